"""A trainer that is given a model and a data set alone, and the guard that it has."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pml_tacl import AttentionEmbedder, UnsupervisedTrainer
from pml_tacl.cli.run_folder import seed_everything
from pml_tacl.clustering.kmeans import have_collapsed
from pml_tacl.datasets import ImageFiles
from pml_tacl.evaluation import embed
from pml_tacl.evaluation.label_free import mutual_neighbours
from pml_tacl.search import ImageIndex
from pml_tacl.trainers.defaults import default_schedule
from pml_tacl.trainers.guard import Guard, load_network, network_state
from pml_tacl.trainers.recipe import PRETRAINED, PRETRAINED_LAYERNORM, SCRATCH, recipe_for

pytestmark = pytest.mark.usefixtures("few_channels")
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of six kinds, told apart by colour and place."""
    root = tmp_path_factory.mktemp("data") / "photos"
    root.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(48):
        pixels = torch.rand(3, SIZE, SIZE, generator=generator) * 90
        kind = i % 6
        pixels[kind % 3, 10 * (kind // 3) : 30 + 10 * (kind // 3)] += 150
        image = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
        image.save(root / f"{i:02}.png")
    return root


def pretrained_model(seed=0):
    torch.manual_seed(seed)
    model = AttentionEmbedder("test_resnet", embedding_dim=16, freeze_batchnorm=True)
    model.from_scratch = False
    return model


def same(mine, theirs):
    return all(torch.equal(value, theirs[name]) for name, value in mine.items())


def trainer_of(model, folder, run, **kwargs):
    return UnsupervisedTrainer(
        model, dataset=folder, image_size=SIZE, run=run, progress=False, **kwargs
    )


def test_three_lines_end_with_a_model_an_index_and_a_verdict(folder, tmp_path, capsys):
    model = pretrained_model()
    trainer = UnsupervisedTrainer(model, dataset=str(folder), image_size=SIZE, run=tmp_path / "run")
    trainer.train(num_epochs=2)
    said = capsys.readouterr().out
    assert "mutual neighbours" in said
    assert "48 images indexed" in said
    again = AttentionEmbedder.from_pretrained(tmp_path / "run" / "model")
    assert again.embedder.is_fitted
    index = ImageIndex.load(tmp_path / "run")
    assert len(index) == 48
    assert index.embeddings.shape[1] == again.embedder.embedding_dim <= 16


def test_the_averaged_model_is_written_and_its_embeddings_indexed(folder, tmp_path):
    trainer = trainer_of(
        pretrained_model(),
        folder,
        tmp_path / "run",
        ema_decay=0.5,
        guard=False,
        iterations_per_epoch=3,
    )
    for epochs in (1, 2):  # the second training begins with a projection of the first
        trainer.train(num_epochs=epochs, start_epoch=epochs)
        (tmp_path / "run").rename(tmp_path / f"run {epochs}")
        again = AttentionEmbedder.from_pretrained(tmp_path / f"run {epochs}" / "model")
        assert again.embedder.is_fitted
        assert same(again.trunk.state_dict(), trainer.ema_model.trunk.state_dict())
        assert not same(again.trunk.state_dict(), trainer.whole.trunk.state_dict())
        index = ImageIndex.load(tmp_path / f"run {epochs}")
        images = ImageFiles(folder, transform=trainer.eval_transform, progress=False)
        found = embed(again, images, progress=False)[0]
        torch.testing.assert_close(torch.as_tensor(index.embeddings), found)


def test_a_model_that_cannot_be_written_is_refused_before_the_training(folder, tmp_path):
    given = {"trunk": torch.nn.Flatten()}
    with pytest.raises(ValueError, match=r"needs an AttentionEmbedder.* got Sequential: .*ImageF"):
        UnsupervisedTrainer(given, dataset=folder, transform=len, eval_transform=len)


def test_a_checkpoint_that_does_not_fit_leaves_the_default_schedule_out(folder, tmp_path):
    def begin(run, dataset=folder, **kwargs):
        return trainer_of(pretrained_model(), dataset, tmp_path / run, **kwargs)

    begin("run", checkpoint_folder=tmp_path / "saved").train(num_epochs=1)
    images = ImageFiles(folder, files=[f"{i:02}.png" for i in range(40)], progress=False)
    trainer = UnsupervisedTrainer(pretrained_model(), dataset=images, image_size=SIZE)
    before = copy.deepcopy(trainer.optimizers["trunk_optimizer"].state_dict())
    with pytest.raises(ValueError, match="written with 48 images, but the data set has 40"):
        trainer.load_checkpoint(tmp_path / "saved")
    assert trainer.lr_schedulers == {}
    assert trainer.optimizers["trunk_optimizer"].state_dict() == before


def test_a_guard_is_not_added_on_a_resume(folder, tmp_path):
    def begin(run, **kwargs):
        saved = tmp_path / "saved"
        return trainer_of(
            pretrained_model(), folder, tmp_path / run, checkpoint_folder=saved, **kwargs
        )

    begin("run", guard=False).train(num_epochs=1)
    with pytest.raises(ValueError, match=r"written without a guard.*: resume with guard=False"):
        begin("again").load_checkpoint()
    begin("once more", guard=False).load_checkpoint()


def test_a_run_that_is_there_is_not_written_over(folder, tmp_path):
    trainer_of(pretrained_model(), folder, tmp_path / "run").finish()
    with pytest.raises(ValueError, match=r"run=.* already contains a run"):
        trainer_of(pretrained_model(), folder, tmp_path / "run")


@pytest.mark.slow
def test_resumed_with_defaults_it_ends_bit_for_bit_like_an_unbroken_one(folder, tmp_path):
    def begin(name, checkpoints, seed):
        torch.manual_seed(seed)
        return trainer_of(
            pretrained_model(seed), folder, tmp_path / name, checkpoint_folder=checkpoints
        )

    unbroken = begin("a", tmp_path / "c1", 0)
    seed_everything(5)
    unbroken.train(num_epochs=3)
    broken = begin("b", tmp_path / "c2", 0)

    def stop(trainer):
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    broken.end_of_epoch_hook = stop
    seed_everything(5)
    with pytest.raises(KeyboardInterrupt):
        broken.train(num_epochs=3)
    resumed = begin("d", tmp_path / "c2", 3)  # of other weights, which the checkpoint replaces
    resumed.load_checkpoint()
    resumed.train(resumed.epoch + 1, 3)
    assert resumed.guard.values == unbroken.guard.values
    for mine, theirs in zip(
        resumed.whole.state_dict().values(), unbroken.whole.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


class TestGuard:
    @pytest.mark.parametrize(
        ("after", "said"),
        [(0.53, "training helped"), (0.515, "training changed little"), (0.49, "changed little")],
    )
    def test_a_small_rise_is_not_called_a_help(self, after, said):
        guard = Guard(0.75)
        guard.values, guard.kept = {0: 0.5, 3: after}, 3
        assert said in guard.verdict()
        assert f"50.0 % before training, {100 * after:.1f} % after epoch" in guard.verdict()

    def test_the_untrained_network_is_kept_if_training_does_harm(self, folder, tmp_path, capsys):
        model = pretrained_model()
        before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
        trainer = trainer_of(model, folder, tmp_path / "run")
        for group in trainer.optimizers["trunk_optimizer"].param_groups:
            group["lr"] = group["initial_lr"] = 3.0  # destroys it
        trainer._schedule_is_open = False
        trainer.train(num_epochs=2)
        assert trainer.guard.kept == 0
        assert trainer.guard.start_is_kept
        assert trainer.verdict.startswith("training did not help")
        for name, value in model.trunk.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)

    def test_training_goes_on_from_the_last_network(self, folder, tmp_path):
        model = pretrained_model()
        trainer = trainer_of(model, folder, tmp_path / "run")
        trainer.run = None
        start = {k: v.clone() for k, v in model.trunk.state_dict().items()}
        trainer.guard.look = lambda trainer, _: trainer.guard.values.update({trainer.ended: 0.1})
        trainer.guard.kept, trainer.guard.values = 0, {0: 0.9}
        trainer.guard._state = trainer.guard._start = network_state(trainer)
        trainer.train(num_epochs=1)
        assert same(model.trunk.state_dict(), start)  # what is kept
        last = trainer._last["trunk"]
        assert not same(last, start)
        load_network(trainer, trainer._last)
        assert same(model.trunk.state_dict(), last)

    def test_collapsed_embeddings_are_the_worst(self):
        generator = torch.Generator().manual_seed(0)
        same_for_all = torch.ones(50, 8) + 1e-7 * torch.randn(50, 8, generator=generator)
        assert have_collapsed(same_for_all)
        assert have_collapsed(torch.zeros(50, 8))  # no direction at all
        assert not have_collapsed(torch.randn(50, 8, generator=generator))
        assert not have_collapsed(torch.ones(50, 8) + 0.1 * torch.randn(50, 8, generator=generator))

    def test_falls_only_after_two_looks_clearly_below_the_best(self):
        guard = Guard()
        for values, expected in (
            ({0: 0.5, 1: 0.6}, False),
            ({0: 0.5, 1: 0.6, 2: 0.5}, False),
            ({0: 0.5, 1: 0.6, 2: 0.5, 3: 0.57}, True),
            ({0: 0.5, 1: 0.6, 2: 0.5, 3: 0.59}, False),
        ):
            guard.values = values
            assert guard.falls is expected, values

    def test_the_last_network_that_is_not_clearly_below_the_highest_is_kept(self, monkeypatch):
        trainer = SimpleNamespace(ended=0, models={"trunk": torch.nn.Linear(1, 1)}, average=None)
        guard, embeddings = Guard(), torch.randn(5, 2)
        for ended, value, kept in (
            (0, 0.55, 0),
            (1, 0.54, 1),
            (2, 0.60, 2),
            (3, 0.579, 2),
            (4, 0.581, 4),
            (5, 0.3, 4),
        ):
            trainer.ended = ended
            monkeypatch.setattr("pml_tacl.trainers.guard.mutual_neighbours", lambda _, v=value: v)
            guard.look(trainer, embeddings)
            assert guard.kept == kept
        assert "epoch 4 is kept" in guard.verdict()

    @pytest.mark.parametrize("share", [0.25, 1.0])
    def test_the_kept_weights_are_the_mean_with_the_untrained_ones(self, folder, tmp_path, share):
        model = pretrained_model()
        start = {k: v.clone() for k, v in model.trunk.state_dict().items()}
        trainer = trainer_of(model, folder, tmp_path / "run")
        trainer.guard.share = share
        trainer.run = None
        trainer.train(num_epochs=1)
        trainer.guard.kept, trainer.guard._state = 1, trainer._last
        trainer.guard.restore_kept(trainer)
        for key, now in model.trunk.state_dict().items():
            last = trainer._last["trunk"][key]
            if now.is_floating_point():
                expected = (1 - share) * start[key] + share * last
                torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(now, last)
        assert not same(model.trunk.state_dict(), start)

    @pytest.mark.parametrize("share", [0, 1.5, float("nan")])
    def test_a_share_out_of_its_range_is_refused(self, share):
        with pytest.raises(ValueError, match="share"):
            Guard(share)

    def test_warm_up_and_guard_exclude_each_other(self, folder, tmp_path):
        with pytest.raises(ValueError, match="guard compares with the pretrained network"):
            trainer_of(pretrained_model(), folder, tmp_path / "run", warmup_epochs=1, guard=True)
        alone = trainer_of(pretrained_model(), folder, tmp_path / "run", warmup_epochs=1)
        assert alone.guard is None
        scratch = AttentionEmbedder("test_resnet", embedding_dim=16)  # its warm-up is a default
        with pytest.raises(ValueError, match="guard compares with the pretrained network"):
            trainer_of(scratch, folder, tmp_path / "run", guard=True)
        assert trainer_of(scratch, folder, tmp_path / "run", guard=True, warmup_epochs=0).guard


class TestRecipe:
    def test_of_networks(self):
        scratch = AttentionEmbedder("test_resnet")
        assert recipe_for(scratch) is SCRATCH
        assert recipe_for(pretrained_model()) is PRETRAINED
        vit = AttentionEmbedder("test_vit", dynamic_img_size=True)
        vit.from_scratch = False
        assert recipe_for(vit) is PRETRAINED_LAYERNORM

    @pytest.mark.parametrize("count", [8, 36, 63, 64, 600, 5000, 10**6])
    def test_of_numbers_of_images(self, count):
        batch = PRETRAINED.batch_size_for(count)
        assert batch % PRETRAINED.images_per_cluster == 0
        assert batch <= min(count, 64)
        clusters = PRETRAINED.clusters(count)
        assert batch // PRETRAINED.images_per_cluster <= clusters <= count
        made = PRETRAINED.epochs(count) * (count // batch)
        assert made >= PRETRAINED.steps(count)

    def test_too_few_images(self, tmp_path):
        (tmp_path / "few").mkdir()
        for i in range(5):
            Image.new("RGB", (SIZE, SIZE), (i * 40, 0, 0)).save(tmp_path / "few" / f"{i}.png")
        with pytest.raises(ValueError, match="dataset contains 5 images"):
            trainer_of(pretrained_model(), tmp_path / "few", tmp_path / "run")


class TestMutualNeighbours:
    def brute_force(self, embeddings, k):
        unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
        near = []
        for i in range(len(unit)):
            order = sorted(
                (j for j in range(len(unit)) if j != i), key=lambda j: -float(unit[i] @ unit[j])
            )
            near.append(set(order[:k]))
        found = sum(i in near[j] for i in range(len(unit)) for j in near[i])
        return found / (len(unit) * k)

    @pytest.mark.parametrize("k", [1, 3, 10])
    def test_against_brute_force(self, k):
        embeddings = torch.randn(40, 5, generator=torch.Generator().manual_seed(k)) + 1
        assert mutual_neighbours(embeddings, k) == pytest.approx(self.brute_force(embeddings, k))

    def test_odd_inputs(self):
        assert mutual_neighbours(torch.randn(2, 4)) == 0
        embeddings = torch.randn(30, 4)
        embeddings[3] = torch.nan
        whole = torch.cat([embeddings[:3], embeddings[4:]])
        assert mutual_neighbours(embeddings) == mutual_neighbours(whole)
        assert mutual_neighbours(embeddings[:, ::2].half()) >= 0
        for bad, message in (({"k": 0}, "k must"), ({"max_images": 0}, "max_images must")):
            with pytest.raises(ValueError, match=message):
                mutual_neighbours(torch.randn(5, 2), **bad)
        with pytest.raises(ValueError, match=r"embeddings must be \(N, D\)"):
            mutual_neighbours(torch.randn(5))


@pytest.mark.slow
def test_metrics_of_a_run_say_what_was_kept(folder, tmp_path):
    from pml_tacl.cli.main import main

    weights = tmp_path / "w.pth"
    torch.save(AttentionEmbedder("test_resnet").trunk.model.state_dict(), weights)
    run = tmp_path / "run"
    flags = ["--backbone", "test_resnet", "--weights", str(weights), "--image-size", str(SIZE)]
    main(["train", str(folder), *flags, "--epochs", "1", "--run", str(run), "--workers", "0"])
    guard = json.loads((run / "metrics.json").read_text())["guard"]
    assert guard["kept_epoch"] in (0, 1)
    assert set(guard["mutual_neighbours"]) == {"0", "1"}
    config = json.loads((run / "run.json").read_text())
    assert config["learning_rate"] == PRETRAINED.learning_rate
    assert config["num_clusters"] == PRETRAINED.clusters(48)


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 10, 19, 100])
def test_the_schedule_of_few_steps_rises_and_falls(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 2.0)
    schedule = default_schedule(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2.0 / 25)
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert steps == 1 or 1.9 < rates[top] <= 2.0
