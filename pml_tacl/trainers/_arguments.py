"""What a trainer refuses before anything is computed."""

from collections.abc import Iterable
from typing import Any

import torch

from pml_tacl._checks import check_count

_MINERS = {"tuple_miner", "attention_miner"}


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
    losses: Iterable[str],
    processes: int = 1,
) -> None:
    """Raise ValueError for an argument of :class:`UnsupervisedTrainer` that does not fit.

    Args:
        count: pictures in the data set.
        batch_size: as of the trainer, and so on.
        miners: names of mining_funcs.
        weights: names of loss_weights.
        losses: names of loss_funcs.
        processes: that train together.
    """
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"batch_size must be from 1 to the number of pictures, {count}, got {batch_size}"
        )
    if images_per_cluster < 1 or batch_size % images_per_cluster:
        raise ValueError(
            f"images_per_cluster must divide batch_size={batch_size}, got {images_per_cluster}"
        )
    if batch_size % (processes * images_per_cluster):
        raise ValueError(
            f"batch_size={batch_size} is of all {processes} processes, and each takes whole "
            f"clusters: give a multiple of {processes * images_per_cluster}, or fewer processes"
        )
    if recluster_every < 1 or warmup_epochs < 0:
        raise ValueError(
            "recluster_every must be at least 1 and warmup_epochs at least 0, got "
            f"{recluster_every} and {warmup_epochs}"
        )
    if recluster_when_moved is not None and not 0 <= recluster_when_moved <= 2:
        raise ValueError(
            f"recluster_when_moved must be in [0, 2] or None, got {recluster_when_moved}"
        )
    if not 0 <= centroid_momentum <= 1:
        raise ValueError(f"centroid_momentum must be in [0, 1], got {centroid_momentum}")
    if not 1 <= accumulation_steps <= batch_size // processes:
        of = f" / {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"accumulation_steps must be from 1 to batch_size={batch_size}{of}, "
            f"got {accumulation_steps}"
        )
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay must be above 0 and below 1, or None, got {ema_decay}")
    check_count("max_unreadable", max_unreadable, 0)
    check_count("keep", keep, 1)
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every, 1, "or None")
    if amp_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp_dtype must be torch.bfloat16, float16 or None, got {amp_dtype}")
    if unknown := set(miners) - _MINERS:
        raise ValueError(
            f"mining_funcs must be named tuple_miner or attention_miner, got {sorted(unknown)}"
        )
    if unknown := set(weights) - set(losses):
        raise ValueError(
            f"loss_weights must be named as loss_funcs, {sorted(losses)}, got {sorted(unknown)}"
        )
    clusters = getattr(labeler, "num_clusters", None)
    if isinstance(clusters, int):  # else only a clustering tells
        if clusters > count:
            raise ValueError(
                f"num_clusters={clusters} is more than the {count} pictures: lower it or add "
                "pictures"
            )
        check_clusters(clusters, batch_size, images_per_cluster)


def check_clusters(clusters: int, batch_size: int, images_per_cluster: int) -> None:
    """Raise ValueError for fewer clusters than a batch needs."""
    needed = batch_size // images_per_cluster
    if clusters < needed:
        raise ValueError(
            f"{clusters} clusters are fewer than the {needed} that a batch of {batch_size} with "
            f"images_per_cluster={images_per_cluster} needs: lower batch_size, raise "
            "images_per_cluster or ask for more clusters"
        )
