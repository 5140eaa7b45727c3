"""What 6 thousand to 100 million images cost: every term measured here, fitted, extrapolated.

Each measurement is a process of its own, so that its peak memory is its own. A term is a line in
its work; the largest size is also predicted from the smaller ones, and that error, grown with the
decades between measured and asked, is the width of what the simulation draws.

    python benchmarks/scaling.py                 # writes docs/scaling.md; six minutes
    python benchmarks/scaling.py --quick --output -
"""

import argparse
import json
import subprocess
import sys
import time

from _common import publish
from scaling_parts.clusters import rows, two_level
from scaling_parts.fits import Gpus
from scaling_parts.page import report
from scaling_parts.terms import TERMS, measure

from pml_tacl import KMeansPseudoLabeler

# Of one GPU of the data-centre kind, and of faiss on it. Assumed, not measured.
GPUS = Gpus(count=8, embed=2_000.0, train=300.0, flops=2e13)


def quality(count: int = 20_000, clusters: int = 900) -> dict[str, float]:
    """Mean cosine distance to the own centroid, by both ways of k-means."""
    embeddings = rows(count)
    flat = KMeansPseudoLabeler(clusters)(embeddings)
    levels = two_level(embeddings, clusters)
    return {"flat": float(flat.distances.mean()), "levels": float(levels.distances.mean())}


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
    publish(report(results, distances, time.perf_counter() - start, GPUS), arguments.output)


if __name__ == "__main__":
    main()
