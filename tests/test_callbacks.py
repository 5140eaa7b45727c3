import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss
from pytorch_metric_learning.trainers import MetricLossOnly
from sklearn.metrics import adjusted_mutual_info_score
from torch import nn

from pml_tacl import AttentionEmbedder, KMeansPseudoLabeler, SiameseTransform, UnsupervisedTrainer
from pml_tacl import callbacks as cb
from pml_tacl.callbacks.loggers import Logger, TensorBoardLogger, WandbLogger, as_image
from pml_tacl.evaluation import evaluate
from pml_tacl.models.receptive_field import measure_cell_offset

pytestmark = [
    pytest.mark.usefixtures("one_thread", "few_channels"),
    # Images of noise hardly fall into groups: rounding decides whether one of four is huge.
    pytest.mark.filterwarnings("ignore:one cluster contains"),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_images(count=32):
    cells = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize((32, 32)) for image in cells]


def ours(hook, count=32, labeler=None, **kwargs):
    torch.manual_seed(0)
    model = AttentionEmbedder("test_resnet", embedding_dim=8, pooling="covariance")
    return UnsupervisedTrainer(
        model,
        torch.optim.SGD(model.parameters(), 0.05),
        8,
        {"metric_loss": MultiSimilarityLoss()},
        [(image, 0) for image in make_images(count)],
        transform=SiameseTransform(32, 2),
        eval_transform=model.transform(image_size=32),
        labeler=labeler or KMeansPseudoLabeler(4),
        images_per_cluster=2,
        progress=False,
        end_of_epoch_hook=hook,
        iterations_per_epoch=2,
        **kwargs,
    )


def labelled(count=24):
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.standard_normal((count, 6))).float()
    return torch.utils.data.TensorDataset(rows, torch.arange(count) % 3)


def pmls(hook, rate=0.1):
    torch.manual_seed(0)
    models = {"trunk": nn.Linear(6, 5), "embedder": nn.Linear(5, 4)}
    optimizers = {f"{k}_optimizer": torch.optim.Adam(m.parameters(), rate)
                  for k, m in models.items()}  # fmt: skip
    return MetricLossOnly(
        models,
        optimizers,
        8,
        {"metric_loss": ContrastiveLoss()},
        labelled(),
        dataloader_num_workers=0,
        end_of_epoch_hook=hook,
    )


class Written(list):
    """A logger of one's own."""

    def log_scalars(self, step, values):
        self.append(("scalars", step, dict(values)))

    def log_images(self, step, images):
        self.append(("images", step, {name: as_image(v).size for name, v in images.items()}))

    def log_embeddings(self, step, embeddings, names, thumbnails=None):
        self.append(("embeddings", step, embeddings, list(names), thumbnails))

    def close(self):
        self.append("closed")


def test_a_chain_calls_all_and_stops_if_any_says_so():
    called = []
    hooks = [
        lambda t, i=i, a=a: called.append((t, i)) or a for i, a in enumerate((None, False, True))
    ]
    assert cb.chain(*hooks)("trainer") is False
    assert called == [("trainer", 0), ("trainer", 1), ("trainer", 2)]
    assert cb.chain(hooks[0], hooks[2])("trainer") is None
    assert cb.chain()(1) is None


def test_a_stopping_hook_in_a_chain_ends_a_training_of_pmls():
    trainer = pmls(cb.chain(lambda trainer: None, lambda trainer: trainer.epoch < 2))
    trainer.train(num_epochs=9)
    assert trainer.epoch == 2


def test_evaluating_keeps_the_best_and_the_last_apart(tmp_path, monkeypatch):
    values = iter([0.2, 0.6, 0.6, 0.4])
    monkeypatch.setattr(cb.hooks, "evaluate", lambda *a, **k: {"recall_at_1": next(values)})
    logger, seen = Written(), []
    hook = cb.Evaluate(labelled(), folder=tmp_path, logger=logger)
    trainer = pmls(cb.chain(hook, lambda t: seen.append(t.models["trunk"].weight.clone()) or None))
    trainer.train(num_epochs=4)
    assert hook.history == {e: {"recall_at_1": v} for e, v in enumerate((0.2, 0.6, 0.6, 0.4), 1)}
    assert logger[1] == ("scalars", 2, {"validation/recall_at_1": 0.6})
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt"))
    assert files == ["best/epoch_0002.pt", "last/epoch_0004.pt"]  # the first of equals
    for name, epoch in (("best", 2), ("last", 4)):
        fresh = pmls(None)
        assert cb.restore(fresh, tmp_path / name) == epoch == fresh.epoch
        torch.testing.assert_close(fresh.models["trunk"].weight, seen[epoch - 1], rtol=0, atol=0)
        state = fresh.optimizers["trunk_optimizer"].state_dict()["state"]
        assert float(state[0]["step"]) == 3 * epoch


def test_evaluating_measures_what_evaluate_does_every_so_many_epochs():
    hook = cb.Evaluate(labelled(), every=2, metrics=["recall_at_3"])
    trainer = pmls(hook)
    trainer.train(num_epochs=4)
    assert list(hook.history) == [2, 4]
    model = nn.Sequential(trainer.models["trunk"], trainer.models["embedder"])
    expected = evaluate(model, labelled(), metrics=["recall_at_1", "recall_at_3"], progress=False)
    assert hook.history[4] == expected
    assert set(expected) == {"recall_at_1", "recall_at_3"}
    assert trainer.models["trunk"].training


def test_evaluating_searches_a_reference_and_loads_as_asked(monkeypatch):
    given = []
    monkeypatch.setattr(cb.hooks, "evaluate", lambda *a, **k: given.append(k) or evaluate(*a, **k))
    # Not in the same order, or each would be left out of its own answers.
    reference = torch.utils.data.Subset(labelled(), list(range(23, -1, -1)))
    hook = cb.Evaluate(labelled(), reference=reference, batch_size=5, num_workers=1)
    pmls(hook).train(num_epochs=1)
    assert (given[0]["batch_size"], given[0]["num_workers"]) == (5, 1)
    assert hook.history[1]["recall_at_1"] == 1  # every image is in the reference, too


def test_without_labels_the_last_is_kept_and_nothing_is_best(tmp_path):
    pmls(cb.Evaluate(folder=tmp_path)).train(num_epochs=2)
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["epoch_0002.pt"]
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    with pytest.raises(FileNotFoundError, match=r"folder='.*best' contains no state"):
        cb.restore(pmls(None), tmp_path / "best")
    other = pmls(None)
    other.models["third"] = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"contains models \['embedder', 'trunk'\] and the trainer"
    ):
        cb.restore(other, tmp_path / "last")


def test_our_trainer_remembers_the_best_when_it_is_resumed(tmp_path, monkeypatch):
    values = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(cb.hooks, "evaluate", lambda *a, **k: {"recall_at_1": next(values)})
    trainer = ours(cb.Evaluate(labelled(), folder=tmp_path))
    trainer.train(num_epochs=2)
    again = ours(cb.Evaluate(labelled(), folder=tmp_path))
    assert cb.restore(again, tmp_path / "last") == 2
    again.train(start_epoch=3, num_epochs=3)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt"))
    assert files == ["best/epoch_0002.pt", "last/epoch_0003.pt"]
    best = ours(None)
    cb.restore(best, tmp_path / "best")
    torch.testing.assert_close(best.labels, trainer.labels)


def test_a_better_earlier_epoch_replaces_the_best_of_a_later_one(tmp_path):
    hook = cb.Evaluate(folder=tmp_path)
    trainer = types.SimpleNamespace(epoch=5, **dict.fromkeys(
        ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs")))  # fmt: skip
    hook(trainer)
    trainer.epoch = 3
    hook(trainer)
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["epoch_0003.pt"]


def test_stability_is_the_agreement_of_two_clusterings():
    seen = []
    hook = cb.EarlyStopping("stability", patience=99, logger=(logger := Written()))
    trainer = ours(cb.chain(hook, lambda t: seen.append(t.labels.clone()) or None), warmup_epochs=1)
    trainer.train(num_epochs=4)
    assert list(hook.history) == [3, 4]  # the first clustering has none before it
    for epoch in (3, 4):
        expected = adjusted_mutual_info_score(seen[epoch - 2], seen[epoch - 1])
        assert hook.history[epoch] == pytest.approx(expected)
    assert logger[0] == ("scalars", 3, {"early_stopping/stability": hook.history[3]})


def test_noise_is_left_out_of_the_agreement():
    hook = cb.EarlyStopping("stability")
    first, second = torch.tensor([0, 0, 1, 1, -1, 1]), torch.tensor([5, 5, 3, 3, 3, -1])
    trainer = types.SimpleNamespace(epoch=1, labels=first, centroids=torch.eye(6), embeddings=None)
    assert hook(trainer) is None
    trainer.labels, trainer.epoch = second, 2
    hook(trainer)
    assert hook.history == {2: pytest.approx(1.0)}


def slow_separation(trainer):
    rows, labels = trainer.embeddings.numpy(), trainer.labels.numpy()
    rows, labels = (x[(labels >= 0) & np.isfinite(rows).all(1)] for x in (rows, labels))
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centroids = {y: rows[labels == y].sum(0) for y in set(labels.tolist())}
    gaps = []
    for row, label in zip(rows, labels.tolist(), strict=True):
        similar = {y: row @ c / np.linalg.norm(c) for y, c in centroids.items()}
        gaps.append(similar.pop(label) - max(similar.values()))
    return np.mean(gaps)


def test_separation_is_how_much_nearer_the_own_centroid_is():
    hook = cb.EarlyStopping("separation", patience=99)
    trainer = ours(hook)
    trainer.train(num_epochs=1)
    expected = slow_separation(trainer)
    assert hook.history[1] == pytest.approx(expected, rel=1e-4)
    trainer.centroids = trainer.centroids.roll(1, 0)  # wherever the batches have led them
    hook(trainer)
    assert hook.history[1] == pytest.approx(expected, rel=1e-4)
    trainer.labels[:5] = -1
    trainer.embeddings[5] = float("nan")
    hook(trainer)
    assert slow_separation(trainer) != pytest.approx(expected, rel=1e-4)
    assert hook.history[1] == pytest.approx(slow_separation(trainer), rel=1e-4)


def test_a_training_stops_after_patience_without_a_rise():
    values = iter([0.1, 0.5, 0.5005, 0.5, 0.504, 0.9])
    hook = cb.EarlyStopping(lambda trainer: next(values), patience=3, min_delta=0.01)
    trainer = pmls(hook)
    trainer.train(num_epochs=20)
    assert trainer.epoch == 5
    values = iter([0.9, 0.1, 0.2, None, 0.3])
    hook = cb.EarlyStopping(lambda trainer: next(values), patience=2, min_delta=0, start=2)
    trainer = pmls(hook)
    trainer.train(num_epochs=4)
    assert hook.history == {2: 0.1, 3: 0.2}


def test_patience_goes_on_when_a_training_is_resumed(tmp_path):
    def hook():
        return cb.EarlyStopping(lambda trainer: 0.5, patience=3)

    first = ours(hook())
    first.train(num_epochs=2)
    path = first.save_checkpoint(tmp_path)
    again = ours(hook())
    again.load_checkpoint(path)
    again.train(start_epoch=3, num_epochs=9)
    assert again.epoch == 4


def test_wrong_arguments(monkeypatch):
    for wrong in ("loss", None):
        with pytest.raises(ValueError, match=f"criterion must be one of .* func.*, got {wrong!r}"):
            cb.EarlyStopping(wrong)
    with pytest.raises(ValueError, match="patience must be an integer of at least 1, got 0"):
        cb.EarlyStopping(patience=0)
    for wrong in (float("nan"), -0.1, "a"):
        with pytest.raises(ValueError, match=f"min_delta must be a finite .* 0, got {wrong!r}"):
            cb.EarlyStopping(min_delta=wrong)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        cb.Evaluate(every=0)
    with pytest.raises(TypeError, match="MetricLossOnly has no pseudo-labels to judge: give Early"):
        pmls(cb.EarlyStopping()).train()
    monkeypatch.setattr(cb.hooks, "evaluate", lambda *a, **k: {"recall_at_1": 1.0})
    with pytest.raises(ValueError, match="metric must be one of recall_at_1, got 'recall'"):
        pmls(cb.Evaluate(labelled(), metric="recall")).train()
    with pytest.raises(ValueError, match="number of images must be an integer of at least 2"):
        cb.LogImages(Written(), make_images(1), None)
    with pytest.raises(ValueError, match=r"^names must have as many entries as .*, 3, got 1"):
        cb.LogImages(Written(), make_images(3), None, names=["a"])


def test_losses_and_images_reach_a_logger_of_ones_own(monkeypatch):
    from pml_tacl import visualize

    logger, offsets = Written(), []
    overlay = visualize.attention_overlay
    monkeypatch.setattr(
        visualize,
        "attention_overlay",
        lambda *args, cell_offset: offsets.append(cell_offset) or overlay(*args),
    )
    assert isinstance(logger, Logger)
    shown = make_images(10)
    transform = AttentionEmbedder("test_resnet", embedding_dim=8).transform(image_size=32)
    draw = cb.LogImages(logger, shown, transform, every=2, shown=3, neighbours=20)
    trainer = ours(draw, end_of_iteration_hook=cb.LogLosses(logger, every=3))
    trainer.train(num_epochs=2)
    losses = [entry for entry in logger if entry[0] == "scalars"]
    assert [step for _, step, _ in losses] == [0, 3]
    assert set(losses[0][2]) == {"loss/metric_loss", "loss/total_loss"}
    assert losses[0][2]["loss/total_loss"] > 0
    (images,) = [entry for entry in logger if entry[0] == "images"]
    assert images[1] == 2
    assert set(images[2]) == {"images/gallery", "images/attention"}
    (written,) = [entry for entry in logger if entry[0] == "embeddings"]
    _, step, embeddings, names, thumbnails = written
    assert (step, names, len(thumbnails)) == (2, [str(i) for i in range(10)], 10)
    assert trainer.models["trunk"].training
    assert offsets == [measure_cell_offset(trainer.models["trunk"], (32, 32))]
    assert max(offsets[0]) < 0  # up and left
    model = nn.Sequential(trainer.models["trunk"], trainer.models["embedder"]).eval()
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in shown]))
    torch.testing.assert_close(embeddings, expected)


def test_a_model_without_attention_has_a_gallery_alone():
    logger = Written()
    trainer = pmls(None)
    trainer.epoch = 1
    hook = cb.LogImages(
        logger, make_images(4), lambda p: torch.tensor(p.getpixel((0, 0)) * 2) / 255
    )
    hook(trainer)
    assert set(logger[0][2]) == {"images/gallery"}


@pytest.mark.parametrize("logger", [TensorBoardLogger, WandbLogger])
def test_what_is_not_installed_is_said_in_one_line(logger, monkeypatch, tmp_path):
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs (\w+): pip install \1$") as stop:
        logger(tmp_path) if logger is TensorBoardLogger else logger()
    assert "\n" not in str(stop.value)


def test_tensorboard_gets_numbers_images_and_the_projector(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, side=16)
    assert isinstance(logger, Logger)
    logger.log_scalars(3, {"loss/a": 0.5})
    logger.log_scalars(4, {"loss/a": torch.tensor(0.25)})
    logger.log_images(3, {"red": Image.new("RGB", (12, 7), "red")})
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.5]])
    thumbnails = [Image.new("RGB", (9, 5), c) for c in ("red", "lime", "blue")]
    logger.log_embeddings(3, rows, ["a\tb", "c\n", "d"], thumbnails)
    logger.log_embeddings(4, rows, ["a", "b", "c"])
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/a")] == [(3, 0.5), (4, 0.25)]
    (image,) = events.Images("red")
    assert (image.step, image.width, image.height) == (3, 12, 7)
    (folder,) = tmp_path.glob("00003/*")
    assert (folder / "tensors.tsv").read_text().split() == [
        "1.0",
        "2.0",
        "3.0",
        "4.0",
        "5.0",
        "6.5",
    ]
    assert (folder / "metadata.tsv").read_text().splitlines() == ["a b", "c", "d"]
    with Image.open(folder / "sprite.png") as sprite:
        assert sprite.convert("RGB").getpixel((20, 8)) == (0, 255, 0)


class FakeWandb(types.ModuleType):
    """The part of wandb that is used, which remembers what it was told."""

    def __init__(self):
        super().__init__("wandb")
        self.logged, self.axes, self.opened, self.finished = [], {}, [], 0

    def init(self, **kwargs):
        self.opened.append(kwargs)
        return self

    def define_metric(self, name, step_metric):
        assert name not in self.axes
        self.axes[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1

    def Image(self, image):
        return ("image", image.size)

    class Table:
        def __init__(self, columns):
            self.columns, self.rows = columns, []

        def add_data(self, *values):
            assert len(values) == len(self.columns)
            self.rows.append(values)


def test_weights_and_biases_gets_numbers_images_and_a_table(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = WandbLogger(project="p", mode="offline")
    assert isinstance(logger, Logger)
    assert fake.opened == [{"project": "p", "mode": "offline"}]
    logger.log_scalars(70, {"loss/a": torch.tensor(0.5)})
    logger.log_scalars(2, {"validation/r": 1, "loss/a": 0.25})  # an epoch, after an iteration
    logger.log_images(2, {"images/x": Image.new("L", (4, 3))})
    logger.log_embeddings(2, torch.tensor([[1.0, 2.0]]), ["n"], [Image.new("RGB", (5, 6))])
    logger.log_embeddings(3, torch.tensor([[1.0, 2.0]]), ["n"])
    assert fake.logged[:4] == [
        {"loss/a": 0.5, "step/loss": 70},
        {"validation/r": 1.0, "step/validation": 2},
        {"loss/a": 0.25, "step/loss": 2},
        {"images/x": ("image", (4, 3)), "step/images": 2},
    ]
    assert fake.axes["loss/a"] == "step/loss"
    table = fake.logged[4]["embeddings"]
    assert table.columns == ["name", "image", "d0", "d1"]
    assert table.rows == [("n", ("image", (5, 6)), 1.0, 2.0)]
    assert fake.logged[5]["embeddings"].columns == ["name", "d0", "d1"]
    logger.close()
    assert fake.finished == 1
    WandbLogger(fake).close()
    assert (fake.finished, len(fake.opened)) == (1, 1)
    with pytest.raises(ValueError, match="run is open already: leave out project"):
        WandbLogger(fake, project="p")
    for wrong, message in (
        ((torch.ones(3), ["a"]), r"embeddings must be \(N, D\), got \(3,\)"),
        ((torch.ones(2, 3), ["a"]), "^names must have as many entries as .*, 2, got 1"),
        ((torch.ones(1, 3), ["a"], []), "^thumbnails .*, 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            logger.log_embeddings(1, *wrong)


def test_anything_that_is_a_image_can_be_logged():
    from matplotlib.figure import Figure

    assert as_image(Figure(figsize=(2, 1), dpi=50)).size == (100, 50)
    assert as_image(torch.zeros(3, 5, 7)).size == (7, 5)
    assert as_image(np.zeros((5, 7, 3), np.uint8)).mode == "RGB"
    with pytest.raises(TypeError, match="must be a PIL image, array or tensor"):
        as_image("x.png")
