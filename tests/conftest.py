import sys
from pathlib import Path

import pytest
import torch

# Last: its files have names as common as "losses".
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture(scope="module")
def one_thread():
    """Sums come out the same each time, and small nets gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
