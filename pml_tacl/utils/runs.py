"""What the commands and the report read of a run folder."""

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from pml_tacl.utils.errors import InputError

MARK = "run.json"  # file with the settings of a run
INDEX = "index.faiss"  # the vectors of the index of a run
STOPPED = "stopped.json"  # names the checkpoint from which a stopped run was indexed
_OTHERS = {"mean_average_precision_at_r": "MAP@R", "NMI": "NMI"}


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the settings of a run.

    Raises:
        ValueError: if the folder contains no run.
    """
    try:
        config = dict(json.loads((Path(folder) / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} is not a run folder: it contains no readable {MARK}") from error
    return config


def stopped_at(run: str | Path) -> str | None:
    """Return the name of the checkpoint of a stopped run's index; None for a completed run."""
    try:
        return str(json.loads((Path(run) / STOPPED).read_text("utf-8"))["checkpoint"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def columns_of(metrics: Iterable[str]) -> dict[str, str]:
    """Return the metrics that a table shows, with column titles: R@K by K, MAP@R, NMI."""
    there = set(metrics)
    ks = sorted(int(at) for name in there if (at := name.removeprefix("recall_at_")).isdecimal())
    recalls = {f"recall_at_{k}": f"R@{k}" for k in ks}
    return recalls | {name: head for name, head in _OTHERS.items() if name in there}


def remove_index(run: str | PathLike[str]) -> None:
    """Remove the index of a run, before another model is written to the run.

    A search would otherwise use the index with a model that did not make it.
    """
    (Path(run) / INDEX).unlink(missing_ok=True)
