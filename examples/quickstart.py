"""Train on characters without reading a label, then retrieve characters never seen before.

    python examples/quickstart.py

Writes runs/quickstart/: metrics.json, loss and recall curves, attention overlays, a retrieval
gallery and record-keeper's records. The same script runs on a GPU if there is one.
"""

import argparse

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import pml_tacl
from pml_tacl import runs
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import embed, make_tester
from pml_tacl.training_run import TrainingRun

CONFIG = {"backbone": "resnet10t", "embedding_dim": 128}  # any timm model; this one is small
CONFIG["timm"] = {"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 16}
CONFIG["feature_index"] = 2  # the stage of attention: 8 x 8 places of a 64-pixel picture
CONFIG |= {"num_clusters": "auto", "batch_size": 64, "images_per_cluster": 4}  # auto: a tenth
CONFIG |= {"epochs": 6, "learning_rate": 5e-3}
CONFIG["warmup_epochs"] = 3  # each picture by itself until features are worth clustering
CONFIG["loss_weights"] = {"metric_loss": 1.0, "clustering_loss": 0.5, "attention_loss": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", choices=["bfloat16"], help="mixed precision")
    parser.add_argument("--run", default="runs/quickstart", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="go on with the run there")
    parser.add_argument("--overwrite", action="store_true", help="replace the run there")
    args = parser.parse_args()
    config = {**CONFIG, "seed": args.seed, "amp": args.amp}
    run = TrainingRun(args.run, resume=args.resume, overwrite=args.overwrite)
    run.open(config)
    runs.seed_everything(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = Glyphs("train"), Glyphs("test")  # other characters; train's labels stay unread
    for half in (train, test):
        half.preload()
    stage = {"feature_index": config["feature_index"], **config["timm"]}
    model = pml_tacl.AttentionEmbedder(config["backbone"], config["embedding_dim"], **stage)
    model = model.to(device, memory_format=torch.channels_last)
    train.transform = test.transform = model.transform(image_size=64)
    if not run.begun:
        model.whiten(DataLoader(train, 128))  # where the projection starts
    train.transform = None
    colours = [v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5)], 0.9), v2.RandomChannelPermutation()]
    colours += [v2.RandomGrayscale(0.2), v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.5))], 0.3)]
    affine = v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), shear=10, fill=220)
    views = {"crop_scale": (0.6, 1), "geometric": affine, "photometric": v2.Compose(colours)}
    views |= {name: model.data_config[name] for name in ("mean", "std")}
    views |= {"flip": False, "cell_offset": model.cell_offset(64)}  # a mirrored letter is another
    calculator = pml_tacl.RetrievalCalculator(exclude=("AMI",))
    tester = make_tester(calculator, end_of_testing_hook=run.hooks.end_of_testing_hook)

    def measure(epoch: int) -> dict[str, float]:
        found = tester.test({"test": test}, epoch, model.trunk, model.embedder)["test"]
        return {k.removesuffix("_level0"): v for k, v in found.items() if k != "epoch"}

    optimizer = torch.optim.AdamW(model.parameters(), config["learning_rate"], weight_decay=1e-2)
    steps = config["epochs"] * (len(train) // config["batch_size"]) + 1
    schedule = OneCycleLR(optimizer, config["learning_rate"], total_steps=steps, pct_start=0.1)
    losses = {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": pml_tacl.ContrastiveClusteringLoss(),
        "attention_loss": pml_tacl.AttentionConsistencyLoss(),
    }
    trainer = pml_tacl.UnsupervisedTrainer(
        model, optimizer, config["batch_size"], losses, train,
        transform=pml_tacl.SiameseTransform(64, grid=8, **views), eval_transform=test.transform,
        labeler=pml_tacl.KMeansPseudoLabeler(config["num_clusters"], seed=args.seed),
        mining_funcs={"attention_miner": pml_tacl.AttentionConsistencyMiner()},
        images_per_cluster=config["images_per_cluster"], warmup_epochs=config["warmup_epochs"],
        loss_weights=config["loss_weights"], amp_dtype=args.amp and getattr(torch, args.amp),
        lr_schedulers={"trunk_scheduler_by_iteration": schedule}, dataloader_num_workers=1,
    )  # fmt: skip
    labels = torch.from_numpy(test.labels)
    pixels = normalize(torch.from_numpy(test.images).flatten(1).float(), dim=1)
    rows = {"raw_pixels": calculator.get_accuracy(pixels, labels)}
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is the loader's
    also = {"test_epochs": [config["warmup_epochs"]], "rows": rows}
    rows = run.train(trainer, config["epochs"], measure, **also)
    run.draw(model, test, embed(model, test)[0], labels, title="characters never seen")
    print(f"\n{runs.metrics_table(rows)}\n\nper cent, on {len(test.classes)} unseen characters")
    print(f"pictures, metrics and model: {args.run}")


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
