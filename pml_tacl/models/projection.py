"""The projection used for retrieval, fitted to images without labels or training."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pml_tacl.functional import covariance_pooling
from pml_tacl.models.covariance import CHANNELS, principal_directions, symmetric_eigen
from pml_tacl.utils.checks import check_count, check_number
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.modes import evaluating
from pml_tacl.utils.precision import at_least_float32, without_autocast
from pml_tacl.utils.words import counted

if TYPE_CHECKING:
    from pml_tacl.models.attention_embedder import AttentionEmbedder

# Chosen on validation, see docs/results.md.
_WHOLE_SHRINKAGE = 0.5
_PARTS_SHRINKAGE = 0.1
_FEW_IMAGES = 1000
_IMAGES_FOR_DIRECTIONS = 256


class Projection(nn.Module):
    """Two whitened descriptors of an image, concatenated: the whole image and its parts.

    The *whole* is the pooled feature of the backbone, scaled to unit length. The *parts* are the
    covariance of the feature maps, weighted by attention; it describes which details occur
    together. Each descriptor is centred, projected on its principal directions, and whitened
    (scaled to nearly equal variance in every direction). It is then scaled to unit length. Each
    gets half of the dimensions. No weight is trained by gradients:
    :meth:`AttentionEmbedder.fit_projection` computes them from images. Before that, `fitted`
    is False and the embedder does not use the projection.

    Based on Jégou and Chum 2012 (PCA whitening) and Lin et al. 2015 (bilinear CNN); the combination
    is our own. Whitening both descriptors jointly retrieves worse, see docs/results.md.

    Args:
        num_features: number of pooled features, F.
        map_channels: number of channels of the feature maps, C.
        embedding_dim: D, largest number of dimensions of the result; at least 1.

    Attributes:
        embedding_dim: dimensions of the result: D, or fewer if there are fewer features.
    """

    directions: Tensor
    whole_mean: Tensor
    whole_basis: Tensor
    parts_mean: Tensor
    parts_basis: Tensor

    def __init__(self, num_features: int, map_channels: int, embedding_dim: int) -> None:
        super().__init__()
        reduced = min(map_channels, CHANNELS)
        num_parts = reduced * (reduced + 1) // 2
        whole = min(num_features, -(-embedding_dim // 2))
        parts = min(num_parts, embedding_dim - whole)
        whole = min(num_features, embedding_dim - parts)
        self.embedding_dim = whole + parts
        self.fitted = False
        self.register_buffer("directions", torch.zeros(reduced, map_channels))
        self.register_buffer("whole_mean", torch.zeros(num_features))
        self.register_buffer("whole_basis", torch.zeros(num_features, whole))
        self.register_buffer("parts_mean", torch.zeros(num_parts))
        self.register_buffer("parts_basis", torch.zeros(num_parts, parts))

    def forward(self, pooled: Tensor, feature_maps: Tensor, weights: Tensor) -> Tensor:
        """Return the projected embeddings (N, D) in fp32, with unit norm.

        Args:
            pooled: (N, F), the embedding of the backbone.
            feature_maps: (N, C, H, W).
            weights: (N, H, W), non-negative.
        """
        with without_autocast(pooled.device):
            whole = F.normalize(at_least_float32(pooled), dim=1)
            parts = self.parts(feature_maps, weights).to(whole.dtype)
            whole = (whole - self.whole_mean.to(whole)) @ self.whole_basis.to(whole)
            parts = (parts - self.parts_mean.to(parts)) @ self.parts_basis.to(parts)
            both = torch.cat([F.normalize(whole, dim=1), F.normalize(parts, dim=1)], dim=1)
            return F.normalize(both, dim=1)

    def parts(self, feature_maps: Tensor, weights: Tensor) -> Tensor:
        """Return the covariance (N, P) of the maps' principal channels, of unit length."""
        with without_autocast(feature_maps.device):
            maps = at_least_float32(feature_maps)
            reduced = torch.einsum("nchw,kc->nkhw", maps, self.directions.to(maps))
            return F.normalize(covariance_pooling(reduced, weights), dim=1)

    def reset(self) -> None:
        """Mark the projection as not fitted, and set its buffers to zero."""
        self.fitted = False
        for buffer in self.buffers():
            buffer.zero_()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.fitted)

    def set_extra_state(self, state: Tensor) -> None:
        self.fitted = bool(state)

    def extra_repr(self) -> str:
        """Return the arguments, for print()."""
        return f"embedding_dim={self.embedding_dim}, fitted={self.fitted}"


Batches = Iterable[Tensor | Sequence[Any]]


@torch.no_grad()
def fit_projection(
    model: "AttentionEmbedder", batches: Batches, max_images: int = 10_000, progress: bool = True
) -> None:
    """Fit the :class:`Projection` of a model to images, in one pass and without labels.

    The principal directions of the maps come from the first 256 images. Moments are summed in
    float64. For fewer than 1000 images the whole is whitened less, because its small variances
    are poorly estimated. If a descriptor has at least as many dimensions as there are images, at
    most half of them are principal directions, because those of a few images do not generalise to
    other images. The rest is a fixed random basis of the remaining space.

    Args:
        model: a model with `pooling="backbone"`; its projection is overwritten, or kept if an
            error is raised.
        batches: iterable over images (N, C, H, W), ready for the model, or over sequences that
            start with them.
        max_images: number of images used, from the start; at least 2.
        progress: show a progress bar.

    Raises:
        ValueError: if there are fewer than 2 images, features are NaN, or all images look the
            same.
    """
    check_count("max_images", max_images, least=2)
    current = model.embedder.projection
    if not isinstance(current, Projection):
        raise InputError("embedding_dim is None: there is no projection to fit")
    projection = copy.deepcopy(current)  # the model keeps its own if an error is raised
    device = projection.whole_mean.device
    waiting: list[tuple[Tensor, Tensor, Tensor]] | None = []
    whole, parts = _Moments(), _Moments()

    def take(pooled: Tensor, maps: Tensor, weights: Tensor) -> None:
        whole.add(F.normalize(at_least_float32(pooled), dim=1))
        parts.add(projection.parts(maps, weights))

    def take_those_waiting() -> None:
        nonlocal waiting
        assert waiting is not None
        cells = _Moments()
        for _, maps, _ in waiting:
            cells.add(maps.movedim(1, -1).flatten(0, 2))
        if waiting:
            covariance = cells.covariance("batches")[1]
            projection.directions.copy_(principal_directions(covariance, CHANNELS))
        for held in waiting:
            take(*held)
        waiting = None

    with evaluating(model):
        for images in _first(batches, max_images, progress):
            output = model.trunk(images.to(device))
            features = model.embedder.pool(output)
            held = (features[0], output.feature_maps, features[1])
            if waiting is None:
                take(*held)
                continue
            waiting.append(held)
            if sum(len(pooled) for pooled, *_ in waiting) >= _IMAGES_FOR_DIRECTIONS:
                take_those_waiting()
        if waiting is not None:
            take_those_waiting()
    if whole.count < 2:
        raise InputError(
            f"batches contain {counted(whole.count, 'image')}: the projection needs at least 2"
        )
    projection.fitted = False
    for moments, shrinkage, mean, basis in (
        (whole, whole_shrinkage(whole.count), projection.whole_mean, projection.whole_basis),
        (parts, _PARTS_SHRINKAGE, projection.parts_mean, projection.parts_basis),
    ):
        centre, covariance = moments.covariance("batches")
        varies = _varies(centre, covariance)
        projection.fitted = projection.fitted or varies
        mean.copy_(centre)
        basis.zero_()
        if varies:
            basis.copy_(principal_basis(covariance, basis.shape[1], moments.count, shrinkage))
    if not projection.fitted:
        raise InputError(f"batches contain {whole.count} images that all look the same")
    current.load_state_dict(projection.state_dict())


def whole_shrinkage(count: int) -> float:
    """Return the shrinkage of the whole for `count` images; chosen on validation data."""
    return _WHOLE_SHRINKAGE * max(1.0, (_FEW_IMAGES / count) ** 2)


def principal_basis(covariance: Tensor, dimensions: int, count: int, shrinkage: float) -> Tensor:
    """Return whitened principal directions (F, dimensions), the largest variance first.

    Columns are `v / sqrt(l + shrinkage * mean(l))` for eigenvalues l and eigenvectors v.
    The covariance of `count` images has a rank of at most `count - 1`. If `dimensions` is larger,
    half of the dimensions (at most the rank) are principal directions. The others are a fixed
    random orthonormal basis of the remaining space, scaled so that lengths are preserved on
    average.

    Args:
        covariance: (F, F), symmetric, float64.
        dimensions: at most F.
        count: number of samples from which the covariance was computed.
        shrinkage: added to each variance, as a fraction of the mean variance; above 0.
    """
    total = len(covariance)
    values, vectors = symmetric_eigen(covariance)
    values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)

    def gain(variance: Tensor) -> Tensor:
        return (variance + shrinkage * covariance.trace() / total).rsqrt()

    known = min(dimensions, total, count - 1)
    if known < min(dimensions, total):
        known = min(known, -(-dimensions // 2))
    basis: Tensor = vectors[:, :known] * gain(values[:known])
    missing = dimensions - known
    if missing > 0:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(total, missing, generator=generator, dtype=basis.dtype)
        rest = noise.to(basis.device)
        for _ in range(2):  # a second pass removes rounding errors
            rest = rest - vectors[:, :known] @ (vectors[:, :known].T @ rest)
        rest = torch.linalg.qr(rest).Q * ((total - known) / missing) ** 0.5
        basis = torch.cat([basis, rest * gain(values[known:].mean())], dim=1)
    return basis


@torch.no_grad()
def whiten_linear(
    model: "AttentionEmbedder",
    batches: Batches,
    max_images: int = 10_000,
    shrinkage: float = 0.1,
    progress: bool = True,
) -> None:
    """Initialise the trained projection of `pooling="covariance"` or `"average"` by whitening.

    Up to a common factor, the weight rows become `v / sqrt(l + shrinkage * mean(l))` for the
    largest eigenvalues l of the covariance of the pooled features, with eigenvectors v. The bias
    subtracts the mean. For covariance pooling, an extra pass first sets the reducing convolution to
    the principal directions of the maps, so the batches are read twice. If D is larger than the
    number of directions, the last rows are zero.

    Args:
        model: its projection is overwritten.
        batches: iterable over images (N, C, H, W), ready for the model, or over sequences that
            start with them; for the covariance a list or a DataLoader, not a generator.
        max_images: number of images used, from the start.
        shrinkage: above 0.
        progress: show a progress bar.

    Raises:
        ValueError: if the model has no projection, there are too few images or all look the
            same, an iterator is given where batches are read twice, or an argument is out of
            range.
    """
    check_count("max_images", max_images, least=2)
    check_number("shrinkage", shrinkage, 0, above=True)
    projection = model.embedder.projection
    if not isinstance(projection, nn.Linear):
        raise InputError("embedding_dim is None: there is no projection to fit")
    device = projection.weight.device
    if model.embedder.covariance is not None and isinstance(batches, Iterator):
        raise InputError(
            f"batches are read twice, which {type(batches).__name__} does not allow: give a list "
            "or a DataLoader"
        )

    def moments(features: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        found, images_seen = _Moments(), 0
        for images in _first(batches, max_images, progress):
            found.add(features(images.to(device)))
            images_seen += len(images)
        if images_seen < 2:
            raise InputError(
                f"batches contain {counted(images_seen, 'image')}: the projection needs at least 2"
            )
        mean, covariance = found.covariance("batches")
        if not _varies(mean, covariance):
            raise InputError(f"batches contain {images_seen} images that all look the same")
        return mean, covariance

    reduce = None if model.embedder.covariance is None else model.embedder.covariance.reduce.weight
    before = None if reduce is None else reduce.clone()

    with evaluating(model):
        if model.embedder.covariance is not None:
            maps = moments(lambda x: model.trunk(x).feature_maps.movedim(1, -1).flatten(0, 2))
            model.embedder.covariance.fit(maps[1])
        try:
            mean, covariance = moments(lambda x: model.embedder.pool(model.trunk(x))[0])
        except InputError:
            if reduce is not None and before is not None:
                reduce.copy_(before)
            raise
    values, vectors = symmetric_eigen(covariance)
    values = values.clamp_min(0).flip(0)[: projection.out_features]
    floor = shrinkage * covariance.trace() / len(covariance)
    gains = (values + floor).clamp_min(1e-24).rsqrt()
    # Scale the result to about unit length before normalisation, to keep learning rates comparable.
    gains = gains / (values * gains.square()).sum().clamp_min(1e-24).sqrt()
    rows = vectors.flip(1).T[: projection.out_features] * gains[:, None]
    projection.weight.zero_()
    projection.weight[: len(rows)] = rows.to(projection.weight)
    if projection.bias is not None:
        projection.bias.zero_()
        projection.bias[: len(rows)] = -(rows @ mean).to(projection.bias)


class _Moments:
    """Running mean and covariance of vectors in batches, summed in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.outer = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add (n, F)."""
        wide = features.double()
        self.sum = self.sum.to(wide) + wide.sum(0)
        self.outer = self.outer.to(wide) + wide.T @ wide
        self.count += len(wide)

    def covariance(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the mean (F,) and the covariance (F, F)."""
        mean = self.sum / self.count
        covariance = self.outer / self.count - mean[:, None] * mean
        if not torch.isfinite(covariance).all():
            raise InputError(
                f"{name} give features that are NaN or infinite: check the images and the weights"
            )
        return mean, covariance


def _varies(mean: Tensor, covariance: Tensor) -> bool:
    """Return whether vectors differ by more than rounding, as those of identical images do."""
    return float(covariance.trace()) > 1e-10 * float(mean.square().sum())


def _first(batches: Batches, max_images: int, progress: bool) -> Iterable[Tensor]:
    """Yield images (n, C, H, W) until there are `max_images`."""
    seen = 0
    with tqdm(desc="fitting the projection", unit="img", disable=not progress, leave=False) as bar:
        for batch in batches:
            images: Tensor = batch if isinstance(batch, Tensor) else batch[0]
            images = images[: max_images - seen]
            if not len(images):
                continue
            seen += len(images)
            bar.update(len(images))
            yield images
            if seen >= max_images:
                return
