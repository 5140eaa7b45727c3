"""Half precision: the swap's pass is in it, and what follows the model waits for it."""

import pytest
import torch
from pytorch_metric_learning import losses

from pml_tacl import AttentionConsistencyLoss, BackgroundSwap, ContrastiveClusteringLoss
from pml_tacl.trainers import forward

from .small import make_model, make_trainer, same, state_of


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, None])
def test_the_swap_s_own_pass_is_in_the_trainer_s_precision(amp_dtype, monkeypatch):
    model = make_model()
    trainer = make_trainer(
        model, swap=BackgroundSwap(1.0, "distinctive"), amp_dtype=amp_dtype, loss_funcs={
            "metric_loss": losses.MultiSimilarityLoss(), "a": AttentionConsistencyLoss()
        },
    )  # fmt: skip
    seen, scored = [], []
    conv = next(m for m in model.trunk.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_hook(lambda m, i, o: seen.append((model.trunk.training, o.dtype)))
    background_score = forward.background_score

    def noted(maps, labels):
        scored.append(maps.dtype)
        return background_score(maps, labels)

    monkeypatch.setattr(forward, "background_score", noted)
    trainer.train()
    swaps = [dtype for training, dtype in seen if not training][1:]  # the first embeds
    wanted = torch.float32 if amp_dtype is None else amp_dtype
    assert swaps == [wanted] * 2  # one for each iteration
    assert scored == [torch.float32] * 4
    assert torch.is_autocast_enabled("cpu") is False


def overflowing(trainer, iterations):
    """Let gradients of the iterations, counted from 0, be infinite."""
    number = [0]
    clip = trainer.clip_gradients

    def overflow():
        if number[0] in iterations:
            next(p for p in trainer.models["trunk"].parameters() if p.grad is not None).grad[:] = (
                torch.inf
            )
        number[0] += 1
        clip()

    trainer.clip_gradients = overflow


@pytest.mark.slow
@pytest.mark.parametrize("clipped", [False, True])
def test_nothing_advances_in_a_step_that_the_scaler_leaves_out(clipped):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedules = {
        "trunk_scheduler_by_iteration": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        "embedder_scheduler_by_epoch": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
    }
    loss = ContrastiveClusteringLoss()
    seen = []

    def look(t):
        ema = [p.clone() for p in t.ema_model.parameters()]
        seen.append((state_of(t), ema, int(t.average.n_averaged), t.centroids.clone()))

    def after(t):
        rates.append(
            (schedules["trunk_scheduler_by_iteration"].last_epoch, optimizer.param_groups[0]["lr"])
        )

    rates = []
    clip = {"trunk_grad_clipper": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)}
    trainer = make_trainer(
        model,
        optimizers=optimizer,
        lr_schedulers=schedules,
        loss_funcs={"metric_loss": losses.MultiSimilarityLoss(), "c": loss},
        gradient_clippers=clip if clipped else {},
        amp_dtype=torch.float16,
        ema_decay=0.5,
        iterations_per_epoch=4,
        end_of_iteration_hook=look,
        end_of_epoch_hook=after,
    )
    assert trainer.scaler.is_enabled()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    overflowing(trainer, {1, 2})
    trainer.train()
    (w0, e0, n0, c0), (w1, e1, n1, c1), (w2, e2, n2, c2), (w3, e3, n3, c3) = seen
    assert (n0, n1, n2, n3) == (1, 1, 1, 2)
    assert same(w0, w1)
    assert same(e0, e1)
    assert same(e0, e2)
    assert torch.equal(c0, c1)
    assert torch.equal(c0, c2)
    assert not same(w2, w3)
    assert not same(e2, e3)
    assert not torch.equal(c2, c3)
    assert torch.equal(loss.centroids, c3)
    # Two steps of four, and one of the epoch's scheduler, which goes by epochs.
    assert rates == [(2, pytest.approx(0.05 * 0.5**2 * 0.9))]
    assert trainer.scaler.get_scale() == 128.0 / 4


def test_a_scaler_that_leaves_out_one_of_two_optimizers_holds_its_schedule_alone():
    model = make_model()
    parts = {name: getattr(model, name) for name in ("trunk", "embedder")}
    optimizers = {
        f"{name}_optimizer": torch.optim.SGD(part.parameters(), 0.1) for name, part in parts.items()
    }
    schedules = {
        f"{name}_scheduler_by_iteration": torch.optim.lr_scheduler.StepLR(
            optimizers[f"{name}_optimizer"], 1, 0.5
        )
        for name in parts
    }
    trainer = make_trainer(
        model,
        optimizers=optimizers,
        lr_schedulers=schedules,
        loss_funcs={"metric_loss": losses.MultiSimilarityLoss()},
        amp_dtype=torch.float16,
    )
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    overflowing(trainer, {0})
    trainer.train()
    rates = {name: o.param_groups[0]["lr"] for name, o in optimizers.items()}
    assert rates == {"trunk_optimizer": 0.05, "embedder_optimizer": 0.025}
