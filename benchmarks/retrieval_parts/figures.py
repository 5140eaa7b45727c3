"""Figures of the results: recall curves, ablation of the parts, and the gap closed."""

from matplotlib import colormaps
from matplotlib.figure import Figure

from retrieval_parts.tables import RECALLS, Table, cost_of_removal, gap_closed

# Show only the main methods; the tables contain all methods.
_SHOWN = {
    "zero_shot": "#999999",
    "ms": "#e69f00",
    "ntxent+swap": "#56b4e9",
    "stml+swap": "#009e73",
    "full": "#d55e00",
    "supervised": "#000000",
    "supervised+head": "#cc79a7",
}


def recall_curves(table: Table) -> Figure:
    """Draw one panel for each setting: recall at 1, 2, 4, 8 of the main methods."""
    columns = min(3, len(table))
    lines = -(-len(table) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(table) :]:
        axes.remove()
    for axes, (setting, methods) in zip(panels, table.items(), strict=False):
        for name, colour in _SHOWN.items():
            if name in methods:
                heights = [100 * methods[name].mean(metric) for metric in RECALLS]
                axes.plot(range(4), heights, color=colour, marker="o", markersize=4, label=name)
        axes.set_xticks(range(4), ["1", "2", "4", "8"])
        axes.set_title(str(setting), fontsize=9)
        axes.set_ylim(0, None)
        axes.set_xlabel("neighbours", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("recall, %")
    lines_of = {
        label: line
        for axes in panels[: len(table)]
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        lines_of.values(),
        lines_of,
        loc="outside lower center",
        ncols=len(_SHOWN),
        frameon=False,
        fontsize=8,
    )
    return figure


def ablation_bars(table: Table) -> Figure | None:
    """Draw the loss of R@1 of the full method without each part, by setting."""
    removal = cost_of_removal(table)
    if not removal:
        return None
    settings = list({setting: None for lost in removal.values() for setting in lost})
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(settings)
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, setting in enumerate(settings):
        there = [(i, lost[setting]) for i, lost in enumerate(removal.values()) if setting in lost]
        axes.bar(
            [i + (number - (len(settings) - 1) / 2) * width for i, _ in there],
            [lost for _, lost in there],
            width,
            label=str(setting),
            color=colours[number % len(colours)],
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(removal)), list(removal))
    axes.set_xlabel("part that is left out")
    axes.set_ylabel("R@1 lost, points")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def gap_plot(table: Table) -> Figure | None:
    """Draw each method on a scale from zero-shot (0) to supervised (100)."""
    names = list({name: None for methods in table.values() for name in methods})
    names = [name for name in names if name not in ("zero_shot", "supervised")]
    points = {
        setting: [(gap, row) for row, name in enumerate(names) if (gap := gap_closed(m, name))]
        for setting, m in table.items()
    }
    if not any(points.values()):
        return None
    figure = Figure(figsize=(8, 0.3 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    for setting, there in points.items():
        axes.plot(
            [100 * gap for gap, _ in there], [row for _, row in there], "o", label=str(setting)
        )
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel("gap closed, % of the way from zero-shot to supervised")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
