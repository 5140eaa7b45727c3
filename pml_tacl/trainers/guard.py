"""A guard without labels: a training keeps what is better, the untrained start included."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pml_tacl.clustering.kmeans import have_collapsed
from pml_tacl.distributed.session import run_on_main
from pml_tacl.evaluation.label_free import mutual_neighbours
from pml_tacl.utils.checks import check_number

if TYPE_CHECKING:
    from pml_tacl.trainers.unsupervised_trainer import UnsupervisedTrainer

Weights = dict[str, Any]
# Shares that differ by less are taken for equal: see the table of docs/results.md.
TOLERANCE = 0.02
_IN_A_ROW = 2


class Guard:
    """Compares the networks of a training by :func:`mutual_neighbours`, and keeps a good one.

    It looks at the embeddings of each clustering, of which the first are those of the untrained
    network, and once more at the end. The last network whose share is at most 0.02 below the
    highest is kept, the untrained one included. Of a trained one, the weights that are kept are
    the mean of its own and the untrained ones: that retrieves about as well where training helps,
    and better where it does harm. What it remembers is part of the checkpoints.

    After Wortsman et al. 2022 (robust fine-tuning by the mean of weights); the criterion is ours.

    Args:
        share: of the trained weights in that mean, in (0, 1]; 1 keeps the trained network itself.

    Attributes:
        values: epochs that had ended -> share of mutual neighbours.
        kept: the epochs after which the network that is kept was seen; None before the first look.
    """

    def __init__(self, share: float = 1.0) -> None:
        check_number("share", share, 0, most=1, above=True)
        self.share = share
        self.values: dict[int, float] = {}
        self.kept: int | None = None
        self._start: dict[str, Any] = {}
        self._state: dict[str, Any] = {}

    def look(self, trainer: "UnsupervisedTrainer", embeddings: Tensor | None) -> None:
        """Judge the network as it is. All processes call it, the first with the embeddings."""
        if trainer.ended in self.values:
            return

        def judge() -> float:
            assert embeddings is not None
            return 0.0 if have_collapsed(embeddings) else mutual_neighbours(embeddings)

        value = run_on_main(judge, "comparing networks")
        self.values[trainer.ended] = value
        if value >= max(self.values.values()) - TOLERANCE:
            self.kept = trainer.ended
            self._state = network_state(trainer)
            if len(self.values) == 1:
                self._start = self._state

    def note_collapse(self, trainer: "UnsupervisedTrainer") -> None:
        """Judge a network whose embeddings cannot be clustered: it is the worst."""
        self.values.setdefault(trainer.ended, 0.0)

    @property
    def falls(self) -> bool:
        """Whether the last looks were clearly below the highest: training has begun to do harm."""
        last = [self.values[epoch] for epoch in sorted(self.values)][-_IN_A_ROW:]
        return len(last) == _IN_A_ROW and max(last) < max(self.values.values()) - TOLERANCE

    def restore_kept(self, trainer: "UnsupervisedTrainer") -> None:
        """Give the models of a trainer the weights that are kept."""
        load_network(trainer, mean_state(self._start, self._state, self.share))

    @property
    def start_is_kept(self) -> bool:
        """Whether the untrained network is kept."""
        return self.kept is not None and self.kept == min(self.values)

    def verdict(self) -> str:
        """Say in one line which network was kept, and why."""
        if self.kept is None:
            return "nothing was compared: the last network is kept"
        start, kept = self.values[min(self.values)], self.values[self.kept]
        last = self.values[max(self.values)]
        if self.start_is_kept:
            return (
                "training did not help: the untrained network is kept (mutual neighbours "
                f"{100 * start:.1f} % before, {100 * last:.1f} % at the end)"
            )
        how = "" if self.share == 1 else f", averaged {self.share:.0%} with the untrained one"
        return (
            f"{'training helped' if kept >= start else 'training changed little'}: the network of "
            f"epoch {self.kept} is kept{how} (mutual neighbours {100 * start:.1f} % before, "
            f"{100 * kept:.1f} % then)"
        )

    def summary(self) -> dict[str, Any]:
        """Return what a run's metrics.json tells of it."""
        values = {str(epoch): value for epoch, value in sorted(self.values.items())}
        return {
            "mutual_neighbours": values,
            "kept_epoch": self.kept,
            "share": self.share,
            "verdict": self.verdict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints hold."""
        states = {"state": self._state, "start": self._start}
        return {"values": dict(self.values), "kept": self.kept, **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.values, self.kept = dict(state["values"]), state["kept"]
        self._state, self._start = state["state"], state["start"]


def network_state(trainer: "UnsupervisedTrainer") -> dict[str, Any]:
    """Return a copy, in main memory, of the weights of a trainer's models and their average."""
    models: dict[str, nn.Module] = dict(trainer.models)
    if trainer.average is not None:
        models["average"] = trainer.average
    return {
        name: {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        for name, model in models.items()
    }


def load_network(trainer: "UnsupervisedTrainer", state: dict[str, Any]) -> None:
    """Undo :func:`network_state`."""
    for name, weights in state.items():
        model = trainer.average if name == "average" else trainer.models[name]
        assert model is not None
        model.load_state_dict(weights)


def mean_state(start: Weights, end: Weights, share: float) -> Weights:
    """Return the weights `share` of the way from one network to another.

    Numbers that are counted, such as BatchNorm's steps, are taken from the end.
    """

    def between(first: Any, last: Any) -> Any:
        if isinstance(last, dict):
            return {key: between(first[key], value) for key, value in last.items()}
        if not isinstance(last, Tensor) or not last.is_floating_point():
            return last
        return torch.lerp(first.float(), last.float(), share).to(last.dtype)

    return end if share == 1 else between(start, end)
