import warnings

import faiss
import numpy as np
import pytest
import torch
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_rand_score

from pml_tacl.clustering import (
    KMeansPseudoLabeler,
    PseudoLabeler,
    PseudoLabels,
    pseudo_labels_from,
)
from pml_tacl.clustering.kmeans import auto_clusters
from pml_tacl.utils.neighbours import nearest_others


def blobs(groups=5, members=30, dim=16, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    centroids = rng.standard_normal((groups, dim))
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    truth = np.repeat(np.arange(groups), members)
    order = rng.permutation(len(truth))
    points = centroids[truth] + noise * rng.standard_normal((len(truth), dim))
    return points[order].astype(np.float32), truth[order]


def check_consistent(result, embeddings):
    """Labels, centroids and distances against their definition, row by row in float64."""
    labels, centroids, distances = (value.cpu() for value in result)
    rows = np.asarray(embeddings, dtype=np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert labels.dtype == torch.int64
    assert centroids.dtype == distances.dtype == torch.float32
    assert len(labels) == len(distances) == len(rows)
    assert set(labels.tolist()) - {-1} == set(range(len(centroids)))
    for cluster, centroid in enumerate(centroids.numpy()):
        mean = rows[labels.numpy() == cluster].mean(axis=0)
        np.testing.assert_allclose(centroid, mean / np.linalg.norm(mean), atol=1e-5)
    for row, label, distance in zip(rows, labels.tolist(), distances.tolist(), strict=True):
        cosines = centroids.double().numpy() @ row
        cosine = cosines.max() if label < 0 else cosines[label]
        assert distance == pytest.approx(1 - cosine, abs=1e-5)


def test_finds_separated_groups():
    embeddings, truth = blobs()
    result = KMeansPseudoLabeler(5, seed=1)(embeddings)
    assert isinstance(result, PseudoLabels)
    check_consistent(result, embeddings)
    assert adjusted_rand_score(truth, result.labels) > 0.7
    start = KMeansPseudoLabeler(5)(embeddings, initial_centroids=embeddings[:5] * 0 + 1)
    check_consistent(start, embeddings)


@pytest.mark.parametrize("members", [30, 1000])
def test_equals_slow_spherical_kmeans_from_the_same_start(members):
    # With 1000 members faiss would by itself draw 256 for each centroid.
    embeddings, _ = blobs(groups=4, members=members, noise=0.3)
    rows = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    centroids = rows[:4].copy()
    for _ in range(3):
        labels = (rows @ centroids.T).argmax(1)
        centroids = np.stack([rows[labels == k].sum(0) for k in range(4)])
        centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    expected = (rows @ centroids.T).argmax(1)
    result = KMeansPseudoLabeler(4, num_iterations=3)(embeddings, rows[:4])
    assert result.labels.tolist() == expected.tolist()


def test_is_deterministic_for_a_seed_and_leaves_the_input_alone():
    embeddings, _ = blobs(groups=20, noise=0.5)
    before = embeddings.copy()
    first, again = (KMeansPseudoLabeler(20, seed=3)(embeddings) for _ in range(2))
    other = KMeansPseudoLabeler(20, seed=4)(embeddings)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.labels, other.labels)
    np.testing.assert_array_equal(embeddings, before)


def test_is_deterministic_with_several_threads():
    embeddings = np.random.default_rng(0).standard_normal((3000, 32)).astype(np.float32)
    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        first, again = (KMeansPseudoLabeler(50)(embeddings) for _ in range(2))
    finally:
        faiss.omp_set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("chunk_size", [1, 7, 150, 10_000])
def test_chunks_change_nothing(chunk_size):
    embeddings, _ = blobs()
    whole = KMeansPseudoLabeler(5, min_cluster_size=2)(embeddings)
    chunked = KMeansPseudoLabeler(5, min_cluster_size=2, chunk_size=chunk_size)(embeddings)
    assert torch.equal(whole.labels, chunked.labels)
    torch.testing.assert_close(whole.centroids, chunked.centroids)
    torch.testing.assert_close(whole.distances, chunked.distances)


def test_arrays_tensors_and_memory_maps_agree(tmp_path):
    embeddings, _ = blobs()
    np.save(tmp_path / "embeddings.npy", embeddings)
    expected = KMeansPseudoLabeler(5, max_points=100)(embeddings)
    strided = torch.from_numpy(np.repeat(embeddings, 2, axis=1))[:, ::2]
    assert not strided.is_contiguous()
    for same in (
        np.load(tmp_path / "embeddings.npy", mmap_mode="r"),
        embeddings.astype(np.float64),
        torch.from_numpy(embeddings).requires_grad_(),
        strided,
        # Scale is of no account, not even at the ends of float32.
        embeddings * np.float32(1e30),
        embeddings * np.float32(1e-30),
        embeddings.astype(np.float64) * 1e300,
        torch.from_numpy(embeddings).double() * 1e-300,
        embeddings.astype(">f4"),
        embeddings.astype(np.longdouble),
    ):
        result = KMeansPseudoLabeler(5, max_points=100)(same)
        assert torch.equal(result.labels, expected.labels)
        torch.testing.assert_close(result.centroids, expected.centroids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    embeddings = torch.from_numpy(blobs()[0]).to(dtype)
    result = KMeansPseudoLabeler(5)(embeddings)
    assert result.centroids.dtype == torch.float32
    check_consistent(result, embeddings.double())


def test_all_points_train_unless_asked(monkeypatch):
    seen = []
    train = faiss.Kmeans.train
    monkeypatch.setattr(
        faiss.Kmeans, "train", lambda self, x, **kw: (seen.append(x), train(self, x, **kw))
    )
    embeddings = np.random.default_rng(0).standard_normal((1500, 4)).astype(np.float32)
    KMeansPseudoLabeler(2)(embeddings)
    result = KMeansPseudoLabeler(2, max_points=64, chunk_size=10)(embeddings)
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(seen[0], units, atol=1e-6)
    rows = (seen[1] @ units.T).argmax(axis=1)
    np.testing.assert_allclose(seen[1], units[rows], atol=1e-6)
    assert len(set(rows.tolist())) == 64
    assert rows.min() < 300
    assert rows.max() > 1200
    assert len(result.labels) == 1500
    check_consistent(result, embeddings)


def test_no_warning_with_few_points_per_cluster(capfd):
    embeddings = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = KMeansPseudoLabeler(20)(embeddings)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    check_consistent(result, embeddings)


def test_warm_start_keeps_the_meaning_of_labels():
    embeddings, truth = blobs(noise=0.05)
    centroids = np.stack([embeddings[truth == group].mean(0) for group in range(5)])
    order = [3, 1, 4, 0, 2]
    result = KMeansPseudoLabeler(5)(embeddings, torch.from_numpy(centroids[order]))
    assert [order[label] for label in result.labels.tolist()] == truth.tolist()


def test_warm_start_with_another_number_of_centroids():
    embeddings, truth = blobs(noise=0.05)
    centroids = np.stack([embeddings[truth == group].mean(0) for group in range(5)])
    fewer = KMeansPseudoLabeler(5)(embeddings, centroids[:2])
    assert [fewer.labels[truth == group].mode().values.item() for group in (0, 1)] == [0, 1]
    assert len(fewer.centroids) == 5
    useless = -centroids[:1] - centroids[1:2]
    # Groups grow, so that an order by size would show.
    unequal = np.concatenate([np.flatnonzero(truth == group)[: 5 + group] for group in range(5)])
    more = KMeansPseudoLabeler(5)(embeddings[unequal], np.concatenate([useless, centroids]))
    assert more.labels.tolist() == truth[unequal].tolist()


def test_empty_clusters_are_dropped_with_a_warning():
    embeddings = np.repeat(np.eye(4, 8, dtype=np.float32), 10, axis=0)
    with pytest.warns(UserWarning, match=r"only 4 of 20 clusters are used: .* num_clusters"):
        result = KMeansPseudoLabeler(20)(embeddings)
    assert len(result.centroids) == 4
    check_consistent(result, embeddings)
    assert len(set(zip(result.labels.tolist(), np.repeat(range(4), 10).tolist()))) == 4  # noqa: B905


def test_a_huge_cluster_is_reported():
    rng = np.random.default_rng(0)
    embeddings = np.eye(6, dtype=np.float32)[np.r_[np.zeros(94, int), np.arange(6)]]
    embeddings += 1e-3 * rng.standard_normal(embeddings.shape).astype(np.float32)
    with pytest.warns(UserWarning, match=r"one cluster contains \d+ of 100 images"):
        KMeansPseudoLabeler(6)(embeddings, np.eye(6))


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_total_collapse_is_an_error(noise):
    rng = np.random.default_rng(0)
    embeddings = np.ones((2000, 8)) + noise * rng.standard_normal((2000, 8))
    with pytest.raises(ValueError, match=r"^all 2000 embeddings are nearly identical .*collapsed"):
        KMeansPseudoLabeler(50)(embeddings)


def test_small_clusters_become_noise():
    embeddings, truth = blobs(groups=3, members=10, noise=0.01)
    loner = -embeddings.mean(axis=0, keepdims=True)
    embeddings = np.concatenate([embeddings, loner])
    start = np.stack([embeddings[:-1][truth == group][0] for group in range(3)] + [loner[0]])
    all_kept = KMeansPseudoLabeler(4)(embeddings, start)
    assert all_kept.labels.bincount().min() == 1
    result = KMeansPseudoLabeler(4, min_cluster_size=2)(embeddings, start)
    assert result.labels[-1] == -1
    check_consistent(result, embeddings)
    with pytest.raises(ValueError, match=r"all 31 embeddings are noise: .*min_cluster_size=32"):
        KMeansPseudoLabeler(4, min_cluster_size=32)(embeddings)


@pytest.mark.parametrize(("count", "expected"), [(2, 2), (29, 2), (200, 20)])
def test_auto_is_a_tenth(count, expected):
    embeddings = np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)
    assert len(KMeansPseudoLabeler("auto")(embeddings).centroids) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_clusters": 1}, 'num_clusters must be an integer of at least 2 or "auto", got 1'),
        ({"num_clusters": 2.5}, "num_clusters must be .* got 2.5"),
        ({"num_clusters": "ten"}, "num_clusters must be .* got 'ten'"),
        ({"num_clusters": True}, "num_clusters must be .* got True"),
        ({"num_iterations": 0}, "num_iterations must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer from 0 to 2147483647, got -1"),
        ({"max_points": 1}, "max_points must be .* at least 2 or None, got 1"),
        ({"num_clusters": 50, "max_points": 20}, "num_clusters=50 is more than max_points=20"),
        ({"min_cluster_size": 0}, "min_cluster_size must be .* got 0"),
        ({"chunk_size": 0}, "chunk_size must be .* got 0"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        KMeansPseudoLabeler(**kwargs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_rows_are_counted(value):
    embeddings = blobs()[0]
    embeddings[[3, 70, 149], [0, 5, 1]] = value
    for chunk_size in (50, 1000):
        with pytest.raises(ValueError, match=r"^3 of 150 rows of embeddings are NaN or infinite"):
            KMeansPseudoLabeler(5, chunk_size=chunk_size)(torch.from_numpy(embeddings))


def test_zero_rows_are_counted():
    embeddings = blobs()[0]
    embeddings[[3, 70]] = 0
    with pytest.raises(ValueError, match=r"^2 of 150 rows of embeddings are all zero"):
        KMeansPseudoLabeler(5)(embeddings)


def test_bad_inputs():
    embeddings = blobs()[0]
    labeler = KMeansPseudoLabeler(200)
    with pytest.raises(
        ValueError, match=r"num_clusters=200 is more than the number of embeddings, 150: lower it"
    ):
        labeler(embeddings)
    with pytest.raises(TypeError, match="embeddings must be a tensor or an array, got list"):
        labeler(embeddings.tolist())
    for wrong in (embeddings[0], embeddings[:0], embeddings[:, :0]):
        with pytest.raises(ValueError, match=r"embeddings must be .* not empty, got "):
            labeler(wrong)
    labeler = KMeansPseudoLabeler(5)
    with pytest.raises(ValueError, match="initial_centroids have 15 dimensions, embeddings 16"):
        labeler(embeddings, embeddings[:5, :15])
    with pytest.raises(ValueError, match="1 of 5 rows of initial_centroids are all zero"):
        labeler(embeddings, embeddings[:5] * (np.arange(5) > 0)[:, None])


def test_labels_of_any_clusterer():
    embeddings, _ = blobs(groups=3, members=4)
    given = np.array([7, 7, -1, 3, 3, 3, -5, 90, 90, 7, 3, 8])
    expected = [1, 1, -1, 0, 0, 0, -1, 3, 3, 1, 0, 2]
    for labels in (given, torch.from_numpy(given), given.tolist(), given.astype(np.int8)):
        result = pseudo_labels_from(labels, embeddings)
        assert result.labels.tolist() == expected
        check_consistent(result, embeddings)
    without_single = pseudo_labels_from(given, embeddings, min_cluster_size=2, chunk_size=5)
    assert without_single.labels.tolist() == [1, 1, -1, 0, 0, 0, -1, 2, 2, 1, 0, -1]
    check_consistent(without_single, embeddings)


def test_members_that_cancel_out_still_have_a_unit_centroid():
    embeddings = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    result = pseudo_labels_from([0, 0, 1], embeddings)
    torch.testing.assert_close(result.centroids, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(result.distances, torch.tensor([0.0, 2.0, 0.0]))


def test_bad_labels():
    embeddings = blobs()[0]
    with pytest.raises(ValueError, match=r"labels must have the shape \(150,\) .* got \(3,\)"):
        pseudo_labels_from([0, 1, 2], embeddings)
    with pytest.raises(ValueError, match=r"labels must be integers, got dtype float64"):
        pseudo_labels_from(np.zeros(150), embeddings)
    with pytest.raises(ValueError, match=r"all 150 embeddings are noise"):
        pseudo_labels_from(np.full(150, -1), embeddings)
    with pytest.raises(ValueError, match=r"min_cluster_size must be .* got 0"):
        pseudo_labels_from(np.zeros(150, int), embeddings, min_cluster_size=0)
    with pytest.raises(ValueError, match=r"150 of 150 rows of embeddings are NaN"):
        pseudo_labels_from(np.zeros(150, int), embeddings * np.nan)


def test_hdbscan_as_pseudo_labeler():
    def hdbscan(embeddings, initial_centroids=None):
        labels = HDBSCAN(min_cluster_size=8, copy=True).fit_predict(embeddings)
        return pseudo_labels_from(labels, embeddings)

    embeddings, truth = blobs(groups=3, noise=0.03)
    outliers = np.random.default_rng(1).standard_normal((6, 16)).astype(np.float32) * 3
    embeddings = np.concatenate([embeddings, outliers])
    result = hdbscan(embeddings)
    assert isinstance(hdbscan, PseudoLabeler)
    assert isinstance(KMeansPseudoLabeler(), PseudoLabeler)
    assert (result.labels == -1).sum() >= 6
    clustered = result.labels[:90] >= 0
    assert adjusted_rand_score(truth[clustered.numpy()], result.labels[:90][clustered]) == 1
    check_consistent(result, embeddings)


@pytest.mark.parametrize(
    ("count", "least", "expected"), [(15, 2, 2), (300, 2, 30), (300, 40, 40), (10**6, 2, 10_000)]
)
def test_auto_is_a_tenth_of_the_images(count, least, expected):
    assert auto_clusters(count, least) == expected
    if least == 2:
        assert KMeansPseudoLabeler("auto").number_for(count) == expected
        assert KMeansPseudoLabeler("auto", max_points=20).number_for(count) == min(expected, 20)


def test_nearest_others_leave_the_own_row_out_even_among_copies():
    rows = np.float32([[1, 0], [1, 0], [0.6, 0.8], [0, 1]])
    similarities, found = nearest_others(rows, np.array([0, 3]), 2)
    assert found.tolist() == [[1, 2], [2, 0]] or found.tolist() == [[1, 2], [2, 1]]
    np.testing.assert_allclose(similarities, [[1, 0.6], [0.8, 0]], atol=1e-6)
    assert nearest_others(rows[:2], np.array([0]), 5)[1].tolist() == [[1]]
