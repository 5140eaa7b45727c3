"""What every benchmark's page says of the machine, and where the page goes."""

import platform
from pathlib import Path


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def publish(text: str, output: str | Path) -> None:
    """Write a page, making its folder; "-" prints it instead."""
    if str(output) == "-":
        print(text, end="")
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(text, encoding="utf-8")
