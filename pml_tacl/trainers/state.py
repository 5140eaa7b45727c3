"""Where a training stands, as one object: what a checkpoint keeps besides its networks."""

from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor

from pml_tacl.clustering.centroids import CentroidTable
from pml_tacl.trainers.data import Unreadable

StateDict = dict[str, object]
"""What a part's ``state_dict()`` returns."""


class Schedules(TypedDict):
    """Learning rate schedules before their first step.

    A schedule of a resumed training that began otherwise is told by it.
    """

    states: dict[str, StateDict]
    """State by name of the scheduler."""
    rates: dict[str, list[StateDict]]
    """By name of the optimizer, the rates of each of its parameter groups."""


@dataclass
class TrainingState:
    """Where a training stands.

    The generators of random numbers are part of it, too: a checkpoint reads them from Python,
    NumPy and torch when it is written (:func:`pml_tacl.trainers.checkpoint.random_state`).

    Attributes:
        labels: pseudo-labels (N,), -1 for noise; each image's own before the first clustering.
        unreadable: images that could not be read so far.
        table: the centroids, which losses and miners share; empty before the first clustering.
        moved_from: embeddings (M, D) of a sample, at the last clustering.
        embeddings: (N, D) of the last embedding pass, on the first rank; not in checkpoints.
        ended: epochs that have ended.
        done: iterations of the next epoch that are done.
        order: (size, 2) of the epoch that runs, as of :func:`pml_tacl.trainers.data.draw_order`.
        loaded_within_epoch: whether a checkpoint was loaded whose epoch has yet to go on.
        stopped: whether a hook or the guard has ended the training.
        schedules: of learning rates, before their first step; None before training.
        extra: of the user.
    """

    labels: Tensor
    unreadable: Unreadable
    table: CentroidTable = field(default_factory=CentroidTable)
    moved_from: Tensor | None = None
    embeddings: Tensor | None = None
    ended: int = 0
    done: int = 0
    order: Tensor | None = None
    loaded_within_epoch: bool = False
    stopped: bool = False
    schedules: Schedules | None = None
    extra: StateDict = field(default_factory=dict)
