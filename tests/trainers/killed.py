"""Two processes of a training, of which one kills itself.

    python -m tests.trainers.killed FOLDER PORT PLACE VICTIM

prints the exit codes of both. Their output is in FOLDER/0.log and FOLDER/1.log. If FOLDER holds
checkpoints, the training goes on from the last one.
"""

import io
import multiprocessing
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from pml_tacl import KMeansPseudoLabeler
from pml_tacl.cli import run_folder as runs
from pml_tacl.distributed.session import session
from pml_tacl.trainers import checkpoint, unsupervised_trainer
from pml_tacl.trainers.checkpoint import checkpoints

from .small import Images, make_model, make_trainer

EPOCHS, IMAGES = 3, 100  # the first process embeds 64 images, the second 36
PATIENCE = 60  # seconds in which both must end


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, call, after=False):
    """The function, which kills the process at the beginning or end of its n-th call."""
    calls = []

    def called(*args, **kwargs):
        calls.append(0)
        if len(calls) == call and not after:
            kill()
        found = function(*args, **kwargs)
        if len(calls) == call:
            kill()
        return found

    return called


class Half(io.RawIOBase):
    """A file that kills the process after 10 000 bytes."""

    def __init__(self, file):
        self.file, self.left = file, 10_000  # of about 200 000

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            self.file.flush()
            kill()
        return self.file.write(data)


def writing_half(write, call):
    """The function, whose n-th file kills the process in its middle."""
    calls = []

    @contextmanager
    def called(path):
        calls.append(0)
        with write(path) as file:
            yield Half(file) if len(calls) == call else file

    return called


def train(number, folder, port, place, victim):
    log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # so small a network makes uneven clusters
    runs.seed_everything(0)
    unsupervised_trainer.IN_MEMORY_UP_TO = 10
    with session(), runs.one_line_errors():
        model = make_model()
        transform = model.transform(image_size=32)
        if number == victim:
            if place == "embedding":  # in the second epoch
                images = (64, 36)[victim]
                transform = dying(transform, images + images // 2)
            elif place == "learning":
                KMeansPseudoLabeler._learn = dying(KMeansPseudoLabeler._learn, 2)
            elif place == "assigning":
                KMeansPseudoLabeler._assign = dying(KMeansPseudoLabeler._assign, 2)
            elif place == "writing":
                checkpoint.atomic_write = writing_half(checkpoint.atomic_write, 4)
            elif place == "waiting for a checkpoint":
                unsupervised_trainer.states_of_others = dying(
                    unsupervised_trainer.states_of_others, 5, after=True
                )
        trainer = make_trainer(
            model,
            Images(IMAGES),
            eval_transform=transform,
            labeler=KMeansPseudoLabeler(4, max_points=60, chunk_size=16),
            checkpoint_folder=folder / "run",
            checkpoint_every=1,
            keep=99,
        )
        if checkpoints(folder / "run"):
            trainer.load_checkpoint()
        trainer.train(trainer.epoch + 1, EPOCHS)
        print("trained")


def main(folder, port, place, victim):
    start = multiprocessing.get_context("fork").Process
    started = [
        start(target=train, args=(number, Path(folder), port, place, int(victim)))
        for number in (0, 1)
    ]
    for process in started:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
    print(*[process.exitcode for process in started])


if __name__ == "__main__":
    main(*sys.argv[1:])
