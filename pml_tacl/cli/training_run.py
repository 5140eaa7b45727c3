"""A complete training for scripts: run folder, records, tests before and after, and figures."""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pml_tacl.callbacks import chain
from pml_tacl.callbacks.trainer_access import shown_and_nearest
from pml_tacl.cli import run_folder as runs
from pml_tacl.distributed.session import is_main, run_on_main
from pml_tacl.models import AttentionEmbedder
from pml_tacl.models.preprocessing import as_seen
from pml_tacl.trainers.checkpoint import checkpoints
from pml_tacl.trainers.fitting import fit_to
from pml_tacl.trainers.records import LossesFile, read_losses
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError, InputTypeError
from pml_tacl.utils.files import write_json
from pml_tacl.utils.modes import evaluating
from pml_tacl.utils.plain import number
from pml_tacl.utils.runs import remove_index
from pml_tacl.utils.versions import versions

if TYPE_CHECKING:
    from pml_tacl.trainers.unsupervised_trainer import UnsupervisedTrainer

_LOGGER = logging.getLogger(__name__)
_LOSSES = "records/every_loss.csv"
Metrics = dict[str, float]
Rows = dict[str, Mapping[str, float]]


class TrainingRun:
    """Run folder of a training, with methods to open, train, resume and draw.

    A complete run contains ``metrics.json``, ``model/`` (of an :class:`AttentionEmbedder`, with
    averaged weights if there are any), ``records/`` of record-keeper, ``checkpoints/``,
    ``curves.png``, and ``recall.png`` if recall was measured. ``records/every_loss.csv`` contains
    all losses of all iterations. Under torchrun, within
    :func:`pml_tacl.distributed.inference.session`, all processes call all methods, and the main
    process writes.

    Args:
        folder: folder of the run, which :meth:`open` creates.
        resume: continue the run in the folder, or begin if the folder is empty.
        overwrite: replace the run in the folder.
        apart_from: folders of images that must neither contain the run nor lie in it; None
            entries are ignored.

    Attributes:
        folder: absolute path.
        begun: whether the run resumes from a checkpoint, so that no initial state is needed.
        hooks: hooks from :func:`pml_tacl.cli.run_folder.make_hooks`, on the main process after
            :meth:`open`.

    Raises:
        ValueError: the errors of :func:`pml_tacl.cli.run_folder.check_run`, or if run and images
            are not in separate folders. Nothing is changed then.

    Example:
        >>> import tempfile
        >>> run = TrainingRun(tempfile.mkdtemp() + "/run")
        >>> run.begun
        False
        >>> run.open({"seed": 0})
        >>> sorted(path.name for path in run.folder.iterdir())
        ['records', 'run.json']
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        apart_from: Iterable[str | Path | None] = (),
    ) -> None:
        self.folder = Path(folder).resolve()
        for images in (Path(path).resolve() for path in apart_from if path is not None):
            if images.is_relative_to(self.folder) or self.folder.is_relative_to(images):
                raise InputError(
                    f"the run, {self.folder}, and the images, {images}, must be in separate "
                    "folders: give another folder (--run)"
                )
        self._flags: dict[str, Any] = {"resume": resume, "overwrite": overwrite}

        def look() -> bool:
            runs.check_run(folder, **self._flags)
            return bool(checkpoints(self.folder / "checkpoints"))

        self.begun = run_on_main(look, "opening the run") and resume
        self.hooks: Any = None
        self._config: dict[str, Any] | None = None

    def open(self, config: Mapping[str, Any], free: Collection[str] = ("epochs",)) -> None:
        """Create or open the folder, see `open_run`.

        Validate all other arguments before this call, because it may delete an earlier run.

        Args:
            config: settings of the run, saved in ``run.json`` and ``metrics.json``.
            free: names of settings that may change on resume, such as the number of epochs and
                the folder of the images.

        Raises:
            InputError: if the config of the run to resume differs.
            ImportError: if matplotlib, which draws the figures, is not installed.
        """
        import pml_tacl.visualize  # noqa: F401  # fail before training, not after it

        flags = {"free": free, **self._flags}
        run_on_main(lambda: runs.open_run(self.folder, config, **flags), "opening the run")
        self._config = dict(config)
        if is_main():  # only the main process writes
            self.hooks = runs.make_hooks(self.folder / "records")

    def train(
        self,
        trainer: "UnsupervisedTrainer",
        epochs: int,
        test: Callable[[int], Metrics] | None = None,
        *,
        test_epochs: Collection[int] = (),
        rows: Mapping[str, Metrics] | None = None,
    ) -> Rows:
        """Train to the end, from the start or the last checkpoint, and write the results.

        Args:
            trainer: a new :class:`UnsupervisedTrainer`. Its records, checkpoint_folder and
                test_hook are set here; its own iteration and epoch hooks are still called.
            epochs: number of epochs of the whole training, at least 1. A completed run continues
                if this is more than before. Learning rate schedules for the new length continue
                as if training had used them from the start.
            test: function from the epoch to metrics in [0, 1]. All processes call it before
                training (epoch 0), after ``test_epochs`` and at the end. At the end of an epoch, a
                checkpoint is saved first. The results are shown but never used to select a model.
                Values may be NumPy numbers or 0-d tensors; NaN and infinite values are left out
                with a warning.
            test_epochs: further epochs to test after.
            rows: metrics of other methods, to show beside those of the training.

        Returns:
            ``rows``, and "before" and "after", which are empty without a test.

        Raises:
            RuntimeError: if the run is not open.
            InputError: if the trainer is not new, or the run has more than ``epochs`` epochs.
            InputTypeError: before the first epoch, if the test returns values other than numbers.
        """
        check_count("epochs", epochs, 1)
        if self._config is None:
            raise RuntimeError("the run is not open: call open(config) before train")
        if trainer.epoch:
            raise InputError(f"trainer must be new, got one in epoch {trainer.epoch}")
        self._equip(trainer)
        if self.begun:
            trainer.load_checkpoint()
        if trainer.epoch > epochs:
            raise InputError(
                f"epochs={epochs} is below the {trainer.epoch} epochs that {self.folder} was "
                "trained for: give at least as many"
            )
        recalls = _recalls(trainer)

        def measure(trainer: "UnsupervisedTrainer") -> None:
            if trainer.epoch == epochs:
                run_on_main(lambda: self._write_model(trainer), "writing the model")
            if trainer.epoch not in recalls:
                found = {}
                if test is not None:
                    # Keep the random state, so that a test does not change the training.
                    with torch.random.fork_rng(devices=_devices()):
                        trainer.fit_projection()  # searches use it too
                        found = test(trainer.epoch)
                        trainer.reset_projection()
                recalls[trainer.epoch] = _as_metrics(found, trainer.epoch)

        due = {epochs, *test_epochs}
        trainer.test_epochs = {epochs} if test is None else due
        trainer.test_hook = lambda trainer: measure(trainer) if trainer.epoch in due else None
        if not self.begun:
            measure(trainer)
        trainer.train(trainer.epoch + 1, epochs)
        measure(trainer)  # if a hook ended the training at another epoch
        trainer.fit_projection()
        after = recalls[trainer.epoch]
        if test is not None and trainer.guard is not None and trainer.guard.kept is not None:
            if trainer.guard.start_is_kept and recalls.get(0):
                after = recalls[0]
            else:  # averaged with the untrained network: not tested yet
                after = _as_metrics(test(trainer.epoch), trainer.guard.kept)
        beside = {name: _as_metrics(row, None) for name, row in (rows or {}).items()}
        found: Rows = {**beside, "before": recalls.get(0, {}), "after": after}
        run_on_main(lambda: self._write(trainer, found), "writing the run")
        return found

    def fit(
        self,
        model: AttentionEmbedder,
        dataset: Dataset[Any],
        test: Callable[[int], Metrics] | None = None,
        *,
        num_workers: int = 0,
        progress: bool = True,
        fitted: bool = False,
    ) -> Rows:
        """Fit the projection to images and write the model, without training.

        Args:
            model: the model to write.
            dataset: items (image as the model takes it, anything).
            test: test function as in :meth:`train`, called with 0.
            num_workers: processes that read images.
            progress: show a progress bar.
            fitted: whether the projection is fitted already; it is then not fitted again.

        Returns:
            "before" and "after", which are equal.

        Raises:
            RuntimeError: if the run is not open.
        """
        if self._config is None:
            raise RuntimeError("the run is not open: call open(config) before fit")
        if not fitted:
            fit_to(model, dataset, num_workers, progress=progress and is_main())
        metrics = {} if test is None else _as_metrics(test(0), 0)
        rows: Rows = {"before": metrics, "after": metrics}

        def write() -> None:
            model.save_pretrained(self.folder / "model")
            content = {**rows, "config": self._config, "versions": versions()}
            write_json(self.folder / "metrics.json", content)

        run_on_main(write, "writing the run")
        return rows

    def draw(
        self,
        model: AttentionEmbedder,
        dataset: Dataset[Any],
        embeddings: Tensor | None,
        labels: Tensor | None = None,
        *,
        count: int = 8,
        title: str = "",
    ) -> None:
        """Draw ``attention.png`` and ``gallery.png`` of evenly spaced images of a data set.

        If drawing fails, one line is logged and the run continues.

        Args:
            model: model that computes the attention.
            dataset: items (image as the model takes it (3, H, W), anything).
            embeddings: (N, D), of unit norm; used on the main process only.
            labels: (N,), to mark right and wrong neighbours; None to mark neither.
            count: number of images shown, and of neighbours of each.
            title: title of the gallery.
        """
        if embeddings is None or not is_main():
            return
        with _never_fatal("attention.png and gallery.png"):
            self._draw(model, dataset, embeddings, labels, count, title)

    def _draw(
        self,
        model: AttentionEmbedder,
        dataset: Dataset[Any],
        embeddings: Tensor,
        labels: Tensor | None,
        count: int,
        title: str,
    ) -> None:
        from pml_tacl import visualize as vis

        def read(rows: Tensor) -> Tensor:
            return torch.stack([dataset[int(row)][0] for row in rows])

        shown, nearest = shown_and_nearest(embeddings, count, count)
        device, views = next(model.parameters()).device, read(shown)
        with evaluating(model), torch.inference_mode():
            attention = model.forward_features(views.to(device)).attention.cpu()
        offset = model.cell_offset((views.shape[-2], views.shape[-1]))
        asked = as_seen(views, model.data_config)
        overlay = vis.attention_overlay(asked, attention, cell_offset=offset)
        vis.save_figure(overlay, self.folder / "attention.png")
        if len(embeddings) < 2:
            return
        right = None if labels is None else labels[nearest] == labels[shown, None]
        found = [as_seen(read(rows), model.data_config) for rows in nearest]
        gallery = vis.retrieval_gallery(asked, found, correct=right, title=title or None)
        vis.save_figure(gallery, self.folder / "gallery.png")

    def _equip(self, trainer: "UnsupervisedTrainer") -> None:
        """Add records and checkpoints to a trainer; its own hooks stay."""
        trainer.checkpoint_folder = self.folder / "checkpoints"
        if not is_main():
            return
        trainer.record_keeper = self.hooks.record_keeper
        trainer.losses_file = LossesFile(self.folder / _LOSSES)
        trainer.end_of_iteration_hook = chain(
            trainer.end_of_iteration_hook, self.hooks.end_of_iteration_hook, _remember
        )
        trainer.end_of_epoch_hook = chain(
            trainer.end_of_epoch_hook, lambda _: self.hooks.record_keeper.save_records()
        )

    def _write_model(self, trainer: "UnsupervisedTrainer") -> None:
        model = trainer.whole if trainer.average is None else trainer.ema_model
        if isinstance(model, AttentionEmbedder):
            remove_index(self.folder)
            model.save_pretrained(self.folder / "model")

    def _write(self, trainer: "UnsupervisedTrainer", rows: Rows) -> None:
        """Write model, records and metrics, and only then draw the figures."""
        self._write_model(trainer)
        trainer.whole.eval()
        self.hooks.record_keeper.save_records()
        if trainer.losses_file is not None:
            trainer.losses_file.flush()
        content = {**rows, "config": self._config, "versions": versions()}
        if trainer.guard is not None:
            content["guard"] = trainer.guard.summary()
        write_json(self.folder / "metrics.json", content)
        (self.folder / "stopped.json").unlink(missing_ok=True)  # from a search before the end
        from pml_tacl import visualize as vis

        recalls = {epoch: row for epoch, row in _recalls(trainer).items() if row}
        with _never_fatal("curves.png"):
            begins = trainer.warmup_epochs * trainer.iterations_per_epoch
            curves = vis.training_curves(read_losses(self.folder / _LOSSES), recalls, begins)
            vis.save_figure(curves, self.folder / "curves.png")
        shown = {name: row for name, row in rows.items() if any("recall_at_" in at for at in row)}
        with _never_fatal("recall.png"):
            if shown:
                vis.save_figure(vis.recall_curve(shown), self.folder / "recall.png")


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def _never_fatal(names: str) -> Iterator[None]:
    """Log errors in drawing figures in one line, so that they do not end a finished training."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or "no reason given"
        _LOGGER.warning("%s not drawn: %s: %s", names, type(error).__name__, text)
        _LOGGER.debug("why it was not drawn", exc_info=True)


def _as_metrics(found: Any, epoch: int | None) -> Metrics:
    """Convert metrics to floats, and leave out those that are NaN or infinite."""
    where = "rows" if epoch is None else f"test({epoch})"
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise InputTypeError(f"{where} must be a dict of metrics by name, got {kind}")
    if wrong := [name for name in found if not isinstance(name, str)]:
        raise InputTypeError(f"{where} must name its metrics by strings, got {wrong[0]!r}")
    values = {str(name): number(value, f"{where}[{name!r}]") for name, value in found.items()}
    if unknown := [name for name, value in values.items() if not math.isfinite(value)]:
        _LOGGER.warning(
            "%s could not measure %s (NaN): recall needs classes of two images or more; training "
            "continues without it",
            where,
            ", ".join(unknown),
        )
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _recalls(trainer: "UnsupervisedTrainer") -> dict[int, Metrics]:
    """Return the results of the test by epoch, which checkpoints keep."""
    return cast(dict[int, Metrics], trainer.extra.setdefault("recalls", {}))


def _remember(trainer: "UnsupervisedTrainer") -> None:
    assert trainer.losses_file is not None
    trainer.losses_file.add(trainer.get_global_iteration() + 1, trainer.losses)
