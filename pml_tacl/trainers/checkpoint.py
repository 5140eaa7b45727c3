"""Checkpoints: what of a training is saved, how it is written, read, and put back."""

import copy
import logging
import math
import pickle
import random
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from pml_tacl.distributed.session import is_main, naming, patient, rank, world_size
from pml_tacl.trainers.data import Unreadable, seed_apart
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
_NAMES = {"extra": "trainer.extra"}  # what messages call a part of the state
# What a scheduler writes into an optimizer's groups.
_RATES = (
    "lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum",
)  # fmt: skip


class Stateful(Protocol):
    """Anything with a state: modules, optimizers, schedulers."""

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state_dict: StateDict, /) -> object: ...


class Parts(Protocol):
    """The parts of a trainer, of ours or of PML's, that have a state."""

    models: dict[str, nn.Module]
    loss_funcs: dict[str, nn.Module]
    mining_funcs: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    lr_schedulers: dict[str, LRScheduler]


class Trainer(Parts, Protocol):
    """What a checkpoint reads of a trainer of ours."""

    state: TrainingState
    whole: nn.Module
    average: AveragedModel | None
    scaler: torch.amp.GradScaler
    guard: Guard | None
    record_keeper: Any  # record-keeper has no types
    transform: Callable[[Any], tuple[Tensor, Tensor, Tensor]]
    swap: BackgroundSwap | None
    epoch: int
    batch_size: int
    iterations_per_epoch: int
    images_per_cluster: int
    recluster_every: int
    warmup_epochs: int
    centroid_momentum: float
    accumulation_steps: int


class SavedParts(TypedDict):
    """A checkpoint of a trainer of PML's: its parts."""

    format: int
    epoch: int
    iteration: int
    parts: dict[str, dict[str, StateDict]]
    kinds: dict[str, dict[str, str]]


class Saved(SavedParts):
    """A checkpoint of a trainer of ours.

    ``epoch`` is how many epochs have ended, ``iteration`` how much of the next one is done.
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
    """Where the cells of the feature maps look: what a transform or swap knows of it."""

    grid: tuple[int, int]
    cell_offset: tuple[float, float]


class RandomState(TypedDict, total=False):
    """The state of Python's, NumPy's and torch's generators."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    cuda: list[Tensor]


class OtherRank(TypedDict):
    """What a checkpoint holds of each rank but the first."""

    random: RandomState
    unreadable: list[str]


def save_checkpoint(folder: str | Path, state: Mapping[str, object], keep: int = 2) -> Path:
    """Write a state atomically, and delete all earlier checkpoints but the last of them.

    Args:
        folder: made if it is not there.
        state: as of :func:`trainer_state` or :func:`parts_state`. Its ``epoch``, E, is how many
            epochs have ended, its ``iteration``, I, what is done of the next one: the file is
            ``epoch_E.pt``, or ``epoch_E_iteration_I.pt``.
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
        with atomic_write(path) as file:
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


def load_checkpoint(path: str | Path) -> Saved:
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


def _read(path: Path) -> Saved:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: there is no such file")
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
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
    return cast(Saved, state)


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


def random_state() -> RandomState:
    """The state of Python's, NumPy's and torch's generators."""
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
    """Restore what :func:`random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    # PML's samplers draw from NumPy's global generator.
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def states_of_others(unreadable: Unreadable) -> list[OtherRank]:
    """Return random state and unreadable images of each rank but the first, on the first one."""
    if world_size() == 1:
        return []
    own: OtherRank = {"random": random_state(), "unreadable": sorted(unreadable.known)}
    into: list[Any] | None = [None] * world_size() if is_main() else None
    with naming("gathering the state of the training"):
        distributed.gather_object(own, into, dst=0, group=patient())
    return (into or [])[1:]


def restore_random(state: Saved, batch_size: int) -> None:
    """Restore this rank's random state, perhaps from a training of another number of ranks."""
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
    """Return the state of a trainer's parts, as a checkpoint of it."""
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
    """Undo :func:`parts_state`, wholly or not at all; schedules go on where they were.

    Raises:
        InputError: if the state is of other models, losses, optimizers or schedulers.
    """
    _check_kinds(trainer, state)
    with _unchanged_on_error(_all_parts(trainer)):
        _load_parts(trainer, state)
        for name, schedule in (trainer.lr_schedulers or {}).items():
            schedule.load_state_dict(state["parts"]["lr_schedulers"][name])


def trainer_state(trainer: Trainer, others: Sequence[OtherRank] = ()) -> Saved:
    """Return what an :class:`UnsupervisedTrainer` needs to go on as if it had never stopped.

    Args:
        trainer: that of the first rank.
        others: of the other ranks, as of :func:`states_of_others`.
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
    """Undo :func:`trainer_state`, but for the random state; wholly, or not at all.

    A schedule of learning rates goes on where it was. One that was made with other settings than
    the checkpoint's, such as for more epochs, goes on where a training that had it from the start
    would stand after as many epochs.

    Raises:
        InputError: if the state is of another number of images, of other models, losses,
            optimizers or schedulers, or within an epoch of other batches.
    """
    _check_fit(trainer, state)
    now = trainer.state
    schedules = now.schedules or fresh_schedules(trainer)
    parts = _all_parts(trainer)
    parts += [trainer.scaler] if trainer.scaler.is_enabled() else []
    parts += [trainer.average] if trainer.average is not None else []
    with _unchanged_on_error(parts):
        _load_parts(trainer, state)
        _load_schedules(trainer, state, schedules)
        for name, loss in trainer.loss_funcs.items():
            for path, counters in state["counters"][name].items():
                vars(loss.get_submodule(path)).update(counters)
        if state["scaler"] and trainer.scaler.is_enabled():  # else the precision is another now
            trainer.scaler.load_state_dict(state["scaler"])
        if trainer.average is not None and state["ema"] is not None:
            _load_module("ema_model", trainer.average, state["ema"])
        if trainer.record_keeper is not None and state["records"] is not None and is_main():
            restore_records(trainer.record_keeper, state["records"])
    now.ended, now.done, now.order = state["epoch"], state["iteration"], state["order"]
    now.stopped, now.labels = state["stopped"], state["labels"]
    now.table.values, now.moved_from = state["centroids"], state["moved_from"]
    now.extra, now.schedules = state["extra"], schedules
    now.unreadable.known = set(state["unreadable"])
    now.loaded_within_epoch = now.order is not None
    trainer.epoch = now.ended
    _lay_cells(trainer, state["cells"])
    if trainer.guard is not None and state["guard"]:
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
    """Return what decides how a network is trained and is in none of its weights."""
    found = {
        "from_scratch": getattr(trainer.whole, "from_scratch", None),
        "freeze_batchnorm": getattr(trainer.models["trunk"], "freeze_batchnorm", None),
    }
    return {name: value for name, value in found.items() if isinstance(value, bool)}


def _check_fit(trainer: Trainer, state: Saved) -> None:
    count = len(trainer.state.labels)
    if "labels" not in state:
        raise InputError("checkpoint is of a trainer of PML's: restore it into one of the same")
    if len(state["labels"]) != count:
        raise InputError(
            f"checkpoint is of {len(state['labels'])} images and the data set has "
            f"{count}: resume on the same images"
        )
    _check_kinds(trainer, state)
    if (state["ema"] is None) != (trainer.average is None):
        had = "without" if state["ema"] is None else "with"
        raise InputError(f"checkpoint is {had} averaged weights: resume with the same ema_decay")
    network = _network_of(trainer)
    for name, value in state["network"].items():
        if network.get(name, value) != value:
            how = "set model.from_scratch" if name == "from_scratch" else f"build it with {name}"
            raise InputError(
                f"checkpoint is of a model with {name}={value} and the trainer's has "
                f"{network[name]}, by which it would be trained otherwise: {how}={value}"
            )
    config = _config_of(trainer)
    for name in ("batch_size", "iterations_per_epoch"):  # what a drawn epoch depends on
        had_value = state["config"][name]
        if state["order"] is not None and had_value != config[name]:
            raise InputError(
                f"checkpoint is within an epoch of {name}={had_value}, got {config[name]}: "
                "resume with the same"
            )


def _check_kinds(trainer: Parts, state: SavedParts) -> None:
    """Raise InputError for a state of other parts, or of parts of other types."""
    parts = parts_of(trainer)
    for kind, things in parts.items():
        if set(state["parts"][kind]) != set(things):
            raise InputError(
                f"checkpoint holds {kind} {sorted(state['parts'][kind])} and the trainer has "
                f"{sorted(things)}: resume with the same"
            )
    for kind, names in state["kinds"].items():
        for name, had in names.items():
            now = type(parts[kind][name]).__name__
            if had != now:
                raise InputError(
                    f"checkpoint holds {name} of type {had} and the trainer's is {now}: "
                    "resume with the same"
                )


@contextmanager
def _unchanged_on_error(parts: Sequence[Stateful]) -> Iterator[None]:
    """Put every part back as it was if the block raises."""
    before = [copy.deepcopy(each.state_dict()) for each in parts]
    try:
        yield
    except Exception:
        for each, state in zip(parts, before, strict=True):
            each.load_state_dict(state)
        raise


def _load_parts(trainer: Parts, state: SavedParts) -> None:
    """Load models, losses, miners and optimizers; InputError names the first that differs."""
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
    except Exception as error:  # a module of the user's own may raise anything
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
    return f"{type(module).__name__} refuses its state"


def _shape(state: StateDict, key: str) -> str:
    if key not in state:
        return "not there"
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
    """Return the schedules of a trainer as they are before their first step.

    NumPy's numbers in optimizers and schedulers become plain ones, in place: a checkpoint gives
    plain ones back, and a resumed training must compute with the same types.
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
    """Load schedulers, or replay those that were made with other settings."""
    saved = state["parts"]["lr_schedulers"]
    # All are plain values, so that their text compares them, NaN and tensors too.
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
    """Whether a LambdaLR, whose functions no state holds, would give another rate here."""
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
    """Make the steps of new schedulers, in the order of a training.

    Args:
        schedulers: by name, as of the trainer.
        iterations_per_epoch: of the training.
        epochs: that have ended.
        iterations: of the next one that are done.
        others: names of those that are new, for the messages.
    """
    every, at_end = (
        [schedule for name, schedule in schedulers.items() if name.endswith(ending)]
        for ending in ("_scheduler_by_iteration", "_scheduler_by_epoch")
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer has made a step yet
            for epoch in range(epochs + 1):
                count = iterations if epoch == epochs else iterations_per_epoch
                for schedule in every * count:
                    schedule.step()
                for schedule in () if epoch == epochs else at_end:
                    schedule.step()
    except ValueError as error:  # of OneCycleLR
        raise InputError(
            f"{', '.join(others)} ends before epoch {epochs}, where the checkpoint is: make it for "
            "all epochs of the training"
        ) from error
    _LOGGER.info(
        "%s: other settings than before; goes on where it would stand after %d epochs",
        ", ".join(others),
        epochs,
    )


def _cells_of(trainer: Trainer) -> dict[str, Cells]:
    """Return where the cells of a trainer's transform and swap look, of those that know.

    A resumed training must track the same points and swap by the same masks, also where its
    script measures the offset anew: with another version of timm, or through weights that have
    moved on.
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
    """Let a trainer's transform and swap look where those of :func:`_cells_of` did.

    Views of another grid are of another size, for which the offset is another: they stay, with a
    warning.
    """
    now = _cells_of(trainer)
    for name, part in (("transform", trainer.transform), ("swap", trainer.swap)):
        had, has = cells.get(name), now.get(name)
        if not has or not had or has == had:
            continue
        if has.get("grid") != had.get("grid"):
            _LOGGER.warning(
                "the checkpoint's views have a grid of %s and now have %s: cells look at %s",
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
        _LOGGER.info("%s: cells look at %s, as in the checkpoint", name, had["cell_offset"])
