"""The folder of a training: what is tested when, what ends it early, and what is drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning import losses
from torch import nn

from pml_tacl import AttentionEmbedder, ContrastiveClusteringLoss
from pml_tacl.cli.run_folder import seed_everything
from pml_tacl.cli.training_run import TrainingRun
from pml_tacl.trainers.records import LossesFile, read_losses
from tests.trainers.small import Images, make_model, make_trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread", "few_channels"),
    pytest.mark.filterwarnings("ignore:one cluster contains"),
]
quick = pytest.mark.usefixtures("empty_figures")


def train(folder, epochs=3, asked=None, resume=False, test_epochs=(1,), fails_at=None, **kwargs):
    """Epochs that were tested, of a training of its own; a test in epoch `fails_at` breaks it."""
    asked = [] if asked is None else asked
    seed_everything(0)
    run = TrainingRun(folder, resume=resume)
    run.open({"seed": 0})
    trainer = make_trainer(iterations_per_epoch=1, **kwargs)

    def test(epoch):
        assert trainer.epoch == epoch
        asked.append(epoch)
        if epoch == fails_at:
            raise OSError("the disk of the test images is gone")
        weight = next(trainer.models["trunk"].parameters()).detach()
        return {"recall_at_1": float(weight.double().abs().mean().clamp(0, 1))}

    return run.train(trainer, epochs, test, test_epochs=test_epochs), asked, trainer


def contents(folder):
    kept = ("*.json", "*.csv", "*.png", "*.safetensors")
    found = (path for kind in kept for path in folder.rglob(kind))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_it_is_tested_before_between_and_after(tmp_path):
    rows, asked, trainer = train(tmp_path / "run")
    assert asked == [0, 1, 3]
    assert sorted(trainer.extra["recalls"]) == [0, 1, 3]
    assert rows == {"before": trainer.extra["recalls"][0], "after": trainer.extra["recalls"][3]}
    assert rows["before"] != rows["after"]
    every = read_losses(tmp_path / "run" / "records" / "every_loss.csv")
    assert set(every) == {*trainer.loss_funcs, "total_loss"}
    assert [len(values) for values in every.values()] == [3] * 4
    assert "history" not in trainer.extra
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {**written, **rows} == written
    assert written["config"] == {"seed": 0}
    names = {"model/config.json", "records/loss_histories.csv", "curves.png", "recall.png"}
    assert names <= set(contents(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_broken_run_ends_like_an_unbroken_one(request, tmp_path, fails_at):
    if fails_at != 1:  # curves are compared once
        request.getfixturevalue("empty_figures")
    whole, *_ = train(tmp_path / "whole")
    with pytest.raises(OSError, match="gone"):
        train(tmp_path / "broken", fails_at=fails_at)
    asked = []
    rows, *_ = train(tmp_path / "broken", asked=asked, resume=True)
    assert rows == whole
    assert asked == [epoch for epoch in (0, 1, 3) if epoch >= fails_at]
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    before = contents(tmp_path / "whole")
    again, *_ = train(tmp_path / "whole", resume=True)
    assert again == whole
    assert contents(tmp_path / "whole") == before


@quick
def test_a_hook_that_ends_the_training_ends_the_run(tmp_path):
    seen = []
    hooks = {
        "end_of_iteration_hook": lambda trainer: seen.append(trainer.epoch),
        "end_of_epoch_hook": lambda trainer: trainer.epoch < 2,
    }
    rows, asked, trainer = train(tmp_path, epochs=9, test_epochs=(1, 5), **hooks)
    assert asked == [0, 1, 2]
    assert seen == [1, 2]
    assert rows["after"] == trainer.extra["recalls"][2]
    again, asked, _ = train(tmp_path, epochs=9, test_epochs=(1, 5), resume=True, **hooks)
    assert again == rows
    assert asked == [2]  # it was measured after the last checkpoint


@quick
def test_a_hook_that_ends_it_where_it_is_tested_ends_it_too(tmp_path):
    stops = {"end_of_epoch_hook": lambda trainer: trainer.epoch < 2}
    rows, asked, trainer = train(tmp_path, epochs=4, test_epochs=(2,), **stops)
    assert asked == [0, 2]
    assert trainer.epoch == 2
    again, asked, _ = train(tmp_path, epochs=4, test_epochs=(2,), resume=True, **stops)
    assert again == rows
    assert asked == []


@quick
def test_no_test_makes_a_training_longer(tmp_path):
    _, asked, trainer = train(tmp_path, epochs=2, test_epochs=(1, 7))
    assert asked == [0, 1, 2]
    assert trainer.epoch == 2
    with pytest.raises(ValueError, match=r"epochs=1 is below the 2 epochs that .* was trained"):
        train(tmp_path, epochs=1, resume=True)


@quick
def test_a_run_of_parts_and_other_metrics_is_written_too(tmp_path):
    model = make_model()
    parts = {"trunk": model.trunk, "embedder": model.embedder}
    trainer = make_trainer(model, models=parts, iterations_per_epoch=1)
    run = TrainingRun(tmp_path / "run")
    run.open({})
    rows = run.train(trainer, 1, lambda epoch: {"NMI": 0.5})
    assert rows == {"before": {"NMI": 0.5}, "after": {"NMI": 0.5}}
    names = {path.name for path in run.folder.iterdir()}
    assert {"metrics.json", "curves.png", "checkpoints"} <= names
    assert not names & {"model", "recall.png"}
    with pytest.raises(ValueError, match="trainer must be new, got one in epoch 1"):
        run.train(trainer, 2)


@quick
def test_several_losses_in_a_list_are_recorded_and_resumed(tmp_path):
    several = [losses.ContrastiveLoss(), losses.MultipleLosses([ContrastiveClusteringLoss()])]
    funcs = {"metric_loss": losses.MultipleLosses(several)}
    train(tmp_path, epochs=1, loss_funcs=funcs)
    train(tmp_path, epochs=2, loss_funcs=funcs, resume=True)
    found = [path.name for path in (tmp_path / "records").glob("*.csv")]
    for name in ("ContrastiveLoss", "ContrastiveClusteringLoss"):
        assert any(table.startswith(f"_0_{name}_") for table in found)


@quick
def test_averaged_weights_are_the_model(tmp_path):
    *_, trainer = train(tmp_path, ema_decay=0.5)
    saved = AttentionEmbedder.from_pretrained(tmp_path / "model").state_dict()
    averaged = trainer.ema_model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in averaged.items())
    assert not torch.equal(next(trainer.whole.parameters()), next(iter(saved.values())))


@quick
def test_without_tests_there_are_no_recalls(tmp_path):
    run = TrainingRun(tmp_path / "run")
    run.open({"seed": 0})
    rows = run.train(make_trainer(iterations_per_epoch=1), 1)
    assert rows == {"before": {}, "after": {}}
    assert not (tmp_path / "run" / "recall.png").exists()
    assert (tmp_path / "run" / "curves.png").exists()


def test_one_image_has_no_neighbours(tmp_path):
    run, model = TrainingRun(tmp_path / "run"), make_model().train()
    run.open({})
    run.draw(model, [(torch.zeros(3, 32, 32), 0)], torch.ones(1, 2))
    assert model.training
    assert sorted(path.name for path in run.folder.glob("*.png")) == ["attention.png"]
    run.draw(model, [], None)  # as on all processes but the first


@pytest.mark.parametrize(("count", "with_labels"), [(2, True), (99, False)])
def test_images_are_drawn_beside_their_nearest(tmp_path, monkeypatch, count, with_labels):
    model, images = make_model(), Images(6)
    plain = model.transform(image_size=32)
    items = [(plain(images[row][0]), 0) for row in range(6)]
    embeddings = nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [1, 0.3], [0, 1],
                                                       [0.1, 1], [0.3, 1]]))  # fmt: skip
    labels = torch.tensor([0, 0, 1, 1, 1, 1]) if with_labels else None
    drawn = {}

    def gallery(queries, neighbours, correct=None, title=None):
        drawn.update(queries=queries, neighbours=neighbours, correct=correct, title=title)
        return original(queries, neighbours, correct=correct, title=title)

    from pml_tacl import visualize

    original = visualize.retrieval_gallery
    monkeypatch.setattr(visualize, "retrieval_gallery", gallery)
    run = TrainingRun(tmp_path / "run")
    run.open({"seed": 0})
    run.draw(model, items, embeddings, labels, count=count, title="six")
    assert len(drawn["queries"]) == min(count, 6)
    mean, std = (torch.tensor(model.data_config[k]).view(3, 1, 1) for k in ("mean", "std"))
    shown = [(items[row][0] * std + mean).clamp(0, 1) for row in (0, 1, 5)]
    assert torch.equal(drawn["queries"][0], shown[0])
    assert torch.equal(drawn["queries"][-1], shown[2])
    assert torch.equal(drawn["neighbours"][0][0], shown[1])  # never the image itself
    if with_labels:
        assert drawn["correct"][0][:2].tolist() == [True, False]
    else:
        assert drawn["correct"] is None
    for name in ("gallery", "attention"):
        with Image.open(run.folder / f"{name}.png") as image:
            image.verify()


def begun(folder, test, epochs=2, resume=False, **kwargs):
    """A run with a test of its own, and its trainer."""
    seed_everything(0)
    run = TrainingRun(folder, resume=resume)
    run.open({"seed": 0})
    trainer = make_trainer(iterations_per_epoch=1, **kwargs)
    return run, trainer, lambda: run.train(trainer, epochs, test, test_epochs=(1,))


@quick
@pytest.mark.slow
@pytest.mark.parametrize(
    "value",
    [np.float64(0.5), np.array(0.5), torch.tensor(0.5)],
)
def test_metrics_may_be_of_numpy_or_tensors(tmp_path, value):
    *_, go = begun(tmp_path / "run", lambda epoch: {"recall_at_1": value})
    assert go() == {"before": {"recall_at_1": 0.5}, "after": {"recall_at_1": 0.5}}
    assert json.loads((tmp_path / "run/metrics.json").read_text())["after"] == {"recall_at_1": 0.5}
    _, trainer, go = begun(tmp_path / "run", None, resume=True)
    assert go()["after"] == {"recall_at_1": 0.5}
    assert trainer.extra["recalls"] == {epoch: {"recall_at_1": 0.5} for epoch in (0, 1, 2)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"recall_at_1": "high"}, r"test\(0\)\['recall_at_1'\] must be a number, got str: 'high'"),
        (
            {"recall_at_1": np.ones(3)},
            r"test\(0\)\['recall_at_1'\] must be one number, got .*\(3,\)",
        ),
        ({"recall_at_1": None}, r"test\(0\)\['recall_at_1'\] must be a number, got NoneType"),
        ({1: 0.5}, r"test\(0\) must name its metrics by strings, got 1"),
        (0.5, r"test\(0\) must be a dict of metrics by name, got float"),
        (None, r"test\(0\) must be a dict of metrics by name, got NoneType"),
    ],
)
def test_what_is_no_metric_is_refused_before_the_first_epoch(tmp_path, found, message):
    _, trainer, go = begun(tmp_path / "run", lambda epoch: found)
    with pytest.raises(TypeError, match=message):
        go()
    assert trainer.epoch == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


@quick
def test_what_cannot_be_measured_is_told_at_once_and_costs_nothing(tmp_path, caplog):
    nan = float("nan")
    *_, go = begun(tmp_path / "run", lambda epoch: {"recall_at_1": nan, "NMI": np.float32(0.5)})
    assert go() == {"before": {"NMI": 0.5}, "after": {"NMI": 0.5}}
    assert "test(0) could not measure recall_at_1 (NaN): recall needs classes of two" in caplog.text
    text = (tmp_path / "run" / "metrics.json").read_text()
    assert "NaN" not in text
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model", "curves.png"}


@pytest.mark.parametrize("name", ["training_curves", "recall_curve", "save_figure"])
def test_a_curve_that_cannot_be_drawn_costs_nothing(tmp_path, monkeypatch, caplog, name):
    from pml_tacl import visualize

    def fail(*_, **__):
        seen.extend(path.name for path in (tmp_path / "run").iterdir())
        raise RuntimeError("no\nfont")

    seen = []
    monkeypatch.setattr(visualize, name, fail)
    *_, go = begun(tmp_path / "run", lambda epoch: {"recall_at_1": 0.5, "loss": 7.0})
    assert go()["after"] == {"recall_at_1": 0.5, "loss": 7.0}
    assert "png not drawn: RuntimeError: no font" in caplog.text
    assert {"model", "metrics.json", "checkpoints", "records"} <= set(seen)  # before any curve


def test_a_gallery_that_cannot_be_drawn_costs_nothing(tmp_path, caplog):
    run, model = TrainingRun(tmp_path / "run"), make_model()
    run.open({})
    items = [(torch.zeros(3, 32, 32), 0)]  # two embeddings, and an image that is gone
    run.draw(model, items, nn.functional.normalize(torch.rand(2, 2)))
    assert "attention.png and gallery.png not drawn: IndexError: list index out of" in caplog.text


@quick
def test_a_last_test_that_fails_loses_neither_model_nor_epoch(tmp_path):
    def test(epoch):
        if epoch == 2 and not mended:
            raise OSError("gone")
        return {"recall_at_1": 0.5}

    mended, trained = [], []
    hook = {"end_of_iteration_hook": lambda trainer: trained.append(trainer.epoch)}
    _, trainer, go = begun(tmp_path / "run", test, **hook)
    with pytest.raises(OSError, match="gone"):
        go()
    assert trained == [1, 2]
    saved = AttentionEmbedder.from_pretrained(tmp_path / "run" / "model").state_dict()
    weights = trainer.whole.state_dict()
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    mended.append(True)
    _, again, go = begun(tmp_path / "run", test, resume=True, **hook)
    assert go()["after"] == {"recall_at_1": 0.5}
    assert trained == [1, 2]  # nothing was trained again
    assert all(torch.equal(again.whole.state_dict()[name], weights[name]) for name in weights)


@quick
def test_every_loss_is_in_a_file_that_checkpoints_do_not_hold(tmp_path):
    sizes, seen = [], []

    def note(trainer):
        seen.append({name: float(value) for name, value in trainer.losses.items()})

    def measure_size(trainer):
        if trainer.epoch in (2, 8):
            path = trainer.save_checkpoint(tmp_path / "apart", keep=1)
            sizes.append(path.stat().st_size)

    hooks = {"end_of_iteration_hook": note, "end_of_epoch_hook": measure_size}
    _, _, go = begun(tmp_path / "run", None, 8, **hooks)
    go()
    found = read_losses(tmp_path / "run" / "records" / "every_loss.csv")
    assert found == {name: [row[name] for row in seen] for name in seen[0]}
    # Half of the records is what has not been written yet; a loss more is no more bytes.
    assert abs(sizes[1] - sizes[0]) < 600


def test_losses_are_read_many_together(tmp_path, monkeypatch):
    from pml_tacl.trainers import records

    reads = []
    numbers = records._numbers
    monkeypatch.setattr(records, "_numbers", lambda v: reads.append(len(v)) or numbers(v))
    file = LossesFile(tmp_path / "records" / "every_loss.csv")
    assert read_losses(file.path) == {}
    values = torch.rand(250, dtype=torch.float64)
    for at, value in enumerate(values):
        file.add(at + 1, {"a": value.float(), "total_loss": value, "off": 0})
    assert reads == [100] * 3 + [100] * 3
    file.flush()
    file.flush()
    assert reads[6:] == [50] * 3
    found = read_losses(file.path)
    assert found["total_loss"] == values.tolist()
    assert found["a"] == values.float().tolist()
    assert found["off"] == [0.0] * 250


@pytest.mark.parametrize("images", ["run", "run/in/it", "", "run/../run"])
def test_a_run_and_its_images_lie_apart(tmp_path, images):
    with pytest.raises(ValueError, match=r"the run, .*, and the images, .*, must be in separate"):
        TrainingRun(tmp_path / "run", apart_from=[tmp_path / "a", None, tmp_path / images])
    assert list(tmp_path.iterdir()) == []
    TrainingRun(tmp_path / "run", apart_from=[tmp_path / "runner", None])


def test_wrong_uses_are_named(tmp_path):
    run = TrainingRun(tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"not open: call open\(config\)"):
        run.train(make_trainer(), 1)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 1, got 0"):
        run.train(make_trainer(), 0)
    run.open({"seed": 0})
    with pytest.raises(ValueError, match="already contains a run: give --resume"):
        TrainingRun(tmp_path / "run")
    with pytest.raises(ValueError, match=r"started with other settings \(seed\)"):
        TrainingRun(tmp_path / "run", resume=True).open({"seed": 1})
