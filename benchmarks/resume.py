"""Kill trainings (kill -9) at random or especially critical moments, then resume them.

Every killed run is resumed by the same command. It must end with the same weights, records and
metrics as the uninterrupted run, bit for bit, on a CPU with one thread.

    python benchmarks/resume.py                  # 20 kills, writes a section of docs/reliability.md
    python benchmarks/resume.py --kills 3 --output -
"""

import argparse
import datetime
import multiprocessing
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import cpu_model, publish_section
from resume_parts.comparing import differences, last_seen, result
from resume_parts.training import EPOCHS, ITERATIONS, SIZE, WEIGHTS, train, write_weights

from pml_tacl import __version__
from pml_tacl.datasets import Glyphs

BEGIN, END = "<!-- begin benchmarks/resume.py -->", "<!-- end benchmarks/resume.py -->"
# Where a process kills itself: in the middle of this call, and in which call of this kind.
FORCED = [
    ("between records and checkpoint", 2),
    ("writing a checkpoint", 3),
    ("writing records, csv done and sqlite not", 9),
    ("clustering", 1),
    ("writing a checkpoint", 1),
    ("writing a checkpoint", 6),
    ("writing records, csv done and sqlite not", 1),
    ("clustering", 3),
]


def run(
    folder: Path,
    halves: Any,
    workers: int = 0,
    forced: tuple[str, int] | None = None,
    after: float | None = None,
) -> tuple[int, float]:
    """Train in a new process, killed after ``after`` seconds; return exit code and seconds."""
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(folder, halves, workers, forced)
    )
    start = time.perf_counter()
    process.start()
    process.join(after)
    process.kill()
    process.join()
    return process.exitcode or 0, time.perf_counter() - start


def series(
    kills: int, seed: int, note: Callable[[str], None]
) -> list[tuple[str, str, int, list[str]]]:
    """Kill and resume; return (moment, place, kills, differences) of each run."""
    halves = Glyphs("train", size=SIZE, num_classes=16), Glyphs("test", size=SIZE, num_classes=6)
    for half in halves:
        half.preload(progress=False)
    rng = random.Random(seed)
    rows = []
    with tempfile.TemporaryDirectory() as base:
        write_weights(Path(base) / WEIGHTS)
        unbroken = Path(base) / "unbroken"
        code, seconds = run(unbroken, halves)
        if code:
            raise RuntimeError(f"the unbroken run: {unbroken.with_suffix('.log').read_text()}")
        expected = result(unbroken)
        note(f"unbroken: {seconds:.1f} s, {len(expected)} things to compare")
        for number in range(kills):
            folder = Path(base) / f"killed {number}"
            forced = FORCED[number] if number < min(len(FORCED), (kills + 1) // 2) else None
            # Kill the last run several times.
            times = 5 if number == kills - 1 else 1
            killed, places, share = 0, [], 0.95 if times == 1 else 0.4
            while killed < times:
                after = None if forced else rng.uniform(0.05, share) * seconds
                code, _ = run(folder, halves, number % 2, forced, after)
                if code == 0 and killed == 0:  # it ended before the kill: try again, earlier
                    shutil.rmtree(folder)
                    share *= 0.7
                    continue
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    log = folder.with_suffix(".log").read_text()
                    raise RuntimeError(f"run {number} ended with {code}, not killed: {log}")
                killed += 1
                places.append(last_seen(folder))
            code, _ = run(folder, halves)
            different = differences(folder, expected) if code == 0 else [f"ended with {code}"]
            if code:
                note(folder.with_suffix(".log").read_text())
            place = "; ".join(places)
            rows.append(("chosen" if forced else "random", place, killed, different))
            note(f"{number + 1} of {kills}: {place}: {', '.join(different) or 'equal'}")
    return rows


def report(rows: list[tuple[str, str, int, list[str]]], seconds: float) -> str:
    equal = sum(not different for *_, different in rows)
    lines = [
        f"Written by `benchmarks/resume.py` on {datetime.date.today()}: {cpu_model()}, one thread, "
        f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, "
        f"pml_tacl {__version__}; {seconds:.0f} s.",
        "",
        f"Each run trains for {EPOCHS} epochs of {ITERATIONS} iterations on Glyphs, with initial "
        "weights from a file and with background swap. It is tested after each epoch, and saves a "
        "checkpoint every four iterations and after each epoch. It is killed with `kill -9`. If "
        "the moment is chosen, this is in the middle of the call named in the table. If it is "
        "random, the table names the last step that the run logged. Then the run is resumed with "
        "the same command and compared, bit for bit, with a run that was not killed: weights, "
        "averaged weights, the whole last checkpoint, metrics, every csv file and every row of "
        "the database. Every other run has a loader process when it is killed, and none when it "
        "is resumed.",
        "",
        f"**{equal} of {len(rows)} are equal.**",
        "",
        "| run | moment | killed in | kills | differs in |",
        "| ---: | --- | --- | ---: | --- |",
    ]
    for number, (moment, place, kills, different) in enumerate(rows, 1):
        found = ", ".join(different) or "nothing"
        lines.append(f"| {number} | {moment} | {place} | {kills} | {found} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--output", default="docs/reliability.md", help="page; - prints it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = series(arguments.kills, arguments.seed, lambda line: print(line, file=sys.stderr))
    text = report(rows, time.perf_counter() - start)
    publish_section(text, arguments.output, BEGIN, END)
    if any(different for *_, different in rows):
        sys.exit("error: a resumed run differs from the unbroken one")


if __name__ == "__main__":
    main()
