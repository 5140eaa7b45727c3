"""Everything that depends on a GPU, tested and measured by one command of at most 8 minutes.

Nothing is downloaded; weights are random. Each part that fails or does not fit into the time is
named on the page, and the others go on. What is known after each part is in the JSON already.

    python benchmarks/gpu.py      # with CUDA: writes docs/benchmarks/gpu.md and gpu.json beside it
    python benchmarks/gpu.py      # without: says so, runs small sizes on the CPU, prints the page

The exit status is 0 unless a test or a part has failed.
"""

import argparse
import datetime
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import losses
import numpy as np
import overhead
import timm
import torch
from _common import cpu_model, publish, take_turns
from evaluation import data as labelled_embeddings
from PIL import Image
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pml_tacl import RetrievalCalculator, SiameseTransform, __version__

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0
_TABLE = list[list[str]]  # the head is the first row


class Sizes(Namespace):
    """What is measured, on a GPU or, small, on a CPU."""

    backbones: dict[str, int]  # and the images in a batch
    side: int
    rounds: int
    cases: str  # of losses.py, those whose name holds this
    workers: list[int]
    images: int  # read by each number of workers
    evaluated: tuple[int, int]  # embeddings and classes
    clustered: tuple[int, int]  # embeddings and clusters


ON_GPU = Sizes(
    backbones={"resnet50": 64, "vit_small_patch16_224": 64},
    side=224,
    rounds=5,
    cases="",
    workers=[1, 2, 4, 8, 16],
    images=1024,
    evaluated=(60_000, 12_000),
    clustered=(60_000, 1_000),
)
ON_CPU = Sizes(
    backbones={"test_resnet": 8},
    side=64,
    rounds=1,
    cases="miners",
    workers=[0, 1],
    images=32,
    evaluated=(2_000, 400),
    clustered=(4_000, 40),
)


def tests(device: torch.device, sizes: Sizes, seconds: float) -> dict[str, Any]:
    """Run the tests of the marker gpu in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--device", device.type, "tests/test_gpu.py"]
    if device.type == "cuda":
        command += ["tests/test_functional_runtime.py", "tests/test_transforms.py"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        status = -1
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    print(output[-4000:], file=sys.stderr)
    summary = output.strip().splitlines()[-1] if output.strip() and status >= 0 else "out of time"
    return {"summary": summary.strip("= "), "failed": failed, "status": status}


def loss_ratios(device: torch.device, sizes: Sizes) -> _TABLE:
    """Return forward and backward of each loss over its dense floor, as docs/benchmarks/losses."""
    rows = [["loss or miner", "case", "time", "relative to the first"]]
    for case, make in losses.CASES.items():
        if sizes.cases not in case:
            continue
        with device:
            times = losses.medians(make(), sizes.rounds)
        first = next(iter(times.values()))
        rows += [
            [name, case, f"{time_ * 1e3:.2f} ms", f"{time_ / first:.2f} x"]
            for name, time_ in times.items()
        ]
    return rows


def steps(device: torch.device, sizes: Sizes) -> _TABLE:
    """Return training steps and embedding passes beside timm's own, as docs/benchmarks/overhead."""
    rows = [["backbone, batch", "base / with pml_tacl", "base", "ours", "ratio", "ratio, range"]]
    for backbone, batch in sizes.backbones.items():
        arguments = Namespace(
            device=device.type,
            backbone=backbone,
            side=sizes.side,
            batch=batch,
            rounds=sizes.rounds,
            amp="bfloat16",
        )
        for line in overhead.measure(arguments):
            rows.append([f"{backbone}, {batch}", *line.strip("| ").split(" | ")])
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


class Files(Dataset[Any]):
    """JPEG files of 500 x 375 pixels in memory, decoded and made into two views."""

    def __init__(self, count: int, side: int, grid: int) -> None:
        cells = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG")
        self.file, self.count, self.views = file.getvalue(), count, SiameseTransform(side, grid)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.views(Image.open(io.BytesIO(self.file)).convert("RGB"))


def loading(device: torch.device, sizes: Sizes) -> _TABLE:
    """Return the images/s of two views that reach the device, and what the device would train."""
    rows = [["what", "images/s"]]
    for workers in sizes.workers:
        loader = DataLoader(
            Files(sizes.images, sizes.side, sizes.side // 16),
            batch_size=32,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )
        seconds = []
        for _ in range(2):  # the second time the processes are there
            start = time.perf_counter()
            for batch in loader:
                sent = [part.to(device, non_blocking=True) for part in batch]
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        del loader, sent
        rows.append([f"loader of {workers} workers, JPEG", f"{sizes.images / seconds[-1]:.0f}"])
    for backbone, batch in sizes.backbones.items():
        placed = {"device": device, "memory_format": torch.channels_last}
        model = timm.create_model(backbone, num_classes=0).to(**placed).train()
        images = torch.randn(2 * batch, 3, sizes.side, sizes.side).to(**placed)

        def step(model: Any = model, images: Tensor = images) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                value = model(images).square().mean()
            value.backward()
            model.zero_grad(set_to_none=True)

        times = take_turns({"step": step}, sizes.rounds, device.type == "cuda")["step"]
        speed = batch / float(np.median(times))
        rows.append([f"training of `{backbone}` on two views, data on the device", f"{speed:.0f}"])
    return rows


def evaluation(device: torch.device, sizes: Sizes) -> _TABLE:
    """Return the time of the ranking metrics beside PML's calculator."""
    embeddings, labels = (x.to(device) for x in labelled_embeddings(*sizes.evaluated))
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculators = {
        "`AccuracyCalculator` of PML": AccuracyCalculator(names, k="max_bin_count", device=device),
        "`RetrievalCalculator`": RetrievalCalculator(include=names, device=device),
    }
    rows, first = [["calculator", "time", "relative to PML", "R@1"]], 0.0
    for name, calculator in calculators.items():
        calculator.get_accuracy(embeddings[:500], labels[:500])  # kernels are loaded now
        start = time.perf_counter()
        values = calculator.get_accuracy(embeddings, labels)
        seconds = time.perf_counter() - start
        first = first or seconds
        right = f"{values['precision_at_1']:.4f}"
        rows.append([name, f"{seconds:.2f} s", f"{seconds / first:.2f} x", right])
    return rows


def kmeans_of_torch(rows: Tensor, clusters: int, iterations: int = 20) -> Tensor:
    """Spherical k-means on the rows' device, from rows as the first centroids."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:clusters]
    centroids = rows[chosen.to(rows.device)]
    for _ in range(iterations):
        own = torch.cat([(part @ centroids.T).argmax(1) for part in rows.split(1 << 15)])
        sums = torch.zeros_like(centroids).index_add_(0, own, rows)
        empty = ~sums.any(dim=1)
        centroids = torch.nn.functional.normalize(torch.where(empty[:, None], centroids, sums))
    return centroids


def clustering(device: torch.device, sizes: Sizes) -> _TABLE:
    """Return the time and the mean similarity of k-means on the device and of faiss on the CPU."""
    count, clusters = sizes.clustered
    embeddings = labelled_embeddings(count, clusters)[0]
    there = embeddings.to(device)
    engines: dict[str, Callable[[], Tensor]] = {}

    def of_faiss() -> Tensor:
        kmeans = faiss.Kmeans(
            embeddings.shape[1], clusters, niter=20, spherical=True, min_points_per_centroid=1
        )
        kmeans.train(embeddings.numpy())
        return torch.from_numpy(kmeans.centroids)

    engines["faiss, CPU"] = of_faiss
    engines[f"torch, {device.type}"] = lambda: kmeans_of_torch(there, clusters).cpu()
    rows, first = [["k-means, 20 iterations", "time", "relative to faiss", "mean similarity"]], 0.0
    for name, run in engines.items():
        if name.startswith("torch"):
            run()  # kernels are loaded now
        start = time.perf_counter()
        centroids = run()
        seconds = time.perf_counter() - start
        first = first or seconds
        best = [(part @ centroids.T).amax(1) for part in embeddings.split(1 << 14)]
        similar = f"{torch.cat(best).mean():.4f}"
        rows.append([name, f"{seconds:.2f} s", f"{seconds / first:.2f} x", similar])
    return rows


PARTS: dict[str, Callable[[torch.device, Sizes], _TABLE]] = {
    "Losses and miners, fp32": loss_ratios,
    "Training step and embedding pass, bf16": steps,
    "Reading images beside computing": loading,
    "Evaluation": evaluation,
    "K-means": clustering,
}


def machine(device: torch.device) -> str:
    if device.type != "cuda":
        return cpu_model()
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(cards)} x {cards[0]} (CUDA {torch.version.cuda}, {os.cpu_count()} CPU cores)"


def page(found: dict[str, Any], sizes: Sizes) -> str:
    """Write what was found as a page."""
    tested = found["tests"]
    lines = [
        "# What depends on a GPU",
        "",
        f"Written by `benchmarks/gpu.py` on {found['date']} in {found['seconds']:.0f} s: "
        f"{found['machine']}, Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, timm {timm.__version__}, faiss "
        f"{faiss.__version__}, pml_tacl {__version__}. Random weights; {sizes.side} px; "
        f"evaluation of {sizes.evaluated[0]} x 512, k-means of {sizes.clustered[0]} x 512 in "
        f"{sizes.clustered[1]} clusters.",
        "",
    ]
    if not found["cuda"]:
        lines += ["**There was no CUDA device**: small sizes of the same code on the CPU.", ""]
    lines += [f"Tests of the marker `gpu`: {tested['summary']}.", ""]
    lines += [f"- failed: `{name}`" for name in tested["failed"]]
    for title, body in found["parts"].items():
        lines += ["", f"## {title}", ""]
        if isinstance(body, str):
            lines.append(body)
            continue
        rule = ["---", *["---:"] * (len(body[0]) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in (body[0], rule, *body[1:])]
    return "\n".join(lines) + "\n"


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all parts together")
    parser.add_argument("--only", default="", help="parts whose title holds this; - is the tests")
    parser.add_argument("--output", help="page; left out: docs/benchmarks/gpu.md, - without CUDA")
    arguments = parser.parse_args(given)
    device, start = torch.device(arguments.device), time.perf_counter()
    cuda = device.type == "cuda"
    sizes = ON_GPU if cuda else ON_CPU
    output = arguments.output or ("docs/benchmarks/gpu.md" if cuda else "-")
    if not cuda:
        print("no CUDA device: the CPU part runs, and measures nothing of a GPU", file=sys.stderr)
    found: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "machine": machine(device),
        "cuda": cuda,
        "tests": {"summary": "not run", "failed": [], "status": 0},
        "parts": {},
    }

    def left() -> float:
        return arguments.minutes * 60 - (time.perf_counter() - start)

    def note() -> None:
        found["seconds"] = time.perf_counter() - start
        if output != "-":
            publish(json.dumps(found, indent=1) + "\n", Path(output).with_suffix(".json"))

    failed = False
    longest = 20.0 if cuda else 1.0
    for title, part in PARTS.items():
        if arguments.only not in title:
            continue
        began = time.perf_counter()
        if left() < 1.5 * longest:
            found["parts"][title] = "Not measured: the time was up."
            continue
        try:
            found["parts"][title] = part(device, sizes)
        except Exception as error:
            traceback.print_exc()
            words = " ".join(str(error).split())[:300]
            found["parts"][title] = f"Failed: {type(error).__name__}: {words}"
            failed = True
        longest = max(longest, time.perf_counter() - began)
        print(f"{title}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        note()
    # Last, with all the time that is left: they are the same each time, the figures are not.
    if arguments.only in ("", "-"):
        if cuda:
            torch.cuda.empty_cache()
        found["tests"] = tests(device, sizes, max(10.0, left() - 5))
        failed = failed or found["tests"]["status"] != 0
    note()
    publish(page(found, sizes), output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
