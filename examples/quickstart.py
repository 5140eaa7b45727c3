"""Train on characters without reading a label, then retrieve characters never seen before.

    python examples/quickstart.py

Writes runs/quickstart/: metrics.json, loss and recall curves, attention overlays, a retrieval
gallery and record-keeper's records. The same script runs on a GPU if there is one.
"""

import argparse
from collections import defaultdict

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    RetrievalCalculator,
    SiameseTransform,
    UnsupervisedTrainer,
    runs,
)
from pml_tacl import visualize as vis
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import embed, make_tester

CONFIG = {
    "backbone": "resnet10t",  # any timm model; this one is small and starts from scratch
    "timm": {"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 16},
    "feature_index": 2,  # the stage of attention: 8 x 8 places of a 64-pixel picture
    "embedding_dim": 128,
    "num_clusters": "auto",  # a tenth of the pictures
    "batch_size": 64,
    "images_per_cluster": 4,
    "epochs": 6,
    "warmup_epochs": 3,  # each picture is its own cluster until features are worth clustering
    "learning_rate": 5e-3,
    "loss_weights": {"metric_loss": 1.0, "clustering_loss": 0.5, "attention_loss": 3.0},
    "amp": None,  # or "bfloat16": mixed precision
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", choices=["bfloat16"], default=CONFIG["amp"], help="precision")
    parser.add_argument("--run", default="runs/quickstart", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run there")
    args = parser.parse_args()
    config = {**CONFIG, "seed": args.seed, "amp": args.amp}
    run = runs.open_run(args.run, config, overwrite=args.overwrite)
    runs.seed_everything(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # The labels of the training half are never read; the test half has other characters.
    train, test = Glyphs("train"), Glyphs("test")
    for half in (train, test):
        half.preload()

    model = AttentionEmbedder(
        config["backbone"],
        config["embedding_dim"],
        feature_index=config["feature_index"],
        **config["timm"],
    )
    model = model.to(device, memory_format=torch.channels_last)
    train.transform = test.transform = model.transform(image_size=64)
    model.whiten(DataLoader(train, 128))  # where the projection starts
    train.transform = None
    siamese = SiameseTransform(
        size=64,
        grid=8,  # the places of attention, and
        cell_offset=model.cell_offset(64),  # where they look
        crop_scale=(0.6, 1.0),
        geometric=v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), shear=10, fill=220),
        photometric=v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5)], 0.9),
                v2.RandomChannelPermutation(),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.5))], 0.3),
            ]
        ),
        flip=False,  # a mirrored letter is another letter
        mean=model.data_config["mean"],
        std=model.data_config["std"],
    )

    hooks = runs.make_hooks(run / "records")
    calculator = RetrievalCalculator(exclude=("AMI",))
    tester = make_tester(calculator, end_of_testing_hook=hooks.end_of_testing_hook)
    recalls, history = {}, defaultdict(list)

    def test_at(epoch: int) -> dict[str, float]:
        found = tester.test({"test": test}, epoch, model.trunk, model.embedder)["test"]
        recalls[epoch] = {k.removesuffix("_level0"): v for k, v in found.items() if k != "epoch"}
        return recalls[epoch]

    def remember_losses(trainer: UnsupervisedTrainer) -> None:
        hooks.end_of_iteration_hook(trainer)
        for name, value in trainer.losses.items():
            history[name].append(float(value))

    def end_epoch(trainer: UnsupervisedTrainer) -> None:
        # Watched, never chosen by: the last epoch is the result.
        if trainer.epoch in (config["warmup_epochs"], config["epochs"]):
            test_at(trainer.epoch)
        hooks.record_keeper.save_records()
        trainer.save_checkpoint(run / "checkpoints")

    optimizer = torch.optim.AdamW(model.parameters(), config["learning_rate"], weight_decay=1e-2)
    steps = config["epochs"] * (len(train) // config["batch_size"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config["learning_rate"], total_steps=steps + 1, pct_start=0.1
    )
    trainer = UnsupervisedTrainer(
        model,
        optimizer,
        config["batch_size"],
        {
            "metric_loss": MultiSimilarityLoss(),
            "clustering_loss": ContrastiveClusteringLoss(),
            "attention_loss": AttentionConsistencyLoss(),
        },
        train,
        transform=siamese,
        eval_transform=test.transform,
        labeler=KMeansPseudoLabeler(config["num_clusters"], seed=args.seed),
        mining_funcs={"attention_miner": AttentionConsistencyMiner()},
        images_per_cluster=config["images_per_cluster"],
        warmup_epochs=config["warmup_epochs"],
        loss_weights=config["loss_weights"],
        amp_dtype=config["amp"] and getattr(torch, config["amp"]),
        lr_schedulers={"trunk_scheduler_by_iteration": schedule},
        dataloader_num_workers=1,
        end_of_iteration_hook=remember_losses,
        end_of_epoch_hook=end_epoch,
    )

    labels, pictures = torch.from_numpy(test.labels), torch.from_numpy(test.images)
    raw = calculator.get_accuracy(normalize(pictures.flatten(1).float(), dim=1), labels)
    before = test_at(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))  # one core is the loader's
    trainer.train(num_epochs=config["epochs"])
    torch.set_num_threads(threads)
    after = recalls[config["epochs"]]
    rows = {"raw_pixels": raw, "before": before, "after": after}
    runs.write_json(run / "metrics.json", {**rows, "config": config, "versions": runs.versions()})

    model.eval().save_pretrained(run / "model")
    shown = torch.linspace(0, len(test) - 1, 8).long()  # eight pictures, evenly over the classes
    embeddings, _ = embed(model, test)
    with torch.inference_mode():
        views = torch.stack([test[int(i)][0] for i in shown]).to(device)
        attention = model.forward_features(views).attention.cpu()
    nearest = (embeddings[shown] @ embeddings.T).topk(9).indices[:, 1:]
    for name, figure in {
        "curves": vis.training_curves(history, recalls),
        "recall": vis.recall_curve(rows),
        "attention": vis.attention_overlay(pictures[shown].numpy(), attention),
        "gallery": vis.retrieval_gallery(
            pictures[shown].numpy(),
            [pictures[row].numpy() for row in nearest],
            correct=labels[nearest] == labels[shown, None],
            title="characters never seen in training, and their 8 nearest",
        ),
    }.items():
        vis.save_figure(figure, run / f"{name}.png")
    print(f"\n{runs.metrics_table(rows)}\n\nper cent, on {len(test.classes)} unseen characters")
    print(f"pictures, metrics and model: {run}")


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
