from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save_file

from pml_tacl.models import AttentionEmbedder, Trunk


def images(channels=3):
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source():
    torch.manual_seed(3)
    return timm.create_model("test_resnet").eval()


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
def test_local_file_with_classifier(tmp_path, source, suffix):
    path = tmp_path / f"weights.{suffix}"
    state = source.state_dict()
    assert any(key.startswith("fc.") for key in state)
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    trunk = Trunk("test_resnet", path if suffix == "pth" else str(path)).eval()
    torch.testing.assert_close(trunk(images()).features, source.forward_features(images()))
    assert "state_dict" not in trunk.model.pretrained_cfg


@pytest.mark.parametrize(
    "name", ["test_vit2", "test_convnext", "mobilenetv3_small_050", "test_nfnet"]
)
def test_other_families(tmp_path, name):
    kwargs = {"img_size": 64} if "vit" in name else {}
    source = timm.create_model(name, **kwargs).eval()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    trunk = Trunk(name, tmp_path / "w.pth", **kwargs).eval()
    mine, theirs = trunk(images()).features, source.forward_features(images())
    if theirs.ndim == 3:
        theirs = source.fc_norm(theirs)  # ours comes before pooling
        theirs = theirs[:, source.num_prefix_tokens :].transpose(1, 2).reshape(mine.shape)
    torch.testing.assert_close(mine, theirs)


def test_classifier_of_another_size_and_none(tmp_path):
    source = timm.create_model("test_resnet", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "seven.pth")
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "none.pth")
    Trunk("test_resnet", tmp_path / "seven.pth")
    Trunk("test_resnet", tmp_path / "none.pth")


def test_channels_and_size_are_adapted_by_timm(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    gray = Trunk("test_resnet", tmp_path / "w.pth", in_chans=1).eval()
    one = images(1)
    torch.testing.assert_close(
        gray(one).features, source.forward_features(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4
    )
    vit = timm.create_model("test_vit", img_size=96)
    torch.save(vit.state_dict(), tmp_path / "v.pth")
    resized = Trunk("test_vit", tmp_path / "v.pth", img_size=64)
    assert resized(images()).features.shape[2:] == (4, 4)
    torch.testing.assert_close(
        resized.model.patch_embed.proj.weight, vit.patch_embed.proj.weight, rtol=0, atol=0
    )


def test_missing_trunk_weights_are_named(tmp_path, source):
    state = source.state_dict()
    del state["layer2.0.conv2.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"does not fit 'test_resnet'.*layer2\.0\.conv2\.weight"
    ) as info:
        AttentionEmbedder("test_resnet", embedding_dim=8, pretrained=tmp_path / "w.pth")
    assert "\n" not in str(info.value)


def test_weights_of_another_model(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit 'test_convnext'"):
        Trunk("test_convnext", tmp_path / "w.pth")


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Trunk("test_resnet", tmp_path / "nothing.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(OSError, match="is no readable state dict") as info:
            Trunk("test_resnet", tmp_path / name)
        assert "\n" not in str(info.value)


def test_pickled_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"weight": Code()}, tmp_path / "w.pth")
    with pytest.raises(OSError, match="is no readable state dict"):
        Trunk("test_resnet", tmp_path / "w.pth")


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), OSError("offline\nmode"), ConnectionError("refused")]
)
def test_offline(monkeypatch, error):
    def create_model(*args, **kwargs):
        raise error

    monkeypatch.setattr("timm.create_model", create_model)
    with pytest.raises(OSError, match=r"no weights for 'test_resnet'.*pretrained='weights") as info:
        AttentionEmbedder("test_resnet", embedding_dim=8, pretrained=True)
    assert "\n" not in str(info.value)


def test_no_weights_at_timm():
    name = "vit_base_patch32_plus_256"  # timm has none for it
    with pytest.raises(OSError, match=rf"no weights for '{name}' \(No pretrained weights exist"):
        Trunk(name, True, depth=1)


def test_other_errors_are_not_hidden():
    with pytest.raises(TypeError, match="no_such_argument"):
        Trunk("test_resnet", True, no_such_argument=3)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'resnet5O' is no timm model: did you mean .*resnet50"):
        AttentionEmbedder("resnet5O")
    with pytest.raises(ValueError, match=r"timm.list_models\(\) lists them"):
        AttentionEmbedder("$$$$")
    with pytest.raises(ValueError, match=r"backbone='test_resnet\.nope': .*nope"):
        Trunk("test_resnet.nope")
    with pytest.raises(TypeError, match="pretrained must be True, False or a path, got 3"):
        AttentionEmbedder("test_resnet", pretrained=3)


@pytest.mark.parametrize("key", ["num_classes", "features_only"])
def test_arguments_about_the_head(key):
    with pytest.raises(ValueError, match=f"{key}=.* can not be set: the trunk has no head"):
        Trunk("test_resnet", **{key: 1})
