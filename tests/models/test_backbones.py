"""Every family of timm, and modules of the user's own, through the same few questions."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pml_tacl.models import AttentionEmbedder, Trunk

_SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
_TINY_VIT = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}

# name, arguments, a size that the model takes, an odd one (None: the size is fixed), the maps' grid
FAMILIES = {
    "resnet": ("test_resnet", {}, (64, 64), (65, 39), (4, 4)),
    "resnet dilated": ("test_resnet", {"output_stride": 8}, (64, 64), (65, 39), (8, 8)),
    "convnext": ("test_convnext", {"drop_path_rate": 0.1}, (64, 64), (71, 47), (4, 4)),
    "efficientnet": ("test_efficientnet", {}, (64, 64), (65, 39), (4, 4)),
    "mobilenetv3": ("mobilenetv3_small_050", {}, (64, 64), (65, 39), (4, 4)),
    "regnet": ("regnetx_002", {}, (64, 64), (65, 39), (4, 4)),
    "nfnet": ("test_nfnet", {}, (64, 64), (65, 39), (4, 4)),
    "vit": ("test_vit", {"dynamic_img_size": True}, (64, 64), (48, 80), (4, 4)),
    "vit pooled": ("test_vit2", {"img_size": 64}, (64, 64), None, (4, 4)),
    "vit without class token": (
        "test_vit",
        {"img_size": 64, "class_token": False, "global_pool": "avg"},
        (64, 64),
        None,
        (4, 4),
    ),
    "vit with registers": ("test_vit", {"img_size": 64, "reg_tokens": 4}, (64, 64), None, (4, 4)),
    "dinov2": (
        "vit_small_patch14_reg4_dinov2",
        {**_TINY_VIT, "img_size": 56, "dynamic_img_size": True},
        (56, 56),
        (28, 42),
        (4, 4),
    ),
    "dinov3": (
        "vit_small_patch16_dinov3",
        {**_TINY_VIT, "embed_dim": 48},
        (64, 64),
        (32, 80),
        (4, 4),
    ),
    "beit": ("beitv2_base_patch16_224", _TINY_VIT, (32, 32), None, (2, 2)),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, **_SWIN}, (64, 64), None, (4, 4)),
    "maxvit": ("test_maxvit", {"img_size": 64}, (64, 64), None, (4, 4)),
    "coatnet": ("test_coatnet", {"img_size": 64}, (64, 64), None, (4, 4)),
    "hiera": (
        "hiera_tiny_224",
        {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 1, 1), "num_heads": 1},
        (64, 64),
        None,
        (4, 4),
    ),
    "mambaout": (
        "mambaout_femto",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
        (64, 64),
        (71, 47),
        (4, 4),
    ),
}


# One of each layout: (N, C, H, W), tokens, and (N, H, W, C). The others are slow in most tests.
LAYOUTS = ["resnet", "vit", "swin"]


def slow_but_for_layouts(families):
    return [
        name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow) for name in families
    ]


# What the parts of a larger model have, in small: none of `test_*` pools like these.
POOLINGS = {
    "vit pooled, norm before": ("test_vit", {"img_size": 64, "global_pool": "avg"}),
    "siglip": ("vit_base_patch16_siglip_224", {**_TINY_VIT, "img_size": 64}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {**_TINY_VIT, "img_size": 64}),
    "cait": ("cait_xxs24_224", {**_TINY_VIT, "img_size": 64}),
    "eva": ("eva02_tiny_patch14_224", {**_TINY_VIT, "img_size": 56}),
    "beit class token": ("beit_base_patch16_224", _TINY_VIT),
}


def build(family, embedding_dim=8, **overrides):
    name, kwargs, size, odd, grid = FAMILIES[family]
    torch.manual_seed(0)
    return (
        AttentionEmbedder(name, embedding_dim=embedding_dim, **{**kwargs, **overrides}),
        size,
        odd,
        grid,
    )


def images(size, channels=3, n=2):
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(1))


def check_output(model, x):
    out = model.forward_features(x)
    own = model.embedder.pooling == "backbone"
    assert out.embeddings.shape == (len(x), model.trunk.num_features if own else 8)
    torch.testing.assert_close(out.embeddings.norm(dim=1), torch.ones(len(x)))
    assert out.feature_maps.shape[1] == model.trunk.map_channels
    assert out.attention.shape == (len(x), *out.feature_maps.shape[2:])
    assert (out.attention >= 0).all()
    torch.testing.assert_close(out.attention.sum((1, 2)), torch.ones(len(x)))
    return out


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        *[(family, "backbone") for family in FAMILIES],
        *[(family, "average") for family in LAYOUTS],  # of other families: see the next test
        *[(family, "covariance") for family in LAYOUTS],
        *[
            pytest.param(family, "covariance", marks=pytest.mark.slow)
            for family in FAMILIES
            if family not in LAYOUTS
        ],
    ],
)
def test_shapes_and_gradients(family, pooling):
    model, size, _, grid = build(family, pooling=pooling)
    out = check_output(model, images(size))
    assert out.feature_maps.shape[2:] == grid
    output = model.trunk(images(size))
    assert (
        model.trunk.num_features
        == (output.pooled if pooling == "backbone" else output.features).shape[1]
    )
    (out.embeddings * torch.randn_like(out.embeddings)).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    if pooling == "average":
        assert model.embedder.attention.score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", slow_but_for_layouts(FAMILIES))
def test_starts_as_average_pooling_of_timms_features(family):
    model, size, *_ = build(family, embedding_dim=None, pooling="average")
    model.eval()
    with torch.no_grad():
        embeddings = model(images(size))
        final = model.trunk.model.forward_features(images(size))
    if final.ndim == 3:
        pooled = final[:, getattr(model.trunk.model, "num_prefix_tokens", 0) :].mean(1)
    else:
        channels_last = final.shape[-1] == model.trunk.num_features
        pooled = final.mean((1, 2) if channels_last else (2, 3))
    with torch.no_grad():
        pooled = model.embedder.norm(pooled)
    torch.testing.assert_close(embeddings, F.normalize(pooled), rtol=1e-5, atol=1e-6)


def timms_own(name, kwargs):
    """timm's model without a classifier, and its weights with one, all of them random."""
    timms = timm.create_model(name, **kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    for module in timms.modules():  # a fresh norm would hide that it was lost
        for name, parameter in module.named_parameters(recurse=False):
            scale = torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator)
            # Scales of 1e-5, as some layers have at the start, would hide the image.
            parameter.data = scale if name.startswith("gamma") else parameter.data * scale
            if isinstance(module, nn.LayerNorm) and name == "bias":
                parameter.data += scale - 1
    state = {key: value.clone() for key, value in timms.state_dict().items()}
    timms.reset_classifier(0)
    return timms, state


@pytest.mark.parametrize(
    ("family", "built_by"),
    [
        *[(family, "name") for family in [*FAMILIES, *POOLINGS]],
        *[(family, "module") for family in [*LAYOUTS, *POOLINGS]],
    ],
)
def test_starts_as_timms_own_embedding(family, built_by, tmp_path):
    name, kwargs, *sizes = (FAMILIES | POOLINGS)[family]
    size = sizes[0] if sizes else (kwargs["img_size"],) * 2
    timms, state = timms_own(name, kwargs)
    if built_by == "name":
        torch.save(state, tmp_path / "weights.pth")
        model = AttentionEmbedder(name, tmp_path / "weights.pth", **kwargs).eval()
    else:
        module = timm.create_model(name, **kwargs)
        module.load_state_dict(state)
        hint = {"img_size": kwargs["img_size"]} if "img_size" in kwargs else {}
        model = AttentionEmbedder(module, **hint).eval()
    with torch.no_grad():
        expected, found = timms(images(size)), model.trunk(images(size))
        embeddings = model(images(size))
    torch.testing.assert_close(found.pooled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeddings, F.normalize(expected), rtol=1e-4, atol=1e-5)
    assert embeddings.shape == (2, model.trunk.num_features)
    assert (1 - F.cosine_similarity(*embeddings, dim=0)).item() > 1e-6  # else it would say nothing


@pytest.mark.parametrize("family", POOLINGS)
def test_every_parameter_learns_through_timms_own_pooling(family):
    name, kwargs = POOLINGS[family]
    model = AttentionEmbedder(name, **kwargs)
    embeddings = model(images((kwargs["img_size"],) * 2))
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("family", slow_but_for_layouts(FAMILIES))
def test_a_fitted_projection(family, monkeypatch):
    monkeypatch.setattr("pml_tacl.models.projection.CHANNELS", 8)  # quickly
    model, size, *_ = build(family)
    model.eval().fit_projection([images(size, n=10)], progress=False)
    with torch.no_grad():
        embeddings = model(images(size))
    assert embeddings.shape == (2, 8)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row[3]])
def test_odd_sizes(family):
    model, _, odd, _ = build(family)
    check_output(model.eval(), images(odd))


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if not row[3]])
def test_fixed_sizes_say_so(family):
    model, *_ = build(family)
    with pytest.raises(ValueError, match=r"does not accept images of \(50, 34\) px .*img_size="):
        model(images((50, 34)))


@pytest.mark.parametrize(
    ("family", "channels"),
    [
        *[(family, channels) for family in LAYOUTS for channels in (1, 4)],
        *[
            pytest.param(family, 1, marks=pytest.mark.slow)
            for family in FAMILIES
            if family not in LAYOUTS
        ],
    ],
)
def test_channels(family, channels):
    model, size, *_ = build(family, in_chans=channels)
    assert model.data_config["input_size"][0] == len(model.data_config["mean"]) == channels
    check_output(model.eval(), images(size, channels))
    with pytest.raises(ValueError, match=rf"must be {channels} for this backbone, got 3"):
        model(images(size))


@pytest.mark.parametrize("family", LAYOUTS)
def test_frozen_trunk(family):
    model, size, *_ = build(family, pooling="average")
    model.trunk.requires_grad_(False)
    out = model.forward_features(images(size))
    assert not out.feature_maps.requires_grad
    (out.embeddings * torch.randn_like(out.embeddings)).sum().backward()
    assert all(p.grad is None for p in model.trunk.parameters())
    assert all(p.grad is not None for p in model.embedder.parameters())
    assert [group["name"] for group in model.parameter_groups(0.1)] == ["embedder"]


@pytest.mark.parametrize("family", ["resnet", "vit", "swin", "hiera", "mambaout"])
def test_maps_follow_the_image(family):
    """Places keep their place: a change in the last corner moves that corner's features most."""
    model, size, *_ = build(family)
    model.eval()
    first, second = images(size, n=1), images(size, n=1)
    second[..., -16:, -16:] += 3
    with torch.no_grad():
        for one, other in zip(model.trunk(first)[:2], model.trunk(second)[:2], strict=True):
            moved = (one - other).norm(dim=1)[0]
            assert moved.argmax() == moved.numel() - 1


def test_the_layout_is_seen_where_a_model_says_it_wrongly():
    trunk = Trunk("test_mambaout").eval()
    expected = trunk(images((64, 96))).features
    trunk.model.output_fmt = "NLC"
    torch.testing.assert_close(trunk(images((64, 96))).features, expected, rtol=0, atol=0)


def test_intermediate_blocks_of_a_vit_are_normalised():
    model = AttentionEmbedder(
        "test_vit", embedding_dim=8, feature_index=2, img_size=64, pooling="average"
    ).eval()
    with torch.no_grad():
        out = model.trunk(images((64, 64)))
        maps = model.trunk.model.forward_intermediates(
            images((64, 64)), indices=[2], norm=True, intermediates_only=True
        )[0]
    torch.testing.assert_close(out.feature_maps, maps)
    assert not torch.equal(out.feature_maps, out.features)


def test_feature_index_picks_the_stage():
    strides = [4, 8, 16, 32]
    for index, stride in enumerate(strides):
        for given in (index, index - 4):
            trunk = Trunk("test_convnext", feature_index=given)
            assert trunk(images((64, 64))).feature_maps.shape[2:] == (64 // stride,) * 2
    with pytest.raises(ValueError, match=r"feature_index=4 must be in -4\.\.3.*\[4, 8, 16, 32\]"):
        Trunk("test_convnext", feature_index=4)


@pytest.mark.parametrize("name", ["test_vit2", "beitv2_base_patch16_224"])
def test_places_of_average_pooled_vits_are_normalised(name):
    kwargs = {"depth": 2, "embed_dim": 32, "num_heads": 2} if "beit" in name else {}
    trunk = AttentionEmbedder(name, embedding_dim=8, img_size=32, **kwargs).eval().trunk
    maps = trunk(images((32, 32))).feature_maps
    torch.testing.assert_close(maps.std(1, correction=0), torch.ones(2, 2, 2), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tresnet_m", "crossvit_9_240", "coat_lite_mini", "efficientvim_m1"]
)
def test_families_with_ways_of_their_own(name):
    """Folded pixels before the first convolution, a list instead of final features."""
    with torch.device("meta"):
        trunk = Trunk(name)
    channels, *size = trunk.data_config["input_size"]
    assert channels == 3
    out = trunk.eval()(torch.empty(2, 3, *size, device="meta"))
    assert out.features.shape[:2] == (2, trunk.num_features)
    assert out.feature_maps.shape[:2] == (2, trunk.map_channels)
    assert out.feature_maps.shape[2] >= size[0] // 16


@pytest.mark.parametrize("name", ["gemma4_vit_167m", "gemma4_vit_167m_enc"])
def test_a_model_that_reads_its_grid_off_its_data(name):
    """It can not be probed without data; final features are places without prefix tokens."""
    model = AttentionEmbedder(
        name, embedding_dim=8, img_size=96, depth=2, embed_dim=32, num_heads=2
    )
    for size, grid in (((96, 96), (6, 6)), ((48, 144), (3, 9))):
        out = check_output(model, images(size))
        assert out.feature_maps.shape == (2, 32, *grid)
        assert model.trunk(images(size)).features.shape == (2, 32, *grid)
    out.embeddings.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if name.endswith("_enc"):  # it has no head to pool by
        output = model.trunk(images((96, 96)))
        assert output.pooled is None
        expected = F.normalize(output.features.mean((2, 3)))
        torch.testing.assert_close(model(images((96, 96))), expected)


def test_a_timm_too_old_for_a_model(monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *args, **kwargs: nn.Flatten())
    with pytest.raises(ValueError, match=r"return feature maps of 'test_nfnet': upgrade timm"):
        Trunk("test_nfnet")


def test_a_backbone_coarser_than_16_takes_its_finest():
    assert Trunk("test_vit", patch_size=32, img_size=64).feature_index == 5


@pytest.mark.parametrize("name", ["resnet", "mobilenetv3", "vit pooled", "swin"])
def test_one_pass_of_the_backbone(name):
    model, size, *_ = build(name)
    calls = []
    stem = next(m for m in model.trunk.modules() if isinstance(m, nn.Conv2d))
    stem.register_forward_hook(lambda *_: calls.append(1))
    model.forward_features(images(size))
    assert len(calls) == 1


class Plain(nn.Module):
    """What a user may bring: no timm, maps out, a list if asked."""

    def __init__(self, channels=3, stages=False):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.BatchNorm2d(10))
        self.stages = stages

    def forward(self, x):
        maps = self.first(x)
        last = self.second(maps)
        return [maps, last] if self.stages else last


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_own_module(channels):
    model = AttentionEmbedder(Plain(channels), embedding_dim=8)
    out = check_output(model, images((33, 21), channels))
    assert out.feature_maps.shape == (2, 10, 9, 6)
    assert model.data_config["input_size"] == (channels, 224, 224)
    out.embeddings.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_own_module_with_stages():
    model = AttentionEmbedder(
        Plain(stages=True), embedding_dim=8, feature_index=0, pooling="average"
    )
    assert check_output(model, images((32, 32))).feature_maps.shape == (2, 6, 16, 16)
    assert model.trunk.num_features == 10
    with pytest.raises(ValueError, match=r"feature_index=2 must be in -2\.\.1: .* 2 map"):
        AttentionEmbedder(Plain(stages=True), embedding_dim=8, feature_index=2)


@pytest.mark.parametrize("family", ["resnet", "efficientnet", "convnext", "swin"])
def test_covariance_pooling_ends_the_backbone_at_its_maps(family):
    model, size, *_ = build(family, pooling="covariance")
    whole, *_ = build(family, pooling="average")
    with torch.no_grad():
        output = model.eval().trunk(images(size))
        maps = whole.eval().trunk(images(size)).feature_maps
    assert output.features is output.feature_maps
    torch.testing.assert_close(output.feature_maps, maps, rtol=1e-5, atol=1e-5)

    def size_of(module):
        return sum(p.numel() for p in module.trunk.parameters())

    assert size_of(model) < size_of(whole)


def test_own_module_is_left_as_it_was():
    module = Plain().eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.first.train()
    model = AttentionEmbedder(module, embedding_dim=8)
    assert model.trunk.model is module
    assert module.first.training
    assert not module.second.training
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_own_module_that_the_probe_without_data_can_not_run():
    class ByNumpy(Plain):
        def forward(self, x):
            return super().forward(torch.from_numpy(x.detach().numpy()))

    assert AttentionEmbedder(ByNumpy(), embedding_dim=8).trunk.num_features == 10


@pytest.mark.parametrize("result", [torch.zeros(1, 5), "maps"])
def test_own_module_with_other_output(result):
    class Wrong(nn.Module):
        def forward(self, x):
            return result

    with pytest.raises(ValueError, match=r"must return \(N, C, H, W\) maps or a list"):
        AttentionEmbedder(Wrong(), embedding_dim=8)


def test_timm_module_and_features_only_net():
    module = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    model = AttentionEmbedder(module, embedding_dim=8)
    assert check_output(model, images((64, 64), 1)).feature_maps.shape[2:] == (4, 4)
    model(images((64, 64), 1)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    net = timm.create_model("test_resnet", features_only=True, out_indices=(2, 4))
    assert check_output(
        AttentionEmbedder(net, embedding_dim=8, feature_index=0), images((64, 64))
    ).attention.shape == (
        2,
        8,
        8,
    )


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", ["checkpoint", "no_grad"])
def test_nothing_is_removed_where_the_graph_does_not_show_what_is_used(how):
    module = timm.create_model("test_resnet")
    blocks = module.layer1.forward
    if how == "no_grad":
        module.forward_intermediates = torch.no_grad()(module.forward_intermediates)
    else:  # the weights of the first blocks are no inputs of it
        module.layer1.forward = lambda x: checkpoint(blocks, x, use_reentrant=True)
    before = [name for name, _ in module.named_parameters()]
    trunk = Trunk(module)
    assert [name for name, _ in trunk.model.named_parameters()] == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_built_without_gradients_ends_at_its_maps_too(mode):
    expected = AttentionEmbedder("test_resnet", embedding_dim=16).state_dict()
    with mode():
        found = AttentionEmbedder("test_resnet", embedding_dim=16).state_dict()
    assert list(found) == list(expected)
