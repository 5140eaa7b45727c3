"""Cost terms and their measurements."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from scaling_parts import runs
from scaling_parts.config import ITERATIONS, NPROBE
from scaling_parts.runs import Run, lists


class Term(NamedTuple):
    """Cost term: the step to time, how its work grows, and the sizes (N, k) to measure."""

    run: Callable[[int, int], Run]
    work: Callable[[float, float], float]
    sizes: list[tuple[int, int]]
    says: str
    memory: bool = False  # whether its peak memory grows with its work


def make_images(n: float, _: float) -> float:
    return n


def products(n: float, k: float) -> float:
    return n * k


TERMS = {
    "decode and two views": Term(
        runs.decode, make_images, [(40, 0), (80, 0), (240, 0)], "images, one core"
    ),
    "embedding": Term(runs.embed, make_images, [(16, 0), (40, 0), (96, 0)], "images"),
    "training step": Term(
        runs.train, make_images, [(4, 0), (8, 0), (16, 0)], "images, two views each", True
    ),
    "k-means": Term(
        runs.kmeans,
        products,
        [(10_000, 200), (20_000, 400), (60_000, 1_000)],
        f"points x clusters, {ITERATIONS} iterations",
    ),
    "assignment": Term(
        runs.assign,
        products,
        [(20_000, 1_000), (40_000, 2_000), (80_000, 4_000)],
        "images x clusters",
    ),
    "two-level k-means": Term(
        runs.hierarchy,
        lambda n, k: n * k**0.5,
        [(10_000, 400), (20_000, 900), (60_000, 3_600)],
        "images x root of clusters",
    ),
    "store and read embeddings": Term(
        runs.store, make_images, [(20_000, 0), (60_000, 0), (200_000, 0)], "images"
    ),
    "order of an epoch": Term(
        runs.draw,
        make_images,
        [(150_000, 15_000), (400_000, 40_000), (1_500_000, 150_000)],
        "images",
        True,
    ),
    "list of files": Term(
        runs.listing, make_images, [(50_000, 0), (100_000, 0), (500_000, 0)], "images", True
    ),
    "exact search, all against all": Term(
        runs.search, lambda n, k: n * n, [(8_000, 0), (16_000, 0), (40_000, 0)], "images squared"
    ),
    "IVF search, all against all": Term(
        runs.ivf,
        lambda n, k: n * (lists(n) + NPROBE * n / lists(n)),
        [(10_000, 0), (30_000, 0), (80_000, 0)],
        "images x vectors compared",
    ),
}


def peak(reset: bool = False) -> int:
    """Return the peak memory of this process in bytes since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def measure(name: str, count: int, clusters: int) -> dict[str, float]:
    torch.manual_seed(0)
    run = TERMS[name].run(count, clusters)
    before = peak(reset=True)
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    held = peak() - before
    del kept
    return {"n": count, "k": clusters, "seconds": seconds, "bytes": held}
