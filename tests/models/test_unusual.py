"""Backbones and inputs that are built or used in unusual ways."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from pml_tacl import AttentionEmbedder, RetrievalCalculator, SiameseTransform
from pml_tacl.functional import to_image
from pml_tacl.miners import ContrastiveClusteringMiner
from pml_tacl.models.covariance import symmetric_eigen
from pml_tacl.utils.modes import evaluating


def shared_backbone():
    block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(block, block))


def test_modules_with_two_names_keep_their_weights():
    backbone = shared_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = AttentionEmbedder(backbone, embedding_dim=None, freeze_batchnorm=False)
    model.cell_offset(64)
    model.cell_offset(64, through_weights=True)
    for name, value in backbone.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])
    assert torch.isfinite(model(torch.rand(2, 3, 64, 64))).all()


@pytest.mark.slow
def test_coat_retrieves_like_timm():
    own = timm.create_model("coat_lite_tiny", num_classes=0, img_size=64).eval()
    model = AttentionEmbedder("coat_lite_tiny", img_size=64).eval()
    model.trunk.model.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(own(x), dim=1), model(x))


def test_a_model_without_pooling_is_pooled():
    own = timm.create_model("test_resnet", num_classes=0, global_pool="")
    model = AttentionEmbedder(own).eval()
    x = torch.rand(4, 3, 64, 64)
    assert model(x).ndim == 2
    model.fit_projection([x], progress=False)
    assert model(x).ndim == 2


def test_features_of_few_images_that_are_mostly_zero():
    for seed in (4, 6, 13):
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(4, 1280, generator=generator)
        x = F.normalize(x * (torch.rand(4, 1280, generator=generator) < 0.04)).double()
        covariance = x.T @ x / 4 - x.mean(0)[:, None] * x.mean(0)
        values, vectors = symmetric_eigen(covariance)
        torch.testing.assert_close(vectors * values @ vectors.T, covariance, atol=1e-10, rtol=0)


def test_the_second_solver(monkeypatch):
    def fail(_):
        raise torch.linalg.LinAlgError("failed to converge")

    matrix = torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
    expected = torch.linalg.eigvalsh(matrix)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = symmetric_eigen(matrix)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(vectors * values @ vectors.T, matrix)


@pytest.mark.slow
def test_attention_before_the_class_token_is_added():
    model = AttentionEmbedder("cait_xxs24_224", img_size=64, depth=2).eval()
    seen = []
    dropout = list(model.trunk.model.blocks)[-1].attn.attn_drop
    dropout.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = model.self_attention(torch.randn(1, 3, 64, 64)).flatten()
    expected = seen[0].mean(2).mean(1)[0]
    torch.testing.assert_close(found, expected / expected.sum())


def test_no_checkpointing_is_an_error_in_a_line():
    model = AttentionEmbedder("test_resnet")

    def refuse(enable):
        assert not enable, "gradient checkpointing not supported"

    model.trunk.model.set_grad_checkpointing = refuse
    with pytest.raises(ValueError, match=r"no gradient checkpointing .*not supported"):
        model.set_grad_checkpointing()


def test_modules_do_what_their_own_train_does():
    class Merging(nn.Conv2d):
        merged = False

        def train(self, mode=True):
            super().train(mode)
            self.merged = not mode
            return self

    model = nn.Sequential(Merging(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[1].eval()
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged
    assert [module.training for module in model] == [True, False]


def test_torchvisions_names_of_interpolation():
    given = SiameseTransform(32, 2, interpolation=v2.InterpolationMode.BICUBIC)
    assert given.interpolation == v2.InterpolationMode.BICUBIC


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_half_precision_are_enlarged_like_others(dtype):
    maps = torch.rand(1, 14, 14).to(dtype)
    exact = to_image(maps.float(), (224, 224), (0.3, 0.3))
    found = to_image(maps, (224, 224), (0.3, 0.3))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=4e-3, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_large_whole_embeddings_are_compared_exactly(dtype):
    rows = np.array([[2**24], [2**24 + 1], [2**24 + 3]], dtype)
    calculator = RetrievalCalculator(include="precision_at_1")
    assert calculator.get_accuracy(rows, [0, 1, 1])["precision_at_1"] == 0.5


def test_no_limit_of_ambiguity_keeps_images_on_another_centroid():
    miner = ContrastiveClusteringMiner(max_ambiguity=float("inf"))
    miner.set_centroids(torch.eye(3))
    found = miner(torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 1, 1, 0]))
    assert len(found[0]) == 4
