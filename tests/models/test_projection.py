"""The projection: fitted to images without labels, or (other poolings) trained from a whitening."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from pml_tacl import AttentionEmbedder
from pml_tacl.functional import border_similarity, covariance_pooling
from pml_tacl.models import Embedder, Projection, TrunkOutput
from pml_tacl.models.projection import principal_basis, whiten_linear, whole_shrinkage


def images(n=24, seed=0):
    """Of a few colours each, so that features differ in more than noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, (64, 64)) + 0.1 * torch.randn(n, 3, 64, 64, generator=generator)


# Few channels, so that the covariance of the parts is small: 24 features, 12 * 13 / 2 parts.
SMALL = {"channels": [8, 8, 12, 24], "stem_width": 8}


def build(embedding_dim=16, pooling="backbone", **kwargs):
    torch.manual_seed(0)
    return AttentionEmbedder(
        "resnet10t", embedding_dim=embedding_dim, pooling=pooling, **SMALL, **kwargs
    ).eval()


def pooled(model, x):
    with torch.no_grad():
        return model.embedder.pool(model.trunk(x))[0].double()


def fitted(embedding_dim=16, n=24, **kwargs):
    model = build(embedding_dim, **kwargs)
    model.fit_projection([images(n)], progress=False)
    return model


def test_the_bar_has_a_name_and_leaves_the_screen(capsys):
    build().fit_projection([images(8)], progress=True)
    written = capsys.readouterr().err
    assert "fitting the projection" in written
    assert "\n" not in written
    assert not written.rstrip("\r").rpartition("\r")[2].strip()


def slow_basis(rows, shrinkage, dimensions):
    """The mean and the basis from the docstring, for more rows than dimensions."""
    mean = sum(rows) / len(rows)
    covariance = sum(np.outer(row - mean, row - mean) for row in rows) / len(rows)
    values, vectors = np.linalg.eigh(covariance)
    columns = []
    for i in range(1, dimensions + 1):
        spread = values[-i] + shrinkage * np.trace(covariance) / len(covariance)
        columns.append(vectors[:, -i] / np.sqrt(spread))
    return mean, np.stack(columns, axis=1)


def slow_projection(model, x, whole_dim, parts_dim, channels):
    """Unit embeddings (N, D) of the images that the projection is fitted to."""
    with torch.no_grad():
        output = model.trunk(x)
        similarity = border_similarity(output.feature_maps).double().numpy()
        maps = output.feature_maps.double().numpy()
        whole = [row / np.linalg.norm(row) for row in output.pooled.double().numpy()]
    cells = [image[:, y, x] for image in maps for y in range(4) for x in range(4)]
    centre = sum(cells) / len(cells)
    second = sum(np.outer(cell - centre, cell - centre) for cell in cells) / len(cells)
    directions = np.linalg.eigh(second)[1][:, -channels:].T
    parts = []
    for image, b in zip(maps, similarity, strict=True):
        weights = np.exp(-6 * b) / np.exp(-6 * b).sum()
        places = [(y, x) for y in range(4) for x in range(4)]
        seen = {place: directions @ image[:, place[0], place[1]] for place in places}
        mean = sum(weights[place] * seen[place] for place in places)
        matrix = sum(
            weights[place] * np.outer(seen[place] - mean, seen[place] - mean) for place in places
        )
        triangle = np.array([matrix[i, j] for i in range(channels) for j in range(i, channels)])
        parts.append(triangle / np.linalg.norm(triangle))
    projected = []
    more = 0.5 * (1000 / len(x)) ** 2  # for so few images
    for rows, shrinkage, dimensions in ((whole, more, whole_dim), (parts, 0.1, parts_dim)):
        mean, basis = slow_basis(rows, shrinkage, dimensions)
        short = [(row - mean) @ basis for row in rows]
        projected.append([row / np.linalg.norm(row) for row in short])
    both = [np.concatenate(pair) for pair in zip(*projected, strict=True)]
    return np.stack([row / np.linalg.norm(row) for row in both])


class TestProjection:
    @pytest.mark.parametrize("channels", [12, 5])
    def test_against_the_slow_reference(self, channels, monkeypatch):
        monkeypatch.setattr("pml_tacl.models.projection.CHANNELS", channels)
        model, x = fitted(), images()
        with torch.no_grad():
            found = model(x).double().numpy()
        expected = slow_projection(model, x, 8, 8, channels)
        assert found.shape == expected.shape == (24, 16)
        # The sign of a direction is free: what counts is who is near whom.
        np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)

    def test_before_and_after(self):
        model, x = build(), images(4)
        with torch.no_grad():
            own = F.normalize(model.trunk(x).pooled)
            assert torch.equal(model(x), own)
            model.fit_projection([images()], progress=False)
            assert model.embedder.is_fitted
            assert model(x).shape == (4, 16)
            assert not model.embedder.projection.whole_basis.requires_grad
            assert list(model.embedder.parameters()) == []
            model.reset_projection()
            assert not model.embedder.is_fitted
            assert torch.equal(model(x), own)
        assert all(not buffer.any() for buffer in model.embedder.projection.buffers())

    def test_one_pass_over_a_generator_and_no_image_too_many(self):
        read = []

        def batches():
            for part in images(40).split(7):
                read.append(len(part))
                yield part, "a label, which is never read"

        one, other = build(), build()
        one.fit_projection(batches(), max_images=24, progress=False)
        assert read == [7, 7, 7, 7]
        other.fit_projection([images(40)[:24]], progress=False)
        with torch.no_grad():
            found, expected = one(images(9)), other(images(9))
        torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-3, rtol=0)

    def test_directions_come_from_the_first_images_and_moments_from_all(self, monkeypatch):
        monkeypatch.setattr("pml_tacl.models.projection._IMAGES_FOR_DIRECTIONS", 16)
        whole, split, first = build(), build(), build()
        x = images(40)
        split.fit_projection(x.split(8), progress=False)
        first.fit_projection([x[:16]], progress=False)
        whole.fit_projection([x[:16], x[16:]], progress=False)
        # The largest ones: the others of these few channels hardly differ in size.
        rows = [m.embedder.projection.directions[-4:] for m in (whole, split, first)]
        for other in rows[:2]:
            torch.testing.assert_close(other.abs(), rows[2].abs(), atol=1e-3, rtol=0)
        for name in ("whole_mean", "parts_mean"):
            mine, other = (getattr(m.embedder.projection, name) for m in (whole, split))
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(
            whole.embedder.projection.whole_mean, first.embedder.projection.whole_mean, atol=1e-4
        )

    @pytest.mark.parametrize("n", [2, 5, 30])
    def test_fewer_images_than_dimensions(self, n):
        model = fitted(512, n)
        assert model.embedder.embedding_dim == 24 + 78
        x = images(n)
        with torch.no_grad():
            embeddings = model(x)
            again = model(x + 0.02 * torch.randn(x.shape, generator=torch.manual_seed(3)))
            others = model(images(8, seed=9))
        assert embeddings.shape == (n, 24 + 78)
        for found in (embeddings, others):
            assert found.isfinite().all()
            torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
        # Each image is found again, and images that were not fitted to are told apart.
        assert (again @ embeddings.T).argmax(1).tolist() == list(range(n))
        assert (others @ others.T - 2 * torch.eye(8)).max() < 0.999

    @pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (7, 7), (512, 512), (9999, 2144)])
    def test_dimensions(self, asked, given):
        projection = Projection(64, 192, asked)  # 64 features, 64 * 65 / 2 covariances
        assert projection.embedding_dim == given
        if asked < 512:
            assert fitted(asked)(images(2)).shape == (2, given)

    def test_images_of_one_cell_have_no_parts(self):
        model = build()
        x = images(12)[:, :, ::4, ::4]
        model.fit_projection([x], progress=False)
        with torch.no_grad():
            embeddings = model(x)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(12))
        assert (embeddings[:, 8:] == 0).all()
        assert (embeddings[:, :8].std(0) > 0).all()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (images(1).expand(5, -1, -1, -1), "batches contain 5 images that all look the same"),
            (images(4) * torch.nan, "features that are NaN or infinite: check the images"),
            (images(1), "batches contain 1 image: the projection needs at least 2"),
            (images(0), "batches contain 0 images: the projection needs at least 2"),
        ],
    )
    def test_what_it_can_not_be_fitted_to_changes_nothing(self, wrong, message):
        for model in (build(), fitted()):
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(ValueError, match=message):
                model.fit_projection([wrong], progress=False)
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name]), name

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match=r"max_images must be .*2.* got 1"):
            build().fit_projection([images()], max_images=1)
        with pytest.raises(ValueError, match="embedding_dim is None: there is no projection"):
            build(None).fit_projection([images()])

    def test_modes_statistics_and_images_are_left_as_they_were(self):
        model = build().train()
        model.embedder.eval()
        before = copy.deepcopy(model.trunk.state_dict())
        x = images()
        kept = x.clone()
        model.fit_projection([x], progress=False)
        assert model.trunk.training
        assert not model.embedder.training
        assert torch.equal(x, kept)
        for name, value in model.trunk.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        model, x = fitted(), images(6)
        with torch.no_grad():
            expected = model(x)
            with torch.autocast("cpu", dtype):
                mixed = model(x)
            cast = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert mixed.dtype == cast.dtype == torch.float32
        torch.testing.assert_close(mixed.norm(dim=1), torch.ones(6))
        assert F.cosine_similarity(mixed, expected).min() > 0.99
        assert F.cosine_similarity(cast, expected).min() > 0.95
        fresh = build()
        with torch.autocast("cpu", dtype):
            fresh.fit_projection([images()], progress=False)
        with torch.no_grad():
            found = fresh(x)
        torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=0.1, rtol=0)

    def test_double_precision(self):
        model = build().double()
        model.fit_projection([images().double()], progress=False)
        with torch.no_grad():
            found, expected = model(images(4).double()), fitted()(images(4))
        assert found.dtype == torch.float64
        torch.testing.assert_close(
            (found @ found.T).float(), expected @ expected.T, atol=2e-3, rtol=0
        )

    def test_memory_that_is_not_contiguous(self):
        model, x = fitted(), images(8)
        transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
        with torch.no_grad():
            for other in (transposed, x.to(memory_format=torch.channels_last), x[::2]):
                expected = model(other.contiguous())
                torch.testing.assert_close(model(other), expected, atol=1e-5, rtol=1e-4)

    def test_gradients_pass_through_it(self):
        model = fitted()
        (model(images(3)) * torch.randn(3, 16, generator=torch.manual_seed(0))).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        assert next(model.trunk.parameters()).grad.abs().sum() > 0

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, copied):
        model = fitted()
        with torch.no_grad():
            torch.testing.assert_close(copied(model)(images(3)), model(images(3)), rtol=0, atol=0)

    def test_state_travels_both_ways(self, tmp_path):
        model, other = fitted(), build()
        torch.save(model.state_dict(), tmp_path / "state.pth")
        other.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
        assert other.embedder.is_fitted
        with torch.no_grad():
            torch.testing.assert_close(other(images(3)), model(images(3)), rtol=0, atol=0)
        other.load_state_dict(build().state_dict())
        assert not other.embedder.is_fitted

    def test_saved_and_loaded(self, tmp_path):
        for model in (fitted(), build()):
            model.save_pretrained(tmp_path)
            loaded = AttentionEmbedder.from_pretrained(tmp_path)
            assert loaded.embedder.is_fitted == model.embedder.is_fitted
            with torch.no_grad():
                torch.testing.assert_close(loaded(images(3)), model(images(3)), rtol=0, atol=0)

    def test_moving_average(self):
        model = fitted()
        average = AveragedModel(model, use_buffers=True)
        average.update_parameters(model)
        average.update_parameters(model)
        with torch.no_grad():
            torch.testing.assert_close(average(images(3)), model(images(3)), atol=1e-5, rtol=1e-4)

    @pytest.mark.slow
    def test_compile(self):
        model, x = fitted(), images(2)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
            model.reset_projection()  # seen without a compilation by hand
            torch.testing.assert_close(compiled(x), model(x))

    def test_pml_tester(self):
        model = fitted()
        tester = GlobalEmbeddingSpaceTester(dataloader_num_workers=0, batch_size=3)
        data = [(x, i % 2) for i, x in enumerate(images(6))]
        embeddings, _ = tester.get_all_embeddings(data, model.trunk, model.embedder)
        with torch.no_grad():
            torch.testing.assert_close(embeddings.cpu(), model(images(6)))

    def test_in_inference_mode(self):
        model = build()
        with torch.inference_mode():
            model.fit_projection([images()], progress=False)
        (model(images(2))[:, 0]).sum().backward()
        assert next(model.trunk.parameters()).grad is not None


@pytest.mark.parametrize(
    ("count", "expected"), [(2, 125_000), (100, 50), (500, 2), (1000, 0.5), (5000, 0.5)]
)
def test_the_whole_is_whitened_less_for_few_images(count, expected):
    assert whole_shrinkage(count) == pytest.approx(expected)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5])
@pytest.mark.parametrize("count", [2, 4, 9, 50])
def test_a_basis_for_few_samples(count, shrinkage):
    """Half of the dimensions, or all that are known, are principal; the rest is orthogonal."""
    rows = torch.randn(count, 12, generator=torch.manual_seed(0), dtype=torch.float64)
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / count
    basis = principal_basis(covariance, 8, count, shrinkage)
    assert basis.shape == (12, 8)
    assert torch.equal(basis, principal_basis(covariance, 8, count, shrinkage))  # no chance in it
    known = 8 if count > 8 else min(count - 1, 4)
    values, vectors = torch.linalg.eigh(covariance)

    def gain(variance):
        return (variance + shrinkage * covariance.trace() / 12).rsqrt()

    expected = vectors.flip(1)[:, :known] * gain(values.flip(0)[:known])
    torch.testing.assert_close(basis[:, :known].abs(), expected.abs())
    inner = basis.T @ basis
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-9, rtol=0)
    if known < 8:
        left = values.flip(0)[known:].mean().clamp_min(0)
        length = (12 - known) / (8 - known) * gain(left).square()
        torch.testing.assert_close(inner.diagonal()[known:], length.expand(8 - known))


def test_covariance_embedding_from_the_formula():
    embedder = Embedder(6, 5, 4, pooling="covariance")  # by what is unlike the border
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
        whiten_linear(model, [x], shrinkage=1e-6, progress=False)
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
        whiten_linear(model, [x], shrinkage=0.3, progress=False)
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
        whole.fit_projection([x[:20]], progress=False)
        parts.fit_projection([(part, "label") for part in x[:20].split(7)], progress=False)
        first.fit_projection(x.split(7), max_images=20, progress=False)
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
        model.fit_projection([images()], progress=False)
        assert (model.embedder.projection.weight[-5:] == 0).all()
        assert (model.embedder.projection.bias[-5:] == 0).all()
        embeddings = model(images(4))
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))

    def test_modes_and_gradients_are_left_as_they_were(self, pooling):
        model = build(6, pooling).train()
        model.embedder.eval()
        before = {name: buffer.clone() for name, buffer in model.trunk.named_buffers()}
        model.fit_projection([images()], progress=False)
        assert model.trunk.training
        assert not model.embedder.training
        for name, buffer in model.trunk.named_buffers():
            torch.testing.assert_close(buffer, before[name])
        assert model.embedder.projection.weight.requires_grad
        assert model.embedder.projection.weight.grad is None

    def test_saved_and_loaded(self, pooling, tmp_path):
        model = build(6, pooling)
        model.fit_projection([images()], progress=False)
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
        whiten_linear(model, [x], shrinkage=1e-4, progress=False)
        assert right() > max(0.9, before)


@pytest.mark.parametrize(
    ("pooling", "written", "attention"),
    [
        ("average", None, "border"),
        ("covariance", "covariance", "border"),
        ("average", None, "pool"),
    ],
)
def test_folders_of_earlier_versions_load(tmp_path, pooling, written, attention):
    """`"border"` was then standardised, and the first ones name no pooling."""
    now = "relative_border" if attention == "border" else attention
    model = build(6, pooling, attention=now)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("format_version") == 2
    del config["pooling"]
    config |= {"format_version": 1, "attention": attention}
    config |= {} if written is None else {"pooling": written}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AttentionEmbedder.from_pretrained(tmp_path)
    assert loaded.embedder.attention_name == now
    with torch.no_grad():
        for mine, other in zip(
            model.forward_features(images(3)), loaded.forward_features(images(3)), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


class TestErrors:
    def test_pooling(self):
        with pytest.raises(ValueError, match=r"pooling must be .* got 'max'"):
            build(pooling="max")

    def test_whiten(self):
        model = build(6, "covariance")
        before = copy.deepcopy(model.state_dict())
        for wrong in (0, "a"):
            with pytest.raises(ValueError, match=f"shrinkage must be .* above 0, got {wrong!r}"):
                whiten_linear(model, [images()], shrinkage=wrong)
        for wrong, message in [
            ([images(1)], "batches contain 1 image:"),
            ([], "batches contain 0 images"),
            ([images() * torch.nan], "features that are NaN or infinite"),
            ([images(1).expand(2, -1, -1, -1)], "batches contain 2 images that all look the same"),
            ([images(1).expand(49, -1, -1, -1)], "contain 49 images that all look the same"),
            # Of one cell, which has no covariance.
            ([images()[:, :, :8, :8]], "batches contain 24 images that all look the same"),
            (iter([images()]), "batches are read twice, which list_iterator does not allow: give"),
        ]:
            with pytest.raises(ValueError, match=message):
                model.fit_projection(wrong, progress=False)
        with pytest.raises(ValueError, match=r"max_images must be .*2.* got 1"):
            model.fit_projection([images()], max_images=1)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        with pytest.raises(ValueError, match="embedding_dim is None: there is no projection"):
            build(None, "average").fit_projection([images()], progress=False)
        build(6, "average").fit_projection(iter([images()]), progress=False)  # in one pass

    def test_images_are_left_alone(self):
        model, x = build(6, "covariance"), images()
        kept = x.clone()
        model.fit_projection([x], progress=False)
        assert torch.equal(x, kept)


def test_the_projection_learns_on():
    model = build(6, "covariance").train()
    model.fit_projection([images()], progress=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.embedder.projection.weight.clone()
    model(images(4))[:, 0].sum().backward()
    assert all(p.grad is not None for p in model.embedder.parameters())
    optimizer.step()
    assert not torch.equal(model.embedder.projection.weight, before)
    assert isinstance(model.embedder.projection, nn.Linear)
