"""Measure the cost of the embedder, the losses and the embedding pass beside the backbone.

Each row compares two contenders that take turns in one process, in channels_last. The result is
the median ratio of neighbouring turns.

    python benchmarks/overhead.py                # writes docs/benchmarks/overhead.md
    python benchmarks/overhead.py --backbone resnet18 --side 64 --batch 8 --rounds 2 --output -
"""

import argparse
import datetime
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import PIL.Image
import timm
import torch
from _common import cpu_model, publish, ratio_line, take_turns
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    SiameseTransform,
    __version__,
)
from pml_tacl.evaluation import embed

PER_CLUSTER, CLUSTERS = 4, 100


def learns(
    model: nn.Module,
    loss: Callable[[], Tensor],
    after: Callable[[], None] = lambda: None,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[[], None]:
    """Return a function that runs forward, backward and `after`, and discards the gradients."""

    def step() -> None:
        with precision():
            value = loss()
        value.backward()
        after()
        model.zero_grad(set_to_none=True)

    return step


def measure(arguments: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    placed = {"device": device, "memory_format": torch.channels_last}
    batch, side = arguments.batch, arguments.side
    images = torch.randn(2 * batch, 3, side, side).to(**placed)
    bare = timm.create_model(arguments.backbone, num_classes=0).to(**placed).train()
    ours = AttentionEmbedder(arguments.backbone, embedding_dim=512).to(**placed).train()

    def turns(base: Callable[[], object], with_us: Callable[[], object], title: str) -> str:
        contenders = {"base": base, "ours": with_us}
        times = take_turns(contenders, arguments.rounds, device.type == "cuda")
        return ratio_line(title, times["ours"], times["base"])

    half_type = getattr(torch, arguments.amp) if arguments.amp else None
    precision = partial(torch.autocast, device.type, half_type, half_type is not None)
    half = images[:batch]
    lines = [
        turns(
            learns(bare, lambda: bare(half).square().sum(), precision=precision),
            learns(
                ours,
                lambda: ours.forward_features(half).embeddings.square().sum(),
                precision=precision,
            ),
            f"training pass: timm to pooled features / `AttentionEmbedder` to embeddings, maps "
            f"and attention, {batch} images",
        )
    ]

    labels = torch.arange(batch, device=device) // PER_CLUSTER
    twice = torch.cat([labels, labels])
    views = SiameseTransform(side, ours.grid(side))
    blank = PIL.Image.new("RGB", (side, side))
    points = torch.stack([views(blank)[2] for _ in range(batch)]).to(device)
    similarity, attention, miner = (
        MultiSimilarityLoss(),
        AttentionConsistencyLoss(),
        AttentionConsistencyMiner(),
    )
    clustering = ContrastiveClusteringLoss()
    clustering.set_centroids(torch.randn(CLUSTERS, ours.trunk.num_features, device=device))

    seen: list[Tensor] = []

    def full() -> Tensor:
        out = ours.forward_features(images)
        seen[:] = [out.embeddings]
        first, second = out.feature_maps.chunk(2)
        loss = similarity(out.embeddings, twice) + clustering(out.embeddings, twice)
        return loss + attention(first, second, points, labels, miner(first, labels))

    lines.append(
        turns(
            learns(ours, lambda: similarity(ours(images), twice), precision=precision),
            learns(ours, full, lambda: clustering.move_centroids(seen[0], twice), precision),
            f"training step, both views of {batch} images: MultiSimilarityLoss / with CCL, TAC "
            "and its miner",
        )
    )

    data = TensorDataset(images, twice)

    @torch.inference_mode()
    def inference() -> None:
        bare.eval()
        with precision():
            for part in images.split(batch):
                bare(part)

    def embedding() -> None:
        with precision():
            embed(ours, data, batch_size=batch, progress=False)

    lines.append(
        turns(
            inference,
            embedding,
            f"embedding pass of {2 * batch} images: timm's inference / `embed`",
        )
    )
    return lines


def report(arguments: argparse.Namespace, rows: list[str]) -> str:
    cuda = arguments.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if cuda else cpu_model()
    clock = "wall clock" if cuda else f"seconds of CPU, threads: {torch.get_num_threads()}"
    lines = [
        "# What the parts cost beside the backbone",
        "",
        f"Written by `benchmarks/overhead.py` on {datetime.date.today()}: {machine}, {clock}, "
        f"{arguments.amp or 'fp32'}, channels_last, Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, timm {timm.__version__}, pml_tacl {__version__}.",
        "",
        f"`{arguments.backbone}`, {arguments.side} x {arguments.side} pixels. In each row, both "
        f"sides take {arguments.rounds} turns.",
        "",
        "| base / with pml_tacl | base | ours | ratio, median | ratio, range |",
        "| --- | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 1 disturbs least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", default="", help="type of autocast, such as bfloat16")
    parser.add_argument("--output", default="docs/benchmarks/overhead.md", help="- prints it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    publish(report(arguments, measure(arguments)), arguments.output)


if __name__ == "__main__":
    main()
