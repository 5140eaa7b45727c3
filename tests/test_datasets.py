"""Glyphs, ImageFiles and the ready-made forms of PML's benchmark data sets."""

import logging
import os
import pickle
import shutil
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning import datasets as pml_datasets
from torch.utils.data import DataLoader

from pml_tacl import datasets
from pml_tacl.datasets import (
    CUB,
    Cars196,
    Glyphs,
    ImageFiles,
    InShop,
    StanfordOnlineProducts,
    load_rgb,
)
from pml_tacl.datasets import characters as selection
from pml_tacl.datasets import glyphs as drawing
from pml_tacl.datasets import image_files as files_module
from pml_tacl.evaluation import evaluate
from tests.layouts import make_cars, make_cub, make_inshop, make_sop


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


class TestGlyphs:
    def test_halves_share_no_class_and_make_the_whole(self):
        train, test, whole = (Glyphs(split).classes for split in ("train", "test", "all"))
        assert not set(train) & set(test)
        assert sorted(train + test) == sorted(whole) == sorted(set(whole))
        assert 250 <= len(train) <= 310
        assert abs(len(train) - len(test)) <= 1

    def test_split_is_the_same_for_every_seed(self):
        assert Glyphs("test", seed=0).classes == Glyphs("test", seed=7).classes

    def test_one_image_for_each_face_by_default(self):
        data = Glyphs("test", num_classes=30)
        assert data.labels.dtype == np.int64
        assert set(data.labels) == set(range(30))
        faces = [len(selection.characters()[char]) for char in data.classes]
        assert np.bincount(data.labels).tolist() == faces
        assert min(faces) >= 8

    def test_items_are_rgb_images_with_integer_labels(self):
        data = Glyphs("train", num_classes=3, size=48)
        image, label = data[len(data) - 1]
        assert (image.mode, image.size, label, type(label)) == ("RGB", (48, 48), 2, int)
        assert np.array_equal(pixels(image), pixels(data[-1][0]))
        assert Glyphs("train", num_classes=1, transform=lambda image: image.size)[0][0] == (64, 64)
        with pytest.raises(IndexError):
            data[len(data)]

    def test_an_image_depends_on_seed_character_and_instance_alone(self):
        few = Glyphs("test", num_classes=4)
        many = Glyphs("all", images_per_class=5)
        for index in (37, 3, 20):
            char, instance = few.classes[few.labels[index]], int(index % 5)
            start = int(np.flatnonzero(few.labels == few.labels[index])[0])
            twin = many.classes.index(char) * 5 + instance
            assert np.array_equal(pixels(few[start + instance][0]), pixels(many[twin][0]))
        assert np.array_equal(few.images, Glyphs("test", num_classes=4).images)
        assert not np.array_equal(few.images, Glyphs("test", num_classes=4, seed=1).images)

    def test_more_images_than_faces_use_each_face_again_and_differ(self):
        data = Glyphs("test", num_classes=1, images_per_class=50)
        assert len(data) == 50
        assert len({image.tobytes() for image in data.images}) == 50

    def test_faces_come_in_an_order_of_their_own_and_evenly(self, monkeypatch):
        drawn = []
        place = drawing._place

        def place_and_note(rng, char, face, *arguments):
            drawn.append((char, face))
            return place(rng, char, face, *arguments)

        monkeypatch.setattr(drawing, "_place", place_and_note)
        Glyphs("test", num_classes=20, images_per_class=1).preload(progress=False)
        assert len({face for _, face in drawn}) > 5
        drawn.clear()
        data = Glyphs("test", num_classes=1)
        Glyphs("test", num_classes=1, images_per_class=2 * len(data)).preload(progress=False)
        faces = selection.characters()[data.classes[0]]
        assert Counter(drawn) == {(data.classes[0], face): 2 for face in faces}

    def test_a_shift_never_cuts_a_glyph(self):
        def extents(shift):
            boxes = Glyphs("test", num_classes=20, max_shift=shift).boxes
            return boxes[:, 2:] - boxes[:, :2]

        assert np.array_equal(extents(0), extents(32))

    def test_boxes_hold_the_ink_tightly(self):
        # Without clutter the ground is flat, so whatever differs from it is the glyph.
        for size, shift, angle in ((64, 4, 10), (64, 32, 180), (33, 16, 45)):
            data = Glyphs(
                "test", num_classes=8, size=size, clutter=0, max_shift=shift, max_angle=angle
            )
            assert data.boxes.shape == (len(data), 4)
            assert data.boxes.dtype == np.float32
            for image, box in zip(data.images.astype(int), data.boxes, strict=True):
                colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
                rows, columns = np.nonzero((image != colours[counts.argmax()]).any(-1))
                ink = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert (box[:2] <= ink[:2]).all()
                assert (box[2:] >= ink[2:]).all()
                assert np.abs(box - ink).max() <= 2
                assert box.min() >= 0
                assert box.max() <= size

    def test_shift_moves_the_box_no_further_than_asked(self):
        def centres(shift):
            boxes = Glyphs("test", num_classes=20, max_shift=shift).boxes
            return np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - 32)

        assert centres(0).max() <= 0.5
        assert 3.5 <= centres(4).max() <= 4.5

    def test_clutter_sets_the_contrast_of_the_ground(self):
        def unrest(clutter):
            data = Glyphs("test", num_classes=10, clutter=clutter)
            spread = []
            for image, (x0, y0, x1, y1) in zip(data.images, data.boxes.astype(int), strict=True):
                outside = np.ones(image.shape[:2], bool)
                outside[y0:y1, x0:x1] = False
                spread.append(image[outside].std(0).mean())
            return np.mean(spread)

        assert unrest(0) == 0
        assert 1 < unrest(0.1) < unrest(0.25) < unrest(1)

    def test_raw_pixels_leave_the_documented_head_room(self):
        data = Glyphs("test", num_classes=100)
        flat = data.images.reshape(len(data), -1).astype(np.float32)
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        similarity = flat @ flat.T
        np.fill_diagonal(similarity, -1)
        recall = (data.labels[similarity.argmax(1)] == data.labels).mean()
        assert 0.33 < recall < 0.43

    def test_preload_shows_progress_once(self, capfd):
        data = Glyphs("test", num_classes=2)
        data.preload()
        assert "rendering glyphs" in capfd.readouterr().err
        data.preload()
        assert capfd.readouterr().err == ""

    def test_survives_pickling_and_worker_processes(self):
        data = Glyphs("test", num_classes=2)
        assert len(pickle.dumps(data)) < 20_000
        expected = data.images.copy()
        assert np.array_equal(pickle.loads(pickle.dumps(data)).images, expected)
        fresh = Glyphs("test", num_classes=2, transform=np.array)
        loader = DataLoader(fresh, batch_size=7, num_workers=1)
        loaded = np.concatenate([images.numpy() for images, _ in loader])
        assert np.array_equal(loaded, expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"split": "val"}, "split must be one of train, test, all, got 'val'"),
            ({"size": 8}, "size must be an integer from 16 to 1024, got 8"),
            ({"size": 64.0}, "size must be an integer from 16 to 1024, got 64.0"),
            ({"seed": -1}, "seed must be an integer from 0 to"),
            ({"num_classes": 0}, "num_classes must be an integer from 1 to 280, got 0"),
            ({"num_classes": 9999}, "num_classes must be an integer from 1 to 280, got 9999"),
            ({"images_per_class": 0}, "images_per_class must be an integer from 1"),
            ({"images_per_class": True}, "images_per_class must be an integer from 1"),
            ({"clutter": 1.5}, "clutter must be from 0 to 1, got 1.5"),
            ({"clutter": float("nan")}, "clutter must be from 0 to 1, got nan"),
            ({"max_shift": 33}, "max_shift must be an integer from 0 to 32, got 33"),
            ({"max_angle": -1}, "max_angle must be from 0 to 180, got -1"),
        ],
    )
    def test_wrong_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Glyphs(**arguments)

    def test_without_matplotlib_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r'pip install "pml_tacl\[examples\]"'):
            selection.characters.__wrapped__()


class TestGlyphCharacters:
    def test_faces_are_text_faces_and_computer_modern_is_ascii_only(self):
        faces_of = selection.characters()
        faces = {face for found in faces_of.values() for face in found}
        assert {face for face in faces if not face.startswith(("DejaVu", "STIXGeneral"))} == {
            "cmb10.ttf", "cmr10.ttf", "cmss10.ttf", "cmti10.ttf", "cmtt10.ttf"
        }  # fmt: skip
        assert "cmr10.ttf" in faces_of["A"]
        beyond = [found for char, found in faces_of.items() if ord(char) > 127]
        assert not any(face.startswith("cm") for found in beyond for face in found)

    def test_look_alikes_are_gone(self):
        kept = set(selection.characters())
        assert "A" in kept
        for group in ("AΑА", "oOοо", "sSѕЅ", "xXхХ", "BΒВ", "HНΗ", "lI|ǀ", "1lǀ", "cCсϲ"):
            assert len(kept & set(group)) <= 1, group
        assert not kept & set("éñﬁʰ²\u2126\u212a")  # decomposable: the last two are ohm and kelvin

    def test_no_two_that_are_kept_look_alike_on_any_reference_face(self):
        for face in ("DejaVuSans.ttf", "STIXGeneral.ttf"):
            kept = [char for char, faces in selection.characters().items() if face in faces]
            shapes = np.stack([selection.shape(char, face) for char in kept])
            assert (np.triu(shapes @ shapes.T, 1) <= 0.9 + 1e-6).all()
            assert np.allclose(np.linalg.norm(shapes, axis=1), 1, atol=1e-5)


class TestGlyphsCache:
    def test_second_use_loads_instead_of_rendering(self, tmp_path, monkeypatch):
        folder = tmp_path / "deep" / "cache"
        expected = Glyphs("test", num_classes=2).images
        data = Glyphs("test", num_classes=2, cache_dir=folder)
        assert np.array_equal(pixels(data[3][0]), expected[3])
        assert [path.suffix for path in folder.iterdir()] == [".npz"]

        monkeypatch.setattr(drawing, "_paint", None)  # rendering would now fail
        again = Glyphs("test", num_classes=2, cache_dir=str(folder))
        assert np.array_equal(again.images, expected)
        assert np.array_equal(again.boxes, data.boxes)
        with pytest.raises(TypeError):
            Glyphs("test", num_classes=2, seed=1, cache_dir=folder).preload(progress=False)

    @pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b""])
    def test_damaged_file_is_rendered_again_and_replaced(self, tmp_path, damage):
        expected = Glyphs("test", num_classes=1).images
        Glyphs("test", num_classes=1, cache_dir=tmp_path).preload(progress=False)
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        assert np.array_equal(Glyphs("test", num_classes=1, cache_dir=tmp_path).images, expected)
        with np.load(file) as stored:
            assert np.array_equal(stored["images"], expected)

    def test_failed_write_leaves_nothing_behind(self, tmp_path, monkeypatch):
        def full(file, **arrays):
            file.write(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(drawing.np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            Glyphs("test", num_classes=1, cache_dir=tmp_path)[0]
        assert list(tmp_path.iterdir()) == []


RED, HALF = (200, 30, 40), 128


def flat(mode: str, colour) -> Image.Image:
    return Image.new(mode, (12, 8), colour)


def truncate(path: Path, share: float = 0.5) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8))


@pytest.fixture
def tree(tmp_path):
    """Two classes, the images of one of them in two formats, and things to skip."""
    for folder in ("b/deep", "a", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
    flat("RGB", RED).save(tmp_path / "b/deep/2.PNG")
    flat("RGB", RED).save(tmp_path / "b/deep/10.jpeg")
    flat("L", HALF).save(tmp_path / "a/z.webp")
    flat("L", HALF).save(tmp_path / ".hidden/seen.png")
    flat("L", HALF).save(tmp_path / "a/.thumb.png")
    (tmp_path / "a/notes.txt").write_text("no image")
    return tmp_path


class TestImageFiles:
    def test_scan_is_sorted_and_skips_hidden_and_foreign_files(self, tree):
        data = ImageFiles(tree, progress=False)
        names = [path.relative_to(tree).as_posix() for path in data.paths]
        assert names == ["a/z.webp", "b/deep/10.jpeg", "b/deep/2.PNG"]
        assert data.labels.tolist() == [-1, -1, -1]
        assert (data.classes, data.broken, len(data)) == ([], [], 3)
        image, label = data[2]
        assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (12, 8), RED, -1)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            *((f"x.{ending}", None) for ending in ("jpg", "JPEG", "png", "webp", "bmp", "gif")),
            *((f"x.{ending}", None) for ending in ("tif", "TIFF", "ppm", "tga", "jp2", "jpe")),
            *((f"x.{ending}", None) for ending in ("mpo", "qoi", "pcx", "ico", "dds", "pgm")),
            ("x.jfif", "JPEG"), ("x.jpg_large", "JPEG"), ("x", "PNG"), ("x.apng", "PNG"),
            ("x.bak", "TIFF"), ("x.txt", "WEBP"), ("x.pdf", "GIF"), ("x.jpg", "PNG"),
            ("x.HEIC", "JPEG"), ("x.jxl", "PNG"), ("x.dng", "JPEG"),
        ],
    )  # fmt: skip
    def test_whatever_pillow_opens_is_read(self, tmp_path, name, kind):
        Image.new("RGB", (16, 16), RED).save(tmp_path / name, format=kind)
        images = ImageFiles(tmp_path, progress=False)
        assert images.names == [name]
        assert (images.broken, images.skipped) == ([], [])
        assert np.abs(pixels(images[0][0]) - RED).max() <= 9
        assert ImageFiles(tmp_path, check=False).paths == images.paths

    def test_what_is_not_read_is_counted_and_named_once(self, tmp_path, caplog):
        flat("RGB", RED).save(tmp_path / "x.png")
        (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 64)
        flat("RGB", RED).save(tmp_path / "camera.NEF", format="TIFF")  # its preview
        for name in ("Thumbs.db", "notes.txt", "clip.mp4", "page.eps", "none"):
            (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
        (tmp_path / "empty").touch()
        images = ImageFiles(tmp_path, progress=False)
        assert images.names == ["x.png"]
        assert images.broken == [
            (tmp_path / "camera.NEF", ".nef files are not read: convert them to .png or .jpg"),
            (tmp_path / "phone.HEIC", ".heic files are not read: convert them to .png or .jpg"),
        ]
        assert [path.name for path in images.skipped] == [
            "Thumbs.db", "clip.mp4", "empty", "none", "notes.txt", "page.eps"
        ]  # fmt: skip
        left_out, skipped = (record.getMessage() for record in caplog.records)
        assert left_out.startswith("left out 2 of 3 files: ")
        assert skipped.startswith("skipped 6 files that are not images: ")
        assert all(str(path) in skipped for path in images.skipped)

    def test_no_other_program_is_started_for_a_file(self, tmp_path):
        (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        with pytest.raises(OSError, match=r"x\.jpg: not an image of a known format"):
            load_rgb(tmp_path / "x.jpg")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have names")
    def test_a_pipe_does_not_hang(self, tmp_path):
        flat("RGB", RED).save(tmp_path / "x.png")
        for name in ("pipe", "pipe.jpg"):
            os.mkfifo(tmp_path / name)
        (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe")
        assert ImageFiles(tmp_path, progress=False).names == ["x.png"]

    def test_names_are_places_below_the_root(self, tree):
        images = ImageFiles(tree, progress=False)
        assert images.names
        assert [images.root / name for name in images.names] == images.paths

    def test_another_transform_reads_the_same_images(self, tree, monkeypatch):
        images = ImageFiles(tree, labels="folder", transform=np.asarray, progress=False)
        monkeypatch.setattr(files_module, "_decode_all", None)  # nothing is checked again
        plain = images.with_transform(None)
        assert plain.paths == images.paths
        assert plain.classes == images.classes
        assert plain[0][1] == images[0][1]
        assert np.array_equal(np.asarray(plain[0][0]), images[0][0])
        assert isinstance(images[0][0], np.ndarray)
        assert not isinstance(plain[0][0], np.ndarray)

    def test_folder_labels(self, tree):
        (tree / "b/other/deeper").mkdir(parents=True)
        flat("L", HALF).save(tree / "b/other/deeper/3.png")
        flat("L", HALF).save(tree / "b/0.png")
        data = ImageFiles(str(tree), labels="folder", transform=np.array, progress=False)
        assert data.classes == ["a", "b"]
        assert data.labels.dtype == np.int64
        assert data.names == [
            "a/z.webp", "b/0.png", "b/deep/10.jpeg", "b/deep/2.PNG", "b/other/deeper/3.png"
        ]  # fmt: skip
        assert data.labels.tolist() == [0, 1, 1, 1, 1]
        assert data[1][0].shape == (8, 12, 3)
        assert data[1][1] == 1

    def test_an_image_beside_the_classes_is_named(self, tree, caplog):
        flat("L", HALF).save(tree / "top.png")
        data = ImageFiles(tree, labels="folder", progress=False)
        assert (data.classes, len(data)) == (["a", "b"], 3)
        assert data.broken == [(tree / "top.png", "in no sub-folder, so it has no class")]
        assert "left out 1 of 4 files" in caplog.text
        assert len(ImageFiles(tree, progress=False)) == 4  # without classes it is one of them
        with pytest.raises(ValueError, match="sort them into one sub-folder for"):
            ImageFiles(tree / "b/deep", labels="folder", progress=False)

    def test_a_linked_class_keeps_its_images(self, tree):
        (tree / "alias").symlink_to(tree / "b")
        (tree / "a/more").symlink_to(tree / "b/deep")
        (tree / "b/up").symlink_to(tree)
        data = ImageFiles(tree, labels="folder", progress=False)
        assert data.classes == ["a", "alias", "b"]
        assert np.bincount(data.labels).tolist() == [3, 2, 2]
        assert len(ImageFiles(tree, progress=False)) == 3  # without classes, each folder once

    def test_links_are_followed_without_going_round(self, tree, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        flat("L", HALF).save(elsewhere / "far.png")
        (tree / "c").symlink_to(elsewhere)
        (tree / "a/up").symlink_to(tree)
        (tree / "gone.jpg").symlink_to(tree / "nowhere.jpg")
        data = ImageFiles(tree, progress=False)
        assert [path.name for path in data.paths] == ["z.webp", "10.jpeg", "2.PNG", "far.png"]
        assert data.broken == [(tree / "gone.jpg", "No such file or directory")]

    def test_broken_files_are_named_once_and_left_out(self, tree, caplog, capfd):
        (tree / "b/empty.jpg").touch()
        (tree / "b/text.jpg").write_text("I am a text file")
        noise().save(tree / "b/cut.jpg")
        truncate(tree / "b/cut.jpg")
        with caplog.at_level(logging.WARNING):
            data = ImageFiles(tree, labels="folder")
        assert "checking images" in capfd.readouterr().err
        assert len(data) == 3
        assert data.classes == ["a", "b"]
        reasons = {path.name: reason for path, reason in data.broken}
        assert reasons["empty.jpg"] == "empty file"
        assert reasons["text.jpg"] == "not an image of a known format"
        assert "truncated" in reasons["cut.jpg"]
        message, skipped = (record.getMessage() for record in caplog.records)
        assert skipped == f"skipped 1 file that is not an image: {tree / 'a/notes.txt'}"
        assert message.startswith("left out 3 of 6 files: ")
        assert "\n" not in message
        assert all(str(path) in message for path, _ in data.broken)

    @pytest.mark.parametrize("suffix", ["png", "webp", "gif", "bmp", "tif"])
    def test_truncation_is_found_in_every_format(self, tmp_path, suffix):
        noise().save(tmp_path / f"cut.{suffix}")
        truncate(tmp_path / f"cut.{suffix}")
        noise().save(tmp_path / f"whole.{suffix}")
        data = ImageFiles(tmp_path, progress=False)
        assert [path.stem for path in data.paths] == ["whole"]
        (reason,) = (reason for _, reason in data.broken)
        assert reason
        assert "\n" not in reason

    def test_many_broken_files_are_counted_not_all_listed(self, tree, caplog):
        for number in range(14):
            (tree / f"{number:02}.png").touch()
        assert len(ImageFiles(tree, progress=False).broken) == 14
        assert "09.png" in caplog.text
        assert "10.png" not in caplog.text
        assert "; and 4 more" in caplog.text

    def test_strict_raises_with_the_names(self, tree):
        (tree / "empty.jpg").touch()
        with pytest.raises(ValueError, match=r"1 file is broken .*empty\.jpg \(empty file\)"):
            ImageFiles(tree, strict=True, progress=False)

    def test_without_a_image_names_the_folder(self, tmp_path):
        with pytest.raises(ValueError, match=f"no image in '{tmp_path}'"):
            ImageFiles(tmp_path)
        (tmp_path / "only.png").touch()
        with pytest.raises(ValueError, match=r"no readable image in .*only\.png \(empty file\)"):
            ImageFiles(tmp_path, progress=False)

    def test_the_bar_has_a_name_and_leaves_the_screen(self, tree, capsys):
        ImageFiles(tree)
        written = capsys.readouterr().err
        assert "checking images" in written
        assert not written.rstrip("\r").rpartition("\r")[2].strip()

    def test_wrong_arguments_are_named(self, tree):
        with pytest.raises(ValueError, match="is not a folder: give a folder of images"):
            ImageFiles(tree / "nowhere")
        with pytest.raises(ValueError, match="is not a folder: give a folder of images"):
            ImageFiles(tree / "b/deep/2.PNG")
        with pytest.raises(ValueError, match="labels must be one of none, folder, got 'csv'"):
            ImageFiles(tree, labels="csv")
        with pytest.raises(ValueError, match="strict=True needs check=True"):
            ImageFiles(tree, strict=True, check=False)

    def test_a_file_lost_after_the_scan_is_named(self, tree):
        data = ImageFiles(tree, progress=False)
        data.paths[0].unlink()
        with pytest.raises(OSError, match=r"cannot read .*z\.webp: No such file or directory"):
            data[0]
        truncate(data.paths[2], 0.6)
        with pytest.raises(OSError, match=r"cannot read .*2\.PNG: "):
            data[2]

    def test_without_check_nothing_is_decoded(self, tree, monkeypatch):
        (tree / "empty.jpg").touch()
        monkeypatch.setattr(files_module, "load_rgb", None)
        data = ImageFiles(tree, check=False)
        assert len(data) == 4
        assert data.broken == []

    def test_unreadable_subfolder_is_reported(self, tree, monkeypatch):
        walk = files_module.os.walk

        def walk_with_a_closed_door(top, onerror, **kwargs):
            onerror(PermissionError(13, "Permission denied", str(tree / "locked")))
            return walk(top, onerror=onerror, **kwargs)

        monkeypatch.setattr(files_module.os, "walk", walk_with_a_closed_door)
        data = ImageFiles(tree, progress=False)
        assert data.broken == [(tree / "locked", "Permission denied")]

    def test_decompression_bomb_is_a_broken_file_not_a_crash(self, tree):
        def chunk(kind: bytes, body: bytes) -> bytes:
            crc = struct.pack(">I", zlib.crc32(kind + body))
            return struct.pack(">I", len(body)) + kind + body + crc

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
        (tree / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
        data = ImageFiles(tree, progress=False)
        ((path, reason),) = data.broken
        assert path.name == "bomb.png"
        assert "3600000000 pixels" in reason
        with pytest.raises(OSError, match=r"bomb\.png: Image size"):
            load_rgb(tree / "bomb.png")

    def test_survives_pickling_and_worker_processes(self, tree):
        data = ImageFiles(tree, labels="folder", transform=np.array, progress=False)
        copy = pickle.loads(pickle.dumps(data))
        assert copy.paths == data.paths
        ((images, labels),) = DataLoader(copy, batch_size=3, num_workers=1)
        assert images.shape == (3, 8, 12, 3)
        assert labels.tolist() == [0, 1, 1]


class TestLoadRgb:
    @pytest.mark.parametrize(
        ("mode", "colour", "suffix", "expected"),
        [
            ("1", 1, "png", (255, 255, 255)),
            ("L", 90, "png", (90, 90, 90)),
            ("RGB", RED, "png", RED),
            ("RGBA", (*RED, 255), "png", RED),
            ("RGBA", (*RED, 0), "png", (255, 255, 255)),
            ("RGBA", (0, 0, 0, 51), "webp", (204, 204, 204)),
            ("LA", (0, 51), "png", (204, 204, 204)),
            ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
            ("CMYK", (0, 255, 255, 0), "jpg", (254, 0, 0)),
            ("I;16", 90 * 257, "png", (90, 90, 90)),
            ("I;16", 90 * 256, "tif", (90, 90, 90)),
            ("I", 90 * 256 + 255, "tif", (90, 90, 90)),
            ("YCbCr", (HALF, HALF, HALF), "jpg", (HALF, HALF, HALF)),
        ],
    )
    def test_every_mode_becomes_rgb(self, tmp_path, mode, colour, suffix, expected):
        path = tmp_path / f"x.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        flat(mode, colour).save(path, **options)
        image = load_rgb(path)
        assert (image.mode, image.size) == ("RGB", (12, 8))
        assert np.abs(pixels(image) - expected).max() <= 1

    def test_palette_with_transparency_becomes_white(self, tmp_path):
        image = Image.new("P", (4, 2), 0)
        image.putpalette([*RED, 10, 20, 30])
        image.putpixel((3, 1), 1)
        image.save(tmp_path / "p.png", transparency=1)
        image.save(tmp_path / "opaque.gif")
        loaded = load_rgb(tmp_path / "p.png")
        assert (loaded.getpixel((0, 0)), loaded.getpixel((3, 1))) == (RED, (255, 255, 255))
        assert load_rgb(tmp_path / "opaque.gif").getpixel((3, 1)) == (10, 20, 30)

    def test_grey_and_rgb_with_a_transparent_colour(self, tmp_path):
        flat("L", 7).save(tmp_path / "l.png", transparency=7)
        flat("RGB", RED).save(tmp_path / "rgb.png", transparency=RED)
        assert load_rgb(tmp_path / "l.png").getpixel((0, 0)) == (255, 255, 255)
        assert load_rgb(tmp_path / "rgb.png").getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (np.array([[-1.5, 0.5, 0.0, 2.5]], np.float32), [0, 128, 96, 255]),
            (np.array([[0, 500_000, 1_000_000, 0]], np.int32), [0, 128, 255, 0]),
            (np.array([[-3.0, -3.0, -3.0, -3.0]], np.float32), [0, 0, 0, 0]),
        ],
    )
    def test_wide_values_are_stretched(self, tmp_path, values, expected):
        Image.fromarray(values).save(tmp_path / "wide.tif")
        assert pixels(load_rgb(tmp_path / "wide.tif"))[0, :, 0].tolist() == expected

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_pixels_that_are_no_numbers_make_a_broken_file(self, tmp_path, bad):
        flat("RGB", RED).save(tmp_path / "sound.png")
        Image.fromarray(np.array([[1.0, bad, 2.0]], np.float32)).save(tmp_path / "bad.tif")
        found = ImageFiles(tmp_path, progress=False)
        assert [path.name for path in found.paths] == ["sound.png"]
        assert found.broken == [(tmp_path / "bad.tif", "image is NaN or infinite in 1 of 3 pixels")]

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_honoured(self, tmp_path, orientation):
        upright = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
        stored = {  # what a camera writes so that the orientation undoes it
            1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
            5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
        }[orientation]  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "x.png"
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
        assert np.array_equal(np.asarray(load_rgb(path)), upright)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.parametrize("damage", [b"MM\0*\0\0\0\x08\xff\xff\0", b"no TIFF header"])
    def test_damaged_exif_loses_no_image(self, tmp_path, damage):
        flat("RGB", RED).save(tmp_path / "x.png", exif=b"Exif\0\0" + damage)
        assert load_rgb(tmp_path / "x.png").getpixel((0, 0)) == RED

    def test_first_frame_of_an_animation(self, tmp_path):
        frames = [flat("RGB", RED), flat("RGB", (0, 0, 255))]
        frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
        assert load_rgb(tmp_path / "x.webp").getpixel((0, 0)) == RED

    def test_image_outlives_its_file(self, tmp_path):
        flat("RGB", RED).save(tmp_path / "x.bmp")
        image = load_rgb(str(tmp_path / "x.bmp"))
        (tmp_path / "x.bmp").unlink()
        assert pickle.loads(pickle.dumps(image)).getpixel((11, 7)) == RED

    def test_a_folder_is_no_image(self, tmp_path):
        with pytest.raises(OSError, match=f"cannot read {tmp_path}: "):
            load_rgb(tmp_path)


INSHOP = [(7, "train"), (2, "query"), (7, "train"), (9, "gallery"), (2, "gallery"), (4, "train")]


class TestBenchmarks:
    def check(self, ours, theirs, expected_ids):
        """Images and paths as PML's; labels are ranks of PML's ids within the split."""
        assert ours.paths == theirs.paths
        assert ours.class_ids.tolist() == sorted(set(expected_ids))
        assert ours.class_ids[ours.labels].tolist() == theirs.labels == expected_ids
        assert ours.labels.dtype == np.int64
        assert set(ours.labels.tolist()) == set(range(len(set(expected_ids))))
        assert len(ours) == len(expected_ids)
        for index, class_id in enumerate(expected_ids):
            image, label = ours[index]
            assert image.mode == "RGB"
            assert np.abs(pixels(image) - class_id % 256).max() <= 2
            assert (label, type(label)) == (ours.labels[index], int)

    @pytest.mark.parametrize(
        ("split", "ids"), [("train", [3, 100, 3]), ("test", [101, 200]), ("train+test", None)]
    )
    def test_cub(self, tmp_path, split, ids):
        make_cub(tmp_path, [101, 3, 100, 200, 3])
        ids = ids or [101, 3, 100, 200, 3]
        self.check(CUB(tmp_path, split), pml_datasets.CUB(tmp_path, split), ids)

    @pytest.mark.parametrize(
        ("split", "ids"), [("train", [98, 7]), ("test", [99, 196]), ("train+test", None)]
    )
    def test_cars(self, tmp_path, split, ids):
        make_cars(tmp_path, [98, 99, 7, 196])
        ids = 2 * (ids or [98, 99, 7, 196])  # PML joins both annotation files, as its classes ask
        self.check(Cars196(tmp_path, split), pml_datasets.Cars196(tmp_path, split), ids)

    @pytest.mark.parametrize(
        ("split", "ids"), [("train", [5, 1, 5]), ("test", [11319, 11320]), ("train+test", None)]
    )
    def test_sop(self, tmp_path, split, ids):
        make_sop(tmp_path, {"train": [5, 1, 5], "test": [11319, 11320]})
        ids = ids or [5, 1, 5, 11319, 11320]
        theirs = pml_datasets.StanfordOnlineProducts(tmp_path, split)
        self.check(StanfordOnlineProducts(tmp_path, split), theirs, ids)

    @pytest.mark.parametrize("images", ["Img", "."])
    @pytest.mark.parametrize(
        ("split", "ids", "class_ids"),
        [
            ("train", [7, 7, 4], [4, 7]),
            ("query", [2], [2, 9]),
            ("gallery", [9, 2], [2, 9]),
            ("test", [2, 9, 2], [2, 9]),
            ("train+test", [7, 2, 7, 9, 2, 4], [2, 4, 7, 9]),
        ],
    )
    def test_inshop(self, tmp_path, split, ids, class_ids, images):
        make_inshop(tmp_path, INSHOP, images)
        data = InShop(tmp_path, split)
        assert data.class_ids.tolist() == class_ids
        assert data.class_ids[data.labels].tolist() == ids
        assert data.labels.dtype == np.int64
        assert len(data) == len(ids)
        for index, item in enumerate(ids):
            image, label = data[index]
            assert image.mode == "RGB"
            assert np.abs(pixels(image) - item).max() <= 2
            assert label == class_ids.index(item)

    def test_inshop_queries_find_their_item_in_the_gallery(self, tmp_path):
        make_inshop(tmp_path, [(5, "query"), (200, "query"), (200, "gallery"), (5, "gallery")])

        def bright(image):  # an embedding by which each image is next to those of its item
            angle = torch.tensor(float(np.mean(image)) / 255)
            return torch.stack([angle.cos(), angle.sin()])

        query, gallery = (InShop(tmp_path, part, transform=bright) for part in ("query", "gallery"))
        found = evaluate(torch.nn.Identity(), query, reference=gallery, metrics=["recall_at_1"])
        assert found == {"recall_at_1": 1.0}

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text.replace("6\n", "52712\n", 1),
            lambda text: text.replace("query", "val"),
            lambda text: text.replace("id_00000007  ", "seven  "),
            lambda text: text[: len(text) // 2],
            lambda text: "",
        ],
    )
    def test_inshop_names_a_damaged_list(self, tmp_path, damage):
        make_inshop(tmp_path, INSHOP)
        path = tmp_path / "Eval" / "list_eval_partition.txt"
        path.write_text(damage(path.read_text()))
        message = r"list_eval_partition\.txt is damaged: it must contain"
        with pytest.raises(ValueError, match=message):
            InShop(tmp_path, "train")

    def test_transforms_and_pickling(self, tmp_path):
        make_cub(tmp_path, [101, 150])
        data = CUB(tmp_path, "test", transform=np.array, target_transform=str)
        image, label = pickle.loads(pickle.dumps(data))[1]
        assert (image.shape, label) == ((8, 12, 3), "1")

    def test_a_damaged_image_is_named(self, tmp_path):
        make_cub(tmp_path, [101])
        data = CUB(tmp_path, "test")
        Path(data.paths[0]).write_bytes(b"")
        with pytest.raises(OSError, match=r"cannot read .*1\.jpg: empty file"):
            data[0]

    @pytest.mark.parametrize(
        ("benchmark", "missing", "source"),
        [
            (CUB, "CUB_200_2011/images.txt", "data.caltech.edu"),
            (Cars196, "names.csv", "kaggle.com"),
            (StanfordOnlineProducts, "Stanford_Online_Products/Ebay_train.txt", "google.com"),
            (InShop, "Eval/list_eval_partition.txt", "mmlab.ie.cuhk.edu.hk"),
        ],
    )
    @pytest.mark.parametrize("folder", ["", "nowhere"])
    def test_a_wrong_root_says_what_is_missing_and_where_to_get_it(
        self, tmp_path, benchmark, missing, source, folder
    ):
        with pytest.raises(FileNotFoundError) as error:
            benchmark(tmp_path / folder)
        text = str(error.value)
        assert text.startswith(f"root={str(tmp_path / folder)!r} contains no {missing}: ")
        assert f"{source}/" in text
        assert ("download=True" in text) == (benchmark is not InShop)
        assert "\n" not in text

    def test_images_left_out_of_a_layout_are_missed_at_once(self, tmp_path):
        make_cub(tmp_path, [101])
        shutil.rmtree(tmp_path / "CUB_200_2011" / "images")
        with pytest.raises(FileNotFoundError, match=r"contains no CUB_200_2011/images/101\.Bird/1"):
            CUB(tmp_path, "test")

    def test_a_split_without_images(self, tmp_path):
        make_cub(tmp_path, [101])
        with pytest.raises(ValueError, match=r"^root='.* no image of split='train': .* again from"):
            CUB(tmp_path, "train")

    @pytest.mark.parametrize("benchmark", [CUB, InShop])
    def test_unknown_split(self, tmp_path, benchmark):
        with pytest.raises(ValueError, match=r"split must be one of train, test, .*, got 'val'"):
            benchmark(tmp_path, split="val")

    def test_download_fills_an_empty_folder_and_no_other(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            pml_datasets.CUB, "download_and_remove", lambda data: make_cub(Path(data.root), [101])
        )
        for _ in range(2):  # the second time it is there already
            assert len(CUB(tmp_path / "new", "test", download=True)) == 1
        other = tmp_path / "other"
        other.mkdir()
        (other / "file").touch()
        with pytest.raises(FileNotFoundError, match="into an empty folder"):
            CUB(other, download=True)

    def test_inshop_is_not_downloaded(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"contains no Eval/list_eval_partition\.txt"):
            InShop(tmp_path / "new", download=True)
        assert not (tmp_path / "new").exists()
        make_inshop(tmp_path, INSHOP)
        assert len(InShop(tmp_path, "train", download=True)) == 3


def test_names_of_the_package():
    assert {name for name in datasets.__all__ if hasattr(datasets, name)} == set(datasets.__all__)
    assert Counter(datasets.__all__).most_common(1)[0][1] == 1
    with pytest.raises(AttributeError, match="has no attribute 'MNIST'"):
        _ = datasets.MNIST


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("thumbs", ["a.png", "b/c.png", "b/d_small.png"]),
        ("b/thumbs", ["a.png", "b/c.png", "b/d_small.png", "thumbs/e.png"]),
        ("*_small.png", ["a.png", "b/c.png", "b/thumbs/e.png", "thumbs/e.png"]),
        ("b/*.png", ["a.png", "thumbs/e.png"]),
        ("b/", ["a.png", "thumbs/e.png"]),
        ("/b", ["a.png", "thumbs/e.png"]),
        ("e.*", ["a.png", "b/c.png", "b/d_small.png"]),
    ],
)
def test_patterns_leave_files_and_folders_out(tmp_path, pattern, left):
    names = ["a.png", "b/c.png", "b/d_small.png", "b/thumbs/e.png", "thumbs/e.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert ImageFiles(tmp_path, progress=False).names == names
    assert ImageFiles(tmp_path, exclude=[pattern], progress=False).names == left


def test_a_list_of_files_is_taken_alone(tmp_path, caplog):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text(f"c.png\n\n{tmp_path / 'a.png'}\n", encoding="utf-8-sig")
    listed = tmp_path / "list.txt"
    assert ImageFiles(tmp_path, files=listed, progress=False).names == ["a.png", "c.png"]
    assert ImageFiles(tmp_path, files=["./b.png"], progress=False).names == ["b.png"]
    caplog.clear()
    assert ImageFiles(tmp_path, files=["b.png", "no.png"], progress=False).names == ["b.png"]
    assert "no.png" in caplog.text
    assert "list.txt" not in caplog.text  # which was not asked for
    for wrong in (["no.png"], ["../a.png"], ["/etc/a.png"], [], tmp_path / "none.txt"):
        with pytest.raises(ValueError, match=r"^files"):
            ImageFiles(tmp_path, files=wrong, progress=False)
    with pytest.raises(ValueError, match=r"^exclude"):
        ImageFiles(tmp_path, exclude=["*"], progress=False)
