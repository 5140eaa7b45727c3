"""What train_cub.py, train_cars.py, train_sop.py and train_inshop.py have in common.

Train on the training half of a benchmark without its labels, test on the other half's classes.
"""

import argparse
from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.utils.data import DataLoader

import pml_tacl
from pml_tacl import runs
from pml_tacl.evaluation import evaluate
from pml_tacl.training_run import TrainingRun

# As usual in the field: 512 dimensions, crops of 224 from 256 pixels, ImageNet's first weights of
# ResNet-50; batch, rate, decay and schedule as in the code of Kim et al. 2022 (STML).
COMMON = {
    "backbone": "resnet50.tv_in1k",
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
}


def main(benchmark, settings: dict, description: str) -> None:
    name, config = benchmark.__name__.lower(), {**COMMON, **settings}
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("root", type=Path, help="folder of the data set as it was published")
    add("--run", type=Path, default=Path("runs") / name, help="folder for the results")
    add("--weights", default="pretrained", help="pretrained (through timm), none, or a local file")
    add("--workers", type=int, default=4, help="processes that read pictures")
    add("--resume", action="store_true", help="go on with the run that --run holds")
    add("--overwrite", action="store_true", help="replace the run that --run holds")
    args = parser.parse_args()
    run = TrainingRun(args.run, resume=args.resume, overwrite=args.overwrite)
    runs.seed_everything(config["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train = benchmark(args.root, "train")
    weights = {"pretrained": True, "none": False}.get(args.weights, args.weights)
    weights = False if run.begun else weights
    kept = {"freeze_batchnorm": config["freeze_batchnorm"]}
    size, dim = config["image_size"], config["embedding_dim"]
    model = pml_tacl.AttentionEmbedder(config["backbone"], dim, weights, **kept)
    model = model.to(device, memory_format=torch.channels_last)
    plain = model.transform(image_size=size)
    query, *gallery = (benchmark(args.root, part, plain) for part in config["test_splits"])
    if not run.begun:  # where the projection starts
        seen = benchmark(args.root, "train", plain)
        model.whiten(DataLoader(seen, 64, shuffle=True, num_workers=args.workers))

    def measure(epoch: int) -> dict[str, float]:
        searched = gallery[0] if gallery else None
        settings = {"metrics": config["metrics"], "num_workers": args.workers}
        found = evaluate(model, query, reference=searched, **settings)
        print(f"epoch {epoch}:", *(f"{name} {100 * value:.1f}" for name, value in found.items()))
        return found

    parameters = {"lr": config["learning_rate"], "weight_decay": config["weight_decay"]}
    optimizer = torch.optim.AdamW(model.parameters(), **parameters)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"])
    losses = {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": pml_tacl.ContrastiveClusteringLoss(),
        "attention_loss": pml_tacl.AttentionConsistencyLoss(),
    }
    views = {name: model.data_config[name] for name in ("mean", "std")}
    views |= {"crop_scale": config["crop_scale"], "cell_offset": model.cell_offset(size)}
    trainer = pml_tacl.UnsupervisedTrainer(
        model, optimizer, config["batch_size"], losses, train,
        transform=pml_tacl.SiameseTransform(size, model.grid(size), **views),
        eval_transform=plain,
        labeler=pml_tacl.KMeansPseudoLabeler(config["num_clusters"], seed=config["seed"]),
        mining_funcs={"attention_miner": pml_tacl.AttentionConsistencyMiner()},
        images_per_cluster=config["images_per_cluster"],
        swap=pml_tacl.SurroundingsSwap(cell_offset=views["cell_offset"]),
        loss_weights=config["loss_weights"],
        amp_dtype=torch.bfloat16 if device.type == "cuda" else None,
        lr_schedulers={"trunk_scheduler_by_epoch": cosine}, dataloader_num_workers=args.workers,
    )  # fmt: skip
    run.open(config)
    rows = run.train(trainer, config["epochs"], measure)
    print(f"\n{runs.metrics_table(rows)}\n\nper cent; metrics and model: {args.run}")
