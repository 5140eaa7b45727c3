"""Compare the output of two runs."""

import io
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from pml_tacl.trainers.checkpoint import checkpoints


def last_seen(folder: Path) -> str:
    trace = folder.with_suffix(".trace")
    lines = trace.read_text().splitlines() if trace.exists() else []
    return lines[-1] if lines else "starting"


def result(folder: Path) -> dict[str, Any]:
    """Return by name everything that must be equal in two runs."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".csv", ".safetensors", ".json")
    }
    with closing(sqlite3.connect(folder / "records" / "logs.db")) as base:
        tables = base.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in sorted(tables):
            found[f"logs.db, {name}"] = base.execute(f'SELECT * FROM "{name}"').fetchall()
    found["checkpoints"] = [path.name for path in checkpoints(folder / "checkpoints")]
    state = torch.load(checkpoints(folder / "checkpoints")[-1], weights_only=True)
    buffer = io.BytesIO()
    torch.save({name: state[name] for name in state if name != "versions"}, buffer)
    found["last checkpoint"] = buffer.getvalue()
    return found


def differences(folder: Path, expected: dict[str, Any]) -> list[str]:
    if not (folder / "metrics.json").exists():
        return ["it has not ended"]
    found = result(folder)
    return [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
