"""The layout of unlabelled images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from expect import begins
from PIL import Image

from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.layouts.images import Images


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for shade, name in enumerate(("a/2.png", "a/deep/1.PNG", "b/2.png", "a/.hidden.png", "a/.git/3.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 2), 10 * shade).save(tmp_path / name, format="PNG")
    (tmp_path / "a/notes.txt").write_text("no image")
    return tmp_path


def test_one_folder(place):
    assert LAYOUTS.get("images", "data") is Images
    data = Images(folder="a", root=str(place))
    assert (
        [data.name(i) for i in range(len(data))] == ["2.png", "deep/1.PNG"]
        and not data.classes
        and not data.faults
    )
    sample = data.read(1)
    assert sample.image.shape == (2, 3, 3) and (sample.image == 10).all()
    assert sample.labels == {}
    for index in (2, -1):
        with pytest.raises(IndexError):
            data.read(index)


def test_several_folders(place, monkeypatch):
    data = Images(folder=["b", "a"], root=str(place))
    assert data.names == ["b/2.png", "a/2.png", "a/deep/1.PNG"]  # in the order given; names tell them apart
    assert [data.read(i).image.max() for i in range(3)] == [20, 0, 10]
    monkeypatch.setenv("SETS", str(place))
    monkeypatch.chdir(place)
    assert Images(folder=["$SETS/b", "a"]).names == data.names


def test_cache(place):
    data = Images(folder="a", root=str(place), cache=str(place / "cache"))
    assert [data.read(1).image.max() for _ in range(2)] == [10, 10] and len(os.listdir(place / "cache")) == 1


def test_what_is_wrong(place):
    with begins("folder", "c' does not exist"):
        Images(folder="c", root=str(place))
    (place / "c").mkdir()
    with begins("folder", "no images", "/c'"):
        Images(folder=["a", "c"], root=str(place))
    for folders in (["a", "a/deep"], ["b", "b"], ["a", "b/../a"]):
        with begins("folder", "two of the folders"):
            Images(folder=folders, root=str(place))
    for none in ([], {}, 5, None):
        with begins("folder", "path or a list of paths"):
            Images(folder=none)
    for none in ("", [3]):
        with begins("folder", "a path is needed"):
            Images(folder=none)
    (place / "a/2.png").write_text("no image")
    with begins("image", "a/2.png", "cannot be decoded"):
        Images(folder="a", root=str(place)).read(0)


@pytest.mark.real_data
def test_photographs(real):
    data = Images(folder=str(real("samples/bdd100k_images_unlabeled")))
    assert len(data) == 5
    for i in range(5):
        image = data.read(i).image
        assert image.shape == (720, 1280, 3) and image.std() > 20
