"""Measure how well the label-free criteria of EarlyStopping correlate with R@1, on Glyphs.

    python benchmarks/early_stopping.py    # writes docs/benchmarks/early_stopping.md; 15 minutes

The network, losses and clusters are those of the quickstart. The learning rate is constant and
there are more epochs than in the quickstart, so that there is a reason to stop.
"""

import argparse
import datetime
import statistics
import sys
from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    SiameseTransform,
    UnsupervisedTrainer,
)
from pml_tacl.callbacks import EarlyStopping, Evaluate, chain
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _common import cpu_model, publish
from quickstart import CONFIG, MODEL

RATE = 2e-3  # the quickstart has a peak of 5e-3 and ends at 0
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "early_stopping.md"


def trained(seed: int, epochs: int, classes: int | None) -> list[tuple[int, float, float, float]]:
    """Return epoch, R@1 on unseen characters, stability and separation (nan: not available)."""
    runs.seed_everything(seed)
    train, test = (Glyphs(split, num_classes=classes) for split in ("train", "test"))
    model = AttentionEmbedder(**MODEL)
    train.transform = test.transform = model.transform(image_size=64)
    model.fit_projection(DataLoader(train, 128), progress=False)
    train.transform = None
    measure = Evaluate(test, metrics=["recall_at_1"])
    never = 10**6
    watch = {name: EarlyStopping(name, patience=never) for name in ("stability", "separation")}
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2)
    trainer = UnsupervisedTrainer(
        model,
        optimizer,
        CONFIG["batch_size"],
        {
            "metric_loss": MultiSimilarityLoss(),
            "clustering_loss": ContrastiveClusteringLoss(),
            "attention_loss": AttentionConsistencyLoss(),
        },
        train,
        transform=SiameseTransform.for_model(
            model,
            64,
            crop_scale=(0.6, 1.0),
            geometric=v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), shear=10, fill=220),
            flip=False,
        ),
        eval_transform=test.transform,
        labeler=KMeansPseudoLabeler("auto", seed=seed),
        mining_funcs={"attention_miner": AttentionConsistencyMiner()},
        warmup_epochs=CONFIG["warmup_epochs"],
        images_per_cluster=CONFIG["images_per_cluster"],
        loss_weights=CONFIG["loss_weights"],
        progress=False,
        end_of_epoch_hook=chain(
            measure,
            *watch.values(),
            lambda trainer: print(
                f"seed {seed}, epoch {trainer.epoch}:",
                [hook.history.get(trainer.epoch) for hook in (measure, *watch.values())],
                flush=True,
            ),
        ),
    )
    trainer.train(num_epochs=epochs)
    none = float("nan")
    return [
        (epoch, found["recall_at_1"], *(hook.history.get(epoch, none) for hook in watch.values()))
        for epoch, found in measure.history.items()
    ]


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Return Spearman's rank correlation of values without ties; nan for fewer than three."""
    if len(first) < 3:
        return float("nan")
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return statistics.correlation(*ranks)


def page(results: dict[int, list[tuple[int, float, float, float]]], classes: int | None) -> str:
    half = "the whole half" if classes is None else f"{classes} classes of each half"
    versions = ", ".join(f"{name} {version}" for name, version in runs.versions().items())
    lines = [
        "# Do the criteria of early stopping follow the labels?",
        "",
        f"Written by `benchmarks/early_stopping.py` on {datetime.date.today()}: {cpu_model()}; "
        f"{versions}.",
        "",
        f"Data: Glyphs ({half}). The network and losses are those of the quickstart, with a "
        f"constant learning rate of {RATE} and {CONFIG['warmup_epochs']} epochs of warm-up. R@1 is "
        "measured on characters that are not in the training. Neither the training nor the two "
        "criteria use labels.",
    ]
    for seed, rows in results.items():
        lines += ["", f"## Seed {seed}", "", "| epoch | R@1, % | stability | separation |"]
        lines += ["| ---: | ---: | ---: | ---: |"]
        for epoch, recall, *others in rows:
            shown = " | ".join("–" if v != v else f"{v:.3f}" for v in others)
            lines.append(f"| {epoch} | {100 * recall:.1f} | {shown} |")
        lines.append("")
        for at, name in ((2, "stability"), (3, "separation")):
            judged = [row for row in rows if row[at] == row[at]]
            rho = rank_correlation([row[1] for row in judged], [row[at] for row in judged])
            over = f"over its {len(judged)} epochs"
            lines.append(f"Rank correlation of {name} with R@1 {over}: {rho:.2f}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--classes", type=int, help="characters of each half (default: all)")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    results = {seed: trained(seed, args.epochs, args.classes) for seed in args.seeds}
    publish(page(results, args.classes), args.out)


if __name__ == "__main__":
    main()
