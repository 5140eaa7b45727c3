"""Sections of the page. All text from the run is escaped here."""

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from PIL import Image

from pml_tacl.report import _charts as charts
from pml_tacl.report import _images
from pml_tacl.report._choices import Cluster, Query
from pml_tacl.report._sources import ImageSet, Run
from pml_tacl.utils.files import shown_name
from pml_tacl.utils.runs import columns_of
from pml_tacl.utils.words import counted

_SHOWN_IN_CLUSTER = 12
_ROW_NAMES = {"raw_pixels": "raw pixels", "before": "before training", "after": "after training"}


def header(run: Run) -> str:
    """Return the header: name, settings, verdict and the main numbers."""
    config, after = run.config, run.metrics.get("after", {})
    before = run.metrics.get("before", {})
    facts = []
    for name, head in (("recall_at_1", "Recall@1"), ("mean_average_precision_at_r", "MAP@R")):
        if name in after:
            facts.append((head, *_better(before.get(name), after[name])))
    clusters = run.training.clusters
    count = 0 if clusters is None else len(set(clusters[clusters >= 0].tolist()))
    used = "used in training, without labels" if config.get("epochs") != 0 else "indexed"
    facts.append(("Images", _grouped(len(run.training)), "", used))
    per = f"{len(run.training) / count:.1f} images each" if count else ""
    facts.append(("Clusters", _grouped(count), "", per))
    if not after:
        facts.append(("Epochs", str(config.get("epochs", "?")), "", ""))
    cells = "".join(
        f'<div class="fact"><dt>{name}</dt><dd>{value}<span class="unit">{unit}</span></dd>'
        f'<p class="was">{was or "&nbsp;"}</p></div>'
        for name, value, unit, was in facts
    )
    parts = [config.get("backbone"), _epochs(config.get("epochs")), f"seed {config.get('seed')}"]
    said = " · ".join(escape(str(part)) for part in parts if part and "None" not in str(part))
    verdict = f'<p class="verdict">{escape(_verdict(run))}</p>' if _verdict(run) else ""
    name = escape(run.folder.resolve().name)
    return (
        f'<header id="top"><p class="kicker">Run report</p><h1>{name}</h1>'
        f'<p class="lede">{said}</p>{verdict}<dl class="facts">{cells}</dl></header>'
    )


def _better(before: float | None, after: float) -> tuple[str, str, str]:
    """Return the better of two shares in per cent, its unit, and a note about the other."""
    if before is None:
        return f"{100 * after:.1f}", "%", ""
    if before > after:
        return f"{100 * before:.1f}", "%", f"before; {100 * after:.1f} % after training"
    return f"{100 * after:.1f}", "%", f"after training; {100 * before:.1f} % before"


def _epochs(count: object) -> str:
    """Return "1 epoch", "2 epochs"; runs of other versions may not say how many."""
    return counted(count, "epoch") if isinstance(count, int) else f"{count} epochs"


def _verdict(run: Run) -> str:
    """Return whether training helped: the verdict of the guard, else by measured recall."""
    if run.verdict:
        return f"{run.verdict[:1].upper()}{run.verdict[1:]}."
    name = "recall_at_1"
    if not all(name in run.metrics.get(row, {}) for row in ("before", "after")):
        return ""
    before, after = (run.metrics[row][name] for row in ("before", "after"))
    if before == after:
        return ""
    if before > after:
        return "Training made retrieval worse: search with the model from before training."
    return "Training made retrieval better."


def results(run: Run) -> str:
    """Return the table of metrics, and a chart of Recall@K."""
    rows = {_ROW_NAMES.get(name, name): values for name, values in run.metrics.items()}
    names = columns_of(name for row in rows.values() for name in row)
    if not rows or not names:
        return (
            '<p class="empty">The run had no labelled test images, so nothing was measured. Train '
            "with <code>--eval-folder</code> to get a table here.</p>"
        )
    best = {name: max(row.get(name, -1.0) for row in rows.values()) for name in names}
    head = "".join(f'<th scope="col">{title}</th>' for title in names.values())
    body = ""
    for title, row in rows.items():
        cells = "".join(_cell(row.get(name), best[name], len(rows) > 1) for name in names)
        body += f'<tr><th scope="row">{escape(title)}</th>{cells}</tr>'
    lines = {}
    for title, row in rows.items():
        pairs = sorted((int(k[10:]), v) for k, v in row.items() if k.startswith("recall_at_"))
        if pairs:
            ks, values = zip(*pairs, strict=True)
            lines[title.removesuffix(" training")] = ([float(k) for k in ks], list(values))
    chart = ""
    if lines:
        said = "; ".join(f"{name} {100 * line[1][0]:.1f} to {100 * line[1][-1]:.1f} per cent"
                         for name, line in lines.items())  # fmt: skip
        said = f"Recall at K: {said}"
        drawn = charts.percent_chart(lines, "K", said, logarithmic=True, width=430, height=240)
        chart = _figure(drawn, "Recall@K: an image of the same class is among the K nearest.")
    note = "Per cent. Each test image searches among all others."
    return (
        f'<div class="split"><div><div class="scroll"><table class="metrics"><thead><tr><th></th>'
        f'{head}</tr></thead><tbody>{body}</tbody></table></div><p class="note">{note}</p></div>'
        f"{chart}</div>"
    )


def training(run: Run) -> str:
    """Return charts of each loss by iteration, and of recall by epoch."""
    order = sorted(run.losses, key=lambda name: (name != "total_loss", name))
    drawn = [
        _figure(charts.loss_chart(name, run.losses[name], run.warmup), name.replace("_", " "))
        for name in order
    ]
    lines = {
        head: run.recalls[name]
        for name, head in columns_of(run.recalls).items()
        if name.startswith("recall") and len(run.recalls[name][0]) > 1
    }
    if lines:
        said = "Recall by epoch: " + "; ".join(
            f"{name} from {100 * line[1][0]:.1f} to {100 * line[1][-1]:.1f} per cent"
            for name, line in lines.items()
        )
        chart = charts.percent_chart(lines, "epoch", said, width=340, height=190, margin=70)
        drawn.append(_figure(chart, "recall by epoch"))
    if not drawn:
        return '<p class="empty">The run recorded no losses.</p>'
    return f'<div class="charts">{"".join(drawn)}</div>'


def gallery(images: ImageSet, queries: Iterable[Query], title: str) -> str:
    """Return a gallery of queries, each beside its nearest images."""
    rows = ""
    for query in queries:
        found = ""
        for at, row in enumerate(query.rows):
            right = None if query.right is None else query.right[at]
            found += f"<li>{_image(images, row, right, query.similarities[at])}</li>"
        hits = "" if query.right is None else f"{sum(query.right)} of {len(query.right)} right"
        name = named(images, query.row)
        rows += (
            f'<li class="query"><div class="asked">{_image(images, query.row)}'
            f'<p><b title="{escape(name)}">{escape(name)}</b><span>{hits}</span></p></div>'
            f'<ol class="found">{found}</ol></li>'
        )
    return f'<h3>{escape(title)}</h3><ol class="gallery">{rows}</ol>'


def attention(run: Run, images: ImageSet, rows: list[int]) -> str:
    """Return images as the model sees them, each beside its attention overlay."""
    overlays = _images.attention_overlays(run, images.open, rows)
    cells = ""
    for row, (image, overlay) in zip(rows, overlays, strict=True):
        name = escape(named(images, row))
        seen, over = (_tag(image, "", 192) for image in (image, overlay))
        cells += (
            f'<figure class="pair"><div>{seen}{over}</div><figcaption title="{name}">{name}'
            "</figcaption></figure>"
        )
    return f'<div class="pairs">{cells}</div>'


def cluster_cards(images: ImageSet, ranked: Mapping[str, list[Cluster]]) -> str:
    """Return a section of cluster cards for each kind of cluster."""
    sections = ""
    for title, clusters in ranked.items():
        cards = "".join(_card(images, cluster, title) for cluster in clusters)
        sections += f'<h3>{title}</h3><div class="cards">{cards}</div>'
    return sections


def configuration(run: Run) -> str:
    """Return tables of the settings of the run and of package versions."""
    tables = ""
    for title, values in (("Configuration", flat(run.config)), ("Versions", run.versions)):
        rows = "".join(
            f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(str(v))}</td></tr>'
            for k, v in values.items()
        )
        tables += f'<div class="scroll"><table class="plain"><caption>{title}</caption>{rows}'
        tables += "</table></div>"
    return f'<div class="split even">{tables}</div>'


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested settings: {"a": {"b": 1}} becomes {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def as_json(value: Any) -> str:
    """Return JSON for an HTML script element, escaped so that it cannot end the element."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _card(images: ImageSet, cluster: Cluster, title: str) -> str:
    rows = cluster.rows
    if title in ("Most mixed", "Loosest") and len(rows) > _SHOWN_IN_CLUSTER:
        step = (len(rows) - 1) / (_SHOWN_IN_CLUSTER - 1)  # from the nearest to the farthest image
        rows = rows[[round(at * step) for at in range(_SHOWN_IN_CLUSTER)]]
    shown = "".join(_image(images, int(row)) for row in rows[:_SHOWN_IN_CLUSTER])
    facts = [f"{len(cluster.rows)} images"]
    if cluster.purity is not None and cluster.majority is not None:
        facts.append(f"{100 * cluster.purity:.0f} % are {images.classes[cluster.majority]}")
    else:
        facts.append(f"mean similarity to the centroid {cluster.tightness:.2f}")
    return (
        f'<article class="card"><h4>Cluster {cluster.number}</h4>'
        f'<p>{escape(" · ".join(facts))}</p><div class="thumbs">{shown}</div>'
        f'<button type="button" data-cluster="{cluster.number}">Show on the map</button></article>'
    )


def _image(
    images: ImageSet, row: int, right: bool | None = None, similarity: float | None = None
) -> str:
    name = named(images, row)
    said = name if similarity is None else f"{name}, similarity {similarity:.3f}"
    mark = ""
    if right is not None:
        said += ", right" if right else ", wrong"
        mark = f' class="{"right" if right else "wrong"}"'
    image = _images.thumbnail(_images.opened(images.open, row))
    return f"<span{mark}>{_tag(image, said)}</span>"


def _tag(image: Image.Image, said: str, side: int = 128) -> str:
    small = _images.thumbnail(image, side)
    text = escape(said)
    title = f' title="{text}"' if said else ""
    return (
        f'<img src="{_images.uri(small)}" width="{small.width}" height="{small.height}" '
        f'alt="{text}"{title} decoding="async">'
    )


def named(images: ImageSet, row: int) -> str:
    return shown_name(images.names[row])


def _cell(value: float | None, best: float, compared: bool) -> str:
    if value is None:
        return "<td>–</td>"
    mark = ' class="best"' if compared and value >= best else ""
    bar = f'<i style="--share:{100 * value:.1f}%"></i>'
    return f"<td{mark}>{100 * value:.1f}{bar}</td>"


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def _grouped(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")
