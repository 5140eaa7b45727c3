"""Labels of any type mean what the same int64 labels mean, or are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
)
from pml_tacl.functional import background_score
from pml_tacl.utils.labels import pseudo_labels

N = 8
_GENERATOR = torch.Generator().manual_seed(0)
EMBEDDINGS = torch.randn(N, 6, generator=_GENERATOR)
MAPS, OTHERS = torch.randn(2, N, 5, 3, 3, generator=_GENERATOR)
POINTS = torch.rand(N, 9, 2, generator=_GENERATOR) * 2 - 1
CENTROIDS = torch.randn(256, 6, generator=_GENERATOR)


def with_centroids(part):
    part.set_centroids(CENTROIDS)
    return part


def moved(labels):
    loss = with_centroids(ContrastiveClusteringLoss())
    loss.move_centroids(EMBEDDINGS, labels, 0.3)
    return loss.centroids


CALLS = {
    "loss, means": lambda y: ContrastiveClusteringLoss(1.0)(EMBEDDINGS, y),
    "loss, centroids": lambda y: with_centroids(ContrastiveClusteringLoss(1.0))(EMBEDDINGS, y),
    "loss, reference": lambda y: ContrastiveClusteringLoss(1.0)(
        EMBEDDINGS, torch.arange(N) % 3, None, EMBEDDINGS.flip(0), y
    ),
    "moving centroids": moved,
    "attention loss": lambda y: AttentionConsistencyLoss()(MAPS, OTHERS, POINTS, y),
    "attention loss, pairs": lambda y: AttentionConsistencyLoss()(
        MAPS, OTHERS, POINTS, y, AttentionConsistencyMiner()(MAPS, y)
    ),
    "miner, means": lambda y: ContrastiveClusteringMiner()(EMBEDDINGS, y),
    "miner, centroids": lambda y: with_centroids(ContrastiveClusteringMiner())(EMBEDDINGS, y),
    "miner, reference": lambda y: ContrastiveClusteringMiner()(
        EMBEDDINGS, torch.arange(N) % 3, EMBEDDINGS.flip(0), y
    ),
    "attention miner": lambda y: AttentionConsistencyMiner()(MAPS, y),
    "attention miner, reference": lambda y: AttentionConsistencyMiner()(
        MAPS, torch.arange(N) % 3, OTHERS, y
    ),
    "background_score": lambda y: background_score(MAPS, y),
}
WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
         torch.uint32, torch.uint64)  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def outcome(call, labels):
    """What a call gives, or None if it refuses the labels, which it does in one line."""
    try:
        found = call(labels)
    except ValueError as error:
        return None if "labels" in str(error) and "\n" not in str(error) else [error]
    return list(found) if isinstance(found, tuple) else [found]


def means(labels):
    """The same labels as int64, or None where there are none."""
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if any(isinstance(value, str) or value != value or value % 1 for value in values):
        return None
    return None if min(values) < -1 else torch.tensor([int(value) for value in values])


@st.composite
def labels(draw):
    kind = draw(st.sampled_from(("whole", "float", "fraction", "bool", "array", "list", "string")))
    low = draw(st.sampled_from((-9, -2, -1, 0)))
    values = draw(st.lists(st.integers(low, 5), min_size=N, max_size=N))
    if kind == "whole":
        dtype = draw(st.sampled_from(WHOLE))
        signed = torch.iinfo(dtype).min < 0
        return torch.tensor([v if signed else abs(v) for v in values]).to(dtype)
    if kind == "bool":
        return torch.tensor([v > 1 for v in values])
    if kind == "string":
        return [str(v) for v in values]
    if kind == "list":
        return values
    if kind == "array":
        return np.array(values, dtype=draw(st.sampled_from(("i1", "i8", "f4", "f8"))))
    floats = torch.tensor(values, dtype=draw(st.sampled_from(FLOATS)))
    if kind == "fraction":
        odd = draw(st.sampled_from((0.5, 0.1, -0.25, float("nan"), float("inf"), -float("inf"))))
        floats[draw(st.integers(0, N - 1))] += odd
    return floats


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(labels(), st.sampled_from(sorted(CALLS)))
def test_labels_of_any_type_mean_what_int64_labels_mean(given_labels, name):
    expected = means(given_labels)
    found = outcome(CALLS[name], given_labels)
    if expected is None:
        assert found is None
        return
    assert found is not None
    for one, other in zip(found, outcome(CALLS[name], expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (torch.arange(N) - 2, "got -2"),
        (torch.arange(N) / 10, "got 0.1"),
        (torch.full((N,), torch.nan), "got nan"),
        (torch.full((N,), torch.inf), "got inf"),
        (torch.full((N,), 1e30), "got 1.0"),
        (torch.full((N,), 2**64 - 1, dtype=torch.uint64), "got 18446744073709551615"),
        (torch.zeros(N, dtype=torch.complex64), "got 0j"),
        (["cat"] * N, "got 'cat'"),
        ([None] * N, "got None"),
    ],
)
def test_what_is_no_label_is_refused_by_name(name, wrong, shown):
    argument = "ref_labels" if "reference" in name else "labels"
    with pytest.raises(
        ValueError, match=rf"^{argument} must be whole numbers, .*{shown}.*: number"
    ):
        CALLS[name](wrong)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [*WHOLE, *FLOATS, torch.bool, np.int16, np.float32, list])
def test_whole_numbers_of_every_type_are_the_same_labels(name, dtype):
    y = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0])
    same = y.tolist() if dtype is list else y.numpy().astype(dtype) if dtype in (
        np.int16, np.float32) else y.to(dtype)  # fmt: skip
    for found, expected in zip(outcome(CALLS[name], same), outcome(CALLS[name], y), strict=True):
        assert torch.equal(found, expected)


def test_labels_are_not_checked_where_they_are_not_there_to_be_read():
    meta = torch.zeros(3, dtype=torch.int32, device="meta")
    assert pseudo_labels(meta).dtype == torch.int64

    @torch.compile(backend="eager", fullgraph=True)
    def as_taken(labels):
        return pseudo_labels(labels) + 1

    assert as_taken(torch.tensor([-1, 3], dtype=torch.int32)).tolist() == [0, 4]
    assert pseudo_labels(torch.empty(0)).shape == (0,)
