"""Find groups of near-duplicate images by their embeddings."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from pml_tacl.cli import flags
from pml_tacl.cli.embed import embed_images
from pml_tacl.cli.models import given_folder, given_index
from pml_tacl.cli.search import thumbnail, write_gallery
from pml_tacl.duplicates import Group, find_duplicates
from pml_tacl.search import ImageIndex
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import atomic_write
from pml_tacl.utils.words import counted

SHOWN = 20  # groups in the gallery
MEMBERS = 16  # images of a group in the gallery, at most
PRINTED = 10  # groups that are printed


def run(args: Any, results: TextIO) -> dict[str, Any]:
    """Print a summary, and write a table and a gallery; see `pml_tacl.cli.main`."""
    folder: Path = args.folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a run, or a folder of images")
    is_run = (folder / "run.json").is_file()
    if is_run:
        given = {
            "--exclude": bool(args.exclude),
            "--files": args.files is not None,
            "--image-size": args.image_size is not None,
            "--model": args.model != flags.DUPLICATES_MODEL,
        }
        if unused := [flag for flag, is_given in given.items() if is_given]:
            raise InputError(
                f"{', '.join(unused)}: for a folder of images, and {folder} is a run, whose index "
                "is searched"
            )
        index = given_index(args, folder)
        embeddings: Any = index.embeddings
    else:
        loaded, images = given_folder(args, folder)
        embeddings = embed_images(
            loaded, images, num_workers=args.workers, progress=flags.bars(args)
        )
        index = ImageIndex.of(images, embeddings)
    groups = find_duplicates(embeddings, args.threshold)
    listed = [
        [
            {"file": index.files[row], "similarity": round(float(value), 6)}
            for row, value in zip(group.rows, group.similarities, strict=True)
        ]
        for group in groups
    ]
    inside = sum(map(len, listed))
    if not args.json:
        print(
            f"{counted(len(groups), 'group')} of near-duplicates, {inside} of {len(index)} images, "
            f"similarity of {args.threshold:g} or more",
            file=results,
        )
        for number, group in enumerate(listed[:PRINTED], 1):
            names = ", ".join(image["file"] for image in group[:4])
            more = f", and {len(group) - 4} more" if len(group) > 4 else ""
            print(f"{number:4}  {len(group):4} images  {names}{more}", file=results)
        if len(groups) > PRINTED:
            print(f"      and {len(groups) - PRINTED} more groups", file=results)
    out = args.out or (folder / "duplicates" if is_run and not args.json else None)
    if out is not None:
        write_groups(out, index, groups)
        print(f"{'table and gallery' if groups else 'table'}: {out}")
    return {"root": str(index.root), "threshold": args.threshold, "groups": listed}


def write_groups(out: str | Path, index: ImageIndex, groups: Sequence[Group]) -> None:
    """Write groups as a table, ``duplicates.csv``, and a gallery, ``duplicates.png``.

    The table has the columns group, file and similarity. The gallery shows the first groups.

    Args:
        out: folder, which is created if needed.
        index: index of the images.
        groups: groups from :func:`pml_tacl.duplicates.find_duplicates`.
    """
    out = Path(out)
    with atomic_write(out / "duplicates.csv") as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        writer = csv.writer(text)
        writer.writerow(["group", "file", "similarity"])
        for number, group in enumerate(groups, 1):
            for row, value in zip(group.rows, group.similarities, strict=True):
                writer.writerow([number, index.files[row], f"{value:.6f}"])
        text.flush()
        text.detach()
    shown = []
    for group in groups[:SHOWN]:
        try:
            shown.append((group, thumbnail(index.paths(group.rows[:1])[0])))
        except OSError:  # deleted or damaged after indexing
            continue
    (out / "duplicates.png").unlink(missing_ok=True)  # from another threshold
    if shown:
        write_gallery(
            index,
            [first for _, first in shown],
            [group.rows[1:MEMBERS] for group, _ in shown],
            [group.similarities[1:MEMBERS] for group, _ in shown],
            out / "duplicates.png",
            [index.files[group.rows[0]] for group, _ in shown],
            headings=("a group's first image", "near-duplicates of it"),
        )
