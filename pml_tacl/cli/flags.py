"""Flags of commands and scripts, with the same name, type and help everywhere."""

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

# Settings that may change on resume, because they do not affect the trained weights.
_FREE = frozenset(
    {
        "run",
        "resume",
        "overwrite",
        "debug",
        "json",
        "quiet",
        "device",
        "strict",
        "workers",
        "checkpoint_every",
        "tensorboard",
    }
)
# Settings that --help shows; --help-all also shows the group "more" with the others.
_FIRST = ("run", "backbone", "weights", "image_size", "epochs", "batch_size")
_WEIGHTS: dict[str, bool | str] = {"pretrained": True, "none": False}


def training_parser(description: str, defaults: Mapping[str, Any]) -> "Parser":
    """Return a parser with flags for a script's settings, --resume, --overwrite and --debug.

    The flag of ``batch_size`` is ``--batch-size``; a boolean such as ``swap`` has ``--swap`` and
    ``--no-swap``. Settings without a flag, such as ``loss_weights``, keep the script's value in
    the parsed arguments.

    Args:
        description: description of the script; its first line is shown.
        defaults: the script's settings: name -> value.

    Returns:
        A parser to which the script can add arguments. Invalid arguments end the script with a
        message of one line.

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
        # Set here: some Python versions append the default if the help is given above.
        added.help = text if value is None else text.partition("; default: ")[0]
        if kind is not bool:
            added.metavar = _METAVARS.get(kind, "N")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument("--help-all", action=_HelpAll, help="show all flags")
    add_debug(more)
    return parser


class Parser(argparse.ArgumentParser):
    """Argument parser with errors of one line, exit code 2, and defaults in its help.

    Args:
        description: one sentence.
        example: one command line, shown at the end.
        program: name of the command; None for the name of the process.

    Attributes:
        more: group of flags that only ``--help-all`` shows, in a :func:`training_parser`.
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
            allow_abbrev=False,  # --ov must not delete a run
        )

    def format_help(self, everything: bool = False) -> str:
        """Return the help, with the flags of the group ``more`` only if ``everything``."""
        groups = self._action_groups
        if not everything:
            self._action_groups = [group for group in groups if group is not self.more]
        try:
            return super().format_help()
        finally:
            self._action_groups = groups

    def error(self, message: str) -> NoReturn:
        """Exit with a message of one line, without the long usage text."""
        self.exit(2, f"error: {message} (flags: --help)\n")


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_help(everything=True), end="")
        parser.exit()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if action.nargs == argparse.PARSER:  # argparse forgets that sub-commands are indented
            self._action_max_length += self._indent_increment

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help  # the help text describes the default
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example: "):  # not wrapped, so that it can be copied
            return indent + text
        return super()._fill_text(text, width, indent)


def flag_of(name: str) -> str:
    """Return the flag of a setting: ``batch_size`` -> ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def command_line(*words: Any) -> str:
    """Return a command line that can be pasted into a shell: ``pml-tacl search 'my run' QUERY``."""
    return shlex.join(map(str, ("pml-tacl", *words)))


def by_flags(message: str) -> str:
    """Replace names of arguments in an error message by their flags, except inside quotes.

    Example:
        >>> by_flags("batch_size must be at least 2, got 1")
        '--batch-size must be at least 2, got 1'
        >>> by_flags("eval_folder='x' contains one class")
        "--eval-folder 'x' contains one class"
        >>> by_flags("give --resume (resume=True) to go on with it")
        'give --resume to go on with it'
    """
    message = re.sub(r"(--[\w-]+) \(\w+=\w+\)", r"\1", message)
    first = re.match(r"(\w+)(?= must\b)", message)
    if first is not None and first[1] in _NAMES:
        message = flag_of(first[1]) + message[first.end() :]
    # What is in quotes is a path or another value.
    return re.sub(r"(?<!\w)'[^']*'|(?<![\w./-])(\w+)=(True\b|False\b)?", _by_flag, message)


def _by_flag(found: re.Match[str]) -> str:
    """Return ``--name `` for ``name=``, ``--name`` or ``--no-name`` for True or False."""
    name, value = found[1], found[2]
    if name == "pretrained":
        return "--weights " + {"True": "pretrained", "False": "none"}.get(value, "")
    rest = found.string[found.end() :]
    if name not in _NAMES or "/" in rest.partition(" ")[0].partition("'")[0]:
        return found[0]
    if name in _PATHS and value is None and not rest.startswith(("'", '"', "[", "...")):
        return found[0]  # part of the name of a file or folder
    if value is None:
        return f"{flag_of(name)} "
    return flag_of(name if value == "True" else f"no_{name}")


def add_debug(parser: Any) -> None:
    """Add --debug, which makes `run_folder.one_line_errors` show tracebacks."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")


def add_quiet(parser: Any) -> None:
    """Add --quiet, which hides progress bars and notes; results, warnings and errors stay."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no notes")


def add_choice(parser: Any) -> None:
    """Add --exclude and --files, which select images of a folder."""
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out images or sub-folders, such as '*_small.jpg' or thumbs; may be repeated",
    )
    parser.add_argument(
        "--files",
        type=Path,
        metavar="LIST",
        help="text file with the images of the folder to use, one per line",
    )


def choice(args: argparse.Namespace) -> dict[str, Any]:
    """Return --exclude and --files as arguments of :class:`pml_tacl.datasets.ImageFiles`."""
    return {"exclude": args.exclude, "files": args.files}


def bars(args: argparse.Namespace) -> bool:
    """Return whether to show progress bars: in a terminal and without --quiet."""
    return not args.quiet and sys.stderr.isatty()


def add_device(parser: Any) -> None:
    """Add --device, such as cpu, cuda, cuda:1 or mps; the default is None."""
    parser.add_argument(
        "--device",
        type=device,
        metavar="NAME",
        help="cpu, cuda or mps; default: cuda if there is a GPU, else cpu",
    )


DUPLICATES_MODEL = "resnet50"  # that embeds a folder of images which is not indexed


def add_model(parser: Any, default: str | None = None) -> None:
    """Add --model, --weights and --image-size; --model is required without a default."""
    parser.add_argument(
        "--model",
        required=default is None,
        default=default,
        metavar="RUN_OR_NAME",
        help="folder of a run, or name of a timm model",
    )
    parser.add_argument(
        "--weights",
        type=weights,
        default="pretrained",
        metavar="WHICH",
        help="weights of a timm model: pretrained, none, or a local file",
    )
    parser.add_argument(
        "--image-size",
        type=at_least(1),
        metavar="N",
        help="side in pixels; default: the run's, or the model's own",
    )


def add_json(parser: Any) -> None:
    """Add --json, which prints the result as JSON and everything else on standard error."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_common(parser: Any, json: bool = False) -> None:
    """Add --device, --workers, --quiet, --debug, and --json if ``json``."""
    add_device(parser)
    parser.add_argument(
        "--workers", type=at_least(0), default=2, metavar="N", help="processes that read images"
    )
    if json:
        add_json(parser)
    add_quiet(parser)
    add_debug(parser)


@contextmanager
def output(quiet: bool, json: bool = False) -> Iterator[TextIO]:
    """Separate results from notes: yield a stream for results, and redirect print() for notes.

    Args:
        quiet: hide notes.
        json: print notes to standard error.

    Yields:
        Standard output, which prints invalid text in file names as backslash escapes.
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
    """Return the settings that define a run: the config for `TrainingRun.open`.

    Args:
        arguments: parsed arguments.

    Returns:
        All settings, with paths as absolute strings, except those that may change on resume (run,
        resume, overwrite, debug, json, quiet, device, strict, workers, checkpoint_every,
        tensorboard).
    """
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in _FREE
    }


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argument type for whole numbers of at least `least` and at most `most`."""

    def count(text: str) -> int:
        number = int(text) if text.isdecimal() else -1
        if number < least or (most is not None and number > most):
            wanted = f"must be a whole number of at least {least}"
            wanted += "" if most is None else f" and at most {most}"
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
    """Return the torch device with a name; raise ArgumentTypeError if it is not available."""
    import torch

    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not available: give cpu, cuda, cuda:1 or mps"
        ) from None
    return found


def weights(text: str) -> bool | str:
    """Return the value of `pretrained` of `AttentionEmbedder`."""
    return _WEIGHTS[text] if text in _WEIGHTS else str(Path(text).resolve())


SEEDS = 2**32 - 1  # the largest seed that NumPy accepts
_FLAGS: dict[str, tuple[Any, str]] = {
    "run": (Path, "folder for the results"),
    "backbone": (str, "name of a timm model"),
    "weights": (weights, "pretrained, none, or a local file"),
    "embedding_dim": (at_least(1), "dimensions of an embedding"),
    "image_size": (at_least(1), "side in pixels; default: the backbone's own"),
    "freeze_batchnorm": (
        bool,
        "keep BatchNorm's statistics and weights fixed; default: on if pretrained",
    ),
    "num_clusters": (
        _number_or_auto,
        "a number; auto: a tenth of the images, at least what a batch needs, at most 10 000",
    ),
    "images_per_cluster": (at_least(1), "images of one cluster in a batch; default: 4"),
    "batch_size": (at_least(1), "images in a batch, over all processes; default: 64"),
    "epochs": (
        at_least(0),
        "passes over the images; 0 indexes without training; default: by their number",
    ),
    "warmup_epochs": (
        at_least(0),
        "epochs before the first clustering; default: 0, or half of the epochs from scratch",
    ),
    "learning_rate": (
        _rate,
        "highest learning rate of the backbone; default: depends on the backbone",
    ),
    "guard": (
        bool,
        "keep the better network, from before or after training; default: on if pretrained",
    ),
    "weight_decay": (_rate, "weight decay of AdamW"),
    "swap": (bool, "swap backgrounds between images; switch off if backgrounds matter"),
    "device": (device, "cpu, cuda or mps; default: cuda if there is a GPU, else cpu"),
    "seed": (at_least(0, SEEDS), "seed of all random numbers"),
    "workers": (at_least(0), "processes that read images"),
    "strict": (bool, "stop at broken files instead of leaving them out"),
    "checkpoint_every": (at_least(1), "iterations between checkpoints within an epoch"),
    "tensorboard": (bool, "also write the losses to RUN/tensorboard for TensorBoard"),
}
_METAVARS: dict[Any, str] = {
    Path: "DIR",
    str: "NAME",
    weights: "WHICH",
    _rate: "X",
    _number_or_auto: "N",
    device: "NAME",
}
_PATHS = {"run", "weights", "eval_folder", "reference", "model", "out", "onnx", "files", "exclude"}
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
