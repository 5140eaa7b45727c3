"""Index a folder of images for search with a run's model or a timm model, without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pml_tacl.cli import flags
from pml_tacl.cli.models import given_folder
from pml_tacl.cli.training_run import TrainingRun
from pml_tacl.evaluation import embed
from pml_tacl.search import ImageIndex


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command: write a run folder for `search` and `report`.

    Args:
        arguments: arguments of the command line; None for sys.argv.
        program: name of the command in messages.
    """
    parser = flags.Parser(str(__doc__), None, program)
    parser.epilog = f"example: {parser.prog} photos --model resnet50 --run runs/index"
    parser.add_argument("images", type=Path, metavar="FOLDER", help="folder of images")
    flags.add_model(parser)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/index"), metavar="DIR", help="folder for the index"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    flags.add_choice(parser)
    flags.add_common(parser)
    args = parser.parse_args(arguments)
    with flags.output(args.quiet):
        _index(args)


def _index(args: Any) -> None:
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
    print(
        f"{len(images)} images indexed in {args.run}: "
        f"{flags.command_line('search', args.run, 'QUERY')} finds similar images"
    )
