"""How the functional core runs: dtypes, layouts, torch.compile, no host sync, memory."""

import shutil

import pytest
import torch
from _common import peak_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from pml_tacl import functional as core
from pml_tacl.functional import consistency
from pml_tacl.losses import AttentionConsistencyLoss, ContrastiveClusteringLoss
from tests.references import grid_points

TEMPERATURES = [None, 0.2]
HALF = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


def batch(n=4, c=32, h=3, w=4, dtype=torch.float32, device="cpu"):
    """Two views, points, anchors and positives; the second view has another grid."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(n, c, h, w, generator=generator)
    second = torch.randn(n, c, w, h, generator=generator)
    points = 2.4 * torch.rand(n, h * w, 2, generator=generator) - 1.2
    anchors = torch.arange(n).repeat(2)
    positives = (anchors + 1 + torch.arange(2 * n) // n) % n
    tensors = [first.to(dtype), second.to(dtype), points, anchors, positives]
    return [x.to(device) for x in tensors]


def losses_and_gradients(function, first, second, *rest, **kwargs):
    first, second = first.detach().requires_grad_(), second.detach().requires_grad_()
    losses = function(first, second, *rest, **kwargs)
    return losses, *torch.autograd.grad(losses.sum(), (first, second))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_are_reduced_in_fp32(dtype, temperature):
    exact = losses_and_gradients(
        core.attention_consistency, *batch(dtype=dtype), temperature=temperature
    )
    wide = losses_and_gradients(
        core.attention_consistency,
        *[x.double() if x.is_floating_point() else x for x in batch(dtype=dtype)],
        temperature=temperature,
    )
    assert exact[0].dtype == torch.float32
    assert exact[1].dtype == exact[2].dtype == dtype
    for got, expected in zip(exact, wide, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            got.double(), expected, rtol=HALF[dtype], atol=8 * HALF[dtype] * scale
        )
    common = core.background_score(batch(dtype=dtype)[0], temperature=temperature)
    assert common.dtype == torch.float32


def test_fp32_agrees_with_fp64():
    exact = losses_and_gradients(core.attention_consistency, *batch(dtype=torch.float64))
    single = losses_and_gradients(core.attention_consistency, *batch())
    assert exact[0].dtype == torch.float64
    for got, expected in zip(single, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)


def test_sampling_half_maps_keeps_their_dtype():
    points = grid_points(3, 4, torch.float32).expand(2, -1, -1)
    for dtype in HALF:
        maps = torch.randn(2, 3, 4).to(dtype)
        read, _ = core.sample_at_points(maps, points)
        assert read.dtype == dtype
        torch.testing.assert_close(read, maps.flatten(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_autocast_changes_nothing(temperature):
    plain = losses_and_gradients(core.attention_consistency, *batch(), temperature=temperature)
    common = core.background_score(batch()[0], temperature=temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses_and_gradients(core.attention_consistency, *batch(), temperature=temperature)
        torch.testing.assert_close(
            core.background_score(batch()[0], temperature=temperature), common, rtol=0, atol=0
        )
    for got, expected in zip(cast, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing_and_the_gradient_keeps_it(layout, temperature):
    first, second, *rest = batch()
    plain = losses_and_gradients(
        core.attention_consistency, first, second, *rest, temperature=temperature
    )
    other = losses_and_gradients(
        core.attention_consistency,
        LAYOUTS[layout](first),
        LAYOUTS[layout](second),
        *rest,
        temperature=temperature,
    )
    for got, expected in zip(other, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert plain[1].is_contiguous()
    if layout == "channels_last":
        assert other[1].is_contiguous(memory_format=torch.channels_last)


def test_only_one_view_needs_a_gradient():
    first, second, *rest = batch()
    expected = losses_and_gradients(core.attention_consistency, first, second, *rest)[2]
    second.requires_grad_()
    losses = core.attention_consistency(first, second, *rest)
    got = torch.autograd.grad(losses.sum(), second)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "temperature"),
    [
        ("aot_eager", None),
        ("aot_eager", 0.2),
        pytest.param(
            "inductor",
            None,
            marks=pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a compiler"),
        ),
    ],
)
def test_compiles_without_a_graph_break_to_the_same_values(backend, temperature):
    def whole(first, second, points, anchors, positives):
        losses = core.attention_consistency(
            first, second, points, anchors, positives, temperature=temperature
        )
        return losses + core.contrastive_clustering(losses, losses[:, None] - points[:1, :3, 0])

    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, backend=backend)
    expected = losses_and_gradients(whole, *batch())
    for got, value in zip(losses_and_gradients(compiled, *batch()), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-7)
    common = torch.compile(core.background_score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        common(batch()[0], temperature=temperature),
        core.background_score(batch()[0], temperature=temperature),
    )


class NoDataDependence(TorchDispatchMode):
    """Fails on everything whose shape or Python value depends on a tensor's content."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(name == bad or name.startswith(bad + "_") for bad in self.FORBIDDEN) or (
            name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            raise AssertionError(f"{name} asks for a tensor's content")
        return func(*args, **(kwargs or {}))


def all_of_the_core(first, second, points, anchors, positives):
    labels = torch.zeros_like(anchors[: len(first)])
    for temperature in TEMPERATURES:
        losses_and_gradients(
            core.attention_consistency,
            first,
            second,
            points,
            anchors,
            positives,
            points[..., 0],
            temperature,
        )
        core.background_score(first, labels, second, labels, temperature)
    own = first[:, 0, 0, 0].detach().requires_grad_()
    others = second[:, :3, 0, 0]
    core.contrastive_clustering(own, others, 0.2, others > 0).sum().backward()
    core.contrastive_clustering(own, others, 0.2).sum().backward()


def test_the_core_never_asks_for_a_tensor_s_content(monkeypatch):
    def forbidden(self, *_):
        raise AssertionError("a tensor's content was asked for")

    # Labels are read on a CPU alone; on a GPU they are checked without waiting for it.
    monkeypatch.setattr(consistency, "pseudo_labels", lambda labels, *_: labels)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    with NoDataDependence():
        all_of_the_core(*batch())
    for probe in (torch.Tensor.tolist, torch.nonzero, lambda x: x[x > 0]):
        with pytest.raises(AssertionError, match="content"), NoDataDependence():
            probe(torch.ones(2))


def test_on_a_device_there_is_no_content_to_ask_for():
    # The meta device has shapes alone: whatever would stall a GPU's queue raises here.
    arguments = batch(device="meta")
    all_of_the_core(*arguments)
    first, second, points, labels, _ = arguments
    first, second, labels = first.requires_grad_(), second.requires_grad_(), labels[: len(first)]
    AttentionConsistencyLoss()(first, second, points, labels).backward()
    assert first.grad.shape == first.shape
    embeddings, loss = first.detach()[:, :, 0, 0].requires_grad_(), ContrastiveClusteringLoss()
    for centroids in (None, torch.empty(9, 32)):
        loss.centroids = centroids
        loss(embeddings, labels, (labels, labels, labels)).backward()
    assert embeddings.grad.shape == embeddings.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_sync_on_cuda():
    arguments = batch(device="cuda")
    expected = losses_and_gradients(core.attention_consistency, *batch())
    loss, centre_loss = AttentionConsistencyLoss(), ContrastiveClusteringLoss()
    centre_loss.set_centroids(torch.randn(9, 32, device="cuda"))
    labels = arguments[3][:4] // 2
    embeddings = arguments[0][:, :, 0, 0].clone().requires_grad_()
    all_of_the_core(*arguments)  # kernels are loaded now
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_of_the_core(*arguments)
        loss(arguments[0].requires_grad_(), *arguments[1:3], labels).backward()
        centre_loss(embeddings, labels).backward()
        got = losses_and_gradients(core.attention_consistency, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value.cpu(), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_peak_memory_is_that_of_unit_maps_and_their_gradients(channels_last):
    first, second, points, anchors, positives = batch(n=24, c=1024, h=7, w=7)
    anchors, positives = anchors[:24], positives[:24]  # one pair an image
    if channels_last:
        first, second = (LAYOUTS["channels_last"](x) for x in (first, second))
    first.requires_grad_()
    second.requires_grad_()

    def run():
        losses = core.attention_consistency(first, second, points, anchors, positives)
        losses.mean().backward()
        first.grad = second.grad = None

    maps = 2 * first.numel() * first.element_size()
    assert peak_bytes(run) <= 1.2 * 2 * maps


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_similarities_are_held_for_a_chunk_of_pairs_alone(temperature):
    n, places = 16, 196
    first, second, points, _, _ = batch(n=n, c=4, h=14, w=14)
    pairs = torch.arange(n * n)
    anchors, positives = pairs // n, pairs % n
    first.requires_grad_()

    def run():
        losses = core.attention_consistency(
            first, second, points, anchors, positives, None, temperature, chunk_size=4
        )
        losses.mean().backward()
        first.grad = None

    similarities = 4 * places * places * 4
    everything = n * n * places * places * 4
    # Besides: a few numbers for each place of each pair (attention, index, order, weight, points).
    small = 60 * n * n * places * 4
    peak = peak_bytes(run)
    assert peak < 8 * similarities + small
    assert peak < everything / 2

    peak = peak_bytes(lambda: core.background_score(first, temperature=temperature, chunk_size=4))
    assert peak < 4 * similarities + small / 20
