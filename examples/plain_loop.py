"""Train like the quickstart in a plain PyTorch loop, without a trainer or hooks.

    python examples/plain_loop.py

It prints retrieval metrics on unseen characters before and after training.
"""

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.utils.data import DataLoader, RandomSampler, StackDataset
from torchvision.transforms import v2

import pml_tacl
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import embed, evaluate

SEED, EPOCHS, WARMUP_EPOCHS, BATCH_SIZE, PER_CLUSTER, LEARNING_RATE = 0, 6, 3, 64, 4, 5e-3
BACKBONE = {"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 16}
BACKBONE |= {"feature_index": 2, "pooling": "covariance"}  # attention on 8 x 8 cells; from scratch
CLASSES = None  # characters of each half; None for all 280


def main():
    runs.seed_everything(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = pml_tacl.AttentionEmbedder("resnet10t", embedding_dim=128, **BACKBONE)
    model = model.to(device, memory_format=torch.channels_last)
    train, seen, test = (Glyphs(half, num_classes=CLASSES) for half in ("train", "train", "test"))
    seen.transform = test.transform = model.transform(image_size=64)
    train.preload()
    model.fit_projection(DataLoader(seen, BATCH_SIZE))  # initial projection
    colours = [v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5)], 0.9), v2.RandomChannelPermutation()]
    colours += [v2.RandomGrayscale(0.2), v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.5))], 0.3)]
    affine = v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), shear=10, fill=220)
    views = {"crop_scale": (0.6, 1), "geometric": affine, "photometric": v2.Compose(colours)}
    train.transform = pml_tacl.SiameseTransform.for_model(model, 64, flip=False, **views)

    similarity, clustering = MultiSimilarityLoss(), pml_tacl.ContrastiveClusteringLoss()
    attention, miner = pml_tacl.AttentionConsistencyLoss(), pml_tacl.AttentionConsistencyMiner()
    labeler, centroids = pml_tacl.KMeansPseudoLabeler("auto", seed=SEED), None
    steps = len(train) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, epochs=EPOCHS, steps_per_epoch=steps, pct_start=0.1
    )
    rows = {"before": evaluate(model, test)}
    for epoch in range(1, EPOCHS + 1):
        if epoch <= WARMUP_EPOCHS:  # features are still poor: each image is its own cluster
            labels, sampler = torch.arange(len(train)), RandomSampler(train)
        else:
            labels, centroids, _ = labeler(embed(model, seen)[0], centroids)
            clustering.set_centroids(centroids.to(device))
            sampler = MPerClassSampler(labels, PER_CLUSTER, BATCH_SIZE, steps * BATCH_SIZE)
        images = StackDataset(train, labels)
        loader = DataLoader(images, BATCH_SIZE, sampler=sampler, num_workers=1, drop_last=True)
        for (item, _), y in loader:  # _: the true labels, which are not used
            views, transformed, points = item
            both, points, y = torch.cat([views, transformed]), points.to(device), y.to(device)
            out = model.forward_features(both.to(device, memory_format=torch.channels_last))
            e, first, second = out.embeddings, *out.feature_maps.chunk(2)
            i = torch.arange(len(y), device=device)
            pairs = (i, i, i[:0], i[:0]) if centroids is None else miner(first, y)
            loss = similarity(e, y.repeat(2)) + 0.5 * clustering(e, y.repeat(2))
            loss = loss + 3 * attention(first, second, points, y, pairs)
            optimizer.zero_grad()
            loss.backward()
            clustering.move_centroids(e, y.repeat(2))
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch} of {EPOCHS}, last loss {loss.item():.3f}")
    rows["after"] = evaluate(model, test)
    print(runs.metrics_table(rows))
    return rows


if __name__ == "__main__":
    main()
