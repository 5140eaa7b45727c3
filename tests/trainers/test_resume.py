"""A training that was stopped ends like one that was not."""

import csv
import random
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses

from pml_tacl import (
    BackgroundSwap,
    ContrastiveClusteringLoss,
    SiameseTransform,
)
from pml_tacl.cli.run_folder import make_hooks, seed_everything
from pml_tacl.trainers import checkpoint, records
from pml_tacl.trainers.checkpoint import checkpoints, load_checkpoint
from pml_tacl.trainers.data import TwoViews, draw_order, drawing_from, make_loader

from .small import BATCH, COUNT, SIZE, Images, make_model, make_trainer, same, state_of

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


class Noisy(Images):
    """Draws from all three generators, as data sets of users do."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        shift = random.randrange(9) + np.random.randint(9) + int(torch.randint(9, ()))  # noqa: NPY002
        return image + shift, label


def views(dataset=None):
    labels = torch.arange(COUNT) % 4
    return TwoViews(dataset or Noisy(), SiameseTransform(SIZE, grid=2), labels)


def drawn():
    return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002


def test_a_image_s_views_depend_on_its_seed_alone():
    items = [(3, 17), (5, 2**62 + 1), (3, 18)]
    seed_everything(0)
    first = [views()[item] for item in items]
    after = drawn()
    seed_everything(0)
    assert after == drawn()  # nothing was taken from the global state
    seed_everything(1)
    second = [views()[item] for item in reversed(items)][::-1]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert not torch.equal(first[0][0], first[2][0])


def test_the_state_comes_back_even_after_an_error():
    seed_everything(0)
    expected = drawn()
    seed_everything(0)
    with pytest.raises(ZeroDivisionError), drawing_from(5):
        1 / (drawn()[0] * 0)
    assert drawn() == expected


class Drawing(Images):
    """Gives what the global generators give before and after an item, in a loader's process."""

    def __getitem__(self, index):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        with drawing_from(index):
            inside = drawn()
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        same = torch.equal(before[0], after[0]) and before[1] == after[1]
        return inside, same and bool((before[2] == after[2]).all())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_leaves_the_generators_as_they_were_in_every_process(workers):
    found = list(torch.utils.data.DataLoader(Drawing(), None, num_workers=workers))
    assert all(same for _, same in found)
    with drawing_from(5):
        assert found[5][0] == pytest.approx(drawn())
    assert found[4][0] != found[5][0]


def test_items_in_threads_take_turns():
    expected = {seed: views()[seed % COUNT, seed] for seed in range(24)}
    seed_everything(0)
    before = drawn()
    seed_everything(0)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: views()[seed % COUNT, seed], list(range(24)) * 2))
    assert drawn() == before
    for seed, item in zip([*range(24)] * 2, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(item[:3], expected[seed][:3], strict=True))


def test_a_process_that_is_forked_while_another_thread_makes_an_item_can_make_some():
    inside, done = threading.Event(), threading.Event()

    def hold():
        with drawing_from(3):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    try:
        loader = torch.utils.data.DataLoader(Drawing(), None, num_workers=1, timeout=30)
        assert len(list(loader)) == COUNT
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_the_rest_gives_the_rest(workers):
    seed_everything(3)
    order = draw_order(torch.arange(COUNT) % 4, True, 4 * BATCH, 2, BATCH)
    assert order.shape == (4 * BATCH, 2)
    assert len(order[:, 1].unique()) == 4 * BATCH
    state = drawn()
    seed_everything(3)
    draw_order(torch.arange(COUNT) % 4, True, 4 * BATCH, 2, BATCH)
    whole = list(make_loader(views(), order, BATCH, num_workers=0))
    rest = list(make_loader(views(), order[2 * BATCH :], BATCH, num_workers=workers))
    assert state == drawn()  # a loader takes nothing either
    assert len(rest) == 2
    for expected, found in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected[:4], found[:4], strict=True))


def fresh(folder, workers=0, epochs=3, **kwargs):
    """A trainer with everything that has a state; what it recorded is in its folder."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    hooks = make_hooks(folder / "records", log_freq=2)

    def end_iteration(trainer):
        hooks.end_of_iteration_hook(trainer)
        trainer.extra.setdefault("losses", []).append(float(trainer.losses["total_loss"]))

    settings = {
        "optimizers": optimizer,
        "lr_schedulers": {
            "trunk_scheduler_by_iteration": torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, 9
            ),
            "embedder_scheduler_by_epoch": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
        },
        "loss_funcs": {
            "metric_loss": losses.ProxyAnchorLoss(COUNT, 16),
            # Centroids within another loss, which move in each iteration.
            "clustering_loss": losses.MultipleLosses(
                {"centroids": ContrastiveClusteringLoss(margin=1.0)}
            ),
            # Once its queue has gone round, where it stands decides what it holds.
            "memory_loss": losses.CrossBatchMemory(losses.NTXentLoss(), 16, memory_size=40),
        },
        "dataset": Noisy(),
        "warmup_epochs": 1,
        "iterations_per_epoch": 3,
        "ema_decay": 0.5,
        "dataloader_num_workers": workers,
        "checkpoint_folder": folder / "checkpoints",
        "checkpoint_every": 1,
        "keep": 99,
        "record_keeper": hooks.record_keeper,
        "end_of_iteration_hook": end_iteration,
        "end_of_epoch_hook": lambda _: hooks.record_keeper.save_records(),
    } | kwargs
    return make_trainer(model, **settings)


def outcome(trainer, folder):
    """What two trainings must share."""
    tables = {}
    with closing(sqlite3.connect(folder / "records" / "logs.db")) as base:
        for (name,) in base.execute("SELECT name FROM sqlite_master").fetchall():
            tables[name] = base.execute(f'SELECT * FROM "{name}"').fetchall()
    tables |= {p.name: p.read_bytes() for p in (folder / "records").glob("*.csv")}
    tensors = [*state_of(trainer), *trainer.ema_model.state_dict().values(), trainer.labels]
    tensors += [trainer.centroids, *trainer.loss_funcs["metric_loss"].parameters()]
    rates = [group["lr"] for group in trainer.optimizers["trunk_optimizer"].param_groups]
    return [t.detach().clone() for t in tensors], tables, trainer.extra["losses"], rates, drawn()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_bit_for_bit_from_every_checkpoint(tmp_path, workers):
    seed_everything(1)
    whole = fresh(tmp_path / "whole")
    whole.train(num_epochs=3)
    tensors, *others = outcome(whole, tmp_path / "whole")
    rows = (tmp_path / "whole" / "records" / "loss_histories.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 2
    there = checkpoints(tmp_path / "whole" / "checkpoints")
    assert [p.name for p in there[:5]] == [
        "epoch_0000.pt",
        "epoch_0000_iteration_000001.pt",
        "epoch_0000_iteration_000002.pt",
        "epoch_0001.pt",
        "epoch_0001_iteration_000001.pt",
    ]
    assert len(there) == 1 + 3 * 3
    # With workers, only where it matters: mid-epoch, before and after the clustering.
    for path in [there[i] for i in ((0, 2, 3, 5, 9) if workers == 0 else (2, 5))]:
        folder = tmp_path / "whole"  # whose records go further than the checkpoint
        seed_everything(99)  # whatever the new process would have drawn
        trainer = fresh(folder, workers, checkpoint_folder=tmp_path / path.stem)
        trainer.load_checkpoint(path)
        trainer.train(start_epoch=trainer.epoch + 1, num_epochs=3)
        found, *found_others = outcome(trainer, folder)
        assert same(tensors, found), path
        assert found_others == others, path


def test_a_checkpoint_within_an_epoch_is_of_that_epoch(tmp_path):
    fresh(tmp_path).train(num_epochs=1)
    path = checkpoints(tmp_path / "checkpoints")[2]
    trainer = fresh(tmp_path, checkpoint_folder=None)
    trainer.load_checkpoint(path)
    assert (trainer.epoch, trainer.state.done) == (0, 2)
    with pytest.raises(ValueError, match="from within epoch 1, got start_epoch=2: train with"):
        trainer.train(start_epoch=2, num_epochs=2)
    again = trainer.save_checkpoint(tmp_path / "again")
    assert again.name == path.name
    with pytest.raises(ValueError, match="within an epoch with batch_size=8, got 4: resume with"):
        fresh(tmp_path, batch_size=4, images_per_cluster=2).load_checkpoint(path)
    with pytest.raises(ValueError, match="with averaged weights: resume with the same ema_decay"):
        fresh(tmp_path, ema_decay=None).load_checkpoint(path)


def test_a_training_that_its_hook_ended_stays_ended(tmp_path):
    calls = []

    def stop(trainer):
        calls.append(trainer.epoch)
        return False

    fresh(tmp_path, end_of_epoch_hook=stop).train(num_epochs=3)
    trainer = fresh(tmp_path, end_of_epoch_hook=stop)
    trainer.load_checkpoint()
    trainer.train(start_epoch=trainer.epoch + 1, num_epochs=3)
    assert calls == [1]
    trainer.train(start_epoch=trainer.epoch + 1, num_epochs=3)  # asked for again, it goes on
    assert calls == [1, 2]


def test_a_checkpoint_within_an_iteration_is_refused(tmp_path):
    trainer = make_trainer(end_of_iteration_hook=lambda t: t.save_checkpoint(tmp_path))
    with pytest.raises(ValueError, match="set checkpoint_every"):
        trainer.train()


def test_the_checkpoints_of_another_training_are_not_written_over(tmp_path):
    fresh(tmp_path).train(num_epochs=1)
    names = [p.name for p in checkpoints(tmp_path / "checkpoints")]
    with pytest.raises(ValueError, match="contains checkpoints of an earlier training: load_check"):
        fresh(tmp_path).train(num_epochs=1)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == names
    trainer = fresh(tmp_path)
    trainer.load_checkpoint(tmp_path / "checkpoints" / names[1])  # back on purpose
    trainer.train(start_epoch=1, num_epochs=1)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == names
    superseded = sorted(p.name for p in (tmp_path / "checkpoints").glob("*.superseded"))
    assert superseded == sorted(f"{name}.superseded" for name in names[2:])


def test_the_last_k_stay_in_the_order_of_the_training(tmp_path):
    trainer = fresh(tmp_path, keep=2)
    trainer.train(num_epochs=2)
    names = [p.name for p in checkpoints(tmp_path / "checkpoints")]
    assert names == ["epoch_0001_iteration_000002.pt", "epoch_0002.pt"]
    assert names == sorted(names)
    trainer.save_checkpoint(tmp_path / "other", keep=1)
    assert [p.name for p in checkpoints(tmp_path / "other")] == ["epoch_0002.pt"]


def test_half_written_files_are_no_checkpoints_and_are_cleared(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".epoch_0007.pt.1234abcd.tmp").write_bytes(b"half")
    (folder / "notes.pt").write_bytes(b"of the user")
    fresh(tmp_path).train(num_epochs=1)
    assert not list(folder.glob(".*"))
    assert (folder / "notes.pt").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "bytes"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, damage, caplog):
    fresh(tmp_path).train(num_epochs=1)
    folder = tmp_path / "checkpoints"
    *_, before, last = checkpoints(folder)
    content = last.read_bytes()
    if damage == "cut":
        last.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        last.write_bytes(b"")
    else:
        last.write_bytes(content[:2000] + bytes(2000) + content[4000:])
    with pytest.raises(
        ValueError, match=f"{last.name} is damaged: use the one before it, {before.name}"
    ):
        load_checkpoint(last)
    trainer = fresh(tmp_path)
    trainer.load_checkpoint()
    assert f"{last.name} is damaged: reading the one before it" in caplog.text
    assert (trainer.epoch, trainer.state.done) == (0, 2)
    assert checkpoints(folder)[-1] == before
    assert last.with_suffix(".pt.damaged").exists()
    trainer.train(start_epoch=1, num_epochs=1)
    assert checkpoints(folder)[-1].name == "epoch_0001.pt"


@pytest.mark.parametrize("value", [np.float64(0.5), date(2026, 1, 1), frozenset({1})])
def test_a_type_that_is_not_read_is_no_damage(tmp_path, value):
    """As a checkpoint may be that an earlier version has written."""
    fresh(tmp_path).train(num_epochs=1)
    folder = tmp_path / "checkpoints"
    names = [path.name for path in folder.iterdir()]
    last = checkpoints(folder)[-1]
    state = load_checkpoint(last)
    torch.save(state | {"extra": {"score": value}}, last)
    kind = r"numpy\._?core\.multiarray\.scalar|datetime\.date|frozenset"
    for path in (folder, last):
        with pytest.raises(ValueError, match=f"is intact, but contains a type .* \\(({kind})\\)"):
            load_checkpoint(path)
    assert [path.name for path in folder.iterdir()] == names


def test_no_readable_checkpoint_says_so(tmp_path):
    (tmp_path / "epoch_0001.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        load_checkpoint(tmp_path)
    assert (tmp_path / "epoch_0001.pt").exists()
    torch.save({"epoch": 1}, tmp_path / "epoch_0001.pt")
    for path in (tmp_path, tmp_path / "epoch_0001.pt"):  # whole, so it keeps its name
        with pytest.raises(ValueError, match=r"by another version of pml_tacl: resume with that"):
            load_checkpoint(path)
    assert (tmp_path / "epoch_0001.pt").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "epoch_0002.pt")


def test_another_version_of_torch_is_told(tmp_path, caplog, monkeypatch):
    fresh(tmp_path).train(num_epochs=1)
    monkeypatch.setattr(checkpoint, "versions", lambda: {"torch": "99.0"})
    fresh(tmp_path).load_checkpoint()
    assert f"the checkpoint was written with torch {torch.__version__.partition('+')[0]}" in (
        caplog.text.replace(torch.__version__, torch.__version__.partition("+")[0])
    )


def test_records_made_after_the_checkpoint_are_taken_back(tmp_path):
    hooks = make_hooks(tmp_path)
    keeper = hooks.record_keeper
    keeper.update_records({"a": 1.5, "name": "x"}, 0, parent_name="old")
    keeper.save_records()
    keeper.update_records({"a": np.float64(2.5), "name": "y"}, 1, parent_name="old")
    state = records.records_state(keeper)
    torch.save(state, tmp_path / "state.pt")
    keeper.save_records()
    keeper.update_records({"a": 3.5, "b": 1.0}, 2, parent_name="old")
    keeper.update_records({"c": 1.0}, 2, parent_name="new")
    keeper.save_records()
    resumed = make_hooks(tmp_path).record_keeper
    records.restore_records(resumed, torch.load(tmp_path / "state.pt", weights_only=True))
    assert not (tmp_path / "new.csv").exists()
    assert not resumed.table_exists("new")
    assert [row["a"] for row in resumed.query("SELECT * FROM old")] == [1.5]
    resumed.save_records()
    rows = resumed.query("SELECT id, a, name FROM old")
    assert [tuple(row) for row in rows] == [(1, 1.5, "x"), (2, 2.5, "y")]
    with (tmp_path / "old.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["~iteration~", "a", "name"],
            ["0", "1.5", "x"],
            ["1", "2.5", "y"],
        ]


def test_records_that_are_gone_are_told(tmp_path, caplog):
    keeper = make_hooks(tmp_path).record_keeper
    keeper.update_records({"a": 1.5}, 0, parent_name="old")
    keeper.save_records()
    state = records.records_state(keeper)
    (tmp_path / "old.csv").write_text("")
    records.restore_records(keeper, state)
    assert "old.csv has lost records" in caplog.text


def swapping(folder, offset, **kwargs):
    """A trainer that looks off the middle of its cells, as its script has measured it."""
    transform = SiameseTransform(SIZE, grid=2, cell_offset=offset)
    swap = BackgroundSwap(cell_offset=offset)
    return fresh(folder, transform=transform, swap=swap, **kwargs)


@pytest.mark.slow
def test_a_resumed_training_looks_where_it_looked(tmp_path, caplog):
    seed_everything(1)
    whole = swapping(tmp_path / "whole", (-0.3, 0.2))
    whole.train(num_epochs=3)
    tensors, *others = outcome(whole, tmp_path / "whole")
    state = load_checkpoint(tmp_path / "whole" / "checkpoints")
    assert state["cells"] == {
        "transform": {"grid": (2, 2), "cell_offset": (-0.3, 0.2)},
        "swap": {"cell_offset": (-0.3, 0.2)},
    }
    seed_everything(1)
    swapping(tmp_path / "part", (-0.3, 0.2)).train(num_epochs=1)
    part = swapping(tmp_path / "part", (0.1, 0.0))  # as a script of another version measures it
    with caplog.at_level("INFO", "pml_tacl"):
        part.load_checkpoint()
    assert "transform: cell_offset=(-0.3, 0.2), as in the checkpoint" in caplog.text
    assert part.swap.cell_offset == part.transform.cell_offset == (-0.3, 0.2)
    part.train(part.epoch + 1, 3)
    resumed, *same_others = outcome(part, tmp_path / "part")
    assert same(tensors, resumed)
    assert others == same_others


def test_views_of_another_grid_keep_their_own_cells(tmp_path, caplog):
    swapping(tmp_path / "run", (-0.3, 0.2)).train(num_epochs=1)
    transform = SiameseTransform(2 * SIZE, grid=4, cell_offset=(-0.25, 0.25))
    larger = fresh(tmp_path / "run", transform=transform)
    larger.load_checkpoint()
    assert larger.transform.cell_offset == (-0.25, 0.25)
    assert "have a grid of (2, 2), but now it is (4, 4)" in caplog.text


@pytest.mark.slow
def test_runs_killed_and_resumed_equal_an_unbroken_one(warm):
    words = [ROOT / "benchmarks" / "resume.py", "--kills=3", "--output=-"]
    done = warm.run(words, timeout=900)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "**3 of 3 are equal.**" in done.stdout
    assert "| chosen | between records and checkpoint | 1 | nothing |" in done.stdout
    assert "| chosen | writing a checkpoint | 1 | nothing |" in done.stdout
