"""Embedding of data sets, PML's tester with our calculator, and evaluation in one call."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate
from tqdm import tqdm

from pml_tacl.evaluation.calculator import RetrievalCalculator, as_names
from pml_tacl.evaluation.inputs import queries_first, starts_with, whole_labels
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError, InputTypeError
from pml_tacl.utils.modes import evaluating
from pml_tacl.utils.signals import ShieldedLoader


def embed(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the embeddings and labels of all images of a data set, in its order.

    The model runs in evaluation mode and without gradients; the training flags of its modules
    are restored afterwards.

    Args:
        model: any module, images (N, C, H, W) -> embeddings (N, D).
        dataset: data set with a length and items (image, label). The image is a tensor; the label
            is a whole number of any type, or one per level. An iterable data set must give as
            many items as its length, and is read in this process.
        batch_size: number of images per batch.
        num_workers: number of processes that load images.
        device: device to run on; the model is moved to it. None is the device of the model.
        progress: show a progress bar.

    Returns:
        Embeddings (N, D) of the model (not normalised here), float32, and labels (N,) int64, or
        (N, L) for labels with several levels; both on the CPU.

    Raises:
        ValueError: if the data set is empty, gives more or fewer items than its length, or is
            iterable and ``num_workers`` is not 0; if the model does not return (N, D); or if
            labels are not whole numbers (number the classes).
        TypeError: if the data set has no length, or items are not (image, label) pairs with a
            tensor as the image.
    """
    embeddings, labels, done = torch.empty(0), [], 0
    for rows, batch_labels in embed_in_batches(
        model,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        progress=progress,
    ):
        if not done:
            embeddings = torch.empty(_length(dataset), rows.shape[1])
        embeddings[done : done + len(rows)] = rows
        labels.append(batch_labels)
        done += len(rows)
    return embeddings, torch.cat(labels)


def embed_in_batches(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the embeddings and labels of each batch; the arguments are those of :func:`embed`.

    Yields:
        Embeddings (n, D) on the device of the model, and labels (n,) or (n, L) on the CPU.

    Raises:
        ValueError: as for :func:`embed`; missing items are reported after the last batch.
        TypeError: as for :func:`embed`.
    """
    check_count("batch_size", batch_size, 1)
    check_count("num_workers", num_workers, 0)
    count = _length(dataset)
    if num_workers and isinstance(dataset, IterableDataset):
        raise InputError(
            f"num_workers must be 0 for an iterable data set, got {num_workers}: workers would "
            "repeat items or change their order"
        )
    if not count:
        raise InputError("dataset is empty: there is nothing to embed")
    where = _device_of(model) if device is None else torch.device(device)
    model.to(where)
    loader = ShieldedLoader(
        dataset, batch_size, num_workers=num_workers, collate_fn=_images_and_labels
    )
    done = 0
    with (
        evaluating(model),
        tqdm(total=count, desc="embedding", unit="img", disable=not progress, leave=False) as bar,
    ):
        for batch in loader:
            images, batch_labels = _pair(batch)
            if done + len(images) > count:
                raise InputError(
                    f"dataset gives more items than its length, {count}: fix its __len__"
                )
            # Not inference mode: torch's fully_shard keeps the tensors that it gathers here.
            with torch.no_grad():
                rows = model(images.to(where, non_blocking=True))
            if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(images):
                shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise InputError(
                    f"model must turn {len(images)} images into ({len(images)}, D) embeddings, "
                    f"got {shape}"
                )
            yield rows, whole_labels("labels of dataset", batch_labels, len(images))
            done += len(rows)
            bar.update(len(rows))
    if done < count:
        raise InputError(
            f"dataset gives {done} items and its length is {count}: fix its __len__ or its items"
        )


def make_tester(
    calculator: AccuracyCalculator | None = None, **kwargs: Any
) -> GlobalEmbeddingSpaceTester:
    """Return PML's tester with our calculator and defaults for small data sets.

    Args:
        calculator: None for `RetrievalCalculator()`.
        **kwargs: arguments of PML's GlobalEmbeddingSpaceTester, such as hooks. By default,
            batch_size is 64 and images are loaded in this process (dataloader_num_workers=0).

    Returns:
        A tester; its `test({"test": dataset}, epoch, trunk, embedder)` returns the metrics, with
        names like `recall_at_1_level0`.
    """
    settings = {"batch_size": 64, "dataloader_num_workers": 0, **kwargs}
    calculator = RetrievalCalculator() if calculator is None else calculator
    return GlobalEmbeddingSpaceTester(accuracy_calculator=calculator, **settings)


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    metrics: str | Sequence[str] = (),
    progress: bool = True,
    reference: Dataset[Any] | None = None,
    ref_includes_query: bool | None = None,
) -> dict[str, float]:
    """Measure how well a model retrieves images of the same class.

    Embeddings are L2-normalised. Each image is a query, and all others are its gallery.

    Args:
        model: any module, images (N, C, H, W) -> embeddings (N, D).
        dataset: items (image, label) of the queries.
        batch_size: number of images per batch.
        num_workers: number of processes that load images.
        device: device to run on; the model is moved to it. None is the device of the model.
        metrics: names, or one name, including `recall_at_<k>` for any k; empty for all metrics
            of `RetrievalCalculator`.
        progress: show a progress bar.
        reference: the gallery, if it is another data set.
        ref_includes_query: the gallery contains the queries, and each is left out of its own
            results. None detects this: it is True if the gallery is the same data set or contains
            all of it (also within torch's Subset and ConcatDataset), or if its first labels and
            embeddings equal those of the queries, up to rounding.

    Returns:
        Dict from metric name to value in [0, 1] (AMI may fall a little below 0).

    Raises:
        ValueError: if the data set is empty, an image has no label (negative), labels are not
            whole numbers, a metric is unknown, embeddings are NaN or infinite, or
            `ref_includes_query=True` with a gallery that does not start with the queries.

    Example:
        >>> import torch
        >>> images = torch.eye(4)[[0, 0, 1, 1]]
        >>> dataset = torch.utils.data.TensorDataset(images, torch.tensor([0, 0, 1, 1]))
        >>> evaluate(torch.nn.Identity(), dataset, metrics=["recall_at_1"], progress=False)
        {'recall_at_1': 1.0}
    """
    names = as_names(metrics)
    asked = [name.removeprefix("recall_at_") for name in names if name.startswith("recall_at_")]
    ks = [int(at) for at in asked if at.isdecimal() and int(at)] or (1, 2, 4, 8)
    calculator = RetrievalCalculator(include=names, ks=ks)

    def labelled(name: str, images: Dataset[Any]) -> tuple[Tensor, Tensor]:
        embeddings, labels = embed(
            model,
            images,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            progress=progress,
        )
        unlabelled = int((labels < 0).view(len(labels), -1).any(dim=1).sum())
        if unlabelled:
            raise InputError(
                f"{unlabelled} of {len(labels)} images of {name} have no label "
                f"({int(labels.min())}): evaluate on labelled images"
            )
        return F.normalize(embeddings), labels

    query = gallery = labelled("dataset", dataset)
    if reference is not None and reference is not dataset:
        gallery = labelled("reference", reference)
        order = None if ref_includes_query is False else queries_first(dataset, reference)
        if order is not None:
            others = order[len(query[0]) :]
            gallery = (
                torch.cat([query[0], gallery[0][others]]),
                torch.cat([query[1], gallery[1][others]]),
            )
            ref_includes_query = True
            c_f.LOGGER.warning(
                "reference contains the images of dataset: each is left out of its own results "
                "(ref_includes_query=False keeps it)"
            )
        if ref_includes_query is None and query[0].shape[1] == gallery[0].shape[1]:
            ref_includes_query = starts_with(*query, *gallery)
            if ref_includes_query:
                c_f.LOGGER.warning(
                    "reference starts with the images of dataset: each is left out of its own "
                    "results (ref_includes_query=False keeps it)"
                )
    elif ref_includes_query is None:
        ref_includes_query = True
    return calculator.get_accuracy(*query, *gallery, ref_includes_query=bool(ref_includes_query))


def _images_and_labels(items: list[Any]) -> tuple[Any, list[Any]] | None:
    """Collate images and leave labels as they are; return None if items are not pairs."""
    if not all(isinstance(item, list | tuple) and len(item) == 2 for item in items):
        return None
    images, labels = zip(*items, strict=True)
    # As tensors, labels would each take a file handle when a worker sends them.
    known = [isinstance(label, Tensor) and label.dtype != torch.bfloat16 for label in labels]
    plain = [x.numpy(force=True) if numpy else x for x, numpy in zip(labels, known, strict=True)]
    return default_collate(list(images)), plain


def _length(dataset: Dataset[Any]) -> int:
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise InputTypeError(
            f"dataset must have a length, and {type(dataset).__name__} has none: give it a __len__"
        ) from None


def _pair(batch: Any) -> tuple[Tensor, list[Any]]:
    """Return the images and labels of one batch; raise TypeError if items are not such pairs."""
    if batch is None:
        raise InputTypeError("dataset must give (image, label) pairs: wrap it to do so")
    images, labels = batch
    if not isinstance(images, Tensor) or not 1 <= images.ndim <= 9:
        found = (
            f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        )
        raise InputTypeError(
            "dataset must give (image, label) pairs with a tensor as the image: a batch of images "
            f"came as {found}"
        )
    return images, labels


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device
