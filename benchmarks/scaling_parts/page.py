"""Write docs/scaling.md from the measurements."""

import datetime
import platform
from collections.abc import Callable, Iterable

import faiss
import numpy as np
import torch
from _common import cpu_model

from pml_tacl import AttentionEmbedder, __version__
from pml_tacl.trainers.data import ORDER_OF_PML_UP_TO
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
    others += ["exact search, all against all", "IVF search, all against all"]
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
pixels. K-means trains {ITERATIONS} iterations on at most {PER_CENTROID} points per \
cluster (`max_points`).

## Measured

Each size was measured once, in its own process. The error is that of the prediction for the \
largest size, by a line that was fitted to the smaller sizes only. The order of an epoch is drawn \
in arrays above {ORDER_OF_PML_UP_TO:,} images, and measured there; below, PML's sampler draws it, \
in about a second at most.

{table(["term", "work", "sizes, N or N x k", "time", "error"], measured)}

Peak memory of each step, without what the process used before it, if this memory grows with the \
work:

{table(["term", "peak, same sizes", "error"], peaks)}

## Extrapolated to more images, this machine

Time of each part: the median of 4000 draws and, in brackets, their middle 90 %. A draw multiplies \
the fitted line by a log-normal factor. The spread of this factor is the error above (at least \
5 %), and half of that more for each decade beyond the largest work measured. The brackets do not \
include other causes of error, such as slower memory and disks, a network, or other images.

{table(["images / clusters", *columns], spans(columns))}

The embedding pass and the training decode images on the cores that also run the network. \
Two-level k-means (`two_level` of the script) replaces k-means and assignment: it makes about \
sqrt(k) clusters, and clusters each of them again. For 20 000 images and 900 clusters, the mean \
cosine distance to the own centroid is {distances["levels"]:.4f}, and {distances["flat"]:.4f} with \
all clusters at once.

{table(["images / clusters", *others], spans(others))}

## Memory of the first process

The sizes of arrays are computed, and those of lists are measured. The other processes hold \
neither embeddings nor points. Each process also needs memory for the model and its batch: \
{amount(step.a + 32 * step.b)} at 32 images in fp32.

{table(["images / clusters", *next(iter(parts.values())), "together"], kept)}

## With GPUs

**Assumed, not measured**: {gpus.count} GPUs, each of which embeds {gpus.embed:g} images/s, trains \
on {gpus.train:g} images/s (two views, bf16) and runs faiss at {gpus.flops:g} operations/s; \
storage and cores are fast enough. Put your own numbers at the top of the script.

{table(["images / clusters", *gpus.seconds(1, 1)], on_gpus)}

Decoding {gpus.count * gpus.train:g} images/s needs \
{gpus.count * gpus.train * times["decode and two views"].b:.0f} cores like those of this machine.

## Which engine takes over where

{takeovers(drawn, parts)}

Traffic between processes: a step sums the gradients, for which each process exchanges twice the \
size of the weights (`{BACKBONE}`: 2 x {amount(weights())}), and gathers the embeddings of a batch \
(kilobytes). An embedding pass sends {4 * D} bytes per image to the first process, which then \
broadcasts 8 bytes per image and {4 * D} per cluster. No network was measured here.
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
            "`torchrun` with a GPU for each process; for a model too large for one GPU: FSDP, "
            "which this trainer does not apply",
        ],
        [
            "k-means of faiss on the CPU, all clusters at once",
            "it takes longer than the embedding pass",
            first(
                lambda n: (
                    np.median(drawn[n]["k-means"] + drawn[n]["assignment"])
                    > np.median(drawn[n]["embedding pass"])
                )
            ),
            "faiss with GPUs (used if installed), with `IndexShards` for several; "
            "above 20 000 clusters, `KMeansPseudoLabeler` has two levels",
        ],
        [
            "all embeddings in the first process's memory",
            "all arrays and lists above take more than 16 GB",
            first(lambda n: sum(parts[n].values()) > 16e9),
            "one file that all processes write (above 1 000 000 images, with `checkpoint_folder`); "
            "k-means is trained on a sample of it",
        ],
        [
            "exact search of all images among all images",
            "it takes more than an hour",
            first(slow("exact search, all against all", 3600.0)),
            'faiss on GPUs, or an IVF index (`kind="ivfpq"` of `ImageIndex`); '
            "evaluation on a sample of queries",
        ],
        [
            "list of files and order of an epoch",
            "they take more than 16 GB in each process",
            first(lambda n: parts[n]["order of an epoch"] + parts[n]["list of files"] > 16e9),
            "shards of tar files (WebDataset) as the data set",
        ],
    ]
    return table(["what", "until", "from images", "then"], body)
