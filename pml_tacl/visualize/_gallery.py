"""Gallery of retrieved images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from pml_tacl.utils.errors import InputError
from pml_tacl.visualize import _drawing as drawing
from pml_tacl.visualize._figures import styled
from pml_tacl.visualize._inputs import (
    Images,
    require_count,
    require_some,
    rows_like,
    to_images,
)


@styled
def retrieval_gallery(
    queries: Images,
    neighbours: Sequence[Images] | npt.NDArray[Any] | torch.Tensor,
    correct: Sequence[Sequence[bool]] | npt.NDArray[np.bool_] | torch.Tensor | None = None,
    distances: Sequence[Sequence[float]] | npt.NDArray[Any] | torch.Tensor | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    title: str | None = None,
    *,
    query_captions: Sequence[str] | None = None,
    columns: int = 8,
    headings: tuple[str, str] = ("query", "nearest"),
) -> Figure:
    """Draw each query beside its nearest images, and mark right and wrong ones.

    A right neighbour has a blue frame (``RIGHT_COLOUR``) and a tick, a wrong one an orange frame
    (``WRONG_COLOUR``) and a cross. The colours are safe for colour blindness.

    Args:
        queries: Q images.
        neighbours: the nearest images of each query, nearest first; their number may differ.
        correct: for each neighbour whether it is right; None draws neutral frames.
        distances: for each neighbour a number, written below it.
        captions: for each neighbour a text, written below it and shortened in the middle.
        title: a line at the top of the figure.
        query_captions: Q texts.
        columns: neighbours per line; more neighbours continue on the next line.
        headings: texts above the queries and above the first neighbours.

    Returns:
        A figure with one axes for each image: each query, followed by its neighbours.

    Raises:
        ValueError: if there are no queries, counts do not match, or values are out of range.
        TypeError: if an image has another type.

    Example:
        >>> import torch
        >>> queries, found = torch.rand(1, 32, 32, 3), torch.rand(1, 2, 32, 32, 3)
        >>> figure = retrieval_gallery(queries, found, correct=[[True, False]])
        >>> len(figure.axes)
        3
    """
    asked = to_images(queries, "queries")
    require_some(asked, "queries")
    require_count(neighbours, len(asked), "neighbours", "queries")
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    found = [to_images(row, f"neighbours[{i}]") for i, row in enumerate(neighbours)]
    right = rows_like(correct, found, "correct")
    numbers = rows_like(distances, found, "distances")
    texts = rows_like(captions, found, "captions")
    if query_captions is not None:
        require_count(query_captions, len(asked), "query_captions", "queries")

    widest = max(1, min(columns, max(map(len, found))))
    lines = (numbers is not None) + (texts is not None)
    lines = max(lines, int(query_captions is not None))
    grid = drawing.Grid(
        sum(max(1, -(-len(row) // widest)) for row in found),
        widest + 1,
        gap=(0.07, 0.07 + 0.125 * lines),
        top=0.2 + 0.25 * (title is not None),
        bottom=0.04 + 0.125 * lines,
        column_gaps={1: 0.14},
        min_width=5.6 if title is not None else 0.0,
    )
    first_line = 0
    for q, (query, row) in enumerate(zip(asked, found, strict=True)):
        axes = grid.axes(first_line, 0)
        drawing.image(axes, query, drawing.QUERY_COLOUR)
        if q == 0:
            grid.header(axes, headings[0])
        if query_captions is not None:
            grid.caption(axes, [query_captions[q]])
        for k, neighbour in enumerate(row):
            line, column = divmod(k, widest)
            axes = grid.axes(first_line + line, 1 + column)
            if right is None:
                drawing.image(axes, neighbour, drawing.NEUTRAL_COLOUR)
            else:
                drawing.image(axes, neighbour)
                drawing.verdict(axes, bool(right[q][k]))
            if q == 0 and line == 0:
                grid.header(axes, headings[1] if column == 0 else str(column + 1))
            below = [] if texts is None else [str(texts[q][k])]
            below += [] if numbers is None else [f"{float(numbers[q][k]):.3f}"]
            grid.caption(axes, below)
        first_line += max(1, -(-len(row) // widest))
    if title is not None:
        grid.title(title)
    return grid.figure
