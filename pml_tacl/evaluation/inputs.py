"""Validate embeddings and labels and convert them to one form."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from pml_tacl.clustering.unit_embeddings import Embeddings
from pml_tacl.utils.errors import InputError


def finite_rows(name: str, embeddings: Embeddings, device: torch.device) -> Tensor:
    """Return embeddings as contiguous float32 on a device, or float64 if float32 rounds them.

    Raises:
        ValueError: if they are not (N, D), or are empty, NaN or infinite.
    """
    if isinstance(embeddings, np.ndarray):
        if embeddings.dtype.kind not in "biufc":
            raise InputError(f"{name} must be numbers, got an array of {embeddings.dtype}")
        if embeddings.dtype.itemsize > 8 and embeddings.dtype.kind == "f":
            embeddings = embeddings.astype(np.float64)  # torch has no wider type
        embeddings = embeddings.astype(embeddings.dtype.newbyteorder("="), copy=False)
        # torch warns about read-only arrays, such as memory maps.
        embeddings = torch.from_numpy(np.require(embeddings, requirements=["C", "W"]))
    rows = torch.as_tensor(embeddings).detach()
    if rows.ndim != 2 or 0 in rows.shape or rows.is_complex():
        raise InputError(
            f"{name} must be (N, D) and not empty, got {tuple(rows.shape)}"
            f"{' complex numbers' if rows.is_complex() else ''}"
        )
    whole = (torch.int32, torch.int64, torch.uint32, torch.uint64)
    wide = rows.dtype in (torch.float64, *whole)
    rows = rows.to(device, torch.float64 if wide else torch.float32).contiguous()
    # Checking a sum is much faster; count the embeddings only if it is not finite.
    bad = 0
    if not torch.isfinite(rows.sum(dim=1)).all():
        bad = len(rows) - int(torch.isfinite(rows).all(dim=1).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(rows)} rows of {name} are NaN or infinite: "
            "look for NaN images or a diverged model"
        )
    return rows


def whole_labels(name: str, labels: Any, count: int | None = None) -> Tensor:
    """Return labels (N,) or (N, L) as int64, which keeps large ids distinct.

    Whole numbers of any type are accepted, and True and False become 1 and 0. Strings are not
    accepted: number the classes first.

    Args:
        name: name of the argument, used in error messages.
        labels: tensor, array or sequence.
        count: N; None accepts any number.

    Raises:
        ValueError: if the shape is wrong, or labels are not whole numbers or may be rounded.
    """
    given = _as_array(name, labels)
    if given.ndim not in (1, 2) or (count is not None and len(given) != count):
        wanted = "(N,) or (N, levels)" if count is None else f"({count},) or ({count}, levels)"
        raise InputError(f"{name} must be {wanted} whole numbers, got shape {given.shape}")
    kind, flat = given.dtype.kind, given.reshape(-1)
    wrong = np.zeros(len(flat), dtype=bool)
    if kind == "f":
        wrong = ~np.isfinite(flat) | (flat != np.floor(flat))
    elif kind not in "biu":
        wrong[:] = True
    if wrong.any():
        first = flat[wrong.argmax()]
        shown = first.item() if isinstance(first, np.generic) else first
        raise InputError(
            f"{name} must be whole numbers, got {_short(shown)}: number the classes 0, 1, 2, ..."
        )
    # Floats above this limit cannot represent odd numbers, so labels may have been merged.
    limit = 2 ** (np.finfo(given.dtype).nmant + 1) if kind == "f" else 2**63
    largest = max(abs(int(flat.max())), abs(int(flat.min()))) if len(flat) else 0
    if kind in "fu" and largest >= limit:
        kept = given.dtype if kind == "f" and largest < 2**63 else "int64"
        raise InputError(
            f"{name} reach {largest}, beyond the whole numbers that {kept} can "
            "distinguish: number the classes 0, 1, ..."
        )
    return torch.from_numpy(given.astype(np.int64))


def _as_array(name: str, labels: Any) -> Any:
    if isinstance(labels, np.ma.MaskedArray) and np.ma.is_masked(labels):
        raise InputError(f"{name} contain masked values: give a whole number for each image")
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        if labels.dtype == torch.bfloat16:  # NumPy has no such type
            if (labels.abs() >= 2**8).any():
                raise InputError(f"{name} are bfloat16, which rounds above 256: give integers")
            labels = labels.float()
        return labels.numpy()
    try:
        if isinstance(labels, list | tuple):
            labels = [_as_array(name, x) if isinstance(x, Tensor) else x for x in labels]
        given = np.asarray(labels)
        if given.dtype.kind == "O" and not isinstance(labels, list | tuple):
            given = np.asarray(given.tolist())  # an object array may contain whole numbers
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists or unsupported types
        text = " ".join(str(error).split())
        raise InputError(
            f"{name} must be whole numbers, one for each image, or for each image and "
            f"level ({text})"
        ) from error
    return given


def _short(value: object) -> str:
    text = f"{value!r} ({type(value).__name__})" if not isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_fit(
    query: Tensor, query_labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> None:
    """Raise ValueError if queries and reference differ in dimensions or label levels."""
    if query.shape[1] != reference.shape[1]:
        raise InputError(
            f"query has {query.shape[1]} dimensions, reference {reference.shape[1]}: "
            "embed both with the same model"
        )
    if query_labels.shape[1:] != reference_labels.shape[1:]:
        raise InputError(
            f"query_labels have the shape {tuple(query_labels.shape)}, reference_labels "
            f"{tuple(reference_labels.shape)}: give both the same levels"
        )


def starts_with(
    query: Tensor, query_labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> bool:
    """Return whether the reference starts with the queries, up to rounding."""
    head, head_labels = reference[: len(query)], reference_labels[: len(query)]
    return torch.equal(query_labels, head_labels) and (
        # The first check is much faster, and nearly always sufficient.
        torch.equal(query, head) or (query.shape == head.shape and torch.allclose(query, head))
    )


def queries_first(dataset: Dataset[Any], reference: Dataset[Any]) -> list[int] | None:
    """Return an order of the reference that starts with the items of a data set.

    Items are identified by their data set and index, also within torch's Subset and
    ConcatDataset.

    Returns:
        Indices of the reference, each once; None if it lacks an item of the data set.
    """
    if not _sources(dataset) <= _sources(reference):
        return None
    places: dict[tuple[int, int], list[int]] = {}
    items = _items(reference)
    for at in reversed(range(len(items))):
        places.setdefault(items[at], []).append(at)
    first = [places[item].pop() for item in _items(dataset) if places.get(item)]
    if len(first) < len(dataset):  # type: ignore[arg-type]
        return None
    taken = set(first)
    return first + [at for at in range(len(items)) if at not in taken]


def _sources(dataset: Dataset[Any]) -> set[int]:
    """Return the ids of the data sets that contain the items."""
    if type(dataset) is Subset:
        return _sources(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return {source for part in dataset.datasets for source in _sources(part)}
    return {id(dataset)}


def _items(dataset: Dataset[Any]) -> list[tuple[int, int]]:
    """Return the id of the data set and the index in it for each item."""
    # Subclasses may return other items, so only the exact types are followed.
    if type(dataset) is Subset:
        inner = _items(dataset.dataset)
        return [inner[int(at)] for at in dataset.indices]
    if type(dataset) is ConcatDataset:
        return [item for part in dataset.datasets for item in _items(part)]
    return [(id(dataset), at) for at in range(len(dataset))]  # type: ignore[arg-type]
