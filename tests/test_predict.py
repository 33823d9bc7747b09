import json
import shutil

import cv2
import numpy as np
import pytest
import several_tasks
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from multitask_kd import build
from multitask_kd.data.files import decode_mask
from multitask_kd.data.footage import Video, VideoFile, find
from multitask_kd.data.loader import Truth, collate_eval
from multitask_kd.data.transforms import letterbox
from multitask_kd.engine.evaluate import evaluate_checkpoint
from multitask_kd.engine.evaluate import predict as restored
from multitask_kd.engine.networks import open_network
from multitask_kd.engine.predict import names_of, predict
from multitask_kd.errors import UserError
from multitask_kd.tasks.base import build_task


@pytest.fixture(scope="module")
def network(learnt_run):
    return str(learnt_run / "best.pt")


@pytest.fixture(scope="module")
def layout(tiny, tmp_path_factory):
    return build.open_sets(tiny(tmp_path_factory.mktemp("none")), "val", only=("seg", "det"))


@pytest.fixture(scope="module")
def images(layout, tmp_path_factory):
    """The validation set as files, one with a name that is no plain ASCII in a folder of its own."""
    folder = tmp_path_factory.mktemp("images") / "in put"
    names = ["a b.png", "ü'\"<b>.png", "deep/er/c.png", "d.PNG", "e.png"]
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(layout.read(index).image).save(folder / name)
    return folder, names


@pytest.fixture(scope="module")
def written(network, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted") / "new"
    done = predict(network, [str(images[0])], str(out), batch=3, threads=1, device="cpu")
    return out, done


def truth_of(layout, names, listed):
    """The layout's labels as a COCO object over the images of a detections.json."""
    ids = {image["file_name"]: image["id"] for image in listed["images"]}
    rows = []
    for index, name in enumerate(names):
        found = layout.read(index).labels["det"]
        for box, kind, crowd, area in zip(
            found.boxes.tolist(), found.classes, found.crowd, found.area, strict=True
        ):
            x1, y1, x2, y2 = box
            row = {
                "id": len(rows) + 1,
                "image_id": ids[name],
                "category_id": int(kind) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            rows.append({**row, "area": float(area), "iscrowd": int(crowd)})
    coco = COCO()
    coco.dataset = {"images": listed["images"], "categories": listed["categories"], "annotations": rows}
    coco.createIndex()
    return coco


def test_the_json_scores_as_the_evaluation_does(network, images, layout, written, tiny, tmp_path):
    out, done = written
    listed = json.loads((out / "detections.json").read_text(encoding="utf-8"))
    assert sorted(image["file_name"] for image in listed["images"]) == sorted(images[1])
    assert done == {"images": 5, "frames": 0, "boxes": len(listed["annotations"]), "skipped": 0}
    assert [c["name"] for c in listed["categories"]] == list(layout.classes["det"])
    loaded = COCO(str(out / "detections.json"))  # a complete COCO file
    assert loaded.getImgIds() == [1, 2, 3, 4, 5]
    truth = truth_of(layout, images[1], listed)
    evaluation = COCOeval(truth, truth.loadRes(listed["annotations"]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = evaluate_checkpoint(tiny(tmp_path, {"eval.batch_size": 3}), network)["det"]
    assert 100 * evaluation.stats[0] == pytest.approx(expected["mAP"], abs=1e-4) and expected["mAP50"] > 5
    assert 100 * evaluation.stats[1] == pytest.approx(expected["mAP50"], abs=1e-4)
    assert 100 * evaluation.stats[8] == pytest.approx(expected["AR100"], abs=1e-4)


def test_the_masks_are_those_of_the_evaluation(network, images, layout, written, tiny, tmp_path):
    out, _ = written
    one = open_network(network, "x", torch.device("cpu"))
    loader = build.val_loader(tiny(tmp_path, {"eval.batch_size": 5}), layout, one.size, None, one.device)
    (batch, _), *_ = loader
    predictions = restored(one.run, one.tasks, batch.to(one.device, channels_last=True), {})
    listed = json.loads((out / "detections.json").read_text(encoding="utf-8"))
    files = {image["file_name"]: out / image["mask_file"] for image in listed["images"]}
    for name, prediction in zip(images[1], predictions, strict=True):
        mask = decode_mask(str(files[name]))
        expected = prediction["seg"].numpy()
        assert mask.shape == expected.shape == layout.read(0).labels["seg"].shape
        assert (mask == expected).mean() > 0.999  # batches of another size round otherwise
    assert json.loads((out / "settings.json").read_text())["classes"]["seg"] == list(layout.classes["seg"])
    assert len(np.unique(np.stack([decode_mask(str(path)) for path in files.values()]))) > 2


def test_every_image_is_drawn_and_alpha_and_score_matter(network, images, written, tmp_path):
    out, _ = written
    drawn = sorted(path.relative_to(out / "drawn").as_posix() for path in (out / "drawn").rglob("*.jpg"))
    assert (
        drawn == sorted(name.rsplit(".", 1)[0] + ".jpg" for name in images[1])
        and (out / "legend.png").is_file()
    )
    file = images[0] / "e.png"
    predict(network, [str(file)], str(tmp_path / "bare"), alpha=0, score=1, device="cpu", threads=1)
    bare, shown = (np.array(Image.open(path / "drawn/e.jpg"), float) for path in (tmp_path / "bare", out))
    plain = cv2.resize(np.array(Image.open(file)), bare.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(bare - plain).mean() < 6 < np.abs(shown - plain).mean()


def test_sizes_come_back_and_files_of_one_stem_stay_apart(network, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (90, 50, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # a viewer shows it on its side; here it stays as stored
    Image.fromarray(noise).save(folder / "x.jpg", exif=turned)
    Image.fromarray(noise[:31, :41]).save(folder / "x.png")
    predict(network, [str(folder)], str(tmp_path / "out"), draw=False, device="cpu", threads=1, keep=0.0)
    listed = json.loads((tmp_path / "out/detections.json").read_text())["images"]
    sizes = {
        i["file_name"]: (Image.open(tmp_path / "out" / i["mask_file"]).size, i["width"], i["height"])
        for i in listed
    }
    assert sizes == {"x.jpg": ((50, 90), 50, 90), "x.png": ((41, 31), 41, 31)}
    boxes = json.loads((tmp_path / "out/detections.json").read_text())["annotations"]
    limits = {i["id"]: (i["width"], i["height"]) for i in listed}
    assert boxes and not (tmp_path / "out/drawn").exists()
    for row in boxes:
        x, y, w, h = row["bbox"]
        assert (
            x >= 0
            and y >= 0
            and x + w <= limits[row["image_id"]][0] + 1e-3
            and y + h <= limits[row["image_id"]][1] + 1e-3
        )


def test_no_two_images_share_a_mask(network, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = [
        "a.jpeg",
        "a.jpg",
        "a.jpg.png",
    ]  # the second takes its whole name, which is the stem of the third
    for index, name in enumerate(names):
        Image.fromarray(np.full((20 + index, 30, 3), 90, np.uint8)).save(folder / name)
    predict(network, [str(folder)], str(tmp_path / "out"), device="cpu", threads=1)
    listed = json.loads((tmp_path / "out/detections.json").read_text())["images"]
    heights = {i["file_name"]: Image.open(tmp_path / "out" / i["mask_file"]).height for i in listed}
    assert heights == {"a.jpeg": 20, "a.jpg": 21, "a.jpg.png": 22}
    assert len(list((tmp_path / "out/drawn").iterdir())) == 3


def film(path, frames):
    writer = VideoFile(str(path), 10.0)
    for frame in frames:
        writer.add(frame)
    writer.close()


def test_a_video_comes_back_frame_by_frame(network, layout, images, written, tmp_path):
    frames = [cv2.resize(layout.read(i % 5).image, (63, 48)) for i in range(7)]  # an odd width is made even
    film(tmp_path / "clip.mp4", frames)
    read = list(Video(str(tmp_path / "clip.mp4")))
    assert len(read) == 7 and read[0].shape == (48, 64, 3)
    assert (
        np.abs(read[0][:, :63].astype(int) - frames[0]).mean() < 12
    )  # the same picture and the same order of colours
    done = predict(
        network, [str(tmp_path / "clip.mp4")], str(tmp_path / "out"), batch=3, device="cpu", threads=1
    )
    assert (done["images"], done["frames"], done["skipped"]) == (0, 7, 0)
    listed = json.loads((tmp_path / "out/detections.json").read_text())["images"]
    assert [(i["file_name"], i["frame"], i["seconds"]) for i in listed[:2]] == [
        ("clip.mp4/000000.png", 0, 0.0),
        ("clip.mp4/000001.png", 1, 0.1),
    ]
    assert len(list((tmp_path / "out/masks/clip.mp4").glob("*.png"))) == 7
    drawn = Video(str(tmp_path / "out/drawn/clip.mp4"))
    assert drawn.rate == pytest.approx(10) and [frame.shape for frame in drawn] == [(240, 320, 3)] * 7
    predict(
        network, [str(tmp_path / "clip.mp4")], str(tmp_path / "single"), frames=True, device="cpu", threads=1
    )
    assert len(list((tmp_path / "single/drawn/clip.mp4").glob("*.jpg"))) == 7


def test_what_cannot_be_read_is_named_skipped_and_counted(network, images, tool, tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"\x89PNG no more")
    (folder / "bad.mp4").write_bytes(b"no video")
    whole = (images[0] / "e.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    status, out, err = tool(
        "predict", "--checkpoint", network, folder, "--out", tmp_path / "none", "--device", "cpu"
    )
    assert (
        status == 2 and "error: none of the 3 files could be read" in err and not (tmp_path / "none").exists()
    )
    (folder / "good.png").write_bytes(whole)
    caplog.clear()
    status, out, err = tool(
        "predict", "--checkpoint", network, folder, "--out", tmp_path / "out", "--device", "cpu"
    )
    assert (
        status == 0
        and "1 images and 0 frames" in out
        and "3 files could not be read" in out
        and "Traceback" not in err
    )
    assert all(name in caplog.text for name in ("bad.png", "bad.mp4", "cut.png"))


def test_a_folder_that_holds_something_else_is_never_touched(network, images, tmp_path):
    file, options = str(images[0] / "e.png"), {"device": "cpu", "threads": 1, "draw": False}
    other = tmp_path / "labels"
    (other / "masks").mkdir(parents=True)
    (other / "masks/e.png").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds something else than predictions"):
            predict(network, [file], str(other), overwrite=overwrite, **options)
    assert (other / "masks/e.png").read_text() == "mine"
    with pytest.raises(UserError, match="lie in one another"):
        predict(network, [str(images[0])], str(images[0] / "out"), **options)
    out = tmp_path / "out"
    predict(network, [str(images[0])], str(out), **options)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="earlier predictions.*--overwrite"):
        predict(network, [file], str(out), **options)
    predict(network, [file], str(out), overwrite=True, **options)
    assert [path.name for path in (out / "masks").rglob("*.png")] == ["e.png"] and (
        out / "notes.txt"
    ).read_text() == "mine"


def test_only_what_the_settings_list_is_removed(network, images, tmp_path):
    """Without pictures nothing is listed that is called drawn: a folder of that name is somebody else's."""
    file, out, options = str(images[0] / "e.png"), tmp_path / "out", {"device": "cpu", "threads": 1}
    predict(network, [file], str(out), draw=False, **options)
    (out / "drawn").mkdir()
    (out / "drawn/mine.txt").write_text("mine")
    predict(network, [file], str(out), draw=False, overwrite=True, **options)
    with pytest.raises(UserError, match="drawn' is not of earlier predictions; move it"):
        predict(network, [file], str(out), overwrite=True, **options)
    assert (out / "drawn/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("listed", ["none", "outside"])
def test_settings_of_others(network, images, tmp_path, listed):
    """Settings of versions that listed nothing: what those wrote is replaced. Names that lie elsewhere are
    left alone."""
    file, out, options = str(images[0] / "e.png"), tmp_path / "out", {"device": "cpu", "threads": 1}
    predict(network, [file], str(out), **options)
    (out / "masks/old.png").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    settings = json.loads((out / "settings.json").read_text())
    written = settings.pop("written")
    assert sorted(written) == ["detections.json", "drawn", "legend.png", "masks"]
    if listed == "outside":
        settings["written"] = ["../notes.txt", str(tmp_path / "notes.txt"), "..", ".", "", 3, *written]
    (out / "settings.json").write_text(json.dumps(settings))
    predict(network, [file], str(out), overwrite=True, **options)
    assert not (out / "masks/old.png").exists() and (tmp_path / "notes.txt").read_text() == "mine"


# several tasks of a kind


@pytest.fixture(scope="module")
def several(images, tmp_path_factory):
    """The folder of predictions of a network with tasks of every kind, and what its detections.json has."""
    home = tmp_path_factory.mktemp("several")
    several_tasks.write(home / "net.pt")
    names = [images[0] / name for name in ("a b.png", "e.png")]
    done = predict(str(home / "net.pt"), list(map(str, names)), str(home / "out"), device="cpu", threads=1)
    return home / "out", json.loads((home / "out/detections.json").read_text()), done


def restored_by(path, files):
    """By image, by task: what an evaluation would score."""
    one = open_network(str(path), "x", torch.device("cpu"))
    items = []
    for index, file in enumerate(files):
        image, geometry = letterbox(np.array(Image.open(file)), one.size)
        items.append((image, Truth(index, geometry)))
    batch, _ = collate_eval(items)
    return restored(one.run, one.tasks, batch.to(one.device, channels_last=True), {})


def test_every_kind_writes_what_it_has(several, images):
    out, listed, done = several
    written = json.loads((out / "settings.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == sorted([*written["written"], "settings.json"])
    assert set(written["written"]) == {"masks", "lane", "distance", "drawn", "detections.json", "legend.png"}
    assert written["kinds"] == {name: part["kind"] for name, part in several_tasks.TASKS.items()}
    assert written["classes"]["weather"] == ["dry", "rain"] and "distance" not in written["classes"]
    expected = restored_by(out.parent / "net.pt", [images[0] / name for name in ("a b.png", "e.png")])
    for entry, predictions in zip(listed["images"], expected, strict=True):
        height, width = entry["height"], entry["width"]
        for task, key in (("seg", "mask_file"), ("lane", "lane_file")):
            mask = decode_mask(str(out / entry[key]))
            assert mask.shape == (height, width) and (mask == predictions[task].numpy()).mean() > 0.999
        metres = cv2.imread(str(out / entry["distance_file"]), cv2.IMREAD_UNCHANGED)
        assert (
            metres.dtype == np.uint16 and np.abs(metres / 256 - predictions["distance"].numpy()).max() < 0.01
        )
        assert entry["weather"]["class"] == ["dry", "rain"][int(predictions["weather"].argmax())]
        assert entry["weather"]["score"] == pytest.approx(float(predictions["weather"].max()), abs=1e-5)
        assert entry["lane_file"].startswith("lane/") and entry["distance_file"].startswith("distance/")
    assert done["boxes"] == len(listed["annotations"]) and len(list((out / "drawn").iterdir())) == 2


def test_the_classes_of_several_detectors_follow_one_another(several, images):
    out, listed, _ = several
    assert listed["categories"] == [
        {"id": 1, "name": "car", "supercategory": "det"},
        {"id": 2, "name": "person", "supercategory": "det"},
        {"id": 3, "name": "stop", "supercategory": "sign"},
        {"id": 4, "name": "go", "supercategory": "sign"},
        {"id": 5, "name": "turn", "supercategory": "sign"},
    ]
    expected = restored_by(out.parent / "net.pt", [images[0] / name for name in ("a b.png", "e.png")])
    for entry, predictions in zip(listed["images"], expected, strict=True):
        rows = [row for row in listed["annotations"] if row["image_id"] == entry["id"]]
        for first, last, task in ((1, 2, "det"), (3, 5, "sign")):
            own = [row for row in rows if first <= row["category_id"] <= last]
            assert [row["category_id"] - first for row in own] == predictions[task].classes.tolist() and own
            scores = predictions[task].scores.tolist()
            assert [row["score"] for row in own] == pytest.approx(scores, abs=1e-5)
    assert COCO(str(out / "detections.json")).getCatIds() == [1, 2, 3, 4, 5]


def test_names_of_tasks_take_no_files_of_others():
    """Folders that differ also where upper and lower case are one; keys that no image's entry has already."""
    kinds = {
        name: "semantic"
        for name in ("seg", "drawn", "masks", "Lane", "lane", "mask", "a/b", "..", "settings.json")
    }
    kinds |= {"id": "classification", "mask_file": "classification", "legend.png": "depth", "лес": "depth"}
    tasks = {name: build_task(name, kind, ["a", "b"], (4,)) for name, kind in kinds.items()}
    found = names_of(tasks)
    folders = {name: one.folder for name, one in found.items()}
    assert folders == {
        **{
            "seg": "masks",
            "drawn": "drawn_2",
            "masks": "masks_2",
            "Lane": "Lane",
            "lane": "lane_2",
            "mask": "mask",
        },
        **{"a/b": "a_b", "..": "__", "settings.json": "settings_json", "id": "id", "mask_file": "mask_file"},
        **{"legend.png": "legend_png", "лес": "лес"},
    }
    assert found["seg"].file_key == "mask_file" and found["mask"].file_key == "mask_file_2"
    assert (found["id"].value_key, found["mask_file"].value_key) == ("id_2", "mask_file_3")
    keys = [key for one in found.values() for key in one[1:]]
    assert len(keys) == len(set(keys)) and not set(keys) & {"id", "file_name", "width", "height"}


def test_tasks_called_like_the_files_lose_nothing(images, tmp_path):
    """drawn and masks are tasks here; a run over it removes their folders and keeps what somebody put beside
    them."""
    parts = {"drawn": "lane", "masks": "distance", "id": "weather", "det": "det"}
    several_tasks.write(tmp_path / "net.pt", {name: several_tasks.TASKS[of] for name, of in parts.items()})
    file, out, options = str(images[0] / "e.png"), tmp_path / "out", {"device": "cpu", "threads": 1}
    for overwrite in (False, True):
        predict(str(tmp_path / "net.pt"), [file], str(out), overwrite=overwrite, **options)
        (entry,) = json.loads((out / "detections.json").read_text())["images"]
        assert (entry["id"], entry["drawn_file"], entry["masks_file"]) == (
            1,
            "drawn_2/e.png",
            "masks_2/e.png",
        )
        assert entry["id_2"]["class"] in ("dry", "rain") and "mask_file" not in entry
        assert (
            (out / "drawn/e.jpg").is_file()
            and (out / "drawn_2/e.png").is_file()
            and not (out / "masks").exists()
        )
        (out / "masks_2/stray.png").write_text("replaced")
        shutil.copy(out / "drawn/e.jpg", out / "kept.jpg")
    assert (out / "kept.jpg").is_file()
    (out / "lane").mkdir()  # somebody's, beside predictions of a network that has no such task
    several_tasks.write(tmp_path / "lane.pt", {"lane": several_tasks.TASKS["lane"]})
    with pytest.raises(UserError, match="lane' is not of earlier predictions"):
        predict(str(tmp_path / "lane.pt"), [file], str(out), overwrite=True, **options)
    assert (out / "lane").is_dir() and not list((out / "lane").iterdir()) and (out / "kept.jpg").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{image}", "--checkpoint", "none.pt"], "--checkpoint: there is no checkpoint none.pt"),
        (["none.png"], "'none.png' does not exist"),
        (["{image}", "--score", "3"], "--score: 3.0 is not in [0, 1]"),
        (["{image}", "--batch", "0"], "--batch: needs a number from 1"),
        (["{image}", "--out", "{image}"], "is a file; name a folder"),
        (["{empty}"], "there are no images or videos"),
    ],
)
def test_faults_are_told_in_a_line(network, images, tool, tmp_path, arguments, message):
    places = {"image": str(images[0] / "e.png"), "empty": str(tmp_path)}
    given = [
        "--out",
        str(tmp_path / "out"),
        "--checkpoint",
        network,
        *(text.format(**places) for text in arguments),
    ]
    status, _, err = tool("predict", *given)
    assert status == 2 and "error: " in err and message in err and "Traceback" not in err


def test_inputs_are_called_by_their_path_from_where_all_of_them_lie(tmp_path):
    for name in ("a/x.jpg", "b/x.jpg", "b/v.MOV", "b/.hidden.jpg", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find([str(tmp_path / "a/x.jpg"), str(tmp_path / "b"), str(tmp_path / "b/x.jpg")])
    assert [(i.name, i.video) for i in found] == [("a/x.jpg", False), ("b/v.MOV", True), ("b/x.jpg", False)]
    assert [i.name for i in find([str(tmp_path / "a/x.jpg")])] == ["x.jpg"]
