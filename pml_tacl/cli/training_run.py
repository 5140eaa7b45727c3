"""A whole training as scripts want it: a folder, records, tests before and after, and pictures."""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pml_tacl.callbacks import chain
from pml_tacl.callbacks.trainer_access import shown_and_nearest
from pml_tacl.cli import run_folder as runs
from pml_tacl.distributed.session import is_first, on_first
from pml_tacl.models import AttentionEmbedder
from pml_tacl.models.preprocessing import as_seen
from pml_tacl.trainers.checkpoint import checkpoints
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.modes import evaluating

Metrics = dict[str, float]
Rows = dict[str, Mapping[str, float]]


class TrainingRun:
    """The folder of a training: checked, opened, trained into, resumed, and drawn at the end.

    It ends with ``metrics.json``, ``model/`` (of an :class:`AttentionEmbedder`, with averaged
    weights if there are some), ``records/`` of record-keeper, ``checkpoints/``, ``curves.png``,
    and ``recall.png`` if recall was measured. Under torchrun, within
    :func:`pml_tacl.distributed.inference.session`, every process calls all of it and the first
    writes.

    Args:
        folder: of the run; made by :meth:`open`.
        resume: go on with the run that the folder holds, or begin if it holds nothing.
        overwrite: replace the run that the folder holds.
        apart_from: folders of pictures, which a run must neither lie in nor hold; None is none.

    Attributes:
        folder: absolute path.
        begun: whether there is a checkpoint to go on from, so that a start need not be made.
        hooks: of :func:`pml_tacl.cli.run_folder.make_hooks`, on the first process, once it is open.

    Raises:
        ValueError: as of :func:`pml_tacl.cli.run_folder.check_run`, or if the folders are not
            apart, before anything is touched.

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
        for pictures in (Path(path).resolve() for path in apart_from if path is not None):
            if pictures.is_relative_to(self.folder) or self.folder.is_relative_to(pictures):
                raise ValueError(
                    f"the run, {self.folder}, and the pictures, {pictures}, must lie apart: give "
                    "another folder (--run)"
                )
        self._flags: dict[str, Any] = {"resume": resume, "overwrite": overwrite}

        def look() -> bool:
            runs.check_run(folder, **self._flags)
            return bool(checkpoints(self.folder / "checkpoints"))

        self.begun = on_first(look, "opening the run") and resume
        self.hooks: Any = None
        self._config: dict[str, Any] | None = None

    def open(self, config: Mapping[str, Any]) -> None:
        """Make or open the folder, once all arguments are validated; see `open_run`.

        Args:
            config: what the run was asked to do, kept in ``run.json`` and ``metrics.json``.

        Raises:
            ValueError: if a run to resume had another config.
            ImportError: without matplotlib, which draws at the end.
        """
        import pml_tacl.visualize  # noqa: F401  # better missed now than after days

        on_first(lambda: runs.open_run(self.folder, config, **self._flags), "opening the run")
        self._config = dict(config)
        if is_first():  # one process writes what all have learnt
            self.hooks = runs.make_hooks(self.folder / "records")

    def train(
        self,
        trainer: Any,
        epochs: int,
        test: Callable[[int], Metrics] | None = None,
        *,
        test_epochs: Collection[int] = (),
        rows: Mapping[str, Metrics] | None = None,
    ) -> Rows:
        """Train to the end, from the start or the last checkpoint, and write what came of it.

        Args:
            trainer: a new :class:`UnsupervisedTrainer`; gets the run's records, checkpoint_folder
                and test_hook. Its own hooks of iterations and epochs are called too.
            epochs: of the whole training, at least 1.
            test: epoch -> metrics in [0, 1], called at 0, at ``test_epochs`` and at the end, by
                every process. What it finds is shown, and never chosen by.
            test_epochs: further ones to test at.
            rows: metrics of other methods, beside which the training's are shown.

        Returns:
            ``rows``, and "before" and "after": empty without a test.

        Raises:
            RuntimeError: if the run is not open.
            ValueError: if the trainer was trained before, or the run beyond ``epochs``.
        """
        check_count("epochs", epochs, 1)
        if self._config is None:
            raise RuntimeError("a run must be open to be trained: call open(config) before")
        if trainer.epoch:
            raise ValueError(f"trainer must be new, got one in epoch {trainer.epoch}")
        self._equip(trainer)
        if self.begun:
            trainer.load_checkpoint()
        if trainer.epoch > epochs:
            raise ValueError(
                f"epochs={epochs} are fewer than the {trainer.epoch} that {self.folder} has been "
                "trained: give at least as many"
            )
        recalls = trainer.extra.setdefault("recalls", {})
        trainer.extra.setdefault("history", {})

        def measure(trainer: Any) -> None:
            if trainer.epoch not in recalls:
                recalls[trainer.epoch] = {} if test is None else test(trainer.epoch)

        due = {epochs, *test_epochs}
        trainer.test_hook = lambda trainer: measure(trainer) if trainer.epoch in due else None
        if not self.begun:
            measure(trainer)
        trainer.train(trainer.epoch + 1, epochs)
        measure(trainer)  # if a hook has ended the training at an epoch that was not due
        found = {**(rows or {}), "before": recalls.get(0, {}), "after": recalls[trainer.epoch]}
        on_first(lambda: self._write(trainer, found), "writing the run")
        return found

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
        """``attention.png`` and ``gallery.png`` of pictures taken evenly from a data set.

        Args:
            model: of the pictures' attention.
            dataset: items (picture as the model takes it (3, H, W), anything).
            embeddings: (N, D) of them, unit rows; not looked at but on the first process.
            labels: (N,), to frame right and wrong neighbours; None for neither.
            count: pictures shown, and neighbours of each.
            title: of the gallery.
        """
        if embeddings is None or not is_first():
            return
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

    def _equip(self, trainer: Any) -> None:
        """Records and checkpoints, beside the hooks that the trainer has."""
        trainer.checkpoint_folder = self.folder / "checkpoints"
        if not is_first():
            return
        trainer.record_keeper = self.hooks.record_keeper
        trainer.end_of_iteration_hook = chain(
            trainer.end_of_iteration_hook, self.hooks.end_of_iteration_hook, _remember
        )
        trainer.end_of_epoch_hook = chain(
            trainer.end_of_epoch_hook, lambda _: self.hooks.record_keeper.save_records()
        )

    def _write(self, trainer: Any, rows: Rows) -> None:
        from pml_tacl import visualize as vis

        self.hooks.record_keeper.save_records()
        content = {**rows, "config": self._config, "versions": runs.versions()}
        runs.write_json(self.folder / "metrics.json", content)
        model = trainer.whole if trainer.average is None else trainer.ema_model
        if isinstance(model, AttentionEmbedder):
            model.eval().save_pretrained(self.folder / "model")
        extra = trainer.extra
        figures = {"curves": vis.training_curves(extra["history"], extra["recalls"])}
        with_recalls = {
            name: row for name, row in rows.items() if any("recall_at_" in at for at in row)
        }
        if with_recalls:
            figures["recall"] = vis.recall_curve(with_recalls)
        for name, figure in figures.items():
            vis.save_figure(figure, self.folder / f"{name}.png")


def _remember(trainer: Any) -> None:
    for name, value in trainer.losses.items():
        trainer.extra["history"].setdefault(name, []).append(float(value))
