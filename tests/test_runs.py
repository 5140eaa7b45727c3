import errno
import json
import os
import re
import sqlite3
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_tacl.cli import run_folder as runs
from pml_tacl.utils import errors
from pml_tacl.utils.files import atomic_write


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_run_keeps_its_config(tmp_path):
    folder = runs.open_run(tmp_path / "a" / "b", {"epochs": 3, "losses": ["x"]})
    assert json.loads((folder / "run.json").read_text()) == {"epochs": 3, "losses": ["x"]}


def test_another_run_is_refused_and_left_whole(tmp_path):
    folder = runs.open_run(tmp_path / "run", {"epochs": 3})
    (folder / "metrics.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="already contains a run: give --resume"):
        runs.open_run(folder, {"epochs": 3})
    with pytest.raises(
        ValueError, match=r"other settings \(epochs\): resume with the same"
    ) as told:
        runs.open_run(folder, {"epochs": 4}, resume=True)
    assert "(epochs=3)" in str(told.value)
    assert "overwrite" not in str(told.value)
    with pytest.raises(ValueError, match="exclude each other"):
        runs.open_run(folder, {"epochs": 3}, resume=True, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", ["[1, 2]", "3", "null", "{"])
def test_a_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"it contains no readable run\.json"):
        runs.open_run(tmp_path, {"epochs": 3}, resume=True)


def test_resuming_keeps_and_overwriting_replaces(tmp_path):
    folder = runs.open_run(tmp_path / "run", {"epochs": 3})
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "epoch_0001.pt").write_text("state")
    before = contents(tmp_path)
    assert runs.open_run(folder, {"epochs": 3}, resume=True) == folder
    assert contents(tmp_path) == before
    runs.open_run(folder, {"epochs": 4}, overwrite=True)
    assert {str(p) for p in contents(folder)} == {"run.json"}
    assert json.loads((folder / "run.json").read_text()) == {"epochs": 4}


def test_checking_a_run_says_what_opening_it_would_and_reads_what_it_was_asked(tmp_path):
    runs.check_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"it contains no readable run\.json"):
        runs.read_config(tmp_path / "run")
    folder = runs.open_run(tmp_path / "run", {"epochs": 3})
    assert runs.read_config(folder) == {"epochs": 3}
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="already contains a run: give --resume"):
        runs.check_run(folder)
    with pytest.raises(ValueError, match=r"started with other settings \(epochs\)"):
        runs.check_run(folder, {"epochs": 4}, resume=True)
    runs.check_run(folder, resume=True)  # of settings not known yet
    runs.check_run(folder, {"epochs": 4}, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, flags):
    (tmp_path / "holiday.jpg").write_text("precious")
    with pytest.raises(ValueError, match="contains files, but no run"):
        runs.open_run(tmp_path, {}, **flags)
    assert contents(tmp_path) == {(tmp_path / "holiday.jpg").relative_to(tmp_path): b"precious"}
    with pytest.raises(ValueError, match="is a file"):
        runs.open_run(tmp_path / "holiday.jpg", {}, **flags)


def test_overwriting_does_not_follow_links(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    folder = runs.open_run(tmp_path / "run", {})
    (folder / "link").symlink_to(elsewhere)
    runs.open_run(folder, {}, overwrite=True)
    assert (elsewhere / "precious").read_text() == "kept"


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_write(path) as file:  # noqa: PT012
        file.write(b"half of the second")
        raise KeyError
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    (tmp_path / "ordinary").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_a_value_that_is_not_json_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "metrics.json"
    runs.write_json(path, {"é": 1.5})
    before = path.read_bytes()
    assert json.loads(before) == {"é": 1.5}
    with pytest.raises(TypeError):
        runs.write_json(path, {"tensor": torch.ones(1)})
    assert path.read_bytes() == before


def test_json_has_no_nan_and_numbers_of_numpy_are_numbers(tmp_path):
    path = tmp_path / "metrics.json"
    content = {"a": float("nan"), "b": [np.float32(0.5), -np.inf], "c": np.int64(3)}
    runs.write_json(path, content | {"d": np.bool_(True), "é": "\udcff", "e": (1, None)})

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    expected = {"a": None, "b": [0.5, None], "c": 3, "d": True, "é": "\udcff", "e": [1, None]}
    assert found == expected


def test_a_config_that_cannot_be_kept_deletes_nothing(tmp_path):
    folder = runs.open_run(tmp_path / "run", {"rate": np.float32(0.5), "size": np.int64(3)})
    assert runs.read_config(folder) == {"rate": 0.5, "size": 3}
    before = contents(tmp_path)
    with pytest.raises(TypeError, match=r"config\['loss'\] is of a type that cannot .* \(object\)"):
        runs.open_run(folder, {"loss": object()}, overwrite=True)
    assert contents(tmp_path) == before
    assert runs.open_run(folder, {"rate": np.float64(0.5), "size": 3}, resume=True) == folder


def test_settings_that_are_free_may_change_and_are_kept(tmp_path):
    folder = runs.open_run(tmp_path / "run", {"epochs": 3, "seed": 0, "images": "/old"})
    asked = {"epochs": 9, "seed": 0, "images": "/new"}
    runs.open_run(folder, asked, resume=True, free=("epochs", "images"))
    assert runs.read_config(folder) == asked
    with pytest.raises(
        ValueError, match=r"other settings \(seed\): resume with the same \(seed=0\)"
    ):
        runs.open_run(folder, asked | {"seed": 1}, resume=True, free=("epochs", "images"))
    assert runs.read_config(folder) == asked


def test_a_digest_is_of_names_and_content_wherever_they_lie(tmp_path):
    names = ["a.png", "b.png"]
    for folder, middle in (("one", b"x"), ("moved", b"x"), ("other", b"y"), ("late", b"x")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(b"same" + middle + bytes(200_000))
    (tmp_path / "late" / "b.png").write_bytes(b"samex" + bytes(199_999) + b"z")

    def digest(folder, names=names, files=None):
        return runs.digest_of(names, [tmp_path / folder / name for name in files or names])

    assert digest("one") == digest("moved")
    others = [digest("other"), digest("late"), digest("one", ["a.png", "c.png"], names)]
    assert len({digest("one"), *others}) == 4


def test_the_table_has_a_row_for_each_result():
    table = runs.metrics_table(
        {
            "raw pixels": {"recall_at_1": 0.25, "NMI": 0.5},
            "after": {"recall_at_1000": 1.0, "recall_at_8": 1.0, "NMI": 0.791, "AMI": 0.7},
            "again": {"recall_at_1": 0.8312},
        }
    )
    header, raw, after, again = table.splitlines()
    assert header.split() == ["R@1", "R@8", "R@1000", "NMI"]
    assert raw.split() == ["raw", "pixels", "25.0", "-", "-", "50.0"]
    assert after.split() == ["after", "-", "100.0", "100.0", "79.1"]
    assert again.split() == ["again", "83.1", "-", "-", "-"]
    assert len({len(line) for line in (header, raw, after, again)}) == 1


@pytest.mark.parametrize(
    "error",
    [
        errors.InputError,
        errors.InputTypeError,
        errors.DivergedError,
        errors.MissingPackageError,
        OSError,
        PermissionError,
    ],
)
def test_errors_that_a_user_can_mend_become_one_line(error, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(SystemExit) as stop, runs.one_line_errors():
        raise error("first line\n  second line")
    assert stop.value.code == "error: first line second line"
    monkeypatch.setattr("sys.argv", ["script", "--debug"])
    with pytest.raises(error, match="first line\n  second line"), runs.one_line_errors():
        raise error("first line\n  second line")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: int("x"),
        lambda: None + 1,
        lambda: [][1],
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: np.ones(2) + np.ones(3),
        lambda: __import__("pml_tacl.nothing"),
        lambda: sqlite3.connect(":memory:").execute("SELECT no such table"),
    ],
)
def test_faults_of_a_program_keep_their_traceback(wrong):
    with pytest.raises(Exception) as caught, runs.one_line_errors():  # noqa: PT011
        wrong()
    assert not isinstance(caught.value, SystemExit)


def test_the_package_raises_its_own_errors():
    """Others would end a script with a traceback."""
    plain = r"raise (ValueError|TypeError|ImportError|FloatingPointError)\("
    package = Path(runs.__file__).parents[1]
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if re.search(plain, line)
    ]
    assert found == []


def test_a_full_disk_of_the_records_becomes_one_line():
    with pytest.raises(SystemExit) as stop, runs.one_line_errors():
        raise sqlite3.OperationalError("database or disk is full")
    assert stop.value.code == "error: database or disk is full"


def test_interrupts_keep_their_code():
    with pytest.raises(SystemExit) as stop, runs.one_line_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130


def test_a_seed_fixes_all_three_generators():
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    runs.seed_everything(3)
    first = draw()
    runs.seed_everything(3)
    assert draw() == first
    assert len(set(first)) == 3


def test_versions_name_the_core_dependencies():
    found = runs.versions()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert set(found) >= {"python", "pml_tacl", "pytorch-metric-learning", "timm", "faiss-cpu"}


def test_hooks_write_csv_and_sqlite_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    hooks = runs.make_hooks(tmp_path / "records")
    hooks.record_keeper.update_records({"loss": 1.5}, 0, parent_name="loss_histories")
    hooks.record_keeper.save_records()
    assert hooks.get_loss_history() == {"~iteration~": [0], "loss": [1.5]}
    assert "1.5" in (tmp_path / "records" / "loss_histories.csv").read_text()


@pytest.mark.parametrize(
    ("groups", "tables"),
    [
        (["0_NTXentLoss", "1_NTXentLoss"], ["_0_NTXentLoss", "_1_NTXentLoss"]),
        (["my loss_A", "x_A"], ["my_loss_A", "x_A"]),
        (["../x_A", "a'b\"]_A"], [".*___x_A", "a_b___A"]),
        (["a b_A", "a_b_A", "A_B_A"], ["a_b_A", r"a_b_A_\w{8}", r"A_B_A_\w{8}"]),
    ],
)
def test_records_of_any_name_are_written_apart(tmp_path, groups, tables):
    for start in (0, len(groups)):  # as a resumed run does
        keeper = runs.make_hooks(tmp_path / "records").record_keeper
        for at, group in enumerate(groups, start):
            keeper.update_records({"margin": at / 2}, at, parent_name=group)
        keeper.save_records()
    found = sorted(path.stem for path in (tmp_path / "records").glob("*.csv"))
    assert len(found) == len(groups)
    for at, table in enumerate(tables):
        (name,) = (name for name in found if re.fullmatch(table, name))
        rows = keeper.query(f"SELECT margin FROM [{name}]")
        assert [row["margin"] for row in rows] == [at / 2, (at + len(groups)) / 2]
    assert not list(tmp_path.glob("*.csv"))


def test_a_pipe_that_is_not_the_output_is_an_error_in_a_line():
    with pytest.raises(SystemExit, match=r"error: .*Broken pipe"), runs.one_line_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_an_output_that_nobody_reads_ends_silently(warm):
    reading, writing = os.pipe()
    os.close(reading)
    code = "from pml_tacl.cli.run_folder import one_line_errors\n"
    code += "with one_line_errors():\n    print('x', flush=True)"
    with open(writing, "wb") as output:
        process = warm.start(["-c", code], stdout=output)
    assert process.wait() == 141
    assert process.errors() == ""
