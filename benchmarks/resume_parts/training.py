"""A training that kills itself at a given point."""

import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import timm
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from safetensors.torch import save_file
from tqdm import tqdm

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionEmbedder,
    BackgroundSwap,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    RetrievalCalculator,
    SiameseTransform,
    UnsupervisedTrainer,
)
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import make_tester
from pml_tacl.trainers import checkpoint
from pml_tacl.trainers.checkpoint import checkpoints

EPOCHS, ITERATIONS, BATCH, SIZE = 4, 5, 16, 32
WEIGHTS = "weights.safetensors"  # in the folder of the runs


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_weights(path: Path) -> None:
    """Write weights that a training seed does not produce, like pretrained weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = timm.create_model("test_resnet").state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, path)


class Halfway(io.RawIOBase):
    """File that kills the process after its first 100 000 bytes."""

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
    """Run or resume a training, and write its steps to ``folder.trace``."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # forked processes share tqdm's own: a killed one may hold it
    os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    trace = os.open(folder.with_suffix(".trace"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    counts: dict[str, int] = {}

    def enter(place: str) -> bool:
        """Note the start of a step, and return whether to kill the training in it."""
        counts[place] = counts.get(place, 0) + 1
        os.write(trace, f"{place}\n".encode())
        return forced == (place, counts[place])

    def leave(place: str) -> None:
        os.write(trace, f"after {place}\n".encode())

    resume = bool(checkpoints(folder / "checkpoints"))
    runs.open_run(folder, {"epochs": EPOCHS}, resume=folder.exists())
    runs.seed_everything(0)
    train_half, test_half = halves
    # As in train_folder.py, a resumed network is built without the weight file, so that nothing
    # else may depend on the file. BatchNorm statistics are trained to include them in the test.
    weights = False if resume else folder.with_name(WEIGHTS)
    model = AttentionEmbedder("test_resnet", weights, embedding_dim=16, freeze_batchnorm=False)
    model.from_scratch = False
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
    views = SiameseTransform.for_model(model, SIZE)
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
        transform=views,
        swap=BackgroundSwap(cell_offset=views.cell_offset),
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
