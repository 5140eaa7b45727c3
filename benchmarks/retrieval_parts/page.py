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

For photographs, see [Retrieval on photographs](results.md), where the defaults for pretrained \
networks were chosen. The runs below use a learning rate of 1e-3 for pretrained networks. Methods \
with a head are trained through the covariance head (`pooling="covariance"`), which is still the \
default for networks from scratch.

Written by `python benchmarks/retrieval.py page` from the files of `benchmarks/results/` alone. \
`python benchmarks/retrieval.py all` makes these files, and continues where it was stopped.

The classes are split into thirds. The labels of the training third are only used by *supervised* \
(the upper bound), for the number of clusters (which is the number of classes), and to report \
purity. Every choice was made on the validation third. The test third was measured after the last \
step. All methods share network, views, batches of 64 images in two views, steps and seeds.

- **glyphs**: characters on cluttered backgrounds, drawn by the package.
- **openemoji**: {emoji}, on white. Each emoji is a class, and each drawing of it is an image. \
Skin tones, repeated drawings of a set, and emoji that are not in all sets are left out.
- **openemoji-busy**: the same drawings, at random positions on crops of photographs (from \
scikit-image) and on patterns.

*scratch* is a small ResNet (resnet10t, 64 pixels). *pretrained* is EfficientNet-Lite0 with \
ImageNet weights and frozen BatchNorm.

- `ms`: k-means and PML's MultiSimilarityLoss, the baseline.
- `+head`: a head of `AttentionEmbedder`. Its attention leaves out what looks like the image's own \
border. It pools covariances at stride 16 (8 for 64 pixels), and its projection starts as a \
whitening of them. Without `+head`, embeddings are the mean of the last stage.
- `+swap`: `BackgroundSwap`, with masks from the image's own border too. The network computes them \
at the start and at the first clustering.
- `full`: `ms+ccl+tac+head+swap`.
- `ntxent`: PML's SelfSupervisedLoss on the two views.
- `stml`: our implementation of Kim et al., CVPR 2022, from its formulas.

The paper that this package follows is not measured: the definitions here are our own.
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
    parts = ["## R@1 of every method\n\nIn per cent, mean and standard deviation over the seeds."]
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
        "## The full method\n\nR@1 of `full` minus that of each other method, in points. The last "
        "columns say which part of the gap from zero-shot (or untrained) to supervised `full` "
        "closes.",
        rows(heads, lines),
    ]
    untrained = {s: gap_closed(m, "zero_shot+head", ceiling="full") for s, m in table.items()}
    shares = [f"{100 * share:.0f} % on {s.dataset}" for s, share in untrained.items() if share]
    if shares:
        parts.append(
            "Of the gain of `full` over zero-shot, the head alone, whitened and never trained, has "
            f"{', '.join(shares)}: the losses should only be compared among methods with the same "
            "head."
        )
    removal = cost_of_removal(table)
    if removal:
        parts.append("What each part is worth: the R@1 that `full` loses without it, in points.")
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
        "## All numbers\n\nMetrics are in per cent. Purity is that of the last clusters. Memory is "
        "the peak of the process, which may include memory kept from earlier runs."
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
        heads = ["method", *COLUMNS.values(), "purity", "s per step", "memory", "seeds"]
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

Every setting that was tried, including those that did harm: R@1 on the validation third in per \
cent, and the difference from the current method, if it was measured on validation as well."""
_EARLIER = """## Measured on test before, and changed since

R@1 on the test third in per cent, and how much more the current method gives (-: less). The \
changes were chosen on validation, but after these test results were seen."""


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
        heads = ["method", "changed", "R@1", "difference", "seeds"]
        parts += [f"### {setting}", rows(heads, lines)]
    return "\n\n".join(parts)


def _made_with(found: list[dict[str, Any]]) -> str:
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in found})
    return "## Made with\n\n" + "\n".join(f"- {version}" for version in versions)
