"""Two views of a whole batch at once, with tracked points and maps.

This does the same as SiameseTransform for a whole batch, in a twentieth of the operations. Crop,
rotation and shear are one sampling of the images; their maps (masks) are sampled in the same way.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Recipe:
    """Ranges of the views; the first view is a crop, the second is also rotated."""

    crop: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    degrees: float = 15.0
    shear: float = 5.0
    scale: tuple[float, float] = (0.8, 1.25)
    shift: float = 0.08
    flip: bool = False
    jitter: float = 0.4
    jitter_share: float = 0.8
    channels: float = 0.0  # fraction of views with permuted channels
    grey: float = 0.1
    blur: float = 0.2


RECIPES = {
    "default": Recipe(),
    "flip": Recipe(flip=True),
    "quickstart": Recipe(
        crop=(0.6, 1.0),
        shear=10.0,
        scale=(0.7, 1.4),
        jitter=0.5,
        jitter_share=0.9,
        channels=1.0,
        grey=0.2,
        blur=0.3,
    ),
}


class Views(NamedTuple):
    """Two views (N, 3, S, S) of N images, points (N, G * G, 2), and maps (N, h, w) or None."""

    first: Tensor
    second: Tensor
    points: Tensor
    first_maps: Tensor | None
    second_maps: Tensor | None


class BatchViews:
    """Compute `Views` of uint8 images (N, 3, S, S) on a device, with random numbers of the CPU."""

    def __init__(
        self,
        recipe: Recipe,
        grid: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        cell_offset: tuple[float, float] = (0.0, 0.0),
        device: torch.device | None = None,
    ) -> None:
        self.recipe, self.grid, self.cell_offset = recipe, grid, cell_offset
        self.device = device or torch.device("cpu")
        self.off = (torch.tensor(cell_offset) * 2 / grid).to(self.device)
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1).to(self.device) for v in (mean, std))
        centres = (torch.arange(grid) + 0.5) / grid * 2 - 1
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        self.cells = torch.stack((x, y), -1).view(-1, 2).to(self.device) + self.off

    def __call__(
        self, images: Tensor, generator: torch.Generator, maps: Tensor | None = None
    ) -> Views:
        """Return both views; `maps` (N, h, w) of the images are transformed with them."""
        pixels = images.float() / 255
        crop, turned = self._crops(len(images), generator), self._crops(len(images), generator)
        turned = turned @ self._turns(len(images), generator)
        crop, turned = crop.to(self.device), turned.to(self.device)
        # Map cells of the first view through the image to the second view.
        across = torch.linalg.inv(turned) @ crop
        points = self.cells @ across[:, :2, :2].transpose(1, 2) + across[:, None, :2, 2]
        points = points - self.off  # the maps of the second view have the same offset
        views = [self._colour(sample(pixels, m), generator) for m in (crop, turned)]
        followed = [
            None if maps is None else sample(maps[:, None], m)[:, 0] for m in (crop, turned)
        ]
        return Views(self.normalise(views[0]), self.normalise(views[1]), points, *followed)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise values in [0, 1] for the model."""
        return (pixels.to(self.device) - self.mean) / self.std

    def _crops(self, n: int, generator: torch.Generator) -> Tensor:
        """Return (N, 3, 3): maps coordinates of a view to those of the image, in [-1, 1]."""
        r = self.recipe
        draws = torch.rand(5, n, generator=generator)
        area = r.crop[0] + (r.crop[1] - r.crop[0]) * draws[0]
        low, high = (torch.tensor(v).log() for v in r.ratio)
        ratio = (low + (high - low) * draws[1]).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        matrix = torch.zeros(n, 3, 3)
        matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 2, 2] = width, height, 1
        matrix[:, 0, 2] = (1 - width) * (2 * draws[2] - 1)
        matrix[:, 1, 2] = (1 - height) * (2 * draws[3] - 1)
        return matrix

    def _turns(self, n: int, generator: torch.Generator) -> Tensor:
        r = self.recipe
        draws = torch.rand(6, n, generator=generator) * 2 - 1
        angle, shear = torch.deg2rad(r.degrees * draws[0]), torch.deg2rad(r.shear * draws[1])
        low, high = (torch.tensor(v).log() for v in r.scale)
        zoom = (-(low + (high - low) * (draws[2] + 1) / 2)).exp()
        mirror = torch.where((draws[5] < 0) & r.flip, -1.0, 1.0)
        matrix = torch.zeros(n, 3, 3)
        matrix[:, 0, 0] = zoom * angle.cos() * mirror
        matrix[:, 0, 1] = zoom * (angle + shear).sin()
        matrix[:, 1, 0] = -zoom * angle.sin() * mirror
        matrix[:, 1, 1] = zoom * (angle + shear).cos()
        matrix[:, 0, 2], matrix[:, 1, 2] = 2 * r.shift * draws[3], 2 * r.shift * draws[4]
        matrix[:, 2, 2] = 1
        return matrix

    def _colour(self, x: Tensor, generator: torch.Generator) -> Tensor:
        r, n = self.recipe, len(x)

        def rand(k: int) -> Tensor:
            return torch.rand(k, n, 1, 1, 1, generator=generator).to(x.device)

        jittered, greyed, blurred, permuted = rand(4)
        amounts = torch.where(jittered < r.jitter_share, 1 + r.jitter * (2 * rand(3) - 1), 1.0)
        brightness, contrast, saturation = amounts
        x = (x * brightness).clamp(0, 1)
        x = torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, contrast).clamp(0, 1)
        x = torch.lerp(_grey(x), x, torch.where(greyed < r.grey, 0.0, saturation)).clamp(0, 1)
        order = torch.rand(n, 3, generator=generator).argsort(1).to(x.device)
        order = torch.where(
            permuted.view(n, 1) < r.channels, order, torch.arange(3, device=x.device)
        )
        x = x[torch.arange(n, device=x.device)[:, None], order]
        sigma = 0.1 + 1.1 * rand(1)[0].view(n)
        rows = (blurred.view(n) < r.blur).nonzero()[:, 0]
        return x.index_copy(0, rows, _blur(x[rows], sigma[rows])) if len(rows) else x


def sample(x: Tensor, matrix: Tensor) -> Tensor:
    """Sample (N, C, H, W) at positions given by matrices (N, 3, 3), mirrored at the border."""
    size = [len(x), x.shape[1], *x.shape[2:]]
    grid = F.affine_grid(matrix[:, :2], size, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _grey(x: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    n, c, h, w = x.shape
    side = torch.exp(-1 / (2 * sigma**2))
    kernel = torch.stack([side, torch.ones_like(side), side], 1)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)
    x = F.pad(x, (1, 1, 1, 1), mode="reflect").reshape(1, n * c, h + 2, w + 2)
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * c)
    return F.conv2d(x, kernel[:, None, None, :], groups=n * c).view(n, c, h, w)
