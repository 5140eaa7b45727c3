"""What a trainer is given: taken apart, handed centroids, emptied of old labels, or refused."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, reducers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    BackgroundSwap,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
    KMeansPseudoLabeler,
    SiameseTransform,
)
from pml_tacl.clustering import pseudo_labels_from
from pml_tacl.trainers.arguments import check_dimensions, check_losses
from pml_tacl.utils.pml_compat import classes_of, dimensions_of

from .small import BATCH, COUNT, SIZE, Images, make_model, make_trainer

OURS = "ContrastiveClusteringLoss"


class Twice(losses.SelfSupervisedLoss):
    @staticmethod
    def supported_losses():
        return [OURS]


class Remembering(losses.CrossBatchMemory):
    @staticmethod
    def supported_losses():
        return [OURS, "ContrastiveLoss"]


class Own(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.parts = nn.ModuleDict({"deep": nn.ModuleList([loss])})

    def forward(self, embeddings, labels, indices_tuple=None):
        return 1.0 * self.parts["deep"][0](embeddings, labels)


WRAPPERS = {
    "bare": lambda loss: loss,
    "MultipleLosses": lambda loss: losses.MultipleLosses([loss]),
    "MultipleLosses, named": lambda loss: losses.MultipleLosses({"a": loss}, weights={"a": 1}),
    "SelfSupervisedLoss": Twice,
    "SelfSupervisedLoss, one-sided": lambda loss: Twice(loss, symmetric=False),
    "CrossBatchMemory": lambda loss: Remembering(loss, 16, memory_size=64),
    "DistributedLossWrapper": DistributedLossWrapper,
    "a module of the user's": Own,
    "two deep": lambda loss: Own(losses.MultipleLosses([loss])),
}


def first_losses(wrapped, **kwargs):
    """Total losses of the first two epochs' iterations, the first of them clustered."""
    seen = []
    trainer = make_trainer(
        make_model(),
        loss_funcs={"a": wrapped},
        end_of_iteration_hook=lambda t: seen.append(float(t.losses["total_loss"])),
        **kwargs,
    )
    trainer.train(num_epochs=2)
    return trainer, seen


@pytest.fixture(scope="module")
def losses_of_the_bare_loss():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    return first_losses(ContrastiveClusteringLoss(margin=1.0))[1]


@pytest.mark.filterwarnings("ignore:DistributedLossWrapper")
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "bare"])
def test_centroids_reach_a_loss_within_every_wrapper_and_count(wrapper, losses_of_the_bare_loss):
    inner = ContrastiveClusteringLoss(margin=1.0)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    trainer, seen = first_losses(WRAPPERS[wrapper](inner))
    assert seen == pytest.approx(losses_of_the_bare_loss, rel=1e-5)
    assert min(seen) > 0
    assert inner.centroids.shape == (4, 16)
    assert inner.centroids is trainer.centroids  # the trainer's are theirs


def test_all_holders_share_what_the_trainer_holds_while_it_moves():
    class Foreign(nn.Module):
        """Not of ours, but it takes centroids."""

        def set_centroids(self, centroids):
            self.given = centroids

        def forward(self, embeddings, labels, indices_tuple=None):
            return embeddings.sum() * 0

    inner, miner, foreign = ContrastiveClusteringLoss(), ContrastiveClusteringMiner(), Foreign()
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 16, 64, miner=miner)
    tuple_miner = ContrastiveClusteringMiner()
    starts = []
    trainer = make_trainer(
        loss_funcs={"a": Own(inner), "memory": memory, "foreign": foreign},
        mining_funcs={"tuple_miner": tuple_miner},
        end_of_iteration_hook=lambda t: starts.append(t.centroids.clone()),
    )
    trainer.train(num_epochs=1)
    assert not torch.equal(starts[0], starts[1])  # they follow the batches
    for holder in (inner, miner, tuple_miner):
        assert holder.centroid_table is trainer.state.table
        assert holder.centroids is trainer.centroids
    assert torch.equal(foreign.given, trainer.centroids)


@pytest.mark.parametrize(
    "wrap", [lambda loss: loss, Own, lambda loss: losses.MultipleLosses([loss])]
)
def test_a_memory_is_emptied_at_each_relabelling_and_only_there(wrap):
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 16, memory_size=256)
    stale, held = [], []

    def fresh(embeddings, initial_centroids=None):
        found = KMeansPseudoLabeler(4, seed=int(torch.randint(99, ())))(embeddings)
        order = torch.randperm(len(found.centroids))
        return pseudo_labels_from(order[found.labels], embeddings)

    def look(trainer):
        count = memory.queue_idx
        held.append(count)
        batch = trainer.state.order[: (trainer.iteration + 1) * BATCH, 0].view(-1, BATCH)
        index = torch.cat([row.repeat(2) for row in batch])
        if trainer.epoch % 2:  # of this clustering alone
            stale.append(int((memory.label_memory[:count] != trainer.labels[index]).sum()))

    trainer = make_trainer(
        loss_funcs={"memory": wrap(memory)},
        labeler=fresh,
        recluster_every=2,
        end_of_iteration_hook=look,
    )
    trainer.train(num_epochs=5)
    assert held == [16, 32, 48, 64] * 2 + [16, 32]
    assert stale == [0] * 6


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("sampler", torch.utils.data.RandomSampler(range(3)), "pseudo-labels"),
        ("dtype", torch.float16, "see amp_dtype"),
        ("data_and_label_getter", lambda batch: batch, "wrap the data set"),
        ("label_hierarchy_level", 1, "pseudo-labels have one level"),
        ("dataset_labels", [0] * COUNT, "labels of the data set are not read"),
        ("set_min_label_to_zero", True, "labels of the data set are not read"),
    ],
)
def test_arguments_of_pml_that_have_no_use_are_refused_by_name(name, value, why):
    with pytest.raises(ValueError, match=f"^{name} must be left out, got .*{why}") as stop:
        make_trainer(**{name: value})
    assert "\n" not in str(stop.value)


def test_usual_values_of_those_arguments_are_let_through():
    usual = {"sampler": None, "dtype": None, "data_and_label_getter": None, "dataset_labels": None}
    make_trainer(**usual, label_hierarchy_level=0, set_min_label_to_zero=False)


def test_a_scheduler_that_would_never_step_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match=r"^lr_schedulers must be named .*'trunk_scheduler'"):
        make_trainer(model, optimizers=optimizer, lr_schedulers={"trunk_scheduler": schedule})


class Plain(nn.Module):
    """A network of one part, without trunk."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, images):
        return self.layers(images).flatten(1)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"^models .*DataParallel: .* torchrun$"),
        (
            lambda model: nn.Sequential(model.trunk, model.embedder),
            r'got Sequential without trunk and embedder: give \{"trunk": model\}',
        ),
        (lambda model: Plain(), r'got Plain without trunk and embedder: give \{"trunk": model\}'),
        (lambda model: {"embedder": model.embedder}, r"got \['embedder'\]$"),
        (lambda model: {"trunk": model.trunk, "head": model.embedder}, "got 'head': Embedder"),
        (lambda model: "resnet50", "got str$"),
    ],
)
def test_models_that_cannot_be_taken_apart_say_what_to_give(wrap, message):
    model = make_model()
    plain = {"optimizers": torch.optim.SGD(model.parameters(), 0.1)}
    with pytest.raises(ValueError, match=message) as stop:
        make_trainer(model, models=wrap(model), **plain)
    assert "\n" not in str(stop.value)


def test_a_model_of_one_part_trains():
    model = Plain()
    trainer = make_trainer(
        make_model(),
        models={"trunk": model},
        optimizers=torch.optim.SGD(model.parameters(), 0.1),
        loss_funcs={"metric_loss": losses.NTXentLoss()},
    )
    before = [p.detach().clone() for p in model.parameters()]
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_that_is_compiled_is_trained_compiled_and_saved_as_itself(monkeypatch):
    model, compiled = make_model(), []
    ours = torch.compile(model, backend="eager")

    def compile_noted(function):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_noted)
    trainer = make_trainer(model, models=ours)
    trainer.train()
    assert trainer.whole is model
    assert len(compiled) == 1


def test_numbers_of_numpy_are_as_good_as_others():
    counts = {"batch_size": BATCH, "images_per_cluster": 2, "recluster_every": 1, "keep": 2}
    counts |= {"warmup_epochs": 1, "iterations_per_epoch": 2, "accumulation_steps": 2}
    counts |= {"max_unreadable": 3, "dataloader_num_workers": 0}
    numbers = {"centroid_momentum": 0.5, "ema_decay": 0.5, "recluster_when_moved": 0.1}
    given = {name: np.int64(value) for name, value in counts.items()}
    given |= {name: np.float64(value) for name, value in numbers.items()}
    trainer = make_trainer(make_model(), **given, loss_weights={"metric_loss": np.float32(2)})
    trainer.train(np.int64(1), np.int64(2))
    for name in (*counts, "centroid_momentum", "recluster_when_moved"):
        if name != "max_unreadable":
            assert type(getattr(trainer, name)) in (int, float), name
    assert type(trainer.loss_weights["metric_loss"]) is float
    assert type(trainer.state.ended) is int


CLASSIFIERS = {
    "ArcFaceLoss": lambda k: losses.ArcFaceLoss(k, 16),
    "CosFaceLoss": lambda k: losses.CosFaceLoss(k, 16),
    "LargeMarginSoftmaxLoss": lambda k: losses.LargeMarginSoftmaxLoss(k, 16),
    "NormalizedSoftmaxLoss": lambda k: losses.NormalizedSoftmaxLoss(k, 16),
    "P2SGradLoss": lambda k: losses.P2SGradLoss(16, k),
    "ProxyAnchorLoss": lambda k: losses.ProxyAnchorLoss(k, 16),
    "ProxyNCALoss": lambda k: losses.ProxyNCALoss(k, 16),
    "SoftTripleLoss": lambda k: losses.SoftTripleLoss(k, 16),
    "SphereFaceLoss": lambda k: losses.SphereFaceLoss(k, 16),
    "SubCenterArcFaceLoss": lambda k: losses.SubCenterArcFaceLoss(num_classes=k, embedding_size=16),
    "MarginLoss": lambda k: losses.MarginLoss(learn_beta=True, num_classes=k),
    "ClassWeightedReducer": lambda k: losses.ContrastiveLoss(
        reducer=reducers.ClassWeightedReducer(torch.ones(k))
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_losses_of_too_few_classes_are_refused_at_the_start(name):
    loss = CLASSIFIERS[name](4)
    assert [classes_of(m) for m in loss.modules() if classes_of(m)][:1] == [4]
    make_trainer(loss_funcs={"loss": loss})  # 4 clusters
    message = rf"^loss_funcs\['loss'\]: \w+ has 4 classes, but there are {COUNT} images, each"
    with pytest.raises(ValueError, match=message):
        make_trainer(loss_funcs={"loss": loss}, warmup_epochs=1)
    with pytest.raises(ValueError, match="has 4 classes, but there are 5 clusters"):
        make_trainer(loss_funcs={"loss": loss}, labeler=KMeansPseudoLabeler(5))

    def five(embeddings, initial_centroids=None):
        return KMeansPseudoLabeler(5)(embeddings)

    with pytest.raises(ValueError, match="has 4 classes, but there are 5 clusters"):
        make_trainer(loss_funcs={"loss": Own(loss)}, labeler=five).train()


SIZED = [name for name in CLASSIFIERS if name not in ("MarginLoss", "ClassWeightedReducer")]


@pytest.mark.parametrize("name", [*SIZED, "CrossBatchMemory"])
def test_losses_for_embeddings_of_another_size_are_refused_by_name(name):
    make = {**CLASSIFIERS, "CrossBatchMemory": lambda _: losses.CrossBatchMemory(
        losses.ContrastiveLoss(), 16)}[name]  # fmt: skip
    assert [dimensions_of(m) for m in make(4).modules() if dimensions_of(m)] == [16]
    check_dimensions({"a": make(4)}, 16)
    with pytest.raises(ValueError, match=rf"^loss_funcs\['a'\]: {name} is for .* 16 dimensions"):
        check_dimensions({"a": Own(make(4))}, 24)


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: losses.MultipleLosses([loss])])
def test_a_memory_smaller_than_a_batch_is_refused_at_the_start(wrap):
    small, enough = (
        wrap(losses.CrossBatchMemory(losses.ContrastiveLoss(), 16, memory_size=size))
        for size in (2 * BATCH - 1, 2 * BATCH)
    )
    make_trainer(loss_funcs={"a": enough}).train()
    with pytest.raises(
        ValueError, match=r"^loss_funcs\['a'\]: .*memory_size=15, fewer than the 16"
    ):
        make_trainer(loss_funcs={"a": small})


def test_the_size_of_embeddings_is_compared_in_the_first_step():
    trainer = make_trainer(loss_funcs={"a": losses.ArcFaceLoss(4, 24)})
    with pytest.raises(ValueError, match=r"the model returns 16 in training: .*embedding_size=16"):
        trainer.train()
    assert dimensions_of(ContrastiveClusteringLoss()) is dimensions_of(nn.Linear(3, 4)) is None


def test_losses_of_any_label_have_no_number_of_classes():
    for loss in (losses.MultiSimilarityLoss(), losses.MarginLoss(), ContrastiveClusteringLoss()):
        assert [classes_of(module) for module in loss.modules()] == [None] * len(
            list(loss.modules())
        )


def test_losses_where_they_could_not_be_called_are_refused():
    inner = AttentionConsistencyLoss()
    with pytest.raises(ValueError, match=r"AttentionConsistencyLoss is within MultipleLosses"):
        make_trainer(loss_funcs={"a": losses.MultipleLosses([inner])})
    views = losses.SelfSupervisedLoss(losses.NTXentLoss())
    with pytest.raises(ValueError, match=r"SelfSupervisedLoss is within MultipleLosses, which"):
        make_trainer(loss_funcs={"a": losses.MultipleLosses([views])})
    with pytest.raises(ValueError, match=r"^loss_funcs\['a'\] must be a module, got sum"):
        make_trainer(loss_funcs={"a": sum})
    gathering = {"a": DistributedLossWrapper(losses.NTXentLoss())}
    check_losses(gathering, {}, 1)
    with pytest.raises(ValueError, match="DistributedLossWrapper joins the batches"):
        check_losses(gathering, {}, 2)


@pytest.mark.parametrize(
    ("labels", "centroids", "message"),
    [
        (["a", "b"] * (COUNT // 2), None, "labels must be whole numbers, .* got 'a': number"),
        (torch.arange(COUNT) % 4 - 2, None, "labels must be whole numbers, .* got -2: number"),
        (torch.arange(COUNT) / 2, None, "labels must be whole numbers, .* got 0.5: number"),
        (torch.arange(5) % 4, None, rf"^labels .* each of the {COUNT} images, got shape \(5,\)"),
        (torch.arange(COUNT) % 4, torch.eye(3, 16), "must index the 3 centroids, got label 3"),
    ],
)
def test_pseudo_labels_that_do_not_fit_are_refused(labels, centroids, message):
    trainer = make_trainer()
    before = trainer.labels
    with pytest.raises(ValueError, match=message):
        trainer.set_pseudo_labels(labels, centroids)
    assert trainer.labels is before


class Views:
    """A transform of the user's, which knows no grid."""

    def __init__(self, points=4):
        self.points = points

    def __call__(self, image):
        view = image[:, :SIZE, :SIZE] / 255
        return view, view.flip(-1), torch.zeros(self.points, 2)


@pytest.mark.parametrize("mask", ["border", "centred"])
def test_a_swap_needs_no_grid_of_the_transform(mask):
    trainer = make_trainer(transform=Views(), swap=BackgroundSwap(1.0, mask))
    trainer.train()
    assert trainer.losses["total_loss"] == 0  # of the end
    assert trainer._grid_of(torch.zeros(2, 3, SIZE, SIZE)) == (2, 2)
    knowing = make_trainer(transform=SiameseTransform(SIZE, 2), swap=BackgroundSwap(1.0, mask))
    assert knowing._grid_of(torch.zeros(2, 3, SIZE, SIZE)) == (2, 2)


def test_a_swap_with_masks_from_maps_needs_a_trunk_that_gives_some():
    model = Plain()
    settings = {
        "models": {"trunk": model},
        "optimizers": torch.optim.SGD(model.parameters(), 0.1),
        "loss_funcs": {"metric_loss": losses.NTXentLoss()},
    }
    with pytest.raises(ValueError, match=r"^BackgroundSwap\(mask='border'\) needs a trunk with"):
        make_trainer(make_model(), **settings, swap=BackgroundSwap(1.0)).train()
    make_trainer(make_model(), **settings, swap=BackgroundSwap(1.0, "centred")).train()


def test_a_transform_of_two_values_is_told():
    with pytest.raises(ValueError, match=r"^transform must return \(view, .*\), got 2 values"):
        make_trainer(transform=lambda image: (image, image)).train()


def test_copies_of_one_image_are_not_called_a_collapse_alone():
    class Copies(Images):
        def __getitem__(self, index):
            return super().__getitem__(0)

    with pytest.raises(ValueError, match="the images are copies of one another, or the model"):
        make_trainer(dataset=Copies()).train()


def test_all_share_one_table_of_centroids_through_a_checkpoint_too(tmp_path):
    def begin():
        given = {"a": ContrastiveClusteringLoss(), "b": Own(ContrastiveClusteringLoss())}
        miner = {"tuple_miner": ContrastiveClusteringMiner()}
        return make_trainer(loss_funcs=given, mining_funcs=miner)

    trainer = begin()
    trainer.train(num_epochs=1)
    trainer.save_checkpoint(tmp_path)
    again = begin()
    again.load_checkpoint(tmp_path)
    assert torch.equal(again.centroids, trainer.centroids)
    for each in (trainer, again):
        inner = each.loss_funcs["b"].parts["deep"][0]
        for holder in (each.loss_funcs["a"], inner, each.mining_funcs["tuple_miner"]):
            assert holder.centroid_table is each.state.table
    # A move through one of them is seen by all.
    embeddings, before = torch.randn(2, 16), again.centroids.clone()
    again.loss_funcs["a"].move_centroids(embeddings, torch.tensor([0, 1]))
    expected = nn.functional.normalize(embeddings, dim=1)
    torch.testing.assert_close(again.mining_funcs["tuple_miner"].centroids[:2], expected)
    assert torch.equal(again.centroids[2:], before[2:])


@pytest.mark.parametrize("needs", ["pairs", "labels", "views", "feature_maps", None])
def test_a_loss_is_called_with_what_it_says_that_it_needs(needs):
    calls = []

    class Noting(nn.Module):
        def forward(self, *given):
            calls.append(given)
            return sum(x.sum() for x in given if torch.is_tensor(x) and x.requires_grad) * 0

    if needs is not None:
        Noting.needs = needs
    miner = {"tuple_miner": ContrastiveClusteringMiner()}
    make_trainer(loss_funcs={"a": Noting()}, mining_funcs=miner).train()
    shapes = [tuple(x.shape) if torch.is_tensor(x) else x for x in calls[0]]
    both = [(2 * BATCH, 16), (2 * BATCH,)]
    if needs == "views":
        assert shapes == [(BATCH, 16)] * 2
    elif needs == "labels":
        assert shapes == [*both, None]
    elif needs == "feature_maps":
        first, second, points, labels, matched, weights = shapes
        assert first == second
        assert first[0] == BATCH
        assert (points, labels, matched, weights) == ((BATCH, 4, 2), (BATCH,), None, None)
    else:
        assert shapes[:2] == both
        assert len(shapes[2]) == 4


def test_a_miner_of_feature_maps_is_no_tuple_miner():
    with pytest.raises(ValueError, match=r"^mining_funcs\['tuple_miner'\]: Attention.*attention_m"):
        make_trainer(mining_funcs={"tuple_miner": AttentionConsistencyMiner()})
