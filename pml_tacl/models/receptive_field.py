"""How many cells a backbone's feature maps have, and where those really look."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.modes import evaluating

_IMAGES, _PAIRS, _DIRECTIONS = 4, 2, 2


@torch.inference_mode()
def measure_grid(
    trunk: nn.Module, image_size: tuple[int, int], channels: int = 3, least: int = 1
) -> tuple[int, int]:
    """Rows and columns of the feature maps.

    Args:
        trunk: images (N, C, H, W) -> an output with `feature_maps` (N, C', h, w).
        image_size: (H, W) in pixels.
        channels: C.
        least: cells that a map must have.

    Raises:
        ValueError: if images of that size are too small.
    """
    images = next(trunk.parameters(), torch.empty(0)).new_zeros(1, channels, *image_size)
    with evaluating(trunk), _too_small_named(trunk, image_size):
        rows, columns = trunk(images).feature_maps.shape[-2:]
    _check_cells(rows, columns, least, image_size)
    return rows, columns


@torch.inference_mode(False)
@torch.enable_grad()
def measure_cell_offset(
    trunk: nn.Module,
    image_size: tuple[int, int],
    channels: int = 3,
    least: int = 1,
    seed: int = 0,
) -> tuple[float, float]:
    """How far from the middle of its cell a feature looks, in cells, as (x, y).

    A convolution of kernel 3, stride 2 and padding 1 looks half a pixel up and left of the middle
    of what it stands for, and each stride doubles that: ResNet's maps of stride 16 look half a
    cell up and left (-0.47, -0.47), EfficientNets with TensorFlow's padding down and right; ViT,
    Swin and ConvNeXt look straight on. Measured as the centroid of the squared gradient of central
    cells with respect to noise images; cells opposite each other are averaged, so that what the
    image's border cuts off cancels. Definition ours.

    Args:
        trunk: images (N, C, H, W) -> an output with `feature_maps` (N, C', h, w).
        image_size: (H, W) in pixels.
        channels: C.
        least: cells that a map must have.
        seed: of the noise.

    Raises:
        ValueError: if images of that size are too small.
    """
    first = next(trunk.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(_IMAGES, channels, *image_size, generator=generator)
    images = noise.to(first).requires_grad_()
    # A model that was built or loaded in inference mode has weights without gradients through.
    named = (*trunk.named_parameters(), *trunk.named_buffers())
    copies = {name: value.clone() for name, value in named if value.is_inference()}
    with evaluating(trunk):
        with _too_small_named(trunk, image_size):
            maps = functional_call(trunk, copies, (images,)).feature_maps
        rows, columns = maps.shape[-2:]
        _check_cells(rows, columns, least, image_size)
        cells = set()
        for inward in range(_PAIRS):
            row, column = max(0, (rows - 1) // 2 - inward), max(0, (columns - 1) // 2 - inward)
            cells |= {(row, column), (rows - 1 - row, columns - 1 - column)}
        found = []
        for row, column in sorted(cells):
            for _ in range(_DIRECTIONS):
                direction = torch.randn(maps.shape[1], generator=generator).to(maps)
                feature = (maps[:, :, row, column] * direction).sum()
                (gradient,) = torch.autograd.grad(feature, images, retain_graph=True)
                weight = gradient.double().square().sum(dim=(0, 1))
                x = _centroid(weight.sum(0)) * columns - (column + 0.5)
                y = _centroid(weight.sum(1)) * rows - (row + 0.5)
                found.append(torch.stack([x, y]))
    x, y = torch.stack(found).mean(0).tolist()
    return x, y


@contextmanager
def _too_small_named(trunk: nn.Module, image_size: tuple[int, int]) -> Iterator[None]:
    """Of images that are too small torch says something about its paddings and kernels."""
    own = getattr(trunk, "data_config", {}).get("input_size", (0, 0, 0))[1:]
    try:
        yield
    except RuntimeError as error:
        larger = all(side >= usual for side, usual in zip(image_size, own, strict=True))
        if larger or isinstance(error, torch.OutOfMemoryError):
            raise
        text = " ".join(str(error).split())
        raise InputError(
            f"image_size={image_size} is too small for the backbone ({text}): give more pixels"
        ) from error


def _check_cells(rows: int, columns: int, least: int, image_size: tuple[int, int]) -> None:
    if rows * columns < least:
        raise InputError(
            f"image_size={image_size} makes feature maps of {rows} x {columns} cells, and the "
            f"pooling needs at least {least}: give more pixels, or a model with pooling='average'"
        )


def _centroid(weight: torch.Tensor) -> torch.Tensor:
    """Of weights along a line, as a fraction of its length."""
    places = (torch.arange(len(weight), device=weight.device) + 0.5) / len(weight)
    return (weight * places).sum() / weight.sum()
