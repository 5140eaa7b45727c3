"""HTML report of a run: one self-contained file, which needs no network."""

import base64
import hashlib
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pml_tacl.report import _images
from pml_tacl.report import _page as page
from pml_tacl.report._choices import (
    best_and_worst,
    clusters_of,
    project,
    ranked_clusters,
    sample_of,
)
from pml_tacl.report._sources import ImageSet, Run, read_run
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import atomic_write

__all__ = ["read_run", "report_html", "write_report"]

_SHEET_BYTES = 3_300_000  # size of all sheets, so that the page stays below 5 MB
_GRID = 4095  # coordinates on the map are integers up to this
_NOISE = "noise, in no cluster"


def write_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    images: str | Path | None = None,
    folders_are_classes: bool = False,
    queries: int = 6,
    clusters: int = 4,
    points: int = 4000,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write the report of a run of `pml-tacl train`, quickstart.py or train_folder.py.

    Args:
        folder: folder of the run.
        out: file of the page; None for RUN/report.html.
        images: folder of the training images, if it has moved.
        folders_are_classes: judge clusters by the sub-folders of the training images.
        queries: number of best and of worst queries to show, at least 1.
        clusters: number of clusters of each kind to show, at least 1.
        points: largest number of points on all maps together, at least 1.
        seed: seed of random samples and of the map.
        progress: show progress bars.

    Returns:
        The path of the page.

    Raises:
        ValueError: if the folder contains no completed run, or a count is below 1.
        OSError: if the model or the images of the run are missing.
    """
    for name, value in (("queries", queries), ("clusters", clusters), ("points", points)):
        check_count(name, value, 1)
    run = read_run(folder, images, folders_are_classes=folders_are_classes, progress=progress)
    html = report_html(run, queries=queries, clusters=clusters, points=points, seed=seed)
    path = Path(folder) / "report.html" if out is None else Path(out)
    with atomic_write(path) as file:
        file.write(html.encode("utf-8"))
    return path


def report_html(run: Run, *, queries: int, clusters: int, points: int, seed: int) -> str:
    """Return the page as text; the arguments are those of :func:`write_report`."""
    ranked = ranked_clusters(clusters_of(run.training), clusters)
    first = list(dict.fromkeys(c.number for row in ranked.values() for c in row))
    sets = [_map_set(run.training, "cluster", points, first, seed)]
    shown = run.training
    if run.test is not None:
        shown = run.test
        each = max(1, points // 2)
        sets = [
            _map_set(run.training, "cluster", each, first, seed),
            _map_set(run.test, "class", each, [], seed),
        ]
    budget = _SHEET_BYTES // len(sets)
    sheets = ""
    for at, (one, images, rows) in enumerate(sets):
        # Images beyond the size limit have a point and a name, but no thumbnail.
        sheet, one["tiles"] = _images.sheet(images.open, rows.tolist(), budget)
        sheets += f'<img id="sheet-{at}" alt="" hidden src="{sheet}">'
    best, worst, among = best_and_worst(shown, queries, seed)
    eight = np.linspace(0, len(shown) - 1, min(8, len(shown))).round().astype(int).tolist()
    judged = shown.labels is not None
    how = (
        "Each query has a different class. Blue with a tick: same class; orange with a cross: "
        "another class. The worst queries are mistakes with the most similar neighbours."
        if judged
        else "Without labels, the best queries have the most similar neighbours and the worst "
        "queries the least similar ones. Each query is from a different cluster."
    )
    galleries = page.gallery(shown, best, "Best queries")
    galleries += page.gallery(shown, worst, "Worst queries")
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    body = page.header(run)
    for name, title, lede, content in (
        ("results", "Results", "", page.results(run)),
        ("training", "Training", "Thin lines: recorded values. Thick lines: moving means.",
         page.training(run)),
        ("retrieval", "Retrieval",
         f"{shown.title}: best and worst of {among} queries. {how}", galleries),
        ("attention", "Attention",
         f"{shown.title}, evenly spaced: the image as the model sees it, and the attention on it. "
         "Each map is scaled to its own range.", page.attention(run, shown, eight)),
        ("clusters", "Clusters",
         f"{run.clusters_are} Images are sorted by distance to the centroid. Mixed and loose "
         "clusters show a sample from the nearest to the farthest image.",
         page.cluster_cards(run.training, ranked)),
        ("map", "Map", "", _template("map.html") + sheets),
        ("setup", "Setup", "", page.configuration(run)),
    ):  # fmt: skip
        said = f'<p class="lede">{escape(lede)}</p>' if lede else ""
        body += f'<section id="{name}"><h2>{title}</h2>{said}{content}</section>'
    if notes:
        body += f'<ul class="notes">{notes}</ul>'
    script = _template("script.js")
    data = page.as_json({"sets": [one for one, _, _ in sets], "grid": _GRID,
                         "tile": _images.TILE, "columns": _images.COLUMNS})  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    parts = {
        "TITLE": escape(run.folder.resolve().name),
        "HASH": digest,
        "STYLE": _template("style.css"),
        "BODY": body,
        "DATA": data,
        "SCRIPT": script,
    }
    # In one pass, so that placeholders in file names are not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _template("page.html"))


def _map_set(
    images: ImageSet, kind: str, cap: int, first: list[int], seed: int
) -> tuple[dict[str, Any], ImageSet, Any]:
    groups = images.clusters if kind == "cluster" else images.labels
    if groups is None:
        raise InputError(f"{images.title} have no {kind} for the colours of the map")
    rows = sample_of(groups, cap, first, seed)
    places, how = project(images.embeddings[rows], seed)
    numbers, index = np.unique(groups[rows], return_inverse=True)
    if kind == "cluster":
        names = [_NOISE if number < 0 else f"cluster {number}" for number in numbers]
    else:
        names = [images.classes[number] for number in numbers]
    whole = np.round(places * _GRID).astype(int)
    return (
        {
            "title": images.title,
            "kind": kind,
            "how": how,
            "all": len(images),
            "x": whole[:, 0].tolist(),
            "y": whole[:, 1].tolist(),
            "group": index.tolist(),
            "ids": numbers.tolist(),
            "groups": names,
            "labels": []
            if images.labels is None or kind == "class"
            else [images.classes[label] for label in images.labels[rows]],
            "names": [page.named(images, int(row)) for row in rows],
        },
        images,
        rows,
    )


def _template(name: str) -> str:
    return files("pml_tacl.report").joinpath(name).read_text(encoding="utf-8")
