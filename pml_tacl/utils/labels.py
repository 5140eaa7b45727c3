"""Validation of pseudo-labels: integers, -1 for noise."""

from typing import Any

import torch
from torch import Tensor

from pml_tacl.utils.errors import InputError

_LARGEST = 2**53  # from here on float64 does not represent all integers


def pseudo_labels(labels: Any, name: str = "labels") -> Tensor:
    """Return labels in {-1, 0, 1, ...} as int64, on the same device.

    Integers in any dtype are allowed; True and False count as 1 and 0. On a GPU, integer dtypes
    are checked asynchronously: an invalid label causes a device-side assertion. Float dtypes are
    checked with a synchronisation.

    Args:
        labels: (N,) tensor, array or sequence.
        name: name of the argument, for messages.

    Returns:
        (N,) int64.

    Raises:
        ValueError: for a label below -1, a fraction, NaN, or a value that is not a number.
    """
    return _checked(labels if isinstance(labels, Tensor) else _as_tensor(labels, name), name)


def _checked(labels: Tensor, name: str) -> Tensor:
    if labels.dtype == torch.int64 and _traced(labels):
        return labels
    if labels.is_floating_point():
        if torch.compiler.is_compiling():
            raise InputError(f"{name} must be integers in a compiled function, got {labels.dtype}")
        wrong = ~(labels.double().abs() < _LARGEST) | (labels != labels.floor())
        if wrong.any():
            raise _refused(name, labels[wrong][0].item())
    elif labels.is_complex():
        raise _refused(name, labels.flatten()[0].item() if labels.numel() else "complex numbers")
    unsigned = labels.dtype == torch.uint64  # int64 cannot hold its upper half
    labels = labels.long()
    if _traced(labels) or not labels.numel():
        return labels
    least = 0 if unsigned else -1
    if labels.device.type == "cpu":
        smallest = int(labels.min())
        if smallest < least:
            raise _refused(name, smallest + 2**64 if unsigned else smallest)
    elif labels.device.type == "cuda":
        torch._assert_async(
            (labels >= least).all(), f"{name} must be -1 for noise, or 0, 1, 2, ..."
        )
    return labels


def _traced(labels: Tensor) -> bool:
    return torch.compiler.is_compiling() or labels.is_meta


def _as_tensor(labels: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        first = next(iter(labels), labels) if hasattr(labels, "__iter__") else labels
        raise _refused(name, first) from error


def _refused(name: str, got: Any) -> InputError:
    return InputError(
        f"{name} must be whole numbers, -1 for noise or 0, 1, 2, ..., got {got!r}: number the "
        "clusters from 0"
    )
