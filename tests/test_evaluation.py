import math
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import (
    adjusted_mutual_info_score,
    average_precision_score,
    normalized_mutual_info_score,
)
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pml_tacl.evaluation import RetrievalCalculator, embed, evaluate, make_tester
from pml_tacl.evaluation import nearest as nearest_rows
from pml_tacl.evaluation import ranking as ranks
from pml_tacl.evaluation.mutual_information import adjusted_mutual_information

CPU = torch.device("cpu")
# The long run: PML_TACL_EXAMPLES=2000 pytest tests/test_evaluation.py
EXAMPLES = int(os.environ.get("PML_TACL_EXAMPLES", "100"))
KS = (1, 2, 3, 5, 8, 150)
RANKING = [
    "precision_at_1",
    "r_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
    "mean_average_precision",
    *(f"recall_at_{k}" for k in KS),
]


def brute_force(query, query_labels, reference, reference_labels, includes, depth=None):
    """Each metric of each query by its definition, {class: [{metric: value}]}."""
    found = {}
    for number, (row, label) in enumerate(zip(query, query_labels, strict=True)):
        ranking = sorted(
            (sum((float(a) - float(b)) ** 2 for a, b in zip(row, other, strict=True)), index)
            for index, other in enumerate(reference)
            if not (includes and index == number)
        )
        hits = [reference_labels[index] == label for _, index in ranking]
        right = sum(hits)
        if not right:
            continue
        first = hits.index(True) + 1
        precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
        deep = hits[:depth]
        values = {f"recall_at_{k}": float(first <= k) for k in KS}
        values["precision_at_1"] = float(hits[0])
        values["r_precision"] = sum(hits[:right]) / right
        values["mean_reciprocal_rank"] = 1 / first if depth is None or first <= depth else 0.0
        for name, reach in (("mean_average_precision_at_r", hits[:right]), ("", deep)):
            total = sum(p for p, hit in zip(precision, reach, strict=False) if hit)
            values[name or "mean_average_precision"] = total / right
        found.setdefault(label, []).append(values)
    return found


def means(found, name):
    return [sum(v[name] for v in values) / len(values) for _, values in sorted(found.items())]


def mean(found, name):
    every = [v[name] for values in found.values() for v in values]
    return sum(every) / len(every) if every else math.nan


@st.composite
def cases(draw):
    # Small whole numbers: float32 is exact on them, so that ties are ties and abound.
    includes = draw(st.booleans())
    queries = draw(st.integers(1, 30))
    others = draw(st.one_of(st.integers(0 if includes else 1, 25), st.integers(100, 160)))
    dim = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    spread = draw(st.sampled_from([1, 2, 40]))
    classes = draw(st.sampled_from([1, 2, 5, 40]))
    first_id = draw(st.sampled_from([0, -3, 2**24, 2**60]))
    rng = np.random.default_rng(seed)
    query = rng.integers(0, spread, (queries, dim)).astype(np.float32)
    reference = rng.integers(0, spread, (others, dim)).astype(np.float32)
    query_labels = rng.integers(0, classes, queries) + first_id
    reference_labels = rng.integers(0, classes, others) + first_id
    if includes:
        reference = np.concatenate([query, reference])
        reference_labels = np.concatenate([query_labels, reference_labels])
    return query, query_labels, reference, reference_labels, includes


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    case=cases(),
    engine=st.sampled_from(["faiss", "torch"]),
    depth=st.sampled_from([None, None, 1, 4, 200, "max_bin_count"]),
    entries=st.sampled_from([1, 64, 2**22]),
    names=st.one_of(st.just(set(RANKING)), st.sets(st.sampled_from(RANKING), min_size=1)),
)
def test_every_metric_equals_brute_force(case, engine, depth, entries, names):
    settings = {"include": tuple(names), "ks": KS, "k": depth, "device": CPU, "engine": engine}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "RESULT_ENTRIES", entries)
        patch.setattr(nearest_rows, "DISTANCE_ENTRIES", entries)
        plain = RetrievalCalculator(**settings)
        values = plain.get_accuracy(*case)
        per_class = RetrievalCalculator(**settings, return_per_class=True).get_accuracy(*case)
        averages = RetrievalCalculator(**settings, avg_of_avgs=True).get_accuracy(*case)
    if depth == "max_bin_count":
        labels, includes = case[3].tolist(), case[4]
        depth = max(1, *(labels.count(label) - includes for label in case[1].tolist()), 1)
    found = brute_force(*(part.tolist() for part in case[:4]), case[4], depth)
    assert list(values) == sorted(names)
    assert plain.num_lone_queries == len(case[0]) - sum(map(len, found.values()))
    for name in names:
        assert values[name] == pytest.approx(mean(found, name), abs=1e-12, nan_ok=True), name
        if not found:
            assert all(map(math.isnan, [averages[name], *per_class[name]]))
            continue
        assert 0 <= values[name] <= 1
        assert per_class[name] == pytest.approx(means(found, name), abs=1e-12), name
        assert averages[name] == pytest.approx(np.mean(means(found, name)), abs=1e-12), name


def clustered(count=300, classes=40, dim=8, noise=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(count) % classes
    points = centres[labels] + noise * torch.randn(count, dim, generator=generator)
    return nn.functional.normalize(points), labels


@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_equals_stock_where_stock_ranks_everything(engine):
    embeddings, labels = clustered()
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "NMI", "AMI")
    names = (*names, "mean_reciprocal_rank", "mean_average_precision")
    for kwargs in ({}, {"avg_of_avgs": True}, {"return_per_class": True}):
        ours = RetrievalCalculator(names, device=CPU, engine=engine, **kwargs)
        stock = AccuracyCalculator(names, device=CPU, **kwargs)
        for gallery in ((), (embeddings[100:], labels[100:]), (embeddings, labels, True)):
            expected = stock.get_accuracy(embeddings[: 300 if gallery else None], labels, *gallery)
            actual = ours.get_accuracy(embeddings, labels, *gallery)
            assert actual.keys() == expected.keys()
            for name in names:
                assert actual[name] == pytest.approx(expected[name], abs=1e-6), name


def test_average_precision_equals_scikit_learn():
    embeddings, labels = clustered(60, 5)
    distances = torch.cdist(
        embeddings, embeddings[10:], compute_mode="donot_use_mm_for_euclid_dist"
    )
    expected = [
        average_precision_score(labels[10:] == label, -row)
        for row, label in zip(distances, labels, strict=True)
    ]
    calculator = RetrievalCalculator(("mean_average_precision",), device=CPU)
    actual = calculator.get_accuracy(embeddings, labels, embeddings[10:], labels[10:])
    assert actual["mean_average_precision"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_ranking_metrics_equal_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    embeddings, labels = clustered(60, 12, noise=1)
    # Positive, since torchmetrics takes scores of 0 and less for not retrieved.
    scores = torch.exp(-torch.cdist(embeddings, embeddings[10:]).double())
    hits = labels[:, None] == labels[10:]
    rows = list(zip(scores, hits, strict=True))
    expected = {
        "mean_average_precision": [retrieval.retrieval_average_precision(*row) for row in rows],
        "mean_reciprocal_rank": [retrieval.retrieval_reciprocal_rank(*row) for row in rows],
        "r_precision": [retrieval.retrieval_r_precision(*row) for row in rows],
        "precision_at_1": [retrieval.retrieval_precision(*row, top_k=1) for row in rows],
        **{
            f"recall_at_{k}": [retrieval.retrieval_hit_rate(*row, top_k=k) for row in rows]
            for k in (1, 2, 4)
        },
    }
    calculator = RetrievalCalculator(tuple(expected), ks=(1, 2, 4), device=CPU)
    actual = calculator.get_accuracy(embeddings, labels, embeddings[10:], labels[10:])
    assert actual == pytest.approx(
        {name: float(torch.stack(values).mean()) for name, values in expected.items()}, abs=1e-6
    )


def test_clustering_scores_equal_scikit_learn():
    embeddings, labels = clustered()
    clusters = torch.arange(300) % 7
    calculator = RetrievalCalculator(
        ("NMI", "AMI"), device=CPU, kmeans_func=lambda rows, number: clusters
    )
    # Stock float32 labels would merge these classes.
    actual = calculator.get_accuracy(embeddings, labels + 2**30)
    assert actual == pytest.approx(
        {
            "NMI": normalized_mutual_info_score(labels, clusters),
            "AMI": adjusted_mutual_info_score(labels, clusters),
        }
    )


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 100)
@given(st.lists(st.tuples(st.integers(-2, 9), st.integers(0, 6)), min_size=1, max_size=60))
@pytest.mark.slow
def test_adjusted_mutual_information_equals_scikit_learn(pairs):
    first, second = torch.tensor(pairs).T
    for one, other in ((first, second), (first, first * 3), (first, torch.arange(len(first)))):
        expected = adjusted_mutual_info_score(one.numpy(), other.numpy())
        assert adjusted_mutual_information(one, other) == pytest.approx(expected, abs=1e-9)


def test_adjusted_mutual_information_of_groups_of_every_size():
    sizes = torch.arange(1, 80)
    first = sizes.repeat_interleave(sizes)
    second = first[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))]
    second[:500] = first[:500]
    expected = adjusted_mutual_info_score(first.numpy(), second.numpy())
    assert expected > 0.1
    assert adjusted_mutual_information(first, second) == pytest.approx(expected, abs=1e-9)


def test_clustering_is_silent_with_few_points_per_class(capfd):
    embeddings, labels = clustered()
    assert (
        0 < RetrievalCalculator(("NMI",), device=CPU).get_accuracy(embeddings, labels)["NMI"] <= 1
    )
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_recall_needs_no_k():
    # Four images a class: the stock calculator's "max_bin_count" would rank only three.
    embeddings = torch.arange(32.0)[:, None] ** 1.5
    labels = torch.arange(32) % 8
    values = RetrievalCalculator(ks=(1, 8, 31, 10_000), device=CPU).get_accuracy(embeddings, labels)
    assert values["recall_at_1"] == 0
    assert values["recall_at_8"] < values["recall_at_31"] == values["recall_at_10000"] == 1


def test_the_query_is_left_out_among_its_copies():
    embeddings = torch.ones(50, 4)
    labels = torch.arange(50) // 2
    for engine in ("faiss", "torch"):
        values = RetrievalCalculator(
            ("recall_at_1", "mean_reciprocal_rank"), device=CPU, engine=engine
        ).get_accuracy(embeddings, labels)
        # Equal distances by index: only 0 and 1 see their partner first.
        ranks = [i if i % 2 else i + 1 for i in range(50)]
        assert values["recall_at_1"] == 2 / 50
        assert values["mean_reciprocal_rank"] == pytest.approx(np.mean([1 / r for r in ranks]))


def test_far_first_answers_are_found_in_few_searches():
    count = 2000
    embeddings = torch.arange(float(count))[:, None]
    labels = torch.arange(count)
    labels[-1] = 0
    calls = []
    knn = CustomKNN(_SlowL2())

    def counting(*args):
        calls.append(args[1])
        return knn(*args)

    values = RetrievalCalculator(
        ("mean_reciprocal_rank",), device=CPU, knn_func=counting
    ).get_accuracy(embeddings, labels)
    assert values["mean_reciprocal_rank"] == pytest.approx(1 / (count - 1))
    assert calls == [2, 17, 257, 2000]


def test_an_approximate_search_that_misses_ends():
    def blind(queries, k, reference, ref_includes_query):
        return None, torch.full((len(queries), k), -1)

    embeddings, labels = clustered(20, 4)
    calculator = RetrievalCalculator(exclude=("NMI", "AMI"), device=CPU, knn_func=blind)
    assert set(calculator.get_accuracy(embeddings, labels).values()) == {0.0}


class _SlowL2:
    is_inverted = False

    def __call__(self, query, reference):
        return torch.cdist(query, reference)


def test_one_large_class_does_not_widen_the_search_of_all(monkeypatch):
    widths = {}

    class Spy(nearest_rows.Nearest):
        def __call__(self, rows, k):
            widths[k] = widths.get(k, 0) + len(rows)
            return super().__call__(rows, k)

    monkeypatch.setattr(ranks, "CHUNK", 100)
    calculator = RetrievalCalculator(("r_precision",), device=CPU)
    monkeypatch.setattr("pml_tacl.evaluation.calculator.Nearest", Spy)
    labels = torch.cat([torch.arange(100).repeat(2), torch.full((100,), 100)])
    calculator.get_accuracy(torch.randn(300, 4), labels)
    assert widths == {2: 200, 100: 100}


def test_memory_bound_holds(monkeypatch):
    seen = []

    class Spy(nearest_rows.Nearest):
        def __call__(self, rows, k):
            seen.append(len(rows) * k)
            return super().__call__(rows, k)

    monkeypatch.setattr(ranks, "RESULT_ENTRIES", 1000)
    calculator = RetrievalCalculator(RANKING, device=CPU, ks=KS)
    monkeypatch.setattr("pml_tacl.evaluation.calculator.Nearest", Spy)
    calculator.get_accuracy(*clustered())
    assert 500 < max(seen) <= 1000
    assert sum(seen) == 300 * 300


def test_several_label_levels():
    embeddings, fine = clustered(48, 12)
    labels = torch.stack([fine, fine // 4], dim=1)
    by_level = {}

    def hook(tester):
        by_level["hook"] = dict(tester.all_accuracies["test"])

    tester = make_tester(
        RetrievalCalculator(("recall_at_1", "NMI"), device=CPU),
        label_hierarchy_level="all",
        end_of_testing_hook=hook,
        data_device=CPU,
    )
    dataset = TensorDataset(embeddings, labels)
    values = tester.test({"test": dataset}, 3, nn.Identity())["test"]
    calculator = RetrievalCalculator(("recall_at_1", "NMI"), device=CPU)
    for level in (0, 1):
        expected = calculator.get_accuracy(embeddings, labels[:, level])
        assert values[f"recall_at_1_level{level}"] == expected["recall_at_1"]
    assert values["epoch"] == 3
    halves = values["recall_at_1_level0"] + values["recall_at_1_level1"]
    assert values["AVERAGE_recall_at_1"] == pytest.approx(halves / 2)
    assert by_level["hook"] == values
    # Labels of several levels at once: a right answer agrees in all.
    both = calculator.get_accuracy(embeddings, labels)
    assert both["recall_at_1"] == values["recall_at_1_level0"]


def test_tester_with_another_gallery():
    embeddings, labels = clustered(90, 9)
    sets = {
        "query": TensorDataset(embeddings[:30], labels[:30]),
        "gallery": TensorDataset(embeddings[30:], labels[30:]),
    }
    calculator = RetrievalCalculator(("recall_at_2",), ks=(2,), device=CPU)
    tester = make_tester(calculator, data_device=CPU)
    splits = [("query", ["gallery"])]
    alone = tester.test(sets, 1, nn.Identity(), splits_to_eval=splits)["query"]
    splits = [("query", ["gallery", "query"])]
    with_queries = tester.test(sets, 1, nn.Identity(), splits_to_eval=splits)["query"]
    expected = calculator.get_accuracy(embeddings[:30], labels[:30], embeddings[30:], labels[30:])
    assert alone["recall_at_2_level0"] == expected["recall_at_2"]
    expected = calculator.get_accuracy(embeddings[:30], labels[:30], embeddings, labels, True)
    assert with_queries["recall_at_2_level0"] == expected["recall_at_2"]
    assert calculator.get_curr_metrics() == ["recall_at_2"]


def test_make_tester_defaults_and_overrides():
    tester = make_tester()
    assert isinstance(tester, GlobalEmbeddingSpaceTester)
    assert isinstance(tester.accuracy_calculator, RetrievalCalculator)
    assert (tester.batch_size, tester.dataloader_num_workers) == (64, 0)
    tester = make_tester(AccuracyCalculator(), batch_size=7, dataloader_num_workers=1)
    assert type(tester.accuracy_calculator) is AccuracyCalculator
    assert (tester.batch_size, tester.dataloader_num_workers) == (7, 1)


def test_include_and_exclude():
    embeddings, labels = clustered(40, 4)
    every = RetrievalCalculator(device=CPU)
    expected = {"AMI", "NMI", "precision_at_1", "r_precision", "mean_average_precision_at_r"}
    expected |= {"mean_reciprocal_rank", *(f"recall_at_{k}" for k in (1, 2, 4, 8))}
    assert set(every.get_accuracy(embeddings, labels)) == expected == set(every.get_curr_metrics())
    assert every.description() == ""
    assert set(every.get_accuracy(embeddings, labels, include=("recall_at_2",))) == {"recall_at_2"}
    assert "NMI" not in every.get_accuracy(embeddings, labels, exclude=("NMI",))
    assert set(RetrievalCalculator(exclude=["NMI"]).get_curr_metrics()) == expected - {"NMI"}
    assert "mean_average_precision" in RetrievalCalculator(k=5).get_curr_metrics()
    assert set(RetrievalCalculator(ks=[9, 3, 9]).requires_knn()) >= {"recall_at_3", "recall_at_9"}


def test_can_be_pickled_and_extended():
    class WithOwn(RetrievalCalculator):
        def calculate_precision_at_1(self, **kwargs):
            return -1.0

        def calculate_worst_recall(self, per_query, relevant, **kwargs):
            return float(per_query["recall_at_8"].nan_to_num(1).min()) + int(relevant.max())

    embeddings, labels = clustered(40, 4)
    values = WithOwn(device=CPU).get_accuracy(embeddings, labels)
    assert values["precision_at_1"] == -1
    assert values["worst_recall"] in (9.0, 10.0)
    calculator = RetrievalCalculator(exclude=("NMI", "AMI"), device=CPU)
    copy = pickle.loads(pickle.dumps(calculator))
    assert copy.get_accuracy(embeddings, labels) == calculator.get_accuracy(embeddings, labels)


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double", "numpy", "strided", "readonly"])
def test_kinds_of_embeddings(kind, recwarn):
    embeddings, labels = clustered(60, 6)
    embeddings = embeddings.bfloat16().float()
    calculator = RetrievalCalculator(exclude=("NMI", "AMI"), device="cpu")
    expected = calculator.get_accuracy(embeddings, labels)
    same = {
        "half": lambda: (embeddings * 256).half(),
        "bfloat16": embeddings.bfloat16,
        "double": lambda: embeddings.double().requires_grad_(),
        "numpy": embeddings.double().numpy,
        "strided": lambda: embeddings.repeat_interleave(2, dim=1)[:, ::2],
        "readonly": lambda: np.frombuffer(embeddings.numpy().tobytes(), np.float32).reshape(60, 8),
    }[kind]()
    given_labels = labels.numpy() if kind in ("numpy", "readonly") else labels.float()
    actual = calculator.get_accuracy(same, given_labels)
    assert actual == pytest.approx(expected, abs=2e-2 if kind == "half" else 1e-9)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ks": ()}, r"ks must be a sequence of integers, for instance \(1, 8\), got \(\)"),
        ({"ks": 8}, r"ks must be a sequence of integers.*got 8"),
        ({"ks": (1, 0)}, "each of ks must be an integer of at least 1, got 0"),
        ({"ks": (1, 2.5)}, "each of ks must be an integer of at least 1, got 2.5"),
        ({"engine": "annoy"}, "engine must be .* got 'annoy'"),
        ({"label_comparison_fn": torch.eq}, "label_comparison_fn is not supported: use PML's"),
        ({"include": ("recall_at_3",)}, "Primary metrics must be one or more of"),
        ({"k": 0}, "k must be an integer greater than 0"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RetrievalCalculator(**kwargs)


def test_bad_inputs():
    embeddings, labels = clustered(20, 4)
    get = RetrievalCalculator(device=CPU).get_accuracy
    broken = embeddings.clone()
    broken[[2, 5], 0] = torch.tensor([math.nan, math.inf])
    for args, message in (
        ((broken, labels), "2 of 20 rows of query are NaN or infinite"),
        ((embeddings, labels, broken, labels), "2 of 20 rows of reference are NaN or infinite"),
        ((embeddings[:0], labels[:0]), r"query must be .* not empty, got \(0, 8\)"),
        ((embeddings[0], labels), r"query must be .* not empty, got \(8,\)"),
        ((embeddings, labels[1:]), r"query_labels must be \(20,\) or .*, got shape \(19,\)"),
        ((embeddings, labels + 0.5), "query_labels must be whole numbers, got 0.5: number the"),
        ((embeddings, labels, embeddings[:, 1:], labels), "query has 8 dimensions, reference 7"),
        ((embeddings, labels, embeddings, labels[:, None]), "give both the same levels"),
        ((embeddings, labels, embeddings.flip(0), labels, True), "put the queries first"),
        ((embeddings, labels, embeddings, labels + 1, True), "put the queries first"),
        ((embeddings, labels, embeddings[:9], labels[:9], True), "put the queries first"),
    ):
        with pytest.raises(ValueError, match=message):
            get(*args)


class Images(Dataset):
    """Images whose mean is their class."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.full((3, 4, 4), float(self.labels[index]) + 0.01 * index), self.labels[index]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.project = nn.Linear(3, 5)

    def forward(self, images):
        return self.project(self.drop(self.norm(images)).mean(dim=(2, 3)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_embed_keeps_order_and_restores_the_model(num_workers):
    torch.manual_seed(0)
    model = Model()
    model.norm.eval()
    dataset = Images([3, 1, 2, 3, 1])
    flags = [module.training for module in model.modules()]
    embeddings, labels = embed(
        model, dataset, batch_size=2, num_workers=num_workers, progress=False
    )
    assert [module.training for module in model.modules()] == flags == [True, False, True, True]
    assert labels.tolist() == dataset.labels
    assert labels.dtype == torch.int64
    assert embeddings.dtype == torch.float32
    model.eval()
    for row, (image, _) in zip(embeddings, dataset, strict=True):
        torch.testing.assert_close(row, model(image[None])[0].detach())
    # Usable in a loss: not an inference tensor.
    assert not embeddings.is_inference()
    assert not embeddings.requires_grad


def test_embed_restores_the_model_after_an_error():
    model = Model()
    with pytest.raises(RuntimeError):
        embed(model, TensorDataset(torch.ones(2, 9, 4, 4), torch.zeros(2)), progress=False)
    assert all(module.training for module in model.modules())


def test_embed_shows_a_bar_when_asked(capsys):
    dataset = Images([1, 2])
    embed(Model(), dataset)
    assert "embedding" in capsys.readouterr().err
    embed(Model(), dataset, progress=False)
    assert capsys.readouterr().err == ""


def test_embed_half_precision_and_several_levels():
    images = torch.randn(3, 4)
    labels = torch.tensor([[1, 2], [3, 4], [5, 6]])
    embeddings, found = embed(nn.Identity().half(), TensorDataset(images.half(), labels))
    torch.testing.assert_close(embeddings, images.half().float())
    assert torch.equal(found, labels)


def test_bad_data_and_models():
    dataset = Images([1, 2, 3])
    for model, images, error, message in (
        (Model(), Images([]), ValueError, "dataset is empty: there is nothing to embed"),
        (nn.Identity(), dataset, ValueError, r"into \(3, D\) embeddings, got \(3, 3, 4, 4\)"),
        (_Pair(), dataset, ValueError, r"into \(3, D\) embeddings, got tuple"),
        (Model(), TensorDataset(torch.ones(2, 3, 4, 4)), TypeError, r"\(image, label\) pairs"),
    ):
        with pytest.raises(error, match=message):
            embed(model, images, progress=False)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        embed(Model(), dataset, batch_size=0)
    with pytest.raises(ValueError, match="2 of 3 images of dataset have no label"):
        evaluate(Model(), Images([-1, -1, 0]), progress=False)
    with pytest.raises(ValueError, match="1 of 2 images of reference have no label"):
        evaluate(Model(), dataset, reference=Images([-1, 0]), progress=False)
    for name in ("recall_at_0", "recall", "recall_at_x"):
        with pytest.raises(ValueError, match="Primary metrics must be one or more of"):
            evaluate(Model(), dataset, metrics=(name,), progress=False)


class _Pair(nn.Module):
    def forward(self, images):
        return images, images


def test_evaluate_normalises_and_agrees_with_the_tester():
    embeddings, labels = clustered(60, 6)
    scaled = embeddings * torch.linspace(1, 50, 60)[:, None]
    dataset = TensorDataset(scaled, labels)
    values = evaluate(nn.Identity(), dataset, progress=False)
    tester = make_tester(RetrievalCalculator(device=CPU), data_device=CPU)
    expected = tester.test({"test": dataset}, 0, nn.Identity())["test"]
    assert {f"{name}_level0": pytest.approx(v, abs=1e-9) for name, v in values.items()} == {
        name: value for name, value in expected.items() if name != "epoch"
    }


def test_evaluate_with_chosen_metrics_and_gallery():
    embeddings, labels = clustered(60, 6)
    query, gallery = (
        TensorDataset(embeddings[:20], labels[:20]),
        TensorDataset(embeddings[20:], labels[20:]),
    )
    values = evaluate(
        nn.Identity(), query, metrics=["recall_at_3", "NMI"], reference=gallery, progress=False
    )
    calculator = RetrievalCalculator(("recall_at_3", "NMI"), ks=(3,), device=CPU)
    assert values == calculator.get_accuracy(
        embeddings[:20], labels[:20], embeddings[20:], labels[20:]
    )


def test_evaluate_measures_the_same_however_images_are_loaded():
    dataset = Images([3, 1, 2, 3, 1, 2, 3])
    torch.manual_seed(0)
    model = Model()
    values = evaluate(model, dataset, progress=False)
    loading = {"batch_size": 2, "num_workers": 1, "device": "cpu"}
    assert evaluate(model, dataset, progress=False, **loading) == pytest.approx(values)
