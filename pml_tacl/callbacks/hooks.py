"""Hooks for trainers: measure, keep the best, stop early and log. Of ours and of PML's trainers.

Each takes the trainer, as PML's ``end_of_epoch_hook`` and ``end_of_iteration_hook`` do. What they
remember lies in ``trainer.extra`` where there is one, so that it is part of its checkpoints.
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

Hook = Callable[[Any], bool | None]
Criterion = Callable[[Any], float | None]

_LOGGER = logging.getLogger(__name__)


def chain(*hooks: Hook) -> Hook:
    """One hook of several, called in order; the training stops if any of them returns False.

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
    """An end-of-epoch hook that measures every n epochs, and keeps the last and the best apart.

    ``folder/last`` holds the state of the last epoch, ``folder/best`` that of the epoch with the
    best metric; :func:`restore` reads either. Without labels there is no best: a training that is
    not measured keeps the last only.

    Args:
        dataset: labelled items (image, label) of a *validation* set; None if there is none. A
            test set does not belong here: the best epoch of a test set is a leak.
        every: epochs between two measurements.
        folder: of the states; None keeps none.
        metric: what is best, higher being better, as of :func:`pml_tacl.evaluation.evaluate`.
        metrics: further ones to measure, or one name; empty for all.
        reference: the gallery to search in, if it is another data set.
        logger: gets all values, as ``validation/NAME`` over epochs.
        batch_size: images at once.
        num_workers: processes that load images.

    Attributes:
        history: epoch -> value by name of metric, of this process.

    Raises:
        ValueError: for counts out of range; in training, if ``metric`` was not measured.
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

    def __call__(self, trainer: Any) -> None:
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
    """An end-of-epoch hook that ends a training that no longer gets anywhere, without labels.

    Two criteria of ours need nothing but what :class:`UnsupervisedTrainer` has at hand, and cost
    nothing to speak of (definitions ours, measured in ``docs/records.md``):

    - "stability": how well the pseudo-labels agree with those of the clustering before, as
      adjusted mutual information in [0, 1]. While the embedding still learns, clusters change.
    - "separation": how much nearer images are to their own centroid than to the nearest other
      one, as the mean difference of cosines.

    Args:
        criterion: one of these, or a function of the trainer that gives a number, higher being
            better, or None where there is nothing to judge yet.
        patience: judgements without a rise of ``min_delta`` over the best after which to stop.
        min_delta: the least rise that counts.
        start: epoch of the first judgement.
        logger: gets the values, as ``early_stopping/NAME`` over epochs.

    Attributes:
        history: epoch -> value, of this process.

    Raises:
        ValueError: for an unknown criterion or a number out of range.
        TypeError: in training, if "stability" or "separation" is asked of a trainer that has no
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

    def __call__(self, trainer: Any) -> bool | None:
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
        _LOGGER.info("epoch %d: no rise of %g in %d judgements: stopping", trainer.epoch,
                     self.min_delta, self.patience)  # fmt: skip
        return False


class LogLosses:
    """An end-of-iteration hook that logs each loss as ``loss/NAME``, every so many iterations."""

    def __init__(self, logger: Logger, every: int = 10) -> None:
        check_count("every", every, 1)
        self.logger, self.every = logger, every

    def __call__(self, trainer: Any) -> None:
        step = trainer.get_global_iteration()
        if step % self.every == 0:
            values = {f"loss/{name}": float(value) for name, value in trainer.losses.items()}
            self.logger.log_scalars(step, values)


class LogImages:
    """An end-of-epoch hook that logs attention overlays, a gallery and embeddings of images.

    Args:
        logger: where they go.
        images: N of them, as PIL images, at least 2.
        transform: image -> (3, S, S), as the model takes it.
        names: of the images, for the projector; numbers if not given.
        every: epochs between two times.
        shown: images in the overlay, and queries in the gallery.
        neighbours: images beside each query.

    Raises:
        ValueError: for fewer than 2 images, another number of names, or counts out of range.
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
            raise InputError(f"names must be as many as images, {count}, got {len(names)}")
        self.logger, self.images, self.transform, self.names = logger, images, transform, names
        self.every, self.shown, self.neighbours = every, shown, neighbours
        self._offset: tuple[float, float] | None = None

    def __call__(self, trainer: Any) -> None:
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

        if self._offset is None:  # the architecture's, so measured once
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
