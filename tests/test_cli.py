"""The command pml-tacl: each sub-command as a user gives it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from pml_tacl import AttentionEmbedder, UnsupervisedTrainer, visualize
from pml_tacl.cli.building import sized_model
from pml_tacl.cli.flags import by_flags
from pml_tacl.cli.main import COMMANDS, main
from pml_tacl.cli.parsers import parse
from pml_tacl.cli.search import NEIGHBOURS, SHOWN
from pml_tacl.datasets import ImageFiles
from pml_tacl.duplicates import find_duplicates
from pml_tacl.evaluation import embed, evaluate
from pml_tacl.search import ImageIndex
from pml_tacl.trainers.checkpoint import checkpoints, load_checkpoint
from pml_tacl.trainers.fitting import fit_to
from pml_tacl.trainers.records import read_losses

pytestmark = pytest.mark.usefixtures("one_thread", "few_channels")
ROOT = Path(__file__).parents[1]
TIMM = ["--model=test_resnet", "--weights=none", "--image-size=32", "--workers=0", "--quiet"]
TINY = ["--backbone=test_resnet", "--weights=none", "--image-size=32", "--embedding-dim=8"]
TINY += ["--workers=0", "--batch-size=8", "--epochs=1", "--quiet"]


def call(*arguments):
    main([str(argument) for argument in arguments])


def said(capsys, *arguments):
    """Standard output of a command that ends well, and of one with --json what it holds."""
    capsys.readouterr()
    call(*arguments)
    printed = capsys.readouterr().out
    return json.loads(printed) if "--json" in arguments else printed


def draw(folder, count=24, seed=0):
    """Images in three classes, of which one in b is nearly one in a."""
    rng = np.random.default_rng(seed)
    for number, cells in enumerate(rng.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)):
        path = folder / "abc"[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cells).resize((40, 50), Image.Resampling.BICUBIC).save(path)
    with Image.open(folder / "a" / "00.png") as image:
        image.save(folder / "b" / "again.jpg", quality=98)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "photos"
    draw(folder)
    return folder


@pytest.fixture(scope="module")
def run(photos):
    folder = photos.parent / "run"
    call("train", photos, *TINY, "--run", folder)
    return folder


def embedded(run, folder):
    model = AttentionEmbedder.from_pretrained(run / "model")
    transform = model.transform(image_size=32)
    images = ImageFiles(folder, labels="folder", transform=transform, progress=False)
    return model, images, embed(model, images, progress=False)[0].numpy()


def test_train_writes_a_run_and_quiet_says_nothing(run, photos, capfd):
    assert {"model", "index.faiss", "metrics.json"} <= {path.name for path in run.iterdir()}
    assert len(ImageIndex.load(run)) == 25
    call("train", photos, *TINY, "--run", run, "--resume")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_what_would_harm_a_run_is_refused_and_changes_nothing(photos, tmp_path, capsys):
    def contents():
        paths = (path for path in run.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in paths}

    run = tmp_path / "run"
    call("train", photos, *TINY, "--run", run, "--epochs", 2)
    before = contents()
    resume = ["train", "--resume", "--run", run]
    for command, message in [
        ([*resume, "--epochs", 0], "--epochs 0 is below the 2 epochs that .* was trained for"),
        ([*resume, "--epochs", 1], "--epochs 1 is below the 2 epochs that .* was trained for"),
        ([*resume, "--weights", "pretrained"], "began from scratch: resume without --weights"),
        (["export", run, "--onnx", run / "run.onnx"], r"would overwrite .*run\.json of the run"),
        (["duplicates", run, "--exclude", "a"], "--exclude: for a folder of images, and .* is a"),
    ]:
        with pytest.raises(SystemExit, match=message):
            call(*command)
        assert contents() == before
    files = run / "files.txt"
    files.write_text("a/00.png")
    with pytest.raises(SystemExit, match="must be in separate folders"):
        call("train", photos, *TINY, "--run", run, "--overwrite", "--files", files)
    assert files.exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as wrong:
        call("export", run, "--onnx", tmp_path / "model.json")
    assert wrong.value.code == 2
    assert "must end with .onnx" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_a_new_model_is_never_used_with_an_old_index(photos, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    run, query = tmp_path / "run", photos / "a" / "00.png"
    call("train", photos, *TINY, "--run", run, "--epochs", 1)
    with monkeypatch.context() as patch:
        patch.setattr("pml_tacl.cli.train.embed_distributed", stop)
        with pytest.raises(SystemExit):
            call("train", "--resume", "--run", run, "--epochs", 2)
    with pytest.raises(
        SystemExit, match=r"stopped before it was written; .* --resume --run .* writ"
    ):
        call("search", run, query)
    call("train", "--resume", "--run", run)
    call("search", run, query)


def test_duplicates_leave_no_gallery_of_another_threshold(run, tmp_path):
    for threshold, shown in ((0.5, True), (1, False)):
        call("duplicates", run, "--threshold", threshold, "--out", tmp_path)
        assert (tmp_path / "duplicates.png").exists() == shown


def test_help_of_train_shows_what_matters_first(capsys):
    with pytest.raises(SystemExit) as stop:
        call("train", "--help")
    assert stop.value.code == 0
    first = capsys.readouterr().out
    wanted = "run backbone weights image-size epochs eval-folder resume overwrite batch-size"
    wanted = [*wanted.split(), "help-all"]
    for name in wanted:
        assert f"  --{name}" in first
    assert "  FOLDER " in first
    assert first.count("\n  --") == len(wanted)
    assert first.count("\n") <= 24  # of the usual terminal
    with pytest.raises(SystemExit) as stop:
        call("train", "--help-all")
    assert stop.value.code == 0
    whole = capsys.readouterr().out
    more = whole.partition("\nmore:\n")[2]
    hidden = "learning-rate device quiet debug no-guard exclude files tensorboard workers"
    for name in hidden.split():
        assert f"--{name}" in more
        assert f"--{name}" not in first
    for name in wanted:
        assert f"  --{name}" in whole
    assert "None" not in whole
    assert "default: False" not in whole
    assert "default: []" not in whole


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_one_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        call(name, "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: pml-tacl {name} ")
    assert shown.count(f"\nexample: pml-tacl {name} ") == 1
    assert "None" not in shown
    if name == "train":
        with pytest.raises(SystemExit):
            call(name, "--help-all")
        shown = capsys.readouterr().out
    assert "--debug" in shown
    assert "--quiet" in shown


def in_a_process(*arguments):
    command = [sys.executable, "-m", "pml_tacl", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_help_and_wrong_usage_do_not_wait_for_torch():
    helps = [["train", "--help-all"], *([name, "--help"] for name in COMMANDS)]
    wrong = [
        ["train", "photos", "--epochs=many"],
        ["search", "run"],
        ["embed", "photos", "--model=a", "--out=a.txt"],
    ]
    code = (
        "import sys\n"
        "from pml_tacl.cli.main import main\n"
        f"for arguments in {helps + wrong!r}:\n"
        "    try:\n        main(arguments)\n"
        "    except SystemExit as stop:\n        print('code', stop.code)\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'timm'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    *lines, loaded = done.stdout.splitlines()
    codes = [line.split()[1] for line in lines if line.startswith("code ")]
    assert codes == ["0"] * len(helps) + ["2"] * len(wrong)
    assert loaded == "[]"


@pytest.mark.slow
def test_the_command_is_declared_and_runs_as_a_module():
    declared = '[project.scripts]\npml-tacl = "pml_tacl.cli.main:main"\n'
    assert declared in (ROOT / "pyproject.toml").read_text("utf-8")
    done = in_a_process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, text in COMMANDS.items():  # each on a line
        assert f"\n    {name:<10}  {text}\n" in done.stdout
    done = in_a_process("search", "nowhere", "x.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: nowhere contains no index.faiss: give the folder of a run that train or index wrote"
    ]


def test_embed_of_a_run_is_what_its_index_holds(run, photos, tmp_path):
    out = tmp_path / "new" / "photos.npy"
    call("embed", photos, "--model", run, "--out", out, "--workers=0", "--quiet")
    index = ImageIndex.load(run)
    assert json.loads((out.parent / "photos.names.json").read_text()) == index.files
    rows = np.load(out)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, index.embeddings, atol=1e-5)


@pytest.mark.slow
def test_json_of_embed_and_index(run, photos, tmp_path, capsys):
    out, made = tmp_path / "a.npy", tmp_path / "index"
    given = ["--model", run, "--json", "--workers=0"]
    found = said(capsys, "embed", photos, *given, "--out", out)
    assert found == {"file": str(out), "images": 25, "dimensions": np.load(out).shape[1]}
    found = said(capsys, "index", photos, *given, "--run", made)
    assert found == {"run": str(made), "images": 25, "dimensions": np.load(out).shape[1]}


def test_embed_without_training_fits_the_projection(photos, tmp_path, monkeypatch):
    torch.manual_seed(0)
    call("embed", photos, *TIMM, "--out", tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head[:2] == ["name", "0"]
    assert [row[0] for row in rows] == ImageFiles(photos, progress=False).names
    values = np.array([row[1:] for row in rows], dtype=np.float64)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
    # Centred by the fit: a raw network's embeddings all point to one side.
    assert np.linalg.norm(values.mean(axis=0)) < 0.3


def test_parquet_without_pyarrow_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = r"^error: \.parquet needs pyarrow: pip install pyarrow, or give --out a .npy or .csv$"
    with pytest.raises(SystemExit, match=message):
        call("embed", tmp_path / "nothing", *TIMM, "--out", tmp_path / "a.parquet")


def test_export_without_onnx_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = "^error: --onnx needs onnx and onnxscript: pip install onnx onnxscript$"
    with pytest.raises(SystemExit, match=message):
        call("export", tmp_path, "--onnx", tmp_path / "a.onnx")


def test_parquet_holds_names_and_embeddings(run, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install pyarrow")
    out = tmp_path / "a.parquet"
    call("embed", photos, "--model", run, "--out", out, "--workers=0", "--quiet")
    table, index = parquet.read_table(out).to_pydict(), ImageIndex.load(run)
    assert table["name"] == index.files
    np.testing.assert_allclose(table["embedding"], index.embeddings, atol=1e-5)


@pytest.mark.slow
def test_index_by_a_run_and_by_a_timm_model(run, photos, tmp_path, capsys):
    made = tmp_path / "by run"
    settings = ["--workers=0", "--device=cpu"]
    printed = said(capsys, "index", photos / "b", "--model", run, "--run", made, *settings)
    assert f"9 images indexed in {made}" in printed
    index = ImageIndex.load(made)
    np.testing.assert_allclose(index.embeddings, embedded(run, photos)[2][8:17], atol=1e-5)
    assert said(capsys, "search", made, photos / "b" / "01.png", "-k1", "--json", *settings)[
        "queries"
    ][0]["found"] == [{"file": "01.png", "similarity": pytest.approx(1, abs=1e-5)}]
    call("index", photos, *TIMM, "--run", tmp_path / "by timm")
    config = json.loads((tmp_path / "by timm" / "run.json").read_text())
    assert (config["backbone"], config["image_size"]) == ("test_resnet", [32, 32])
    with pytest.raises(SystemExit, match="already contains a run: give --resume"):
        call("index", photos, *TIMM, "--run", tmp_path / "by timm")
    call("report", tmp_path / "by timm", "--points=30", "--queries=1", "--quiet")
    page = (tmp_path / "by timm" / "report.html").read_text("utf-8")
    assert len(page) > 10_000
    assert "Indexed images" in page
    assert "used in training" not in page


def test_search_takes_several_queries(run, photos, tmp_path, capsys):
    asked = [photos / "a" / "00.png", photos / "c" / "02.png"]
    found = said(capsys, "search", run, *asked, "-k", "3", "--json", "--workers=0")
    assert found["root"] == str(photos)
    assert [one["query"] for one in found["queries"]] == [str(path) for path in asked]
    _, images, rows = embedded(run, photos)
    for one, path in zip(found["queries"], asked, strict=True):
        row = images.paths.index(path)
        nearest = np.argsort(-rows @ rows[row])[:3]
        assert [image["file"] for image in one["found"]] == [images.names[i] for i in nearest]
        similarities = [image["similarity"] for image in one["found"]]
        np.testing.assert_allclose(similarities, (rows @ rows[row])[nearest], atol=1e-5)
    assert not (run / "search.png").exists()
    printed = said(capsys, "search", run, *asked, "-k2", "--out", tmp_path / "a.png", "--workers=0")
    assert printed.count("rank  similarity  image") == 2
    assert printed.endswith(f"gallery of 2 of 2 queries: {tmp_path / 'a.png'}\n")
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image.convert("L")).std() > 20
    assert SHOWN * NEIGHBOURS <= 1000


def test_search_updates_without_a_query(run, photos, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "a" / "00.png").unlink()
    shutil.copy(photos / "a" / "03.png", tmp_path / "photos" / "new.png")
    moved = ["--images", tmp_path / "photos", "--workers=0"]
    printed = said(capsys, "search", tmp_path / "run", "--update", *moved)
    assert printed == "1 image embedded, 1 removed, 25 in the index\n"
    done = said(capsys, "search", tmp_path / "run", "--update", "--json", *moved)
    assert done == {"update": {"embedded": 0, "removed": 0, "indexed": 25}}
    assert ImageIndex.load(tmp_path / "run").changes() == ([], [], [])


def groups_by_brute_force(rows, threshold):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    linked = unit @ unit.T >= threshold
    for _ in range(len(rows)):
        linked = linked @ linked
    groups = {tuple(np.flatnonzero(row).tolist()) for row in linked if row.sum() > 1}
    return sorted(groups, key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("pairs", [2**24, 50])
def test_groups_are_those_of_brute_force(threshold, pairs, monkeypatch):
    monkeypatch.setattr("pml_tacl.duplicates._PAIRS", pairs)
    rng = np.random.default_rng(int(100 * threshold))
    rows = rng.standard_normal((40, 6))[rng.integers(0, 40, 90)] * rng.uniform(1, 5, (90, 1))
    rows[::2] += 0.4 * rng.standard_normal((45, 6))
    rows = rows.astype(np.float32)
    found = find_duplicates(torch.from_numpy(rows), threshold)
    wanted = groups_by_brute_force(rows.astype(np.float64), threshold)
    assert len(wanted) >= 1
    assert [tuple(group.rows.tolist()) for group in found] == wanted
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for rows_of, similarities in found:
        among = unit[rows_of] @ unit[rows_of].T
        np.fill_diagonal(among, -1)
        np.testing.assert_allclose(similarities, among.max(axis=1), atol=1e-5)


def test_duplicates_joined_through_others_and_equal_ones():
    angles = np.deg2rad([0, 15, 30, 120, 121, 120, 240])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    groups = [group.rows.tolist() for group in find_duplicates(rows, np.cos(np.deg2rad(16)))]
    assert groups == [[0, 1, 2], [3, 4, 5]]
    assert [group.rows.tolist() for group in find_duplicates(rows, 1)] == [[3, 5]]
    assert find_duplicates(rows[:1]) == []
    with pytest.raises(ValueError, match=r"threshold must be a number in \(0, 1\], got 1\.5"):
        find_duplicates(rows, 1.5)


def test_duplicates_of_a_run_are_a_table_a_summary_and_a_gallery(
    run, tmp_path, capsys, monkeypatch
):
    out, texts = tmp_path / "out", []
    save = visualize.save_figure

    def save_and_read(figure, path):
        texts.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, path)

    monkeypatch.setattr(visualize, "save_figure", save_and_read)
    printed = said(capsys, "duplicates", run, "--threshold=0.99", "--out", out)
    assert printed.splitlines()[:2] == [
        "1 group of near-duplicates, 2 of 25 images, similarity of 0.99 or more",
        "   1     2 images  a/00.png, b/again.jpg",
    ]
    with (out / "duplicates.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["group", "file", "similarity"]
    assert [row[:2] for row in rows] == [["1", "a/00.png"], ["1", "b/again.jpg"]]
    with Image.open(out / "duplicates.png") as image:
        assert np.asarray(image.convert("L")).std() > 20
    assert {"a group's first image", "near-duplicates of it"} <= set(texts)
    assert "query" not in texts
    found = said(capsys, "duplicates", run, "--threshold=0.99", "--json")
    assert [[image["file"] for image in group] for group in found["groups"]] == [
        ["a/00.png", "b/again.jpg"]
    ]


def test_duplicates_of_a_folder_need_no_run(photos, tmp_path, capsys):
    torch.manual_seed(0)
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(photos / "c" / "05.png", tmp_path / "photos" / "copy.png")
    before = sorted(tmp_path.rglob("*"))
    found = said(capsys, "duplicates", tmp_path / "photos", *TIMM, "--json", "--threshold=0.999")
    assert [[image["file"] for image in group] for group in found["groups"]] == [
        ["c/05.png", "copy.png"]
    ]
    assert found["root"] == str(tmp_path / "photos")
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_gives_what_python_gives(run, photos, tmp_path, capsys):
    found = said(capsys, "evaluate", run, photos, "--json", "--workers=0")
    model, images, _ = embedded(run, photos)
    assert found == pytest.approx(evaluate(model, images, progress=False), abs=1e-6)
    printed = said(capsys, "evaluate", run, photos, "--workers=0")
    assert f"{100 * found['recall_at_1']:8.1f}" in printed
    # The same classes at other numbers, and one of the reference alone.
    shutil.copytree(photos / "b", tmp_path / "query" / "b")
    shutil.copytree(photos / "c", tmp_path / "query" / "c")
    reference = ["--reference", photos, "--json", "--workers=0"]
    assert said(capsys, "evaluate", run, tmp_path / "query", *reference)["recall_at_1"] == 1


@pytest.mark.slow
def test_export_gives_the_same_embeddings(run, photos, tmp_path, capsys):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs it: pip install {package}")
    runtime = pytest.importorskip("onnxruntime", reason="needs it: pip install onnxruntime")
    path = tmp_path / "made" / "model.onnx"
    call("export", run, "--onnx", path, "--json")
    printed, notes = capsys.readouterr()
    described = str(path.with_suffix(".json"))
    made = {"onnx": str(path), "preprocessing": described, "input_size": [3, 32, 32]}
    assert json.loads(printed) == made
    assert "images (n, 3, 32, 32) -> embeddings" in notes
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    _, images, rows = embedded(run, photos)
    for count in (1, 5):
        batch = torch.stack([images[row][0] for row in range(count)]).numpy()
        (found,) = session.run(["embeddings"], {"images": batch})
        np.testing.assert_allclose(found, rows[:count], atol=1e-4)
    assert json.loads(path.with_suffix(".json").read_text())["input_size"] == [3, 32, 32]
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.json", "model.onnx"]


def test_report_is_written_where_it_is_asked_for(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    given = ["report", run, "--out", out, "--points=30", "--queries=1"]
    assert said(capsys, *given).startswith(f"{out}: 0.")
    found = said(capsys, *given, "--json", "--debug")
    assert found == {"file": str(out), "bytes": out.stat().st_size}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["embed", "{no}", *TIMM, "--out=a.npy"], "{no}' is not a folder: give a folder of images"),
        (["embed", "{photos}", "--model=resnet51", "--weights=none", "--out=a.npy"], "'resnet51'"),
        (
            ["embed", "{photos}", "--model={photos}", "--out=a.npy"],
            "{photos} contains no model: give",
        ),
        (["search", "{photos}", "a.png"], "{photos} contains no index.faiss"),
        (["search", "{run}", "{no}.png"], "{no}.png"),
        (["search", "{run}", "--images={no}", "--update"], "give --images"),
        (["duplicates", "{no}"], "{no} is not a folder: give a run, or a folder of images"),
        (["evaluate", "{no}", "{photos}"], "{no} is not a folder: give the folder of a run"),
        (["evaluate", "{run}", "{photos}/a"], "are not in a sub-folder"),
        (["evaluate", "{run}", "{photos}", "--reference={run}/.."], "--reference '{run}/..' has"),
        (["report", "{photos}"], "{photos} is not a run folder"),
        (["serve", "{photos}"], "{photos} contains no index.faiss: give the folder of a run"),
        (["serve", "{run}", "--also={no}"], "--also {no} is not a folder: give one"),
        (["embed", "{photos}", *TIMM, "--out=a.npy", "--files={no}"], "--files '{no}' cannot be"),
        (["embed", "{photos}", *TIMM, "--out=a.npy", "--exclude=*"], "leaves no image of"),
        (["export", "{no}", "--onnx=a.onnx"], "{no} is not a folder: give the folder of a run"),
        (["train", "{photos}", *TINY, "--run={run}"], "already contains a run: give --resume"),
        (["train", "{photos}", *TINY, "--run={new}", "--eval-folder={photos}"], "--eval-folder '"),
    ],
)
def test_what_is_wrong_is_one_line_and_code_1(arguments, line, run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"photos": photos, "run": run, "no": tmp_path / "no", "new": tmp_path / "new"}
    with pytest.raises(SystemExit) as stop:
        call(*(argument.format(**places) for argument in arguments))
    assert stop.value.code.startswith("error: ")
    assert line.format(**places) in stop.value.code
    assert "\n" not in stop.value.code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["watch"], "argument COMMAND: invalid choice: 'watch'"),
        (["serve"], "the following arguments are required: RUN"),
        (["train"], "no folder of images is given: put it first"),
        (
            ["train", "--resume", "--run=x"],
            "x contains no run to resume: give the folder of a run as --run",
        ),
        (["train", "x", "--epochs=-1"], "argument --epochs: must be a whole number of at least 0"),
        (
            ["train", "x", "--device=cuda:77"],
            "argument --device: 'cuda:77' is not available",
        ),
        (["embed", "x", "--out=a.npy"], "the following arguments are required: --model"),
        (["embed", "x", "--model=y", "--out=a.txt"], "--out: must end with .npy, .csv or .parquet"),
        (["search", "x"], "no query: give a QUERY, or --update"),
        (["search", "x", "y", "-k0"], "argument -k: must be a whole number of at least 1, got 0"),
        (["search", "x", "y", "--out=a.gif"], "argument --out: must end with .png, .svg or .pdf"),
        (["duplicates", "x", "--threshold=2"], "--threshold: must be a number above 0 and at most"),
        (["export", "x"], "the following arguments are required: --onnx"),
        (["report", "x", "--points=0"], "argument --points: must be a whole number of at least 1"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments, line, capsys):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("error: ")
    assert line in printed.err


@pytest.mark.parametrize(
    "words", ["run a.png b.png --update -k 3", "run --update a.png -k 3 b.png"]
)
def test_queries_of_a_search_stand_anywhere(words):
    args = parse("search", words.split())
    assert (args.run, args.queries, args.update, args.k) == (
        Path("run"),
        ["a.png", "b.png"],
        True,
        3,
    )


def test_ctrl_c_ends_with_130_and_debug_shows_where(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pml_tacl.cli.report.run", stop)
    with pytest.raises(SystemExit) as ended:
        call("report", "x")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"
    monkeypatch.setattr("sys.argv", ["pml-tacl", "duplicates", "nowhere", "--debug"])
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        main()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("batch_size must be at least 2, got 1", "--batch-size must be at least 2, got 1"),
        ("eval_folder='a=b' contains one class", "--eval-folder 'a=b' contains one class"),
        ("dataset must have a length", "dataset must have a length"),
        ("epochs are many", "epochs are many"),
        ("give --resume (resume=True), or another", "give --resume, or another"),
        ("3 files are broken (strict=True): a", "3 files are broken (--strict): a"),
        (
            "pretrained=True: none; pass pretrained=False",
            "--weights pretrained: none; pass --weights none",
        ),
        ("pretrained='a/epochs=3.pth': no such file", "--weights 'a/epochs=3.pth': no such file"),
        ("pass img_size= or dynamic_img_size=True", "pass img_size= or dynamic_img_size=True"),
    ],
)
def test_messages_name_the_flag(message, line):
    assert by_flags(message) == line


@pytest.fixture(scope="module")
def stopped(photos, tmp_path_factory):
    """A training of three epochs that Ctrl-C ended in the second."""
    folder = tmp_path_factory.mktemp("stopped") / "my run"
    step = UnsupervisedTrainer.forward_and_backward

    def interrupted(trainer):
        if (trainer.epoch, trainer.iteration) == (2, 1):
            os.kill(os.getpid(), signal.SIGINT)
        step(trainer)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UnsupervisedTrainer, "forward_and_backward", interrupted)
            with pytest.raises(SystemExit) as stop:
                call("train", photos, *TINY, "--epochs=3", "--run", folder)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_a_training_stopped_before_its_first_step_is_begun_again(
    photos, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pml_tacl.cli.train.tell_start", stop)
        with pytest.raises(SystemExit) as ended:
            call("train", photos, *TINY, "--run", run)
    again = f"pml-tacl train --resume --run {run} starts again"
    assert ended.value.code == 130
    assert (
        capsys.readouterr().err
        == f"stopped by SIGINT: {again}, because nothing has been saved yet\n"
    )
    with pytest.raises(SystemExit, match=f"stopped before the first checkpoint; {again}"):
        call("search", run, photos / "a" / "00.png")
    call("train", "--resume", "--run", run, "--quiet", "--workers=0")
    assert len(ImageIndex.load(run)) == 25


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_a_stopped_training_is_searched_with_the_model_of_its_last_checkpoint(
    stopped, photos, tmp_path, capsys
):
    run = tmp_path / "my run"
    shutil.copytree(stopped, run)
    assert not (run / "model").exists()
    query = [run, photos / "a" / "00.png", "--json", "--workers=0", "-k25"]
    found = said(capsys, "search", *query)["queries"][0]["found"]
    state = load_checkpoint(run / "checkpoints")
    model = AttentionEmbedder("test_resnet", embedding_dim=8, pooling="covariance")
    model.trunk.load_state_dict(state["parts"]["models"]["trunk"])
    model.embedder.load_state_dict(state["parts"]["models"]["embedder"])
    transform = model.eval().transform(image_size=32)
    images = ImageFiles(photos, transform=transform, progress=False)
    fit_to(model, images, progress=False)
    rows = embed(model, images, progress=False)[0].numpy()
    wanted = dict(zip(images.names, rows @ rows[0], strict=True))
    for image in found:
        assert image["similarity"] == pytest.approx(wanted[image["file"]], abs=1e-4)
    written = (run / "index.faiss").stat().st_mtime_ns
    call("search", *query)
    printed = capsys.readouterr()
    assert (run / "index.faiss").stat().st_mtime_ns == written
    last = checkpoints(run / "checkpoints")[-1].name
    assert f"was not completed: searching with the model of {last}" in printed.err
    assert f"pml-tacl train --resume --run '{run}' resumes it" in printed.err
    call("duplicates", run, "--quiet")
    call("report", run, "--points=30", "--queries=1", "--quiet")
    page = (run / "report.html").read_text("utf-8")
    assert f"The training was stopped: the page shows the state of {last}." in page
    printed = said(capsys, "train", "--resume", "--run", run, "--workers=0")
    assert f"resuming {run} after epoch 1 of 3 ({last})" in printed
    assert not (run / "stopped.json").exists()
    capsys.readouterr()
    call("search", *query)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_the_start_says_what_is_trained_and_a_log_file_gets_lines(photos, tmp_path, capsys):
    loud = [word for word in TINY if word != "--quiet"]
    run = tmp_path / "run"
    printed = said(capsys, "train", photos, *loud, "--epochs=2", "--warmup-epochs=1", "--run", run)
    lines = printed.splitlines()
    assert "training: 25 images, test_resnet at 32 px, on cpu" in lines
    steps = "2 epochs of 3 steps, batches of 8; 6 clusters, from epoch 2 on"
    assert steps in lines
    values = read_losses(run / "records" / "every_loss.csv")["total_loss"]
    for epoch in (1, 2):
        mean = np.mean(values[3 * (epoch - 1) : 3 * epoch])
        assert any(line.startswith(f"epoch {epoch}/2: loss {mean:.3f}, ") for line in lines)
    assert "\r" not in printed
    capsys.readouterr()
    call("train", "--resume", "--run", run, "--workers=0", "--json")
    printed, notes = capsys.readouterr()
    kept = json.loads((run / "metrics.json").read_text())
    assert json.loads(printed) == {
        "run": str(run),
        "images": 25,
        "dimensions": 8,
        "epochs": 2,
        "metrics": {"before": kept["before"], "after": kept["after"]},
        "verdict": None,
    }
    assert "the run has completed all 2 epochs: give more --epochs to continue" in notes


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_resuming_nothing_and_never_clustering_are_said(photos, tmp_path, capsys):
    loud = [word for word in TINY if word != "--quiet"]
    run = tmp_path / "run"
    call("train", photos, *loud, "--warmup-epochs=3", "--run", run, "--resume", "--tensorboard")
    printed = capsys.readouterr()
    assert f"{run} contains no checkpoint to resume: starting" in printed.out
    assert "\n1 epoch of 3 steps, batches of 8; " in printed.out
    assert "--epochs 1 is not above --warmup-epochs 3" in printed.err
    assert any((run / "tensorboard").iterdir())
    call("report", run, "--points=30", "--queries=1", "--quiet")
    page = (run / "report.html").read_text("utf-8")
    assert (
        "The training never clustered, because all epochs were warm-up; the clusters were computed"
        in page
    )
    assert "pseudo-labels of the last epoch" not in page


def test_a_run_of_three_lines_is_searched_at_its_own_size(photos, tmp_path, capsys):
    model = AttentionEmbedder("test_resnet", embedding_dim=8)
    model.from_scratch = False
    run = tmp_path / "run"
    trainer = UnsupervisedTrainer(model, dataset=photos, image_size=32, run=run, progress=False)
    trainer.train(num_epochs=1)
    found = said(capsys, "search", run, photos / "c" / "02.png", "-k1", "--json", "--workers=0")
    assert found["queries"][0]["found"] == [
        {"file": "c/02.png", "similarity": pytest.approx(1, abs=1e-4)}
    ]


@pytest.mark.slow
def test_images_that_are_left_out_stay_out(photos, tmp_path, capsys):
    run = tmp_path / "run"
    call("index", photos, *TIMM, "--run", run, "--exclude=c", "--exclude", "a/*3.png")
    index = ImageIndex.load(run)
    kept = [n for n in ImageFiles(photos, progress=False).names if n[0] != "c" and n != "a/03.png"]
    assert index.files == kept
    assert said(capsys, "search", run, "--update") == (
        f"0 images embedded, 0 removed, {len(kept)} in the index\n"
    )
    (tmp_path / "list.txt").write_text("a/00.png\n\nb/again.jpg\nc/../c/02.png\n")
    listed = tmp_path / "listed"
    call("index", photos, *TIMM, "--run", listed, "--files", tmp_path / "list.txt")
    assert ImageIndex.load(listed).files == ["a/00.png", "b/again.jpg", "c/02.png"]
    assert ImageIndex.load(listed).changes() == ([], [], [])


def test_galleries_do_not_replace_each_other(run, photos, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    query = [tmp_path / "run", photos / "a" / "00.png", "-k2", "--workers=0"]
    for name in ("search.png", "search-2.png", "search-3.png"):
        assert said(capsys, "search", *query).endswith(f"{tmp_path / 'run' / name}\n")
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_a_transformer_takes_any_size(photos, tmp_path):
    model = ["--model=vit_tiny_patch16_224", "--weights=none", "--image-size=64"]
    call("embed", photos, *model, "--out", tmp_path / "a.npy", "--workers=0", "--quiet")
    assert len(np.load(tmp_path / "a.npy")) == 25
    images = torch.rand(2, 3, 32, 32)
    for name in ("vit_tiny_patch16_224", "test_vit", "test_resnet"):
        assert sized_model(name, False, 32, embedding_dim=8)(images).shape[0] == 2


def test_a_transformer_is_built_once(monkeypatch):
    built = []
    monkeypatch.setattr(
        "pml_tacl.cli.building.AttentionEmbedder",
        lambda *args, **settings: built.append((args, settings)),
    )
    for name, size in (
        ("vit_tiny_patch16_224", 64),
        ("vit_tiny_patch16_224", 224),
        ("resnet50", 64),
    ):
        sized_model(name, False, size, embedding_dim=8)
    assert [settings.get("img_size") for _, settings in built] == [(64, 64), None, None]


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_a_test_changes_nothing_of_the_training(photos, tmp_path):
    runs = tmp_path / "plain", tmp_path / "tested"
    settings = [*TINY, "--epochs=2", "--warmup-epochs=1"]
    call("train", photos, *settings, "--run", runs[0], "--exclude=c")
    call("train", photos, *settings, "--run", runs[1], "--exclude=c", "--eval-folder", photos)
    assert "recall_at_1" in json.loads((runs[1] / "metrics.json").read_text())["after"]
    for name in ("records/every_loss.csv", "model/model.safetensors", "embeddings.npy"):
        one, other = ((run / name).read_bytes() for run in runs)
        assert one == other


@pytest.mark.slow
@pytest.mark.usefixtures("empty_figures")
def test_a_training_begins_from_what_a_run_has_learnt(photos, tmp_path):
    run = tmp_path / "run"
    model = AttentionEmbedder("test_resnet", embedding_dim=8)
    torch.save(model.trunk.model.state_dict(), tmp_path / "a.pth")
    given = [*TINY, "--weights", tmp_path / "a.pth", "--run", run]
    call("train", photos, *given)
    weights = run / "model" / "model.safetensors"
    begun = sized_model("test_resnet", str(weights)).trunk.model.state_dict()
    learnt = AttentionEmbedder.from_pretrained(run / "model").trunk.model.state_dict()
    assert begun.keys() == learnt.keys()
    assert all(torch.equal(begun[name], learnt[name]) for name in begun)
    shutil.copytree(photos, tmp_path / "grown")
    shutil.copy(photos / "a" / "00.png", tmp_path / "grown" / "new.png")
    with pytest.raises(
        SystemExit, match=f"pml-tacl search {run} --update .* --weights {weights} starts"
    ):
        call("train", tmp_path / "grown", *given, "--resume")
