"""The measured steps: each function prepares its inputs and returns a function to time."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning.losses import MultiSimilarityLoss

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    SiameseTransform,
)
from pml_tacl.trainers.data import draw_order
from pml_tacl.utils.names import Names
from scaling_parts.clusters import rows, two_level
from scaling_parts.config import BACKBONE, ITERATIONS, NPROBE, SIDE, D

Run = Callable[[], Any]


def make_model() -> AttentionEmbedder:
    return AttentionEmbedder(BACKBONE, embedding_dim=D).to(memory_format=torch.channels_last)


def make_image() -> bytes:
    rng = np.random.default_rng(0)
    cells = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    cells.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def decode(count: int, _: int) -> Run:
    file, views = make_image(), SiameseTransform(SIDE, 14)
    return lambda: [views(Image.open(io.BytesIO(file)).convert("RGB")) for _ in range(count)]


def embed(count: int, _: int) -> Run:
    model = (
        AttentionEmbedder(BACKBONE, embedding_dim=D).eval().to(memory_format=torch.channels_last)
    )
    images = torch.randn(8, 3, SIDE, SIDE).to(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(count // 8):
                model(images)

    model(images)
    return run


def train(count: int, _: int) -> Run:
    model = (
        AttentionEmbedder(BACKBONE, embedding_dim=D).train().to(memory_format=torch.channels_last)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    clusters, attention = ContrastiveClusteringLoss(), AttentionConsistencyLoss()
    # The training uses the backbone's own embedding; the projection is fitted afterwards.
    clusters.set_centroids(torch.randn(1000, model.trunk.num_features))
    labels, points = torch.arange(count) // 4, torch.rand(count, 196, 2) * 2 - 1

    def run(size: int = count) -> None:
        images = torch.randn(2 * size, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
        out = model.forward_features(images)
        first, second = out.feature_maps.chunk(2)
        both = torch.cat([labels[:size]] * 2)
        loss = MultiSimilarityLoss()(out.embeddings, both) + clusters(out.embeddings, both)
        loss = loss + attention(first, second, points[:size], labels[:size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run(4)
    return run


def kmeans(count: int, clusters: int) -> Run:
    embeddings = rows(count)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    bare = faiss.Kmeans(D, clusters, niter=ITERATIONS, spherical=True, min_points_per_centroid=1)
    return lambda: bare.train(embeddings)


def assign(count: int, clusters: int) -> Run:
    embeddings, centres = rows(count), rows(clusters, 1)
    index = faiss.IndexFlatIP(D)
    index.add(centres)
    return lambda: [index.search(embeddings[i : i + 16384], 1) for i in range(0, count, 16384)]


def hierarchy(count: int, clusters: int) -> Run:
    embeddings = rows(count)
    return lambda: two_level(embeddings, clusters)


def store(count: int, _: int) -> Run:
    embeddings = rows(count)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "embeddings.npy"
            table = np.lib.format.open_memmap(path, "w+", np.float32, (count, D))
            for i in range(0, count, 16384):
                table[i : i + 16384] = embeddings[i : i + 16384]
            table.flush()
            held = np.load(path, mmap_mode="r")
            for i in range(0, count, 16384):
                np.array(held[i : i + 16384])

    return run


def draw(count: int, clusters: int) -> Run:
    labels = torch.arange(count) % clusters
    return lambda: draw_order(labels, True, count // 32 * 32, 4, 32)


def listing(count: int, _: int) -> Run:
    return lambda: Names(f"{i // 1000:06}/{i:09}.jpg" for i in range(count))


def search(count: int, _: int) -> Run:
    embeddings = rows(count)
    return lambda: faiss.knn(embeddings, embeddings, 9, metric=faiss.METRIC_INNER_PRODUCT)


def ivf(count: int, _: int) -> Run:
    embeddings = rows(count)
    index = faiss.index_factory(D, f"IVF{lists(count)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(embeddings)
    index.add(embeddings)
    index.nprobe = NPROBE
    return lambda: index.search(embeddings, 9)


def lists(count: int) -> int:
    return round(4 * count**0.5)
