"""A training's whole state in one file, written so that a crash leaves the last one whole."""

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pml_tacl._files import written_whole

_SAVED = ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs")
_NAME = re.compile(r"epoch_(\d+)\.pt$")


def save_checkpoint(folder: str | Path, epoch: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``epoch_NNNN.pt`` atomically and delete all but the last ``keep``.

    Args:
        folder: made if it is not there.
        epoch: the epoch that has ended.
        state: tensors, numbers, strings and containers of them: what ``weights_only`` loads.
        keep: how many files stay, at least 1.

    Returns:
        The path written.
    """
    folder = Path(folder)
    path = folder / f"epoch_{epoch:04d}.pt"
    with written_whole(path) as file:
        torch.save({"epoch": epoch, **state}, file)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, earliest epoch first."""
    found = [(int(m[1]), p) for p in Path(folder).glob("*.pt") if (m := _NAME.search(p.name))]
    return [path for _, path in sorted(found)]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; no pickled code is run.

    Args:
        path: a checkpoint, or a folder, whose last one is read.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if path.is_dir():
        there = checkpoints(path)
        if not there:
            raise FileNotFoundError(f"no checkpoint in {path}: start without resuming")
        path = there[-1]
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (
            name,
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    # PML's samplers draw from NumPy's global generator.
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def trainer_state(trainer: Any, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an :class:`UnsupervisedTrainer` needs to go on as if it had never stopped."""
    state: dict[str, Any] = {
        kind: {name: thing.state_dict() for name, thing in getattr(trainer, kind).items()}
        for kind in _SAVED
    }
    state |= {"labels": trainer.labels, "centroids": trainer.centroids, "extra": dict(extra or {})}
    state |= {"scaler": trainer.scaler.state_dict(), "random": random_state()}
    return state


def restore_trainer(trainer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`trainer_state`; gives back its ``extra``.

    Raises:
        ValueError: if the state is of another number of pictures or of other losses.
    """
    if len(state["labels"]) != len(trainer.labels):
        raise ValueError(
            f"checkpoint is of {len(state['labels'])} pictures and the data set has "
            f"{len(trainer.labels)}: resume on the same pictures"
        )
    for kind in _SAVED:
        if set(state[kind]) != set(getattr(trainer, kind)):
            raise ValueError(
                f"checkpoint holds {kind} {sorted(state[kind])} and the trainer has "
                f"{sorted(getattr(trainer, kind))}: resume with the same"
            )
    for kind in _SAVED:
        for name, thing in getattr(trainer, kind).items():
            thing.load_state_dict(state[kind][name])
    trainer.labels, trainer.centroids = state["labels"], state["centroids"]
    trainer.epoch = state["epoch"]
    trainer.scaler.load_state_dict(state["scaler"])
    set_random_state(state["random"])
    extra: dict[str, Any] = state["extra"]
    return extra
