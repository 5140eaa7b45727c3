"""Sharding with torch's `fully_shard`: examples/fsdp_vit.py, and its step beside a whole one."""

import re
from pathlib import Path

import pytest
import torch

from pml_tacl import AttentionEmbedder
from pml_tacl.datasets import Glyphs
from pml_tacl.search import ImageIndex
from tests.processes import begin, meeting, wait_for_all

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ROOT = Path(__file__).parents[1]

# The losses and the backward pass of the example, on given images.
STEP = """
import sys, torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
import pml_tacl
from pml_tacl.distributed.collectives import gather_batch
from pml_tacl.distributed.session import is_main, rank, session, world_size

with session():
    torch.manual_seed(0)
    model = pml_tacl.AttentionEmbedder("test_vit", pooling="backbone", dynamic_img_size=True)
    if sys.argv[2] == "sharded":
        for block in model.trunk.model.blocks:
            fully_shard(block)
        fully_shard(model.trunk)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 8, 3, 64, 64, generator=generator)
    cells = model.forward_features(first[:1]).feature_maps[0, 0].numel()
    points = 2 * torch.rand(8, cells, 2, generator=generator) - 1
    labels = torch.arange(8) // 4
    clustering = pml_tacl.ContrastiveClusteringLoss()
    clustering.set_centroids(torch.randn(2, model.trunk.num_features, generator=generator))
    mine = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
    model.train()
    out = model.forward_features(torch.cat([first[mine], second[mine]]))
    embeddings = gather_batch(out.embeddings, views=2)
    both = gather_batch(labels[mine]).repeat(2)
    loss = MultiSimilarityLoss()(embeddings, both) + 0.5 * clustering(embeddings, both)
    attention = pml_tacl.AttentionConsistencyLoss(temperature=0.3)
    maps = out.feature_maps.chunk(2)
    # All pairs of a label lie on one process, so the mean over processes is that of one.
    own = 3 * attention(*maps, points[mine], labels[mine])
    (world_size() * loss + own).backward()
    optimizer.step()
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if is_main():
        torch.save(state, sys.argv[1])
"""


def torchrun(warm, processes, script, *arguments, cwd):
    """Return what the first process has written."""
    store = meeting()
    wait_for_all(begin(warm, [script, *arguments], processes, store, cwd, cwd=cwd))
    return (cwd / "0.log").read_text()


def test_a_sharded_step_is_that_of_one_process(warm, tmp_path):
    (tmp_path / "step.py").write_text(STEP)
    states = []
    for processes, how in ((1, "whole"), (2, "sharded")):
        torchrun(warm, processes, "step.py", tmp_path / how, how, cwd=tmp_path)
        states.append(torch.load(tmp_path / how, weights_only=True))
    whole, sharded = states
    assert whole.keys() == sharded.keys()
    torch.manual_seed(0)
    start = AttentionEmbedder("test_vit", pooling="backbone", dynamic_img_size=True).state_dict()
    moved = 0
    for name, value in whole.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=1e-5)
            moved += int((value - start[name]).abs().max() > 1e-4)
    assert moved > 20  # or equal weights would say nothing


def test_the_example_ends_with_a_model_and_an_index(warm, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (image, _) in enumerate(Glyphs("train", num_classes=4)):
        image.save(folder / f"{number:02}.png")
    settings = {"FOLDER": "photos", "RUN": "run", "BACKBONE": "test_vit", "WEIGHTS": False}
    settings |= {"IMAGE_SIZE": 160, "ROUNDS": 2, "STEPS": 2, "BATCH_SIZE": 8, "WORKERS": 0}
    source = (ROOT / "examples" / "fsdp_vit.py").read_text("utf-8")
    for constant, value in settings.items():
        line = rf"^{constant} = .*$"
        assert len(re.findall(line, source, re.M)) == 1
        source = re.sub(line, f"{constant} = {value!r}", source, flags=re.M)
    (tmp_path / "example.py").write_text(source)
    out = torchrun(warm, 2, "example.py", cwd=tmp_path)
    assert "round 2 of 2, last loss " in out
    index = ImageIndex.load(tmp_path / "run")
    assert len(index) == len(list(folder.iterdir()))
    assert AttentionEmbedder.from_pretrained(tmp_path / "run" / "model")
