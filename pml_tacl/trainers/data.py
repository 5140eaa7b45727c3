"""What a training reads: the views of images, the order of an epoch, and its loader."""

import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler
from torch.utils.data._utils import signal_handling

from pml_tacl.distributed.collectives import broadcast
from pml_tacl.distributed.session import is_main, rank, world_size
from pml_tacl.trainers.order import draw_by_clusters
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.signals import ShieldedLoader

Images: TypeAlias = Dataset[Any]
"""A data set of the user: items (image as the transform takes it, anything)."""
Views: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(view, transformed view, points) of one image."""
Item: TypeAlias = tuple[Tensor, Tensor, Tensor, int, str]

ORDER_OF_PML_UP_TO = 100_000
"""Images of a data set up to which PML's sampler draws the order of an epoch.

It takes a second there and its time grows faster than the images. Above, the order is drawn in
arrays (:func:`pml_tacl.trainers.order.draw_by_clusters`), so that smaller trainings keep, number
for number, the order that they had.
"""
_ITEMS = 1 << 16  # of an order that are Python's numbers at once
_TRIES = 5  # images in a row that cannot be read: it is the storage then, not an image
_LOGGER = logging.getLogger(__name__)


class Batch(NamedTuple):
    """N images: both views (N, 3, S, S), points (N, G, 2) and pseudo-labels (N,)."""

    views: Tensor
    transformed: Tensor
    points: Tensor
    labels: Tensor


class TwoViews(Dataset[Item]):
    """Two views of an image: item (index, seed) -> (view, transformed view, points, index, "").

    Whatever is random in an item comes from its seed alone, so that neither the number of
    workers nor where an epoch was resumed changes it. An image that cannot be read is replaced
    by another of its cluster, whose index is given; the last entry then says why.

    Args:
        dataset: items (image, anything).
        transform: image -> (view, transformed view, points).
        labels: (N,) pseudo-labels; noise, -1, replaces nothing.

    Raises:
        OSError: for an item, if its replacements cannot be read either.
        ValueError: for an item that is NaN.
    """

    def __init__(
        self,
        dataset: Images,
        transform: Callable[[Any], Views],
        labels: Tensor,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.labels = labels

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, item: tuple[int, int]) -> Item:
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
        raise OSError(f"{_TRIES} images in a row cannot be read; the first was {trouble}")

    def _replacement(self, index: int) -> int:
        usable = self.labels >= 0
        usable[index] = False
        same = usable & (self.labels == self.labels[index])
        there = (same if same.any() else usable).nonzero()[:, 0]
        return int(there[torch.randint(len(there), ())]) if len(there) else index


class OneView(Dataset[tuple[Tensor, int]]):
    """(evaluation view, index) of each image; ValueError for NaN in it.

    The index of an image that cannot be read comes as -1 - index, with another's view.
    """

    def __init__(self, dataset: Images, transform: Callable[[Any], Tensor]) -> None:
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
        raise OSError(f"{_TRIES} images in a row cannot be read; the first was {trouble}")


def describe(index: int, error: OSError) -> str:
    """One line about an image that cannot be read."""
    return " ".join(f"image {index}: {error}".split())


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


def _three(found: object) -> Views:
    if not isinstance(found, tuple | list) or len(found) != 3:
        got = f"{len(found)} values" if isinstance(found, tuple | list) else type(found).__name__
        raise InputError(
            f"transform must return (view, transformed view, points), got {got}: see "
            "SiameseTransform"
        )
    return found[0], found[1], found[2]


def _finite(image: Tensor, index: int) -> Tensor:
    # Here, where the image is known: one NaN would spread to the batch through BatchNorm.
    if not torch.isfinite(image.sum()):
        raise InputError(f"image {index} of the data set is NaN or infinite: mend or remove it")
    return image


class Unreadable:
    """What was unreadable so far, each told once, up to a bound.

    Args:
        most: how many images are tolerated.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.known: set[str] = set()

    def add(self, trouble: str) -> None:
        """Note one line about an image; OSError if there are too many."""
        if trouble in self.known:
            return
        self.known.add(trouble)
        count = len(self.known)
        if count > self.most:
            raise OSError(
                f"{count} images cannot be read, more than max_unreadable={self.most}: mend the "
                f"storage and resume, or raise it; the last is {trouble}"
            )
        _LOGGER.warning(
            "another image takes the place of one (%d of at most %d): %s",
            count,
            self.most,
            trouble,
        )


def draw_order(
    labels: Tensor, clustered: bool, size: int, images_per_cluster: int, batch_size: int
) -> Tensor:
    """Draw an epoch from the global random state.

    Up to ``ORDER_OF_PML_UP_TO`` images PML's MPerClassSampler and torch's RandomSampler draw it;
    above, arrays are drawn from a seed that is torch's next number.

    Args:
        labels: (N,) pseudo-labels, -1 for noise.
        clustered: whether to draw by clusters; else every image alike.
        size: images in the epoch.
        images_per_cluster: in a batch.
        batch_size: images in a batch.

    Returns:
        (size, 2) int64: index of each image and the seed of its views.
    """
    if len(labels) > ORDER_OF_PML_UP_TO:
        generator = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        if clustered:
            drawn = draw_by_clusters(
                labels.numpy(), images_per_cluster, batch_size, size, generator
            )
        else:
            passes = [generator.permutation(len(labels)) for _ in range(-(-size // len(labels)))]
            drawn = np.concatenate(passes)[:size]
        index = torch.from_numpy(drawn)
    elif clustered:
        chosen = torch.where(labels >= 0)[0]
        sampler = MPerClassSampler(labels[chosen], images_per_cluster, batch_size, size)
        index = chosen[list(sampler)]
    else:
        index = torch.tensor(list(RandomSampler(labels, num_samples=size)))  # type: ignore[arg-type]
    return torch.stack([index, torch.randint(2**63 - 1, (len(index),))], dim=1)


def draw_epoch(
    labels: Tensor, clustered: bool, size: int, images_per_cluster: int, batch_size: int
) -> Tensor:
    """Draw an epoch on the first rank, as :func:`draw_order`, and seed the other ranks. Collective.

    Returns:
        (size, 2), the same on all ranks.
    """
    drawn = None
    if is_main():
        drawn = draw_order(labels, clustered, size, images_per_cluster, batch_size)
    order = broadcast([drawn])[0]
    assert order is not None
    seed_apart(order)
    return order


def share_of(order: Tensor, batch_size: int) -> Tensor:
    """Return this rank's part of each batch of an order: (size / world_size, 2)."""
    shares = order.view(-1, world_size(), batch_size // world_size(), 2)
    return shares[:, rank()].flatten(0, 1)


def seed_apart(order: Tensor, at: int = 0) -> None:
    """Seed all ranks but the first differently, from the epoch alone."""
    if not is_main():
        seed = (int(order[at, 1]) + rank()) % 2**63
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)


class _Items(Sampler[tuple[int, int]]):
    def __init__(self, order: Tensor) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for part in self.order.split(_ITEMS):
            yield from zip(part[:, 0].tolist(), part[:, 1].tolist(), strict=True)


def make_loader(
    views: TwoViews,
    order: Tensor,
    batch_size: int,
    *,
    num_workers: int,
    collate_fn: Callable[[list[Item]], object] | None = None,
    pin_memory: bool = False,
) -> DataLoader[Item]:
    """A loader of the images of an order, or of what is left of it.

    Args:
        views: what to read.
        order: as :func:`draw_order` gives it.
        batch_size: images in a batch.
        num_workers: processes that read images.
        collate_fn: of the DataLoader.
        pin_memory: of the DataLoader.
    """
    return ShieldedLoader(
        views,
        batch_size,
        sampler=_Items(order),
        generator=torch.Generator(),  # the global one would be a draw ahead after resuming
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory,
    )


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turn torch's error about a killed loader's process into an OSError that says what to do.

    Within, it is raised where a batch is waited for. Torch's handler of SIGCHLD would raise it
    anywhere: within an optimizer's step, or in a destructor, which swallows it.
    """
    handler = None
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal_handling._set_SIGCHLD_handler()  # once for ever, so not later within
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    # The last three: a batch was on its way when its sender went.
    except (RuntimeError, EOFError, ConnectionResetError, ConnectionRefusedError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ChildProcessError(
            f"a process that reads images was lost ({reason}), perhaps for want of memory: "
            "resume, with smaller dataloader_num_workers if it happens again"
        ) from error
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
