"""Compare forward + backward times of our losses and miners with PML's and a dense lower bound.

All contenders of a case take turns in one run, on one thread. The page shows the ratios of their
medians, because ratios transfer better to other machines than times.

    python benchmarks/losses.py                 # writes docs/benchmarks/losses.md
    python benchmarks/losses.py --only miners --rounds 5 --output -
"""

import argparse
import datetime
import platform
import sys
from collections.abc import Callable
from functools import partial

import pytorch_metric_learning
import torch
import torch.nn.functional as F
from _common import cpu_model, peak_bytes, publish
from pytorch_metric_learning.losses import MultiSimilarityLoss, ProxyAnchorLoss, SoftTripleLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor
from torch.utils.benchmark import Measurement, Timer

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
    __version__,
)

BATCH, DIMENSIONS, PER_CLUSTER, NEGATIVES = 240, 512, 5, 5
Contenders = dict[str, Callable[[], object]]


def clustered(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a batch of embeddings in loose clusters of five, and their labels."""
    labels = torch.arange(BATCH) // PER_CLUSTER
    middles = torch.randn(BATCH // PER_CLUSTER, DIMENSIONS, generator=generator)
    return middles[labels] + 2 * torch.randn(BATCH, DIMENSIONS, generator=generator), labels


def train_step(loss: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward and discards the gradients."""

    def step() -> None:
        loss().backward()
        for x in inputs:
            x.grad = None

    return step


def centroid_losses(num_centroids: int) -> Contenders:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    embeddings, labels = clustered(generator)
    embeddings.requires_grad_()
    centroids = torch.randn(num_centroids, DIMENSIONS, generator=generator)
    centroids[: BATCH // PER_CLUSTER] += embeddings.detach()[::PER_CLUSTER]
    ours = ContrastiveClusteringLoss(num_negatives=NEGATIVES)
    ours.set_centroids(centroids)
    of_means = ContrastiveClusteringLoss(num_negatives=NEGATIVES)
    unit = F.normalize(centroids, dim=1)

    def floor() -> Tensor:
        return (F.normalize(embeddings, dim=1) @ unit.T).topk(NEGATIVES + 1, dim=1).values.sum()

    anchor = ProxyAnchorLoss(num_centroids, DIMENSIONS)
    triple = SoftTripleLoss(num_centroids, DIMENSIONS, centers_per_class=1)
    similarity, miner = MultiSimilarityLoss(), MultiSimilarityMiner()
    return {
        "floor": train_step(floor, embeddings),
        "ContrastiveClusteringLoss": train_step(lambda: ours(embeddings, labels), embeddings),
        "ContrastiveClusteringLoss, means of the batch": train_step(
            lambda: of_means(embeddings, labels), embeddings
        ),
        "MultiSimilarityLoss + miner": train_step(
            lambda: similarity(embeddings, labels, miner(embeddings, labels)), embeddings
        ),
        "ProxyAnchorLoss": train_step(
            lambda: anchor(embeddings, labels), embeddings, *anchor.parameters()
        ),
        "SoftTripleLoss": train_step(
            lambda: triple(embeddings, labels), embeddings, *triple.parameters()
        ),
    }


def attention_losses(channels: int, side: int, pairs: int) -> Contenders:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    first, second = (
        torch.randn(pairs, channels, side, side, generator=generator).requires_grad_()
        for _ in range(2)
    )
    points = 2.2 * torch.rand(pairs, side * side, 2, generator=generator) - 1.1
    anchors = torch.arange(pairs)
    positives = anchors // PER_CLUSTER * PER_CLUSTER + (anchors + 1) % PER_CLUSTER
    empty = torch.empty(0, dtype=torch.long)
    ours = AttentionConsistencyLoss()

    def floor() -> Tensor:
        a, b = F.normalize(first.flatten(2), dim=1), F.normalize(second.flatten(2), dim=1)
        other = a[positives]
        seen, followed = (
            torch.bmm(view.transpose(1, 2), other).max(dim=2).values for view in (a, b)
        )
        return (seen - followed).square().mean()

    return {
        "floor": train_step(floor, first, second),
        "AttentionConsistencyLoss": train_step(
            lambda: ours(first, second, points, None, (anchors, positives, empty, empty)),
            first,
            second,
        ),
    }


def miners() -> Contenders:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    embeddings, labels = clustered(generator)
    maps = torch.randn(BATCH, DIMENSIONS, 7, 7, generator=generator)
    with_centroids = ContrastiveClusteringMiner(num_negatives=NEGATIVES)
    with_centroids.set_centroids(embeddings[::PER_CLUSTER])
    of_means = ContrastiveClusteringMiner(num_negatives=NEGATIVES)
    of_attention, similarity = AttentionConsistencyMiner(), MultiSimilarityMiner()
    return {
        "MultiSimilarityMiner": lambda: similarity(embeddings, labels),
        "ContrastiveClusteringMiner, centroids set": lambda: with_centroids(embeddings, labels),
        "ContrastiveClusteringMiner, means of the batch": lambda: of_means(embeddings, labels),
        "AttentionConsistencyMiner, 512 x 7 x 7": lambda: of_attention(maps, labels),
    }


PAIRS, SHAPES = 120, ((2048, 7), (1024, 14))
CASES: dict[str, Callable[[], Contenders]] = {
    **{f"centroid losses, K = {k}": partial(centroid_losses, k) for k in (100, 1000, 10000)},
    **{
        f"attention losses, {PAIRS} pairs, {c} x {s} x {s}": partial(attention_losses, c, s, PAIRS)
        for c, s in SHAPES
    },
    "miners, N = 240": miners,
}
# Bytes of two normalised maps and of their gradients.
MEMORY_UNITS = {
    f"attention losses, {PAIRS} pairs, {c} x {s} x {s}": 4 * PAIRS * c * s * s * 4
    for c, s in SHAPES
}


def medians(contenders: Contenders, rounds: int) -> dict[str, float]:
    """Return the median seconds of each; they take turns, so that disturbances affect all."""
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=1)
        for name, run in contenders.items()
    }
    # Choose the number of calls per round so that it takes some milliseconds.
    calls = {name: max(1, round(5e-3 / timer.timeit(2).median)) for name, timer in timers.items()}
    rows: dict[str, list[Measurement]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            rows[name].append(timer.timeit(calls[name]))
    return {name: Measurement.merge(row)[0].median for name, row in rows.items()}


Results = dict[str, tuple[dict[str, float], dict[str, float]]]


def report(results: Results, rounds: int) -> str:
    lines = [
        "# Speed of the losses and miners",
        "",
        f"Written by `benchmarks/losses.py` on {datetime.date.today()}: {cpu_model()}, one thread, "
        f"fp32, Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, "
        f"pytorch-metric-learning {pytorch_metric_learning.__version__}, pml_tacl {__version__}.",
        "",
        "Time is that of forward + backward (for miners: of the call). It is the median of "
        f"{rounds} rounds, divided by the median of the first row; in each round, all rows of a "
        "table take turns. There are N = 240 embeddings of D = 512, five of each cluster; for the "
        "attention losses, 120 images of 24 clusters. Memory is the peak that the allocator held "
        "beyond the inputs, divided by the size of two normalised maps and their gradients.",
        "",
        "- Floor of the centroid losses: normalise, one matmul with K centroids, top-k, backward.",
        "- Floor of the attention losses: normalise, two batched matmuls, maximum, backward; dense,"
        " by autograd.",
        "- ProxyAnchorLoss and SoftTripleLoss have K proxies and train them. "
        "ContrastiveClusteringLoss gets K centroids. Its variant with the means of the batch and "
        "MultiSimilarityLoss do not use K.",
    ]
    for case, (times, memory) in results.items():
        first = next(iter(times.values()))
        rows = [[name, f"{time / first:.2f} x"] for name, time in times.items()]
        head = ["", "time"]
        if memory:
            head.append("peak extra memory")
            rows = [[*row, f"{memory[row[0]]:.2f} x"] for row in rows]
        lines += ["", f"## {case[0].upper()}{case[1:]}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (head, *rows)]
        lines.insert(len(lines) - len(rows), "| --- |" + " ---: |" * (len(head) - 1))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--output", default="docs/benchmarks/losses.md", help="- prints it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for case, make in CASES.items():
        if arguments.only in case:
            print(case, file=sys.stderr)
            contenders, unit = make(), MEMORY_UNITS.get(case)
            memory = {k: peak_bytes(run) / unit for k, run in contenders.items()} if unit else {}
            results[case] = medians(contenders, arguments.rounds), memory
    text = report(results, arguments.rounds)
    publish(text, arguments.output)
    if arguments.output == "-":
        for case, (times, _) in results.items():
            print(case, {name: f"{time * 1e3:.2f} ms" for name, time in times.items()})


if __name__ == "__main__":
    main()
