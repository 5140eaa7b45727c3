"""Fixtures of the tests in `tests/`, which the tests of the benchmarks use, too."""

from tests.conftest import few_channels, one_thread  # noqa: F401
