"""The check before a run: it passes a sound one, changes nothing, and names every fault that is planted."""

import types

import pytest
import torch

from multitask_kd import build, checkpoint
from multitask_kd.engine.check import FAIL, LOOK, PASS, check_run, closing_line, require
from multitask_kd.engine.run import prepare
from multitask_kd.engine.train import check, train
from multitask_kd.errors import UserError
from multitask_kd.models.class_mapping import ClassMapping

TERMS = {
    "cwd": {"student": "neck.p3", "loss": "cwd"},
    "mgd": {"student": "neck.p3", "loss": "mgd", "weight": 200},
    "logits": {"student": "heads.seg", "loss": "cwd"},
}


def ready(config):
    """The run of a config, and its optimizer."""
    return prepare(build.resolve_init(config))


@pytest.fixture
def sound(tiny, distilled, tmp_path):
    """A run with everything: both tasks taught, three terms, a floor that any teacher reaches."""
    teacher = distilled["teacher"] | {"floor": {"seg": 0}, "check_images": 4}
    return lambda changes=(): ready(
        tiny(tmp_path / "run", {**distilled, "teacher": teacher, "distill": TERMS, **dict(changes)})
    )


def verdicts(run, optimizer):
    return {line.what: (line.verdict, line.detail) for line in check_run(run, optimizer).lines}


def only_failure(run, optimizer, what, words):
    """The one line that fails is ``what`` and says ``words``."""
    found = verdicts(run, optimizer)
    failed = [name for name, (verdict, _) in found.items() if verdict == FAIL]
    assert failed == [what], [(name, found[name]) for name in failed]
    assert words in found[what][1]


def test_a_sound_run_passes_with_a_line_for_everything(sound):
    run, optimizer = sound()
    proof = check_run(run, optimizer)
    assert not proof.failed and require(proof) is None
    found = {line.what: line for line in proof.lines}
    assert found["distill.cwd taps"].detail == (
        "student neck.p3 [4, 8, 6, 8] and teacher neck.p3 [4, 16, 6, 8]: 1x1 convolution 8 -> 16 channels, "
        "both normalised"
    )
    assert "compared as they are" in found["distill.logits taps"].detail
    assert "all in the optimizer and with a gradient" in found["distill.mgd learns"].detail
    assert {
        "classes of seg",
        "classes of det",
        "teacher in eval",
        "teacher frozen",
        "optimizer",
        "checkpoint",
    } <= set(found)
    assert "on 4 validation images; teacher.floor.seg asks 0" in found["teacher's seg"].detail
    parts = {"seg.hard", "seg.soft", "det.hard", "det.soft", "distill.cwd", "distill.mgd", "distill.logits"}
    shares = [
        float(found[p].detail.split(" % of the total")[0])
        for p in parts - {"distill.cwd", "distill.mgd", "distill.logits"}
    ]
    assert all(0 < s < 100 for s in shares)
    assert proof.step_seconds > 0 and "a step takes about" in closing_line(proof, run)


def test_shares_add_up(sound):
    lines = [line for line in check_run(*sound()).lines if "% of the total" in line.detail]
    totals = [float(line.detail.split(" % of the total")[0]) for line in lines]
    pulls = [float(line.detail.split(", ")[1].split(" % of the gradient")[0]) for line in lines]
    assert sum(totals) == pytest.approx(100, abs=0.4) and sum(pulls) == pytest.approx(100, abs=0.4)


def test_nothing_of_the_run_is_changed(sound, same_weights):
    run, optimizer = sound()
    before = {k: v.clone() for k, v in run.distiller.state_dict().items()}
    random = checkpoint.random_state()
    check_run(run, optimizer)
    same_weights(before, run.distiller.state_dict())
    assert torch.equal(random["torch"], torch.get_rng_state())
    assert all(p.grad is None for p in run.distiller.parameters())


def test_a_run_with_the_check_is_the_run_without(tiny, distilled, tmp_path, same_weights):
    weights = []
    for name, checked in (("with", True), ("without", False)):
        config = tiny(
            tmp_path / name, {**distilled, "distill": TERMS, "train.check": checked, "train.steps": 2}
        )
        train(config)
        weights.append(torch.load(tmp_path / name / "best.pt", weights_only=True)["model"])
    same_weights(*weights)


# --- planted faults


def test_teacher_in_training_mode(sound):
    run, optimizer = sound()
    run.teachers.members["teacher"].net.heads["seg"].train()
    only_failure(run, optimizer, "teacher in eval", "heads.seg is in training mode")


def test_teacher_that_learns(sound):
    run, optimizer = sound()
    run.teachers.members["teacher"].net.neck.requires_grad_(True)
    only_failure(run, optimizer, "teacher frozen", "neck.fpn.inner_blocks.0.0.weight would learn")


def test_teacher_below_its_floor(sound):
    run, optimizer = sound({"teacher.floor": {"seg": 99.5}})
    only_failure(run, optimizer, "teacher's seg", "teacher.floor.seg asks 99.5")


def test_classes_that_the_teacher_does_not_know(sound):
    run, optimizer = sound()
    own = run.tasks["seg"].classes
    run.teachers.members["teacher"].mappings["seg"] = ClassMapping([*own[1:], "tram"], own)
    verdict, detail = verdicts(run, optimizer)["classes of seg"]
    assert verdict == LOOK and detail == (
        f"{len(own) - 1} of {len(own)} are known to the teacher; left to the labels: {own[0]}; of no use "
        f"here: tram"
    )


def test_adapters_left_out_of_the_optimizer(sound):
    run, _ = sound()
    found = verdicts(run, torch.optim.SGD(run.student.parameters(), lr=0.1))
    failed = {name for name, (verdict, _) in found.items() if verdict == FAIL}
    assert failed == {"distill.cwd learns", "distill.mgd learns", "optimizer"}
    assert "align.weight is not in the optimizer" in found["distill.cwd learns"][1]


def test_adapter_without_a_gradient(sound):
    run, optimizer = sound()
    term = run.distiller.terms["mgd"]
    align = term.align.forward
    term.align.forward = types.MethodType(
        lambda self, x: x.repeat(1, 2, 1, 1) + 0 * align(x).detach(), term.align
    )
    only_failure(run, optimizer, "distill.mgd learns", "align.weight gets no gradient")


def test_term_that_moves_nothing(sound):
    run, optimizer = sound()
    loss = run.distiller.terms["logits"].loss
    forward = loss.forward
    loss.forward = lambda s, t, target=None, mask=None: forward(s.detach(), t).requires_grad_()
    only_failure(run, optimizer, "distill.logits", "moves no weight of the student")


def test_term_that_is_zero(sound):
    run, optimizer = sound()
    loss = run.distiller.soft["seg"]
    forward = loss.forward
    loss.forward = lambda s, t, target=None, mask=None: 0 * forward(s, t, target, mask)
    found = verdicts(run, optimizer)
    assert found["seg.soft.kl"][0] == FAIL and found["seg.soft.kl"][1].startswith("is exactly 0")


@pytest.mark.parametrize(
    ("changes", "looks"),
    [
        ({"tasks.seg.alpha": 1.0}, {"seg.hard"}),
        ({"tasks.det.ratio": 0.0}, {"det.hard", "det.soft"}),
        ({"tasks.seg.alpha": {"schedule": "linear", "start": 0.8, "end": 0, "over": [0, 0.5]}}, set()),
        ({"distill.cwd.weight": {"schedule": "staged", "values": [100, 0]}}, set()),
    ],
)
def test_a_weight_that_is_zero_on_purpose_or_for_a_while_does_not_fail(sound, changes, looks):
    found = verdicts(*sound(changes))
    assert not [name for name, (verdict, _) in found.items() if verdict == FAIL]
    assert {
        name for name, (_, detail) in found.items() if "weight is 0 from beginning to end" in detail
    } == looks


def test_an_average_that_is_still_the_student_does_not_fail(sound):
    run, optimizer = sound({"teacher": {"source": "ema", "amp": "none"}, "distill": {}})
    for module in run.student.modules():  # nothing that differs between training and eval
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = lambda x: x
    for module in run.teachers.members["teacher"].net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = lambda x: x
    found = verdicts(run, optimizer)
    assert found["seg.soft.kl"][0] == LOOK and "still the student itself" in found["seg.soft.kl"][1]
    assert not [name for name, (verdict, _) in found.items() if verdict == FAIL]


def test_term_that_is_not_finite(sound):
    run, optimizer = sound()
    with torch.no_grad():
        run.teachers.members["teacher"].net.heads["det"].objectness.weight[0, 0] = torch.nan
    only_failure(run, optimizer, "det.soft.det_mse", "is nan")


def test_tap_that_does_not_fire(sound):
    run, optimizer = sound()
    run.student.neck.forward = types.MethodType(_without_taps, run.student.neck)
    only_failure(
        run, optimizer, "one step", "distill.cwd.student: the module 'neck.p3' was not called in this step"
    )


def _without_taps(self, features):
    named = dict(zip(map(str, self.strides), features, strict=True))
    return dict(zip(self.strides, self.fpn(named).values(), strict=True))


def test_tap_that_fires_twice(sound):
    run, optimizer = sound()
    plain = run.student.neck.forward
    run.student.neck.forward = types.MethodType(
        lambda self, x: (self.p3(x[0]), plain(x))[1], run.student.neck
    )
    found = verdicts(run, optimizer)
    assert (
        found["distill.cwd taps"][0] == FAIL
        and "student neck.p3 fired 2 times" in found["distill.cwd taps"][1]
    )


def test_tap_that_is_written_over(sound):
    run, optimizer = sound()

    def in_place(module, inputs, output):
        for level in output.values():
            level.mul_(2)

    run.student.neck.register_forward_hook(in_place)
    found = verdicts(run, optimizer)
    assert found["tap"][0] == LOOK and "neck.p3 is written over by a module after it" in found["tap"][1]


def test_teacher_in_the_checkpoint_and_in_the_optimizer(sound):
    run, _ = sound()
    run.distiller.teacher = run.teachers.members["teacher"].net
    optimizer = torch.optim.SGD(run.distiller.parameters(), lr=0.1)
    found = verdicts(run, optimizer)
    assert found["checkpoint"][0] == FAIL and "is the teacher's" in found["checkpoint"][1]
    assert found["optimizer and teacher"][0] == FAIL


def test_weight_that_vanishes_and_weight_that_swamps(sound):
    run, optimizer = sound({"distill.cwd": {"student": "neck.p3", "loss": "cwd", "weight": 1e-7}})
    assert "next to nothing" in verdicts(run, optimizer)["distill.cwd"][1]
    run, optimizer = sound({"distill.cwd": {"student": "neck.p3", "loss": "cwd", "weight": 1e7}})
    assert verdicts(run, optimizer)["distill.cwd"][0] == LOOK


def test_background_of_cells_that_are_matched_by_location(sound, distilled):
    other = {**distilled["tasks.det"], "head": {"strides": [4, 8], "depth": 1}}

    def line(soft):
        run, optimizer = sound({"model.strides": [4, 8], "distill": {}, "tasks.det": {**other, "soft": soft}})
        return verdicts(run, optimizer).get("det.soft cells")

    verdict, words = line({"loss": "det_mse"})
    assert (
        verdict == LOOK
        and "the cells of teacher are" in words
        and "tasks.det.soft.options.weighting: teacher" in words
    )
    assert (
        line({"loss": "det_mse", "options": {"weighting": "teacher"}}) is None
        and line({"loss": "det_soft"}) is None
    )


def test_cells_of_the_same_locations_are_no_cause_for_a_look(sound, distilled):
    run, optimizer = sound({"tasks.det": {**distilled["tasks.det"], "soft": {"loss": "det_mse"}}})
    assert "det.soft cells" not in verdicts(run, optimizer)


def test_the_penalty_of_sparse_training_has_a_line(tiny, tmp_path):
    def line(weight):
        return verdicts(*ready(tiny(tmp_path / "run", {"sparse": {"method": "scale", "weight": weight}})))[
            "sparse"
        ]

    schedule = {"schedule": "linear", "start": 0.0, "end": 0.001}
    verdict, words = line(schedule)
    assert verdict == PASS and words.endswith("% of the total with it, at its largest weight 0.001")
    assert line(0.001) == (verdict, words)
    assert line(1e-9)[0] == line(1e6)[0] == LOOK
    assert "sparse" not in verdicts(*ready(tiny(tmp_path / "run")))


# --- where a user meets it


def test_a_run_that_fails_the_check_does_not_begin(tiny, distilled, tmp_path):
    config = tiny(tmp_path / "run", {**distilled, "teacher.floor": {"seg": 99.5}})
    with pytest.raises(UserError, match=r"teacher's seg: mIoU .* teacher\.floor\.seg asks 99\.5"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_the_check_does_not_cost_the_one_that_is_there(tiny, distilled, tmp_path):
    train(tiny(tmp_path / "run", {**distilled, "train.steps": 1}))
    before = (tmp_path / "run/best.pt").read_bytes()
    with pytest.raises(UserError, match="the check on the first batch failed"):
        train(tiny(tmp_path / "run", {**distilled, "teacher.floor": {"seg": 99.5}}), overwrite=True)
    assert (tmp_path / "run/best.pt").read_bytes() == before and (tmp_path / "run/metrics.json").exists()


def test_the_tool_prints_every_line_and_fails_by_its_status(raw, distilled, tmp_path, tool):
    import yaml

    path = tmp_path / "cfg.yaml"
    path.write_text(yaml.safe_dump(raw(tmp_path / "run", {**distilled, "distill": TERMS})))
    status, out, err = tool("check", "--config", path)
    assert status == 0, err
    assert out.count(f"{PASS}  ") > 15 and "check: " in out and not (tmp_path / "run").exists()
    status, out, err = tool("check", "--config", path, "teacher.floor={seg: 99.5}")
    assert status == 2 and "FAIL  teacher's seg" in out and "1 FAILED" in out


def test_a_run_without_a_teacher_can_be_checked(tiny, tmp_path):
    proof, summary = check(tiny(tmp_path / "run"))
    assert not proof.failed and "a step takes about" in summary
