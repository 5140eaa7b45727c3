"""The index of codes: what it finds, what it holds, and that it never holds the embeddings."""

import numpy as np
import pytest

from pml_tacl import search
from pml_tacl.search import ImageIndex

COUNT, D, K = 3_000, 16, 10
LEAST = 2_000  # as if so few were enough to learn from: the tests stay short


def clustered(count=COUNT, dim=D, seed=0):
    """Unit rows around a centre for each twenty."""
    rng = np.random.default_rng(seed)
    centroids = rng.standard_normal((count // 20, dim), dtype=np.float32)
    rows = centroids[np.arange(count) % len(centroids)]
    rows = rows + 0.5 * rng.standard_normal((count, dim), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def names(count, start=0):
    return [f"{i % 7}/{i}.jpg" for i in range(start, start + count)]


@pytest.fixture(scope="module", autouse=True)
def few_are_enough():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "IVFPQ_FROM", LEAST)
        yield


@pytest.fixture(scope="module")
def rows():
    return clustered()


@pytest.fixture(scope="module")
def made(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, 3 * rows)  # of any length
    mapped = np.load(path, mmap_mode="r")
    return ImageIndex(mapped, names(COUNT), "x", kind="ivfpq")


def exact(rows, queries, k=K):
    near = queries @ rows.T
    order = np.argsort(-near, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(near, order, axis=1), order


def recall(found, expected):
    pairs = zip(found, expected, strict=True)
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs])


def test_nearly_all_neighbours_are_found_and_ranked_exactly(made, rows):
    queries = rows[:300] + 0.1 * clustered(seed=1)[:300]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    similarities, found = made.search(queries, K)
    near, expected = exact(rows, queries)
    assert made.kind == "ivfpq"
    assert recall(found, expected) > 0.97
    # Codes alone would be wrong by hundredths.
    of_found = np.einsum("qd,qkd->qk", queries, rows[found])
    assert np.allclose(similarities, of_found, atol=1e-5)
    assert (np.diff(similarities, axis=1) <= 1e-6).all()
    assert np.allclose(similarities[:, 0], near[:, 0], atol=1e-5)


def test_memory_is_a_byte_for_eight_dimensions(made):
    inverted = search.faiss.extract_index_ivf(made._index)
    assert inverted.code_size == D // 8
    assert isinstance(made._rows.source, np.memmap)


def test_what_is_saved_finds_the_same_from_a_memory_map(made, rows, tmp_path):
    made.save(tmp_path)
    loaded = ImageIndex.load(tmp_path)
    assert loaded.kind == "ivfpq"
    assert isinstance(loaded._rows, np.memmap)
    for one, other in zip(made.search(rows[:50], K), loaded.search(rows[:50], K), strict=True):
        assert np.allclose(one, other, atol=1e-6)
    assert np.allclose(np.load(tmp_path / "embeddings.npy"), rows, atol=1e-6)
    assert np.allclose(loaded.embeddings, rows, atol=1e-6)
    loaded.save(tmp_path)  # over the file that it reads
    assert np.allclose(ImageIndex.load(tmp_path).embeddings, rows, atol=1e-6)
    np.save(tmp_path / "embeddings.npy", rows[:-1])
    with pytest.raises(ValueError, match=r"embeddings\.npy"):
        ImageIndex.load(tmp_path)


def test_a_folder_is_searched_exactly(made, rows):
    inside = np.array([i for i in range(COUNT) if i % 7 == 3])
    similarities, found = made.search(rows[:20], K, folder="3")
    near, expected = exact(rows[inside], rows[:20])
    assert np.allclose(similarities, near, atol=1e-5)
    assert recall(found, inside[expected]) == 1


@pytest.mark.slow
def test_copies_are_all_found_in_the_order_of_the_files(rows):
    many = np.concatenate([rows, rows[:3], rows[:3]])
    index = ImageIndex(many, names(len(many)), "x", kind="ivfpq")
    similarities, found = index.search(rows[:3], 4)
    assert np.allclose(similarities[:, :3], 1, atol=1e-5)
    expected = np.arange(3)[:, None] + np.array([0, COUNT, COUNT + 3])
    assert np.array_equal(found[:, :3], expected)


@pytest.mark.slow
def test_images_come_and_go(rows):
    index = ImageIndex(rows, names(COUNT), "x", kind="ivfpq")
    new = clustered(500, seed=2)
    index.add(new, names(500, COUNT))
    assert len(index) == COUNT + 500
    assert index.kind == "ivfpq"
    assert (index.search(new[:50], 1)[1][:, 0] == np.arange(COUNT, COUNT + 50)).mean() > 0.95
    index.remove(names(100))
    assert np.allclose(index.embeddings, np.concatenate([rows[100:], new]), atol=1e-6)
    assert (index.search(rows[100:150], 1)[1][:, 0] == np.arange(50)).mean() > 0.95
    index.remove(names(1500, 100))
    assert index.kind == "flat"  # too few are left to learn codes from
    assert np.array_equal(index.search(rows[1600:1650], 1)[1][:, 0], np.arange(50))


@pytest.mark.slow
def test_auto_takes_codes_above_a_number_of_images(rows, monkeypatch):
    monkeypatch.setattr(search, "FLAT_UP_TO", 100)
    monkeypatch.setattr(search, "HNSW_UP_TO", COUNT - 1)
    assert ImageIndex(rows[:200], names(200), "x").kind == "hnsw"
    index = ImageIndex(rows, names(COUNT), "x")
    assert index.kind == "ivfpq"
    index.remove(names(COUNT - 200))
    assert index.kind == "hnsw"


@pytest.mark.parametrize("count", [3, LEAST - 1])
def test_few_images_are_looked_at_one_by_one(rows, count):
    assert ImageIndex(rows[:count], names(count), "x", kind="ivfpq").kind == "flat"


@pytest.mark.slow
def test_any_number_of_dimensions_fits():
    rows = clustered(2_200, 13)
    index = ImageIndex(rows, names(len(rows)), "x", kind="ivfpq")
    assert recall(index.search(rows[:100], K)[1], exact(rows, rows[:100])[1]) > 0.95
