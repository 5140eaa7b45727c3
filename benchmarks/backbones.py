"""List the stage, grid, channels and output of each family of backbones at 224 pixels.

Shapes and numbers of parameters do not depend on weights, so the backbones are built and run on
torch's meta device, without memory. Only the few tensors of the embedder are real.

    python benchmarks/backbones.py              # writes docs/backbones.md
    python benchmarks/backbones.py --output -
"""

import argparse
import datetime
import platform
from typing import Any

import timm
import torch
import torchvision
from _common import publish
from torch import nn

from pml_tacl import AttentionEmbedder, __version__

SIDE, DIMENSIONS = 224, 512

# family, backbone (a timm model), arguments beyond the name
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("ResNet", "resnet50", {}),
    ("ResNet, dilated", "resnet50", {"output_stride": 16}),
    ("ConvNeXt", "convnext_tiny", {}),
    ("EfficientNet", "efficientnet_b0", {}),
    ("EfficientNet-Lite", "tf_efficientnet_lite0", {}),
    ("MobileNet", "mobilenetv3_large_100", {}),
    ("RegNet", "regnety_032", {}),
    ("NFNet", "dm_nfnet_f0", {}),
    ("ViT, class token", "vit_base_patch16_224", {}),
    ("ViT, no class token", "vit_base_patch16_siglip_224", {}),
    ("ViT, register tokens", "vit_medium_patch16_reg4_gap_256", {"dynamic_img_size": True}),
    ("DINOv2", "vit_small_patch14_dinov2", {"img_size": SIDE}),
    ("DINOv2, register tokens", "vit_small_patch14_reg4_dinov2", {"img_size": SIDE}),
    ("DINOv3", "vit_small_patch16_dinov3", {}),
    ("BEiT", "beitv2_base_patch16_224", {}),
    ("Swin", "swin_tiny_patch4_window7_224", {}),
    ("MaxViT", "maxvit_tiny_tf_224", {}),
    ("CoAtNet", "coatnet_0_rw_224", {}),
    ("CoaT", "coat_lite_mini", {}),
    ("Hiera", "hiera_tiny_224", {}),
    ("MambaOut", "mambaout_tiny", {}),
    ("EfficientViM", "efficientvim_m1", {}),
]


def own_module() -> nn.Module:
    """Return a module from outside timm: the layers of torchvision's ResNet-18 up to its maps."""
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])


def given(
    backbone: str | nn.Module, pooling: str, kwargs: dict[str, Any]
) -> tuple[int | None, int, torch.Size, float]:
    """Return the stage for attention, dimensions, shape of the maps, millions of parameters."""
    with torch.device("meta"):
        model = AttentionEmbedder(
            backbone, embedding_dim=DIMENSIONS, pooling=pooling, **kwargs
        ).eval()
        output = model.trunk(torch.empty(1, 3, SIDE, SIDE))
    # The pooling switches autocast off, which does not support the meta device.
    embedder = model.embedder.to_empty(device="cpu")
    for parameter in embedder.parameters():
        nn.init.ones_(parameter)
    out = embedder.forward_features(
        type(output)(*(None if x is None else torch.ones(x.shape) for x in output))
    )
    assert out.attention.shape == (1, *out.feature_maps.shape[2:])
    millions = sum(parameter.numel() for parameter in model.trunk.parameters()) / 1e6
    return model.trunk.feature_index, out.embeddings.shape[1], out.feature_maps.shape, millions


def row(family: str, backbone: str | nn.Module, kwargs: dict[str, Any]) -> str:
    index, dimensions, maps, whole = given(backbone, "backbone", kwargs)
    *_, cut = given(backbone, "covariance", kwargs)
    name = f"`{backbone}`" if isinstance(backbone, str) else "torchvision's `resnet18`, as a module"
    name += "".join(f", `{key}={value}`" for key, value in kwargs.items())
    shown = "" if index is None else index
    return (
        f"| {family} | {name} | {dimensions} | {whole:.1f} M | {shown} | {maps[2]} x {maps[3]} "
        f"| {maps[1]} | {cut:.1f} M |"
    )


def report(rows: list[str]) -> str:
    lines = [
        "# Backbones",
        "",
        f"Written by `benchmarks/backbones.py` on {datetime.date.today()}: Python "
        f"{platform.python_version()}, torch {torch.__version__.partition('+')[0]}, torchvision "
        f"{torchvision.__version__.partition('+')[0]}, timm {timm.__version__}, pml_tacl "
        f"{__version__}.",
        "",
        f"`AttentionEmbedder(name)` for one image of {SIDE} x {SIDE} pixels. Dimensions are "
        "those of the backbone's own embedding, which is trained; after `fit_projection` "
        f"there are {DIMENSIONS} (`embedding_dim`). `feature_index` is the default: the last "
        "stage of stride 16 or finer, or the last block of a plain ViT. Attention is computed on "
        'the maps of this stage; with `pooling="covariance"`, the trunk ends there. Prefix tokens '
        "(class, registers) have no position in the image and are left out of the maps. "
        "Parameters are those of the trunk, without its classifier.",
        "",
        "| family | model | dimensions | parameters | feature_index | grid of the maps | channels "
        "| parameters, covariance |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        "`tests/models/test_backbones.py` tests the families at a small size: forward, backward, "
        "frozen, 1 and 4 channels, odd sizes (CoaT and EfficientViM: only shapes; "
        "EfficientNet-Lite: with its ImageNet weights). Any other timm model with "
        "`forward_intermediates` works in the same way, and so does a module that maps "
        "(N, C, H, W) images to (N, C, H, W) maps or a list of them.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/backbones.md", help="page; - prints it")
    arguments = parser.parse_args()
    rows = [row(*family) for family in FAMILIES]
    with torch.device("meta"):
        module = own_module()
    text = report([*rows, row("any other module", module, {})])
    publish(text, arguments.output)


if __name__ == "__main__":
    main()
