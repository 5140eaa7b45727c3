"""Range checks for arguments that are integers or numbers."""

from collections.abc import Sequence
from math import inf
from numbers import Real
from typing import Any, TypeGuard

import numpy as np

from pml_tacl.utils.errors import InputError


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number; bools, strings and tensors are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_numbers(values: Any) -> list[float]:
    """Convert a sequence, array or tensor to floats; return [] if any value is not a number."""
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return []


def as_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return a positive int, or a pair of them, as (rows, columns); else raise ValueError."""
    pair = (value, value) if isinstance(value, int) else value
    if isinstance(pair, Sequence) and len(pair) == 2:
        rows, columns = pair
        if isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0:
            return rows, columns
    raise InputError(
        f"{name} must be an int above 0 or a pair (rows, columns) of them, got {value!r}"
    )


def check_count(
    name: str, value: object, least: int, alternative: str = "", most: int | None = None
) -> None:
    """Raise ValueError unless `value` is an integer of at least `least` and at most `most`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        also = f" {alternative}" if alternative else ""
        raise InputError(f"{name} must be an integer {wanted}{also}, got {value!r}")


def check_number(
    name: str,
    value: object,
    least: float,
    most: float = inf,
    *,
    alternative: str = "",
    above: bool = False,
    below: bool = False,
    finite: bool = True,
) -> None:
    """Raise ValueError unless `value` is a number in a range, and not NaN.

    Args:
        name: name of the argument, for the message.
        value: value to check.
        least: lower bound.
        most: upper bound.
        alternative: other allowed values for the message, such as "or None".
        above: exclude `least` from the range.
        below: exclude `most` from the range.
        finite: reject infinity.
    """
    # All comparisons with NaN are false, so NaN is always rejected.
    fits = is_number(value) and (value > least if above else value >= least)
    fits = fits and is_number(value) and (value < most if below else value <= most)
    if fits and not (finite and value == inf):
        return
    if most < inf:
        wanted = f"a number in {'(' if above else '['}{least:g}, {most:g}{')' if below else ']'}"
    else:
        where = "above" if above else "of at least"
        wanted = f"a {'finite ' if finite else ''}number {where} {least:g}"
    also = f" {alternative}" if alternative else ""
    raise InputError(f"{name} must be {wanted}{also}, got {value!r}")
