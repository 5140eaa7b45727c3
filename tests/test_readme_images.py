"""examples/readme_images.py, from the model of a run."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_tacl import AttentionEmbedder

SCRIPT = Path(__file__).parent.parent / "examples" / "readme_images.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("images", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pair", [-1, 8])
def test_a_pair_that_is_not_shown_is_named(script, monkeypatch, tmp_path, pair):
    monkeypatch.setattr(sys, "argv", ["readme_images.py", str(tmp_path), f"--pair={pair}"])
    with pytest.raises(ValueError, match=f"pair must be from 0 to 7, got {pair}"):
        script.main()


@pytest.mark.slow
def test_four_images_the_same_each_time(script, monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    model = AttentionEmbedder("resnet10t", embedding_dim=16, channels=[8, 8, 16, 16], stem_width=8)
    model.eval().save_pretrained(tmp_path / "run" / "model")
    for folder in ("first", "second"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "readme_images.py",
                str(tmp_path / "run"),
                "--out",
                str(tmp_path / folder),
                "--classes=6",
            ],
        )
        script.main()
    names = ["attention.png", "gallery.png", "pair.png", "similar.png"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == names
    for name in names:
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        pixels = np.asarray(Image.open(first).convert("RGB"))
        assert pixels.shape[0] > 150
        assert pixels.shape[1] > 500
        assert pixels.std() > 20
    assert capsys.readouterr().out.count(".png") == 8


def test_a_folder_without_a_model(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["readme_images.py", str(tmp_path)])
    with pytest.raises(
        FileNotFoundError, match=r"contains no config\.json, so it is not a saved model"
    ):
        script.main()
