"""Where a training starts: anew, after a checkpoint or a guard's choice, or with a part frozen."""

import collections
import io

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning import losses, miners
from torch.optim import lr_scheduler as schedules

from pml_tacl import AttentionEmbedder, KMeansPseudoLabeler, UnsupervisedTrainer
from pml_tacl.trainers.checkpoint import checkpoints, load_checkpoint
from tests.trainers.small import Images, make_model, make_trainer, same, state_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:one cluster contains"),
]


def guarded(**kwargs):
    trainer = make_trainer(make_model(), guard=True, keep=10, **kwargs)
    trainer.guard.share = 0.5  # so that the network that is kept is not the last one
    return trainer


def everything(trainer):
    return [p.detach().clone() for model in trainer.models.values() for p in model.parameters()]


class TestGuard:
    def test_a_checkpoint_replaces_the_last_network(self, tmp_path):
        used = guarded(checkpoint_folder=tmp_path)
        used.train(1, 3)
        used.load_checkpoint(tmp_path / "epoch_0001.pt")
        fresh = guarded()
        fresh.load_checkpoint(tmp_path / "epoch_0001.pt")
        assert same(everything(used), everything(fresh))
        used.checkpoint_folder = None
        used.train(2, 3)
        fresh.train(2, 3)
        assert same(everything(used), everything(fresh))

    def test_a_training_that_starts_again_is_not_thrown_away(self):
        trainer = guarded()
        trainer.train(1, 2)
        first, values = everything(trainer), dict(trainer.guard.values)
        trainer.train(1, 2)
        assert not same(first, everything(trainer))
        assert trainer.guard.values.keys() == values.keys()
        assert trainer.guard.values != values

    def test_a_checkpoint_after_the_choice_resumes_exactly(self, tmp_path):
        unbroken = guarded()
        unbroken.train(1, 2)
        kept = everything(unbroken)
        unbroken.save_checkpoint(tmp_path)
        assert same(kept, everything(unbroken))
        unbroken.train(3, 4)
        resumed = guarded()
        resumed.load_checkpoint(tmp_path)
        resumed.train(3, 4)
        assert same(everything(unbroken), everything(resumed))
        assert unbroken.guard.values == resumed.guard.values

    def test_only_clusters_count_as_collapsed(self):
        def nan(image):
            calls.append(0)
            return plain(image) * (float("nan") if len(calls) == 60 else 1)

        plain, calls = make_model().transform(image_size=32), []
        trainer = guarded(eval_transform=nan)
        with pytest.raises(ValueError, match=r"image \d+ of the data set is NaN"):
            trainer.train(1, 4)
        assert 0.0 not in trainer.guard.values.values()

    def test_a_model_with_other_state(self):
        class Stateful(torch.nn.Identity):
            def get_extra_state(self):
                return {"calls": [1]}

            def set_extra_state(self, state):
                assert state == {"calls": [1]}

        model = make_model()
        model.trunk.extra = Stateful()
        make_trainer(model, guard=True).train(1, 2)


class TestEpochs:
    @pytest.mark.parametrize(
        ("start", "end", "message"),
        [
            (0, 1, "start_epoch must be an integer of at least 1, got 0"),
            (1, -2, "num_epochs must be an integer of at least 0, got -2"),
            (1, 1.5, "num_epochs must be an integer of at least 0, got 1.5"),
            (1, "2", "num_epochs must be an integer of at least 0, got '2'"),
        ],
    )
    def test_wrong_numbers(self, start, end, message):
        with pytest.raises(ValueError, match=message):
            make_trainer().train(start, end)

    def test_of_a_checkpoint(self, tmp_path):
        make_trainer(checkpoint_folder=tmp_path).train(1, 2)
        trainer = make_trainer(checkpoint_folder=tmp_path)
        trainer.load_checkpoint()
        with pytest.raises(ValueError, match="from the end of epoch 2, got start_epoch=1: train"):
            trainer.train(num_epochs=3)
        assert checkpoints(tmp_path)[-1].name == "epoch_0002.pt"
        trainer.train(3, 3)
        with pytest.raises(ValueError, match="start_epoch=5 skips epoch 4"):
            trainer.train(5, 6)

    @pytest.mark.parametrize("optimizers", [None, "own"])
    def test_start_again(self, optimizers):
        given = {} if optimizers else {"optimizers": None}
        trainer = make_trainer(**given)
        rates = []
        trainer.end_of_iteration_hook = lambda t: rates.append(
            t.optimizers["trunk_optimizer"].param_groups[0]["lr"]
        )
        for _ in range(2):
            trainer.train(num_epochs=2)
        assert rates[:4] == pytest.approx(rates[4:])
        assert (len(set(rates)) > 1) == (optimizers is None)

    def test_longer_from_scratch_goes_on_with_clusters(self):
        model = AttentionEmbedder("test_resnet", pretrained=False, embedding_dim=16)
        clustered = []

        def labeler(embeddings, centroids=None):
            clustered.append(trainer.epoch)
            return KMeansPseudoLabeler(4)(embeddings, centroids)

        trainer = UnsupervisedTrainer(
            model, dataset=Images(), image_size=32, batch_size=8, images_per_cluster=2,
            iterations_per_epoch=1, labeler=labeler, progress=False,
        )  # fmt: skip
        trainer.train(1, 4)
        trainer.train(5, 8)
        assert clustered == [3, 4, 5, 6, 7, 8]

    def test_an_iteration_is_known_in_every_hook(self, tmp_path):
        seen = []
        saved = make_trainer(checkpoint_folder=tmp_path, keep=9)
        saved.test_epochs = {1}  # so that a checkpoint is written before the hook
        saved.train(1, 1)
        trainer = make_trainer(end_of_epoch_hook=lambda t: seen.append(t.get_global_iteration()))
        trainer.load_checkpoint(tmp_path / "epoch_0000_iteration_000002.pt")
        trainer.train(1, 1)
        assert seen == [saved.get_global_iteration()]

    def test_after_a_step_that_failed(self, tmp_path):
        def fail(trainer):
            if trainer.epoch == 2:
                raise RuntimeError("in a hook")

        trainer = make_trainer(checkpoint_folder=tmp_path, end_of_iteration_hook=fail)
        with pytest.raises(RuntimeError, match="in a hook"):
            trainer.train(1, 3)
        trainer.load_checkpoint()
        trainer.save_checkpoint(tmp_path / "other")
        with pytest.raises(ValueError, match=r"keep must be .*, got 2\.5"):
            trainer.save_checkpoint(tmp_path / "none", keep=2.5)
        assert not (tmp_path / "none").exists()


class TestParts:
    @pytest.mark.parametrize("amp_dtype", [None, torch.float16])
    def test_one_optimizer_of_a_frozen_trunk_trains_the_rest(self, amp_dtype):
        trainer = make_trainer(make_model(), freeze_these=["trunk"], amp_dtype=amp_dtype)
        trunk = state_of(trainer)
        embedder = [p.detach().clone() for p in trainer.models["embedder"].parameters()]
        trainer.train(1, 2)
        assert same(trunk, state_of(trainer))
        assert not same(embedder, trainer.models["embedder"].parameters())

    def test_half_precision_without_gradients_for_an_optimizer(self):
        loss = losses.ProxyAnchorLoss(24, 16)
        model = make_model()
        trainer = make_trainer(
            model,
            loss_funcs={"metric_loss": losses.MultiSimilarityLoss(), "proxy_loss": loss},
            loss_weights={"metric_loss": 1.0, "proxy_loss": 0.0},
            optimizers={
                "trunk_optimizer": torch.optim.SGD(model.parameters(), 0.01),
                "proxy_loss_optimizer": torch.optim.SGD(loss.parameters(), 0.01),
            },
            amp_dtype=torch.float16,
        )
        before = state_of(trainer)
        trainer.train(1, 2)
        assert not same(before, state_of(trainer))

    def test_a_schedule_with_a_counter_resumes(self, tmp_path):
        def begin():
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            parts = [
                schedules.LinearLR(optimizer, 0.1, total_iters=2),
                schedules.MultiStepLR(optimizer, [1, 1]),
            ]
            schedule = schedules.SequentialLR(optimizer, parts, [2])
            return make_trainer(
                model, optimizers=optimizer, lr_schedulers={"trunk_scheduler_by_epoch": schedule}
            )

        unbroken = begin()
        unbroken.train(1, 2)
        unbroken.save_checkpoint(tmp_path)
        saved = load_checkpoint(tmp_path)["parts"]["lr_schedulers"]["trunk_scheduler_by_epoch"]
        assert isinstance(saved["_schedulers"][1]["milestones"], collections.Counter)
        unbroken.train(3, 4)
        resumed = begin()
        resumed.load_checkpoint(tmp_path)
        resumed.train(3, 4)
        assert same(state_of(unbroken), state_of(resumed))

    def test_a_memory_gets_no_pairs_of_the_batch(self):
        def begin(memory):
            return make_trainer(
                loss_funcs={"metric_loss": memory},
                mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
            )

        def forward(embeddings, labels, pairs, reference, reference_labels):
            first, positive, second, negative = pairs
            assert torch.equal(labels[first], reference_labels[positive])
            assert (labels[second] != reference_labels[negative]).all()
            called.append(len(first))
            return original(embeddings, labels, pairs, reference, reference_labels)

        loss, called = losses.ContrastiveLoss(), []
        original, loss.forward = loss.forward, forward
        with pytest.raises(ValueError, match=r"CrossBatchMemory cannot use the pairs of tuple_m"):
            begin(losses.CrossBatchMemory(loss, 16, 40))
        miner = miners.MultiSimilarityMiner()
        begin(losses.CrossBatchMemory(loss, 16, 40, miner=miner)).train(1, 3)
        assert len(called) == 6

    def test_an_image_counts_once_whatever_its_error_says(self):
        class Bytes(Images):
            def __getitem__(self, index):
                if index == 5:  # the message names an address in memory
                    return Image.open(io.BytesIO(b"no image" * 10)), 0
                return super().__getitem__(index)

        trainer = make_trainer(dataset=Bytes(), max_unreadable=1)
        trainer.train(1, 6)
        assert trainer.state.unreadable.known == {"image 5"}

    @pytest.mark.parametrize("swap", ["centred", 0.7, True])
    def test_another_swap_is_refused(self, swap):
        with pytest.raises(ValueError, match=f"swap must be a BackgroundSwap.*, got {swap!r}"):
            make_trainer(swap=swap)

    def test_no_number_of_iterations_is_the_default(self):
        assert make_trainer(iterations_per_epoch=None).iterations_per_epoch == 3


def test_two_levels_of_many_copies(monkeypatch):
    monkeypatch.setattr("pml_tacl.clustering.kmeans.TWO_LEVELS_ABOVE", 50)
    rows = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    rows = np.repeat(rows, 8, axis=0)
    found = KMeansPseudoLabeler(200, num_iterations=3)(torch.from_numpy(rows))
    assert len(found.centroids) <= 40
    assert all(len(found.labels[i : i + 8].unique()) == 1 for i in range(0, 320, 8))
