"""Fit lines to the measurements, and extrapolate them to more images."""

import math
from typing import NamedTuple

import numpy as np
import torch

from scaling_parts.config import ITERATIONS, PER_CENTROID, PLANS, D
from scaling_parts.terms import TERMS, Term


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Fit a + b * work by least squares of the relative errors, with a and b not negative."""
    work, value = np.array(points).T
    if len(points) > 1:
        matrix = np.stack([np.ones_like(work), work], axis=1) / value[:, None]
        a, b = np.linalg.lstsq(matrix, np.ones_like(value), rcond=None)[0]
        if a >= 0 and b > 0:
            return float(a), float(b)
    return 0.0, float(np.mean(value / work))


class Fit(NamedTuple):
    a: float
    b: float
    missed: float  # predicted / measured - 1 for the largest size, predicted from the smaller
    largest: float

    def draw(self, work: float, rng: np.random.Generator, count: int) -> np.ndarray:
        decades = max(0.0, math.log10(max(work, 1) / self.largest))
        spread = max(abs(self.missed), 0.05) * (1 + decades / 2)
        return (self.a + self.b * work) * np.exp(spread * rng.standard_normal(count))


def fitted(term: Term, results: list[dict[str, float]], what: str) -> Fit:
    points = [(term.work(r["n"], r["k"]), max(r[what], 1e-9)) for r in results]
    a, b = line(points[:-1])
    missed = (a + b * points[-1][0]) / points[-1][1] - 1
    return Fit(*line(points), missed, points[-1][0])


def simulate(fits: dict[str, Fit], draws: int = 4000) -> dict[int, dict[str, np.ndarray]]:
    """Return random draws of the seconds of each term, as wide as the uncertainty of the fits."""
    rng, cores = np.random.default_rng(0), torch.get_num_threads()
    found = {}
    for n, k in PLANS.items():
        works = {name: term.work(n, k) for name, term in TERMS.items()}
        works["k-means"] = float(min(n, PER_CENTROID * k)) * k
        drawn = {name: fits[name].draw(work, rng, draws) for name, work in works.items()}
        drawn["decode and two views"] /= cores
        # Decoding and computing share the same cores, so their times add up.
        drawn["embedding pass"] = drawn["embedding"] + drawn["decode and two views"]
        drawn["epoch of training"] = drawn["training step"] + drawn["decode and two views"]
        found[n] = drawn
    return found


def memory(fits: dict[str, Fit], n: int, k: int) -> dict[str, float]:
    """Return the bytes of the first process: arrays are computed, Python lists are measured."""
    trained = min(n, PER_CENTROID * k)
    return {
        "embeddings": 4.0 * n * D,
        "points of k-means": 4.0 * trained * D,
        "centroids": 4.0 * k * D,
        "labels": 8.0 * n,
        "order of an epoch": fits["order of an epoch"].a + fits["order of an epoch"].b * n,
        "list of files": fits["list of files"].a + fits["list of files"].b * n,
    }


class Gpus(NamedTuple):
    """Number of GPUs, and images and operations per second of each."""

    count: int
    embed: float
    train: float
    flops: float

    def seconds(self, n: int, k: int) -> dict[str, float]:
        flops = self.count * self.flops
        return {
            "embedding pass": n / (self.count * self.embed),
            "k-means": 2.0 * min(n, PER_CENTROID * k) * k * D * ITERATIONS / flops,
            "assignment": 2.0 * n * k * D / flops,
            "epoch of training": n / (self.count * self.train),
            "exact search, all against all": 2.0 * n * n * D / flops,
        }
