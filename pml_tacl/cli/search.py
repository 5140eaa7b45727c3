"""Find the images of an indexed folder that are most similar to one or several images."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from pml_tacl.cli import flags
from pml_tacl.cli.models import given_index, load_model
from pml_tacl.cli.queries import ImageList, query_paths
from pml_tacl.datasets.image_files import load_rgb
from pml_tacl.evaluation import embed
from pml_tacl.models import AttentionEmbedder
from pml_tacl.search import ImageIndex
from pml_tacl.utils.words import counted

SHOWN = 20  # queries in the gallery
NEIGHBOURS = 40  # images for each query in the gallery, at most
SIDE = 224  # pixels of an image in the gallery, at most


def run(args: Any, results: TextIO) -> dict[str, Any]:
    """Print a table and write one gallery; see `pml_tacl.cli.main`."""
    index = given_index(args)
    loaded = load_model(args.run, device=args.device)
    settings = {"num_workers": args.workers, "progress": flags.bars(args)}
    made: dict[str, Any] = {}
    if args.update:
        made["update"] = done = update_index(index, loaded.model, loaded.transform, **settings)
        index.save(args.run)
        print(
            f"{counted(done['embedded'], 'image')} embedded, {done['removed']} removed, "
            f"{done['indexed']} in the index"
        )
    if args.queries:
        with tempfile.TemporaryDirectory() as scratch:
            asked = [
                path
                for query in args.queries
                for path in query_paths(query, sys.stdin.buffer, Path(scratch), flags.bars(args))
            ]
            embeddings, _ = embed(loaded.model, ImageList(asked, loaded.transform), **settings)
            shown = [thumbnail(path) for path in asked[:SHOWN]]
        similarities, rows = index.search(embeddings, args.k, folder=args.folder)
        found = [
            [
                {"file": index.files[row], "similarity": round(float(value), 6)}
                for value, row in zip(*pair, strict=True)
            ]
            for pair in zip(similarities, rows, strict=True)
        ]
        made["root"] = str(index.root)
        made["queries"] = [
            {"query": str(query), "found": images}
            for query, images in zip(asked, found, strict=True)
        ]
        if not args.json:
            for query, images in zip(asked, found, strict=True):
                print(f"{query}\n{'rank':>4}  similarity  image", file=results)
                for rank, image in enumerate(images, 1):
                    print(f"{rank:4}  {image['similarity']:10.4f}  {image['file']}", file=results)
    if args.queries and (args.out or not args.json):
        out = args.out or unused(args.run / "search.png")
        rows, similarities = rows[:SHOWN, :NEIGHBOURS], similarities[:SHOWN, :NEIGHBOURS]
        gone = write_gallery(
            index, shown, rows, similarities, out, [path.name for path in asked[:SHOWN]]
        )
        print(f"gallery of {min(SHOWN, len(asked))} of {len(asked)} queries: {out}")
        if gone:
            first, more = min(gone), len(gone) - 1
            named = f"{first} and {more} more are" if more else f"{first} is"
            print(f"{named} in the index but can no longer be read: give --update", file=sys.stderr)
    return made


def update_index(
    index: ImageIndex,
    model: AttentionEmbedder,
    transform: Callable[[Image.Image], Any],
    *,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, int]:
    """Update an index to the current images of its folder.

    Unreadable images are left out with a warning.

    Args:
        index: index to update, in memory only.
        model: the model that made the index.
        transform: transform from a PIL image to an input of the model.
        num_workers: processes that read images.
        progress: show a progress bar.

    Returns:
        Numbers of images: ``embedded`` and ``removed`` now, and ``indexed`` in total.
    """
    added, changed, removed = index.changes()
    paths = [index.root / file for file in (*added, *changed)]
    images = ImageList(paths, transform, strict=False)
    if len(images):
        embeddings, _ = embed(model, images, num_workers=num_workers, progress=progress)
        index.add(embeddings, [path.relative_to(index.root).as_posix() for path in images.paths])
    read = set(images.paths)
    removed = [*removed, *(file for file in changed if index.root / file not in read)]
    index.remove(removed)
    return {"embedded": len(images), "removed": len(removed), "indexed": len(index)}


def unused(path: Path) -> Path:
    """Return a path that does not exist yet: a.png, else a-2.png, a-3.png, ..."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return path if not path.exists() else next(one for one in others if not one.exists())


def write_gallery(
    index: ImageIndex,
    queries: Sequence[Image.Image],
    rows: Sequence[Sequence[int]] | Any,
    similarities: Sequence[Sequence[float]] | Any,
    out: Path,
    names: Sequence[str] | None = None,
    headings: tuple[str, str] = ("query", "nearest"),
) -> set[Path]:
    """Draw a gallery of queries, each beside the images found for it.

    Args:
        index: index of the images found.
        queries: Q images.
        rows: for each query the row numbers in the index; their counts may differ.
        similarities: cosine similarities of the same images, written below them.
        out: .png, .svg or .pdf file.
        names: for each query a text, written below it.
        headings: texts above the queries and above the images found.

    Returns:
        Paths of indexed images that can no longer be read; they are grey in the gallery.
    """
    from pml_tacl import visualize as vis

    gone: set[Path] = set()
    figure = vis.retrieval_gallery(
        queries,
        [_thumbnails(index.paths(found), gone) for found in rows],
        distances=similarities,
        captions=[[index.files[row] for row in found] for found in rows],
        query_captions=names,
        headings=headings,
    )
    vis.save_figure(figure, out)
    return gone


def thumbnail(path: Path) -> Image.Image:
    """Return a small version of an image."""
    image = load_rgb(path)
    image.thumbnail((SIDE, SIDE))
    return image


def _thumbnails(paths: list[Path], gone: set[Path]) -> list[Image.Image]:
    """Return thumbnails; an unreadable image becomes grey, and its path is added to ``gone``."""
    images = []
    for path in paths:
        try:
            images.append(thumbnail(path))
        except OSError:
            gone.add(path)
            images.append(Image.new("RGB", (SIDE, SIDE), "grey"))
    return images
