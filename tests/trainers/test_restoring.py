"""A checkpoint is put back wholly or not at all, and schedules go on as they were planned."""

import io

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses
from torch.optim import lr_scheduler as schedules

from pml_tacl import AttentionEmbedder, ContrastiveClusteringLoss, UnsupervisedTrainer
from pml_tacl.trainers import checkpoint as checkpoint_module
from pml_tacl.trainers.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_checkpoint_distributed,
)

from .small import Images, make_model, make_trainer, same, state_of

pytestmark = [
    pytest.mark.usefixtures("one_thread", "few_channels"),
    pytest.mark.filterwarnings("ignore:one cluster contains"),
]
STEPS = 2  # iterations of an epoch


def new(folder=None, make=None, optimizer=None, rate=0.05, **kwargs):
    """A trainer; `make` gives its schedulers from the optimizer."""
    model = kwargs.pop("model", None) or make_model()
    parameters = kwargs.pop("groups", None) or model.parameters()
    made = (optimizer or torch.optim.SGD)(parameters, lr=rate)
    settings = {"optimizers": made, "checkpoint_folder": folder, "iterations_per_epoch": STEPS}
    settings["loss_funcs"] = {"metric_loss": losses.MultiSimilarityLoss()}
    if make is not None:
        settings["lr_schedulers"] = make(made)
    return make_trainer(model, **(settings | kwargs))


def rates_of(trainer, epochs, folder=None):
    """The learning rate of each iteration that is trained."""
    seen = []
    optimizer = trainer.optimizers["trunk_optimizer"]
    trainer.end_of_iteration_hook = lambda _: seen.append(float(optimizer.param_groups[0]["lr"]))
    if folder is not None:
        trainer.load_checkpoint(folder)
    trainer.train(trainer.epoch + 1, epochs)
    return seen


MADE = {
    "cosine by epoch": lambda n: (
        lambda o: {"trunk_scheduler_by_epoch": schedules.CosineAnnealingLR(o, n)}
    ),
    "cosine by iteration": lambda n: (
        lambda o: {"trunk_scheduler_by_iteration": schedules.CosineAnnealingLR(o, n * STEPS)}
    ),
    "one cycle": lambda n: (
        lambda o: {
            "trunk_scheduler_by_iteration": schedules.OneCycleLR(o, 0.05, total_steps=n * STEPS + 1)
        }
    ),
    "linear": lambda n: (
        lambda o: {"trunk_scheduler_by_epoch": schedules.LinearLR(o, 1.0, 0.1, total_iters=n)}
    ),
    "polynomial": lambda n: (
        lambda o: {"trunk_scheduler_by_epoch": schedules.PolynomialLR(o, total_iters=n)}
    ),
    "warm-up, then cosine": lambda n: (
        lambda o: {
            "trunk_scheduler_by_epoch": schedules.SequentialLR(
                o,
                [schedules.LinearLR(o, 0.1, total_iters=1), schedules.CosineAnnealingLR(o, n - 1)],
                [1],
            )
        }
    ),
    "of a function": lambda n: (
        lambda o: {"trunk_scheduler_by_epoch": schedules.LambdaLR(o, lambda epoch: 1 - epoch / n)}
    ),
    "two on one optimizer": lambda n: (
        lambda o: {
            "trunk_scheduler_by_iteration": schedules.CosineAnnealingLR(o, n * STEPS),
            "embedder_scheduler_by_epoch": schedules.StepLR(o, 1, 0.9),
        }
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "within"), [*((kind, False) for kind in MADE), ("two on one optimizer", True)]
)
def test_a_schedule_for_more_epochs_goes_on_as_if_planned_so(tmp_path, kind, within):
    expected = rates_of(new(make=MADE[kind](6)), 6)
    short = new(tmp_path, MADE[kind](3), checkpoint_every=1, keep=9)
    assert rates_of(short, 3) != expected[: 3 * STEPS]
    path = checkpoints(tmp_path)[-2 if within else -1]
    done = 3 * STEPS - within
    again = new(tmp_path / "again", MADE[kind](6))
    found = rates_of(again, 6, path)
    assert found == pytest.approx(expected[done:], rel=1e-6)
    # And as it is then, it goes on bit for bit.
    last = new(tmp_path / "last", MADE[kind](6))
    last.load_checkpoint(tmp_path / "again" / "epoch_0005.pt")
    last.train(6, 6)
    assert same(state_of(last), state_of(again))


@pytest.mark.slow
def test_the_trainer_s_own_schedule_goes_on_for_more_epochs(tmp_path):
    def own(folder=None):
        model = make_model()
        settings = {"checkpoint_folder": folder, "iterations_per_epoch": STEPS, "progress": False}
        return UnsupervisedTrainer(model, dataset=Images(), image_size=32, **settings)

    def rates(trainer, first, last):
        seen = []
        (optimizer,) = trainer.optimizers.values()
        trainer.end_of_iteration_hook = lambda _: seen.append(optimizer.param_groups[0]["lr"])
        trainer.train(first, last)
        return seen

    expected = rates(own(), 1, 4)
    first = own(tmp_path)
    assert rates(first, 1, 2) != expected[: 2 * STEPS]
    again = own(tmp_path)
    again.load_checkpoint()
    assert rates(again, 3, 4) == pytest.approx(expected[2 * STEPS :], rel=1e-6)
    assert rates(first, 3, 4) == pytest.approx(expected[2 * STEPS :], rel=1e-6)  # without a file


def test_a_model_that_would_be_trained_otherwise_is_refused(tmp_path):
    new(tmp_path).train(1, 1)
    for name, message in (
        ("from_scratch", "from_scratch=True, .* has False.*: set model.from_scratch"),
        ("freeze_batchnorm", "freeze_batchnorm=False, .* has True.*: build it with"),
    ):
        model = make_model()
        setattr(model if name == "from_scratch" else model.trunk, name, name != "from_scratch")
        with pytest.raises(ValueError, match=message):
            new(model=model).load_checkpoint(tmp_path)


def test_a_schedule_that_ends_too_soon_is_named(tmp_path):
    rates_of(new(tmp_path, MADE["one cycle"](3)), 3)
    trainer = new(None, MADE["one cycle"](2))
    with pytest.raises(ValueError, match="trunk_scheduler_by_iteration ends before epoch 3"):
        trainer.load_checkpoint(tmp_path)


def test_going_back_to_a_kept_state_resets_the_schedule_too(tmp_path):
    trainer = new(tmp_path, MADE["cosine by epoch"](4), keep=9)
    first = rates_of(trainer, 4)
    again = rates_of(trainer, 4, tmp_path / "epoch_0002.pt")
    assert again == first[2 * STEPS :]


def test_rates_of_numpy_resume_bit_for_bit(tmp_path):
    def make(optimizer):
        decay = np.float32(0.9)
        return {
            "trunk_scheduler_by_epoch": schedules.ExponentialLR(optimizer, decay),
            "embedder_scheduler_by_iteration": schedules.LambdaLR(
                optimizer, lambda step: np.cos(step / np.float64(9))
            ),
        }

    def trainer(folder):
        model = make_model()
        rate = np.geomspace(1e-3, 1e-1, 3)[1]
        groups = [
            {"params": list(model.trunk.parameters()), "lr": np.float32(rate)},
            {"params": list(model.embedder.parameters()), "lr": rate},
        ]
        counts = {"recluster_every": np.int64(1), "images_per_cluster": np.int32(2)}
        return new(folder, make, model=model, groups=groups, rate=rate, keep=9, **counts)

    whole = trainer(tmp_path / "whole")
    whole.train(1, 3)
    again = trainer(tmp_path / "again")
    again.load_checkpoint(tmp_path / "whole" / "epoch_0001.pt")
    again.train(2, 3)
    assert same(state_of(whole), state_of(again))
    for one, other in zip(
        whole.optimizers["trunk_optimizer"].param_groups,
        again.optimizers["trunk_optimizer"].param_groups,
        strict=True,
    ):
        assert float(one["lr"]) == float(other["lr"])


def test_a_value_that_cannot_be_kept_is_refused_when_it_is_written(tmp_path):
    trainer = new(tmp_path)
    trainer.extra["score"] = [np.float64(0.5), object()]
    with pytest.raises(
        TypeError, match=r"^trainer\.extra\['score'\]\[1\] is of a type .*\(object\)"
    ):
        trainer.train(1, 1)
    assert list(tmp_path.glob("*.pt")) == []


PARTS = {
    "optimizer": ({"optimizer": torch.optim.AdamW}, "trunk_optimizer of type SGD .* is AdamW"),
    "scheduler": (
        {"make": lambda o: {"trunk_scheduler_by_epoch": schedules.StepLR(o, 1)}},
        "trunk_scheduler_by_epoch of type CosineAnnealingLR .* is StepLR",
    ),
    "no scheduler": ({"make": None}, r"contains lr_schedulers \['trunk_scheduler_by_epoch'\] and"),
    "backbone": (
        {"model": "test_vit"},
        r"trunk does not fit the trainer's \(model\.conv1\.0\.weight: \(16, 3, 3, 3\) in the "
        "checkpoint, missing in the trainer",
    ),
    "dimension": ({"model": 32}, r"projection\.\w+: .* in the checkpoint, .* in the"),
    "loss": (
        {"loss_funcs": {"metric_loss": losses.ProxyAnchorLoss(4, 16)}},
        r"metric_loss does not fit .*\(proxies: missing in the checkpoint, \(4, 16\) in",
    ),
    "names of losses": (
        {"loss_funcs": {"clustering_loss": ContrastiveClusteringLoss()}},
        r"loss_funcs \['metric_loss'\] and the trainer has \['clustering_loss'\]",
    ),
    "groups": ({"groups": 2}, r"has \d+ parameters in 1 group and .* parameters in 2 groups"),
    "averaged": ({"ema_decay": 0.5}, "without averaged weights"),
    "count": ({"dataset": 20}, "was written with 24 images, but the data set has 20"),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_differs_is_named_in_one_line_and_nothing_is_changed(tmp_path, part):
    cosine = MADE["cosine by epoch"](3)
    new(tmp_path, cosine).train(1, 1)
    change, message = PARTS[part]
    change = {"make": cosine} | change
    if change.get("model") == 32:
        change["model"] = AttentionEmbedder("test_resnet", embedding_dim=32, pooling="covariance")
    elif "model" in change:
        change["model"] = make_model(backbone=change["model"])
    if "groups" in change:
        change["model"] = make_model()
        change["groups"] = [
            {"params": list(p.parameters())}
            for p in (change["model"].trunk, change["model"].embedder)
        ]
    if "dataset" in change:
        change["dataset"] = Images(20)
    trainer = new(None, **change)
    before = everything(trainer)
    with pytest.raises(ValueError, match=message) as told:
        trainer.load_checkpoint(tmp_path)
    assert "\n" not in str(told.value)
    assert everything(trainer) == before


def everything(trainer):
    """The state of all parts, in a form that compares."""
    kinds = ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs")
    file = io.BytesIO()
    torch.save(
        {k: {n: p.state_dict() for n, p in getattr(trainer, k).items()} for k in kinds}, file
    )
    return file.getvalue(), trainer.epoch, trainer.labels.tolist(), dict(trainer.extra)


@pytest.mark.parametrize("broken", ["optimizers", "records", "counters"])
def test_a_failure_half_way_leaves_the_trainer_as_it_was(tmp_path, broken, monkeypatch):
    new(tmp_path, MADE["cosine by epoch"](3)).train(1, 1)
    state = load_checkpoint(tmp_path)
    if broken == "optimizers":
        state["parts"]["optimizers"]["trunk_optimizer"]["param_groups"] = None
    elif broken == "counters":
        state["counters"]["metric_loss"] = {"no.such.module": {"queue_idx": 1}}
    else:
        state["records"] = {}
    path = tmp_path / "other" / "epoch_0001.pt"
    path.parent.mkdir()
    torch.save(state, path)
    trainer = new(None, MADE["cosine by epoch"](3), model=make_model(seed=1))
    trainer.record_keeper = object()
    before = everything(trainer)
    with pytest.raises((TypeError, AttributeError)):
        trainer.load_checkpoint(path)
    assert everything(trainer) == before


def test_no_path_and_no_folder_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new(tmp_path / "checkpoints").train(1, 1)  # of somebody else
    with pytest.raises(ValueError, match="load_checkpoint needs a path: the trainer has no check"):
        new().load_checkpoint()
    for gone in ("none", "none.pt", tmp_path / "none" / "epoch_0001.pt"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none"):
            new(tmp_path / "checkpoints").load_checkpoint(gone)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["metric-loss"], "name 'metric-loss' must"),
        (["ms loss"], "name 'ms loss' must consist"),
        (["loss.1"], "name 'loss.1' must consist"),
        (["2nd_loss"], "name '2nd_loss' must consist"),
        (["a/b"], "name 'a/b' must consist"),
        (["../../x"], "name '../../x' must consist"),
        ([""], "name '' must consist"),
        (["a]"], r"name 'a\]' must consist"),
        ([3], "name 3 must consist"),
        (["x" * 101], "must be at most 100 bytes long"),
        (["ID"], "name 'ID' is reserved"),
        (["total_loss"], "name 'total_loss' is reserved"),
        (["Sqlite_x"], "name 'Sqlite_x' is reserved"),
        (["a_loss", "A_Loss"], "names 'a_loss' and 'A_Loss' differ by case alone"),
        (["ä", "a\u0308"], "differ by case alone"),
    ],
)
def test_names_of_losses_that_records_cannot_hold_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        new(loss_funcs={name: losses.MultiSimilarityLoss() for name in names})


@pytest.mark.parametrize("disk", ["common", "another file", "none"])
def test_another_rank_reads_the_file_itself_if_it_can(tmp_path, monkeypatch, disk):
    """One process plays both: what the main process sends, and what the other asks for."""
    trainer = new(tmp_path / "run")
    trainer.train(num_epochs=1)
    whole, sent = load_checkpoint(tmp_path / "run"), []

    def run_on_main(function, doing):
        sent.append(doing)
        if doing == "sending a checkpoint":
            return whole
        place, stamp = function()
        if disk == "another file":
            return place, (stamp[0], stamp[1] - 1)
        return (place if disk == "common" else f"{place} of another machine"), stamp

    read, reads = checkpoint_module._read, []
    monkeypatch.setattr(checkpoint_module, "_read", lambda at: reads.append(at) or read(at))
    monkeypatch.setattr(checkpoint_module, "run_on_main", run_on_main)
    monkeypatch.setattr(checkpoint_module, "is_main", lambda: False)
    if disk != "common":
        # Here the main process's own list is the other's too, which has read nothing.
        monkeypatch.setattr(checkpoint_module, "all_reduce_max", lambda _: 1)
    state = load_checkpoint_distributed(tmp_path / "run")
    assert torch.equal(state["labels"], whole["labels"])
    assert len(reads) == 1 + (disk == "common")
    assert sent == ["reading a checkpoint", "sending a checkpoint"][: 1 + (disk != "common")]
