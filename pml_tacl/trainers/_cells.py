"""Where the cells of the feature maps look, as part of a checkpoint.

A resumed training must track the same points and swap by the same masks, also where its script
measures the offset anew: with another version of timm, or through weights that have moved on.
"""

import logging
from typing import Any

_LOGGER = logging.getLogger(__name__)


def cells_of(trainer: Any) -> dict[str, dict[str, Any]]:
    """Grid and cell_offset of a trainer's transform, and cell_offset of its swap.

    Returns:
        By part, of those that know them: "grid" (rows, columns), "cell_offset" (x, y) in cells.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("transform", "swap"):
        part = getattr(trainer, name)
        known = {key: getattr(part, key, None) for key in ("grid", "cell_offset")}
        known = {key: value for key, value in known.items() if value is not None}
        if "cell_offset" in known:
            found[name] = {
                key: tuple(value) if isinstance(value, tuple | list) else value
                for key, value in known.items()
            }
    return found


def lay_cells(trainer: Any, cells: dict[str, dict[str, Any]]) -> None:
    """Let a trainer's transform and swap look where those of :func:`cells_of` did.

    Views of another grid are of another size, for which the offset is another: they stay, with a
    warning.
    """
    now = cells_of(trainer)
    for name, had in cells.items():
        has = now.get(name, {})
        if not has or has == had:
            continue
        if has.get("grid") != had.get("grid"):
            _LOGGER.warning(
                "the checkpoint's views have a grid of %s and now have %s: cells look at %s",
                had.get("grid"),
                has.get("grid"),
                has["cell_offset"],
            )
            continue
        part = getattr(trainer, name)
        if hasattr(part, "lay_cells"):
            part.lay_cells(had["cell_offset"])
        else:
            part.cell_offset = had["cell_offset"]
        _LOGGER.info("%s: cells look at %s, as in the checkpoint", name, had["cell_offset"])
