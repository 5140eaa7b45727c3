"""Draw the images of the README from a run of quickstart.py, with unseen characters.

    python examples/readme_images.py runs/quickstart

The script writes gallery.png, attention.png, similar.png and pair.png to docs/images/.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

from pml_tacl import AttentionEmbedder, SiameseTransform
from pml_tacl import visualize as vis
from pml_tacl.cli import flags
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import embed
from pml_tacl.functional import cross_image_attention
from pml_tacl.utils.errors import InputError

SIZE, SHOWN, NEIGHBOURS, ALIKE = 64, 8, 8, 5


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder written by quickstart.py")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="output folder")
    parser.add_argument("--classes", type=int, help="number of characters (default: all)")
    parser.add_argument("--pair", type=int, default=5, help="index of the image in pair.png")
    flags.add_debug(parser)
    args = parser.parse_args()
    if not 0 <= args.pair < SHOWN:
        raise InputError(f"pair must be from 0 to {SHOWN - 1}, got {args.pair}")
    model = AttentionEmbedder.from_pretrained(args.run / "model")
    test = Glyphs("test", num_classes=args.classes, transform=model.transform(image_size=SIZE))
    images, labels = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    embeddings, _ = embed(model, test)
    shown = torch.linspace(0, len(test) - 1, SHOWN).long()  # evenly over the classes
    nearest = (embeddings[shown] @ embeddings.T).topk(NEIGHBOURS + 1).indices[:, 1:]

    def look(rows: torch.Tensor):
        return model.forward_features(torch.stack([test[int(row)][0] for row in rows]))

    def found_in(maps: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return A(i|j) minus the mean attention of i to images of any kind."""
        anywhere = [cross_image_attention(maps, o.expand_as(maps)) for o in queries.split(1)]
        return (cross_image_attention(maps, others) - torch.stack(anywhere).mean(0)).clamp_min(0)

    queries = look(shown).feature_maps
    alike = nearest[0, :ALIKE]
    maps = look(alike).feature_maps
    asked = queries[:1].expand_as(maps)
    likeness = found_in(maps, asked), found_in(asked, maps)

    # A character in two fonts: compare two views of one image with the other image.
    first = int(shown[args.pair])
    second = next(int(row) for row in (labels == labels[first]).nonzero() if row != first)
    turn = v2.RandomAffine((20, 20), fill=220)
    offset = model.cell_offset(SIZE)
    siamese = SiameseTransform(
        SIZE,
        maps.shape[2:],
        crop_scale=None,
        geometric=turn,
        photometric=None,
        flip=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        cell_offset=offset,
    )
    view, transformed, points = siamese(Image.fromarray(test.images[first]))
    three = torch.stack([view, transformed, images[second].permute(2, 0, 1) / 255])
    mean, std = (model.data_config[key] for key in ("mean", "std"))
    seen = model.forward_features(v2.functional.normalize(three, mean, std)).feature_maps
    across = cross_image_attention(seen[:2], seen[2:].expand_as(seen[:2]))

    right = labels[nearest] == labels[shown, None]
    for name, figure in {
        "gallery": vis.retrieval_gallery(images[shown], images[nearest], right),
        "attention": vis.attention_overlay(
            images[shown], look(shown).attention, cell_offset=offset
        ),
        "similar": vis.similar_regions(
            images[shown[0]], images[alike], *likeness, cell_offset=offset
        ),
        "pair": vis.cross_attention_pair(*three, *across, points),
    }.items():
        print(vis.save_figure(figure, args.out / f"{name}.png"))


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
