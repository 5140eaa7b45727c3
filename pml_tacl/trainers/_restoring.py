"""The parts of a checkpoint put back into a trainer: all of them, or none."""

import copy
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.plain import plain

PARTS = ("models", "loss_funcs", "mining_funcs", "optimizers", "lr_schedulers")
_LOGGER = logging.getLogger(__name__)
# What a scheduler writes into an optimizer's groups.
_RATES = (
    "lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum",
)  # fmt: skip


def kinds_of(trainer: Any) -> dict[str, dict[str, str]]:
    """Names of the types of a trainer's optimizers and schedulers."""
    return {
        kind: {name: type(thing).__name__ for name, thing in getattr(trainer, kind).items()}
        for kind in ("optimizers", "lr_schedulers")
    }


def fresh_schedules(trainer: Any) -> dict[str, Any]:
    """What the schedules of a trainer are before their first step.

    NumPy's numbers in optimizers and schedulers become plain ones, in place: a checkpoint gives
    plain ones back, and a resumed training must compute with the same types.

    Returns:
        "states" by scheduler, and "rates" of each group by optimizer.
    """
    rates = {}
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
    return copy.deepcopy({"states": states, "rates": rates})


def check_kinds(trainer: Any, state: dict[str, Any]) -> None:
    """Raise InputError for a state of other parts, or of parts of other types."""
    for kind in PARTS:
        if set(state[kind]) != set(getattr(trainer, kind)):
            raise InputError(
                f"checkpoint holds {kind} {sorted(state[kind])} and the trainer has "
                f"{sorted(getattr(trainer, kind))}: resume with the same"
            )
    for kind, now in kinds_of(trainer).items():
        for name, had in state.get("kinds", {}).get(kind, {}).items():
            if had != now[name]:
                raise InputError(
                    f"checkpoint holds {name} of type {had} and the trainer's is {now[name]}: "
                    "resume with the same"
                )


@contextmanager
def unchanged_on_error(trainer: Any) -> Iterator[None]:
    """Put every part of a trainer back as it was if the block raises."""
    parts = [each for kind in PARTS for each in (getattr(trainer, kind) or {}).values()]
    scaler, average = (getattr(trainer, name, None) for name in ("scaler", "average"))
    parts += [scaler] if scaler is not None and scaler.is_enabled() else []
    parts += [average] if average is not None else []
    before = [copy.deepcopy(each.state_dict()) for each in parts]
    try:
        yield
    except Exception:
        for each, state in zip(parts, before, strict=True):
            each.load_state_dict(state)
        raise


def load_parts(trainer: Any, state: dict[str, Any], schedules: dict[str, Any]) -> None:
    """Load models, losses, miners, optimizers and schedulers, the last as `restore_trainer` says.

    Args:
        trainer: to load into.
        state: of the training to go on with.
        schedules: of the trainer, as of :func:`fresh_schedules`.

    Raises:
        InputError: naming the first part that differs, and how.
    """
    for kind in PARTS[:3]:
        for name, module in getattr(trainer, kind).items():
            load_module(name, module, state[kind][name])
    for name, optimizer in trainer.optimizers.items():
        _load_optimizer(name, optimizer, state["optimizers"][name])
    # All are plain values, so that their text compares them, NaN and tensors too.
    earlier = (state.get("schedules") or {}).get("states", {})
    others = [
        name
        for name, made in schedules["states"].items()
        if not isinstance(schedule := trainer.lr_schedulers[name], ReduceLROnPlateau)
        and (
            repr(earlier.get(name, made)) != repr(made)
            or _is_of_another_function(schedule, state["lr_schedulers"][name])
        )
    ]
    for name, schedule in trainer.lr_schedulers.items():
        replayed = others and not isinstance(schedule, ReduceLROnPlateau)
        saved = schedules["states"] if replayed else state["lr_schedulers"]
        schedule.load_state_dict(copy.deepcopy(saved[name]))
    if others:
        for name, optimizer in trainer.optimizers.items():
            for group, rates in zip(optimizer.param_groups, schedules["rates"][name], strict=True):
                group.update(copy.deepcopy(rates))
        replay(trainer, state["epoch"], state["iteration"], others)


def load_module(name: str, module: nn.Module, state: dict[str, Any]) -> None:
    """Load a module's state; InputError names the first tensor that does not fit."""
    try:
        module.load_state_dict(state)
    except Exception as error:  # a module of the user's own may raise anything
        raise InputError(
            f"checkpoint's {name} does not fit the trainer's ({_difference(state, module)}): "
            "resume with the same model and losses"
        ) from error


def _difference(state: dict[str, Any], module: nn.Module) -> str:
    now = module.state_dict()
    for key in (*state, *(key for key in now if key not in state)):
        had, has = (_shape(where, key) for where in (state, now))
        if had != has:
            return f"{key}: {had} in the checkpoint, {has} in the trainer"
    return f"{type(module).__name__} refuses its state"


def _shape(state: dict[str, Any], key: str) -> str:
    if key not in state:
        return "not there"
    value = state[key]
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _load_optimizer(name: str, optimizer: Any, state: dict[str, Any]) -> None:
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


def _is_of_another_function(schedule: Any, state: dict[str, Any]) -> bool:
    """Whether a LambdaLR, whose functions no state holds, would give another rate here."""
    if not isinstance(schedule, LambdaLR):
        return False
    at = state["last_epoch"]
    now = [
        float(rate * function(at))
        for rate, function in zip(state["base_lrs"], schedule.lr_lambdas, strict=True)
    ]
    return not all(map(math.isclose, now, map(float, state["_last_lr"])))


def replay(trainer: Any, epochs: int, iterations: int, others: list[str]) -> None:
    """Make the steps of new schedulers, in the order of a training."""
    every, at_end = (
        [schedule for name, schedule in trainer.lr_schedulers.items() if name.endswith(ending)]
        for ending in ("_scheduler_by_iteration", "_scheduler_by_epoch")
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer has made a step yet
            for epoch in range(epochs + 1):
                count = iterations if epoch == epochs else trainer.iterations_per_epoch
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
