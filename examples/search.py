"""Find the pictures of a trained folder that are most like a picture, or like each of a folder.

    python examples/search.py runs/folder QUERY

RUN is a folder that train_folder.py wrote. Prints a table and writes one gallery.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

from pml_tacl import AttentionEmbedder, runs
from pml_tacl import visualize as vis
from pml_tacl.datasets import ImageFiles
from pml_tacl.datasets.image_files import load_rgb
from pml_tacl.evaluation import embed
from pml_tacl.search import PictureIndex

SHOWN = 20  # queries in the gallery
SIDE = 224  # pixels of a picture in it, at most


def thumbnail(path: Path) -> Image.Image:
    image = load_rgb(path)
    image.thumbnail((SIDE, SIDE))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder written by train_folder.py")
    parser.add_argument("query", type=Path, metavar="QUERY", help="a picture, or a folder of them")
    parser.add_argument("-k", type=int, default=8, help="pictures to find (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the gallery (default: RUN/search.png)")
    parser.add_argument("--images", type=Path, help="where the indexed pictures are, if moved")
    args = parser.parse_args()
    out = args.out or args.run / "search.png"
    if args.k < 1 or out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"k must be at least 1 and out a .png, got {args.k} and {out}")

    size = runs.read_config(args.run)["image_size"]
    index = PictureIndex.load(args.run)
    index.root = args.images or index.root
    if not index.root.is_dir():
        raise ValueError(f"the indexed pictures are not in {index.root}: give --images FOLDER")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AttentionEmbedder.from_pretrained(args.run / "model")
    model = model.to(device, memory_format=torch.channels_last)
    transform = model.transform(image_size=tuple(size))
    if args.query.is_dir():
        queries = ImageFiles(args.query, transform=transform)
        asked, (embeddings, _) = queries.paths, embed(model, queries)
    else:
        asked = [args.query]
        with torch.inference_mode():
            embeddings = model(transform(load_rgb(args.query))[None].to(device))
    similarities, rows = index.search(embeddings, args.k)

    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    for query, values, found in zip(asked, similarities, rows, strict=True):
        print(f"{query}\n{'rank':>4}  similarity  picture")
        for rank, (value, row) in enumerate(zip(values, found, strict=True), 1):
            print(f"{rank:4}  {value:10.4f}  {index.files[row]}")
    figure = vis.retrieval_gallery(
        [thumbnail(path) for path in asked[:SHOWN]],
        [[thumbnail(path) for path in index.paths(found)] for found in rows[:SHOWN]],
        distances=similarities[:SHOWN],
        captions=[[index.files[row] for row in found] for found in rows[:SHOWN]],
    )
    vis.save_figure(figure, out)
    print(f"gallery of {min(SHOWN, len(asked))} of {len(asked)} queries: {out}")


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
