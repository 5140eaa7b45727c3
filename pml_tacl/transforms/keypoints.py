"""Points that follow torchvision's geometric transforms exactly; lost points become NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

_ELASTIC_STEPS = 20


class CellPoints(tv_tensors.KeyPoints):  # type: ignore[misc]
    """KeyPoints in continuous coordinates: x is 0 at the left edge and the width at the right edge.

    They differ from torchvision's KeyPoints in two ways. A point outside the canvas is lost: it
    becomes NaN and stays NaN, even if a later step would move it back. And some kernels of
    torchvision do not move points exactly as they move pixels, so they are replaced here: flips
    (they count pixels), elastic (it rounds, and inverts the field only roughly), and expanding
    rotations and padding centre crops (they round the canvas differently).
    """

    @classmethod
    def like(cls, places: Tensor, points: CellPoints, **kwargs: Any) -> CellPoints:
        """Return plain positions (G, 2) as points, on the canvas of `points` or `canvas_size`."""
        wrapped: CellPoints = tv_tensors.wrap(places, like=points, **kwargs)
        return wrapped

    def visible(self) -> Tensor:
        """Return plain positions (G, 2), with NaN for points outside the canvas."""
        places: Tensor = self.as_subclass(torch.Tensor)
        height, width = self.canvas_size
        inside = (places >= 0) & (places <= places.new_tensor([width, height]))
        return places.where(inside.all(-1, keepdim=True), torch.nan)


def _losing_outside(functional: Callable[..., Any]) -> Callable[..., CellPoints]:
    def kernel(points: CellPoints, *args: Any, **kwargs: Any) -> CellPoints:
        visible = tv_tensors.KeyPoints(points.visible(), canvas_size=points.canvas_size)
        moved = functional(visible, *args, **kwargs)
        return CellPoints.like(
            moved.as_subclass(torch.Tensor), points, canvas_size=moved.canvas_size
        )

    return kernel


def _horizontal_flip(points: CellPoints) -> CellPoints:
    x, y = points.as_subclass(torch.Tensor).unbind(-1)
    return CellPoints.like(torch.stack((points.canvas_size[1] - x, y), -1), points)


def _vertical_flip(points: CellPoints) -> CellPoints:
    x, y = points.as_subclass(torch.Tensor).unbind(-1)
    return CellPoints.like(torch.stack((x, points.canvas_size[0] - y), -1), points)


def _rotate(
    points: CellPoints,
    angle: float,
    expand: bool = False,
    center: list[float] | None = None,
    **_: Any,
) -> CellPoints:
    height, width = points.canvas_size
    turned, _size = tvf.rotate_keypoints(
        points.visible(), (height, width), angle, expand=False, center=center
    )
    if not expand:
        return CellPoints.like(turned, points)
    # torchvision does not return the size of the expanded canvas; rotate an empty image.
    blank = torch.zeros(1, height, width, dtype=torch.uint8)
    size = tvf.rotate(blank, angle, expand=True, center=center).shape[-2:]
    shift = turned.new_tensor([(size[1] - width) / 2, (size[0] - height) / 2])
    return CellPoints.like(turned + shift, points, canvas_size=tuple(size))


def _center_crop(points: CellPoints, output_size: int | Sequence[int]) -> CellPoints:
    pair = [output_size] if isinstance(output_size, int) else list(output_size)
    crop = (pair[0], pair[-1])
    # torchvision pads to at least the crop (an odd pixel goes right and below), then crops.
    shift = [
        (wanted - side) // 2 if wanted > side else -round((side - wanted) / 2)
        for wanted, side in zip(crop, points.canvas_size, strict=True)
    ]
    places = points.visible()
    return CellPoints.like(places + places.new_tensor(shift[::-1]), points, canvas_size=crop)


def _elastic(points: CellPoints, displacement: Tensor, **_: Any) -> CellPoints:
    height, width = points.canvas_size
    half = torch.tensor([width / 2, height / 2])
    target = points.visible() / half - 1
    field = displacement.to(target.dtype).permute(0, 3, 1, 2)

    def shown(place: Tensor) -> Tensor:
        grid = place.view(1, 1, -1, 2)
        step = nnf.grid_sample(field, grid, padding_mode="border", align_corners=False)
        return place + step[0, :, 0].T

    # Output position q shows input position q + displacement(q): solve for q by iteration.
    place = target
    for _step in range(_ELASTIC_STEPS):
        place = place + (target - shown(place))
    # Where the field folds, a position appears several times or never: the iteration diverges.
    lost = ((shown(place) - target) * half).abs().amax(-1, keepdim=True) > 0.5
    return CellPoints.like(torch.where(lost, torch.nan, (place + 1) * half), points)


for _functional in (tvf.affine, tvf.perspective, tvf.pad, tvf.crop, tvf.resized_crop):
    tvf.register_kernel(_functional, CellPoints)(_losing_outside(_functional))
for _functional, _kernel in (
    (tvf.horizontal_flip, _horizontal_flip),
    (tvf.vertical_flip, _vertical_flip),
    (tvf.rotate, _rotate),
    (tvf.center_crop, _center_crop),
    (tvf.elastic, _elastic),
):
    tvf.register_kernel(_functional, CellPoints)(_kernel)
