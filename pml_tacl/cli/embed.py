"""Embed a folder of images with the model of a run or a timm model, without training."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch import Tensor

from pml_tacl.cli import flags
from pml_tacl.cli.models import Loaded, given_folder
from pml_tacl.cli.parsers import EMBEDDING_FILES
from pml_tacl.datasets import ImageFiles
from pml_tacl.evaluation import embed
from pml_tacl.trainers.fitting import fit_to
from pml_tacl.utils.errors import InputError, MissingPackageError
from pml_tacl.utils.files import atomic_write, shown_name, write_json
from pml_tacl.utils.words import counted


def run(args: Any, results: TextIO) -> dict[str, Any]:
    """Embed, and write one file; see `pml_tacl.cli.main`."""
    if args.out.suffix.lower() == ".parquet":
        _pyarrow()  # fail before the work, not after it
    loaded, images = given_folder(args, args.images)
    embeddings = embed_images(loaded, images, num_workers=args.workers, progress=flags.bars(args))
    write_embeddings(args.out, images.names, embeddings)
    count, dimensions = embeddings.shape
    print(f"{counted(count, 'image')}, {dimensions} numbers each: {args.out}")
    return {"file": str(args.out), "images": count, "dimensions": dimensions}


def embed_images(
    loaded: Loaded, images: ImageFiles, *, num_workers: int = 0, progress: bool = True
) -> Tensor:
    """Embed images; the projection of a timm model is fitted to them first.

    Args:
        loaded: model from :func:`pml_tacl.cli.models.load_model`.
        images: N images, with the transform ``loaded.transform``.
        num_workers: processes that read images.
        progress: show progress bars.

    Returns:
        Unit embeddings (N, D), on the CPU.
    """
    if not loaded.of_run:
        fit_to(loaded.model, images, num_workers, progress=progress)
    return embed(loaded.model, images, num_workers=num_workers, progress=progress)[0]


def write_embeddings(path: str | Path, names: Sequence[str], embeddings: Tensor) -> None:
    """Write embeddings with the names of their images.

    Args:
        path: path with the suffix ``.npy`` (float32 (N, D), with the names as a JSON list in
            ``<stem>.names.json`` beside it), ``.csv`` (columns name, 0, 1, ...) or ``.parquet``
            (columns name and embedding, a list of float32).
        names: N names.
        embeddings: (N, D).

    Raises:
        InputError: for another suffix.
        MissingPackageError: for ``.parquet`` without pyarrow.
    """
    path, rows = Path(path), embeddings.numpy()
    ending = path.suffix.lower()
    if ending not in EMBEDDING_FILES:
        raise InputError(f"path must end with .npy, .csv or .parquet, got {str(path)!r}")
    if ending == ".npy":
        write_json(path.with_suffix(".names.json"), list(names))
        with atomic_write(path) as file:
            np.save(file, rows)
    elif ending == ".csv":
        with atomic_write(path) as file:
            text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
            writer = csv.writer(text)
            writer.writerow(["name", *range(rows.shape[1])])
            writer.writerows([name, *row] for name, row in zip(names, rows.tolist(), strict=True))
            text.flush()
            text.detach()
    else:
        arrow, parquet = _pyarrow()
        values = arrow.FixedSizeListArray.from_arrays(rows.reshape(-1), rows.shape[1])
        table = arrow.table({"name": list(map(shown_name, names)), "embedding": values})
        with atomic_write(path) as file:
            parquet.write_table(table, file)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            ".parquet needs pyarrow: pip install pyarrow, or give --out a .npy or .csv"
        ) from error
    return pyarrow, pyarrow.parquet
