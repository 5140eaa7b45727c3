"""The one conversion to RGB: every way into the package gives the pixels that the file gives."""

import functools
import io
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms

from pml_tacl import AttentionEmbedder, SiameseTransform
from pml_tacl.callbacks.loggers import as_image
from pml_tacl.datasets import ImageFiles, load_rgb
from pml_tacl.models.preprocessing import _Shortened, image_transform
from pml_tacl.utils.images import to_rgb
from pml_tacl.visualize._inputs import to_pixels

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
CONFIG = {
    "input_size": (3, 8, 8), "interpolation": "bicubic", "crop_mode": "center", "crop_pct": 0.9,
    "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4),
}  # fmt: skip
ORIENTATION = 0x0112
STORED = {  # what a camera writes so that the orientation undoes it
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def grey(image):
    """The (H, W) values of an image whose channels are alike."""
    values = np.asarray(to_rgb(image))
    assert (values == values[..., :1]).all()
    return values[..., 0].astype(int)


def of_file(image, path, **options):
    image.save(path, **options)
    return np.asarray(load_rgb(path))


def write_tiff(path, data, bits, photometric=1):
    """16 grey pixels in a row."""
    tags = [(256, 4, 16), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(start + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4)
    return path


WIDE = [  # what is white for a ramp of numbers up to a top
    ("uint16", 65535, 65535), ("uint16", 4095, 4095), ("uint16", 1023, 1023), ("uint16", 255, 255),
    ("uint16", 20000, 65535), ("uint16", 3, 3), ("int32", 65535, 65535), ("int32", 1000, 1023),
    ("int32", 255, 255), ("int32", 15, 15), ("int32", 1, 1), ("float32", 1, 1),
    ("float32", 255, 255), ("float32", 2, 3), ("float32", 60000, 65535),
]  # fmt: skip


class TestWideNumbers:
    @pytest.mark.parametrize(("dtype", "top", "white"), WIDE)
    def test_a_ramp_stays_a_ramp(self, tmp_path, dtype, top, white):
        values = (RAMP * top).astype(dtype)
        image = Image.fromarray(values)
        expected = np.minimum(values.astype(float) * 255 / white, 255)
        assert np.abs(grey(image) - expected).max() <= 1
        assert grey(image).max() >= 255 * top / white - 1
        from_file = of_file(image, tmp_path / "x.tif")
        assert np.array_equal(from_file, np.asarray(to_rgb(image)))
        if dtype == "uint16":
            assert np.array_equal(from_file, of_file(image, tmp_path / "x.png"))
        if dtype != "float32" or top == 1:
            for same in (values, torch.from_numpy(values), values[..., None].repeat(3, 2)):
                assert np.array_equal(from_file, np.asarray(to_rgb(same)))

    @pytest.mark.parametrize(
        ("dtype", "values", "expected"),
        [
            ("int32", [-500, 0, 500], [0, 128, 255]),
            ("int32", [0, 500_000, 1_000_000], [0, 128, 255]),
            ("float32", [-1.5, 0.5, 2.5], [0, 128, 255]),
            ("float32", [1e30, 2e30, 3e30], [0, 128, 255]),
        ],
    )
    def test_what_fits_no_white_is_stretched(self, dtype, values, expected):
        assert grey(Image.fromarray(np.array([values], dtype)))[0].tolist() == expected

    @pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
    @pytest.mark.parametrize("hot", [65535, -1])
    @pytest.mark.parametrize("side", [8, 64])
    def test_no_single_pixel_decides(self, dtype, hot, side):
        if dtype == "uint16" and hot < 0:
            pytest.skip("unsigned")
        values = (np.linspace(0, 1, side * side).reshape(side, side) * 1000).astype(dtype)
        without = grey(Image.fromarray(values))
        values[3, 4] = hot
        found = grey(Image.fromarray(values))
        assert found[3, 4] == (255 if hot > 0 else 0)
        found[3, 4] = without[3, 4]
        assert np.array_equal(found, without)

    @pytest.mark.parametrize("step", [256, 257])
    @pytest.mark.parametrize("top", [3, 40, 255])
    def test_widened_eight_bits_stay_what_they_were(self, tmp_path, step, top):
        narrow = (RAMP * top).astype(np.uint8)
        wide = narrow.astype(np.uint16) * step
        from_file = of_file(Image.fromarray(wide), tmp_path / "x.png")
        assert np.array_equal(from_file[..., 0], narrow)
        assert np.array_equal(from_file, np.asarray(to_rgb(Image.fromarray(narrow))))

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
    def test_every_byte_order(self, mode):
        values = (RAMP * 65535).astype(np.uint16)
        order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
        image = Image.frombytes(mode, (64, 64), values.astype(order).tobytes())
        assert np.array_equal(grey(image), values >> 8)

    @pytest.mark.parametrize("top", [4095, 300])
    def test_bits_per_sample_of_the_file_decide(self, tmp_path, top):
        values = np.linspace(0, top, 16).astype(int)
        packed = b"".join(struct.pack(">I", a << 12 | b)[1:] for a, b in values.reshape(-1, 2))
        path = write_tiff(tmp_path / "x.tif", packed, 12)
        assert np.asarray(load_rgb(path))[0, :, 0].tolist() == (values >> 4).tolist()
        with Image.open(path) as image:
            assert grey(image)[0].tolist() == (values >> 4).tolist()

    @pytest.mark.parametrize("bits", [8, 16])
    def test_a_file_whose_zero_is_white(self, tmp_path, bits):
        values = np.linspace(0, 2**bits - 1, 16).astype(f"<u{bits // 8}")
        path = write_tiff(tmp_path / "x.tif", values.tobytes(), bits, photometric=0)
        expected = np.arange(255, -1, -17)
        assert np.asarray(load_rgb(path))[0, :, 0].tolist() == expected.tolist()
        with Image.open(path) as image:
            assert grey(image)[0].tolist() == expected.tolist()

    def test_a_transparent_grey_of_16_bits_is_white(self, tmp_path):
        image = Image.fromarray((RAMP * 65535).astype(np.uint16))
        image.save(tmp_path / "x.png", transparency=0)
        found = np.asarray(load_rgb(tmp_path / "x.png"))
        assert (found[0, 0].tolist(), found[0, -1].tolist()) == ([255] * 3, [3] * 3)

    def test_views_of_other_dtypes(self):
        bits = RAMP > 0.5
        for same in (bits, torch.from_numpy(bits), Image.fromarray(bits)):
            assert np.array_equal(grey(same), bits * 255)
        levels = (RAMP * 255).astype(np.uint8)
        for same in (levels / 255, levels.astype(np.float16) / 255, levels.astype(np.int64)):
            assert np.array_equal(grey(same), levels)
        assert np.array_equal(grey(torch.from_numpy(levels / 255).float()), levels)
        assert np.abs(grey(torch.from_numpy(levels / 255).bfloat16()) - levels).max() <= 1
        assert np.array_equal(grey(torch.from_numpy(RAMP).requires_grad_()), np.rint(RAMP * 255))


class TestLayouts:
    RGBA = np.array([[[200, 30, 40, 255], [200, 30, 40, 0], [0, 0, 0, 51]]], np.uint8)

    def test_channels_are_found(self):
        rgb = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
        for same in (
            rgb, rgb.transpose(2, 0, 1), torch.from_numpy(rgb), torch.from_numpy(rgb).movedim(2, 0),
        ):  # fmt: skip
            assert np.array_equal(np.asarray(to_rgb(same)), rgb)
        assert np.asarray(to_rgb(rgb[:4, :, :1])).shape == (4, 6, 3)
        for height in (1, 3, 4):  # no channels
            for same in (rgb[:height, :, 0], torch.from_numpy(rgb[:height, :, 0])):
                assert np.array_equal(grey(same), rgb[:height, :, 0])
        assert np.asarray(to_rgb(rgb[:3, :4])).shape == (3, 4, 3)  # an array: (H, W, C)
        assert np.asarray(to_rgb(torch.from_numpy(rgb[:3, :4]))).shape == (4, 3, 3)  # (C, H, W)

    def test_what_is_transparent_is_white(self):
        expected = [[200, 30, 40], [255, 255, 255], [204, 204, 204]]
        image = Image.fromarray(self.RGBA)
        for same in (
            self.RGBA, torch.from_numpy(self.RGBA).movedim(2, 0), image, image.convert("RGBa"),
            self.RGBA / 255, self.RGBA.astype(np.uint16) * 257,
        ):  # fmt: skip
            assert np.abs(np.asarray(to_rgb(same))[0].astype(int) - expected).max() <= 1
        grey = Image.fromarray(self.RGBA[..., 2:], mode="LA")
        assert np.asarray(to_rgb(grey))[0, :, 0].tolist() == [40, 255, 204]
        premultiplied = Image.frombytes("La", (2, 1), bytes([40, 255, 0, 51]))
        assert np.asarray(to_rgb(premultiplied))[0, :, 0].tolist() == [40, 204]
        with_palette = Image.new("P", (1, 1))
        with_palette.putpalette([9, 9, 9, 0], "RGBA")
        assert to_rgb(with_palette).getpixel((0, 0)) == (255, 255, 255)

    def test_rgb_is_handed_on(self):
        image = Image.new("RGB", (3, 2), "red")
        assert to_rgb(image) is image

    @pytest.mark.parametrize(
        ("image", "error", "message"),
        [
            (
                "x.png",
                TypeError,
                "^image must be a PIL image, array or tensor, got str: open",
            ),
            ([[1, 2]], TypeError, "got list"),
            (np.zeros((4, 4), np.complex64), TypeError, "got complex64"),
            (np.zeros((4, 4), np.int8), TypeError, "got int8"),
            (np.zeros((4, 4), object), TypeError, "got object"),
            (torch.zeros(4, 4).to_sparse(), TypeError, "got torch.sparse_coo of torch.float32"),
            (torch.zeros(4, 4, device="meta"), TypeError, "on meta"),
            (np.zeros((2, 3, 4, 4), np.uint8), ValueError, r"got \(2, 3, 4, 4\): .* one by one"),
            (np.zeros((5, 6, 7), np.uint8), ValueError, r"got \(5, 6, 7\)"),
            (torch.zeros(0, 4), ValueError, r"got \(0, 4\)"),
            (Image.new("RGB", (0, 4)), ValueError, r"got an image of \(0, 4\) pixels"),
            (np.full((4, 4), 255.0), ValueError, "values from 255 to 255, .* divide by 255"),
            (torch.full((3, 4, 4), -2.0), ValueError, "undo the normalisation"),
            (torch.full((3, 4, 4), torch.nan), ValueError, "from nan to nan"),
            (Image.fromarray(np.float32([[0, np.inf]])), ValueError, "infinite in 1 of 2 pixels"),
        ],
    )  # fmt: skip
    def test_the_rest_is_refused_in_one_line(self, image, error, message):
        for way in (
            to_rgb, image_transform(CONFIG), image_transform(CONFIG, training=True),
            SiameseTransform(8, 2), to_pixels, as_image,
        ):  # fmt: skip
            with pytest.raises(error, match=message) as raised:
                way(image)
            assert "\n" not in str(raised.value)


class TestWaysIn:
    @pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
    @pytest.mark.parametrize("orientation", STORED)
    def test_orientation_is_applied_whoever_opens_the_file(self, tmp_path, suffix, orientation):
        cells = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
        upright = Image.fromarray(cells.repeat(8, 0).repeat(8, 1))
        turn = STORED[orientation]
        stored = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
        path = tmp_path / f"x.{suffix}"
        stored.save(path, exif=exif, **options.get(suffix, {}))
        loaded = load_rgb(path)
        assert np.abs(np.asarray(loaded, int) - np.asarray(upright, int)).max() <= 8
        assert np.array_equal(np.asarray(to_rgb(loaded)), np.asarray(loaded))  # not turned again
        plain, views = image_transform(CONFIG), SiameseTransform(8, 2, **STILL)
        with Image.open(path) as opened:
            assert torch.equal(plain(opened), plain(loaded))
            assert torch.equal(views(opened)[0], views(loaded)[0])
            assert np.array_equal(to_pixels(opened), loaded)
            assert np.array_equal(np.asarray(as_image(opened)), loaded)

    @pytest.mark.parametrize("mode", ["L", "I;16", "CMYK", "RGB"])
    @pytest.mark.parametrize("orientation", [6, 8])
    def test_an_uncompressed_tiff_is_turned_whole(self, tmp_path, mode, orientation):
        # Pillow maps some of them into memory with height and width confused.
        values = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
        image = Image.fromarray(values * np.uint16(257) if mode == "I;16" else values)
        image = image if mode == "I;16" else image.convert(mode)
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        image.save(tmp_path / "x.tif", exif=exif)
        expected = np.rot90(values, -1 if orientation == 6 else 1)
        assert np.array_equal(np.asarray(load_rgb(tmp_path / "x.tif"))[..., 0], expected)
        with Image.open(tmp_path / "x.tif") as opened:
            assert np.array_equal(np.asarray(to_rgb(opened))[..., 0], expected)
            assert opened.filename == str(tmp_path / "x.tif")

    def test_models_of_one_channel_get_the_grey(self):
        transform = image_transform(CONFIG | {"input_size": (1, 8, 8), "mean": (0,), "std": (1,)})
        image = Image.fromarray((RAMP * 65535).astype(np.uint16))
        found = transform(image)
        assert found.shape == (1, 8, 8)
        assert torch.equal(found, transform((RAMP * 255.99).astype(np.uint8)))

    @pytest.mark.parametrize(
        "image",
        [
            Image.new("RGBA", (12, 9), (51, 51, 51, 51)),
            torch.full((4, 9, 12), 51, dtype=torch.uint8),
            torch.full((4, 9, 12), 0.2),
        ],
    )
    def test_models_of_four_channels_take_four(self, image):
        model = AttentionEmbedder("test_resnet", in_chans=4)
        found = model.transform(image_size=8)(image)
        assert found.shape == (4, 8, 8)
        as_given = found * torch.tensor(model.data_config["std"])[:, None, None]
        as_given += torch.tensor(model.data_config["mean"])[:, None, None]
        torch.testing.assert_close(as_given, torch.full((4, 8, 8), 0.2), atol=0.004, rtol=0)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (Image.new("RGB", (9, 9)), "got a PIL image of mode RGB: for RGB, build it with in_ch"),
            (torch.zeros(3, 9, 9), r"got a torch.float32 tensor \(3, 9, 9\)"),
            (torch.full((4, 9, 9), 255.0), r"tensor \(4, 9, 9\) from 255 to 255"),
            (torch.zeros(4, 9, 9, dtype=torch.int32), r"got a torch.int32 tensor \(4, 9, 9\)"),
            (np.zeros((9, 9, 4), np.uint8), "got a ndarray"),
        ],
    )
    def test_models_of_four_channels_refuse_the_rest(self, image, message):
        transform = AttentionEmbedder("test_resnet", in_chans=4).transform(image_size=8)
        with pytest.raises(ValueError, match=f"image must be .* the model's 4 channels.*{message}"):
            transform(image)


class TestStrips:
    @pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 10001), (30000, 3)])
    def test_only_the_middle_is_enlarged(self, size):
        image = Image.new("RGB", size, "red")
        shown = _Shortened()(image)
        assert max(shown.size) in (10 * min(size), 10 * min(size) + 1)
        for training in (False, True):
            found = image_transform(CONFIG, training)(image)
            expected = torch.tensor([2.5, -0.4 / 0.3, -0.75])[:, None, None].expand(3, 8, 8)
            torch.testing.assert_close(found, expected)
        view, transformed, points = SiameseTransform(8, 2)(image)
        assert view.shape == transformed.shape == (3, 8, 8)
        assert points.shape == (4, 2)

    def test_the_middle_stays_the_middle(self):
        values = np.zeros((301, 3), np.uint8)
        values[149:152] = 255  # three rows of the middle
        found = image_transform(CONFIG | {"crop_pct": 1.0, "mean": (0,) * 3, "std": (1,) * 3})(
            values
        )
        torch.testing.assert_close(found, found.flip(1), atol=0.01, rtol=0)
        assert found[:, 3:5].min() > 0.9

    @pytest.mark.parametrize("size", [(40, 30), (300, 30), (30, 300), (1, 1), (7, 70)])
    def test_others_are_left_alone(self, size):
        image = Image.new("RGB", size)
        assert _Shortened()(image) is image


STILL = {"crop_scale": None, "photometric": None, "flip": False}
PLAIN, VIEWS = image_transform(CONFIG), SiameseTransform(8, 2, **STILL)
# What a file holds unchanged, by mode.
KINDS = {
    "1": "png", "L": "png", "LA": "png", "P": "png", "RGB": "png", "RGBA": "png", "I;16": "png",
    "CMYK": "tif", "I": "tif", "F": "tif", "LAB": "tif", "YCbCr": "tif", "I;16B": "tif",
}  # fmt: skip
SIDES = st.integers(1, 9)


def is_same(image, expected):
    """Whether a way in gives the views of the file; refused in one line is no other view."""
    for transform, view in zip((PLAIN, lambda x: VIEWS(x)[0]), expected, strict=True):
        try:
            found = transform(image)
        except (TypeError, ValueError) as refusal:
            if "\n" in str(refusal):
                raise
            return False
        assert torch.equal(found, view)
    return True


def of_folder(content, suffix, folder):
    """What the folder gives, through both transforms; None if it is left out."""
    (folder / f"x.{suffix}").write_bytes(content)
    images = ImageFiles(folder, check=False)
    try:
        (rgb, _), (plain, _) = images[0], images.with_transform(PLAIN)[0]
    except OSError:
        return None
    assert rgb.mode == "RGB"
    return plain, VIEWS(rgb)[0]


@st.composite
def pil_images(draw):
    """An image of any mode, options to save it, and whether its array says all there is."""
    mode = draw(st.sampled_from(sorted(KINDS)))
    size = height, width = draw(SIDES), draw(SIDES)
    whole = True
    if mode in ("I", "I;16", "I;16B", "F"):
        low = -(2**31) if mode == "I" else 0
        top = draw(st.sampled_from([1, 3, 255, 1000, 65535, 2**31 - 1]))
        top = min(top, 65535) if mode.startswith("I;") else top
        if mode == "F":
            top = float(np.float32(top))
            numbers = st.floats(-1, top, width=32) | st.sampled_from([0.0, 1.0])
            image = Image.fromarray(draw(hnp.arrays(np.float32, size, elements=numbers)))
        else:
            least = draw(st.sampled_from([0, max(low, -top)]))
            values = draw(hnp.arrays(np.int64, size, elements=st.integers(least, top)))
            kind = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]
            image = Image.frombytes(mode, (width, height), values.astype(kind).tobytes())
    else:
        base = Image.new(mode, (1, 1))
        bands = 1 if mode == "1" else len(base.getbands())
        cells = draw(hnp.arrays(np.uint8, (*size, bands)))
        if mode == "1":
            image = Image.fromarray(cells[..., 0] > 127)
        elif mode == "P":
            image = Image.fromarray(cells[..., 0]).convert("P")
            image.putpalette(draw(st.binary(min_size=768, max_size=768)))
        else:
            image = Image.frombytes(mode, (width, height), cells.tobytes())
    options = {}
    if mode in ("L", "P", "I;16") and draw(st.booleans()):
        options["transparency"], whole = draw(st.integers(0, 255)), False
    elif mode == "RGB" and draw(st.booleans()):
        options["transparency"], whole = tuple(draw(st.binary(min_size=3, max_size=3))), False
    orientation = draw(st.sampled_from([1, 1, *STORED]))
    if orientation != 1:
        options["exif"], whole = Image.Exif(), False
        options["exif"][ORIENTATION] = orientation
    return image, options, whole and mode not in ("P", "LA", "CMYK", "LAB", "YCbCr")


@pytest.fixture
def one_transform_from_lab(monkeypatch):
    """Let Pillow build its transform from LAB once, which takes longer than an example."""
    build = functools.cache(lambda *modes: original(*profiles, *modes))
    original, profiles = ImageCms.buildTransform, []

    def kept(first, second, *modes):
        profiles[:] = first, second
        return build(*modes)

    monkeypatch.setattr(ImageCms, "buildTransform", kept)


@pytest.mark.slow
@pytest.mark.usefixtures("one_transform_from_lab")
@settings(
    max_examples=2000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=pil_images())
def test_no_way_in_differs_for_pil_images(case, tmp_path_factory):
    image, options, whole = case
    suffix = KINDS[image.mode]
    content = io.BytesIO()
    image.save(content, format={"png": "PNG", "tif": "TIFF"}[suffix], **options)
    folder = FOLDERS.setdefault(suffix, None) or tmp_path_factory.mktemp(suffix)
    FOLDERS[suffix] = folder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = of_folder(content.getvalue(), suffix, folder)
    with Image.open(content) as opened:
        if expected is None:
            assert not is_same(opened, (None, None))
            return
        assert is_same(opened, expected)
        copy = opened.copy()
        assert is_same(copy, expected)
        array = np.array(opened)
    if not options:
        assert is_same(image, expected)
    if whole:
        given_up = array.dtype == np.float32 and not (-1e-3 <= array.min() <= array.max() <= 1.001)
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        tensor = tensor.movedim(2, 0) if tensor.ndim == 3 else tensor
        for same in (array, tensor, array[..., None] if array.ndim == 2 else array):
            assert is_same(same, expected) != given_up


FOLDERS: dict = {}


@st.composite
def arrays(draw):
    dtype = np.dtype(
        draw(st.sampled_from(["bool", "uint8", "uint16", "int32", "int64", "float32", "float64"]))
    )
    top = {"b": 1, "f": 1}.get(dtype.kind, draw(st.sampled_from([1, 3, 255, 1000, 65535])))
    top = min(top, 255) if dtype == np.uint8 else top
    shape = (draw(SIDES), draw(SIDES), *draw(st.sampled_from([(), (1,), (3,), (4,)])))
    numbers = (
        st.floats(0, 1, width=32) if dtype.kind == "f"
        else st.booleans() if dtype.kind == "b" else st.integers(0, top)
    )  # fmt: skip
    return draw(hnp.arrays(dtype, shape, elements=numbers))


@pytest.mark.slow
@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(values=arrays())
def test_no_way_in_differs_for_arrays_and_tensors(values, tmp_path_factory):
    folder = FOLDERS.setdefault("rgb", None) or tmp_path_factory.mktemp("rgb")
    FOLDERS["rgb"] = folder
    content = io.BytesIO()
    to_rgb(values).save(content, format="PNG")
    expected = of_folder(content.getvalue(), "png", folder)
    tensor = torch.from_numpy(values)
    assert is_same(values, expected)
    assert is_same(tensor.movedim(2, 0) if values.ndim == 3 else tensor, expected)
    if values.ndim == 2 and values.dtype in (np.uint8, np.uint16, np.int32, np.float32, bool):
        assert is_same(Image.fromarray(values), expected)
    if values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] > 1:
        assert is_same(Image.fromarray(values), expected)
