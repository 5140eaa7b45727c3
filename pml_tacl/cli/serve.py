"""Serve a local web page that searches a run: drop an image, or click on one."""

import json
import os
import sys
import threading
import webbrowser
from typing import Any, TextIO

from pml_tacl.cli.models import given_index, load_model
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.words import counted


def run(args: Any, results: TextIO) -> None:
    """Serve until Ctrl-C; see `pml_tacl.cli.main`."""
    from pml_tacl.serve import RunSearcher, SearchServer

    for folder in args.also:
        if not folder.is_dir():
            raise InputError(
                f"--also {folder} is not a folder: give one that links among the images point to"
            )
    index = given_index(args)
    loaded = load_model(args.run, device=args.device)
    searcher = RunSearcher(
        loaded.model, loaded.image_size, index, args.also, args.run.resolve().name
    )
    with SearchServer(searcher, args.port) as server:
        if args.json:
            print(json.dumps({"url": server.url, "images": len(index)}), file=results, flush=True)
        else:
            print(server.url, file=results, flush=True)
            print(
                f"serving {counted(len(index), 'image')}, to this machine only; Ctrl-C stops",
                flush=True,
            )
        if args.open and _has_a_screen():
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def _has_a_screen() -> bool:
    """Return whether a browser can open a window, so that none starts inside the terminal."""
    if sys.platform != "linux":
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
