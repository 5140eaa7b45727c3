"""Measure how well attention finds the glyph: pointing game and inside / outside ratio.

Glyphs provides the box of each character. Attention is upsampled bicubically to the image, aligned
to receptive-field centres. The pointing game counts an arg-max inside the box as a hit.

    python benchmarks/attention.py runs/quickstart       # writes docs/attention.md
    python benchmarks/attention.py RUN --classes 20 --output -
"""

import argparse
import datetime
import json
import platform
from pathlib import Path

import timm
import torch
from _common import publish
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from pml_tacl import AttentionEmbedder, __version__
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs
from pml_tacl.functional import to_image

SIZE, REFERENCES = 64, 64


def box_masks(boxes: Tensor) -> Tensor:
    """Return (N, SIZE, SIZE): whether the centre of a pixel is in the box (x0, y0, x1, y1)."""
    centres = torch.arange(SIZE) + 0.5
    x0, y0, x1, y1 = (side[:, None] for side in boxes.unbind(1))
    across, down = (centres > x0) & (centres < x1), (centres > y0) & (centres < y1)
    return down[:, :, None] & across[:, None, :]


def moved_boxes(dataset: Glyphs, transform: v2.Compose) -> Tensor:
    """Return the boxes after the transform of the model, which resizes and crops."""
    boxes = tv_tensors.BoundingBoxes(dataset.boxes, format="XYXY", canvas_size=(SIZE, SIZE))
    for step in transform.transforms:
        if isinstance(step, v2.Resize | v2.CenterCrop):
            boxes = step(boxes)
    return boxes.as_subclass(Tensor)


def scores(
    attention: Tensor, masks: Tensor, cell_offset: tuple[float, float] = (0.0, 0.0)
) -> dict[str, float]:
    """Return the three scores of attention (N, H, W) with masks (N, SIZE, SIZE)."""
    large = to_image(attention.double(), (SIZE, SIZE), cell_offset, "bicubic").clamp_min(0)
    box = masks.double()
    inside = (large * box).sum((1, 2)) / box.sum((1, 2))
    outside = (large * (1 - box)).sum((1, 2)) / (1 - box).sum((1, 2))
    # If several positions have the maximum (in a constant map: all), each counts by its share.
    greatest = large >= large.amax((1, 2), keepdim=True) * (1 - 1e-6)
    hits = (greatest & masks).sum((1, 2)) / greatest.sum((1, 2))
    return {
        "ratio": float((inside / outside).mean()),
        "ratio of means": float(inside.mean() / outside.mean()),
        "pointing game": float(hits.double().mean()),
    }


@torch.inference_mode()
def attention_maps(model: AttentionEmbedder, dataset: Glyphs) -> Tensor:
    parts = [model.forward_features(images).attention for images, _ in DataLoader(dataset, 256)]
    return torch.cat(parts)


@torch.inference_mode()
def distinctive(model: AttentionEmbedder, config: dict, train: Glyphs) -> AttentionEmbedder:
    """Return a model with the same weights and `attention="distinctive"`."""
    other = AttentionEmbedder(**{**config, "attention": "distinctive"}).eval()
    other.trunk.load_state_dict(model.trunk.state_dict())
    rows = torch.linspace(0, len(train) - 1, REFERENCES).long().tolist()
    images = torch.stack([train[row][0] for row in rows])
    other.embedder.set_attention_references(other.trunk(images).feature_maps)
    return other


def measured(run: Path, classes: int | None, seed: int) -> tuple[dict[str, dict[str, float]], str]:
    """Return the scores of each source of attention, and a text about the data."""
    trained = AttentionEmbedder.from_pretrained(run / "model")
    config = json.loads((run / "model" / "config.json").read_text("utf-8"))
    del config["format_version"]
    config.update(config.pop("timm_kwargs"))
    config["attention"] = trained.embedder.attention_name  # older runs use other names
    runs.seed_everything(seed)
    fresh = AttentionEmbedder(**config).eval()
    transform = trained.transform(image_size=SIZE)
    train, test = (Glyphs(s, transform=transform, num_classes=classes) for s in ("train", "test"))
    masks = box_masks(moved_boxes(test, transform))
    maps = {
        "even": torch.ones(len(test), 1, 1),
        f"{config['attention']}, untrained": attention_maps(fresh, test),
        f"{config['attention']}, trained": attention_maps(trained, test),
        "distinctive, untrained": attention_maps(distinctive(fresh, config, train), test),
        "distinctive, trained": attention_maps(distinctive(trained, config, train), test),
    }
    height, width = maps[f"{config['attention']}, trained"].shape[1:]
    about = (
        f"{len(test)} images of {len(test.classes)} characters that are not in the training, "
        f"{SIZE} x {SIZE} pixels. The attention of `{config['backbone']}` has {height} x {width} "
        f"cells. The box of a glyph covers {masks.double().mean():.1%} of its image on average"
    )
    looks = trained.cell_offset(SIZE)
    return {name: scores(attention, masks, looks) for name, attention in maps.items()}, about


def report(rows: dict[str, dict[str, float]], about: str) -> str:
    names = list(next(iter(rows.values())))
    lines = [
        "# Does attention find the glyph?",
        "",
        f"Written by `benchmarks/attention.py` on {datetime.date.today()} from the model of a run "
        f"of `examples/quickstart.py`: Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, timm {timm.__version__}, pml_tacl {__version__}.",
        "",
        f"Measured on {about}. Attention is upsampled bicubically to the image, with each cell at "
        "its receptive-field centre (`AttentionEmbedder.cell_offset`).",
        "",
        f"| attention | {' | '.join(names)} |",
        "| --- |" + " ---: |" * len(names),
    ]
    lines += [
        f"| {name} | {row['ratio']:.2f} | {row['ratio of means']:.2f} "
        f"| {row['pointing game']:.1%} |"
        for name, row in rows.items()
    ]
    lines += [
        "",
        "- ratio: mean attention inside the glyph's box divided by the mean outside, averaged over "
        "images. Ratio of means: both means are averaged over images before the division.",
        "- pointing game: how often the maximum lies inside the box. If several positions share "
        "the maximum, each counts in part, so a uniform map scores the area of the box.",
        "- even: the same weight everywhere, as in average pooling.",
        "- border, relative_border: low where the image looks like its own border. Only the "
        "features are trained, not the attention. On pages written before 2026-11-26, border is "
        "what is now called `relative_border`.",
        '- distinctive: the same trunk with `attention="distinctive"`, which is not trained. '
        f"{REFERENCES} images of the training half are the references, see "
        "`Embedder.set_attention_references`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder written by quickstart.py")
    parser.add_argument("--classes", type=int, help="number of test characters (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the untrained weights")
    parser.add_argument("--output", default="docs/attention.md", help="page; - prints it")
    arguments = parser.parse_args()
    text = report(*measured(arguments.run, arguments.classes, arguments.seed))
    publish(text, arguments.output)


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
