"""Input of a training: views of images, order of an epoch, and loader."""

import logging
import os
import random
import signal
import threading
import time
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
"""A data set with items (image as the transform takes it, anything)."""
Views: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(view, transformed view, points) of one image."""
Item: TypeAlias = tuple[Tensor, Tensor, Tensor, int, str]

ORDER_OF_PML_UP_TO = 100_000
"""Largest data set, in images, for which PML's sampler draws the order of an epoch.

PML's sampler takes about a second at this size, and its time grows faster than the number of
images. Larger data sets use :func:`pml_tacl.trainers.order.draw_by_clusters`. The limit keeps the
exact order of earlier trainings on smaller data sets.
"""
_ITEMS = 1 << 16  # images of an order that are converted to Python numbers at once
_TRIES = 5  # after so many unreadable images in a row, the storage has probably failed
_LOSS = 5.0  # seconds to wait for the end of a lost worker
_LOGGER = logging.getLogger(__name__)


class Batch(NamedTuple):
    """A batch of N images: views (N, 3, height, width), points (N, G, 2), pseudo-labels (N,)."""

    views: Tensor
    transformed: Tensor
    points: Tensor
    labels: Tensor


class TwoViews(Dataset[Item]):
    """Data set of two views: item (index, seed) -> (view, transformed view, points, index, "").

    The random numbers of an item depend on its seed alone, and not on the number of workers or on
    where an epoch was resumed. If an image cannot be read, the item is another image of its
    cluster, with that image's index, and the last entry is the error. If no other image of the
    cluster is left, an image of any cluster is taken.

    Args:
        dataset: items (image, anything).
        transform: image -> (view, transformed view, points).
        labels: (N,) pseudo-labels; images labelled -1 (noise) never serve as replacements.

    Raises:
        OSError: on access to an item, if its replacements cannot be read either.
        ValueError: on access to an item with NaN or infinite values.
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
    """Data set of evaluation views: item index -> (view, index).

    If an image cannot be read, the view of another image is returned with -1 - index.

    Args:
        dataset: items (image, anything).
        transform: image -> (3, height, width).

    Raises:
        OSError: on access to an item, if the images after it cannot be read either.
        ValueError: on access to an item with NaN or infinite values.
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
    """Return one line about an image that cannot be read."""
    return " ".join(f"image {index}: {error}".split())


_ONE_AT_A_TIME = threading.RLock()


def _new_lock() -> None:
    global _ONE_AT_A_TIME
    _ONE_AT_A_TIME = threading.RLock()  # a forked process may inherit a lock that stays locked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of torch, Python and NumPy, and restore their state on exit.

    The global generators are used since torchvision's transforms and users' data sets take no
    generator. A lock serialises threads that use this function. Another thread that draws from
    the global generators at the same time would mix up the sequence: in that case read images in
    worker processes (``dataloader_num_workers`` of at least 1).

    Args:
        seed: any non-negative integer below 2**63.
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
    # Checked here, where the index is known: BatchNorm would spread one NaN to the whole batch.
    if not torch.isfinite(image.sum()):
        raise InputError(f"image {index} of the data set is NaN or infinite: repair or remove it")
    return image


def image_of(trouble: str) -> str:
    """Return which image a line is about; the rest may differ each time that it is read."""
    return trouble.partition(":")[0]


class Unreadable:
    """Record of unreadable images, with an upper bound. Each image is reported once.

    Args:
        most: largest number of unreadable images that is tolerated.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.known: set[str] = set()  # "image 5"

    def add(self, trouble: str) -> None:
        """Add one line about an image; raise OSError if there are too many."""
        image = image_of(trouble)
        if image in self.known:
            return
        self.known.add(image)
        count = len(self.known)
        if count > self.most:
            raise OSError(
                f"{count} images cannot be read, more than max_unreadable={self.most}: repair the "
                f"storage and resume, or raise max_unreadable; the last is {trouble}"
            )
        _LOGGER.warning(
            "an unreadable image was left out or replaced by another (%d of at most %d): %s",
            count,
            self.most,
            trouble,
        )


def draw_order(
    labels: Tensor, clustered: bool, size: int, images_per_cluster: int, batch_size: int
) -> Tensor:
    """Draw the images of an epoch, with the global random state.

    Up to ``ORDER_OF_PML_UP_TO`` images, PML's MPerClassSampler or torch's RandomSampler draws the
    order. For more images, array operations draw the order, with a seed from torch's generator.

    Args:
        labels: (N,) pseudo-labels, -1 for noise.
        clustered: draw by clusters; otherwise all images are equally likely.
        size: images in the epoch.
        images_per_cluster: images of one cluster in a batch.
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
    """Draw an epoch on the main process, and seed the other ranks. Collective.

    The arguments are those of :func:`draw_order`.

    Returns:
        (size, 2) int64, the same on all ranks.
    """
    drawn = None
    if is_main():
        drawn = draw_order(labels, clustered, size, images_per_cluster, batch_size)
    order = broadcast([drawn])[0]
    assert order is not None
    seed_apart(order)
    return order


def share_of(order: Tensor, batch_size: int) -> Tensor:
    """Return this rank's share of each batch of an order: (size / world_size, 2)."""
    shares = order.view(-1, world_size(), batch_size // world_size(), 2)
    return shares[:, rank()].flatten(0, 1)


def seed_apart(order: Tensor, at: int = 0) -> None:
    """Seed each rank, except the main process, differently. The seed depends on the order alone."""
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
    """Return a loader for the images of an epoch, or for the rest of an epoch.

    Args:
        views: the data set of two views.
        order: (size, 2), from :func:`draw_order`.
        batch_size: images in a batch.
        num_workers: processes that read images.
        collate_fn: passed to the DataLoader.
        pin_memory: passed to the DataLoader.
    """
    return ShieldedLoader(
        views,
        batch_size,
        sampler=_Items(order),
        generator=torch.Generator(),  # the global one would be one draw ahead after a resume
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory,
    )


def _wait_for_lost_worker() -> RuntimeError | None:
    """Return torch's error about a worker that has ended, or None after ``_LOSS`` seconds."""
    end = time.monotonic() + _LOSS
    while time.monotonic() < end:
        try:
            signal_handling._error_if_any_worker_fails()  # type: ignore[attr-defined]
        except RuntimeError as error:
            return error
        time.sleep(0.01)
    return None


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turn torch's error about a killed worker of a loader into an OSError that says what to do.

    Inside the block, the error is raised only where a batch is requested. Torch's own handler of
    SIGCHLD may raise it anywhere, such as in an optimizer's step, or in a destructor, where it is
    lost.
    """
    handler = None
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal_handling._set_SIGCHLD_handler()  # now, or torch would set it inside the block
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    # The last three occur if a worker dies while it sends a batch. Its process ends a little later.
    # Wait for that end; otherwise torch's handler, which is restored below, raises its own error.
    except (RuntimeError, EOFError, ConnectionResetError, ConnectionRefusedError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        lost = error if isinstance(error, RuntimeError) else _wait_for_lost_worker()
        if lost is None:
            raise
        reason = " ".join(str(lost).split()).partition(". ")[0]
        raise ChildProcessError(
            f"a process that reads images was lost ({reason}), perhaps for lack of memory: "
            "resume, with a smaller dataloader_num_workers if it happens again"
        ) from error
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
