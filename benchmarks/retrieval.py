"""Retrieval without labels, beside what people would use instead.

python benchmarks/retrieval.py run full dataset=glyphs regime=scratch seed=0
"""

import argparse
from pathlib import Path

from retrieval_parts.config import METHODS, make, parse
from retrieval_parts.data import DEFAULT_CACHE
from retrieval_parts.running import run

from pml_tacl import runs

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one configuration")
    one.add_argument("method", choices=METHODS)
    one.add_argument("settings", nargs="*", metavar="name=value")
    one.add_argument("--watch", action="store_true", help="measure at each clustering too")
    args = parser.parse_args()
    config = make(args.method, **parse(args.settings))
    found = run(config, args.results, args.cache, verbose=True, watch_split=args.watch)
    for name, value in found["metrics"].items():
        print(f"{name:30} {100 * value:5.1f}")
    print(found["key"], {k: round(v, 2) for k, v in found["cost"].items()})


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
