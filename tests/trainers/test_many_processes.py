"""Processes that train together: what they exchange, what they agree on, what ends them."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import distributed, multiprocessing, nn

from pml_tacl import ContrastiveClusteringLoss
from pml_tacl._distributed import (
    ProcessLost,
    agree,
    barrier,
    check_same,
    in_use,
    is_first,
    on_first,
    rank,
    session,
    world_size,
)
from pml_tacl._exchange import (
    equalise_buffers,
    from_first,
    gather_batch,
    gather_rows,
    shard,
    total,
)

ROOT = Path(__file__).parents[2]
COUNTS = [(1, 4), (7, 2), (8, 4), (23, 3)]  # rows and rows at once: some process may get none
PATIENCE = timedelta(minutes=5)


def rows_of(count):
    return torch.arange(3.0 * count).view(count, 3)


def join(number, world, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=number,
        world_size=world,
        timeout=PATIENCE,
    )


def leave(found, folder):
    torch.save(found, f"{folder}/{rank()}.pt")
    distributed.barrier()  # nobody leaves while another still talks to him
    os._exit(0)  # torch's threads now and then abort the interpreter's own way out


def together(child, world, folder):
    multiprocessing.spawn(child, args=(world, str(folder)), nprocs=world)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(world)]


def message(call, kind):
    try:
        call()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def fail(error):
    raise error


# Each loss sees both views of all pictures; the clusters of a picture lie on several processes.
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


def exchanging(number, world, folder):
    join(number, world, folder)
    found = {"rank": rank(), "world": world_size(), "first": is_first(), "in use": in_use()}
    found["rows"] = []
    for count, batch_size in COUNTS:
        own = shard(count, batch_size)
        found["rows"].append(gather_rows(rows_of(count)[own], count, batch_size))
    sent = [torch.arange(5) - 1, torch.eye(2, 3), None, torch.ones(2, dtype=torch.bfloat16)]
    found["sent"] = from_first(sent if number == 0 else [None] * 4)
    tensors = [torch.full((2, 3), float(number + 1)), torch.tensor(number, dtype=torch.float64)]
    last = torch.full((1, 4, 2, 2), 1.0).contiguous(memory_format=torch.channels_last)
    total([*tensors, last], 2.0)
    found["totals"] = [*tensors, last]
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(float(number))
    equalise_buffers([norm])
    found["means"] = norm.running_mean, norm.num_batches_tracked
    found["agreed"] = agree(number == world - 1), agree(False)
    found["on first"] = on_first(lambda: {"k": [rank()]}, "counting")
    for error in (ValueError("two\nlines"), FileNotFoundError(2, "gone"), KeyError("k")):
        text = message(lambda error=error: on_first(lambda: fail(error), "clustering"), Exception)
        found[type(error).__name__] = text
    check_same("labels", [torch.arange(3), None, "x"], "")
    odd = torch.arange(3) + (number == 1)
    found["odd"] = message(lambda: check_same("labels", [odd], "look"), ValueError)
    found["half"] = gather_batch(torch.full((1, 2), number, dtype=torch.bfloat16))
    model, views, labels = batch_of(world)
    own = slice(number * EACH, (number + 1) * EACH)
    found["learned"] = learn(model, views[:, own], labels[own])
    barrier()
    leave(found, folder)


@pytest.mark.parametrize("world", [2, 4])
def test_what_processes_exchange(world, tmp_path):
    found = together(exchanging, world, tmp_path)
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
        assert one["agreed"] == (True, False)
        assert one["on first"] == {"k": [0]}
        where = "" if number == 0 else " (in clustering on process 0)"
        said = "two\nlines" if number == 0 else "two lines"
        assert one["ValueError"] == f"ValueError: {said}{where}"
        assert "gone" in one["FileNotFoundError"]
        assert one["FileNotFoundError"].startswith("FileNotFoundError" if number == 0 else "OSErr")
        assert one["KeyError"].startswith("KeyError" if number == 0 else "RuntimeError")
        assert one["odd"] == "ValueError: labels of process 1 differ from process 0's: look"
        assert one["half"].tolist() == [[float(i)] * 2 for i in range(world)]
    # Each process took the gradients that one process takes of the joined batch.
    expected = learn(*batch_of(world))
    for one in found:
        for got, want, first in zip(one["learned"], expected, found[0]["learned"], strict=True):
            assert want.abs().max() > 0
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert torch.equal(got, first)


def test_one_process_exchanges_nothing():
    assert (rank(), world_size(), is_first(), in_use()) == (0, 1, True, False)
    rows = rows_of(7)
    assert torch.equal(shard(7, 2), torch.arange(7))
    assert gather_rows(rows, 7, 2) is rows
    assert gather_batch(rows, 1) is rows
    assert from_first([rows, None]) == [rows, None]
    total([rows])
    assert torch.equal(rows, rows_of(7))
    assert agree(True)
    assert not agree(False)
    assert on_first(lambda: 3, "counting") == 3
    check_same("labels", [rows], "")
    barrier()
    with session():
        pass
    with pytest.raises(KeyError):
        on_first(lambda: fail(KeyError("as it is")), "clustering")


@pytest.mark.parametrize(("count", "batch_size"), [*COUNTS, (0, 4)])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_shards_hold_each_row_once_in_batches_of_one_process(monkeypatch, world, count, batch_size):
    monkeypatch.setattr("pml_tacl._exchange.world_size", lambda: world)
    whole = list(torch.arange(count).split(batch_size)) if count else []
    for number in range(world):
        own = shard(count, batch_size, number)
        batches = whole[number::world]
        assert own.tolist() == [row for batch in batches for row in batch.tolist()]
        assert own.dtype == torch.int64
        cut = own.split(batch_size) if len(own) else []
        assert [b.tolist() for b in cut] == [b.tolist() for b in batches]


WAITING = """
import os, sys, time
from pml_tacl import runs
from pml_tacl._distributed import agree, on_first, rank, session
with session(), runs.one_line_errors():
    agree(False)
    on_first(lambda: None, "meeting")
    print("met", flush=True)
    if rank() == 1:
        time.sleep(600)
    {waits}
"""


def environment(number, world, port):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    ours = {"TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **place, **ranks, **ours}


@pytest.fixture
def store():
    """The meeting place, as torchrun's agent holds one; the port is the system's choice."""
    held = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield held
    del held


def begin(command, world, store, folder):
    """Processes as torchrun starts them, and the files that they write to."""
    started = []
    for number in range(world):
        with (folder / f"{number}.log").open("w") as log:
            given = {
                **environment(number, world, store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            started.append(subprocess.Popen(command, env=given, stdout=log, stderr=log))
    return started


def wait_for(text, path, processes):
    for _ in range(1200):
        if text in path.read_text():
            return
        assert all(p.poll() is None for p in processes), path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{text!r} did not come: {path.read_text()}")


@pytest.mark.parametrize("waits", ["agree(False)", "on_first(lambda: None, 'clustering')"])
def test_a_killed_process_ends_the_other_with_one_line(waits, store, tmp_path):
    code = WAITING.format(waits=waits)
    survivor, killed = begin([sys.executable, "-c", code], 2, store, tmp_path)
    try:
        wait_for("met", tmp_path / "1.log", [killed])
        killed.send_signal(signal.SIGKILL)
        assert survivor.wait(timeout=120) != 0
    finally:
        for process in (survivor, killed):
            process.kill()
            process.wait()
    lines = (tmp_path / "0.log").read_text().splitlines()
    assert [line for line in lines if "lost another of the 2 processes" in line] == [lines[-1]]
    assert lines[-1].startswith("error: process 0 lost")
    assert "Traceback" not in "".join(lines)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="process 1 of this machine has no GPU, there are 1"):
        session().__enter__()


def test_errors_of_other_kinds_keep_their_words():
    from pml_tacl._distributed import naming

    with pytest.raises(RuntimeError, match="shapes differ"), naming("adding"):
        raise RuntimeError("shapes differ")
    with (
        pytest.raises(ProcessLost, match=r"while adding \(Connection closed by peer"),
        naming("adding"),
    ):
        raise RuntimeError("[/a/pair.cc:5] Connection closed by peer [127.0.0.1]:1. Good luck")
