"""record-keeper's records as part of a checkpoint: taken back to where it was written.

A record that was written after the last checkpoint belongs to iterations that a resumed training
makes again; it would stand there twice.
"""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger(__name__)


def records_state(keeper: Any) -> dict[str, Any]:
    """Where the records of a RecordKeeper are: on the disk, and still in memory.

    Args:
        keeper: a ``record_keeper.RecordKeeper`` with a record_writer.

    Returns:
        Plain numbers, strings and containers.
    """
    writer = keeper.record_writer
    sizes = {}
    for path in sorted(Path(writer.folder).glob("*.csv")):
        with path.open("r+b") as file:
            os.fsync(file.fileno())  # the checkpoint will say that they are there
        sizes[path.name] = path.stat().st_size
    with closing(sqlite3.connect(writer.local_db.db_path)) as base:
        rows = {name: _last_row(base, name) for name in _tables(base)}
    waiting = {
        group: {
            name: {at: _plain(v) for at, v in column.items()} for name, column in series.items()
        }
        for group, series in writer.records.items()
    }
    return {"csv": sizes, "rows": rows, "waiting": waiting}


def restore_records(keeper: Any, state: dict[str, Any]) -> None:
    """Undo what was recorded since :func:`records_state`."""
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


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value  # of NumPy
