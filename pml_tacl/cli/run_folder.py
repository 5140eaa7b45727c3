"""Run folders: opening, resuming and validating them, and helpers for scripts."""

import hashlib
import json
import os
import random
import re
import select
import shlex
import shutil
import sqlite3  # record-keeper's
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pml_tacl.cli.flags import by_flags, command_line
from pml_tacl.trainers.records import Keeper
from pml_tacl.utils.errors import InputError, PmlTaclError
from pml_tacl.utils.files import write_json
from pml_tacl.utils.plain import as_json
from pml_tacl.utils.runs import MARK, columns_of, read_config
from pml_tacl.utils.signals import Interrupted
from pml_tacl.utils.versions import versions

__all__ = [
    "check_run",
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

_WORDS = {"image_files": "its images", "eval_image_files": "its test images"}
_ENDS = 2**16  # bytes
# Words in sqlite's messages about disk errors; other messages are bugs in a statement.
_DISK = re.compile(r"full|disk|read-?only|unable to open|locked|malformed", re.I)


def open_run(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    free: Collection[str] = (),
) -> Path:
    """Create a run folder, or open one to resume; the config is saved in ``run.json``.

    Validate all other arguments before this call: ``overwrite`` deletes the earlier run here.

    Args:
        folder: folder of the run, which is created if needed.
        config: settings of the run; numbers, strings and lists of them.
        resume: continue the run in the folder, or begin if the folder is empty.
        overwrite: delete the run in the folder.
        free: names of settings that may change on resume; the new values are saved.

    Returns:
        The folder.

    Raises:
        InputError: if the folder contains another run or other files, if both flags are set, or
            if the config of the run to resume differs.
        InputTypeError: if the config contains a type that JSON does not support.
    """
    folder = Path(folder)
    check_run(folder, config, resume=resume, overwrite=overwrite, free=free)
    there = sorted(folder.iterdir()) if folder.exists() else []
    if there and resume:
        if read_config(folder) != _as_kept(config):
            write_json(folder / MARK, dict(config))
        return folder
    for path in there:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, dict(config))
    return folder


def check_run(
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    free: Collection[str] = (),
) -> None:
    """Raise the errors of :func:`open_run` without changing anything.

    Call it at the start of a script, so that a missing flag is reported before images are read.
    The arguments are those of :func:`open_run`.

    Args:
        config: settings of the run; None if they are not known yet, to skip their comparison.
    """
    folder = Path(folder)
    asked = None if config is None else _as_kept(config)
    if resume and overwrite:
        raise InputError(
            "resume and overwrite (--resume and --overwrite) exclude each other: give only one"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run folder {folder} is a file: give another folder")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there and MARK not in there:
        raise InputError(f"run folder {folder} contains files, but no run: give another folder")
    if there and not (resume or overwrite):
        raise InputError(
            f"run folder {folder} already contains a run: give --resume (resume=True) to continue "
            "it, --overwrite (overwrite=True) to replace it, or another folder"
        )
    if there and resume and asked is not None:
        earlier = read_config(folder)
        changed = sorted(k for k in {*earlier, *asked} if earlier.get(k) != asked.get(k))
        if changed := [name for name in changed if name not in free]:
            shown = [f"{name}={earlier.get(name)!r}" for name in changed if name in earlier]
            same = ", ".join(text for text in shown if len(text) < 60)
            named = ", ".join(_WORDS.get(name, name) for name in changed)
            hint = _other_images(folder, earlier) if "image_files" in changed else ""
            raise InputError(
                f"run folder {folder} was started with other settings ({named}): "
                f"resume with the same{f' ({same})' if same else ''}, or give another folder{hint}"
            )


def _other_images(folder: Path, config: Mapping[str, Any]) -> str:
    """Return what to do with a folder of images that has changed since the run began."""
    if not {"images", "backbone", "image_size"} <= config.keys():  # not of the command line
        return ""
    command = command_line("search", folder, "--update")
    hint = f"; {command} indexes these images with the model of the run"
    if config.get("weights") is False:
        return hint
    model = shlex.quote(str(folder / "model" / "model.safetensors"))
    return f"{hint}, and then --weights {model} starts a new run from its trained weights"


def _as_kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as it is read from ``run.json``."""
    made: dict[str, Any] = json.loads(json.dumps(as_json(dict(config), "config")))
    return made


def digest_of(names: Sequence[str], paths: Sequence[Path]) -> str:
    """Return a hash that identifies a set of files, independent of their folder.

    Args:
        names: names of the files, relative to their folder.
        paths: paths of the same files.

    Returns:
        A hash of name, size, and first and last 64 KiB of all files.

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


def seed_everything(seed: int) -> None:
    """Seed the global random generators of Python, NumPy (used by PML's samplers) and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def make_hooks(folder: str | Path, log_freq: int = 10, **kwargs: Any) -> Any:
    """Return PML's logging hooks, with record-keeper's csv and sqlite records in a folder.

    Args:
        folder: folder of the records.
        log_freq: iterations from one record of the losses to the next.
        **kwargs: further arguments of PML's HookContainer.

    Returns:
        A ``pytorch_metric_learning.utils.logging_presets.HookContainer``; call
        ``hooks.record_keeper.save_records()`` at the end of an epoch.
    """
    import record_keeper
    from pytorch_metric_learning.utils import common_functions, logging_presets

    # PML's get_record_keeper requires tensorboard even if it is not used.
    keeper = Keeper(
        record_writer=record_keeper.RecordWriter(str(folder)),
        attributes_to_search_for=common_functions.list_of_recordable_attributes_list_names(),
    )
    return logging_presets.HookContainer(keeper, log_freq=log_freq, **kwargs)


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Format retrieval metrics in per cent as a table.

    Args:
        rows: name of the row -> metrics in [0, 1], with the names of :class:`RetrievalCalculator`.
    """
    names = columns_of(name for row in rows.values() for name in row)
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{head:>8}" for head in names.values())]
    for title, row in rows.items():
        cells = (f"{100 * row[name]:8.1f}" if name in row else " " * 7 + "-" for name in names)
        lines.append(f"{title:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _output_is_closed() -> bool:
    """Return whether the reader of standard output has ended, such as head."""
    if not hasattr(select, "poll"):  # Windows
        return False
    try:
        output = sys.stdout.fileno()
    except OSError:  # it is not a file
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a script with a message of one line instead of a traceback, for errors of the user.

    These are errors of this package (:class:`pml_tacl.utils.errors.PmlTaclError`) and of the
    operating system. Other errors are bugs and keep their traceback. With ``--debug`` in the
    script's arguments, all errors keep it. The exit code is 1 for an error, 130 for SIGINT and 143
    for SIGTERM.
    """
    try:
        yield
    except Interrupted as stop:
        print(f"{stop}: continue with --resume", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
    except (PmlTaclError, OSError, sqlite3.DatabaseError) as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        of_disk = not isinstance(error, sqlite3.DatabaseError) or _DISK.search(str(error))
        if "--debug" in sys.argv[1:] or not of_disk:
            raise
        text = str(error)
        if "\nOriginal Traceback" in text:  # from a DataLoader worker: keep its last line
            text = text.strip().rsplit("\n", 1)[-1].partition(": ")[2]
        sys.exit(f"error: {by_flags(' '.join(text.split()))}")
