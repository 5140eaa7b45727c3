"""The console command `pml-tacl`, which runs a sub-command.

Each command has a module with a function `run(args, results)`. It takes the parsed arguments and
the stream for results, and returns the result that --json prints. Everything else that `run` prints
is a note.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from pml_tacl import __version__
from pml_tacl.cli import flags
from pml_tacl.cli.flags import Parser, by_flags
from pml_tacl.cli.parsers import parse

COMMANDS = {
    "train": "train an embedding on a folder of images, and index them",
    "embed": "write the embeddings of a folder of images",
    "index": "index a folder of images without training",
    "search": "find the images most similar to an image; update an index",
    "serve": "serve a local web page that searches a run",
    "duplicates": "find groups of near-duplicate images",
    "evaluate": "measure retrieval on labelled images",
    "report": "write an HTML report of a run",
    "export": "export the model of a run to ONNX",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `pml-tacl`.

    The exit code is 0 on success, 1 for an error (one line on standard error), 2 for wrong usage,
    or 130 after Ctrl-C.

    Args:
        arguments: arguments of the command line, the sub-command first; None for sys.argv.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in COMMANDS:
        _parser().parse_args(words)
    name, *rest = words
    try:
        args = parse(name, rest, f"pml-tacl {name}")
        # Torch takes seconds to load, so import it only now, and only for this command.
        command = import_module(f"pml_tacl.cli.{name}")
        from pml_tacl.cli.run_folder import one_line_errors
        from pml_tacl.distributed.session import session
        from pml_tacl.utils.plain import as_json

        with (
            session(),
            one_line_errors(),
            _warnings_by_flags(),
            flags.output(args.quiet, args.json) as results,
        ):
            made = command.run(args, results)
            if args.json and made is not None:
                print(json.dumps(as_json(made), indent=1), file=results)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


class _ByFlags(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {by_flags(super().format(record))}"


@contextmanager
def _warnings_by_flags() -> Iterator[None]:
    """Print warnings of the package to standard error, with flags for names of arguments."""
    handler, logger = logging.StreamHandler(), logging.getLogger("pml_tacl")
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_ByFlags())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Image embeddings without labels: train, search, find duplicates.",
        "pml-tacl train photos --run runs/photos",
        "pml-tacl",
    )
    parser.usage = "pml-tacl COMMAND ... [flags]"
    parser.add_argument("--version", action="version", version=f"pml_tacl {__version__}")
    commands = parser.add_subparsers(
        title="commands (pml-tacl COMMAND --help)",
        metavar="COMMAND",
        required=True,
        parser_class=argparse.ArgumentParser,
    )
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser
