import copy
import logging

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners, samplers
from pytorch_metric_learning.losses import SelfSupervisedLoss

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    BackgroundSwap,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
    KMeansPseudoLabeler,
    functional,
)
from pml_tacl.cli.run_folder import seed_everything
from pml_tacl.clustering import PseudoLabels, pseudo_labels_from
from pml_tacl.trainers.checkpoint import checkpoints
from pml_tacl.trainers.data import Batch
from pml_tacl.trainers.forward import forward_of, swap_background

from .small import BATCH, COUNT, SIZE, Images, make_model, make_trainer, same, state_of


def test_training_moves_every_trainable_part_and_sets_centroids():
    trainer = make_trainer(mining_funcs={"attention_miner": AttentionConsistencyMiner()})
    before = {
        name: [p.detach().clone() for p in module.parameters()]
        for name, module in trainer.models.items()
    }
    trainer.train(num_epochs=1)
    for name, module in trainer.models.items():
        assert not same(before[name], [p.detach() for p in module.parameters()]), name
    centroids = trainer.loss_funcs["clustering_loss"].centroids
    assert centroids.shape == (len(trainer.labels.unique()), 16)
    torch.testing.assert_close(centroids, trainer.centroids)


def test_batches_hold_the_pseudo_labels_of_their_images():
    trainer = make_trainer()
    trainer.set_pseudo_labels(torch.arange(COUNT) % 4, torch.eye(4, 16))
    trainer.initialize_dataloader()
    source = Images().images
    views = [trainer.eval_transform(image) for image in source]
    trainer.transform = lambda image: (trainer.eval_transform(image),) * 2 + (torch.zeros(4, 2),)
    trainer.initialize_dataloader()
    batch = trainer.get_batch()
    for view, label in zip(batch.views, batch.labels, strict=True):
        matches = [i for i, known in enumerate(views) if torch.equal(known, view)]
        assert int(label) in {i % 4 for i in matches}
    assert batch.labels.bincount().tolist() == [2, 2, 2, 2]


def test_noise_is_never_drawn():
    trainer = make_trainer()
    labels = torch.arange(COUNT) % 4
    labels[torch.arange(0, COUNT, 3)] = -1
    trainer.set_pseudo_labels(labels, torch.eye(4, 16))
    for _ in range(3):
        trainer.initialize_dataloader()
        for *_, index, _ in trainer.dataloader:
            assert (labels[index] >= 0).all()


def test_a_new_clustering_reaches_the_next_epoch_with_workers():
    seen = []

    def labeler(embeddings, initial_centroids=None):
        # Another numbering at each call: a stale loader would show the old one.
        shift = 10 * len(seen)
        seen.append(shift)
        labels = torch.arange(COUNT) % 4
        centroids = torch.nn.functional.normalize(torch.randn(shift + 4, 16), dim=1)
        return PseudoLabels(labels + shift, centroids, torch.zeros(COUNT))

    drawn = []
    trainer = make_trainer(
        labeler=labeler, dataloader_num_workers=2, iterations_per_epoch=3, loss_weights=None
    )
    get_batch = trainer.get_batch

    def watched():
        batch = get_batch()
        drawn.append((trainer.epoch, batch.labels))
        return batch

    trainer.get_batch = watched
    trainer.train(num_epochs=2)
    assert len(drawn) == 6
    for epoch, labels in drawn:
        assert labels.min() >= 10 * (epoch - 1)
        assert labels.max() < 10 * (epoch - 1) + 4


def test_warm_up_makes_every_image_its_own_cluster():
    calls = []

    def labeler(embeddings, initial_centroids=None):
        calls.append(initial_centroids)
        return KMeansPseudoLabeler(4)(embeddings, initial_centroids)

    trainer = make_trainer(labeler=labeler, warmup_epochs=1, recluster_every=2)
    trainer.train(num_epochs=1)
    assert trainer.labels.tolist() == list(range(COUNT))
    assert trainer.centroids is None
    trainer.train(start_epoch=2, num_epochs=5)  # clusterings due in epochs 2 and 4
    assert len(calls) == 2
    assert calls[0] is None
    assert calls[1].shape[1] == 16


def test_total_loss_is_the_weighted_sum_of_what_each_loss_gives():
    model = make_model()
    weights = {"metric_loss": 0.5, "clustering_loss": 2.0, "attention_loss": 3.0}
    funcs = {
        "metric_loss": losses.TripletMarginLoss(),
        "clustering_loss": ContrastiveClusteringLoss(),
        "attention_loss": AttentionConsistencyLoss(),
    }
    miner = miners.MultiSimilarityMiner()
    trainer = make_trainer(
        model, loss_funcs=funcs, loss_weights=weights, mining_funcs={"tuple_miner": miner}
    )
    trainer.set_pseudo_labels(torch.arange(COUNT) % 4, torch.eye(4, 16))
    trainer.initialize_dataloader()
    model.eval()  # batch statistics would differ between one pass and two
    batch = trainer.get_batch()
    trainer.get_batch = lambda: batch
    with torch.no_grad():
        out = model.forward_features(torch.cat([batch.views, batch.transformed]))
        both = torch.cat([batch.labels] * 2)
        expected = 0.5 * funcs["metric_loss"](
            out.embeddings, both, miner(out.embeddings, both)
        ) + 2 * funcs["clustering_loss"](out.embeddings, both)
        first, second = out.feature_maps.chunk(2)
        expected += 3 * funcs["attention_loss"](first, second, batch.points, batch.labels)
    trainer.forward_and_backward()
    torch.testing.assert_close(trainer.losses["total_loss"], expected)


def test_self_supervised_loss_gets_the_two_views():
    funcs = {"contrastive": SelfSupervisedLoss(losses.NTXentLoss())}
    trainer = make_trainer(loss_funcs=funcs, warmup_epochs=1)
    before = state_of(trainer)
    trainer.train(num_epochs=1)
    assert not same(before, state_of(trainer))


@pytest.mark.parametrize("mask", ["centred", "distinctive"])
def test_swapped_surroundings_weigh_cells_by_what_both_views_kept(mask):
    torch.manual_seed(0)
    trunk = make_model().trunk.train()
    views, transformed = torch.randn(2, 6, 3, SIZE, SIZE)
    points = torch.rand(6, 4, 2) * 2 - 1
    batch = Batch(views, transformed, points, torch.tensor([0, 0, 1, 1, 2, 2]))
    statistics = copy.deepcopy(trunk.state_dict())
    first, second, weights = swap_background(BackgroundSwap(1.0, mask), trunk, batch, (2, 2))
    assert first.shape == second.shape == views.shape
    assert not torch.equal(first, views)
    assert weights.shape == (6, 4)
    assert 0 < weights.min() < weights.max() < 1
    # Looking for the common must leave no trace in the running statistics.
    assert all(torch.equal(statistics[k], v) for k, v in trunk.state_dict().items())
    assert all(module.training for module in trunk.modules())
    untouched = swap_background(BackgroundSwap(0.0, mask), trunk, batch, (2, 2))
    assert torch.equal(untouched[0], views)
    torch.testing.assert_close(untouched[2], torch.ones(6, 4))


def test_swap_reaches_the_attention_loss(monkeypatch):
    seen = []
    original = functional.attention_consistency

    def spy(*args, **kwargs):
        seen.append(args[5])
        return original(*args, **kwargs)

    monkeypatch.setattr("pml_tacl.losses.attention_consistency_loss.attention_consistency", spy)
    make_trainer(swap=BackgroundSwap(1.0, "centred")).train(num_epochs=1)
    assert seen
    assert all(w.shape == (BATCH, 4) and w.max() < 1 for w in seen)


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, None])
def test_mixed_precision_trains(amp_dtype):
    trainer = make_trainer(amp_dtype=amp_dtype)
    before = state_of(trainer)
    trainer.train(num_epochs=1)
    after = state_of(trainer)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after)
    assert not same(before, after)


def test_losses_are_summed_in_single_precision():
    seen = set()

    class Watching(losses.MultiSimilarityLoss):
        def compute_loss(self, embeddings, *args):
            seen.add((embeddings.dtype, (embeddings @ embeddings.T).dtype))
            return super().compute_loss(embeddings, *args)

    trainer = make_trainer(amp_dtype=torch.bfloat16, loss_funcs={"metric_loss": Watching()})
    # A head of the user's gives what autocast gives.
    trainer.models["trunk"] = torch.nn.Flatten()
    trainer.models["embedder"] = torch.nn.Linear(3 * SIZE * SIZE, 16)
    trainer.forward_features = forward_of(trainer.models)
    trainer.train(num_epochs=1)
    assert seen == {(torch.float32, torch.float32)}


@pytest.mark.slow
def test_resumed_training_ends_bit_for_bit_like_an_unbroken_one(tmp_path):
    def fresh(folder):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return make_trainer(
            model,
            optimizers=optimizer,
            lr_schedulers={"trunk_scheduler_by_iteration": schedule},
            warmup_epochs=1,
            end_of_epoch_hook=lambda t: t.save_checkpoint(folder, extra={"seen": t.epoch}),
        )

    seed_everything(1)
    whole = fresh(tmp_path / "whole")
    whole.train(num_epochs=4)
    end = state_of(whole)

    for stop in (1, 2, 3):
        seed_everything(1)
        folder = tmp_path / f"stopped after {stop}"
        first = fresh(folder)
        first.train(num_epochs=stop)
        seed_everything(99)  # whatever the new process would have drawn
        second = fresh(folder)
        assert second.load_checkpoint(folder) == {"seen": stop}
        second.train(start_epoch=second.epoch + 1, num_epochs=4)
        assert same(end, state_of(second)), stop
        assert torch.equal(whole.labels, second.labels)
        torch.testing.assert_close(
            whole.loss_funcs["clustering_loss"].centroids,
            second.loss_funcs["clustering_loss"].centroids,
            rtol=0,
            atol=0,
        )


def test_checkpoints_keep_the_last_and_survive_a_failed_write(tmp_path, monkeypatch):
    trainer = make_trainer()
    for epoch in range(1, 5):
        trainer.state.ended = epoch
        trainer.save_checkpoint(tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["epoch_0003.pt", "epoch_0004.pt"]
    content = checkpoints(tmp_path)[-1].read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pml_tacl.trainers.checkpoint.torch.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_0003.pt", "epoch_0004.pt"]
    assert checkpoints(tmp_path)[-1].read_bytes() == content


def test_checkpoints_of_something_else_are_refused(tmp_path):
    trainer = make_trainer()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        trainer.load_checkpoint(tmp_path)
    trainer.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="24 images, but the data set has 20"):
        make_trainer(dataset=Images(20)).load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="checkpoint contains loss_funcs"):
        make_trainer(loss_funcs={"metric_loss": losses.NTXentLoss()}).load_checkpoint(tmp_path)


def test_a_loss_that_is_not_finite_stops_with_its_name():
    class Broken(losses.MultiSimilarityLoss):
        def forward(self, embeddings, *args):
            return super().forward(embeddings, *args) * float("nan")

    trainer = make_trainer(loss_funcs={"metric_loss": Broken()}, warmup_epochs=1)
    before = state_of(trainer)
    with pytest.raises(FloatingPointError, match=r"epoch 1, iteration 0 \(metric_loss nan"):
        trainer.train(num_epochs=1)
    assert same(before, state_of(trainer))


def test_nan_images_are_reported_before_a_step():
    class Bad(Images):
        def __getitem__(self, index):
            return torch.full((3, 40, 40), 255, dtype=torch.uint8), 0

    trainer = make_trainer(dataset=Bad())
    trainer.eval_transform = lambda image: torch.full((3, SIZE, SIZE), float("nan"))
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        trainer.train(num_epochs=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_nan_image_is_named_before_it_reaches_the_model(workers):
    model = make_model()
    to_input = model.transform(image_size=SIZE)

    def siamese(image):
        view = to_input(image)
        if torch.equal(image, Images().images[5]):
            view[0, 3, 3] = float("nan")
        return to_input(image), view, torch.zeros(4, 2)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(
        model,
        transform=siamese,
        warmup_epochs=1,
        dataloader_num_workers=workers,
        batch_size=COUNT,
        images_per_cluster=6,
    )
    with pytest.raises(ValueError, match="image 5 of the data set is NaN or infinite"):
        trainer.train(num_epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_few_clusters_for_a_batch_say_so():
    def labeler(embeddings, initial_centroids=None):
        return pseudo_labels_from(torch.arange(COUNT) % 2, embeddings)

    with pytest.raises(ValueError, match="needs 4 clusters, got 2"):
        make_trainer(labeler=labeler).train(num_epochs=1)


def test_hooks_run_as_in_pml_and_can_end_the_training():
    seen = []

    def stop(trainer):
        seen.append(("epoch", trainer.epoch))
        return trainer.epoch < 2

    trainer = make_trainer(
        end_of_iteration_hook=lambda t: seen.append(
            (t.epoch, t.iteration, t.get_global_iteration())
        ),
        end_of_epoch_hook=stop,
    )
    trainer.train(num_epochs=5)
    assert seen == [(1, 0, 0), (1, 1, 1), ("epoch", 1), (2, 0, 2), (2, 1, 3), ("epoch", 2)]


def test_frozen_trunk_stays():
    model = make_model()
    trainer = make_trainer(
        model,
        optimizers={
            "trunk_optimizer": torch.optim.SGD(model.trunk.parameters(), 0.1),
            "embedder_optimizer": torch.optim.SGD(model.embedder.parameters(), 0.1),
        },
        freeze_these=("trunk",),
    )
    before = state_of(trainer)
    head = [p.detach().clone() for p in model.embedder.parameters()]
    trainer.train(num_epochs=1)
    assert same(before, state_of(trainer))
    assert not same(head, [p.detach() for p in model.embedder.parameters()])


def test_mined_clusters_follow_the_centroids():
    miner = ContrastiveClusteringMiner()
    trainer = make_trainer(mining_funcs={"tuple_miner": miner})
    trainer.train(num_epochs=1)
    torch.testing.assert_close(miner.centroids, trainer.centroids)


def test_the_clustering_is_logged(caplog):
    with caplog.at_level(logging.INFO, "pml_tacl"):
        make_trainer().relabel()
    assert "4 clusters, 0 images are noise" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 25}, "batch_size must be from 1 to the number of images, 24, got 25"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 4.0}, "batch_size must be an integer of at least 1, got 4.0"),
        ({"images_per_cluster": 3}, "images_per_cluster must divide batch_size=8, got 3"),
        ({"images_per_cluster": 0}, "images_per_cluster must be an integer of at least 1, got 0"),
        ({"images_per_cluster": 2.0}, "images_per_cluster must be an integer .* got 2.0"),
        ({"recluster_every": 0}, "^recluster_every must be an integer of at least 1, got 0$"),
        ({"warmup_epochs": -1}, "^warmup_epochs must be an integer of at least 0, got -1$"),
        ({"amp_dtype": torch.float64}, "amp_dtype must be"),
        (
            {"recluster_when_moved": 3.0},
            r"recluster_when_moved must be a number in \[0, 2\] or None, got 3",
        ),
        ({"recluster_when_moved": "a"}, "recluster_when_moved must be a number .* got 'a'"),
        ({"accumulation_steps": 0}, "accumulation_steps must be an integer of at least 1, got 0"),
        ({"accumulation_steps": 2.5}, "accumulation_steps must be an integer .* got 2.5"),
        ({"accumulation_steps": 9}, "accumulation_steps must be from 1 to batch_size=8, got 9"),
        ({"centroid_momentum": 1.5}, r"centroid_momentum must be a number in \[0, 1\], got 1.5"),
        ({"ema_decay": 1.0}, r"ema_decay must be a number in \(0, 1\) or None, got 1"),
        ({"ema_decay": "a"}, r"ema_decay must be a number in \(0, 1\) or None, got 'a'"),
        ({"max_unreadable": -1}, "max_unreadable must be an integer of at least 0, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1 or None"),
        ({"keep": 0}, "keep must be an integer of at least 1, got 0"),
        ({"mining_funcs": {"tuple_miners": None}}, "^mining_funcs .*tuple_miners"),
        ({"loss_funcs": {}}, r"^loss_funcs must be a dict .* got \{\}"),
        ({"loss_funcs": losses.NTXentLoss()}, "loss_funcs must be a dict .* got NTXentLoss$"),
        ({"loss_weights": {"metric": 1.0}}, r"^loss_weights .*loss_funcs.*\['metric'\]"),
        ({"labeler": 3}, "^labeler must be callable, got 3"),
        ({"eval_transform": 3}, "^eval_transform must be callable, got 3"),
        (
            {"labeler": KMeansPseudoLabeler(25)},
            "num_clusters=25 is more than the number of images, 24",
        ),
        ({"labeler": KMeansPseudoLabeler(3)}, "needs 4 clusters, got 3"),
        (
            {"labeler": KMeansPseudoLabeler(np.int64(3))},
            "needs 4 clusters, got 3",
        ),
        ({"labeler": KMeansPseudoLabeler("auto")}, "needs 4 clusters, got 2"),
        (
            {"labeler": KMeansPseudoLabeler("auto", max_points=3), "dataset": Images(200)},
            "needs 4 clusters, got 3",
        ),
        (
            {
                "labeler": KMeansPseudoLabeler("auto"),
                "dataset": Images(1),
                "batch_size": 1,
                "images_per_cluster": 1,
            },
            "num_clusters=2 is more than the number of images, 1:",
        ),
    ],
)
def test_arguments_are_checked_before_anything_is_computed(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**kwargs)


def test_auto_clusters_that_are_as_many_as_a_batch_needs_are_let_through():
    trainer = make_trainer(dataset=Images(40), labeler=KMeansPseudoLabeler("auto"))
    trainer.relabel()
    assert len(trainer.centroids) == 4


def test_a_trunk_without_feature_maps_is_told_about_attention():
    model = make_model()

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, images):
            return self.body(images)

    trainer = make_trainer(
        model, models={"trunk": Plain(), "embedder": torch.nn.Identity()}, warmup_epochs=1
    )
    with pytest.raises(ValueError, match="feature_maps: use AttentionEmbedder"):
        trainer.train(num_epochs=1)


def test_sampler_is_pmls_own(monkeypatch):
    used = []

    class Watched(samplers.MPerClassSampler):
        def __init__(self, *args, **kwargs):
            used.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("pml_tacl.trainers.data.MPerClassSampler", Watched)
    make_trainer().train(num_epochs=1)
    assert len(used) == 1
