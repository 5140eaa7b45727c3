"""The page of a run: what it says, that nothing in a run can harm it, and how it behaves."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_tacl import AttentionEmbedder
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Glyphs
from pml_tacl.datasets.image_files import listing_place
from pml_tacl.report import _charts as charts
from pml_tacl.report import _choices as choices
from pml_tacl.report import _images as images
from pml_tacl.report import _page as page
from pml_tacl.report import write_report
from pml_tacl.report._sources import ImageSet, read_run
from pml_tacl.search import ImageIndex

pytestmark = pytest.mark.usefixtures("one_thread", "few_channels")
SCRIPT = Path(__file__).parents[1] / "examples" / "report.py"
_spec = importlib.util.spec_from_file_location(
    "report_image", SCRIPT.parents[1] / "docs" / "report_image.py"
)
drawing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(drawing)
HOSTILE = [
    "a<//script><script>window.pwned=1<//script>.png".replace("//", "/"),
    'b/"><img src=x onerror=window.pwned=1>.png',
    "b/{{DATA}} &amp; {{NOTHING}}.png",
    "b/' onmouseover='window.pwned=1.png",
    os.fsdecode(b"b/no text \xff.png"),
]


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_run(folder, *, count=60, labelled=True):
    """A run as train_folder.py leaves it, of a model that was not trained."""
    images, rng = folder / "images", np.random.default_rng(0)
    files = [*HOSTILE, *(f"{'cd'[i % 2]}/{i}.png" for i in range(count - len(HOSTILE)))]
    files.sort(key=listing_place)
    for number, file in enumerate(files):
        path = images / file
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((40, 30), 0).save(path)
        if labelled:
            (folder / "test" / f"class {number % 5}").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "test" / f"class {number % 5}" / f"{number}.png")
    torch.manual_seed(0)
    run = folder / "run <&> {{BODY}}"
    AttentionEmbedder("test_resnet", embedding_dim=16).save_pretrained(run / "model")
    config = {"images": str(images), "image_size": [32, 32], "epochs": 2, "backbone": "x<y",
              "eval_folder": str(folder / "test") if labelled else None,
              "loss_weights": {"metric_loss": 1.0}}  # fmt: skip
    runs.write_json(run / "run.json", config)
    before = {"recall_at_1": 0.25, "recall_at_2": 0.5, "NMI": 0.125} if labelled else {}
    after = {name: 1.5 * value for name, value in before.items()}
    versions = {"torch": "<2>"}
    runs.write_json(
        run / "metrics.json",
        {"before": before, "after": after, "config": config, "versions": versions},
    )
    rows = unit(np.repeat(np.eye(6, 16), 10, 0)[:count] + 0.1 * rng.standard_normal((count, 16)))
    ImageIndex(rows, files, images).save(run)
    labels = torch.arange(count) // 10
    labels[50:] = -1  # noise
    history = {"total_loss": [3.0, 2.0, float("nan"), 1.0], "<i>_loss": [1.0] * 4}
    extra = {"history": history, "recalls": {0: before, 2: after}}
    (run / "checkpoints").mkdir()
    torch.save({"labels": labels, "extra": extra}, run / "checkpoints" / "epoch_0002.pt")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def html(run):
    return write_report(run, queries=3, clusters=2).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags that are open at the end, all tags by name, ids, and text outside scripts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.attributes = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("img", "meta", "link", "path", "circle", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def data_of(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])


def test_the_page_is_sound_and_says_what_the_run_was(html):
    found = Page(html)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    words = " ".join(" ".join(found.text).split())
    for said in ("run <&> {{BODY}}", "x<y", "<2>", "25.0", "37.5", "loss_weights.metric_loss",
                 "Best queries", "Worst queries", "Largest", "Tightest", "Loosest"):  # fmt: skip
        assert said in words, said
    assert found.tags.count("canvas") == 2
    assert {"results", "training", "retrieval", "attention", "clusters", "map"} <= set(found.ids)
    assert 'aria-label="&lt;i&gt;_loss by iteration' in html


def test_nothing_in_a_run_becomes_a_tag_a_handler_or_a_script(html):
    found = Page(html)
    assert found.tags.count("script") == 2
    assert html.count("window.pwned=1&lt;/script&gt;.png") > 1  # it is shown, as its own name
    assert not [name for name in found.attributes if name.startswith("on")]
    assert "<i>" not in html.replace('<i style="--share', "")
    outside = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.findall(r"(?:src|href)=\"(?!#|data:|\")", outside)
    assert not re.findall(r"https?://", outside)
    names = data_of(html)["sets"][0]["names"]
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in HOSTILE]
    assert set(shown) <= set(names)
    digest = re.search(r"script-src 'sha256-([^']+)'", html)[1]
    script = html.rpartition("<script>")[2].rpartition("</script>")[0]
    assert base64.b64decode(digest) == hashlib.sha256(script.encode()).digest()
    assert "default-src 'none'" in html


def test_the_map_holds_every_image_with_its_cluster(html, run):
    training, test = data_of(html)["sets"]
    assert (training["kind"], test["kind"]) == ("cluster", "class")
    assert training["all"] == len(training["x"]) == training["tiles"] == 60
    index = ImageIndex.load(run)
    for name, group in zip(training["names"][5:], training["group"][5:], strict=True):
        cluster = index.files.index(name) // 10
        cluster = -1 if cluster == 5 else cluster
        assert training["ids"][group] == cluster
        assert training["groups"][group] == ("noise, in no cluster" if cluster < 0
                                             else f"cluster {cluster}")  # fmt: skip
    assert test["groups"] == [f"class {i}" for i in range(5)]
    for one in (training, test):
        assert (min(one["x"]), max(one["x"])) == (min(one["y"]), max(one["y"])) == (0, 4095)
        assert one["how"].startswith("t\u2011SNE")
    # Clusters were put in six directions, so on the map too each image's nearest is its own.
    places = np.array([training["x"], training["y"]], dtype=float).T
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(60)
    near = np.array(training["group"])[apart.argmin(1)]
    assert (near == training["group"]).mean() > 0.95


def test_a_page_without_labels_and_with_a_image_gone(tmp_path):
    run = write_run(tmp_path, labelled=False)
    (tmp_path / "images" / "c" / "0.png").unlink()
    html = write_report(run, tmp_path / "deep" / "page.html", queries=2, clusters=1, points=40)
    assert html == tmp_path / "deep" / "page.html"
    text = html.read_text(encoding="utf-8")
    assert "had no labelled test images" in text
    assert "Without labels, the best queries" in text
    (one,) = data_of(text)["sets"]
    assert (one["all"], len(one["x"])) == (60, 40)
    sizes = np.bincount(one["group"])
    assert sorted(sizes.tolist()) == [10, 10, 10, 10]  # whole clusters


@pytest.mark.parametrize("points", [1, 2, 3])
def test_a_map_of_few_points(run, tmp_path, capsys, points):
    page = write_report(run, tmp_path / "page.html", queries=1, points=points, progress=False)
    sets = data_of(page.read_text(encoding="utf-8"))["sets"]
    assert [len(one["x"]) for one in sets] == [1, 1]
    assert capsys.readouterr().err == ""


def test_an_update_has_moved_images(tmp_path):
    run = write_run(tmp_path, labelled=False)
    assert read_run(run).training.clusters[0] == 0
    index = ImageIndex.load(run)
    changed = index.files[0]
    index.add(index.embeddings[:1], [changed])  # as search --update does
    index.save(run)
    notes = " ".join(read_run(run).notes)
    assert "contains no pseudo-labels of these images; the clusters were computed" in notes


def test_one_image_is_one_cluster(tmp_path):
    run = write_run(tmp_path, labelled=False)
    files = ImageIndex.load(run).files[:1]
    ImageIndex(np.eye(1, 16, dtype=np.float32), files, tmp_path / "images").save(run)
    assert "too few different images for clusters" in write_report(run).read_text("utf-8")


def test_clusters_are_judged_by_folders_if_asked(run):
    training = read_run(run, folders_are_classes=True).training
    assert training.classes == ["a<", "b", "c", "d"]  # the first folder of each path
    assert [training.classes[label] for label in training.labels[:3]] == [
        training.classes[0], "b", "b",
    ]  # fmt: skip
    found = choices.clusters_of(training)
    assert [c.number for c in found] == [0, 1, 2, 3, 4]
    assert found[0].purity == 0.5
    assert list(choices.ranked_clusters(found, 1)) == ["Largest", "Purest", "Most mixed"]


@pytest.fixture
def few_glyphs(monkeypatch):
    def half(split, **kwargs):
        return Glyphs(split, num_classes=6, **kwargs)

    monkeypatch.setattr("pml_tacl.report._sources.Glyphs", half)


def write_quickstart(folder):
    torch.manual_seed(0)
    AttentionEmbedder("test_resnet", embedding_dim=16).save_pretrained(folder / "model")
    runs.write_json(folder / "run.json", {"epochs": 3, "seed": 0, "timm": {"stem_width": 8}})
    rows = {name: {"recall_at_1": 0.5} for name in ("raw_pixels", "before", "after")}
    runs.write_json(folder / "metrics.json", {**rows, "config": {}, "versions": {}})
    hooks = runs.make_hooks(folder / "records")
    hooks.record_keeper.update_records({"total_loss": 1.5}, 0, parent_name="loss_histories")
    hooks.record_keeper.update_records({"total_loss": 0.5}, 10, parent_name="loss_histories")
    name = "accuracies_normalized_GlobalEmbeddingSpaceTester_level_0_TEST_vs_self"
    values = {"epoch": 0, "recall_at_1_level0": 0.125}
    hooks.record_keeper.update_records(values, 0, parent_name=name)
    hooks.record_keeper.save_records()
    return folder


def test_a_quickstart_run_is_read_from_its_records(few_glyphs, tmp_path):
    read = read_run(write_quickstart(tmp_path / "quick"))
    assert read.losses == {"total_loss": ([0.0, 10.0], [1.5, 0.5])}
    assert read.recalls == {"recall_at_1": ([0.0, 3.0], [0.125, 0.5])}
    assert read.training.classes == list(Glyphs("train", num_classes=6).classes)
    assert read.training.names[0] == f"{read.training.classes[0]} 1"
    assert any("computed for this page" in note for note in read.notes)
    assert len(np.unique(read.training.clusters)) == max(2, len(read.training) // 10)
    assert "raw pixels" in page.results(read)


def test_an_unreadable_checkpoint_is_passed_over(few_glyphs, tmp_path):
    folder = write_quickstart(tmp_path / "quick")
    count = len(Glyphs("train", num_classes=6))
    (folder / "checkpoints").mkdir()
    torch.save({"labels": torch.arange(count) % 3}, folder / "checkpoints" / "epoch_0001.pt")
    (folder / "checkpoints" / "epoch_0002.pt").write_bytes(b"damaged")
    clusters = read_run(folder).training.clusters
    assert clusters.tolist() == [i % 3 for i in range(count)]
    assert (folder / "checkpoints" / "epoch_0002.pt").exists()


def test_a_run_of_a_benchmark_is_no_report(few_glyphs, tmp_path):
    folder = write_quickstart(tmp_path / "cub")
    runs.write_json(folder / "run.json", {"root": "data/cub", "image_size": 224})
    with pytest.raises(ValueError, match="is a training on data/cub"):
        read_run(folder)


def test_what_is_missing_is_said(run, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match=r"it contains no readable run\.json"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no readable metrics\.json: give a run that"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="queries must be an integer of at least 1, got 0"):
        write_report(run, queries=0)
    with pytest.raises(FileNotFoundError, match="give images="):
        write_report(run, images=tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .*metrics\.json"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    arguments = [str(run), "--out", str(tmp_path / "p.html"), "--queries=1", "--points=30"]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "p.html: 0." in capsys.readouterr().out


def a_set(count=80, classes=8, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    rows = unit(rng.standard_normal((classes, 12))[labels] + 0.8 * rng.standard_normal((count, 12)))
    names = [f"{i}.png" for i in range(count)]
    return ImageSet("x", names, rows, lambda row: Image.new("RGB", (9, 9)), **kwargs), labels


def test_the_best_and_the_worst_queries_are_those_of_brute_force():
    images, labels = a_set()
    labels[0] = 8  # alone in its class, so it is no query
    images.labels, images.classes = labels, [str(i) for i in range(9)]
    scores = {}
    for i in range(1, len(labels)):
        near = sorted(
            (j for j in range(len(labels)) if j != i),
            key=lambda j: -float(images.embeddings[i] @ images.embeddings[j]),
        )[:8]
        hits = [bool(labels[j] == labels[i]) for j in near]
        score = sum(sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits) if hit) / 8
        mean = float(np.mean([images.embeddings[i] @ images.embeddings[j] for j in near]))
        scores[i] = (score, mean, near, hits)
    best, worst, among = choices.best_and_worst(images, 4)
    assert among == 79
    for found, order in (
        (best, sorted(scores, key=lambda i: (-scores[i][0], -scores[i][1]))),
        (worst, sorted(scores, key=lambda i: (scores[i][0], -scores[i][1]))),
    ):
        firsts = {}
        for i in order:
            firsts.setdefault(int(labels[i]), i)
        assert [query.row for query in found] == list(firsts.values())[:4]
        for query in found:
            assert (query.rows, query.right) == (scores[query.row][2], scores[query.row][3])


def test_among_copies_a_query_never_finds_itself():
    images, _ = a_set(30)
    images.embeddings[:] = images.embeddings[0]
    best, worst, _ = choices.best_and_worst(images, 30)
    for query in (*best, *worst):
        assert query.row not in query.rows
        assert len(set(query.rows)) == 8


def test_few_images_have_few_neighbours_or_none():
    images, _ = a_set(3)
    assert [len(query.rows) for query in choices.best_and_worst(images, 9)[0]] == [2, 2, 2]
    images, _ = a_set(1)
    assert choices.best_and_worst(images, 3) == ([], [], 0)


def test_clusters_are_ranked_by_size_purity_and_tightness():
    rows = unit(np.array([[1, 0], [1, 0.1], [1, -0.1], [0, 1], [0.7, 1], [-0.7, 1], [1, 1]]))
    clusters = np.array([0, 0, 0, 1, 1, 1, -1])
    images = ImageSet("x", list("abcdefg"), rows, None, None, [], clusters)
    first, second = choices.clusters_of(images)
    assert first.rows.tolist() == [0, 1, 2]
    assert second.rows.tolist()[0] == 3
    assert first.tightness > second.tightness > 0.8
    ranked = choices.ranked_clusters([first, second], 1)
    assert {k: [c.number for c in v] for k, v in ranked.items()} == {
        "Largest": [0], "Tightest": [0], "Loosest": [1],
    }  # fmt: skip
    images.labels, images.classes = np.array([0, 1, 2, 3, 3, 4, 5]), list("uvwxyz")
    first, second = choices.clusters_of(images)
    assert (first.purity, second.purity) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert second.majority == 3


def test_a_sample_is_of_whole_groups_the_asked_for_first():
    groups = np.repeat(np.arange(10), 10)
    rows = choices.sample_of(groups, 35, [7, 2])
    assert len(rows) == 35
    counts = np.bincount(groups[rows], minlength=10)
    assert (counts[7], counts[2]) == (10, 10)
    assert sorted(counts[counts > 0].tolist()) == [5, 10, 10, 10]
    np.testing.assert_array_equal(choices.sample_of(groups, 100, []), np.arange(100))


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("dim", [1, 2, 30])
def test_any_number_of_images_has_places(count, dim):
    rows = unit(np.random.default_rng(0).standard_normal((count, dim)))
    places, how = choices.project(rows)
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()
    assert places.min() >= 0
    assert places.max() <= 1
    assert how.startswith("PCA" if count < 10 or dim < 2 else "t\u2011SNE")


def test_without_scikit_learn_the_map_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    rows = unit(np.random.default_rng(0).standard_normal((20, 5)) * [9, 3, 1, 1, 1])
    places, how = choices.project(rows)
    assert how == "PCA, since scikit-learn is not installed"
    centred = rows - rows.mean(0)
    first = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    assert abs(np.corrcoef(places[:, 0], centred @ first)[0, 1]) > 0.999


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_sheet_keeps_its_budget_and_its_places():
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 50, 3), dtype=np.uint8)
    uri, count = images.sheet(lambda row: Image.fromarray(noise[row]), range(90), 60_000)
    assert len(uri) <= 60_100
    assert 0 < count < 90
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    order = [i % 3 for i in range(85)]
    sheet, count = images.sheet(
        lambda row: Image.new("RGB", (30, 60), colours[row]), order, 1_000_000
    )
    assert count == 85
    pixels = np.asarray(decoded(sheet).convert("RGB")).astype(int)
    assert pixels.shape == (3 * 64, 40 * 64, 3)
    for at, row in enumerate(order):
        y, x = divmod(at, 40)
        tile = pixels[64 * y + 8 : 64 * y + 56, 64 * x + 8 : 64 * x + 56]
        assert np.abs(tile - colours[row]).max() < 40, at


def test_a_image_that_cannot_be_read_is_a_crossed_square():
    def gone(row):
        raise OSError("gone")

    assert images.opened(gone, 0).size == (128, 128)


def test_ticks_are_round_and_span_the_range():
    assert charts.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert charts.ticks(0, 97) == [0, 25, 50, 75, 100]
    for low, high in ((3, 3), (-2e-9, 1e-9), (0, 0), (5.2, 1e7)):
        found = charts.ticks(low, high)
        assert found[0] <= low + 1e-6
        assert found[-1] >= high
        assert 2 <= len(found) <= 8


def test_a_line_has_a_gap_where_a_loss_was_not_finite():
    values = [1.0, 2.0, float("nan"), 4.0, float("inf"), 6.0]
    drawn = charts.loss_chart("x", ([1, 2, 3, 4, 5, 6], values))
    assert re.search(r'raw" d="([^"]+)"', drawn)[1].count("M") == 3
    assert "nan" not in drawn
    assert "inf" not in drawn
    steps = [float(i) for i in range(5000)]
    assert len(charts.thinned((steps, steps))[0]) == 400


# In a browser, which continuous integration must have.


def browser_or_skip(profile):
    """A browser; where there is none, the test is left out, or fails where it is required."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if not path]
    missing += [] if importlib.util.find_spec("selenium") else ["selenium"]
    if missing:
        say = pytest.fail if os.environ.get("PML_TACL_BROWSER") == "required" else pytest.skip
        say(f"needs {', '.join(missing)}: apt-get install chromium chromium-driver, and pip's test")
    return drawing.open_browser(profile)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = browser_or_skip(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture
def tab(browser, run, html):
    drawing.open_page(browser, run / "report.html")
    return browser


def run_script(driver, script, *arguments):
    return driver.execute_script(f"return {script}", *arguments)


def painted(driver):
    """What the map says of itself, once it has been painted anew."""
    return driver.execute_async_script(
        "const done = arguments[0], canvas = document.getElementById('map-canvas');"
        "requestAnimationFrame(() => requestAnimationFrame(() => done({...canvas.dataset})));"
    )


def place_of(driver, data, at, row):
    """Where an image is on the whole map, from the canvas's middle: as script.js places it."""
    width, height = run_script(
        driver, "[document.getElementById('map-canvas').clientWidth,"
        "document.getElementById('map-canvas').clientHeight]"
    )  # fmt: skip
    high = height - 56
    wide, tall = min(width - 56, 1.7 * high), min(high, 1.7 * (width - 56))
    one = data["sets"][at]
    return (one["x"][row] / 4095 - 0.5) * wide, (one["y"][row] / 4095 - 0.5) * tall


def hover(driver, x, y):
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = driver.find_element("id", "map-canvas")
    # At once: the page scrolls smoothly, and a slow machine would point where the map is not yet.
    run_script(
        driver,
        "document.getElementById('map-box').scrollIntoView({block: 'center', behavior: 'instant'})",
    )
    painted(driver)
    chain = ActionChains(driver, duration=0)
    chain.move_to_element_with_offset(canvas, round(x), round(y)).perform()
    painted(driver)


def choose(driver, value):
    run_script(
        driver,
        "((s) => { s.value = arguments[0]; s.dispatchEvent(new Event('change')); })"
        "(document.getElementById('map-filter'))".replace("arguments[0]", repr(str(value))),
    )


def test_the_page_opens_quickly_quietly_and_without_a_network(browser, run, html):
    browser.get_log("browser"), browser.get_log("performance")
    seconds = min(drawing.open_page(browser, run / "report.html") for _ in range(3))
    assert seconds < 10  # 2 are the aim, for a quiet machine; see docs/report.md
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    asked = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = [one["params"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in asked]
    assert any(url.startswith("file:") for url in urls)
    # chrome: is the browser's own empty page.
    assert {url.split(":")[0] for url in urls} <= {"file", "data", "chrome"}
    assert run_script(browser, "window.pwned === undefined")
    assert run_script(browser, "document.querySelector('h1').textContent") == run.name
    assert run_script(browser, "[...document.images].every((i) => i.naturalWidth > 0)")


def test_hovering_shows_the_image_that_is_there(tab, html, run):
    data = data_of(html)
    group = data["sets"][0]["ids"].index(3)
    row = data["sets"][0]["group"].index(group)
    choose(tab, group)
    hover(tab, *place_of(tab, data, 0, row))
    tip = tab.find_element("id", "map-tip")
    assert tip.is_displayed()
    shown = int(tip.get_attribute("data-index"))
    assert data["sets"][0]["group"][shown] == group
    assert tip.text.split("\n") == [data["sets"][0]["names"][shown], "cluster 3"]
    uri = run_script(tab, "document.querySelector('#map-tip canvas').toDataURL()")
    seen = np.asarray(decoded(uri).convert("RGB").resize((16, 16)), dtype=float)
    with Image.open(ImageIndex.load(run).root / data["sets"][0]["names"][shown]) as image:
        fitted = image.convert("RGB").crop((5, 0, 35, 30)).resize((16, 16))
    assert np.abs(seen - np.asarray(fitted, dtype=float)).mean() < 40
    assert np.corrcoef(seen.ravel(), np.asarray(fitted, dtype=float).ravel())[0, 1] > 0.9
    hover(tab, -tab.find_element("id", "map-canvas").size["width"] / 2 + 3, 0)
    assert not tip.is_displayed()


def test_the_filter_leaves_one_cluster(tab, html):
    data = data_of(html)
    assert painted(tab)["shown"] == "60"
    group = data["sets"][0]["ids"].index(2)
    choose(tab, group)
    assert painted(tab)["shown"] == "10"
    assert tab.find_element("id", "map-status").text == "10 images of cluster 2."
    choose(tab, -1)
    assert painted(tab)["shown"] == "60"
    button = tab.find_element("css selector", "[data-cluster]")
    number = int(button.get_attribute("data-cluster"))
    run_script(tab, "document.querySelector('[data-cluster]').click()")
    assert painted(tab)["shown"] == "10"
    assert f"of cluster {number}." in tab.find_element("id", "map-status").text
    run_script(tab, "document.querySelectorAll('#map-sets button')[1].click()")
    assert painted(tab)["shown"] == "60"
    assert "in 5 classes" in tab.find_element("id", "map-status").text


def test_keys_zoom_and_walk_and_dots_become_images(tab):
    from selenium.webdriver.common.keys import Keys

    canvas = tab.find_element("id", "map-canvas")
    colours = "document.getElementById('map-canvas').toDataURL()"
    run_script(tab, "document.getElementById('map-canvas').focus()")
    before = run_script(tab, colours)
    canvas.send_keys("++")
    assert painted(tab)["images"] == "true"
    zoomed = run_script(tab, colours)
    assert zoomed != before
    canvas.send_keys(Keys.ARROW_LEFT)
    painted(tab)
    assert run_script(tab, colours) != zoomed
    canvas.send_keys("0")
    painted(tab)
    assert run_script(tab, colours) == before
    canvas.send_keys("nnn")
    assert tab.find_element("id", "map-tip").get_attribute("data-index") == "2"
    canvas.send_keys("p")
    tip = tab.find_element("id", "map-tip")
    assert (tip.is_displayed(), tip.get_attribute("data-index")) == (True, "1")
    assert tip.text.split("\n")[0] in tab.find_element("id", "map-status").text
    canvas.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_light_and_dark_and_a_phone(tab):
    ground = "getComputedStyle(document.body).backgroundColor"
    first = run_script(tab, ground)
    tab.find_element("id", "theme").click()
    assert run_script(tab, ground) != first
    tab.find_element("id", "theme").click()
    assert run_script(tab, ground) == first
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    tab.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        assert run_script(tab, "[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    finally:
        tab.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_the_image_of_the_page_is_its_top_and_its_map(browser, run, tmp_path, monkeypatch):
    out = tmp_path / "report.png"
    monkeypatch.setattr(sys, "argv", ["report_image.py", str(run), "--out", str(out)])
    drawing.main()
    with Image.open(out) as image:
        grey = np.asarray(image.convert("L"), dtype=float)
    assert grey.shape == (617, 1700)
    light, dark = np.split(grey, 2, axis=1)
    assert np.median(light) > 200
    assert np.median(dark) < 60
    assert (dark > 100).mean() > 0.02  # images on the map


@pytest.mark.parametrize(
    ("before", "after", "guard", "large", "said"),
    [
        (0.629, 0.718, "training helped: it did", "71.8", "after training; 62.9 % before"),
        (0.718, 0.629, "", "71.8", "before; 62.9 % after training"),
        (0.5, 0.5, "training did not help: kept", "50.0", "after training; 50.0 % before"),
    ],
)
def test_the_head_of_the_page_is_the_verdict_and_the_better_number(
    run, before, after, guard, large, said
):
    read = read_run(run)
    read.metrics = {"before": {"recall_at_1": before}, "after": {"recall_at_1": after}}
    read.verdict = guard
    head = page.header(read)
    assert f"<dt>Recall@1</dt><dd>{large}<" in head
    assert f">{said}<" in head
    worse = "Training made retrieval worse: search with the model from before training."
    wanted = f"{guard[:1].upper()}{guard[1:]}." if guard else worse
    assert f'<p class="verdict">{wanted}</p>' in head
    assert head.index("verdict") < head.index("facts")


@pytest.mark.parametrize(("warmup", "marked"), [(0, False), (10, True), (40, False), (90, False)])
def test_where_clustering_begins_is_marked(warmup, marked):
    steps = list(range(1, 41))
    drawn = charts.loss_chart("a_loss", (steps, [1.0] * 40), warmup)
    assert ('class="mark"' in drawn) == marked
    assert ("clustering begins after iteration 10" in drawn) == marked
