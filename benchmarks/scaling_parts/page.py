"""Write docs/scaling.md from the measurements."""

import datetime
import platform
from collections.abc import Callable, Iterable

import faiss
import numpy as np
import torch
from _common import cpu_model

from pml_tacl import AttentionEmbedder, __version__
from scaling_parts.config import BACKBONE, ITERATIONS, PER_CENTROID, PLANS, SIDE, D
from scaling_parts.fits import Gpus, fitted, memory, simulate
from scaling_parts.terms import TERMS


def span(values: np.ndarray, unit: Callable[[float], str]) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"{unit(middle)} ({unit(low)} to {unit(high)})"


def duration(seconds: float) -> str:
    for size, name in ((86400 * 365, "years"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f} {name}"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 1e-3 else "under 1 ms"


def weights() -> int:
    """Return the size of the network's weights in bytes."""
    with torch.device("meta"):
        model = AttentionEmbedder(BACKBONE, embedding_dim=D)
    return sum(4 * parameter.numel() for parameter in model.parameters())


def amount(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


def table(head: list[str], body: list[list[str]]) -> str:
    rule = [["---", *["---:"] * (len(head) - 1)]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, *rule, *body])


def report(
    results: dict[str, list[dict[str, float]]],
    distances: dict[str, float],
    seconds: float,
    gpus: Gpus,
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
    others = ["list of files", "order of an epoch", "store and read embeddings"]
    others += ["exact search, all in all", "IVF search, all in all"]
    parts = {n: memory(held, n, k) for n, k in PLANS.items()}

    def each(cells: Callable[[int, int], Iterable[str]]) -> list[list[str]]:
        """Return one table row for each plan."""
        return [[size, *cells(n, k)] for size, (n, k) in zip(sizes, PLANS.items(), strict=True)]

    def spans(names: list[str]) -> list[list[str]]:
        return each(lambda n, _: [span(drawn[n][name], duration) for name in names])

    on_gpus = each(lambda n, k: map(duration, gpus.seconds(n, k).values()))
    kept = each(lambda n, _: map(amount, [*parts[n].values(), sum(parts[n].values())]))
    step = held["training step"]
    return f"""# From six thousand to a hundred million images

Written by `benchmarks/scaling.py` on {datetime.date.today()} in {duration(seconds)}: \
{cpu_model()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch \
{torch.__version__.partition("+")[0]}, faiss {faiss.__version__}, pml_tacl {__version__}. \
Everything above the largest size measured is extrapolated; no network was run on more images.

`{BACKBONE}` at {SIDE} px, embeddings of {D} numbers in float32, JPEG images of 500 x 375 \
pixels. K-means trains {ITERATIONS} iterations on at most {PER_CENTROID} points a cluster \
(`max_points`).

## Measured

One process for each, one run. The error is of the largest size, predicted by the line through the \
smaller ones, before it was measured into the line.

{table(["term", "work", "sizes, N or N x k", "time", "error"], measured)}

Peak memory of the terms where it grows with the work, beyond what was there before:

{table(["term", "peak, same sizes", "error"], peaks)}

## Extrapolated to more images, this machine

Time of each part: median and, in brackets, 90 % of 4000 draws. A draw multiplies the fitted line \
by a log-normal factor, as wide as the error above (at least 5 %) and half as wide again with \
each decade beyond the largest work measured. What the lines do not know is in no bracket: slower \
memory and disks, a network, other images.

{table(["images / clusters", *columns], spans(columns))}

The embedding pass and the training decode on the same cores as they compute. Two-level k-means \
(`two_level` of the script: the root of k clusters, and each clustered again) takes the place of \
k-means and assignment. At 20 000 x 900 the mean cosine distance to the own centroid is \
{distances["levels"]:.4f}, and {distances["flat"]:.4f} with all clusters at once.

{table(["images / clusters", *others], spans(others))}

## Memory of the first process

Arrays are counted, the lists measured. The other processes hold neither embeddings nor points. \
Each process adds the model and its batch: {amount(step.a + 32 * step.b)} at 32 images in fp32.

{table(["images / clusters", *next(iter(parts.values())), "together"], kept)}

## With GPUs

**Assumed, not measured**: {gpus.count} GPUs of {gpus.embed:g} images/s embedding and \
{gpus.train:g} images/s training each (two views, bf16), faiss at {gpus.flops:g} operations/s \
each, storage and cores that keep up. Put your own in at the top of the script.

{table(["images / clusters", *gpus.seconds(1, 1)], on_gpus)}

To decode {gpus.count * gpus.train:g} images/s takes \
{gpus.count * gpus.train * times["decode and two views"].b:.0f} cores like these.

## Which engine takes over where

{takeovers(drawn, parts)}

Exchanges of processes: a step sums the gradients, twice the size of the weights a process \
(`{BACKBONE}`: 2 x {amount(weights())}), and gathers the embeddings of a batch (kilobytes); an \
embedding pass sends {4 * D} bytes an image to the first process, which broadcasts 8 bytes a \
image and {4 * D} a cluster. A network was not measured here.
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
            "above 20 000 clusters `KMeansPseudoLabeler` has two levels",
        ],
        [
            "all embeddings in the first process's memory",
            "more than 16 GB together",
            first(lambda n: sum(parts[n].values()) > 16e9),
            "one file that all processes write (above 1 000 000 images, with `checkpoint_folder`); "
            "k-means learns from a sample of it",
        ],
        [
            "exact search of everything in everything",
            "more than an hour",
            first(slow("exact search, all in all", 3600.0)),
            'faiss on GPUs, or an IVF index (`kind="ivfpq"` of the index of images); '
            "evaluation on a sample of queries",
        ],
        [
            "list of files and order of an epoch",
            "more than 16 GB in each process",
            first(lambda n: parts[n]["order of an epoch"] + parts[n]["list of files"] > 16e9),
            "shards of tar files (WebDataset) as the data set",
        ],
    ]
    return table(["what", "until", "from images", "then"], body)
