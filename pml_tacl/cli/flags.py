"""Flags of scripts that train: one name, type and help for each setting, in all of them."""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

# What may be another when a run goes on: it changes nothing of what is learnt.
_FREE = frozenset({"run", "resume", "overwrite", "debug", "strict", "workers", "checkpoint_every"})
_WEIGHTS: dict[str, bool | str] = {"pretrained": True, "none": False}


def training_parser(description: str, defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A parser with a flag for each of a script's settings, --resume, --overwrite and --debug.

    ``batch_size`` becomes ``--batch-size``; ``swap``, which is true or false, ``--swap`` and
    ``--no-swap``. Settings that no flag is known for, as ``loss_weights``, are parsed arguments
    all the same, with the script's value.

    Args:
        description: of the script; its first line is shown.
        defaults: the script's settings: name -> value.

    Returns:
        To which arguments of the script's own can be added. What it refuses ends the script with
        one line.

    Example:
        >>> settings = {"batch_size": 32, "swap": True, "loss_weights": {"metric_loss": 1.0}}
        >>> parser = training_parser("Train.", settings)
        >>> settings_of(parser.parse_args(["--batch-size", "64", "--no-swap"]))
        {'batch_size': 64, 'swap': False, 'loss_weights': {'metric_loss': 1.0}}
    """
    parser = _Parser(
        description=description.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # --ov is no word that a run should be deleted for
    )
    for name, value in defaults.items():
        if name not in _FLAGS:
            parser.set_defaults(**{name: value})
            continue
        kind, text = _FLAGS[name]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        added = parser.add_argument(f"--{name.replace('_', '-')}", default=value, **how)
        added.help = text  # given above, some versions of Python add a switch's default to it
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    add_debug(parser)
    return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add --debug, by which `run_folder.one_line_errors` shows where an error was raised."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what makes a run what it is: the config that `TrainingRun.open` takes.

    Args:
        arguments: parsed.

    Returns:
        All but what may be another when the run goes on (run, resume, overwrite, debug,
        strict, workers, checkpoint_every); paths are absolute strings.
    """
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in _FREE
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # As runs.one_line_errors ends a script; two dozen flags of usage would bury the line.
        raise SystemExit(f"error: {message} (flags: --help)")


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            wanted = f"must be a whole number of at least {least}"
            raise argparse.ArgumentTypeError(f"{wanted}, got {text}")
        return int(text)

    return count


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 <= rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and at least 0, got {text}")
    return rate


def _number_or_auto(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}")
    return text if text == "auto" else int(text)


def _weights(text: str) -> bool | str:
    return _WEIGHTS[text] if text in _WEIGHTS else str(Path(text).resolve())


_FLAGS: dict[str, tuple[Any, str]] = {
    "run": (Path, "folder for the results"),
    "backbone": (str, "any timm model"),
    "weights": (_weights, "pretrained (through timm), none, or a local file"),
    "embedding_dim": (_at_least(1), "numbers in an embedding"),
    "image_size": (_at_least(1), "pixels of a side; left out: the backbone's own"),
    "freeze_batchnorm": (bool, "keep its statistics; left out: if pretrained"),
    "num_clusters": (
        _number_or_auto,
        "a number; auto: a tenth of the images, or what a batch needs if that is more",
    ),
    "images_per_cluster": (_at_least(1), "images of one cluster in a batch; left out: 4"),
    "batch_size": (_at_least(1), "images (of all processes), in two views each; left out: 64"),
    "epochs": (
        _at_least(0),
        "passes over the images; 0 only indexes; left out: by the number of images",
    ),
    "warmup_epochs": (
        _at_least(0),
        "epochs before the first clustering; left out: 0, from scratch half of them",
    ),
    "learning_rate": (_rate, "of the backbone, at its highest; left out: by the backbone"),
    "guard": (bool, "keep the better of before and after; left out: if pretrained"),
    "weight_decay": (_rate, "of AdamW"),
    "swap": (bool, "swap backgrounds between images, unless they are what is shown"),
    "seed": (_at_least(0), "of everything random"),
    "workers": (_at_least(0), "processes that read images"),
    "strict": (bool, "stop at broken files instead of leaving them out"),
    "checkpoint_every": (_at_least(1), "iterations; also at each epoch's end"),
}
