"""Ranks, labels and galleries of retrieval against what exact arithmetic and plain loops give."""

import logging
import math
from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from pml_tacl import RetrievalCalculator
from pml_tacl.callbacks import Evaluate
from pml_tacl.distributed.inference import evaluate_distributed
from pml_tacl.evaluation import embed, evaluate, nearest
from pml_tacl.utils.copies import first_copies
from pml_tacl.utils.precision import full_float32

ENGINES = {"faiss": nearest.faiss_engine, "torch": nearest.torch_engine}
BOTH = pytest.mark.parametrize("engine", ["faiss", "torch"])


def precision_at_1(embeddings, labels, engine, **kwargs):
    calculator = RetrievalCalculator("precision_at_1", engine=engine, device="cpu", **kwargs)
    return calculator.get_accuracy(embeddings, labels)["precision_at_1"]


def exact_precision_at_1(embeddings, labels):
    rows = embeddings.double()
    distances = torch.stack([(rows - row).square().sum(1) for row in rows])
    distances.fill_diagonal_(torch.inf)
    return (labels[distances.argmin(1)] == labels).double().mean().item()


def groups(count=60, members=5, dim=32, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    labels = torch.arange(count).repeat_interleave(members)
    noise = torch.randn(count * members, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + spread * noise, labels


@BOTH
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e4, -1e5])
def test_a_common_offset_changes_no_rank(engine, offset):
    embeddings, labels = groups()
    embeddings = (embeddings + offset).float()
    assert exact_precision_at_1(embeddings, labels) == 1
    assert precision_at_1(embeddings, labels, engine) == 1


@BOTH
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-20, 1e15, 1e19, 1e20, 1e37])
def test_no_scale_changes_a_rank(engine, scale):
    embeddings, labels = groups(spread=0.1)
    embeddings = (embeddings * scale).float()
    assert precision_at_1(embeddings, labels, engine) == 1


@BOTH
def test_double_embeddings_are_ranked_as_given(engine):
    embeddings, labels = groups()
    # In float32 all of these are one row.
    assert precision_at_1(1e9 + embeddings, labels, engine) == 1
    assert precision_at_1(1e200 * embeddings, labels, engine) == 1


@BOTH
def test_an_outlier_leaves_the_others_their_ranks(engine):
    embeddings, labels = groups()
    embeddings[7] = 1e20
    labels[7] = 1000
    for rows in (embeddings.float(), (embeddings + 1000).float()):
        calculator = RetrievalCalculator("precision_at_1", engine=engine, device="cpu")
        assert calculator.get_accuracy(rows, labels)["precision_at_1"] == 1
        assert calculator.num_lone_queries == 1


@BOTH
def test_near_copies_far_from_the_middle_are_told_apart(engine):
    # Two crowds; within them float32 products round all differences away.
    embeddings, labels = groups(dim=16)
    embeddings = 1e-4 * embeddings
    embeddings[::2, 0] += 30
    labels = 2 * labels + (torch.arange(len(labels)) % 2)
    rows = embeddings.float()
    exact = exact_precision_at_1(rows, labels)
    assert precision_at_1(rows, labels, engine) == exact
    assert exact > 0.95


@BOTH
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_changes_nothing(engine, precision):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200).repeat_interleave(4)
    own = torch.randn(200, 128, generator=generator)[labels]
    noise = torch.randn(800, 128, generator=generator)
    rows = nn.functional.normalize(128**-0.5 + 0.003 * (own + 1.6 * noise))
    exact = exact_precision_at_1(rows, labels)
    order = torch.cdist(
        rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).argsort(dim=1)
    find = nearest.Nearest(rows, rows, ENGINES[engine])
    assert 0.3 < exact < 0.9
    torch.set_float32_matmul_precision(precision)
    try:
        assert precision_at_1(rows, labels, engine) == exact
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(find(torch.arange(800), 20), order[:, :20])
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_are_in_full_float32_within_and_as_before_afterwards():
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [part.fp32_precision for part in settings]
    try:
        settings[0].fp32_precision = "tf32"  # torch then refuses to say the old setting
        with full_float32(torch.device("cpu")):
            assert [part.fp32_precision for part in settings] == ["ieee", "ieee"]
        assert settings[0].fp32_precision == "tf32"
        torch.set_float32_matmul_precision("medium")
        with suppress(KeyError), full_float32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        for part, precision in zip(settings, before, strict=True):
            part.fp32_precision = precision


@BOTH
@pytest.mark.parametrize("offset", [0, 1e4])
def test_most_queries_need_no_second_look(engine, offset, monkeypatch):
    again = []
    look = nearest.Nearest._in_double
    monkeypatch.setattr(
        nearest.Nearest, "_in_double", lambda *args: again.append(len(args[1])) or look(*args)
    )
    embeddings, labels = groups(200)
    rows = nn.functional.normalize(embeddings.float()) + offset
    assert precision_at_1(rows, labels, engine) == exact_precision_at_1(rows, labels)
    assert sum(again) < 50


@st.composite
def unkind_rows(draw):
    """Rows with offsets, scales, copies, near copies, ties, lone giants and both zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, dim = draw(st.integers(1, 70)), draw(st.sampled_from([1, 2, 3, 8]))
    kind = draw(st.sampled_from(["grid", "normal", "bits"]))
    if kind == "bits":
        rows = rng.integers(0, 2**32, (count, dim), dtype=np.uint32).view(np.float32).copy()
        rows[~np.isfinite(rows)] = -0.0
        rows = np.clip(rows, -1e38, 1e38)
    else:
        rows = (
            rng.standard_normal((count, dim))
            if kind == "normal"
            else rng.integers(0, 3, (count, dim))
        )
        rows = rows * 10.0 ** draw(st.integers(-30, 30)) * 10.0 ** rng.integers(-6, 1, dim)
        rows = (rows + draw(st.sampled_from([0, 1, -1e4, 1e12]))).astype(np.float32)
    for _ in range(draw(st.integers(0, 3))):
        some = rng.random(count) < draw(st.sampled_from([0.1, 0.5]))
        rows[some] = rows[rng.integers(count)]
        if draw(st.booleans()):
            rows[some] = np.nextafter(rows[some], np.float32(draw(st.sampled_from([-1, 1]))))
    if draw(st.booleans()):
        rows[rng.integers(count)] = 1e20
    return rows


def check_ranks(query, reference, k, engine):
    find = nearest.Nearest(torch.from_numpy(query), torch.from_numpy(reference), ENGINES[engine])
    found = find(torch.arange(len(query)), k).tolist()
    exact = [[Fraction(float(value)) for value in row] for row in reference]
    for row, indices in zip(query, found, strict=True):
        asked = [Fraction(float(value)) for value in row]
        squares = [sum((a - b) ** 2 for a, b in zip(asked, other, strict=True)) for other in exact]
        assert len(set(indices)) == k
        for index, right in zip(indices, sorted(squares), strict=False):
            assert abs(squares[index] - right) <= right / 10**14  # what float64 tells apart
        # Of copies the first ones, in their order.
        of = {}
        for index in indices:
            of.setdefault(reference[index].tobytes(), []).append(index)
        for copy, members in of.items():
            same = [i for i, other in enumerate(reference) if other.tobytes() == copy]
            assert members == same[: len(members)]


def ranks_are_exact(rows, k, engine, split):
    k = min(k, len(rows))
    check_ranks(rows[:6], rows, k, engine)
    if split and len(rows) > k:
        check_ranks(rows[:4], rows[-max(k, len(rows) - 4) :], k, engine)


RANKS = {
    "rows": unkind_rows(),
    "k": st.sampled_from([1, 2, 5, 60]),
    "engine": st.sampled_from(["faiss", "torch"]),
    "split": st.booleans(),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**RANKS)
def test_ranks_are_those_of_exact_arithmetic(rows, k, engine, split):
    ranks_are_exact(rows, k, engine, split)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(**RANKS)
def test_ranks_are_those_of_exact_arithmetic_in_many_cases(rows, k, engine, split):
    ranks_are_exact(rows, k, engine, split)


def test_first_copies_are_of_equal_bytes():
    rows = np.float32([[1, 2], [0.0, 1], [1, 2], [-0.0, 1], [2, 1], [1, 2], [0.0, 1]])
    assert first_copies(rows).tolist() == [0, 1, 0, 3, 4, 0, 1]
    assert first_copies(rows.astype(np.float64)).tolist() == [0, 1, 0, 3, 4, 0, 1]
    # Rows are compared in full where hashes agree.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pml_tacl.utils.copies._hashes", lambda x: np.zeros(len(x), np.uint64))
        patch.setattr("pml_tacl.utils.copies.CHUNK", 2)
        firsts = first_copies(rows)
    assert firsts.tolist() == [0, 1, 0, 3, 4, 0, 6]  # 6 is a copy that a collision hides


def test_first_copies_with_a_tolerance_are_near_and_others_stay():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    copied = np.concatenate([rows, rows[:40] + 1e-7, rows[:40] + 1e-4])
    assert first_copies(copied).tolist() == [*range(140)]
    firsts = first_copies(copied, 1e-6)
    assert np.abs(copied[firsts] - copied).max() <= 1e-6
    assert (firsts[60:100] == np.arange(40)).mean() > 0.8
    assert not (firsts[100:] < 60).any()
    assert (firsts <= np.arange(140)).all()


class Labelled(Dataset):
    def __init__(self, embeddings, labels):
        self.embeddings, self.labels = embeddings, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.embeddings[index], self.labels[index]


SIX = torch.eye(4)[[0, 0, 1, 1, 2, 2]] + 0.01 * torch.arange(6)[:, None]
WHOLE = {
    "int": [0, 0, 1, 1, 2, 2],
    "bool": [True, True, False, False, True, True],
    "float": [0.0, 0.0, 1.0, 1.0, 2.0, 2.0],
    "huge": [2**60, 2**60, 2**60 + 1, 2**60 + 1, 5, 5],
    "uint8": list(np.array([0, 0, 1, 1, 255, 255], np.uint8)),
    "float16": list(np.array([0, 0, 1, 1, 2047, 2047], np.float16)),
    "bfloat16": list(torch.tensor([0, 0, 1, 1, 255, 255], dtype=torch.bfloat16)),
    "objects": np.array([0, 0, 1, 1, 2, 2], dtype=object),
    "0-d": list(torch.tensor([0, 0, 1, 1, 2, 2])),
    "levels": [(0, 1), (0, 1), (1, 0), (1, 0), (2, 2), (2, 2)],
    "level": list(torch.tensor([[0], [0], [1], [1], [2], [2]])),
    "one-hot": list(torch.eye(3)[[0, 0, 1, 1, 2, 2]]),
}
OTHERS = {
    "fractions": ([0.1, 0.1, 0.2, 0.2, 0.3, 0.3], "whole numbers, got 0.1: number the classes"),
    "negative fractions": (list(torch.arange(6) / 5 - 0.4), r"whole numbers, got -0\.4"),
    "soft": (list(torch.full((6, 2), 0.5)), "whole numbers, got 0.5"),
    "nan": ([math.nan] * 6, "whole numbers, got nan"),
    "infinite": ([math.inf] * 6, "whole numbers, got inf"),
    "strings": (["cat", "cat", "dog", "dog", "x", "x"], r"whole numbers, got 'cat' \(str\)"),
    "None": ([None] * 6, r"whole numbers, got None \(NoneType\)"),
    "dicts": ([{"id": 0}] * 6, r"whole numbers, got \{'id': 0\} \(dict\)"),
    "complex": ([1j] * 6, r"whole numbers, got 1j \(complex\)"),
    "uint64": (list(np.array([2**63] * 6, np.uint64)), "reach 9223372036854775808, .* int64"),
    "int": ([2**63] * 6, "reach 9223372036854775808, beyond"),
    "float32": (list(np.array([2**24] * 6, np.float32)), "reach 16777216, beyond .* float32"),
    "float16": (list(np.array([2**11] * 6, np.float16)), "reach 2048, beyond .* float16"),
    "float64": ([2.0**53] * 6, "reach 9007199254740992, beyond .* float64"),
    "ragged": ([(1, 2), (1,), (1, 2), (1, 2), (1,), (1,)], "one for each image, or for each image"),
    "objects": (np.array(["a"] * 6, dtype=object), r"whole numbers, got 'a' \(str\)"),
    "deep": (list(torch.zeros(6, 2, 2)), r"got shape \(6, 2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_labels_of_any_type_are_taken(kind, batch_size):
    labels = WHOLE[kind]
    dataset = Labelled(SIX, labels)
    expected = torch.tensor([np.asarray(label).tolist() for label in map(_plain, labels)]).long()
    found = embed(nn.Identity(), dataset, batch_size=batch_size, progress=False)[1]
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    value = evaluate(nn.Identity(), dataset, metrics="recall_at_1", progress=False)
    assert value == {"recall_at_1": 1.0}
    assert precision_at_1(SIX, labels, "faiss") == 1


def _plain(label):
    return label.float().numpy() if isinstance(label, torch.Tensor) else label


@pytest.mark.parametrize("kind", OTHERS)
def test_other_labels_are_refused_in_one_line(kind):
    labels, message = OTHERS[kind]
    dataset = Labelled(SIX, labels)
    for name, call in (
        ("labels of dataset", lambda: embed(nn.Identity(), dataset, progress=False)),
        ("labels of dataset", lambda: evaluate(nn.Identity(), dataset, progress=False)),
        ("query_labels", lambda: precision_at_1(SIX, labels, "faiss")),
    ):
        with pytest.raises(ValueError, match=f"{name} .*{message}") as info:
            call()
        assert "\n" not in str(info.value)


def test_labels_survive_the_way_from_loading_processes():
    dataset = Labelled(SIX, list(torch.tensor([[2**60, 1], [3, 4]] * 3)))
    found = embed(nn.Identity(), dataset, batch_size=2, num_workers=1, progress=False)[1]
    assert found.tolist() == [[2**60, 1], [3, 4]] * 3


def test_every_label_below_zero_is_none():
    dataset = Labelled(SIX, [(0, -2), (1, 1), (-3, -1), (1, 1), (0, 0), (0, 0)])
    with pytest.raises(ValueError, match=r"2 of 6 images of dataset have no label \(-3\)"):
        evaluate(nn.Identity(), dataset, progress=False)


def noise(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 20
    return TensorDataset(torch.randn(count, 8, generator=generator), labels)


def recall(dataset, **kwargs):
    return evaluate(nn.Identity(), dataset, metrics="recall_at_1", progress=False, **kwargs)[
        "recall_at_1"
    ]


def test_a_reference_that_is_the_data_set_does_not_answer_itself(caplog):
    queries = noise()
    alone = recall(queries)
    assert alone < 0.1
    assert recall(queries, reference=queries) == alone
    assert not caplog.records
    assert recall(queries, reference=TensorDataset(*queries.tensors)) == alone
    assert "reference starts with the images of dataset" in caplog.text
    longer = ConcatDataset([queries, noise(50, 1)])
    assert recall(queries, reference=longer) < 0.1
    assert recall(queries, reference=longer, ref_includes_query=True) < 0.1
    # Whoever asks for it gets it.
    assert recall(queries, reference=queries, ref_includes_query=False) == 1
    assert recall(queries, reference=longer, ref_includes_query=False) == 1


def test_the_data_set_is_embedded_once_as_its_own_reference():
    seen = []
    model = nn.Identity()
    model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    queries = noise()
    evaluate(model, queries, reference=queries, metrics="recall_at_1", progress=False)
    assert sum(seen) == 200


REFERENCES = {
    "all of it": lambda queries, order: Subset(queries, range(200)),
    "in another order": lambda queries, order: Subset(queries, order),
    "two deep": lambda queries, order: Subset(Subset(queries, order), order),
    "behind others": lambda queries, order: ConcatDataset([noise(50, 1), queries]),
    "among others": lambda queries, order: Subset(ConcatDataset([noise(50, 1), queries]),
                                                  [*range(40, 250), *range(7)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFERENCES)
def test_queries_are_known_again_within_the_reference(caplog, kind):
    queries = noise()
    reference = REFERENCES[kind](queries, torch.randperm(200).tolist())
    others = Subset(reference, [at for at in range(len(reference)) if not _is_of(reference, at)])
    expected = recall(queries, reference=ConcatDataset([queries, others]))
    assert expected < 0.1
    caplog.clear()
    assert recall(queries, reference=reference) == expected
    assert "reference contains the images of dataset: each is left out" in caplog.text
    assert recall(queries, reference=reference, ref_includes_query=True) == expected
    assert recall(queries, reference=reference, ref_includes_query=False) == 1
    distributed = evaluate_distributed(
        nn.Identity(), queries, reference=reference, metrics="recall_at_1", progress=False
    )
    assert distributed["recall_at_1"] == expected
    # A part of them searches in all.
    part = Subset(queries, range(30, 90, 2))
    assert recall(part, reference=queries) == pytest.approx(
        recall(part, reference=Subset(queries, [*part.indices, *_rest(part.indices)]))
    )
    assert recall(part, reference=queries) < 0.2


def _is_of(reference, at):
    """Whether an item of a reference is one of the queries, which come from the first generator."""
    rows = noise().tensors[0]
    return bool((rows == reference[at][0]).all(dim=1).any())


def _rest(indices):
    return [at for at in range(200) if at not in indices]


def test_queries_elsewhere_in_the_reference_are_told(caplog):
    caplog.set_level(logging.WARNING)
    queries = noise()
    embeddings, labels = queries.tensors
    copies = TensorDataset(embeddings.clone(), labels)
    assert recall(queries, reference=ConcatDataset([noise(50, 1), copies])) == 1
    assert "200 of 200 sampled queries find themselves in the reference" in caplog.text
    caplog.clear()
    third = Subset(queries, range(100, 160))
    assert 0.3 <= recall(queries, reference=third) < 0.4
    assert "60 of 200 sampled queries find themselves" in caplog.text
    caplog.clear()
    calculator = RetrievalCalculator("recall_at_1", ks=(1,), device="cpu")
    calculator.get_accuracy(embeddings, labels, embeddings, labels)
    assert "200 of 200 sampled queries find themselves" in caplog.text
    caplog.clear()
    assert recall(queries, reference=noise(300, 5)) < 0.1
    calculator.get_accuracy(embeddings, labels)
    calculator.get_accuracy(embeddings, labels, embeddings, labels, True)
    assert not caplog.records


def test_a_reference_must_start_with_queries_that_it_is_said_to_hold():
    with pytest.raises(ValueError, match="ref_includes_query=True, but the first rows"):
        recall(noise(), reference=noise(300, 5), ref_includes_query=True)


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble, ">i2", np.uint16, np.float16, bool])
def test_arrays_of_any_numbers_are_ranked(dtype):
    embeddings = np.array([[0, 9], [0, 8], [7, 0], [6, 0]]).astype(dtype)
    assert precision_at_1(embeddings, torch.tensor([0, 0, 1, 1]), "faiss") == 1


@pytest.mark.parametrize("wrong", [np.full((4, 2), "a"), np.full((4, 2), None)])
def test_arrays_of_no_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="query must be numbers, got an array of"):
        precision_at_1(wrong, torch.tensor([0, 0, 1, 1]), "faiss")


def test_one_name_is_one_metric():
    dataset = noise()
    assert set(evaluate(nn.Identity(), dataset, metrics="recall_at_3", progress=False)) == {
        "recall_at_3"
    }
    without = RetrievalCalculator(exclude="NMI", device="cpu").get_accuracy(*dataset.tensors)
    assert "NMI" not in without
    assert "recall_at_1" in without
    one = RetrievalCalculator(device="cpu").get_accuracy(*dataset.tensors, include="recall_at_1")
    assert set(one) == {"recall_at_1"}
    assert Evaluate(dataset, metrics="NMI").metrics == ("recall_at_1", "NMI")


def test_clusters_do_not_depend_on_an_offset():
    embeddings, labels = groups(12, 20, spread=0.05)
    calculator = RetrievalCalculator("NMI", device="cpu")
    near = calculator.get_accuracy(embeddings.float(), labels)["NMI"]
    far = calculator.get_accuracy((embeddings + 3e4).float(), labels)["NMI"]
    assert near > 0.85
    assert far == pytest.approx(near, abs=0.05)


KS = (1, 2, 7)
NAMES = (
    "precision_at_1",
    "r_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
    "mean_average_precision",
    *(f"recall_at_{k}" for k in KS),
)


def plain_metrics(query, query_labels, reference, reference_labels, includes):
    """Each metric by its definition, in float64."""
    found = {name: [] for name in NAMES}
    for number in range(len(query)):
        distances = ((query[number].astype(np.float64) - reference) ** 2).sum(1)
        order = np.argsort(distances, kind="stable")
        hits = (
            reference_labels[order[order != number] if includes else order] == query_labels[number]
        )
        right = int(hits.sum())
        if not right:
            continue
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        for k in KS:
            found[f"recall_at_{k}"].append(hits[:k].any())
        found["precision_at_1"].append(hits[0])
        found["r_precision"].append(hits[:right].mean())
        found["mean_average_precision_at_r"].append((precision * hits)[:right].sum() / right)
        found["mean_reciprocal_rank"].append(1 / (np.argmax(hits) + 1))
        found["mean_average_precision"].append((precision * hits).sum() / right)
    return {name: np.mean(values) if values else math.nan for name, values in found.items()}


TYPES = st.sampled_from(
    ["int64", "int32", "uint8", "float64", "float32", "bool", "list", "tensor", "bfloat16"]
)


def as_type(labels, kind):
    if kind == "list":
        return labels.tolist()
    if kind in ("tensor", "bfloat16"):
        return torch.from_numpy(labels).to(torch.int64 if kind == "tensor" else torch.bfloat16)
    return labels.astype(kind)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 80), st.integers(1, 5)),
    spread=st.integers(1, 4),
    classes=st.sampled_from([1, 2, 6, 30]),
    mode=st.sampled_from(["alone", "reference", "included"]),
    engine=st.sampled_from(["faiss", "torch"]),
    kind=TYPES,
)
def test_all_metrics_equal_plain_loops_for_labels_of_every_type(
    seed, sizes, spread, classes, mode, engine, kind
):
    queries, others, dim = sizes
    rng = np.random.default_rng(seed)
    # Few whole numbers: copies and ties abound, and float64 is exact on them.
    query, reference = (
        rng.integers(0, spread + 1, (count, dim)).astype(np.float32) for count in (queries, others)
    )
    query_labels, labels = (rng.integers(0, classes, count) for count in (queries, others))
    if kind == "bool":
        query_labels, labels = query_labels % 2, labels % 2
    includes = mode != "reference"
    if mode == "included":
        reference, labels = (
            np.concatenate([query, reference]),
            np.concatenate([query_labels, labels]),
        )
    elif mode == "alone":
        reference, labels = query, query_labels
    expected = plain_metrics(query, query_labels, reference, labels, includes)
    calculator = RetrievalCalculator(NAMES, ks=KS, engine=engine, device="cpu")
    given_labels = as_type(query_labels, kind)
    rest = (reference, as_type(labels, kind), includes) if mode != "alone" else ()
    found = calculator.get_accuracy(query, given_labels, *rest)
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
    if mode == "alone" and kind != "list":
        rows = torch.from_numpy(query) + 1  # no zero, which has no direction
        dataset = Labelled(rows, given_labels)
        found = evaluate(nn.Identity(), dataset, metrics=NAMES, progress=False)
        unit = nn.functional.normalize(rows)
        assert found == calculator.get_accuracy(unit, query_labels) or math.isnan(
            found["recall_at_1"]
        )
