"""Two training views of an image, with tracked points.

`SiameseTransform` works on one image (in a data set, on the CPU). `BackgroundSwap` works on a
whole batch (on the device).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from pml_tacl.transforms.background_swap import (
    as_offset,
)
from pml_tacl.transforms.keypoints import CellPoints
from pml_tacl.utils.checks import as_numbers, as_pair, is_number
from pml_tacl.utils.errors import InputError, InputTypeError
from pml_tacl.utils.images import AnyImage, to_rgb

if TYPE_CHECKING:
    from pml_tacl.models import AttentionEmbedder

# Position of points that are not in the second view: far outside [-1, 1], but finite.
_NOWHERE = 1e4


def _default_photometric() -> v2.Compose:
    # No hue: it takes 5 times as long as all the others, and colour often separates classes.
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4)], p=0.8),
            v2.RandomGrayscale(p=0.1),
            v2.RandomApply([v2.GaussianBlur(kernel_size=3, sigma=(0.1, 1.2))], p=0.2),
        ]
    )


class SiameseTransform:
    """Transform from an image to two random views, and points that connect them.

    The first view is divided into a grid of cells, one for each position of the model's feature
    maps. The points are the positions of these cells in the second view. The first view is a random
    crop, resized. The second view is another random crop, mirrored with probability 1/2 and passed
    through `geometric`. `photometric` is then applied to each view separately, with its own random
    numbers, and both views are normalised. The idea (to compare images with their transformed
    versions) is from Li et al. 2020; the definition is our own.

    Random numbers come from torch's global generator: `torch.manual_seed` makes a call
    reproducible, and the workers of a DataLoader are seeded from its `generator` argument.

    Args:
        size: height and width of both views, in pixels; an int makes them square.
        grid: number of cells of the first view, (rows, columns) or an int for both. It must equal
            the size of the model's feature maps.
        crop_scale: smallest and largest area of a crop, as a fraction of the image, in (0, 1].
            None: both views use the largest centred box that has their aspect ratio.
        crop_ratio: smallest and largest width / height of a crop, before it is resized.
        geometric: transforms from torchvision.transforms.v2, or any callable that takes
            (tv_tensors.Image, tv_tensors.KeyPoints) and returns both. It is called on the second
            view after the crop is resized, so its arguments in pixels are pixels of the view. The
            points are measured from the left and upper edges of the view, and are NaN if they are
            outside the crop. If it returns a view of another size, that is resized to `size`.
        photometric: transforms that change only the values of pixels, on uint8 tensors
            (3, H, W). "default" is colour jitter, occasional grey and occasional mild blur; None
            applies none.
        flip: whether to mirror the second view left to right with probability 1/2. Turn it off if
            a mirrored image has another meaning, as for letters.
        mean: for each channel, the value that is subtracted from pixel values in [0, 1]. The
            default is that of ImageNet.
        std: for each channel, the value by which the result is divided.
        interpolation: how crops are resized: "bilinear", "bicubic" or "nearest".
        cell_offset: (x, y) in cells, as `AttentionEmbedder.cell_offset` returns it: the offset of
            the centre of a cell's receptive field (the part of the image that influences the cell)
            from the centre of the cell. In most convolutional networks, the receptive field is half
            a cell too far up and left. In a mirrored view, the x offset has the opposite
            sign relative to the content of the image; the points take this into account.

    Raises:
        ValueError: at construction, for an argument out of range.
        TypeError: at construction, if `geometric` or `photometric` is not callable.

    Example:
        >>> transform = SiameseTransform(size=64, grid=8, geometric=v2.RandomRotation(20))
        >>> view, transformed, points = transform(PIL.Image.new("RGB", (80, 60)))
        >>> view.shape, transformed.shape, points.shape
        (torch.Size([3, 64, 64]), torch.Size([3, 64, 64]), torch.Size([64, 2]))
    """

    def __init__(
        self,
        size: int | Sequence[int] = 224,
        grid: int | Sequence[int] = 7,
        *,
        crop_scale: tuple[float, float] | None = (0.4, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        geometric: Callable[..., Any] | None = None,
        photometric: Callable[..., Any] | Literal["default"] | None = "default",
        flip: bool = True,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: str | v2.InterpolationMode = "bilinear",
        cell_offset: Sequence[float] = (0.0, 0.0),
    ) -> None:
        self.size = as_pair("size", size)
        self.grid = as_pair("grid", grid)
        if photometric == "default" and min(self.size) < 2:
            raise InputError(
                f"size must be at least 2 pixels for the blur of photometric, got {size!r}: give "
                "more pixels, or photometric=None"
            )
        if crop_scale is not None:
            _check_range("crop_scale", crop_scale, 1.0)
        _check_range("crop_ratio", crop_ratio, float("inf"))
        for name, value in (("geometric", geometric), ("photometric", photometric)):
            if not (
                value is None or callable(value) or (name, value) == ("photometric", "default")
            ):
                raise InputTypeError(
                    f"{name} must be a transform (a callable) or None, got {value!r}"
                )
        self.mean = _as_channels("mean", mean, "3 finite numbers")
        self.std = _as_channels("std", std, "3 finite numbers above 0", above=0)
        interpolation = getattr(interpolation, "value", interpolation)
        if interpolation not in ("nearest", "bilinear", "bicubic"):
            raise InputError(
                f"interpolation must be 'nearest', 'bilinear' or 'bicubic', got {interpolation!r}"
            )
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.geometric = geometric
        self.photometric = _default_photometric() if photometric == "default" else photometric
        self.flip = flip
        self.interpolation = v2.InterpolationMode(interpolation)
        self.lay_cells(cell_offset)

    def lay_cells(self, cell_offset: Sequence[float]) -> None:
        """Set the offset of receptive-field centres.

        Args:
            cell_offset: (x, y) in cells, measured from the cell centres; see the class.

        Raises:
            ValueError: if it is not a pair of numbers in [-2, 2].
        """
        rows, columns = self.grid
        y, x = torch.meshgrid(
            (torch.arange(rows) + 0.5) / rows,
            (torch.arange(columns) + 0.5) / columns,
            indexing="ij",
        )
        self.cell_offset = as_offset(cell_offset)
        # Offset from the cell centre, as fractions of the sides of a view.
        self._off = torch.tensor(self.cell_offset) / torch.tensor([columns, rows])
        # Receptive-field centres in row-major order, as fractions of the first view's sides.
        self._centres = torch.stack((x, y), dim=-1).view(-1, 2) + self._off

    @classmethod
    def for_model(
        cls, model: AttentionEmbedder, size: int | Sequence[int], **kwargs: Any
    ) -> SiameseTransform:
        """Return a transform with the mean, std, grid and cell offset of a model.

        For a pretrained model, the cell offset is measured with its weights, which can change it
        by a third of a cell. For a model from scratch, it depends only on the layers.

        Args:
            model: the model that will process the views.
            size: height and width of both views, in pixels; an int makes them square.
            **kwargs: the other arguments of the class; they override those of the model.

        Raises:
            TypeError: if the model is not an AttentionEmbedder and does not have its methods.
            ValueError: if an argument is out of range, or the model does not accept images of 3
                channels or of that size.
        """
        if not all(hasattr(model, name) for name in ("data_config", "grid", "cell_offset")):
            raise InputTypeError(
                f"model must be an AttentionEmbedder, got {type(model).__name__}: wrap it, "
                "AttentionEmbedder(model), or give SiameseTransform(size, grid=...) the size of "
                "its maps"
            )
        shape = as_pair("size", size)
        channels = model.data_config["input_size"][0]
        if channels != 3:
            raise InputError(
                f"views have 3 channels and the model takes {channels}: build it with in_chans=3"
            )
        own = {name: model.data_config[name] for name in ("mean", "std")}
        offset = model.cell_offset(shape, through_weights=not model.from_scratch)
        own |= {"grid": model.grid(shape), "cell_offset": offset}
        return cls(shape, **(own | kwargs))

    def __call__(self, image: AnyImage) -> tuple[Tensor, Tensor, Tensor]:
        """Return two views of an image and the points that connect them.

        Args:
            image: a PIL image of any mode, or an array or tensor (H, W), (H, W, C) or (C, H, W) of
                uint8, wider integers, or floats in [0, 1]. It is converted by
                :func:`pml_tacl.utils.images.to_rgb`.

        Returns:
            View (3, H, W) and transformed view (3, H, W), float32, normalised, and points
            (rows * columns, 2), float32. There is one point for each cell of the first view, in
            row-major order. It says where the centre of the cell lies in the feature maps of the
            second view: (x, y) in [-1, 1], as for grid_sample with align_corners=False. If a point
            is outside that range, the second view does not show the cell.

        Raises:
            TypeError: if the image has another type, or if `geometric` does not return an image
                and KeyPoints.
            ValueError: if `to_rgb` cannot convert the image, if `photometric` changes its shape,
                or if `geometric` changes the channels or the number of points.
        """
        source = tvf.pil_to_tensor(to_rgb(image))
        view, (top, left, height, width) = self._crop(source)
        other, (other_top, other_left, other_height, other_width) = self._crop(source)
        # Convert fractions of the first view to fractions of the second, through the image.
        scale = torch.tensor([width / other_width, height / other_height])
        offset = torch.tensor([(left - other_left) / other_width, (top - other_top) / other_height])
        points = torch.addcmul(offset, self._centres, scale)
        if self.flip and torch.rand(()) < 0.5:
            other = other.flip(-1)
            points[:, 0] = 1 - points[:, 0]
        if self.geometric is not None:
            other, points = self._move(other, points)
        # The maps of the second view have the same offset.
        points = (points - self._off).mul_(2).sub_(1)
        return self._finish(view), self._finish(other), points

    def __repr__(self) -> str:
        names = ("size", "grid", "crop_scale", "crop_ratio", "geometric", "photometric", "flip")
        return f"SiameseTransform({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"

    def _crop(self, source: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        if self.crop_scale is None:
            box = _centred_box(source.shape[-2], source.shape[-1], self.size)
        else:
            box = v2.RandomResizedCrop.get_params(
                source, list(self.crop_scale), list(self.crop_ratio)
            )
        view = tvf.resized_crop(
            source, *box, size=list(self.size), interpolation=self.interpolation, antialias=True
        )
        return view, box

    def _move(self, view: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        assert self.geometric is not None
        height, width = self.size
        tracked = CellPoints(points * torch.tensor([width, height]), canvas_size=self.size)
        # Points outside the crop are lost, even if a rotation would move them back.
        tracked = CellPoints.like(tracked.visible(), tracked)
        result = self.geometric(tv_tensors.Image(view), tracked)
        moved, places = result if isinstance(result, Sequence) and len(result) == 2 else (0, 0)
        if not isinstance(moved, Tensor) or not isinstance(places, tv_tensors.KeyPoints):
            found = type(result).__name__
            raise InputTypeError(f"geometric must return (image tensor, KeyPoints), got {found}")
        if moved.shape[:-2] != (3,) or places.shape != points.shape:
            raise InputError(
                f"geometric must keep the 3 channels and all {len(points)} points, got an image "
                f"{tuple(moved.shape)} and points {tuple(places.shape)}"
            )
        height, width = moved.shape[-2:]
        if tuple(places.canvas_size) != (height, width):
            raise InputError(
                f"geometric must move image and KeyPoints alike: the image is {(height, width)}, "
                f"the points' canvas {tuple(places.canvas_size)}"
            )
        moved = moved.as_subclass(torch.Tensor)
        if (height, width) != self.size:
            moved = tvf.resize(
                moved, list(self.size), interpolation=self.interpolation, antialias=True
            )
        fractions = places.as_subclass(torch.Tensor) / torch.tensor([width, height])
        return moved, fractions.nan_to_num(_NOWHERE, _NOWHERE, -_NOWHERE)

    def _finish(self, view: Tensor) -> Tensor:
        if self.photometric is not None:
            view = self.photometric(view)
            if view.shape != (3, *self.size):
                raise InputError(
                    f"photometric must keep the shape {(3, *self.size)}, got {tuple(view.shape)}; "
                    f"transforms that move pixels belong in geometric"
                )
        view = tvf.to_dtype(view.contiguous(), torch.float32, scale=True)
        normalised: Tensor = tvf.normalize(view, self.mean, self.std)
        return normalised


def _check_range(name: str, value: Sequence[float], limit: float) -> None:
    fits = isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value))
    if not fits or not 0 < value[0] <= value[1] <= limit:
        upper = f" <= {limit:g}" if limit < float("inf") else ""
        raise InputError(
            f"{name} must be (least, greatest) with 0 < least <= greatest{upper}, got {value!r}"
        )


def _as_channels(
    name: str, values: Sequence[float], wanted: str, above: float = float("-inf")
) -> list[float]:
    numbers = as_numbers(values)
    if len(numbers) != 3 or not all(above < number < float("inf") for number in numbers):
        raise InputError(f"{name} must be {wanted}, one for each channel, got {values!r}")
    return numbers


def _centred_box(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    scale = min(height / size[0], width / size[1])
    box_height, box_width = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
