"""Index a folder of images for search with a run's model or a timm model, without training."""

import json
from collections.abc import Sequence
from typing import Any

from pml_tacl.cli import flags
from pml_tacl.cli.models import given_folder
from pml_tacl.cli.parsers import parse
from pml_tacl.cli.training_run import TrainingRun
from pml_tacl.evaluation import embed
from pml_tacl.search import ImageIndex


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command: write a run folder for `search` and `report`.

    Args:
        arguments: arguments of the command line; None for sys.argv.
        program: name of the command in messages.
    """
    run(parse("index", arguments, program))


def run(args: Any) -> None:
    """Run the command with parsed arguments."""
    with flags.output(args.quiet, args.json) as results:
        _index(args, results)


def _index(args: Any, results: Any) -> None:
    run = TrainingRun(args.run, overwrite=args.overwrite, apart_from=[args.images])
    settings = {"num_workers": args.workers, "progress": flags.bars(args)}
    loaded, images = given_folder(args, args.images)
    run.open(
        {
            "images": str(args.images.resolve()),
            "backbone": str(args.model),
            "weights": args.weights,
            "image_size": loaded.image_size,
            "epochs": 0,
            "exclude": args.exclude,
            "files": args.files and str(args.files.resolve()),
        }
    )
    run.fit(loaded.model, images, fitted=loaded.of_run, **settings)
    embeddings, _ = embed(loaded.model, images, **settings)
    ImageIndex.of(images, embeddings).save(run.folder)
    run.draw(loaded.model, images, embeddings)
    if args.json:
        made = {"run": str(args.run), "images": len(images), "dimensions": embeddings.shape[1]}
        print(json.dumps(made, indent=1), file=results)
        return
    print(
        f"{len(images)} images indexed in {args.run}: "
        f"{flags.command_line('search', args.run, 'QUERY')} finds similar images"
    )
