import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.distances import DotProductSimilarity, LpDistance

from pml_tacl import AttentionConsistencyLoss, AttentionConsistencyMiner
from tests import references as slow

DISTANCES = {
    "cosine": (lambda: None, slow.DISTANCES["cosine"]),
    "dot": (lambda: DotProductSimilarity(normalize_embeddings=False), slow.DISTANCES["dot"]),
    "euclidean": (lambda: LpDistance(normalize_embeddings=False), slow.DISTANCES["euclidean"]),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@slow.examples
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(sorted(DISTANCES)),
    st.booleans(),
)
def test_pairs_are_the_most_alike_of_each_cluster(seed, n, per_anchor, name, use_reference):
    make, measure = DISTANCES[name]
    maps, reference = normal(n, 5, 2, 3, seed=seed), normal(6, 5, 3, 1, seed=seed + 1)
    labels = torch.randint(-1, 3, (n,), generator=torch.Generator().manual_seed(seed))
    ref_labels = torch.tensor([0, 1, -1, 0, 1, 0])
    miner = AttentionConsistencyMiner(per_anchor, distance=make())
    if not use_reference:
        reference, ref_labels = maps, labels
    a, p, *negatives = miner(maps, labels, *((reference, ref_labels) if use_reference else ()))
    rows, others = (slow.as_array(x).mean(axis=(2, 3)) for x in (maps, reference))
    wanted = set()
    for i in range(n):
        ranked = sorted(
            (measure(rows[i], others[j]), j)
            for j in range(len(others))
            if labels[i] >= 0 and labels[i] == ref_labels[j] and (use_reference or i != j)
        )
        wanted |= {(i, j) for _, j in ranked[:per_anchor]}
    assert set(zip(a.tolist(), p.tolist(), strict=True)) == wanted
    assert len(a) == len(wanted)
    assert [len(x) for x in negatives] == [0, 0]


def test_the_loss_takes_its_pairs():
    maps, labels = normal(6, 5, 2, 3), torch.tensor([0, 0, 0, 1, -1, -1])
    miner = AttentionConsistencyMiner()
    mined = miner(maps, labels)
    assert mined[0].tolist() == [0, 1, 2]
    assert miner.num_pos_pairs == 3
    points = torch.zeros(6, 6, 2, dtype=torch.float64)
    loss = AttentionConsistencyLoss()
    value = loss(maps, maps, points, labels, mined)
    torch.testing.assert_close(value, loss(maps, maps, points, indices_tuple=mined))
    assert value > 0


@pytest.mark.parametrize("n", [0, 1])
def test_no_image_and_one_give_no_pair(n):
    mined = AttentionConsistencyMiner()(normal(n, 5, 2, 3), torch.zeros(n, dtype=torch.long))
    assert [x.shape for x in mined] == [(0,)] * 4
    assert all(x.dtype == torch.long for x in mined)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_floating_types_and_layouts_give_the_same_pairs(dtype):
    maps, labels = normal(20, 32, 2, 3).to(dtype), torch.arange(20) // 5
    wanted = [x.tolist() for x in AttentionConsistencyMiner()(maps.double(), labels)]
    miner = AttentionConsistencyMiner()
    last = maps.contiguous(memory_format=torch.channels_last)
    for given_maps in (maps, last, maps.transpose(2, 3).contiguous().transpose(2, 3)):
        assert [x.tolist() for x in miner(given_maps, labels)] == wanted


def test_autocast_changes_nothing():
    # So alike that bf16 could not tell them apart.
    maps = (1 + 0.01 * normal(20, 32, 2, 3)).float()
    labels, miner = torch.arange(20) // 5, AttentionConsistencyMiner()
    wanted = [x.tolist() for x in miner(maps, labels)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [x.tolist() for x in miner(maps, labels)] == wanted


def test_a_nan_image_gets_no_pair():
    maps = normal(3, 5, 2, 3)
    maps[1] = torch.nan
    a, p, *_ = AttentionConsistencyMiner(2)(maps, torch.zeros(3, dtype=torch.long))
    assert list(zip(a.tolist(), p.tolist(), strict=True)) == [(0, 2), (2, 0)]


def test_wrong_arguments_are_named():
    for wrong in (0, 1.5, None):
        with pytest.raises(ValueError, match=f"pairs_per_anchor must be an .* 1, got {wrong}"):
            AttentionConsistencyMiner(wrong)
    with pytest.raises(ValueError, match=r"feature_maps must be \(N, C, H, W\), got \(4, 5\)"):
        AttentionConsistencyMiner()(normal(4, 5), torch.arange(4))
