"""Draw the attention of a model on your images, and the regions that make two images similar.

    python examples/visualize_attention.py IMAGE IMAGE ... --model runs/folder/model --size 224
    python examples/visualize_attention.py            # glyphs, with the model of the quickstart

The script writes overlay.png (the attention in each image), pair.png (whether the attention between
the first image and its nearest one follows a rotation and a shift) and similar.png (the similar
regions of the first image and its nearest ones).
"""

import argparse
from pathlib import Path

import torch
from torchvision.transforms import v2

from pml_tacl import AttentionEmbedder, SiameseTransform
from pml_tacl import visualize as vis
from pml_tacl.cli import flags
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs, load_rgb
from pml_tacl.functional import cross_image_attention
from pml_tacl.models.preprocessing import as_seen
from pml_tacl.utils.errors import InputError

GLYPHS = {"split": "test", "num_classes": 3, "images_per_class": 3}
MOVED = v2.RandomAffine((20, 20), (0.1, 0.1), fill=128)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", type=Path, nargs="*", metavar="IMAGE", help="two or more; default: glyphs")
    add("--model", type=Path, default=Path("runs/quickstart/model"), help="folder of a model")
    add("--backbone", help="use a pretrained timm model instead of --model")
    add("--weights", help="local weight file of the backbone, or none")
    add("--size", type=int, default=64, help="image size in pixels (default: 64)")
    add("--out", type=Path, default=Path("runs/attention"), help="folder for the figures")
    flags.add_debug(parser)
    args = parser.parse_args()
    if len(args.images) == 1:
        raise InputError("images are compared with each other: give at least two")
    return args


@torch.no_grad()
def main() -> None:
    args = arguments()
    if args.backbone:
        weights = False if args.weights == "none" else args.weights or True
        # Without a projection there are no untrained weights.
        model = AttentionEmbedder(
            args.backbone, embedding_dim=None, pretrained=weights, attention="none"
        ).eval()
    else:
        model = AttentionEmbedder.from_pretrained(args.model)
    glyphs = Glyphs(**GLYPHS)
    images = [load_rgb(path) for path in args.images] or [image for image, _ in glyphs]
    normalise = v2.Normalize(model.data_config["mean"], model.data_config["std"])
    transform = model.transform(image_size=args.size)
    views = torch.stack([transform(image) for image in images])
    out = model.forward_features(views)

    seen = as_seen(views, model.data_config)  # cropped and scaled, in original colours
    order = (out.embeddings @ out.embeddings[0]).argsort(descending=True)
    alike = order[order != 0][:5]
    first, maps = out.feature_maps[:1], out.feature_maps[alike]
    in_query = cross_image_attention(first.expand_as(maps), maps)
    in_alike = cross_image_attention(maps, first.expand_as(maps))

    offset = model.cell_offset(args.size)
    siamese = SiameseTransform(
        args.size,
        tuple(maps.shape[2:]),
        crop_scale=None,
        geometric=MOVED,
        photometric=None,
        flip=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        cell_offset=offset,
    )
    view, moved, points = siamese(v2.functional.to_pil_image(seen[0]))
    both = model.forward_features(normalise(torch.stack([view, moved]))).feature_maps
    followed = cross_image_attention(both, maps[:1].expand_as(both))
    figures = {
        "overlay": vis.attention_overlay(seen, out.attention, cell_offset=offset),
        "pair": vis.cross_attention_pair(view, moved, seen[alike[0]], *followed, points),
        "similar": vis.similar_regions(
            seen[0], seen[alike], in_alike, in_query, cell_offset=offset
        ),
    }
    for name, figure in figures.items():
        print(vis.save_figure(figure, args.out / f"{name}.png"))


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
