"""Find the pictures of a trained folder that are most like a picture, or like each of a folder.

    python examples/search.py runs/folder QUERY

RUN is a folder that train_folder.py wrote; QUERY is a picture, a folder of them, or - for what is
piped in: a picture's bytes, or paths, one in each line. Prints a table and writes one gallery.
With --update the index first follows the folder of pictures: new and changed ones are embedded,
deleted ones taken out.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from pml_tacl import AttentionEmbedder
from pml_tacl import visualize as vis
from pml_tacl.cli import flags
from pml_tacl.cli import run_folder as runs
from pml_tacl.cli.queries import PictureList, query_paths
from pml_tacl.datasets.image_files import load_rgb
from pml_tacl.evaluation import embed
from pml_tacl.search import PictureIndex
from pml_tacl.utils.errors import InputError

SHOWN = 20  # queries in the gallery
SIDE = 224  # pixels of a picture in it, at most


def thumbnail(path: Path) -> Image.Image:
    image = load_rgb(path)
    image.thumbnail((SIDE, SIDE))
    return image


def thumbnails(paths: list[Path], gone: set[Path]) -> list[Image.Image]:
    """Of indexed pictures: grey, and added to ``gone``, where one can no longer be read."""
    images = []
    for path in paths:
        try:
            images.append(thumbnail(path))
        except OSError:
            gone.add(path)
            images.append(Image.new("RGB", (SIDE, SIDE), "grey"))
    return images


def update(index: PictureIndex, model: AttentionEmbedder, transform: Callable) -> None:
    """Make the index follow its folder; a picture that cannot be read is left out and named."""
    added, changed, removed = index.changes()
    paths = [index.root / file for file in (*added, *changed)]
    pictures = PictureList(paths, transform, strict=False)
    if len(pictures):
        embeddings, _ = embed(model, pictures)
        index.add(embeddings, [path.relative_to(index.root).as_posix() for path in pictures.paths])
    index.remove([*removed, *(file for file in changed if index.root / file not in pictures.paths)])
    print(f"{len(pictures)} pictures embedded, {len(removed)} taken out, {len(index)} in the index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder written by train_folder.py")
    parser.add_argument("query", metavar="QUERY", help="a picture, a folder of them, or - (a pipe)")
    parser.add_argument("-k", type=int, default=8, help="pictures to find (default: %(default)s)")
    parser.add_argument("--folder", help="find only below this sub-folder of the indexed pictures")
    parser.add_argument("--update", action="store_true", help="first index what is new or changed")
    parser.add_argument("--out", type=Path, help="the gallery (default: RUN/search.png)")
    parser.add_argument("--images", type=Path, help="where the indexed pictures are, if moved")
    flags.add_debug(parser)
    args = parser.parse_args()
    out = args.out or args.run / "search.png"
    if args.k < 1 or out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"k must be at least 1 and out a .png, got {args.k} and {out}")

    config = runs.read_config(args.run)
    index = PictureIndex.load(args.run)
    index.root = args.images.absolute() if args.images else index.root
    if not index.root.is_dir():
        raise InputError(f"the indexed pictures are not in {index.root}: give --images FOLDER")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AttentionEmbedder.from_pretrained(args.run / "model")
    model = model.to(device, memory_format=torch.channels_last)
    transform = model.transform(image_size=tuple(config["image_size"]))
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    if args.update:
        update(index, model, transform)
        index.save(args.run)

    with tempfile.TemporaryDirectory() as scratch:
        asked = query_paths(args.query, sys.stdin.buffer, Path(scratch))
        embeddings, _ = embed(model, PictureList(asked, transform))
        queries = [thumbnail(path) for path in asked[:SHOWN]]
    similarities, rows = index.search(embeddings, args.k, folder=args.folder)
    for query, values, found in zip(asked, similarities, rows, strict=True):
        print(f"{query}\n{'rank':>4}  similarity  picture")
        for rank, (value, row) in enumerate(zip(values, found, strict=True), 1):
            print(f"{rank:4}  {value:10.4f}  {index.files[row]}")
    gone: set[Path] = set()
    figure = vis.retrieval_gallery(
        queries,
        [thumbnails(index.paths(found), gone) for found in rows[:SHOWN]],
        distances=similarities[:SHOWN],
        captions=[[index.files[row] for row in found] for found in rows[:SHOWN]],
    )
    vis.save_figure(figure, out)
    if gone:
        named = f"{min(gone)} and {len(gone) - 1} more are" if len(gone) > 1 else f"{min(gone)} is"
        print(f"{named} indexed and can no longer be read: give --update", file=sys.stderr)
    print(f"gallery of {min(SHOWN, len(asked))} of {len(asked)} queries: {out}")


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
