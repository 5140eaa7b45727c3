"""Compare trainings whose k-means has one level and two, by R@1 of other classes.

Above `TWO_LEVELS_ABOVE` clusters, k-means has two levels. Here the limit is lowered, so that it has
two levels on small data sets, too. `ms` trains on the training third of each set, with a tenth as
many clusters as images, and is measured on the validation third.

    python benchmarks/two_levels.py ROOT  # as for retrieval.py folders; writes a section of a page
"""

import argparse
import datetime
from pathlib import Path
from statistics import mean
from typing import Any

from _common import cpu_model, publish_section
from retrieval_parts import folders
from retrieval_parts.config import make
from retrieval_parts.data import DEFAULT_CACHE
from retrieval_parts.page import rows
from retrieval_parts.running import run

from pml_tacl import __version__
from pml_tacl.clustering import kmeans

PAGE = Path(__file__).parents[1] / "docs" / "components" / "kmeans_pseudo_labeler.md"
BEGIN, END = "<!-- begin benchmarks/two_levels.py -->", "<!-- end benchmarks/two_levels.py -->"
LEVELS = {"one level": kmeans.TWO_LEVELS_ABOVE, "two levels": 1}  # largest number for one level


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train once for each number of levels; return R@1 and purity, in per cent."""
    found: dict[str, Any] = {"set": name, "seed": seed}
    for levels, limit in LEVELS.items():
        config = make(
            "ms", recipe="photographs", dataset=name, size=args.size, seed=seed,
            split="validation", steps=args.steps,
        )  # fmt: skip
        before, kmeans.TWO_LEVELS_ABOVE = kmeans.TWO_LEVELS_ABOVE, limit
        try:
            result = run(config, None, args.cache, data_root=args.root)
        finally:
            kmeans.TWO_LEVELS_ABOVE = before
        clusterings = [one for one in result["history"] if "clusters" in one]
        found[levels] = {
            "recall": 100 * result["metrics"]["recall_at_1"],
            "purity": 100 * mean(one["purity"] for one in clusterings),
            "clusters": clusterings[0]["clusters"],
        }
    return found


def section(found: list[dict[str, Any]], size: int) -> str:
    """Return the section of the page."""
    lines = []
    for one in found:
        pair = [one[levels] for levels in LEVELS]
        numbers = [f"{at[key]:.1f}" for key in ("purity", "recall") for at in pair]
        gain = pair[1]["recall"] - pair[0]["recall"]
        start = [one["set"], str(one["seed"]), str(pair[0]["clusters"])]
        lines.append([*start, *numbers, f"{gain:+.1f}"])
    heads = ["set", "seed", "clusters", *(f"purity, {at}" for at in LEVELS)]
    heads += [*(f"R@1, {at}" for at in LEVELS), "difference"]
    gains = [one["two levels"]["recall"] - one["one level"]["recall"] for one in found]
    return (
        f"Written by `benchmarks/two_levels.py` on {datetime.date.today()}: {cpu_model()}, "
        f"pml_tacl {__version__}, EfficientNet-Lite0 at {size} px. Each model was trained with the "
        "method `ms` (MultiSimilarityLoss alone) on the training third of a set and measured on "
        "the validation third; purity is the mean over all clusterings.\n\n"
        f"{rows(heads, lines)}\n\n"
        f"Mean difference of R@1: {mean(gains):+.1f} points.\n"
    )


def main() -> None:
    """Run all sets and seeds, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="ROOT", help="holds NAME/CLASS/FILE")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="run only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=-1, help="-1: those of the recipe")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the weights")
    parser.add_argument("--output", default=PAGE, help="page of the section; - prints it")
    args = parser.parse_args()
    names = folders.chosen(args.root, args.sets)
    found = []
    for seed in args.seeds:
        for name in names:
            found.append(measure(args, name, seed))
            print(found[-1], flush=True)
    publish_section(section(found, args.size), args.output, BEGIN, END)


if __name__ == "__main__":
    main()
