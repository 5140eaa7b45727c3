"""The parts of the retrieval benchmark, on settings that take seconds, without a network."""

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pytorch_metric_learning.losses import MultiSimilarityLoss
from retrieval_parts import (
    batches,
    config,
    data,
    emoji,
    masks,
    model,
    objective,
    page,
    photos,
    plan,
    running,
    scoring,
    state,
    stml,
    tables,
    training,
    views,
)
from torch.nn import functional as F

BENCHMARKS = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread", "few_channels")
TINY = {"dataset": "glyphs", "regime": "scratch", "limit": 6, "steps": 3, "batch": 8}
TINY |= {"recluster": 1, "warmup": 1, "num_clusters": "4", "per_cluster": 2, "size": 32}


@pytest.fixture(scope="module")
def glyphs():
    return data.load("glyphs", "train", 32, limit=6)


# --- data -------------------------------------------------------------------------------------


def make_image(seed, side=16, box=(2, 2, 12, 14)):
    image = Image.new("RGBA", (side, side))
    colour = tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())
    ImageDraw.Draw(image).rectangle(box, fill=(*colour, 255))
    return image


def archive(path, files):
    with tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def png(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Archives that look like the real ones; nine emoji, of which six remain."""
    sets = {
        "Noto": ("one", "1", "img", "png", "free"),
        "Fluent": ("@two/three", "1", "assets", "webp", "free"),
    }
    monkeypatch.setattr(emoji, "SETS", sets)
    codes = [f"1F60{i}" for i in range(8)] + ["1F3FB"]
    listed = [
        {"unified": c, "sort_order": i, "category": "Component" if c == "1F3FB" else "Faces"}
        for i, c in enumerate(codes)
    ]
    listed[0]["unified"] += "-FE0F"
    noto = {f"img/{c.lower()}.png": png(make_image(i)) for i, c in enumerate(codes)}
    noto["img/1f604.png"] = noto["img/1f603.png"]  # drawn once for two emoji
    noto["emoji.json"] = json.dumps(listed).encode()
    fluent = {
        f"assets/{c.lower()}-fe0f.webp": png(make_image(i + 50, 300, (40, 90, 260, 140)), "WEBP")
        for i, c in enumerate(codes)
        if c != "1F606"  # Fluent lacks it
    }
    archive(tmp_path / "one-1.tgz", noto)
    archive(tmp_path / "two-three-1.tgz", fluent)
    return tmp_path


def test_emoji_are_those_that_every_set_draws_once(packages):
    found = emoji.drawings(packages)
    assert list(found) == ["1f600", "1f601", "1f602", "1f603", "1f605", "1f607"]
    noto, fluent = found["1f600"]
    assert noto.size == (11, 13)  # cropped to what is drawn
    assert max(fluent.size) <= emoji.SIDE
    assert abs(fluent.width - 221 * emoji.SIDE / 300) < 8  # shrinking softens its edges
    assert abs(fluent.height - 51 * emoji.SIDE / 300) < 8
    expected = np.random.default_rng(0).integers(0, 256, 3)
    assert np.asarray(noto)[5, 5].tolist() == [*expected.tolist(), 255]


@pytest.mark.parametrize("name", data.DRAWN)
def test_splits_of_emoji_share_no_class_and_stay_the_same(packages, name):
    first = {s: data.load(name, s, 24, packages) for s in data.SPLITS}
    for path in packages.glob("*.npz"):
        path.unlink()
    kept = {s: data.load(name, s, 24, packages) for s in data.SPLITS}
    seen = set()
    for split, images in first.items():
        assert images.images.shape == (4, 3, 24, 24)
        assert images.images.dtype == torch.uint8
        assert images.labels.tolist() == [0, 0, 1, 1]
        assert torch.equal(images.images, kept[split].images)
        seen |= {image.numpy().tobytes() for image in images.images}
    assert len(seen) == 12


def test_busy_images_have_grounds_of_their_own(packages):
    white = data.load("openemoji", "train", 24, packages).images
    busy = data.load("openemoji-busy", "train", 24, packages).images
    assert (white[:, :, 0, 0] == 255).all()
    corners = torch.cat([busy[:, :, y, x] for y in (0, -1) for x in (0, -1)], 1)
    assert len(corners.unique(dim=0)) == len(busy)


def test_an_archive_that_npm_does_not_have_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.shutil, "which", lambda _: None)
    with pytest.raises(OSError, match="some@1 is fetched with npm: install it"):
        emoji.fetch("some", "1", tmp_path)
    (tmp_path / "scope-some-1.tgz").write_bytes(b"")
    assert emoji.fetch("@scope/some", "1", tmp_path).name == "scope-some-1.tgz"


def test_drawings_in_svg_are_rendered_where_that_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match="drawings are SVG: pip install resvg-py"):
        emoji._open(b"<svg/>", "svg")
    asked = {}
    fake = type(sys)("resvg_py")
    fake.svg_to_bytes = lambda **how: (asked.update(how), list(png(make_image(1))))[1]
    monkeypatch.setitem(sys.modules, "resvg_py", fake)
    assert emoji._open(b"<svg/>", "svg").mode == "RGBA"
    assert asked == {"svg_string": "<svg/>", "width": emoji.SIDE, "height": emoji.SIDE}


def test_thirds_cover_every_class_once():
    for count in (3, 7, 560, 1803):
        classes = [c for s in data.SPLITS for c in range(count)[data.third(count, s)]]
        assert classes == list(range(count))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset='birds' is none of glyphs"):
        data.load("birds", "train", 32, tmp_path)
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        data.load("glyphs", "dev", 32, tmp_path)
    with pytest.raises(FileNotFoundError, match="'cub' needs --data-root with a folder cub/"):
        data.load("cub", "train", 32, tmp_path)


def test_in_shop_queries_search_in_the_gallery(tmp_path):
    root = tmp_path / "inshop"
    (root / "img").mkdir(parents=True)
    lines = []
    for item in range(6):
        for number in range(2):
            name = f"img/{item}_{number}.jpg"
            colour = tuple(np.random.default_rng(item).integers(0, 256, 3).tolist())
            Image.new("RGB", (40, 30), colour).save(root / name)
            split = "train" if item < 3 else ("query", "gallery")[number]
            lines.append(f"{name} id_{item:03} {split}")
    heading = [str(len(lines)), "image_name item_id evaluation_status"]
    (root / "list_eval_partition.txt").write_text("\n".join(heading + lines))
    train, validation, test = (
        data.load("inshop", split, 20, tmp_path / "cache", data_root=tmp_path)
        for split in data.SPLITS
    )
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert validation.labels.tolist() == [0, 0]
    assert test.queries.tolist() == [True, False] * 3
    assert scoring.measure(MEAN_COLOUR, test, lambda x: x - 0.5)["recall_at_1"] == 1
    assert photos.PHOTOS.keys() <= set(data.NAMES)


MEAN_COLOUR = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def test_queries_do_not_find_one_another():
    colours = torch.tensor([[250, 0, 0], [250, 9, 0], [250, 30, 0], [0, 0, 250]])
    images = colours.to(torch.uint8).view(4, 3, 1, 1).expand(4, 3, 4, 4)
    labels, queries = torch.tensor([0, 0, 1, 0]), torch.tensor([True, True, False, False])
    among_all = data.Images(images, labels)
    assert scoring.measure(MEAN_COLOUR, among_all, lambda x: x)["recall_at_1"] > 0.5
    in_gallery = among_all._replace(queries=queries)
    assert scoring.measure(MEAN_COLOUR, in_gallery, lambda x: x)["recall_at_1"] == 0


# --- views ------------------------------------------------------------------------------------


def plain(**changes):
    quiet = {"jitter": 0.0, "grey": 0.0, "blur": 0.0, "channels": 0.0}
    recipe = views.Recipe(**{**quiet, **changes})
    return views.BatchViews(recipe, 8, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("flip", [False, True])
def test_points_lead_to_the_same_place(flip):
    # Each pixel says where it is, so what a cell shows can be compared with what its point shows.
    ramp = torch.linspace(0, 255, 64)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])
    images = image.to(torch.uint8).expand(16, 3, 64, 64)
    made = plain(flip=flip)(images, torch.Generator().manual_seed(0), images[:, 0].float())
    here = F.adaptive_avg_pool2d(made.first, 8).flatten(2)
    there = F.grid_sample(made.second, made.points[:, :, None], align_corners=False)[..., 0]
    inside = (made.points.abs() < 0.9).all(2)
    assert inside.float().mean() > 0.4
    difference = (here - there).abs().amax(1)[inside]
    assert difference.max() < 0.03
    assert (here[:, :, 0] - there[:, :, 0]).abs().mean() > 0  # the views are not one
    mirrored = (made.second[:, 0, 32, 40] < made.second[:, 0, 32, 24]).float().mean()
    assert (0 < mirrored < 1) if flip else mirrored == 0
    # Maps of the images follow: red is the map.
    assert (made.first_maps / 255 - made.first[:, 0]).abs().max() < 1e-5
    assert (made.second_maps / 255 - made.second[:, 0]).abs().max() < 1e-5


def test_cells_that_look_elsewhere_have_their_points_there():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    recipe, norm = views.RECIPES["flip"], ((0.0,) * 3, (1.0,) * 3)
    offset = (-0.5, 0.25)
    middle, off = (
        views.BatchViews(recipe, 4, *norm, where)(images, torch.Generator().manual_seed(0)).points
        for where in ((0.0, 0.0), offset)
    )
    # A place that is half a cell to the left, moved as all places are, is half a cell off again.
    shift = torch.tensor(offset) * 2 / 4
    steps = middle.view(8, 4, 4, 2)
    right, down = steps[:, :1, 1:2] - steps[:, :1, :1], steps[:, 1:2, :1] - steps[:, :1, :1]
    expected = steps + offset[0] * right + offset[1] * down - shift
    assert torch.allclose(off.view(8, 4, 4, 2), expected, atol=1e-5)


def test_views_depend_on_the_generator_alone():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    make = views.BatchViews(views.RECIPES["quickstart"], 4, (0.5,) * 3, (0.5,) * 3)
    one, two, other = (make(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one.first, two.first)
    assert torch.equal(one.points, two.points)
    assert not torch.equal(one.second, other.second)
    assert one.first.abs().max() <= 1
    assert one.points.shape == (4, 16, 2)


def test_blur_keeps_a_constant_and_softens_an_edge():
    flat = torch.full((2, 3, 8, 8), 0.5)
    sigma = torch.tensor([0.3, 1.0])
    assert torch.allclose(views._blur(flat, sigma), flat)
    edge = torch.zeros(2, 3, 8, 8)
    edge[..., 4:] = 1
    soft = views._blur(edge, sigma)
    assert 0 < soft[0, 0, 4, 3] < soft[1, 0, 4, 3] < 0.5


# --- network ----------------------------------------------------------------------------------


def test_folded_batchnorm_is_the_frozen_one(monkeypatch):
    from pml_tacl import AttentionEmbedder

    torch.manual_seed(0)
    usual = AttentionEmbedder(
        model.LITE0, embedding_dim=None, attention="none", freeze_batchnorm=True
    ).train()
    for module in usual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.3)
    folded = AttentionEmbedder(
        model.LITE0, embedding_dim=None, attention="none", freeze_batchnorm=True
    )
    folded.load_state_dict(usual.state_dict())
    model.fold_batchnorm(folded.trunk.model)
    folded.train()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    images = torch.randn(2, 3, 64, 64)
    expected, found = usual.forward_features(images), folded.forward_features(images)
    assert torch.allclose(expected.feature_maps, found.feature_maps, atol=1e-4)
    assert torch.allclose(expected.embeddings, found.embeddings, atol=1e-5)
    (expected.feature_maps.square().mean() + expected.embeddings[:, 0].sum()).backward()
    (found.feature_maps.square().mean() + found.embeddings[:, 0].sum()).backward()
    stem = folded.trunk.model.conv_stem.parametrizations.weight.original.grad
    assert torch.allclose(usual.trunk.model.conv_stem.weight.grad, stem, rtol=1e-2, atol=1e-5)
    assert all(p.grad is not None for p in folded.parameters() if p.requires_grad)


# --- STML -------------------------------------------------------------------------------------


def slow_context(similarity, same, k):
    """The definition, set by set."""
    n = len(similarity)
    similarity = torch.where(same, 1.0, similarity)
    nearest = [similarity[i].topk(k).indices.tolist() for i in range(n)]
    mutual = [{j for j in nearest[i] if i in nearest[j]} for i in range(n)]
    shared = torch.zeros(n, n)
    for i in range(n):
        for j in mutual[i]:
            shared[i, j] = len(mutual[i] & mutual[j]) / len(mutual[i])
    expanded = torch.stack([shared[nearest[i][: round(k / 2)]].mean(0) for i in range(n)])
    return (expanded + expanded.T) / 2


@pytest.mark.parametrize(("n", "k"), [(12, 4), (20, 10), (6, 6)])
def test_contextual_similarity_is_that_of_the_sets(n, k):
    generator = torch.Generator().manual_seed(n)
    embeddings = F.normalize(torch.randn(n, 8, generator=generator))
    rows = torch.arange(n // 2).repeat(2)
    similarity = stml.pairwise_similarity(embeddings, 3.0)
    same = rows[:, None] == rows
    found = stml.contextual_similarity(similarity, same, k)
    assert torch.allclose(found, slow_context(similarity, same, k), atol=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(found, found.T)


def test_relaxed_contrastive_is_the_sum_over_pairs():
    torch.manual_seed(0)
    embeddings, similarity = F.normalize(torch.randn(7, 4)), torch.rand(7, 7)
    total = 0.0
    for i in range(7):
        distances = [(embeddings[i] - embeddings[j]).norm() for j in range(7)]
        average = sum(distances) / 7
        for j in set(range(7)) - {i}:
            d = distances[j] / average
            pull, push = similarity[i, j] * d**2, (1 - similarity[i, j]) * max(1 - d, 0) ** 2
            total += float(pull + push)
    found = stml.relaxed_contrastive(embeddings, similarity, 1.0)
    assert float(found) == pytest.approx(total / 42, rel=1e-4)


def test_self_distillation_is_a_divergence():
    torch.manual_seed(0)
    small, large = torch.randn(6, 4, requires_grad=True), torch.randn(6, 9, requires_grad=True)
    p, q = ((-stml.relative_distances(x)).softmax(1) for x in (large, small))
    expected = (p * (p.log() - q.log())).sum() / 6
    loss = stml.self_distillation(small, large)
    assert torch.allclose(loss, expected)
    loss.backward()
    assert small.grad.abs().sum() > 0
    assert large.grad is None  # it teaches, it does not learn from this
    assert stml.self_distillation(small, small).abs() < 1e-6


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        method if method in config.FIRST else pytest.param(method, marks=pytest.mark.slow)
        for method in config.METHODS
    ],
)
def test_every_method_trains(method, glyphs):
    run = training.train(config.make(method, **TINY, mask_references=8), glyphs)
    start = state.start(run.config, glyphs).model
    moved = [
        not torch.equal(a, b)
        for a, b in zip(start.parameters(), run.model.parameters(), strict=True)
    ]
    shown = method.startswith("zero_shot")
    assert any(moved) == (not shown)
    assert len(run.losses) == run.config.steps
    assert all(np.isfinite(run.losses))
    supervised = method.startswith("supervised")
    clustered = run.config.metric in ("ms", "none") and not shown and not supervised
    assert [entry["step"] for entry in run.history] == ([1, 2] if clustered else [])
    if supervised:
        assert torch.equal(run.labels, glyphs.labels)
    elif clustered:
        assert 0 < run.history[-1]["purity"] <= 1


def test_runs_repeat_and_seeds_differ(glyphs):
    results = [
        training.train(config.make("full", **TINY, mask_references=8, seed=seed), glyphs)
        for seed in (0, 0, 1)
    ]
    first, again, other = (r.losses for r in results)
    assert first == again
    assert first != other


def test_methods_differ_only_in_what_they_are(glyphs):
    runs = {
        name: state.start(config.make(name, **TINY), glyphs)
        for name in ("ms", "ntxent", "stml", "supervised")
    }
    reference = runs["ms"].model.state_dict()
    for run in runs.values():
        assert all(torch.equal(v, reference[k]) for k, v in run.model.state_dict().items())
    rows = torch.arange(8)
    made = [r.views(glyphs.images[rows], torch.Generator().manual_seed(3)) for r in runs.values()]
    assert all(torch.equal(made[0].second, other.second) for other in made[1:])


def test_batches_hold_groups_of_clusters(glyphs):
    run = state.start(config.make("ms", **TINY), glyphs)
    run.labels, run.centroids = glyphs.labels.clone(), torch.zeros(6, 4)
    run.labels[:5] = -1
    for _ in range(5):
        rows = batches.draw_rows(run)
        labels, counts = run.labels[rows].unique(return_counts=True)
        assert len(rows) == 8
        assert counts.tolist() == [2, 2, 2, 2]
        assert labels.min() >= 0
    run.labels[:] = -1
    run.labels[3], run.labels[4] = 0, 1  # clusters of one: the image comes again
    assert sorted(batches.draw_rows(run).tolist()) == [3, 3, 4, 4]


def test_the_loss_of_clusters_is_pmls(glyphs):
    run = state.start(config.make("ms", **TINY), glyphs)
    run.labels, run.centroids = glyphs.labels, torch.zeros(6, 4)
    batch = batches.draw(run)
    run.model.eval()
    embeddings = run.model(batch.images)
    expected = MultiSimilarityLoss()(embeddings, torch.cat([batch.labels] * 2))
    assert torch.allclose(objective.Losses(run)(batch), expected)


def test_swapped_cells_weigh_less(glyphs):
    run = state.start(config.make("full", **TINY, mask="centred", sigma=0.2), glyphs)
    run = state.Training(**{**vars(run), "labels": glyphs.labels})
    weights = torch.cat([batches.draw(run).weights for _ in range(4)]).view(-1, 2, 2)
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert weights.mean() < 0.9


def test_masks_find_what_others_lack():
    maps = torch.zeros(12, 13, 3, 3)
    maps[:, 0] = 1  # the background, everywhere the same
    for i in range(12):
        maps[i, :, 1, 1] = 0
        maps[i, i + 1, 1, 1] = 1  # in the middle something of its own
    common = masks.distinctive(maps, None, 8, 0)
    assert common.shape == (12, 3, 3)
    assert torch.allclose(common[:, 1, 1], torch.zeros(12), atol=1e-5)
    assert common[:, 0, 0].min() > 0.99


def test_teacher_follows_the_model():
    teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = teacher.weight.detach().clone()
    state.follow(teacher, student, 0.75)
    expected = 0.75 * before + 0.25 * student.weight
    assert torch.allclose(teacher.weight, expected)


def test_purity_counts_the_most_frequent():
    clusters, labels = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 2, 1, 0, 0])
    assert scoring.purity(clusters, labels) == pytest.approx(0.8)


# --- results ----------------------------------------------------------------------------------


def test_a_run_is_made_once(tmp_path, monkeypatch):
    wanted = config.make("ms", **TINY)
    first = running.run(wanted, tmp_path)
    monkeypatch.setattr(running, "train", lambda *_: pytest.fail("trained again"))
    assert running.run(wanted, tmp_path) == json.loads(json.dumps(first))
    assert set(first["metrics"]) == set(tables.COLUMNS)
    assert first["cost"]["peak_bytes"] > 1e7
    assert first["config"]["split"] == "validation"


def test_keys_tell_runs_apart():
    assert (
        config.make("ms").key == config.make("ms", steps=60, lr=config.make("ms").resolved.lr).key
    )
    different = [config.make("ms"), config.make("full"), config.make("ms", seed=1)]
    assert len({c.key for c in different}) == 3
    assert config.make("zero_shot", steps=9).resolved.steps == 0


def test_settings_of_the_command_line():
    assert config.parse(["steps=5", "lr=1e-3", "tac_masked=false", "mask=centred"]) == {
        "steps": 5,
        "lr": 1e-3,
        "tac_masked": False,
        "mask": "centred",
    }
    with pytest.raises(ValueError, match="'speed=1' must be one of dataset"):
        config.parse(["speed=1"])
    with pytest.raises(ValueError, match="tac_masked must be true or false"):
        config.parse(["tac_masked=1"])
    with pytest.raises(ValueError, match="method='best' is none of zero_shot"):
        config.make("best")


def test_the_plan_has_every_method_and_no_run_twice(tmp_path):
    (tmp_path / "cub").mkdir()
    configs = plan.everything(data_root=tmp_path)
    assert len({c.key for c in configs}) == len(configs)
    for dataset, regime in (*plan.SETTINGS, ("cub", "pretrained")):
        methods = [c.method for c in configs if c.dataset == dataset and c.regime == regime]
        assert set(methods) == set(config.METHODS)
    assert {c.split for c in configs} == {"test"}
    assert {c.seed for c in configs} == {0, 1, 2}
    assert {c.split for c in plan.five_minutes()} == {"validation"}


def result(method, value, **changes):
    wanted = config.make(method, **changes).resolved
    metrics = dict.fromkeys(tables.COLUMNS, value)
    cost = {"seconds": 1.0, "seconds_a_step": 0.1, "peak_bytes": 10**9}
    history = [{"purity": 0.25}]
    made = {"key": wanted.key, "config": vars(wanted), "metrics": metrics, "cost": cost}
    return {**made, "history": history, "versions": {"torch": "9"}}


@pytest.fixture
def results(tmp_path):
    values = {"zero_shot": 0.1, "ms": 0.2, "full": 0.4, "ms+ccl+head+swap": 0.35, "supervised": 0.7}
    values |= {"ms+tac+head+swap": 0.38, "ms+ccl+tac+head": 0.15, "ntxent": 0.3}
    values["zero_shot+head"] = 0.22
    found = [
        result(method, value + 0.01 * seed, dataset=dataset, seed=seed, split="test")
        for method, value in values.items()
        for dataset in ("glyphs", "openemoji")
        for seed in (0, 1, 2)
    ]
    found.append(result("full", 0.33, dataset="glyphs"))
    found.append(result("full", 0.31, dataset="glyphs", tac_temperature=0.1))
    for one in found:
        (tmp_path / f"{one['key']}.json").write_text(json.dumps(one))
    return tmp_path


def test_tables_average_the_seeds_and_leave_out_what_is_changed(results):
    extra = result("full", 0.99, dataset="glyphs", split="test", ccl_margin=0.7)
    (results / "extra.json").write_text(json.dumps(extra))
    table = tables.tables(tables.read_results(results))
    full = table[tables.Setting("pretrained", 64, "glyphs")]["full"]
    assert full.text("recall_at_1") == "41.0 ± 1.0"
    gaps = [tables.gap_closed(methods, "full") for methods in table.values()]
    assert gaps == pytest.approx([0.5, 0.5])
    shares = [tables.gap_closed(m, "zero_shot+head", "full") for m in table.values()]
    assert shares == pytest.approx([0.4, 0.4])
    lost = tables.cost_of_removal(table)
    assert {part: round(next(iter(v.values())), 6) for part, v in lost.items()} == {
        "CCL": 2,
        "TAC": 5,
        "swap": 25,
    }


def test_the_page_is_made_of_the_results_alone(results, tmp_path):
    choice = {"what": "mask", "chosen": "centred", "on": "validation of glyphs", "why": "+3"}
    (results / "choices.json").write_text(json.dumps([choice]))
    target = tmp_path / "docs" / "results.md"
    text = page.write(results, target, target.parent / "images")
    assert target.read_text("utf-8") == text
    assert "| glyphs, pretrained, 64 px | +20.0 | +10.0 | 50 % |" in text
    assert "| 50 % |" in text
    assert "never trained, has 40 % on glyphs, 40 % on openemoji: the" in text
    assert "| **mean** | **+2.0** | **+5.0** | **+25.0** |" in text
    assert "Measured on test before" not in text
    earlier = result("full", 0.3, dataset="glyphs", split="test", ccl_momentum=1.0)
    (results / "earlier.json").write_text(json.dumps(earlier))
    again = page.write(results, target, target.parent / "images")
    assert (
        again.replace(again[again.index("## Measured on") : again.index("## What was tr")], "")
        == text
    )
    assert "| full | `ccl_momentum=1.0` | 30.0 | +11.0 | 1 |" in again
    (results / "earlier.json").unlink()
    page.write(results, target, target.parent / "images")
    assert "| full | `tac_temperature=0.1` | 31.0 | -2.0 | 1 |" in text  # what failed is shown too
    assert "| mask | centred | validation of glyphs | +3 |" in text
    for name in ("recall", "ablation", "gap"):
        assert f"](images/results-{name}.png)" in text
        assert Image.open(target.parent / "images" / f"results-{name}.png").width > 300
    look = page.write(results, tmp_path / "look.md", tmp_path, split="validation")
    assert "results on the validation third" in look
    assert "| full | 33.0 |" in look
    with pytest.raises(ValueError, match="holds none: run the benchmark first"):
        page.write(tmp_path / "docs", target, target.parent)


def test_the_command_runs_one_and_refuses_the_test_third(tmp_path, monkeypatch, capsys):
    script = BENCHMARKS / "retrieval.py"

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(script), "--results", str(tmp_path), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    settings = [f"{name}={value}" for name, value in TINY.items()]
    call("run", "ms", *settings)
    assert "ms glyphs scratch 32 validation seed 0: R@1/2/4/8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="split=test is measured by the command all"):
        call("run", "ms", "split=test")
    call("page", "--output", str(tmp_path / "new" / "results.md"))
    assert (tmp_path / "new" / "results.md").is_file()
