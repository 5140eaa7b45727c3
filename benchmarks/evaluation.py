"""Compare values, time and memory of RetrievalCalculator and PML's AccuracyCalculator.

Each variant runs in its own process, one after the other, so that peak memory is measured
separately. The stock calculator needs 8 GB at full size.

    python benchmarks/evaluation.py                        # writes docs/benchmarks/evaluation.md
    python benchmarks/evaluation.py --count 6000 --classes 1200 --output -
"""

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import faiss
import pytorch_metric_learning
import torch
import torch.nn.functional as F
from _common import cpu_model, publish
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from pml_tacl import RetrievalCalculator, __version__

# Metrics that the stock calculator computes correctly with k="max_bin_count". With k=None it needs
# 61 bytes per pair.
RANKING = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
CLUSTERING = ("NMI", "AMI")
DIMENSIONS = 512
PER_MIB = 1 << 20 if sys.platform == "darwin" else 1 << 10
CPU = torch.device("cpu")

VARIANTS: dict[str, tuple[str, Any]] = {
    "stock, ranking": ("stock", RANKING),
    "ours, ranking": ("ours", RANKING),
    "ours, all ranking metrics": ("ours", None),
    "stock, clustering": ("stock", CLUSTERING),
    "ours, clustering": ("ours", CLUSTERING),
    "stock, all": ("stock", ()),
    "ours, all": ("ours", ()),
}


def data(count: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return unit embeddings around class centres, with noise so that two thirds are right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(count, generator=generator) % classes
    centres = F.normalize(torch.randn(classes, DIMENSIONS, generator=generator))
    noise = torch.randn(count, DIMENSIONS, generator=generator)
    return F.normalize(centres[labels] + 0.11 * noise), labels


def calculator(kind: str, metrics: tuple[str, ...] | None) -> AccuracyCalculator:
    if kind == "stock":
        return AccuracyCalculator(include=metrics, k="max_bin_count", device=CPU)
    if metrics is None:
        return RetrievalCalculator(exclude=CLUSTERING, device=CPU)
    return RetrievalCalculator(include=metrics, device=CPU)


def run(variant: str, count: int, classes: int) -> dict[str, Any]:
    """Run one call, and return its values, its time and the peak memory of this process."""
    kind, metrics = VARIANTS[variant]
    embeddings, labels = data(count, classes)
    calls = calculator(kind, metrics)
    start, busy = time.perf_counter(), time.process_time()
    # As in PML's tester, the reference is a copy that starts with the queries.
    values = calls.get_accuracy(embeddings, labels, embeddings.clone(), labels.clone(), True)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / PER_MIB
    return {"values": values, "seconds": seconds, "busy": busy, "peak": peak}


def beside_floor(count: int = 6000, classes: int = 1200, rounds: int = 15) -> dict[str, float]:
    """Return median times of the calculator and of a plain search of equal depth, in turns."""
    embeddings, labels = data(count, classes)
    ours = calculator(
        "ours", (*RANKING, "recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8")
    )
    rows = embeddings.numpy()
    times: dict[str, list[float]] = {"floor": [], "ours": []}
    for _ in range(rounds):
        start = time.perf_counter()
        faiss.knn(rows, rows, 9)
        middle = time.perf_counter()
        ours.get_accuracy(embeddings, labels)
        times["floor"].append(middle - start)
        times["ours"].append(time.perf_counter() - middle)
    return {name: statistics.median(found) for name, found in times.items()}


def report(
    count: int, classes: int, results: dict[str, dict[str, Any]], floor: dict[str, float]
) -> str:
    lines = [
        "# Time and memory of evaluation",
        "",
        f"Written by `benchmarks/evaluation.py` on {datetime.date.today()}: {cpu_model()}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, faiss {faiss.__version__}, "
        f"pytorch-metric-learning {pytorch_metric_learning.__version__}, pml_tacl {__version__}.",
        "",
        f"{count} embeddings of {DIMENSIONS} dimensions in {classes} classes; each image is "
        "searched among all others. Each row is one run in its own process. Peak memory includes "
        "libraries and data. CPU seconds are summed over all threads. Stock is PML's "
        'AccuracyCalculator with `k="max_bin_count"`, for which only the metrics compared here '
        f"are right. With `k=None`, it would need about {61e-9 * count * count:.0f} GB.",
        "",
        "| | seconds | CPU seconds | peak memory |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {result['seconds']:.1f} | {result['busy']:.1f} "
        f"| {result['peak'] / 1000:.2f} GB |"
        for name, result in results.items()
    ]
    lines += ["", "| metric | stock | ours | difference |", "| --- | ---: | ---: | ---: |"]
    for group in ("ranking", "clustering"):
        stock, ours = (results[f"{kind}, {group}"] for kind in ("stock", "ours"))
        lines += [
            f"| {name} | {value:.7f} | {ours['values'][name]:.7f} | "
            f"{abs(value - ours['values'][name]):.1e} |"
            for name, value in stock["values"].items()
        ]
    lines += [
        f"| {name} | | {value:.7f} | |"
        for name, value in results["ours, all ranking metrics"]["values"].items()
        if name not in RANKING
    ]
    lines += ["", "Ratios, ours to stock:", ""]
    for group in ("ranking", "clustering", "all"):
        stock, ours = (results[f"{kind}, {group}"] for kind in ("stock", "ours"))
        lines.append(
            f"- {group}: time {ours['seconds'] / stock['seconds']:.2f}, "
            f"CPU time {ours['busy'] / stock['busy']:.2f}, "
            f"peak memory {ours['peak'] / stock['peak']:.2f}"
        )
    lines += [
        "",
        "Both calculators use the same k-means for clustering. Stock computes AMI with "
        "scikit-learn, and ours as a sum over the different sizes of groups. All means every "
        "metric that a calculator has by default, in one call. Ours then computes recall at 1, 2, "
        "4 and 8 in addition to the metrics of the first comparison.",
        "",
        f"Compared with a bare `faiss.knn` of the same depth, at 6000 x {DIMENSIONS}, the ranking "
        f"metrics and recall take {floor['ours'] / floor['floor']:.2f} x as long (medians of "
        f"alternating runs, {floor['floor']:.3f} s and {floor['ours']:.3f} s).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--classes", type=int, default=12_000)
    parser.add_argument(
        "--output", default="docs/benchmarks/evaluation.md", help="page; - prints it"
    )
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = (arguments.count, arguments.classes)
    if arguments.variant:
        print(json.dumps(run(arguments.variant, *size)))
        return
    results = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--count", size[0], "--classes", size[1]]
        output = subprocess.run(
            [*map(str, command), "--variant", variant], check=True, stdout=subprocess.PIPE
        ).stdout
        results[variant] = json.loads(output.splitlines()[-1])
        print(variant, results[variant], file=sys.stderr)
    text = report(*size, results, beside_floor())
    publish(text, arguments.output)


if __name__ == "__main__":
    main()
