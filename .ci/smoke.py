"""Whether an installed pml_tacl works with nothing but its dependencies: every public name once."""

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss

import pml_tacl
from pml_tacl.evaluation import evaluate

assert Path(pml_tacl.__file__).is_relative_to(sys.prefix), "not the installed package"


class Images(torch.utils.data.Dataset):
    """Noise of four kinds."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        noise = 60 * torch.rand(3, 64, 64, generator=generator)
        return (noise + 40 * (index % 4)).to(torch.uint8), index % 4


model = pml_tacl.AttentionEmbedder("test_resnet", embedding_dim=16)
transform = model.transform(image_size=64)
trainer = pml_tacl.UnsupervisedTrainer(
    model,
    torch.optim.AdamW(model.parameters(), 1e-3),
    8,
    {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": pml_tacl.ContrastiveClusteringLoss(),
        "attention_loss": pml_tacl.AttentionConsistencyLoss(),
    },
    Images(),
    transform=pml_tacl.SiameseTransform(64, 4),
    eval_transform=transform,
    labeler=pml_tacl.KMeansPseudoLabeler(4),
    mining_funcs={
        "tuple_miner": pml_tacl.ContrastiveClusteringMiner(),
        "attention_miner": pml_tacl.AttentionConsistencyMiner(),
    },
    swap=pml_tacl.BackgroundSwap(),
    progress=False,
)
trainer.train(num_epochs=2)


class Evaluated(Images):
    """The same, as the model takes them."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return transform(image), label


with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = pml_tacl.AttentionEmbedder.from_pretrained(folder)
metrics = evaluate(again, Evaluated(), progress=False)
assert 0 <= metrics["recall_at_1"] <= 1
assert isinstance(pml_tacl.RetrievalCalculator(ks=(1,)).ks, tuple)
if importlib.util.find_spec("matplotlib") is None:
    said = ""
    try:
        from pml_tacl import visualize  # noqa: F401
    except ImportError as error:
        said = str(error)
    assert "pml_tacl[examples]" in said, said
print(f"smoke test passed: Python {sys.version.split()[0]}, {len(pml_tacl.__all__)} public names")
