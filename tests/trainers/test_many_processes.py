"""Processes that train together: what they exchange, what they agree on, what ends them."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import distributed, nn

from pml_tacl import AttentionConsistencyMiner, ContrastiveClusteringLoss
from pml_tacl.distributed.collectives import (
    OwnImages,
    broadcast,
    equalise_buffers,
    gather_batch,
    gather_rows,
    shard,
    take_rows,
    total,
    used_anywhere,
)
from pml_tacl.distributed.gradients import start_alike, sum_gradients
from pml_tacl.distributed.inference import evaluate_distributed
from pml_tacl.distributed.session import (
    ProcessLost,
    all_reduce_max,
    barrier,
    check_same,
    in_use,
    is_main,
    rank,
    run_on_main,
    session,
    world_size,
)
from pml_tacl.evaluation import evaluate
from pml_tacl.search import ImageIndex
from pml_tacl.trainers.checkpoint import checkpoints, load_checkpoint
from tests.processes import begin, join, leave, meeting, together

from .small import Images, make_model, make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
COUNTS = [(1, 4), (7, 2), (8, 4), (23, 3)]  # rows and rows at once: some process may get none


def rows_of(count):
    return torch.arange(3.0 * count).view(count, 3)


def message(call, kind):
    try:
        call()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def fail(error):
    raise error


# Each loss sees both views of all images; the clusters of an image lie on several processes.
VIEWS, EACH, LABELS = 2, 3, torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 2, 1])


def batch_of(world):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
    return model, torch.randn(VIEWS, world * EACH, 4), LABELS[: world * EACH]


def loss_of(embeddings, labels):
    both = torch.cat([labels] * VIEWS)
    return MultiSimilarityLoss()(embeddings, both) + ContrastiveClusteringLoss(1.0)(
        embeddings, both
    )


def learn(model, views, labels):
    """The loss of a joined batch, and its gradients."""
    loss = loss_of(gather_batch(model(views.flatten(0, 1)), VIEWS), gather_batch(labels))
    loss.backward()
    total(p.grad for p in model.parameters())
    return [loss.detach(), *[p.grad for p in model.parameters()]]


def sum_of_unlike_gradients(number):
    """What a process has after summing where each of them has used other layers."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(4))
    loss = layers[min(number, 1)](torch.full((1, 2), number + 1.0)).sum()
    (loss + layers[3](torch.ones(1, 2)).sum()).backward()
    sum_gradients({"trunk": layers}, {})
    return [layer.weight.grad for layer in layers]


def exchanging(number, world, folder):
    join(number, world, folder)
    found = {"rank": rank(), "world": world_size(), "first": is_main(), "in use": in_use()}
    found["rows"] = []
    for count, batch_size in COUNTS:
        own = shard(count, batch_size)
        found["rows"].append(gather_rows(rows_of(count)[own], count, batch_size))
    sent = [torch.arange(5) - 1, torch.eye(2, 3), None, torch.ones(2, dtype=torch.bfloat16)]
    found["sent"] = broadcast(sent if number == 0 else [None] * 4)
    tensors = [torch.full((2, 3), float(number + 1)), torch.tensor(number, dtype=torch.float64)]
    last = torch.full((1, 4, 2, 2), 1.0).contiguous(memory_format=torch.channels_last)
    total([*tensors, last], 2.0)
    found["totals"] = [*tensors, last]
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(float(number))
    equalise_buffers([norm])
    found["means"] = norm.running_mean, norm.num_batches_tracked
    found["highest"] = all_reduce_max(number), all_reduce_max(-number)
    found["on first"] = run_on_main(lambda: {"k": [rank()]}, "counting")
    for error in (ValueError("two\nlines"), FileNotFoundError(2, "gone"), KeyError("k")):
        text = message(
            lambda error=error: run_on_main(lambda: fail(error), "clustering"), Exception
        )
        found[type(error).__name__] = text
    check_same("labels", [torch.arange(3), None, "x"], "")
    odd = torch.arange(3) + (number == 1)
    found["odd"] = message(lambda: check_same("labels", [odd], "look"), ValueError)
    found["used"] = used_anywhere([number == 0, number == 1, False, True])
    found["summed"] = sum_of_unlike_gradients(number)
    own = torch.arange(2 * number, 2 * number + 2)
    found["taken"] = take_rows(own, torch.arange(2 * world).roll(3))
    found["half"] = gather_batch(torch.full((1, 2), number, dtype=torch.bfloat16))
    model, views, labels = batch_of(world)
    own = slice(number * EACH, (number + 1) * EACH)
    found["learned"] = learn(model, views[:, own], labels[own])
    barrier()
    leave(found, folder)


@pytest.mark.parametrize("world", [2, 4])
def test_what_processes_exchange(warm, world, tmp_path):
    found = together(warm, exchanging, world, tmp_path)
    for number, one in enumerate(found):
        assert (one["rank"], one["world"], one["first"]) == (number, world, number == 0)
        assert one["in use"]
        for whole, (count, _) in zip(one["rows"], COUNTS, strict=True):
            assert whole is None if number else torch.equal(whole, rows_of(count))
        labels, centroids, nothing, half = one["sent"]
        assert torch.equal(labels, torch.arange(5) - 1)
        assert torch.equal(centroids, torch.eye(2, 3))
        assert nothing is None
        assert torch.equal(half, torch.ones(2, dtype=torch.bfloat16))
        pairs, wide, last = one["totals"]
        assert torch.equal(pairs, torch.full((2, 3), sum(range(1, world + 1)) / 2))
        assert wide == sum(range(world)) / 2
        assert wide.dtype == torch.float64
        assert torch.equal(last, torch.full((1, 4, 2, 2), world / 2))
        mean, steps = one["means"]
        assert mean.tolist() == [(world - 1) / 2] * 2
        assert steps == 0
        assert one["highest"] == (world - 1, 0)
        assert one["on first"] == {"k": [0]}
        where = "" if number == 0 else " (in clustering on process 0)"
        said = "two\nlines" if number == 0 else "two lines"
        assert one["ValueError"] == f"ValueError: {said}{where}"
        assert "gone" in one["FileNotFoundError"]
        assert one["FileNotFoundError"].startswith("FileNotFoundError" if number == 0 else "OSErr")
        assert one["KeyError"].startswith("KeyError" if number == 0 else "RuntimeError")
        assert one["odd"] == "InputError: labels of process 1 differ from process 0's: look"
        assert one["used"] == [True, True, False, True]
        first, second, nobodys, everyones = one["summed"]
        assert first.tolist() == [[1.0, 1.0]]  # zero where it was not used
        assert second.tolist() == [[float(sum(range(2, world + 1)))] * 2]
        assert nobodys is None
        assert everyones.tolist() == [[float(world)] * 2]
        rolled = torch.arange(2 * world).roll(3)
        assert torch.equal(one["taken"], rolled[2 * number : 2 * number + 2])
        assert one["half"].tolist() == [[float(i)] * 2 for i in range(world)]
    # Each process took the gradients that one process takes of the joined batch.
    expected = learn(*batch_of(world))
    for one in found:
        for got, want, first in zip(one["learned"], expected, found[0]["learned"], strict=True):
            assert want.abs().max() > 0
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert torch.equal(got, first)


def test_one_process_exchanges_nothing():
    assert (rank(), world_size(), is_main(), in_use()) == (0, 1, True, False)
    rows = rows_of(7)
    assert torch.equal(shard(7, 2), torch.arange(7))
    assert gather_rows(rows, 7, 2) is rows
    assert gather_batch(rows, 1) is rows
    assert broadcast([rows, None]) == [rows, None]
    total([rows])
    assert torch.equal(rows, rows_of(7))
    assert all_reduce_max(-3) == -3
    assert run_on_main(lambda: 3, "counting") == 3
    check_same("labels", [rows], "")
    barrier()
    with session():
        pass
    with pytest.raises(KeyError):
        run_on_main(lambda: fail(KeyError("as it is")), "clustering")


@pytest.mark.parametrize(("count", "batch_size"), [*COUNTS, (0, 4)])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_shards_hold_each_row_once_in_batches_of_one_process(monkeypatch, world, count, batch_size):
    monkeypatch.setattr("pml_tacl.distributed.collectives.world_size", lambda: world)
    whole = list(torch.arange(count).split(batch_size)) if count else []
    for number in range(world):
        monkeypatch.setattr("pml_tacl.distributed.collectives.rank", lambda n=number: n)
        own = shard(count, batch_size, number)
        batches = whole[number::world]
        assert own.tolist() == [row for batch in batches for row in batch.tolist()]
        assert own.dtype == torch.int64
        computed = OwnImages(count, batch_size)
        assert list(computed) == computed[:] == own.tolist()
        assert len(computed) == len(own)
        cut = own.split(batch_size) if len(own) else []
        assert [b.tolist() for b in cut] == [b.tolist() for b in batches]


def exact_trainer(model=None, **kwargs):
    """All that must not change the mathematics, and no BatchNorm, which would."""
    model = model or make_model(backbone="test_efficientnet_ln")
    settings = {
        "mining_funcs": {
            "tuple_miner": MultiSimilarityMiner(),
            "attention_miner": AttentionConsistencyMiner(),
        },
        "optimizers": torch.optim.AdamW(model.parameters(), 1e-3),
        "accumulation_steps": 2,
        "ema_decay": 0.5,
        "dataset": Images(100),
        "iterations_per_epoch": 3,
        "gradient_clippers": {
            "trunk_grad_clipper": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        },
    }
    return make_trainer(model, **{**settings, **kwargs})


def weights_of(trainer):
    states = [*(m.state_dict() for m in trainer.models.values()), trainer.average.state_dict()]
    return [value.clone() for state in states for value in state.values() if value.numel()]


def first_epochs(trainer, epochs=2):
    """Labels, losses and weights at the end of each epoch."""
    found = []

    def note(trainer):
        found.append([trainer.labels, trainer.centroids, *weights_of(trainer)])

    trainer.end_of_epoch_hook = note
    losses = []
    trainer.end_of_iteration_hook = lambda t: losses.append(
        [float(value) for value in t.losses.values()]
    )
    trainer.train(start_epoch=trainer.epoch + 1, num_epochs=epochs)
    return found, losses, [trainer.labels, trainer.centroids, *weights_of(trainer)]


WITHIN = "epoch_0001_iteration_000001.pt"  # the second epoch, after one of three iterations


def labelled():
    images = torch.rand(18, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(images, torch.arange(18) % 5)


def noise(embeddings, initial_centroids=None):
    raise ValueError("all embeddings are noise")


def training(number, world, folder):
    join(number, world, folder)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    found = {}
    trainer = exact_trainer(checkpoint_folder=f"{folder}/run", checkpoint_every=2, keep=9)
    found["epochs"], found["losses"], found["end"] = first_epochs(trainer)
    torch.manual_seed(2 + number)  # whatever another process would have drawn
    again = exact_trainer(checkpoint_folder=f"{folder}/run", keep=9)
    again.load_checkpoint(f"{folder}/run/{WITHIN}")
    *_, found["again"] = first_epochs(again)

    with_statistics = make_trainer(batch_size=16, images_per_cluster=4)
    with_statistics.train(num_epochs=1)
    found["statistics"] = [b.clone() for b in with_statistics.models["trunk"].buffers()]
    found["metrics"] = evaluate_distributed(make_model(), labelled(), batch_size=4, progress=False)
    found["labeler"] = message(lambda: exact_trainer(labeler=noise).train(), ValueError)
    other = {"iterations_per_epoch": 2 + number}
    found["settings"] = message(lambda: exact_trainer(**other), ValueError)
    found["batch"] = message(lambda: exact_trainer(batch_size=6), ValueError)
    found["stopped"] = stop_and_save(number, folder)
    leave(found, folder)


def stop_and_save(number, folder):
    """How many epochs are trained if a hook says stop in epoch 2, and saves; who calls it."""

    def hook(trainer):
        (Path(folder) / f"called by {number} in {trainer.epoch}").touch()
        trainer.save_checkpoint(f"{folder}/of a hook")
        return trainer.epoch < 2

    trainer = exact_trainer(end_of_epoch_hook=hook, iterations_per_epoch=1)
    trainer.train(num_epochs=4)
    return trainer.epoch


def test_two_processes_learn_what_one_learns(warm, tmp_path):
    first, second = together(warm, training, 2, tmp_path)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    one, losses, _ = first_epochs(exact_trainer(checkpoint_folder=tmp_path / "one", keep=9))
    # Pseudo-labels of epoch 1 come from the same weights. Their centroids have followed its steps,
    # and a processor's kernels for the half of a batch need not sum as those for the whole do.
    assert torch.equal(first["epochs"][0][0], one[0][0])
    assert (torch.cosine_similarity(first["epochs"][0][1], one[0][1]) > 0.9999).all()
    torch.testing.assert_close(
        torch.tensor(first["losses"][:3]), torch.tensor(losses[:3]), rtol=1e-4, atol=1e-5
    )
    initial = weights_of(exact_trainer())
    for got, want, before in zip(first["epochs"][0][2:], one[0][2:], initial, strict=True):
        if want.is_floating_point():  # Adam makes a full step of a gradient that is but rounding
            assert (got - want).abs().mean() < 0.02 * (want - before).abs().mean() + 1e-7
    # Both processes have the same of everything, and so has a resumed training.
    assert second["epochs"] == second["losses"] == []  # hooks are the first one's
    for found in (first, second):
        for end in (found["end"], found["again"]):
            assert all(torch.equal(a, b) for a, b in zip(end, first["epochs"][1], strict=True))
        assert found["stopped"] == 2
        assert found["metrics"] == evaluate(make_model(), labelled(), batch_size=4, progress=False)
        assert "settings of process 1 differ from process 0's: start all" in found["settings"]
        assert "batch_size=6 is split over 2 processes" in found["batch"]
        assert "give a multiple of 4, or fewer processes" in found["batch"]
    called = sorted(path.name for path in tmp_path.glob("called by *"))
    assert called == ["called by 0 in 1", "called by 0 in 2"]
    state = load_checkpoint(tmp_path / "of a hook")
    assert state["epoch"] == 2
    assert len(state["others"]) == 1
    assert first["labeler"] == "ValueError: all embeddings are noise"
    assert second["labeler"] == f"{first['labeler']} (in clustering on process 0)"
    assert len(first["statistics"]) > 0
    for mine, yours in zip(first["statistics"], second["statistics"], strict=True):
        assert torch.equal(mine, yours)
    # One process goes on with what two have saved, within an epoch.
    alone = exact_trainer(checkpoint_folder=tmp_path / "run", keep=9)
    alone.load_checkpoint(tmp_path / "run" / WITHIN)
    _, losses, end = first_epochs(alone)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(first["losses"][4:]))
    assert torch.equal(end[0], first["end"][0])


TRAINING = """
import sys, warnings
warnings.simplefilter("ignore")  # so small a network makes uneven clusters
from pml_tacl.cli import run_folder as runs
from pml_tacl.distributed.inference import is_main, session
from tests.trainers.small import make_trainer
with session(), runs.one_line_errors():
    begun = "--resume" in sys.argv
    trainer = make_trainer(checkpoint_folder=sys.argv[1], end_of_epoch_hook=lambda t: print(
        f"epoch {t.epoch} of", flush=True))
    if begun:
        trainer.load_checkpoint()
    trainer.train(trainer.epoch + 1, 100_000)
"""


@pytest.fixture
def store():
    held = meeting()
    yield held
    del held


def wait_for(text, path, processes):
    for _ in range(6000):
        if text in path.read_text():
            return
        assert all(p.poll() is None for p in processes), path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{text!r} did not come: {path.read_text()}")


@pytest.fixture
def processes():
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def last_lines(folder):
    return [(folder / f"{number}.log").read_text().splitlines()[-1] for number in (0, 1)]


def test_signals_save_once_and_a_killed_process_ends_the_others(warm, store, processes, tmp_path):
    command = ["-c", TRAINING, str(tmp_path / "run")]
    processes += begin(warm, command, 2, store, tmp_path)
    wait_for("epoch 3 of", tmp_path / "0.log", processes)
    for process in processes:  # as torchrun passes it on
        process.send_signal(signal.SIGTERM)
    assert [process.wait(timeout=300) for process in processes] == [143, 143]
    for line in last_lines(tmp_path):
        assert line.startswith("stopped by SIGTERM: saved at"), line
    saved = [path.name for path in checkpoints(tmp_path / "run")]
    assert len(saved) == len(list((tmp_path / "run").iterdir())) == 2  # keep=2, nothing else
    ended = int(saved[-1][6:10])

    store = meeting()
    resumed = begin(warm, [*command, "--resume"], 2, store, tmp_path)
    processes += resumed
    wait_for(f"epoch {ended + 3} of", tmp_path / "0.log", resumed)
    resumed[1].send_signal(signal.SIGKILL)
    assert resumed[0].wait(timeout=300) == 1
    lines = (tmp_path / "0.log").read_text().splitlines()
    said = [line for line in lines if not line.startswith("epoch ")]
    assert len(said) == 1, said
    assert said[0].startswith("error: process 0 lost another of the 2 processes while")
    assert said[0].endswith("Resume from the last checkpoint")
    assert int(checkpoints(tmp_path / "run")[-1].name[6:10]) >= ended + 2


def test_waiting_for_the_first_process_ends_when_it_is_killed(warm, store, processes, tmp_path):
    code = """
import time
from pml_tacl.cli import run_folder as runs
from pml_tacl.distributed.session import all_reduce_max, run_on_main, rank, session
with session(), runs.one_line_errors():
    all_reduce_max(0)
    print("met", flush=True)
    run_on_main(lambda: time.sleep(600), "clustering")
"""
    processes += begin(warm, ["-c", code], 2, store, tmp_path)
    for number in (0, 1):
        wait_for("met", tmp_path / f"{number}.log", processes)
    processes[0].send_signal(signal.SIGKILL)
    assert processes[1].wait(timeout=300) == 1
    lines = (tmp_path / "1.log").read_text().splitlines()
    assert len(lines) == 2
    assert "process 1 lost another of the 2 processes while waiting for clustering" in lines[1]


def test_torchrun_trains_a_folder_and_writes_it_once(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(36):
        folder = "images" if number < 24 else "labelled"
        path = tmp_path / folder / str(number % 4) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((40, 50)).save(path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [ROOT / "examples" / "train_folder.py", tmp_path / "images"]
    script += ["--backbone=test_resnet", "--weights=none", "--image-size=32", "--batch-size=8"]
    script += ["--epochs=1", "--warmup-epochs=0", "--workers=0", "--embedding-dim=16"]
    script += [f"--eval-folder={tmp_path / 'labelled'}", f"--run={tmp_path / 'run'}"]
    done = subprocess.run(
        [*launch, "--", *map(str, script)],  # --run alone torchrun would take for its own
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("24 images indexed") == 1
    assert done.stdout.count("testing on 12 images of 4 classes\n") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["after"]["recall_at_1"] <= 1
    assert len(ImageIndex.load(tmp_path / "run")) == 24
    rows = (tmp_path / "run" / "records" / "loss_histories.csv").read_text().splitlines()
    assert len(rows) == 1 + 1  # a header, and the first iteration of the epoch


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        SystemExit, match=r"process 1 of this machine has no GPU \(number of GPUs: 1\):"
    ):
        session().__enter__()


def test_a_session_meets_the_others_with_its_timeout(monkeypatch):
    met = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(distributed, "init_process_group", lambda *a, **k: met.append((a, k)))
    with session(timedelta(seconds=7)):
        assert met == [(("gloo",), {"timeout": timedelta(seconds=7)})]


ENDING = """
import atexit, sys
from pml_tacl.distributed.session import all_reduce_max, in_use, rank, session
atexit.register(lambda: print("at exit"))
try:
    with session():
        print("highest", all_reduce_max(rank()))
        if sys.argv[1] == "fails" and rank() == 1:
            raise KeyError("mine")
except KeyError as error:
    print("caught", error)
print("after", in_use())
sys.exit(3)
"""


@pytest.mark.parametrize("how", ["well", "fails"])
def test_what_follows_a_session_runs(warm, store, processes, tmp_path, how):
    processes += begin(warm, ["-c", ENDING, how], 2, store, tmp_path)
    codes = [process.wait(timeout=300) for process in processes]
    written = [(tmp_path / f"{number}.log").read_text().splitlines() for number in (0, 1)]
    after = ["after False", "at exit"]
    if how == "well":
        assert codes == [3, 3]
        assert written == [["highest 1", *after]] * 2
    else:
        assert codes == [1, 3]
        assert written[1] == ["highest 1", "caught 'mine'", *after]
        assert written[0][-1] == "at exit"
        assert any(line.startswith("error: process 0 lost another") for line in written[0])


def test_batchnorm_is_synchronised_on_gpus_with_its_activation_and_weights(monkeypatch):
    monkeypatch.setattr("pml_tacl.distributed.gradients.world_size", lambda: 2)
    model = make_model(backbone="test_efficientnet")  # BatchNorm and activation in one layer
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    before, parameters = model(images), list(model.parameters())
    models = {"trunk": model.trunk, "embedder": model.embedder}
    start_alike(models, {}, [8, 4], torch.device("cuda"))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(images), before)


def test_errors_of_other_kinds_keep_their_words():
    from pml_tacl.distributed.session import naming

    with pytest.raises(RuntimeError, match="shapes differ"), naming("adding"):
        raise RuntimeError("shapes differ")
    with (
        pytest.raises(ProcessLost, match=r"while adding \(Connection closed by peer"),
        naming("adding"),
    ):
        raise RuntimeError("[/a/pair.cc:5] Connection closed by peer [127.0.0.1]:1. Good luck")
