"""Batches in chunks, clipped gradients, averaged weights, compiled models, moved embeddings."""

import re

import pytest
import torch
from pytorch_metric_learning import losses, miners
from torch import nn

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    AttentionEmbedder,
    BackgroundSwap,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
)
from pml_tacl.cli.run_folder import seed_everything
from pml_tacl.clustering import PseudoLabels
from pml_tacl.evaluation import embed
from pml_tacl.trainers.forward import Features, forward_in_chunks
from pml_tacl.trainers.pseudo_labeling import EmbeddingPass
from tests.trainers.small import COUNT, SIZE, Images, make_model, make_trainer, state_of


class Plain(nn.Module):
    """A backbone without BatchNorm."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.GELU(), nn.Dropout2d(dropout),
            nn.Conv2d(8, 12, 3, 2, 1), nn.GELU(), nn.Conv2d(12, 12, 4, 4),
        )  # fmt: skip

    def forward(self, images):
        return self.body(images)


def plain_model(dropout=0.0):
    torch.manual_seed(0)
    return AttentionEmbedder(Plain(dropout), embedding_dim=16, pooling="covariance")


def every_loss():
    torch.manual_seed(5)
    return {
        "metric_loss": losses.MultiSimilarityLoss(),
        "clustering_loss": ContrastiveClusteringLoss(),
        "attention_loss": AttentionConsistencyLoss(),
        "proxy_loss": losses.ProxyAnchorLoss(COUNT, 16),
    }


def gradients_of_a_step(steps, clustered, **kwargs):
    """Gradients of model and losses, and the losses, of one step in so many chunks."""
    model = plain_model().double() if kwargs.pop("double", False) else plain_model()
    seed_everything(3)
    trainer = make_trainer(
        model,
        optimizers=torch.optim.SGD(model.parameters(), 0.0),
        eval_transform=lambda image: image[:, :SIZE, :SIZE].float() / 255,
        loss_funcs=every_loss(),
        accumulation_steps=steps,
        mining_funcs={
            "tuple_miner": miners.MultiSimilarityMiner(),
            "attention_miner": AttentionConsistencyMiner(),
        },
        swap=BackgroundSwap(0.7, "distinctive"),
        warmup_epochs=0 if clustered else 1,
        iterations_per_epoch=1,
        **kwargs,
    )
    seen = []
    zero = trainer.zero_losses

    def keep_losses():
        seen.append(dict(trainer.losses))
        zero()

    trainer.zero_losses = keep_losses
    trainer.train(num_epochs=1)
    parameters = [*model.parameters(), *trainer.loss_funcs["proxy_loss"].parameters()]
    return [p.grad.clone() for p in parameters], seen[-1]


@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_chunks_give_the_gradient_of_the_whole_batch(steps, clustered):
    expected, values = gradients_of_a_step(1, clustered)
    found, found_values = gradients_of_a_step(steps, clustered)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_values, values, atol=1e-5, rtol=1e-5)
    assert float(values["attention_loss"]) != 0


def test_only_one_chunk_goes_through_the_model_at_a_time():
    sizes = []
    model = plain_model()

    def watch(module, inputs, _):
        if module.training:
            sizes.append(len(inputs[0]))

    model.trunk.register_forward_hook(watch)
    trainer = make_trainer(model, eval_transform=lambda p: p[:, :SIZE, :SIZE].float() / 255,
                           accumulation_steps=4, iterations_per_epoch=1)  # fmt: skip
    trainer.train()
    assert sizes == [4] * 4 * 2  # 16 views in four chunks, forward and again in backward


def test_both_forwards_of_a_chunk_drop_the_same_and_count_statistics_once():
    torch.manual_seed(0)
    norm, drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(5, 6), norm, drop, nn.Linear(6, 3))
    seen = []
    drop.register_forward_hook(lambda _m, _i, output: seen.append(output.detach() != 0))
    images = torch.randn(8, 5)
    features = forward_in_chunks(lambda x: Features(model(x), None), images, 2, [model])
    statistics = norm.running_mean.clone()
    assert norm.num_batches_tracked == 2
    after = torch.get_rng_state()
    features.embeddings.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[3])  # backward starts at the last chunk
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(norm.running_mean, statistics)
    assert norm.num_batches_tracked == 2
    assert norm.momentum == 0.1


def clipped(amp_dtype, limit):
    model = make_model()
    norms = []

    def clip():
        norms.append(float(nn.utils.clip_grad_norm_(model.trunk.parameters(), limit)))

    trainer = make_trainer(
        model,
        optimizers=torch.optim.SGD(model.trunk.parameters(), 1.0),
        loss_funcs={"metric_loss": losses.MultiSimilarityLoss()},
        amp_dtype=amp_dtype,
        gradient_clippers={"trunk_grad_clipper": clip},
        iterations_per_epoch=1,
        warmup_epochs=1,
    )
    # From 65536 it would have to find its way down first.
    trainer.scaler = torch.amp.GradScaler("cpu", 256.0, enabled=amp_dtype is torch.float16)
    before = state_of(trainer)
    seed_everything(2)
    trainer.train()
    moved = torch.cat([(a - b).flatten() for a, b in zip(state_of(trainer), before, strict=True)])
    return norms[0], float(moved.norm())


def test_gradients_are_clipped_before_the_step():
    norm, moved = clipped(None, 0.01)
    assert norm > 0.02
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_gradients_are_unscaled_before_they_are_clipped():
    norm, moved = clipped(torch.float16, 0.01)
    # Scaled by 256 it would be so much larger.
    assert norm == pytest.approx(clipped(None, 1e9)[0], rel=0.05)
    assert moved == pytest.approx(0.01, rel=1e-2)


def test_averaged_weights_follow_the_formula():
    model = make_model()
    expected = []

    def follow(_):
        now = {name: value.clone() for name, value in model.state_dict().items()}
        if expected:
            last = expected[-1]
            mixed = {
                name: 0.75 * last[name] + 0.25 * value if value.is_floating_point() else value
                for name, value in now.items()
            }
            expected.append(mixed)
        else:
            expected.append(now)

    trainer = make_trainer(model, ema_decay=0.75, end_of_iteration_hook=follow)
    trainer.train(num_epochs=2)
    assert isinstance(trainer.ema_model, AttentionEmbedder)
    averaged = trainer.ema_model.state_dict()
    assert list(averaged) == list(expected[-1])
    for name, value in expected[-1].items():
        if value.is_floating_point():
            torch.testing.assert_close(averaged[name], value, msg=name)
    assert not torch.equal(next(trainer.ema_model.parameters()), next(model.parameters()))


@pytest.mark.filterwarnings("ignore:one cluster contains")  # after losses of centroids alone
@pytest.mark.parametrize("momentum", [0.25, 1])
def test_centroids_follow_the_batches_until_the_next_clustering(momentum):
    begun, made, moved = [], [], []

    def labeler(embeddings, initial_centroids=None):
        begun.append(initial_centroids)
        found = KMeansPseudoLabeler(4)(embeddings, initial_centroids)
        made.append(found.centroids.clone())
        return found

    class Watching(ContrastiveClusteringLoss):
        def forward(self, embeddings, labels, *args):
            moved.append((self.centroids.clone(), embeddings.detach().clone(), labels))
            return super().forward(embeddings, labels, *args)

    loss = Watching()
    trainer = make_trainer(
        loss_funcs={"clustering_loss": loss}, labeler=labeler, centroid_momentum=momentum
    )
    trainer.train(num_epochs=2)
    for (before, embeddings, labels), (after, *_) in ((moved[0], moved[1]), (moved[2], moved[3])):
        expected = ContrastiveClusteringLoss()
        expected.set_centroids(before)
        expected.move_centroids(embeddings, labels, momentum)
        torch.testing.assert_close(after, expected.centroids)
        assert torch.equal(after, before) == (momentum == 1)
    # The next clustering begins where the batches have led them.
    last = ContrastiveClusteringLoss()
    last.set_centroids(moved[1][0])
    last.move_centroids(*moved[1][1:], momentum)
    assert begun[0] is None
    torch.testing.assert_close(begun[1], last.centroids)
    if momentum == 1:
        last.set_centroids(made[-1])
        assert torch.equal(loss.centroids, last.centroids)
    assert loss.centroids is trainer.centroids


def test_averaged_weights_are_evaluated_and_exported(tmp_path):
    trainer = make_trainer(ema_decay=0.5)
    trainer.train(num_epochs=1)
    images = [(trainer.eval_transform(image), 0) for image, _ in Images()]
    rows, _ = embed(trainer.ema_model, images, progress=False)
    trainer.ema_model.save_pretrained(tmp_path)
    again, _ = embed(AttentionEmbedder.from_pretrained(tmp_path), images, progress=False)
    torch.testing.assert_close(rows, again)
    with pytest.raises(ValueError, match="ema_model needs averaged weights: give the trainer an"):
        _ = make_trainer().ema_model


def test_averaged_weights_of_a_dictionary_of_models():
    model = make_model()
    trainer = make_trainer(
        model, models={"trunk": model.trunk, "embedder": model.embedder}, ema_decay=0.5
    )
    trainer.train(num_epochs=1)
    assert trainer.ema_model(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, 16)


def test_clusters_come_from_the_weights_that_are_trained():
    model = make_model()
    trainer = make_trainer(model, ema_decay=0.99)
    trainer.train(num_epochs=2)
    trainer.relabel()
    images = [(trainer.eval_transform(image), 0) for image, _ in Images()]
    torch.testing.assert_close(trainer.embeddings, embed(model, images, progress=False)[0])


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_under_the_same_names(monkeypatch):
    compiled = []
    original = torch.compile

    def watched(function):
        compiled.append(function)
        return original(function, backend="eager")  # this test is not of the compiler

    monkeypatch.setattr(torch, "compile", watched)
    results = []
    for compile_it in (False, True):
        seed_everything(4)
        model = make_model()
        names = list(model.state_dict())
        trainer = make_trainer(model, compile=compile_it)
        trainer.train(num_epochs=1)
        assert list(model.state_dict()) == names
        results.append(state_of(trainer))
    assert len(compiled) == 1
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("threshold", [0.0, 0.5, None])
def test_clusters_stay_while_the_embeddings_have_hardly_moved(threshold, caplog):
    calls = []

    def labeler(embeddings, initial_centroids=None):
        calls.append(len(embeddings))
        return KMeansPseudoLabeler(4)(embeddings, initial_centroids)

    trainer = make_trainer(labeler=labeler, recluster_when_moved=threshold)
    with caplog.at_level("INFO", "pml_tacl"):
        trainer.train(num_epochs=3)
    assert calls == [COUNT] * (1 if threshold == 0.5 else 3)
    assert ("embeddings have moved by" in caplog.text) == (threshold is not None)


def test_how_far_embeddings_have_moved_is_the_mean_cosine_distance(monkeypatch):
    trainer = make_trainer(recluster_when_moved=0.4)
    trainer.relabel()
    trainer.epoch = 2
    kept = trainer.embeddings
    assert torch.equal(trainer.state.moved_from, kept)  # fewer images than the sample
    everything = torch.arange(COUNT)
    half = kept.clone()
    half[: COUNT // 2] *= -1  # cosine distance 2 for half of them: 1 on average
    monkeypatch.setattr(EmbeddingPass, "__call__", lambda *_: (half, everything))
    assert trainer._clustering_is_due()
    few = kept.clone()
    few[:4] *= -1  # 2 * 4 / 24
    monkeypatch.setattr(EmbeddingPass, "__call__", lambda *_: (few, everything))
    assert not trainer._clustering_is_due()


def test_the_embedding_pass_is_in_the_trainer_s_precision_without_gradients():
    seen = []
    model = make_model()
    model.trunk.model.conv1.register_forward_hook(
        lambda module, _, output: seen.append(
            (module.training, output.dtype, torch.is_grad_enabled())
        )
    )
    trainer = make_trainer(model, amp_dtype=torch.bfloat16)
    trainer.relabel()
    assert set(seen) == {(False, torch.bfloat16, False)}
    assert trainer.embeddings.dtype == torch.float32
    assert trainer.embeddings.shape == (COUNT, 16)


def test_the_bar_shows_every_loss_and_the_speed(capsys):
    trainer = make_trainer(progress=True)
    trainer.train(num_epochs=1)
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown
    for part in ("metric ", "clustering ", "attention ", "total ", "img/s"):
        assert part in shown, part


@pytest.mark.parametrize("columns", [80, 160])
def test_the_bar_of_a_narrow_terminal_shows_the_sum_and_the_time_left(columns, capsys, monkeypatch):
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (columns, 24))
    trainer = make_trainer(progress=True)
    trainer.train(num_epochs=1)
    bars = [bar.rstrip() for bar in capsys.readouterr().err.split("\r") if "epoch 1/1" in bar]
    assert max(map(len, bars)) <= columns
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*, total \d+\.\d{3}\]$", bars[-1]), bars[-1]
    assert ("metric " in bars[-1]) == (columns == 160)


def test_labels_of_noise_reach_no_loss():
    seen = []

    class Watching(losses.MultiSimilarityLoss):
        def forward(self, embeddings, labels, *args):
            seen.append(labels)
            return super().forward(embeddings, labels, *args)

    def labeler(embeddings, initial_centroids=None):
        labels = torch.arange(COUNT) % 5 - 1
        return PseudoLabels(labels, nn.functional.normalize(torch.randn(4, 16)), torch.zeros(COUNT))

    make_trainer(labeler=labeler, loss_funcs={"metric_loss": Watching()}).train(num_epochs=2)
    assert torch.cat(seen).unique().tolist() == [0, 1, 2, 3]
