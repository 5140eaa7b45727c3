"""Where cells look is measured right, and the views' points and masks follow it."""

from functools import partial

import PIL.Image
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pml_tacl import AttentionEmbedder, BackgroundSwap, SiameseTransform
from pml_tacl.functional import sample_at_points, to_picture
from pml_tacl.models.receptive_field import measure_cell_offset
from pml_tacl.models.trunk import TrunkOutput


class Strided(nn.Module):
    """Convolutions of ones, so that what a cell looks at is known exactly."""

    def __init__(self, layers, kernel, stride, padding):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 1, kernel, stride, padding, bias=False) for _ in range(layers))
        )
        for layer in self.body:
            nn.init.constant_(layer.weight, 1 / kernel**2)

    def forward(self, images):
        maps = self.body(images)
        return TrunkOutput(maps, maps)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_kernel_three_looks_half_a_pixel_off_at_each_stride(layers):
    size = 16 * 2**layers
    x, y = measure_cell_offset(Strided(layers, 3, 2, 1), (size, 2 * size), channels=1)
    # Half a pixel at strides 1, 2, 4, ...: (2^layers - 1) / 2 pixels of a cell of 2^layers.
    expected = -(2**layers - 1) / 2 / 2**layers
    assert x == pytest.approx(expected, abs=1e-6)
    assert y == pytest.approx(expected, abs=1e-6)


def test_in_inference_mode_as_elsewhere():
    trunk = Strided(2, 3, 2, 1)
    with torch.inference_mode():
        offset = measure_cell_offset(trunk, (64, 64), channels=1)
    assert offset == pytest.approx((-0.375, -0.375), abs=1e-6)


def test_patches_look_straight_on():
    x, y = measure_cell_offset(Strided(2, 4, 4, 0), (64, 48), channels=1)
    assert x == pytest.approx(0, abs=1e-6)
    assert y == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("backbone", "low", "high"),
    [("resnet18", -0.6, -0.35), ("test_vit", -0.1, 0.1), ("test_convnext", -0.15, 0.15)],
)
def test_of_timm_models(backbone, low, high):
    torch.manual_seed(0)
    model = AttentionEmbedder(backbone, embedding_dim=8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    offset = model.cell_offset(160)
    assert all(low < value < high for value in offset)
    assert offset == model.cell_offset((160, 160))
    maps = model.trunk(torch.zeros(2, 3, 160, 160)).feature_maps
    model.load_state_dict(before)  # a training pass counts in BatchNorm
    assert model.grid(160) == model.grid((160, 160)) == maps.shape[-2:]
    with torch.inference_mode():
        model.load_state_dict(before)
        loaded = AttentionEmbedder(backbone, embedding_dim=8)
        loaded.load_state_dict(before)
        assert loaded.cell_offset(160) == offset
    assert model.trunk.training  # as it was, statistics of BatchNorm too
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 7, 16, (16, 9)])
def test_sizes_of_one_cell_have_no_covariance(size):
    model = AttentionEmbedder("test_resnet", embedding_dim=8, pooling="covariance")  # stride 16
    for call in (model.grid, model.cell_offset, partial(SiameseTransform.for_model, model)):
        with pytest.raises(ValueError, match=r"^image_size=\(.* of 1 x 1 cells, .* least 2: "):
            call(size)
    assert model.grid((16, 17)) == (1, 2)
    for pooling in ("backbone", "average"):  # for which one is enough
        other = AttentionEmbedder("test_resnet", embedding_dim=8, pooling=pooling)
        views = SiameseTransform.for_model(other, size, photometric=None)  # no blur of one pixel
        assert other.grid(size) == views.grid == (1, 1)


def test_sizes_that_the_backbone_cannot_take():
    model = AttentionEmbedder("test_convnext", embedding_dim=8)
    for call in (model.grid, model.cell_offset, partial(SiameseTransform.for_model, model)):
        with pytest.raises(ValueError, match=r"^image_size=\(3, 3\) is too .*: give") as stop:
            call(3)
        assert "\n" not in str(stop.value)
    with pytest.raises(ValueError, match=r"takes no images of \(40, 40\) px"):
        AttentionEmbedder("test_vit", embedding_dim=8, dynamic_img_size=True).grid(40)


def test_what_is_wrong_at_the_backbones_own_size_keeps_its_words(monkeypatch):
    model = AttentionEmbedder("test_resnet", embedding_dim=8)

    def broken(*_):
        raise error

    monkeypatch.setattr(model.trunk, "forward", broken)
    for error, size in ((RuntimeError("no kernel"), 160), (torch.OutOfMemoryError("full"), 64)):
        for call in (model.grid, model.cell_offset):
            with pytest.raises(type(error), match=str(error)):
                call(size)


@pytest.mark.parametrize("seed", range(6))
def test_points_read_the_same_place_from_the_other_view(seed):
    """With the offset maps of both views agree at the points; without they do not."""
    torch.manual_seed(seed)
    blob = F.interpolate(torch.rand(1, 3, 5, 5), (64, 64), mode="bicubic")[0].clamp(0, 1)
    picture = PIL.Image.fromarray((255 * blob).byte().permute(1, 2, 0).numpy())
    trunk = Strided(3, 3, 2, 1)
    errors = {}
    for name, offset in {"with": (-7 / 16, -7 / 16), "without": (0.0, 0.0)}.items():
        torch.manual_seed(seed)
        transform = SiameseTransform(
            64, 8, crop_scale=(0.6, 0.9), photometric=None, cell_offset=offset
        )
        transform.flip = False
        first, second, points = transform(picture)
        second, points = second.flip(-1), points * torch.tensor([-1.0, 1.0])
        if name == "with":  # mirrored by hand, so that the mirror's offset is not the code's own
            points[:, 0] -= 4 * offset[0] / 8
        maps = [trunk(view[None, :1])[1][0] for view in (first, second)]
        values, visible = sample_at_points(maps[1], points[None])
        inner = visible[0].view(8, 8).clone()
        inner[[0, -1]] = inner[:, [0, -1]] = False  # zero padding darkens the border
        inside = (points.view(8, 8, 2).abs() < 0.75).all(-1)
        difference = (values.view(8, 8) - maps[0][0])[inner & inside]
        errors[name] = difference.abs().mean().item()
    assert errors["with"] < 0.5 * errors["without"]


def test_a_flip_moves_points_by_twice_the_offset():
    picture = PIL.Image.new("RGB", (64, 64))
    torch.manual_seed(0)
    options = {"crop_scale": None, "photometric": None}
    plain, off = (SiameseTransform(64, 4, cell_offset=(o, 0), **options) for o in (0.0, -0.4))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        expected = plain(picture)[2]
        torch.manual_seed(seed)
        moved = off(picture)[2] - expected
        assert moved[:, 1].abs().max() < 1e-6
        flipped = bool(expected[0, 0] > 0)
        # Two fifths of a cell of half a unit, there and back.
        assert torch.allclose(moved[:, 0], torch.tensor(0.4 if flipped else 0.0), atol=1e-6)
        seen.add(flipped)
    assert seen == {False, True}


def test_to_picture_puts_values_where_cells_look():
    maps = torch.rand(2, 4, 6)
    plain = F.interpolate(maps[:, None], (32, 48), mode="bilinear")[:, 0]
    assert torch.equal(to_picture(maps, (32, 48)), plain)
    moved = to_picture(maps, (32, 48), (1.0, -0.5))  # 8 pixels to the right, 4 up
    assert torch.allclose(moved[:, :-4, 8:], plain[:, 4:, :-8], atol=1e-5)
    assert torch.allclose(to_picture(maps, (32, 48), (1e-9, 0.0)), plain, atol=1e-5)
    cubic = F.interpolate(maps[:, None], (32, 48), mode="bicubic")[:, 0]
    assert torch.equal(to_picture(maps, (32, 48), mode="bicubic"), cubic)
    moved = to_picture(maps, (32, 48), (1.0, -0.5), "bicubic")
    assert torch.allclose(moved[:, 4:-12, 20:-12], cubic[:, 8:-8, 12:-20], atol=1e-5)
    with pytest.raises(ValueError, match=r"maps must be \(N, H, W\), got \(4, 6\)"):
        to_picture(maps[0], (8, 8))


def test_the_swap_keeps_what_cells_look_at():
    common = torch.zeros(2, 8, 8)
    common[:, 3, 3] = -1.0
    images = torch.rand(2, 3, 64, 64)
    masks = BackgroundSwap(1.0, cell_offset=(-0.5, -0.5))(images, common).masks
    rows = masks[0].sum(1)
    weight = (rows - rows.min()) / (rows - rows.min()).sum()
    # The cell's middle is at 28 pixels, it looks at 24.
    assert (weight * (torch.arange(64) + 0.5)).sum() == pytest.approx(24, abs=0.1)


@pytest.mark.parametrize("wrong", [(0.1,), (3.0, 0.0), (0.0, float("nan"))])
def test_wrong_offsets(wrong):
    with pytest.raises(ValueError, match="cell_offset must be"):
        SiameseTransform(64, 4, cell_offset=wrong)
    with pytest.raises(ValueError, match="cell_offset must be"):
        BackgroundSwap(cell_offset=wrong)
