"""Any process is killed at any place: the other ends in a line, and the resumed run is whole."""

import pytest
import torch
from torch import distributed

from pml_tacl.trainers.checkpoint import checkpoints, load_checkpoint

from .killed import EPOCHS

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PLACES = [
    ("embedding", 0),
    ("embedding", 1),
    ("learning", 0),
    ("assigning", 0),
    ("assigning", 1),
    ("writing", 0),
    ("waiting for a checkpoint", 1),
]


def run(warm, folder, place="", victim=0):
    """Exit codes of both processes, and the last lines that they wrote."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = ["-m", "tests.trainers.killed", folder, store.port, place, victim]
    done = warm.run(words, timeout=120)
    assert done.returncode == 0, done.stderr
    logs = [(folder / f"{number}.log").read_text().splitlines() for number in (0, 1)]
    return list(map(int, done.stdout.split())), logs


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.fixture(scope="module")
def unbroken(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(warm, folder) == ([0, 0], [["trained"]] * 2)
    return load_checkpoint(folder / "run")


@pytest.mark.parametrize(("place", "victim"), PLACES)
def test_the_other_process_ends_and_the_resumed_run_is_whole(
    warm, tmp_path, unbroken, place, victim
):
    codes, logs = run(warm, tmp_path, place, victim)
    assert codes == ([-9, 1] if victim == 0 else [1, -9])
    assert logs[victim] == []
    assert len(logs[1 - victim]) == 1
    line = logs[1 - victim][0]
    assert line.startswith(f"error: process {1 - victim} lost another of the 2 processes while")
    assert line.endswith("Resume from the last checkpoint")
    last = checkpoints(tmp_path / "run")[-1].name
    within = place == "waiting for a checkpoint"  # the other has written it
    assert last == ("epoch_0001_iteration_000001.pt" if within else "epoch_0001.pt")
    assert run(warm, tmp_path) == ([0, 0], [["trained"]] * 2)
    state = load_checkpoint(tmp_path / "run")
    assert state["epoch"] == EPOCHS
    assert same(state, unbroken)
