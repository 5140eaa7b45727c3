"""Our parts in a training of PML's own: its trainer, tester, hooks and records, none changed."""

import csv

import pytest
import torch
from pytorch_metric_learning import losses, miners, samplers, testers, trainers
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.inference import InferenceModel
from torch.utils.data import TensorDataset

from pml_tacl import (
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
    KMeansPseudoLabeler,
    RetrievalCalculator,
)
from pml_tacl.callbacks import Evaluate, chain
from pml_tacl.cli import run_folder as runs

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, EACH = 4, 10


def coloured(seed):
    """Images of a colour for each class, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    images = corners[labels][:, :, None, None].repeat(1, 1, 32, 32)
    return TensorDataset(images + 2.5 * torch.randn(images.shape, generator=generator), labels)


class Stock:
    """MetricLossOnly as PML's notebooks set it up; what is ours is named in it."""

    def __init__(self, folder, epochs=None):
        runs.seed_everything(0)  # PML's sampler draws from NumPy
        # Ours. Images of one colour have no covariance.
        self.model = AttentionEmbedder("test_resnet", embedding_dim=16, pooling="average")
        self.loss = ContrastiveClusteringLoss(margin=1.0)  # ours
        parts = {"trunk": self.model.trunk, "embedder": self.model.embedder}
        optimizers = {
            f"{name}_optimizer": torch.optim.Adam(part.parameters(), 3e-3)
            for name, part in parts.items()
        }
        self.hooks = runs.make_hooks(folder / "records", log_freq=2, primary_metric="recall_at_2")
        assert type(self.hooks) is logging_presets.HookContainer
        self.tester = testers.GlobalEmbeddingSpaceTester(
            end_of_testing_hook=self.hooks.end_of_testing_hook,
            accuracy_calculator=RetrievalCalculator(ks=(1, 2), exclude=("AMI",)),  # ours
            dataloader_num_workers=0,
            batch_size=16,
        )
        self.data, self.models_folder = coloured(0), folder / "saved"
        self.epochs = []
        test = self.hooks.end_of_epoch_hook(
            self.tester, {"val": coloured(1)}, str(self.models_folder), test_interval=1, patience=5
        )
        self.trainer = trainers.MetricLossOnly(
            parts,
            optimizers,
            batch_size=16,
            loss_funcs={"metric_loss": self.loss},
            mining_funcs={"tuple_miner": ContrastiveClusteringMiner(num_negatives=2)},  # ours
            dataset=self.data,
            sampler=samplers.MPerClassSampler(self.data.tensors[1], 4, 16, len(self.data)),
            dataloader_num_workers=0,
            end_of_iteration_hook=self.hooks.end_of_iteration_hook,
            end_of_epoch_hook=chain(test, lambda trainer: self.epochs.append(trainer.epoch)),
        )

    def records(self, folder, name):
        # The shortest name: records of a loss's parts begin with the name of the loss.
        path = min((folder / "records").glob(f"{name}*.csv"), key=lambda path: len(path.name))
        with path.open(newline="") as file:
            return list(csv.DictReader(file))


def test_stock_pml_trains_tests_saves_logs_and_resumes(tmp_path):
    first = Stock(tmp_path)
    before = first.tester.test({"val": coloured(1)}, 0, first.model.trunk, first.model.embedder)
    before = {split: dict(values) for split, values in before.items()}
    first.trainer.train(num_epochs=3)
    assert first.epochs == [1, 2, 3]
    name = "mean_average_precision_at_r_level0"
    after, before = first.tester.all_accuracies["val"][name], before["val"][name]
    assert after > before + 0.1

    losses_written = first.records(tmp_path, "loss_histories")
    assert [int(row["~iteration~"]) for row in losses_written] == [0, 2, 4]
    assert float(losses_written[0]["metric_loss"]) > 2 * float(losses_written[-1]["metric_loss"])
    ours = first.records(tmp_path, "metric_loss_ContrastiveClusteringLoss")
    assert float(ours[0]["margin"]) == 1.0
    assert len(first.records(tmp_path, "tuple_miner_ContrastiveClusteringMiner")) == 3
    tested = first.records(tmp_path, "accuracies")
    assert [int(row["epoch"]) for row in tested] == [0, 1, 2, 3]
    assert {"recall_at_2_level0", "NMI_level0", "best_epoch"} <= set(tested[0])
    saved = {path.name for path in first.models_folder.iterdir()}
    assert {"trunk_3.pth", "embedder_3.pth", "metric_loss_3.pth", "trunk_optimizer_3.pth"} <= saved
    assert any(name.startswith("trunk_best") for name in saved)

    again = Stock(tmp_path)
    epoch = again.hooks.load_latest_saved_models(again.trainer, str(again.models_folder), "cpu")
    assert epoch == 4
    for mine, other in ((first.model, again.model), (first.loss, again.loss)):
        torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=0, atol=0)
    again.trainer.train(start_epoch=epoch, num_epochs=4)
    assert again.epochs == [4]
    assert [int(row["epoch"]) for row in again.records(tmp_path, "accuracies")] == [0, 1, 2, 3, 4]
    assert (again.models_folder / "trunk_4.pth").exists()


def test_centroids_set_by_the_user_are_saved_and_loaded_by_pmls_hooks(tmp_path):
    first, again = Stock(tmp_path), Stock(tmp_path)
    images, _ = first.data.tensors
    with torch.no_grad():
        found = KMeansPseudoLabeler(CLASSES)(first.model.eval()(images))
    first.loss.set_centroids(found.centroids)
    first.models_folder.mkdir(exist_ok=True)
    first.hooks.save_models(first.trainer, str(first.models_folder), 7)
    assert first.hooks.load_latest_saved_models(again.trainer, str(first.models_folder), "cpu") == 8
    torch.testing.assert_close(again.loss.get_extra_state(), first.loss.get_extra_state())
    embeddings = torch.nn.functional.normalize(torch.randn(8, 16))
    labels = torch.arange(8) % CLASSES
    torch.testing.assert_close(again.loss(embeddings, labels), first.loss(embeddings, labels))


def test_the_model_serves_pmls_inference_model():
    model, data = AttentionEmbedder("test_resnet", embedding_dim=16), coloured(0)
    inference = InferenceModel(model)
    inference.train_knn(data, batch_size=16)
    distances, rows = inference.get_nearest_neighbors(data.tensors[0][:5], k=3)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert distances.shape == (5, 3)
    trunk = InferenceModel(model.trunk, embedder=model.embedder)
    torch.testing.assert_close(
        trunk.get_embeddings(data.tensors[0][:2]), inference.get_embeddings(data.tensors[0][:2])
    )


def test_our_hook_and_pmls_loss_and_miner_go_together(tmp_path):
    stock = Stock(tmp_path)
    stock.trainer.loss_funcs["metric_loss"] = losses.MultipleLosses(
        [ContrastiveClusteringLoss(), losses.MultiSimilarityLoss()]
    )
    stock.trainer.mining_funcs["tuple_miner"] = miners.MultiSimilarityMiner()
    hook = Evaluate(coloured(1), folder=tmp_path / "kept", metrics=["NMI"])
    stock.trainer.end_of_epoch_hook = hook
    stock.trainer.train(num_epochs=2)
    assert set(hook.history[2]) == {"recall_at_1", "NMI"}
    assert len(list((tmp_path / "kept" / "best").iterdir())) == 1
