import signal

import pytest

from pml_tacl.cli.run_folder import seed_everything


@pytest.fixture(autouse=True)
def seeded():
    """PML's samplers draw from NumPy's generator, which nobody else seeds."""
    seed_everything(0)


@pytest.fixture(autouse=True)
def ctrl_c_as_ever():
    """A shell that starts the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
