"""State of a run, which depends only on its configuration and seed."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pml_tacl import AttentionEmbedder
from retrieval_parts.config import Config
from retrieval_parts.data import DEFAULT_CACHE, Images
from retrieval_parts.model import build
from retrieval_parts.views import RECIPES, BatchViews


@dataclass
class Training:
    """State of a run; `train` adds what a method needs in addition.

    Attributes:
        model: the network that is trained.
        teacher: its moving average, or the network itself.
        labels: (N,) labels of the metric losses, -1 for noise; on the CPU, as those of the images.
        centroids: (K, D) centroids of the labels, None before the first clustering.
        history: one entry for each clustering: step, clusters, purity, loss since the last one.
    """

    config: Config
    images: Images
    model: AttentionEmbedder
    teacher: AttentionEmbedder
    views: BatchViews
    labels: Tensor
    generator: torch.Generator
    centroids: Tensor | None = None
    embeddings: Tensor | None = None
    background: Tensor | None = None
    untrained: dict[str, Any] = field(default_factory=dict)  # state of the network at the start
    kept: dict[str, Any] | None = None  # the guard's choice: step, criterion, state of the model
    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds_of_steps: float = 0.0

    @property
    def device(self) -> torch.device:
        """Return the device of the network, the images and the views."""
        return self.images.images.device

    @property
    def result(self) -> AttentionEmbedder:
        """Return the network to measure."""
        return self.teacher if self.config.evaluate_teacher else self.model


def start(
    config: Config,
    images: Images,
    cache: Path = DEFAULT_CACHE,
    device: torch.device | None = None,
) -> Training:
    """Return a run before its first step; all random numbers depend on the configured seed."""
    config = config.for_count(len(images.images))
    model = build(config, cache)
    with torch.no_grad():
        probe = torch.zeros(1, 3, config.size, config.size)
        grid = model.trunk(probe).feature_maps.shape[-1]
    data = model.data_config
    offset = model.cell_offset(config.size) if config.cell_offset else (0.0, 0.0)
    norm = (tuple(data["mean"]), tuple(data["std"]))
    device = device or torch.device("cpu")
    model = model.to(device)
    images = images._replace(images=images.images.to(device))
    views = BatchViews(RECIPES[config.views], grid, *norm, offset, device)
    if config.pooling == "covariance" and config.whiten:
        model.fit_projection(
            [views.normalise(part.float() / 255) for part in images.images.split(128)],
            progress=False,
        )
    needs_teacher = config.ema > 0 or config.metric == "stml"
    teacher = copy.deepcopy(model).requires_grad_(False) if needs_teacher else model
    labels = images.labels if config.labels == "true" else torch.arange(len(images.labels))
    generator = torch.Generator().manual_seed(config.seed)
    untrained = copy.deepcopy(model.state_dict())
    return Training(config, images, model, teacher, views, labels, generator, untrained=untrained)


@torch.no_grad()
def follow(teacher: torch.nn.Module, model: torch.nn.Module, momentum: float) -> None:
    """Update the moving average by one step, and copy buffers (statistics)."""
    for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs, 1 - momentum)
    for mine, theirs in zip(teacher.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
