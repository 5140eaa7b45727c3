"""What 6 thousand to 100 million pictures cost: every term measured here, fitted, extrapolated.

Each measurement is a process of its own, so that its peak memory is its own. A term is a line in
its work; the largest size is also predicted from the smaller ones, and that error, grown with the
decades between measured and asked, is the width of what the simulation draws.

    python benchmarks/scaling.py                 # writes docs/scaling.md; six minutes
    python benchmarks/scaling.py --quick --output -
"""

import argparse
import datetime
import io
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from _common import cpu_model, publish
from PIL import Image
from pytorch_metric_learning.losses import MultiSimilarityLoss

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    SiameseTransform,
    __version__,
)
from pml_tacl.clustering import pseudo_labels_from
from pml_tacl.trainers._order import draw_order

D, ITERATIONS, PER_CENTROID, NPROBE = 512, 20, 50, 16
PLANS = {6_000: 600, 60_000: 6_000, 10**6: 10_000, 10**7: 100_000, 10**8: 10**6}
BACKBONE, SIDE = "resnet50", 224
# Of one GPU of the data-centre kind, and of faiss on it. Assumed, not measured.
GPUS, GPU_EMBED, GPU_TRAIN, GPU_FLOPS = 8, 2_000.0, 300.0, 2e13


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Embeddings around a centre for each ten."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 10), D), dtype=np.float32)
    found = rng.standard_normal((count, D), dtype=np.float32)
    found *= 0.8
    for start in range(0, count, 16384):
        part = found[start : start + 16384]
        part += centres[np.arange(start, start + len(part)) % len(centres)]
    return found


def picture() -> bytes:
    rng = np.random.default_rng(0)
    cells = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    cells.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def two_level(embeddings: np.ndarray, clusters: int) -> Any:
    """k-means of k-means: the work grows with the root of the clusters.

    A PseudoLabeler for many clusters: ``lambda embeddings, _: two_level(embeddings, 10**6)``.
    """
    coarse = KMeansPseudoLabeler(max(2, round(clusters**0.5)), max_points=PER_CENTROID * clusters)
    groups = coarse(embeddings).labels.numpy()
    labels, used = np.empty(len(groups), dtype=np.int64), 0
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        share = max(1, round(clusters * len(members) / len(groups)))
        if share == 1 or share >= len(members):
            labels[members] = used if share == 1 else used + np.arange(len(members))
        else:
            labels[members] = used + KMeansPseudoLabeler(share)(embeddings[members]).labels.numpy()
        used = int(labels[members].max()) + 1
    return pseudo_labels_from(labels, embeddings)


def quality(count: int = 20_000, clusters: int = 900) -> dict[str, float]:
    """Mean cosine distance to the own centroid, by both ways of k-means."""
    embeddings = rows(count)
    flat = KMeansPseudoLabeler(clusters)(embeddings)
    levels = two_level(embeddings, clusters)
    return {"flat": float(flat.distances.mean()), "levels": float(levels.distances.mean())}


Run = Callable[[], Any]


def decode(count: int, _: int) -> Run:
    file, views = picture(), SiameseTransform(SIDE, 14)
    return lambda: [views(Image.open(io.BytesIO(file)).convert("RGB")) for _ in range(count)]


def embed(count: int, _: int) -> Run:
    model = AttentionEmbedder(BACKBONE, D).eval().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, SIDE, SIDE).to(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(count // 8):
                model(images)

    model(images)
    return run


def train(count: int, _: int) -> Run:
    model = AttentionEmbedder(BACKBONE, D).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    clusters, attention = ContrastiveClusteringLoss(), AttentionConsistencyLoss()
    clusters.set_centroids(torch.randn(1000, D))
    labels, points = torch.arange(count) // 4, torch.rand(count, 196, 2) * 2 - 1

    def run(size: int = count) -> None:
        images = torch.randn(2 * size, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
        out = model.forward_features(images)
        first, second = out.feature_maps.chunk(2)
        both = torch.cat([labels[:size]] * 2)
        loss = MultiSimilarityLoss()(out.embeddings, both) + clusters(out.embeddings, both)
        loss = loss + attention(first, second, points[:size], labels[:size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run(4)
    return run


def kmeans(count: int, clusters: int) -> Run:
    embeddings = rows(count)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    bare = faiss.Kmeans(D, clusters, niter=ITERATIONS, spherical=True, min_points_per_centroid=1)
    return lambda: bare.train(embeddings)


def assign(count: int, clusters: int) -> Run:
    embeddings, centres = rows(count), rows(clusters, 1)
    index = faiss.IndexFlatIP(D)
    index.add(centres)
    return lambda: [index.search(embeddings[i : i + 16384], 1) for i in range(0, count, 16384)]


def hierarchy(count: int, clusters: int) -> Run:
    embeddings = rows(count)
    return lambda: two_level(embeddings, clusters)


def store(count: int, _: int) -> Run:
    embeddings = rows(count)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "embeddings.npy"
            table = np.lib.format.open_memmap(path, "w+", np.float32, (count, D))
            for i in range(0, count, 16384):
                table[i : i + 16384] = embeddings[i : i + 16384]
            table.flush()
            held = np.load(path, mmap_mode="r")
            for i in range(0, count, 16384):
                np.array(held[i : i + 16384])

    return run


def draw(count: int, clusters: int) -> Run:
    labels = torch.arange(count) % clusters
    return lambda: draw_order(labels, True, count // 32 * 32, 4, 32)[:, 0].tolist()


def listing(count: int, _: int) -> Run:
    return lambda: [Path(f"/data/pictures/{i // 1000:06}/{i:09}.jpg") for i in range(count)]


def search(count: int, _: int) -> Run:
    embeddings = rows(count)
    return lambda: faiss.knn(embeddings, embeddings, 9, metric=faiss.METRIC_INNER_PRODUCT)


def ivf(count: int, _: int) -> Run:
    embeddings = rows(count)
    index = faiss.index_factory(D, f"IVF{_lists(count)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(embeddings)
    index.add(embeddings)
    index.nprobe = NPROBE
    return lambda: index.search(embeddings, 9)


def _lists(count: int) -> int:
    return round(4 * count**0.5)


class Term(NamedTuple):
    """A cost: what makes it, how its work grows, and the sizes (N, k) at which it is measured."""

    run: Callable[[int, int], Run]
    work: Callable[[float, float], float]
    sizes: list[tuple[int, int]]
    says: str
    memory: bool = False  # whether its peak grows with its work


TERMS = {
    "decode and two views": Term(
        decode, lambda n, k: n, [(40, 0), (80, 0), (240, 0)], "pictures, one core"
    ),
    "embedding": Term(embed, lambda n, k: n, [(16, 0), (40, 0), (96, 0)], "pictures"),
    "training step": Term(
        train, lambda n, k: n, [(4, 0), (8, 0), (16, 0)], "pictures, two views each", True
    ),
    "k-means": Term(
        kmeans,
        lambda n, k: n * k,
        [(10_000, 200), (20_000, 400), (60_000, 1_000)],
        f"points x clusters, {ITERATIONS} iterations",
    ),
    "assignment": Term(
        assign,
        lambda n, k: n * k,
        [(20_000, 1_000), (40_000, 2_000), (80_000, 4_000)],
        "pictures x clusters",
    ),
    "two-level k-means": Term(
        hierarchy,
        lambda n, k: n * k**0.5,
        [(10_000, 400), (20_000, 900), (60_000, 3_600)],
        "pictures x root of clusters",
    ),
    "store and read embeddings": Term(
        store, lambda n, k: n, [(20_000, 0), (60_000, 0), (200_000, 0)], "pictures"
    ),
    "order of an epoch": Term(
        draw,
        lambda n, k: n,
        [(50_000, 5_000), (100_000, 10_000), (400_000, 40_000)],
        "pictures",
        True,
    ),
    "list of files": Term(
        listing, lambda n, k: n, [(50_000, 0), (100_000, 0), (500_000, 0)], "pictures", True
    ),
    "exact search, all in all": Term(
        search,
        lambda n, k: n * n,
        [(8_000, 0), (16_000, 0), (40_000, 0)],
        "pictures squared",
    ),
    "IVF search, all in all": Term(
        ivf,
        lambda n, k: n * (_lists(n) + NPROBE * n / _lists(n)),
        [(10_000, 0), (30_000, 0), (80_000, 0)],
        "pictures x vectors compared",
    ),
}


def peak(reset: bool = False) -> int:
    """Bytes that this process has held at most, since the last reset (Linux)."""
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


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares of the relative errors of a + b * work, neither of them negative."""
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
    missed: float  # the largest size predicted from the smaller, over measured, less 1
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


def span(values: np.ndarray, unit: Callable[[float], str]) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"{unit(middle)} ({unit(low)} to {unit(high)})"


def duration(seconds: float) -> str:
    for size, name in ((86400 * 365, "years"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f} {name}"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 1e-3 else "under 1 ms"


def amount(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


def simulate(fits: dict[str, Fit], draws: int = 4000) -> dict[int, dict[str, np.ndarray]]:
    """Seconds of each term at each number of pictures, drawn as far apart as the fits are sure."""
    rng, cores = np.random.default_rng(0), torch.get_num_threads()
    found = {}
    for n, k in PLANS.items():
        works = {name: term.work(n, k) for name, term in TERMS.items()}
        works["k-means"] = float(min(n, PER_CENTROID * k)) * k
        drawn = {name: fits[name].draw(work, rng, draws) for name, work in works.items()}
        drawn["decode and two views"] /= cores
        # A pass decodes while it computes, on the same cores: one after the other.
        drawn["embedding pass"] = drawn["embedding"] + drawn["decode and two views"]
        drawn["epoch of training"] = drawn["training step"] + drawn["decode and two views"]
        found[n] = drawn
    return found


def memory(fits: dict[str, Fit], n: int, k: int) -> dict[str, float]:
    """Bytes of the first process; the arrays are counted, Python's lists are measured."""
    trained = min(n, PER_CENTROID * k)
    return {
        "embeddings": 4.0 * n * D,
        "points of k-means": 4.0 * trained * D,
        "centroids": 4.0 * k * D,
        "labels": 8.0 * n,
        "order of an epoch": fits["order of an epoch"].a + fits["order of an epoch"].b * n,
        "list of files": fits["list of files"].a + fits["list of files"].b * n,
    }


def on_gpus(n: int, k: int) -> dict[str, float]:
    """Seconds on the GPUs assumed."""
    return {
        "embedding pass": n / (GPUS * GPU_EMBED),
        "k-means": 2.0 * min(n, PER_CENTROID * k) * k * D * ITERATIONS / (GPUS * GPU_FLOPS),
        "assignment": 2.0 * n * k * D / (GPUS * GPU_FLOPS),
        "epoch of training": n / (GPUS * GPU_TRAIN),
        "exact search, all in all": 2.0 * n * n * D / (GPUS * GPU_FLOPS),
    }


def table(head: list[str], body: list[list[str]]) -> str:
    rule = [["---", *["---:"] * (len(head) - 1)]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, *rule, *body])


def report(
    results: dict[str, list[dict[str, float]]], distances: dict[str, float], seconds: float
) -> str:
    times = {name: fitted(TERMS[name], found, "seconds") for name, found in results.items()}
    held = {n: fitted(TERMS[n], found, "bytes") for n, found in results.items() if TERMS[n].memory}
    drawn = simulate(times)
    sizes = [f"{n:,} / {k:,}".replace(",", " ") for n, k in PLANS.items()]
    measured = [
        [
            name,
            TERMS[name].says,
            ", ".join(f"{r['n']:g}" + (f" x {r['k']:g}" if r["k"] else "") for r in found),
            ", ".join(duration(r["seconds"]) for r in found),
            f"{100 * times[name].missed:+.0f} %",
        ]
        for name, found in results.items()
    ]
    peaks = [
        [name, ", ".join(amount(r["bytes"]) for r in results[name]), f"{100 * fit.missed:+.0f} %"]
        for name, fit in held.items()
    ]
    columns = ["embedding pass", "k-means", "assignment", "two-level k-means", "epoch of training"]
    here = [
        [size, *(span(drawn[n][name], duration) for name in columns)]
        for size, n in zip(sizes, PLANS, strict=True)
    ]
    others = ["list of files", "order of an epoch", "store and read embeddings"]
    others += ["exact search, all in all", "IVF search, all in all"]
    around = [
        [size, *(span(drawn[n][name], duration) for name in others)]
        for size, n in zip(sizes, PLANS, strict=True)
    ]
    gpu = [
        [size, *map(duration, on_gpus(n, k).values())]
        for size, (n, k) in zip(sizes, PLANS.items(), strict=True)
    ]
    parts = {n: memory(held, n, k) for n, k in PLANS.items()}
    kept = [
        [size, *map(amount, parts[n].values()), amount(sum(parts[n].values()))]
        for size, n in zip(sizes, PLANS, strict=True)
    ]
    step = held["training step"]
    return f"""# From six thousand to a hundred million pictures

Written by `benchmarks/scaling.py` on {datetime.date.today()} in {duration(seconds)}: \
{cpu_model()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch \
{torch.__version__.partition("+")[0]}, faiss {faiss.__version__}, pml_tacl {__version__}. \
Everything above the largest size measured is extrapolated; no run of more pictures was made.

`{BACKBONE}` at {SIDE} px, embeddings of {D} numbers in float32, JPEG pictures of 500 x 375 \
pixels. K-means trains {ITERATIONS} iterations on at most {PER_CENTROID} points a cluster \
(`max_points`).

## Measured

One process for each, one run. The error is of the largest size, predicted by the line through the \
smaller ones, before it was measured into the line.

{table(["term", "work", "sizes, N or N x k", "time", "error"], measured)}

Peak memory of the terms where it grows with the work, beyond what was there before:

{table(["term", "peak, same sizes", "error"], peaks)}

## Extrapolated to more pictures, this machine

Time of each part: median and, in brackets, 90 % of 4000 draws. A draw multiplies the fitted line \
by a log-normal factor, as wide as the error above (at least 5 %) and half as wide again with \
each decade beyond the largest work measured. What the lines do not know is in no bracket: slower \
memory and disks, a network, other pictures.

{table(["pictures / clusters", *columns], here)}

The embedding pass and the training decode on the same cores as they compute. Two-level k-means \
(`two_level` of the script: the root of k clusters, and each clustered again) takes the place of \
k-means and assignment. At 20 000 x 900 the mean cosine distance to the own centroid is \
{distances["levels"]:.4f}, and {distances["flat"]:.4f} with all clusters at once.

{table(["pictures / clusters", *others], around)}

## Memory of the first process

Arrays are counted, the lists measured. The other processes hold neither embeddings nor points. \
Each process adds the model and its batch: {amount(step.a + 32 * step.b)} at 32 pictures in fp32.

{table(["pictures / clusters", *next(iter(parts.values())), "together"], kept)}

## With GPUs

**Assumed, not measured**: {GPUS} GPUs of {GPU_EMBED:g} pictures/s embedding and {GPU_TRAIN:g} \
pictures/s training each (two views, bf16), faiss at {GPU_FLOPS:g} operations/s each, storage and \
cores that keep up. Put your own in at the top of the script.

{table(["pictures / clusters", *next(iter([on_gpus(1, 1)]))], gpu)}

To decode {GPUS * GPU_TRAIN:g} pictures/s takes \
{GPUS * GPU_TRAIN * (times["decode and two views"].b):.0f} cores like these.

## Which engine takes over where

{takeovers(drawn, parts)}

Exchanges of processes: a step sums the gradients, twice the size of the weights a process \
(`{BACKBONE}`: 2 x 0.1 GB), and gathers the embeddings of a batch (kilobytes); an embedding pass \
sends {4 * D} bytes a picture to the first process, which broadcasts 8 bytes a picture and \
{4 * D} a cluster. A network was not measured here.
"""


def takeovers(drawn: dict[int, dict[str, np.ndarray]], parts: dict[int, dict[str, float]]) -> str:
    day = 86400.0

    def first(test: Callable[[int], bool]) -> str:
        found = next((n for n in PLANS if test(n)), None)
        return "beyond this table" if found is None else f"{found:,}".replace(",", " ")

    def slow(name: str, limit: float) -> Callable[[int], bool]:
        return lambda n: bool(np.median(drawn[n][name]) > limit)

    body = [
        [
            "training and embedding on this machine",
            "an epoch takes more than a day",
            first(slow("epoch of training", day)),
            "`torchrun` with a GPU for each process; a model too large for one GPU: FSDP, which "
            "this trainer does not wrap",
        ],
        [
            "k-means of faiss on the CPU, all clusters at once",
            "longer than the embedding pass",
            first(
                lambda n: (
                    np.median(drawn[n]["k-means"] + drawn[n]["assignment"])
                    > np.median(drawn[n]["embedding pass"])
                )
            ),
            "faiss with GPUs (used if installed); several: `IndexShards`; "
            "or two levels, `two_level` of this script as the labeler",
        ],
        [
            "all embeddings in the first process's memory",
            "more than 16 GB together",
            first(lambda n: sum(parts[n].values()) > 16e9),
            "a memory map (the labeler takes one, with `max_points`); the trainer keeps them in "
            "memory, so its machine must have it",
        ],
        [
            "exact search of everything in everything",
            "more than an hour",
            first(slow("exact search, all in all", 3600.0)),
            "faiss on GPUs, or an IVF index; evaluation on a sample of queries",
        ],
        [
            "lists of files and order as Python's",
            "more than 16 GB in each process",
            first(lambda n: parts[n]["order of an epoch"] + parts[n]["list of files"] > 16e9),
            "shards of tar files (WebDataset) as the data set",
        ],
    ]
    return table(["what", "until", "from pictures", "then"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smaller sizes: for trying")
    parser.add_argument("--output", default="docs/scaling.md", help="- prints it")
    parser.add_argument("--term", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.term:
        name, *size = arguments.term
        print(json.dumps(measure(name, *map(int, size))))
        return
    start, results = time.perf_counter(), {}
    for name, term in TERMS.items():
        results[name] = []
        for size in term.sizes[:2] if arguments.quick else term.sizes:
            command = [sys.executable, __file__, "--term", name, *map(str, size)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
            print(name, results[name][-1], file=sys.stderr)
    distances = quality()
    publish(report(results, distances, time.perf_counter() - start), arguments.output)


if __name__ == "__main__":
    main()
