"""Where cells look is measured right, and the views' points and masks follow it."""

import copy
from functools import partial

import PIL.Image
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pml_tacl import AttentionEmbedder, BackgroundSwap, SiameseTransform
from pml_tacl.functional import sample_at_points, to_image
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


class Asymmetric(nn.Module):
    """What layers can be, with another offset in x and y."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        maps = self.layers(images)
        return TrunkOutput(maps, maps)


def conv(channels, *args, **kwargs):
    return nn.Conv2d(channels, 4, *args, **kwargs)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # Pixels off the middle of a cell, over its stride: kernel 3, stride 2, padding 1 looks
        # half a pixel up and left; without padding half a pixel down and right.
        ([conv(3, 3, 2, 1)], (-1 / 4, -1 / 4)),
        ([conv(3, (3, 1), 2, (1, 0))], (-1 / 4, -1 / 4)),
        ([conv(3, 2, 2)], (0, 0)),
        ([conv(3, 4, 4)], (0, 0)),
        ([conv(3, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(3, 2, 1)], (-3 / 8,) * 2),
        ([conv(3, 3, 2, 1), nn.AvgPool2d(2)], (-1 / 8, -1 / 8)),
        ([conv(3, 3, 1, "same", dilation=2), nn.GroupNorm(2, 4), nn.Sigmoid()], (0, 0)),
        ([nn.ZeroPad2d((0, 1, 0, 1)), conv(3, 3, 2)], (1 / 4, 1 / 4)),  # TensorFlow's, even sizes
        ([nn.ZeroPad2d((0, 1, 1, 0)), conv(3, 3, 2), nn.SiLU()], (1 / 4, -1 / 4)),
        ([nn.ReflectionPad2d(1), conv(3, 3, 2), nn.Tanh(), nn.InstanceNorm2d(4)], (-1 / 4,) * 2),
        ([conv(3, 3, 2, 1, groups=1), nn.PReLU(), conv(4, 5, 2, 2, groups=4)], (-3 / 8,) * 2),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_offsets_of_layers_are_exact_whatever_the_weights(layers, expected, seed):
    torch.manual_seed(seed)
    trunk = Asymmetric(*copy.deepcopy(layers))
    for parameter in trunk.parameters():
        nn.init.normal_(parameter)
    assert measure_cell_offset(trunk, (64, 48)) == pytest.approx(expected, abs=1e-6)


# Models with fewer blocks of a kind: their number does not move what a cell looks at.
BACKBONES = {
    # Strides of 2 with kernel 3 and padding 1, four times: -(1 + 2 + 4 + 8) / 2 pixels of 16.
    "resnet18": (160, -15 / 32, {}),
    # Squeeze and excitation looks everywhere.
    "mobilenetv3_small_100": (96, -15 / 32, {}),
    "efficientnet_b0": (96, -15 / 32, {}),
    # TensorFlow pads below and to the right.
    "tf_efficientnet_lite0": (96, 15 / 32, {}),
    # Its later strides are means of 2 x 2 pixels.
    "densenet121": (96, -1.5 / 16, {"block_config": (2, 2, 2, 2)}),
    # A shortcut of means beside convolutions: between both.
    "test_resnet": (64, -9 / 32, {}),
    "test_vit": (160, 0, {}),
    "test_convnext": (160, 0, {}),
    "convnextv2_atto": (96, 0, {"depths": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (224, 0, {"embed_dim": 24, "depths": (1, 2, 1, 1)}),
    # Products of branches.
    "eva02_tiny_patch14_224": (224, 0, {"depth": 2}),
    "xcit_nano_12_p16_224": (96, -15 / 32, {"depth": 2}),
    # Attends to fewer places.
    "pvt_v2_b0": (96, -15 / 32, {"depths": (1, 1, 1, 1)}),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith("test_") else pytest.param(name, marks=pytest.mark.slow)
        for name in BACKBONES
    ],
)
def test_the_offset_belongs_to_the_architecture(name):
    size, expected, settings = BACKBONES[name]
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AttentionEmbedder(name, embedding_dim=8, **settings)
        before = torch.get_rng_state()
        found.append(model.cell_offset(size))
        assert torch.equal(before, torch.get_rng_state())  # no random number is drawn
    assert found[0] == found[1] == pytest.approx((expected, expected), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_offset_is_alike_in_every_precision_and_device_of_no_weights(dtype):
    model = AttentionEmbedder("test_efficientnet", embedding_dim=8)
    expected = model.cell_offset(96)
    assert expected == pytest.approx((-15 / 32,) * 2, abs=1e-6)
    assert model.to(dtype).cell_offset(96) == expected
    assert all(p.dtype == dtype for p in model.parameters())


def test_sizes_that_padding_makes_even_change_it():
    """With TensorFlow's padding an odd size is padded on both sides."""
    model = AttentionEmbedder("tf_efficientnet_lite0", embedding_dim=8)
    assert model.cell_offset(97) == (0, 0)
    assert model.cell_offset((97, 96)) == pytest.approx((15 / 32, 0), abs=1e-6)


class ByHand(nn.Module):
    """Normalises by hand, so that equal weights say nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, images):
        maps = self.first(images)
        maps = (maps - maps.mean(1, keepdim=True)) / (maps.std(1, keepdim=True) + 1e-5)
        maps = self.second(maps)
        return TrunkOutput(maps, maps)


def test_networks_that_equal_weights_do_not_measure_are_measured_by_fixed_ones():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(measure_cell_offset(ByHand(), (64, 64)))
        torch.manual_seed(seed)
        assert torch.equal(state, torch.get_rng_state())
    assert found[0] == found[1] == pytest.approx((-3 / 8, -3 / 8), abs=0.1)


def test_networks_that_look_nowhere_say_so():
    class Blind(nn.Module):
        def forward(self, images):
            maps = torch.ones_like(images)[:, :, ::4, ::4] + 0 * images[:, :, ::4, ::4]
            return TrunkOutput(maps, maps)

    with pytest.raises(
        ValueError, match=r"cell_offset cannot be measured for images of \(32, 32\) px: give"
    ):
        measure_cell_offset(Blind(), (32, 32))


def test_through_weights_they_count():
    trunk = Strided(1, 3, 2, 1)
    assert measure_cell_offset(trunk, (64, 64), channels=1) == (-0.25, -0.25)
    with torch.no_grad():
        trunk.body[0].weight.zero_()
        trunk.body[0].weight[0, 0, 0, 2] = 1  # above, and to the right
    assert measure_cell_offset(trunk, (64, 64), channels=1) == (-0.25, -0.25)
    seen = measure_cell_offset(trunk, (64, 64), channels=1, through_weights=True)
    assert seen == pytest.approx((0.25, -0.75), abs=1e-6)
    half = measure_cell_offset(trunk.half(), (64, 64), channels=1, through_weights=True)
    assert half == pytest.approx(seen, abs=1e-6)


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
    with pytest.raises(ValueError, match=r"does not accept images of \(40, 40\) px"):
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
    image = PIL.Image.fromarray((255 * blob).byte().permute(1, 2, 0).numpy())
    trunk = Strided(3, 3, 2, 1)
    errors = {}
    for name, offset in {"with": (-7 / 16, -7 / 16), "without": (0.0, 0.0)}.items():
        torch.manual_seed(seed)
        transform = SiameseTransform(
            64, 8, crop_scale=(0.6, 0.9), photometric=None, cell_offset=offset
        )
        transform.flip = False
        first, second, points = transform(image)
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
    image = PIL.Image.new("RGB", (64, 64))
    torch.manual_seed(0)
    options = {"crop_scale": None, "photometric": None}
    plain, off = (SiameseTransform(64, 4, cell_offset=(o, 0), **options) for o in (0.0, -0.4))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        expected = plain(image)[2]
        torch.manual_seed(seed)
        moved = off(image)[2] - expected
        assert moved[:, 1].abs().max() < 1e-6
        flipped = bool(expected[0, 0] > 0)
        # Two fifths of a cell of half a unit, there and back.
        assert torch.allclose(moved[:, 0], torch.tensor(0.4 if flipped else 0.0), atol=1e-6)
        seen.add(flipped)
    assert seen == {False, True}


def test_to_image_puts_values_where_cells_look():
    maps = torch.rand(2, 4, 6)
    plain = F.interpolate(maps[:, None], (32, 48), mode="bilinear")[:, 0]
    assert torch.equal(to_image(maps, (32, 48)), plain)
    moved = to_image(maps, (32, 48), (1.0, -0.5))  # 8 pixels to the right, 4 up
    assert torch.allclose(moved[:, :-4, 8:], plain[:, 4:, :-8], atol=1e-5)
    assert torch.allclose(to_image(maps, (32, 48), (1e-9, 0.0)), plain, atol=1e-5)
    cubic = F.interpolate(maps[:, None], (32, 48), mode="bicubic")[:, 0]
    assert torch.equal(to_image(maps, (32, 48), mode="bicubic"), cubic)
    moved = to_image(maps, (32, 48), (1.0, -0.5), "bicubic")
    assert torch.allclose(moved[:, 4:-12, 20:-12], cubic[:, 8:-8, 12:-20], atol=1e-5)
    with pytest.raises(ValueError, match=r"maps must be \(N, H, W\), got \(4, 6\)"):
        to_image(maps[0], (8, 8))


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
