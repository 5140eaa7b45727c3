"""Hooks for UnsupervisedTrainer and PML's trainers: evaluation, early stopping and logging.

Each hook is called with the trainer, like PML's ``end_of_epoch_hook`` and
``end_of_iteration_hook``. Hooks store their state in ``trainer.extra`` if the trainer has it, so
checkpoints include it.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pml_tacl.callbacks.loggers import Logger
from pml_tacl.callbacks.trainer_access import (
    CRITERIA,
    Trainer,
    features_of,
    keep,
    memory_of,
    model_of,
    shown_and_nearest,
)
from pml_tacl.evaluation import evaluate
from pml_tacl.evaluation.calculator import as_names
from pml_tacl.utils.checks import check_count, check_number
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.modes import evaluating

# A user's functions may take any trainer type, which a protocol would narrow.
Hook = Callable[[Any], object]  # False ends the training
Criterion = Callable[[Any], float | None]

_LOGGER = logging.getLogger(__name__)


def chain(*hooks: Hook) -> Hook:
    """Return a hook that calls several hooks in order.

    All hooks are called. Training stops if any of them returns False.

    Example:
        >>> hook = chain(lambda trainer: None, lambda trainer: False)
        >>> hook(None)
        False
    """

    def all_of_them(trainer: Any) -> bool | None:
        answers = [hook(trainer) for hook in hooks]
        return False if any(answer is False for answer in answers) else None

    return all_of_them


class Evaluate:
    """End-of-epoch hook that evaluates on a validation set and saves the last and best states.

    ``folder/last`` has the state after the last epoch, ``folder/best`` the state after the epoch
    with the best metric; :func:`restore` loads either. Without a data set only ``last`` is saved.

    Args:
        dataset: labelled items (image, label) of a *validation* set, or None. Do not use a test
            set: choosing the best epoch on it would leak test labels.
        every: epochs from one evaluation to the next, at least 1.
        folder: folder for the states; None saves none.
        metric: metric that defines the best epoch, higher is better; a name from
            :func:`pml_tacl.evaluation.evaluate`.
        metrics: further metrics, or one name; empty for all.
        reference: the gallery to search in; None for the data set itself.
        logger: receives all values, as ``validation/NAME`` over epochs.
        batch_size: images in a batch, at least 1.
        num_workers: processes that read images.

    Attributes:
        history: epoch -> value by name of metric, recorded since this object was created.

    Raises:
        ValueError: for counts out of range; in training, if ``metric`` is unknown.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | None = None,
        *,
        every: int = 1,
        folder: str | Path | None = None,
        metric: str = "recall_at_1",
        metrics: str | Sequence[str] = (),
        reference: Dataset[Any] | None = None,
        logger: Logger | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        check_count("every", every, 1)
        check_count("batch_size", batch_size, 1)
        check_count("num_workers", num_workers, 0)
        self.dataset, self.reference, self.every = dataset, reference, every
        self.folder = None if folder is None else Path(folder)
        self.metric, self.logger = metric, logger
        self.metrics = tuple(dict.fromkeys([metric, *as_names(metrics)])) if metrics else ()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.history: dict[int, dict[str, float]] = {}
        self._own: dict[str, Any] = {}

    def __call__(self, trainer: Trainer) -> None:
        best = False
        memory = memory_of(trainer, "evaluate", self._own)
        if self.dataset is not None and trainer.epoch % self.every == 0:
            found = evaluate(
                model_of(trainer),
                self.dataset,
                reference=self.reference,
                metrics=self.metrics,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                progress=False,
            )
            self.history[trainer.epoch] = found
            if self.metric not in found:
                known = ", ".join(found)
                raise InputError(f"metric must be one of {known}, got {self.metric!r}")
            if self.logger is not None:
                values = {f"validation/{name}": value for name, value in found.items()}
                self.logger.log_scalars(trainer.epoch, values)
            best = found[self.metric] > memory.get("best", float("-inf"))
            if best:
                memory.update(best=found[self.metric], epoch=trainer.epoch)
        if self.folder is not None:
            keep(trainer, self.folder / "last")
            if best:
                keep(trainer, self.folder / "best")


class EarlyStopping:
    """End-of-epoch hook that stops a training when a criterion no longer rises.

    Two criteria need no labels and almost no time. They use the pseudo-labels and embeddings of
    :class:`UnsupervisedTrainer`. The definitions are ours; ``docs/records.md`` has measurements.

    - "stability": agreement of the pseudo-labels with those of the previous clustering, as
      adjusted mutual information: at most 1, and about 0 for random pseudo-labels. The agreement
      is low while the embedding still changes.
    - "separation": mean difference between the cosine of an image to its own centroid and the
      cosine to the nearest other centroid.

    Args:
        criterion: one of these names, or a function of the trainer that returns a number, higher
            is better, or None if there is no value yet.
        patience: number of values in a row without an improvement after which training stops, at
            least 1.
        min_delta: smallest rise above the best value that counts as an improvement, at least 0.
        start: first epoch to judge, at least 1.
        logger: receives the values, as ``early_stopping/NAME`` over epochs.

    Attributes:
        history: epoch -> value, recorded since this object was created.

    Raises:
        ValueError: for an unknown criterion or a number out of range.
        TypeError: in training, if "stability" or "separation" is used with a trainer without
            pseudo-labels.

    Example:
        >>> hook = EarlyStopping(lambda trainer: -trainer.loss, patience=1)
    """

    def __init__(
        self,
        criterion: str | Criterion = "stability",
        *,
        patience: int = 3,
        min_delta: float = 0.005,
        start: int = 1,
        logger: Logger | None = None,
    ) -> None:
        if not callable(criterion) and criterion not in tuple(CRITERIA):
            named = ", ".join(CRITERIA)
            raise InputError(f"criterion must be one of {named} or a function, got {criterion!r}")
        check_count("patience", patience, 1)
        check_count("start", start, 1)
        check_number("min_delta", min_delta, 0)
        self.criterion, self.patience, self.min_delta = criterion, patience, float(min_delta)
        self.start, self.logger = start, logger
        self.history: dict[int, float] = {}
        self._own: dict[str, Any] = {}

    def __call__(self, trainer: Trainer) -> bool | None:
        memory = memory_of(trainer, "early_stopping", self._own)
        if isinstance(self.criterion, str):
            value = CRITERIA[self.criterion](trainer, memory)
        else:
            value = self.criterion(trainer)
        if value is None or trainer.epoch < self.start:
            return None
        self.history[trainer.epoch] = float(value)
        if self.logger is not None:
            name = self.criterion if isinstance(self.criterion, str) else "criterion"
            self.logger.log_scalars(trainer.epoch, {f"early_stopping/{name}": float(value)})
        if value > memory.get("best", float("-inf")) + self.min_delta:
            memory.update(best=float(value), waited=0)
            return None
        memory["waited"] = memory.get("waited", 0) + 1
        if memory["waited"] < self.patience:
            return None
        _LOGGER.info("epoch %d: no rise of %g in %d values: stopping", trainer.epoch,
                     self.min_delta, self.patience)  # fmt: skip
        return False


class LogLosses:
    """End-of-iteration hook that logs each loss as ``loss/NAME``.

    Args:
        logger: receives the losses over iterations.
        every: iterations from one log to the next, at least 1.

    Raises:
        ValueError: for ``every`` out of range.
    """

    def __init__(self, logger: Logger, every: int = 10) -> None:
        check_count("every", every, 1)
        self.logger, self.every = logger, every

    def __call__(self, trainer: Trainer) -> None:
        step = trainer.get_global_iteration()
        if step % self.every == 0:
            values = {f"loss/{name}": float(value) for name, value in trainer.losses.items()}
            self.logger.log_scalars(step, values)


class LogImages:
    """End-of-epoch hook that logs attention overlays, a gallery and embeddings of images.

    Args:
        logger: receives figures and embeddings over epochs.
        images: N PIL images, at least 2.
        transform: image -> (3, height, width), as the model takes it.
        names: N names of the images for the projector; None for numbers.
        every: epochs from one log to the next, at least 1.
        shown: number of images in the overlay, and of queries in the gallery, at least 1.
        neighbours: number of images beside each query, at least 1.

    Raises:
        ValueError: for fewer than 2 images, a wrong number of names, or counts out of range.
    """

    def __init__(
        self,
        logger: Logger,
        images: Sequence[Any],
        transform: Callable[[Any], Tensor],
        *,
        names: Sequence[str] | None = None,
        every: int = 1,
        shown: int = 6,
        neighbours: int = 6,
    ) -> None:
        for name, value in (("every", every), ("shown", shown), ("neighbours", neighbours)):
            check_count(name, value, 1)
        check_count("number of images", len(images), 2)
        count = len(images)
        names = [str(at) for at in range(count)] if names is None else list(names)
        if len(names) != count:
            raise InputError(
                f"names must have as many entries as images, {count}, got {len(names)}"
            )
        self.logger, self.images, self.transform, self.names = logger, images, transform, names
        self.every, self.shown, self.neighbours = every, shown, neighbours
        self._offset: tuple[float, float] | None = None

    def __call__(self, trainer: Trainer) -> None:
        if trainer.epoch % self.every:
            return
        from pml_tacl import visualize as vis

        embeddings, attention = self._forward(model_of(trainer))
        shown, near = shown_and_nearest(embeddings, self.shown, self.neighbours)
        asked = [self.images[row] for row in shown.tolist()]
        found = [[self.images[row] for row in rows] for rows in near.tolist()]
        images = {"images/gallery": vis.retrieval_gallery(asked, found)}
        if attention is not None:
            offset = self._cell_offset(trainer.models["trunk"])
            overlay = vis.attention_overlay(asked, attention[shown], cell_offset=offset)
            images["images/attention"] = overlay
        self.logger.log_images(trainer.epoch, images)
        self.logger.log_embeddings(trainer.epoch, embeddings, self.names, list(self.images))

    def _cell_offset(self, trunk: nn.Module) -> tuple[float, float]:
        from pml_tacl.models.receptive_field import measure_cell_offset

        if self._offset is None:  # depends on the architecture alone, so measured once
            channels, *size = self.transform(self.images[0]).shape
            self._offset = measure_cell_offset(trunk, (size[0], size[1]), channels)
        return self._offset

    def _forward(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        device = next(model.parameters()).device
        embeddings, maps = [], []
        with evaluating(model):
            for start in range(0, len(self.images), 64):
                batch = self.images[start : start + 64]
                images = torch.stack([self.transform(image) for image in batch]).to(device)
                with torch.inference_mode():
                    rows, attention = features_of(model, images)
                embeddings.append(rows.float().cpu())
                if attention is not None:
                    maps.append(attention.float().cpu())
        unit = nn.functional.normalize(torch.cat(embeddings))
        return unit, torch.cat(maps) if maps else None
