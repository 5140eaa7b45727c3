"""One, two and four processes: the same pseudo-labels and losses, with backgrounds swapped."""

import numpy as np
import pytest
import torch

from pml_tacl import BackgroundSwap

from .small import make_model
from .test_many_processes import exact_trainer, join, leave, together

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, EPOCHS = 10, 2
MASKS = {2: ["border", "distinctive"], 4: ["border"]}  # by the number of processes


def train(mask):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    model = make_model(backbone="test_efficientnet_ln")
    trainer = exact_trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), 0.01),
        batch_size=16,
        images_per_cluster=4,
        iterations_per_epoch=STEPS,
        gradient_clippers=None,
        swap=BackgroundSwap(0.7, mask),
    )
    labels, losses = [], []
    trainer.end_of_epoch_hook = lambda trainer: labels.append(trainer.labels)
    trainer.end_of_iteration_hook = lambda trainer: losses.append(
        [float(value) for value in trainer.losses.values()]
    )
    trainer.train(num_epochs=EPOCHS)
    return labels, losses


def training(number, world, folder):
    join(number, world, folder)
    leave({mask: train(mask) for mask in MASKS[world]}, folder)


@pytest.fixture(scope="module")
def alone():
    return {mask: train(mask) for mask in MASKS[2]}


@pytest.mark.parametrize("world", MASKS)
def test_processes_swap_across_the_whole_batch(world, alone, tmp_path):
    found = together(training, world, tmp_path)[0]
    for mask, (labels, losses) in found.items():
        expected = alone[mask]
        assert len(losses) == STEPS * EPOCHS
        assert all(torch.equal(a, b) for a, b in zip(labels, expected[0], strict=True))
        torch.testing.assert_close(
            torch.tensor(losses), torch.tensor(expected[1]), rtol=1e-4, atol=1e-5
        )
