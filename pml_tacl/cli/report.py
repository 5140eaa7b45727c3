"""Write an HTML report of a run: one file for any browser, which needs no network."""

from typing import Any, TextIO

from pml_tacl.cli import flags
from pml_tacl.cli.unfinished import index_stopped
from pml_tacl.report import write_report


def run(args: Any, results: TextIO) -> dict[str, Any]:
    """Write the page; see `pml_tacl.cli.main`."""
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
        progress=flags.bars(args),
    )
    size = path.stat().st_size
    print(f"{path}: {size / 1e6:.1f} MB, one file, opens in any browser")
    return {"file": str(path), "bytes": size}
