"""Measure the cost of each step, and extrapolate it to 6 thousand to 100 million images.

Each measurement runs in its own process, so that peak memory is measured separately. The cost of a
step is fitted by a line in its work. The error of the largest size, predicted from the smaller
ones, gives the width of the simulated distribution. The width grows with each decade of
extrapolation.

    python benchmarks/scaling.py                 # writes docs/scaling.md; six minutes
    python benchmarks/scaling.py --quick --output -
"""

import argparse
import json
import subprocess
import sys
import time

from _common import publish, section_of
from scaling_parts.clusters import rows, two_level
from scaling_parts.config import BEGIN, END
from scaling_parts.fits import Gpus
from scaling_parts.page import report
from scaling_parts.terms import TERMS, measure

from pml_tacl import KMeansPseudoLabeler

# Speed of a data-centre GPU, and of faiss on it. Assumed, not measured.
INTRODUCTION = """## A training of many images, run

`benchmarks/simulation.py` runs and measures what a training does apart from the network. A \
generator replaces the network. Each part runs in its own process, and reads what the previous \
part has written to the folder. Other programs on the machine disturb the CPU time less than the \
time. Memory-mapped files count as memory while they are read."""
GPUS = Gpus(count=8, embed=2_000.0, train=300.0, flops=2e13)


def quality(count: int = 20_000, clusters: int = 900) -> dict[str, float]:
    """Return the mean cosine distance to the own centroid for both variants of k-means."""
    embeddings = rows(count)
    flat = KMeansPseudoLabeler(clusters)(embeddings)
    levels = two_level(embeddings, clusters)
    return {"flat": float(flat.distances.mean()), "levels": float(levels.distances.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="measure only the two smaller sizes")
    parser.add_argument("--output", default="docs/scaling.md", help="page; - prints it")
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
    page = report(results, distances, time.perf_counter() - start, GPUS)
    kept = section_of(arguments.output, BEGIN, END)  # of another script
    publish(
        page.replace("\n## Measured\n", f"\n{INTRODUCTION}\n\n{kept}\n\n## Measured\n"),
        arguments.output,
    )


if __name__ == "__main__":
    main()
