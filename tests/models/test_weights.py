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
        with pytest.raises(OSError, match="is not a readable state dict") as info:
            Trunk("test_resnet", tmp_path / name)
        assert "\n" not in str(info.value)


def test_pickled_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"weight": Code()}, tmp_path / "w.pth")
    with pytest.raises(OSError, match="is not a readable state dict"):
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
    with pytest.raises(ValueError, match=r"'resnet5O' is not a timm model: did you mean .*t50"):
        AttentionEmbedder("resnet5O")
    with pytest.raises(ValueError, match=r"timm.list_models\(\) lists them"):
        AttentionEmbedder("$$$$")
    with pytest.raises(ValueError, match=r"backbone='test_resnet\.nope': .*nope"):
        Trunk("test_resnet.nope")
    with pytest.raises(TypeError, match="pretrained must be True, False or a path, got 3"):
        AttentionEmbedder("test_resnet", pretrained=3)


@pytest.mark.parametrize("key", ["num_classes", "features_only"])
def test_arguments_about_the_head(key):
    with pytest.raises(ValueError, match=f"{key}=.* cannot be set: the trunk has no head"):
        Trunk("test_resnet", **{key: 1})


@pytest.fixture
def nowhere(monkeypatch):
    """No way to any weights but the file: whoever asks is told on."""

    def asked(*args, **kwargs):
        raise AssertionError(f"asked for {args}")

    for name in ("load_state_dict_from_hf", "load_state_dict_from_url", "download_cached_file"):
        monkeypatch.setattr(f"timm.models._builder.{name}", asked)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", asked)
    monkeypatch.setattr("pml_tacl.models.weights.get_hf_file_metadata", asked)


def behind(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


FOREIGN = {
    "as it is": lambda s: s,
    "data parallel": lambda s: {"state_dict": behind("module.", s), "epoch": 3},
    "compiled": lambda s: behind("_orig_mod.", s),
    "compiled in parallel": lambda s: behind("module._orig_mod.", s),
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "average": lambda s: {"state_dict": zeros(s), "state_dict_ema": s},
    "average of torch's": lambda s: behind("module.", s) | {"n_averaged": torch.tensor(9)},
    "lightning": lambda s: {"state_dict": behind("model.", s)},
    "encoder": lambda s: behind("encoder.", s) | {"projector.0.weight": torch.ones(3, 3)},
    "backbone": lambda s: {"state_dict": behind("backbone.", s), "hyper_parameters": {"lr": 1}},
    "moco": lambda s: {
        "state_dict": behind("module.encoder_k.", zeros(s))
        | behind("module.encoder_q.", s)
        | {"module.queue": torch.ones(4, 4)}
    },
    "dino": lambda s: {
        "student": behind("module.backbone.", zeros(s)),
        "teacher": behind("backbone.", s) | {"head.mlp.0.weight": torch.ones(2, 2)},
    },
    "dino in one": lambda s: behind("student.", zeros(s)) | behind("teacher.", s),
    "byol": lambda s: behind("target_encoder.", zeros(s)) | behind("online_encoder.", s),
    "our trainer": lambda s: {"models": {"trunk": behind("model.", s)}, "format": 2},
    "another head": lambda s: s | {"mlp.0.weight": torch.ones(3, 3), "queue": torch.ones(2)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_files_of_other_projects(tmp_path, nowhere, source, kind):
    torch.save(FOREIGN[kind](source.state_dict()), tmp_path / "w.pth")
    mine = Trunk("test_resnet", tmp_path / "w.pth").model.state_dict()
    for key, value in mine.items():
        torch.testing.assert_close(value, source.state_dict()[key], rtol=0, atol=0)


REFUSED = {
    "nothing": (lambda s: {}, "it contains no weights"),
    "nothing inside": (lambda s: {"state_dict": {}, "epoch": 1}, "it contains no weights"),
    "a head": (
        lambda s: {"fc.weight": s["fc.weight"], "fc.bias": s["fc.bias"]},
        "it contains 0 of the 90 tensors of .*; its tensors are fc.weight, fc.bias",
    ),
    "a head elsewhere": (lambda s: {"state_dict": {"a.b.weight": torch.ones(3)}}, "a.b.weight"),
    "a quarter": (lambda s: dict([*s.items()][:20]), "20 of the 90 tensors .* are conv1.0.weight"),
    "most": (lambda s: dict([*s.items()][:70]), r"Missing key\(s\).*layer"),
    "a deeper one": (
        lambda s: s | {"layer2.7.conv1.weight": torch.ones(1)},
        r"Unexpected key\(s\).*layer2\.7\.conv1\.weight",
    ),
    "a token": (lambda s: s | {"reg_token": torch.ones(1)}, r"Unexpected key\(s\).*reg_token"),
    "two": (lambda s: behind("left.", s) | behind("right.", s), r"left\. and right\.: keep one"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_do_not_fill_the_backbone_are_refused(tmp_path, nowhere, source, kind):
    make, message = REFUSED[kind]
    torch.save(make(source.state_dict()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"does not fit 'test_resnet': .*{message}") as info:
        Trunk("test_resnet", tmp_path / "w.pth")
    assert "\n" not in str(info.value)


def test_our_saved_model_gives_its_backbone_where_that_is_whole(tmp_path, nowhere):
    model = AttentionEmbedder("test_resnet", embedding_dim=8)
    model.save_pretrained(tmp_path)
    again = AttentionEmbedder("test_resnet", tmp_path / "model.safetensors", embedding_dim=8)
    for key, value in model.trunk.state_dict().items():
        assert torch.equal(again.trunk.state_dict()[key], value), key


def test_our_saved_model_is_no_weights_file_where_its_backbone_was_cut(tmp_path, nowhere):
    AttentionEmbedder("test_resnet", pooling="covariance").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"from_pretrained\(FOLDER\) loads a saved model as it is"):
        AttentionEmbedder("test_resnet", embedding_dim=8, pretrained=tmp_path / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder: give the file in it"):
        AttentionEmbedder("test_resnet", embedding_dim=8, pretrained=tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "timm/test_resnet",
        "timm/test_resnet.r160_in1k",
        "hf-hub:timm/test_resnet.r160_in1k",
        "hf_hub:timm/test_resnet.r160_in1k",
        "HF-HUB:timm/test_resnet",
    ],
)
def test_names_of_the_hub_that_timm_knows_are_built_here(tmp_path, nowhere, source, name):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert Trunk(name).num_features == source.num_features
    trunk = Trunk(name, tmp_path / "w.pth")
    torch.testing.assert_close(trunk.model.conv1[0].weight, source.conv1[0].weight)


def test_other_names_of_the_hub(tmp_path, monkeypatch, source):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"'me/model' is not a timm model: .* 'hf-hub:me/model'"):
        Trunk("me/model")
    with pytest.raises(ValueError, match="local file, but backbone='hf_hub:me/m' is read from"):
        Trunk("hf_hub:me/m", tmp_path / "w.pth")
    with pytest.raises(OSError, match="backbone='local-dir:/none': no config of the model"):
        Trunk("local-dir:/none")
    offline(monkeypatch, [])
    with pytest.raises(OSError, match=r"backbone='hf_hub:me/m': no config .*\(no route\)"):
        Trunk("hf_hub:me/m")
    with pytest.raises(OSError, match=r"no weights for 'hf_hub:me/m' \(no route\)"):
        Trunk("hf_hub:me/m", True)


def test_a_wrong_tag_with_a_file(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"backbone='test_resnet\.nope': .*nope"):
        Trunk("test_resnet.nope", tmp_path / "w.pth")


def offline(monkeypatch, asked):
    def no_route(url, **kwargs):
        asked.append((url, kwargs))
        raise ConnectionError("no route")

    monkeypatch.setattr("pml_tacl.models.weights.get_hf_file_metadata", no_route)

    def unasked(*args, **kwargs):
        raise AssertionError(args)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", unasked)


def test_without_a_network_the_hub_is_asked_once(monkeypatch, tmp_path):
    asked = []
    offline(monkeypatch, asked)
    with pytest.raises(OSError, match=r"no weights for 'test_resnet' \(no route\)"):
        Trunk("test_resnet", True, cache_dir=tmp_path)
    ((url, kwargs),) = asked
    assert url.endswith("timm/test_resnet.r160_in1k/resolve/main/model.safetensors")
    assert kwargs["timeout"] <= 5


def test_weights_in_the_cache_need_no_network(monkeypatch, tmp_path, source):
    asked = []
    offline(monkeypatch, asked)
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    folder = repository / "snapshots" / "abc"
    folder.mkdir(parents=True)
    save_file(source.state_dict(), folder / "model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download", lambda **kwargs: folder / kwargs["filename"]
    )
    trunk = Trunk("test_resnet", True, cache_dir=tmp_path)
    torch.testing.assert_close(trunk.model.conv1[0].weight, source.conv1[0].weight)
    assert not asked


def test_a_hub_that_answers_is_left_to_timm(monkeypatch, tmp_path):
    class NotThere(Exception):
        response = "404"

    def answer(url, **kwargs):
        raise NotThere

    def create_model(*args, **kwargs):
        raise OSError("timm was asked")

    monkeypatch.setattr("pml_tacl.models.weights.get_hf_file_metadata", answer)
    monkeypatch.setattr("timm.create_model", create_model)
    with pytest.raises(OSError, match="timm was asked"):
        Trunk("test_resnet", True, cache_dir=tmp_path)
