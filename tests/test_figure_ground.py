"""Border similarity and covariance pooling, against loops in float64 and at their edges."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as nnf

from pml_tacl.functional import border_similarity, covariance_pooling


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def slow_border_similarity(image):
    _, height, width = image.shape
    unit = image / np.linalg.norm(image, axis=0)
    edge = [(0, x) for x in range(width)] + [(height - 1, x) for x in range(width)]
    edge = sorted(
        {*edge, *((y, 0) for y in range(height)), *((y, width - 1) for y in range(height))}
    )
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            result[y, x] = np.mean([unit[:, y, x] @ unit[:, v, u] for v, u in edge])
    return result


@pytest.mark.parametrize("size", [(5, 7), (6, 6), (2, 3), (3, 3), (1, 4), (1, 1)])
def test_border_similarity_is_the_formula(size):
    feature_maps = maps(3, 4, *size)
    found = border_similarity(feature_maps)
    for image, expected in zip(found, feature_maps.numpy(), strict=True):
        np.testing.assert_allclose(image, slow_border_similarity(expected), rtol=1e-10, atol=1e-12)


def test_what_fills_the_border_is_background():
    feature_maps = torch.tensor([1.0, 0.0])[None, :, None, None].repeat(1, 1, 6, 6)
    feature_maps[0, :, 1:3, 1:4] = torch.tensor([0.0, 5.0])[:, None, None]  # not in the middle
    found = border_similarity(feature_maps)[0]
    torch.testing.assert_close(found == 0, feature_maps[0, 1] > 0)
    assert (found[feature_maps[0, 1] == 0] == 1).all()


def test_border_similarity_neither_learns_nor_scales():
    feature_maps = maps(2, 5, 4, 4).requires_grad_()
    found = border_similarity(feature_maps)
    assert not found.requires_grad
    torch.testing.assert_close(border_similarity(1e3 * feature_maps), found)


def test_a_dead_place_is_like_nothing():
    feature_maps = maps(1, 5, 4, 4)
    feature_maps[:, :, 1, 2] = 0
    assert border_similarity(feature_maps)[0, 1, 2] == 0
    assert border_similarity(torch.zeros(1, 5, 4, 4)).eq(0).all()


def slow_covariance(image, weights):
    channels = len(image)
    cells = image.reshape(channels, -1)
    share = weights.reshape(-1) / weights.sum()
    mean = sum(share[u] * cells[:, u] for u in range(cells.shape[1]))
    total = np.zeros((channels, channels))
    for u in range(cells.shape[1]):
        total += share[u] * np.outer(cells[:, u] - mean, cells[:, u] - mean)
    return [total[i, j] for i in range(channels) for j in range(i, channels)]


@pytest.mark.parametrize("weighted", [False, True])
def test_covariance_is_the_formula(weighted):
    feature_maps, weights = maps(3, 4, 3, 5), maps(3, 3, 5, seed=1).abs()
    weights[1, 0] = 0
    found = covariance_pooling(feature_maps, weights if weighted else None)
    used = weights if weighted else torch.ones_like(weights)
    for n in range(3):
        expected = slow_covariance(feature_maps[n].numpy(), used[n].numpy())
        np.testing.assert_allclose(found[n], expected, rtol=1e-10, atol=1e-12)


def test_covariance_does_not_depend_on_place_or_level():
    feature_maps, weights = maps(2, 4, 3, 5), maps(2, 3, 5, seed=1).abs()
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    mixed = [x.flatten(-2)[..., order].view(x.shape) for x in (feature_maps, weights)]
    expected = covariance_pooling(feature_maps, weights)
    torch.testing.assert_close(covariance_pooling(*mixed), expected)
    torch.testing.assert_close(covariance_pooling(feature_maps + 7, 3 * weights), expected)


def test_gradient_of_covariance():
    feature_maps = maps(2, 3, 2, 3).requires_grad_()
    weights = maps(2, 2, 3, seed=1).abs().requires_grad_()
    assert gradcheck(covariance_pooling, (feature_maps, weights))
    assert gradcheck(covariance_pooling, (feature_maps,))


@pytest.mark.parametrize("call", [border_similarity, covariance_pooling])
class TestEdges:
    @pytest.mark.parametrize("count", [0, 1])
    def test_few_images(self, call, count):
        found = call(maps(count, 3, 4, 4))
        assert len(found) == count
        assert found.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_summed_in_single(self, call, dtype):
        half = maps(2, 3, 4, 4, dtype=torch.float32).to(dtype)
        found = call(half)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, call(half.double()).float(), rtol=1e-4, atol=1e-5)

    def test_autocast_changes_nothing(self, call):
        feature_maps = maps(2, 3, 4, 4, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = call(feature_maps)
        torch.testing.assert_close(found, call(feature_maps), rtol=0, atol=0)

    def test_memory_layout_changes_nothing(self, call):
        feature_maps = maps(2, 3, 4, 5)
        wide = nnf.pad(feature_maps, (0, 2, 1, 0))[:, :, 1:, :-2]
        last = feature_maps.to(memory_format=torch.channels_last)
        for other in (wide, last):
            torch.testing.assert_close(call(other), call(feature_maps))

    def test_compiled_without_a_break(self, call):
        feature_maps = maps(2, 3, 4, 4, dtype=torch.float32)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(feature_maps), call(feature_maps))

    def test_wrong_shapes_are_named(self, call):
        with pytest.raises(ValueError, match=r"feature_maps must be .* got \(3, 4, 4\)"):
            call(torch.zeros(3, 4, 4))


def test_weights_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"weights must .* \(2, 4, 5\), got \(2, 5, 4\)"):
        covariance_pooling(torch.zeros(2, 3, 4, 5), torch.zeros(2, 5, 4))
