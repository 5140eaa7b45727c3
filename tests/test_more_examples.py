"""The examples that are one file each, at the smallest settings that still show something."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import pml_tacl
from pml_tacl import AttentionEmbedder, UnsupervisedTrainer
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import CUB, Cars196, Glyphs, InShop, StanfordOnlineProducts
from pml_tacl.evaluation import embed
from tests.layouts import make_cars, make_cub, make_inshop, make_sop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "few_channels")]
EXAMPLES = Path(__file__).parents[1] / "examples"
NETWORK = {"channels": [8, 16, 32, 64], "stem_width": 8, "output_stride": 16}
HEAD = {"feature_index": 2, "pooling": "covariance"}
BENCHMARK = {"backbone": "test_resnet", "embedding_dim": 16, "image_size": 32, "batch_size": 8}
BENCHMARK |= {"num_clusters": 6, "images_per_cluster": 2, "freeze_batchnorm": False, "epochs": 2}


@pytest.fixture(autouse=True)
def from_examples(monkeypatch):
    """As Python starts a script: its folder is where modules are looked for first."""
    monkeypatch.syspath_prepend(EXAMPLES)


def script(name, **constants):
    """A fresh module of the example, with other constants."""
    sys.modules.pop(name, None)
    module = importlib.import_module(name)
    for constant, value in constants.items():
        assert hasattr(module, constant)
        setattr(module, constant, value)
    return module


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["example.py", *map(str, arguments)])


def make_image(path, least=20):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > least
    return pixels


class TestPlainLoop:
    def test_unseen_characters_are_retrieved_better(self, capsys):
        network = {**NETWORK, "channels": [16, 32, 64, 128], **HEAD}
        rows = script("plain_loop", BACKBONE=network, CLASSES=40, BATCH_SIZE=32).main()
        before, after = rows["before"]["recall_at_1"], rows["after"]["recall_at_1"]
        assert 0 <= before < 0.2
        assert after > before + 0.05
        assert (
            rows["after"]["mean_average_precision_at_r"]
            > (rows["before"]["mean_average_precision_at_r"])
        )
        printed = capsys.readouterr().out
        assert printed.count("last loss") == 6
        assert f"{100 * after:8.1f}" in printed

    def test_training_labels_are_never_read(self, monkeypatch):
        settings = {"CLASSES": 8, "EPOCHS": 2, "WARMUP_EPOCHS": 1, "BATCH_SIZE": 32}
        small = script("plain_loop", BACKBONE={**NETWORK, **HEAD}, **settings)
        with_labels = small.main()

        def without_labels(split, **settings):
            half = Glyphs(split, **settings)
            half.preload(progress=False)  # rendering reads the labels, training must not
            if split == "train":
                half.labels[:] = 0
            return half

        monkeypatch.setattr(small, "Glyphs", without_labels)
        assert small.main() == with_labels

    def test_its_settings_are_those_of_the_quickstart(self):
        plain, quickstart = script("plain_loop"), script("quickstart")
        network = {"backbone": "resnet10t", "embedding_dim": 128, **plain.BACKBONE}
        assert network == quickstart.MODEL
        config = quickstart.CONFIG
        names = ("epochs", "warmup_epochs", "batch_size", "images_per_cluster", "learning_rate")
        constants = (plain.EPOCHS, plain.WARMUP_EPOCHS, plain.BATCH_SIZE, plain.PER_CLUSTER)
        assert (*constants, plain.LEARNING_RATE) == tuple(config[name] for name in names)

    def test_it_is_short(self):
        lines = (EXAMPLES / "plain_loop.py").read_text().splitlines()
        assert len(lines) < 80


def glyph_of(class_ids):
    """Draw a character of its own for each class, another face or colour for each image."""
    seen = dict.fromkeys(class_ids, 0)
    every = Glyphs("all", num_classes=len(seen), images_per_class=20)
    first = {class_id: 20 * rank for rank, class_id in enumerate(seen)}

    def draw(class_id):
        seen[class_id] += 1
        return every[first[class_id] + seen[class_id] - 1][0]

    return draw


def birds(root):
    classes = [*range(1, 7), *range(101, 105)] * 4
    make_cub(root, classes, glyph_of(classes))


def cars(root):
    classes = [*range(1, 7), *range(99, 103)] * 2
    root.mkdir()
    make_cars(root, classes, glyph_of(classes))


def products(root):
    classes = {"train": [*range(1, 7)] * 4, "test": [*range(11319, 11323)] * 4}
    make_sop(root, classes, glyph_of([*classes["train"], *classes["test"]]))


def clothes(root):
    rows = [(item, "train") for item in range(1, 7)] * 4
    rows += [(item, part) for item in range(7, 11) for part in ("query", "gallery")] * 2
    make_inshop(root, rows, draw=glyph_of([item for item, _ in rows]))


class TestBenchmarks:
    @pytest.mark.parametrize(
        ("name", "make", "benchmark", "clusters", "ks"),
        [
            ("train_cub", birds, CUB, 100, (1, 2, 4, 8)),
            ("train_cars", cars, Cars196, 98, (1, 2, 4, 8)),
            ("train_sop", products, StanfordOnlineProducts, 10_000, (1, 10, 100, 1000)),
            ("train_inshop", clothes, InShop, 4000, (1, 10, 20, 30)),
        ],
    )
    def test_what_a_run_writes(
        self, name, make, benchmark, clusters, ks, tmp_path, monkeypatch, capsys
    ):
        make(tmp_path / "data")
        example = script(name)
        assert example.CONFIG["num_clusters"] == clusters
        run = tmp_path / "run"
        command(monkeypatch, tmp_path / "data", "--run", run, "--weights=none", "--workers=0")
        example.main(benchmark, {**example.CONFIG, **BENCHMARK}, "what it does")
        metrics = json.loads((run / "metrics.json").read_text())
        names = {f"recall_at_{k}" for k in ks} | ({"NMI"} if clusters < 200 else set())
        for row in ("before", "after"):
            assert set(metrics[row]) == names
            assert all(0 <= value <= 1 for value in metrics[row].values())
        assert metrics["config"] == {**metrics["config"], **BENCHMARK}
        assert "R@1" in capsys.readouterr().out
        assert len(list((run / "checkpoints").iterdir())) > 0

        # Counted once more, by hand: of another class, and never the query itself.
        model = AttentionEmbedder.from_pretrained(run / "model")
        plain = model.transform(image_size=32)
        parts = [benchmark(tmp_path / "data", p, plain) for p in example.CONFIG["test_splits"]]
        (query, labels), (searched, found) = (
            embed(model, part, progress=False) for part in (parts[0], parts[-1])
        )
        similarity = query @ searched.T
        if len(parts) == 1:
            similarity.fill_diagonal_(-2)
        right = (found[similarity.argmax(1)] == labels).float().mean()
        assert metrics["after"]["recall_at_1"] == pytest.approx(float(right), abs=1e-6)

    def test_a_run_that_was_stopped_goes_on(self, tmp_path, monkeypatch):
        birds(tmp_path / "data")
        example = script("train_cub")
        settings = {**example.CONFIG, **BENCHMARK}

        def run(name, *flags):
            folder = tmp_path / name
            data = tmp_path / "data"
            command(monkeypatch, data, "--run", folder, "--weights=none", "--workers=0", *flags)
            example.main(CUB, settings, "")
            return json.loads((folder / "metrics.json").read_text())

        unbroken = run("unbroken")
        step = UnsupervisedTrainer.forward_and_backward

        def stopped(trainer):
            if trainer.epoch == 2:
                raise KeyboardInterrupt
            step(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(UnsupervisedTrainer, "forward_and_backward", stopped)
            with pytest.raises(KeyboardInterrupt):
                run("broken")
        assert run("broken", "--resume") == unbroken
        with pytest.raises(ValueError, match="already contains a run"):
            run("broken")

    def test_a_wrong_root_is_found_before_anything_is_made(self, tmp_path, monkeypatch):
        command(monkeypatch, tmp_path / "no data", "--run", tmp_path / "run")
        example = script("train_cub")
        with pytest.raises(SystemExit) as stop, runs.one_line_errors():
            example.main(CUB, example.CONFIG, "")
        assert "contains no CUB_200_2011/images.txt: get CUB-200-2011 from" in stop.value.code
        assert "\n" not in stop.value.code
        assert not (tmp_path / "run").exists()

    def test_the_settings_are_those_of_the_field(self):
        common = script("train_benchmark").COMMON
        weights = timm.get_pretrained_cfg(common["backbone"])
        assert common["embedding_dim"] == 512
        assert common["image_size"] == 224
        assert int(common["image_size"] / weights.crop_pct) == 256  # the crop is of 256 pixels
        assert weights.tag.endswith("in1k")  # ImageNet of 1000 classes, without labels of ours


class TestMixLosses:
    def test_every_loss_of_each_mix_takes_part(self, monkeypatch, capsys):
        seen = {}
        step = UnsupervisedTrainer.forward_and_backward

        def remembered(trainer):
            step(trainer)
            for name in trainer.loss_funcs:
                seen.setdefault(type(trainer.loss_funcs[name]).__name__, []).append(
                    float(trainer.losses[name])
                )

        class FewSteps(UnsupervisedTrainer):
            """Take a few steps with each mix, which begins from the network that has learnt."""

            def __init__(self, *args, warmup_epochs, **kwargs):
                few = {} if warmup_epochs else {"iterations_per_epoch": 4}
                super().__init__(*args, warmup_epochs=warmup_epochs, **few, **kwargs)

        monkeypatch.setattr(pml_tacl, "UnsupervisedTrainer", FewSteps)
        monkeypatch.setattr(UnsupervisedTrainer, "forward_and_backward", remembered)
        small = {"CLASSES": 24, "WARMUP_EPOCHS": 6, "EPOCHS": 1, "BATCH_SIZE": 32, "WORKERS": 0}
        found = script("mix_losses", BACKBONE=NETWORK, **small).main()
        assert set(seen) == {
            "SelfSupervisedLoss", "MultiSimilarityLoss", "ContrastiveClusteringLoss",
            "AttentionConsistencyLoss", "TripletMarginLoss", "ArcFaceLoss", "CrossBatchMemory",
        }  # fmt: skip
        assert all(np.isfinite(values).all() and max(values) > 0 for values in seen.values())
        assert all(0 <= value <= 1 for value in found.values())
        assert max(found.values()) > found["untrained"]
        printed = capsys.readouterr().out.splitlines()
        assert [line.split(" R@1")[0].strip() for line in printed] == list(found)


class TestSemiSupervised:
    def test_known_labels_are_kept_and_sure_ones_guessed(self):
        generator = torch.Generator().manual_seed(0)
        truth = torch.arange(4).repeat_interleave(10)
        embeddings = torch.eye(4, 8)[truth] + 0.05 * torch.randn(40, 8, generator=generator)
        embeddings[9] = embeddings[19] = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])  # unsure
        known = truth.where(torch.arange(40) % 10 < 3, -1)
        labeler = script("semi_supervised").KnownAndSure(known, (0.0, 26 / 28, 1.0))
        first, second, third, fourth = (labeler(embeddings).labels for _ in range(4))
        assert torch.equal(first, known)
        unsure = torch.zeros(40, dtype=torch.bool)
        unsure[[9, 19]] = True
        assert torch.equal(second, truth.where(~unsure, -1))
        assert torch.equal(third[~unsure], truth[~unsure])
        assert (third >= 0).all()
        assert torch.equal(third, fourth)

    def test_each_source_of_labels_gives_a_result(self, capsys):
        small = {"CLASSES": 10, "WARMUP_EPOCHS": 1, "EPOCHS": 2, "SHARES": (0.0, 0.5)}
        small |= {"BATCH_SIZE": 32, "WORKERS": 0}
        found = script("semi_supervised", BACKBONE=NETWORK, **small).main()
        assert len(found) == 4
        assert all(0 < value <= 1 for value in found.values())
        printed = capsys.readouterr().out
        assert "30 of " in printed
        assert all(f"{name:<26} R@1" in printed for name in found)


class TestVit:
    def test_maps_at_both_sizes(self, tmp_path, capsys):
        small = {"CLASSES": 6, "BATCH_SIZE": 16, "EPOCHS": 1, "WORKERS": 0, "OUT": tmp_path}
        found = script("vit_backbone", **small).main()
        assert list(found) == ["before", "after, 64 pixels", "after, 96 pixels"]
        assert all(0 < value <= 1 for value in found.values())
        printed = capsys.readouterr().out
        for size, side in ((64, 8), (96, 12)):
            assert f"{size} pixels: feature maps (4, 96, {side}, {side})" in printed
            assert f"attention ({side}, {side})" in printed
            make_image(tmp_path / f"attention_{size}.png")


class TestVisualizeAttention:
    NAMES = ("overlay.png", "pair.png", "similar.png")

    def test_glyphs_with_the_model_of_a_run(self, tmp_path, monkeypatch, capsys):
        torch.manual_seed(0)
        model = AttentionEmbedder("resnet10t", embedding_dim=16, **NETWORK).eval()
        model.save_pretrained(tmp_path / "model")
        command(monkeypatch, "--model", tmp_path / "model", "--out", tmp_path / "out")
        script("visualize_attention").main()
        assert capsys.readouterr().out.split() == [str(tmp_path / "out" / n) for n in self.NAMES]
        for name in self.NAMES:
            make_image(tmp_path / "out" / name)

    def test_images_of_ones_own_with_any_backbone(self, tmp_path, monkeypatch):
        files = []
        for number, image in enumerate(Glyphs("test", num_classes=1).images[:3]):
            files.append(tmp_path / f"{number}.png")
            Image.fromarray(image).resize((90, 70)).save(files[-1])
        backbone = ["--backbone=test_resnet", "--weights=none", "--size=64"]
        command(monkeypatch, *files, *backbone, "--out", tmp_path / "out")
        script("visualize_attention").main()
        sizes = {name: make_image(tmp_path / "out" / name).shape for name in self.NAMES}
        assert len(set(sizes.values())) == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["one.png"], "give at least two"),
            ([], "contains no config.json, so it is not a saved model"),
            (["a.png", "b.png", "--backbone=resnet5O", "--weights=none"], "did you mean"),
        ],
    )
    def test_what_is_wrong_in_a_line(self, arguments, message, tmp_path, monkeypatch):
        command(monkeypatch, *arguments, "--model", tmp_path / "none", "--out", tmp_path / "out")
        with pytest.raises(SystemExit) as stop, runs.one_line_errors():
            script("visualize_attention").main()
        assert stop.value.code.startswith("error: ")
        assert message in stop.value.code
        assert not (tmp_path / "out").exists()


class TestFolder:
    """Flat scripts, run with other settings on top."""

    @pytest.mark.parametrize("name", ["folder_trainer", "folder_loop"])
    def test_a_folder_is_trained_on_and_searched(self, name, tmp_path, monkeypatch, capsys):
        folder = tmp_path / "photos"
        folder.mkdir()
        for number, (image, _) in enumerate(Glyphs("train", num_classes=4)):
            image.save(folder / f"{number:02}.png")
        model = AttentionEmbedder("test_resnet", embedding_dim=16)
        torch.save(model.trunk.model.state_dict(), tmp_path / "weights.pth")
        settings = {"FOLDER": str(folder), "RUN": str(tmp_path / "run"), "BACKBONE": "test_resnet"}
        settings |= {"WEIGHTS": str(tmp_path / "weights.pth"), "IMAGE_SIZE": 32, "EPOCHS": 1}
        if name == "folder_loop":
            settings |= {"BATCH_SIZE": 16}
        source = (EXAMPLES / f"{name}.py").read_text("utf-8")
        for constant, value in settings.items():
            line = rf"^{constant} = .*$"
            assert len(re.findall(line, source, re.M)) == 1
            source = re.sub(line, lambda _, c=constant, v=value: f"{c} = {v!r}", source, flags=re.M)
        exec(compile(source, name, "exec"), {"__name__": name})
        last = capsys.readouterr().out.splitlines()[-5:]
        assert last[0] == f"1.000  {folder / '00.png'}"
        values = [float(line.split()[0]) for line in last]
        assert values == sorted(values, reverse=True)
        assert (tmp_path / "run" / "index.faiss").is_file()

    @pytest.mark.parametrize("name", ["folder_trainer", "folder_loop"])
    def test_it_is_flat_and_short(self, name):
        source = (EXAMPLES / f"{name}.py").read_text("utf-8")
        assert 30 <= len(source.splitlines()) <= 80
        assert "fmt: skip" not in source
        assert "\ndef " not in source
