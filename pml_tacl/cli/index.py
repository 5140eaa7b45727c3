"""Index a folder of images for search with a run's model or a timm model, without training."""

from typing import Any, TextIO

from pml_tacl.cli import flags
from pml_tacl.cli.models import given_folder
from pml_tacl.cli.training_run import TrainingRun
from pml_tacl.evaluation import embed
from pml_tacl.search import ImageIndex
from pml_tacl.utils.words import counted


def run(args: Any, results: TextIO) -> dict[str, Any]:
    """Write a run folder for `search` and `report`; see `pml_tacl.cli.main`."""
    apart = [args.images, args.files if args.overwrite else None]
    run = TrainingRun(args.run, overwrite=args.overwrite, apart_from=apart)
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
        f"{counted(len(images), 'image')} indexed in {args.run}: "
        f"{flags.command_line('search', args.run, 'QUERY')} finds similar images"
    )
    return {"run": str(args.run), "images": len(images), "dimensions": embeddings.shape[1]}
