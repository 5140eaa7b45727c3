"""State of a training, which checkpoints keep together with the networks."""

from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor

from pml_tacl.clustering.centroids import CentroidTable
from pml_tacl.trainers.data import Unreadable

StateDict = dict[str, object]
"""Return value of a ``state_dict()`` method."""


class Schedules(TypedDict):
    """Learning rate schedules before their first step.

    On resume they show which schedules were created with different settings.
    """

    states: dict[str, StateDict]
    """State of each scheduler by name."""
    rates: dict[str, list[StateDict]]
    """Rates of each parameter group by name of the optimizer."""


@dataclass
class TrainingState:
    """State of a training, without networks, losses and optimizers.

    The state of the random number generators is not stored here: checkpoints read it from Python,
    NumPy and torch (:func:`pml_tacl.trainers.checkpoint.random_state`).

    Attributes:
        labels: pseudo-labels (N,), -1 for noise; before the first clustering each image has its
            own label.
        unreadable: images that could not be read so far.
        table: centroids that losses and miners share; empty before the first clustering.
        moved_from: embeddings (M, D) of a sample of images at the last clustering.
        embeddings: embeddings (N, D) of the last embedding pass, on the main process only; not in
            checkpoints.
        ended: number of epochs completed.
        done: number of iterations completed in the current epoch.
        order: images and seeds (size, 2) of the current epoch, from
            :func:`pml_tacl.trainers.data.draw_order`.
        loaded_within_epoch: whether a checkpoint from within an epoch was loaded and that epoch
            has not continued yet.
        stopped: whether a hook or the guard has ended the training.
        schedules: learning rate schedules before their first step; None before training.
        extra: data of the user.
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
