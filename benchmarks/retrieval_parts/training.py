"""One training loop for every method: same network, views, batches, steps and seeds."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss, NTXentLoss, SelfSupervisedLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor
from torch.nn import functional as F

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    SurroundingsSwap,
)
from pml_tacl.functional import sample_at_points
from pml_tacl.transforms import cell_weights
from retrieval_parts.config import Config
from retrieval_parts.data import DEFAULT_CACHE, Pictures
from retrieval_parts.masks import picture_masks
from retrieval_parts.model import build
from retrieval_parts.scoring import embed_pictures, purity
from retrieval_parts.stml import SelfTaught
from retrieval_parts.views import RECIPES, BatchViews, Views

Watcher = Callable[["Training"], None]


@dataclass
class Training:
    """The state of a run; what a method needs beyond it is made in `train`.

    Attributes:
        model: the network that learns.
        teacher: its moving average, the network itself without one.
        labels: (N,) what the metric losses learn from, -1 for noise.
        centroids: (K, D) of them, None before the first clustering.
        history: one entry for each clustering: step, clusters, purity, loss since the last.
    """

    config: Config
    pictures: Pictures
    model: AttentionEmbedder
    teacher: AttentionEmbedder
    views: BatchViews
    labels: Tensor
    generator: torch.Generator
    centroids: Tensor | None = None
    embeddings: Tensor | None = None
    background: Tensor | None = None
    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds_of_steps: float = 0.0

    @property
    def result(self) -> AttentionEmbedder:
        """The network that is measured."""
        return self.teacher if self.config.evaluate_teacher else self.model


def start(config: Config, pictures: Pictures, cache: Path = DEFAULT_CACHE) -> Training:
    """A run before its first step; all randomness comes from the configuration's seed."""
    config = config.resolved
    model = build(config, cache)
    with torch.no_grad():
        probe = torch.zeros(1, 3, config.size, config.size)
        grid = model.trunk(probe).feature_maps.shape[-1]
    data = model.data_config
    views = BatchViews(RECIPES[config.views], grid, tuple(data["mean"]), tuple(data["std"]))
    needs_teacher = config.ema > 0 or config.metric == "stml"
    teacher = copy.deepcopy(model).requires_grad_(False) if needs_teacher else model
    labels = pictures.labels if config.labels == "true" else torch.arange(len(pictures.labels))
    generator = torch.Generator().manual_seed(config.seed)
    return Training(config, pictures, model, teacher, views, labels, generator)


def train(
    config: Config,
    pictures: Pictures,
    cache: Path = DEFAULT_CACHE,
    watch: Watcher | None = None,
) -> Training:
    """Train a network as the configuration says.

    Args:
        config: of the run.
        pictures: the training third; its labels are read for `labels="true"` and for purity.
        cache: folder of the weights.
        watch: called at each clustering and at the end.
    """
    torch.manual_seed(config.seed)
    run = start(config, pictures, cache)
    config = run.config
    losses = Losses(run)
    parameters = [p for p in (*run.model.parameters(), *losses.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    schedule = None
    if config.schedule == "onecycle" and config.steps:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.lr, total_steps=config.steps + 1, pct_start=0.1
        )
    run.model.train()
    for run.step in range(config.steps):
        if _is_due(run):
            recluster(run, losses)
            if watch is not None:
                watch(run)
        begin = time.perf_counter()
        loss = losses(draw(run))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if run.teacher is not run.model:
            momentum = config.stml_momentum if config.metric == "stml" else config.ema
            follow(run.teacher, run.model, momentum)
            losses.follow(momentum)
        run.losses.append(float(loss.detach()))
        run.seconds_of_steps += time.perf_counter() - begin
    run.step = config.steps
    if watch is not None:
        watch(run)
    return run


def _is_due(run: Training) -> bool:
    since = run.step - run.config.warmup
    return run.step == 0 or (since >= 0 and since % run.config.recluster == 0)


@torch.no_grad()
def recluster(run: Training, losses: "Losses") -> None:
    """New labels, centres, masks and neighbours from the network as it is."""
    config = run.config
    warm = run.step >= config.warmup
    grouped = config.metric == "ms" or config.ccl > 0 or config.tac > 0
    uses_clusters = config.ccl > 0 or (grouped and config.labels == "clusters")
    stale = run.background is None or (config.mask_from == "recluster" and warm)
    if config.swap > 0 and config.mask != "centred" and stale:
        run.background = _masks(run, run.labels if run.centroids is not None else None)
    if config.metric == "stml" or (warm and uses_clusters):
        run.embeddings = _embeddings(run)
    if not (warm and uses_clusters):
        return
    if config.labels == "true":
        count = int(run.pictures.labels.max()) + 1
        sums = torch.zeros(count, run.embeddings.shape[1])
        run.centroids = F.normalize(sums.index_add_(0, run.labels, run.embeddings))
    else:
        labeler = KMeansPseudoLabeler(number_of_clusters(run), seed=config.seed)
        found = labeler(run.embeddings, run.centroids)
        run.labels, run.centroids = found.labels, found.centroids
        if config.max_ambiguity > 0:
            own, other = (1 - run.embeddings @ run.centroids.T).topk(2, 1, largest=False)[0].T
            run.labels = torch.where(own <= config.max_ambiguity * other, run.labels, -1)
    losses.clustering.set_centroids(run.centroids)
    sure = run.labels >= 0
    run.history.append(
        {
            "step": run.step,
            "clusters": len(run.centroids),
            "sure": float(sure.float().mean()),
            "purity": purity(run.labels[sure], run.pictures.labels[sure]),
            "loss": float(torch.tensor(run.losses[-config.recluster :]).mean()),
        }
    )


def number_of_clusters(run: Training) -> Any:
    """The rule of the configuration, as `KMeansPseudoLabeler` takes it."""
    rule = run.config.num_clusters
    if rule.endswith("classes"):
        return int(rule.removesuffix("classes") or 1) * (int(run.pictures.labels.max()) + 1)
    return rule if rule == "auto" else int(rule)


def _masks(run: Training, labels: Tensor | None) -> Tensor:
    config = run.config
    return picture_masks(
        run.teacher,
        run.pictures.images,
        run.views.normalise,
        labels,
        config.mask,
        index=config.mask_index,
        scale=config.mask_size,
        references=config.mask_references,
        seed=config.seed,
    )


def _embeddings(run: Training) -> Tensor:
    """(N, D) of the pictures as they are, or averaged over their swapped views."""
    images, count = run.pictures.images, run.config.cluster_views
    if count <= 1:
        return embed_pictures(run.teacher, images, run.views.normalise)
    total = torch.zeros(())
    for _ in range(count):
        total = total + embed_pictures(
            run.teacher, images, lambda part: part, prepare=lambda rows: _swapped(run, rows)
        )
    return F.normalize(total)


def _swapped(run: Training, rows: Tensor) -> Tensor:
    pixels = run.views.normalise(run.pictures.images[rows].float() / 255)
    maps = None if run.background is None else run.background[rows]
    return make_swap(run.config, probability=1.0)(pixels, maps, run.generator).images


def make_swap(config: Config, probability: float | None = None) -> SurroundingsSwap:
    """The surroundings swap of a run; every mask but the centred one comes as a map."""
    return SurroundingsSwap(
        config.swap if probability is None else probability,
        "centred" if config.mask == "centred" else "distinctive",
        sharpness=config.sharpness,
        sigma=config.sigma,
    )


@dataclass
class Batch:
    """N pictures: two views, rows, labels, and how far each cell of the first was kept."""

    views: Views
    rows: Tensor
    labels: Tensor
    weights: Tensor | None

    @property
    def images(self) -> Tensor:
        both = torch.cat([self.views.first, self.views.second])
        return both.contiguous(memory_format=torch.channels_last)


def draw(run: Training) -> Batch:
    """The next batch, its surroundings swapped if the run does that."""
    config = run.config
    rows = draw_rows(run)
    maps = None if run.background is None else run.background[rows]
    views = run.views(run.pictures.images[rows], run.generator, maps)
    weights = None
    if config.swap > 0:
        swap = make_swap(config)
        first = swap(views.first, views.first_maps, run.generator)
        second = swap(views.second, views.second_maps, run.generator)
        views = views._replace(first=first.images, second=second.images)
        if config.tac_masked:
            kept, _ = sample_at_points(second.masks, views.points)
            weights = cell_weights(first.masks, run.views.grid) * kept
    return Batch(views, rows, run.labels[rows], weights)


def draw_rows(run: Training) -> Tensor:
    """Rows of a batch: whole groups of a cluster (or of neighbours), or any pictures."""
    config, generator = run.config, run.generator
    count = len(run.pictures.images)
    if config.metric == "stml" and run.embeddings is not None:
        # After the paper: some pictures, each with its nearest by the teacher's embedding.
        queries = torch.randperm(count, generator=generator)[: config.batch // config.per_cluster]
        near = run.embeddings[queries] @ run.embeddings.T
        return near.topk(config.per_cluster, 1).indices.flatten()
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


@torch.no_grad()
def follow(teacher: torch.nn.Module, model: torch.nn.Module, momentum: float) -> None:
    """One step of the moving average; buffers (statistics) are copied."""
    for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs, 1 - momentum)
    for mine, theirs in zip(teacher.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


class Losses:
    """The objective of a run, of both views of a batch."""

    def __init__(self, run: Training) -> None:
        config = run.config
        self.run = run
        self.metric = MultiSimilarityLoss()
        self.miner = MultiSimilarityMiner() if config.miner == "ms" else None
        self.clustering = ContrastiveClusteringLoss(config.ccl_margin, config.ccl_negatives)
        self.attention = AttentionConsistencyLoss(config.tac_temperature or None)
        self.pairs = AttentionConsistencyMiner(config.tac_pairs)
        self.views_loss = SelfSupervisedLoss(NTXentLoss(config.ntxent_temperature))
        self.self_taught = SelfTaught(run) if config.metric == "stml" else None

    def parameters(self) -> list[torch.nn.Parameter]:
        return [] if self.self_taught is None else list(self.self_taught.head.parameters())

    def follow(self, momentum: float) -> None:
        if self.self_taught is not None:
            follow(self.self_taught.teacher_head, self.self_taught.head, momentum)

    def __call__(self, batch: Batch) -> Tensor:
        config, model = self.run.config, self.run.model
        output = model.trunk(batch.images)
        embeddings = model.embedder(output)
        labels = torch.cat([batch.labels] * 2)
        total = embeddings.sum() * 0
        if config.metric == "ms":
            mined = None if self.miner is None else self.miner(embeddings, labels)
            total = total + self.metric(embeddings, labels, mined)
        elif config.metric == "ntxent":
            total = total + self.views_loss(*embeddings.chunk(2))
        elif self.self_taught is not None:
            total = total + self.self_taught(output, embeddings, batch)
        if config.ccl > 0:
            total = total + config.ccl * self.clustering(embeddings, labels)
        if config.tac > 0:
            total = total + config.tac * self._attention(output.feature_maps, batch)
        return total

    def _attention(self, maps: Tensor, batch: Batch) -> Tensor:
        first, second = maps.chunk(2)
        if self.run.centroids is None:  # a picture is matched with itself
            index = torch.arange(len(batch.labels))
            pairs: Any = (index, index, index[:0], index[:0])
        else:
            pairs = self.pairs(first, batch.labels)
        points = batch.views.points
        return self.attention(first, second, points, batch.labels, pairs, batch.weights)
