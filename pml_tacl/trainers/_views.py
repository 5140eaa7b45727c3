"""What a trainer reads: two views of each picture, or one for evaluation."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pml_tacl.functional import border_similarity, commonness, sample_at_points
from pml_tacl.trainers._forward import in_precision
from pml_tacl.transforms import BackgroundSwap, cell_weights
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.modes import evaluating
from pml_tacl.utils.precision import wide_dtype

_TRIES = 5  # pictures in a row that cannot be read: it is the storage then, not a picture


class Batch(NamedTuple):
    """N pictures: both views (N, 3, S, S), points (N, G, 2) and pseudo-labels (N,)."""

    views: Tensor
    transformed: Tensor
    points: Tensor
    labels: Tensor


class TwoViews(Dataset[Any]):
    """Two views of a picture: item (index, seed) -> (view, transformed view, points, index, "").

    Whatever is random in an item comes from its seed alone, so that neither the number of
    workers nor where an epoch was resumed changes it. A picture that cannot be read is replaced
    by another of its cluster, whose index is given; the last entry then says why.

    Args:
        dataset: items (picture, anything).
        transform: picture -> (view, transformed view, points).
        labels: (N,) pseudo-labels; noise, -1, replaces nothing.

    Raises:
        OSError: for an item, if its replacements cannot be read either.
        ValueError: for an item that is NaN.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        transform: Callable[[Any], tuple[Tensor, Tensor, Tensor]],
        labels: Tensor,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.labels = labels

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, int, str]:
        index, seed = item
        trouble = ""
        with drawing_from(seed):
            for _ in range(_TRIES):
                try:
                    found = self.transform(self.dataset[index][0])
                except OSError as error:
                    trouble = trouble or describe(index, error)
                    index = self._replacement(index)
                else:
                    view, transformed, points = _three(found)
                    view, transformed = _finite(view, index), _finite(transformed, index)
                    return view, transformed, points, index, trouble
        raise OSError(f"{_TRIES} pictures in a row cannot be read; the first was {trouble}")

    def _replacement(self, index: int) -> int:
        usable = self.labels >= 0
        usable[index] = False
        same = usable & (self.labels == self.labels[index])
        there = (same if same.any() else usable).nonzero()[:, 0]
        return int(there[torch.randint(len(there), ())]) if len(there) else index


class OneView(Dataset[Any]):
    """(evaluation view, index) of each picture; ValueError for NaN in it.

    The index of a picture that cannot be read comes as -1 - index, with another's view.
    """

    def __init__(self, dataset: Dataset[Any], transform: Callable[[Any], Tensor]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        trouble = ""
        for there in range(index, index + _TRIES):
            there %= len(self)
            try:
                with drawing_from(index):
                    view = _finite(self.transform(self.dataset[there][0]), there)
            except OSError as error:
                trouble = trouble or describe(index, error)
            else:
                return view, index if there == index else -1 - index
        raise OSError(f"{_TRIES} pictures in a row cannot be read; the first was {trouble}")


def describe(index: int, error: OSError) -> str:
    """One line about a picture that cannot be read."""
    return " ".join(f"picture {index}: {error}".split())


_ONE_AT_A_TIME = threading.RLock()


def _new_lock() -> None:
    global _ONE_AT_A_TIME
    _ONE_AT_A_TIME = threading.RLock()  # or a process forked meanwhile would wait for ever


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Within, torch's, Python's and NumPy's global generators draw from a seed, on the CPU.

    torchvision's transforms and the data sets of users take no generator, so the global ones
    must give these numbers; afterwards they stand where they stood, in a loader's process too.
    Threads that draw by this function take turns. A thread that draws from the global generators
    by itself meanwhile gets, and takes, numbers of the seed: read in processes then
    (``dataloader_num_workers`` of at least 1).
    """
    with _ONE_AT_A_TIME:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])


def _three(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(found, tuple | list) or len(found) != 3:
        got = f"{len(found)} values" if isinstance(found, tuple | list) else type(found).__name__
        raise InputError(
            f"transform must return (view, transformed view, points), got {got}: see "
            "SiameseTransform"
        )
    return found[0], found[1], found[2]


def _finite(image: Tensor, index: int) -> Tensor:
    # Here, where the picture is known: one NaN would spread to the batch through BatchNorm.
    if not torch.isfinite(image.sum()):
        raise InputError(f"picture {index} of the data set is NaN or infinite: mend or remove it")
    return image


@torch.no_grad()
def swap_background(
    swap: BackgroundSwap,
    trunk: nn.Module,
    batch: Batch,
    grid: tuple[int, int] | None,
    chunks: int = 1,
    amp_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Swap the background of both views.

    A mask from maps takes a pass of the trunk over the unswapped views, in evaluation mode, in so
    many chunks and in the precision of the training.

    Returns:
        Both views (N, 3, S, S), and how far both kept each cell of the first: (N, H*W) in [0, 1],
        None without a grid.

    Raises:
        ValueError: for a mask from maps, if the trunk gives none.
    """
    ground: list[Tensor | None] = [None, None]
    if swap.mask != "centred":
        images = torch.cat([batch.views, batch.transformed])
        with evaluating(trunk), in_precision(images.device, amp_dtype):
            outputs = [trunk(part) for part in images.chunk(chunks)]
        if not hasattr(outputs[0], "feature_maps"):
            raise InputError(
                f"BackgroundSwap(mask={swap.mask!r}) needs a trunk with feature_maps: use "
                "AttentionEmbedder, or mask='centred'"
            )
        maps = torch.cat([output.feature_maps for output in outputs])
        maps = maps.to(wide_dtype(maps))
        for view, part in enumerate(maps.chunk(2)):
            border = swap.mask == "border"
            ground[view] = border_similarity(part) if border else commonness(part, batch.labels)
    first = swap(batch.views, ground[0])
    second = swap(batch.transformed, ground[1])
    if grid is None:
        return first.images, second.images, None
    kept, _ = sample_at_points(second.masks, batch.points)
    return first.images, second.images, cell_weights(first.masks, grid) * kept
