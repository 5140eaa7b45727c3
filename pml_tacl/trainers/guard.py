"""A guard without labels: a training keeps the best network, the untrained start included."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from pml_tacl.distributed.session import on_first
from pml_tacl.evaluation.label_free import mutual_neighbours

if TYPE_CHECKING:
    from pml_tacl.trainers.unsupervised_trainer import UnsupervisedTrainer

_FALL, _IN_A_ROW = 0.02, 2
_COLLAPSED = 1e-5


class Guard:
    """Compares the networks of a training by :func:`mutual_neighbours`, and remembers the best.

    It looks at the embeddings of each clustering, of which the first are those of the untrained
    network, and once more at the end. What it remembers is part of the checkpoints.

    Attributes:
        values: epochs that had ended -> share of mutual neighbours.
        best: the epochs after which it was highest; None before the first look.
    """

    def __init__(self) -> None:
        self.values: dict[int, float] = {}
        self.best: int | None = None
        self._state: dict[str, Any] = {}

    def look(self, trainer: "UnsupervisedTrainer", embeddings: Tensor | None) -> None:
        """Judge the network as it is. All processes call it, the first with the embeddings."""
        if trainer.ended in self.values:
            return

        def judge() -> float:
            assert embeddings is not None
            return 0.0 if have_collapsed(embeddings) else mutual_neighbours(embeddings)

        value = on_first(judge, "comparing networks")
        self.values[trainer.ended] = value
        if self.best is None or value > self.values[self.best]:
            self.best = trainer.ended
            self._state = network_state(trainer)

    def note_collapse(self, trainer: "UnsupervisedTrainer") -> None:
        """Judge a network whose embeddings cannot be clustered: it is the worst."""
        self.values.setdefault(trainer.ended, 0.0)

    @property
    def falls(self) -> bool:
        """Whether the last looks were clearly below the best: training has begun to do harm."""
        if self.best is None:
            return False
        last = [self.values[epoch] for epoch in sorted(self.values)][-_IN_A_ROW:]
        return len(last) == _IN_A_ROW and max(last) < self.values[self.best] - _FALL

    def restore_best(self, trainer: "UnsupervisedTrainer") -> None:
        """Give the models of a trainer the weights that were best."""
        load_network(trainer, self._state)

    def verdict(self) -> str:
        """Say in one line which network was kept, and why."""
        if self.best is None:
            return "nothing was compared: the last network is kept"
        start, best = self.values[min(self.values)], self.values[self.best]
        last = self.values[max(self.values)]
        if self.best == min(self.values):
            return (
                "training did not help: the untrained network is kept (mutual neighbours "
                f"{100 * start:.1f} % before, {100 * last:.1f} % at the end)"
            )
        return (
            f"training helped: the network of epoch {self.best} is kept (mutual neighbours "
            f"{100 * start:.1f} % before, {100 * best:.1f} % then)"
        )

    def summary(self) -> dict[str, Any]:
        """Return what a run's metrics.json tells of it."""
        values = {str(epoch): value for epoch, value in sorted(self.values.items())}
        return {"mutual_neighbours": values, "kept_epoch": self.best, "verdict": self.verdict()}

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints hold."""
        return {"values": dict(self.values), "best": self.best, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.values, self.best = dict(state["values"]), state["best"]
        self._state = state["state"]


def have_collapsed(embeddings: Tensor) -> bool:
    """Whether all embeddings (N, D) are nearly the same: what tells them apart is rounding."""
    unit = F.normalize(embeddings[embeddings.isfinite().all(1)].float(), dim=1)
    if len(unit) < 2:
        return True
    distance = 1 - (unit @ F.normalize(unit.mean(0), dim=0)).mean()
    return float(distance) < _COLLAPSED


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
