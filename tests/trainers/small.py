"""A trainer that takes a fraction of a second."""

import torch
from pytorch_metric_learning import losses
from torch.utils.data import Dataset

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    SiameseTransform,
    UnsupervisedTrainer,
)

COUNT, SIZE, BATCH = 24, 32, 8


class Images(Dataset):
    """Random images of four colours; the second item must never be read."""

    def __init__(self, count=COUNT):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 60, (count, 3, 40, 40), generator=generator)
        colours = torch.randint(0, 190, (4, 3, 1, 1), generator=generator)
        self.images = (noise + colours[torch.arange(count) % 4]).to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], "a label, which is never read"


def make_model(seed=0, backbone="test_resnet"):
    torch.manual_seed(seed)
    # With something to train in the embedder too.
    return AttentionEmbedder(backbone, embedding_dim=16, pooling="covariance")


def make_trainer(model=None, dataset=None, transform=None, **kwargs):
    model = make_model() if model is None else model
    settings = {
        "models": model,
        "optimizers": torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        "batch_size": BATCH,
        "loss_funcs": {
            "metric_loss": losses.MultiSimilarityLoss(),
            "clustering_loss": ContrastiveClusteringLoss(),
            "attention_loss": AttentionConsistencyLoss(),
        },
        "dataset": Images() if dataset is None else dataset,
        "transform": transform or SiameseTransform(SIZE, grid=2),
        "eval_transform": model.transform(image_size=SIZE),
        "labeler": KMeansPseudoLabeler(4),
        "images_per_cluster": 2,
        "iterations_per_epoch": 2,
        "progress": False,
        "data_device": torch.device("cpu"),
    } | kwargs
    return UnsupervisedTrainer(**settings)


def state_of(trainer):
    return [p.detach().clone() for p in trainer.models["trunk"].parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
