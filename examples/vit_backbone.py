"""Train a small vision transformer, and draw its attention at two image sizes.

    python examples/vit_backbone.py

The script trains a ViT from scratch on two views of each image. It prints R@1 on unseen characters
at the training size and at a larger size. It draws the attention at both sizes:
runs/vit/attention_64.png and attention_96.png.
"""

from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import pml_tacl
from pml_tacl import visualize as vis
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import evaluate

CLASSES = 60
EPOCHS = 8
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
SIZES = (64, 96)  # the training size first; dynamic_img_size allows other sizes
WORKERS = 1  # number of processes that compute the views
# You can use any timm ViT with pretrained=True, such as "vit_small_patch14_dinov2" or
# "vit_base_patch16_siglip_224". This one is small enough to train from scratch.
BACKBONE = "vit_tiny_patch16_224"
TIMM = {"img_size": 64, "patch_size": 8, "depth": 4, "embed_dim": 96, "num_heads": 3}
OUT = Path("runs/vit")


def main() -> dict[str, float]:
    runs.seed_everything(0)
    model = pml_tacl.AttentionEmbedder(
        BACKBONE, embedding_dim=64, pooling="average", dynamic_img_size=True, **TIMM
    )
    train, test = Glyphs("train", num_classes=CLASSES), Glyphs("test", num_classes=CLASSES)
    views = {size: model.transform(image_size=size) for size in SIZES}
    train.transform = views[SIZES[0]]
    model.fit_projection(DataLoader(train, BATCH_SIZE), progress=False)  # initial projection
    train.transform = None
    two_views = pml_tacl.SiameseTransform.for_model(
        model,
        SIZES[0],
        crop_scale=(0.6, 1.0),
        flip=False,
        geometric=v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), fill=220),
        photometric=v2.Compose([v2.ColorJitter(0.5, 0.5, 0.5), v2.RandomChannelPermutation()]),
    )

    def recall(size: int) -> float:
        test.transform = views[size]
        return evaluate(model, test, metrics=["recall_at_1"], progress=False)["recall_at_1"]

    found = {"before": recall(SIZES[0])}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    losses = {"pairs": MultiSimilarityLoss(), "tac": pml_tacl.AttentionConsistencyLoss()}
    pml_tacl.UnsupervisedTrainer(
        model,
        optimizer,
        BATCH_SIZE,
        losses,
        train,
        transform=two_views,
        eval_transform=views[SIZES[0]],
        labeler=pml_tacl.KMeansPseudoLabeler("auto"),
        warmup_epochs=EPOCHS,
        progress=False,
        dataloader_num_workers=WORKERS,
    ).train(num_epochs=EPOCHS)

    model.eval()
    shown = torch.linspace(0, len(test) - 1, 4).long().tolist()  # evenly over the classes
    for size in SIZES:
        found[f"after, {size} pixels"] = recall(size)
        images = torch.stack([test[i][0] for i in shown])
        with torch.inference_mode():
            out = model.forward_features(images)
        own = model.self_attention(images)  # of the class token to each patch, in the last block
        maps = torch.cat([out.attention, own])
        print(f"{size} pixels: feature maps {tuple(out.feature_maps.shape)}")
        names = ["pooling"] * len(shown) + ["class token"] * len(shown)
        figure = vis.attention_overlay(test.images[shown + shown], maps, names, columns=2)
        print(f"attention {tuple(maps.shape[1:])}: ", end="")
        print(vis.save_figure(figure, OUT / f"attention_{size}.png"))
    for name, value in found.items():
        print(f"{name:<18} R@1 {100 * value:5.1f}")
    return found


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
