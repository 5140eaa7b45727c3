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
from pml_tacl.trainers.checkpoint import checkpoints

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


def arguments(description: str, name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("root", type=Path, help="folder of the data set as it was published")
    add("--run", type=Path, default=Path("runs") / name, help="folder for the results")
    add("--weights", default="pretrained", help="pretrained (through timm), none, or a local file")
    add("--workers", type=int, default=4, help="processes that read pictures")
    add("--resume", action="store_true", help="go on with the run that --run holds")
    add("--overwrite", action="store_true", help="replace the run that --run holds")
    return parser.parse_args()


def main(benchmark, settings: dict, description: str) -> None:
    config = {**COMMON, **settings}
    args = arguments(description, benchmark.__name__.lower())
    runs.check_run(args.run, resume=args.resume, overwrite=args.overwrite)
    runs.seed_everything(config["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun = args.resume and bool(checkpoints(args.run / "checkpoints"))

    train = benchmark(args.root, "train")
    weights = {"pretrained": True, "none": False}.get(args.weights, args.weights)
    model = pml_tacl.AttentionEmbedder(
        config["backbone"],
        config["embedding_dim"],
        False if begun else weights,
        freeze_batchnorm=config["freeze_batchnorm"],
    ).to(device, memory_format=torch.channels_last)
    plain = model.transform(image_size=config["image_size"])
    query, *gallery = (benchmark(args.root, part, plain) for part in config["test_splits"])
    if not begun:  # where the projection starts
        seen = benchmark(args.root, "train", plain)
        model.whiten(DataLoader(seen, 64, shuffle=True, num_workers=args.workers))
    with torch.inference_mode():
        example = torch.zeros(1, 3, *[config["image_size"]] * 2, device=device)
        grid = model.eval().forward_features(example).feature_maps.shape[2:]

    def test() -> dict[str, float]:
        searched = gallery[0] if gallery else None
        settings = {"metrics": config["metrics"], "num_workers": args.workers}
        found = evaluate(model, query, reference=searched, **settings)
        print("  ".join(f"{name} {100 * value:.1f}" for name, value in found.items()))
        return found

    optimizer = torch.optim.AdamW(
        model.parameters(), config["learning_rate"], weight_decay=config["weight_decay"]
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"])
    losses = {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": pml_tacl.ContrastiveClusteringLoss(),
        "attention_loss": pml_tacl.AttentionConsistencyLoss(),
    }
    views = {"mean": model.data_config["mean"], "std": model.data_config["std"]}
    views |= {"crop_scale": config["crop_scale"]}
    offset = model.cell_offset(config["image_size"])
    views |= {"cell_offset": offset}
    trainer = pml_tacl.UnsupervisedTrainer(
        model,
        optimizer,
        config["batch_size"],
        losses,
        train,
        transform=pml_tacl.SiameseTransform(config["image_size"], tuple(grid), **views),
        eval_transform=plain,
        labeler=pml_tacl.KMeansPseudoLabeler(config["num_clusters"], seed=config["seed"]),
        mining_funcs={"attention_miner": pml_tacl.AttentionConsistencyMiner()},
        images_per_cluster=config["images_per_cluster"],
        swap=pml_tacl.SurroundingsSwap(cell_offset=offset),
        loss_weights=config["loss_weights"],
        amp_dtype=torch.bfloat16 if device.type == "cuda" else None,
        lr_schedulers={"trunk_scheduler_by_epoch": cosine},
        dataloader_num_workers=args.workers,
        end_of_epoch_hook=lambda trainer: trainer.save_checkpoint(
            args.run / "checkpoints", extra={"before": before}
        ),
    )
    run = runs.open_run(args.run, config, resume=args.resume, overwrite=args.overwrite)
    before = trainer.load_checkpoint(run / "checkpoints")["before"] if begun else test()
    trainer.train(start_epoch=trainer.epoch + 1, num_epochs=config["epochs"])
    rows = {"before": before, "after": test()}
    runs.write_json(run / "metrics.json", {**rows, "config": config, "versions": runs.versions()})
    model.eval().save_pretrained(run / "model")
    print(f"metrics and model: {run}")
