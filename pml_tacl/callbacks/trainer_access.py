"""Access to UnsupervisedTrainer and PML's trainers for hooks: model, state and checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pml_tacl.clustering import pseudo_labels_from
from pml_tacl.evaluation.mutual_information import adjusted_mutual_information
from pml_tacl.trainers.checkpoint import (
    Parts,
    checkpoints,
    load_checkpoint,
    parts_state,
    restore_parts,
    save_checkpoint,
)
from pml_tacl.utils.errors import InputTypeError
from pml_tacl.utils.neighbours import nearest_others

_CHUNK = 4096


class Trainer(Parts, Protocol):
    """Attributes that every trainer has, of this package or of PML."""

    epoch: int
    losses: Mapping[str, Tensor | float]

    def get_global_iteration(self) -> int: ...


@runtime_checkable
class SavesItself(Protocol):
    """A trainer that writes and reads its own checkpoints, such as `UnsupervisedTrainer`."""

    def save_checkpoint(self, folder: Path, /) -> Path: ...

    def load_checkpoint(self, folder: Path, /) -> object: ...


@runtime_checkable
class HasAverage(Protocol):
    """A trainer that may average its weights, such as `UnsupervisedTrainer`."""

    average: AveragedModel | None


@runtime_checkable
class HasPseudoLabels(Protocol):
    """A trainer that clusters, such as `UnsupervisedTrainer`."""

    labels: Tensor
    centroids: Tensor | None
    embeddings: Tensor | None


def memory_of(trainer: Trainer, name: str, own: dict[str, Any]) -> dict[str, Any]:
    """Return a dict for a hook's state.

    Args:
        trainer: any trainer.
        name: key in ``trainer.extra``, whose contents are saved in checkpoints.
        own: dict to return if the trainer has no ``extra``.
    """
    extra = getattr(trainer, "extra", None)
    memory: dict[str, Any] = own if extra is None else extra.setdefault(name, {})
    return memory


def model_of(trainer: Trainer) -> nn.Module:
    """Return the model with averaged weights if there is one, else trunk and embedder."""
    if isinstance(trainer, HasAverage) and trainer.average is not None:
        averaged: nn.Module = trainer.average.module
        return averaged
    return nn.Sequential(*(trainer.models[name] for name in ("trunk", "embedder")))


def features_of(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return embeddings (N, D), and attention maps (N, H, W) or None if the model has none."""
    if hasattr(model, "forward_features"):
        out = model.forward_features(images)
        return out.embeddings, out.attention
    if isinstance(model, nn.Sequential) and hasattr(model[-1], "forward_features"):
        embedder: Any = model[-1]
        out = embedder.forward_features(model[0](images))
        return out.embeddings, out.attention
    return model(images), None


def shown_and_nearest(embeddings: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Choose Q evenly spaced embeddings and find the K nearest others of each.

    Args:
        embeddings: (N, D), of unit norm.
        count: largest Q.
        neighbours: largest K.

    Returns:
        Indices (Q,) of the chosen embeddings, and of their neighbours (Q, K), nearest first.
    """
    rows = len(embeddings)
    shown = torch.linspace(0, rows - 1, min(count, rows)).long()
    unit = embeddings.detach().float().cpu().numpy()
    return shown, torch.from_numpy(nearest_others(unit, shown.numpy(), neighbours)[1])


def keep(trainer: Trainer, folder: Path) -> Path:
    """Save the trainer's state, delete other checkpoints in the folder, and return the path."""
    if isinstance(trainer, SavesItself):
        path = trainer.save_checkpoint(folder)
    else:
        path = save_checkpoint(folder, parts_state(trainer, trainer.epoch))
    for other in checkpoints(folder):
        if other.name != path.name:
            other.unlink()
    return path


def restore(trainer: Trainer, folder: str | Path) -> int:
    """Restore a state that :class:`Evaluate` saved.

    Args:
        trainer: a trainer with the same models, losses and optimizers as the saved one.
        folder: ``best`` or ``last`` in the folder of the hook.

    Returns:
        The epoch of the state; continue training with the next epoch.

    Raises:
        FileNotFoundError: if the folder contains no state.
        ValueError: if the trainer has different models, losses or optimizers.
    """
    folder = Path(folder)
    if isinstance(trainer, SavesItself):
        trainer.load_checkpoint(folder)
        return int(trainer.epoch)
    if not checkpoints(folder):
        raise FileNotFoundError(
            f"folder={str(folder)!r} contains no state of a trainer: give 'best' or 'last' in the "
            "folder of Evaluate"
        )
    state = load_checkpoint(folder)
    restore_parts(trainer, state)
    trainer.epoch = state["epoch"]
    return state["epoch"]


def stability(trainer: Trainer, memory: dict[str, Any]) -> float | None:
    """Return the agreement of the last two clusterings, at most 1; None before the second."""
    labels, centroids, _ = _pseudo_labels(trainer)
    if centroids is None:
        return None
    before = memory.get("labels")
    if before is not None and torch.equal(before, labels):
        return None  # no new clustering, or one with identical labels
    memory["labels"] = labels.clone()
    if before is None:
        return None
    both = (labels >= 0) & (before >= 0)
    return adjusted_mutual_information(before[both], labels[both]) if both.any() else None


def separation(trainer: Trainer, memory: dict[str, Any]) -> float | None:
    """Return the mean cosine to the own centroid minus that to the nearest other centroid."""
    labels, centroids, embeddings = _pseudo_labels(trainer)
    if centroids is None or embeddings is None:
        return None
    chosen = (labels >= 0) & embeddings.isfinite().all(1) & embeddings.any(1)
    if not chosen.any():
        return None
    if not chosen.all():
        labels, embeddings = labels[chosen], embeddings[chosen]
    # Compute centroids of these embeddings: the trainer's have moved with the batches since.
    labels, centroids, _ = pseudo_labels_from(labels, embeddings)
    if len(centroids) < 2:
        return None
    total = 0.0
    for own_labels, rows in zip(labels.split(_CHUNK), embeddings.split(_CHUNK), strict=True):
        similar = nn.functional.normalize(rows.float()) @ centroids.T
        own = similar.gather(1, own_labels[:, None])
        other = similar.scatter(1, own_labels[:, None], float("-inf")).amax(1, keepdim=True)
        total += float((own - other).sum())
    return total / len(labels)


CRITERIA = {"stability": stability, "separation": separation}


def _pseudo_labels(trainer: Trainer) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return labels (N,), centroids (K, D) and embeddings (N, D) of the last clustering."""
    if not isinstance(trainer, HasPseudoLabels):
        raise InputTypeError(
            f"{type(trainer).__name__} has no pseudo-labels to judge: give EarlyStopping a function"
        )
    return trainer.labels, trainer.centroids, trainer.embeddings
