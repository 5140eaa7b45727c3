"""Shared code of the benchmarks: alternating timings, peak memory, and output of pages."""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def take_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, cuda: bool = False
) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round, after a round of warm-up.

    On a CPU they are CPU seconds of this process, which other processes disturb least. On a GPU
    they are wall-clock seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    clock = time.perf_counter if cuda else time.process_time
    for turn in range(rounds + 1):
        # Alternate the order, so that no contender always follows the other.
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            contenders[name]()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                times[name].append(clock() - start)
        print(f"turn {turn} of {rounds}", file=sys.stderr)
    return times


def ratio_line(title: str, ours: list[float], base: list[float]) -> str:
    """Return a table row: medians in seconds, and the ratio of neighbouring turns."""
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    return (
        f"| {title} | {statistics.median(base):.2g} s | {statistics.median(ours):.2g} s "
        f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak memory of the CPU allocator during a call, above that before the call."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def publish(text: str, output: str | Path) -> None:
    """Write a page and create its folder; "-" prints the page instead."""
    if str(output) == "-":
        print(text, end="")
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(text, encoding="utf-8")


def section_of(output: str | Path, begin: str, end: str) -> str:
    """Return the part of a page between two markers, with them; the markers alone if none is."""
    page = Path(output)
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return f"{begin}{text.partition(begin)[2].partition(end)[0] or chr(10) * 2}{end}"


def publish_section(text: str, output: str | Path, begin: str, end: str) -> None:
    """Write the part of a page between two markers, and keep the rest; "-" prints it instead."""
    page = Path(output)
    if page.is_file():
        before, _, rest = page.read_text(encoding="utf-8").partition(begin)
        text = f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}"
    publish(text, output)
