"""Checkpoints: writing, reading and restoring the state of a training."""

import copy
import logging
import math
import pickle
import random
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from pml_tacl.distributed.session import (
    all_reduce_max,
    is_main,
    naming,
    patient,
    rank,
    run_on_main,
    world_size,
)
from pml_tacl.trainers.data import Unreadable, image_of, seed_apart
from pml_tacl.trainers.guard import Guard
from pml_tacl.trainers.records import RecordsState, records_state, restore_records
from pml_tacl.trainers.state import Schedules, StateDict, TrainingState
from pml_tacl.transforms import BackgroundSwap
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import atomic_write
from pml_tacl.utils.plain import plain
from pml_tacl.utils.versions import versions

_NumPyState = tuple[str, npt.NDArray[np.uint32], int, int, float]
_LOGGER = logging.getLogger(__name__)
_FORMAT = 3
_COUNTERS = ("queue_idx", "has_been_filled")  # of PML's CrossBatchMemory, not in its state_dict
_NAME = re.compile(r"epoch_(\d+)(?:_iteration_(\d+))?\.pt")
_NAMES = {"extra": "trainer.extra"}  # names of entries of the state in messages
# Entries that schedulers write into an optimizer's parameter groups.
_RATES = (
    "lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum",
)  # fmt: skip


class Stateful(Protocol):
    """An object with a state: a module, optimizer or scheduler."""

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state_dict: StateDict, /) -> object: ...


class Parts(Protocol):
    """The parts of a trainer, of this package or of PML, that have a state."""

    models: dict[str, nn.Module]
    loss_funcs: dict[str, nn.Module]
    mining_funcs: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    lr_schedulers: dict[str, LRScheduler]


class Trainer(Parts, Protocol):
    """Attributes of :class:`UnsupervisedTrainer` that checkpoints read."""

    state: TrainingState
    whole: nn.Module
    average: AveragedModel | None
    scaler: torch.amp.GradScaler
    guard: Guard | None
    record_keeper: Any  # record-keeper has no types
    transform: Callable[[Any], tuple[Tensor, Tensor, Tensor]]
    swap: BackgroundSwap | None
    epoch: int
    iteration: int
    warmup_is_open: bool
    batch_size: int
    iterations_per_epoch: int
    images_per_cluster: int
    recluster_every: int
    warmup_epochs: int
    centroid_momentum: float
    accumulation_steps: int


class SavedParts(TypedDict):
    """Checkpoint of any PML trainer: the state of its parts."""

    format: int
    epoch: int
    iteration: int
    parts: dict[str, dict[str, StateDict]]
    kinds: dict[str, dict[str, str]]


class Saved(SavedParts):
    """Checkpoint of an :class:`UnsupervisedTrainer`.

    ``epoch`` is the number of epochs completed, ``iteration`` the number of iterations completed
    in the next epoch.
    """

    order: Tensor | None
    stopped: bool
    labels: Tensor
    centroids: Tensor | None
    moved_from: Tensor | None
    unreadable: list[str]
    extra: StateDict
    schedules: Schedules | None
    cells: "dict[str, Cells]"
    counters: dict[str, dict[str, StateDict]]
    scaler: StateDict
    ema: StateDict | None
    records: RecordsState | None
    random: "RandomState"
    others: "list[OtherRank]"
    config: dict[str, float]
    versions: dict[str, str]
    network: dict[str, bool]
    guard: StateDict | None


class Cells(TypedDict, total=False):
    """Grid and offset of feature map cells, as a transform or swap stores them."""

    grid: tuple[int, int]
    cell_offset: tuple[float, float]


class RandomState(TypedDict, total=False):
    """State of the random number generators of Python, NumPy and torch."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    cuda: list[Tensor]


class OtherRank(TypedDict):
    """State of one rank, other than the main process, in a checkpoint."""

    random: RandomState
    unreadable: list[str]


def save_checkpoint(folder: str | Path, state: Mapping[str, object], keep: int = 2) -> Path:
    """Write a state atomically, and delete old checkpoints.

    Args:
        folder: the folder, which is created if needed.
        state: from :func:`trainer_state` or :func:`parts_state`. The file name contains its
            ``epoch``, E, and ``iteration``, I: ``epoch_E.pt``, or ``epoch_E_iteration_I.pt`` if I
            is not 0.
        keep: number of files to keep, including the new one, at least 1.

    Returns:
        The path written.

    Raises:
        InputTypeError: if the state contains a type that cannot be loaded again; the message
            gives its place and type. Nothing is written.
        OSError: if the file cannot be written; earlier checkpoints are kept.
    """
    folder = Path(folder)
    state = {name: plain(value, _NAMES.get(name, name)) for name, value in state.items()}
    within = f"_iteration_{state['iteration']:06d}" if state["iteration"] else ""
    path = folder / f"epoch_{state['epoch']:04d}{within}.pt"
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or " ".join(str(error).split())
        whole = [p.name for p in checkpoints(folder)]
        kept = f"{whole[-1]} is intact: free space and resume from it" if whole else "free space"
        raise OSError(f"cannot write checkpoint {path} ({reason}); {kept}") from error
    earlier = [there for there in checkpoints(folder) if place_of(there) < place_of(path)]
    for old in earlier[: len(earlier) + 1 - keep]:
        old.unlink()
    return path


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, earliest first."""
    return sorted((p for p in Path(folder).glob("*.pt") if _NAME.fullmatch(p.name)), key=place_of)


def place_of(path: Path) -> tuple[int, int]:
    """Return the epochs, and the iterations of the next epoch, that a checkpoint's name gives."""
    found = _NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


class DamagedError(InputError):
    """Error for a checkpoint with damaged bytes."""


def load_checkpoint(path: str | Path) -> Saved:
    """Read a checkpoint to the CPU, without running pickled code.

    Args:
        path: a checkpoint, or a folder, whose last undamaged checkpoint is read. Damaged
            ones after it are renamed to ``*.damaged``, with a warning.

    Returns:
        The state that was saved.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        InputError: if the file, or every file in the folder, is damaged, if it was written by
            another version, or if it contains a type that can only be read by running code.
            Nothing is renamed then.
    """
    return _find(Path(path))[1]


def load_checkpoint_distributed(path: str | Path) -> Saved:
    """Read a checkpoint on all ranks, see :func:`load_checkpoint`. Collective.

    The main process chooses the file, and each rank reads it. The main process sends the state
    only if a rank does not find the same file, for example because there is no shared disk.

    Raises:
        Exception: the errors of :func:`load_checkpoint`, on all ranks.
    """
    own: list[Saved] = []

    def choose() -> tuple[str, tuple[int, int]]:
        there, state = _find(Path(path))
        own.append(state)
        return str(there.absolute()), _stamp(there)

    place, stamp = run_on_main(choose, "reading a checkpoint")
    if not is_main():
        with suppress(Exception):  # the main process then sends the state
            if _stamp(Path(place)) == stamp:
                own.append(_read(Path(place)))
    if all_reduce_max(int(not own)):
        return run_on_main(lambda: own[0], "sending a checkpoint")
    return own[0]


def _stamp(path: Path) -> tuple[int, int]:
    there = path.stat()
    return there.st_size, there.st_mtime_ns


def _find(path: Path) -> tuple[Path, Saved]:
    """Return the checkpoint at a path, or the last undamaged one in a folder, and its state."""
    if not path.is_dir():
        earlier = [there for there in checkpoints(path.parent) if place_of(there) < place_of(path)]
        try:
            return path, _read(path)
        except DamagedError as error:
            hint = f"use the one before it, {earlier[-1].name}" if earlier else "start again"
            raise DamagedError(f"{error}: {hint}") from error
    there = checkpoints(path)
    if not there:
        raise FileNotFoundError(f"no checkpoint in {path}: start without resuming")
    for last in reversed(there):
        try:
            state = _read(last)
        except DamagedError as error:
            _LOGGER.warning("%s: reading the one before it", error)
            continue
        for damaged in there[there.index(last) + 1 :]:  # else they would sort after new ones
            damaged.rename(damaged.with_suffix(".pt.damaged"))
        return last, state
    raise DamagedError(f"no checkpoint in {path} can be read: start again")


def _read(path: Path) -> Saved:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: the file does not exist")
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes raise many types of errors
        if isinstance(error, pickle.UnpicklingError) and _is_whole(path):
            found = re.search(r"GLOBAL (\S+)|(?:[Cc]lass|type) ([\w.]+)", str(error))
            kind = next(filter(None, found.groups()), "") if found else ""
            raise InputError(
                f"checkpoint {path} is intact, but contains a type that can only be read by "
                f"running code ({kind or 'unknown'}): if you trust the file, allow the type with "
                "torch.serialization.add_safe_globals, and resume"
            ) from error
        raise DamagedError(f"checkpoint {path} is damaged") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise InputError(
            f"checkpoint {path} was written by another version of pml_tacl: resume with that "
            "version, or start again in another folder"
        )
    return cast(Saved, state)


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # as above
        return False


def open_folder(folder: Path, own: Path | None, place: tuple[int, int]) -> bool:
    """Prepare a folder for the checkpoints of a training that begins or resumes.

    Incomplete files of a killed process are deleted. If the training resumed from an earlier
    checkpoint, the later ones are renamed to ``*.superseded``.

    Args:
        folder: folder to write to.
        own: folder that the training was loaded from or has written to, if any.
        place: number of epochs completed, and of iterations completed in the next epoch.

    Returns:
        Whether the training has no checkpoint in this folder yet.

    Raises:
        ValueError: if the folder contains checkpoints of another training.
    """
    new = own is None or own.resolve() != folder.resolve()
    there = checkpoints(folder)
    if new and there:
        raise InputError(
            f"checkpoint_folder {folder} contains checkpoints of an earlier training: "
            "load_checkpoint first, or give another folder"
        )
    for path in folder.glob(".epoch_*.pt.*.tmp"):
        path.unlink()
    for path in there:
        if place_of(path) > place:
            path.rename(path.with_suffix(".pt.superseded"))
    return new


def random_state() -> RandomState:
    """Return the state of the random number generators of Python, NumPy and torch."""
    legacy = np.random.get_state(legacy=True)  # noqa: NPY002
    name, keys, position, has_gauss, cached = cast(_NumPyState, legacy)
    state: RandomState = {
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


def set_random_state(state: RandomState) -> None:
    """Restore a state from :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    # PML's samplers draw from NumPy's global generator.
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def states_of_others(unreadable: Unreadable) -> list[OtherRank]:
    """Gather random states and unreadable images of the other ranks on the main process.

    Collective.

    Args:
        unreadable: unreadable images of this rank.

    Returns:
        On the main process one entry for each other rank; empty on the other ranks.
    """
    if world_size() == 1:
        return []
    own: OtherRank = {"random": random_state(), "unreadable": sorted(unreadable.known)}
    into: list[Any] | None = [None] * world_size() if is_main() else None
    with naming("gathering the state of the training"):
        distributed.gather_object(own, into, dst=0, group=patient())
    return (into or [])[1:]


def restore_random(state: Saved, batch_size: int) -> None:
    """Restore this rank's random state, even if the checkpoint has another number of ranks."""
    if is_main():
        set_random_state(state["random"])
    elif len(state["others"]) == world_size() - 1:
        set_random_state(state["others"][rank() - 1]["random"])
    elif state["order"] is not None:
        seed_apart(state["order"], state["iteration"] * batch_size - 1)


def parts_of(trainer: Parts) -> dict[str, Mapping[str, Stateful]]:
    """Return the parts of a trainer that have a state, by kind and name."""
    found: dict[str, Mapping[str, Stateful] | None] = {
        "models": trainer.models,
        "loss_funcs": trainer.loss_funcs,
        "mining_funcs": trainer.mining_funcs,
        "optimizers": trainer.optimizers,
        "lr_schedulers": trainer.lr_schedulers,
    }
    return {kind: things or {} for kind, things in found.items()}


def parts_state(trainer: Parts, epoch: int, iteration: int = 0) -> SavedParts:
    """Return the state of a trainer's parts, in the format of a checkpoint."""
    parts = parts_of(trainer)
    return {
        "format": _FORMAT,
        "epoch": epoch,
        "iteration": iteration,
        "parts": {
            kind: {name: thing.state_dict() for name, thing in things.items()}
            for kind, things in parts.items()
        },
        "kinds": {
            kind: {name: type(thing).__name__ for name, thing in parts[kind].items()}
            for kind in ("optimizers", "lr_schedulers")
        },
    }


def restore_parts(trainer: Parts, state: SavedParts) -> None:
    """Restore a state from :func:`parts_state`. After an error nothing is changed.

    Raises:
        InputError: if models, losses, optimizers or schedulers differ from those of the state.
    """
    _check_kinds(trainer, state)
    with _unchanged_on_error(_all_parts(trainer)):
        _load_parts(trainer, state)
        for name, schedule in (trainer.lr_schedulers or {}).items():
            schedule.load_state_dict(state["parts"]["lr_schedulers"][name])


def trainer_state(trainer: Trainer, others: Sequence[OtherRank] = ()) -> Saved:
    """Return the complete state of an :class:`UnsupervisedTrainer`, for an exact resume.

    Args:
        trainer: the trainer of the main process.
        others: states of the other ranks, from :func:`states_of_others`.
    """
    state = trainer.state
    unreadable = state.unreadable.known.union(*(other["unreadable"] for other in others))
    return {
        **parts_state(trainer, state.ended, state.done),
        "order": state.order,
        "stopped": state.stopped,
        "labels": state.labels,
        "centroids": state.table.values,
        "moved_from": state.moved_from,
        "unreadable": sorted(unreadable),
        "extra": dict(state.extra),
        "schedules": state.schedules,
        "cells": _cells_of(trainer),
        "counters": {name: _counters(loss) for name, loss in trainer.loss_funcs.items()},
        "scaler": trainer.scaler.state_dict(),
        "ema": None if trainer.average is None else trainer.average.state_dict(),
        "records": trainer.record_keeper and records_state(trainer.record_keeper),
        "random": random_state(),
        "others": list(others),
        "config": _config_of(trainer),
        "versions": versions(),
        "network": _network_of(trainer),
        "guard": None if trainer.guard is None else trainer.guard.state_dict(),
    }


def restore_trainer(trainer: Trainer, state: Saved) -> None:
    """Restore a state from :func:`trainer_state`, except random states. On error change nothing.

    A learning rate schedule continues from its saved state. If it was created with settings that
    differ from the checkpoint's, such as more epochs, its steps are replayed: it then continues
    as if training had used it from the start.

    Raises:
        InputError: if state and trainer differ in the number of images, in models, losses,
            optimizers or schedulers, or in whether weights are averaged; or if the state is from
            within an epoch with other batches.
    """
    _check_fit(trainer, state)
    now = trainer.state
    schedules = now.schedules or fresh_schedules(trainer)
    parts = _all_parts(trainer)
    parts += [trainer.scaler] if trainer.scaler.is_enabled() else []
    parts += [trainer.average] if trainer.average is not None else []
    with _unchanged_on_error(parts):
        _load_parts(trainer, state)
        counters = [
            (vars(loss.get_submodule(path)), values)
            for name, loss in trainer.loss_funcs.items()
            for path, values in state["counters"][name].items()
        ]
        _load_schedules(trainer, state, schedules)
        if state["scaler"] and trainer.scaler.is_enabled():  # else the precision has changed
            trainer.scaler.load_state_dict(state["scaler"])
        if trainer.average is not None and state["ema"] is not None:
            _load_module("ema_model", trainer.average, state["ema"])
        if trainer.record_keeper is not None and state["records"] is not None and is_main():
            restore_records(trainer.record_keeper, state["records"])
    for variables, values in counters:
        variables.update(values)
    now.ended, now.done, now.order = state["epoch"], state["iteration"], state["order"]
    now.stopped, now.labels = state["stopped"], state["labels"]
    now.table.values, now.moved_from = state["centroids"], state["moved_from"]
    now.extra, now.schedules = state["extra"], schedules
    now.unreadable.known = {image_of(each) for each in state["unreadable"]}
    now.loaded_within_epoch = now.order is not None
    trainer.epoch, trainer.iteration = now.ended, max(0, now.done - 1)
    if trainer.warmup_is_open:
        trainer.warmup_epochs = int(state["config"]["warmup_epochs"])
    _lay_cells(trainer, state["cells"])
    if trainer.guard is not None and state["guard"] is not None:
        trainer.guard.load_state_dict(state["guard"])
    changed = {
        name: f"{name} {state['versions'].get(name)} (now {here})"
        for name, here in versions().items()
        if state["versions"].get(name) != here
    }
    if changed:
        _LOGGER.warning("the checkpoint was written with %s", ", ".join(changed.values()))


def _all_parts(trainer: Parts) -> list[Stateful]:
    return [thing for things in parts_of(trainer).values() for thing in things.values()]


def _counters(loss: nn.Module) -> dict[str, StateDict]:
    return {
        path: found
        for path, module in loss.named_modules()
        if (found := {name: vars(module)[name] for name in _COUNTERS if name in vars(module)})
    }


def _config_of(trainer: Trainer) -> dict[str, float]:
    return {
        "batch_size": trainer.batch_size,
        "iterations_per_epoch": trainer.iterations_per_epoch,
        "images_per_cluster": trainer.images_per_cluster,
        "recluster_every": trainer.recluster_every,
        "warmup_epochs": trainer.warmup_epochs,
        "centroid_momentum": trainer.centroid_momentum,
        "accumulation_steps": trainer.accumulation_steps,
    }


def _network_of(trainer: Trainer) -> dict[str, bool]:
    """Return the settings of a network that affect training and are not in its state_dict."""
    found = {
        "from_scratch": getattr(trainer.whole, "from_scratch", None),
        "freeze_batchnorm": getattr(trainer.models["trunk"], "freeze_batchnorm", None),
    }
    return {name: value for name, value in found.items() if isinstance(value, bool)}


def _check_fit(trainer: Trainer, state: Saved) -> None:
    count = len(trainer.state.labels)
    if "labels" not in state:
        raise InputError(
            "checkpoint was written by a PML trainer: restore it into a trainer of that class"
        )
    if len(state["labels"]) != count:
        raise InputError(
            f"checkpoint was written with {len(state['labels'])} images, but the data set has "
            f"{count}: resume on the same images"
        )
    _check_kinds(trainer, state)
    if (state["ema"] is None) != (trainer.average is None):
        had = "without" if state["ema"] is None else "with"
        raise InputError(
            f"checkpoint was written {had} averaged weights: resume with the same ema_decay"
        )
    if trainer.guard is not None and state["guard"] is None:
        raise InputError(
            "checkpoint was written without a guard, which compares with the pretrained network: "
            "resume with guard=False"
        )
    network = _network_of(trainer)
    for name, value in state["network"].items():
        if network.get(name, value) != value:
            how = "set model.from_scratch" if name == "from_scratch" else f"build it with {name}"
            raise InputError(
                f"checkpoint was written with a model with {name}={value}, but the trainer's model "
                f"has {network[name]}, which changes training: {how}={value}"
            )
    config = _config_of(trainer)
    for name in ("batch_size", "iterations_per_epoch"):  # the order of an epoch depends on them
        had_value = state["config"][name]
        if state["order"] is not None and had_value != config[name]:
            raise InputError(
                f"checkpoint is from within an epoch with {name}={had_value}, got "
                f"{config[name]}: resume with the same value"
            )


def _check_kinds(trainer: Parts, state: SavedParts) -> None:
    """Raise InputError if the names or types of parts differ from those of a state."""
    parts = parts_of(trainer)
    for kind, things in parts.items():
        if set(state["parts"][kind]) != set(things):
            raise InputError(
                f"checkpoint contains {kind} {sorted(state['parts'][kind])} and the trainer has "
                f"{sorted(things)}: resume with the same"
            )
    for kind, names in state["kinds"].items():
        for name, had in names.items():
            now = type(parts[kind][name]).__name__
            if had != now:
                raise InputError(
                    f"checkpoint contains {name} of type {had} and the trainer's is {now}: "
                    "resume with the same"
                )


@contextmanager
def _unchanged_on_error(parts: Sequence[Stateful]) -> Iterator[None]:
    """Restore the state of all parts if the block raises."""
    before = [copy.deepcopy(each.state_dict()) for each in parts]
    try:
        yield
    except Exception:
        for each, state in zip(parts, before, strict=True):
            each.load_state_dict(state)
        raise


def _load_parts(trainer: Parts, state: SavedParts) -> None:
    """Load models, losses, miners and optimizers; raise InputError for the first that differs."""
    saved = state["parts"]
    for kind, modules in (
        ("models", trainer.models),
        ("loss_funcs", trainer.loss_funcs),
        ("mining_funcs", trainer.mining_funcs),
    ):
        for name, module in (modules or {}).items():
            _load_module(name, module, saved[kind][name])
    for name, optimizer in trainer.optimizers.items():
        _load_optimizer(name, optimizer, saved["optimizers"][name])


def _load_module(name: str, module: nn.Module, state: StateDict) -> None:
    try:
        module.load_state_dict(state)
    except Exception as error:  # user-defined modules may raise any error
        raise InputError(
            f"checkpoint's {name} does not fit the trainer's ({_difference(state, module)}): "
            "resume with the same model and losses"
        ) from error


def _difference(state: StateDict, module: nn.Module) -> str:
    now = module.state_dict()
    for key in (*state, *(key for key in now if key not in state)):
        had, has = (_shape(where, key) for where in (state, now))
        if had != has:
            return f"{key}: {had} in the checkpoint, {has} in the trainer"
    return f"{type(module).__name__} cannot load its state"


def _shape(state: StateDict, key: str) -> str:
    if key not in state:
        return "missing"
    value = state[key]
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _load_optimizer(name: str, optimizer: Optimizer, state: dict[str, Any]) -> None:
    had, has = (
        [len(group["params"]) for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if had != has:
        raise InputError(
            f"checkpoint's {name} has {_groups(had)} and the trainer's has {_groups(has)}: resume "
            "with the same parameter groups"
        )
    optimizer.load_state_dict(state)


def _groups(sizes: list[int]) -> str:
    return f"{sum(sizes)} parameters in {len(sizes)} group{'s' if len(sizes) > 1 else ''}"


def fresh_schedules(trainer: Parts) -> Schedules:
    """Return a copy of a trainer's schedules. No schedule may have made a step yet.

    NumPy numbers in optimizers and schedulers are replaced by Python numbers, in place. A resumed
    training has Python numbers, and every training must compute with the same types.
    """
    rates: dict[str, list[StateDict]] = {}
    for name, optimizer in trainer.optimizers.items():
        for group in optimizer.param_groups:
            group.update({k: plain(group[k], f"{name}: {k}") for k in _RATES if k in group})
        rates[name] = [{k: g[k] for k in _RATES if k in g} for g in optimizer.param_groups]
    for schedule in trainer.lr_schedulers.values():
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = plain(list(schedule.base_lrs), "base_lrs")
    states = {
        name: plain(schedule.state_dict(), name) for name, schedule in trainer.lr_schedulers.items()
    }
    made: Schedules = {"states": states, "rates": rates}
    return copy.deepcopy(made)


def _load_schedules(trainer: Trainer, state: Saved, schedules: Schedules) -> None:
    """Load schedulers; if one was created with other settings, replay the steps of all."""
    saved = state["parts"]["lr_schedulers"]
    # All values are plain, so comparing their repr also works for NaN and tensors.
    earlier = state["schedules"]["states"] if state["schedules"] else {}
    others = [
        name
        for name, made in schedules["states"].items()
        if not isinstance(schedule := trainer.lr_schedulers[name], ReduceLROnPlateau)
        and (
            repr(earlier.get(name, made)) != repr(made)
            or _is_of_another_function(schedule, saved[name])
        )
    ]
    for name, schedule in trainer.lr_schedulers.items():
        replayed = others and not isinstance(schedule, ReduceLROnPlateau)
        own = schedules["states"] if replayed else saved
        schedule.load_state_dict(copy.deepcopy(own[name]))
    if others:
        for name, optimizer in trainer.optimizers.items():
            for group, rates in zip(optimizer.param_groups, schedules["rates"][name], strict=True):
                group.update(copy.deepcopy(rates))
        iterations = trainer.iterations_per_epoch
        replay(trainer.lr_schedulers, iterations, state["epoch"], state["iteration"], others)


def _is_of_another_function(schedule: LRScheduler, state: dict[str, Any]) -> bool:
    """Return whether a LambdaLR gives other rates than those in its saved state.

    The state does not contain the functions of the LambdaLR, so the rates are compared.
    """
    if not isinstance(schedule, LambdaLR):
        return False
    at = state["last_epoch"]
    now = [
        float(rate * function(at))
        for rate, function in zip(state["base_lrs"], schedule.lr_lambdas, strict=True)
    ]
    return not all(map(math.isclose, now, map(float, state["_last_lr"])))


def replay(
    schedulers: Mapping[str, LRScheduler],
    iterations_per_epoch: int,
    epochs: int,
    iterations: int,
    others: list[str],
) -> None:
    """Step new schedulers as often as a training has stepped, in the same order.

    Args:
        schedulers: schedulers of the trainer by name.
        iterations_per_epoch: iterations per epoch of the training.
        epochs: number of epochs completed.
        iterations: number of iterations completed in the next epoch.
        others: names of the schedulers whose settings have changed, for messages.

    Raises:
        InputError: if a OneCycleLR has fewer steps.
    """
    every, at_end = (
        [schedule for name, schedule in schedulers.items() if name.endswith(ending)]
        for ending in ("_scheduler_by_iteration", "_scheduler_by_epoch")
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns since no optimizer has made a step
            for epoch in range(epochs + 1):
                count = iterations if epoch == epochs else iterations_per_epoch
                for schedule in every * count:
                    schedule.step()
                for schedule in () if epoch == epochs else at_end:
                    schedule.step()
    except ValueError as error:  # from OneCycleLR
        raise InputError(
            f"{', '.join(others)} ends before epoch {epochs} of the checkpoint: create it for all "
            "epochs of the training"
        ) from error
    _LOGGER.info(
        "%s: settings have changed; the steps of %d epochs were replayed",
        ", ".join(others),
        epochs,
    )


def _cells_of(trainer: Trainer) -> dict[str, Cells]:
    """Return grid and cell offset of a trainer's transform and swap, if they have them.

    A resumed training must track the same points and use the same masks. Its script may measure a
    different offset, with another version of timm or with weights that have changed.
    """
    found: dict[str, Cells] = {}
    for name, part in (("transform", trainer.transform), ("swap", trainer.swap)):
        grid, offset = getattr(part, "grid", None), getattr(part, "cell_offset", None)
        if offset is None:
            continue
        found[name] = {"cell_offset": _as_tuple(offset)}
        if grid is not None:
            found[name] = {"grid": _as_tuple(grid), "cell_offset": _as_tuple(offset)}
    return found


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple | list) else value


def _lay_cells(trainer: Trainer, cells: dict[str, Cells]) -> None:
    """Set the cell offsets of a trainer's transform and swap to those of :func:`_cells_of`.

    If the grid differs, the views have another size, which needs another offset. The offset is then
    not changed, and a warning is logged.
    """
    now = _cells_of(trainer)
    for name, part in (("transform", trainer.transform), ("swap", trainer.swap)):
        had, has = cells.get(name), now.get(name)
        if not has or not had or has == had:
            continue
        if has.get("grid") != had.get("grid"):
            _LOGGER.warning(
                "the checkpoint's views have a grid of %s, but now it is %s: cell_offset stays %s",
                had.get("grid"),
                has.get("grid"),
                has["cell_offset"],
            )
            continue
        lay = getattr(part, "lay_cells", None)
        if lay is not None:
            lay(had["cell_offset"])
        else:
            setattr(part, "cell_offset", had["cell_offset"])  # noqa: B010
        _LOGGER.info("%s: cell_offset=%s, as in the checkpoint", name, had["cell_offset"])
