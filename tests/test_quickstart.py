import importlib.util
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from pml_tacl import AttentionEmbedder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "few_channels")]
SCRIPT = Path(__file__).parent.parent / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    """The script with the smallest settings that still take every step."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MODEL |= {"channels": [8, 8, 16, 16], "stem_width": 8}
    module.CONFIG |= {"num_clusters": 20, "epochs": 2, "warmup_epochs": 1, "batch_size": 32}
    original = module.Glyphs
    module.Glyphs = lambda split: original(split, num_classes=12)
    return module


def run(module, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
        module.main()


@pytest.fixture(scope="module")
def whole(quickstart, tmp_path_factory):
    """A run that nothing has stopped, and what it has printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "whole"
    printed = io.StringIO()
    with redirect_stdout(printed):
        run(quickstart, "--run", folder)
    return folder, printed.getvalue()


@pytest.fixture
def no_figures(quickstart, monkeypatch):
    """Figures take half of the time of a run."""
    monkeypatch.setattr(quickstart.TrainingRun, "draw", lambda *_, **__: None)


def test_the_quickstart_writes_everything(quickstart, whole):
    folder, printed = whole
    for word in ("raw_pixels", "before", "after", "R@1", "MAP@R", "NMI", "12 unseen characters"):
        assert word in printed
    names = {p.name for p in folder.iterdir()}
    assert names >= {"metrics.json", "model", "records", "checkpoints", "gallery.png"}
    assert {"curves.png", "recall.png", "attention.png"} <= names
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"raw_pixels", "before", "after", "config", "versions"}
    for row in ("raw_pixels", "before", "after"):
        assert {"recall_at_1", "recall_at_8", "mean_average_precision_at_r", "NMI"} <= set(
            metrics[row]
        )
        assert all(0 <= value <= 1 for value in metrics[row].values())
    assert (folder / "records" / "loss_histories.csv").stat().st_size > 100
    AttentionEmbedder.from_pretrained(folder / "model")
    with pytest.raises(ValueError, match="already contains a run"):
        run(quickstart, "--run", folder)


def test_training_labels_are_never_read(quickstart, whole, no_figures, monkeypatch, tmp_path):
    small = quickstart.Glyphs

    def without_labels(split):
        half = small(split)
        half.preload(progress=False)  # rendering reads the labels, training must not
        if split == "train":
            half.labels[:] = 0
        return half

    monkeypatch.setattr(quickstart, "Glyphs", without_labels)
    run(quickstart, "--run", tmp_path / "without")
    first, second = (
        json.loads((folder / "metrics.json").read_text())["after"]
        for folder in (whole[0], tmp_path / "without")
    )
    assert first == second


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_was_stopped_goes_on_and_no_flag_harms_it(
    quickstart, whole, monkeypatch, tmp_path, capsys
):
    """Stopped, resumed, then asked for with bad flags: in the end all as if never stopped."""
    step = quickstart.pml_tacl.UnsupervisedTrainer.forward_and_backward

    def stopped(trainer):
        if trainer.epoch == 2:
            raise KeyboardInterrupt
        step(trainer)

    command = ["--run", tmp_path / "run"]
    with monkeypatch.context() as patch:
        trainer = quickstart.pml_tacl.UnsupervisedTrainer
        patch.setattr(trainer, "forward_and_backward", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(quickstart, *command)
    run(quickstart, *command, "--resume")
    ended, expected = contents(tmp_path / "run"), contents(whole[0])
    same = {path for path in expected if path.suffix not in (".pt", ".db")}
    assert {path for path in ended if path.suffix not in (".pt", ".db")} == same
    assert [path for path in sorted(same) if ended[path] != expected[path]] == []
    for flag, message in (
        ("--batch-size=99999", "batch_size must be from 1"),
        ("--num-clusters=4", "needs 8 clusters, got 4"),
        ("--learning-rate=inf", "must be finite"),
        ("--backbone=vit_tiny", "unrecognized arguments"),
        ("--images-per-cluster=3", "images_per_cluster must divide batch_size"),
        ("--resume", "--resume and --overwrite) exclude each other"),
    ):
        with pytest.raises((ValueError, SystemExit)) as caught:
            run(quickstart, *command, "--overwrite", flag)
        assert message in f"{caught.value} {capsys.readouterr().err}"
    assert contents(tmp_path / "run") == ended
    capsys.readouterr()
    monkeypatch.setattr(quickstart.TrainingRun, "draw", lambda *_, **__: None)
    run(quickstart, *command, "--overwrite", "--epochs=1", "--amp=bfloat16")
    assert "after" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"]["epochs"] == 1
