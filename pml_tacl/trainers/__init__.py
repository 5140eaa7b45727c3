from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pml_tacl.trainers.unsupervised_trainer import UnsupervisedTrainer

__all__ = ["UnsupervisedTrainer"]


def __getattr__(name: str) -> Any:
    """Import the trainer on first use, which avoids a circular import with the other modules."""
    if name != "UnsupervisedTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pml_tacl.trainers.unsupervised_trainer import UnsupervisedTrainer

    return UnsupervisedTrainer
