import runpy
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parents[1] / "losses.py"


def test_the_table_of_the_losses_is_written(tmp_path, monkeypatch):
    output = tmp_path / "new" / "losses.md"
    arguments = ["--only", "miners", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as "python benchmarks/losses.py" has it
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = output.read_text()
    assert torch.__version__.partition("+")[0] in table
    assert "| MultiSimilarityMiner | 1.00 x |" in table
    assert "| AttentionConsistencyMiner, 512 x 7 x 7 |" in table
