"""Do the label-free criteria of EarlyStopping follow what labels say? Trained on Glyphs.

    python benchmarks/early_stopping.py

Trains as the quickstart does, but with a constant rate for more epochs, so that there is something
to stop, and prints for each epoch R@1 on the test half beside the criteria, and how well their
ranks agree. 10 to 15 minutes for two seeds on two cores.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torchvision.transforms import v2

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    SiameseTransform,
    UnsupervisedTrainer,
    runs,
)
from pml_tacl.callbacks import EarlyStopping, Evaluate, chain
from pml_tacl.datasets import Glyphs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import CONFIG

WARMUP = 3


def trained(seed: int, epochs: int, classes: int | None) -> list[tuple[int, float, float, float]]:
    """Epoch, R@1 on characters never seen, stability and separation (nan: none yet)."""
    runs.seed_everything(seed)
    train, test = (Glyphs(split, num_classes=classes) for split in ("train", "test"))
    model = AttentionEmbedder(CONFIG["backbone"], CONFIG["embedding_dim"], **CONFIG["timm"])
    test.transform = model.transform(image_size=64)
    measure = Evaluate(test, metrics=["recall_at_1"])
    never = 10**6
    watch = {name: EarlyStopping(name, patience=never) for name in ("stability", "separation")}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
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
        transform=SiameseTransform(
            64,
            4,
            crop_scale=(0.6, 1.0),
            geometric=v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), shear=10, fill=220),
            flip=False,
            mean=model.data_config["mean"],
            std=model.data_config["std"],
        ),
        eval_transform=test.transform,
        labeler=KMeansPseudoLabeler("auto", seed=seed),
        mining_funcs={"attention_miner": AttentionConsistencyMiner()},
        warmup_epochs=WARMUP,
        progress=False,
        end_of_epoch_hook=chain(measure, *watch.values()),
    )
    trainer.train(num_epochs=epochs)
    none = float("nan")
    return [
        (epoch, found["recall_at_1"], *(hook.history.get(epoch, none) for hook in watch.values()))
        for epoch, found in measure.history.items()
    ]


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, for values without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return statistics.correlation(*ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--classes", type=int, help="of each half; all if not given")
    args = parser.parse_args()
    for seed in args.seeds:
        rows = trained(seed, args.epochs, args.classes)
        print(f"seed {seed}\n\n| epoch | R@1 | stability | separation |")
        print("| ---: | ---: | ---: | ---: |")
        for epoch, *values in rows:
            recall, *others = values
            shown = " | ".join("–" if v != v else f"{v:.3f}" for v in others)
            print(f"| {epoch} | {100 * recall:.1f} | {shown} |")
        for at, name in ((2, "stability"), (3, "separation")):
            judged = [row for row in rows if row[at] == row[at]]
            rho = rank_correlation([row[1] for row in judged], [row[at] for row in judged])
            print(f"\nrank correlation of {name} with R@1: {rho:.2f}")
        print(flush=True)


if __name__ == "__main__":
    main()
