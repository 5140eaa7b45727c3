"""Combine our losses and miners with those of pytorch-metric-learning, and compare the results.

    python examples/mix_losses.py

A network first learns from two views of each image (NTXentLoss in SelfSupervisedLoss). Starting
from this network, each combination learns from clusters. The script prints R@1 on unseen
characters for each combination.
"""

import copy

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import pml_tacl
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import evaluate

CLASSES = 60
WARMUP_EPOCHS = 6
EPOCHS = 2
BATCH_SIZE = 64
DIM = 64
LEARNING_RATE = 5e-3
WORKERS = 1  # number of processes that compute the views
BACKBONE = {"channels": [16, 32, 64, 128], "stem_width": 8, "output_stride": 16}


def mixes(clusters: int) -> dict[str, tuple[dict[str, nn.Module], dict[str, nn.Module]]]:
    """Return losses and miners by name; the trainer passes each loss the inputs it needs."""
    two_views = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.1))
    # The memory stores embeddings with pseudo-labels, so it must be emptied after a new clustering.
    contrastive = losses.ContrastiveLoss(pos_margin=1, neg_margin=0.5, distance=CosineSimilarity())
    memory = losses.CrossBatchMemory(contrastive, DIM, memory_size=4 * BATCH_SIZE)
    # Classifies the clusters; its weights are trained together with the network.
    classifier = losses.ArcFaceLoss(clusters, DIM)
    matched = {"attention_miner": pml_tacl.AttentionConsistencyMiner()}
    hard = {"tuple_miner": pml_tacl.ContrastiveClusteringMiner()}  # for losses that need pairs
    clustering = pml_tacl.ContrastiveClusteringLoss()
    attention = pml_tacl.AttentionConsistencyLoss()
    return {
        "MultiSimilarity": ({"pairs": losses.MultiSimilarityLoss()}, {}),
        "MultiSimilarity, CCL, TAC": (
            {"pairs": losses.MultiSimilarityLoss(), "ccl": clustering, "tac": attention},
            matched,
        ),
        "TripletMargin by our miner, TAC": (
            {"triplets": losses.TripletMarginLoss(margin=0.2), "tac": attention},
            {**matched, **hard},
        ),
        "ArcFace, CCL": ({"classes": classifier, "ccl": clustering}, {}),
        "CrossBatchMemory, CCL": ({"memory": memory, "ccl": clustering}, {}),
        "NTXent of two views, CCL": ({"views": two_views, "ccl": clustering}, {}),
    }


def main() -> dict[str, float]:
    runs.seed_everything(0)
    start = pml_tacl.AttentionEmbedder(
        "resnet10t", embedding_dim=DIM, pooling="covariance", **BACKBONE
    )
    train, test = Glyphs("train", num_classes=CLASSES), Glyphs("test", num_classes=CLASSES)
    train.transform = test.transform = start.transform(image_size=64)
    start.fit_projection(DataLoader(train, BATCH_SIZE), progress=False)  # initial projection
    train.transform = None
    clusters = len(train) // 10
    affine = v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), fill=220)
    colour = v2.Compose([v2.ColorJitter(0.5, 0.5, 0.5), v2.RandomChannelPermutation()])
    two_views = pml_tacl.SiameseTransform.for_model(
        start, 64, geometric=affine, photometric=colour, flip=False
    )

    def recall(model: nn.Module) -> float:
        return evaluate(model, test, metrics=["recall_at_1"], progress=False)["recall_at_1"]

    def fit(model: nn.Module, loss_funcs: dict, miners: dict, epochs: int, warmup: int) -> float:
        parameters = [model, *loss_funcs.values()]  # only ArcFace has weights
        parameters = [p for module in parameters for p in module.parameters()]
        trainer = pml_tacl.UnsupervisedTrainer(
            model,
            torch.optim.AdamW(parameters, LEARNING_RATE),
            BATCH_SIZE,
            loss_funcs,
            train,
            transform=two_views,
            eval_transform=test.transform,
            mining_funcs=miners,
            labeler=pml_tacl.KMeansPseudoLabeler(clusters),
            warmup_epochs=warmup,
            recluster_every=epochs,  # cluster once: ArcFace and the memory depend on the labels
            progress=False,
            dataloader_num_workers=WORKERS,
        )
        trainer.train(num_epochs=epochs)
        return recall(model)

    found = {"untrained": recall(start)}
    views = {"views": losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.1))}
    found["NTXent of two views, no clusters"] = fit(start, views, {}, WARMUP_EPOCHS, WARMUP_EPOCHS)
    for name, (loss_funcs, miners) in mixes(clusters).items():
        found[name] = fit(copy.deepcopy(start), loss_funcs, miners, EPOCHS, 0)
    for name, value in found.items():
        print(f"{name:<34} R@1 {100 * value:5.1f}")
    return found


if __name__ == "__main__":
    main()
