"""Distributed training for scripts that are started with torchrun; otherwise a single process.

Example of a script::

    from pml_tacl.distributed.inference import is_main, run_on_main, session

    if __name__ == "__main__":
        with session():
            main()  # an UnsupervisedTrainer in here trains on all processes
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from pml_tacl.distributed.collectives import OwnImages, gather_rows
from pml_tacl.distributed.session import (
    ProcessLost,
    barrier,
    is_main,
    rank,
    run_on_main,
    session,
    world_size,
)
from pml_tacl.distributed.store import EmbeddingFile
from pml_tacl.evaluation import embed, evaluate
from pml_tacl.evaluation.inference import embed_in_batches
from pml_tacl.evaluation.inputs import queries_first

__all__ = [
    "ProcessLost",
    "barrier",
    "embed_distributed",
    "evaluate_distributed",
    "is_main",
    "rank",
    "run_on_main",
    "session",
    "world_size",
]


def embed_distributed(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 64,
    file: str | PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> tuple[Tensor, Tensor] | None:
    """Embed a data set on all processes, see :func:`pml_tacl.evaluation.embed`. Collective.

    Args:
        model: images (N, C, H, W) -> embeddings (N, D).
        dataset: items (image, label).
        batch_size: images in a batch on each process.
        file: .npy file on a disk that all processes can access. Each process writes its part of
            the embeddings, and no process holds all of them in memory. None: the main process
            gathers them.
        dtype: dtype of the embeddings in the file, torch.float32 or torch.float16.
        **kwargs: further arguments of ``embed``.

    Returns:
        On the main process embeddings (N, D) and labels (N,), in the order of the data set and
        bit-identical to those of a single process (rounded to ``dtype``); None on the others.
        With ``file``, the embeddings are memory-mapped: writing to them changes the file.

    Raises:
        ValueError: on all processes, for another dtype; also the errors of ``embed``.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if file is not None:
        return _into_file(model, dataset, batch_size, Path(file), dtype, kwargs)
    if world_size() == 1:
        return embed(model, dataset, batch_size=batch_size, **kwargs)
    own = OwnImages(count, batch_size)
    rows, labels = torch.empty(0), torch.empty(0, dtype=torch.long)
    if len(own) or not count:
        progress = kwargs.pop("progress", True) and is_main()
        mine: Dataset[Any] = Subset(dataset, own)
        rows, labels = embed(model, mine, batch_size=batch_size, progress=progress, **kwargs)
    embeddings = gather_rows(rows, count, batch_size)
    found = gather_rows(labels, count, batch_size)
    return None if embeddings is None or found is None else (embeddings, found)


def _into_file(
    model: nn.Module,
    dataset: Dataset[Any],
    batch_size: int,
    path: Path,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor] | None:
    count = len(dataset)  # type: ignore[arg-type]
    progress = settings.pop("progress", True)

    def make() -> None:
        first, _ = embed(model, Subset(dataset, range(min(1, count))), progress=False, **settings)
        EmbeddingFile.create(path, count, first.shape[1], dtype)

    run_on_main(make, "making the file of embeddings")
    store = EmbeddingFile(path)
    own = OwnImages(count, batch_size)
    labels, done = [torch.empty(0, dtype=torch.long)], 0
    if len(own):
        mine: Dataset[Any] = Subset(dataset, own)
        settings["progress"] = progress and is_main()
        for rows, batch_labels in embed_in_batches(model, mine, batch_size=batch_size, **settings):
            start = own[done]  # images of a batch are adjacent
            store.write(start, rows)
            labels.append(batch_labels)
            done += len(rows)
    store.flush()
    barrier()  # read only after all have written
    found = gather_rows(torch.cat(labels[1:] or labels), count, batch_size)
    return None if found is None else (store.tensor(), found)


def evaluate_distributed(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    metrics: Sequence[str] = (),
    reference: Dataset[Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Evaluate on all processes, see :func:`pml_tacl.evaluation.evaluate`. Collective.

    Args:
        model: images (N, C, H, W) -> embeddings (N, D).
        dataset: items (image, label) of the queries.
        metrics: names of metrics; empty for all.
        reference: the gallery to search in; None for the queries themselves.
        **kwargs: further arguments of :func:`embed_distributed`.

    Returns:
        Value in [0, 1] by name of metric, on all processes.
    """
    parts, order = [dataset], None
    if reference is not None and reference is not dataset:
        parts.append(reference)
        order = queries_first(dataset, reference)
    found = [embed_distributed(model, part, **kwargs) for part in parts]

    def measure() -> dict[str, float]:
        query, *gallery = [TensorDataset(*part) for part in found if part is not None]
        searched: Dataset[Any] | None = gallery[0] if gallery else None
        if searched is not None and order is not None:
            searched = Subset(searched, order)  # `evaluate` detects the queries at its start
        settings: dict[str, Any] = {"metrics": metrics, "progress": False}
        return evaluate(nn.Identity(), query, reference=searched, **settings)

    return run_on_main(measure, "evaluating")
