"""Write one HTML page of a run, to be looked at in any browser, without a network.

    python examples/report.py runs/quickstart

RUN is a folder that quickstart.py or train_folder.py wrote. The page shows its curves and metrics,
the queries that retrieve best and worst, what the model attends to, clusters, and a map of the
embeddings to zoom into.
"""

import argparse
from pathlib import Path

from pml_tacl.cli import flags
from pml_tacl.cli import run_folder as runs
from pml_tacl.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a training that has ended")
    add("--out", type=Path, help="the page (default: RUN/report.html)")
    add("--images", type=Path, help="where the pictures that were trained on are, if moved")
    add("--labels", choices=("none", "folder"), default="none",
        help="folder: judge clusters by the sub-folders of the pictures")  # fmt: skip
    add("--queries", type=int, default=6, help="best and worst ones to show (default: %(default)s)")
    add("--clusters", type=int, default=4, help="of each kind to show (default: %(default)s)")
    add("--points", type=int, default=4000, help="on the map at most (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what is drawn at random, and of the map")
    flags.add_debug(parser)
    args = parser.parse_args()
    path = write_report(
        args.run,
        args.out,
        images=args.images,
        folders_are_classes=args.labels == "folder",
        queries=args.queries,
        clusters=args.clusters,
        points=args.points,
        seed=args.seed,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, one file, opens in any browser")


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
