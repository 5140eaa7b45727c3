"""What each part of the method is worth on photographs: `retrieval.py folders-parts ROOT`.

Choices are made with this, so it never reads the test third. It trains on the training third and
measures on the validation third, and the other way round (`reverse`).
"""

import argparse
import copy
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from pml_tacl.cli import run_folder as runs
from pml_tacl.evaluation.label_free import mutual_neighbours
from pml_tacl.trainers.guard import mean_state
from pml_tacl.utils.device import device_or_default
from retrieval_parts import folders
from retrieval_parts.config import PHOTO_METHODS, make, parse
from retrieval_parts.data import Images
from retrieval_parts.page import rows
from retrieval_parts.running import load, normalised
from retrieval_parts.scoring import embed_images, measure
from retrieval_parts.training import train

Result = dict[str, Any]
BASE = "ms+swap"  # other ways of training are compared with it
PARTS = (BASE, "ms+ccl+tac+swap", "ms+tac+swap", "ms+ccl+swap", "ms+ccl+tac", "ms", "stml")
SHARES = (0.0, 0.5, 0.75, 1.0)  # weight of the trained network in the mean that is measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("root", type=Path, metavar="ROOT", help="holds NAME/CLASS/FILE")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="run only these")
    parser.add_argument(
        "--methods", nargs="+", choices=PHOTO_METHODS, default=PARTS, metavar="METHOD",
        help=f"of {', '.join(PARTS)}, ...",
    )  # fmt: skip
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="name=value", help="fields of Config"
    )
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--device", type=torch.device, help="of the networks; left out: CUDA if there is one"
    )
    parser.add_argument("--json", type=Path, required=True, help="results are added to this file")


def main(args: argparse.Namespace) -> None:
    """Run each set in both directions, and print a line for each run."""
    device = device_or_default(args.device)
    names = folders.chosen(args.root, args.sets)
    found: list[Result] = json.loads(args.json.read_text("utf-8")) if args.json.is_file() else []
    for seed in args.seeds:
        for name in names:
            for reverse in (False, True):
                for method in args.methods:
                    one = {
                        "set": name, "reverse": reverse, "method": method,
                        "settings": sorted(args.settings), "seed": seed, "size": args.size,
                    }  # fmt: skip
                    if any(one.items() <= other.items() for other in found):
                        continue
                    result = one | run(args, name, reverse, method, seed, device)
                    found.append(result)
                    runs.write_json(args.json, found)
                    print(line(result), flush=True)


def run(
    args: argparse.Namespace, name: str, reverse: bool, method: str, seed: int, device: torch.device
) -> Result:
    """Train once, and measure the means of the untrained and the trained weights."""
    config = make(
        method, recipe="photographs", dataset=name, size=args.size, seed=seed,
        **parse(args.settings),
    ).resolved  # fmt: skip
    parts = [load(name, s, args.size, args.cache, -1, args.root) for s in ("train", "validation")]
    images, measured = parts[::-1] if reverse else parts
    training = train(config, images, args.cache, device=device)
    model, last = training.model, copy.deepcopy(training.model.state_dict())
    shares = {}
    for share in SHARES:
        model.load_state_dict(mean_state(training.untrained, last, share))
        shares[str(share)] = _measure(training, images, measured)
    return {"shares": shares, "history": training.history, "device": device.type}


def _measure(training: Any, images: Images, measured: Images) -> dict[str, float]:
    model, normalise = training.model, training.views.normalise
    model.reset_projection()
    found = {
        "raw": 100 * measure(model, measured, normalise)["recall_at_1"],
        "mutual": mutual_neighbours(embed_images(model, images.images, normalise)),
    }
    model.fit_projection(normalised(training, images), progress=False)
    found["projected"] = 100 * measure(model, measured, normalise)["recall_at_1"]
    model.reset_projection()
    return found


def line(one: Result) -> str:
    """Return a result in one line."""
    where = one["set"] + (" reverse" if one["reverse"] else "")
    values = " ".join(
        f"{share}: {at['raw']:.1f} / {at['projected']:.1f}" for share, at in one["shares"].items()
    )
    return (
        f"{where} {' '.join([one['method'], *one['settings']])} seed {one['seed']} "
        f"raw / projected R@1 at shares of the trained weights {values}"
    )


def table(found: list[Result], share: str = "0.5", measured: str = "projected") -> str:
    """Return the mean differences of each way of training to `BASE`, over the seeds of both.

    Args:
        found: the results.
        share: weight of the trained network.
        measured: "raw" or "projected".
    """

    def values(method: str, settings: tuple[str, ...], where: tuple[str, bool]) -> dict[Any, float]:
        return {
            # Only runs on the same pixels are compared.
            (one["seed"], one.get("webp_quality")): one["shares"][share][measured]
            for one in found
            if (one["method"], tuple(one["settings"])) == (method, settings)
            and (one["set"], one["reverse"]) == where
        }

    places = sorted({(one["set"], one["reverse"]) for one in found})
    lines = []
    for method, settings in sorted({(one["method"], tuple(one["settings"])) for one in found}):
        cells, means = [], []
        for where in places:
            own, base = values(method, settings, where), values(BASE, (), where)
            if (method, settings) == (BASE, ()):
                cells.append(f"{mean(own.values()):.1f} ({len(own)})" if own else "")
                continue
            gains = [own[key] - base[key] for key in own.keys() & base.keys()]
            means += [mean(gains)] if gains else []
            cells.append(f"{mean(gains):+.1f} ({len(gains)})" if gains else "")
        if any(cells):
            name = f"`{' '.join([method, *settings])}`"
            lines.append([name, *cells, f"{mean(means):+.1f}" if means else ""])
    lines.sort(key=lambda cells: cells[-1] != "")  # BASE first
    heads = [name + (", reverse" if reverse else "") for name, reverse in places]
    return rows(["trained by", *heads, "mean"], lines)
