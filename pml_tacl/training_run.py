"""A whole training as scripts want it: a folder, records, tests before and after, and pictures."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pml_tacl import runs
from pml_tacl._checks import check_count
from pml_tacl._distributed import is_first, on_first
from pml_tacl.callbacks import chain
from pml_tacl.models import AttentionEmbedder
from pml_tacl.trainers.checkpoint import checkpoints

Metrics = dict[str, float]
Rows = dict[str, Mapping[str, float]]


class TrainingRun:
    """The folder of a training: checked, opened, trained into, resumed, and drawn at the end.

    It ends with ``metrics.json``, ``model/``, ``records/`` of record-keeper, ``checkpoints/``,
    ``curves.png``, and ``recall.png`` if there was something to test on. Under torchrun every
    process calls all of it, and the first writes.

    Args:
        folder: of the run; made by :meth:`open`.
        resume: go on with the run that the folder holds, or begin if it holds nothing.
        overwrite: replace the run that the folder holds.

    Attributes:
        folder: absolute path.
        begun: whether there is a checkpoint to go on from, so that a start need not be made.
        hooks: of :func:`pml_tacl.runs.make_hooks`, on the first process, once it is open.

    Raises:
        ValueError: as of :func:`pml_tacl.runs.check_run`, before anything is touched.

    Example:
        >>> import tempfile
        >>> run = TrainingRun(tempfile.mkdtemp() + "/run")
        >>> run.begun
        False
        >>> run.open({"seed": 0})
        >>> sorted(path.name for path in run.folder.iterdir())
        ['run.json']
    """

    def __init__(
        self, folder: str | Path, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.folder = Path(folder).resolve()
        self._flags: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
        on_first(lambda: runs.check_run(folder, **self._flags), "opening the run")
        saved = on_first(lambda: len(checkpoints(self.folder / "checkpoints")), "opening the run")
        self.begun = resume and saved > 0
        self.hooks: Any = None
        self._config: dict[str, Any] = {}

    def open(self, config: Mapping[str, Any]) -> None:
        """Make or open the folder, as :func:`pml_tacl.runs.open_run`, when nothing can be wrong.

        Args:
            config: what the run was asked to do, kept in ``run.json`` and ``metrics.json``.

        Raises:
            ValueError: if a run to resume had another config.
        """
        self._config = dict(config)
        on_first(lambda: runs.open_run(self.folder, config, **self._flags), "opening the run")
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
            trainer: an :class:`UnsupervisedTrainer`; gets the run's records and
                ``checkpoint_folder``. Its hooks are called too.
            epochs: of the whole training, at least 1.
            test: epoch -> metrics in [0, 1], called at 0, at ``test_epochs`` and at the end, by
                every process. What it finds is shown, and never chosen by.
            test_epochs: further ones to test at.
            rows: metrics of other methods, beside which the training's are shown.

        Returns:
            ``rows``, and "before" and "after".

        Raises:
            RuntimeError: if the run is not open.
        """
        check_count("epochs", epochs, 1)
        if not self._config:
            raise RuntimeError("a run must be open to be trained: call open(config) before")
        self._equip(trainer)
        if self.begun:
            trainer.load_checkpoint()
        recalls = trainer.extra["recalls"]
        for epoch in sorted({0, epochs, *test_epochs}):
            if trainer.epoch < epoch:
                trainer.train(trainer.epoch + 1, epoch)
            now = trainer.epoch  # earlier than asked for if a hook has ended the training
            if now <= epoch and now not in recalls:
                recalls[now] = {} if test is None else test(now)
            if now < epoch:
                break
        found = {**(rows or {}), "before": recalls[0], "after": recalls[trainer.epoch]}
        if is_first():
            self._write(trainer, found)
        return found

    def draw(
        self,
        model: AttentionEmbedder,
        dataset: Dataset[Any],
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        count: int = 8,
        title: str = "",
    ) -> None:
        """``attention.png`` and ``gallery.png`` of pictures taken evenly from a data set.

        Args:
            model: of the pictures' attention.
            dataset: items (picture as the model takes it (3, H, W), anything).
            embeddings: (N, D) of them, unit rows.
            labels: (N,), to frame right and wrong neighbours; None for neither.
            count: pictures shown, and neighbours of each.
            title: of the gallery.
        """
        from pml_tacl import visualize as vis

        mean, std = (torch.tensor(model.data_config[k]).view(3, 1, 1) for k in ("mean", "std"))

        def as_seen(rows: Tensor) -> Tensor:
            pictures = torch.stack([dataset[int(row)][0] for row in rows])
            return (pictures * std + mean).clamp(0, 1)

        size = len(embeddings)
        shown = torch.linspace(0, size - 1, min(count, size)).long()
        similar = embeddings[shown] @ embeddings.T
        similar[torch.arange(len(shown)), shown] = -torch.inf
        nearest = similar.topk(min(count, size - 1), dim=1).indices
        device = next(model.parameters()).device
        with torch.inference_mode():
            batch = torch.stack([dataset[int(row)][0] for row in shown]).to(device)
            attention = model.eval().forward_features(batch).attention.cpu()
        right = None if labels is None else labels[nearest] == labels[shown, None]
        found = [as_seen(rows) for rows in nearest]
        gallery = vis.retrieval_gallery(as_seen(shown), found, correct=right, title=title)
        vis.save_figure(gallery, self.folder / "gallery.png")
        overlay = vis.attention_overlay(as_seen(shown), attention)
        vis.save_figure(overlay, self.folder / "attention.png")

    def _equip(self, trainer: Any) -> None:
        """Records, history and checkpoints, beside the hooks that the trainer has."""
        trainer.checkpoint_folder = self.folder / "checkpoints"
        trainer.extra |= {"history": {}, "recalls": {}}
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
        trainer.whole.eval().save_pretrained(self.folder / "model")
        extra = trainer.extra
        figures = {"curves": vis.training_curves(extra["history"], extra["recalls"])}
        if any(rows.values()):
            figures["recall"] = vis.recall_curve(rows)
        for name, figure in figures.items():
            vis.save_figure(figure, self.folder / f"{name}.png")


def _remember(trainer: Any) -> None:
    for name, value in trainer.losses.items():
        trainer.extra["history"].setdefault(name, []).append(float(value))
