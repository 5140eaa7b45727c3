"""What a trainer is given: its models and losses, taken apart and checked before it begins."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pml_tacl.losses import AttentionConsistencyLoss
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.pml_compat import SelfSupervisedLoss, classes_of, gathers_itself

_HIDING = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHAPE = '{"trunk": module, "embedder": module}'
_ENDINGS = ("_scheduler_by_iteration", "_scheduler_by_epoch", "_scheduler_by_plateau")
# Arguments of PML's BaseTrainer about labels that a data set has, or about drawing by them.
_WITHOUT_USE = {
    "sampler": (None, "each epoch is drawn by the pseudo-labels, see images_per_cluster"),
    "dtype": (None, "the images keep the type that transform gives them, see amp_dtype"),
    "data_and_label_getter": (None, "items are (image, anything): wrap the data set"),
    "label_hierarchy_level": (0, "pseudo-labels have one level"),
    "dataset_labels": (None, "labels of the data set are not read"),
    "set_min_label_to_zero": (False, "labels of the data set are not read"),
}


def check_pml_arguments(settings: Mapping[str, Any]) -> None:
    """Raise InputError for an argument of PML's BaseTrainer that a training would pass over."""
    for name, (usual, why) in _WITHOUT_USE.items():
        given = settings.get(name, usual)
        if given is not usual and not (isinstance(given, int | bool) and given == usual):
            raise InputError(f"{name} must be left out, got {_shown(given)}: {why}")
    for name in settings.get("lr_schedulers") or {}:
        if not str(name).endswith(_ENDINGS):  # PML would take the name and never make a step
            raise InputError(
                f"lr_schedulers must be named PART{_ENDINGS[0]}, ...{_ENDINGS[1]} or "
                f"...{_ENDINGS[2]}, as trunk{_ENDINGS[0]}; got {name!r}"
            )
    if settings.get("iterations_per_epoch") is not None:
        check_count("iterations_per_epoch", settings["iterations_per_epoch"], 1, "or None")
    check_count("dataloader_num_workers", settings.get("dataloader_num_workers", 0), 0)


def as_models(models: Any) -> tuple[dict[str, nn.Module], nn.Module, bool]:
    """Take models apart.

    Args:
        models: a module with `trunk` and `embedder`, perhaps by torch.compile; or a dict of them,
            of which the embedder may be missing.

    Returns:
        The dict, the whole (of a dict, a Sequential), and whether it came compiled.

    Raises:
        InputError: saying what to give instead.
    """
    compiled = isinstance(models, nn.Module) and hasattr(models, "_orig_mod")
    if compiled:
        models = models._orig_mod
    if isinstance(models, _HIDING):
        kind = type(models).__name__
        raise InputError(
            f"models must not be within {kind}: give the model itself, and start a process for "
            "each GPU with torchrun"
        )
    if isinstance(models, nn.Module):
        named = dict(models.named_children())
        missing = [name for name in ("trunk", "embedder") if name not in named]
        if missing:
            raise InputError(
                f"models must be an AttentionEmbedder or {_SHAPE}, got {type(models).__name__} "
                f'without {" and ".join(missing)}: give {{"trunk": model}} for a model of one part'
            )
        return {"trunk": named["trunk"], "embedder": named["embedder"]}, models, compiled
    if not isinstance(models, Mapping) or "trunk" not in models:
        got = sorted(models) if isinstance(models, Mapping) else type(models).__name__
        raise InputError(f"models must be an AttentionEmbedder or {_SHAPE}, got {got}")
    for name, part in models.items():
        if name not in ("trunk", "embedder") or not isinstance(part, nn.Module):
            raise InputError(f"models must be {_SHAPE}, got {name!r}: {type(part).__name__}")
        if isinstance(part, nn.parallel.DistributedDataParallel):
            raise InputError(
                f"models[{name!r}] must not be within DistributedDataParallel: the trainer sums "
                "the gradients of all processes itself"
            )
    both = {"trunk": models["trunk"], "embedder": models.get("embedder", nn.Identity())}
    return both, nn.Sequential(OrderedDict(both)), compiled


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the CPU if it has no tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def within(parts: Mapping[str, nn.Module], method: str) -> list[Any]:
    """Every module in losses or miners, however deep, that has a method; each once."""
    found = {
        id(module): module
        for part in parts.values()
        for module in part.modules()
        if callable(getattr(module, method, None))
    }
    return list(found.values())


def check_losses(
    losses: Mapping[str, nn.Module], miners: Mapping[str, nn.Module], processes: int
) -> None:
    """Raise InputError for losses and miners that a training could not call as they are meant."""
    for kind, parts in (("loss_funcs", losses), ("mining_funcs", miners)):
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                raise InputError(
                    f"{kind}[{name!r}] must be a module, got {_shown(part)}: make one, as "
                    "losses.MultiSimilarityLoss()"
                )
            for module in part.modules():
                own = f"{kind}[{name!r}]: {type(module).__name__}"
                if isinstance(module, AttentionConsistencyLoss) and module is not part:
                    raise InputError(
                        f"{own} is within {type(part).__name__}, which gives it embeddings: it "
                        "reads feature maps, so name it among loss_funcs itself"
                    )
                if processes > 1 and gathers_itself(module):
                    raise InputError(
                        f"{own} joins the batches of all processes, which the trainer has done: "
                        "give what is in it"
                    )
                if isinstance(module, SelfSupervisedLoss) and module is not part:
                    raise InputError(
                        f"{own} is within {type(part).__name__}, which gives it labels: it takes "
                        "two views, so name it among loss_funcs itself"
                    )


def check_classes(losses: Mapping[str, nn.Module], needed: int, of: str) -> None:
    """Raise InputError if a loss has fewer classes than there are labels.

    Args:
        losses: by name.
        needed: labels are below it.
        of: what there are as many of, as "clusters".
    """
    for name, loss in losses.items():
        for module in loss.modules():
            classes = classes_of(module)
            if classes is not None and classes < needed:
                raise InputError(
                    f"loss_funcs[{name!r}]: {type(module).__name__} has {classes} classes, and "
                    f"labels are of {needed} {of}"
                )


def check_warm_up(
    losses: Mapping[str, nn.Module], labeler: Any, count: int, warmup_epochs: int
) -> None:
    """Raise InputError if a loss has too few classes for warm-up or for the clusters to come."""
    if warmup_epochs:
        of = "images, each its own cluster in warm-up: give warmup_epochs=0, or as many classes"
        check_classes(losses, count, of)
    clusters = getattr(labeler, "num_clusters", None)
    if isinstance(clusters, int | np.integer):
        of = "clusters (num_clusters): give as many classes, or fewer clusters"
        check_classes(losses, int(clusters), of)


def plain_number(value: Any) -> Any:
    """A number of NumPy as Python's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _shown(value: Any) -> str:
    if isinstance(value, nn.Module | Tensor) or callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value!r:.60}"
