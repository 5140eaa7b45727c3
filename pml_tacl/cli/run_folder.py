"""A run's folder: opened without harming another run, written without a half-written file."""

import hashlib
import json
import random
import re
import shutil
import sqlite3  # record-keeper's
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pml_tacl.cli.flags import by_flags
from pml_tacl.trainers.records import Keeper
from pml_tacl.utils.errors import InputError, PmlTaclError
from pml_tacl.utils.files import write_json
from pml_tacl.utils.plain import as_json
from pml_tacl.utils.signals import Interrupted
from pml_tacl.utils.versions import versions

__all__ = [
    "check_run",
    "columns_of",
    "digest_of",
    "make_hooks",
    "metrics_table",
    "one_line_errors",
    "open_run",
    "read_config",
    "seed_everything",
    "versions",
    "write_json",
]

_MARK = "run.json"
_ENDS = 2**16  # bytes
# Of sqlite's own words for a fault of the disk; the rest are faults of a statement.
_DISK = re.compile(r"full|disk|read-?only|unable to open|locked|malformed", re.I)
_OTHERS = {"mean_average_precision_at_r": "MAP@R", "NMI": "NMI"}


def open_run(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    free: Collection[str] = (),
) -> Path:
    """Make a run's folder, or open one to go on in it; its config is kept in ``run.json``.

    Call it last, when all arguments have been found good: with ``overwrite`` the earlier run's
    files are deleted here.

    Args:
        folder: made if it is not there.
        config: what the run was asked to do; numbers, strings and lists of them.
        resume: go on with the run that the folder holds (or begin, if it holds nothing).
        overwrite: delete the run that the folder holds.
        free: names of settings that may be others when the run goes on; the new ones are kept.

    Returns:
        The folder.

    Raises:
        InputError: if the folder holds another run or other files, or both flags are set, or the
            run to resume had another config.
        InputTypeError: if the config holds what JSON has no form for.
    """
    folder = Path(folder)
    check_run(folder, config, resume=resume, overwrite=overwrite, free=free)
    there = sorted(folder.iterdir()) if folder.exists() else []
    if there and resume:
        if read_config(folder) != _as_kept(config):
            write_json(folder / _MARK, dict(config))
        return folder
    for path in there:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _MARK, dict(config))
    return folder


def check_run(
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    free: Collection[str] = (),
) -> None:
    """Raise what :func:`open_run` would, and touch nothing.

    For the first line of a script: whoever forgot a flag learns it before images are read.

    Args:
        folder: as of :func:`open_run`, and so on.
        config: None if it is not known yet, and then not compared.
    """
    folder = Path(folder)
    asked = None if config is None else _as_kept(config)
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other: give one of them")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run folder {folder} is a file: give another folder")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there and _MARK not in there:
        raise InputError(f"run folder {folder} holds files that are no run: give another folder")
    if there and not (resume or overwrite):
        raise InputError(
            f"run folder {folder} holds another run: give --resume (resume=True) to go on with it, "
            "--overwrite (overwrite=True) to replace it, or another folder"
        )
    if there and resume and asked is not None:
        earlier = read_config(folder)
        changed = sorted(k for k in {*earlier, *asked} if earlier.get(k) != asked.get(k))
        if changed := [name for name in changed if name not in free]:
            shown = [f"{name}={earlier.get(name)!r}" for name in changed if name in earlier]
            same = ", ".join(text for text in shown if len(text) < 60)
            learnt = (folder / "model").is_dir() and earlier.get("weights") is not False
            grown = "image_files" in changed and learnt
            raise InputError(
                f"run folder {folder} was begun with other settings ({', '.join(changed)}): "
                f"resume with the same{f' ({same})' if same else ''}, or give another folder"
                + (f"; {_other_images(folder)}" if grown else "")
            )


def _other_images(folder: Path) -> str:
    return (
        f"pml-tacl search {folder} --update indexes other images with its model, and --weights "
        f"{folder / 'model' / 'model.safetensors'} begins from what it has learnt"
    )


def _as_kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it comes back from ``run.json``."""
    made: dict[str, Any] = json.loads(json.dumps(as_json(dict(config), "config")))
    return made


def digest_of(names: Sequence[str], paths: Sequence[Path]) -> str:
    """Tell a collection of files by their names and content, wherever it lies.

    Args:
        names: of the files, relative to their folder.
        paths: of the same files.

    Returns:
        A hash of each name, size, and first and last 64 KiB.

    Raises:
        OSError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    for name, path in zip(names, paths, strict=True):
        with path.open("rb") as file:
            digest.update(f"{name}\0".encode("utf-8", "surrogatepass"))
            size = file.seek(0, 2)
            digest.update(f"{size}\0".encode())
            file.seek(0)
            digest.update(file.read(_ENDS))
            file.seek(max(file.tell(), size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


def read_config(folder: str | Path) -> dict[str, Any]:
    """What a run was asked to do.

    Raises:
        ValueError: if the folder holds no run.
    """
    try:
        config = dict(json.loads((Path(folder) / _MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} is no run's folder: it holds no readable {_MARK}") from error
    return config


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy (which PML's samplers draw from) and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def make_hooks(folder: str | Path, log_freq: int = 10, **kwargs: Any) -> Any:
    """PML's logging hooks with record-keeper's csv and sqlite records in a folder.

    Args:
        folder: of the records.
        log_freq: iterations between two records of the losses.
        **kwargs: as of PML's HookContainer.

    Returns:
        A ``pytorch_metric_learning.utils.logging_presets.HookContainer``; call
        ``hooks.record_keeper.save_records()`` at the end of an epoch.
    """
    import record_keeper
    from pytorch_metric_learning.utils import common_functions, logging_presets

    # PML's own get_record_keeper wants tensorboard even where nothing is written for it.
    keeper = Keeper(
        record_writer=record_keeper.RecordWriter(str(folder)),
        attributes_to_search_for=common_functions.list_of_recordable_attributes_list_names(),
    )
    return logging_presets.HookContainer(keeper, log_freq=log_freq, **kwargs)


def columns_of(metrics: Iterable[str]) -> dict[str, str]:
    """Which metrics a table shows, and what heads their columns: R@K by K, MAP@R, NMI."""
    there = set(metrics)
    ks = sorted(int(at) for name in there if (at := name.removeprefix("recall_at_")).isdecimal())
    recalls = {f"recall_at_{k}": f"R@{k}" for k in ks}
    return recalls | {name: head for name, head in _OTHERS.items() if name in there}


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Retrieval metrics in per cent, one line per row.

    Args:
        rows: name of the row -> metrics, named as :class:`RetrievalCalculator` does.
    """
    names = columns_of(name for row in rows.values() for name in row)
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{head:>8}" for head in names.values())]
    for title, row in rows.items():
        cells = (f"{100 * row[name]:8.1f}" if name in row else " " * 7 + "-" for name in names)
        lines.append(f"{title:<{width}}" + "".join(cells))
    return "\n".join(lines)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a script with one line instead of a traceback, for errors that a user can mend.

    These are the package's own (:class:`pml_tacl.utils.errors.PmlTaclError`) and the operating
    system's; any other is a fault of a program and keeps its traceback. With ``--debug`` among the
    script's arguments all do. A signal ends it with 130 (SIGINT) or 143 (SIGTERM), an error with 1.
    """
    try:
        yield
    except Interrupted as stop:
        print(f"{stop}: go on with --resume", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
    except (PmlTaclError, OSError, sqlite3.DatabaseError) as error:
        of_disk = not isinstance(error, sqlite3.DatabaseError) or _DISK.search(str(error))
        if "--debug" in sys.argv[1:] or not of_disk:
            raise
        text = str(error)
        if "\nOriginal Traceback" in text:  # from a DataLoader's worker: what was raised there
            text = text.strip().rsplit("\n", 1)[-1].partition(": ")[2]
        sys.exit(f"error: {by_flags(' '.join(text.split()))}")
