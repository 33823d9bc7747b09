import os

import pytest
import torch

from multitask_kd import build, checkpoint
from multitask_kd.build import teacher as build_teacher
from multitask_kd.config import Config
from multitask_kd.data.base import LAYOUTS, Layout
from multitask_kd.data.scenes import cache as scenes_cache
from multitask_kd.engine.run import build_run
from multitask_kd.engine.train import _require_outside, train
from multitask_kd.errors import UserError
from multitask_kd.models import backbones
from multitask_kd.models.multitask import reads_encoder
from multitask_kd.precision import resolve_device
from multitask_kd.tasks.base import DEFAULT_KINDS, KINDS, build_task


@pytest.fixture
def no_data(monkeypatch):
    """Reading any data is a failure."""

    def ensure(*args):
        raise AssertionError("data was read")

    monkeypatch.setattr(scenes_cache, "ensure", ensure)


def recipe(config):
    return build_run(build.resolve_init(config))


@pytest.fixture
def fault(tiny, tmp_path):
    """fault({"train.steps": 3}) -> what building the run says of it."""

    def said(changes):
        with pytest.raises(UserError) as error:
            recipe(tiny(tmp_path / "run", changes))
        return str(error.value)

    return said


class Named(Layout):
    """Two blank images with the classes that the options give; nothing is read."""

    def __init__(self, *, seg=("a", "b"), det=("x", "y"), count=2):
        super().__init__()
        for name, names in (("seg", seg), ("det", det)):
            if names:
                self.add_label(name, DEFAULT_KINDS[name], names)
        self.count = count

    def __len__(self):
        return self.count


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setitem(LAYOUTS._entries, "named", Named)


DET_MSE = {"loss": "det_mse"}


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        (
            {"data.train.layout": "scense"},
            "data.train: ",
            "unknown data layout 'scense'; did you mean 'scenes'?",
        ),
        ({"data.val.layout": "cocoo"}, "data.val: ", "did you mean 'coco'?"),
        ({"data.train.sizes": [48, 64]}, "data.train.sizes: ", "no such option; did you mean 'size'?"),
        ({"data.val.cuont": 3}, "data.val.cuont: ", "did you mean 'count'?"),
        ({"data.val.seed": "few"}, "data.val.seed: ", "needs a whole number, not 'few'"),
        (
            {"tasks.sge": {}},
            "tasks.sge: ",
            "needs kind; known: classification, depth, detection, semantic (only tasks called seg and det "
            "need ",
        ),
        ({"tasks.det.head.dpeth": 1}, "tasks.det.head.dpeth: ", "no such option; did you mean 'depth'?"),
        ({"tasks.det.head.depth": "two"}, "tasks.det.head.depth: ", "needs a whole number, not 'two'"),
        (
            {"tasks.det.head.strides": [8, 64]},
            "tasks.det.head: ",
            "strides: the pyramid has no stride 64; it has [4, 8, 16]",
        ),
        ({"tasks.det.head.prior": 1.5}, "tasks.det.head: ", "prior"),
        ({"tasks.seg.hard.smoothing": 0.1}, "tasks.seg.hard.smoothing: ", "did you mean 'label_smoothing'?"),
        ({"tasks.seg.hard.label_smoothing": 1}, "tasks.seg.hard: ", "label_smoothing: 1 is not in [0, 1)"),
        ({"tasks.seg.hard.resolution": "full"}, "tasks.seg.hard: ", "'full' is neither 'head' nor 'image'"),
        (
            {"tasks.det.decode.max_detections": -1},
            "tasks.det.decode: ",
            "max_detections: -1 is not at least 1",
        ),
        ({"tasks.det.decode.nms_iou": 1.5}, "tasks.det.decode: ", "nms_iou: 1.5 is not in [0, 1]"),
        ({"tasks.det.hard.box": -1}, "tasks.det.hard: ", "box: -1 is no weight"),
        ({"tasks.seg.head.depth": -1}, "tasks.seg.head: ", "depth: -1 is below 0"),
        ({"tasks.det.hard.box": "big"}, "tasks.det.hard.box: ", "needs a number, not 'big'"),
        ({"tasks.det.decode.nms_ious": 0.5}, "tasks.det.decode.nms_ious: ", "did you mean 'nms_iou'?"),
        (
            {"tasks.det.decode.score_threshold": "low"},
            "tasks.det.decode.score_threshold: ",
            "needs a number, not 'low'",
        ),
        ({"tasks.seg.decode.score_threshold": 0.1}, "tasks.seg.decode.score_threshold: ", "no such option"),
        (
            {"tasks.seg.soft": {"loss": "kll"}},
            "tasks.seg.soft.loss: ",
            "unknown soft loss 'kll'; did you mean 'kl'?",
        ),
        (
            {"tasks.seg.soft": DET_MSE},
            "tasks.seg.soft.loss: ",
            "'det_mse' does not fit this task; known: cwd, feature_mse",
        ),
        (
            {"tasks.det.soft": DET_MSE | {"options": {"from": "raw"}}},
            "tasks.det.soft.options.from: ",
            "did you mean 'form'?",
        ),
        (
            {"tasks.det.soft": DET_MSE | {"options": {"form": "rwa"}}},
            "tasks.det.soft.options: ",
            "'rwa' is none of raw, ",
        ),
        (
            {"tasks.seg.soft": {"loss": "kl", "options": {"temperature": 0}}},
            "tasks.seg.soft.options: ",
            "0 is not above 0",
        ),
        (
            {"model.encoder": "tu-test_resnt"},
            "model.encoder: ",
            "unknown encoder 'tu-test_resnt'; did you mean 'tu-test_resnet'?",
        ),
        ({"model.encoder": "resnet18x"}, "model.encoder: ", "did you mean 'resnet18'?"),
        ({"run.device": "gpu"}, "run.device: ", "'gpu' is none of auto, cpu, cuda, cuda:N"),
        (
            {"run.device": "cuda:99"},
            "run.device: ",
            f"cuda:99 is not there; this machine has {torch.cuda.device_count()} CUDA",
        ),
        ({"train.amp": "fp16"}, "train.amp: ", "fp16 needs a CUDA device"),
    ],
)
def test_a_wrong_name_or_value_is_told_before_data_is_read(no_data, fault, changes, where, said):
    message = fault(changes)
    assert message.startswith(where) and said in message


def test_a_layout_without_a_name_or_with_missing_options(no_data, raw, tmp_path):
    plain = raw(tmp_path / "run")
    for wrong in ({}, {"layout": None}, {"layout": ["scenes"]}):
        plain["data"]["val"] = wrong
        with pytest.raises(UserError, match="data.val: needs layout; known: .*coco, .*scenes"):
            build.check(Config.model_validate(plain))
    plain["data"]["val"] = {"layout": "scenes", "split": "val"}
    with pytest.raises(UserError, match="data.val: needs count"):
        build.check(Config.model_validate(plain))


def test_a_value_that_only_the_layout_knows_names_its_place(fault):
    assert (
        fault({"data.train.split": "trian"})
        == "data.train.split: unknown split 'trian'; did you mean 'train'?"
    )
    assert fault({"data.val.count": "few"}).startswith("data.val.count: 'few' is not a number of scenes")
    assert fault({"data.val.size": [8, 8]}).startswith("data.val.size: [8, 8] cannot be drawn")


def test_a_sound_config_builds(tiny, tmp_path):
    run = recipe(tiny(tmp_path / "run"))
    assert run.teachers is None and list(run.tasks) == ["seg", "det"]
    assert run.distiller.loss_names() == [
        "seg.hard.ce",
        "det.hard.box",
        "det.hard.objectness",
        "det.hard.class",
    ]
    assert run.objective.weights_at(0.0)["seg.hard.ce"] == 2.0
    assert run.arch["tasks"]["det"]["head"] == {"strides": [8, 16], "depth": 1}
    assert not (tmp_path / "run").exists()


def test_soft_losses_and_weights_of_a_distilled_run(tiny, tmp_path, distilled):
    weights = recipe(tiny(tmp_path / "run", distilled)).objective.weights_at(0.0)
    assert weights == {
        "seg.hard.ce": 2 * 0.5, "seg.soft.kl": 2 * 0.5,
        "det.hard.box": 0.75 * 5, "det.hard.objectness": 0.75, "det.hard.class": 0.75, "det.soft.det_mse": 0.25 * 3,
    }  # fmt: skip


def test_one_seed_gives_the_student_one_start_with_and_without_teacher(
    tiny, tmp_path, distilled, same_weights
):
    starts = []
    for changes in ({}, distilled):
        checkpoint.seed_everything(3)
        starts.append(recipe(tiny(tmp_path / "run", changes)).student.state_dict())
    same_weights(*starts)


def test_more_labels_than_images(fault):
    message = fault({"data.labelled": 13, "data.unlabelled": False})
    assert message.startswith("data.labelled: 13 ") and "the training set has 12" in message


def test_a_share_without_a_slot_for_unlabelled_images(fault, distilled):
    message = fault({**distilled, "data.labelled": 4, "data.labelled_share": 0.9})
    assert message.startswith("data.labelled_share: 0.9 of a batch of 4 ") and "unlabelled" in message


def test_unlabelled_images_need_a_teacher(fault, tiny, tmp_path):
    message = fault({"data.labelled": 4})
    assert message.startswith("data.unlabelled: ") and "teacher" in message and "false" in message
    run = recipe(tiny(tmp_path / "run", {"data.labelled": 4, "data.unlabelled": False}))
    assert [len(p.indices) for p in run.pools] == [4]
    assert recipe(tiny(tmp_path / "run", {"data.labelled": 12})).pools[0].labelled


def named_sets(**val):
    return {"data.train": {"layout": "named", "seg": ["a", "b"]}, "data.val": {"layout": "named", **val}}


@pytest.fixture
def only_named(monkeypatch, named, raw):
    """raw() without the options of scenes."""

    def make(folder, changes):
        plain = raw(folder, {k: v for k, v in changes.items() if not k.startswith("data.")})
        plain["data"] |= {k.removeprefix("data."): v for k, v in changes.items() if k.startswith("data.")}
        return Config.model_validate(plain)

    return make


def test_a_task_that_the_data_does_not_label(only_named, tmp_path):
    changes = named_sets() | {"data.train": {"layout": "named", "det": []}}
    with pytest.raises(UserError, match="tasks.det: the training data has no labels for it; it has seg"):
        recipe(only_named(tmp_path / "run", changes))


@pytest.mark.parametrize(
    ("val", "said"),
    [
        ({"seg": ["a", "c"]}, "data.val: the classes of 'seg' differ: lacks ['b']; has ['c'] besides"),
        ({"det": ["x"]}, "data.val: the classes of 'det' differ: lacks ['y']"),
        ({"det": []}, "data.val has no classes for the task 'det'"),
        ({"count": 0}, "data.val: the data set has no images"),
    ],
)
def test_validation_classes_are_the_training_classes(only_named, tmp_path, val, said):
    with pytest.raises(UserError) as error:
        recipe(only_named(tmp_path / "run", named_sets(**val)))
    assert str(error.value) == said


# the teacher


def taught(distilled, path):
    return {**distilled, "teacher": {"path": str(path), "amp": "none"}}


@pytest.fixture
def changed_teacher(teacher_run, tmp_path):
    """A teacher file whose arch ``change`` edited."""

    def make(change):
        content = checkpoint.load(teacher_run / "best.pt", "teacher")
        content.pop("format")
        change(content["arch"])
        checkpoint.save(tmp_path / "changed.pt", content)
        return tmp_path / "changed.pt"

    return make


def test_the_teacher_file_is_missing(no_data, fault, distilled, tmp_path):
    message = fault(taught(distilled, tmp_path / "nothing.pt"))
    assert message.startswith("teacher.path: ") and str(tmp_path / "nothing.pt") in message


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_the_teacher_file_is_damaged(no_data, fault, distilled, tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    message = fault(taught(distilled, tmp_path / "bad.pt"))
    assert message.startswith(f"teacher.path: {tmp_path / 'bad.pt'} ") and (
        "cannot be read as" in message or "is no checkpoint" in message
    )
    assert "weights_only" not in message  # torch's advice


def test_a_teacher_file_cut_short(no_data, fault, distilled, teacher_run, tmp_path):
    whole = (teacher_run / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a checkpoint" in fault(taught(distilled, tmp_path / "cut.pt"))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_teacher_file_never_runs(no_data, fault, distilled, tmp_path):
    trap = tmp_path / "executed"
    torch.save({"format": checkpoint.FORMAT, "arch": {}, "model": Malicious(trap)}, tmp_path / "evil.pt")
    message = fault(taught(distilled, tmp_path / "evil.pt"))
    assert "pickled code, which is never run" in message and not trap.exists()


def test_a_file_of_another_program(no_data, fault, distilled, tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "other.pt")
    assert fault(taught(distilled, tmp_path / "other.pt")).endswith(
        "is not a checkpoint written by tools/train.py; weights of another program are a source of their "
        "own, state_dict"
    )


def test_teacher_classes_in_another_order_meet_by_name(tiny, tmp_path, distilled, changed_teacher):
    def swap(arch):
        classes = arch["tasks"]["seg"]["classes"]
        classes[0], classes[1] = classes[1], classes[0]

    plain, swapped = (
        recipe(tiny(tmp_path / "run", change))
        for change in (distilled, taught(distilled, changed_teacher(swap)))
    )
    batch = plain.first_batch().to(plain.device)
    own, other = (run.teachers(batch).preds["seg"] for run in (plain, swapped))
    assert torch.equal(other[:, [1, 0, *range(2, own.shape[1])]], own)


def test_a_class_that_the_teacher_does_not_know_is_told(tiny, tmp_path, distilled, changed_teacher, caplog):
    def rename(arch):
        arch["tasks"]["det"]["classes"][0] = "tram"

    run = recipe(tiny(tmp_path / "run", taught(distilled, changed_teacher(rename))))
    assert "teacher does not know car of 'det': left to the labels; it has tram besides" in caplog.text
    assert run.teachers.known("det") == (1, 2, 3, 4, 5)


def test_a_teacher_without_the_task(fault, distilled, teacher_run, tmp_path):
    content = checkpoint.load(teacher_run / "best.pt", "x")
    content.pop("format")
    content["arch"]["tasks"].pop("det")
    content["model"] = {k: v for k, v in content["model"].items() if not k.startswith("heads.det")}
    checkpoint.save(tmp_path / "seg.pt", content)
    message = fault(taught(distilled, tmp_path / "seg.pt"))
    assert message.startswith("tasks.det.alpha: it is above 0, but no teacher knows 'det'")


def test_a_teacher_with_other_cells_is_matched_by_location(tiny, tmp_path, distilled):
    changes = {
        **distilled,
        "tasks.det": {**distilled["tasks.det"], "head": {"strides": [4, 8], "depth": 1}},
        "model.strides": [4, 8],
    }
    run = recipe(tiny(tmp_path / "run", changes))
    output = run.teachers(run.first_batch().to(run.device))
    assert output.preds["det"].shape[1] == (48 // 4) * (64 // 4) + (48 // 8) * (64 // 8)
    # the teacher has strides 8 and 16: it predicts nothing at stride 4, every cell of stride 8 has its own
    assert output.ignore_mask["det"][:, : 12 * 16].all() and not output.ignore_mask["det"][:, 12 * 16 :].any()


def test_a_teacher_whose_weights_do_not_fit_its_arch(fault, distilled, changed_teacher):
    message = fault(taught(distilled, changed_teacher(lambda arch: arch.update(width=12))))
    assert message.startswith("teacher.path: '") and "the network has" in message


def test_an_input_that_is_no_multiple_of_the_teachers_stride(tiny, tmp_path, distilled, teacher_run):
    content = checkpoint.load(teacher_run / "best.pt", "x")
    content.pop("format")
    arch = content["arch"] | {"strides": [4, 8, 16, 32]}
    arch["tasks"] = {"seg": arch["tasks"]["seg"]}
    checkpoint.save(tmp_path / "deep.pt", content | {"arch": arch, "model": build.network(arch).state_dict()})
    only_seg = taught(distilled, tmp_path / "deep.pt")
    only_seg["tasks.det"] = {"alpha": 0}
    with pytest.raises(UserError, match=r"needs images in multiples of 32, not \[48, 64\]"):
        recipe(tiny(tmp_path / "run", only_seg))


def test_without_alpha_the_teacher_is_never_opened(tiny, tmp_path, distilled, monkeypatch):
    monkeypatch.setattr(
        build_teacher, "load_checkpoint", lambda *args: pytest.fail("the teacher's file was opened")
    )
    changes = taught(distilled, tmp_path / "does-not-exist.pt")
    changes |= {
        "tasks.seg": distilled["tasks.seg"] | {"alpha": 0},
        "tasks.det": distilled["tasks.det"] | {"alpha": 0},
    }
    run = recipe(tiny(tmp_path / "run", changes))
    assert run.teachers is None and not any(".soft." in name for name in run.distiller.loss_names())
    assert not any(".soft." in name for name in run.objective.weights)


def test_one_alpha_of_zero_means_no_soft_loss_there(tiny, tmp_path, distilled):
    run = recipe(tiny(tmp_path / "run", {**distilled, "tasks.det": {**distilled["tasks.det"], "alpha": 0}}))
    assert [n for n in run.distiller.loss_names() if ".soft." in n] == ["seg.soft.kl"]
    assert list(run.teachers.subjects) == ["seg"]


def test_the_teacher_is_frozen(tiny, tmp_path, distilled):
    run = recipe(tiny(tmp_path / "run", distilled))
    run.distiller.train()
    assert not run.teachers.members["teacher"].net.training and not any(
        p.requires_grad for p in run.teachers.members["teacher"].net.parameters()
    )
    learning = {id(p) for p in run.distiller.parameters()}
    assert not learning & {id(p) for p in run.teachers.members["teacher"].net.parameters()}
    assert learning == {id(p) for p in run.student.parameters()}


def test_encoder_that_has_no_map_at_a_stride(fault):
    message = fault(
        {"model.encoder": "tu-test_convnext", "model.strides": [2, 4, 8], "tasks.det.head.strides": [8]}
    )
    assert message.startswith("model") and "stride" in message
    assert fault({"model.encoder": "tu-test_vit"}).startswith(
        "model.encoder: 'tu-test_vit' cannot give features"
    )


def test_starting_weights_that_are_not_there(fault, tmp_path):
    message = fault({"model.weights": str(tmp_path / "none.pt")})
    assert message.startswith("model.weights: ") and str(tmp_path / "none.pt") in message


@pytest.mark.parametrize("name", ["meta", "mps", "vulkan"])
def test_only_devices_that_are_offered(name):
    with pytest.raises(UserError, match=f"run.device: '{name}' is none of auto, cpu, cuda, cuda:N"):
        resolve_device(name)


def test_every_kind_and_its_head_build_from_defaults():
    assert KINDS.names() == ["classification", "depth", "detection", "semantic"]
    for kind in KINDS.names():
        found = KINDS.get(kind, "x")
        head = found.Head({4: 8, 8: 8} if reads_encoder(found.Head) else 8, (4, 8), 2)
        task = build_task("mine", kind, ("a", "b"), head.strides)
        assert (
            task.name == "mine"
            and task.kind == kind
            and set(task.headline)
            and task.weights
            and not task.is_default
        )
        assert task.classes == (("a", "b") if task.has_classes else ()) and task.strides == tuple(
            head.strides
        )
    for name, kind in DEFAULT_KINDS.items():
        task = build_task(name, None, ("a", "b"), (4,))
        assert (task.name, task.kind, task.is_default) == (name, kind, True)


def test_a_run_does_not_write_over_what_it_needs(tiny, teacher_run, tmp_path, distilled):
    path = teacher_run / "best.pt"
    before = path.read_bytes()
    with pytest.raises(UserError, match="teacher.path: .* lies in run.dir"):
        train(tiny(teacher_run, distilled), overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("run.dir", "", "is no path"),
        ("run.dir", "$NOT_SET_ANYWHERE/x", "a variable in it is not set"),
        ("model.strides", [], "at least 1 item"),
        ("data.labelled", True, "data.labelled"),
        ("data.augment.scale", [2, 1], "give [smallest, largest]"),
    ],
)
def test_values_that_would_do_harm_quietly(tiny, tmp_path, key, value, said):
    with pytest.raises(UserError) as caught:
        tiny(tmp_path, {key: value})
    assert said in str(caught.value) and key.split(".")[0] in str(caught.value)


def test_paths_may_hold_a_home_and_variables(tiny, monkeypatch):
    monkeypatch.setenv("RUNS", "/runs")
    assert tiny("$RUNS/a").run.dir == "/runs/a" and "~" not in tiny("~/a").run.dir


def test_a_checkpoint_of_numbers_that_are_none_is_refused(fault, distilled, teacher_run, tmp_path):
    content = torch.load(teacher_run / "best.pt", weights_only=True)
    next(iter(content["model"].values())).fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pt")
    assert "not finite" in fault(taught(distilled, tmp_path / "nan.pt"))


def test_imagenet_is_no_path_wherever_the_run_is(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked, real = [], backbones.smp.encoders.get_encoder

    def without_download(*args, weights, **more):
        asked.append(weights)
        return real(*args, weights=None, **more)

    monkeypatch.setattr(backbones.smp.encoders, "get_encoder", without_download)
    config = tiny(".", {"model.weights": "imagenet", "train.steps": 1, "eval.pictures": 0})
    assert config.run.dir == "."
    assert train(config)["images"] == 5 and (tmp_path / "best.pt").is_file()
    assert asked.count("imagenet") == 1  # for the student; no other network is made with them


def test_weights_that_the_run_would_write_over_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("model.weights", "model.start"):
        config = tiny(".", {key: "best.pt"})
        with pytest.raises(
            UserError, match=f"^{key}: best.pt lies in run.dir, where this run would write over it"
        ):
            _require_outside(tmp_path, config)
    _require_outside(tmp_path, tiny(".", {"model.weights": "encoder.pt"}))
