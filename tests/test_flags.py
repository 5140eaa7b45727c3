"""Flags of scripts that train: every setting has one, and every flag changes its setting."""

import argparse
import json
from pathlib import Path

import pytest

from pml_tacl.cli import flags, parsers
from pml_tacl.cli import run_folder as runs

CONFIG = {
    "run": "runs/it", "weights": "pretrained", "num_clusters": "auto", "epochs": 3,
    "image_size": None, "swap": True, "strict": False, "workers": 2, "learning_rate": 1e-3,
    "loss_weights": {"metric_loss": 1.0},
}  # fmt: skip


def parse(*arguments, config=CONFIG, **own):
    parser = flags.training_parser("Train.\n\nAt length.", config)
    for name, settings in own.items():
        parser.add_argument(name, **settings)
    return parser.parse_args([str(argument) for argument in arguments])


def test_without_flags_all_is_as_the_script_says():
    args = parse()
    said = {**CONFIG, "run": Path("runs/it"), "weights": True, "resume": False, "overwrite": False}
    said["debug"] = False
    assert vars(args) == said
    assert args.loss_weights is CONFIG["loss_weights"]


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--weights=none", "weights", False),
        ("--weights=/a/../file.pth", "weights", str(Path("/file.pth"))),
        ("--num-clusters=12", "num_clusters", 12),
        ("--num-clusters=auto", "num_clusters", "auto"),
        ("--epochs=1", "epochs", 1),
        ("--image-size=64", "image_size", 64),
        ("--no-swap", "swap", False),
        ("--strict", "strict", True),
        ("--learning-rate=0.5", "learning_rate", 0.5),
        ("--run=elsewhere", "run", Path("elsewhere")),
        ("--resume", "resume", True),
        ("--overwrite", "overwrite", True),
        ("--debug", "debug", True),
    ],
)
def test_a_flag_changes_its_setting_alone(flag, name, value):
    changed = vars(parse(flag))
    assert changed == {**vars(parse()), name: value}
    assert type(changed[name]) is type(value)


@pytest.mark.parametrize("name", flags._FLAGS)
def test_each_known_setting_is_explained(name, capsys):
    with pytest.raises(SystemExit):
        parse("--help-all", config={name: True if flags._FLAGS[name][0] is bool else "1"})
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("(default: True)") + said.count("(default: 1)") == 1
    assert f"--{name.replace('_', '-')}" in said
    assert flags._FLAGS[name][1].partition("; default: ")[0] in said
    assert "Train." in said
    assert "At length." not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs=-1"], "argument --epochs: must be a whole number of at least 0, got -1"),
        (["--epochs=two"], "argument --epochs: must be a whole number of at least 0, got two"),
        (
            ["--image-size=-3"],
            "argument --image-size: must be a whole number of at least 1, got -3",
        ),
        (["--workers=-1"], "argument --workers: must be a whole number of at least 0, got -1"),
        (
            ["--learning-rate=nan"],
            "argument --learning-rate: must be finite and at least 0, got nan",
        ),
        (
            ["--learning-rate=inf"],
            "argument --learning-rate: must be finite and at least 0, got inf",
        ),
        (["--learning-rate=-1"], "argument --learning-rate: must be finite and at least 0, got -1"),
        (["--num-clusters=-4"], "argument --num-clusters: must be a number or auto, got '-4'"),
        (["--learning-rate=fast"], "argument --learning-rate: must be a number, got 'fast'"),
        (["--over"], "unrecognized arguments: --over"),
        (["--batch-size=3"], "unrecognized arguments: --batch-size=3"),
        (["more"], "unrecognized arguments: more"),
    ],
)
def test_what_is_refused_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop, runs.one_line_errors():
        parse(*arguments)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message} (flags: --help)\n")


def test_settings_are_what_a_run_is_begun_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"images": {"type": Path}, "--eval-folder": {"type": Path}}
    settings = flags.settings_of(parse("images", **own))
    assert settings["images"] == str((tmp_path / "images").resolve())
    assert settings["eval_folder"] is None
    kept = {"weights", "num_clusters", "epochs", "image_size", "swap", "learning_rate"}
    assert set(settings) == {*kept, "loss_weights", "images", "eval_folder"}
    assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize(
    "flag", ["--workers=0", "--strict", "--resume", "--debug", "--run=runs/../runs/it"]
)
def test_a_run_goes_on_with_what_changes_nothing_of_it(flag):
    assert flags.settings_of(parse(flag)) == flags.settings_of(parse())


def test_the_parser_takes_arguments_of_the_scripts_own():
    assert isinstance(flags.training_parser("Train.", {}), argparse.ArgumentParser)
    assert parse("here", root={"type": Path}).root == Path("here")


@pytest.mark.parametrize("content", ["[]", '{"images": 3}', "{"])
def test_a_run_that_cannot_be_read_gives_no_settings(tmp_path, content, capsys):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit):
        parsers.parse("train", ["--resume", "--run", str(tmp_path)])
    assert "contains no run to resume" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "4294967296", "a"])
def test_seeds_are_those_that_numpy_takes(tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        parsers.parse("report", ["run", "--seed", text])
    assert "at least 0 and at most 4294967295" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run=3", "seed=1/out=2", "/x/run=a"])
def test_names_of_folders_stay(name):
    assert flags.by_flags(f"{name} contains no index") == f"{name} contains no index"


def test_command_lines_can_be_pasted():
    words = flags.command_line("search", "MY PHOTOS; RM", "QUERY")
    assert words == "pml-tacl search 'MY PHOTOS; RM' QUERY"


@pytest.mark.parametrize(("saved", "given"), [([64, 64], 64), ([64, 32], None)])
def test_a_resumed_run_has_its_image_size(tmp_path, saved, given):
    config = {"images": str(tmp_path), "image_size": saved}
    (tmp_path / "run.json").write_text(json.dumps(config))
    args = parsers.parse("train", ["--resume", "--run", str(tmp_path)])
    assert args.image_size == given  # None is the backbone's own size, which alone is not square
