"""What embedding, attention and maps cost beside the backbone itself, in training.

Both sides are one timm model in channels_last: timm's own forward to pooled features, with its
backward, and `AttentionEmbedder.forward_features`, with the backward of its embeddings. They take
turns in one process; what counts is the median of the ratios of neighbouring turns.

    python benchmarks/overhead.py                # writes docs/benchmarks/overhead.md
    python benchmarks/overhead.py --backbone resnet18 --side 64 --batch 4 --rounds 3 --output -
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from _common import cpu_model, publish
from torch import Tensor, nn

from pml_tacl import AttentionEmbedder, __version__


def step(model: nn.Module, output: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Seconds of one forward and backward, gradients thrown away."""
    cuda = images.is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output(images).square().sum().backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    placed = {"device": device, "memory_format": torch.channels_last}
    shape = (arguments.batch, 3, arguments.side, arguments.side)
    images = torch.randn(shape).to(**placed)
    timms = timm.create_model(arguments.backbone, num_classes=0).to(**placed).train()
    ours = AttentionEmbedder(arguments.backbone, 512).to(**placed).train()

    def embed(x: Tensor) -> Tensor:
        return ours.forward_features(x).embeddings

    times: dict[str, list[float]] = {"timm": [], "ours": []}
    contenders = {"timm": (timms, timms), "ours": (ours, embed)}
    for turn in range(arguments.rounds + 1):  # the first one warms up
        # Who goes first alternates too, so that neither always follows the other.
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            seconds = step(*contenders[name], images)
            if turn:
                times[name].append(seconds)
        print(f"turn {turn} of {arguments.rounds}", file=sys.stderr)
    return times


def report(arguments: argparse.Namespace, times: dict[str, list[float]]) -> str:
    ratios = [ours / base for ours, base in zip(times["ours"], times["timm"], strict=True)]
    cuda = arguments.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if cuda else cpu_model()
    threads = "" if cuda else f", threads: {torch.get_num_threads()}"
    lines = [
        "# What attention costs beside the backbone",
        "",
        f"Written by `benchmarks/overhead.py` on {datetime.date.today()}: {machine}{threads}, "
        f"fp32, channels_last, Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, timm {timm.__version__}, pml_tacl {__version__}.",
        "",
        f"`{arguments.backbone}` in training, {arguments.batch} pictures of {arguments.side} x "
        f"{arguments.side} pixels, forward and backward: timm's own to pooled features, and "
        f"`AttentionEmbedder.forward_features` to embeddings (512), maps and attention, in "
        f"{arguments.rounds} turns of both.",
        "",
        "| | median |",
        "| --- | ---: |",
        f"| timm | {statistics.median(times['timm']) * 1e3:.0f} ms |",
        f"| AttentionEmbedder | {statistics.median(times['ours']) * 1e3:.0f} ms |",
        f"| ratio of each turn, median | {statistics.median(ratios):.3f} |",
        f"| least and greatest ratio | {min(ratios):.3f} to {max(ratios):.3f} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="docs/benchmarks/overhead.md", help="- prints it")
    arguments = parser.parse_args()
    text = report(arguments, measure(arguments))
    publish(text, arguments.output)


if __name__ == "__main__":
    main()
