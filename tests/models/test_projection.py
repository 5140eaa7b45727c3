"""Covariance pooling in a model, and the whitening that its projection starts as."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pml_tacl import AttentionEmbedder
from pml_tacl.functional import border_similarity, covariance_pooling
from pml_tacl.models import Embedder, TrunkOutput


def images(n=24, seed=0):
    """Of a few colours each, so that features differ in more than noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, (64, 64)) + 0.1 * torch.randn(n, 3, 64, 64, generator=generator)


def build(embedding_dim=16, pooling="covariance", **kwargs):
    torch.manual_seed(0)
    return AttentionEmbedder(
        "test_resnet", embedding_dim=embedding_dim, pooling=pooling, **kwargs
    ).eval()


def pooled(model, x):
    with torch.no_grad():
        return model.embedder.pool(model.trunk(x))[0].double()


def test_embedding_from_the_formula():
    embedder = Embedder(6, 5, 4)  # the default: covariance, by what is unlike the border
    feature_maps = torch.randn(2, 5, 7, 6, generator=torch.Generator().manual_seed(0))
    out = embedder.forward_features(TrunkOutput(torch.randn(2, 6, 3, 3), feature_maps))
    for i in range(2):
        b = border_similarity(feature_maps[i : i + 1])[0].double()
        kept = torch.sigmoid(-4 * (b - b.mean()) / b.std(correction=0))
        attention = kept / kept.sum()
        torch.testing.assert_close(out.attention[i].double(), attention, rtol=1e-4, atol=1e-6)
        reduced = torch.einsum(
            "chw,dc->dhw", feature_maps[i], embedder.covariance.reduce.weight[:, :, 0, 0]
        )
        second = covariance_pooling(reduced[None].double(), attention[None])[0]
        expected = second.float() / second.float().norm() @ embedder.projection.weight.T
        expected = expected + embedder.projection.bias
        torch.testing.assert_close(
            out.embeddings[i], expected / expected.norm(), rtol=1e-4, atol=1e-5
        )


def test_many_channels_are_reduced():
    embedder = Embedder(6, 100, None, pooling="covariance")
    assert embedder.embedding_dim == 64 * 65 // 2
    with torch.no_grad():
        out = embedder(TrunkOutput(torch.zeros(2, 6, 1, 1), torch.randn(2, 100, 3, 3)))
    assert out.shape == (2, 2080)


def test_fit_takes_the_principal_directions():
    embedder = Embedder(6, 70, None, pooling="covariance")
    spread = torch.arange(70.0) + 1
    rotation = torch.linalg.qr(torch.randn(70, 70, generator=torch.manual_seed(0)))[0]
    embedder.covariance.fit(rotation @ torch.diag(spread) @ rotation.T)
    rows = embedder.covariance.reduce.weight[:, :, 0, 0] @ rotation
    torch.testing.assert_close(rows[:, :6], torch.zeros(64, 6), atol=1e-4, rtol=0)  # the smallest
    torch.testing.assert_close(rows @ rows.T, torch.eye(64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", ["average", "covariance"])
class TestWhiten:
    def test_projections_are_centred_uncorrelated_and_nearly_alike_in_variance(self, pooling):
        model, x = build(6, pooling), images()
        model.fit_projection([x], shrinkage=1e-6)
        with torch.no_grad():
            features = pooled(model, x)
            found = features @ model.embedder.projection.weight.double().T
            found = found + model.embedder.projection.bias.double()
        covariance = found.T @ found / len(found)
        torch.testing.assert_close(found.mean(0), torch.zeros(6).double(), atol=1e-3, rtol=0)
        level = covariance.diagonal().mean()
        torch.testing.assert_close(covariance / level, torch.eye(6).double(), atol=2e-2, rtol=0)
        # Unit length on average, before the normalisation.
        assert found.square().sum(1).mean().item() == pytest.approx(1, abs=1e-2)

    def test_shrinkage_from_the_formula(self, pooling):
        model, x = build(6, pooling), images()
        model.fit_projection([x], shrinkage=0.3)
        features = pooled(model, x)
        centred = features - features.mean(0)
        moments = centred.T @ centred / len(x)
        values, vectors = torch.linalg.eigh(moments)
        values, vectors = values.flip(0)[:6], vectors.flip(1)[:, :6]
        rows = (vectors / (values + 0.3 * moments.trace() / len(moments)).sqrt()).T
        found = model.embedder.projection.weight.double()
        scale = found.norm() / rows.norm()
        # The sign of an eigenvector is free.
        torch.testing.assert_close(found.abs(), (scale * rows).abs().detach(), atol=1e-3, rtol=1e-2)

    def test_batches_do_not_matter_but_for_the_images_in_them(self, pooling):
        whole, parts, first = build(6, pooling), build(6, pooling), build(6, pooling)
        x = images()
        whole.fit_projection([x[:20]])
        parts.fit_projection([(part, "label") for part in x[:20].split(7)])
        first.fit_projection(x.split(7), max_images=20)
        for other in (parts, first):
            torch.testing.assert_close(
                other.embedder.projection.weight.abs(),
                whole.embedder.projection.weight.abs(),
                atol=1e-3,
                rtol=1e-3,
            )

    def test_more_dimensions_than_directions(self, pooling):
        features = build(None, pooling).embedder.embedding_dim
        model = build(features + 5, pooling)
        model.fit_projection([images()])
        assert (model.embedder.projection.weight[-5:] == 0).all()
        assert (model.embedder.projection.bias[-5:] == 0).all()
        embeddings = model(images(4))
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))

    def test_modes_and_gradients_are_left_as_they_were(self, pooling):
        model = build(6, pooling).train()
        model.embedder.eval()
        before = {name: buffer.clone() for name, buffer in model.trunk.named_buffers()}
        model.fit_projection([images()])
        assert model.trunk.training
        assert not model.embedder.training
        for name, buffer in model.trunk.named_buffers():
            torch.testing.assert_close(buffer, before[name])
        assert model.embedder.projection.weight.requires_grad
        assert model.embedder.projection.weight.grad is None

    def test_saved_and_loaded(self, pooling, tmp_path):
        model = build(6, pooling)
        model.fit_projection([images()])
        model.save_pretrained(tmp_path)
        loaded = AttentionEmbedder.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(images(3)), model(images(3)), rtol=0, atol=0)


def test_rare_detail_counts_after_whitening():
    """What differs between images by little, beside a strong common direction, is found."""
    torch.manual_seed(0)
    model = build(4, "average", attention="none")
    strong, weak = torch.randn(2, 3, 1, 1)
    kinds = torch.arange(40) % 2
    x = torch.randn(40, 1, 1, 1) * strong + 0.05 * (2.0 * kinds - 1)[:, None, None, None] * weak
    x = x.expand(40, 3, 64, 64)
    with torch.no_grad():

        def right():
            similar = model(x) @ model(x).T - 2 * torch.eye(40)
            return float((kinds[similar.argmax(1)] == kinds).float().mean())

        before = right()
        model.fit_projection([x], shrinkage=1e-4)
        assert right() > max(0.9, before)


def test_a_folder_written_before_pooling_was_chosen_loads(tmp_path):
    import json

    model = build(6, "average")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pooling"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AttentionEmbedder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images(3)), model(images(3)), rtol=0, atol=0)


class TestErrors:
    def test_pooling(self):
        with pytest.raises(ValueError, match=r"pooling must be .* got 'max'"):
            build(pooling="max")

    def test_whiten(self):
        model = build(6)
        before = copy.deepcopy(model.state_dict())
        for kwargs, message in [
            ({"max_images": 1}, "max_images must be .*2.* got 1"),
            ({"shrinkage": 0}, "shrinkage must be a finite number above 0, got 0"),
            ({"shrinkage": "a"}, "shrinkage must be a finite number above 0, got 'a'"),
        ]:
            with pytest.raises(ValueError, match=message):
                model.fit_projection([images()], **kwargs)
        with pytest.raises(ValueError, match="batches hold 1 images"):
            model.fit_projection([images(1)])
        with pytest.raises(ValueError, match="batches hold 0 images"):
            model.fit_projection([])
        with pytest.raises(ValueError, match="features are NaN or infinite"):
            model.fit_projection([images() * torch.nan])
        with pytest.raises(ValueError, match="batches hold 24 images whose features are all the s"):
            model.fit_projection([images()[:, :, :8, :8]])  # of one cell, which has no covariance
        torch.testing.assert_close(
            model.state_dict()["embedder.projection.weight"], before["embedder.projection.weight"]
        )
        with pytest.raises(ValueError, match="embedding_dim is None: there is no projection"):
            build(None, "average").fit_projection([images()])

    def test_images_are_left_alone(self):
        model, x = build(6), images()
        kept = x.clone()
        model.fit_projection([x])
        assert torch.equal(x, kept)


def test_the_projection_learns_on():
    model = build(6).train()
    model.fit_projection([images()])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.embedder.projection.weight.clone()
    model(images(4))[:, 0].sum().backward()
    assert all(p.grad is not None for p in model.embedder.parameters())
    optimizer.step()
    assert not torch.equal(model.embedder.projection.weight, before)
    assert isinstance(model.embedder.projection, nn.Linear)
