import csv
import io
import json

import numpy as np
import pytest
import torch
import yaml

from multitask_kd import config as configs
from multitask_kd.cli import given
from multitask_kd.engine import compare as comparing
from multitask_kd.engine import cost
from multitask_kd.engine.networks import open_network
from multitask_kd.engine.train import train
from multitask_kd.metrics.detection_counts import Matches, match
from multitask_kd.metrics.mean_ap import MeanAP
from multitask_kd.report.comparison import pareto, rows, text

CPU = torch.device("cpu")


def boxes(*given):
    return np.array(given, np.float32).reshape(-1, 4)


@pytest.fixture
def gathered():
    """Two classes, two images. Of class a two objects and a crowd, of b one object."""
    metric = MeanAP(("a", "b"))
    truth = (
        boxes((0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 90, 90)),
        [0, 0, 0],
        [False, False, True],
        [100, 100, 1600],
    )
    found = (
        boxes((0, 0, 10, 10), (0, 0, 10, 9), (20, 0, 30, 4), (60, 60, 80, 80)),
        [
            0.9,
            0.8,
            0.7,
            0.95,
        ],  # right; a second one on the same object; IoU .4; inside the crowd, so not counted
        [0, 0, 0, 0],
    )
    metric.update(0, (100, 100), found, truth)
    metric.update(
        1, (100, 100), (boxes((0, 0, 8, 8)), [0.6], [1]), (boxes((0, 0, 8, 10)), [1], [False], [80])
    )
    return metric


def test_precision_recall_and_f1_by_hand(gathered):
    matches = match(gathered)
    assert sorted(zip(matches.scores, matches.right, matches.labels, strict=True)) == [
        (pytest.approx(0.6), True, 1), (pytest.approx(0.7), False, 0), (pytest.approx(0.8), False, 0), (pytest.approx(0.9), True, 0)
    ]  # fmt: skip
    assert matches.truths.tolist() == [2, 1]
    everything = matches.at(0.01)
    assert (everything["right"], everything["wrong"], everything["missed"]) == (2, 2, 1)
    assert everything["precision"] == 50 and everything["recall"] == pytest.approx(200 / 3)
    assert everything["F1"] == pytest.approx(100 * 2 * 2 / (2 + 2 + 3))  # 2 TP / (detections + objects)
    a, b = (everything["classes"][name] for name in "ab")
    assert a["precision"] == pytest.approx(100 / 3) and a["recall"] == 50 and a["F1"] == pytest.approx(40)
    assert b["precision"] == b["recall"] == b["F1"] == 100
    sure = matches.at(0.85)
    assert (
        sure["precision"] == 100
        and sure["recall"] == pytest.approx(100 / 3)
        and sure["classes"]["b"]["precision"] is None
    )
    assert sure["classes"]["b"]["recall"] == 0 and sure["classes"]["b"]["F1"] == 0


def test_the_best_confidence_is_that_of_the_highest_f1(gathered):
    # F1 from .9 on: 2*1/(1+3) = .5; from .8: 2/5; from .7: 2/6; from .6: 4/7
    matches = match(gathered)
    assert matches.best_confidence() == 0.6
    assert matches.at(0.6)["F1"] == pytest.approx(100 * 4 / 7)
    one = Matches(
        ("a",),
        np.array([0.9, 0.7312, 0.7298]),
        np.array([True, True, False]),
        np.zeros(3, int),
        np.array([2]),
    )
    assert one.best_confidence() == 0.73 and one.at(0.73)["F1"] == 100
    tied = Matches(("a",), np.array([0.5, 0.5]), np.array([True, False]), np.zeros(2, int), np.array([1]))
    assert tied.at(tied.best_confidence())["F1"] == pytest.approx(100 * 2 / 3)  # a score is taken as a whole


def test_nothing_to_divide_by_is_none():
    empty = Matches(("a",), np.zeros(0), np.zeros(0, bool), np.zeros(0, int), np.array([0]))
    figures = empty.at(0.5)
    assert (
        figures["precision"] is figures["recall"] is figures["F1"] is None and empty.best_confidence() is None
    )
    assert match(MeanAP(("a",))).best_confidence() is None


def test_figures_at_a_confidence_and_at_the_best_one(gathered):
    # F1 is highest from .6 on (4/7); from .85 on one of three objects is found, and nothing else
    found = match(gathered).figures(0.85)
    assert (found["precision"], found["confidence"], found["best_confidence"]) == (100, 0.85, 0.6)
    assert found["F1"] == pytest.approx(50) and found["best_F1"] == pytest.approx(400 / 7)
    best = match(gathered).figures(None)
    assert best["F1"] == best["best_F1"] and best["confidence"] == 0.6 and list(best["classes"]) == ["a", "b"]
    nothing = match(MeanAP(("a",))).figures(None)
    assert set(nothing.values()) == {None} and {"precision", "best_F1"} <= set(nothing)


def test_what_is_matched_agrees_with_the_average_precision(learnt_run, tiny):
    """pycocotools' own recall at IoU .5 is ours at confidence 0."""
    metric = MeanAP(("a",), backend="pycocotools")
    generator = np.random.default_rng(0)
    for image in range(20):
        corner = generator.uniform(0, 60, (5, 2))
        truth = np.concatenate([corner, corner + generator.uniform(8, 30, (5, 2))], 1).astype(np.float32)
        moved = truth + generator.normal(0, 3, truth.shape).astype(np.float32)
        metric.update(
            image,
            (100, 100),
            (moved, generator.uniform(0, 1, 5), [0] * 5),
            (truth, [0] * 5, [False] * 5, [100] * 5),
        )
    _, recall = metric._evaluate()
    found = match(metric).at(0)
    assert found["recall"] == pytest.approx(100 * recall[0, 0, 0, -1]) and 0 < found["recall"] < 100


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["r/kl/best.pt", "r/cwd/best.pt"], ["kl", "cwd"]),
        (["r/kl/seed0/best.pt", "r/kl/seed1/best.pt"], ["seed0", "seed1"]),
        (["r/a.pt", "r/a.onnx"], ["a.pt", "a.onnx"]),
        (["r/teacher/best.pt", "r/kl/seed0/best.pt"], ["teacher", "kl/seed0"]),
        (["r/best.pt", "r/b/best.pt"], ["r", "b"]),
        (["runs/demo/teacher/best.pt"], ["teacher"]),
        (["x.onnx"], ["x"]),
        (["r/a/best.pt"] * 2, ["a", "a (2)"]),
        (["r/a/best.pt", "r/b/best.pt", "./r/a/best.pt"], ["a", "b", "a (2)"]),
        (["r/\udcff.pt", "r/b.pt"], ["\ufffd.pt", "b.pt"]),
        (
            ["/t/runs/demo/teacher/best.pt", "w/di/best.pt", "/t/runs/demo/alone/best.pt"],
            ["teacher", "di", "alone"],
        ),
        (
            ["/t/runs/teacher/best.pt", "w/di/best.pt", "w/net.onnx"],
            ["teacher/best.pt", "di/best.pt", "net.onnx"],
        ),
        (["/t/teacher/best.pt", "w/teacher/best.pt"], ["t", "w"]),
    ],
)
def test_names_are_what_tells_the_paths_apart(paths, names):
    assert comparing.distinct_names(paths) == names


def test_files_and_overrides_may_be_mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.pt").touch()
    assert given(["a.pt", "run.threads=1", "lr=1.pt", "runs/x=2/b.pt"]) == (
        ["a.pt", "lr=1.pt", "runs/x=2/b.pt"],
        ["run.threads=1"],
    )


def test_the_front_holds_what_nothing_beats_in_both():
    assert pareto([(3, 50), (1, 40), (2, 40), (2, 45), (4, 49), (3, 50)]) == [1, 3, 0]
    assert pareto([]) == []


def test_flops_are_those_of_a_convolution_by_hand(learnt_run):
    network = open_network(str(learnt_run / "best.pt"), "x", CPU)
    net = torch.nn.Conv2d(3, 8, 3, padding=1)
    alone = type(network)("p", "checkpoint", net, {}, (16, 16), {}, 224, CPU)
    assert cost.flops(alone) == 2 * 16 * 16 * 8 * 3 * 3 * 3  # a multiply-add is two
    exported = type(network)(
        "p", "onnx", lambda images: None, {}, network.size, network.arch, network.parameters, CPU
    )
    assert cost.flops(exported) == cost.flops(network) > 10**6
    other = type(network)(
        "p", "onnx", lambda images: None, {}, network.size, network.arch, network.parameters + 1, CPU
    )
    assert cost.flops(other) is None


def test_memory_is_at_least_the_weights(learnt_run):
    taken = cost.peak_memory(str(learnt_run / "best.pt"), device=CPU, threads=1, channels_last=True)
    weights = open_network(str(learnt_run / "best.pt"), "x", CPU).parameters * 4 / 2**20
    assert weights < taken < weights + 400


def test_memory_that_cannot_be_measured_is_none_and_told(monkeypatch, caplog):
    monkeypatch.setattr(cost.sys, "executable", "/bin/false")
    assert cost.peak_memory("x.pt", device=CPU, threads=1, channels_last=True) is None
    assert "the memory of x.pt could not be measured" in caplog.text


@pytest.fixture(scope="module")
def compared(learnt_run, teacher_run, raw, tmp_path_factory):
    """What the tool writes of two networks."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "cfg.yaml").write_text(yaml.safe_dump(raw(folder / "none")), encoding="utf-8")
    return folder, [str(learnt_run / "best.pt"), str(teacher_run / "best.pt")]


def test_the_figures_are_those_of_eval_and_the_files_agree(compared, tool, monkeypatch):
    folder, files = compared
    monkeypatch.setattr(comparing, "peak_memory", lambda *args, **options: 12.5)
    arguments = [
        "--config",
        folder / "cfg.yaml",
        "--batch",
        2,
        "--runs",
        2,
        "--pictures",
        1,
        "eval.batch_size=2",
    ]
    written = {kind: folder / f"deep/{kind}.{kind}" for kind in ("csv", "json", "html")}
    options = [part for kind, path in written.items() for part in (f"--{kind}", path)]
    status, out, err = tool("compare", *files, *arguments, *options, "--names", "learnt", "other")
    assert status == 0 and "Traceback" not in err and "index created" not in out
    results = json.loads(written["json"].read_text(encoding="utf-8"))
    for file, network in zip(files, results["networks"], strict=True):
        tool(
            "eval",
            "--config",
            folder / "cfg.yaml",
            "--checkpoint",
            file,
            "--json",
            folder / "eval.json",
            "eval.batch_size=2",
        )
        expected = json.loads((folder / "eval.json").read_text())
        assert {"images": network["images"], "skipped": network["skipped"], **network["figures"]} == expected
    learnt = results["networks"][0]
    figures, counts = learnt["figures"], learnt["more"]["det"]
    assert figures["det"]["mAP50"] > 5 and counts["F1"] == counts["best_F1"]
    assert counts["right"] + counts["missed"] == sum(
        c["right"] + c["missed"] for c in counts["classes"].values()
    )
    lines = list(csv.DictReader(io.StringIO(written["csv"].read_text(encoding="utf-8"))))
    assert [line["network"] for line in lines] == ["learnt", "other"]
    assert list(lines[0])[:15] == [
        *("network", "path", "kind", "weights", "input", "parameters_m", "gmacs", "file_mb", "memory_mb"),
        *("ms", "ms_p10", "ms_p90", "ms_batch", "mIoU", "mAP"),
    ]
    assert list(lines[0])[15:20] == ["mAP50", "precision", "recall", "F1", "confidence"]
    assert float(lines[0]["mIoU"]) == figures["seg"]["mIoU"] and float(lines[0]["F1"]) == counts["F1"]
    assert (
        float(lines[0]["ms"]) == learnt["latency_ms"]["1"]["median"] and float(lines[0]["memory_mb"]) == 12.5
    )
    assert float(lines[0]["IoU/car"]) == figures["seg"]["IoU"]["car"]
    assert float(lines[0]["AP/car"]) == figures["det"]["AP"]["car"]
    assert {"precision/car", "recall/car", "F1/car"} <= set(lines[0])
    page = written["html"].read_text(encoding="utf-8")
    for row in rows(results):
        for key in ("mIoU", "ms", "mAP", "parameters_m"):
            assert row[key] is None or f'data-value="{row[key]!r}"' in page
    assert text(results) in out and "highest; it was chosen on these same images" in " ".join(out.split())
    assert (
        f"{figures['seg']['mIoU']:.1f}" in out
        and results["threads"] == 1
        and "--runs 2" in results["command"]
    )


def test_a_confidence_and_a_number_of_images(compared, tiny, monkeypatch):
    folder, files = compared
    monkeypatch.setattr(comparing, "peak_memory", lambda *args, **options: None)
    results = comparing.compare(tiny(folder / "x"), files[:1], confidence=0.2, images=3, batch=1, runs=1)
    (network,) = results["networks"]
    assert results["data"] == {"images": 3, "skipped": 0, "of": 5}
    counts = network["more"]["det"]
    assert counts["confidence"] == 0.2 and counts["best_F1"] >= counts["F1"]
    said = text(results)
    assert (
        "3 of 5 images" in said
        and "best F1" in said
        and "a confidence of 0.2" in said
        and "memory MB" not in said
    )


def test_networks_of_other_tasks_side_by_side(compared, raw, tool, monkeypatch):
    """A segmenting detector, and a network with two other masks, an attribute and depth."""
    folder, files = compared
    monkeypatch.setattr(comparing, "peak_memory", lambda *args, **options: 12.5)
    kinds = {"lane": "semantic", "drivable": "semantic", "weather": "classification", "depth": "depth"}
    plain = raw(folder / "driving", {"train.steps": 1, "eval.pictures": 0})
    plain["tasks"] = {name: {"kind": kind} for name, kind in kinds.items()}
    train(configs.parse(plain, "driving.yaml"))
    plain["tasks"] |= {"seg": {}, "det": {}}
    (folder / "all.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    paths = {ending: folder / f"all.{ending}" for ending in ("csv", "json", "html")}
    options = [part for kind, path in paths.items() for part in (f"--{kind}", path)]
    given = [files[0], folder / "driving/best.pt", "--names", "both", "driving", "--runs", 1, "--pictures", 1]
    status, out, err = tool("compare", *given, "--config", folder / "all.yaml", *options)
    assert status == 0, err
    one, other = csv.DictReader(io.StringIO(paths["csv"].read_text(encoding="utf-8")))
    mine = {"mIoU", "mAP", "mAP50"}
    theirs = {"lane mIoU", "drivable mIoU", "top1", "delta1", "AbsRel"}
    assert all(one[key] and not other[key] for key in mine) and all(
        other[key] and not one[key] for key in theirs
    )
    results = json.loads(paths["json"].read_text(encoding="utf-8"))
    figures = results["networks"][1]["figures"]
    assert (
        float(other["lane mIoU"]) == figures["lane"]["mIoU"]
        and float(other["AbsRel"]) == figures["depth"]["AbsRel"]
    )
    assert text(results) in out and "lane IoU by class" in out and "weather accuracy by class" in out
    page = paths["html"].read_text(encoding="utf-8")
    assert page.count("<img ") == 3 and page.count('<svg class="plot"') == 3 * 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no network was given"),
        (["{file}", "--names", "a", "b"], "--names: 2 names for 1 files"),
        (["{file}", "{file}", "--names", "a", "a"], "--names: two names are the same"),
        (["{file}", "--confidence", "2"], "--confidence: 2.0 is not"),
        (["{file}", "--runs", "0"], "--runs: needs a number from 1"),
        (["{file}", "--html", "."], "--html: . is a folder"),
        (["{file}", "--csv", "x", "--json", "x"], "--csv and --json: both name x"),
        (["nowhere/best.pt"], "nowhere/best.pt"),
        (["{file}", "run.thraeds=1"], "did you mean 'threads'?"),
    ],
)
def test_faults_are_told_in_a_line(compared, tool, arguments, said):
    folder, files = compared
    arguments = [text.format(file=files[0]) for text in arguments] or ["run.threads=1"]
    status, out, err = tool("compare", "--config", folder / "cfg.yaml", *arguments)
    assert status == 2 and "error: " in err and said in err and "Traceback" not in err
