"""Arguments that count, checked in one voice."""

import numpy as np


def check_count(
    name: str, value: object, least: int, alternative: str = "", most: int | None = None
) -> None:
    """Raise ValueError unless `value` is an integer of at least `least` and at most `most`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        also = f" {alternative}" if alternative else ""
        raise ValueError(f"{name} must be an integer {wanted}{also}, got {value!r}")
