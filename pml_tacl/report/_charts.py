"""Line charts as SVG, with the light and dark colours of the page."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from pml_tacl.report._sources import Curve
from pml_tacl.visualize._curves import smoothed, spread_apart

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 34
_MOST_POINTS = 400  # points of a line, more than a chart has pixels


def loss_chart(name: str, curve: Curve, warmup: int = 0) -> str:
    """Draw a loss by iteration, raw and smoothed, with a mark at the end of the warm-up."""
    steps, values = thinned(curve)
    mean = smoothed(np.where(np.isfinite(values), values, np.nan)).tolist()
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    frame = _Frame(steps or [0.0], [min(finite), max(finite)], 340, 190)
    last = next((value for value in reversed(mean) if math.isfinite(value)), finite[-1])
    says = f"{name} by iteration, from {finite[0]:.3g} to about {last:.3g}"
    lines = frame.line(steps, values, "raw") + frame.line(steps, mean, "mean")
    if steps and steps[0] <= warmup < steps[-1]:
        lines += frame.mark(warmup + 0.5, "clusters")
        says += f"; clustering begins after iteration {warmup}"
    return frame.drawn(lines, "iteration", says)


def percent_chart(
    lines: Mapping[str, Curve],
    x_label: str,
    says: str,
    *,
    logarithmic: bool = False,
    width: int = 520,
    height: int = 270,
    margin: int = 118,
) -> str:
    """Draw shares in [0, 1] in per cent as one labelled line per name.

    Args:
        lines: name -> (xs, values).
        x_label: label of the x axis.
        says: description of the chart for screen readers.
        logarithmic: use a logarithmic x axis with base 2.
        width: width of the chart in pixels.
        height: height of the chart in pixels.
        margin: space for names at the right, in pixels.
    """
    xs = sorted({x for line, _ in lines.values() for x in line})
    top = max((value for _, values in lines.values() for value in values), default=1.0)
    frame = _Frame(
        [math.log2(x) for x in xs] if logarithmic else xs,
        [0.0, max(100 * top, 1.0)],
        width,
        height,
        right=margin,
        x_names={math.log2(x) if logarithmic else x: f"{x:g}" for x in xs} if len(xs) < 9 else None,
        unit=" %",
    )
    drawn, ends = "", []
    for at, (_, values) in enumerate(lines.items()):
        places = [math.log2(x) if logarithmic else x for x in values[0]]
        heights = [100 * value for value in values[1]]
        drawn += frame.line(places, heights, f"c{at}", dots=True)
        ends.append((places[-1], heights[-1]))
    labels = spread_apart([-frame.y(height) for _, height in ends], 17)
    for at, (name, place) in enumerate(zip(lines, labels, strict=True)):
        x, value = frame.x(ends[at][0]) + 9, ends[at][1]
        drawn += (
            f'<text class="end c{at}" x="{x:.1f}" y="{4 - place:.1f}">{escape(name)} '
            f'<tspan class="value">{value:.1f}</tspan></text>'
        )
    return frame.drawn(drawn, x_label, says)


def thinned(curve: Curve) -> tuple[list[float], list[float]]:
    """Return at most ``_MOST_POINTS`` evenly spaced points of a curve."""
    steps, values = curve
    if len(steps) <= _MOST_POINTS:
        return list(steps), list(values)
    kept = np.linspace(0, len(steps) - 1, _MOST_POINTS).round().astype(int)
    return [steps[i] for i in kept], [values[i] for i in kept]


def ticks(low: float, high: float) -> list[float]:
    """Return about four round numbers that span a range."""
    span = max(high - low, abs(high) * 1e-6, 1e-9)
    rough = span / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [step * at for at in range(first, max(last, first + 1) + 1)]


class _Frame:
    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        width: int,
        height: int,
        right: int = _RIGHT,
        x_names: Mapping[float, str] | None = None,
        unit: str = "",
    ) -> None:
        self._size, self._right, self._unit = (width, height), right, unit
        self._y_ticks = ticks(min(ys), max(ys))
        self._low, self._high = self._y_ticks[0], self._y_ticks[-1]
        self._first, self._last = min(xs), max(xs)
        if x_names is None:
            shown = ticks(self._first, self._last)
            x_names = {x: f"{x:g}" for x in shown if self._first <= x <= self._last}
        self._x_names = x_names

    def x(self, value: float) -> float:
        share = (value - self._first) / ((self._last - self._first) or 1.0)
        return _LEFT + share * (self._size[0] - _LEFT - self._right)

    def y(self, value: float) -> float:
        share = (value - self._low) / ((self._high - self._low) or 1.0)
        return self._size[1] - _BOTTOM - share * (self._size[1] - _TOP - _BOTTOM)

    def line(
        self, xs: Sequence[float], ys: Sequence[float], kind: str, *, dots: bool = False
    ) -> str:
        """Draw a line with gaps at values that are not finite."""
        commands, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if not math.isfinite(y):
                pen = "M"
                continue
            commands.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L"
        drawn = f'<path class="line {kind}" d="{"".join(commands)}"/>'
        if dots:
            drawn += "".join(
                f'<circle class="dot {kind}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.2"/>'
                for x, y in zip(xs, ys, strict=True)
                if math.isfinite(y)
            )
        return drawn

    def mark(self, value: float, name: str) -> str:
        """Draw a vertical line with a name beside it."""
        x, low = self.x(value), self._size[1] - _BOTTOM
        return (
            f'<path class="mark" d="M{x:.1f} {_TOP}V{low}"/>'
            f'<text class="mark" x="{x + 4:.1f}" y="{_TOP + 8}">{escape(name)}</text>'
        )

    def drawn(self, lines: str, x_label: str, says: str) -> str:
        width, height = self._size
        grid = ""
        for tick in self._y_ticks:
            y = self.y(tick)
            grid += f'<path class="grid" d="M{_LEFT} {y:.1f}H{width - self._right}"/>'
            text = f"{tick:.6g}{self._unit}"
            grid += f'<text class="y" x="{_LEFT - 7}" y="{y + 3.5:.1f}">{text}</text>'
        for place, name in self._x_names.items():
            grid += f'<text class="x" x="{self.x(place):.1f}" y="{height - 17}">{name}</text>'
        middle = (_LEFT + width - self._right) / 2
        grid += f'<text class="x label" x="{middle:.1f}" y="{height - 2}">{escape(x_label)}</text>'
        return (
            f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(says)}">{grid}{lines}</svg>'
        )
