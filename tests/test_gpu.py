"""What a device computes beside float64 on the CPU, and when it waits.

The numbers are compared on any device; what is about CUDA alone is skipped without it.

    python -m pytest -m gpu --device cuda --dtype float32,bfloat16
"""

import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
    functional,
)
from pml_tacl.cli.run_folder import seed_everything
from pml_tacl.evaluation import embed
from tests.trainers.small import make_model, make_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).parents[1]
# Error of a value or gradient as a vector, over the length of the exact one. Inputs are rounded
# before; what is left is the rounding of results and, in half types, of products. There the best
# match of a cell may be another one that is as near, which turns the gradient of a maximum.
WITHIN = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
TURNED = 0.2
N, D, C, H, W = 48, 32, 16, 5, 4


def batch():
    """Embeddings in twelve clusters, centroids, maps of both views, points and labels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.arange(N) // 4
    labels[3] = -1
    middles = normal(12, D)
    return {
        "embeddings": middles[labels] + 0.7 * normal(N, D),
        "centroids": middles + 0.1 * normal(12, D),
        "first": normal(N, C, H, W),
        "second": normal(N, C, H, W),
        "points": 2.4 * torch.rand(N, H * W, 2, generator=generator, dtype=torch.float64) - 1.2,
        "labels": labels,
    }


def clustering(x, centroids=True):
    loss = ContrastiveClusteringLoss(margin=1.0)
    if centroids:
        loss.set_centroids(x["centroids"])  # looks at the values, which waits
    return lambda x: loss(x["embeddings"], x["labels"])


def attention(x, **kwargs):
    loss = AttentionConsistencyLoss(**kwargs)
    return lambda x: loss(x["first"], x["second"], x["points"], x["labels"])


# Each returns a function of the batch that computes a loss.
LOSSES = {
    "clustering, centroids": clustering,
    "clustering, means of the batch": lambda x: clustering(x, centroids=False),
    "attention": attention,
    "attention, temperature": lambda x: attention(x, temperature=0.2),
    "background_score": lambda _: lambda x: functional.background_score(x["first"], x["labels"]),
    "border": lambda _: lambda x: functional.border_similarity(x["first"]),
}


def placed(dtype, device):
    """The batch as leaves of a type on a device, and rounded alike in float64 on the CPU."""
    there, exact = {}, {}
    for name, tensor in batch().items():
        if tensor.is_floating_point() and name != "points":
            there[name] = tensor.to(device, dtype).requires_grad_()
            exact[name] = tensor.to(dtype).double().requires_grad_()
        elif name == "points":
            there[name], exact[name] = tensor.to(device, torch.float32), tensor.float().double()
        else:
            there[name], exact[name] = tensor.to(device), tensor
    return there, exact


def results(case, inputs, autocast=None):
    """The value, and gradients of the embeddings and maps that take part."""
    run = LOSSES[case](inputs) if isinstance(case, str) else case
    device = inputs["labels"].device.type
    # The backward pass belongs outside, as torch says.
    with torch.autocast(device, autocast, enabled=autocast is not None):
        value = run(inputs)
    leaves = [inputs[name] for name in ("embeddings", "first", "second")]
    if not value.requires_grad:
        return [value]
    found = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return [value, *(gradient for gradient in found if gradient is not None)]


def errors(found, expected):
    pairs = [(f.detach().cpu().double(), e.detach()) for f, e in zip(found, expected, strict=True)]
    assert all(got.shape == wanted.shape and wanted.any() for got, wanted in pairs)
    return [float((got - wanted).norm() / wanted.norm()) for got, wanted in pairs]


@pytest.mark.parametrize("case", LOSSES)
def test_values_and_gradients_are_those_of_float64(case, device, dtype):
    there, exact = placed(dtype, device)
    found = results(case, there)
    assert found[0].device.type == device.type
    assert all(gradient.dtype == dtype for gradient in found[1:])
    value, *gradients = errors(found, results(case, exact))
    assert value < WITHIN[dtype]
    of_maximum = case == "attention" and dtype != torch.float32
    assert all(error < (TURNED if of_maximum else WITHIN[dtype]) for error in gradients)


@pytest.mark.parametrize("case", LOSSES)
def test_autocast_takes_no_precision_from_float32(case, device, dtype):
    there, exact = placed(torch.float32, device)
    found = results(case, there, None if dtype == torch.float32 else dtype)
    assert max(errors(found, results(case, exact))) < WITHIN[torch.float32]


def make_miner(which, x):
    if which == "attention":
        return AttentionConsistencyMiner(pairs_per_anchor=2)
    miner = ContrastiveClusteringMiner(num_negatives=3)
    if which == "clustering, centroids":
        miner.set_centroids(x["centroids"])
    return miner


def mined(which, x):
    miner = make_miner(which, x)
    return miner(x["first" if which == "attention" else "embeddings"], x["labels"])


def pairs_of(mined):
    """Positive and negative pairs."""
    first, positive, second, negative = (index.tolist() for index in mined)
    return set(zip(first, positive, strict=True)), set(zip(second, negative, strict=True))


MINERS = ["attention", "clustering, centroids", "clustering, means of the batch"]


@pytest.mark.parametrize("which", MINERS)
def test_miners_choose_the_pairs_of_float64(which, device, dtype):
    there, exact = placed(dtype, device)
    expected = pairs_of(mined(which, exact))
    assert len(expected[0]) > 40
    for got, wanted in zip(pairs_of(mined(which, there)), expected, strict=True):
        # In half types two candidates may be as near as rounding.
        allowed = 0 if dtype == torch.float32 else len(wanted) / 10
        assert len(got ^ wanted) <= allowed


@contextmanager
def counting_waits():
    """Yield a list, which has a message for each wait at the end."""
    waits = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [str(warning.message) for warning in caught]
    waits += [message for message in found if "called a synchronizing" in message]


@pytest.mark.parametrize("case", LOSSES)
def test_no_loss_makes_the_cpu_wait(case, cuda, dtype):
    there, _ = placed(dtype, cuda)
    run = LOSSES[case](there)
    results(run, there)  # kernels are loaded now
    with counting_waits() as waits:
        results(run, there)
    assert not waits


@pytest.mark.parametrize("which", MINERS)
def test_a_miner_makes_the_cpu_wait_only_for_the_number_of_pairs(which, cuda):
    there, _ = placed(torch.float32, cuda)
    miner = make_miner(which, there)
    x = there["first" if which == "attention" else "embeddings"]
    miner(x, there["labels"])
    with counting_waits() as waits:
        miner(x, there["labels"])
    # The attention miner returns no negative pairs.
    assert len(waits) == (1 if which == "attention" else 2)


def on_device(device, **kwargs):
    seed_everything(0)
    model = make_model().to(device)
    return make_trainer(model, data_device=device, **kwargs)


def noting(losses):
    return lambda trainer: losses.append(float(trainer.losses["total_loss"]))


def test_a_training_step_has_the_losses_of_the_cpu(device):
    seen = {}
    for where in (device, torch.device("cpu")):
        losses = seen[where] = []
        on_device(where, end_of_iteration_hook=noting(losses)).train(num_epochs=1)
    assert len(seen[device]) == 2
    # The second has gone through a step of the weights.
    assert seen[device] == pytest.approx(seen[torch.device("cpu")], rel=1e-2)


def test_a_training_step_of_ours_makes_the_cpu_wait_for_nothing(cuda):
    """PML's own losses look for their pairs, which waits: waits in files of ours are counted."""
    trainer, waits = on_device(cuda, iterations_per_epoch=6), []

    def watched(trainer):
        torch.cuda.set_sync_debug_mode("warn" if trainer.iteration == 2 else "default")

    trainer.end_of_iteration_hook = watched
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train(num_epochs=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message) and "pml_tacl" in Path(warning.filename).parts:
            waits.append(f"{warning.filename}:{warning.lineno}")
    assert not waits


def test_the_core_compiles_as_one_graph_to_the_same_values(cuda):
    there, _ = placed(torch.float32, cuda)
    anchors = torch.arange(N, device=cuda)
    arguments = there["first"], there["second"], there["points"], anchors, anchors.roll(1)
    torch._dynamo.reset()
    compiled = torch.compile(functional.attention_consistency, fullgraph=True)
    found, expected = compiled(*arguments), functional.attention_consistency(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_attention_loss_holds_two_unit_maps_and_their_gradients(cuda):
    generator = torch.Generator(cuda).manual_seed(0)
    maps = [
        torch.randn(24, 1024, 7, 7, device=cuda, generator=generator).requires_grad_()
        for _ in range(2)
    ]
    points = 2 * torch.rand(24, 49, 2, device=cuda, generator=generator) - 1
    anchors = torch.arange(24, device=cuda)

    def run():
        losses = functional.attention_consistency(*maps, points, anchors, anchors.roll(1))
        losses.mean().backward()
        maps[0].grad = maps[1].grad = None

    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    held = torch.cuda.max_memory_allocated() - before
    unit = 2 * 2 * maps[0].numel() * maps[0].element_size()
    # The bound of a CPU and a block of the allocator for each of a few small tensors.
    assert held <= 1.2 * unit + 16 * 2**20


def test_views_and_fitting_run_on_the_device(device):
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for where in (device, torch.device("cpu")):
        torch.manual_seed(0)
        model = AttentionEmbedder("test_resnet", embedding_dim=16).eval().to(where)
        with torch.inference_mode():
            out = model.forward_features(images.to(where))
        assert out.embeddings.device.type == where.type
        found.append(out.embeddings.cpu())
    assert F.cosine_similarity(*found).min() > 0.999


def test_embed_takes_images_and_labels_that_lie_on_the_device(device):
    images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = AttentionEmbedder("test_resnet", embedding_dim=16).to(device)
    data = TensorDataset(images.to(device), torch.arange(10, device=device))
    embeddings, labels = embed(model, data, progress=False)
    assert labels.tolist() == list(range(10))
    expected, _ = embed(model, TensorDataset(images, torch.arange(10)), progress=False)
    torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)


def test_a_training_resumes_on_the_device(device, tmp_path):
    settings = {"iterations_per_epoch": 4, "checkpoint_every": 1, "keep": 99}

    def made(folder):
        losses = []
        trainer = on_device(
            device,
            checkpoint_folder=folder,
            end_of_iteration_hook=noting(losses),
            **settings,
        )
        return trainer, losses

    whole, expected = made(tmp_path / "whole")
    whole.train(num_epochs=2)
    first = sorted((tmp_path / "whole").iterdir())[1]
    rest, found = made(tmp_path / "rest")
    np.random.seed(99)  # noqa: NPY002
    rest.load_checkpoint(first)
    rest.train(num_epochs=2)
    assert 0 < len(found) < len(expected)
    within = 1e-6 if device.type == "cpu" else 1e-2
    assert found == pytest.approx(expected[-len(found) :], rel=within)


SCRIPT = """
import sys, torch
from pml_tacl.cli.run_folder import seed_everything
from pml_tacl.distributed.session import is_main, rank, session
from tests.trainers.small import make_model, make_trainer

with session():
    seed_everything(0)
    device = torch.device("cuda", rank())
    losses = []
    trainer = make_trainer(
        make_model().to(device), data_device=device,
        end_of_iteration_hook=lambda t: losses.append(float(t.losses["total_loss"])),
    )
    trainer.train(num_epochs=2)
    if is_main():
        torch.save(losses, sys.argv[1])
"""


def test_two_processes_with_nccl_have_the_losses_of_one(cuda, tmp_path, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = []
    for world in (1, 2):
        out = tmp_path / f"{world}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", str(script), str(out)]
        subprocess.run(command, check=True, timeout=240, cwd=ROOT)
        found.append(torch.load(out, weights_only=True))
    assert found[1] == pytest.approx(found[0], rel=1e-2)
