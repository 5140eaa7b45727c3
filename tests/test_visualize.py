import builtins
import io
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import cbook
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from pml_tacl import visualize
from pml_tacl.visualize import (
    RIGHT_COLOUR,
    WRONG_COLOUR,
    attention_overlay,
    cross_attention_pair,
    recall_curve,
    retrieval_gallery,
    save_figure,
    similar_regions,
    training_curves,
)
from pml_tacl.visualize._curves import smoothed, spread_apart
from pml_tacl.visualize._inputs import shortened, to_images, to_pixels


def rendered(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float)


def pixels_of(axes, figure_pixels):
    height = len(figure_pixels)
    box = axes.get_window_extent().extents.round().astype(int)
    return figure_pixels[height - box[3] : height - box[1], box[0] : box[2]]


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def grid_points(h, w):
    y, x = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in (h, w)), indexing="ij")
    return np.stack([x, y], -1).reshape(-1, 2)


def patches(axes):
    return [p for p in axes.patches if p.get_hatch()]


@pytest.fixture(autouse=True)
def leaves_no_trace():
    """Every figure here is drawn with warnings as errors and must leave matplotlib as it was."""
    before = dict(matplotlib.rcParams)
    pyplot_was_loaded = "matplotlib.pyplot" in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What an older matplotlib asks of a newer pyparsing is between the two.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib")
        yield
    assert dict(matplotlib.rcParams) == before
    if pyplot_was_loaded:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
    else:
        assert "matplotlib.pyplot" not in sys.modules


# Images in


def test_every_form_of_one_image_gives_the_same_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    floats = pixels / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)  # not contiguous
    forms = [
        pixels,
        floats,
        floats.astype(np.float32),
        tensor,
        tensor.requires_grad_(),
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(floats),
        Image.fromarray(pixels),
        pixels[::-1][::-1],
    ]
    for form in forms:
        np.testing.assert_array_equal(to_pixels(form), pixels)
    np.testing.assert_array_equal(to_images(floats[None])[0], pixels)
    np.testing.assert_array_equal(to_images(tensor[None])[0], pixels)
    np.testing.assert_array_equal(to_images(forms)[3], pixels)
    np.testing.assert_allclose(to_pixels(tensor.half()), pixels, atol=1)
    np.testing.assert_allclose(to_pixels(tensor.bfloat16()), pixels, atol=2)


def test_a_image_that_fits_both_layouts_is_read_by_its_type():
    ambiguous = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(ambiguous), ambiguous)
    np.testing.assert_array_equal(
        to_pixels(torch.from_numpy(ambiguous)), ambiguous.transpose(1, 2, 0)
    )


def test_grayscale_and_transparent_images():
    gray = np.random.default_rng(2).integers(0, 256, (6, 9), dtype=np.uint8)
    expected = np.repeat(gray[..., None], 3, axis=2)
    for form in (gray, gray[None], gray[..., None], Image.fromarray(gray), torch.from_numpy(gray)):
        np.testing.assert_array_equal(to_pixels(form), expected)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (to_pixels(clear) == 255).all()
    assert to_pixels(Image.new("CMYK", (4, 4))).shape == (4, 4, 3)
    deep = Image.fromarray(gray.astype(np.uint16) << 8)
    np.testing.assert_array_equal(to_pixels(deep), expected)


def test_a_large_photograph_is_made_small_and_the_callers_stays():
    large = Image.new("RGB", (3000, 1500))
    assert to_pixels(large).shape == (320, 640, 3)
    assert large.size == (3000, 1500)
    assert to_pixels(Image.new("P", (3000, 1))).shape == (1, 640, 3)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.full((4, 4, 3), 2.0), ValueError, "from 2 to 2.*undo the normalisation"),
        (np.full((4, 4, 3), -0.5), ValueError, "from -0.5 to -0.5"),
        (np.full((4, 4, 3), np.nan), ValueError, "nan"),
        (np.zeros((4, 4, 3), dtype=np.complex64), TypeError, "complex64"),
        (np.zeros((5, 6, 7)), ValueError, r"\(5, 6, 7\)"),
        (np.zeros((0, 4, 3)), ValueError, r"\(0, 4, 3\)"),
        (["a.png"], TypeError, "str"),
    ],
)
def test_what_is_not_a_image_is_refused(bad, error, message):
    with pytest.raises(error, match=f"^images .*{message}"):
        attention_overlay(bad, np.zeros((2, 2)))


# Attention


@pytest.mark.parametrize("cell", [(0, 0), (1, 3), (3, 2)])
def test_the_overlay_is_brightest_at_the_hot_cell(cell):
    attention = torch.zeros(1, 4, 4)
    attention[0][cell] = 1
    figure = attention_overlay(torch.full((1, 3, 64, 64), 0.5), attention)
    image, heat, overlay = figure.axes
    whole = rendered(figure)
    for axes in (heat, overlay):
        shown = pixels_of(axes, whole).mean(axis=2)
        y, x = np.argwhere(shown == shown.max()).mean(axis=0)
        assert (int(4 * y / shown.shape[0]), int(4 * x / shown.shape[1])) == cell
    assert np.ptp(pixels_of(image, whole)[5:-5, 5:-5]) == 0


@pytest.mark.parametrize("offset", [(0.0, 0.0), (-0.5, 0.0), (0.25, -0.5)])
def test_the_overlay_is_where_the_cells_look(offset):
    attention = torch.zeros(1, 4, 4)
    attention[0, 1, 2] = 1
    figure = attention_overlay(torch.full((1, 3, 64, 64), 0.5), attention, cell_offset=offset)
    _, heat, overlay = figure.axes
    image = rendered(figure)
    shown = pixels_of(overlay, image).mean(axis=2)
    y, x = np.argwhere(shown == shown.max()).mean(axis=0) / shown.shape
    expected = np.array([2.5 + offset[0], 1.5 + offset[1]]) / 4
    np.testing.assert_allclose([x, y], expected, atol=0.02)
    assert heat.images[0].get_array().argmax() == 6  # cells themselves are where they were


def test_maps_are_stretched_each_on_its_own_and_even_ones_stay_even():
    ramp = np.arange(4.0).reshape(2, 2)
    even = np.full((2, 2), 0.25) + 1e-9 * ramp
    figure = attention_overlay(np.full((3, 8, 8, 3), 0.5), np.stack([ramp, 100 * ramp + 7, even]))
    shown = [figure.axes[3 * i + 1].images[0].get_array() for i in range(3)]
    np.testing.assert_allclose(shown[0], ramp / 3)
    np.testing.assert_allclose(shown[1], ramp / 3)
    np.testing.assert_allclose(shown[2], 0.5)


def test_a_map_is_as_wide_and_high_as_its_image():
    figure = attention_overlay(
        np.full((1, 20, 40, 3), 0.5), np.random.default_rng(0).random((3, 3))
    )
    rendered(figure)
    boxes = [axes.get_window_extent() for axes in figure.axes]
    np.testing.assert_allclose([box.width for box in boxes], boxes[0].width)
    np.testing.assert_allclose([box.height for box in boxes], boxes[0].width / 2)


@pytest.mark.parametrize(("count", "columns", "lines"), [(1, None, 1), (5, None, 3), (5, 3, 2)])
def test_overlays_stand_in_lines(count, columns, lines):
    images = [Image.new("L", (20 + i, 30)) for i in range(count)]
    titles = [f"title {i}" for i in range(count)]
    figure = attention_overlay(images, torch.rand(count, 3, 5), titles, columns)
    assert len(figure.axes) == 3 * count
    assert len({round(axes.get_position(original=True).y0, 6) for axes in figure.axes}) == lines
    assert [axes.get_title(loc="left") for axes in figure.axes[::3]] == titles
    assert {"image", "attention", "overlay"} <= set(texts(figure))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "images is empty"),
        ({"attention": np.zeros((3, 2, 2))}, "attention has 3 maps for 2 images"),
        ({"attention": np.full((2, 2, 2), np.nan)}, "attention contains NaN"),
        ({"attention": np.zeros((2, 1, 2, 2))}, r"attention must have shape .*\(2, 1, 2, 2\)"),
        ({"titles": ["one"]}, "titles has 1 entries for 2 images"),
        ({"columns": 0}, "columns must be at least 1, got 0"),
    ],
)
def test_overlay_arguments_are_checked(change, message):
    good = {"images": np.zeros((2, 8, 8, 3)), "attention": np.zeros((2, 2, 2))}
    with pytest.raises(ValueError, match=message):
        attention_overlay(**(good | change))


# The pair


def drawn_pair(first, second, points, size=16):
    image = np.full((size, size, 3), 0.5)
    return cross_attention_pair(image, image, image, first, second, points)


def test_the_identity_reads_back_the_map_itself():
    attention = np.random.default_rng(0).random((3, 4))
    figure = drawn_pair(attention, attention, grid_points(3, 4))
    first, second, read_back, difference = (axes.images[0].get_array() for axes in figure.axes[3:7])
    np.testing.assert_allclose(first, attention)
    np.testing.assert_allclose(second, attention)
    np.testing.assert_allclose(read_back, attention)
    np.testing.assert_allclose(difference, 0, atol=1e-12)
    assert not any(patches(axes) for axes in figure.axes)
    assert any("0.0000" in t and "12 of 12" in t for t in texts(figure))


def test_a_flip_is_undone_and_hidden_cells_are_hatched():
    attention = np.random.default_rng(1).random((3, 4))
    points = grid_points(3, 4) * [-1, 1]
    points[[0, 6]] = [[1.5, 0], [np.nan, np.nan]]
    figure = drawn_pair(torch.tensor(attention), attention[:, ::-1].copy(), torch.tensor(points))
    hidden = np.zeros((3, 4), dtype=bool)
    hidden.ravel()[[0, 6]] = True
    for axes in figure.axes[5:7]:
        shown = axes.images[0].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(shown), hidden)
        assert {p.get_xy() for p in patches(axes)} == {(-0.5, -0.5), (1.5, 0.5)}
    np.testing.assert_allclose(figure.axes[5].images[0].get_array()[~hidden], attention[~hidden])
    assert not patches(figure.axes[3])
    assert not patches(figure.axes[4])
    assert any("10 of 12" in t for t in texts(figure))


def test_the_loss_in_the_figure_is_that_of_the_formula():
    generator = np.random.default_rng(3)
    first, second = generator.random((2, 2, 2))
    figure = drawn_pair(first, second, grid_points(2, 2))
    expected = ((first - second) ** 2).mean()
    assert any(f"{expected:.4f}" in t for t in texts(figure))


def test_dots_follow_the_points():
    figure = drawn_pair(np.ones((2, 2)), np.ones((2, 2)), grid_points(2, 2) * [-1, 1], size=8)
    before, after = (axes.collections[0].get_offsets() for axes in figure.axes[:2])
    np.testing.assert_allclose(before, [[1.5, 1.5], [5.5, 1.5], [1.5, 5.5], [5.5, 5.5]])
    np.testing.assert_allclose(after, [[5.5, 1.5], [1.5, 1.5], [5.5, 5.5], [1.5, 5.5]])


def test_a_pair_without_a_visible_cell():
    figure = drawn_pair(np.ones((2, 2)), np.ones((3, 3)), np.full((4, 2), 9.0))
    rendered(figure)
    assert len(patches(figure.axes[6])) == 4
    assert any("0 of 4" in t for t in texts(figure))


def test_points_must_fit_the_map():
    with pytest.raises(ValueError, match=r"points has shape \(9, 2\), attention_ij has 4 cells"):
        drawn_pair(np.ones((2, 2)), np.ones((2, 2)), np.zeros((9, 2)))


# Similar regions


def test_similar_regions_shows_both_directions():
    neighbours = [np.zeros((8, 8, 3)), np.zeros((8, 12, 3))]
    maps = np.zeros((2, 2, 2))
    maps[0, 0, 0] = maps[1, 1, 1] = 1
    figure = similar_regions(Image.new("RGB", (9, 9)), neighbours, maps, captions=["a", "b"])
    assert len(figure.axes) == 3
    assert {"query", "a", "b"} <= set(texts(figure))
    for axes, corner in zip(figure.axes[1:], [(0, 0), (-1, -1)], strict=True):
        shown = np.asarray(axes.images[0].get_array()).mean(axis=2)
        assert shown[corner] == shown.max() > shown[-1 - corner[0], -1 - corner[1]]
    both = similar_regions(Image.new("RGB", (9, 9)), neighbours, maps, query_maps=maps)
    assert len(both.axes) == 5
    assert both.axes[1].images[0].get_array().shape == (9, 9, 3)
    with pytest.raises(ValueError, match="query_maps has 1 maps for 2 images"):
        similar_regions(np.zeros((8, 8, 3)), neighbours, maps, query_maps=maps[:1])
    with pytest.raises(ValueError, match="neighbours is empty"):
        similar_regions(np.zeros((8, 8, 3)), [], maps)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (-0.5, 0.25)])
def test_similar_regions_are_where_the_cells_look(offset):
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1
    grey = np.full((64, 64, 3), 0.5)
    figure = similar_regions(grey, [grey], maps, query_maps=maps, cell_offset=offset)
    assert len(figure.axes) == 3
    for axes in figure.axes[1:]:
        shown = np.asarray(axes.images[0].get_array()).mean(axis=2)
        y, x = np.argwhere(shown == shown.max()).mean(axis=0) / 64
        expected = np.array([2.5 + offset[0], 1.5 + offset[1]]) / 4
        np.testing.assert_allclose([x, y], expected, atol=0.02)


# The gallery


def frame_of(axes):
    colours = {to_hex(spine.get_edgecolor()) for spine in axes.spines.values()}
    assert len(colours) == 1
    return colours.pop()


def marks_of(axes):
    return [(t.get_text(), to_hex(t.get_bbox_patch().get_facecolor())) for t in axes.texts]


def test_right_and_wrong_have_their_colour_and_their_mark():
    correct = torch.tensor([[True, False, True], [False, False, True]])
    figure = retrieval_gallery(
        torch.rand(2, 3, 8, 8), torch.rand(2, 3, 3, 8, 8), correct, title="a title"
    )
    assert len(figure.axes) == 8
    for row in range(2):
        query, *found = figure.axes[4 * row : 4 * row + 4]
        assert not query.texts
        assert frame_of(query) not in (RIGHT_COLOUR, WRONG_COLOUR)
        for axes, right in zip(found, correct[row].tolist(), strict=True):
            expected = ("✓", RIGHT_COLOUR) if right else ("✗", WRONG_COLOUR)
            assert marks_of(axes) == [expected]
            assert frame_of(axes) == expected[1]
    image = rendered(figure)
    for axes, colour in zip(figure.axes[1:3], (RIGHT_COLOUR, WRONG_COLOUR), strict=True):
        wanted = np.array(matplotlib.colors.to_rgb(colour)) * 255
        near = np.abs(pixels_of(axes, image) - wanted).max(axis=2) < 12
        assert near.sum() > 100
    assert "a title" in texts(figure)


def test_without_verdicts_frames_are_neutral():
    figure = retrieval_gallery([np.zeros((8, 8, 3))], [[np.zeros((8, 8, 3))] * 2])
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert not axes.texts
        assert frame_of(axes) not in (RIGHT_COLOUR, WRONG_COLOUR)


def test_rows_may_differ_and_long_ones_go_on_below():
    image = np.zeros((8, 8, 3))
    figure = retrieval_gallery(
        [image, image, image],
        [[image] * 5, [], [image]],
        distances=[[0.1, 0.2, 0.3, 0.4, 0.5], [], [0.6]],
        columns=2,
    )
    assert len(figure.axes) == 9
    places = [axes.get_position(original=True) for axes in figure.axes]
    boxes = [(round(p.x0, 4), round(p.y0, 4)) for p in places]
    assert len(set(boxes)) == 9
    assert boxes[1][0] == boxes[3][0] == boxes[5][0] > boxes[0][0]
    assert boxes[0][1] == boxes[1][1] > boxes[3][1] > boxes[5][1] > boxes[6][1] > boxes[7][1]
    assert "0.600" in texts(figure)


@pytest.mark.parametrize(
    "caption",
    [
        "写真.jpg",
        "фото.jpg",
        "صورة.png",
        "a$b$c.png",
        "50%_{x}^2",
        "$\\frac$.jpg",
        "\udcff\x07.jpg",
        "🐱.png",
    ],
)
def test_captions_of_any_script_are_drawn_without_a_warning(caption, caplog):
    image = np.zeros((8, 8, 3))
    figure = retrieval_gallery(
        [image], [[image]], captions=[[caption]], title=caption, query_captions=[caption]
    )
    rendered(figure)
    rendered(attention_overlay([image], np.zeros((1, 2, 2)), [caption]))
    rendered(recall_curve({caption: {"recall_at_1": 0.5}}))
    assert not caplog.records
    if caption.isascii():
        assert caption in texts(figure)


def test_long_captions_keep_both_ends():
    assert shortened("short.jpg", 12) == "short.jpg"
    assert shortened("a_long_name_0042.jpg", 11) == "a_lon…2.jpg"
    assert len(shortened("写真写真写真写真.jpg", 11)) < 11
    assert shortened(" two\nlines ", 20) == "two lines"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": []}, "queries is empty"),
        ({"neighbours": np.zeros((3, 2, 8, 8, 3))}, "neighbours has 3 entries for 2 queries"),
        ({"correct": [[True, True]]}, "correct has 1 entries for 2 queries"),
        ({"correct": [[True], [True]]}, r"correct\[0\] has 1 entries for 2 neighbours"),
        ({"distances": np.zeros((2, 3))}, r"distances\[0\] has 3 entries for 2 neighbours"),
        ({"captions": [["a", "b"], ["c"]]}, r"captions\[1\] has 1 entries for 2 neighbours"),
        ({"query_captions": ["a"]}, "query_captions has 1 entries for 2 queries"),
        ({"columns": 0}, "columns must be at least 1, got 0"),
        (
            {"neighbours": np.full((2, 2, 8, 8, 3), -1.0)},
            r"neighbours\[0\] contains values from -1",
        ),
    ],
)
def test_gallery_arguments_are_checked(change, message):
    good = {"queries": np.zeros((2, 8, 8, 3)), "neighbours": np.zeros((2, 2, 8, 8, 3))}
    with pytest.raises(ValueError, match=message):
        retrieval_gallery(**(good | change))


def test_eight_rows_of_photographs_stay_below_a_megabyte(tmp_path):
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB")
    corners = np.random.default_rng(0).integers(0, 300, (72, 2))
    crops = [photograph.crop((x, y, x + 200, y + 200)) for x, y in corners]
    rows = [crops[8 + 8 * i : 16 + 8 * i] for i in range(8)]
    figure = retrieval_gallery(crops[:8], rows, np.ones((8, 8), bool))
    assert save_figure(figure, tmp_path / "gallery.png").stat().st_size < 2**20


# Curves


def test_training_curves_show_raw_and_smooth_values_and_recall():
    values = [2.0, float("nan"), 1.0, float("inf"), 0.5]
    figure = training_curves(
        {"metric_loss": values, "clustering_loss": [1.0]},
        {2: {"recall_at_1": 0.6, "NMI": 0.1}, 0: {"recall_at_1": 0.2}},
    )
    first, second, recall = figure.axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == [
        "metric_loss",
        "clustering_loss",
    ]
    raw, smooth = first.lines
    np.testing.assert_array_equal(raw.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(raw.get_ydata(), [2, np.nan, 1, np.nan, 0.5])
    np.testing.assert_array_equal(smooth.get_ydata(), [2, np.nan, 1, np.nan, 0.5])
    assert len(recall.lines) == 1
    np.testing.assert_allclose(recall.lines[0].get_xydata(), [[0, 20], [2, 60]])
    assert "R@1 60.0" in texts(figure)
    rendered(figure)


def test_smoothing_is_a_centred_mean():
    values = np.random.default_rng(0).random(80)
    values[7] = np.nan
    expected = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(80)]
    expected[7] = np.nan
    np.testing.assert_allclose(smoothed(values), expected)


def test_curves_of_one_kind_only():
    assert len(training_curves({"loss": [1.0, 2.0]}).axes) == 1
    assert len(training_curves({}, {0: {"NMI": 0.3}}).axes) == 1
    rendered(training_curves({"loss": []}, {0: {"recall_at_1": 0.0}}))
    with pytest.raises(ValueError, match="both empty"):
        training_curves({}, {0: {}})
    with pytest.raises(ValueError, match=r"'R@1' at 0 is 37\.0: recalls go from 0 to 1"):
        training_curves({}, {0: {"recall_at_1": 37.0}})


def test_recall_curve_has_one_labelled_line_for_each_result():
    figure = recall_curve(
        {
            "raw pixels": {"recall_at_8": 0.5, "precision_at_1": 0.25, "NMI": 0.4},
            "after": {"recall_at_1": 0.7, "recall_at_2": 0.8, "precision_at_1": 0.1},
        }
    )
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 25], [8, 50]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[1, 70], [2, 80]])
    assert {"raw pixels 50.0", "after 80.0", "25.0", "70.0"} <= set(texts(figure))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "8"]
    rendered(figure)
    with pytest.raises(ValueError, match="results is empty"):
        recall_curve({})
    with pytest.raises(ValueError, match=r"results\['a'\] has no recall_at_K among \['NMI'\]"):
        recall_curve({"a": {"NMI": 1.0}})
    with pytest.raises(ValueError, match="'a' at 1 is nan"):
        recall_curve({"a": {"recall_at_1": float("nan")}})


def test_labels_make_room_for_each_other():
    assert spread_apart([5.0], 1) == [5.0]
    assert spread_apart([9.0, 0.0], 1) == [9.0, 0.0]
    places = spread_apart([1.0, 1.1, 0.9, 5.0], 1)
    np.testing.assert_allclose(places, [1.0, 2.0, 0.0, 5.0], atol=1e-12)


# Files


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_bytes_on_another_day(tmp_path, ending, monkeypatch):
    def write(name, time):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", time)
        figure = retrieval_gallery(np.full((1, 8, 8, 3), 0.3), np.zeros((1, 2, 8, 8, 3)), [[1, 0]])
        return save_figure(figure, tmp_path / "folder" / f"{name}.{ending}").read_bytes()

    assert write("a", "1000000") == write("b", "2000000")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        f"a.{ending}",
        f"b.{ending}",
    ]


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    figure = training_curves({"loss": [1.0]})
    path = save_figure(figure, tmp_path / "curve.png")
    with Image.open(path) as image:
        size = image.size
    assert size == tuple(np.round(100 * figure.get_size_inches()).astype(int))
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(training_curves({"loss": [2.0, 3.0]}), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_a_notebook_shows_the_figure():
    content = training_curves({"loss": [1.0]})._repr_png_()
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (830, 220)


def test_save_arguments_are_checked(tmp_path):
    figure = training_curves({"loss": [1.0]})
    with pytest.raises(ValueError, match=r"path must end in \.png.*'curve\.doc'"):
        save_figure(figure, tmp_path / "curve.doc")
    with pytest.raises(ValueError, match="dpi must be above 0, got 0"):
        save_figure(figure, tmp_path / "curve.png", dpi=0)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("pml_tacl.visualize")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r'pip install "pml_tacl\[examples\]"'):
        __import__("pml_tacl.visualize")


def test_the_public_names_exist():
    assert all(hasattr(visualize, name) for name in visualize.__all__)


@pytest.mark.parametrize(("warmup", "lines"), [(0, 2), (5, 3), (20, 2)])
def test_curves_mark_where_clustering_begins(warmup, lines):
    figure = visualize.training_curves({"loss": [1.0] * 20}, warmup=warmup)
    (axes,) = figure.axes
    assert len(axes.lines) == lines
    if lines == 3:
        assert list(axes.lines[-1].get_xdata()) == [5.5, 5.5]
