"""The benchmark on photographs in class folders: `retrieval.py folders ROOT`."""

import argparse
import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pml_tacl.cli import run_folder as runs
from pml_tacl.utils.device import device_or_default
from pml_tacl.utils.errors import InputError
from retrieval_parts import folders
from retrieval_parts.config import PHOTO_METHODS, Config, make, of_one_training
from retrieval_parts.data import DRAWN
from retrieval_parts.plan import run_all

# Methods that the package is compared with; the other methods are parts of `full`.
USUAL = (
    "zero_shot",
    "zero_shot+whitened",
    "zero_shot+projection",
    "ms",
    "ms+projection",
    "stml",
    "stml+projection",
    "ntxent",
    "ntxent+projection",
    "full",
    "supervised",
    "supervised+projection",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("root", type=Path, metavar="ROOT", help="holds NAME/CLASS/FILE")
    parser.add_argument(
        "--sets", nargs="+", metavar="NAME", help="run only these; also glyphs, ..."
    )
    parser.add_argument(
        "--methods", nargs="+", choices=PHOTO_METHODS, default=USUAL, metavar="METHOD",
        help=f"of {', '.join(PHOTO_METHODS)}",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=folders.SPLITS[1:], default="test", help="measured part")
    parser.add_argument(
        "--device", type=torch.device, help="of the networks; left out: CUDA if there is one"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--json", type=Path, help="also write all results to this file")


def main(args: argparse.Namespace) -> None:
    """Run each method, set and seed, and print a line for it; report sets that are left out."""
    there = [*folders.sets_in(args.root), *DRAWN]
    names = args.sets or folders.sets_in(args.root)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise InputError(f"--sets {unknown[0]} is not in {args.root}: there are {', '.join(there)}")
    configs, prints = [], {}
    for name in names:
        try:
            prints[name] = _fingerprint(args.root / name, args.split) if name not in DRAWN else name
        except ValueError as error:
            print(f"{name} left out: {error}", flush=True)
            continue
        configs += [
            make(
                method, recipe="photographs", dataset=name, size=args.size, seed=seed,
                split=args.split,
            ).resolved
            for seed in args.seeds
            for method in args.methods
        ]  # fmt: skip
    if not configs:
        raise InputError(f"ROOT={args.root} contains no set that can be measured")
    found: dict[str, dict[str, Any]] = {}
    if args.json is not None and args.json.is_file():
        found = {one["key"]: one for one in json.loads(args.json.read_text("utf-8"))}
    wanted = {config.key: config for config in configs}
    done = [
        key for key, c in wanted.items() if key in found and found[key]["data"] == prints[c.dataset]
    ]
    for key in done:
        print(line(found[key]), flush=True)
    left = _trained_once([config for key, config in wanted.items() if key not in done])
    device = device_or_default(args.device)
    with TemporaryDirectory() as folder:
        for result in run_all(left, Path(folder), args.cache, args.root, args.jobs, device):
            for other in of_one_training(Config(**result["config"])):
                if other.key in wanted:
                    path = Path(folder, f"{other.key}.json")
                    one = json.loads(path.read_text("utf-8"))
                    one["data"] = prints[other.dataset]
                    found[other.key] = one
                    print(line(one), flush=True)
            if args.json is not None:
                runs.write_json(args.json, list(found.values()))


def _fingerprint(root: Path, split: str) -> str:
    """Return a digest of the files that are read; ValueError if they cannot be measured."""
    digest = hashlib.sha256()
    for part in ("train-for-test" if split == "test" else "train", split):
        for path in folders.listed(root, part).paths:
            digest.update(f"{Path(path).relative_to(root)} {Path(path).stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _trained_once(configs: list[Config]) -> list[Config]:
    """Keep one of the configurations that share a training; it also writes their results."""
    left: list[Config] = []
    done: set[str] = set()
    for config in configs:
        if config.key not in done:
            left.append(config)
        done |= {other.key for other in of_one_training(config)}
    return left


def line(result: dict[str, Any]) -> str:
    """Return a result in one line."""
    config, metrics = result["config"], result["metrics"]
    shown = {f"R@{k}": metrics[f"recall_at_{k}"] for k in (1, 2, 4, 8)}
    shown["MAP@R"] = metrics["mean_average_precision_at_r"]
    numbers = " ".join(f"{name} {100 * value:.1f}" for name, value in shown.items())
    kept = ""
    if "kept" in result:
        kept = f" (guard kept step {result['kept']['step']})"
    return f"{config['dataset']} {config['method']} seed {config['seed']} {numbers}{kept}"
