"""Attention consistency and contrastive clustering, after Li et al. 2020 (ECCV).

The exact definitions are our own.

Shapes: N images, C channels, H x W cells of a feature map, P pairs of images, K centroids,
D dimensions of an embedding, G = H * W grid points.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pml_tacl.functional.attention import check_options, cross_attention, soft_maximum, unit_rows
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.labels import pseudo_labels
from pml_tacl.utils.precision import wide_dtype, without_autocast


def cross_image_attention(
    feature_maps: Tensor,
    other_maps: Tensor,
    temperature: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return how well each cell of one image matches any cell of another image.

    ``A(i|j)[u] = max_v cos(F_i[u], F_j[v])``. A temperature t replaces the maximum by
    ``t * logsumexp(cos / t) - t * log(H'W')``. After Li et al. 2020; the definition is our own.

    Args:
        feature_maps: (P, C, H, W), image i of each pair.
        other_maps: (P, C, H', W'), image j of each pair.
        temperature: None for the hard maximum, else t > 0.
        chunk_size: number of pairs compared at once; None chooses it for the device. At most
            chunk_size * HW * H'W' similarities are in memory at a time.

    Returns:
        (P, H, W) in [-1, 1], at least fp32.

    Raises:
        ValueError: if the shapes do not match, or ``temperature`` or ``chunk_size`` is not
            positive.
    """
    if feature_maps.ndim != 4 or other_maps.ndim != 4:
        raise InputError(
            "feature_maps and other_maps must be (P, C, H, W), got "
            f"{tuple(feature_maps.shape)} and {tuple(other_maps.shape)}"
        )
    if feature_maps.shape[:2] != other_maps.shape[:2]:
        raise InputError(
            "feature_maps and other_maps must agree in P and C, got "
            f"{tuple(feature_maps.shape)} and {tuple(other_maps.shape)}"
        )
    pairs = torch.arange(len(feature_maps), device=feature_maps.device)
    return cross_attention(feature_maps, None, other_maps, pairs, pairs, temperature, chunk_size)[0]


def sample_at_points(maps: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Read maps at tracked points by bilinear sampling.

    Args:
        maps: (N, H, W) or (N, C, H, W).
        points: (N, G, 2), (x, y) in grid_sample coordinates, align_corners=False. Points
            outside [-1, 1] or nan are not visible.

    Returns:
        values: (N, G) or (N, C, G), 0 where not visible.
        visible: (N, G) bool.

    Raises:
        ValueError: if the shapes do not match.
    """
    if maps.ndim not in (3, 4) or points.shape[2:] != (2,) or len(maps) != len(points):
        raise InputError(
            "maps must be (N, H, W) or (N, C, H, W) and points (N, G, 2) with the same N, got "
            f"{tuple(maps.shape)} and {tuple(points.shape)}"
        )
    visible = (points.abs() <= 1).all(dim=-1)
    wide = wide_dtype(maps)
    # Invisible points may be nan or infinite; do not pass them to the sampler.
    safe = torch.where(visible.unsqueeze(-1), points, 0.0).to(wide).unsqueeze(2)
    stacked = (maps.unsqueeze(1) if maps.ndim == 3 else maps).to(wide)
    # "border" repeats the outermost cells; zero padding would darken the outermost half cell.
    values = F.grid_sample(stacked, safe, padding_mode="border", align_corners=False)
    values = torch.where(visible.unsqueeze(1), values.squeeze(-1), 0.0).to(maps.dtype)
    return (values.squeeze(1) if maps.ndim == 3 else values), visible


def to_image(
    maps: Tensor,
    size: tuple[int, int],
    cell_offset: tuple[float, float] = (0.0, 0.0),
    mode: str = "bilinear",
) -> Tensor:
    """Resize maps to the size of the image, aligned to the receptive-field centres of the cells.

    Args:
        maps: (N, H, W).
        size: (height, width) of the image, in pixels.
        cell_offset: (x, y) in cells, from :meth:`AttentionEmbedder.cell_offset`.
        mode: "bilinear", or "bicubic", whose peaks may lie between cells and overshoot.

    Returns:
        (N, height, width). Values of the outermost cells extend to the border.

    Raises:
        ValueError: if maps are not (N, H, W).
    """
    if maps.ndim != 3:
        raise InputError(f"maps must be (N, H, W), got {tuple(maps.shape)}")
    if cell_offset == (0.0, 0.0):
        return F.interpolate(maps.unsqueeze(1), size, mode=mode).squeeze(1)
    wide = wide_dtype(maps)
    centres = [
        (2 * torch.arange(n, device=maps.device, dtype=wide) + 1) / n - 1 - 2 * shift / cells
        for n, shift, cells in zip(size, reversed(cell_offset), maps.shape[1:], strict=True)
    ]
    grid = torch.stack(torch.meshgrid(*centres, indexing="ij")[::-1], dim=-1)
    grid = grid.expand(len(maps), -1, -1, -1)
    large = F.grid_sample(maps.unsqueeze(1).to(wide), grid, mode, "border", align_corners=False)
    return large.squeeze(1).to(maps.dtype)


def attention_consistency(
    feature_maps: Tensor,
    transformed_feature_maps: Tensor,
    points: Tensor,
    anchors: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    temperature: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the transformed attention consistency of matched pairs (i, j).

    ``l_ij = mean over visible u of (A(i|j)[u] - A(i'|j)[T u])^2``: the attention should be
    transformed like the image. After Li et al. 2020; the definition is our own.

    Args:
        feature_maps: (N, C, H, W) of the first views.
        transformed_feature_maps: (N, C, H', W') of the second views.
        points: (N, H*W, 2), position of each cell of the first view in the second view.
        anchors: (P,) indices i.
        positives: (P,) indices j.
        weights: (N, H*W) non-negative weight of each cell, None for ones. After a background
            swap, pass the mask at each cell so that replaced cells do not count.
        temperature: None for the hard maximum, else t > 0.
        chunk_size: number of pairs compared at once, see :func:`cross_image_attention`.

    Returns:
        (P,) losses in [0, 4], at least fp32. A pair without visible cells gives 0 and keeps its
        graph.

    Raises:
        ValueError: if the shapes do not match, or ``temperature`` or ``chunk_size`` is not
            positive.
    """
    n, h, w = _check_views(feature_maps, transformed_feature_maps)
    if points.shape != (n, h * w, 2):
        raise InputError(
            f"points must be ({n}, {h * w}, 2), one for each cell of the {h} x {w} feature_maps, "
            f"got {tuple(points.shape)}: SiameseTransform's grid must be ({h}, {w})"
        )
    if weights is not None and weights.shape != (n, h * w):
        raise InputError(f"weights must be ({n}, {h * w}), got {tuple(weights.shape)}")
    attention, transformed = cross_attention(
        feature_maps, transformed_feature_maps, None, anchors, positives, temperature, chunk_size
    )
    followed, visible = sample_at_points(transformed, points[anchors])  # (P, HW)
    counted = visible.to(followed.dtype)
    if weights is not None:
        counted = counted * weights[anchors]
    # Cells with weight 0 may be nan.
    difference = torch.where(counted > 0, attention.flatten(1) - followed, 0.0)
    total = counted.sum(dim=1).clamp(min=torch.finfo(counted.dtype).tiny)
    return (counted * difference.square()).sum(dim=1) / total


def _check_views(feature_maps: Tensor, transformed: Tensor) -> tuple[int, int, int]:
    if (
        feature_maps.ndim != 4
        or transformed.ndim != 4
        or feature_maps.shape[:2] != transformed.shape[:2]
    ):
        raise InputError(
            "feature_maps and transformed_feature_maps must be (N, C, H, W) with the same N and "
            f"C, got {tuple(feature_maps.shape)} and {tuple(transformed.shape)}"
        )
    n, _, h, w = feature_maps.shape
    return n, h, w


def contrastive_clustering(
    own: Tensor, others: Tensor, margin: float = 0.2, valid: Tensor | None = None
) -> Tensor:
    """Return the contrastive clustering loss: a triplet loss between images and centroids.

    ``l_i = [ d(e_i, c_y) - mean_k d(e_i, c_k) + margin ]_+`` over the nearest other centroids
    c_k. After Li et al. 2020; the definition is our own.

    Args:
        own: (N,) distance of each embedding to its own centroid.
        others: (N, k) distances to the nearest other centroids.
        margin: in the unit of the distance.
        valid: (N, k) bool, which of ``others`` count; None for all.

    Returns:
        (N,) losses. An embedding without valid other centroids gets 0 and keeps its graph.
    """
    if others.shape[1] == 0:
        return own * 0
    if valid is None:
        return F.relu(own - others.mean(dim=1) + margin)
    count = valid.sum(dim=1)
    mean = torch.where(valid, others, 0.0).sum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, F.relu(own - mean + margin), own * 0)


@torch.no_grad()
def background_score(
    feature_maps: Tensor,
    labels: Tensor | None = None,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    temperature: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return how well each cell matches images of *other* clusters; high means background.

    ``B_i[u] = mean of A(i|j)[u] over images j of other clusters``. Computed without gradient.
    After Li et al. 2020; the definition is our own.

    Args:
        feature_maps: (N, C, H, W).
        labels: (N,) pseudo-labels; None treats every other image as another cluster.
        references: (M, C, H', W') feature maps of images j; None takes ``feature_maps``.
        reference_labels: (M,) pseudo-labels of ``references``. Images labelled -1 are skipped.
        temperature: as in :func:`cross_image_attention`.
        chunk_size: number of pairs compared at once, see :func:`cross_image_attention`.

    Returns:
        (N, H, W) in [-1, 1], at least fp32; 0 for an image without images of other clusters.

    Raises:
        ValueError: if the shapes do not match, or ``temperature`` or ``chunk_size`` is not
            positive.
    """
    check_options(temperature, chunk_size)
    n, c, h, w = feature_maps.shape
    own_batch = references is None
    if references is None:
        references, reference_labels = feature_maps, labels
    elif references.shape[1] != c:
        raise InputError(
            f"references must have the {c} channels of feature_maps, got {tuple(references.shape)}"
        )
    m, places = len(references), references.shape[2] * references.shape[3]
    other = _others(n, m, labels, reference_labels, own_batch, feature_maps.device)
    with without_autocast(feature_maps.device):
        table, norms = unit_rows([feature_maps] if own_batch else [feature_maps, references])
        rows = table[: n * h * w].view(n, h * w, c)
        reference_rows = table[-1 - m * places : -1].view(m, places, c)
        total = norms.new_zeros(n, h * w)
        budget = 2 ** (22 if feature_maps.device.type == "cpu" else 26)
        pairs = chunk_size or max(1, budget // max(1, h * w * places))
        for j in range(0, m, pairs):
            reference = reference_rows[j : j + pairs]
            step = max(1, pairs // len(reference))
            for i in range(0, n, step):
                similarity = rows[i : i + step].flatten(0, 1) @ reference.flatten(0, 1).T
                similarity = similarity.view(-1, h * w, len(reference), places).to(total.dtype)
                if temperature is None:
                    attention = similarity.amax(dim=3)
                else:
                    attention = soft_maximum(similarity, temperature)
                counts = other[i : i + step, None, j : j + pairs]
                total[i : i + step] += torch.where(counts, attention, 0.0).sum(dim=2)
    return (total / other.sum(dim=1, keepdim=True).clamp(min=1)).view(n, h, w)


def _others(
    n: int,
    m: int,
    labels: Tensor | None,
    reference_labels: Tensor | None,
    own_batch: bool,
    device: torch.device,
) -> Tensor:
    """Return (N, M) bool: whether each reference belongs to another cluster than each image."""
    if labels is not None and reference_labels is not None:
        labels = pseudo_labels(labels)
        reference_labels = pseudo_labels(reference_labels, "reference_labels")
        return (labels[:, None] != reference_labels) & (reference_labels >= 0)
    other = torch.ones(n, m, dtype=torch.bool, device=device)
    return other.fill_diagonal_(False) if own_batch else other
