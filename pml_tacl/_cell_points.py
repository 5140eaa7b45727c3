"""Points that follow torchvision's geometric transforms exactly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

# Where points without a place in the picture go: far outside [-1, 1], yet finite.
NOWHERE = 1e4
_ELASTIC_STEPS = 20


class CellPoints(tv_tensors.KeyPoints):  # type: ignore[misc]
    """KeyPoints in continuous coordinates: 0 is the canvas' left edge, its width the right one.

    torchvision's kernels for crop, resize, pad, affine and perspective agree with that. Those that
    do not (flips count pixels, elastic rounds to a pixel and reverses the field only roughly, an
    expanding rotation rounds the canvas) are replaced below, for this class alone.
    """


def _plain(points: CellPoints) -> Tensor:
    plain: Tensor = points.as_subclass(torch.Tensor)
    return plain


def _like(places: Tensor, points: CellPoints, **kwargs: Any) -> CellPoints:
    wrapped: CellPoints = tv_tensors.wrap(places, like=points, **kwargs)
    return wrapped


def _horizontal_flip(points: CellPoints) -> CellPoints:
    x, y = _plain(points).unbind(-1)
    return _like(torch.stack((points.canvas_size[1] - x, y), -1), points)


def _vertical_flip(points: CellPoints) -> CellPoints:
    x, y = _plain(points).unbind(-1)
    return _like(torch.stack((x, points.canvas_size[0] - y), -1), points)


def _rotate(
    points: CellPoints,
    angle: float,
    expand: bool = False,
    center: list[float] | None = None,
    **_: Any,
) -> CellPoints:
    height, width = points.canvas_size
    turned, _size = tvf.rotate_keypoints(
        _plain(points), (height, width), angle, expand=False, center=center
    )
    if not expand:
        return _like(turned, points)
    # The size of the expanded canvas is torchvision's secret; an empty picture tells it.
    blank = torch.empty(1, height, width, dtype=torch.uint8)
    size = tvf.rotate(blank, angle, expand=True, center=center).shape[-2:]
    shift = turned.new_tensor([(size[1] - width) / 2, (size[0] - height) / 2])
    return _like(turned + shift, points, canvas_size=tuple(size))


def _elastic(points: CellPoints, displacement: Tensor, **_: Any) -> CellPoints:
    height, width = points.canvas_size
    half = torch.tensor([width / 2, height / 2])
    target = _plain(points) / half - 1
    field = displacement.to(target.dtype).permute(0, 3, 1, 2)

    def moved(place: Tensor) -> Tensor:
        grid = place.view(1, 1, -1, 2)
        step = nnf.grid_sample(field, grid, padding_mode="border", align_corners=False)
        return place + step[0, :, 0].T

    # The picture at q shows the place q + displacement(q): solve that for q, step by step.
    place = target
    for _step in range(_ELASTIC_STEPS):
        place = place + (target - moved(place))
    lost = ((moved(place) - target) * half).abs().amax(-1, keepdim=True) > 0.5
    # In a fold of the field a place is seen several times or never: none is the right one.
    return _like(torch.where(lost, NOWHERE, (place + 1) * half), points)


for _functional, _kernel in (
    (tvf.horizontal_flip, _horizontal_flip),
    (tvf.vertical_flip, _vertical_flip),
    (tvf.rotate, _rotate),
    (tvf.elastic, _elastic),
):
    tvf.register_kernel(_functional, CellPoints)(_kernel)
