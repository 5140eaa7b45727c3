"""Parsers of the commands. They import no torch, so that help and wrong usage take no time."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pml_tacl.cli import flags

# Settings of `train`; None: the default of the model's recipe, see `pml_tacl.trainers.recipe`.
TRAINING: dict[str, Any] = {
    "run": "runs/folder",
    "backbone": "resnet50",
    "weights": "pretrained",
    "image_size": None,
    "epochs": None,
    "batch_size": None,
    "learning_rate": None,
    "num_clusters": "auto",
    "swap": True,
    "guard": None,
    "embedding_dim": 512,
    "freeze_batchnorm": None,
    "images_per_cluster": None,
    "warmup_epochs": None,
    "checkpoint_every": 1000,
    "strict": False,
    "workers": 2,
    "tensorboard": False,
    "device": None,
    "seed": 0,
}
EMBEDDING_FILES = (".npy", ".csv", ".parquet")
_GALLERIES = (".png", ".svg", ".pdf")


def parse(
    command: str, arguments: Sequence[str] | None = None, program: str | None = None
) -> argparse.Namespace:
    """Parse and check the arguments of a command; help and wrong usage exit.

    Args:
        command: name of the command, such as "search".
        arguments: arguments after the name; None for sys.argv.
        program: name of the command in messages; None for the name of the process.
    """
    return _PARSERS[command](arguments, program)


def _train(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.training_parser(
        "Train an embedding on a folder of images without labels, and index the images.", TRAINING
    )
    if program is not None:
        parser.prog = program
    parser.usage = "%(prog)s FOLDER [flags]"
    parser.epilog = f"example: {parser.prog} photos --backbone resnet50 --run runs/photos"
    parser.add_argument("images", type=Path, nargs="?", metavar="FOLDER", help="folder of images")
    parser.add_argument(
        "--eval-folder",
        type=Path,
        metavar="DIR",
        help="test images with a sub-folder per class; default: no test",
    )
    flags.add_choice(parser.more)
    flags.add_json(parser.more)
    flags.add_quiet(parser.more)
    args = parser.parse_args(arguments)
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other: give only one")
    if args.resume:  # the run's settings are the defaults of this command line
        parser.set_defaults(**_settings_of_run(Path(args.run), set(vars(args))))
        args = parser.parse_args(arguments)
    if args.images is None and args.resume:
        parser.error(f"{args.run} contains no run to resume: give the folder of a run as --run")
    if args.images is None:
        parser.error("no folder of images is given: put it first")
    return args


def _settings_of_run(run: Path, known: set[str]) -> dict[str, Any]:
    """Return the flags of an existing run; empty if there is none."""
    path = run / "run.json"
    if not os.path.isfile(path):  # False also if the folder cannot be read
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # opening the run raises the error
        return {}
    if not isinstance(config, dict) or not isinstance(config.get("images"), str | None):
        return {}
    found = {name: value for name, value in config.items() if name in known}
    size = found.get("image_size")
    if isinstance(size, list):  # one that is not square is the backbone's own
        found["image_size"] = size[0] if size[0] == size[1] else None
    for name in ("images", "eval_folder", "files"):
        if isinstance(found.get(name), str):
            found[name] = Path(found[name])
    return found


def _embed(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.Parser(
        "Embed a folder of images with the model of a run or a timm model, without training.",
        "%(prog)s photos --model resnet50 --out photos.npy",
        program,
    )
    parser.add_argument("images", type=Path, metavar="FOLDER", help="folder of images")
    flags.add_model(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE",
        help=".npy (names in FILE.names.json beside it), .csv or .parquet (needs pyarrow)",
    )  # fmt: skip
    flags.add_choice(parser)
    flags.add_common(parser, json=True)
    args = parser.parse_args(arguments)
    if args.out.suffix.lower() not in EMBEDDING_FILES:
        parser.error(f"argument --out: must end with .npy, .csv or .parquet, got {args.out}")
    return args


def _index(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.Parser(
        "Index a folder of images for search with a run's model or a timm model, without training.",
        "%(prog)s photos --model resnet50 --run runs/index",
        program,
    )
    parser.add_argument("images", type=Path, metavar="FOLDER", help="folder of images")
    flags.add_model(parser)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/index"), metavar="DIR", help="folder for the index"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    flags.add_choice(parser)
    flags.add_common(parser, json=True)
    return parser.parse_args(arguments)


def _search(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.Parser(
        "Find the images of an indexed folder that are most similar to one or several images.",
        "%(prog)s runs/photos new.jpg -k 20",
        program,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run")
    add(
        "queries",
        nargs="*",
        metavar="QUERY",
        help="images, folders of images, or - to read standard input",
    )
    add("-k", type=flags.at_least(1), default=8, metavar="N", help="images to find per query")
    add("--folder", metavar="DIR", help="search only in this sub-folder of the indexed images")
    add(
        "--update",
        action="store_true",
        help="first add new and changed images to the index, and remove deleted ones",
    )
    add("--out", type=Path, metavar="FILE",
        help="file of the gallery; default: RUN/search.png, search-2.png, ...")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="folder of the indexed images, if moved")
    flags.add_common(parser, json=True)
    # So that flags may stand before the queries, too: RUN --update QUERY.
    args = parser.parse_intermixed_args(arguments)
    if not args.queries and not args.update:
        parser.error("no query: give a QUERY, or --update")
    if args.out is not None and args.out.suffix.lower() not in _GALLERIES:
        parser.error(f"argument --out: must end with .png, .svg or .pdf, got {args.out}")
    return args


def _serve(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.Parser(
        "Serve a local web page that searches a run: drop an image, or click on one.",
        "%(prog)s runs/photos --port 8080",
        program,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run")
    add("--port", type=_port, default=8765, metavar="N", help="port of the page; 0: any free port")
    add("--open", action=argparse.BooleanOptionalAction, default=True,
        help="open the page in a browser")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="folder of the indexed images, if moved")
    add("--also", type=Path, action="append", default=[], metavar="DIR",
        help="a further folder that links among the images may point to; repeatable")  # fmt: skip
    flags.add_common(parser, json=True)
    return parser.parse_args(arguments)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text}")
    return int(text)


def _duplicates(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.Parser(
        "Find groups of near-duplicate images by their embeddings.",
        "%(prog)s runs/photos --threshold 0.97",
        program,
    )
    parser.add_argument(
        "folder", type=Path, metavar="RUN_OR_FOLDER", help="an indexed run, or a folder of images"
    )
    parser.add_argument(
        "--threshold", type=_threshold, default=0.95, metavar="X",
        help="lowest cosine similarity of near-duplicates",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for duplicates.csv and duplicates.png; default: RUN/duplicates, or none for "
        "a folder of images",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="where the images of a run are, if moved"
    )
    flags.add_model(parser, default=flags.DUPLICATES_MODEL)
    flags.add_choice(parser)
    flags.add_common(parser, json=True)
    return parser.parse_args(arguments)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text}")
    return value


def _evaluate(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.Parser(
        "Measure how well the model of a run retrieves images of the same class.",
        "%(prog)s runs/photos labelled --json",
        program,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run")
    add("labelled", type=Path, metavar="LABELLED_FOLDER", help="its sub-folders are classes")
    add("--reference", type=Path, metavar="DIR",
        help="labelled images to search in; default: the same images")  # fmt: skip
    flags.add_common(parser, json=True)
    return parser.parse_args(arguments)


def _report(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.Parser(
        "Write an HTML report of a run: one file for any browser, which needs no network.",
        "%(prog)s runs/photos --out page.html",
        program,
    )
    add, number = parser.add_argument, flags.at_least(1)
    add("run", type=Path, metavar="RUN", help="folder of a run")
    add("--out", type=Path, metavar="FILE", help="file of the page; default: RUN/report.html")
    add("--images", type=Path, metavar="DIR", help="folder of the indexed images, if moved")
    add("--labels", choices=("none", "folder"), default="none",
        help="folder: judge clusters by the sub-folders of the images")  # fmt: skip
    add(
        "--queries",
        type=number,
        default=6,
        metavar="N",
        help="number of best and of worst queries to show",
    )
    add(
        "--clusters",
        type=number,
        default=4,
        metavar="N",
        help="number of clusters of each kind to show",
    )
    add(
        "--points",
        type=number,
        default=4000,
        metavar="N",
        help="largest number of points on the map",
    )
    add("--seed", type=flags.at_least(0, flags.SEEDS), default=0, metavar="N",
        help="seed of random samples and of the map")  # fmt: skip
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_debug(parser)
    return parser.parse_args(arguments)


def _export(arguments: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    parser = flags.Parser(
        "Export the model of a run to ONNX, for any batch size.",
        "%(prog)s runs/photos --onnx photos.onnx",
        program,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="file to write")
    flags.add_json(parser)
    flags.add_quiet(parser)
    flags.add_debug(parser)
    args = parser.parse_args(arguments)
    if args.onnx.suffix.lower() != ".onnx":
        parser.error(f"argument --onnx: must end with .onnx, got {args.onnx}")
    return args


_PARSERS: dict[str, Callable[[Sequence[str] | None, str | None], argparse.Namespace]] = {
    "train": _train,
    "embed": _embed,
    "index": _index,
    "search": _search,
    "serve": _serve,
    "duplicates": _duplicates,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
}
