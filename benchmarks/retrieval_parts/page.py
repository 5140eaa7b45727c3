"""docs/results_drawings.md and its figures, from the results alone."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from pml_tacl import visualize as vis
from pml_tacl.utils.errors import InputError
from retrieval_parts.emoji import SETS
from retrieval_parts.figures import ablation_bars, gap_plot, recall_curves
from retrieval_parts.tables import (
    COLUMNS,
    R1,
    Table,
    cost_of_removal,
    gap_closed,
    read_results,
    tables,
    trials,
)

# Beside the results: [{"what": ..., "chosen": ..., "on": ..., "why": ...}, ...]
CHOICES = "choices.json"
INTRODUCTION = """# Retrieval on drawings

For photographs, see [Retrieval on photographs](results.md): the defaults for pretrained networks \
were chosen there. The runs below have a learning rate of 1e-3 for pretrained networks and learn \
through the covariance head (`pooling="covariance"`), which is still what networks from scratch do.

Written by `python benchmarks/retrieval.py page` from the files of `benchmarks/results/` alone; \
`python benchmarks/retrieval.py all` makes those, and goes on where it was stopped.

Classes are split in thirds that share none: the labels of the training third are never read \
(except by *supervised*, the ceiling, and to report purity), every choice was made on the \
validation third, and the test third was measured at the last step. All methods share network, \
views, batches of 64 images in two views, steps and seeds.

- **glyphs**: characters on cluttered ground, drawn by the package.
- **openemoji**: {emoji}, each emoji a class and each drawing an instance, on white. Skin tones, \
drawings that a set uses twice, and emoji that not all sets draw are left out.
- **openemoji-busy**: the same on crops of photographs (of scikit-image) and on patterns, \
everywhere on the image.

*scratch* is a small ResNet (resnet10t, 64 pixels), *pretrained* EfficientNet-Lite0 with \
ImageNet weights and frozen BatchNorm. `ms` is k-means and PML's MultiSimilarityLoss, the \
baseline. `+head` is `AttentionEmbedder`'s: attention that leaves out what looks like the \
image's own border, covariance pooling at stride 16 (8 on 64 pixels) and a whitening of it to \
start from; without it embeddings are the mean of the last stage. `+swap` is `BackgroundSwap`, \
with the mask of the same attention by the network as it starts. `full` is \
`ms+ccl+tac+head+swap`; `ntxent` is PML's SelfSupervisedLoss on the two views; \
`stml` is our implementation of Kim et al., CVPR 2022, from its formulas. The paper that this \
package follows is not measured: the definitions here are our own.
"""


# What the full method is put beside.
_OTHERS = (
    "ms",
    "ms+head",
    "ntxent",
    "ntxent+swap",
    "ntxent+head+swap",
    "stml",
    "stml+swap",
    "stml+head+swap",
)
_CEILINGS = ("supervised", "supervised+head")


def write(results: Path, page: Path, images: Path, split: str = "test") -> str:
    """Write the page and its figures.

    Args:
        results: folder of the results.
        page: the file to write.
        images: folder of the figures.
        split: whose results; "validation" for a look on the way.

    Raises:
        ValueError: if there are no results.
    """
    found = read_results(results)
    if not found:
        raise InputError(f"results={str(results)!r} holds none: run the benchmark first")
    table = tables(found, split)
    sets = ", ".join(f"{name} ({entry[4]})" for name, entry in SETS.items())
    parts = [INTRODUCTION.format(emoji=f"emoji as drawn by {sets}")]
    if split != "test":
        parts.append(f"**These are results on the {split} third, on which choices are made.**")
    if table:
        parts += [_asked(table), _overview(table), _figures(table, page, images), _details(table)]
    parts += [_choices(results / CHOICES), _trials(found, "test", _EARLIER)]
    parts += [_trials(found, "validation", _TRIED), _made_with(found)]
    page.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(part.strip("\n") + "\n" for part in parts if part)
    page.write_text(text, encoding="utf-8")
    return text


def rows(heads: list[str], lines: list[list[str]]) -> str:
    """A table in markdown; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines])


def _overview(table: Table) -> str:
    parts = ["## R@1 of every method\n\nPer cent, mean and deviation over the seeds."]
    for regime, size in sorted({setting[:2] for setting in table}):
        settings = [setting for setting in table if setting[:2] == (regime, size)]
        names = list({name: None for s in settings for name in table[s]})
        lines = [
            [name, *(table[s][name].text(R1) if name in table[s] else "" for s in settings)]
            for name in names
        ]
        parts.append(f"### {regime}, {size} px")
        parts.append(rows(["method", *(s.dataset for s in settings)], lines))
    return "\n\n".join(parts)


def _asked(table: Table) -> str:
    """What the benchmark was made to find out, each with its answer."""
    lines = []
    for setting, methods in table.items():
        if "full" not in methods:
            continue
        full = methods["full"].mean()

        def ahead(name: str, methods: Any = methods, full: float = full) -> str:
            return f"{100 * (full - methods[name].mean()):+.1f}" if name in methods else ""

        gaps = [gap_closed(methods, "full", ceiling) for ceiling in _CEILINGS]
        closed = ["" if gap is None else f"{100 * gap:.0f} %" for gap in gaps]
        lines.append([str(setting), *(ahead(name) for name in _OTHERS), *closed])
    if not lines:
        return ""
    heads = ["setting", *_OTHERS, *(f"gap to {ceiling}" for ceiling in _CEILINGS)]
    there = [at for at in range(len(heads)) if any(line[at] for line in lines)]
    heads, *lines = [[line[at] for at in there] for line in [heads, *lines]]
    parts = [
        "## The full method\n\nR@1 of `full` less that of each other method, in points, and how "
        "much of the way from zero-shot (or untrained) to supervised it goes.",
        rows(heads, lines),
    ]
    untrained = {s: gap_closed(m, "zero_shot+head", ceiling="full") for s, m in table.items()}
    shares = [f"{100 * share:.0f} % on {s.dataset}" for s, share in untrained.items() if share]
    if shares:
        parts.append(
            "Of what `full` gains over zero-shot the head alone, whitened and never trained, has "
            f"{', '.join(shares)}: the losses are compared fairly among methods with the same head."
        )
    removal = cost_of_removal(table)
    if removal:
        parts.append("What each part is worth: R@1 that is lost without it, in points.")
        settings = list({s: None for lost in removal.values() for s in lost})
        lines = [
            [
                str(setting),
                *(f"{lost[setting]:+.1f}" if setting in lost else "" for lost in removal.values()),
            ]
            for setting in settings
        ]
        lines.append(
            ["**mean**", *(f"**{mean(lost.values()):+.1f}**" for lost in removal.values())]
        )
        parts.append(rows(["setting", *removal], lines))
    return "\n\n".join(parts)


def _figures(table: Table, page: Path, images: Path) -> str:
    figures = {
        "recall": (recall_curves(table), "Recall at 1, 2, 4 and 8 of each method"),
        "ablation": (ablation_bars(table), "What each part of the full method is worth"),
        "gap": (gap_plot(table), "How much of the gap to supervision each method closes"),
    }
    lines = ["## Figures"]
    for name, (figure, title) in figures.items():
        if figure is not None:
            path = images / f"results-{name}.png"
            vis.save_figure(figure, path)
            lines.append(f"![{title}]({path.relative_to(page.parent).as_posix()})")
    return "\n\n".join(lines) if len(lines) > 1 else ""


def _details(table: Table) -> str:
    parts = [
        "## All numbers\n\nPer cent; purity of the last clusters; seconds as run. Memory is the "
        "most that the process held, which keeps what earlier runs took."
    ]
    for setting, methods in table.items():
        lines = []
        for name, group in methods.items():
            costs = [result["cost"] for result in group]
            last = [result["history"][-1]["purity"] for result in group if result["history"]]
            lines.append(
                [
                    name,
                    *(group.text(metric) for metric in COLUMNS),
                    f"{100 * mean(last):.1f}" if last else "",
                    f"{mean(cost['seconds_a_step'] for cost in costs):.2f}",
                    f"{max(cost['peak_bytes'] for cost in costs) / 1e9:.1f} GB",
                    str(len(group)),
                ]
            )
        heads = ["method", *COLUMNS.values(), "purity", "s a step", "memory", "seeds"]
        parts += [f"### {setting}", rows(heads, lines)]
    return "\n\n".join(parts)


def _choices(path: Path) -> str:
    if not path.is_file():
        return ""
    columns = ("what", "chosen", "on", "why")
    listed = json.loads(path.read_text("utf-8"))
    head, rule = "| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * 4) + " |"
    lines = ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in listed]
    return "## What was chosen, and on what\n\n" + "\n".join([head, rule, *lines])


_TRIED = """## What was tried on validation

Every setting that was tried, the ones that did harm too: R@1 on the validation third in per cent, \
and the difference to the method as it is now, where that was measured on validation as well."""
_EARLIER = """## Measured on test before, and changed since

R@1 on the test third in per cent, and what the method as it is now gives more (less: -). The \
changes were chosen on validation, but after this was seen."""


def _trials(found: list[dict[str, Any]], split: str, introduction: str) -> str:
    tried = [trial for trial in trials(found, split) if trial.changed]
    if not tried:
        return ""
    sign = 1 if split == "validation" else -1
    parts = [introduction]
    for setting in sorted({trial.setting for trial in tried}):
        lines = [
            [
                trial.method,
                f"`{trial.changed}`",
                f"{100 * trial.value:.1f}",
                "" if trial.plain is None else f"{100 * sign * (trial.value - trial.plain):+.1f}",
                str(trial.seeds),
            ]
            for trial in tried
            if trial.setting == setting
        ]
        parts += [f"### {setting}", rows(["method", "changed", "R@1", "", "seeds"], lines)]
    return "\n\n".join(parts)


def _made_with(found: list[dict[str, Any]]) -> str:
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in found})
    return "## Made with\n\n" + "\n".join(f"- {version}" for version in versions)
