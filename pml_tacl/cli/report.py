"""Write an HTML report of a run: one file for any browser, which needs no network."""

from collections.abc import Sequence
from pathlib import Path

from pml_tacl.cli import flags
from pml_tacl.cli.unfinished import index_stopped
from pml_tacl.report import write_report


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command.

    Args:
        arguments: arguments of the command line; None for sys.argv.
        program: name of the command in messages.
    """
    parser = flags.Parser(str(__doc__), None, program)
    parser.epilog = f"example: {parser.prog} runs/photos --out page.html"
    add, number = parser.add_argument, flags.at_least(1)
    add("run", type=Path, metavar="RUN", help="folder of a run that has ended")
    add("--out", type=Path, metavar="FILE", help="file of the page; default: RUN/report.html")
    add("--images", type=Path, metavar="DIR", help="folder of the indexed images, if moved")
    add("--labels", choices=("none", "folder"), default="none",
        help="folder: judge clusters by the sub-folders of the images")  # fmt: skip
    add("--queries", type=number, default=6, metavar="N", help="best and worst queries to show")
    add("--clusters", type=number, default=4, metavar="N", help="clusters of each kind to show")
    add("--points", type=number, default=4000, metavar="N", help="most points on the map")
    add("--seed", type=flags.at_least(0), default=0, metavar="N",
        help="seed of random samples and of the map")  # fmt: skip
    flags.add_quiet(parser)
    flags.add_debug(parser)
    args = parser.parse_args(arguments)
    with flags.output(args.quiet):
        index_stopped(args.run, images=args.images, progress=flags.bars(args))
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
