"""Numbers of many runs, brought together: means over seeds, gaps closed, what a part is worth."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from retrieval_parts.config import METHODS, make

R1 = "recall_at_1"
RECALLS = tuple(f"recall_at_{k}" for k in (1, 2, 4, 8))
COLUMNS = {
    **{name: f"R@{name.removeprefix('recall_at_')}" for name in RECALLS},
    "mean_average_precision_at_r": "MAP@R",
    "NMI": "NMI",
}
# What a configuration without one part of the full method is called.
WITHOUT = {
    "CCL": "ms+tac+head+swap",
    "TAC": "ms+ccl+head+swap",
    "swap": "ms+ccl+tac+head",
    "head": "ms+ccl+tac+swap",
    "metric": "ccl+tac+head+swap",
}


class Setting(NamedTuple):
    """What results must share to stand in one table."""

    regime: str
    size: int
    dataset: str

    def __str__(self) -> str:
        return f"{self.dataset}, {self.regime}, {self.size} px"


class Group(list[dict[str, Any]]):
    """The seeds of one method."""

    def values(self, metric: str) -> list[float]:
        return [result["metrics"][metric] for result in self]

    def mean(self, metric: str = R1) -> float:
        return mean(self.values(metric))

    def text(self, metric: str) -> str:
        """Per cent, with the deviation over the seeds if there are several."""
        values = [100 * value for value in self.values(metric)]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        return f"{mean(values):.1f}{spread}"


Table = dict[Setting, dict[str, Group]]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in an order that does not depend on the system."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if isinstance(result, dict) and "metrics" in result]


def changes(result: dict[str, Any]) -> dict[str, Any]:
    """How a result's configuration differs from its method as it is defined now."""
    config = result["config"]
    same = ("dataset", "regime", "split", "seed", "size")
    plain = make(config["method"], **{name: config[name] for name in same})
    now = vars(plain.resolved)
    return {name: value for name, value in config.items() if now.get(name) != value}


def tables(results: Iterable[dict[str, Any]], split: str = "test") -> Table:
    """Unchanged methods by setting and name, in the order of METHODS."""
    found: Table = {}
    for result in results:
        config = result["config"]
        if config["split"] == split and not changes(result):
            setting = Setting(config["regime"], config["size"], config["dataset"])
            found.setdefault(setting, {}).setdefault(config["method"], Group()).append(result)
    return {
        setting: {name: found[setting][name] for name in METHODS if name in found[setting]}
        for setting in sorted(found)
    }


def gap_closed(methods: dict[str, Group], method: str, ceiling: str = "supervised") -> float | None:
    """Where R@1 lies between zero-shot (0) and supervised (1); None if one is missing."""
    if not {"zero_shot", ceiling, method} <= set(methods):
        return None
    low, high = methods["zero_shot"].mean(), methods[ceiling].mean()
    return None if high <= low else (methods[method].mean() - low) / (high - low)


def cost_of_removal(table: Table) -> dict[str, dict[Setting, float]]:
    """R@1 that the full method loses without each part, in points."""
    found: dict[str, dict[Setting, float]] = {}
    for part, method in WITHOUT.items():
        for setting, methods in table.items():
            if "full" in methods and method in methods:
                lost = 100 * (methods["full"].mean() - methods[method].mean())
                found.setdefault(part, {})[setting] = lost
    return found


class Trial(NamedTuple):
    """One setting that was tried, beside the method without the change."""

    setting: Setting
    method: str
    changed: str
    seeds: int
    value: float
    plain: float | None


def trials(results: Iterable[dict[str, Any]], split: str = "validation") -> list[Trial]:
    """Everything that was tried on a split, worst and best alike."""
    groups: dict[tuple[Setting, str, str], Group] = {}
    for result in results:
        config = result["config"]
        if config["split"] == split:
            setting = Setting(config["regime"], config["size"], config["dataset"])
            changed = ", ".join(f"{k}={v}" for k, v in changes(result).items())
            groups.setdefault((setting, config["method"], changed), Group()).append(result)
    found = []
    for (setting, method, changed), group in groups.items():
        plain = groups.get((setting, method, ""))
        value = None if plain is None else plain.mean()
        found.append(Trial(setting, method, changed, len(group), group.mean(), value))
    order = list(METHODS)
    return sorted(found, key=lambda t: (t.setting, order.index(t.method), -t.value))
