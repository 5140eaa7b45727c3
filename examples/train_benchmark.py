"""Shared code of train_cub.py, train_cars.py, train_sop.py and train_inshop.py.

Train on the training half of a benchmark without labels, and test on the classes of the other half.
"""

from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.utils.data import DataLoader

import pml_tacl
from pml_tacl.cli import flags
from pml_tacl.cli import run_folder as runs
from pml_tacl.cli.training_run import TrainingRun
from pml_tacl.evaluation import evaluate

# Common settings: 512 dimensions, crops of 224 from 256 pixels, the first ImageNet weights (V1) of
# ResNet-50. Batch size, learning rate, decay and schedule are those of Kim et al. 2022 (STML).
COMMON = {
    "backbone": "resnet50.tv_in1k",
    "weights": "pretrained",
    "embedding_dim": 512,
    "image_size": 224,
    "crop_scale": (0.2, 1.0),
    "freeze_batchnorm": True,
    "batch_size": 120,
    "epochs": 90,
    "learning_rate": 1e-4,
    "weight_decay": 1e-2,
    "loss_weights": {"metric_loss": 1.0, "clustering_loss": 0.5, "attention_loss": 3.0},
    "seed": 0,
    "workers": 4,
}


def main(benchmark, settings: dict, description: str) -> None:
    name = benchmark.__name__.lower()
    parser = flags.training_parser(description, {"run": f"runs/{name}", **COMMON, **settings})
    parser.add_argument("root", type=Path, help="folder of the published data set")
    args = parser.parse_args()
    run = TrainingRun(
        args.run, resume=args.resume, overwrite=args.overwrite, apart_from=[args.root]
    )
    runs.seed_everything(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train = benchmark(args.root, "train")
    weights = False if run.begun else args.weights
    kept = {"freeze_batchnorm": args.freeze_batchnorm}
    model = pml_tacl.AttentionEmbedder(
        args.backbone, embedding_dim=args.embedding_dim, pretrained=weights, **kept
    )
    model = model.to(device, memory_format=torch.channels_last)
    plain = model.transform(image_size=args.image_size)
    query, *gallery = (benchmark(args.root, part, plain) for part in args.test_splits)
    if not run.begun:  # initial projection
        seen = benchmark(args.root, "train", plain)
        model.fit_projection(DataLoader(seen, 64, shuffle=True, num_workers=args.workers))

    def measure(epoch: int) -> dict[str, float]:
        searched = gallery[0] if gallery else None
        settings = {"metrics": args.metrics, "num_workers": args.workers}
        found = evaluate(model, query, reference=searched, **settings)
        print(f"epoch {epoch}:", *(f"{name} {100 * value:.1f}" for name, value in found.items()))
        return found

    parameters = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **parameters)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    losses = {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": pml_tacl.ContrastiveClusteringLoss(),
        "attention_loss": pml_tacl.AttentionConsistencyLoss(),
    }
    views = pml_tacl.SiameseTransform.for_model(model, args.image_size, crop_scale=args.crop_scale)
    trainer = pml_tacl.UnsupervisedTrainer(
        model,
        optimizer,
        args.batch_size,
        losses,
        train,
        transform=views,
        eval_transform=plain,
        labeler=pml_tacl.KMeansPseudoLabeler(args.num_clusters, seed=args.seed),
        mining_funcs={"attention_miner": pml_tacl.AttentionConsistencyMiner()},
        images_per_cluster=args.images_per_cluster,
        swap=pml_tacl.BackgroundSwap(cell_offset=views.cell_offset),
        loss_weights=args.loss_weights,
        amp_dtype=torch.bfloat16 if device.type == "cuda" else None,
        lr_schedulers={"trunk_scheduler_by_epoch": cosine},
        dataloader_num_workers=args.workers,
    )
    # When a run is resumed, the folder of the data set and the number of epochs may differ.
    run.open(flags.settings_of(args), free=("epochs", "root", "weights"))
    rows = run.train(trainer, args.epochs, measure)
    print(f"\n{runs.metrics_table(rows)}\n\nper cent; metrics and model: {args.run}")
