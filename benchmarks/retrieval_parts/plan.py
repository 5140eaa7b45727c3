"""Lists of runs: all runs, and a selection that takes five minutes."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from retrieval_parts.config import FIRST, METHODS, Config, make
from retrieval_parts.photos import PHOTOS
from retrieval_parts.running import run

SEEDS = (0, 1, 2)
# Characters are nothing that a network of photographs helps with, and hard emoji are not learned
# from scratch in minutes.
SETTINGS = (("glyphs", "scratch"), ("openemoji", "pretrained"), ("openemoji-busy", "pretrained"))
LARGER = 160  # one more size, for the pretrained network on the hardest set
_LARGER_METHODS = ("zero_shot", "ms", "full", "supervised")


def everything(split: str = "test", data_root: Path | None = None) -> list[Config]:
    """Return all methods on all data sets, in the regime of the data set, for all seeds.

    The larger size is run once. The photographs of `data_root` use the pretrained network.
    """
    further = [name for name in METHODS if name not in FIRST]
    configs = [
        make(method, dataset=dataset, regime=regime, seed=seed, split=split)
        for methods in (FIRST, further)
        for seed in SEEDS  # seeds before methods, so that an interrupted run has complete tables
        for method in methods
        for dataset, regime in SETTINGS
    ]
    for name in PHOTOS:
        if data_root is not None and (data_root / name).is_dir():
            configs += [
                make(method, dataset=name, seed=seed, split=split)
                for seed in SEEDS
                for method in METHODS
            ]
    configs += [
        make(method, dataset=SETTINGS[-1][0], size=LARGER, split=split)
        for method in _LARGER_METHODS
    ]
    return without_repeats(configs)


def five_minutes() -> list[Config]:
    """Return short runs of the small network on Glyphs, with one seed, on validation data."""
    methods = ("zero_shot", "ms", "full", "ntxent", "supervised")
    return [make(m, dataset="glyphs", regime="scratch", steps=150) for m in methods]


def without_repeats(configs: Iterable[Config]) -> list[Config]:
    return list({config.key: config for config in configs}.values())


def run_all(
    configs: list[Config],
    results: Path,
    cache: Path,
    data_root: Path | None = None,
    jobs: int = 1,
    device: torch.device | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield results when they are complete; existing results are read from files.

    Args:
        configs: configurations of the runs.
        results: folder of the results.
        cache: folder of archives, images and weights.
        data_root: folder of the photograph data sets.
        jobs: number of runs at a time, each in a process with its share of the cores.
        device: of the networks; None is the CPU.
    """
    arguments = ([config, results, cache, data_root, device] for config in configs)
    if jobs <= 1:
        yield from map(_one, arguments)
        return
    # torch and faiss read this when a new process loads them, so processes must be spawned.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # Otherwise glibc returns each large tensor to the system, which costs a third of a step.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(_one, arguments)


def _one(arguments: list[Any]) -> dict[str, Any]:
    config, results, cache, data_root, device = arguments
    return run(config, results, cache, data_root=data_root, device=device)
