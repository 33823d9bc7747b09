"""The layout of one folder of images a class."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from expect import begins
from PIL import Image

from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.layouts.folders import Folders


def image(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (3, 2), shade).save(path, format="PNG")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two images of rain, one of them deeper, and one of snow; fog is empty."""
    image(tmp_path / "set/rain/2.png", 10)
    image(tmp_path / "set/rain/old/1.PNG", 20)
    image(tmp_path / "set/snow/1.png", 30)
    image(tmp_path / "set/.trash/1.png")
    image(tmp_path / "set/rain/.hidden.png")
    (tmp_path / "set/fog").mkdir()
    (tmp_path / "set/notes.txt").write_text("no image")
    return tmp_path


def opened(place: Path, **options) -> Folders:
    return Folders(**{"folder": "set", "root": str(place)} | options)


def test_registered_with_its_options():
    assert LAYOUTS.get("folders", "data") is Folders
    LAYOUTS.check(
        "folders", {"folder": "a", "label": "weather", "class_folders": ["a"], "cache": "c"}, "data"
    )
    with begins("data", "needs folder"):
        LAYOUTS.check("folders", {}, "data")
    with begins("data.label", "a text"):
        LAYOUTS.check("folders", {"folder": "a", "label": 3}, "data")


def test_every_image_has_the_class_of_its_folder(place):
    data = opened(place)
    assert data.classes == {"class": ("fog", "rain", "snow")} and data.kinds == {"class": "classification"}
    assert [data.name(i) for i in range(len(data))] == ["rain/2.png", "rain/old/1.PNG", "snow/1.png"]
    samples = [pickle.loads(pickle.dumps(data)).read(i) for i in range(3)]
    assert [sample.labels for sample in samples] == [{"class": 1}, {"class": 1}, {"class": 2}]
    assert type(samples[0].labels["class"]) is int
    assert [int(sample.image.max()) for sample in samples] == [10, 20, 30]
    assert samples[0].image.shape == (2, 3, 3)
    assert data.seen["class"].tolist() == [0, 2, 1] and not data.faults  # fog never occurs
    for index in (3, -1):
        with pytest.raises(IndexError):
            data.read(index)


def test_the_label_has_a_name_and_may_be_unwanted(place):
    data = opened(place, label="weather")
    assert list(data.classes) == list(data.seen) == ["weather"] and data.read(2).labels == {"weather": 2}
    data.wanted = frozenset({"seg"})
    assert data.read(2).labels == {}
    with begins("label", "a name is needed"):
        opened(place, label="")


def test_classes_chosen_and_merged(place):
    data = opened(place, class_folders=["snow", "fog"])
    assert data.classes["class"] == ("snow", "fog") and data.names == ["snow/1.png"]
    assert data.read(0).labels == {"class": 0} and data.seen["class"].tolist() == [1, 0]
    assert data.faults == {"images in folders that `class_folders` does not name (left out)": 2}
    data = opened(place, class_folders={"wet": ["snow", "rain"], "grey": "fog"})
    assert data.classes["class"] == ("wet", "grey")
    assert data.seen["class"].tolist() == [3, 0] and not data.faults
    (place / "names.json").write_text(json.dumps({"dry": "fog", "wet": ["rain"]}))
    data = opened(place, class_folders="names.json")
    assert data.classes["class"] == ("dry", "wet")
    assert [data.read(i).labels["class"] for i in range(2)] == [1, 1]


def test_cache(place, monkeypatch):
    data = opened(place, cache=str(place / "cache"))
    first = data.read(0).image
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail(f"{path} was decoded again"))
    assert np.array_equal(data.read(0).image, first) and len(os.listdir(place / "cache")) == 1
    for inside in (place / "set/cache", place / "set", place / "set/../set/rain"):
        with begins("cache", "whose folders are classes"):
            opened(place, cache=str(inside))
    assert len(opened(place, cache=str(place / "set2"))) == 3
    assert not (place / "set/cache").exists()


def test_what_is_wrong(place, monkeypatch):
    with begins("folder", "none' does not exist"):
        opened(place, folder="none")
    with begins("folder", "no images", "fog'"):
        opened(place, folder="set/fog")
    with begins("class_folders", "no folder of images is called 'rian'", "did you mean 'rain'"):
        opened(place, class_folders=["rian"])
    with begins("class_folders", "'rain' is there twice"):
        opened(place, class_folders={"a": "rain", "b": ["rain"]})
    with begins("class_folders", "list of class names"):
        opened(place, class_folders=[])
    with begins("class_folders", "no images are in the folders fog"):
        opened(place, class_folders=["fog"])
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    with begins("folder", "NO_SUCH_PLACE"):
        opened(place, folder="$NO_SUCH_PLACE/set")
    (place / "set/snow/1.png").write_text("no image")
    with begins("image", "snow/1.png", "cannot be decoded"):
        opened(place).read(2)


def test_images_in_no_folder_of_a_class(place):
    image(place / "set/loose.png")
    image(place / "set/loose_too.png")
    with begins("folder", "'loose.png' lies in", "images like it: 2", "layout `images`"):
        opened(place)
    with begins("folder", "'loose.png'"):
        opened(place, class_folders=["snow"])
