"""Pooling of feature maps to unit embeddings, weighted by an attention map."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pml_tacl.functional import background_score, border_similarity
from pml_tacl.functional.background import foreground_scores
from pml_tacl.models.covariance import Covariance
from pml_tacl.models.projection import Projection
from pml_tacl.models.trunk import TrunkOutput
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.precision import at_least_float32

_DISTINCTIVE_TEMPERATURE = 0.1
_RELATIVE_SHARPNESS = 4.0
_BORDER_SHARPNESS = 6.0  # chosen on validation, see docs/results.md
_ATTENTIONS = ("border", "relative_border", "pool", "distinctive", "none")


class EmbedderOutput(NamedTuple):
    """Output of `AttentionEmbedder.forward_features`.

    Attributes:
        embeddings: (N, D), unit norm.
        feature_maps: (N, C, H, W), the maps used for attention.
        attention: (N, H, W), non-negative, sums to 1 over H and W.
    """

    embeddings: Tensor
    feature_maps: Tensor
    attention: Tensor


class PoolAttention(nn.Module):
    """Attention logits from a learned direction in feature space, initialised with zeros.

    Each feature vector is scaled to a root mean square of 1 over its channels. The scale and the
    number of channels of the maps then do not affect how fast the attention becomes sharp. There
    is no bias because a softmax over cells cancels it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, trunk_output: TrunkOutput) -> Tensor:
        maps = at_least_float32(trunk_output.feature_maps)
        with torch.autocast(
            maps.device.type, enabled=False
        ):  # bf16 logits have errors of about 0.1
            scores: Tensor = F.conv2d(maps, self.score.weight.to(maps.dtype)).squeeze(1)
        length: Tensor = torch.linalg.vector_norm(maps, dim=1)
        logits: Tensor = scores * maps.shape[1] ** 0.5 / length.clamp_min(1e-6)
        return logits


class BorderAttention(nn.Module):
    """Attention logits `-6 B`, where B is the `border_similarity` of each cell.

    Cells that look like the image's own border count less. B keeps its absolute scale: if the
    border and the middle look alike, the weights are nearly uniform. There are no parameters.
    """

    def forward(self, trunk_output: TrunkOutput) -> Tensor:
        return -_BORDER_SHARPNESS * border_similarity(trunk_output.feature_maps)


class RelativeBorderAttention(nn.Module):
    """Attention logits `log sigmoid(4 z)`, which split every image into foreground and background.

    z is the negated `border_similarity`, standardised within each image. Use it if every image
    shows an object on a background, as drawings do. It also splits photographs that have no
    background.
    """

    def forward(self, trunk_output: TrunkOutput) -> Tensor:
        scores = foreground_scores(border_similarity(trunk_output.feature_maps))
        return F.logsigmoid(_RELATIVE_SHARPNESS * scores)


class Embedder(nn.Module):
    """Pooling, projection and L2 normalisation.

    With `pooling="backbone"` the embedding is the pooled feature of the backbone, which is
    trained. The projection is fitted afterwards (see :class:`Projection`) and then applied in
    every pass. With the other poolings the projection is a trained linear layer.

    Args:
        num_features: F of the pooled features, or channels C of the last stage for `"average"`.
        map_channels: channels C' of the maps used for attention.
        embedding_dim: largest number of dimensions D of the projected embeddings; None builds no
            projection.
        attention: weights of the cells. `"border"`: cells that look like the image's own border
            count less, on an absolute scale, see :class:`BorderAttention`; `"relative_border"`:
            the same, standardised within each image; `"pool"`: learned, starts uniform; `"none"`:
            uniform; `"distinctive"`: softmax(-B / 0.1), where B is the background score of each
            cell against reference images (after Li et al. 2020; the definition is our own), see
            `set_attention_references`; or a module that maps a `TrunkOutput` to (N, H', W') logits
            on the grid of its feature maps. None: `"border"` for the pooling of the backbone,
            `"relative_border"` for the covariance, `"pool"` for the average.
        norm: applied to average-pooled features (N, C), such as `Trunk.head_norm`.
        pooling: `"backbone"`: `TrunkOutput.pooled`; `"covariance"`: of the maps used for
            attention, see :class:`Covariance`; `"average"`: the mean of the last stage. The last
            two are weighted by attention.

    Attributes:
        embedding_dim: D of the embeddings that :meth:`forward` returns once the projection is
            fitted or trained.

    Raises:
        ValueError: for an unknown `attention` or `pooling`, or a dimension below 1.
    """

    def __init__(
        self,
        num_features: int,
        map_channels: int,
        embedding_dim: int | None = 512,
        attention: str | nn.Module | None = None,
        norm: nn.Module | None = None,
        pooling: str = "backbone",
    ) -> None:
        super().__init__()
        if pooling not in ("backbone", "average", "covariance"):
            raise InputError(
                f"pooling must be 'backbone', 'average' or 'covariance', got {pooling!r}"
            )
        if embedding_dim is not None and (not isinstance(embedding_dim, int) or embedding_dim < 1):
            raise InputError(f"embedding_dim must be None or at least 1, got {embedding_dim!r}")
        if attention is None:
            defaults = {"backbone": "border", "covariance": "relative_border", "average": "pool"}
            attention = defaults[pooling]
        self.map_channels = map_channels
        self.pooling = pooling
        self.covariance = Covariance(map_channels) if pooling == "covariance" else None
        # The covariance of a single cell is zero: every image would get the same embedding.
        self.least_cells = 1 if self.covariance is None else 2
        if self.covariance is not None:
            num_features, norm = self.covariance.num_features, None
        self.attention: nn.Module | None = None
        if isinstance(attention, nn.Module):
            self.attention = attention
            self.attention_name = "module"
        elif attention in _ATTENTIONS:
            if attention == "border":
                self.attention = BorderAttention()
            elif attention == "relative_border":
                self.attention = RelativeBorderAttention()
            elif attention == "pool":
                if pooling == "backbone":
                    raise InputError(
                        "attention='pool' is learned, and the backbone's own pooling does not use "
                        "it: give pooling='average' or 'covariance', or another attention"
                    )
                self.attention = PoolAttention(map_channels)
            self.attention_name = attention
        else:
            names = ", ".join(map(repr, _ATTENTIONS))
            raise InputError(f"attention must be {names} or a module, got {attention!r}")
        self.norm = nn.Identity() if norm is None else norm
        self.projection: nn.Module = nn.Identity()
        if embedding_dim is None:
            self.embedding_dim = num_features
        elif pooling == "backbone":
            self.projection = Projection(num_features, map_channels, embedding_dim)
            self.embedding_dim = self.projection.embedding_dim
        else:
            self.projection = nn.Linear(num_features, embedding_dim)
            self.embedding_dim = embedding_dim
        # Not a buffer: load_state_dict would reject another number of references.
        self.references = torch.empty(0)

    def forward(self, trunk_output: TrunkOutput) -> Tensor:
        """Return unit embeddings (N, D) of the output of a trunk."""
        if self.pooling == "backbone" and not self.is_fitted:
            return F.normalize(at_least_float32(self._own(trunk_output)), dim=1)
        embeddings: Tensor = self.forward_features(trunk_output).embeddings
        return embeddings

    @property
    def is_fitted(self) -> bool:
        """Return whether a fitted projection is applied to the embeddings."""
        return isinstance(self.projection, Projection) and self.projection.fitted

    def forward_features(self, trunk_output: TrunkOutput) -> EmbedderOutput:
        """Return the embeddings, and the feature maps and attention they are computed from."""
        pooled, attention = self.pool(trunk_output)
        if isinstance(self.projection, Projection):
            if self.projection.fitted:
                pooled = self.projection(pooled, trunk_output.feature_maps, attention)
        else:
            pooled = self.projection(pooled)
        embeddings = F.normalize(at_least_float32(pooled), dim=1)
        return EmbedderOutput(embeddings, trunk_output.feature_maps, attention)

    def pool(self, trunk_output: TrunkOutput) -> tuple[Tensor, Tensor]:
        """Return the pooled features (N, F) before projection, and the attention (N, H', W')."""
        features, maps = trunk_output.features, trunk_output.feature_maps
        attention = self._attention(trunk_output)
        if self.pooling == "backbone":
            return self._own(trunk_output), attention
        dtype = next((parameter.dtype for parameter in self.parameters()), None)
        if self.covariance is not None:
            pooled = self.covariance(maps, attention)
            return pooled.to(dtype or pooled.dtype), attention
        with torch.autocast(features.device.type, enabled=False):
            weights = resample_attention(attention, features.shape[-2:])
            pooled = torch.einsum("nchw,nhw->nc", at_least_float32(features), weights)
        pooled = self.norm(pooled.to(dtype or pooled.dtype))
        return pooled, attention

    def _own(self, trunk_output: TrunkOutput) -> Tensor:
        if trunk_output.pooled is not None:
            return trunk_output.pooled
        return at_least_float32(trunk_output.features).mean((2, 3))

    def set_attention_references(self, feature_maps: Tensor | None) -> None:
        """Set the reference images that `attention="distinctive"` compares each image with.

        A few dozen images of many kinds are enough. Without references the attention is uniform.

        Args:
            feature_maps: (M, C', H', W') maps from `TrunkOutput.feature_maps`, or None to remove
                the references.

        Raises:
            ValueError: if the attention is not `"distinctive"`, or the shape does not match.
        """
        if self.attention_name != "distinctive":
            raise InputError(
                f"attention={self.attention_name!r} uses no references: build with 'distinctive'"
            )
        if feature_maps is None:
            self.references = torch.empty(0)
            return
        if feature_maps.ndim != 4 or feature_maps.shape[1] != self.map_channels:
            raise InputError(
                f"feature_maps must be (M, {self.map_channels}, H, W), "
                f"got shape {tuple(feature_maps.shape)}"
            )
        places = at_least_float32(feature_maps.detach()).flatten(2).transpose(1, 2)
        device = next((parameter.device for parameter in self.parameters()), places.device)
        self.references = F.normalize(places, dim=2).contiguous().to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Embedder":
        super()._apply(fn, recurse)
        self.references = fn(self.references)  # .to() and .cuda() also move the references
        return self

    def get_extra_state(self) -> Tensor:
        return self.references

    def set_extra_state(self, state: Tensor) -> None:
        device = next((parameter.device for parameter in self.parameters()), state.device)
        self.references = state.to(device)

    def _attention(self, trunk_output: TrunkOutput) -> Tensor:
        maps = trunk_output.feature_maps
        n, _, height, width = maps.shape
        if self.attention is not None:
            logits = self.attention(trunk_output)
            if logits.shape != (n, height, width):
                raise InputError(
                    f"attention must give logits of shape {(n, height, width)}, the grid of the "
                    f"feature maps, got {tuple(logits.shape)}"
                )
        elif self.references.numel():
            logits = -background_score_against(maps, self.references) / _DISTINCTIVE_TEMPERATURE
        else:
            return at_least_float32(maps.detach()).new_full(
                (n, height, width), 1 / (height * width)
            )
        return at_least_float32(logits).flatten(1).softmax(dim=1).view(n, height, width)


def resample_attention(attention: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Resample attention to another grid of any size, weighted by area.

    The weight of each cell is divided among the new cells in proportion to the shared area. The
    sum is preserved, and a uniform map stays uniform.

    Args:
        attention: (N, H', W').
        size: (H, W) of the new grid.

    Returns:
        (N, H, W).
    """
    if attention.shape[-2:] == tuple(size):
        return attention
    rows = _overlap(attention.shape[-2], size[0], attention)
    columns = _overlap(attention.shape[-1], size[1], attention)
    return rows @ attention @ columns.T


def _overlap(old: int, new: int, like: Tensor) -> Tensor:
    """Return (new, old): the fraction of each old cell of a line that lies in each new cell."""
    left = torch.arange(new, device=like.device, dtype=like.dtype)[:, None] * (old / new)
    cell = torch.arange(old, device=like.device, dtype=like.dtype)[None]
    shared = torch.minimum(left + old / new, cell + 1) - torch.maximum(left, cell)
    return shared.clamp_min(0)


def background_score_against(
    feature_maps: Tensor, references: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Return how well each cell matches the references, on average.

    Args:
        feature_maps: (N, C, H, W).
        references: (M, P, C), unit vectors of the P cells of each of M images.
        chunk_size: number of pairs compared at once, see
            :func:`pml_tacl.functional.background_score`.

    Returns:
        (N, H, W) in [-1, 1]: mean over references of the best cosine similarity in each.
    """
    maps = at_least_float32(feature_maps)
    bank = references.to(maps).transpose(1, 2).unsqueeze(3)
    return background_score(maps, references=bank, chunk_size=chunk_size)
