"""Retrieval of a trained network, and the cost of its training."""

import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pml_tacl import RetrievalCalculator
from pml_tacl.utils.modes import evaluating
from retrieval_parts.data import Images


@torch.no_grad()  # not inference mode: the result is used in training
def embed_images(model: nn.Module, images: Tensor, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """Return unit embeddings (N, D) of uint8 images, on the device of the network."""
    parts = []
    with evaluating(model):
        for part in images.split(128):
            pixels = normalise(part.float() / 255)
            parts.append(model(pixels.contiguous(memory_format=torch.channels_last)))
    return F.normalize(torch.cat(parts).float())


def measure(
    model: nn.Module, images: Images, normalise: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Return R@1, 2, 4, 8, MAP@R and NMI, in [0, 1]."""
    calculator = RetrievalCalculator(
        include=(
            *(f"recall_at_{k}" for k in (1, 2, 4, 8)),
            "mean_average_precision_at_r",
            "NMI",
        )
    )
    embeddings = embed_images(model, images.images, normalise).cpu()
    labels, queries = images.labels, images.queries
    if queries is None:
        return calculator.get_accuracy(embeddings, labels)
    return calculator.get_accuracy(
        embeddings[queries], labels[queries], embeddings[~queries], labels[~queries]
    )


def purity(clusters: Tensor, labels: Tensor) -> float:
    """Return the fraction of images in the most frequent class of their cluster."""
    if len(clusters) == 0:
        return float("nan")
    table = torch.zeros(int(clusters.max()) + 1, int(labels.max()) + 1)
    table.index_put_((clusters, labels), torch.ones(len(labels)), accumulate=True)
    return float(table.amax(1).sum() / len(labels))


def forget_peak() -> None:
    """Reset the peak memory, if the system supports it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """Return the peak memory of this process since `forget_peak`, or since its start."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
