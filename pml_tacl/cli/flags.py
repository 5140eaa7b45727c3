"""Flags of commands and scripts: one name, type and help for each setting, in all of them."""

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO

# What may be another when a run goes on: it changes nothing of what is learnt.
_FREE = frozenset(
    {
        "run",
        "resume",
        "overwrite",
        "debug",
        "quiet",
        "device",
        "strict",
        "workers",
        "checkpoint_every",
        "tensorboard",
    }
)
# Shown by --help; the rest is in the group "more", which --help-all shows.
_FIRST = ("run", "backbone", "weights", "image_size", "epochs", "batch_size")
_WEIGHTS: dict[str, bool | str] = {"pretrained": True, "none": False}


def training_parser(description: str, defaults: Mapping[str, Any]) -> "Parser":
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
    parser = Parser(description.partition("\n")[0])
    parser.usage = "%(prog)s [flags]"
    parser.more = more = parser.add_argument_group("more")
    for name, value in defaults.items():
        if name not in _FLAGS:
            parser.set_defaults(**{name: value})
            continue
        kind, text = _FLAGS[name]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        place = parser if name in _FIRST else more
        added = place.add_argument(flag_of(name), default=value, **how)
        added.help = text  # given above, some versions of Python add a switch's default to it
        if kind is not bool:
            added.metavar = _METAVARS.get(kind, "N")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument("--help-all", action=_HelpAll, help="show all flags")
    add_debug(more)
    return parser


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2, and whose help says defaults.

    Args:
        description: one sentence.
        example: one command line, shown last.
        program: name of the command; None is that of the process.

    Attributes:
        more: the group of flags that only ``--help-all`` shows, of a :func:`training_parser`.
    """

    more: Any = None

    def __init__(
        self, description: str, example: str | None = None, program: str | None = None
    ) -> None:
        super().__init__(
            prog=program,
            description=description,
            epilog=None if example is None else f"example: {example}",
            formatter_class=_Help,
            allow_abbrev=False,  # --ov is no word that a run should be deleted for
        )

    def format_help(self, everything: bool = False) -> str:
        """Return the help; the flags of the group ``more`` are left out unless asked for."""
        groups = self._action_groups
        if not everything:
            self._action_groups = [group for group in groups if group is not self.more]
        try:
            return super().format_help()
        finally:
            self._action_groups = groups

    def error(self, message: str) -> NoReturn:
        """End with one line; two dozen flags of usage would bury it."""
        self.exit(2, f"error: {message} (flags: --help)\n")


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_help(everything=True), end="")
        parser.exit()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help  # which says what happens then
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example: "):  # to be copied as it is
            return indent + text
        return super()._fill_text(text, width, indent)


def flag_of(name: str) -> str:
    """Return the flag of a setting: ``batch_size`` -> ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def command_line(*words: Any) -> str:
    """Return a command line that can be pasted into a shell: ``pml-tacl search 'my run' QUERY``."""
    return " ".join(w if w.isupper() else shlex.quote(w) for w in map(str, ("pml-tacl", *words)))


def by_flags(message: str) -> str:
    """Return an error message that begins with the flag, where it begins with the argument.

    Example:
        >>> by_flags("batch_size must be at least 2, got 1")
        '--batch-size must be at least 2, got 1'
        >>> by_flags("eval_folder='x' holds one class")
        "--eval-folder 'x' holds one class"
    """
    found = re.match(r"(\w+)(=| must\b)", message)
    if found is None or found[1] not in _NAMES:
        return message
    rest = message[found.end() :]
    return f"{flag_of(found[1])} {rest}" if found[2] == "=" else f"{flag_of(found[1])} must{rest}"


def add_debug(parser: Any) -> None:
    """Add --debug, by which `run_folder.one_line_errors` shows where an error was raised."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")


def add_quiet(parser: Any) -> None:
    """Add --quiet: no progress bars and no notes, only results, warnings and errors."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no notes")


def add_choice(parser: Any) -> None:
    """Add --exclude and --files, by which images of a folder are left out."""
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave images or sub-folders out, as '*_small.jpg' or thumbs; may be repeated",
    )
    parser.add_argument(
        "--files",
        type=Path,
        metavar="LIST",
        help="a text file that lists the images of the folder to take, one in each line",
    )


def choice(args: argparse.Namespace) -> dict[str, Any]:
    """Return what --exclude and --files mean to :class:`pml_tacl.datasets.ImageFiles`."""
    return {"exclude": args.exclude, "files": args.files}


def bars(args: argparse.Namespace) -> bool:
    """Whether progress bars are shown: in a terminal, without --quiet."""
    return not args.quiet and sys.stderr.isatty()


def add_device(parser: Any) -> None:
    """Add --device: cpu, cuda, cuda:1, mps; None if it is left out."""
    parser.add_argument(
        "--device", type=device, metavar="NAME", help="cpu, cuda or mps; left out: a GPU if any"
    )


def add_model(parser: Any, default: str | None = None) -> None:
    """Add --model, which is required without a default, --weights and --image-size."""
    parser.add_argument(
        "--model",
        required=default is None,
        default=default,
        metavar="RUN_OR_NAME",
        help="folder of a run, or any timm model",
    )
    parser.add_argument(
        "--weights",
        type=weights,
        default="pretrained",
        metavar="WHICH",
        help="of a timm model: pretrained, none, or a local file",
    )
    parser.add_argument(
        "--image-size",
        type=at_least(1),
        metavar="N",
        help="pixels of a side; left out: the run's, or the model's own",
    )


def add_common(parser: Any, json: bool = False) -> None:
    """Add the flags that commands share: --device, --workers, --json if asked, --quiet, --debug."""
    add_device(parser)
    parser.add_argument(
        "--workers", type=at_least(0), default=2, metavar="N", help="processes that read images"
    )
    if json:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_quiet(parser)
    add_debug(parser)


@contextmanager
def output(quiet: bool, json: bool = False) -> Iterator[TextIO]:
    """Yield where results are printed to; notes, printed as usual, do not disturb them.

    Args:
        quiet: notes are not shown.
        json: notes go to standard error.

    Yields:
        Standard output, which prints names of files that are no text with backslashes.
    """
    results = sys.stdout
    if hasattr(results, "reconfigure"):
        results.reconfigure(errors="backslashreplace")
    if quiet:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
            yield results
    else:
        with redirect_stdout(sys.stderr if json else results):
            yield results


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


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of argument: whole numbers from a least one."""

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


def device(text: str) -> Any:
    """Return the torch device of that name; refuse one that this machine has not."""
    import torch

    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not there: give cpu, cuda, cuda:1 or mps"
        ) from None
    return found


def weights(text: str) -> bool | str:
    """Return what `AttentionEmbedder` takes as `pretrained`."""
    return _WEIGHTS[text] if text in _WEIGHTS else str(Path(text).resolve())


_FLAGS: dict[str, tuple[Any, str]] = {
    "run": (Path, "folder for the results"),
    "backbone": (str, "any timm model"),
    "weights": (weights, "pretrained, none, or a local file"),
    "embedding_dim": (at_least(1), "numbers in an embedding"),
    "image_size": (at_least(1), "pixels of a side; left out: the backbone's own"),
    "freeze_batchnorm": (bool, "keep its statistics; left out: if pretrained"),
    "num_clusters": (
        _number_or_auto,
        "a number; auto: a tenth of the images, or what a batch needs if that is more",
    ),
    "images_per_cluster": (at_least(1), "images of one cluster in a batch; left out: 4"),
    "batch_size": (at_least(1), "images in a batch, of all processes; left out: 64"),
    "epochs": (
        at_least(0),
        "passes; 0 only indexes; left out: by the number of images",
    ),
    "warmup_epochs": (
        at_least(0),
        "epochs before the first clustering; left out: 0, from scratch half of them",
    ),
    "learning_rate": (_rate, "of the backbone, at its highest; left out: by the backbone"),
    "guard": (bool, "keep the better of before and after; left out: if pretrained"),
    "weight_decay": (_rate, "of AdamW"),
    "swap": (bool, "swap backgrounds between images, unless they are what is shown"),
    "device": (device, "cpu, cuda or mps; left out: a GPU if there is one"),
    "seed": (at_least(0), "of everything random"),
    "workers": (at_least(0), "processes that read images"),
    "strict": (bool, "stop at broken files instead of leaving them out"),
    "checkpoint_every": (at_least(1), "iterations; also at each epoch's end"),
    "tensorboard": (bool, "write the losses for TensorBoard, too, into RUN/tensorboard"),
}
_METAVARS: dict[Any, str] = {
    Path: "DIR",
    str: "NAME",
    weights: "WHICH",
    _rate: "X",
    _number_or_auto: "N",
    device: "NAME",
}
_NAMES = frozenset(_FLAGS) | {
    "eval_folder",
    "threshold",
    "reference",
    "model",
    "out",
    "onnx",
    "port",
    "exclude",
    "files",
}
