import os
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.warm import Warm

# The process that shares out the tests runs none, so torch is not imported for it.
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one process for each core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)

# Last: its files have names as common as "losses".
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


def pytest_addoption(parser):
    parser.addoption("--device", default="", help="of the fixture `device`; left out: a GPU if any")
    parser.addoption(
        "--dtype",
        default="float32,bfloat16,float16",
        help="of the fixture `dtype`: one or more with commas between, a test for each",
    )


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames and metafunc.definition.get_closest_marker("gpu"):
        given = metafunc.definition.iter_markers("parametrize")
        if not any("dtype" in str(mark.args[0]) for mark in given):
            import torch

            names = metafunc.config.getoption("dtype").split(",")
            metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=str)


def pytest_configure(config):
    # Keep the order of `pytest_collection_modifyitems`. xdist sorts files by their number of tests,
    # so that one process would still run a few long ones when the others have ended.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Run the files with the most slow tests first."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def device(request):
    """Where tests of the marker gpu run."""
    import torch

    name = request.config.getoption("device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture
def cuda(device):
    """The same for tests that say nothing on a CPU."""
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    return device


@pytest.fixture(scope="session")
def warm():
    """Starts processes that need not import torch and pml_tacl."""
    with closing(Warm()) as server:
        yield server


@pytest.fixture(scope="module")
def one_thread():
    """Sums come out the same each time, and small nets gain nothing from more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def empty_figures(monkeypatch):
    """Write empty figures in the place of those of a training, which take as long as it takes."""
    from matplotlib.figure import Figure

    for name in ("attention_overlay", "recall_curve", "retrieval_gallery", "training_curves"):
        monkeypatch.setattr(f"pml_tacl.visualize.{name}", lambda *_, **__: Figure((1, 1)))


@pytest.fixture(scope="module")
def few_channels():
    """Reduce feature maps to 16 channels instead of 64, for projections that take no time to fit.

    The eigenvectors of 2080 features take more time than the training of a small model. A process
    that a test starts does not see this: it cannot load the models of such a test.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in ("covariance", "projection"):
            patch.setattr(f"pml_tacl.models.{module}.CHANNELS", 16)
        yield
