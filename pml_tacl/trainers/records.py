"""Saving record-keeper's records in checkpoints, and restoring them.

A resumed training repeats the iterations after the last checkpoint. Records of those iterations
are removed on resume; otherwise they would appear twice.
"""

import csv
import logging
import os
import re
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict

import torch
from record_keeper import RecordKeeper
from torch import Tensor

from pml_tacl.utils.plain import plain

_LOGGER = logging.getLogger(__name__)
_TOGETHER = 100  # iterations written at once


class RecordsState(TypedDict):
    """State of record-keeper's records when a checkpoint was written."""

    csv: dict[str, int]
    """Size of each csv file in bytes."""
    rows: dict[str, int]
    """Id of the last row of each table."""
    waiting: dict[str, dict[str, dict[int, object]]]
    """Values in memory, not yet written: iteration -> value, by group and name."""


class Keeper(RecordKeeper):
    """RecordKeeper that makes names valid for tables and files.

    Names come from the parts of a loss. Those of ``MultipleLosses([...])`` are numbers, and those
    of a dict may be any text. Valid names do not change.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._taken: dict[str, str] = {}

    def append_data(self, group_name: str, series_name: str, value: Any, iteration: int) -> None:
        name = re.sub(r"\W", "_", group_name)
        name = f"_{name}" if name[:1].isdigit() else name
        if self._taken.setdefault(name.casefold(), group_name) != group_name:
            name += f"_{zlib.crc32(group_name.encode()):08x}"
        super().append_data(name, series_name, value, iteration)


class LossesFile:
    """A csv file with all losses of all iterations. Training appends to it and never reads it.

    Reading a loss makes the CPU wait for the GPU, so the losses of 100 iterations are read at
    once. If the file is in the folder of record-keeper's records, checkpoints cover it too.

    Args:
        path: path of the file, which is created with the first losses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[tuple[int, dict[str, float | Tensor]]] = []

    def add(self, iteration: int, losses: dict[str, float | Tensor]) -> None:
        """Add the losses of an iteration.

        Args:
            iteration: number of the iteration.
            losses: numbers, or 0-d tensors without a graph, by name.
        """
        self._waiting.append((iteration, dict(losses)))
        if len(self._waiting) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write all losses that are still in memory."""
        if not self._waiting:
            return
        steps, rows = zip(*self._waiting, strict=True)
        names = list(rows[0])
        columns = [_numbers([row.get(name, 0.0) for row in rows]) for name in names]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(["iteration", *names])
            writer.writerows(zip(steps, *columns, strict=True))
        self._waiting = []


def read_losses(path: str | Path) -> dict[str, list[float]]:
    """Read a :class:`LossesFile`: name -> one value for each iteration; empty without a file."""
    if not Path(path).is_file():
        return {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        names, *rows = list(csv.reader(file)) or [[]]
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return {
        name: [float(value) for value in column]
        for name, column in zip(names[1:], columns[1:], strict=True)
    }


def _numbers(values: list[float | Tensor]) -> list[float]:
    """Convert numbers and 0-d tensors to floats, with one synchronisation of the device."""
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    wide = max((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
    read = iter(torch.stack([t.to(tensors[0].device, wide) for t in tensors]).tolist())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def records_state(keeper: Any) -> RecordsState:
    """Return the state of a RecordKeeper's records, on disk and in memory.

    Args:
        keeper: a ``record_keeper.RecordKeeper`` with a record_writer.

    Returns:
        A state of plain numbers, strings and containers.
    """
    writer = keeper.record_writer
    sizes = {}
    for path in sorted(Path(writer.folder).glob("*.csv")):
        with path.open("r+b") as file:
            os.fsync(file.fileno())  # the checkpoint will rely on this size
        sizes[path.name] = path.stat().st_size
    with closing(sqlite3.connect(writer.local_db.db_path)) as base:
        rows = {name: _last_row(base, name) for name in _tables(base)}
    waiting = {
        group: {name: {at: plain(v) for at, v in column.items()} for name, column in series.items()}
        for group, series in writer.records.items()
    }
    return {"csv": sizes, "rows": rows, "waiting": waiting}


def restore_records(keeper: Any, state: RecordsState) -> None:
    """Remove everything that was recorded since the state of :func:`records_state`."""
    writer = keeper.record_writer
    for path in sorted(Path(writer.folder).glob("*.csv")):
        size = state["csv"].get(path.name)
        if size is None:
            path.unlink()
        elif path.stat().st_size < size:
            _LOGGER.warning("%s has lost records since the checkpoint was written", path)
        else:
            os.truncate(path, size)
    with closing(sqlite3.connect(writer.local_db.db_path)) as base, base:
        for name in _tables(base):
            last = state["rows"].get(name)
            if last is None:
                base.execute(f"DROP TABLE {_quoted(name)}")
                continue
            base.execute(f"DELETE FROM {_quoted(name)} WHERE id > ?", (last,))
            base.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = ?", (last, name))
    writer.records = writer.get_empty_nested_dict()
    for group, series in state["waiting"].items():
        for name, column in series.items():
            writer.records[group][name] = dict(column)


def _tables(base: sqlite3.Connection) -> list[str]:
    found = base.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return [name for (name,) in found if not name.startswith("sqlite_")]


def _last_row(base: sqlite3.Connection, table: str) -> int:
    return int(base.execute(f"SELECT coalesce(max(id), 0) FROM {_quoted(table)}").fetchone()[0])


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
