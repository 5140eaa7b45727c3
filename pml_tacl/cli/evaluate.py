"""Measure how well the model of a run retrieves images of the same class."""

from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pml_tacl.cli import flags
from pml_tacl.cli.eval_folder import images_to_test_on
from pml_tacl.cli.models import Loaded, given_run
from pml_tacl.cli.run_folder import metrics_table
from pml_tacl.datasets import ImageFiles
from pml_tacl.evaluation import evaluate
from pml_tacl.utils.errors import InputError


def run(args: Any, results: TextIO) -> dict[str, Any]:
    """Print a table of metrics in per cent; see `pml_tacl.cli.main`."""
    metrics = evaluate_folder(
        given_run(args),
        args.labelled,
        args.reference,
        num_workers=args.workers,
        progress=flags.bars(args),
    )
    if not args.json:
        print(f"{metrics_table({str(args.run): metrics})}\n\nper cent", file=results)
    return dict(metrics)


def evaluate_folder(
    loaded: Loaded,
    folder: str | Path,
    reference: str | Path | None = None,
    *,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Measure retrieval on a folder whose sub-folders are classes.

    Args:
        loaded: model from :func:`pml_tacl.cli.models.load_model`.
        folder: folder of the queries.
        reference: folder of the images to search in; classes are matched by name. None searches
            in the same images, each without itself.
        num_workers: processes that read images.
        progress: show progress bars.

    Returns:
        Value in [0, 1] by name of metric.

    Raises:
        InputError: if retrieval cannot be measured on these images.
    """
    settings: dict[str, Any] = {"num_workers": num_workers, "progress": progress}
    if reference is None:
        images = images_to_test_on(folder, transform=loaded.transform, progress=progress)
        return evaluate(loaded.model, images, **settings)
    images, others = (
        ImageFiles(one, labels="folder", transform=loaded.transform, progress=progress)
        for one in (folder, reference)
    )
    common = set(images.classes) & set(others.classes)
    if not common:
        raise InputError(
            f"reference={str(reference)!r} has no sub-folder with the same name as one in "
            f"{str(folder)!r}: use the same class names in both"
        )
    names = sorted({*images.classes, *others.classes})
    for one in (images, others):
        own = np.searchsorted(names, one.classes)
        one.labels, one.classes = own[one.labels].astype(np.int64), names
    print(
        f"searching {len(others)} images for {len(images)} queries, {len(common)} classes in common"
    )
    return evaluate(loaded.model, images, reference=others, **settings)
