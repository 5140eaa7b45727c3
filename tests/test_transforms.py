"""Points are compared with where drawn dots are seen; the swap with loops over its formula."""

import math
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from pml_tacl import AttentionEmbedder
from pml_tacl.transforms import BackgroundSwap, SiameseTransform, SwapOutput, cell_weights
from pml_tacl.transforms.background_swap import emptied

HEIGHT, WIDTH, SIZE = 150, 200, 128
BILINEAR = v2.InterpolationMode.BILINEAR
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


def plain(size=SIZE, grid=SIZE, **kwargs):
    """No colours, values in [0, 1]; by default a cell for every pixel: points are a dense map."""
    return SiameseTransform(
        size, grid, photometric=None, mean=(0, 0, 0), std=(1, 1, 1), **{"flip": False, **kwargs}
    )


def make_image(seed=0, height=HEIGHT, width=WIDTH):
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def dot(x, y, deviation=2.0):
    """A bright dot at (x, y), counted from the upper left corner, on black."""
    rows, columns = torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5
    squared = (rows[:, None] - y) ** 2 + (columns - x) ** 2
    bright = (255 * torch.exp(-squared / (2 * deviation**2))).round().to(torch.uint8)
    return bright.expand(3, HEIGHT, WIDTH)


def seen_at(view):
    """(x, y) of the dot in a view, from the upper left corner, or None if it is not there."""
    bright = view[0]
    bright = torch.where(bright > 0.15, bright, 0.0)
    if bright.max() < 0.4:
        return None
    rows, columns = torch.arange(view.shape[1]) + 0.5, torch.arange(view.shape[2]) + 0.5
    mass = bright.sum()
    return torch.stack(((bright * columns).sum() / mass, (bright * rows[:, None]).sum() / mass))


GEOMETRIC = {
    "nothing": None,
    "horizontal flip": v2.RandomHorizontalFlip(1.0),
    "vertical flip": v2.RandomVerticalFlip(1.0),
    "affine": v2.RandomAffine(30, (0.2, 0.2), (0.8, 1.3), (-9, 9, -9, 9), BILINEAR),
    "affine, other centre": v2.RandomAffine(30, (0.1, 0.1), interpolation=BILINEAR, center=[9, 70]),
    "rotation": v2.RandomRotation(60, BILINEAR),
    "rotation, nearest": v2.RandomRotation(60),
    "rotation by 90": v2.RandomRotation((90, 90)),
    "rotation, expanding": v2.RandomRotation(60, BILINEAR, expand=True),
    "rotation, expanding, other centre": v2.RandomRotation(60, BILINEAR, True, center=[13, 50]),
    "perspective": v2.RandomPerspective(0.6, 1.0),
    "elastic": v2.ElasticTransform(50.0, 5.0),
    "elastic, strong": v2.ElasticTransform(250.0, 12.0),
    "resized crop": v2.RandomResizedCrop(77, (0.3, 0.8)),
    "resize": v2.Resize((77, 131)),
    "pad": v2.Pad((3, 7, 11, 2)),
    "crop after padding": v2.RandomCrop(110, padding=11),
    "centre crop": v2.CenterCrop((101, 110)),
    "centre crop, padding": v2.CenterCrop((143, 166)),
    "zoom out": v2.RandomZoomOut(side_range=(1.0, 1.5), p=1.0),
    "composed": v2.Compose(
        [
            v2.RandomAffine(25, (0.1, 0.1), (0.9, 1.2), interpolation=BILINEAR),
            v2.RandomHorizontalFlip(),
            v2.RandomPerspective(0.3, 1.0),
            v2.ElasticTransform(),
            v2.RandomResizedCrop(SIZE, (0.6, 1.0)),
        ]
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "elastic, strong" else [])
        for name in GEOMETRIC
    ],
)
def test_points_are_where_a_drawn_dot_is_seen(name):
    transform = plain(crop_scale=(0.5, 1.0), flip=True, geometric=GEOMETRIC[name])
    rng = np.random.default_rng(0)
    errors, unseen = [], 0
    for seed in range(40):
        torch.manual_seed(seed)
        view, transformed, points = transform(
            dot(rng.uniform(10, WIDTH - 10), rng.uniform(10, HEIGHT - 10))
        )
        first = seen_at(view)
        if first is None or not (first.min() > 8 and first.max() < SIZE - 8):
            continue
        dense = points.view(SIZE, SIZE, 2)
        column, row = (first - 0.5).round().long().tolist()
        around = dense[row - 8 : row + 9, column - 8 : column + 9].abs().amax(-1)
        if (around > 1).all():
            unseen += 1
            assert seen_at(transformed) is None
        elif (around < 0.98).all():
            grid = (first / SIZE * 2 - 1).view(1, 1, 1, 2)
            told = nnf.grid_sample(dense.permute(2, 0, 1)[None], grid, align_corners=False)
            second = seen_at(transformed)
            assert second is not None
            errors.append((told.flatten() + 1) / 2 * SIZE - second)
    errors = torch.stack(errors)
    assert len(errors) >= 8
    assert errors.norm(dim=1).max() < 0.5
    assert errors.mean(dim=0).abs().max() < 0.1  # no shift in common: half a pixel would show
    assert unseen > 0 or name in ("rotation, expanding", "zoom out")


@pytest.mark.parametrize("name", ["nothing", "affine", "perspective"])
def test_coarse_cells_are_the_dense_map_at_their_centres(name):
    kwargs = {"crop_scale": (0.6, 1.0), "geometric": GEOMETRIC[name]}
    rows, columns = 4, 8
    torch.manual_seed(3)
    points = plain(grid=(rows, columns), **kwargs)(make_image())[2]
    torch.manual_seed(3)
    dense = plain(**kwargs)(make_image())[2].view(SIZE, SIZE, 2)
    for k, point in enumerate(points):
        row, column = divmod(k, columns)
        y, x = (row + 0.5) * SIZE / rows, (column + 0.5) * SIZE / columns
        # The centre of such a cell is the corner of four pixels.
        around = dense[int(y) - 1 : int(y) + 1, int(x) - 1 : int(x) + 1].reshape(-1, 2)
        if around.abs().max() < 1:
            torch.testing.assert_close(point, around.mean(0), atol=2e-3, rtol=0)


def test_without_crops_points_are_the_cells_themselves():
    points = plain(size=64, grid=(2, 4), crop_scale=None)(make_image())[2]
    x, y = [-0.75, -0.25, 0.25, 0.75], [-0.5, 0.5]
    expected = torch.tensor([[column, row] for row in y for column in x])
    torch.testing.assert_close(points, expected)


def test_without_crop_scale_views_are_the_largest_centred_box():
    view, transformed, _ = plain(size=50, crop_scale=None)(make_image(height=50, width=80))
    expected = v2.functional.pil_to_tensor(make_image(height=50, width=80))[:, :, 15:65] / 255
    torch.testing.assert_close(view, expected)
    torch.testing.assert_close(transformed, expected)


def test_flip_mirrors_half_of_the_second_views_and_no_first_one():
    transform = plain(size=40, grid=2, crop_scale=None, flip=True)
    straight, _, _ = plain(size=40, grid=2, crop_scale=None)(make_image())
    torch.manual_seed(0)
    mirrored = 0
    for _ in range(60):
        view, transformed, points = transform(make_image())
        torch.testing.assert_close(view, straight)
        if points[0, 0] > 0:
            mirrored += 1
            torch.testing.assert_close(transformed, straight.flip(-1))
            torch.testing.assert_close(points[:, 0], torch.tensor([0.5, -0.5, 0.5, -0.5]))
        else:
            torch.testing.assert_close(transformed, straight)
    assert 15 < mirrored < 45


def shifted_by_hand(image, points):
    """A user's own transform: 24 pixels to the right, with no call of torchvision's."""
    moved = torch.zeros_like(image)
    moved[..., 24:] = image[..., :-24]
    return moved, tv_tensors.wrap(points + points.new_tensor([24.0, 0.0]), like=points)


THERE_AND_BACK = {
    "rotation": [v2.RandomRotation((45, 45), BILINEAR), v2.RandomRotation((-45, -45), BILINEAR)],
    "affine": [
        v2.RandomAffine((0, 0), scale=(1.5, 1.5), interpolation=BILINEAR),
        v2.RandomAffine((0, 0), scale=(1 / 1.5, 1 / 1.5), interpolation=BILINEAR),
    ],
    "crop and pad": [v2.CenterCrop(60), v2.Pad(10)],
    "crop and centre crop": [v2.RandomCrop(50), v2.CenterCrop(80)],
    "crop and padded crop": [v2.CenterCrop(60), v2.RandomCrop(80, padding=10)],
    "crop and crop beyond": [
        v2.CenterCrop(60),
        v2.Lambda(lambda x: v2.functional.crop(x, -10, -10, 80, 80)),
    ],
    "crop and resized crop beyond": [
        v2.CenterCrop(60),
        v2.Lambda(lambda x: v2.functional.resized_crop(x, -10, -10, 80, 80, [80, 80])),
    ],
    "crop and zoom out": [v2.CenterCrop(40), v2.RandomZoomOut(side_range=(2.0, 2.0), p=1.0)],
    "crop and perspective": [
        v2.CenterCrop(60),
        v2.Lambda(
            lambda x: v2.functional.perspective(
                x, [[0, 0], [60, 0], [60, 60], [0, 60]], [[15, 15], [45, 15], [45, 45], [15, 45]]
            )
        ),
    ],
    "crop and elastic": [
        v2.CenterCrop(60),
        v2.Lambda(lambda x: v2.functional.elastic(x, torch.full((1, 60, 60, 2), 0.25))),
    ],
}


@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_a_place_that_left_the_view_does_not_come_back(name):
    geometric = v2.Compose(THERE_AND_BACK[name])
    transform = plain(size=80, grid=80, crop_scale=None, geometric=geometric)
    _, transformed, points = transform(torch.full((3, 80, 80), 255, dtype=torch.uint8))
    visible = points[(points.abs() <= 1).all(-1)]
    assert 300 < len(visible) < 6000
    lit = nnf.grid_sample(transformed[None, :1], visible[None, None], align_corners=False)
    assert (lit > 0.4).float().mean() > 0.99
    # Nor is anything seen called lost: the lit area holds as many cells.
    magnified = {"crop and perspective": 30 / 60 * 80 / 60, "crop and elastic": 80 / 60}
    cells = transformed[0].sum().item() / magnified.get(name, 1.0) ** 2
    assert len(visible) == pytest.approx(cells, rel=0.05)


@pytest.mark.parametrize("geometric", [v2.RandomRotation((45, 45), BILINEAR), shifted_by_hand])
def test_a_place_outside_the_second_crop_is_not_moved_into_view(geometric):
    transform = plain(size=64, grid=64, crop_scale=(0.2, 0.3), geometric=geometric)
    torch.manual_seed(1)
    shares = []
    for _ in range(10):
        _, transformed, points = transform(torch.full((3, 120, 120), 255, dtype=torch.uint8))
        inside = points[(points.abs() <= 1).all(-1)]
        if len(inside):
            lit = nnf.grid_sample(transformed[None, :1], inside[None, None], align_corners=False)
            shares.append((lit > 0.45).float().mean())
    assert shares
    assert min(shares) > 0.98


def test_wholly_invisible_grids_are_finite_and_outside():
    away = v2.RandomAffine(0, translate=None, scale=(1, 1))
    away.make_params = lambda _: {
        "angle": 0.0, "translate": [500.0, 0.0], "scale": 1.0, "shear": [0.0, 0.0]
    }  # fmt: skip
    points = plain(size=32, grid=3, geometric=away)(make_image())[2]
    assert points.isfinite().all()
    assert (points.abs() > 1).any(-1).all()


def test_a_half_visible_grid():
    keep_left = v2.Lambda(lambda x: v2.functional.crop(x, 0, 0, 40, 20))
    points = plain(size=40, grid=(2, 4), crop_scale=None, geometric=keep_left)(make_image())[2]
    visible = (points.abs() <= 1).all(-1).view(2, 4)
    assert visible.tolist() == [[True, True, False, False]] * 2
    torch.testing.assert_close(points[0], torch.tensor([-0.5, -0.5]))


def test_geometric_of_another_size_is_resized_to_the_views():
    view, transformed, points = plain(size=(30, 40), grid=5, geometric=v2.Resize((90, 20)))(
        make_image()
    )
    assert view.shape == transformed.shape == (3, 30, 40)
    assert points.shape == (25, 2)
    assert type(transformed) is type(points) is torch.Tensor


def test_fold_in_the_field_loses_points_rather_than_inventing_them():
    points = plain(size=64, grid=64, crop_scale=None, geometric=v2.ElasticTransform(400.0, 3.0))(
        make_image()
    )[2]
    assert points.isfinite().all()
    assert (points.abs() > 1000).any()


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(2, 40),
    grid=GRIDS,
    seed=st.integers(0, 1000),
)
def test_any_image_gives_finite_views_and_evenly_spaced_points(height, width, size, grid, seed):
    rows, columns = grid
    torch.manual_seed(seed)
    view, transformed, points = SiameseTransform(size, grid)(make_image(seed, height, width))
    for tensor in (view, transformed):
        assert tensor.shape == (3, size, size)
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert tensor.is_contiguous()
    assert points.shape == (rows * columns, 2)
    assert points.dtype == torch.float32
    x, y = points.view(rows, columns, 2).unbind(-1)
    assert (x == x[:1]).all()
    assert (y == y[:, :1]).all()
    if columns > 2:
        steps = x[0].diff()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps), atol=1e-4, rtol=1e-3)


def test_default_is_normalised_with_imagenets_numbers():
    grey = PIL.Image.new("RGB", (40, 40), (128, 64, 32))
    view, _, _ = SiameseTransform(32, photometric=None)(grey)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.tensor([128, 64, 32]) / 255 - mean) / std
    torch.testing.assert_close(view, expected[:, None, None].expand(3, 32, 32))


def test_views_get_their_own_photometric_draws():
    photometric = v2.ColorJitter(brightness=(0.2, 0.9))
    torch.manual_seed(0)
    kwargs = {"crop_scale": None, "flip": False}
    view, transformed, _ = SiameseTransform(32, photometric=photometric, **kwargs)(make_image())
    assert (view - transformed).abs().mean() > 0.05
    view, transformed, _ = SiameseTransform(32, photometric=None, **kwargs)(make_image())
    torch.testing.assert_close(view, transformed)


def test_default_photometric_changes_colours_but_moves_nothing():
    transform = SiameseTransform(
        SIZE, SIZE, crop_scale=None, flip=False, mean=(0, 0, 0), std=(1, 1, 1)
    )
    torch.manual_seed(0)
    base, shifts, changed = None, [], 0
    for _ in range(30):
        view, transformed, _ = transform(dot(90, 60, 3.0))
        base = seen_at(plain(crop_scale=None)(dot(90, 60, 3.0))[0])
        if (found := seen_at(transformed / transformed.amax())) is not None:
            shifts.append((found - base).norm())
        changed += bool((view - transformed).abs().max() > 0.02)
    assert max(shifts) < 0.1
    assert changed > 20


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    image = make_image().convert(mode)
    torch.manual_seed(0)
    expected = SiameseTransform(32)(image.convert("RGB"))
    torch.manual_seed(0)
    for found, wanted in zip(SiameseTransform(32)(image), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_tensor_is_the_image_of_the_same_pixels():
    tensor = v2.functional.pil_to_tensor(make_image())
    for image in (tensor, tensor.contiguous(), tv_tensors.Image(tensor)):
        before = image.clone()
        torch.manual_seed(0)
        expected = SiameseTransform(32, geometric=GEOMETRIC["composed"])(make_image())
        torch.manual_seed(0)
        results = SiameseTransform(32, geometric=GEOMETRIC["composed"])(image)
        for found, wanted in zip(results, expected, strict=True):
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, wanted, atol=0.1, rtol=0)
        assert torch.equal(image, before)


def test_same_seed_same_views_and_pickling_keeps_them():
    transform = SiameseTransform(32, 4, geometric=GEOMETRIC["composed"])
    copy = pickle.loads(pickle.dumps(transform))
    results = []
    for each, seed in ((transform, 0), (copy, 0), (transform, 1)):
        torch.manual_seed(seed)
        results.append(each(make_image()))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


class Same(Dataset):
    """One image, over and over."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return SiameseTransform(16, 3)(make_image(height=40, width=40))


def test_workers_draw_differently_and_reproducibly():
    def views(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(Same(), batch_size=2, num_workers=2, generator=generator)
        return torch.cat([points for _, _, points in loader])

    first, again, other = views(0), views(0), views(1)
    assert first.shape == (8, 9, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be an int above 0 .* got 0"),
        ({"size": (3, 4, 5)}, ValueError, "size must be"),
        ({"grid": (0, 3)}, ValueError, r"grid must be .* got \(0, 3\)"),
        ({"grid": 2.5}, ValueError, "grid must be .* got 2.5"),
        ({"crop_scale": (0.5, 1.5)}, ValueError, r"crop_scale must be .* <= 1, got \(0.5, 1.5\)"),
        ({"crop_scale": 0.5}, ValueError, "crop_scale must be .* got 0.5"),
        ({"crop_ratio": (2, 1)}, ValueError, r"crop_ratio must be .* got \(2, 1\)"),
        ({"crop_ratio": (0, 1)}, ValueError, "crop_ratio must be"),
        ({"geometric": "flip"}, TypeError, "geometric must be a transform .* got 'flip'"),
        ({"geometric": "default"}, TypeError, "geometric must be a transform"),
        ({"photometric": 3}, TypeError, "photometric must be a transform .* got 3"),
        ({"crop_scale": ("a", "b")}, ValueError, r"crop_scale must be .* got \('a', 'b'\)"),
        ({"mean": (0.5,)}, ValueError, r"mean must be 3 finite numbers, one .* got \(0.5,\)"),
        ({"mean": 0.5}, ValueError, "mean must be 3 finite numbers, .* got 0.5"),
        ({"mean": (0, 0, float("nan"))}, ValueError, "mean must be 3 finite numbers, .* nan"),
        ({"std": (1, 1, 0)}, ValueError, r"std must be 3 finite numbers above 0, .* \(1, 1, 0\)"),
        ({"std": "abc"}, ValueError, "std must be 3 finite numbers above 0, .* got 'abc'"),
        ({"cell_offset": 0.5}, ValueError, r"cell_offset must be \(x, y\) .* got 0.5"),
        ({"size": (1, 8)}, ValueError, r"size must be at least 2 pixels for .* got \(1, 8\): "),
        ({"interpolation": "lanczos"}, ValueError, "interpolation must be .* got 'lanczos'"),
    ],
)
def test_wrong_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        SiameseTransform(**kwargs)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("a.png", TypeError, "image must be a PIL image, array or tensor, got str"),
        (torch.full((3, 4, 4), 255.0), ValueError, "image contains values from 255 to 255"),
        (torch.zeros(2, 4, 9, dtype=torch.uint8), ValueError, r"got \(2, 4, 9\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ValueError, r"got \(2, 3, 4, 4\)"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), ValueError, r"got \(3, 0, 4\)"),
    ],
)
def test_wrong_images_are_named(image, error, message):
    with pytest.raises(error, match=message):
        SiameseTransform(32)(image)


@pytest.mark.parametrize(
    ("geometric", "error", "message"),
    [
        (lambda image, points: image, TypeError, "geometric must return .* got Image"),
        (lambda image, points: (image, points.mul(2)), TypeError, "geometric must return"),
        (v2.SanitizeKeyPoints(), ValueError, "must keep the 3 channels and all 64 points"),
        (v2.Grayscale(), ValueError, r"got an image \(1, 32, 32\)"),
        (
            lambda image, points: (v2.functional.resize(image, [8, 8]), points),
            ValueError,
            r"alike: the image is \(8, 8\), the points' canvas \(32, 32\)",
        ),
    ],
)
def test_geometric_that_breaks_its_promise_is_named(geometric, error, message):
    torch.manual_seed(0)
    transform = SiameseTransform(32, 8, geometric=geometric, crop_scale=(0.2, 0.3))
    with pytest.raises(error, match=message):
        transform(make_image())


def test_photometric_that_changes_the_shape_is_named():
    with pytest.raises(ValueError, match=r"photometric must keep the shape \(3, 32, 32\).*geometr"):
        SiameseTransform(32, photometric=v2.CenterCrop(20))(make_image())


@pytest.mark.parametrize("size", [64, (32, 96)])
def test_views_for_a_model_are_those_that_fit_it(size):
    model = AttentionEmbedder("test_resnet", embedding_dim=8)
    model.data_config.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    shape = (size, size) if isinstance(size, int) else size
    transform = SiameseTransform.for_model(model, size, flip=False)
    x, y = model.cell_offset(shape)
    assert (x, y) != (0, 0)
    assert transform.cell_offset == pytest.approx((x, y))
    view, other, points = transform(make_image())
    assert view.shape == other.shape == (3, *shape)
    features = model.forward_features(view[None]).feature_maps
    assert transform.grid == features.shape[-2:]
    assert len(points) == features[0, 0].numel()
    assert not transform.flip
    assert (transform.mean, transform.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_the_smallest_views_there_are():
    torch.manual_seed(0)
    blurring, plain = SiameseTransform(2, 1), SiameseTransform(1, 1, photometric=None)
    for _ in range(20):  # which blurs now and then
        assert blurring(make_image())[0].shape == (3, 2, 2)
    assert plain(make_image())[0].shape == (3, 1, 1)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_channels_and_offsets_may_be_arrays(kind):
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    found = SiameseTransform(
        32, 4, cell_offset=kind([0.5, 0.25]), **{name: kind(v) for name, v in given.items()}
    )
    assert found.cell_offset == (0.5, 0.25)
    assert found.mean == pytest.approx(given["mean"])
    assert found.std == pytest.approx(given["std"])


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_is_told_apart_from_the_views(channels):
    model = AttentionEmbedder("test_resnet", embedding_dim=8, in_chans=channels)
    with pytest.raises(ValueError, match=f"views have 3 channels and the model takes {channels}: "):
        SiameseTransform.for_model(model, 64)


def test_what_is_given_goes_before_what_the_model_says():
    model = AttentionEmbedder("test_resnet", embedding_dim=8)
    given = {"grid": (3, 2), "cell_offset": (0.25, 0.5), "mean": [0, 0, 0], "std": [1, 1, 1]}
    transform = SiameseTransform.for_model(model, 64, **given)
    assert {name: getattr(transform, name) for name in given} == given


def test_repr_shows_the_arguments():
    assert "size=(32, 32), grid=(4, 5)" in repr(SiameseTransform(32, (4, 5)))


def batch(count=6, height=12, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator)


def partners(images, output):
    """Which image each swapped one took its backgrounds from; -1 if none explains it."""
    found = []
    for i in range(len(images)):
        mask = output.masks[i]
        errors = [
            (mask * images[i] + (1 - mask) * other - output.images[i]).abs().max().item()
            for other in images
        ]
        best = int(np.argmin(errors))
        found.append(best if errors[best] < 1e-5 else -1)
    return found


def slow_mask(background_score, sharpness, height, width):
    """The mask of one image, element by element; bilinear, half-pixel centres, edges repeated."""
    b = background_score.double().numpy()
    z = -(b - b.mean()) / b.std()
    mask = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * b.shape[0] / height - 0.5, 0), b.shape[0] - 1)
            u = min(max((x + 0.5) * b.shape[1] / width - 0.5, 0), b.shape[1] - 1)
            top, left = int(v), int(u)
            low, right = min(top + 1, b.shape[0] - 1), min(left + 1, b.shape[1] - 1)
            fv, fu = v - top, u - left
            value = (1 - fv) * ((1 - fu) * z[top, left] + fu * z[top, right])
            value += fv * ((1 - fu) * z[low, left] + fu * z[low, right])
            mask[y, x] = 1 / (1 + math.exp(-sharpness * value))
    return torch.tensor(mask, dtype=torch.float32)


@pytest.mark.parametrize("mask", ["border", "distinctive"])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_mask_from_maps_is_the_formula(mask, sharpness):
    images, background_score = batch(), torch.rand(6, 3, 4) * 0.2 + 0.5
    output = BackgroundSwap(1.0, mask, sharpness=sharpness, empty=False)(images, background_score)
    for mask, b in zip(output.masks, background_score, strict=True):
        torch.testing.assert_close(mask, slow_mask(b, sharpness, 12, 10))
    assert -1 not in partners(images, output)


def test_common_places_are_swapped_and_distinctive_ones_kept():
    background_score = torch.zeros(4, 4, 4)
    background_score[:, :2] = 1.0
    output = BackgroundSwap(1.0, sharpness=20.0)(batch(4, 8, 8), background_score)
    assert output.masks[:, 0].max() < 1e-6
    assert output.masks[:, -1].min() > 1 - 1e-6
    torch.testing.assert_close(output.images[:, :, -1], batch(4, 8, 8)[:, :, -1])


@pytest.mark.parametrize("sigma", [0.1, 0.4])
def test_centred_mask_is_a_gaussian_of_the_sides(sigma):
    output = BackgroundSwap(1.0, "centred", sigma=sigma)(batch(2, 9, 15))
    for y in range(9):
        for x in range(15):
            v, u = (y + 0.5) / 9 - 0.5, (x + 0.5) / 15 - 0.5
            expected = math.exp(-(v * v + u * u) / (2 * sigma**2))
            assert output.masks[1, y, x].item() == pytest.approx(expected, abs=1e-6)
    assert output.masks[0, 4, 7] == 1


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 9),
    probability=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_every_swapped_image_gets_anothers_surroundings(count, probability, seed):
    images = batch(count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    swap = BackgroundSwap(probability, "centred", empty=False)
    output = swap(images, generator=generator)
    taken = partners(images, output)
    for i in range(count):
        if output.swapped[i]:
            assert taken[i] not in (i, -1)
            assert output.masks[i].min() < 0.2
        else:
            assert torch.equal(output.images[i], images[i])
            assert (output.masks[i] == 1).all()
    if probability == 1:
        assert sorted(taken) == list(range(count))
    if probability == 0:
        assert not output.swapped.any()


def test_every_other_image_is_as_likely_a_partner():
    images, generator = batch(4, 2, 2), torch.Generator().manual_seed(0)
    swap = BackgroundSwap(1.0, "centred", empty=False)
    counts = torch.zeros(4, 4)
    for _ in range(600):
        for i, j in enumerate(partners(images, swap(images, generator=generator))):
            counts[i, j] += 1
    assert (counts.diagonal() == 0).all()
    others = counts[~torch.eye(4, dtype=torch.bool)]
    assert others.min() > 150  # 200 expected, deviation 12
    assert others.max() < 250


def test_share_of_swapped_images_is_the_probability():
    output = BackgroundSwap(0.7, "centred")(
        torch.zeros(4000, 1, 1, 1), generator=torch.Generator().manual_seed(0)
    )
    assert output.swapped.float().mean().item() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_returned_as_they_are(count):
    images = batch(count)
    for swap in (BackgroundSwap(1.0), BackgroundSwap(1.0, "centred")):
        output = swap(images, torch.rand(count, 3, 3))
        assert torch.equal(output.images, images)
        assert output.masks.shape == (count, 12, 10)
        assert (output.masks == 1).all()
        assert output.swapped.tolist() == [False] * count


@pytest.mark.parametrize("background_score", [torch.full((3, 4, 4), 0.3), torch.rand(3, 1, 1)])
def test_constant_background_score_gives_half_masks_and_no_nan(background_score):
    output = BackgroundSwap(1.0)(batch(3), background_score)
    assert (output.masks == 0.5).all()
    assert output.images.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", ["border", "distinctive", "centred"])
def test_other_dtypes_are_kept(dtype, mask):
    images, background_score = batch().to(dtype), torch.rand(6, 3, 4)
    results = [
        BackgroundSwap(0.7, mask)(x, background_score, torch.Generator().manual_seed(0))
        for x in (images, images.float())
    ]
    assert results[0].images.dtype == dtype
    assert results[0].masks.dtype == torch.float32
    assert torch.equal(results[0].swapped, results[1].swapped)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(
        results[0].images.float(), results[1].images, atol=tolerance, rtol=tolerance
    )


def test_channels_last_and_slices_give_the_same():
    images, background_score = batch(), torch.rand(6, 3, 4)
    wide = torch.randn(6, 3, 12, 20)
    wide[..., ::2] = images

    def swap(x):
        return BackgroundSwap(0.7)(x, background_score, torch.Generator().manual_seed(0)).images

    last = swap(images.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, swap(images))
    torch.testing.assert_close(swap(wide[..., ::2]), swap(images))


def test_an_infinite_image_does_not_spoil_the_unswapped():
    images = batch(8)
    images[0] = torch.inf
    output = BackgroundSwap(0.5, "centred")(images, generator=torch.Generator().manual_seed(0))
    kept = ~output.swapped
    assert kept[1:].any()
    assert torch.equal(output.images[kept], images[kept])


def test_swap_is_reproducible_and_leaves_its_input_alone():
    images = batch()
    before, swap = images.clone(), pickle.loads(pickle.dumps(BackgroundSwap(0.7, "centred")))
    first, again, other = (
        swap(images, generator=torch.Generator().manual_seed(s)) for s in [0, 0, 1]
    )
    assert isinstance(first, SwapOutput)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(images, before)
    state = torch.get_rng_state()
    swap(images, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_mask_carries_no_gradient_to_the_background_score():
    background_score = torch.rand(6, 3, 4, requires_grad=True)
    assert not BackgroundSwap(1.0)(batch(), background_score).images.requires_grad


@pytest.mark.parametrize("mask", ["border", "distinctive", "centred"])
def test_swap_never_reads_a_value_back(mask):
    images = torch.empty(6, 3, 12, 10, device="meta")  # has no values: reading one raises
    output = BackgroundSwap(0.7, mask)(images, torch.empty(6, 3, 4, device="meta"))
    assert output.images.shape == images.shape
    assert output.images.device.type == output.swapped.device.type == "meta"
    assert cell_weights(output.masks, 3).shape == (6, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", ["border", "distinctive", "centred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_agrees_with_cpu_and_never_waits(mask, dtype):
    images, background_score = batch(16), torch.rand(16, 3, 4)
    expected = BackgroundSwap(0.7, mask)(images, background_score, torch.Generator().manual_seed(0))
    arguments = images.to("cuda", dtype), background_score.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = BackgroundSwap(0.7, mask)(*arguments, torch.Generator().manual_seed(0))
        BackgroundSwap(0.7, mask)(*arguments)
        weights = cell_weights(found.masks, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.images.dtype == dtype
    assert torch.equal(found.swapped.cpu(), expected.swapped)
    torch.testing.assert_close(found.masks.cpu(), expected.masks)
    torch.testing.assert_close(found.images.float().cpu(), expected.images, atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(weights.cpu(), cell_weights(expected.masks, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"probability": 1.2}, r"probability must be a number in \[0, 1\], got 1.2"),
        ({"probability": float("nan")}, "probability must be"),
        ({"probability": "x"}, r"probability must be a number in \[0, 1\], got 'x'"),
        ({"mask": "central"}, "mask must be 'border', 'distinctive' or 'centred', got 'central'"),
        ({"sharpness": 0}, "sharpness must be a finite number above 0, got 0"),
        ({"sigma": float("inf")}, "sigma must be a finite number above 0, got inf"),
        ({"cell_offset": None}, r"cell_offset must be \(x, y\) in cells, .* got None"),
    ],
)
def test_wrong_swap_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BackgroundSwap(**kwargs)


@pytest.mark.parametrize(
    ("images", "background_score", "error", "message"),
    [
        (torch.zeros(3, 4, 4), None, ValueError, r"images must .* got \(3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None, TypeError, "got torch.uint8"),
        (torch.zeros(2, 3, 4, 4), None, ValueError, "background must be given for mask='border'"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4), ValueError, r"N = 2 .* got \(3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4), ValueError, r"got \(2, 4\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 0, 4), ValueError, r"got \(2, 0, 4\)"),
    ],
)
def test_wrong_batches_are_named(images, background_score, error, message):
    with pytest.raises(error, match=message):
        BackgroundSwap()(images, background_score)


def slow_emptied(image, keep):
    """Where keep is 1 in the middle and 0 elsewhere: the colours come from without."""
    outside = keep.numpy() == 0
    return image.numpy()[:, outside].min(1), image.numpy()[:, outside].max(1)


def test_the_others_object_is_painted_over():
    images = torch.zeros(2, 3, 32, 32)
    images[0], images[1] = 0.2, 0.6
    keep = torch.zeros(2, 32, 32)
    keep[:, 8:20, 10:24] = 1
    images[:, :, 8:20, 10:24] = 5.0  # the objects
    found = emptied(images, keep)
    # Of one colour around, so that colour fills it.
    torch.testing.assert_close(found[0], torch.full((3, 32, 32), 0.2), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[1], torch.full((3, 32, 32), 0.6), atol=1e-3, rtol=0)
    noisy = torch.rand(1, 3, 32, 32)
    found = emptied(noisy, keep[:1])
    low, high = slow_emptied(noisy[0], keep[0])
    inside = found[0][:, 8:20, 10:24].flatten(1).numpy()
    assert (inside.min(1) >= low).all()
    assert (inside.max(1) <= high).all()
    assert torch.equal(found[0][:, 28:], noisy[0][:, 28:])  # far from the object all stays


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_emptying_nothing_or_all(level):
    images = torch.rand(2, 3, 20, 24)
    found = emptied(images, torch.full((2, 20, 24), level))
    assert found.isfinite().all()
    if level == 0:
        assert torch.equal(found, images)
    else:  # nothing is left to tell a colour: the mean
        mean = images.mean((2, 3), keepdim=True).expand_as(images)
        torch.testing.assert_close(found, mean, atol=0.3, rtol=0)


def test_a_swapped_image_shows_only_its_own_object():
    images = torch.zeros(4, 3, 32, 32) + torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None, None]
    background = torch.ones(4, 8, 8)
    for i, (y, x) in enumerate([(1, 1), (1, 5), (5, 1), (5, 5)]):
        images[i, :, 4 * y : 4 * y + 8, 4 * x : 4 * x + 8] = 9.0
        background[i, y : y + 2, x : x + 2] = 0
    shown = []
    for empty in (False, True):
        swap = BackgroundSwap(1.0, sharpness=8.0, empty=empty)
        found = swap(images, background, torch.Generator().manual_seed(0)).images
        shown.append((found[:, 0] > 4).float().sum((1, 2)))
    assert (shown[0] > 110).all()  # two objects of 64 pixels, with their rims
    assert (shown[1] < 80).all()


def test_swap_shows_its_arguments():
    assert "probability=0.7, mask='centred'" in repr(BackgroundSwap(mask="centred"))


@settings(max_examples=30, deadline=None)
@given(
    grid=GRIDS,
    cell_height=st.integers(1, 4),
    cell_width=st.integers(1, 4),
    count=st.integers(0, 3),
)
def test_cell_weights_are_means_over_the_cells(grid, cell_height, cell_width, count):
    rows, columns = grid
    masks = torch.rand(count, rows * cell_height, columns * cell_width)
    weights = cell_weights(masks, grid)
    assert weights.shape == (count, rows * columns)
    for n in range(count):
        for k in range(rows * columns):
            y, x = k // columns * cell_height, k % columns * cell_width
            mean = masks[n, y : y + cell_height, x : x + cell_width].double().mean().item()
            assert weights[n, k].item() == pytest.approx(mean, abs=1e-5)


def test_cell_weights_of_cells_that_cut_pixels():
    masks = torch.zeros(1, 5, 5)
    masks[:, :, 2] = 1.0
    weights = cell_weights(masks, 2).view(2, 2)
    assert torch.equal(weights[:, 0], weights[:, 1])  # the middle column belongs to both sides
    assert weights.min() > 0


def test_cell_weights_name_wrong_arguments():
    with pytest.raises(ValueError, match=r"masks must have the shape \(N, H, W\), got \(4, 4\)"):
        cell_weights(torch.ones(4, 4), 2)
    with pytest.raises(ValueError, match="grid must be"):
        cell_weights(torch.ones(1, 4, 4), 0)


def test_for_model_of_a_bare_module_says_to_wrap_it():
    with pytest.raises(TypeError, match=r"^model must be an AttentionEmbedder, got Conv2d: wrap"):
        SiameseTransform.for_model(torch.nn.Conv2d(3, 8, 3), 32)
