"""Batches: selection of images, their two views, and swapped backgrounds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pml_tacl import BackgroundSwap
from pml_tacl.functional import sample_at_points
from pml_tacl.transforms import cell_weights
from retrieval_parts.state import Training
from retrieval_parts.views import Views


@dataclass
class Batch:
    """Batch of N images: two views, rows, labels, and the kept fraction of each first-view cell.

    The rows are on the CPU.
    """

    views: Views
    rows: Tensor
    labels: Tensor
    weights: Tensor | None

    @property
    def images(self) -> Tensor:
        both = torch.cat([self.views.first, self.views.second])
        return both.contiguous(memory_format=torch.channels_last)


def draw(run: Training) -> Batch:
    """Return the next batch, with swapped backgrounds if configured."""
    config = run.config
    rows = draw_rows(run)
    maps = None if run.background is None else run.background[rows]
    views = run.views(run.images.images[rows], run.generator, maps)
    weights = None
    if config.swap > 0:
        swap = BackgroundSwap(
            config.swap,
            "centred"
            if config.mask == "centred"
            else "border",  # other masks are also given as maps
            sharpness=config.sharpness,
            sigma=config.sigma,
            empty=config.empty,
        )
        first = swap(views.first, views.first_maps, run.generator)
        second = swap(views.second, views.second_maps, run.generator)
        views = views._replace(first=first.images, second=second.images)
        if config.tac_masked:
            kept, _ = sample_at_points(second.masks, views.points)
            weights = cell_weights(first.masks, run.views.grid) * kept
    return Batch(views, rows, run.labels[rows].to(run.device), weights)


def draw_rows(run: Training) -> Tensor:
    """Return the rows of a batch: groups of a cluster (or of neighbours), or random images."""
    config, generator = run.config, run.generator
    count = len(run.images.images)
    if config.metric == "stml" and run.embeddings is not None:
        # As in the paper: random images, each with its nearest by the teacher's embedding.
        queries = torch.randperm(count, generator=generator)[: config.batch // config.per_cluster]
        near = run.embeddings[queries] @ run.embeddings.T
        return near.topk(config.per_cluster, 1).indices.flatten().cpu()
    grouped = config.metric in ("ms", "none") and (
        config.labels == "true" or run.centroids is not None
    )
    if not grouped:
        return torch.randperm(count, generator=generator)[: config.batch]
    known = run.labels[run.labels >= 0].unique()
    chosen = known[torch.randperm(len(known), generator=generator)]
    groups = []
    for label in chosen[: config.batch // config.per_cluster]:
        members = torch.where(run.labels == label)[0]
        order = torch.randperm(len(members), generator=generator)
        repeats = -(-config.per_cluster // len(members))
        groups.append(members[order.repeat(repeats)[: config.per_cluster]])
    return torch.cat(groups)
