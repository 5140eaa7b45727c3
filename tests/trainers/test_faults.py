"""What can go wrong in a long training: none loses a checkpoint, each says in a line what to do."""

import contextlib
import errno
import gc
import multiprocessing
import os
import re
import select
import signal
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning import losses
from sklearn.cluster import HDBSCAN

from pml_tacl import KMeansPseudoLabeler
from pml_tacl.cli.run_folder import one_line_errors, seed_everything
from pml_tacl.clustering import pseudo_labels_from
from pml_tacl.datasets import ImageFiles
from pml_tacl.trainers.checkpoint import checkpoints
from pml_tacl.trainers.data import OneView, TwoViews, lost_workers_named
from pml_tacl.utils.signals import Interrupted, ShieldedLoader, Signals
from tests.trainers.readers import SlowImages
from tests.trainers.small import COUNT, Images, make_trainer, same, state_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def line_of(trainer, **kwargs):
    """What a script ends with: its exit code, or the line."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        trainer.train(**{"num_epochs": 3} | kwargs)
    return stop.value.code


def names(folder):
    return [path.name for path in checkpoints(folder)]


def goes_on(folder, **kwargs):
    """Whether a training without the fault can go on from what is there."""
    trainer = make_trainer(checkpoint_folder=folder, **kwargs)
    trainer.load_checkpoint()
    trainer.train(start_epoch=trainer.epoch + 1, num_epochs=3)
    return names(folder)[-1] == "epoch_0003.pt"


@pytest.fixture
def full_disk(monkeypatch):
    """Files that are being written take nothing more; what is there stays."""
    original = Path.open
    full = []

    def opened(path, mode="r", *args, **kwargs):
        if full and "w" in mode and path.name.endswith(".tmp"):
            return original(Path("/dev/full"), mode, *args, **kwargs)
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    return full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the kernel has no /dev/full")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, full_disk):
    def fill(trainer):
        if trainer.epoch == 2:
            full_disk.append(True)

    trainer = make_trainer(checkpoint_folder=tmp_path, end_of_epoch_hook=fill)
    line = line_of(trainer)
    assert line == (
        f"error: cannot write checkpoint {tmp_path / 'epoch_0002.pt'} (No space left on device); "
        "epoch_0001.pt is intact: free space and resume from it"
    )
    assert names(tmp_path) == ["epoch_0000.pt", "epoch_0001.pt"]
    assert len(list(tmp_path.iterdir())) == 2
    full_disk.clear()
    assert goes_on(tmp_path)


def write_images(folder):
    for number, image in enumerate(Images().images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02}.png")
    return ImageFiles(folder, progress=False)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["deleted", "cut"])
def test_a_image_that_turns_unreadable_is_replaced_and_becomes_noise(
    tmp_path, fault, workers, caplog
):
    images = write_images(tmp_path)
    bad = images.paths[5]

    def harm(trainer):
        if trainer.epoch == 1 and trainer.iteration == 0:
            bad.unlink() if fault == "deleted" else bad.write_bytes(bad.read_bytes()[:50])

    trainer = make_trainer(
        dataset=images,
        end_of_iteration_hook=harm,
        dataloader_num_workers=workers,
        warmup_epochs=1,
        iterations_per_epoch=6,
    )
    trainer.train(num_epochs=2)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 1  # once, however often it was asked for
    assert "\n" not in told[0]
    assert "(1 of at most 10): image 5" in told[0]
    assert str(bad) in told[0]
    assert trainer.labels[5] == -1
    assert trainer.embeddings[5].isnan().all()
    assert trainer.embeddings[:5].isfinite().all()
    assert set(trainer.labels.tolist()) == {-1, 0, 1, 2, 3}


class Hiccuping(Images):
    """Images that cannot be read the first times that the embedding pass asks for them."""

    def __init__(self, times):
        super().__init__()
        self.times = dict(times)

    def __getitem__(self, index):
        if self.times.get(index, 0) > 0:
            self.times[index] -= 1
            raise OSError(5, "Input/output error", f"{index}.png")
        return super().__getitem__(index)


def test_a_read_error_that_passes_is_told_and_costs_no_image(caplog):
    sound = make_trainer(dataset=Images(), labeler=KMeansPseudoLabeler(4))
    sound.epoch = 1
    sound.relabel()
    trainer = make_trainer(dataset=Hiccuping({3: 1, 17: 1}), labeler=KMeansPseudoLabeler(4))
    trainer.epoch = 1
    with caplog.at_level("WARNING", "pml_tacl"):
        trainer.relabel()
    assert trainer.state.unreadable.known == set()
    torch.testing.assert_close(trainer.embeddings, sound.embeddings)
    assert torch.equal(trainer.labels, sound.labels)
    assert sorted(caplog.messages) == [
        f"image {index} was unreadable at first: the retry worked" for index in (17, 3)
    ]


@pytest.mark.parametrize("times", [2, 99])
def test_a_read_error_that_comes_again_is_told_and_counted(caplog, times):
    trainer = make_trainer(dataset=Hiccuping({3: times}), max_unreadable=1)
    trainer.epoch = 1
    with caplog.at_level("WARNING", "pml_tacl"):
        trainer.relabel()
    assert trainer.labels[3] == -1
    assert (trainer.labels >= 0).sum() == COUNT - 1
    (trouble,) = trainer.state.unreadable.known
    assert trouble == "image 3"
    assert f"{trouble}: " in caplog.text
    trainer = make_trainer(dataset=Hiccuping({3: times, 5: times}), max_unreadable=1)
    trainer.epoch = 1
    with pytest.raises(OSError, match="2 images cannot be read, more than max_unreadable=1"):
        trainer.relabel()


def test_a_replacement_is_of_the_same_cluster_and_never_noise(tmp_path):
    images = write_images(tmp_path)
    labels = torch.arange(COUNT) % 4
    labels[9] = -1  # of the cluster of 1, 5, 9, ...
    images.paths[5].unlink()
    views = TwoViews(images, lambda image: (torch.zeros(3, 2, 2),) * 3, labels)
    seen = {views[5, seed][3] for seed in range(60)}
    assert seen == {1, 13, 17, 21}
    assert views[5, 7][3:] == views[5, 7][3:]
    assert "image 5: cannot read" in views[5, 7][4]
    assert views[6, 7][3:] == (6, "")
    single = torch.arange(COUNT)  # as in the warm-up
    single[9] = -1
    alone = TwoViews(images, views.transform, single)
    assert {alone[5, seed][3] for seed in range(200)} == set(range(COUNT)) - {5, 9}
    evaluated = OneView(images, lambda image: torch.ones(3, 2, 2))
    assert [evaluated[index][1] for index in (4, 5, 6)] == [4, -6, 6]


def test_too_many_unreadable_images_stop_with_the_file_s_name(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    images = write_images(folder)

    def harm(trainer):
        if trainer.epoch == 2:
            for path in images.paths[:3]:
                path.unlink()

    trainer = make_trainer(
        dataset=images,
        end_of_epoch_hook=harm,
        max_unreadable=2,
        checkpoint_folder=tmp_path / "checkpoints",
    )
    line = line_of(trainer)
    assert line.startswith("error: 3 images cannot be read, more than max_unreadable=2: ")
    assert str(images.paths[2]) in line
    assert names(tmp_path / "checkpoints")[-1] == "epoch_0002.pt"
    write_images(folder)
    assert goes_on(tmp_path / "checkpoints", dataset=images, max_unreadable=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_storage_that_is_gone_stops_at_once(tmp_path, workers):
    images = write_images(tmp_path)
    for path in images.paths:
        path.unlink()
    line = line_of(make_trainer(dataset=images, warmup_epochs=1, dataloader_num_workers=workers))
    assert line.startswith("error: 5 images in a row cannot be read; the first was image ")
    assert "No such file" in line
    assert "\n" not in line


class KillsItsReader(Images):
    def __init__(self, at):
        super().__init__()
        self.at, self.harmful = at, torch.zeros(1).share_memory_()

    def __getitem__(self, index):
        if self.harmful and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("place", ["training", "clustering"])
def test_a_killed_worker_ends_in_a_line(tmp_path, place):
    images = KillsItsReader(3)

    def harm(trainer):
        if place == "clustering" and trainer.epoch == 1:
            images.harmful[0] = 1

    def harm_in_training(trainer):
        if place == "training" and (trainer.epoch, trainer.iteration) == (2, 0):
            images.harmful[0] = 1

    trainer = make_trainer(
        dataset=images,
        dataloader_num_workers=1,
        iterations_per_epoch=12,  # more than a worker reads ahead
        end_of_iteration_hook=harm_in_training,
        end_of_epoch_hook=harm,
        checkpoint_folder=tmp_path,
    )
    line = line_of(trainer)
    assert line.startswith("error: a process that reads images was lost (")
    assert line.endswith("smaller dataloader_num_workers if it happens again")
    assert "\n" not in line
    assert names(tmp_path) == ["epoch_0000.pt", "epoch_0001.pt"]
    # torch raises the error again whenever a process ends, as long as it knows the dead worker.
    del trainer
    gc.collect()
    assert goes_on(tmp_path)


def test_a_loss_that_is_nan_is_not_saved(tmp_path):
    class Broken(losses.MultiSimilarityLoss):
        harmful = False

        def forward(self, embeddings, *args):
            return super().forward(embeddings, *args) * (float("nan") if self.harmful else 1)

    def harm(trainer):
        trainer.loss_funcs["metric_loss"].harmful = (trainer.epoch, trainer.iteration) == (2, 0)

    trainer = make_trainer(
        loss_funcs={"metric_loss": Broken()},
        checkpoint_folder=tmp_path,
        checkpoint_every=1,
        end_of_iteration_hook=harm,
    )
    line = line_of(trainer)
    assert line.startswith("error: loss is not finite in epoch 2, iteration 1 (metric_loss nan")
    assert line.endswith("lower the learning rate or resume from the last checkpoint")
    assert names(tmp_path)[-1] == "epoch_0001_iteration_000001.pt"
    weights = torch.load(checkpoints(tmp_path)[-1], weights_only=True)["parts"]["models"]["trunk"]
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
    assert goes_on(tmp_path, loss_funcs={"metric_loss": losses.MultiSimilarityLoss()})


def test_a_gpu_is_asked_for_its_losses_now_and_then_and_before_a_checkpoint(tmp_path):
    class Broken(losses.MultiSimilarityLoss):
        def forward(self, embeddings, *args):
            return super().forward(embeddings, *args) * float("nan")

    looks = []

    def trainer_of(iterations, **kwargs):
        trainer = make_trainer(
            loss_funcs={"metric_loss": Broken()}, iterations_per_epoch=iterations, **kwargs
        )
        trainer.look_every = 10  # as on a GPU
        look = trainer.look_at_losses
        trainer.look_at_losses = lambda: looks.append(trainer.iteration) or look()
        return trainer

    with pytest.raises(FloatingPointError, match="epoch 1, iteration 9"):
        trainer_of(12).train()
    assert looks == [9]
    with pytest.raises(FloatingPointError, match="epoch 1, iteration 3"):
        trainer_of(12, checkpoint_folder=tmp_path, checkpoint_every=4).train()
    assert names(tmp_path) == ["epoch_0000.pt"]


def once(labeler, epoch_calls):
    """Good clusters for so many calls, then another labeler."""
    calls = []

    def both(embeddings, initial_centroids=None):
        calls.append(1)
        found = KMeansPseudoLabeler(4) if len(calls) <= epoch_calls else labeler
        return found(embeddings, initial_centroids)

    return both


@pytest.mark.parametrize(
    ("labeler", "message"),
    [
        (
            lambda e, c=None: KMeansPseudoLabeler(4)(torch.ones_like(e)),
            "all 24 embeddings are nearly identical",
        ),
        (
            lambda e, c=None: pseudo_labels_from(torch.full((len(e),), -1), e),
            "all 24 embeddings are noise: lower min_cluster_size",
        ),
        (
            lambda e, c=None: pseudo_labels_from(torch.arange(len(e)) % 3, e),
            "a batch of 8 with --images-per-cluster 2 needs 4 clusters, got 3: ",
        ),
        (
            lambda e, c=None: KMeansPseudoLabeler(4)(e * float("nan")),
            "24 of 24 rows of embeddings are NaN or infinite: look for NaN images or a diverged",
        ),
    ],
    ids=["equal", "noise", "few", "nan"],
)
def test_clusters_that_cannot_be_used_end_in_a_line(tmp_path, labeler, message):
    line = line_of(make_trainer(labeler=once(labeler, 1), checkpoint_folder=tmp_path))
    assert line.startswith(f"error: {message}")
    assert "\n" not in line
    assert names(tmp_path) == ["epoch_0000.pt", "epoch_0001.pt"]
    assert goes_on(tmp_path)


def test_noise_of_hdbscan_goes_through_the_whole_training():
    found = []

    def hdbscan(embeddings, initial_centroids=None):
        labels = HDBSCAN(min_cluster_size=4, min_samples=1, copy=True).fit_predict(
            embeddings.numpy()
        )
        labels[np.arange(0, len(labels), 7)] = -1  # some for certain
        found.append(pseudo_labels_from(labels, embeddings))
        return found[-1]

    drawn = []
    seed_everything(0)
    trainer = make_trainer(labeler=hdbscan, batch_size=4, images_per_cluster=2)
    get_batch = trainer.get_batch

    def watched():
        batch = get_batch()
        drawn.append(batch.labels)
        return batch

    trainer.get_batch = watched
    before = state_of(trainer)
    trainer.train(num_epochs=3)
    assert len(found) == 3
    assert (trainer.labels < 0).sum() >= 4
    assert len(found[-1].centroids) >= 2
    assert torch.cat(drawn).min() >= 0
    assert not same(before, state_of(trainer))
    assert all(p.isfinite().all() for p in state_of(trainer))


def test_a_data_base_on_a_full_disk_ends_in_a_line():
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise sqlite3.OperationalError("database or disk is full")
    assert stop.value.code == "error: database or disk is full"


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_after_the_iteration_and_a_checkpoint(tmp_path, signum, code, capfd):
    steps = []

    def hook(trainer):
        steps.append((trainer.epoch, trainer.iteration))
        if steps[-1] == (2, 0):
            os.kill(os.getpid(), signum)
            steps.append("the iteration goes on")

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    trainer = make_trainer(checkpoint_folder=tmp_path, end_of_iteration_hook=hook)
    assert line_of(trainer) == code
    assert steps == [(1, 0), (1, 1), (2, 0), "the iteration goes on"]
    *_, first, last = capfd.readouterr().err.strip().splitlines()
    name = signal.Signals(signum).name
    assert first.startswith(f"{name}: training saves a checkpoint and ends after this iteration")
    path = tmp_path / "epoch_0001_iteration_000001.pt"
    saved = f"saved at epoch 2, iteration 1 of 2, in {path}"
    assert last == f"stopped by {name}: {saved}: continue with --resume"
    assert path.exists()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert goes_on(tmp_path)


def test_a_signal_in_clustering_or_a_hook_loses_nothing(tmp_path):
    def labeler(embeddings, initial_centroids=None):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("clustering went on")

    trainer = make_trainer(labeler=labeler, warmup_epochs=1, checkpoint_folder=tmp_path / "one")
    with pytest.raises(Interrupted, match="SIGTERM: saved at the end of epoch 1") as stop:
        trainer.train(num_epochs=3)
    assert stop.value.code == 143
    assert goes_on(tmp_path / "one", warmup_epochs=1)

    def hook(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        trainer.extra["the hook"] = "went on"

    trainer = make_trainer(end_of_epoch_hook=hook, checkpoint_folder=tmp_path / "two")
    with pytest.raises(Interrupted, match=r"SIGINT: saved at the end of epoch 1, in .*0001\.pt"):
        trainer.train(num_epochs=3)
    assert make_trainer().load_checkpoint(tmp_path / "two") == {"the hook": "went on"}


def test_a_second_signal_ends_at_once(tmp_path):
    def hook(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the iteration went on")

    trainer = make_trainer(checkpoint_folder=tmp_path, end_of_iteration_hook=hook)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(tmp_path) == ["epoch_0000.pt"]
    assert goes_on(tmp_path)


def test_a_signal_before_the_first_checkpoint_of_a_full_disk_says_both(tmp_path, full_disk):
    def hook(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        full_disk.append(True)

    trainer = make_trainer(checkpoint_folder=tmp_path, end_of_iteration_hook=hook)
    assert "epoch_0000.pt is intact: free space and resume from it" in line_of(trainer)


def test_without_a_checkpoint_folder_signals_are_as_ever():
    def hook(trainer):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(end_of_iteration_hook=hook).train()


def test_a_training_in_another_thread_leaves_signals_alone(tmp_path):
    trainer = make_trainer(checkpoint_folder=tmp_path)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert names(tmp_path) == ["epoch_0000.pt", "epoch_0001.pt"]


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# In a training the signal comes while the fifth batch is waited for: only then is a reader missed
# that has ended early.
SCRIPT = """
import sys, time
from pathlib import Path
from pml_tacl.cli.run_folder import one_line_errors
from tests.trainers.small import Images, make_trainer

folder, place = sys.argv[1:]
asked = Path(folder, "asked")

class Slow(Images):
    read = 0

    def __getitem__(self, index):
        self.read += 1
        if place == "embedding" and index > 5:
            print("read", flush=True)
            time.sleep(0.2)
        if place == "training" and self.read == 17:  # in the third batch of this reader
            while not asked.exists():
                time.sleep(0.01)
            time.sleep(0.2)
            print("read", flush=True)
            time.sleep(0.5)
        return super().__getitem__(index)

def hook(trainer):
    if trainer.iteration == 3:
        asked.touch()

with one_line_errors():
    make_trainer(dataset=Slow(), checkpoint_folder=folder, end_of_iteration_hook=hook,
                 dataloader_num_workers=2, iterations_per_epoch=500,
                 warmup_epochs=int(place == "training")).train()
"""


ORPHAN = """
import os, signal, time
from pml_tacl.utils.signals import obey_parent_alone

training = os.getpid()
if os.fork() == 0:
    while {waits} and os.getppid() == training:
        time.sleep(0.01)
    obey_parent_alone(training, 0)
    time.sleep(600)
else:
    time.sleep({waits} or 1)
    os.kill(training, signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="signals tell no sender here")
@pytest.mark.parametrize("waits", [0, 0.1])
def test_a_reader_ends_with_its_training_however_early_that_is_killed(warm, waits):
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb") as file:
        training = warm.start(["-c", ORPHAN.format(waits=waits)], stdout=file)
        file.close()
        # Whoever still holds the pipe keeps this waiting: a reader that is left alone would.
        assert select.select([pipe], [], [], 60)[0]
        assert pipe.read() == b""
    assert training.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_readers_live_however_they_are_started(method):
    slow = SlowImages()
    with lost_workers_named():
        loader = ShieldedLoader(slow, 8, num_workers=1, multiprocessing_context=method)
        read = torch.cat([numbers for _, numbers in loader])
        assert torch.equal(read, torch.arange(len(slow)))


class KillsItsReaderLater(Images):
    def __getitem__(self, index):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_ends_after_its_connection_is_waited_for():
    loader = ShieldedLoader(KillsItsReaderLater(), 1, num_workers=1)
    reading = iter(loader)
    line = r"\(DataLoader worker .* is killed by signal"
    with pytest.raises(ChildProcessError, match=line), lost_workers_named():
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    time.sleep(1)  # torch's handler raises its error here if the end comes only now
    del reading


@pytest.mark.parametrize("kind", [EOFError, ConnectionResetError, ConnectionRefusedError])
def test_another_lost_connection_is_not_taken_for_a_reader(monkeypatch, kind):
    monkeypatch.setattr("pml_tacl.trainers.data._LOSS", 0.1)
    with pytest.raises(kind, match="of a logger"), lost_workers_named():
        raise kind("of a logger")


@pytest.mark.parametrize(
    ("signum", "place"),
    [(signal.SIGINT, "training"), (signal.SIGTERM, "training"), (signal.SIGTERM, "embedding")],
)
def test_a_signal_to_all_processes_leaves_no_traceback(warm, tmp_path, signum, place):
    process = warm.start(["-c", SCRIPT, tmp_path, place], group=True)
    try:
        while "read" not in process.output():
            assert process.poll(0.02) is None, process.errors()
        os.killpg(process.pid, signum)
        process.wait()
        errors = process.errors()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signum, errors
    assert "Traceback" not in errors
    assert "Exception" not in errors
    last = names(tmp_path)[-1]
    assert last == f"epoch_0000{'_iteration_000005' if place == 'training' else ''}.pt"
    saved = f"{last}: continue" if place == "training" else "at the end of epoch 0: continue"
    assert errors.strip().splitlines()[-1].endswith(f"{saved} with --resume")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:  # its loader's processes go too
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("processes are left")


def test_the_page_names_tests_that_there_are():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page.partition("## Faults")[2]))
    assert len(named) > 10
    assert {name for name in named if f"def {name}(" not in sources} == set()
