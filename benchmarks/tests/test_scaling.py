"""The arithmetic behind docs/scaling.md."""

import numpy as np
import pytest
from scaling import GPUS
from scaling_parts import runs
from scaling_parts.clusters import rows, two_level
from scaling_parts.config import PLANS
from scaling_parts.fits import Fit, fitted
from scaling_parts.page import report
from scaling_parts.terms import TERMS, Term

from pml_tacl import KMeansPseudoLabeler


def test_the_largest_size_is_predicted_from_the_smaller():
    term = Term(None, lambda n, k: n * k, [], "")
    found = [{"n": n, "k": 10, "seconds": 2.0 + 3.0 * 10 * n} for n in (1, 2, 8)]
    fit = fitted(term, found, "seconds")
    assert fit == pytest.approx((2.0, 3.0, 0.0, 80.0), abs=1e-6)
    found[-1]["seconds"] *= 2  # the smaller ones know nothing of it
    assert fitted(term, found, "seconds").missed == pytest.approx(-0.5)


def test_draws_spread_with_the_error_and_the_decades():
    fit = Fit(0.0, 1.0, -0.2, 100.0)
    rng = np.random.default_rng(0)
    near, far = (np.log(fit.draw(work, rng, 20_000)) for work in (100.0, 10_000.0))
    assert np.median(near) == pytest.approx(np.log(100), abs=0.01)
    assert near.std() == pytest.approx(0.2, rel=0.03)
    assert far.std() == pytest.approx(0.4, rel=0.03)


def test_two_levels_give_as_many_clusters_and_nearly_as_tight():
    embeddings = rows(1_000)
    found = two_level(embeddings, 64)
    assert len(found.labels) == 1_000
    assert 56 <= len(found.centroids) <= 72
    flat = KMeansPseudoLabeler(64)(embeddings)
    assert found.distances.mean() < 1.2 * flat.distances.mean()


@pytest.mark.slow
def test_the_steps_of_the_network_run(monkeypatch):
    monkeypatch.setattr(runs, "BACKBONE", "test_resnet")
    for run in (runs.embed(8, 0), runs.train(4, 0), runs.decode(1, 0)):
        run()


def test_the_page_names_every_size_and_says_what_is_assumed():
    results = {
        name: [
            {"n": n, "k": k, "seconds": 1e-6 * term.work(n, k) + 0.1, "bytes": 1e3 * n}
            for n, k in term.sizes
        ]
        for name, term in TERMS.items()
    }
    page = report(results, {"flat": 0.5, "levels": 0.6}, 60.0, GPUS)
    for n in PLANS:
        assert f"{n:,}".replace(",", " ") in page
    assert "**Assumed, not measured**" in page
    assert "nan" not in page.split("## Measured")[1]
