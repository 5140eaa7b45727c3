"""Validation of a trainer's arguments, before any computation."""

import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pml_tacl.clustering import PseudoLabeler
from pml_tacl.clustering.kmeans import KMeansPseudoLabeler
from pml_tacl.trainers.pseudo_labeling import check_clusters
from pml_tacl.utils.checks import check_count, check_number
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.pml_compat import (
    CrossBatchMemory,
    MultipleLosses,
    classes_of,
    dimensions_of,
    gathers_itself,
    needs_of,
)

_T = TypeVar("_T")
_MINERS = {"tuple_miner", "attention_miner"}
_LONGEST = 100  # file names have at most 255 bytes and also contain the type of the loss
_TAKEN = ("total_loss", "id", "iteration")  # columns that the records use themselves
_HIDING = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHAPE = '{"trunk": module, "embedder": module}'
_ENDINGS = ("_scheduler_by_iteration", "_scheduler_by_epoch", "_scheduler_by_plateau")
# Arguments of PML's BaseTrainer that have no effect here: most concern the data set's own labels.
_WITHOUT_USE = {
    "sampler": (None, "each epoch is sampled by pseudo-labels, see images_per_cluster"),
    "dtype": (None, "images keep the dtype that transform returns, see amp_dtype"),
    "data_and_label_getter": (None, "items are (image, anything): wrap the data set"),
    "label_hierarchy_level": (0, "pseudo-labels have one level"),
    "dataset_labels": (None, "labels of the data set are not read"),
    "set_min_label_to_zero": (False, "labels of the data set are not read"),
}


def check_arguments(
    *,
    count: int,
    batch_size: int,
    images_per_cluster: int,
    recluster_every: int,
    recluster_when_moved: float | None,
    warmup_epochs: int,
    centroid_momentum: float,
    amp_dtype: torch.dtype | None,
    accumulation_steps: int,
    ema_decay: float | None,
    max_unreadable: int,
    checkpoint_every: int | None,
    keep: int,
    labeler: PseudoLabeler,
    miners: Iterable[str],
    weights: Iterable[str],
    losses: object,
    functions: Mapping[str, object],
    processes: int = 1,
) -> None:
    """Validate the arguments of :class:`UnsupervisedTrainer`.

    Arguments that are not listed have the same meaning as in the trainer.

    Args:
        count: number of images in the data set.
        miners: names of mining_funcs.
        weights: names of loss_weights.
        losses: loss_funcs; only the names are checked.
        functions: other arguments that must be callable, by name.
        processes: number of processes in distributed training.

    Raises:
        ValueError: naming the first invalid argument.
    """
    check_count("batch_size", batch_size, 1)
    if batch_size > count:
        raise InputError(
            f"batch_size must be from 1 to the number of images, {count}, got {batch_size}"
        )
    check_count("images_per_cluster", images_per_cluster, 1)
    if batch_size % images_per_cluster:
        raise InputError(
            f"images_per_cluster must divide batch_size={batch_size}, got {images_per_cluster}"
        )
    if batch_size % (processes * images_per_cluster):
        raise InputError(
            f"batch_size={batch_size} is split over {processes} processes, and each takes whole "
            f"clusters: give a multiple of {processes * images_per_cluster}, or fewer processes"
        )
    check_count("recluster_every", recluster_every, 1)
    check_count("warmup_epochs", warmup_epochs, 0)
    if recluster_when_moved is not None:
        check_number("recluster_when_moved", recluster_when_moved, 0, 2, alternative="or None")
    check_number("centroid_momentum", centroid_momentum, 0, 1)
    check_count("accumulation_steps", accumulation_steps, 1)
    if accumulation_steps > batch_size // processes:
        of = f" / {processes} processes" if processes > 1 else ""
        raise InputError(
            f"accumulation_steps must be from 1 to batch_size={batch_size}{of}, "
            f"got {accumulation_steps}"
        )
    if ema_decay is not None:
        check_number("ema_decay", ema_decay, 0, 1, alternative="or None", above=True, below=True)
    check_count("max_unreadable", max_unreadable, 0)
    check_count("keep", keep, 1)
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every, 1, "or None")
    if amp_dtype not in (None, torch.bfloat16, torch.float16):
        raise InputError(
            f"amp_dtype must be torch.bfloat16, torch.float16 or None, got {amp_dtype}"
        )
    for name, function in {"labeler": labeler, **functions}.items():
        if not callable(function):
            raise InputError(f"{name} must be callable, got {function!r}")
    names = list(losses) if isinstance(losses, Mapping | nn.ModuleDict) else []
    if not names:
        got = losses if isinstance(losses, Mapping | nn.ModuleDict) else type(losses).__name__
        raise InputError(
            "loss_funcs must be a dict with at least one loss, for example "
            f'{{"metric_loss": loss}}, got {got}'
        )
    check_loss_names(names)
    if unknown := set(miners) - _MINERS:
        raise InputError(
            f"mining_funcs may only have the keys tuple_miner and attention_miner, got "
            f"{sorted(unknown)}"
        )
    if unknown := set(weights) - set(names):
        raise InputError(
            f"loss_weights may only have the keys of loss_funcs, {sorted(names)}, got "
            f"{sorted(unknown)}"
        )
    clusters = clusters_of(labeler, count)
    if clusters is not None:
        if clusters > count:
            raise InputError(
                f"num_clusters={clusters} is more than the number of images, {count}: lower it "
                "or add images"
            )
        check_clusters(clusters, batch_size, images_per_cluster)


def clusters_of(labeler: PseudoLabeler, count: int) -> int | None:
    """Return how many clusters a labeler makes of `count` images; None if not known in advance."""
    if isinstance(labeler, KMeansPseudoLabeler):
        return labeler.number_for(count)
    clusters = getattr(labeler, "num_clusters", None)
    return int(clusters) if isinstance(clusters, int | np.integer) else None


def check_loss_names(names: Iterable[object]) -> None:
    """Check that the names of losses are valid names of files, tables and columns of the records.

    Records, checkpoints and PML's own checks use the names unchanged. A name begins with a letter
    or an underscore, followed by letters, digits and underscores. Two names must not differ by
    case alone.

    Raises:
        InputError: for a name that is invalid, reserved, or longer than 100 bytes, or for two
            names that differ by case alone.
    """
    seen: dict[str, str] = {}
    for name in names:
        wrong = ""
        if not isinstance(name, str) or not name.isidentifier():
            wrong = "must consist of letters, digits and underscores, and not begin with a digit"
        elif len(name.encode()) > _LONGEST:
            wrong = f"must be at most {_LONGEST} bytes long"
        elif name.casefold() in _TAKEN or name.casefold().startswith("sqlite_"):
            wrong = "is reserved for the records"
        if wrong:
            shown = repr(name) if len(repr(name)) < _LONGEST else f"{name!r:.40}..."
            raise InputError(
                f"loss_funcs: name {shown} {wrong}: give another, for example metric_loss"
            )
        same = unicodedata.normalize("NFKC", str(name)).casefold()
        if same in seen:
            raise InputError(
                f"loss_funcs: names {seen[same]!r} and {name!r} differ by case alone, which their "
                "records cannot tell apart: give another"
            )
        seen[same] = str(name)


def check_pml_arguments(settings: Mapping[str, object]) -> None:
    """Raise InputError for an argument of PML's BaseTrainer that would have no effect."""
    for name, (usual, why) in _WITHOUT_USE.items():
        given = settings.get(name, usual)
        if given is not usual and not (isinstance(given, int | bool) and given == usual):
            raise InputError(f"{name} must be left out, got {_shown(given)}: {why}")
    schedulers = settings.get("lr_schedulers")
    for name in schedulers if isinstance(schedulers, Mapping) else ():
        if not str(name).endswith(_ENDINGS):  # PML would accept the name but never step it
            raise InputError(
                f"lr_schedulers must be named PART{_ENDINGS[0]}, ...{_ENDINGS[1]} or "
                f"...{_ENDINGS[2]}, for example trunk{_ENDINGS[0]}; got {name!r}"
            )
    if settings.get("iterations_per_epoch") is not None:
        check_count("iterations_per_epoch", settings["iterations_per_epoch"], 1, "or None")
    check_count("dataloader_num_workers", settings.get("dataloader_num_workers", 0), 0)


def as_models(models: object) -> tuple[dict[str, nn.Module], nn.Module, bool]:
    """Return trunk and embedder of a model as a dict, together with the whole model.

    Args:
        models: a module with `trunk` and `embedder`, possibly compiled with torch.compile; or a
            dict of the two, where the embedder may be missing.

    Returns:
        The dict, the whole model (a Sequential if a dict was given), and whether it was compiled.

    Raises:
        InputError: for anything else.
    """
    uncompiled: object = getattr(models, "_orig_mod", None)
    compiled = isinstance(models, nn.Module) and uncompiled is not None
    if compiled:
        models = uncompiled
    if isinstance(models, _HIDING):
        kind = type(models).__name__
        raise InputError(
            f"models must not be wrapped in {kind}: give the model itself, and start one process "
            "for each GPU with torchrun"
        )
    if isinstance(models, nn.Module):
        named = dict(models.named_children())
        missing = [name for name in ("trunk", "embedder") if name not in named]
        if missing:
            raise InputError(
                f"models must be an AttentionEmbedder or {_SHAPE}, got {type(models).__name__} "
                f'without {" and ".join(missing)}: give {{"trunk": model}} for a model without them'
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
                f"models[{name!r}] must not be wrapped in DistributedDataParallel: give the module "
                "itself; the trainer sums the gradients of all processes"
            )
    both = {"trunk": models["trunk"], "embedder": models.get("embedder", nn.Identity())}
    return both, nn.Sequential(OrderedDict(both)), compiled


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; the CPU if it has no tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def check_losses(
    losses: Mapping[str, nn.Module], miners: Mapping[str, nn.Module], processes: int
) -> None:
    """Raise InputError for losses and miners that the trainer would not call correctly."""
    for kind, parts in (("loss_funcs", losses), ("mining_funcs", miners)):
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                raise InputError(
                    f"{kind}[{name!r}] must be a module, got {_shown(part)}: give an instance, "
                    "for example losses.MultiSimilarityLoss()"
                )
            for module in part.modules():
                own = f"{kind}[{name!r}]: {type(module).__name__}"
                needs = needs_of(module)
                if needs == "feature_maps" and name == "tuple_miner" and kind == "mining_funcs":
                    raise InputError(
                        f"{own} needs feature maps, but a tuple_miner gets embeddings: name it "
                        "attention_miner"
                    )
                if needs == "feature_maps" and module is not part:
                    raise InputError(
                        f"{own} is within {type(part).__name__}, which gives it embeddings, but it "
                        "needs feature maps: give it in loss_funcs under its own name"
                    )
                memory = isinstance(module, CrossBatchMemory) and kind == "loss_funcs"
                unused = (
                    memory and module.miner is None and not hasattr(module.loss, "set_centroids")
                )
                if unused and "tuple_miner" in miners:
                    raise InputError(
                        f"{own} cannot use the pairs of tuple_miner, which index the batch and not "
                        "the memory: give the miner to CrossBatchMemory(miner=...)"
                    )
                if processes > 1 and gathers_itself(module):
                    raise InputError(
                        f"{own} joins the batches of all processes, which the trainer does itself: "
                        "give the loss or miner that it wraps"
                    )
                if needs == "views" and module is not part:
                    raise InputError(
                        f"{own} is within {type(part).__name__}, which gives it labels, but it "
                        "needs two views: give it in loss_funcs under its own name"
                    )


def check_classes(losses: Mapping[str, nn.Module], needed: int, of: str) -> None:
    """Raise InputError if a loss has fewer classes than there are labels.

    Args:
        losses: losses by name.
        needed: number of classes that the labels need; all labels are below it.
        of: the noun for the message, such as "clusters".
    """
    for name, loss in losses.items():
        for module in loss.modules():
            classes = classes_of(module)
            if classes is not None and classes < needed:
                raise InputError(
                    f"loss_funcs[{name!r}]: {type(module).__name__} has {classes} classes, but "
                    f"there are {needed} {of}"
                )


def check_dimensions(losses: Mapping[str, nn.Module], dim: int) -> None:
    """Raise InputError if a loss was created for another number of dimensions than `dim`."""
    for name, loss in losses.items():
        for module in loss.modules():
            made_for = dimensions_of(module)
            if made_for is not None and made_for != dim:
                raise InputError(
                    f"loss_funcs[{name!r}]: {type(module).__name__} is for embeddings of "
                    f"{made_for} dimensions, but the model returns {dim} in training: give "
                    f"embedding_size={dim}"
                )


def check_memories(losses: Mapping[str, nn.Module], batch_size: int) -> None:
    """Raise InputError if a CrossBatchMemory cannot hold the two views of a batch."""
    for name, loss in losses.items():
        # Not inside user-defined modules, which may pass fewer embeddings to the memory.
        parts = loss.modules() if isinstance(loss, CrossBatchMemory | MultipleLosses) else ()
        for module in parts:
            if isinstance(module, CrossBatchMemory) and module.memory_size < 2 * batch_size:
                raise InputError(
                    f"loss_funcs[{name!r}]: {type(module).__name__} has "
                    f"memory_size={module.memory_size}, fewer than the {2 * batch_size} embeddings "
                    f"of batch_size={batch_size} images in two views: give at least as many"
                )


def check_warm_up(
    losses: Mapping[str, nn.Module], labeler: PseudoLabeler, count: int, warmup_epochs: int
) -> None:
    """Raise InputError if a loss has too few classes for warm-up or for the clusters to come."""
    if warmup_epochs:
        of = "images, each its own cluster in warm-up: give warmup_epochs=0, or as many classes"
        check_classes(losses, count, of)
    clusters = clusters_of(labeler, count)
    if clusters is not None:
        of = "clusters (num_clusters): give as many classes, or fewer clusters"
        check_classes(losses, clusters, of)


def plain_number(value: _T) -> _T:
    """Convert a NumPy number to a Python number; return anything else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def _shown(value: object) -> str:
    if isinstance(value, nn.Module | Tensor) or callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value!r:.60}"
