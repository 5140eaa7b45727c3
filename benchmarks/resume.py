"""kill -9 at moments of a training that are random, or the worst there are; then resume.

Every run that was killed is resumed by the same command and must end with the weights, records
and metrics of the run that nobody killed, bit for bit: on the CPU, with one thread.

    python benchmarks/resume.py                  # 20 kills, writes a section of docs/reliability.md
    python benchmarks/resume.py --kills 3 --output -
"""

import argparse
import datetime
import io
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from _common import cpu_model, publish
from pytorch_metric_learning.losses import MultiSimilarityLoss

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    RetrievalCalculator,
    SiameseTransform,
    UnsupervisedTrainer,
    __version__,
    runs,
)
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import make_tester
from pml_tacl.trainers import checkpoint
from pml_tacl.trainers.checkpoint import checkpoints

EPOCHS, ITERATIONS, BATCH, SIZE = 4, 5, 16, 32
BEGIN, END = "<!-- begin benchmarks/resume.py -->", "<!-- end benchmarks/resume.py -->"
# Where a process kills itself: in the middle of that call, the so-manieth time.
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


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Halfway(io.RawIOBase):
    """A file in which the process is killed after its first 100 000 bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, 100_000

    def write(self, data: Any) -> int:
        self.left -= len(data)
        if self.left < 0:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            kill_now()
        return int(self.file.write(data))


def train(
    folder: Path, halves: tuple[Glyphs, Glyphs], workers: int, forced: tuple[str, int] | None
) -> None:
    """One training, or what is left of it; what it does is written to ``folder.trace``."""
    torch.set_num_threads(1)
    os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    trace = os.open(folder.with_suffix(".trace"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    counts: dict[str, int] = {}

    def enter(place: str) -> bool:
        """Note what the training begins; whether it is to be killed in it."""
        counts[place] = counts.get(place, 0) + 1
        os.write(trace, f"{place}\n".encode())
        return forced == (place, counts[place])

    def leave(place: str) -> None:
        os.write(trace, f"after {place}\n".encode())

    resume = bool(checkpoints(folder / "checkpoints"))
    runs.open_run(folder, {"epochs": EPOCHS}, resume=folder.exists())
    runs.seed_everything(0)
    train_half, test_half = halves
    model = AttentionEmbedder("test_resnet", 16)
    test_half.transform = model.transform(image_size=SIZE)
    hooks = runs.make_hooks(folder / "records", log_freq=2)
    tester = make_tester(
        RetrievalCalculator(include=("recall_at_1", "mean_average_precision_at_r")),
        end_of_testing_hook=hooks.end_of_testing_hook,
    )
    cluster, save = KMeansPseudoLabeler(12), torch.save
    insert = hooks.record_keeper.record_writer.local_db.write

    def labeler(embeddings: Any, initial_centroids: Any = None) -> Any:
        if enter("clustering"):
            kill_now()
        found = cluster(embeddings, initial_centroids)
        leave("clustering")
        return found

    def write_checkpoint(state: Any, file: Any) -> None:
        save(state, Halfway(file) if enter("writing a checkpoint") else file)
        leave("writing a checkpoint")

    def write_rows(*arguments: Any, **settings: Any) -> None:
        if enter("writing records, csv done and sqlite not"):
            kill_now()
        insert(*arguments, **settings)
        leave("writing records of a group")

    def end_iteration(trainer: UnsupervisedTrainer) -> None:
        hooks.end_of_iteration_hook(trainer)
        trainer.extra.setdefault("history", []).append(float(trainer.losses["total_loss"]))
        leave(f"epoch {trainer.epoch}, iteration {trainer.iteration + 1}")

    def end_epoch(trainer: UnsupervisedTrainer) -> None:
        enter(f"evaluating epoch {trainer.epoch}")
        found = tester.test({"test": test_half}, trainer.epoch, model.trunk, model.embedder)
        trainer.extra["after"] = {name: float(value) for name, value in found["test"].items()}
        hooks.record_keeper.save_records()
        if enter("between records and checkpoint"):
            kill_now()

    checkpoint.torch.save = write_checkpoint
    hooks.record_keeper.record_writer.local_db.write = write_rows
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * ITERATIONS)
    trainer = UnsupervisedTrainer(
        model,
        optimizer,
        BATCH,
        {
            "metric_loss": MultiSimilarityLoss(),
            "clustering_loss": ContrastiveClusteringLoss(),
            "attention_loss": AttentionConsistencyLoss(),
        },
        train_half,
        transform=SiameseTransform(SIZE, 2),
        eval_transform=test_half.transform,
        labeler=labeler,
        warmup_epochs=1,
        iterations_per_epoch=ITERATIONS,
        ema_decay=0.9,
        dataloader_num_workers=workers,
        lr_schedulers={"trunk_scheduler_by_iteration": schedule},
        checkpoint_folder=folder / "checkpoints",
        checkpoint_every=4,
        record_keeper=hooks.record_keeper,
        progress=False,
        end_of_iteration_hook=end_iteration,
        end_of_epoch_hook=end_epoch,
    )
    if resume:
        trainer.load_checkpoint()
    trainer.train(start_epoch=trainer.epoch + 1, num_epochs=EPOCHS)
    model.save_pretrained(folder / "model")
    trainer.ema_model.save_pretrained(folder / "ema")
    runs.write_json(folder / "metrics.json", trainer.extra)


def run(
    folder: Path,
    halves: Any,
    workers: int = 0,
    forced: tuple[str, int] | None = None,
    after: float | None = None,
) -> tuple[int, float]:
    """Train in a process of its own, killed ``after`` so many seconds: exit code and seconds."""
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(folder, halves, workers, forced)
    )
    start = time.perf_counter()
    process.start()
    process.join(after)
    process.kill()
    process.join()
    return process.exitcode or 0, time.perf_counter() - start


def last_seen(folder: Path) -> str:
    trace = folder.with_suffix(".trace")
    lines = trace.read_text().splitlines() if trace.exists() else []
    return lines[-1] if lines else "starting"


def result(folder: Path) -> dict[str, Any]:
    """Everything that two runs must have in common, by name."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".csv", ".safetensors", ".json")
    }
    with closing(sqlite3.connect(folder / "records" / "logs.db")) as base:
        tables = base.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in sorted(tables):
            found[f"logs.db, {name}"] = base.execute(f'SELECT * FROM "{name}"').fetchall()
    found["checkpoints"] = [path.name for path in checkpoints(folder / "checkpoints")]
    state = torch.load(checkpoints(folder / "checkpoints")[-1], weights_only=True)
    buffer = io.BytesIO()
    torch.save({name: state[name] for name in state if name != "versions"}, buffer)
    found["last checkpoint"] = buffer.getvalue()
    return found


def differences(folder: Path, expected: dict[str, Any]) -> list[str]:
    if not (folder / "metrics.json").exists():
        return ["it has not ended"]
    found = result(folder)
    return [name for name in {**expected, **found} if found.get(name) != expected.get(name)]


def series(
    kills: int, seed: int, note: Callable[[str], None]
) -> list[tuple[str, str, int, list[str]]]:
    """Kill and resume; gives (moment, place, kills, what differs from the unbroken) of each run."""
    halves = Glyphs("train", size=SIZE, num_classes=16), Glyphs("test", size=SIZE, num_classes=6)
    for half in halves:
        half.preload(progress=False)
    rng = random.Random(seed)
    rows = []
    with tempfile.TemporaryDirectory() as base:
        unbroken = Path(base) / "unbroken"
        code, seconds = run(unbroken, halves)
        if code:
            raise RuntimeError(f"the unbroken run: {unbroken.with_suffix('.log').read_text()}")
        expected = result(unbroken)
        note(f"unbroken: {seconds:.1f} s, {len(expected)} things to compare")
        for number in range(kills):
            folder = Path(base) / f"killed {number}"
            forced = FORCED[number] if number < min(len(FORCED), (kills + 1) // 2) else None
            # The last one is killed again and again.
            times = 5 if number == kills - 1 else 1
            killed, places, share = 0, [], 0.95 if times == 1 else 0.4
            while killed < times:
                after = None if forced else rng.uniform(0.05, share) * seconds
                code, _ = run(folder, halves, number % 2, forced, after)
                if code == 0 and killed == 0:  # it was faster than the unbroken one: again, sooner
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
        f"Runs of {EPOCHS} epochs of {ITERATIONS} iterations on Glyphs, a checkpoint every four "
        "iterations and after each epoch; killed with `kill -9` at a chosen moment, in the middle "
        "of the call named, or at a random one, of which what the run had last noted is given; "
        "resumed by the same command, and compared with the run that was never killed: weights, "
        "averaged weights, the whole last checkpoint, metrics, every csv file and every row of the "
        "data base, bit for bit. Every other run was killed with a loader's process beside it, and "
        "resumed without.",
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
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--output", default="docs/reliability.md", help="- prints it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = series(arguments.kills, arguments.seed, lambda line: print(line, file=sys.stderr))
    text = report(rows, time.perf_counter() - start)
    page = Path(arguments.output)
    if page.is_file():  # its own section alone
        whole = page.read_text(encoding="utf-8")
        before, _, rest = whole.partition(BEGIN)
        text = f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}"
    publish(text, arguments.output)
    if any(different for *_, different in rows):
        sys.exit("error: a resumed run differs from the unbroken one")


if __name__ == "__main__":
    main()
