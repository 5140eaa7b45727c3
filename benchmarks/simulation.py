"""What a training of a million images does beside the network, really done and measured.

A stated generator stands for the network: a unit centre for each hundred images (``--per-class``)
and normal noise of length ``NOISE``. All else is the code that a training runs: the embedding pass
into one file, clustering, the order of an epoch, its batches, checkpoint and resume, evaluation,
index and search. Each part is a process of its own, so that its peak memory is its own; the next
reads what it has left in the folder.

    python benchmarks/simulation.py                      # 1 000 000 images
    python benchmarks/simulation.py --images 20000       # seconds
    python benchmarks/simulation.py --json docs/benchmarks/simulation_1000000.json
    python benchmarks/simulation.py --publish docs/benchmarks/simulation_*.json  # docs/scaling.md
"""

import argparse
import datetime
import json
import multiprocessing
import os
import pickle
import platform
import resource
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from _common import cpu_model, publish, publish_section
from pytorch_metric_learning.losses import MultiSimilarityLoss
from scaling_parts.config import BEGIN, END
from torch import Tensor, nn
from torch.utils.data import Dataset

from pml_tacl import (
    AttentionEmbedder,
    KMeansPseudoLabeler,
    RetrievalCalculator,
    SiameseTransform,
    UnsupervisedTrainer,
    __version__,
)
from pml_tacl.clustering.kmeans import _CELLS_SEARCHED, _ROUNDS, TWO_LEVELS_ABOVE
from pml_tacl.datasets import ImageFiles
from pml_tacl.distributed.inference import embed_distributed
from pml_tacl.distributed.store import EmbeddingFile
from pml_tacl.search import IVFPQ_FROM, ImageIndex
from pml_tacl.trainers.data import draw_order
from pml_tacl.trainers.state import TrainingState

LARGER = (10**7, 10**8)
LEFT = """The remaining bottlenecks:

- **Training of k-means** runs in one process while the others wait. The sample of 50 images per
  cluster is in the memory of that process. For a hundred million images it takes 25.6 GB with
  embeddings of 128 numbers, and four times that with 512. All processes share the assignment of
  images to centroids, which is about a fifth of the comparisons for a hundred million images. The
  table is for one process.
- **Labels and order** take 24 bytes per image, in every process and in every checkpoint: 2.4 GB
  for a hundred million images.
- **The list of files** is small in the end, but every process sorts Python strings to make it.
  `files.json` of an index is read as one text. For a hundred million images, shards of tar files
  (WebDataset) are the better data set.
- **A clusterer other than k-means** runs in one process. If an image cannot be read, the clusterer
  gets a copy of all other embeddings in memory."""
NOISE = 0.8
BATCH, PER_CLUSTER, BATCHES, SIDE = 32, 4, 200, 32
A_FOLDER = 1_000  # links to one empty file: what is in an image is not read
QUERIES, SEARCHED, NEIGHBOURS = 50_000, 1_000, 10
ITERATIONS, POINTS_A_CLUSTER = 10, 50
PER_MIB = 1 << 20 if sys.platform == "darwin" else 1 << 10
# What the page calls the values of the parts, where the JSON files have another name.
SHOWN = {
    "bytes an image": "bytes per image",
    "listed in seconds": "seconds to list",
    "of a core": "CPU seconds to list",
    "pairs of a cluster that are of one class": "share of pairs of a cluster with the same class",
    "drawn in seconds": "seconds to draw",
    "images that come": "share of images in the epoch",
    "the order is that of the first process": "order equal to that of the first process",
    "bytes an image, of codes": "bytes of codes per image",
    "milliseconds a query": "milliseconds per query",
}
Found = dict[str, Any]


class Numbers(Dataset[Any]):
    """The number of each image in the place of its pixels, and its class."""

    def __init__(self, count: int, classes: int) -> None:
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index]), index % self.classes


class Generator(nn.Module):
    """What stands for the network: numbers of images (n, 1) -> embeddings (n, D)."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        centroids = torch.randn(classes, dim, generator=generator)
        self.register_buffer("centroids", nn.functional.normalize(centroids))

    def forward(self, numbers: Tensor) -> Tensor:
        index = numbers[:, 0]
        generator = torch.Generator().manual_seed(int(index[0]))
        noise = torch.randn(len(index), self.centroids.shape[1], generator=generator)
        noise *= NOISE / self.centroids.shape[1] ** 0.5
        return self.centroids[index % len(self.centroids)] + noise


class Blank(Dataset[Any]):
    """As many images as asked, of one colour, for the trainer."""

    def __init__(self, count: int) -> None:
        self.count, self.image = count, torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image, 0


def rows_of(given: Namespace) -> np.ndarray:
    return EmbeddingFile(given.folder / "embeddings.npy").rows


def labels_of(given: Namespace) -> Tensor:
    return torch.from_numpy(np.load(given.folder / "labels.npy").astype(np.int64))


def embedding_pass(given: Namespace) -> Found:
    classes = max(2, given.images // given.per_class)
    found = embed_distributed(
        Generator(classes, given.dim),
        Numbers(given.images, classes),
        batch_size=1024,
        file=given.folder / "embeddings.npy",
        dtype=torch.float16 if given.half else torch.float32,
        progress=False,
    )
    assert found is not None
    np.save(given.folder / "classes.npy", found[1].numpy().astype(np.int32))
    return {"bytes an image": (given.folder / "embeddings.npy").stat().st_size / given.images}


def list_of_files(given: Namespace) -> Found:
    top = given.folder / "images"
    for start in range(0, given.images, A_FOLDER):
        folder = top / f"{start // A_FOLDER:06}"
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / f"{start:09}.jpg"
        first.touch()
        for number in range(start + 1, min(start + A_FOLDER, given.images)):
            with suppress(FileExistsError):
                os.link(first, folder / f"{number:09}.jpg")
    began, busy = time.perf_counter(), time.process_time()
    images = ImageFiles(top, check=False, labels="folder")
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    assert len(images) == given.images
    names = pickle.dumps(images.names)
    (given.folder / "names.pickle").write_bytes(names)
    return {
        "listed in seconds": seconds,
        "of a core": busy,
        "bytes an image": len(names) / given.images,
    }


def clustering(given: Namespace) -> Found:
    clusters = given.clusters
    labeler = KMeansPseudoLabeler(
        clusters, num_iterations=ITERATIONS, max_points=max(1000, POINTS_A_CLUSTER * clusters)
    )
    found = labeler(rows_of(given))
    np.save(given.folder / "labels.npy", found.labels.numpy().astype(np.int32))
    np.save(given.folder / "centroids.npy", found.centroids.numpy())
    pairs = np.stack([found.labels.numpy(), np.load(given.folder / "classes.npy")])
    _, counts = np.unique(pairs, axis=1, return_counts=True)
    same = float((counts.astype(float) ** 2).sum() / (np.bincount(pairs[0]) ** 2.0).sum())
    return {"clusters": len(found.centroids), "pairs of a cluster that are of one class": same}


def order_of_an_epoch(given: Namespace) -> Found:
    labels = labels_of(given)
    torch.manual_seed(0)
    size = given.images // BATCH * BATCH
    began = time.perf_counter()
    order = draw_order(labels, True, size, PER_CLUSTER, BATCH)
    drawn = time.perf_counter() - began
    batches = order[: BATCHES * BATCH, 0].view(-1, BATCH // PER_CLUSTER, PER_CLUSTER)
    groups = labels[batches]
    assert (groups == groups[..., :1]).all()
    return {"drawn in seconds": drawn, "images that come": len(order[:, 0].unique()) / len(labels)}


class Enough(Exception):
    """Ends a training that is stopped in an epoch."""


def trainer_of(given: Namespace, folder: Path, steps: int) -> UnsupervisedTrainer:
    torch.manual_seed(0)
    model = AttentionEmbedder("test_resnet", embedding_dim=16)

    def end_iteration(trainer: UnsupervisedTrainer) -> None:
        if trainer.iteration >= steps:
            raise Enough

    return UnsupervisedTrainer(
        model,
        torch.optim.SGD(model.parameters(), 0.01),
        BATCH,
        {"metric_loss": MultiSimilarityLoss()},
        Blank(given.images),
        transform=SiameseTransform(SIDE, grid=2),
        eval_transform=model.transform(image_size=SIDE),
        labeler=KMeansPseudoLabeler(given.clusters),
        images_per_cluster=PER_CLUSTER,
        warmup_epochs=1,  # the clusters are given, and no pass of a real network is made
        iterations_per_epoch=given.images // BATCH,
        checkpoint_folder=folder,
        checkpoint_every=2,
        progress=False,
        data_device=torch.device("cpu"),
        end_of_iteration_hook=end_iteration,
    )


def checkpoint(given: Namespace) -> Found:
    trainer = trainer_of(given, given.folder / "checkpoints", steps=3)
    centroids = torch.from_numpy(np.load(given.folder / "centroids.npy"))
    trainer.set_pseudo_labels(labels_of(given), centroids)
    with suppress(Enough):
        trainer.train(num_epochs=1)
    assert trainer.state.order is not None
    np.save(given.folder / "order.npy", trainer.state.order.numpy())
    size = max(p.stat().st_size for p in (given.folder / "checkpoints").glob("*.pt"))
    return {"bytes an image": size / given.images}


def resume(given: Namespace) -> Found:
    trainer = trainer_of(given, given.folder / "resumed", steps=3)
    path = max((given.folder / "checkpoints").glob("*.pt"))
    trainer.load_checkpoint(path)
    state: TrainingState = trainer.state
    order = np.load(given.folder / "order.npy")
    assert state.order is not None
    assert np.array_equal(state.order.numpy(), order)
    assert torch.equal(state.labels, labels_of(given))
    with suppress(Enough):
        trainer.train(num_epochs=1)
    return {"the order is that of the first process": True}


def evaluation(given: Namespace) -> Found:
    count = min(QUERIES, given.images)
    # Images of one class are every so many: the first so many hold whole parts of all classes.
    rows = torch.from_numpy(np.array(rows_of(given)[:count], dtype=np.float32))
    labels = torch.from_numpy(np.load(given.folder / "classes.npy")[:count].astype(np.int64))
    found = RetrievalCalculator(include=("recall_at_1",)).get_accuracy(rows, labels)
    return {"queries": count, "recall at 1": found["recall_at_1"]}


def index(given: Namespace) -> Found:
    names = pickle.loads((given.folder / "names.pickle").read_bytes())
    kind = "ivfpq" if given.images >= IVFPQ_FROM else "auto"
    made = ImageIndex(rows_of(given), names, given.folder / "images", kind=kind)
    made.save(given.folder / "index")
    size = (given.folder / "index" / "index.faiss").stat().st_size
    return {"kind": made.kind, "bytes an image, of codes": size / given.images}


def search(given: Namespace) -> Found:
    made = ImageIndex.load(given.folder / "index")
    rows = np.load(given.folder / "index" / "embeddings.npy", mmap_mode="r")
    # Between images and other images, as queries are that are not indexed.
    noise = np.random.default_rng(1).standard_normal((SEARCHED, given.dim), dtype=np.float32)
    wanted = np.linspace(0, given.images - 1, SEARCHED).astype(np.int64)
    queries = rows[wanted] + 0.3 * noise / given.dim**0.5
    began = time.perf_counter()
    found = made.search(queries, NEIGHBOURS)[1]
    seconds = time.perf_counter() - began
    best = faiss.ResultHeap(SEARCHED, NEIGHBOURS, keep_max=True)
    for start in range(0, len(rows), 1 << 16):
        part = np.array(rows[start : start + (1 << 16)])
        near, there = faiss.knn(queries, part, NEIGHBOURS, metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(near, there + start)
    best.finalize()
    shared = [len(set(a) & set(b)) for a, b in zip(found, best.I, strict=True)]
    return {
        f"recall at {NEIGHBOURS}": float(np.mean(shared)) / NEIGHBOURS,
        "milliseconds a query": seconds / SEARCHED * 1e3,
    }


PARTS: dict[str, Callable[[Namespace], Found]] = {
    "embedding pass into one file": embedding_pass,
    "list of files": list_of_files,
    "clustering": clustering,
    "order of an epoch": order_of_an_epoch,
    "checkpoint within an epoch": checkpoint,
    "resume": resume,
    "evaluation": evaluation,
    "index": index,
    "search": search,
}


def measure(part: str, given: Namespace) -> Found:
    """Run one part in this process."""
    # Linux passes on the peak of the process that has started this one; that is written off.
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    said = PARTS[part](given)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status")
    peak = after.ru_maxrss / PER_MIB
    if status.exists():
        peak = int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return {
        "seconds": seconds,
        "of a core": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak MiB": peak,
        "load": os.getloadavg()[0],
        "said": said,
    }


def apart(part: str, given: Namespace) -> Found:
    """Run one part in a new process, which has the libraries of this one where it can be forked."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measure, part, given).result()


def run_of(given: Namespace, parts: dict[str, Found]) -> Found:
    """Return everything that the page says of a run."""
    return {
        "date": str(datetime.date.today()),
        "images": given.images,
        "clusters": given.clusters,
        "dim": given.dim,
        "dtype": "float16" if given.half else "float32",
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": f"Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, faiss {faiss.__version__}, pml_tacl {__version__}",
        "parts": parts,
    }


def report(*runs: Found) -> str:
    """Return the section of the page: a table of each run, and the extrapolation of the largest."""
    runs = tuple(sorted(runs, key=lambda run: int(run["images"])))
    return "\n".join([*map(table_of, runs), extrapolated(*runs)])


def table_of(run: Found) -> str:
    whole, busy = (sum(one[k] for one in run["parts"].values()) for k in ("seconds", "of a core"))
    load = max(one["load"] for one in run["parts"].values())
    others = ""
    if load > 1.5 * run["threads"]:
        others = (
            f" Other programs kept the cores busy (load {load:.0f}), which makes the time longer."
        )
    missing = [part for part in PARTS if part not in run["parts"]]
    if missing:
        others += f" **Not measured**: {', '.join(missing)}."
    others += f" {run['note']}" if run.get("note") else ""
    lines = [
        f"### {spaced(run['images'])} images, {spaced(run['clusters'])} clusters",
        "",
        f"`benchmarks/simulation.py --images {run['images']}` on {run['date']}: {run['machine']}, "
        f"{run['threads']} threads, {run['versions']}. Embeddings of {run['dim']} numbers in "
        f"{run['dtype']}. Together {whole:.0f} s, and {busy:.0f} s of CPU time.{others}",
        "",
        "| part | time | CPU time | peak memory | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, one in run["parts"].items():
        said = ", ".join(
            f"{SHOWN.get(what, what)}: {value:.4g}"
            if isinstance(value, float)
            else f"{SHOWN.get(what, what)}: {value}"
            for what, value in one["said"].items()
        )
        times = f"{one['seconds']:.1f} s | {one['of a core']:.1f} s"
        lines.append(f"| {name} | {times} | {one['peak MiB'] / 1024:.2f} GiB | {said} |")
    return "\n".join(lines) + "\n"


def comparisons(images: int, clusters: int) -> float:
    """Return how many embeddings clustering compares with how many centroids, one by one."""
    points, root = min(images, POINTS_A_CLUSTER * clusters), clusters**0.5
    if clusters <= TWO_LEVELS_ABOVE:
        return float(points * clusters * ITERATIONS + images * clusters)
    near = (1 + _CELLS_SEARCHED) * root  # of each embedding, in the rounds after the second level
    return points * (2 * root * ITERATIONS + _ROUNDS * near) + images * near


def extrapolated(*runs: Found) -> str:
    """Return times and memory for more images, by what each part grows with."""
    base = min(one["peak MiB"] for run in runs for one in run["parts"].values())
    lines = [
        "### Ten and a hundred million images",
        "",
        "CPU time and peak memory, not measured but extrapolated from the largest run of each "
        "part. There is a cluster for every hundred images. Time and memory grow in proportion to "
        f"the images, except for the {base / 1024:.1f} GiB of the libraries and for the "
        "evaluation, whose queries are a sample. Fixed costs, such as making a model or training "
        "codes, are also scaled up. So the numbers are too high rather than too low, especially "
        "where the largest run is small. The time of clustering grows with the number of "
        f"comparisons. Above {spaced(TWO_LEVELS_ABOVE)} clusters, two levels need fewer "
        "comparisons, but each is slower, which is not taken into account.",
        "",
        "| part | from | " + " | ".join(spaced(images) for images in LARGER) + " |",
        "| --- |" + " ---: |" * (1 + len(LARGER)),
    ]
    for name in PARTS:
        last = [run for run in runs if name in run["parts"]][-1]
        one, cells = last["parts"][name], [spaced(last["images"])]
        for images in LARGER:
            longer = larger = 1.0 if name == "evaluation" else images / last["images"]
            if name == "clustering":
                now = comparisons(last["images"], last["clusters"])
                longer = comparisons(images, images // 100) / now
            held = base + (one["peak MiB"] - base) * larger
            cells.append(f"{lasting(one['of a core'] * longer)}, {held / 1024:.1f} GiB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{LEFT}\n"


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def lasting(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, help="left out: a hundredth of the images")
    parser.add_argument("--per-class", type=int, default=100, help="images of the generator's")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--half", action="store_true", help="embeddings in float16")
    parser.add_argument(
        "--folder", type=Path, help="left out: a temporary one, removed again; a run goes on there"
    )
    parser.add_argument("--output", default="-", help="page; - prints it")
    parser.add_argument("--json", type=Path, help="the same as JSON")
    parser.add_argument("--publish", type=Path, nargs="+", help="write the page of these JSONs")
    parser.add_argument("--page", default="docs/scaling.md", help="page; - prints its section")
    given = parser.parse_args(arguments)
    given.clusters = given.clusters or max(8, given.images // 100)
    if given.publish:
        runs = [json.loads(path.read_text()) for path in given.publish]
        publish_section(report(*runs), given.page, BEGIN, END)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        given.folder = given.folder or Path(folder)
        given.folder.mkdir(parents=True, exist_ok=True)
        known = given.folder / "measured.json"  # a run that was stopped goes on in its folder
        found = json.loads(known.read_text()) if known.exists() else {}
        for part in PARTS:
            if part in found:
                continue
            found[part] = apart(part, given)
            known.write_text(json.dumps(found))
            print(part, found[part], file=sys.stderr, flush=True)
    run = run_of(given, {part: found[part] for part in PARTS})
    publish(table_of(run), given.output)
    if given.json:
        publish(json.dumps(run, indent=1) + "\n", given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
