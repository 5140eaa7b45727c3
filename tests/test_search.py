import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from pml_tacl import AttentionEmbedder
from pml_tacl.cli import run_folder as runs
from pml_tacl.cli.main import main
from pml_tacl.cli.queries import ImageList, query_paths
from pml_tacl.datasets import ImageFiles
from pml_tacl.datasets.image_files import load_rgb
from pml_tacl.evaluation import embed
from pml_tacl.search import ImageIndex

SEARCH = Path(__file__).parents[1] / "examples" / "search.py"


def make_index(count=20, dim=8):
    rows = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    return ImageIndex(rows, [f"{i}.jpg" for i in range(count)], "photos"), rows


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
    loaded = ImageIndex.load(tmp_path)
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


def test_fewer_images_than_asked_for_are_all_found():
    index, rows = make_index(3)
    similarities, found = index.search(rows[:1], k=9)
    assert sorted(found[0].tolist()) == [0, 1, 2]
    assert similarities.max() <= 1


def test_wrong_arguments():
    index, rows = make_index()
    with pytest.raises(
        ValueError, match="files must have one entry for each of the 20 embeddings, got 1"
    ):
        ImageIndex(rows, ["a.jpg"], "photos")
    with pytest.raises(ValueError, match="embeddings have 7 dimensions and the index 8"):
        index.search(rows[:, :7])
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        index.search(rows, k=0)
    for wrong in (rows.astype(complex), rows.astype(str), torch.from_numpy(rows).cfloat()):
        with pytest.raises(TypeError, match="embeddings must be real numbers, got "):
            index.search(wrong)
    rows[3] = np.nan
    with pytest.raises(ValueError, match="1 of 20 rows of embeddings are NaN"):
        index.search(rows)


@pytest.mark.parametrize("content", ["{", "[]", '{"root": "x"}', "3"])
def test_a_damaged_list_of_files_says_so(tmp_path, content):
    make_index()[0].save(tmp_path)
    (tmp_path / "files.json").write_text(content)
    with pytest.raises(ValueError, match=r"files\.json is not a list of images"):
        ImageIndex.load(tmp_path)


@pytest.mark.parametrize("content", [{"stamps": []}, {"stamps": [None], "files": []}])
def test_lists_that_do_not_belong_together_say_so(tmp_path, content):
    make_index()[0].save(tmp_path)
    listed = json.loads((tmp_path / "files.json").read_text())
    (tmp_path / "files.json").write_text(json.dumps({**listed, **content}))
    with pytest.raises(ValueError, match="do not fit together"):
        ImageIndex.load(tmp_path)


def test_the_list_of_files_is_json_of_one_entry_a_line(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"12345")
    rows = np.eye(4)[[0, 1, 1]]
    index = ImageIndex(rows, ["a.jpg", "gone.jpg", "ü.jpg"], photos, exclude=["x"])
    index.save(tmp_path)
    listed = json.loads((tmp_path / "files.json").read_text("ascii"))
    assert listed["files"] == ["a.jpg", "gone.jpg", "ü.jpg"]
    assert listed["entries"] == [0, 1, 1]
    assert listed["exclude"] == ["x"]
    assert listed["stamps"] == [[5, (photos / "a.jpg").stat().st_mtime_ns], None, None]
    assert ImageIndex.load(tmp_path).changes() == ([], [], ["gone.jpg", "ü.jpg"])


def test_long_lists_of_files_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("pml_tacl.search._CHUNK", 4)
    names = [f"{i}.jpg" for i in range(11)]
    index = ImageIndex(np.eye(11), names, tmp_path)
    index.save(tmp_path)
    assert json.loads((tmp_path / "files.json").read_text())["files"] == names
    assert ImageIndex.load(tmp_path).files == names


def test_an_index_of_an_earlier_version_is_read(tmp_path):
    index, rows = make_index(4)
    index.save(tmp_path)
    listed = json.loads((tmp_path / "files.json").read_text())
    short = {name: listed[name] for name in ("root", "files")}
    (tmp_path / "files.json").write_text(json.dumps(short))
    loaded = ImageIndex.load(tmp_path)
    loaded.add(rows[:1], ["new.jpg"])
    assert loaded.files[-1] == "new.jpg"


def clustered(count, dim=32, seed=0):
    """Rows around many centres, as embeddings lie, for which a graph is harder than for noise."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((count // 10, dim))
    rows = centres[rng.integers(len(centres), size=count)] + 0.3 * rng.standard_normal((count, dim))
    return rows.astype(np.float32)


def test_a_graph_finds_nearly_all_that_a_look_at_every_image_finds(tmp_path):
    rows = clustered(4000)
    files = [f"{i % 3}/{i}.jpg" for i in range(4000)]
    flat, graph = (ImageIndex(rows, files, "x", kind=kind) for kind in ("flat", "hnsw"))
    assert (flat.kind, graph.kind) == ("flat", "hnsw")
    queries = clustered(200, seed=1)
    exact, found = flat.search(queries, k=10)[1], graph.search(queries, k=10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
    assert recall > 0.97
    graph.save(tmp_path)
    loaded = ImageIndex.load(tmp_path)
    assert loaded.kind == "hnsw"
    np.testing.assert_array_equal(loaded.search(queries, k=10)[1], found)
    np.testing.assert_allclose(loaded.embeddings, flat.embeddings, rtol=1e-6)
    # A walk that asks for more than it can meet is finished by a look at every image.
    assert sorted(graph.search(queries[:1], k=4000)[1][0].tolist()) == list(range(4000))


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_search_in_a_folder_finds_its_own_images_exactly(kind):
    rows = clustered(300, dim=8)
    files = [f"{'ab'[i % 2]}{'/deep' if i % 3 else ''}/{i}.jpg" for i in range(299)]
    index = ImageIndex(rows, [*files, "ab/odd.jpg"], "x", kind=kind)
    queries = clustered(20, dim=8, seed=2)
    inside = np.array([i for i, file in enumerate(files) if file.startswith("a/")])
    unit, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, queries))
    expected = inside[np.argsort(-asked @ unit[inside].T, axis=1)[:, :5]]
    similarities, found = index.search(queries, k=5, folder="a")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(similarities[:, 0], (asked @ unit[inside].T).max(1), rtol=1e-5)
    assert index.search(queries, k=500, folder="a/")[1].shape == (20, len(inside))
    assert index.search(queries, k=2, folder="b/deep")[0].shape == (20, 2)
    np.testing.assert_array_equal(index.rows_in("."), np.arange(300))
    assert index.rows_in("ab").tolist() == [299]
    with pytest.raises(
        ValueError, match="contains no indexed image; the indexed folders are a, a/d"
    ):
        index.search(queries, folder="c")


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_adding_and_removing_gives_the_index_of_what_is_there(kind):
    rows = clustered(200, dim=8)
    files = [f"{i}.jpg" for i in range(200)]
    index = ImageIndex(rows[:120], files[:120], "x", kind=kind)
    index.add(torch.from_numpy(rows[120:150]), files[120:150])
    index.remove(files[:30])
    index.add(np.concatenate([-rows[40:50], rows[150:]]), [*files[40:50], *files[150:]])
    here = [*range(30, 40), *range(50, 150), *range(40, 50), *range(150, 200)]
    expected = np.array(rows)
    expected[40:50] *= -1
    assert index.files == [files[i] for i in here]
    assert index.kind == kind
    plain = ImageIndex(expected[here], index.files, "x", kind="flat")
    np.testing.assert_allclose(index.embeddings, plain.embeddings, rtol=1e-6)
    np.testing.assert_array_equal(index.search(expected, k=1)[1], plain.search(expected, k=1)[1])
    index.remove([])
    assert len(index) == len(here)


def test_the_kind_follows_the_number_of_images(monkeypatch):
    monkeypatch.setattr("pml_tacl.search.FLAT_UP_TO", 50)
    rows = clustered(60, dim=8)
    files = [f"{i}.jpg" for i in range(60)]
    index = ImageIndex(rows[:50], files[:50], "x")
    assert index.kind == "flat"
    index.add(rows[50:], files[50:])
    assert index.kind == "hnsw"
    index.remove(files[:10])
    assert index.kind == "flat"
    assert index.search(rows[10:], k=1)[1][:, 0].tolist() == list(range(50))


def test_what_cannot_be_added_or_removed_changes_nothing():
    index, rows = make_index()
    before = index.embeddings
    for wrong, files, message in (
        (rows[:2, :7], ["a", "b"], "embeddings have 7 dimensions and the index 8"),
        (rows[:2], ["a", "a"], "files must contain each image once"),
        (rows[:2], ["a"], "each of the 2 embeddings, got 1"),
        (rows[:2] * np.nan, ["0.jpg", "b"], "2 of 2 rows of embeddings are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(wrong, files)
    with pytest.raises(ValueError, match=r"files: 'none.jpg' is not in the index"):
        index.remove(["0.jpg", "none.jpg"])
    with pytest.raises(ValueError, match="all images of the index"):
        index.remove(index.files)
    np.testing.assert_array_equal(index.embeddings, before)
    with pytest.raises(ValueError, match=r"kind must be one of .*ivfpq, got 'ivf'"):
        ImageIndex(rows, index.files, "x", kind="ivf")


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((24, 24)).save(path)


def test_changes_are_told_by_name_size_and_time(tmp_path):
    for number in range(4):
        draw(tmp_path / "in" / f"{number}.png", number)
    files = [f"in/{number}.png" for number in range(4)]
    index = ImageIndex(np.eye(4), files, tmp_path)
    index.save(tmp_path / "run")
    assert ImageIndex.load(tmp_path / "run").changes() == ([], [], [])
    draw(tmp_path / "in" / "1.png", 9)
    os.utime(tmp_path / "in" / "1.png", ns=(1, 1))
    (tmp_path / "in" / "2.png").unlink()
    draw(tmp_path / "new.png", 5)
    assert index.changes() == (["new.png"], ["in/1.png"], ["in/2.png"])
    index.add(np.eye(4)[:2], ["in/1.png", "new.png"])
    index.remove(["in/2.png"])
    assert index.changes() == ([], [], [])
    os.utime(tmp_path / "new.png", ns=(5, 5))
    assert index.changes().changed == ["new.png"]


def test_a_query_is_a_image_a_folder_or_what_is_piped_in(tmp_path):
    draw(tmp_path / "a.png", 0)
    draw(tmp_path / "in ü" / "b.png", 1)
    a, b = tmp_path / "a.png", tmp_path / "in ü" / "b.png"

    def asked(query, piped=b""):
        return query_paths(query, io.BytesIO(piped), tmp_path / "in ü")

    assert asked(a) == [a]
    assert asked(tmp_path) == [a, b]
    assert asked("-", f"{b}\n{a}\r\n\n".encode()) == [b, a]
    assert asked("-", f"{tmp_path / 'none.png'}".encode()) == [tmp_path / "none.png"]
    (piped,) = asked("-", b.read_bytes())
    assert np.array_equal(load_rgb(piped), load_rgb(b))
    with pytest.raises(ValueError, match="piped input is empty"):
        asked("-", b" \n")


def test_a_list_of_images_leaves_out_the_broken_or_stops(tmp_path, caplog):
    draw(tmp_path / "a.png", 0)
    (tmp_path / "b.png").write_text("no image")
    paths = [tmp_path / "b.png", tmp_path / "a.png"]
    images = ImageList(paths, strict=False)
    assert "b.png: not an image of a known format" in caplog.text
    assert (len(images), images[0][1], images[0][0].size) == (1, -1, (24, 24))
    assert ImageList(paths[1:], lambda image: image.size)[0] == ((24, 24), -1)
    with pytest.raises(OSError, match=r"b\.png: not an image of a known format"):
        ImageList(paths)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as train_folder.py leaves it, of a model that was not trained."""
    folder = tmp_path_factory.mktemp("run")
    for number in range(6):
        draw(folder / "images" / "ab"[number % 2] / f"{number}.png", number)
    torch.manual_seed(0)
    model = AttentionEmbedder("test_resnet", embedding_dim=8).eval()
    model.save_pretrained(folder / "run" / "model")
    runs.write_json(folder / "run" / "run.json", {"image_size": [32, 32]})
    images = ImageFiles(folder / "images", transform=model.transform(image_size=32), progress=False)
    embeddings, _ = embed(model, images, progress=False)
    ImageIndex(embeddings, images.names, folder / "images").save(folder / "run")
    return folder


@pytest.mark.slow
def test_the_script_reads_a_pipe_and_keeps_to_a_folder(warm, run):
    image = run / "images" / "b" / "3.png"
    words = [SEARCH, run / "run", "-", "-k", "2", "--folder", "b", "--out", run / "out.png"]
    done = warm.run(words, stdin=image.read_bytes())
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.splitlines()[2].split() == ["1", "1.0000", "b/3.png"]
    assert printed.splitlines()[3].split()[2].startswith("b/")


def test_the_script_finds_what_is_left_where_an_indexed_image_is_gone(run, tmp_path, capsys,
                                                                        monkeypatch):  # fmt: skip
    here = tmp_path / "here"
    shutil.copytree(run, here)
    (here / "images" / "b" / "1.png").unlink()
    arguments = [here / "run", here / "images" / "b" / "3.png", "--images", here / "images"]
    monkeypatch.setattr(sys, "argv", ["search.py", *map(str, arguments), "--out", "out.png"])
    monkeypatch.chdir(here)
    runpy.run_path(str(SEARCH), run_name="__main__")
    printed = capsys.readouterr()
    assert len([line for line in printed.out.splitlines() if line.endswith(".png")]) == 8
    gone = here / "images" / "b" / "1.png"
    assert printed.err.splitlines()[-1] == (
        f"{gone} is in the index but can no longer be read: give --update"
    )
    assert (here / "out.png").is_file()


def test_the_script_updates_the_index(run, capsys, monkeypatch):
    folder = run / "images"
    draw(folder / "new.png", 3)  # the pixels of b/3.png, which goes
    (folder / "b" / "3.png").unlink()
    (folder / "broken.png").write_text("no image")
    arguments = [run / "run", folder / "new.png", "--update", "-k", "1", "--out", run / "out.png"]
    monkeypatch.setattr(sys, "argv", ["search.py", *map(str, arguments)])
    runpy.run_path(str(SEARCH), run_name="__main__")
    printed = capsys.readouterr().out
    assert "1 image embedded, 1 removed, 6 in the index" in printed
    assert printed.splitlines()[-2].split() == ["1", "1.0000", "new.png"]
    index = ImageIndex.load(run / "run")
    assert index.changes() == (["broken.png"], [], [])
    capsys.readouterr()
    changed = folder / "new.png"
    changed.write_text("no image any more")
    os.utime(changed, (1, 1))
    arguments = [run / "run", folder, "--update", "--quiet", "--json"]  # a folder of queries
    main(["search", *map(str, arguments)])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["update"] == {"embedded": 0, "removed": 1, "indexed": 5}
    assert "checking" not in printed.err


def crowded(count, share, crowds, jitter=0.0, dim=64):
    """Noise, of which a share is copies, or near copies, of a few rows."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count, dim)).astype(np.float32)
    many = int(count * share)
    members = rng.standard_normal((crowds, dim))[np.arange(many) % crowds]
    rows[:many] = members + jitter * rng.standard_normal((many, dim))
    return rng.permutation(rows)


@pytest.mark.parametrize(
    ("share", "crowds", "jitter"),
    [(0.25, 1, 0), (0.5, 1, 0), (0.5, 20, 0), (0.5, 20, 1e-3), (1, 1000, 0), (0.5, 1, 1e-7)],
)
def test_copies_do_not_hide_others_from_a_graph(share, crowds, jitter):
    rows = crowded(4000, share, crowds, jitter)
    files = [f"{i}.jpg" for i in range(4000)]
    flat, graph = (ImageIndex(rows, files, "x", kind=kind) for kind in ("flat", "hnsw"))
    rng = np.random.default_rng(1)
    near = rows[:200] + 0.3 * rng.standard_normal((200, 64))
    for queries in (near, rng.standard_normal((200, 64))):
        exact, found = flat.search(queries, k=10)[0], graph.search(queries, k=10)[0]
        # By similarity, since copies are as good as each other.
        assert (found >= exact[:, -1:] - 1e-5).mean() > 0.95
        assert (found[:, 0] >= exact[:, 0] - 1e-5).mean() > 0.98


def test_copies_up_to_rounding_are_few_entries_of_a_graph():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((900, 64)).astype(np.float32)
    rows[300:] = rows[:1] * rng.uniform(0.1, 10, (600, 1))
    files = [f"{i}.jpg" for i in range(900)]
    index = ImageIndex(rows[:700], files[:700], "x", kind="hnsw")
    index.add(rows[700:], files[700:])
    assert index._index.ntotal < 330
    similarities, found = index.search(rows[:1], k=601)
    assert sorted(found[0]) == [0, *range(300, 900)]
    np.testing.assert_allclose(similarities, 1, atol=1e-5)
    assert ImageIndex(rows, files, "x", kind="flat")._index.ntotal > 330  # that one is exact


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_all_copies_are_found_in_the_order_of_files(kind, tmp_path):
    rows = clustered(40, dim=8)
    rows[[3, 9, 10, 31]] = rows[3]
    rows[[5, 6]] = rows[5]
    files = [f"{'ab'[i % 2]}/{i}.jpg" for i in range(40)]
    index = ImageIndex(rows, files, "x", kind=kind)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(index.embeddings, unit, rtol=1e-6)

    def check(index, rows, files):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        similarities, found = index.search(rows, k=len(files))
        # From the most similar to the least, equal ones by row.
        rounded = (unit @ unit.T).round(5)
        rounded[np.arange(len(rows)), np.arange(len(rows))] = 1
        np.testing.assert_allclose(similarities, -np.sort(-unit @ unit.T), atol=1e-5)
        assert (np.sort(found) == np.arange(len(files))).all()
        for row, order in zip(rows, found.tolist(), strict=True):
            same = np.flatnonzero((rows == row).all(axis=1)).tolist()
            assert order[: len(same)] == same
            assert index.search(row[None], k=2)[1][0].tolist() == order[:2]

    check(index, rows, files)
    assert index.search(rows[[3]], k=3, folder="b")[1][0, :2].tolist() == [3, 9]
    assert index.search(rows[[3]], k=99, folder="a")[1].shape == (1, 20)
    index.save(tmp_path)
    loaded = ImageIndex.load(tmp_path)
    check(loaded, rows, files)
    # Copies of what is there, of each other, and of nothing.
    more = np.concatenate([rows[[3, 0]], rows[[7]] + 1, rows[[7]] + 1, rows[[6]]])
    loaded.add(more, [f"c/{i}.jpg" for i in range(5)])
    rows, files = np.concatenate([rows, more]), loaded.files
    check(loaded, rows, files)
    loaded.remove(["b/3.jpg", "a/10.jpg", "c/2.jpg"])
    check(loaded, np.delete(rows, [3, 10, 42], axis=0), loaded.files)
    loaded.save(tmp_path)
    np.testing.assert_array_equal(ImageIndex.load(tmp_path).embeddings, loaded.embeddings)


def test_each_embedding_is_kept_once(tmp_path):
    rows = np.eye(4, dtype=np.float32)[[0, 1, 1, 2, 1, 0]]
    index = ImageIndex(rows, list("abcdef"), "x")
    assert index._index.ntotal == 3
    index.add(np.eye(4)[[1, 3]], ["g", "h"])
    assert index._index.ntotal == 4
    index.save(tmp_path)
    listed = json.loads((tmp_path / "files.json").read_text())
    assert listed["entries"] == [0, 1, 1, 2, 1, 0, 1, 3]
    (tmp_path / "files.json").write_text(json.dumps({**listed, "entries": [0] * 8}))
    with pytest.raises(ValueError, match="do not fit together"):
        ImageIndex.load(tmp_path)


def test_an_earlier_index_that_holds_copies_is_added_to(tmp_path):
    rows = clustered(20, dim=8)
    rows[4] = rows[2]
    index = ImageIndex(rows, [f"{i}" for i in range(20)], "x")
    index.save(tmp_path)
    listed = json.loads((tmp_path / "files.json").read_text())
    del listed["entries"]
    (tmp_path / "files.json").write_text(json.dumps(listed))
    whole = faiss.IndexFlatIP(8)
    whole.add(index.embeddings)
    faiss.write_index(whole, str(tmp_path / "index.faiss"))
    loaded = ImageIndex.load(tmp_path)
    loaded.add(np.concatenate([rows[[4]], rows[[0]] + 1]), ["new", "newer"])
    assert sorted(loaded.search(rows[[2]], k=3)[1][0].tolist()) == [2, 4, 20]
    assert loaded.search(rows[[0]] + 1, k=1)[1].tolist() == [[21]]
