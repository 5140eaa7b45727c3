"""A folder to test on: what it holds is said, and what cannot measure is refused."""

import re

import pytest
from PIL import Image

from pml_tacl.cli.eval_folder import can_measure, images_to_test_on
from pml_tacl.datasets import ImageFiles


def write(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / name)
    return root


def test_classes_and_images_are_counted(tmp_path, capsys):
    nested = ("cat/in/1.png", "cat/out/2.png", "dog/1.png", "dog/2.png", "dog/3.png")
    images = images_to_test_on(write(tmp_path, *nested), None, lambda image: image.size)
    assert (images.classes, images.labels.tolist()) == (["cat", "dog"], [0, 0, 1, 1, 1])
    assert images[0] == ((4, 4), 0)
    assert capsys.readouterr().out == "testing on 5 images of 2 classes\n"


def test_what_weakens_the_test_is_said(tmp_path, capsys):
    write(tmp_path, "a/1.png", "a/2.png", "b/1.png", "train/1.png", "train/2.png")
    images_to_test_on(tmp_path, ImageFiles(tmp_path / "train", progress=False))
    assert capsys.readouterr().out == (
        "testing on 5 images of 3 classes; classes with only one image, which has no match: 1; "
        "images that are also training images: 2\n"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png", "2.png"], "are not in a sub-folder"),
        (["a/1.png", "a/2.png"], "contains one class, 'a': every neighbour would be right"),
        (["a/b/1.png", "a/c/2.png"], "contains one class, 'a': every neighbour would be right"),
        (["a/1.png", "b/1.png"], "contains 2 classes of one image each"),
    ],
)
def test_what_cannot_measure_is_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        images_to_test_on(write(tmp_path, *names))


@pytest.mark.parametrize("test", [".", "sub", "link"])
def test_what_is_trained_on_is_no_test(tmp_path, test):
    names = [f"{prefix}{name}/{n}.png" for prefix in ("", "sub/") for name in "ab" for n in "12"]
    root = write(tmp_path / "photos", *names)
    (tmp_path / "link").symlink_to(root)
    folder = tmp_path / "link" if test == "link" else root / test
    trained_on = ImageFiles(root, progress=False)
    message = f"contains only training images of {re.escape(repr(str(root)))}"
    with pytest.raises(ValueError, match=message):
        images_to_test_on(folder, trained_on)


def test_a_training_is_told_of_lone_classes_and_goes_on(tmp_path, caplog):
    write(tmp_path, "a/1.png", "b/1.png", "c/1.png")
    images = images_to_test_on(tmp_path, needed=False)
    assert images.labels.tolist() == [0, 1, 2]
    assert not can_measure(images)
    assert "contains 3 classes of one image each" in caplog.text
    caplog.clear()
    assert can_measure(images_to_test_on(write(tmp_path, "a/2.png"), needed=False))
    assert not caplog.records
