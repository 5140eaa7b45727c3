"""Cells, frames and maps, drawn with matplotlib's object interface (without pyplot)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from pml_tacl.visualize._figures import NotebookFigure, fitted
from pml_tacl.visualize._inputs import Pixels

# From the palette of Okabe and Ito, which is distinguishable with colour blindness.
RIGHT_COLOUR = "#0072b2"
WRONG_COLOUR = "#d55e00"
QUERY_COLOUR = "#222222"
NEUTRAL_COLOUR = "#c8c8c8"
HIDDEN_COLOUR = "#d9d9d9"

_MAP = "inferno"  # perceptually uniform, and black at 0
_WIDTH = 8.3  # inches; the width of a README at 100 dots per inch
_CELL = 1.9  # inches; largest width of a cell


class Grid:
    """Figure with cells at exact positions, because matplotlib's layouts are slow for 80 cells.

    Args:
        rows, columns: number of cells.
        aspect: height of a cell divided by its width.
        gap: inches between columns and between rows.
        top, bottom: free inches above and below.
        column_gaps: additional inches before single columns.
        min_width: smallest width of the figure in inches, for its title.
        titles: whether cells of the first row have titles; headers are placed above them.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        aspect: float = 1.0,
        gap: tuple[float, float] = (0.06, 0.06),
        top: float = 0.04,
        bottom: float = 0.04,
        column_gaps: Mapping[int, float] | None = None,
        min_width: float = 0.0,
        titles: bool = False,
    ) -> None:
        self._rows, self._titles = rows, titles
        self._gap, self._top, self._side = gap, top, 0.04
        further = column_gaps or {}
        extra = sum(further.values()) + 2 * self._side + (columns - 1) * gap[0]
        width = min(_CELL, (_WIDTH - extra) / columns)
        self._cell = (width, width * aspect)
        self._left = [
            self._side + c * (width + gap[0]) + sum(v for at, v in further.items() if at <= c)
            for c in range(columns)
        ]
        self._size = (
            max(min_width, columns * width + extra),
            rows * width * aspect + (rows - 1) * gap[1] + top + bottom,
        )
        self.figure = NotebookFigure(figsize=self._size)

    def axes(self, row: int, column: int) -> Any:
        """Return new axes without ticks in a cell."""
        axes = self.figure.add_axes(self._place(row, column))
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        return axes

    def header(self, axes: Any, content: str) -> None:
        """Write small grey text above a column of cells and their titles."""
        left, _, width, _ = axes.get_position(original=True).bounds
        y = self._top - (0.24 if self._titles else 0.055)
        self._write(content, 24, left + width / 2, y, ha="center", fontsize=7, color="#777777")

    def caption(self, axes: Any, lines: Sequence[str]) -> None:
        """Write small lines of text below a cell, shortened to its width."""
        left, bottom, width, _ = axes.get_position(original=True).bounds
        if lines:
            axes.set_anchor("S")  # keep a wide image next to its caption
        room = int(self._cell[0] / 0.058)
        for index, line in enumerate(lines):
            y = (1 - bottom) * self._size[1] + 0.035 + 0.125 * index
            self._write(
                line,
                room,
                left + width / 2,
                y,
                ha="center",
                va="top",
                fontsize=6.5,
                color="#444444",
            )

    def title(self, content: str) -> None:
        """Write a title line at the top of the figure."""
        room = int(self._size[0] / 0.085)
        left = self._side / self._size[0]
        self._write(content, room, left, 0.06, va="top", fontsize=9.5, color="#222222")

    def _write(self, content: str, room: int, x: float, down: float, **kwargs: Any) -> None:
        words = fitted(content, room)
        self.figure.text(
            x, 1 - down / self._size[1], words["text"], family=words["family"], **kwargs
        )

    def note(self, cell: tuple[int, int], lines: str) -> None:
        """Write text in a cell."""
        left, bottom, width, height = self._place(*cell)
        self.figure.text(
            left + width / 2,
            bottom + height / 2,
            lines,
            ha="center",
            va="center",
            fontsize=8,
            linespacing=1.5,
            color="#333333",
        )

    def colour_scale(
        self, columns: tuple[int, int], limits: tuple[float, float], name: str
    ) -> None:
        """Draw a colour bar below the last row, centred under a range of columns."""
        row = self._rows - 1
        first, last = self._place(row, columns[0]), self._place(row, columns[1])
        middle = (first[0] + last[0] + last[2]) / 2
        width = 0.7 * first[2]
        box = (middle - width / 2, first[1] - 0.15 / self._size[1], width, 0.07 / self._size[1])
        axes = self.figure.add_axes(box)
        bar = self.figure.colorbar(
            ScalarMappable(Normalize(*limits), _MAP), cax=axes, orientation="horizontal"
        )
        bar.outline.set_visible(False)
        bar.set_ticks(list(limits), labels=[f"{limit:.2g}" for limit in limits])
        axes.tick_params(labelsize=6.5, length=2)
        axes.set_xlabel(name, fontsize=7, labelpad=-7)

    def _place(self, row: int, column: int) -> tuple[float, float, float, float]:
        width, height = self._size
        bottom = height - self._top - (row + 1) * self._cell[1] - row * self._gap[1]
        return (
            self._left[column] / width,
            bottom / height,
            self._cell[0] / width,
            self._cell[1] / height,
        )


def image(axes: Any, pixels: Pixels, frame: str | None = None) -> None:
    """Show a whole image, with an optional frame in a colour."""
    axes.imshow(pixels, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    if frame is not None:
        _frame(axes, frame, 1.0)


def verdict(axes: Any, right: bool) -> None:
    """Mark an image as right or wrong, with a frame and a tick or a cross in its corner."""
    colour = RIGHT_COLOUR if right else WRONG_COLOUR
    _frame(axes, colour, 2.2)
    axes.text(
        0.98,
        0.98,
        "✓" if right else "✗",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=7.5,
        fontweight="bold",
        color="white",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "none"},
    )


def cells(
    axes: Any,
    values: npt.NDArray[np.float64],
    aspect: float,
    limits: tuple[float, float] = (0.0, 1.0),
    visible: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Show the cells of a map in the aspect ratio (height / width) of its image.

    Cells that are not visible are grey and hatched.
    """
    shown = np.ma.array(values, mask=False if visible is None else ~visible)
    cell = aspect * values.shape[1] / values.shape[0]
    axes.imshow(
        shown, cmap=_MAP, vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect=cell
    )
    axes.set(xticks=[], yticks=[])
    for y, x in np.argwhere(np.ma.getmaskarray(shown)):
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                facecolor=HIDDEN_COLOUR,
                edgecolor="#a0a0a0",
                hatch="/////",
                linewidth=0,
            )
        )


def tracked_cells(
    axes: Any, pixels: Pixels, points: npt.NDArray[np.float64], visible: npt.NDArray[np.bool_]
) -> None:
    """Draw a dot at each visible cell; a cell has the same colour in every image."""
    size = np.array([pixels.shape[1], pixels.shape[0]])
    places = (points + 1) / 2 * size - 0.5
    colours = colormaps["turbo"](np.linspace(0, 1, len(points)))
    area = min(16.0, 16 * 64 / len(points))
    axes.scatter(
        *places[visible].T, s=area, c=colours[visible], edgecolors="white", linewidths=area / 24
    )


def heat(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return colours (..., 3) in [0, 1] for values in [0, 1]."""
    colours: npt.NDArray[np.float64] = colormaps[_MAP](values)[..., :3]
    return colours


def title(axes: Any, content: str, width: int = 34) -> None:
    """Write a left-aligned title above axes."""
    axes.set_title("", loc="left", fontsize=8, pad=3, color="#222222").update(
        fitted(content, width)
    )


def _frame(axes: Any, colour: str, width: float) -> None:
    axes.spines[:].set(visible=True, color=colour, linewidth=width)
