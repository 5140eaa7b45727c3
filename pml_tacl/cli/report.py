"""Write an HTML report of a run: one file for any browser, which needs no network."""

from collections.abc import Sequence
from typing import Any

from pml_tacl.cli import flags
from pml_tacl.cli.parsers import parse
from pml_tacl.cli.unfinished import index_stopped
from pml_tacl.report import write_report


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command.

    Args:
        arguments: arguments of the command line; None for sys.argv.
        program: name of the command in messages.
    """
    run(parse("report", arguments, program))


def run(args: Any) -> None:
    """Run the command with parsed arguments."""
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
