import os

import numpy as np
import pytest
import torch

from pml_tacl.search import PictureIndex


def make_index(count=20, dim=8):
    rows = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    return PictureIndex(rows, [f"{i}.jpg" for i in range(count)], "photos"), rows


def test_search_is_the_order_of_cosines():
    index, rows = make_index()
    queries = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    similarities, found = index.search(queries, k=6)
    unit = rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)
    asked = torch.nn.functional.normalize(queries, dim=1).numpy()
    expected = np.argsort(-asked @ unit.T, axis=1)[:, :6]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(similarities, np.take_along_axis(asked @ unit.T, found, 1), 1e-5)
    np.testing.assert_allclose(index.embeddings, unit, rtol=1e-5)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    index, rows = make_index(3)
    index.files = ["a.jpg", "ü/b.jpg", os.fsdecode(b"no text \xff.jpg")]
    index.save(tmp_path)
    loaded = PictureIndex.load(tmp_path)
    assert loaded.files == index.files
    assert loaded.root == index.root
    assert loaded.root.is_absolute()
    assert loaded.paths([2, 0]) == [index.root / index.files[2], index.root / "a.jpg"]
    np.testing.assert_array_equal(loaded.embeddings, np.load(tmp_path / "embeddings.npy"))
    for first, second in zip(loaded.search(rows), index.search(rows), strict=True):
        np.testing.assert_array_equal(first, second)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "embeddings.npy", "files.json", "index.faiss",
    ]  # fmt: skip


def test_fewer_pictures_than_asked_for_are_all_found():
    index, rows = make_index(3)
    similarities, found = index.search(rows[:1], k=9)
    assert sorted(found[0].tolist()) == [0, 1, 2]
    assert similarities.max() <= 1


def test_wrong_arguments():
    index, rows = make_index()
    with pytest.raises(ValueError, match="files must be as many as embeddings, 20, got 1"):
        PictureIndex(rows, ["a.jpg"], "photos")
    with pytest.raises(ValueError, match="embeddings have 7 dimensions and the index 8"):
        index.search(rows[:, :7])
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        index.search(rows, k=0)
    rows[3] = np.nan
    with pytest.raises(ValueError, match="1 of 20 rows of embeddings are NaN"):
        index.search(rows)


@pytest.mark.parametrize("content", ["{", "[]", '{"root": "x"}', "3"])
def test_a_damaged_list_of_files_says_so(tmp_path, content):
    make_index()[0].save(tmp_path)
    (tmp_path / "files.json").write_text(content)
    with pytest.raises(ValueError, match=r"files\.json is no list of pictures"):
        PictureIndex.load(tmp_path)
