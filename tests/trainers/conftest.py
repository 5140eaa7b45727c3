import pytest

from pml_tacl.runs import seed_everything


@pytest.fixture(autouse=True)
def seeded():
    """PML's samplers draw from NumPy's generator, which nobody else seeds."""
    seed_everything(0)
