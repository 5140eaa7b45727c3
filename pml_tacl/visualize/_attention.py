"""Figures of attention: over an image, for a pair, and for a query and its neighbours."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from pml_tacl.functional import sample_at_points, to_image
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.images import AnyImage
from pml_tacl.visualize import _drawing as drawing
from pml_tacl.visualize._figures import styled
from pml_tacl.visualize._inputs import (
    Images,
    Numbers,
    Pixels,
    normalised,
    require_count,
    require_some,
    to_images,
    to_maps,
    to_numbers,
    to_pixels,
)


@styled
def attention_overlay(
    images: Images,
    attention: Numbers,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    cell_offset: tuple[float, float] = (0.0, 0.0),
) -> Figure:
    """Draw each image, its attention map, and the map over the image.

    Each map is scaled to its own minimum and maximum. Colours can therefore be compared within
    an image, but not between images. A constant map is drawn in the middle colour.

    Args:
        images: N images.
        attention: (N, h, w), any finite values; upsampled bilinearly for the overlay.
        titles: N titles.
        columns: images per line, at least 1; by default 2, or 1 for a single image.
        cell_offset: offset (x, y) of receptive-field centres, in cells, from
            :meth:`AttentionEmbedder.cell_offset`.

    Returns:
        A figure with three axes for each image, in order.

    Raises:
        ValueError: if there are no images, counts or shapes do not match, or values are out of
            range.
        TypeError: if an image has another type.

    Example:
        >>> import torch
        >>> figure = attention_overlay(torch.rand(2, 32, 32, 3), torch.rand(2, 4, 4))
        >>> len(figure.axes)
        6
    """
    shown = to_images(images)
    require_some(shown, "images")
    maps = to_maps(attention, len(shown), "attention")
    if titles is not None:
        require_count(titles, len(shown), "titles", "images")
    per_line = min(len(shown), 2) if columns is None else columns
    if per_line < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    grid = drawing.Grid(
        -(-len(shown) // per_line),
        3 * per_line,
        aspect=_typical_aspect(shown),
        gap=(0.05, 0.26 if titles is not None else 0.05),
        top=0.42 if titles is not None else 0.24,
        titles=titles is not None,
        column_gaps={3 * i: 0.12 for i in range(1, per_line)},
    )
    for index, (image, single) in enumerate(zip(shown, normalised(maps), strict=True)):
        row, left = divmod(index, per_line)
        axes = [grid.axes(row, 3 * left + offset) for offset in range(3)]
        drawing.image(axes[0], image)
        drawing.cells(axes[1], single, _aspect(image))
        drawing.image(axes[2], _overlaid(image, single, cell_offset))
        if row == 0:
            for axis, name in zip(axes, ("image", "attention", "overlay"), strict=True):
                grid.header(axis, name)
        if titles is not None:
            drawing.title(axes[0], titles[index], 48)
    return grid.figure


@styled
def cross_attention_pair(
    image_i: AnyImage,
    transformed_i: AnyImage,
    image_j: AnyImage,
    attention_ij: Numbers,
    attention_transformed: Numbers,
    points: Numbers,
) -> Figure:
    """Draw transformed attention consistency for one matched pair (i, j).

    The top row shows image i with its grid, its transformed view i' with the same grid, and image
    j. The bottom row shows A(i|j), A(i'|j), A(i'|j) sampled at ``points`` into the grid of i, and
    the difference, which the loss squares. Cells of i that are not visible in i' are grey and
    hatched. After Li et al. 2020; the definition is our own.

    Args:
        image_i: the first view of image i.
        transformed_i: its second view, i'.
        image_j: the image that both views are compared with.
        attention_ij: (h, w), A(i|j), from :func:`pml_tacl.functional.cross_image_attention`.
        attention_transformed: (h', w'), A(i'|j).
        points: (h * w, 2), position of each cell of the first view in the second view, as (x, y)
            in [-1, 1], in row-major order. Points outside are not visible.

    Returns:
        A figure with seven axes in the order above, then two colour scales. The ranges of both
        scales are equally wide, so that the brightness of the difference and of the attention can
        be compared.

    Raises:
        ValueError: if counts or shapes do not match, or values are out of range.
        TypeError: if an image has another type.
    """
    view = to_pixels(image_i, "image_i")
    transformed = to_pixels(transformed_i, "transformed_i")
    other = to_pixels(image_j, "image_j")
    first = to_maps(attention_ij, 1, "attention_ij")[0]
    second = to_maps(attention_transformed, 1, "attention_transformed")[0]
    places = to_numbers(points)
    if places.shape != (first.size, 2):
        raise InputError(
            f"points has shape {places.shape}, attention_ij has {first.size} cells: "
            f"give ({first.size}, 2), one (x, y) for each cell of {first.shape}"
        )
    read_back, visible = _read_back(second, places, first.shape)
    difference = np.abs(first - read_back)

    grid = drawing.Grid(
        2, 4, aspect=_typical_aspect([view, transformed]), gap=(0.1, 0.3), top=0.25, bottom=0.42
    )
    shown = [grid.axes(0, column) for column in range(3)]
    for axes, pixels, text in zip(
        shown,
        (view, transformed, other),
        ("image i", "transformed view i'", "image j"),
        strict=True,
    ):
        drawing.image(axes, pixels)
        drawing.title(axes, text)
    drawing.tracked_cells(shown[0], view, _centres(first.shape), visible.ravel())
    drawing.tracked_cells(shown[1], transformed, places, visible.ravel())

    low = min(first.min(), second.min())
    high = max(first.max(), second.max())
    scale = (low, high) if high > low else (low - 0.5, low + 0.5)
    below = (
        ("A(i|j)", first, view, None, scale),
        ("A(i'|j)", second, transformed, None, scale),
        ("A(i'|j) read back at T u", read_back, view, visible, scale),
        ("|difference|", difference, view, visible, (0.0, scale[1] - scale[0])),
    )
    for column, (text, values, pixels, mask, limits) in enumerate(below):
        axes = grid.axes(1, column)
        drawing.cells(axes, values, _aspect(pixels), limits, mask)
        drawing.title(axes, text)
    count = int(visible.sum())
    loss = float((difference[visible] ** 2).mean()) if count else 0.0
    grid.note(
        (0, 3),
        f"mean of difference²\n= {loss:.4f}\nover {count} of {first.size}\nvisible cells",
    )
    grid.colour_scale((0, 2), scale, "attention")
    grid.colour_scale((3, 3), (0.0, scale[1] - scale[0]), "|difference|")
    return grid.figure


@styled
def similar_regions(
    query: AnyImage,
    neighbours: Images,
    maps: Numbers,
    query_maps: Numbers | None = None,
    captions: Sequence[str] | None = None,
    cell_offset: tuple[float, float] = (0.0, 0.0),
) -> Figure:
    """Draw the similar regions of a query and its neighbours.

    Args:
        query: the query image.
        neighbours: its K nearest images.
        maps: (K, h, w), A(neighbour|query) from
            :func:`pml_tacl.functional.cross_image_attention`, drawn over the neighbours.
        query_maps: (K, h', w'), A(query|neighbour), drawn over the query in a line above.
        captions: K texts.
        cell_offset: offset (x, y) of receptive-field centres, in cells, from
            :meth:`AttentionEmbedder.cell_offset`.

    Returns:
        A figure with the query, then (with ``query_maps``) the query with its attention to each
        neighbour, then each neighbour with its attention to the query. Each map is scaled to its
        own range.

    Raises:
        ValueError: if there are no neighbours, counts do not match, or values are out of range.
        TypeError: if an image has another type.
    """
    asked = to_pixels(query, "query")
    found = to_images(neighbours, "neighbours")
    require_some(found, "neighbours")
    on_found = normalised(to_maps(maps, len(found), "maps"))
    lines = [[_overlaid(p, m, cell_offset) for p, m in zip(found, on_found, strict=True)]]
    if query_maps is not None:
        on_query = normalised(to_maps(query_maps, len(found), "query_maps"))
        lines.insert(0, [_overlaid(asked, single, cell_offset) for single in on_query])
    if captions is not None:
        require_count(captions, len(found), "captions", "neighbours")
    grid = drawing.Grid(
        len(lines),
        len(found) + 1,
        top=0.2,
        bottom=0.18 if captions else 0.04,
        gap=(0.07, 0.07),
        column_gaps={1: 0.14},
    )
    axes = grid.axes(0, 0)
    drawing.image(axes, asked, drawing.QUERY_COLOUR)
    grid.header(axes, "query")
    for line, overlays in enumerate(lines):
        for k, overlay in enumerate(overlays):
            axes = grid.axes(line, k + 1)
            drawing.image(axes, overlay, drawing.NEUTRAL_COLOUR)
            if line == 0:
                grid.header(axes, "nearest" if k == 0 else str(k + 1))
            if captions is not None and line == len(lines) - 1:
                grid.caption(axes, [captions[k]])
    return grid.figure


def _overlaid(
    image: Pixels,
    single: npt.NDArray[np.float64],
    cell_offset: tuple[float, float] = (0.0, 0.0),
) -> Pixels:
    size = (image.shape[0], image.shape[1])
    level = to_image(torch.from_numpy(single)[None], size, cell_offset)[0, ..., None].numpy()
    # The image is grey, so that all colours show attention. Multiplying keeps attended parts
    # legible; parts without attention are drawn dimly.
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None] / 255
    blended = drawing.heat(level[..., 0]) * (0.45 + 0.55 * grey) + 0.35 * grey * (1 - level)
    pixels: Pixels = np.round(255 * np.clip(blended, 0, 1)).astype(np.uint8)
    return pixels


def _aspect(image: Pixels) -> float:
    return float(image.shape[0] / image.shape[1])


def _typical_aspect(images: Sequence[Pixels]) -> float:
    return float(np.clip(np.median([_aspect(image) for image in images]), 0.6, 1.6))


def _centres(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return the cell centres of an (h, w) grid in row-major order, as (x, y) in [-1, 1]."""
    y, x = ((2 * np.arange(n) + 1) / n - 1 for n in shape)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _read_back(
    single: npt.NDArray[np.float64], points: npt.NDArray[np.float64], shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    values, visible = sample_at_points(
        torch.from_numpy(single)[None], torch.from_numpy(points)[None]
    )
    return values[0].numpy().reshape(shape), visible[0].numpy().reshape(shape)
