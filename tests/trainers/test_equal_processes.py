"""One, two and four processes: the same pseudo-labels, centroids and losses."""

import numpy as np
import pytest
import torch

from pml_tacl import BackgroundSwap, KMeansPseudoLabeler
from pml_tacl.clustering import kmeans
from pml_tacl.trainers import unsupervised_trainer
from tests.processes import join, leave, together

from .small import Images, make_model, make_trainer
from .test_many_processes import exact_trainer

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


class OneUnreadable(Images):
    def __getitem__(self, index):
        if index == 5:
            raise OSError("gone")
        return super().__getitem__(index)


def cluster_a_file(folder, clusters):
    """Labels, centroids, and the number of images that this process assigned."""
    assigned, assign = [], KMeansPseudoLabeler._assign

    def noted(*given):
        assigned.append(len(found := assign(*given)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unsupervised_trainer, "IN_MEMORY_UP_TO", 10)
        patch.setattr(kmeans, "TWO_LEVELS_ABOVE", 10)
        patch.setattr(KMeansPseudoLabeler, "_assign", noted)
        trainer = make_trainer(
            dataset=OneUnreadable(100),
            labeler=KMeansPseudoLabeler(clusters, max_points=60, chunk_size=16),
            checkpoint_folder=folder,
        )
        trainer.relabel()
        trainer.relabel()  # from the centroids of the first
    return trainer.labels, trainer.centroids, assigned


def training(number, world, folder):
    join(number, world, folder)
    found = {mask: train(mask) for mask in MASKS[world]}
    for clusters in (4, 12):
        found[clusters] = cluster_a_file(f"{folder}/{clusters}", clusters)
    leave(found, folder)


@pytest.fixture(scope="module")
def alone():
    return {mask: train(mask) for mask in MASKS[2]}


@pytest.fixture(scope="module", params=MASKS)
def world(request, warm, tmp_path_factory):
    return together(warm, training, request.param, tmp_path_factory.mktemp("world"))


def test_processes_swap_across_the_whole_batch(world, alone):
    for mask in MASKS[len(world)]:
        labels, losses = world[0][mask]
        expected = alone[mask]
        assert len(losses) == STEPS * EPOCHS
        assert all(torch.equal(a, b) for a, b in zip(labels, expected[0], strict=True))
        torch.testing.assert_close(
            torch.tensor(losses), torch.tensor(expected[1]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("clusters", [4, 12])  # one level, and two
def test_processes_assign_images_together(world, tmp_path, clusters):
    labels, centroids, assigned = cluster_a_file(tmp_path, clusters)
    assert assigned == [99, 99]
    assert labels.dtype == torch.int64
    assert (labels < 0).nonzero().flatten().tolist() == [5]
    chunks = [16] * 6 + [3]
    for number, found in enumerate(world):
        assert torch.equal(found[clusters][0], labels)
        assert torch.equal(found[clusters][1], centroids)
        assert found[clusters][2] == [sum(chunks[number :: len(world)])] * 2
