"""A training's whole state in one file, written so that a crash leaves the last one whole."""

import logging
import pickle
import random
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pml_tacl.distributed.session import is_first
from pml_tacl.trainers._cells import cells_of, lay_cells
from pml_tacl.trainers._records import records_state, restore_records
from pml_tacl.trainers._restoring import (
    PARTS,
    check_kinds,
    fresh_schedules,
    kinds_of,
    load_module,
    load_parts,
    unchanged_on_error,
)
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import written_whole
from pml_tacl.utils.plain import plain
from pml_tacl.utils.versions import versions

_LOGGER = logging.getLogger(__name__)
_FORMAT = 2
_COUNTERS = ("queue_idx", "has_been_filled")  # of PML's CrossBatchMemory, not in its state_dict
_NAME = re.compile(r"epoch_(\d+)(?:_iteration_(\d+))?\.pt")
_NAMES = {"extra": "trainer.extra"}  # what messages call a part of the state
_ORDER = ("batch_size", "iterations_per_epoch")  # what an epoch that was drawn depends on
_CONFIG = (
    *_ORDER,
    "images_per_cluster",
    "recluster_every",
    "warmup_epochs",
    "centroid_momentum",
    "accumulation_steps",
)


def save_checkpoint(folder: str | Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Write a state atomically, and delete all earlier checkpoints but the last of them.

    Args:
        folder: made if it is not there.
        state: as of :func:`trainer_state`. Its ``epoch``, E, is how many epochs have ended, its
            ``iteration``, I, what is done of the next one: the file is ``epoch_E.pt``, or
            ``epoch_E_iteration_I.pt``.
        keep: how many files stay, this one among them, at least 1.

    Returns:
        The path written.

    Raises:
        InputTypeError: if the state holds what could not be read again, naming where and its
            type; nothing is written.
        OSError: if it cannot be written; the earlier ones are as they were.
    """
    folder = Path(folder)
    state = {name: plain(value, _NAMES.get(name, name)) for name, value in state.items()}
    within = f"_iteration_{state['iteration']:06d}" if state["iteration"] else ""
    path = folder / f"epoch_{state['epoch']:04d}{within}.pt"
    try:
        with written_whole(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or " ".join(str(error).split())
        whole = [p.name for p in checkpoints(folder)]
        kept = f"{whole[-1]} is whole: make room and go on from it" if whole else "make room"
        raise OSError(f"cannot write checkpoint {path} ({reason}); {kept}") from error
    earlier = [there for there in checkpoints(folder) if _place(there) < _place(path)]
    for old in earlier[: len(earlier) + 1 - keep]:
        old.unlink()
    return path


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, earliest first."""
    return sorted((p for p in Path(folder).glob("*.pt") if _NAME.fullmatch(p.name)), key=_place)


def _place(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


class DamagedError(InputError):
    """A checkpoint whose bytes are not those that were written."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; no pickled code is run.

    Args:
        path: a checkpoint, or a folder, whose last undamaged one is read; a damaged one after it
            is renamed to ``*.damaged``, with a warning.

    Raises:
        FileNotFoundError: if there is none.
        InputError: if the file, or every one in the folder, is damaged, is of another version, or
            holds a type that is not read without running code. The last two rename nothing.
    """
    path = Path(path)
    if not path.is_dir():
        earlier = [there for there in checkpoints(path.parent) if _place(there) < _place(path)]
        try:
            return _read(path)
        except DamagedError as error:
            hint = f"use the one before it, {earlier[-1].name}" if earlier else "start anew"
            raise DamagedError(f"{error}: {hint}") from error
    there = checkpoints(path)
    if not there:
        raise FileNotFoundError(f"no checkpoint in {path}: start without resuming")
    for last in reversed(there):
        try:
            state = _read(last)
        except DamagedError as error:
            _LOGGER.warning("%s: going on from the one before it", error)
            continue
        for damaged in there[there.index(last) + 1 :]:  # or the next one would be sorted before it
            damaged.rename(damaged.with_suffix(".pt.damaged"))
        return state
    raise DamagedError(f"no checkpoint in {path} can be read: start anew")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: there is no such file")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and _is_whole(path):
            found = re.search(r"GLOBAL (\S+)|(?:[Cc]lass|type) ([\w.]+)", str(error))
            kind = next(filter(None, found.groups()), "") if found else ""
            raise InputError(
                f"checkpoint {path} is whole, and holds a type that is not read without running "
                f"code ({kind or 'unknown'}): if you trust the file, allow the type with "
                "torch.serialization.add_safe_globals, and resume"
            ) from error
        raise DamagedError(f"checkpoint {path} is damaged") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise InputError(
            f"checkpoint {path} is of another version of pml_tacl: resume with that version, or "
            "start anew in another folder"
        )
    return state


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # as above
        return False


def open_folder(folder: Path, own: Path | None, place: tuple[int, int]) -> bool:
    """Make a folder ready for the checkpoints of a training that begins or goes on.

    Half-written files of a killed process are deleted. Checkpoints later than the training's own
    place, which was loaded from an earlier one, are renamed to ``*.superseded``.

    Args:
        folder: to write to.
        own: the folder that the training was loaded from or has written to, if any.
        place: epochs that have ended, and iterations of the next.

    Returns:
        Whether the training is new there.

    Raises:
        ValueError: if the folder holds checkpoints of another training.
    """
    new = own is None or own.resolve() != folder.resolve()
    there = checkpoints(folder)
    if new and there:
        raise InputError(
            f"checkpoint_folder {folder} holds checkpoints of an earlier training: load_checkpoint "
            "first, or give another folder"
        )
    for path in folder.glob(".epoch_*.pt.*.tmp"):
        path.unlink()
    for path in there:
        if _place(path) > place:
            path.rename(path.with_suffix(".pt.superseded"))
    return new


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


def trainer_state(trainer: Any, others: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """What an :class:`UnsupervisedTrainer` needs to go on as if it had never stopped.

    Args:
        trainer: that of the first process.
        others: "random" and "unreadable" of each of the other processes.
    """
    unreadable = trainer.unreadable.known.union(*(other["unreadable"] for other in others))
    state: dict[str, Any] = {
        kind: {name: thing.state_dict() for name, thing in getattr(trainer, kind).items()}
        for kind in PARTS
    }
    state |= {
        "format": _FORMAT,
        "epoch": trainer.ended,
        "iteration": trainer.done,
        "order": trainer.order,
        "stopped": trainer.stopped,
        "labels": trainer.labels,
        "cells": cells_of(trainer),
        "freeze_batchnorm": getattr(trainer.models["trunk"], "freeze_batchnorm", None),
        "centroids": trainer.centroids,
        "moved_from": trainer.moved_from,
        "unreadable": sorted(unreadable),
        "extra": dict(trainer.extra),
        "counters": {name: _counters(loss) for name, loss in trainer.loss_funcs.items()},
        "scaler": trainer.scaler.state_dict(),
        "ema": trainer.average and trainer.average.state_dict(),
        "records": trainer.record_keeper and records_state(trainer.record_keeper),
        "random": random_state(),
        "others": list(others),
        "config": {name: getattr(trainer, name) for name in _CONFIG},
        "versions": versions(),
        "kinds": kinds_of(trainer),
        "schedules": trainer.schedules,
        "guard": trainer.guard and trainer.guard.state_dict(),
    }
    return state


def _counters(loss: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        path: found
        for path, module in loss.named_modules()
        if (found := {name: vars(module)[name] for name in _COUNTERS if name in vars(module)})
    }


def restore_trainer(trainer: Any, state: dict[str, Any]) -> None:
    """Undo :func:`trainer_state`, but for the random state; wholly, or not at all.

    A schedule of learning rates goes on where it was. One that was made with other settings than
    the checkpoint's, such as for more epochs, goes on where a training that had it from the start
    would stand after as many epochs.

    Raises:
        InputError: if the state is of another number of images, of other models, losses,
            optimizers or schedulers, or within an epoch of other batches.
    """
    _check_fit(trainer, state)
    schedules = trainer.schedules or fresh_schedules(trainer)
    with unchanged_on_error(trainer):
        load_parts(trainer, state, schedules)
        for name, loss in trainer.loss_funcs.items():
            for path, counters in state["counters"][name].items():
                vars(loss.get_submodule(path)).update(counters)
        if state["scaler"] and trainer.scaler.is_enabled():  # else the precision is another now
            trainer.scaler.load_state_dict(state["scaler"])
        if trainer.average is not None:
            load_module("ema_model", trainer.average, state["ema"])
        if trainer.record_keeper is not None and state["records"] is not None and is_first():
            restore_records(trainer.record_keeper, state["records"])
    for name in ("epoch", "order", "stopped", "labels", "centroids", "moved_from", "extra"):
        setattr(trainer, name, state[name])
    trainer.ended, trainer.done = state["epoch"], state["iteration"]
    lay_cells(trainer, state.get("cells", {}))
    trainer.unreadable.known = set(state["unreadable"])
    trainer.schedules = schedules
    if trainer.guard is not None and state.get("guard"):
        trainer.guard.load_state_dict(state["guard"])
    changed = {
        name: f"{name} {state['versions'].get(name)} (now {now})"
        for name, now in versions().items()
        if state["versions"].get(name) != now
    }
    if changed:
        _LOGGER.warning("the checkpoint was written with %s", ", ".join(changed.values()))


def _check_fit(trainer: Any, state: dict[str, Any]) -> None:
    if len(state["labels"]) != len(trainer.labels):
        raise InputError(
            f"checkpoint is of {len(state['labels'])} pictures and the data set has "
            f"{len(trainer.labels)}: resume on the same pictures"
        )
    check_kinds(trainer, state)
    had = state.get("freeze_batchnorm")
    has = getattr(trainer.models["trunk"], "freeze_batchnorm", None)
    if had is not None and had != has:  # left out, it depends on whether weights were given
        raise InputError(
            f"checkpoint is of a model with freeze_batchnorm={had}, and this one has {has}: build "
            f"it with freeze_batchnorm={had}"
        )
    if (state["ema"] is None) != (trainer.average is None):
        had = "without" if state["ema"] is None else "with"
        raise InputError(f"checkpoint is {had} averaged weights: resume with the same ema_decay")
    for name in _ORDER:
        value = state["config"][name]
        if state["order"] is not None and value != getattr(trainer, name):
            raise InputError(
                f"checkpoint is within an epoch of {name}={value}, got {getattr(trainer, name)}: "
                "resume with the same"
            )
