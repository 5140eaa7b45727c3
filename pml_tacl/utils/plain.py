"""Conversion of values to plain types that checkpoints and JSON files can hold."""

import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_tacl.utils.errors import InputTypeError

_KEPT: tuple[type, ...] = (
    type(None), bool, complex, bytes, bytearray, torch.Size, torch.dtype, torch.device,
    torch.layout,
)  # fmt: skip
_SCALARS: tuple[tuple[Any, Any], ...] = (
    (np.bool_, bool),
    (np.integer, int),
    (np.floating, float),
    (np.complexfloating, complex),
    (np.str_, str.__str__),
    (np.bytes_, lambda value: bytes(value) or bytearray()),
)
_BITS = 2000  # of the largest integer that a checkpoint can hold
_DEEPEST = 100


def plain(value: Any, name: str = "value") -> Any:
    """Convert a value to types that ``torch.load(weights_only=True)`` can read.

    NumPy numbers and subclasses of int and float become Python numbers of the same value. Arrays
    become tensors, mappings become dicts (an OrderedDict stays one), and paths become strings.
    Plain numbers, strings, tensors, lists, tuples, sets, dtypes and devices keep their type.

    Args:
        value: value to convert; it is not changed, and its containers are copied.
        name: name of the value, for messages.

    Raises:
        InputTypeError: for any other type, with its place and type.

    Example:
        >>> import numpy as np
        >>> plain({"rate": np.float64(0.5), "seen": np.arange(2)})
        {'rate': 0.5, 'seen': tensor([0, 1])}
    """
    return _plain(value, name, ())


def number(value: Any, name: str = "value") -> float:
    """Convert a number, or a tensor or array with a single element, to a float.

    Raises:
        InputTypeError: for anything else, with the value and its type.
    """
    if isinstance(value, Tensor | np.ndarray):
        if math.prod(value.shape) == 1:
            value = value.detach().cpu().item() if isinstance(value, Tensor) else value.item()
        else:
            shape = tuple(value.shape)
            raise InputTypeError(f"{name} must be one number, got values of shape {shape}")
    if isinstance(value, int | float | np.integer | np.floating | np.bool_):
        return float(value)
    raise InputTypeError(f"{name} must be a number, got {_named(type(value))}: {value!r:.60}")


def as_json(value: Any, name: str = "content") -> Any:
    """Convert a value to types that JSON supports: numbers, strings, lists and dicts.

    NaN and infinity become None, since JSON has neither.

    Raises:
        InputTypeError: for a type that JSON does not support, such as a tensor, with its place.
    """
    value = _plain(value, name, ())
    return _json(value, name)


def _plain(value: Any, name: str, within: tuple[int, ...]) -> Any:
    kind = type(value)
    if kind is bytes and not value:
        return bytearray()  # torch.load cannot read empty bytes
    if kind in _KEPT or kind in (float, str) or (kind is int and value.bit_length() <= _BITS):
        return value
    if isinstance(value, Tensor):
        return _tensor(value, name)
    if isinstance(value, np.ndarray):
        return _tensor_of(value, name) if value.ndim else _plain(value[()], name, within)
    if isinstance(value, np.generic):
        return _scalar(value, name)
    if isinstance(value, str):
        return str.__str__(value)  # a subclass may override __str__
    if isinstance(value, int) and value.bit_length() <= _BITS:
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping) or kind in (list, tuple, set):
        if id(value) in within:
            raise InputTypeError(f"{name} contains itself: remove it")
        if len(within) >= _DEEPEST:
            raise InputTypeError(f"{name.split('[')[0]} is nested too deep: give fewer levels")
        within = (*within, id(value))
        if isinstance(value, Mapping):
            return _mapping(value, name, within)
        return kind(_plain(each, f"{name}[{at}]", within) for at, each in enumerate(value))
    reason = "too large" if isinstance(value, int) else "of a type that cannot be loaded again"
    raise InputTypeError(
        f"{name} is {reason} ({_named(kind)}): give numbers, strings, tensors, or lists and dicts "
        "of them"
    )


def _mapping(value: Mapping[Any, Any], name: str, within: tuple[int, ...]) -> dict[Any, Any]:
    kind = next((one for one in (OrderedDict, Counter) if isinstance(value, one)), dict)
    made: dict[Any, Any] = kind()
    for key, each in value.items():
        simple = _plain(key, f"a key of {name}", within)
        try:
            twice = simple in made
        except TypeError:  # not hashable
            twice = True
        if twice or isinstance(simple, Tensor):
            raise InputTypeError(
                f"{name} has the key {key!r:.60} ({_named(type(key))}), which cannot be saved: "
                "give strings or numbers, each once"
            )
        if type(simple) is str:  # so that equal states give equal files
            simple = sys.intern(simple)
        made[simple] = _plain(each, f"{name}[{simple!r}]", within)
    if isinstance(made, OrderedDict) and vars(value):  # module versions of a state_dict
        vars(made).update({k: _plain(v, f"{name}.{k}", within) for k, v in vars(value).items()})
    return made


def _tensor(value: Tensor, name: str) -> Tensor:
    if type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return value
    if hasattr(value, "__tensor_flatten__"):  # it contains other tensors, such as a sharded one
        raise InputTypeError(
            f"{name} is of a type that cannot be loaded again ({_named(type(value))}): give a "
            "torch.Tensor"
        )
    return value.as_subclass(Tensor)


def _tensor_of(value: Any, name: str) -> Tensor:
    masked = isinstance(value, np.ma.MaskedArray)
    if masked or value.dtype.kind not in "biufc":
        what = "a masked array" if masked else f"an array of {value.dtype}"
        raise InputTypeError(f"{name} is {what}: give an array of numbers")
    if value.dtype.kind == "f" and value.dtype.itemsize > 8:
        value = value.astype(np.float64)
    elif value.dtype.kind == "c" and value.dtype.itemsize > 16:
        value = value.astype(np.complex128)
    native = value.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(value, dtype=native, order="C", subok=False))


def _scalar(value: Any, name: str) -> Any:
    for kind, made in _SCALARS:
        if isinstance(value, kind) and not isinstance(value, np.timedelta64):  # an np.integer
            return made(value)
    raise InputTypeError(
        f"{name} is of a type that cannot be loaded again ({_named(type(value))}): give a number "
        "or a string"
    )


def _json(value: Any, name: str) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_json(each, f"{name}[{at}]") for at, each in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not (key is None or isinstance(key, str | int | float)):
                raise InputTypeError(f"{name} has the key {key!r:.60}: give strings")
        return {key: _json(each, f"{name}[{key!r}]") for key, each in value.items()}
    raise InputTypeError(
        f"{name} is {_named(type(value))}, which JSON does not support: give numbers, strings, or "
        "lists and dicts of them"
    )


def _named(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
