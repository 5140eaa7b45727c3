"""From feature maps to unit embeddings through an attention map."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pml_tacl.functional import commonness
from pml_tacl.models.trunk import TrunkOutput

_DISTINCTIVE_TEMPERATURE = 0.1


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


class Embedder(nn.Module):
    """Attention pooling, linear projection and L2 normalisation.

    Args:
        num_features: channels C of the last stage, which are pooled.
        map_channels: channels C' of the maps that carry attention.
        embedding_dim: D of the embeddings; None leaves the projection out, D = C.
        attention: `"pool"`: learned, starts exactly as average pooling; `"none"`: average pooling;
            `"distinctive"`: softmax(-B / 0.1), with B the commonness of each place among reference
            images (after Li et al. 2020; definition ours), see `set_attention_references`; or a
            module that maps a `TrunkOutput` to (N, H', W') logits on the grid of its feature maps.
        norm: applied to the pooled features (N, C), such as `Trunk.head_norm`.

    Raises:
        ValueError: for another `attention` or a dimension below 1.
    """

    def __init__(
        self,
        num_features: int,
        map_channels: int,
        embedding_dim: int | None = 512,
        attention: str | nn.Module = "pool",
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim is not None and (not isinstance(embedding_dim, int) or embedding_dim < 1):
            raise ValueError(f"embedding_dim must be None or at least 1, got {embedding_dim!r}")
        self.map_channels = map_channels
        self.embedding_dim = embedding_dim or num_features
        self.attention: nn.Module | None = None
        if isinstance(attention, nn.Module):
            self.attention = attention
            self.attention_name = "module"
        elif attention in ("pool", "distinctive", "none"):
            self.attention = PoolAttention(map_channels) if attention == "pool" else None
            self.attention_name = attention
        else:
            raise ValueError(
                f"attention must be 'pool', 'distinctive', 'none' or a module, got {attention!r}"
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
        features, maps = trunk_output
        attention = self._attention(trunk_output)
        with torch.autocast(features.device.type, enabled=False):
            weights = resample_attention(attention, features.shape[-2:])
            pooled = torch.einsum("nchw,nhw->nc", at_least_float32(features), weights)
        dtype = next((parameter.dtype for parameter in self.parameters()), pooled.dtype)
        pooled = self.projection(self.norm(pooled.to(dtype)))
        return EmbedderOutput(F.normalize(at_least_float32(pooled), dim=1), maps, attention)

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
