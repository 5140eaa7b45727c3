"""What a trainer refuses before anything is computed."""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from pml_tacl.clustering.kmeans import KMeansPseudoLabeler, _number_of_clusters
from pml_tacl.utils.checks import check_count, check_number, is_number
from pml_tacl.utils.errors import InputError

_MINERS = {"tuple_miner", "attention_miner"}
_LONGEST = 100  # a file's name is at most 255 bytes, and the type of the loss is in it too
_TAKEN = ("total_loss", "id", "iteration")  # columns of their own


def check_arguments(
    *,
    count: int,
    batch_size: int,
    images_per_cluster: int,
    recluster_every: int,
    recluster_when_moved: float | None,
    warmup_epochs: int,
    centroid_momentum: float,
    amp_dtype: torch.dtype | None,
    accumulation_steps: int,
    ema_decay: float | None,
    max_unreadable: int,
    checkpoint_every: int | None,
    keep: int,
    labeler: Any,
    miners: Iterable[str],
    weights: Iterable[str],
    losses: Any,
    functions: Mapping[str, Any],
    processes: int = 1,
) -> None:
    """Raise ValueError for an argument of :class:`UnsupervisedTrainer` that does not fit.

    Args:
        count: pictures in the data set.
        batch_size: as of the trainer, and so on.
        miners: names of mining_funcs.
        weights: names of loss_weights.
        losses: loss_funcs, of which the names are looked at.
        functions: further ones that must be callable, by name.
        processes: that train together.
    """
    check_count("batch_size", batch_size, 1)
    if batch_size > count:
        raise InputError(
            f"batch_size must be from 1 to the number of pictures, {count}, got {batch_size}"
        )
    check_count("images_per_cluster", images_per_cluster, 1)
    if batch_size % images_per_cluster:
        raise InputError(
            f"images_per_cluster must divide batch_size={batch_size}, got {images_per_cluster}"
        )
    if batch_size % (processes * images_per_cluster):
        raise InputError(
            f"batch_size={batch_size} is of all {processes} processes, and each takes whole "
            f"clusters: give a multiple of {processes * images_per_cluster}, or fewer processes"
        )
    check_count("recluster_every", recluster_every, 1)
    check_count("warmup_epochs", warmup_epochs, 0)
    if recluster_when_moved is not None:
        check_number("recluster_when_moved", recluster_when_moved, 0, 2, alternative="or None")
    check_number("centroid_momentum", centroid_momentum, 0, 1)
    check_count("accumulation_steps", accumulation_steps, 1)
    if accumulation_steps > batch_size // processes:
        of = f" / {processes} processes" if processes > 1 else ""
        raise InputError(
            f"accumulation_steps must be from 1 to batch_size={batch_size}{of}, "
            f"got {accumulation_steps}"
        )
    if ema_decay is not None and not (is_number(ema_decay) and 0 < ema_decay < 1):
        raise InputError(f"ema_decay must be above 0 and below 1, or None, got {ema_decay!r}")
    check_count("max_unreadable", max_unreadable, 0)
    check_count("keep", keep, 1)
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every, 1, "or None")
    if amp_dtype not in (None, torch.bfloat16, torch.float16):
        raise InputError(f"amp_dtype must be torch.bfloat16, float16 or None, got {amp_dtype}")
    for name, function in {"labeler": labeler, **functions}.items():
        if not callable(function):
            raise InputError(f"{name} must be a function or an object to call, got {function!r}")
    names = list(losses.keys()) if hasattr(losses, "keys") else []
    if not names:
        got = losses if hasattr(losses, "keys") else type(losses).__name__
        raise InputError(
            f'loss_funcs must be a dict of at least one loss, as {{"metric_loss": loss}}, got {got}'
        )
    check_loss_names(names)
    if unknown := set(miners) - _MINERS:
        raise InputError(
            f"mining_funcs must be named tuple_miner or attention_miner, got {sorted(unknown)}"
        )
    if unknown := set(weights) - set(names):
        raise InputError(
            f"loss_weights must be named as loss_funcs, {sorted(names)}, got {sorted(unknown)}"
        )
    clusters = getattr(labeler, "num_clusters", None)
    if isinstance(labeler, KMeansPseudoLabeler):
        clusters = _number_of_clusters(labeler, count)
    if isinstance(clusters, int | np.integer):  # else only a clustering tells
        if clusters > count:
            raise InputError(
                f"num_clusters={clusters} is more than the {count} pictures: lower it or add "
                "pictures"
            )
        check_clusters(int(clusters), batch_size, images_per_cluster)


def check_loss_names(names: Iterable[Any]) -> None:
    """Raise InputError for a name that cannot be that of a file, a table and a column of records.

    Records, checkpoints and PML's own checks use the names as they are: a letter first, then
    letters, digits and underscores, and no two that differ by case alone.
    """
    seen: dict[str, str] = {}
    for name in names:
        wrong = ""
        if not isinstance(name, str) or not name.isidentifier():
            wrong = "must be letters, digits and underscores, and not begin with a digit"
        elif len(name.encode()) > _LONGEST:
            wrong = f"must be at most {_LONGEST} bytes long"
        elif name.casefold() in _TAKEN or name.casefold().startswith("sqlite_"):
            wrong = "is taken by the records"
        if wrong:
            shown = repr(name) if len(repr(name)) < _LONGEST else f"{name!r:.40}..."
            raise InputError(f"loss_funcs: name {shown} {wrong}: give another, as metric_loss")
        same = unicodedata.normalize("NFKC", name).casefold()
        if same in seen:
            raise InputError(
                f"loss_funcs: names {seen[same]!r} and {name!r} differ by case alone, which their "
                "records cannot tell apart: give another"
            )
        seen[same] = name


def check_clusters(clusters: int, batch_size: int, images_per_cluster: int) -> None:
    """Raise ValueError for fewer clusters than a batch needs."""
    needed = batch_size // images_per_cluster
    if clusters < needed:
        raise InputError(
            f"{clusters} clusters are fewer than the {needed} that a batch of {batch_size} with "
            f"images_per_cluster={images_per_cluster} needs: lower batch_size, raise "
            "images_per_cluster or ask for more clusters"
        )
