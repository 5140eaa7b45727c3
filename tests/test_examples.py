"""train_folder.py and search.py, run as a user runs them."""

import io
import json
import os
import runpy
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pytorch_metric_learning.losses import MultiSimilarityLoss
from safetensors.torch import save_file

from pml_tacl import AttentionEmbedder, KMeansPseudoLabeler, SiameseTransform, UnsupervisedTrainer
from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import ImageFiles
from pml_tacl.evaluation import embed
from pml_tacl.search import ImageIndex

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "few_channels")]
EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--backbone=test_resnet", "--weights=none", "--image-size=32", "--embedding-dim=32"]
SMALL += ["--workers=0", "--learning-rate=1e-3"]
BROKEN = ("broken/empty.jpg", "broken/text.jpg", "broken/truncated.png")


def run_example(name, *arguments):
    """The example, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def failure(name, *arguments):
    """The line that the example ends with."""
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as stop:
        run_example(name, *arguments)
    return said.getvalue().strip() if stop.value.code == 2 else stop.value.code


def in_a_process(name, *arguments, **environment):
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def draw(rng, count):
    """Random patches of colour, each image its own."""
    for cells in rng.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8):
        yield Image.fromarray(cells).resize((40, 50), Image.Resampling.BICUBIC)


def write_images(folder, count, seed=0):
    """Images of every format and mode that people have, in nested folders."""
    kinds = [
        (".jpg", "RGB"), (".JPEG", "L"), (".jpg", "CMYK"), (".png", "RGB"), (".png", "RGBA"),
        (".png", "P"), (".png", "L"), (".webp", "RGB"), (".webp", "RGBA"), (".tif", "CMYK"),
    ]  # fmt: skip
    for number, image in enumerate(draw(np.random.default_rng(seed), count)):
        suffix, mode = kinds[number % len(kinds)]
        path = folder / f"level {number % 7}" / "ünder" / f"{number:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode == "RGBA":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.convert(mode).save(path, quality=95)
    values = np.random.default_rng(seed).random((50, 40), dtype=np.float32)
    Image.fromarray(values).save(folder / "level 0" / "000 of floats.tif")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """297 sound images and three broken files."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 296)
    (folder / "broken").mkdir()
    (folder / BROKEN[0]).touch()
    (folder / BROKEN[1]).write_text("this is no image")
    whole = (folder / "level 3" / "ünder" / "003.png").read_bytes()
    (folder / BROKEN[2]).write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for number, image in enumerate(draw(np.random.default_rng(9), 12)):
        (folder / f"class {number % 3}").mkdir(exist_ok=True)
        image.save(folder / f"class {number % 3}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    write_images(folder, 23)
    return folder


@pytest.fixture(scope="module")
def trained(images, labelled, tmp_path_factory):
    """The main job; gives the run's folder and what was logged."""
    run = tmp_path_factory.mktemp("runs") / "main"
    settings = ["--epochs=3", "--warmup-epochs=1", "--eval-folder", labelled]
    with pytest.MonkeyPatch.context() as patch:
        warnings = []
        logger = "pml_tacl.datasets.image_files._logger.warning"
        patch.setattr(logger, lambda message, *values: warnings.append(message % values))
        run_example("train_folder", images, "--run", run, *SMALL, *settings)
    return run, warnings


def test_training_names_the_broken_files_and_goes_on(trained, images):
    run, warnings = trained
    assert len(warnings) == 1
    assert "left out 3 of 300 files" in warnings[0]
    assert all(str(images / name) in warnings[0] for name in BROKEN)
    listed = json.loads((run / "files.json").read_text())
    assert listed["root"] == str(images)
    assert len(listed["files"]) == 297
    assert not set(BROKEN) & set(listed["files"])
    assert all((images / name).is_file() for name in listed["files"])
    assert len(ImageIndex.load(run)) == 297
    embeddings = np.load(run / "embeddings.npy")
    assert embeddings.shape == (297, 32)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_a_run_holds_what_the_design_says(trained):
    run, _ = trained
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["before", "after", "config", "versions"]
    for values in (metrics["before"], metrics["after"]):
        assert 0 <= values["recall_at_1"] <= values["recall_at_8"] <= 1
    assert metrics["before"] != metrics["after"]
    assert metrics["config"] == json.loads((run / "run.json").read_text())
    assert metrics["config"]["image_size"] == [32, 32]
    assert metrics["config"]["num_clusters"] == 29
    for name in ("curves", "recall", "attention", "gallery"):
        with Image.open(run / f"{name}.png") as figure:
            figure.verify()
    names = {path.name for path in run.iterdir()}
    assert names >= {"model", "checkpoints", "records", "index.faiss", "embeddings.npy"}
    assert not [name for name in names if name.endswith(".tmp")]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())][-1] == "epoch_0003.pt"
    rows = (run / "records" / "loss_histories.csv").read_text().splitlines()
    assert len(rows) == 1 + 3  # a header, and the first iteration of each epoch


def test_every_stored_image_finds_itself_first(trained, images):
    run, _ = trained
    index = ImageIndex.load(run)
    model = AttentionEmbedder.from_pretrained(run / "model")
    stored = ImageFiles(images, transform=model.transform(image_size=(32, 32)), progress=False)
    # One at a time, as a user asks, not in the batches that the index was made of.
    queries, _ = embed(model, stored, batch_size=1, progress=False)
    similarities, rows = index.search(queries, k=2)
    assert rows[:, 0].tolist() == list(range(297))
    np.testing.assert_allclose(similarities[:, 0], 1, atol=1e-5)
    assert [path.resolve() for path in index.paths(rows[:, 0])] == stored.paths


def test_search_prints_a_table_and_writes_a_gallery(trained, images, tmp_path, capsys):
    run, _ = trained
    files = json.loads((run / "files.json").read_text())["files"]
    run_example("search", run, images / files[7], "-k", 4, "--out", tmp_path / "g.png")
    table = capsys.readouterr().out.splitlines()
    assert table[0] == str(images / files[7])
    assert table[2].split(maxsplit=2) == ["1", "1.0000", files[7]]
    assert len(table) == 1 + 1 + 4 + 1
    values = [float(line.split()[1]) for line in table[2:6]]
    assert values == sorted(values, reverse=True)
    with Image.open(tmp_path / "g.png") as gallery:
        gallery.verify()


def test_search_takes_a_folder_and_a_moved_collection(trained, images, few, tmp_path, capsys):
    run, _ = trained
    index = ImageIndex.load(run)
    index.root = tmp_path / "gone"
    moved = tmp_path / "run"
    moved.mkdir()
    for path in (run / "run.json", run / "model"):
        (moved / path.name).symlink_to(path)
    index.save(moved)
    query = images / "level 1"
    message = failure("search", moved, query)
    assert message == f"error: the indexed images are not in {index.root}: give --images FOLDER"
    capsys.readouterr()
    run_example("search", moved, query, "--images", images)
    asked = ImageFiles(query, progress=False).paths
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(str(query))] == [str(p) for p in asked]
    first = [line.split(maxsplit=2)[2] for line in lines if line.startswith("   1 ")]
    assert [images / name for name in first] == asked
    assert lines[-1].endswith(f"{moved / 'search.png'}")
    assert (moved / "search.png").stat().st_size > 0


def test_search_says_what_is_missing(trained, images, tmp_path):
    run, _ = trained
    query = images / BROKEN[1]
    good = next((images / "level 2").rglob("*.jpg"))
    assert "contains no index.faiss" in failure("search", tmp_path, good)
    assert "text.jpg: not an image of a known format" in failure("search", run, query)
    assert "No such file" in failure("search", run, tmp_path / "none.jpg")
    assert "-k: must be a whole number of at least 1" in failure("search", run, good, "-k", 0)
    broken = tmp_path / "run"
    broken.mkdir()
    for name in ("run.json", "model", "metrics.json", "files.json"):
        (broken / name).symlink_to(run / name)
    assert "contains no index: the command was stopped before" in failure("search", broken, good)
    (broken / "index.faiss").write_bytes((run / "index.faiss").read_bytes()[:50])
    assert "index.faiss is not a faiss index, or is damaged" in failure("search", broken, good)
    ImageIndex(np.eye(2, 32), ["a", "b"], images).save(tmp_path / "other")
    (broken / "index.faiss").write_bytes((tmp_path / "other" / "index.faiss").read_bytes())
    assert "do not fit together (2 embeddings, 297 images)" in failure("search", broken, good)


@pytest.mark.parametrize("stop", [(1, 0), (3, 1)])
def test_a_resumed_run_ends_like_an_unbroken_one(few, labelled, unbroken, tmp_path, stop):
    train = UnsupervisedTrainer.forward_and_backward

    def interrupted(trainer):
        if (trainer.epoch, trainer.iteration) == stop:
            raise KeyboardInterrupt
        train(trainer)

    command = ["train_folder", few, "--run", tmp_path / "run", *unbroken.settings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnsupervisedTrainer, "forward_and_backward", interrupted)
        assert failure(*command) == 130
    assert not (tmp_path / "run" / "index.faiss").exists()
    run_example(*command, "--resume")
    ended = contents(tmp_path / "run")
    # Checkpoints are zip archives and the data base counts its writes: their content is above.
    kept = {path for path in unbroken.files if path.suffix not in (".pt", ".db")}
    assert {path for path in ended if path.suffix not in (".pt", ".db")} == kept
    assert [path for path in sorted(kept) if ended[path] != unbroken.files[path]] == []


@pytest.fixture(scope="module")
def unbroken(few, labelled, tmp_path_factory):
    weights = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    torch.manual_seed(7)
    save_file(timm.create_model("test_resnet").state_dict(), weights)

    class Unbroken:
        # From weights of a file, which a resumed run does not read again.
        settings = (*SMALL, "--epochs=3", "--warmup-epochs=0", "--batch-size=8",
                    "--eval-folder", labelled, "--weights", weights)  # fmt: skip
        run = tmp_path_factory.mktemp("unbroken") / "run"

    run_example("train_folder", few, "--run", Unbroken.run, *Unbroken.settings)
    Unbroken.files = contents(Unbroken.run)
    return Unbroken


@pytest.mark.usefixtures("empty_figures")
def test_a_test_of_lone_classes_is_left_out_and_costs_nothing(few, tmp_path, caplog, capsys):
    for number, image in enumerate(draw(np.random.default_rng(9), 3)):
        (tmp_path / "labelled" / f"class {number}").mkdir(parents=True)
        image.save(tmp_path / "labelled" / f"class {number}" / "1.png")
    run = tmp_path / "run"
    settings = [*SMALL, "--epochs=1", "--batch-size=8", "--eval-folder", tmp_path / "labelled"]
    for others in ([], ["--resume"]):
        caplog.clear()
        run_example("train_folder", few, "--run", run, *settings, *others)
        assert "3 classes of one image each" in caplog.text
        written = json.loads((run / "metrics.json").read_text(), parse_constant=pytest.fail)
        assert (written["before"], written["after"]) == ({}, {})
        assert len(ImageIndex.load(run)) == 24
        assert not (run / "recall.png").exists()
        assert "24 images indexed in" in capsys.readouterr().out


def test_resuming_an_ended_run_changes_nothing(few, unbroken):
    run_example("train_folder", few, "--run", unbroken.run, *unbroken.settings, "--resume")
    assert contents(unbroken.run) == unbroken.files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "no image in '{empty}' or below it"),
        (["{empty}/none"], "'{empty}/none' is not a folder: give a folder of images"),
        (["{few}", "--num-clusters=25"], "--num-clusters 25 is more than the number of images, 24"),
        (
            ["{few}", "--num-clusters=3"],
            "a batch of 16 with --images-per-cluster 4 needs 4 clusters, got 3",
        ),
        (["{few}", "--batch-size=28"], "--batch-size must be from 1 to the number of images, 24"),
        (["{few}", "--batch-size=0"], "--batch-size: must be a whole number of at least 1, got 0"),
        (["{few}", "--batch-size=6"], "--images-per-cluster must divide --batch-size 6"),
        (
            ["{few}", "--backbone=resnet5O"],
            "--backbone 'resnet5O' is not a timm model: did you mean",
        ),
        (["{few}", "--weights=pretrained"], "weights.safetensors', or --weights none"),
        (["{few}", "--weights={empty}/none.pth"], "--weights '{empty}/none.pth': no such file"),
        (["{few}", "--epochs=-1"], "--epochs: must be a whole number of at least 0, got -1"),
        (["{few}", "--num-clusters=few"], "--num-clusters: must be a number or auto, got 'few'"),
        (["{few}", "--images-per-cluster=0"], "--images-per-cluster: must be a whole number"),
        (["{few}", "--epoch-count=3"], "unrecognized arguments: --epoch-count=3"),
        (["{few}", "--image-size=0"], "--image-size: must be a whole number of at least 1, got 0"),
        (
            ["{few}", "--learning-rate=inf"],
            "--learning-rate: must be finite and at least 0, got inf",
        ),
        (["{few}", "--eval-folder={empty}"], "no image in '{empty}' or below it"),
        (["{images}", "--strict"], "3 files are broken (--strict): "),
        (["{images}/broken"], "no readable image in '{images}/broken': "),
        (["{few}", "--resume"], "--resume and --overwrite exclude each other"),
        (["{run}"], "must be in separate folders"),
        (["{run}/.."], "must be in separate folders"),
        (
            ["{few}", "--eval-folder={run}"],
            "must be in separate folders",
        ),
        (
            ["{few}", "--eval-folder={run}/model"],
            "must be in separate folders",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_harms_nothing(
    arguments, message, unbroken, few, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache"))
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "few": few, "images": images, "run": unbroken.run}
    first, *others = [argument.format(**places) for argument in arguments]
    settings = [*SMALL, "--batch-size=16", "--run", unbroken.run, "--overwrite"]
    found = failure("train_folder", first, *settings, *others)
    assert found.startswith("error: ")
    assert message.format(**places) in found
    assert "\n" not in found
    assert contents(unbroken.run) == unbroken.files


@pytest.mark.parametrize("workers", [0, 1])
def test_nan_images_of_a_users_data_set_end_in_one_line(few, workers):
    model = AttentionEmbedder("test_resnet", embedding_dim=8)
    trainer = UnsupervisedTrainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        8,
        {"metric_loss": MultiSimilarityLoss()},
        [(torch.full((3, 40, 40), float("nan") if i == 5 else i / 24), 0) for i in range(24)],
        transform=SiameseTransform(32, 2, photometric=None),
        eval_transform=lambda image: image[:, :32, :32],
        labeler=KMeansPseudoLabeler(4),
        images_per_cluster=2,
        dataloader_num_workers=workers,
        progress=False,
    )
    with pytest.raises(SystemExit) as stop, runs.one_line_errors():
        trainer.train()
    line = "error: image 5 of the data set is NaN or infinite: repair or remove it"
    assert stop.value.code == line


def test_a_run_is_not_mixed_with_another(few, unbroken, images):
    run = ["--run", unbroken.run]
    found = failure("train_folder", few, *run, *unbroken.settings)
    assert "already contains a run: give --resume to continue it" in found
    found = failure("train_folder", few, *run, *unbroken.settings, "--resume", "--seed=4")
    assert "started with other settings (seed): resume with the same (--seed 0), or give" in found
    found = failure("train_folder", images, *run, *unbroken.settings, "--resume")
    assert "started with other settings (its images)" in found
    assert contents(unbroken.run) == unbroken.files


@pytest.mark.usefixtures("empty_figures")
def test_more_epochs_and_moved_images_go_on(few, labelled, unbroken, tmp_path):
    run, moved, tested = (tmp_path / name for name in ("run", "moved", "tested"))
    shutil.copytree(unbroken.run, run)
    shutil.copytree(few, moved)
    shutil.copytree(labelled, tested)
    given = [tested if value == labelled else value for value in unbroken.settings]
    settings = [*given, "--epochs=5", "--resume"]
    run_example("train_folder", moved, "--run", run, *settings)
    config = json.loads((run / "run.json").read_text())
    assert (config["epochs"], config["images"]) == (5, str(moved))
    assert json.loads((run / "files.json").read_text())["root"] == str(moved)
    with closing(sqlite3.connect(run / "records" / "logs.db")) as base:
        rates = [row[0] for row in base.execute("SELECT lr FROM trunk_optimizer_AdamW")]
    assert len(rates) == 5
    # The schedule is that of five epochs from the fourth on, and ends as one does.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1e-3)
    steps = len(ImageFiles(few, progress=False)) // 8
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=5 * steps + 1, pct_start=0.1
    )
    made = []
    for _ in range(5 * steps):
        made.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[3:] == pytest.approx([made[3 * steps], made[4 * steps]])
    shifted = moved / "level 0" / "000 of floats.tif"
    Image.new("RGB", (40, 50), "red").save(shifted)
    found = failure("train_folder", moved, "--run", run, *settings)
    assert "started with other settings (its images): resume with the same, or give" in found
    assert "--overwrite" not in found


@pytest.mark.usefixtures("empty_figures")
def test_overwriting_replaces_the_whole_run(few, tmp_path):
    command = ["train_folder", few, "--run", tmp_path / "run", *SMALL, "--epochs=1"]
    run_example(*command, "--batch-size=8")
    (tmp_path / "run" / "stray").touch()
    run_example(*command, "--batch-size=12", "--overwrite")
    assert not (tmp_path / "run" / "stray").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["before"] == metrics["after"] == {}
    assert metrics["config"]["batch_size"] == 12


def test_offline_a_process_ends_with_one_line_and_code_1(few, tmp_path):
    arguments = [few, "--run", tmp_path / "run", "--backbone=test_resnet"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = in_a_process("train_folder", *arguments, **offline)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --weights pretrained: no weights for 'test_resnet'")
    assert last.endswith(", --weights 'weights.safetensors', or --weights none")
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
