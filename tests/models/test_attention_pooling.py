import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pml_tacl.functional import border_similarity
from pml_tacl.models import Embedder, TrunkOutput
from pml_tacl.models.attention_pooling import background_score_against, resample_attention


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_resample(attention, size):
    """Each cell cut into pieces so small that every piece lies in one new cell."""
    n, old_h, old_w = attention.shape
    fine = attention.double().repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)
    fine = fine / (size[0] * size[1])
    return fine.view(n, size[0], old_h, size[1], old_w).sum((2, 4)).float()


@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (7, 7)), ((15, 9), (7, 4)), ((4, 4), (4, 4)), ((3, 5), (7, 2)), ((1, 1), (2, 3))],
)
class TestResample:
    def test_against_slow_reference(self, old, new):
        attention = maps(2, *old).flatten(1).softmax(1).view(2, *old)
        resampled = resample_attention(attention, new)
        torch.testing.assert_close(resampled, slow_resample(attention, new))
        torch.testing.assert_close(resampled.sum((1, 2)), torch.ones(2))

    def test_uniform_stays_uniform(self, old, new):
        uniform = torch.full((1, *old), 1 / (old[0] * old[1]))
        expected = torch.full((1, *new), 1 / (new[0] * new[1]))
        torch.testing.assert_close(resample_attention(uniform, new), expected)


class TestPool:
    def output(self, seed=0):
        return TrunkOutput(maps(2, 6, 3, 3, seed=seed), maps(2, 5, 7, 7, seed=seed + 1))

    def test_embedding_from_the_formula(self):
        embedder = Embedder(6, 5, 4, pooling="average")
        nn.init.normal_(embedder.attention.score.weight, generator=torch.manual_seed(0))
        features, feature_maps, _ = self.output()
        out = embedder.forward_features(self.output())
        direction = embedder.attention.score.weight[0, :, 0, 0]
        for i in range(2):
            level = feature_maps[i].square().mean(dim=0).sqrt()
            logits = torch.einsum("chw,c->hw", feature_maps[i] / level, direction)
            attention = logits.exp() / logits.exp().sum()
            torch.testing.assert_close(out.attention[i], attention)
            weights = slow_resample(attention[None].detach(), (3, 3))[0]
            pooled = embedder.projection((features[i] * weights).sum((1, 2)))
            torch.testing.assert_close(out.embeddings[i], pooled / pooled.norm())

    def test_attention_does_not_depend_on_the_scale_of_the_maps(self):
        embedder = Embedder(6, 5, None, pooling="average")
        nn.init.normal_(embedder.attention.score.weight)
        features, feature_maps, _ = self.output()
        one = embedder.forward_features(TrunkOutput(features, feature_maps)).attention
        other = embedder.forward_features(TrunkOutput(features, 100 * feature_maps)).attention
        torch.testing.assert_close(one, other)

    def test_pooling_is_exact_under_autocast(self):
        embedder = Embedder(6, 5, None, pooling="average")
        nn.init.normal_(embedder.attention.score.weight)
        expected = embedder.forward_features(self.output())
        with torch.autocast("cpu", torch.bfloat16):
            actual = embedder.forward_features(self.output())
        torch.testing.assert_close(actual.attention, expected.attention, rtol=0, atol=0)
        torch.testing.assert_close(actual.embeddings, expected.embeddings, rtol=0, atol=0)

    @pytest.mark.parametrize("pooling", ["backbone", "average", "covariance"])
    def test_dead_places_do_no_harm(self, pooling):
        embedder = Embedder(6, 5, 4, pooling=pooling)
        features = torch.zeros(1, 6, 3, 3, requires_grad=True)
        feature_maps = torch.zeros(1, 5, 7, 7, requires_grad=True)
        out = embedder.forward_features(TrunkOutput(features, feature_maps))
        (out.embeddings.sum() + out.attention.square().sum()).backward()
        assert out.embeddings.isfinite().all()
        for given in (features, feature_maps):
            assert given.grad is None or given.grad.isfinite().all()

    def test_it_learns_where_to_look(self):
        """One place tells the class, the others are noise: attention must go there."""
        torch.manual_seed(0)
        labels = torch.arange(64) % 2
        embedder = Embedder(8, 8, 2, pooling="average")
        optimizer = torch.optim.Adam(embedder.parameters(), 0.05)
        for _ in range(150):
            places = torch.randn(64, 8, 4, 4)
            places[:, 0, 2, 1] = 4.0
            places[:, 1, 2, 1] = 4.0 * labels - 2
            output = TrunkOutput(places, places)
            optimizer.zero_grad()
            F.cross_entropy(10 * embedder(output), labels).backward()
            optimizer.step()
        attention = embedder.forward_features(output).attention
        assert (attention.flatten(1).argmax(1) == 2 * 4 + 1).float().mean() > 0.8
        assert attention[:, 2, 1].mean() > 4 / 16


class TestBorder:
    def test_weights_from_the_formula(self):
        feature_maps = maps(2, 5, 6, 7)
        output = TrunkOutput(maps(2, 6, 3, 3), feature_maps)
        similarity = border_similarity(feature_maps).double()
        found = Embedder(6, 5, None).forward_features(output).attention
        for i in range(2):
            expected = (-6 * similarity[i]).exp() / (-6 * similarity[i]).exp().sum()
            torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-6)

    def test_an_image_without_a_background_is_left_whole(self):
        """The absolute scale: little contrast, little difference in weight."""
        ground = maps(1, 5, 1, 1).expand(1, 5, 7, 7)
        alike = ground + 0.01 * maps(1, 5, 7, 7, seed=1)
        thing = ground.clone()
        thing[..., 2:5, 2:5] *= -1
        for name, limit in (("border", 1.05), ("relative_border", 100)):
            embedder = Embedder(6, 5, None, name)
            even = embedder.forward_features(TrunkOutput(maps(1, 6, 3, 3), alike)).attention
            cut = embedder.forward_features(TrunkOutput(maps(1, 6, 3, 3), thing)).attention
            assert bool(even.max() / even.min() < limit) is (name == "border")
            assert cut[0, 3, 3] > 5 * cut[0, 0, 0]

    def test_it_is_the_default_of_the_backbones_own_pooling(self):
        assert Embedder(6, 5).attention_name == "border"
        assert Embedder(6, 5, pooling="covariance").attention_name == "relative_border"
        assert Embedder(6, 5, pooling="average").attention_name == "pool"


class TestNone:
    def test_uniform_and_nothing_to_learn(self):
        embedder = Embedder(6, 5, None, "none")
        output = TrunkOutput(maps(2, 6, 3, 3), maps(2, 5, 7, 7))
        out = embedder.forward_features(output)
        torch.testing.assert_close(out.attention, torch.full((2, 7, 7), 1 / 49))
        torch.testing.assert_close(out.embeddings, F.normalize(output.features.mean((2, 3))))
        assert list(embedder.parameters()) == []


class TestDistinctive:
    def test_background_score_from_the_formula(self):
        feature_maps, others = maps(2, 5, 3, 4), maps(7, 5, 2, 3, seed=1)
        bank = F.normalize(others.flatten(2).transpose(1, 2), dim=2)
        expected = torch.zeros(2, 3, 4)
        for i in range(2):
            for y in range(3):
                for x in range(4):
                    best = [
                        F.cosine_similarity(feature_maps[i, :, y, x], r.flatten(1).T).max()
                        for r in others
                    ]
                    expected[i, y, x] = torch.stack(best).mean()
        torch.testing.assert_close(background_score_against(feature_maps, bank), expected)
        torch.testing.assert_close(
            background_score_against(feature_maps, bank, chunk_size=2), expected
        )

    def test_common_places_lose_weight(self):
        embedder = Embedder(5, 5, 4, "distinctive")
        feature_maps = maps(2, 5, 3, 3).requires_grad_()
        output = TrunkOutput(feature_maps, feature_maps)
        torch.testing.assert_close(
            embedder.forward_features(output).attention, torch.full((2, 3, 3), 1 / 9)
        )
        background = feature_maps[:1, :, :1].detach()
        embedder.set_attention_references(background.expand(6, -1, -1, -1))
        out = embedder.forward_features(output)
        assert out.attention[0, 0].max() < out.attention[0, 1:].min()
        assert not out.attention.requires_grad
        out.embeddings.sum().backward()
        assert feature_maps.grad.abs().sum() > 0
        embedder.set_attention_references(None)
        assert embedder.forward_features(output).attention.unique().numel() == 1

    def test_references_travel(self):
        embedder = Embedder(5, 5, 4, "distinctive")
        embedder.set_attention_references(maps(3, 5, 2, 2))
        other = Embedder(5, 5, 4, "distinctive")
        other.load_state_dict(embedder.state_dict())
        torch.testing.assert_close(other.references, embedder.references)
        assert "references" not in dict(embedder.named_buffers())
        assert embedder.to("meta").references.device.type == "meta"
        assert other.double().references.dtype == torch.float64

    def test_state_loads_with_weights_only(self, tmp_path):
        embedder = Embedder(5, 5, 4, "distinctive")
        embedder.set_attention_references(maps(3, 5, 2, 2))
        torch.save(embedder.state_dict(), tmp_path / "state.pth")
        state = torch.load(tmp_path / "state.pth", weights_only=True)
        other = Embedder(5, 5, 4, "distinctive")
        other.load_state_dict(state)
        torch.testing.assert_close(other.references, embedder.references)

    def test_errors(self):
        with pytest.raises(ValueError, match="attention='border' uses no references"):
            Embedder(5, 5).set_attention_references(maps(3, 5, 2, 2))
        with pytest.raises(ValueError, match=r"must be \(M, 5, H, W\), got shape \(3, 6, 2, 2\)"):
            Embedder(5, 5, 4, "distinctive").set_attention_references(maps(3, 6, 2, 2))
        with pytest.raises(ValueError, match="attention='pool' is learned, and the backbone's own"):
            Embedder(5, 5, attention="pool")


class TestOwnModule:
    def test_logits_become_attention(self):
        class First(nn.Module):
            def forward(self, trunk_output):
                return trunk_output.feature_maps[:, 0]

        output = TrunkOutput(maps(2, 6, 3, 3), maps(2, 5, 4, 7))
        out = Embedder(6, 5, None, First()).forward_features(output)
        expected = output.feature_maps[:, 0].flatten(1).softmax(1).view(2, 4, 7)
        torch.testing.assert_close(out.attention, expected)

    def test_wrong_grid(self):
        class Pooled(nn.Module):
            def forward(self, trunk_output):
                return trunk_output.features.mean(1)

        output = TrunkOutput(maps(2, 6, 3, 3), maps(2, 5, 4, 7))
        with pytest.raises(ValueError, match=r"shape \(2, 4, 7\).*got \(2, 3, 3\)"):
            Embedder(6, 5, None, Pooled()).forward_features(output)
