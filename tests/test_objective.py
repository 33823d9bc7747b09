import pytest
import torch
from torch import nn

from multitask_kd.batch import IGNORE, PAD, Batch, ModelOutput
from multitask_kd.distill.balance import Balance
from multitask_kd.distill.distiller import Distiller, Soft
from multitask_kd.distill.objective import Objective, task_weights
from multitask_kd.distill.teacher import Teacher
from multitask_kd.errors import UserError
from multitask_kd.losses.det_mse import DetMSE
from multitask_kd.losses.kl import KL
from multitask_kd.tasks.detection import Detection
from multitask_kd.tasks.semantic import Semantic

# --- the formula


def weights():
    return {
        **task_weights("seg", {"ce": 1.0}, ("kl", 2.0), ratio=4.0, alpha=0.25),
        **task_weights(
            "det", {"box": 5.0, "objectness": 1.0, "class": 0.5}, ("det_mse", 3.0), ratio=0.5, alpha=0.4
        ),
    }


def at(progress, weights):
    """The weights at a moment of training."""
    return {name: weight(progress) for name, weight in weights.items()}


def test_total_by_hand():
    losses = {
        "seg.hard.ce": 1.5,
        "seg.soft.kl": 0.5,
        "det.hard.box": 0.2,
        "det.hard.objectness": 2.0,
        "det.hard.class": 4.0,
        "det.soft.det_mse": 1.0,
    }
    total, weighted, _ = Objective(weights(), losses)({k: torch.tensor(v) for k, v in losses.items()})
    # seg: 4 * (.75 * 1.5 + .25 * 2 * .5) = 4 * (1.125 + .25) = 5.5
    # det: .5 * (.6 * (5 * .2 + 2 + .5 * 4) + .4 * 3 * 1) = .5 * (.6 * 5 + 1.2) = 2.1
    assert total.item() == pytest.approx(7.6)
    assert {k: v.item() for k, v in weighted.items()} == {
        "seg.hard.ce": pytest.approx(4.5),
        "seg.soft.kl": pytest.approx(1.0),
        "det.hard.box": pytest.approx(0.3),
        "det.hard.objectness": pytest.approx(0.6),
        "det.hard.class": pytest.approx(0.6),
        "det.soft.det_mse": pytest.approx(0.6),
    }


def test_task_without_a_teacher():
    assert at(0.5, task_weights("seg", {"ce": 2.0}, None, ratio=3.0, alpha=0.0)) == {"seg.hard.ce": 6.0}


def test_alpha_one_leaves_the_soft_loss_alone():
    weights = task_weights("seg", {"ce": 2.0}, ("kl", 1.5), ratio=2.0, alpha=1.0)
    assert at(0.5, weights) == {"seg.hard.ce": 0.0, "seg.soft.kl": 3.0}


def test_weights_that_change_with_progress():
    halves = {"ratio": lambda p: 4 * p, "alpha": lambda p: p / 2}
    weights = task_weights("seg", {"ce": 3.0, "dice": 1.0}, ("kl", lambda p: 10 - 5 * p), **halves)
    assert at(0.0, weights) == {"seg.hard.ce": 0.0, "seg.hard.dice": 0.0, "seg.soft.kl": 0.0}
    # ratio 2, alpha .25, factor 7.5: hard 2 * .75 * 3 and 2 * .75 * 1, soft 2 * .25 * 7.5
    assert at(0.5, weights) == {"seg.hard.ce": 4.5, "seg.hard.dice": 1.5, "seg.soft.kl": 3.75}
    # ratio 4, alpha .5, factor 5: 4 * .5 * 3, 4 * .5 * 1, 4 * .5 * 5
    assert at(1.0, weights) == {"seg.hard.ce": 6.0, "seg.hard.dice": 2.0, "seg.soft.kl": 10.0}


def test_total_follows_the_progress():
    objective = Objective({"seg.hard.ce": 2.0, "distill.x": lambda p: 1 - p}, ["seg.hard.ce", "distill.x"])
    losses = {"seg.hard.ce": torch.tensor(3.0), "distill.x": torch.tensor(8.0)}
    # 2 * 3 + (1 - p) * 8
    assert [objective(losses, p)[0].item() for p in (0.0, 0.25, 1.0)] == [14.0, 12.0, 6.0]
    assert {k: v.item() for k, v in objective(losses, 0.25)[1].items()} == {
        "seg.hard.ce": 6.0,
        "distill.x": 6.0,
    }


def test_factors_of_a_balance_are_given_back_and_not_kept():
    class Twice(Balance):
        def factors(self, sums, shared):
            return {"seg": 2.0, "det": torch.tensor(3.0, requires_grad=True)}

    names = ["seg.hard.ce", "det.hard.box"]
    objective = Objective(dict.fromkeys(names, 1.0), names, Twice(["seg", "det"]))
    before = dict(vars(objective))
    found = objective(dict.fromkeys(names, torch.tensor(5.0)))
    assert found.total.item() == 2 * 5 + 3 * 5
    assert (
        found.factors["seg"] == 2.0
        and found.factors["det"].item() == 3.0
        and not found.factors["det"].requires_grad
    )
    assert vars(objective) == before
    assert Objective({"seg.hard.ce": 1.0}, ["seg.hard.ce"])({"seg.hard.ce": torch.tensor(5.0)}).factors == {}


def test_weights_that_are_given_stand_for_those_of_the_progress():
    objective = Objective({"seg.hard.ce": 2.0, "distill.x": lambda p: 1 - p}, ["seg.hard.ce", "distill.x"])
    losses = {"seg.hard.ce": torch.tensor(3.0), "distill.x": torch.tensor(8.0)}
    found = objective.weigh(losses, {"seg.hard.ce": 1.0, "distill.x": 0.5}, ())
    assert found.total.item() == 7.0 and {k: v.item() for k, v in found.weighted.items()} == {
        "seg.hard.ce": 3.0,
        "distill.x": 4.0,
    }
    assert objective.weights_at(0.25) == {"seg.hard.ce": 2.0, "distill.x": 0.75}


def test_total_passes_the_gradient_on():
    loss = torch.tensor(1.0, requires_grad=True)
    total, _, _ = Objective({"seg.hard.ce": 2.5}, ["seg.hard.ce"])({"seg.hard.ce": loss})
    total.backward()
    assert loss.grad.item() == 2.5


def test_a_loss_that_is_absent_from_a_batch_adds_nothing():
    objective = Objective(weights(), weights())
    total, weighted, _ = objective({"seg.soft.kl": torch.tensor(1.0)})
    assert total.item() == pytest.approx(2.0) and set(weighted) == {"seg.soft.kl"}


def test_a_loss_without_a_weight_is_named():
    with pytest.raises(
        UserError, match=r"loss 'seg\.soft\.kl' has no weight; did you mean 'seg\.soft\.kll'\?"
    ):
        Objective({"seg.soft.kll": 1.0}, ["seg.soft.kl"])


def test_a_weight_without_a_loss_is_named():
    with pytest.raises(
        UserError, match=r"weight 'det\.hard\.boxes' belongs to no loss; did you mean 'det\.hard\.box'\?"
    ):
        Objective({"det.hard.box": 1.0, "det.hard.boxes": 1.0}, ["det.hard.box"])


def test_a_loss_that_was_never_announced_is_an_error():
    with pytest.raises(KeyError, match="seg.extra"):
        Objective({"seg.hard.ce": 1.0}, ["seg.hard.ce"])({"seg.extra": torch.tensor(1.0)})


# --- the distiller


class Tiny(nn.Module):
    """Both predictions from one 1x1 convolution at stride 8 of a 16x16 image: 4 cells, 3 classes each."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 3 + 8, 8, stride=8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        seg, det = self.conv(images).split([3, 8], dim=1)
        return ModelOutput({"seg": seg, "det": self.dropout(det).flatten(2).transpose(1, 2)})


def distiller(soft=("seg", "det")):
    tasks = {"seg": Semantic("seg", "abc", (8,)), "det": Detection("det", ("x", "y", "z"), (8,))}
    losses = {"seg": Soft("kl", KL(temperature=2.0)), "det": Soft("det_mse", DetMSE())}
    return Distiller(Tiny(0), tasks, {k: losses[k] for k in soft}).eval()


def batch(tasks=("seg", "det"), labelled=(True, True)):
    targets = {
        "seg": {"mask": torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(1))},
        "det": {
            "boxes": torch.tensor([[[0.0, 0, 10, 10]], [[4.0, 4, 12, 16]]]),
            "classes": torch.tensor([[0], [2]]),
        },
    }
    for target in targets.values():
        target["labelled"] = torch.tensor(labelled)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return Batch(images, {k: targets[k] for k in tasks})


HARD = {"seg.hard.ce", "det.hard.box", "det.hard.objectness", "det.hard.class"}
SOFT = {"seg.soft.kl", "det.soft.det_mse"}


def teacher_output(images):
    return Teacher(Tiny(7), {}, torch.device("cpu"))(images)


def test_losses_are_named_as_announced():
    both = distiller()
    losses = both(batch(), teacher_output(batch().images)).losses
    assert set(losses) == set(both.loss_names()) == HARD | SOFT
    assert all(v.shape == () and torch.isfinite(v) for v in losses.values())
    assert set(distiller(soft=())(batch()).losses) == set(distiller(soft=()).loss_names()) == HARD
    assert set(distiller(soft=("seg",)).loss_names()) == HARD | {"seg.soft.kl"}


def test_losses_are_the_tasks_and_the_soft_losses_own():
    own, output = distiller(), teacher_output(batch().images)
    losses, student = own(batch(), output).losses, own.student(batch().images)
    assert (
        losses["seg.hard.ce"]
        == own.tasks["seg"].losses(student.preds["seg"], batch().targets["seg"], (16, 16))["ce"]
    )
    assert losses["seg.soft.kl"] == KL(temperature=2.0)(student.preds["seg"], output.preds["seg"])
    assert losses["det.soft.det_mse"] == DetMSE()(student.preds["det"], output.preds["det"])


def test_without_labels_only_the_soft_losses_are_left():
    own, output = distiller(), teacher_output(batch().images)
    full = own(batch(), output).losses
    assert set(own(batch(tasks=()), output).losses) == SOFT
    assert set(own(batch(tasks=("seg",)), output).losses) == SOFT | {"seg.hard.ce"}
    unlabelled = own(batch(labelled=(False, False)), output).losses
    assert all(unlabelled[k].item() == 0 for k in HARD)
    assert all(unlabelled[k] == full[k] for k in SOFT)


def test_unlabelled_images_teach_through_the_soft_losses_alone():
    own = distiller()
    own.zero_grad()
    losses = own(batch(labelled=(False, False)), teacher_output(batch().images)).losses
    sum(losses[k] for k in HARD).backward(retain_graph=True)
    assert all(p.grad is None or p.grad.eq(0).all() for p in own.parameters())
    sum(losses[k] for k in SOFT).backward()
    assert all(p.grad.ne(0).any() for p in own.parameters())


def test_a_labelled_image_without_objects_and_ignored_pixels():
    empty = batch()
    empty.targets["det"]["classes"].fill_(PAD)
    empty.targets["seg"]["mask"].fill_(IGNORE)
    losses = distiller()(empty, teacher_output(empty.images)).losses
    assert (
        losses["seg.hard.ce"].item() == losses["det.hard.box"].item() == losses["det.hard.class"].item() == 0
    )
    assert losses["det.hard.objectness"] > 0


def test_a_task_without_any_label_has_no_hard_losses():
    tasks = {"seg": Semantic("seg", "abc", (8,)), "det": Detection("det", ("x", "y", "z"), (8,))}
    own = Distiller(Tiny(0), tasks, {"det": Soft("det_mse", DetMSE())}, unlabelled=["det"]).eval()
    assert own.hard_names() == ["seg.hard.ce"] and own.loss_names() == ["seg.hard.ce", "det.soft.det_mse"]
    assert set(own(batch(tasks=("seg",)), teacher_output(batch().images)).losses) == {
        "seg.hard.ce",
        "det.soft.det_mse",
    }


def test_what_a_teacher_ignores_counts_in_neither_sum_nor_divisor():
    own, output = distiller(soft=("seg",)), teacher_output(batch().images)
    ignored = torch.zeros(2, 2, 2, dtype=torch.bool)
    ignored[:, :, 0] = True
    masked = own(batch(), ModelOutput(output.preds, ignore_mask={"seg": ignored})).losses["seg.soft.kl"]
    student, teacher = (preds["seg"][..., 1:] for preds in (own.student(batch().images).preds, output.preds))
    assert masked.item() == pytest.approx(KL(temperature=2.0)(student, teacher).item())
    everywhere = own(
        batch(), ModelOutput(output.preds, ignore_mask={"seg": torch.ones_like(ignored)})
    ).losses["seg.soft.kl"]
    assert everywhere.item() == 0


def test_what_a_distiller_found_is_detached_but_for_its_losses_and_taps():
    found = distiller()(batch(), teacher_output(batch().images))
    assert set(found.preds) == {"seg", "det"} == set(found.soft_preds)
    assert not any(pred.requires_grad for pred in (*found.preds.values(), *found.soft_preds.values()))
    assert all(loss.requires_grad for loss in found.losses.values())
    assert set(distiller(soft=("seg",))(batch(), teacher_output(batch().images)).soft_preds) == {"seg"}


def test_the_losses_of_some_images_are_those_of_a_batch_of_them():
    own, output = distiller(), teacher_output(batch().images)
    whole = own(batch(), output)
    for row in (0, 1):
        rows = torch.tensor([row])
        part = batch().of(rows)
        found = own.compare(whole.preds, whole.soft_preds, part, output, rows)
        alone = own(part, ModelOutput({task: pred[rows] for task, pred in output.preds.items()})).losses
        assert {k: v.item() for k, v in found.items()} == pytest.approx(
            {k: v.item() for k, v in alone.items()}, rel=1e-5
        )


def test_a_soft_loss_needs_a_teacher_and_a_task():
    with pytest.raises(ValueError, match="'seg' is learnt from a teacher, but the step has none"):
        distiller()(batch())
    with pytest.raises(ValueError, match="'depth', which is not a task"):
        Distiller(Tiny(0), {"seg": Semantic("seg", "abc", (8,))}, {"depth": Soft("kl", KL())})


def test_only_the_student_learns():
    own = distiller()
    names = {n for n, _ in own.named_parameters()}
    assert names == {"student.conv.weight", "student.conv.bias"}


def test_teacher_is_frozen_in_eval_and_out_of_reach():
    net = Tiny(7).train()
    teacher = Teacher(net, {}, torch.device("cpu"))
    own = distiller()
    own.teacher = teacher
    own.train()
    assert not net.training and not net.dropout.training
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(name.startswith("teacher") for name in own.state_dict())
    assert len(list(own.parameters())) == 2
    output = teacher(batch().images)
    assert not any(p.requires_grad for p in output.preds.values())
    assert torch.equal(output.preds["det"], teacher(batch().images).preds["det"])  # no dropout


def test_teacher_in_bf16_stays_close():
    exact = Teacher(Tiny(7), {}, torch.device("cpu"))(batch().images).preds["seg"]
    half = Teacher(Tiny(7), {}, torch.device("cpu"), torch.bfloat16)(batch().images).preds["seg"]
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.02, rtol=0.02)
