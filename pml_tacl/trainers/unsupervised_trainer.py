"""A PML trainer for data without labels: training loop and training step."""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.trainers import BaseTrainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from pml_tacl.clustering import PseudoLabeler
from pml_tacl.datasets import ImageFiles
from pml_tacl.distributed.collectives import broadcast, gather_batch, mean_loss
from pml_tacl.distributed.gradients import equalise, start_alike, sum_gradients
from pml_tacl.distributed.inference import embed_distributed
from pml_tacl.distributed.session import (
    all_reduce_max,
    barrier,
    check_same,
    is_main,
    run_on_main,
    world_size,
)
from pml_tacl.distributed.store import IN_MEMORY_UP_TO
from pml_tacl.models import AttentionEmbedder
from pml_tacl.models.preprocessing import size_in_pixels
from pml_tacl.models.receptive_field import measure_grid
from pml_tacl.search import ImageIndex
from pml_tacl.trainers import defaults
from pml_tacl.trainers.arguments import (
    as_models,
    check_arguments,
    check_classes,
    check_dimensions,
    check_losses,
    check_memories,
    check_pml_arguments,
    check_warm_up,
    device_of,
    plain_number,
)
from pml_tacl.trainers.checkpoint import (
    OtherRank,
    Saved,
    fresh_schedules,
    load_checkpoint_distributed,
    open_folder,
    replay,
    restore_random,
    restore_trainer,
    save_checkpoint,
    states_of_others,
    trainer_state,
)
from pml_tacl.trainers.data import (
    Batch,
    Images,
    OneView,
    TwoViews,
    Unreadable,
    Views,
    draw_epoch,
    lost_workers_named,
    make_loader,
    share_of,
)
from pml_tacl.trainers.fitting import fit_to
from pml_tacl.trainers.forward import (
    forward_in_chunks,
    forward_of,
    in_precision,
    swap_background,
)
from pml_tacl.trainers.guard import Guard, load_network, network_state
from pml_tacl.trainers.pseudo_labeling import (
    EmbeddingPass,
    UnusableClusters,
    check_clusters,
    cluster,
    clusters_named,
    distance_moved,
    forget_labels,
    sample,
    share_centroids,
)
from pml_tacl.trainers.recipe import recipe_for
from pml_tacl.trainers.records import LossesFile
from pml_tacl.trainers.state import StateDict, TrainingState
from pml_tacl.transforms import BackgroundSwap
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import DivergedError, InputError
from pml_tacl.utils.files import write_json
from pml_tacl.utils.labels import pseudo_labels
from pml_tacl.utils.pml_compat import called_by_step, needs_of
from pml_tacl.utils.precision import at_least_float32
from pml_tacl.utils.runs import remove_index
from pml_tacl.utils.signals import Interrupted, Signals

_FAULTY = "faulty network hardware or RAM is the likely cause: resume from the last checkpoint"
_LOGGER = logging.getLogger(__name__)
_NARROW = 120  # columns that a bar with several losses needs
_LOOK_EVERY = 10  # iterations: reading a loss makes the CPU wait for a GPU


class UnsupervisedTrainer(BaseTrainer):
    """Trainer for embeddings on images without labels. It alternates clustering and training.

    The trainer is a PML trainer: models, loss_funcs, mining_funcs, optimizers, hooks and records
    work as in PML. At the start of an epoch, it computes the embeddings of the whole data set (the
    *embedding pass*) and clusters them (see ``recluster_every``). The cluster numbers are the
    pseudo-labels of the epoch, and each batch has ``images_per_cluster`` images of each of its
    clusters. Each image of a batch comes in two random views, which have the same pseudo-label.
    During ``warmup_epochs``, each image is its own cluster. In distributed training
    (:mod:`pml_tacl.distributed.inference`), all processes train one model, and the main process
    calls the hooks. The method follows Li et al. 2020; the exact definitions are our own.

    For an :class:`AttentionEmbedder`, only the model and the data set are required; other models
    also need ``transform`` and ``eval_transform``. The defaults of most training settings come from
    :func:`pml_tacl.trainers.recipe.recipe_for`. If you pass ``loss_funcs``, the background swap,
    the guard and the warm-up are off by default. If the data set is given as a folder,
    :meth:`train` ends with :meth:`finish`, which writes a model and a search index and prints
    whether training helped.

    Args:
        models: an :class:`AttentionEmbedder`, or {"trunk": ..., "embedder": ...}; the embedder
            may be missing.
        optimizers: one optimizer for all parameters, or {"trunk_optimizer": ...,
            "embedder_optimizer": ...}. None: AdamW with one cycle of learning rates.
        batch_size: number of images in a batch, summed over all processes; each image comes in two
            views.
        loss_funcs: losses by name; their weighted sum is minimised. An AttentionConsistencyLoss
            gets feature maps and points. PML's SelfSupervisedLoss gets the embeddings of the two
            views. Any other loss gets the embeddings of both views with their pseudo-labels. Losses
            that use centroids receive them, even inside PML's wrappers or user-defined modules.
            PML's SelfSupervisedLoss and CrossBatchMemory do not work with centroids: if one of them
            wraps a loss that has centroids, the trainer calls the wrapped loss directly.
        dataset: its items are (image, anything), with images that ``transform`` accepts; labels
            are ignored. Or the path of a folder of images.
        image_size: side or (height, width) in pixels, for the default transforms; None for the
            model's own size.
        run: folder that :meth:`finish` writes to; None means "runs/" followed by the name of the
            data set's folder.
        transform: image -> (view, transformed view, points): a :class:`SiameseTransform`.
        eval_transform: image -> (3, height, width), for the embedding pass.
        labeler: embeddings (N, D) -> PseudoLabels, such as :class:`KMeansPseudoLabeler`. Images
            with the label -1 are noise and are not used in batches.
        mining_funcs: "tuple_miner" for the metric losses, "attention_miner" (gets feature maps and
            labels of the first views) for the attention losses.
        images_per_cluster: number of images of each cluster in a batch; must divide batch_size.
        recluster_every: number of epochs from one clustering to the next, at least 1.
        recluster_when_moved: skip a clustering that is due if the embeddings have moved less than
            this threshold: the mean cosine distance, in [0, 2], of a sample of 1000 embeddings to
            those of the last clustering (0.02 is a small change, 0.2 a large one). None: never
            skip.
        warmup_epochs: number of epochs before the first clustering, at least 0.
        centroid_momentum: in [0, 1]. After each step, the centroids move towards the embeddings of
            the batch with this momentum (``ContrastiveClusteringLoss.move_centroids``); 1 keeps
            the centroids of the clustering.
        swap: a :class:`BackgroundSwap` for both views; None for no swap. "default": that of the
            recipe, or None if ``loss_funcs`` is given or the transform does not track cells.
        amp_dtype: autocast type, torch.bfloat16 or torch.float16 (with loss scaling); None for no
            autocast.
        accumulation_steps: number of chunks in which a batch passes through the model, to save
            memory. The losses are computed on the whole batch, so a step gives the same result as
            with a single chunk, except for BatchNorm.
        ema_decay: decay in (0, 1) of a moving average of the weights, ``ema_model``; None for no
            average. The averaged weights are for evaluation and export. The clustering uses the
            trained weights, because the losses compare centroids with embeddings of those weights.
        compile: apply torch.compile to trunk and embedder together; parameter names do not change.
        max_unreadable: number of images that may become unreadable before training stops. Within
            an epoch, such an image is replaced by another image of its cluster; at the next
            clustering it counts as noise.
        checkpoint_folder: folder for a checkpoint at the end of each epoch. If it is set, SIGINT or
            SIGTERM ends the training after one more checkpoint, with :class:`Interrupted` (a
            SystemExit, code 130 or 143); a second signal ends it immediately. None: checkpoints are
            written only by calls of :meth:`save_checkpoint`.
        checkpoint_every: number of iterations between additional checkpoints within an epoch; None
            for no additional checkpoints.
        keep: number of checkpoints to keep, at least 1.
        record_keeper: record-keeper's RecordKeeper (``hooks.record_keeper``). Checkpoints store the
            position in its records, so a crash neither loses nor duplicates records.
        progress: show progress bars.
        **kwargs: arguments of PML's BaseTrainer (loss_weights, iterations_per_epoch,
            lr_schedulers, gradient_clippers, freeze_these, dataloader_num_workers,
            end_of_epoch_hook, ...). Arguments that would have no effect here (sampler, dtype,
            dataset_labels, ...) raise ValueError.
        guard: select the best network, which may be the pretrained one, by a measurement that needs
            no labels, and stop early if training does harm
            (:class:`pml_tacl.trainers.guard.Guard`). It needs a clustering before the first epoch,
            so ``warmup_epochs`` must be 0. None: False with warm-up epochs or ``loss_funcs``,
            otherwise the default of the recipe.

    Attributes:
        state: state of the training (:class:`pml_tacl.trainers.state.TrainingState`).
        labels: pseudo-labels (N,), -1 for noise. Before the first clustering each image has its
            own label.
        centroids: (K, D), of unit norm, shared by losses and miners; None before the first
            clustering.
        embeddings: (N, D) from the last embedding pass, NaN for unreadable images; on the main
            process only, and not saved in checkpoints. For more than 1 000 000 images they are in a
            file in ``checkpoint_folder``, if it is set. All processes write to that file.
        extra: dict for your own data: tensors, numbers, strings and containers, which are saved in
            checkpoints. NumPy numbers are saved as Python numbers, and arrays as tensors; other
            types raise an error.

    Raises:
        ValueError: for an invalid argument, before any computation.
        FloatingPointError: in training, if the loss is NaN or infinite.
        OSError: in training, if more than ``max_unreadable`` images are unreadable, if a checkpoint
            cannot be written, or if a process of the loader was killed.
    """

    # Attributes of PML's BaseTrainer, which has no types.
    models: dict[str, nn.Module]
    loss_funcs: dict[str, nn.Module]
    mining_funcs: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    lr_schedulers: dict[str, LRScheduler]
    gradient_clippers: dict[str, Callable[[], object]] | None
    dataset: Images
    batch_size: int
    iterations_per_epoch: int
    dataloader_num_workers: int
    data_device: torch.device | str
    loss_weights: dict[str, float]
    losses: dict[str, Any]
    freeze_these: Collection[str]
    end_of_iteration_hook: Callable[["UnsupervisedTrainer"], object]
    end_of_epoch_hook: Callable[["UnsupervisedTrainer"], object]
    iteration: int

    def __init__(
        self,
        models: nn.Module | dict[str, nn.Module],
        optimizers: torch.optim.Optimizer | dict[str, torch.optim.Optimizer] | None = None,
        batch_size: int | None = None,
        loss_funcs: dict[str, nn.Module] | None = None,
        dataset: Images | str | Path | None = None,
        *,
        image_size: int | tuple[int, int] | None = None,
        run: str | Path | None = None,
        guard: bool | None = None,
        transform: Callable[[Any], Views] | None = None,
        eval_transform: Callable[[Any], Tensor] | None = None,
        labeler: PseudoLabeler | None = None,
        mining_funcs: dict[str, nn.Module] | None = None,
        images_per_cluster: int | None = None,
        recluster_every: int = 1,
        recluster_when_moved: float | None = None,
        warmup_epochs: int | None = None,
        centroid_momentum: float = 0.0,
        swap: BackgroundSwap | str | None = "default",
        amp_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        ema_decay: float | None = None,
        compile: bool = False,
        max_unreadable: int = 10,
        checkpoint_folder: str | Path | None = None,
        checkpoint_every: int | None = None,
        keep: int = 2,
        record_keeper: Any = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> None:
        if dataset is None:
            raise InputError("dataset is missing: give a data set, or the path of an image folder")
        models, whole, compiled = as_models(models)
        self.recipe = recipe = recipe_for(whole)
        self.run: Path | None = None
        if isinstance(dataset, str | Path):
            if not isinstance(whole, AttentionEmbedder):
                raise InputError(
                    "a dataset that is the path of a folder needs an AttentionEmbedder, which is "
                    f"written to the run, got {type(whole).__name__}: give a data set, such as "
                    f"pml_tacl.datasets.ImageFiles({str(dataset)!r})"
                )
            self.run = Path("runs", Path(dataset).resolve().name) if run is None else Path(run)
            _check_unused(self.run)
            dataset = ImageFiles(dataset, progress=progress)
        elif run is not None:
            raise InputError("run needs a dataset that is the path of a folder: leave run out")
        count = len(dataset)  # type: ignore[arg-type]
        plain_pml = loss_funcs is not None
        if loss_funcs is None:
            defaults.check_enough(count)
            loss_funcs, own_miners = defaults.default_losses(recipe)
            mining_funcs = own_miners | dict(mining_funcs or {})
            kwargs["loss_weights"] = recipe.loss_weights | (kwargs.get("loss_weights") or {})
        if batch_size is None:
            batch_size = recipe.batch_size_for(count)
        if images_per_cluster is None:
            images_per_cluster = recipe.images_per_cluster
        if transform is None or eval_transform is None:
            views, view = defaults.default_transforms(whole, image_size)
            transform, eval_transform = transform or views, eval_transform or view
        self._image_size = image_size
        if labeler is None:
            labeler = defaults.default_labeler(recipe, count)
        if not isinstance(swap, BackgroundSwap | None) and swap != "default":
            raise InputError(f'swap must be a BackgroundSwap, None or "default", got {swap!r}')
        if isinstance(swap, str):
            swap = None if plain_pml else defaults.default_swap(recipe, transform)
        # The recipe gives warm-up as a share of the epochs, whose number only `train` knows.
        self.warmup_is_open = warmup_epochs is None and not plain_pml and recipe.warmup > 0
        warmup_epochs = warmup_epochs or 0
        self._schedule_is_own = optimizers is None and not kwargs.get("lr_schedulers")
        if optimizers is None:
            optimizers = defaults.default_optimizer(whole, recipe)
        if guard is None:
            guard = recipe.guard and not plain_pml and not warmup_epochs
        self.guard = Guard(recipe.trained_share) if guard else None
        if self.guard is not None and (warmup_epochs or self.warmup_is_open):
            raise InputError(
                "guard compares with the pretrained network, but warm-up epochs train it before "
                "the first clustering: give warmup_epochs=0, or guard=False"
            )
        self._last: dict[str, dict[str, Tensor]] | None = None  # last trained network
        self._loaded = False  # whether a checkpoint was loaded and not trained yet
        compile = compile or compiled
        kwargs = {name: plain_number(value) for name, value in kwargs.items()}
        check_pml_arguments(kwargs)
        if isinstance(optimizers, torch.optim.Optimizer):
            optimizers = {"trunk_optimizer": optimizers}
        mining_funcs = dict(mining_funcs or {})
        weights = dict(kwargs.pop("loss_weights", None) or {})
        weights = {name: plain_number(weight) for name, weight in weights.items()}
        check_arguments(
            count=count,
            batch_size=batch_size,
            images_per_cluster=images_per_cluster,
            recluster_every=recluster_every,
            recluster_when_moved=recluster_when_moved,
            warmup_epochs=warmup_epochs,
            centroid_momentum=centroid_momentum,
            amp_dtype=amp_dtype,
            accumulation_steps=accumulation_steps,
            ema_decay=ema_decay,
            max_unreadable=max_unreadable,
            checkpoint_every=checkpoint_every,
            keep=keep,
            labeler=labeler,
            miners=mining_funcs,
            weights=weights,
            losses=loss_funcs,
            functions={"transform": transform, "eval_transform": eval_transform},
            processes=world_size(),
        )
        check_losses(loss_funcs, mining_funcs, world_size())
        check_memories(loss_funcs, batch_size)
        check_warm_up(loss_funcs, labeler, count, warmup_epochs)
        self.transform, self.eval_transform, self.labeler = transform, eval_transform, labeler
        self.swap, self.amp_dtype, self.progress = swap, amp_dtype, progress
        self.checkpoint_folder = None if checkpoint_folder is None else Path(checkpoint_folder)
        # Python numbers: loaders and checkpoints do not accept those of NumPy.
        self.images_per_cluster, self.warmup_epochs = int(images_per_cluster), int(warmup_epochs)
        self.recluster_every = int(recluster_every)
        self.recluster_when_moved = plain_number(recluster_when_moved)
        self.accumulation_steps = int(accumulation_steps)
        self.centroid_momentum = float(centroid_momentum)
        self.checkpoint_every, self.keep = plain_number(checkpoint_every), int(keep)
        self.record_keeper = record_keeper
        self.state = TrainingState(torch.arange(count), Unreadable(int(max_unreadable)))
        self.epoch = 0
        self.test_hook: Callable[[UnsupervisedTrainer], object] | None = None  # on every rank
        self.test_epochs: Collection[int] = ()  # their ends are saved before the test
        self.losses_file: LossesFile | None = None
        self._others: list[OtherRank] | None = None  # states of other ranks, set during hooks
        self._within_step = False
        self._own_folder: Path | None = None
        self._signals = Signals(active=False)
        kwargs.setdefault("data_device", device_of(models["trunk"]))
        if kwargs.get("iterations_per_epoch") is None:
            kwargs["iterations_per_epoch"] = max(1, count // batch_size)
        kwargs.setdefault("dataloader_num_workers", 0)
        super().__init__(
            models,
            optimizers,
            int(batch_size),
            dict(loss_funcs),
            dataset,
            mining_funcs=mining_funcs,
            loss_weights={name: weights.get(name, 1.0) for name in loss_funcs},
            **kwargs,
        )
        self.whole, self.iteration = whole, 0
        device = torch.device(self.data_device)
        settings = (count, self.batch_size, self.iterations_per_epoch, self.loss_weights)
        start_alike(self.models, self.loss_funcs, settings, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype is torch.float16)
        self.look_every = 1 if device.type == "cpu" else _LOOK_EVERY
        self.forward_features = forward_of(self.models)
        if compile:
            self.forward_features = torch.compile(self.forward_features)
        self._fits = False  # whether embedding dimensions were checked
        self.average: AveragedModel | None = None
        if ema_decay is not None:
            averaged = get_ema_multi_avg_fn(float(ema_decay))
            self.average = AveragedModel(whole, multi_avg_fn=averaged, use_buffers=True)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}  # by (height, width) of the views
        self._skipped: set[str] = set()  # optimizers whose last step GradScaler skipped
        self._share_centroids()

    @property
    def labels(self) -> Tensor:
        """Pseudo-labels (N,), -1 for noise."""
        return self.state.labels

    @labels.setter
    def labels(self, labels: Tensor) -> None:
        self.state.labels = labels

    @property
    def centroids(self) -> Tensor | None:
        """Centroids (K, D) of unit norm; None before the first clustering."""
        return self.state.table.values

    @centroids.setter
    def centroids(self, centroids: Tensor | None) -> None:
        self.state.table.values = centroids

    @property
    def embeddings(self) -> Tensor | None:
        """Embeddings (N, D) of the last embedding pass."""
        return self.state.embeddings

    @property
    def extra(self) -> StateDict:
        """Your own data, which is saved in checkpoints."""
        return self.state.extra

    @property
    def ended(self) -> int:
        """Number of epochs completed."""
        return self.state.ended

    @property
    def ema_model(self) -> nn.Module:
        """The model with averaged weights, for evaluation and export.

        It is an AttentionEmbedder if the trained model is one, otherwise a Sequential of trunk and
        embedder.

        Raises:
            ValueError: without ``ema_decay``.
        """
        if self.average is None:
            raise InputError("ema_model needs averaged weights: give the trainer an ema_decay")
        averaged: nn.Module = self.average.module
        return averaged

    @property
    def verdict(self) -> str:
        """One line that says whether training helped; "" without a guard."""
        return "" if self.guard is None else self.guard.verdict()

    def modify_schema(self) -> None:
        """Allow all names of losses, but only exact names of miners; PML checks name prefixes."""
        self.schema["loss_funcs"].keys = [name for name in self.loss_names if name != "total_loss"]
        self.schema["mining_funcs"].keys = ["tuple_miner", "attention_miner"]
        self.schema["optimizers"].important = []

    def train(self, start_epoch: int = 1, num_epochs: int = 1) -> None:
        """Train the epochs from ``start_epoch`` to ``num_epochs``, both included.

        The training ends early if end_of_epoch_hook returns False, or if the guard finds that it
        does harm.

        Args:
            start_epoch: first epoch, counted from 1; after :meth:`load_checkpoint`, pass
                ``trainer.epoch + 1``.
            num_epochs: last epoch.

        Raises:
            ValueError: if ``start_epoch`` skips an epoch, or does not continue the checkpoint that
                was loaded, or checkpoint_folder contains checkpoints of a training that was not
                loaded.
            Interrupted: after SIGINT or SIGTERM, with a checkpoint_folder.
        """
        state = self.state
        start_epoch, num_epochs = plain_number(start_epoch), plain_number(num_epochs)
        check_count("start_epoch", start_epoch, 1)
        check_count("num_epochs", num_epochs, 0)
        self._check_start(start_epoch)
        if self._last is not None:
            load_network(self, self._last)
            self._last = None
        self.reset_projection()  # fitted again after training
        self._within_step = False
        if start_epoch <= state.ended:
            self._restart(start_epoch)
        if self.warmup_is_open and self.centroids is None:
            self.warmup_epochs = self.recipe.warmup_epochs(num_epochs)
        self._make_schedule(num_epochs * self.iterations_per_epoch)
        with Signals(self.checkpoint_folder is not None) as self._signals, lost_workers_named():
            self._begin(start_epoch)
            for epoch in range(start_epoch, num_epochs + 1):
                if state.stopped:
                    _LOGGER.info(
                        "training was ended after epoch %d, by end_of_epoch_hook or the guard",
                        state.ended,
                    )
                    break
                self.epoch = epoch
                try:
                    self._begin_epoch()
                except UnusableClusters as error:
                    # Clusters of the untrained network fail for reasons the caller must fix.
                    if self.guard is None or not state.ended:
                        raise
                    _LOGGER.warning("the training ends before epoch %d: %s", epoch, error)
                    self.guard.note_collapse(self)
                    self.epoch, state.stopped = state.ended, True
                    break
                self._train_epoch(num_epochs)
                self.step_lr_schedulers(end_of_epoch=True)
                self.zero_losses()
                state.ended, state.done, state.order = epoch, 0, None
                stops = self._call_end_of_epoch_hooks()
                state.stopped = stops or (self.guard is not None and self.guard.falls)
                self._between_iterations(due=True)
            if self.guard is not None and (state.stopped or state.ended >= num_epochs):
                with self._signals.at_once(f"saved at the end of epoch {state.ended}"):
                    self._keep_better(self.guard)
        state.stopped = False
        if self.run is not None:
            self.finish()

    def _check_start(self, start_epoch: int) -> None:
        """Raise InputError if a training cannot start with this epoch."""
        state, due = self.state, self.state.ended + 1
        if self._loaded and start_epoch != due:
            within = state.loaded_within_epoch
            place = f"within epoch {due}" if within else f"the end of epoch {state.ended}"
            raise InputError(
                f"the checkpoint is from {place}, got start_epoch={start_epoch}: train with "
                "start_epoch=trainer.epoch + 1"
            )
        if start_epoch > due and (state.ended or state.done):
            raise InputError(
                f"start_epoch={start_epoch} skips epoch {due}, which is not complete: train with "
                f"start_epoch={due}"
            )

    def _restart(self, start_epoch: int) -> None:
        """Count epochs from an earlier one again: start the guard and the default schedule anew."""
        state = self.state
        state.ended, state.done, state.order = start_epoch - 1, 0, None
        if self.guard is not None:
            self.guard.reset()
        if self._schedule_is_own and self.lr_schedulers.pop(defaults.SCHEDULE, None) is not None:
            (optimizer,) = self.optimizers.values()
            for group in optimizer.param_groups:
                group["lr"] = group["max_lr"]
            state.schedules = None

    def _begin(self, start_epoch: int) -> None:
        """Prepare the state and the checkpoint folder, so that a killed training can resume."""
        state, self._loaded = self.state, False
        if not state.loaded_within_epoch:
            state.ended, state.done, state.order = start_epoch - 1, 0, None
        state.schedules = state.schedules or fresh_schedules(self)
        folder = self.checkpoint_folder
        place = (state.ended, state.done)
        if folder is not None and run_on_main(
            lambda: open_folder(folder, self._own_folder, place), "opening checkpoint_folder"
        ):
            self._save()  # a crash in the first epoch must not leave records without a checkpoint

    def _begin_epoch(self) -> None:
        if not self.state.loaded_within_epoch:
            with self._signals.at_once(f"saved at the end of epoch {self.state.ended}"):
                if self._clustering_is_due():
                    self.relabel()
                    barrier()  # a signal must not end one process while another goes on
        self._share_centroids()
        self.initialize_dataloader()
        self.set_to_train()

    def _train_epoch(self, num_epochs: int) -> None:
        state = self.state
        with tqdm(
            total=self.iterations_per_epoch * self.batch_size,
            initial=state.done * self.batch_size,
            desc=f"epoch {self.epoch}/{num_epochs}",
            unit="img",
            disable=not (self.progress and is_main()),
        ) as bar:
            for iteration in range(state.done, self.iterations_per_epoch):
                self.iteration = iteration
                self._within_step = True
                self.forward_and_backward()
                if is_main():
                    self.end_of_iteration_hook(self)
                self.step_lr_schedulers(end_of_epoch=False)
                self._within_step = False
                state.done = iteration + 1
                made = self.get_global_iteration() + 1
                due = self.checkpoint_every is not None and made % self.checkpoint_every == 0
                ends = state.done == self.iterations_per_epoch
                if ends or made % self.look_every == 0:
                    losses = _that_fit(self.look_at_losses(), getattr(bar, "ncols", None))
                    bar.set_postfix_str(losses, refresh=False)
                bar.update(self.batch_size)
                # Save before the test, so that an error in it does not lose the epoch.
                self._between_iterations(self.epoch in self.test_epochs if ends else due)
        del self.dataloader_iter  # ends its processes, which frees memory for the hook

    def forward_and_backward(self) -> None:
        """Run one training step: load a batch, compute the losses and update the weights.

        The step does not call ``calculate_loss`` or ``backward`` of PML's trainers: to change the
        step, override this method.
        """
        self.zero_losses()
        self.zero_grad()
        self.update_loss_weights()
        warming_up = self.centroids is None  # each image is its own cluster
        losses = {
            name: called_by_step(loss)
            for name, loss in self.loss_funcs.items()
            if self.loss_weights[name] != 0
        }

        # Views: two of each image, and the points in the second where the cells of the first lie.
        batch = self.get_batch()
        views, transformed, weights = batch.views, batch.transformed, None

        # Swap: replace backgrounds; the weights say how much of each cell both views kept.
        if self.swap is not None:
            views, transformed, weights = swap_background(
                self.swap,
                self.models["trunk"],
                batch,
                self._grid_of(views),
                self.accumulation_steps,
                self.amp_dtype,
            )

        # Forward: both views in one batch.
        images = torch.cat([views, transformed])
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        with in_precision(images.device, self.amp_dtype):
            embeddings, maps = forward_in_chunks(
                self.forward_features, images, self.accumulation_steps, list(self.models.values())
            )
        if not self._fits:
            check_dimensions(self.loss_funcs, embeddings.shape[1])
            self._fits = True
        # Losses run in float32, outside autocast: they take exponentials of similarities, which
        # half precision would round. Gather all ranks, so that losses see the whole batch.
        embeddings = gather_batch(at_least_float32(embeddings), 2)
        labels = gather_batch(batch.labels)
        labels = torch.cat([labels, labels])

        # Mine: tuples of embeddings, and pairs of images with matching feature maps.
        pairs, matched = self.maybe_mine_embeddings(embeddings, labels), None
        if any(needs == "feature_maps" for _, needs in losses.values()):
            if maps is None:
                raise InputError(
                    "AttentionConsistencyLoss needs a trunk with feature_maps: use "
                    "AttentionEmbedder"
                )
            if warming_up:  # match each image with its own transformed view
                index = torch.arange(len(batch.labels), device=batch.labels.device)
                matched = (index, index, index[:0], index[:0])
            elif "attention_miner" in self.mining_funcs:
                first = maps.detach().chunk(2)[0]
                matched = self.mining_funcs["attention_miner"](first, batch.labels)

        # Losses: call each with the inputs that it needs.
        for name, (loss, needs) in losses.items():
            if needs == "feature_maps" and maps is not None:
                each = (*maps.chunk(2), batch.points, batch.labels, matched, weights)
                self.losses[name] = mean_loss(loss(*each))
            elif needs == "views":
                self.losses[name] = loss(*embeddings.chunk(2))
            else:
                self.losses[name] = loss(embeddings, labels, pairs if needs == "pairs" else None)
        self.loss_tracker.update(self.loss_weights)

        # Backward: compute the gradients and sum them over ranks.
        self.scaler.scale(self.losses["total_loss"]).backward()
        sum_gradients(self.models, self.loss_funcs)
        for name, value in self.losses.items():  # frees the graph
            self.losses[name] = value.detach() if isinstance(value, Tensor) else value
        if self.look_every == 1:  # only on the CPU: reading losses waits for a GPU
            self.look_at_losses()

        # Step: update the weights, then the centroids and the averaged weights.
        self.clip_gradients()
        if not self.step_optimizers():
            return
        if self._centroids_are_used and self.centroid_momentum != 1 and not warming_up:
            self.state.table.move(embeddings.detach(), labels, self.centroid_momentum)
            self._share_centroids()
        if self.average is not None:
            self.average.update_parameters(self.whole)

    def _grid_of(self, views: Tensor) -> tuple[int, int] | None:
        """Return (rows, columns) of the feature maps; None if no loss uses feature maps.

        The values come from the transform, or else are measured by a pass of the trunk.
        """
        if all(needs_of(loss) != "feature_maps" for loss in self.loss_funcs.values()):
            return None
        grid: tuple[int, int] | None = getattr(self.transform, "grid", None)
        if grid is not None:
            return grid
        channels, height, width = views.shape[1:]
        if (height, width) not in self._grids:
            found = measure_grid(self.models["trunk"], (height, width), channels)
            self._grids[height, width] = found
        return self._grids[height, width]

    def clip_gradients(self) -> None:
        if self.gradient_clippers:
            for optimizer in self.optimizers.values():
                self.scaler.unscale_(optimizer)
        super().clip_gradients()

    def step_optimizers(self) -> bool:
        """Step each optimizer; return False if GradScaler skipped all steps after an overflow."""
        due = {
            name: optimizer
            for name, optimizer in self.optimizers.items()
            # An optimizer named after a frozen part may also have parameters of another part.
            if name.removesuffix("_optimizer") not in self.freeze_these
            or any(parameter.requires_grad for parameter in parameters_of(optimizer))
        }
        self._skipped = set()
        if self.scaler.is_enabled():  # it refuses optimizers without gradients
            due = {
                name: optimizer
                for name, optimizer in due.items()
                if any(parameter.grad is not None for parameter in parameters_of(optimizer))
            }
        for name, optimizer in due.items():
            if self.scaler.is_enabled() and not self._steps(optimizer):
                self._skipped.add(name)
            elif not self.scaler.is_enabled():
                optimizer.step()
        if due:
            self.scaler.update()
        return not due or self._skipped != set(due)

    def _steps(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step with loss scaling; return False if the scaler skipped the step."""
        made: list[bool] = []
        noted = optimizer.register_step_post_hook(lambda *_: made.append(True))
        try:
            self.scaler.step(optimizer)
        finally:
            noted.remove()
        return bool(made)

    def step_lr_schedulers(self, end_of_epoch: bool = False) -> None:
        """Step the schedulers as in PML, except per-iteration ones whose optimizer did not step."""
        waiting = {id(self.optimizers[name]) for name in self._skipped}
        if end_of_epoch or not waiting:
            super().step_lr_schedulers(end_of_epoch)
            return
        suffix = self.allowed_lr_scheduler_key_suffixes["iteration"]
        for name, schedule in self.lr_schedulers.items():
            if name.endswith(suffix) and id(getattr(schedule, "optimizer", None)) not in waiting:
                schedule.step()

    def look_at_losses(self) -> str:
        """Return the losses for the progress bar; raise FloatingPointError if not finite."""
        device = torch.device(self.data_device)
        values = [
            torch.as_tensor(v, dtype=torch.float32, device=device) for v in self.losses.values()
        ]
        # One transfer for all losses, so that the CPU waits for a GPU only once.
        shown = dict(zip(self.losses, torch.stack(values).tolist(), strict=True))
        if not math.isfinite(shown["total_loss"]):
            parts = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            raise DivergedError(
                f"loss is not finite in epoch {self.epoch}, iteration {self.iteration} ({parts}): "
                "lower the learning rate or resume from the last checkpoint"
            )
        return ", ".join(f"{name.removesuffix('_loss')} {v:.3f}" for name, v in shown.items())

    def relabel(self) -> None:
        """Embed and cluster the whole data set, and set the new pseudo-labels and centroids.

        In distributed training the main process clusters and sends the result to all ranks. If the
        embeddings are in a file, all ranks assign images to the centroids of k-means.

        Raises:
            ValueError: if there are too few clusters for a batch. Errors of the labeler are not
                caught.
        """
        state, embed_images = self.state, self._embedding_pass()
        found = embed_images()
        embeddings: Tensor | None = None
        readable: Tensor | None = None

        def read_again() -> None:
            nonlocal embeddings, readable
            embeddings, readable = embed_images.readable(found, state.unreadable)

        run_on_main(read_again, "reading images a second time")
        with clusters_named():
            clusters = cluster(
                self.labeler, embeddings, readable, self.centroids, embed_images.file
            )
        made: list[Tensor | None] = [None, None, None]
        if clusters is not None and embeddings is not None:
            state.embeddings = embeddings
            made = [*clusters, embeddings[sample(len(embeddings))].clone()]
        if self.guard is not None:
            self.guard.look(self, state.embeddings)
        labels, centroids, moved_from = broadcast(made)
        assert labels is not None
        assert centroids is not None
        check_same("pseudo-labels", [labels, centroids], _FAULTY)
        with clusters_named():
            self.set_pseudo_labels(labels, centroids)
        state.moved_from = moved_from
        if is_main():
            noise = int((labels < 0).sum())
            _LOGGER.info(
                "epoch %d: %d clusters, %d images are noise", self.epoch, len(centroids), noise
            )

    def set_pseudo_labels(self, labels: Tensor, centroids: Tensor | None) -> None:
        """Set the pseudo-labels and the centroids.

        All losses and miners that use centroids get the new ones, including losses inside other
        losses. Stored embeddings with earlier labels are cleared (``reset_queue`` of PML's
        CrossBatchMemory).

        Args:
            labels: (N,), indices of centroids, -1 for noise.
            centroids: (K, D), or None for no centroids.

        Raises:
            ValueError: if there are fewer clusters than a batch needs, or more clusters than a loss
                has classes, or if labels do not match the centroids or the number of images.
        """
        labels = pseudo_labels(labels).cpu()
        if labels.shape != self.labels.shape:
            raise InputError(
                f"labels must have one entry for each of the {len(self.labels)} images, got shape "
                f"{tuple(labels.shape)}"
            )
        needed = int(labels.max()) + 1
        if centroids is not None and needed > len(centroids):
            raise InputError(
                f"labels must index the {len(centroids)} centroids, got label {needed - 1}: give "
                "labels and centroids of the same clustering"
            )
        there = int(labels[labels >= 0].unique().numel())
        check_clusters(there, self.batch_size, self.images_per_cluster)
        check_classes(self.loss_funcs, needed, "clusters: give as many classes, or fewer clusters")
        self.state.table.set(centroids)
        self.state.labels = labels
        self._share_centroids()
        forget_labels(self.loss_funcs, self.mining_funcs)

    def _share_centroids(self) -> None:
        """Give the centroids of this training to all losses and miners."""
        self._centroids_are_used = share_centroids(
            self.state.table, self.loss_funcs, self.mining_funcs
        )

    def _clustering_is_due(self) -> bool:
        """Return whether to cluster before the epoch that begins."""
        since, state = self.epoch - self.warmup_epochs - 1, self.state
        if since < 0 or self.centroids is None:
            return since >= 0
        if since % self.recluster_every:
            return False
        threshold, before = self.recluster_when_moved, state.moved_from
        if threshold is None or before is None:
            return True
        embed_images = self._embedding_pass()
        found = embed_images(sample(len(state.labels)))

        def have_moved() -> bool:
            moved = distance_moved(*embed_images.readable(found, state.unreadable), before)
            _LOGGER.info("epoch %d: embeddings have moved by %.4f", self.epoch, moved)
            return not moved < threshold

        return run_on_main(have_moved, "comparing embeddings")

    def _embedding_pass(self) -> EmbeddingPass:
        """Average BatchNorm statistics over ranks and return the embedding pass. Collective."""
        equalise([*self.models.values(), self.average])
        folder = self.checkpoint_folder
        if len(self.state.labels) <= IN_MEMORY_UP_TO:
            folder = None
        return EmbeddingPass(
            self.models,
            OneView(self.dataset, self.eval_transform),
            self.amp_dtype,
            batch_size=max(64, self.batch_size),
            num_workers=self.dataloader_num_workers,
            progress=self.progress,
            file=None if folder is None else folder / "embeddings.npy",
        )

    def initialize_dataloader(self) -> None:
        """Draw an epoch, or take the rest of a loaded epoch, and make a new loader for it.

        Each epoch needs a new loader, because a running one keeps the old order, and the old
        pseudo-labels, by which it replaces unreadable images.
        """
        state = self.state
        if not state.loaded_within_epoch or state.order is None:
            state.done = 0
            state.order = draw_epoch(
                state.labels,
                self.centroids is not None,
                self.iterations_per_epoch * self.batch_size,
                self.images_per_cluster,
                self.batch_size,
            )
        state.loaded_within_epoch = False
        self.dataloader = make_loader(
            TwoViews(self.dataset, self.transform, state.labels),
            share_of(state.order[state.done * self.batch_size :], self.batch_size),
            self.batch_size // world_size(),
            num_workers=self.dataloader_num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self._pins_memory,
        )
        self.dataloader_iter = iter(self.dataloader)

    @property
    def _pins_memory(self) -> bool:
        """Whether batches lie in pinned memory, which a GPU reads without making the CPU wait."""
        return torch.device(self.data_device).type == "cuda"

    def get_batch(self) -> Batch:
        """Return the next batch, with the pseudo-labels of its images."""
        *tensors, index, troubles = next(self.dataloader_iter)
        for trouble in filter(None, troubles):
            self.state.unreadable.add(trouble)
        tensors.append(self.labels[index])
        if self._pins_memory:
            tensors[-1] = tensors[-1].pin_memory()
        return Batch(*(t.to(self.data_device, non_blocking=True) for t in tensors))

    def _call_end_of_epoch_hooks(self) -> bool:
        """Call test_hook on all ranks, then end_of_epoch_hook on the main process.

        The states of the other ranks are gathered first, because end_of_epoch_hook may save a
        checkpoint.

        Returns:
            Whether end_of_epoch_hook ends the training.
        """
        equalise([*self.models.values(), self.average])
        if self.test_hook is not None:
            self.test_hook(self)
        self._others = states_of_others(self.state.unreadable)
        try:
            return run_on_main(lambda: self.end_of_epoch_hook(self) is False, "end_of_epoch_hook")
        finally:
            self._others = None

    def save_checkpoint(
        self, folder: str | Path, keep: int = 2, extra: Mapping[str, object] | None = None
    ) -> Path:
        """Write a checkpoint, from which :meth:`load_checkpoint` resumes exactly.

        In distributed training the main process writes. All processes must call this method. The
        exception is end_of_epoch_hook, which runs only on the main process and may call it there.

        Args:
            folder: folder to write to. The file is named ``epoch_NNNN.pt`` after the number of
                epochs completed, or ``epoch_NNNN_iteration_NNNNNN.pt`` within the next epoch.
            keep: number of checkpoints to keep, at least 1.
            extra: entries to add to ``trainer.extra``.

        Returns:
            The path written.

        Raises:
            InputTypeError: if the state or ``trainer.extra`` contains a type that cannot be
                loaded again; the message gives its place and type.
            OSError: if the file cannot be written; earlier checkpoints are kept.
            ValueError: if called in end_of_iteration_hook, where the iteration is not complete.
        """
        check_count("keep", keep, 1)
        if self._within_step:
            raise InputError(
                "a checkpoint within an iteration would be incomplete: set checkpoint_every, or "
                "save in end_of_epoch_hook"
            )
        self.extra.update(extra or {})
        if self.losses_file is not None:
            self.losses_file.flush()
        if self._others is not None:  # in end_of_epoch_hook, on the main process
            return save_checkpoint(folder, trainer_state(self, self._others), keep)
        with self._last_network():
            equalise([*self.models.values(), self.average])
            others = states_of_others(self.state.unreadable)
            return run_on_main(
                lambda: save_checkpoint(folder, trainer_state(self, others), keep),
                "writing a checkpoint",
            )

    @contextmanager
    def _last_network(self) -> Iterator[None]:
        """Set the last trained weights for the block, with which a resumed training continues."""
        if self._last is None:  # the guard has not replaced them
            yield
            return
        kept = network_state(self)
        try:
            load_network(self, self._last)
            yield
        finally:
            load_network(self, kept)

    def load_checkpoint(self, path: str | Path | None = None) -> StateDict:
        """Restore a checkpoint; continue with ``train(trainer.epoch + 1, num_epochs)``.

        Args:
            path: a file, or a folder, whose last readable checkpoint is loaded; None for
                ``checkpoint_folder``.

        Returns:
            ``trainer.extra`` as it was saved.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            InputError: if the checkpoint is damaged, or does not match this trainer and its data
                set; the trainer is not changed then.
        """
        path = self.checkpoint_folder if path is None else path
        if path is None:
            raise InputError("load_checkpoint needs a path: the trainer has no checkpoint_folder")
        found = Path(path)
        state = load_checkpoint_distributed(found)
        with self._prepared_schedule(state):
            restore_trainer(self, state)
        self._last, self._loaded, self._within_step = None, True, False
        restore_random(state, self.batch_size)
        self._own_folder = found if found.is_dir() else found.parent
        return self.extra

    def _between_iterations(self, due: bool) -> None:
        """Save a checkpoint if it is due or a signal arrived; raise Interrupted after a signal."""
        if self.checkpoint_folder is None:
            return
        # All processes stop after the same iteration.
        signum = all_reduce_max(self._signals.received or 0)
        if not (due or signum):
            return
        self.look_at_losses()  # a diverged model must not replace good checkpoints
        path = self._save()
        if signum:
            where = (
                f"epoch {self.epoch}, iteration {self.state.done} of {self.iterations_per_epoch}"
            )
            if self.state.order is None:
                where = f"the end of epoch {self.state.ended}"
            raise Interrupted(signum, f"saved at {where}, in {path}")

    def _save(self) -> Path:
        assert self.checkpoint_folder is not None
        self._own_folder = self.checkpoint_folder
        return self.save_checkpoint(self.checkpoint_folder, self.keep)

    @contextmanager
    def _prepared_schedule(self, state: Saved) -> Iterator[None]:
        """Create the default schedule, so that the block can load its state from a checkpoint.

        If the block raises, the schedule is removed again.
        """
        saved = state["parts"]["lr_schedulers"].get(defaults.SCHEDULE)
        steps = None if saved is None else saved.get("total_steps")
        if not isinstance(steps, int) or not self._schedule_is_own or self.lr_schedulers:
            yield
            return
        (optimizer,) = self.optimizers.values()
        before = [dict(group) for group in optimizer.param_groups]
        self._make_schedule(steps - 1)
        try:
            yield
        except Exception:
            del self.lr_schedulers[defaults.SCHEDULE]
            for group, earlier in zip(optimizer.param_groups, before, strict=True):
                group.clear()
                group.update(earlier)
            raise

    def _make_schedule(self, steps: int) -> None:
        """Create the default schedule for a number of steps, advanced to the current step."""
        state, made = self.state, self.lr_schedulers
        earlier = made.get(defaults.SCHEDULE)
        if not self._schedule_is_own:
            return
        if isinstance(earlier, OneCycleLR) and earlier.total_steps == steps + 1:
            return
        (optimizer,) = self.optimizers.values()
        if earlier is not None:  # the number of epochs has changed
            for group in optimizer.param_groups:
                group["lr"] = group["max_lr"]
        made[defaults.SCHEDULE] = defaults.default_schedule(optimizer, steps)
        if earlier is not None:
            state.schedules = fresh_schedules(self)
        if state.ended or state.done:
            iterations = self.iterations_per_epoch
            replay(made, iterations, state.ended, state.done, [defaults.SCHEDULE])

    def _keep_better(self, guard: Guard) -> None:
        """Measure the last network too, and load the network that the guard keeps."""
        found = self._embedding_pass()()
        guard.look(self, None if found is None else found[0])
        self._last = network_state(self)
        guard.restore_kept(self)
        _LOGGER.info("%s", guard.verdict())

    def fit_projection(self, max_images: int = 10_000) -> None:
        """Fit the projection of an :class:`AttentionEmbedder` to the training images.

        All processes use the same images. Other models have no projection and are not changed. If
        the projection cannot be fitted (too few images, all alike, or NaN), a warning is logged and
        the model stays without one.

        Args:
            max_images: largest number of images used; if there are more, a random sample of this
                size.
        """
        images = OneView(self.dataset, self.eval_transform)
        workers, progress = self.dataloader_num_workers, self.progress and is_main()
        fit_to(self._model_to_keep, images, workers, max_images, progress)

    def reset_projection(self) -> None:
        """Remove the fitted projection, so that the model returns the trained embedding."""
        for model in (self.whole, self._model_to_keep):
            if isinstance(model, AttentionEmbedder):
                model.reset_projection()

    @property
    def _model_to_keep(self) -> nn.Module:
        return self.whole if self.average is None else self.ema_model

    def finish(self) -> None:
        """Fit the projection, and write the model and an index of the images to ``run``.

        Raises:
            ValueError: if the data set was not given as the path of a folder.
        """
        if self.run is None or not isinstance(self.dataset, ImageFiles):
            raise InputError("finish needs a folder of images: give dataset as a path")
        run, dataset, model = self.run, self.dataset, self._model_to_keep
        assert isinstance(model, AttentionEmbedder)
        self.fit_projection()
        seen = dataset.with_transform(self.eval_transform)
        found = embed_distributed(
            model, seen, num_workers=self.dataloader_num_workers, progress=self.progress
        )

        def write() -> None:
            assert found is not None
            remove_index(run)
            model.save_pretrained(run / "model")
            size = size_in_pixels(model.data_config, self._image_size)
            images = str(dataset.root.resolve())
            # A search embeds its queries at the image size of the training.
            write_json(
                run / "run.json", {"images": images, "image_size": size, "epochs": self.ended}
            )
            ImageIndex(found[0], dataset.names, dataset.root).save(run)

        run_on_main(write, "writing the run")
        if self.progress and is_main():
            print(f"{self.verdict}\n{len(dataset)} images indexed in {run}".strip())


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield all parameters of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _check_unused(run: Path) -> None:
    """Raise InputError if the folder contains a run already."""
    if (run / "model").exists() or (run / "run.json").exists():
        raise InputError(f"run={str(run)!r} already contains a run: give another folder, run=...")


def _that_fit(losses: str, columns: int | None) -> str:
    """Return the losses that fit a bar with this number of columns: all, or only the total."""
    if columns is None or columns >= _NARROW:
        return losses
    return next((one for one in losses.split(", ") if one.startswith("total ")), losses)
