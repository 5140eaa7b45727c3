import importlib.util
import json
import sys
from pathlib import Path

import pytest

from pml_tacl import AttentionEmbedder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SCRIPT = Path(__file__).parent.parent / "examples" / "quickstart.py"


@pytest.fixture
def quickstart(monkeypatch):
    """The script with the smallest settings that still take every step."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    thin = {"channels": [8, 8, 16, 16], "stem_width": 8}
    monkeypatch.setattr(module, "MODEL", {**module.MODEL, **thin})
    small = {"num_clusters": 20, "epochs": 2, "warmup_epochs": 1, "batch_size": 32}
    monkeypatch.setattr(module, "CONFIG", {**module.CONFIG, **small})
    original = module.Glyphs
    monkeypatch.setattr(module, "Glyphs", lambda split: original(split, num_classes=12))
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
    module.main()


def test_the_quickstart_writes_everything_and_repeats_itself(
    quickstart, monkeypatch, tmp_path, capsys
):
    run(quickstart, monkeypatch, "--run", tmp_path / "first")
    printed = capsys.readouterr().out
    for word in ("raw_pixels", "before", "after", "R@1", "MAP@R", "NMI", "12 unseen characters"):
        assert word in printed
    names = {p.name for p in (tmp_path / "first").iterdir()}
    assert names >= {"metrics.json", "model", "records", "checkpoints", "gallery.png"}
    assert {"curves.png", "recall.png", "attention.png"} <= names
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert set(metrics) == {"raw_pixels", "before", "after", "config", "versions"}
    for row in ("raw_pixels", "before", "after"):
        assert {"recall_at_1", "recall_at_8", "mean_average_precision_at_r", "NMI"} <= set(
            metrics[row]
        )
        assert all(0 <= value <= 1 for value in metrics[row].values())
    assert (tmp_path / "first" / "records" / "loss_histories.csv").stat().st_size > 100
    AttentionEmbedder.from_pretrained(tmp_path / "first" / "model")

    run(quickstart, monkeypatch, "--run", tmp_path / "second")
    assert (tmp_path / "second" / "metrics.json").read_bytes() == (
        tmp_path / "first" / "metrics.json"
    ).read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        run(quickstart, monkeypatch, "--run", tmp_path / "first")


def test_training_labels_are_never_read(quickstart, monkeypatch, tmp_path):
    small = quickstart.Glyphs

    def without_labels(split):
        half = small(split)
        half.preload(progress=False)  # rendering reads the labels, training must not
        if split == "train":
            half.labels[:] = 0
        return half

    run(quickstart, monkeypatch, "--run", tmp_path / "with")
    monkeypatch.setattr(quickstart, "Glyphs", without_labels)
    run(quickstart, monkeypatch, "--run", tmp_path / "without")
    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text())["after"]
        for name in ("with", "without")
    )
    assert first == second


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_was_stopped_goes_on_and_no_flag_harms_it(
    quickstart, monkeypatch, tmp_path, capsys
):
    """Stopped, resumed, then asked for with bad flags: in the end all as if never stopped."""
    step = quickstart.pml_tacl.UnsupervisedTrainer.forward_and_backward

    def stopped(trainer):
        if trainer.epoch == 2:
            raise KeyboardInterrupt
        step(trainer)

    run(quickstart, monkeypatch, "--run", tmp_path / "whole", "--amp=bfloat16")
    command = ["--run", tmp_path / "run", "--amp=bfloat16"]
    with monkeypatch.context() as patch:
        trainer = quickstart.pml_tacl.UnsupervisedTrainer
        patch.setattr(trainer, "forward_and_backward", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(quickstart, monkeypatch, *command)
    run(quickstart, monkeypatch, *command, "--resume")
    ended, whole = contents(tmp_path / "run"), contents(tmp_path / "whole")
    same = {path for path in whole if path.suffix not in (".pt", ".db")}
    assert {path for path in ended if path.suffix not in (".pt", ".db")} == same
    assert [path for path in sorted(same) if ended[path] != whole[path]] == []
    for flag, message in (
        ("--batch-size=99999", "batch_size must be from 1"),
        ("--num-clusters=4", "4 clusters are fewer than the 8"),
        ("--learning-rate=inf", "must be finite"),
        ("--backbone=vit_tiny", "unrecognized arguments"),
        ("--images-per-cluster=3", "images_per_cluster must divide batch_size"),
        ("--resume", "--resume and --overwrite) exclude each other"),
    ):
        with pytest.raises((ValueError, SystemExit)) as caught:
            run(quickstart, monkeypatch, *command, "--overwrite", flag)
        assert message in f"{caught.value} {capsys.readouterr().err}"
    assert contents(tmp_path / "run") == ended
    capsys.readouterr()
    run(quickstart, monkeypatch, *command, "--overwrite", "--epochs=1")
    assert "after" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"]["epochs"] == 1
