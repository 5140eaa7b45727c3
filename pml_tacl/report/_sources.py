"""Read a run folder into one structure for the page."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pml_tacl.clustering import KMeansPseudoLabeler
from pml_tacl.clustering.unit_embeddings import FloatArray, IntArray, UnitRows
from pml_tacl.datasets import Glyphs, ImageFiles
from pml_tacl.datasets.image_files import listing_place, load_rgb
from pml_tacl.evaluation import embed
from pml_tacl.models import AttentionEmbedder
from pml_tacl.search import ImageIndex
from pml_tacl.trainers.checkpoint import checkpoints
from pml_tacl.trainers.records import read_losses
from pml_tacl.utils.device import device_or_default
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.runs import read_config, stopped_at

Curve = tuple[list[float], list[float]]
GLYPH_SIDE = 64  # pixels of the quickstart's images


@dataclass
class ImageSet:
    """Images with their embeddings.

    Attributes:
        title: title on the page.
        names: names of the N images.
        embeddings: (N, D) float32, of unit norm.
        open: function from index to image; raises OSError if it cannot be read.
        labels: (N,) indices of ``classes``, or None.
        classes: names of the classes.
        clusters: (N,) pseudo-labels, -1 for noise, or None.
    """

    title: str
    names: Sequence[str]
    embeddings: FloatArray
    open: Callable[[int], Image.Image]
    labels: IntArray | None = None
    classes: list[str] = field(default_factory=list)
    clusters: IntArray | None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Run:
    """Contents of a run folder.

    Attributes:
        folder: folder of the run.
        config: settings of the run.
        versions: versions of packages.
        metrics: "before", "after" and others -> values in [0, 1] by name.
        losses: name -> (iterations, values).
        recalls: name of a metric -> (epochs, values).
        model: model of the run.
        transform: transform from a PIL image to an input of the model.
        training: training images, with clusters.
        test: labelled test images, or None.
        notes: remarks about the data for readers of the page.
        verdict: verdict of the guard in one line; "" without one.
        clusters_are: one sentence that says where the clusters come from.
        warmup: iterations before the first clustering.
    """

    folder: Path
    config: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, dict[str, float]]
    losses: dict[str, Curve]
    recalls: dict[str, Curve]
    model: AttentionEmbedder
    transform: Callable[[Image.Image], torch.Tensor]
    training: ImageSet
    test: ImageSet | None
    notes: list[str]
    verdict: str = ""
    clusters_are: str = ""
    warmup: int = 0


def read_run(
    folder: str | Path,
    images: str | Path | None = None,
    *,
    folders_are_classes: bool = False,
    progress: bool = True,
) -> Run:
    """Read a run of `pml-tacl train`, quickstart.py or train_folder.py.

    Args:
        folder: folder of the run.
        images: folder of the training images, if it has moved.
        folders_are_classes: judge clusters by the sub-folders of the training images.
        progress: show progress bars.

    Raises:
        ValueError: if the folder contains no completed run.
        OSError: if the model or the images of the run are missing.
    """
    folder = Path(folder)
    config = read_config(folder)
    notes: list[str] = []
    try:
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        place = stopped_at(folder)
        if place is None:
            raise InputError(
                f"{folder} contains no readable metrics.json: give a run that train or index wrote"
            ) from error
        content = {}
        notes.append(f"The training was stopped: the page shows the state of {place}.")
    if "images" not in config and "root" in config:
        raise InputError(
            f"{folder} is a training on {config['root']}, for which reports are not supported: "
            "give a run of pml-tacl train, quickstart.py or train_folder.py"
        )
    model = AttentionEmbedder.from_pretrained(folder / "model")
    model.to(device_or_default())
    size = tuple(config.get("image_size", (GLYPH_SIDE, GLYPH_SIDE)))
    transform = model.transform(image_size=size)
    if "images" in config:
        training = _indexed(folder, images, folders_are_classes)
        if config.get("epochs") == 0:
            training.title = "Indexed images"  # nothing was trained
        test = _labelled_files(model, transform, config.get("eval_folder"), notes, progress)
    else:
        training, test = (_glyphs(model, transform, s, progress) for s in ("train", "test"))
        notes.append(
            "Clusters are judged by labels of the training characters, which training did not use."
        )
    state = _last_checkpoint(folder)
    if "images" in config and list(training.names) != sorted(training.names, key=listing_place):
        state = {**state, "labels": None}  # an update has moved images since the training
    training.clusters, clusters_are, own = _clusters(training, state)
    notes += [] if own else [clusters_are]
    others = ("config", "versions", "guard")
    metrics = {k: v for k, v in content.items() if k not in others and v}
    recalls = _recalls(folder, state)
    if after := metrics.get("after"):
        recalls[int(config.get("epochs", 0))] = after
    return Run(
        folder=folder,
        config=config,
        versions=content.get("versions", {}),
        metrics=metrics,
        losses=_losses(folder, state),
        recalls=_by_metric(recalls),
        model=model,
        transform=transform,
        training=training,
        test=test,
        notes=notes,
        verdict=str((content.get("guard") or {}).get("verdict", "")),
        clusters_are=clusters_are,
        warmup=_warmup(state, config),
    )


def _embedded(
    model: AttentionEmbedder, dataset: Dataset[Any], progress: bool
) -> tuple[FloatArray, IntArray]:
    model = model.to(memory_format=torch.channels_last)
    embeddings, labels = embed(model, dataset, progress=progress)
    return UnitRows("embeddings", embeddings, 16384).hold(), labels.numpy()


def _glyphs(model: AttentionEmbedder, transform: Any, split: str, progress: bool) -> ImageSet:
    images = Glyphs(split, size=GLYPH_SIDE, transform=transform)
    images.preload(progress=progress)
    embeddings, labels = _embedded(model, images, progress)
    counts = np.arange(len(labels)) - np.searchsorted(labels, labels)
    names = [f"{images.classes[y]} {n + 1}" for y, n in zip(labels, counts, strict=True)]
    what = "Training characters" if split == "train" else "Characters never seen in training"
    return ImageSet(
        what,
        names,
        embeddings,
        lambda row: Image.fromarray(images.images[row]),
        labels,
        list(images.classes),
    )


def _indexed(folder: Path, images: str | Path | None, by_folder: bool) -> ImageSet:
    index = ImageIndex.load(folder)
    index.root = Path(images).absolute() if images else index.root
    if not index.root.is_dir():
        raise FileNotFoundError(f"no images in {index.root}: give images= (--images FOLDER)")
    labels, classes = None, []
    if by_folder:
        places = [file.partition("/")[0] if "/" in file else "." for file in index.files]
        classes = sorted(set(places))
        at = {name: row for row, name in enumerate(classes)}
        labels = np.array([at[place] for place in places], dtype=np.int64)
    return ImageSet(
        "Training images",
        index.files,
        index.embeddings,
        lambda row: load_rgb(index.paths([row])[0]),
        labels,
        classes,
    )


def _labelled_files(
    model: AttentionEmbedder,
    transform: Any,
    folder: str | None,
    notes: list[str],
    progress: bool,
) -> ImageSet | None:
    if not folder:
        return None
    if not Path(folder).is_dir():
        notes.append(f"The labelled images are no longer in {folder}, so none are shown.")
        return None
    images = ImageFiles(folder, labels="folder", transform=transform, progress=progress)
    embeddings, labels = _embedded(model, images, progress)
    return ImageSet(
        "Labelled images",
        images.names,
        embeddings,
        lambda row: load_rgb(images.paths[row]),
        labels,
        list(images.classes),
    )


def _last_checkpoint(folder: Path) -> dict[str, Any]:
    # load_checkpoint would reject checkpoints of other versions, which also contain clusters.
    for path in reversed(checkpoints(folder / "checkpoints")):
        with suppress(Exception):  # damaged bytes raise many types of errors
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
    return {}


def _clusters(training: ImageSet, state: Mapping[str, Any]) -> tuple[IntArray, str, bool]:
    """Return pseudo-labels, a sentence about their origin, and whether training used them."""
    saved = state.get("labels")
    if isinstance(saved, torch.Tensor) and len(saved) == len(training):
        labels: IntArray = saved.cpu().numpy().astype(np.int64)
        if len(np.unique(labels)) < len(labels):
            return labels, "Clusters are the pseudo-labels of the last epoch.", True
        why = "The training never clustered, because all epochs were warm-up"
    else:
        why = "The run contains no pseudo-labels of these images"
    try:
        found = KMeansPseudoLabeler("auto")(training.embeddings)
    except InputError:  # one image, or copies of one
        one = np.zeros(len(training), dtype=np.int64)
        return one, "There are too few different images for clusters.", False
    made = f"{why}; the clusters were computed for this page, and training did not use them."
    return np.asarray(found.labels.numpy(), dtype=np.int64), made, False


def _warmup(state: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    settings = {**config, **state.get("config", {})}
    epochs, steps = settings.get("warmup_epochs"), settings.get("iterations_per_epoch")
    return int(epochs) * int(steps) if epochs and steps else 0


def _losses(folder: Path, state: Mapping[str, Any]) -> dict[str, Curve]:
    history = read_losses(folder / "records" / "every_loss.csv")
    history = history or state.get("extra", {}).get("history")  # from earlier versions
    if history:
        return {k: (list(range(1, len(v) + 1)), [float(x) for x in v]) for k, v in history.items()}
    rows = _read_csv(folder / "records" / "loss_histories.csv")
    names = [name for name in (rows[0] if rows else ()) if name != "~iteration~"]
    steps = [float(row["~iteration~"]) for row in rows]
    return {name: (steps, [float(row[name]) for row in rows]) for name in names}


def _recalls(folder: Path, state: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    saved = state.get("extra", {}).get("recalls")
    if saved:
        return {int(epoch): dict(values) for epoch, values in saved.items()}
    found = {}
    for path in sorted((folder / "records").glob("accuracies_*_TEST_*.csv")):
        for row in _read_csv(path):
            values = {k.removesuffix("_level0"): v for k, v in row.items() if "_level0" in k}
            found[int(float(row["epoch"]))] = {k: float(v) for k, v in values.items()}
    return found


def _by_metric(recalls: Mapping[int, Mapping[str, float]]) -> dict[str, Curve]:
    names = dict.fromkeys(name for values in recalls.values() for name in values)
    curves = {}
    for name in names:
        epochs = [epoch for epoch in sorted(recalls) if name in recalls[epoch]]
        values = [float(recalls[epoch][name]) for epoch in epochs]
        curves[name] = ([float(epoch) for epoch in epochs], values)
    return curves


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
