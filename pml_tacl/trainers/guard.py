"""Choice of the best network of a training without labels, or of the pretrained network."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pml_tacl.clustering.kmeans import have_collapsed
from pml_tacl.distributed.session import run_on_main
from pml_tacl.distributed.store import IN_MEMORY_UP_TO
from pml_tacl.evaluation.label_free import mutual_neighbours
from pml_tacl.trainers.pseudo_labeling import sample
from pml_tacl.utils.checks import check_number

if TYPE_CHECKING:
    from pml_tacl.trainers.unsupervised_trainer import UnsupervisedTrainer

Weights = dict[str, Any]
# Smaller differences count as equal: see the table in docs/results.md.
TOLERANCE = 0.02
_IN_A_ROW = 2


def is_kept(values: Sequence[float]) -> bool:
    """Return whether the last fraction of mutual neighbours is close enough to the highest."""
    return values[-1] >= max(values) - TOLERANCE


class Guard:
    """Selects a network by its fraction of mutual neighbours, which needs no labels.

    The guard measures the embeddings at each clustering (the first is of the pretrained network)
    and once more at the end of the training. It keeps the latest network whose fraction of
    :func:`mutual_neighbours` is at most 0.02 below the highest. If that is a trained network, the
    final weights are a weighted mean of the trained and the pretrained weights. On validation sets,
    this mean retrieved slightly better on average than the trained weights alone. The guard's state
    is saved in checkpoints.

    Averaging weights follows Wortsman et al. 2022 (robust fine-tuning); the criterion is ours.

    Args:
        share: weight of the trained network in the mean, in (0, 1]; 1 keeps the trained network.

    Attributes:
        values: maps the number of completed epochs to the fraction of mutual neighbours, in [0, 1].
        kept: number of epochs completed by the network that is kept; None before the first
            measurement.
    """

    def __init__(self, share: float = 1.0) -> None:
        check_number("share", share, 0, most=1, above=True)
        self.share = share
        self.values: dict[int, float] = {}
        self.kept: int | None = None
        self._start: dict[str, Any] = {}
        self._state: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget all measurements and networks, for a training that starts again."""
        self.values, self.kept, self._start, self._state = {}, None, {}, {}

    def look(self, trainer: "UnsupervisedTrainer", embeddings: Tensor | None) -> None:
        """Measure the current network, and keep it if it is close enough to the best.

        All processes must call this method.

        Args:
            trainer: the trainer whose network is measured.
            embeddings: (N, D) on the main process, NaN for unreadable images; ignored on the
                others. If there are more than a million, an evenly spaced sample is measured.
        """
        if trainer.ended in self.values:
            return

        def judge() -> float:
            assert embeddings is not None
            seen = embeddings
            if len(seen) > IN_MEMORY_UP_TO:  # too large to copy
                seen = seen[sample(len(seen), IN_MEMORY_UP_TO // 10)]
            return 0.0 if have_collapsed(seen) else mutual_neighbours(seen)

        value = run_on_main(judge, "comparing networks")
        self.values[trainer.ended] = value
        if is_kept(list(self.values.values())):
            self.kept = trainer.ended
            self._state = network_state(trainer)
            if len(self.values) == 1:
                self._start = self._state

    def note_collapse(self, trainer: "UnsupervisedTrainer") -> None:
        """Record the lowest value for a network whose embeddings cannot be clustered."""
        self.values.setdefault(trainer.ended, 0.0)

    @property
    def falls(self) -> bool:
        """Whether the last two values are clearly below the highest: training does harm."""
        last = [self.values[epoch] for epoch in sorted(self.values)][-_IN_A_ROW:]
        return len(last) == _IN_A_ROW and max(last) < max(self.values.values()) - TOLERANCE

    def restore_kept(self, trainer: "UnsupervisedTrainer") -> None:
        """Load the kept weights into the models of a trainer."""
        load_network(trainer, mean_state(self._start, self._state, self.share))

    @property
    def start_is_kept(self) -> bool:
        """Whether the pretrained network is kept."""
        return self.kept is not None and self.kept == min(self.values)

    def verdict(self) -> str:
        """Return one line that says which network was kept, and why."""
        if self.kept is None:
            return "no networks were compared: the last network is kept"
        start, kept = self.values[min(self.values)], self.values[self.kept]
        last = self.values[max(self.values)]
        if self.start_is_kept:
            return (
                "training did not help: the pretrained network is kept; mutual neighbours: "
                f"{100 * start:.1f} % before training, {100 * last:.1f} % at the end"
            )
        share = round(100 * self.share)
        mean = f", as a mean of its weights ({share} %) and the pretrained ones ({100 - share} %)"
        found = "training helped" if kept > start + TOLERANCE else "training changed little"
        return (
            f"{found}: the network of epoch {self.kept} is kept{'' if share == 100 else mean}; "
            f"mutual neighbours: {100 * start:.1f} % before training, {100 * kept:.1f} % after "
            f"epoch {self.kept}"
        )

    def summary(self) -> dict[str, Any]:
        """Return the values for a run's metrics.json."""
        values = {str(epoch): value for epoch, value in sorted(self.values.items())}
        return {
            "mutual_neighbours": values,
            "kept_epoch": self.kept,
            "share": self.share,
            "verdict": self.verdict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints."""
        states = {"state": self._state, "start": self._start}
        return {"values": dict(self.values), "kept": self.kept, **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.values, self.kept = dict(state["values"]), state["kept"]
        self._state, self._start = state["state"], state["start"]


def network_state(trainer: "UnsupervisedTrainer") -> dict[str, Any]:
    """Return a copy on the CPU of the weights of a trainer's models and of their average."""
    models: dict[str, nn.Module] = dict(trainer.models)
    if trainer.average is not None:
        models["average"] = trainer.average
    return {
        name: {
            key: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for key, value in model.state_dict().items()
        }
        for name, model in models.items()
    }


def load_network(trainer: "UnsupervisedTrainer", state: dict[str, Any]) -> None:
    """Load the weights from :func:`network_state` into a trainer's models."""
    for name, weights in state.items():
        model = trainer.average if name == "average" else trainer.models[name]
        assert model is not None
        model.load_state_dict(weights)


def mean_state(start: Weights, end: Weights, share: float) -> Weights:
    """Interpolate linearly between the weights of two networks.

    Args:
        start: weights of the first network.
        end: weights of the second network.
        share: weight of `end` in the mean, in (0, 1].

    Returns:
        The interpolated weights; integers, such as BatchNorm's step counts, are those of `end`.
    """

    def between(first: Any, last: Any) -> Any:
        if isinstance(last, dict):
            return {key: between(first[key], value) for key, value in last.items()}
        if not isinstance(last, Tensor) or not last.is_floating_point():
            return last
        return torch.lerp(first.float(), last.float(), share).to(last.dtype)

    return end if share == 1 else between(start, end)
