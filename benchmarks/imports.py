"""Measure the time to import the package and each of its names, beside PML and timm.

python benchmarks/imports.py                 # writes docs/benchmarks/imports.md
"""

import argparse
import datetime
import platform
import subprocess
import sys

from _common import cpu_model, publish

import pml_tacl

BESIDE = "import pytorch_metric_learning.losses, pytorch_metric_learning.miners, timm"
SCRIPT = "import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"


def seconds(code: str, rounds: int) -> float:
    """Return the best time of several new interpreters; the first one loads files into memory."""
    command = [sys.executable, "-c", SCRIPT.format(code)]
    return min(float(subprocess.check_output(command)) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="docs/benchmarks/imports.md", help="page; - prints it")
    arguments = parser.parse_args()
    names = {name: f"from pml_tacl import {name}" for name in pml_tacl.__all__}
    codes = {"PML and timm": BESIDE, "pml_tacl": "import pml_tacl"}
    codes |= {**names, "every public name": "from pml_tacl import *"}
    found = {name: seconds(code, arguments.rounds) for name, code in codes.items()}
    floor = found["PML and timm"]
    lines = [
        "# Cost of imports",
        "",
        f"Written by `benchmarks/imports.py` on {datetime.date.today()}: {cpu_model()}, Python "
        f"{platform.python_version()}, pml_tacl {pml_tacl.__version__}. Seconds in a new "
        f"interpreter, best of {arguments.rounds}.",
        "",
        "| import | seconds | relative to PML and timm |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {time:.3f} | {time / floor:.3f} x |" for name, time in found.items()]
    lines += [
        "",
        "`tests/test_packaging.py` tests which of faiss, matplotlib, record-keeper, timm and PML "
        "each name imports. The first three are only imported when they are needed.",
    ]
    publish("\n".join(lines) + "\n", arguments.output)


if __name__ == "__main__":
    main()
