"""Curves of losses by iteration, and of recall by epoch and by K."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pml_tacl.utils.errors import InputError
from pml_tacl.visualize import _drawing as drawing
from pml_tacl.visualize._figures import NotebookFigure, fitted, styled
from pml_tacl.visualize._inputs import to_numbers

_WIDTH = 8.3  # inches; a README shows about 830 pixels
_COLOURS = ("#8a8a8a", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#e69f00", "#000000")


@styled
def training_curves(
    history: Mapping[str, Sequence[float]],
    recalls: Mapping[int, Mapping[str, float]] | None = None,
    warmup: int = 0,
) -> Figure:
    """Draw each loss by iteration, raw and smoothed, and the recall by epoch.

    Args:
        history: the values of each loss at every iteration; NaN and infinity leave a gap.
        recalls: the metrics in [0, 1] of each epoch. Those named ``recall_at_K`` are drawn, or
            all metrics if there are none.
        warmup: iterations before the first clustering. Its end is marked, because the losses
            jump there.

    Returns:
        A figure with one axes for each loss, in order, and one more with ``recalls``.

    Raises:
        ValueError: if both are empty, or a recall is not in [0, 1].
    """
    panels = {name: to_numbers(values).ravel() for name, values in history.items()}
    epochs = {epoch: metrics for epoch, metrics in sorted((recalls or {}).items()) if metrics}
    if not panels and not epochs:
        raise InputError("history and recalls are both empty: there is nothing to draw")
    figure, axes = _panels(len(panels) + bool(epochs))
    for axis, (name, values) in zip(axes, panels.items(), strict=False):
        _loss_panel(axis, name, values, warmup)
    if epochs:
        names = dict.fromkeys(name for metrics in epochs.values() for name in metrics)
        drawn = [name for name in names if name.startswith("recall_at_")] or list(names)
        lines = {
            name.replace("recall_at_", "R@"): {
                epoch: metrics[name] for epoch, metrics in epochs.items() if name in metrics
            }
            for name in drawn
        }
        _require_fractions(lines)
        _percent_lines(axes[-1], lines, "epoch", "recall")
    return figure


@styled
def recall_curve(results: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw Recall@K over K, with one line for each result and its name at the end.

    Args:
        results: the metrics in [0, 1] of each name ("raw pixels", "before", "after").
            ``recall_at_K`` are drawn; ``precision_at_1`` replaces a missing ``recall_at_1``.

    Returns:
        A figure with one axes and one line for each name, in order.

    Raises:
        ValueError: if there are no results, a name has no recall, or a recall is not in [0, 1].
    """
    if not results:
        raise InputError("results is empty: there is nothing to draw")
    lines: dict[str, dict[int, float]] = {}
    for name, metrics in results.items():
        named = {"recall_at_1": metrics["precision_at_1"]} if "precision_at_1" in metrics else {}
        named |= metrics
        lines[name] = dict(
            sorted(
                (int(metric.removeprefix("recall_at_")), float(value))
                for metric, value in named.items()
                if metric.startswith("recall_at_")
            )
        )
        if not lines[name]:
            raise InputError(
                f"results[{name!r}] has no recall_at_K among {sorted(metrics)}: compute one"
            )
    _require_fractions(lines)
    figure, axes = _panels(1, width=5.6, height=3.4)
    _percent_lines(axes[0], lines, "K", "Recall@K")
    ks = sorted({k for line in lines.values() for k in line})
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(ks, [str(k) for k in ks])
    axes[0].minorticks_off()
    axes[0].margins(x=0.14)
    first = [next(iter(line.values())) for line in lines.values()]
    _beside(axes[0], [ks[0]] * len(lines), first, [f"{100 * value:.1f}" for value in first], -1)
    return figure


def _panels(count: int, width: float = _WIDTH, height: float = 2.2) -> tuple[Figure, list[Any]]:
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.04)
    figure = NotebookFigure(figsize=(width, rows * height), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def _loss_panel(axes: Any, name: str, values: npt.NDArray[np.float64], warmup: int) -> None:
    finite = np.where(np.isfinite(values), values, np.nan)
    iterations = np.arange(1, len(values) + 1)
    few = len(values) < 20
    axes.plot(
        iterations, finite, color="#56b4e9", alpha=0.45, linewidth=0.8, marker="." if few else ""
    )
    axes.plot(iterations, smoothed(finite), color="#0072b2", linewidth=1.6)
    if 0 < warmup < len(values):
        axes.axvline(warmup + 0.5, color="#8a8a8a", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            "clusters", (warmup + 0.5, 1), (3, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="left", va="top", fontsize=7, color="#666666",
        )  # fmt: skip
    drawing.title(axes, name, 40)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.02)


def smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the centred moving mean over a twentieth of the values, ignoring NaN."""
    if not len(values):
        return values
    window = max(1, len(values) // 20) | 1
    known = np.isfinite(values)
    cut = slice(window // 2, window // 2 + len(values))
    totals = np.convolve(np.where(known, values, 0.0), np.ones(window))[cut]
    counts = np.convolve(known.astype(float), np.ones(window))[cut]
    return np.where(known, totals / np.maximum(counts, 1), np.nan)


def _percent_lines(
    axes: Any, lines: Mapping[str, Mapping[int, float]], x_label: str, y_label: str
) -> None:
    top = 100 * max(value for line in lines.values() for value in line.values())
    top = min(100.0, top * 1.08) if top > 0 else 1.0
    for colour, line in zip(cycle(_COLOURS), lines.values(), strict=False):
        heights = [100 * value for value in line.values()]
        axes.plot(
            list(line), heights, color=colour, linewidth=1.8, marker="o", markersize=4,
            clip_on=False, zorder=3,
        )  # fmt: skip
    axes.set(ylim=(0, top), xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    last = [list(line.values())[-1] for line in lines.values()]
    names = [f"{name} {100 * value:.1f}" for name, value in zip(lines, last, strict=True)]
    _beside(axes, [max(line) for line in lines.values()], last, names, 1)


def _beside(
    axes: Any, xs: Sequence[float], values: Sequence[float], labels: Sequence[str], side: int
) -> None:
    """Write labels beside the ends of lines, moved apart if lines end close together."""
    rows = axes.get_subplotspec().get_gridspec().nrows
    line_height = 0.15 / (0.72 * axes.figure.get_figheight() / rows) * axes.get_ylim()[1]
    places = spread_apart([100 * value for value in values], line_height)
    x = max(xs) if side > 0 else min(xs)
    for colour, label, place in zip(cycle(_COLOURS), labels, places, strict=False):
        axes.annotate(
            **fitted(label, 28), xy=(x, place), xytext=(7 * side, 0), textcoords="offset points",
            ha="left" if side > 0 else "right", va="center", color=colour, fontsize=8,
            annotation_clip=False,
        )  # fmt: skip


def spread_apart(values: Sequence[float], gap: float) -> list[float]:
    """Return the positions nearest to ``values``, in the same order, at least ``gap`` apart."""
    order = np.argsort(values, kind="stable")
    blocks: list[tuple[float, int]] = []  # (position of the lowest member, members)
    for index in order:
        start, size = float(values[index]), 1
        while blocks and start < blocks[-1][0] + blocks[-1][1] * gap:
            before, members = blocks.pop()
            start = (before * members + (start - members * gap) * size) / (members + size)
            size += members
        blocks.append((start, size))
    places = [start + k * gap for start, size in blocks for k in range(size)]
    return [place for _, place in sorted(zip(order.tolist(), places, strict=True))]


def _require_fractions(lines: Mapping[str, Mapping[int, float]]) -> None:
    for name, line in lines.items():
        for x, value in line.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name!r} at {x} is {value}: recalls go from 0 to 1")
