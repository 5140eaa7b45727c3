"""Draw the gallery of README.md: grocery images and their eight nearest, before and after.

    python benchmarks/photographs_gallery.py ROOT

The script trains `full` on the training part of ROOT/grocery, as `retrieval.py folders ROOT` does
(seed 0). It draws random queries from the test part, and writes docs/images/photographs.jpg.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from retrieval_parts import data, folders
from retrieval_parts.config import make
from retrieval_parts.running import normalised
from retrieval_parts.scoring import embed_images
from retrieval_parts.training import train
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from pml_tacl.datasets import load_rgb
from pml_tacl.trainers.guard import mean_state
from pml_tacl.trainers.recipe import PRETRAINED
from pml_tacl.visualize import retrieval_gallery

SHOWN, NEAREST, PIXELS = 4, 8, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder with grocery/CLASS/FILE")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of queries")
    parser.add_argument("--out", type=Path, default=Path("docs/images/photographs.jpg"))
    args = parser.parse_args()
    config = make("full", recipe="photographs", dataset="grocery", split="test").resolved
    images = data.load("grocery", "train-for-test", config.size, data_root=args.root)
    test = data.load("grocery", "test", config.size, data_root=args.root)
    paths = folders.listed(args.root / "grocery", "test").paths

    run = train(config, images)
    model = run.model
    model.load_state_dict(run.untrained)
    before = embed_images(model, test.images, run.views.normalise)
    model.load_state_dict(mean_state(run.untrained, run.kept["state"], PRETRAINED.trained_share))
    model.fit_projection(normalised(run, images), progress=False)
    after = embed_images(model, test.images, run.views.normalise)

    asked, references = test.queries.nonzero()[:, 0], (~test.queries).nonzero()[:, 0]
    chosen = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(args.seed))]
    chosen = chosen[:SHOWN]
    queries, found, right, captions = [], [], [], []
    for query in chosen.tolist():
        for name, embeddings in (("pretrained", before), ("after pml_tacl", after)):
            nearest = references[_nearest(embeddings[query], embeddings[references])]
            queries.append(_image(paths[query]))
            found.append([_image(paths[i]) for i in nearest.tolist()])
            right.append(test.labels[nearest] == test.labels[query])
            captions.append(name)
    figure = retrieval_gallery(queries, found, right, query_captions=captions, columns=NEAREST)
    figure.savefig(args.out, dpi=100, pil_kwargs={"quality": 82})
    print(f"wrote {args.out}")


def _nearest(query: Tensor, references: Tensor) -> Tensor:
    return (references @ query).topk(NEAREST).indices


def _image(path: str) -> Image.Image:
    return F.center_crop(F.resize(load_rgb(path), PIXELS), PIXELS)


if __name__ == "__main__":
    main()
