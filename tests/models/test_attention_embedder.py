import copy
import json
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.inference import InferenceModel
from torch import nn
from torch.nn.parallel import scatter_gather
from torchvision.transforms import v2

from pml_tacl.models import AttentionEmbedder, EmbedderOutput, TrunkOutput


def images(n=2, size=64, channels=3, seed=1):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AttentionEmbedder("test_resnet", embedding_dim=16)


class Brightness(nn.Module):
    """An attention of a user's own, with nothing to learn."""

    def forward(self, trunk_output):
        return trunk_output.feature_maps.mean(1)


class TestModules:
    def test_trunk_and_embedder_are_the_model(self, model):
        model.eval()
        x = images()
        out = model.forward_features(x)
        assert isinstance(out, EmbedderOutput)
        trunk_output = model.trunk(x)
        assert isinstance(trunk_output, TrunkOutput)
        torch.testing.assert_close(model.embedder(trunk_output), model(x), rtol=0, atol=0)
        for mine, other in zip(out, model.embedder.forward_features(trunk_output), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, model, copied):
        model.eval()
        torch.testing.assert_close(copied(model)(images()), model(images()), rtol=0, atol=0)

    def test_inference_model(self, model):
        model.eval()
        inference = InferenceModel(model.trunk, model.embedder)
        inference.train_knn(images(5))
        _, nearest = inference.get_nearest_neighbors(images(5), k=1)
        assert nearest.flatten().tolist() == [0, 1, 2, 3, 4]

    def test_pml_tester(self, model):
        tester = GlobalEmbeddingSpaceTester(dataloader_num_workers=0, batch_size=3)
        data = [(x, i % 2) for i, x in enumerate(images(6))]
        embeddings, labels = tester.get_all_embeddings(data, model.trunk, model.embedder)
        assert embeddings.shape == (6, 96)
        model.eval()
        torch.testing.assert_close(embeddings.cpu(), model(images(6)).detach())
        assert labels.flatten().tolist() == [0, 1] * 3

    def test_data_parallel_gathers_the_outputs(self, model, monkeypatch):
        """As on two devices: only the copy between them is replaced."""
        monkeypatch.setattr(
            scatter_gather.Gather, "apply", lambda device, dim, *parts: torch.cat(parts, dim)
        )
        model.eval()
        parts = [model.forward_features(part) for part in images(4).chunk(2)]
        gathered = scatter_gather.gather(parts, "cpu")
        assert isinstance(gathered, EmbedderOutput)
        for mine, other in zip(gathered, model.forward_features(images(4)), strict=True):
            torch.testing.assert_close(mine, other)

    @pytest.mark.slow
    def test_compile(self, model):
        model.eval()
        x = images()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))

    def test_export_with_a_dynamic_batch(self, model):
        model.eval()
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(images(5)), model(images(5)))

    def test_channels_last(self, model):
        model.eval()
        expected = model(images())
        model.to(memory_format=torch.channels_last)
        actual = model(images().to(memory_format=torch.channels_last))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_batch_of_one_and_tiny_images(self, model):
        model.eval()
        for size in (8, 16, 33):
            out = model.forward_features(images(1, size))
            assert out.embeddings.isfinite().all()
            torch.testing.assert_close(out.attention.sum(), torch.tensor(1.0))

    def test_empty_batch(self, model):
        out = model.eval().forward_features(images(0))
        assert out.embeddings.shape == (0, 96)
        assert out.attention.shape == (0, 4, 4)

    def test_gradient_checkpointing(self):
        torch.manual_seed(0)
        model = AttentionEmbedder("test_vit", embedding_dim=8, img_size=64)
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            assert model.trunk.model.grad_checkpointing is enable
            model.zero_grad()
            model(images())[:, 0].sum().backward()
            gradients.append(model.trunk.model.patch_embed.proj.weight.grad.clone())
        torch.testing.assert_close(*gradients)
        with pytest.raises(ValueError, match="backbone Conv2d has no gradient checkpointing: use"):
            AttentionEmbedder(nn.Conv2d(3, 4, 3), embedding_dim=8).set_grad_checkpointing()


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("pooling", ["backbone", "average", "covariance"])
    def test_autocast(self, pooling, dtype):
        torch.manual_seed(0)
        model = AttentionEmbedder("test_resnet", embedding_dim=16, pooling=pooling).eval()
        if pooling == "average":
            model.embedder.attention.score.weight.data.normal_(generator=torch.manual_seed(0))
        with torch.no_grad(), torch.autocast("cpu", dtype):
            out = model.forward_features(images())
        exact = model.forward_features(images())
        assert out.embeddings.dtype == out.attention.dtype == torch.float32
        torch.testing.assert_close(out.embeddings.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(out.attention.sum((1, 2)), torch.ones(2))
        torch.testing.assert_close(out.embeddings, exact.embeddings, rtol=0, atol=0.05)

    @pytest.mark.parametrize(
        "attention", ["border", "relative_border", "pool", "none", "distinctive", Brightness()]
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_types(self, attention, dtype):
        pooling = "average" if attention == "pool" else "backbone"
        model = AttentionEmbedder("test_resnet", attention=attention, pooling=pooling)
        model = model.eval().to(dtype)
        out = model.forward_features(images().to(dtype))
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert out.embeddings.dtype == out.attention.dtype == expected
        assert out.feature_maps.dtype == dtype

    def test_own_attention_with_weights_under_autocast(self):
        class Scored(nn.Conv2d):
            def forward(self, trunk_output):
                return super().forward(trunk_output.feature_maps)[:, 0]

        model = AttentionEmbedder(
            "test_resnet", embedding_dim=16, attention=Scored(192, 1, 1), pooling="average"
        )
        with torch.autocast("cpu", torch.bfloat16):
            model(images())[:, 0].sum().backward()
        assert model.embedder.attention.weight.grad.abs().sum() > 0


class TestBatchNorm:
    def test_frozen(self):
        model = AttentionEmbedder("test_resnet", embedding_dim=8, freeze_batchnorm=True)
        before = copy.deepcopy(model.trunk.state_dict())
        optimizer = torch.optim.SGD(model.parameter_groups(0.5))
        model.train()
        model.trunk.train()
        model(images())[:, 0].sum().backward()
        optimizer.step()
        norms = [n for n, m in model.trunk.named_modules() if isinstance(m, nn.BatchNorm2d)]
        after = model.trunk.state_dict()
        kept = [key for key in before if key.rpartition(".")[0] in norms]
        assert len(kept) > 20
        assert all(torch.equal(before[key], after[key]) for key in kept)
        stem = (
            model.trunk.model.conv1[0]
            if isinstance(model.trunk.model.conv1, nn.Sequential)
            else (model.trunk.model.conv1)
        )
        assert stem.training
        assert stem.weight.grad is not None

    def test_not_frozen_unless_asked(self, model):
        norm = next(m for m in model.trunk.modules() if isinstance(m, nn.BatchNorm2d))
        model(images())
        assert norm.num_batches_tracked == 1
        assert norm.weight.requires_grad


class TestParameterGroups:
    def test_rates(self):
        model = AttentionEmbedder("test_resnet", embedding_dim=16, pooling="average")
        trunk, head = model.parameter_groups(0.1, head_lr=0.3)
        assert (trunk["lr"], head["lr"]) == (0.1, 0.3)
        assert len(trunk["params"]) == len(list(model.trunk.parameters()))
        assert {id(p) for p in head["params"]} == {id(p) for p in model.embedder.parameters()}
        assert model.parameter_groups(0.1)[1]["lr"] == 0.1

    def test_nothing_but_the_trunk_is_trained_by_default(self, model):
        (group,) = model.parameter_groups(0.1, head_lr=0.3)
        assert (group["name"], group["lr"]) == ("trunk", 0.1)
        assert len(group["params"]) == len(list(model.parameters()))

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
    def test_layer_decay(self, name):
        model = AttentionEmbedder(name, embedding_dim=8, pooling="average")
        groups = model.parameter_groups(1.0, head_lr=2.0, layer_decay=0.5)
        given = [id(p) for group in groups for p in group["params"]]
        assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        rate = {id(p): group["lr"] for group in groups for p in group["params"]}
        first = next(p for p in model.trunk.parameters() if p.ndim == 4)
        last = list(model.trunk.parameters())[-1]
        assert rate[id(last)] == 1.0
        assert rate[id(first)] == min(rate.values()) < 0.5
        assert rate[id(model.embedder.projection.weight)] == 2.0
        torch.optim.AdamW(groups)

    def test_errors(self, model):
        for wrong in (1.5, 0, "a"):
            with pytest.raises(ValueError, match=rf"layer_decay .* in \(0, 1\], got {wrong!r}"):
                model.parameter_groups(0.1, layer_decay=wrong)
        with pytest.raises(ValueError, match="head_lr must be at least 0, got -1"):
            model.parameter_groups(0.1, head_lr=-1)
        with pytest.raises(ValueError, match="layer_decay must be None: Conv2d"):
            AttentionEmbedder(nn.Conv2d(3, 4, 3), embedding_dim=8).parameter_groups(
                0.1, layer_decay=0.5
            )


class TestTransform:
    def test_matches_timms_own(self):
        """Against timm's transform, which resizes with PIL as ours does."""
        model = AttentionEmbedder("test_vit", embedding_dim=8)
        rng = np.random.default_rng(0)
        image = Image.fromarray(rng.integers(0, 256, (201, 300, 3), dtype=np.uint8))
        theirs = timm.data.create_transform(
            **timm.data.resolve_data_config({}, model=model.trunk.model)
        )
        torch.testing.assert_close(model.transform()(image), theirs(image))

    @pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "1"])
    def test_any_image(self, model, mode):
        size = (50, 90)
        out = model.transform(image_size=32)(Image.new(mode, size))
        assert out.shape == (3, 32, 32)
        assert type(out) is torch.Tensor

    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
    def test_channels(self, channels, mode):
        model = AttentionEmbedder("test_resnet", embedding_dim=8, in_chans=channels)
        assert model.transform(image_size=(24, 40))(Image.new(mode, (70, 80))).shape == (
            channels,
            24,
            40,
        )

    def test_training(self, model):
        transform = model.transform(training=True, image_size=32)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        torch.manual_seed(0)
        first, second = transform(image), transform(image)
        assert first.shape == (3, 32, 32)
        assert not torch.equal(first, second)

    def test_img_size_is_known(self):
        model = AttentionEmbedder("test_vit", embedding_dim=8, img_size=(64, 32))
        assert model.data_config["input_size"] == (3, 64, 32)
        assert model(model.transform()(Image.new("RGB", (99, 99)))[None]).shape == (1, 64)

    def test_pickles_for_workers(self, model):
        transform = pickle.loads(pickle.dumps(model.transform(training=True)))
        assert isinstance(transform, v2.Transform)

    @pytest.mark.parametrize("size", [0, (0, 32), -1, (3, 4, 5), "32", 2.5])
    @pytest.mark.parametrize(
        "call",
        [
            lambda model, size: model.transform(image_size=size),
            lambda model, size: model.grid(size),
            lambda model, size: model.cell_offset(size),
        ],
    )
    def test_wrong_size(self, model, call, size):
        with pytest.raises(ValueError, match="image_size must be an int above 0 or"):
            call(model, size)


class TestSaving:
    @pytest.mark.parametrize("attention", ["pool", "none", "distinctive"])
    @pytest.mark.parametrize("embedding_dim", [8, None])
    def test_round_trip(self, tmp_path, attention, embedding_dim):
        model = AttentionEmbedder(
            "test_convnext",
            embedding_dim=embedding_dim,
            attention=attention,
            pooling="average" if attention == "pool" else "backbone",
            feature_index=1,
            drop_path_rate=0.1,
        ).eval()
        if attention == "distinctive":
            model.embedder.set_attention_references(model.trunk(images(3, seed=5)).feature_maps)
        assert model.save_pretrained(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        again = AttentionEmbedder.from_pretrained(tmp_path / "a" / "b")
        assert not again.training
        assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
            "config.json",
            "model.safetensors",
        ]
        for mine, other in zip(
            model.forward_features(images()), again.forward_features(images()), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)

    def test_own_modules(self, tmp_path):
        def backbone():
            return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6))

        model = AttentionEmbedder(backbone(), embedding_dim=8, attention=Brightness()).eval()
        model.save_pretrained(tmp_path)
        again = AttentionEmbedder.from_pretrained(
            tmp_path, backbone=backbone(), attention=Brightness()
        )
        torch.testing.assert_close(model(images()), again(images()), rtol=0, atol=0)
        with pytest.raises(
            ValueError, match=r"needs backbone=\.\.\.: the model was built with a module"
        ):
            AttentionEmbedder.from_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=r"needs attention=\.\.\.: the model was built with a module"
        ):
            AttentionEmbedder.from_pretrained(tmp_path, backbone=backbone())
        with pytest.raises(ValueError, match=r"weights do not fit.*size mismatch"):
            AttentionEmbedder.from_pretrained(
                tmp_path,
                backbone=nn.Sequential(nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6)),
                attention=Brightness(),
            )

    def test_newer_version_and_no_model(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"contains no config.json"):
            AttentionEmbedder.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["format_version"] == 2
        (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 3}))
        with pytest.raises(
            ValueError, match="format version 3, but this pml_tacl reads versions up to 2: upgrade"
        ):
            AttentionEmbedder.from_pretrained(tmp_path)

    def test_files_have_the_mode_of_others_and_are_whole_or_not_there(self, tmp_path, monkeypatch):
        model = AttentionEmbedder("test_resnet", embedding_dim=8)
        before = os.umask(0o027)
        try:
            model.save_pretrained(tmp_path / "model")
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
        assert modes == {"model.safetensors": 0o640, "config.json": 0o640}
        content = (tmp_path / "model" / "model.safetensors").read_bytes()
        synced = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle) or fsync(handle))
        model.save_pretrained(tmp_path / "model")
        assert len(synced) == 4  # both files, and the folder after each
        monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
        nn.init.zeros_(next(model.parameters()))
        with pytest.raises(ZeroDivisionError):
            model.save_pretrained(tmp_path / "model")
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == content
        assert len(list((tmp_path / "model").iterdir())) == 2

    def test_arguments_that_are_no_json(self, tmp_path):
        model = AttentionEmbedder("test_vit", embedding_dim=8, norm_layer=nn.LayerNorm)
        with pytest.raises(ValueError, match="cannot be saved as JSON"):
            model.save_pretrained(tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_never_loads_the_pretrained_weights_again(self, tmp_path):
        source = timm.create_model("test_resnet")
        torch.save(source.state_dict(), tmp_path / "w.pth")
        AttentionEmbedder(
            "test_resnet", embedding_dim=8, pretrained=tmp_path / "w.pth"
        ).save_pretrained(tmp_path / "run")
        (tmp_path / "w.pth").unlink()
        AttentionEmbedder.from_pretrained(tmp_path / "run")


class TestErrors:
    def test_wrong_arguments(self):
        with pytest.raises(
            TypeError, match="backbone must be a timm model name or a module, got 3"
        ):
            AttentionEmbedder(3)
        with pytest.raises(ValueError, match="embedding_dim must be None or at least 1, got 0"):
            AttentionEmbedder("test_resnet", embedding_dim=0)
        with pytest.raises(TypeError, match=r"pretrained must be .* given as embedding_dim=64"):
            AttentionEmbedder("test_resnet", 64)
        with pytest.raises(ValueError, match=r"pooling must be .*, got 'max'"):
            AttentionEmbedder("test_resnet", pooling="max")
        with pytest.raises(ValueError, match=r"attention must be .*, got 'self'"):
            AttentionEmbedder("test_resnet", attention="self")
        with pytest.raises(ValueError, match="drop_rate needs a timm model name"):
            AttentionEmbedder(nn.Conv2d(3, 4, 3), drop_rate=0.1)
        with pytest.raises(ValueError, match="pretrained needs a timm model name"):
            AttentionEmbedder(nn.Conv2d(3, 4, 3), pretrained=True)

    def test_wrong_images(self, model):
        with pytest.raises(
            ValueError, match=r"images must be \(N, C, H, W\), got shape \(3, 64, 64\)"
        ):
            model(images()[0])
        with pytest.raises(
            ValueError, match="channels of images must be 3 for this backbone, got 1"
        ):
            model(images(channels=1))
