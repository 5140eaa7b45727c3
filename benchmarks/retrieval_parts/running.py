"""Run a configuration once, and store the result in a file named by it."""

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pml_tacl.cli import run_folder as runs
from pml_tacl.models.projection import principal_basis
from pml_tacl.trainers.guard import mean_state
from pml_tacl.trainers.recipe import PRETRAINED
from pml_tacl.utils.modes import evaluating
from retrieval_parts import data
from retrieval_parts.config import Config, of_one_training
from retrieval_parts.scoring import forget_peak, measure, peak_bytes
from retrieval_parts.state import Training
from retrieval_parts.training import train


@lru_cache(maxsize=4)
def load(
    dataset: str, split: str, size: int, cache: Path, limit: int, data_root: Path | None
) -> data.Images:
    return data.load(dataset, split, size, cache, None if limit < 0 else limit, data_root)


def run(
    config: Config,
    results: Path | None,
    cache: Path = data.DEFAULT_CACHE,
    *,
    data_root: Path | None = None,
    verbose: bool = False,
    watch_split: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train and measure, or read the result of an earlier call.

    Args:
        config: configuration of the run.
        results: folder of the results; None keeps none.
        cache: folder of archives, images and weights.
        data_root: folder of the photograph data sets.
        verbose: print each clustering.
        watch_split: also measure the split at each clustering (slow; do not use it to select a
            step).
        device: of the network; None is the CPU.

    Returns:
        {"key", "config", "metrics", "history", "cost", "versions"}.
    """
    config = config.resolved
    path = None if results is None else results / f"{config.key}.json"
    if path is not None and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    photographs = config.recipe == "photographs" and config.dataset not in data.NAMES
    train_split = "train-for-test" if photographs and config.split == "test" else "train"
    images = load(config.dataset, train_split, config.size, cache, config.limit, data_root)
    measured = load(config.dataset, config.split, config.size, cache, config.limit, data_root)
    curve = []

    def watch(training: Training) -> None:
        if watch_split:
            found = measure(training.result, measured, training.views.normalise)
            curve.append({"step": training.step, **found})
        if verbose and training.history:
            print(training.history[-1], curve[-1:] or "", flush=True)

    forget_peak()
    begin = time.perf_counter()
    training = train(config, images, cache, watch, device)
    seconds = time.perf_counter() - begin
    last = copy.deepcopy(training.result.state_dict())
    found = []
    for one in of_one_training(config):
        model = training.result
        state = training.kept["state"] if one.guard and training.kept else last
        if one.averaged:
            state = mean_state(training.untrained, state, PRETRAINED.trained_share)
        model.load_state_dict(state)
        model.reset_projection()
        if one.after != "none":
            model.fit_projection(normalised(training, images), progress=False)
        if one.after == "whitened":
            whiten_whole(training, images)
        result = {
            "key": one.key,
            "config": asdict(one),
            "metrics": measure(model, measured, training.views.normalise),
            "history": training.history,
            "curve": curve,
            "cost": {
                "seconds": seconds,
                "seconds_a_step": training.seconds_of_steps / max(1, training.config.steps),
                "peak_bytes": peak_bytes(),
                "threads": torch.get_num_threads(),
                "device": str(training.device),
            },
            "versions": runs.versions(),
        }
        if one.guard and training.kept is not None:
            result["kept"] = {key: training.kept[key] for key in ("step", "mutual")}
        if results is not None:
            runs.write_json(results / f"{one.key}.json", result)
        found.append(result)
    return found[0]


@torch.no_grad()
def whiten_whole(training: Training, images: data.Images) -> None:
    """Replace a fitted projection by PCA whitening of only the pooled feature."""
    model = training.result
    with evaluating(model):
        found = [model.trunk(x).pooled for x in normalised(training, images)]
    pooled = [F.normalize(part).double() for part in found]
    features = torch.cat(pooled)
    centred = features - features.mean(0)
    projection = model.embedder.projection
    basis = principal_basis(
        centred.T @ centred / len(centred), projection.whole_basis.shape[1], len(centred), 0.5
    )
    projection.whole_basis.copy_(basis)
    projection.parts_basis.zero_()


def normalised(training: Training, images: data.Images) -> Iterator[torch.Tensor]:
    """Yield all images, normalised for the network."""
    for part in images.images.split(128):
        pixels = training.views.normalise(part.float() / 255)
        yield pixels.contiguous(memory_format=torch.channels_last)
