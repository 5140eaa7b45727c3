"""Pseudo-labels, masks and embeddings of all images, recomputed between steps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pml_tacl import KMeansPseudoLabeler
from pml_tacl.functional import to_image
from retrieval_parts.masks import image_masks
from retrieval_parts.objective import Losses
from retrieval_parts.scoring import embed_images, purity
from retrieval_parts.state import Training


@torch.no_grad()
def recluster(run: Training, losses: Losses) -> None:
    """Recompute labels, centroids, masks and neighbours with the current network."""
    config = run.config
    warm = run.step >= config.warmup
    grouped = config.metric == "ms" or config.ccl > 0 or config.tac > 0
    uses_clusters = config.ccl > 0 or (grouped and config.labels == "clusters")
    first = run.step == config.warmup or run.background is None
    stale = first or (config.mask_from == "recluster" and warm)
    if config.swap > 0 and config.mask != "centred" and stale:
        run.background = _masks(run, run.labels if run.centroids is not None else None)
    if config.metric == "stml" or (warm and uses_clusters):
        run.embeddings = embed_images(run.teacher, run.images.images, run.views.normalise)
    if not (warm and uses_clusters):
        return
    if config.labels == "true":
        count = int(run.images.labels.max()) + 1
        sums = torch.zeros(count, run.embeddings.shape[1], device=run.device)
        sums.index_add_(0, run.labels.to(run.device), run.embeddings)
        run.centroids = F.normalize(sums)
    else:
        labeler = KMeansPseudoLabeler(number_of_clusters(run), seed=config.seed)
        found = labeler(run.embeddings, run.centroids)
        run.labels, run.centroids = found.labels.cpu(), found.centroids
        if config.max_ambiguity > 0:
            own, other = (1 - run.embeddings @ run.centroids.T).topk(2, 1, largest=False)[0].T
            run.labels = torch.where((own <= config.max_ambiguity * other).cpu(), run.labels, -1)
    losses.clustering.set_centroids(run.centroids)
    sure = run.labels >= 0
    run.history.append(
        {
            "step": run.step,
            "clusters": len(run.centroids),
            "sure": float(sure.float().mean()),
            "purity": purity(run.labels[sure], run.images.labels[sure]),
            "loss": float(torch.tensor(run.losses[-config.recluster :]).mean()),
        }
    )


def number_of_clusters(run: Training) -> Any:
    """Return the number of clusters of the configuration, for `KMeansPseudoLabeler`."""
    rule = run.config.num_clusters
    if rule.endswith("classes"):
        return int(rule.removesuffix("classes") or 1) * (int(run.images.labels.max()) + 1)
    return rule if rule == "auto" else int(rule)


def _masks(run: Training, labels: Tensor | None) -> Tensor:
    config = run.config
    maps = image_masks(
        run.teacher,
        run.images.images,
        run.views.normalise,
        labels,
        config.mask,
        index=config.mask_index,
        scale=config.mask_size,
        references=config.mask_references,
        seed=config.seed,
    )
    offset = run.views.cell_offset
    if offset == (0.0, 0.0):
        return maps
    # Double the size of the maps: their own grid cannot represent half a cell.
    return to_image(maps, (2 * maps.shape[1], 2 * maps.shape[2]), offset)
