"""From feature maps to unit embeddings through an attention map."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pml_tacl.functional import border_similarity, commonness
from pml_tacl.functional.background import figure_scores
from pml_tacl.models.covariance import Covariance
from pml_tacl.models.trunk import TrunkOutput

_DISTINCTIVE_TEMPERATURE = 0.1
_BORDER_SHARPNESS = 4.0


class EmbedderOutput(NamedTuple):
    """What `AttentionEmbedder.forward_features` returns.

    Attributes:
        embeddings: (N, D), unit norm.
        feature_maps: (N, C, H, W), the maps that carry attention.
        attention: (N, H, W), non-negative, sums to 1 over H and W.
    """

    embeddings: Tensor
    feature_maps: Tensor
    attention: Tensor


def chosen_pooling(pooling: str | None, embedding_dim: int | None) -> str:
    """The pooling that None stands for, or the one asked for; ValueError if there is no such."""
    if pooling is None:
        return "average" if embedding_dim is None else "covariance"
    if pooling not in ("average", "covariance"):
        raise ValueError(f"pooling must be 'average' or 'covariance', got {pooling!r}")
    return pooling


class PoolAttention(nn.Module):
    """Attention logits as a learned direction in feature space, zero at the start.

    Feature vectors enter with a root mean square of 1 over their channels, so that neither the
    scale nor the width of a backbone's maps sets how quickly attention becomes sharp. No bias:
    softmax over places would ignore it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, trunk_output: TrunkOutput) -> Tensor:
        maps = at_least_float32(trunk_output.feature_maps)
        with torch.autocast(maps.device.type, enabled=False):  # logits in bf16 are off by tenths
            scores: Tensor = F.conv2d(maps, self.score.weight.to(maps.dtype)).squeeze(1)
        length: Tensor = torch.linalg.vector_norm(maps, dim=1)
        logits: Tensor = scores * maps.shape[1] ** 0.5 / length.clamp_min(1e-6)
        return logits


class BorderAttention(nn.Module):
    """Attention logits `log sigmoid(4 z)`: what does not look like the image's own border.

    z is the negated `border_similarity`, standardised within each image. Nothing is learned.
    """

    def forward(self, trunk_output: TrunkOutput) -> Tensor:
        scores = figure_scores(border_similarity(trunk_output.feature_maps))
        return F.logsigmoid(_BORDER_SHARPNESS * scores)


class Embedder(nn.Module):
    """Attention pooling, linear projection and L2 normalisation.

    Args:
        num_features: channels C of the last stage, which average pooling takes.
        map_channels: channels C' of the maps that carry attention.
        embedding_dim: D of the embeddings; None leaves the projection out, and D is the number of
            pooled features.
        attention: `"border"`: places that do not look like the image's own border, nothing
            learned, see :func:`pml_tacl.functional.border_similarity`; `"pool"`: learned, starts
            uniform; `"none"`: uniform; None: `"border"` for covariance, `"pool"` for the average;
            `"distinctive"`: softmax(-B / 0.1), with B the commonness of each place among reference
            images (after Li et al. 2020; definition ours), see `set_attention_references`; or a
            module that maps a `TrunkOutput` to (N, H', W') logits on the grid of its feature maps.
        norm: applied to average-pooled features (N, C), such as `Trunk.head_norm`.
        pooling: `"covariance"`: of the maps that carry attention, see :class:`Covariance`;
            `"average"`: the mean of the last stage. Both weighted by attention. None: the
            average where there is no projection, else the covariance.

    Raises:
        ValueError: for another `attention` or `pooling`, or a dimension below 1.
    """

    def __init__(
        self,
        num_features: int,
        map_channels: int,
        embedding_dim: int | None = 512,
        attention: str | nn.Module | None = None,
        norm: nn.Module | None = None,
        pooling: str | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim is not None and (not isinstance(embedding_dim, int) or embedding_dim < 1):
            raise ValueError(f"embedding_dim must be None or at least 1, got {embedding_dim!r}")
        pooling = chosen_pooling(pooling, embedding_dim)
        if attention is None:
            attention = "border" if pooling == "covariance" else "pool"
        self.map_channels = map_channels
        self.pooling = pooling
        self.covariance = Covariance(map_channels) if pooling == "covariance" else None
        # A single place has no covariance: every image would get the same embedding.
        self.least_cells = 1 if self.covariance is None else 2
        if self.covariance is not None:
            num_features, norm = self.covariance.num_features, None
        self.embedding_dim = embedding_dim or num_features
        self.attention: nn.Module | None = None
        if isinstance(attention, nn.Module):
            self.attention = attention
            self.attention_name = "module"
        elif attention in ("border", "pool", "distinctive", "none"):
            if attention == "border":
                self.attention = BorderAttention()
            elif attention == "pool":
                self.attention = PoolAttention(map_channels)
            self.attention_name = attention
        else:
            raise ValueError(
                "attention must be 'border', 'pool', 'distinctive', 'none' or a module, "
                f"got {attention!r}"
            )
        self.norm = nn.Identity() if norm is None else norm
        self.projection = nn.Linear(num_features, embedding_dim) if embedding_dim else nn.Identity()
        # No buffer: its size changes with each new bank, which load_state_dict would refuse.
        self.references = torch.empty(0)

    def forward(self, trunk_output: TrunkOutput) -> Tensor:
        """Unit embeddings (N, D) of a trunk's output."""
        embeddings: Tensor = self.forward_features(trunk_output).embeddings
        return embeddings

    def forward_features(self, trunk_output: TrunkOutput) -> EmbedderOutput:
        """Embeddings with the maps and the attention that they come from."""
        pooled, attention = self.pool(trunk_output)
        embeddings = F.normalize(at_least_float32(self.projection(pooled)), dim=1)
        return EmbedderOutput(embeddings, trunk_output.feature_maps, attention)

    def pool(self, trunk_output: TrunkOutput) -> tuple[Tensor, Tensor]:
        """What is projected, (N, F), and the attention (N, H', W') that it is weighted by."""
        features, maps = trunk_output
        attention = self._attention(trunk_output)
        dtype = next((parameter.dtype for parameter in self.parameters()), None)
        if self.covariance is not None:
            pooled = self.covariance(maps, attention)
            return pooled.to(dtype or pooled.dtype), attention
        with torch.autocast(features.device.type, enabled=False):
            weights = resample_attention(attention, features.shape[-2:])
            pooled = torch.einsum("nchw,nhw->nc", at_least_float32(features), weights)
        pooled = self.norm(pooled.to(dtype or pooled.dtype))
        return pooled, attention

    def set_attention_references(self, feature_maps: Tensor | None) -> None:
        """Sets the bank of images against which `attention="distinctive"` looks for the common.

        A few dozen images of many kinds do; without a bank pooling is average pooling.

        Args:
            feature_maps: (M, C', H', W') maps of `TrunkOutput.feature_maps`, or None for no bank.

        Raises:
            ValueError: if the attention is another, or the shape does not fit.
        """
        if self.attention_name != "distinctive":
            raise ValueError(
                f"attention={self.attention_name!r} uses no references: build with 'distinctive'"
            )
        if feature_maps is None:
            self.references = torch.empty(0)
            return
        if feature_maps.ndim != 4 or feature_maps.shape[1] != self.map_channels:
            raise ValueError(
                f"feature_maps must be (M, {self.map_channels}, H, W), "
                f"got shape {tuple(feature_maps.shape)}"
            )
        places = at_least_float32(feature_maps.detach()).flatten(2).transpose(1, 2)
        device = next((parameter.device for parameter in self.parameters()), places.device)
        self.references = F.normalize(places, dim=2).contiguous().to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Embedder":
        super()._apply(fn, recurse)
        self.references = fn(self.references)  # .to() and .cuda() take the bank along
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
                raise ValueError(
                    f"attention must give logits of shape {(n, height, width)}, the grid of the "
                    f"feature maps, got {tuple(logits.shape)}"
                )
        elif self.references.numel():
            logits = -commonness_against(maps, self.references) / _DISTINCTIVE_TEMPERATURE
        else:
            return at_least_float32(maps.detach()).new_full(
                (n, height, width), 1 / (height * width)
            )
        return at_least_float32(logits).flatten(1).softmax(dim=1).view(n, height, width)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, anything wider as it is."""
    return x if x.dtype == torch.float64 else x.float()


def resample_attention(attention: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Attention on another grid by area, coarser or finer, divisor or not.

    Each cell's weight is split by the area that it shares with each new cell: sums stay as they
    are, and a uniform map stays uniform.

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
    """(new, old): the share of each old cell of a line that lies in each new cell."""
    left = torch.arange(new, device=like.device, dtype=like.dtype)[:, None] * (old / new)
    cell = torch.arange(old, device=like.device, dtype=like.dtype)[None]
    shared = torch.minimum(left + old / new, cell + 1) - torch.maximum(left, cell)
    return shared.clamp_min(0)


def commonness_against(
    feature_maps: Tensor, references: Tensor, chunk_size: int | None = None
) -> Tensor:
    """How well each place is found in a bank of references, on average.

    Args:
        feature_maps: (N, C, H, W).
        references: (M, P, C), unit vectors of the P places of each of M images.
        chunk_size: pairs compared at once, as of :func:`pml_tacl.functional.commonness`.

    Returns:
        (N, H, W) in [-1, 1]: mean over references of the best cosine similarity in each.
    """
    maps = at_least_float32(feature_maps)
    bank = references.to(maps).transpose(1, 2).unsqueeze(3)
    return commonness(maps, references=bank, chunk_size=chunk_size)
