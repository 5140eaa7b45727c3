"""Training loop of all methods, with the same network, views, batches, steps and seeds."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from retrieval_parts.batches import draw
from retrieval_parts.clusters import recluster
from retrieval_parts.config import Config
from retrieval_parts.data import DEFAULT_CACHE, Images
from retrieval_parts.guard import look
from retrieval_parts.objective import Losses
from retrieval_parts.state import Training, follow, start

Watcher = Callable[[Training], None]


def train(
    config: Config,
    images: Images,
    cache: Path = DEFAULT_CACHE,
    watch: Watcher | None = None,
    device: torch.device | None = None,
) -> Training:
    """Train a network as the configuration says.

    Args:
        config: configuration of the run.
        images: the training third; its labels are used for `labels="true"` and for purity.
        cache: folder of the weights.
        watch: called at each clustering and at the end.
        device: of the network and the images; None is the CPU. Random numbers are those of the
            CPU on every device.
    """
    torch.manual_seed(config.seed)
    run = start(config, images, cache, device)
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
            look(run, run.embeddings if run.centroids is not None else None)
            if watch is not None:
                watch(run)
        begin = time.perf_counter()
        loss = losses(draw(run))
        optimizer.zero_grad()
        loss.backward()
        losses.move_centroids()
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
    look(run, None)
    if watch is not None:
        watch(run)
    return run


def _is_due(run: Training) -> bool:
    since = run.step - run.config.warmup
    return run.step == 0 or (since >= 0 and since % run.config.recluster == 0)
