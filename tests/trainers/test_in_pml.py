"""The trainer as one of PML's own: its hooks, presets, testers and frozen parts."""

import sqlite3
from contextlib import closing

import pytest
import torch
from pytorch_metric_learning import losses, regularizers
from pytorch_metric_learning.trainers import BaseTrainer
from pytorch_metric_learning.utils.inference import InferenceModel

from pml_tacl import RetrievalCalculator
from pml_tacl.cli.run_folder import make_hooks
from pml_tacl.evaluation import make_tester
from tests.trainers.small import COUNT, SIZE, Images, make_model, make_trainer, same, state_of


def labelled(trainer):
    return [(trainer.eval_transform(p), n % 4) for n, (p, _) in enumerate(Images())]


@pytest.mark.filterwarnings("ignore")  # of PML's own saving
def test_pml_s_presets_record_test_save_and_stop(tmp_path):
    hooks = make_hooks(tmp_path / "records", log_freq=1, primary_metric="recall_at_1",
                       validation_split_name="val")  # fmt: skip
    tester = make_tester(
        RetrievalCalculator(include=("recall_at_1",)), end_of_testing_hook=hooks.end_of_testing_hook
    )
    trainer = make_trainer(end_of_iteration_hook=hooks.end_of_iteration_hook)
    trainer.end_of_epoch_hook = hooks.end_of_epoch_hook(
        tester, {"val": labelled(trainer)}, str(tmp_path / "models"), patience=1
    )
    trainer.train(num_epochs=9)
    assert 1 <= trainer.epoch < 9  # it is perfect at once, so the patience ends it
    assert (tmp_path / "models" / f"trunk_{trainer.epoch}.pth").exists()
    assert list((tmp_path / "models").glob("trunk_best*.pth"))
    histories = hooks.get_loss_history()
    assert len(histories["total_loss"]) == 2 * trainer.epoch
    assert {"metric_loss", "clustering_loss", "attention_loss"} <= set(histories)
    with closing(sqlite3.connect(tmp_path / "records" / "logs.db")) as base:
        found = {name for (name,) in base.execute("SELECT name FROM sqlite_master").fetchall()}
    assert any(name.startswith("accuracies") for name in found)
    # PML's own way of going on reads them.
    again = make_trainer(make_model(seed=7))
    assert hooks.load_latest_saved_models(again, str(tmp_path / "models")) == trainer.epoch + 1
    assert same(state_of(again), state_of(trainer))


def test_pml_s_other_parts_take_its_parts():
    trainer = make_trainer()
    assert isinstance(trainer, BaseTrainer)
    trainer.train()
    inference = InferenceModel(trainer.models["trunk"], trainer.models["embedder"])
    images = torch.stack([image for image, _ in labelled(trainer)])
    assert inference.get_embeddings(images).shape == (COUNT, 16)


def test_hooks_see_the_losses_and_end_the_epoch_with_zeros():
    seen = []
    trainer = make_trainer(
        end_of_iteration_hook=lambda t: seen.append({k: float(v) for k, v in t.losses.items()}),
        end_of_epoch_hook=lambda t: seen.append(dict(t.losses)),
    )
    trainer.train()
    *steps, end = seen
    assert len(steps) == 2
    for step in steps:
        parts = [value for name, value in step.items() if name != "total_loss"]
        assert step["total_loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert step["total_loss"] > 0
    assert set(end.values()) == {0}


def test_a_frozen_loss_and_a_frozen_embedder_stay():
    model = make_model()
    proxies = losses.ProxyAnchorLoss(COUNT, 16)
    trainer = make_trainer(
        model,
        optimizers={
            "trunk_optimizer": torch.optim.SGD(model.trunk.parameters(), 0.1),
            "embedder_optimizer": torch.optim.SGD(model.embedder.parameters(), 0.1),
            "proxies_optimizer": torch.optim.SGD(proxies.parameters(), 0.1),
        },
        loss_funcs={"proxies": proxies},
        freeze_these=("embedder", "proxies"),
    )
    before = state_of(trainer)
    kept = [p.detach().clone() for p in [*model.embedder.parameters(), *proxies.parameters()]]
    trainer.train()
    assert same(kept, [*model.embedder.parameters(), *proxies.parameters()])
    assert not same(before, state_of(trainer))


def test_batchnorm_of_the_trunk_can_be_frozen():
    model = make_model()
    norms = [m for m in model.trunk.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    make_trainer(model, freeze_trunk_batchnorm=True).train()
    assert norms
    assert same(before, [norm.running_mean for norm in norms])


def test_losses_with_distances_reducers_regularizers_and_several_in_one():
    funcs = {
        "several": losses.MultipleLosses([losses.ContrastiveLoss(), losses.NTXentLoss()]),
        "regularized": losses.TripletMarginLoss(embedding_regularizer=regularizers.LpRegularizer()),
        "memory": losses.CrossBatchMemory(losses.NTXentLoss(), 16, memory_size=32),
    }
    trainer = make_trainer(loss_funcs=funcs, loss_weights={"regularized": 0.0})
    before = state_of(trainer)
    trainer.train(num_epochs=2)
    assert not same(before, state_of(trainer))
    assert all(p.isfinite().all() for p in state_of(trainer))


def test_schedulers_step_when_pml_s_names_say():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    kinds = ("iteration", "epoch")
    rates = {kind: torch.optim.lr_scheduler.StepLR(optimizer, 1, 1.0) for kind in kinds}
    names = {"iteration": "trunk_scheduler_by_iteration", "epoch": "embedder_scheduler_by_epoch"}
    trainer = make_trainer(
        model,
        optimizers=optimizer,
        lr_schedulers={names[kind]: schedule for kind, schedule in rates.items()},
    )
    trainer.train(num_epochs=3)
    assert {kind: schedule.last_epoch for kind, schedule in rates.items()} == {
        "iteration": 6,
        "epoch": 3,
    }


def test_a_image_s_size_is_what_the_transform_says():
    trainer = make_trainer()
    trainer.initialize_dataloader()
    batch = trainer.get_batch()
    assert batch.views.shape == batch.transformed.shape == (8, 3, SIZE, SIZE)
    assert batch.points.shape == (8, 4, 2)
