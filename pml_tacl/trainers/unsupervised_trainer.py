import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from pml_tacl.clustering import PseudoLabeler
from pml_tacl.datasets import ImageFiles
from pml_tacl.distributed.inference import embed_together
from pml_tacl.distributed.session import is_first, on_first, world_size
from pml_tacl.distributed.training import draw_together, end_of_epoch, share_of
from pml_tacl.models import AttentionEmbedder
from pml_tacl.models.preprocessing import size_in_pixels
from pml_tacl.search import PictureIndex
from pml_tacl.trainers import defaults
from pml_tacl.trainers._arguments import check_arguments, check_clusters
from pml_tacl.trainers._clusters import clustering_is_due, embed_pictures, relabel
from pml_tacl.trainers._order import make_loader
from pml_tacl.trainers._parts import (
    as_models,
    check_classes,
    check_losses,
    check_pml_arguments,
    check_warm_up,
    device_of,
    plain_number,
    within,
)
from pml_tacl.trainers._restoring import fresh_schedules, replay
from pml_tacl.trainers._resumable import Resumable
from pml_tacl.trainers._training_step import TrainingStep
from pml_tacl.trainers._unreadable import Unreadable
from pml_tacl.trainers._views import Batch, OneView, TwoViews
from pml_tacl.trainers._workers import lost_workers_named
from pml_tacl.trainers.fitting import fit_to
from pml_tacl.trainers.guard import Guard, load_network, network_state
from pml_tacl.trainers.recipe import recipe_for
from pml_tacl.transforms import BackgroundSwap
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import write_json
from pml_tacl.utils.labels import pseudo_labels
from pml_tacl.utils.signals import Signals

_LOGGER = logging.getLogger(__name__)


class UnsupervisedTrainer(Resumable, TrainingStep):
    """Train an embedding on pictures without labels: cluster, then learn from the clusters.

    A trainer of PML: models, loss_funcs, mining_funcs, optimizers, hooks and records are as
    there. Each epoch that is due begins with an embedding pass over the whole data set; its
    clusters are the pseudo-labels of the epoch, and a new sampler and loader draw by them.
    Both views of a picture share its pseudo-label. During ``warmup_epochs`` every picture is a
    cluster of its own. In many processes (:mod:`pml_tacl.distributed.inference`) all train as one,
    and the first calls the hooks. After Li et al. 2020; definition ours.

    Only the model and the data set must be given. What is left out follows
    :func:`pml_tacl.trainers.recipe.recipe_for`. If the data set is a folder, the training ends
    with :meth:`finish`: a model, an index to search, and a line that says whether it helped.

    Args:
        models: an :class:`AttentionEmbedder`, or {"trunk": ..., "embedder": ...}; the embedder
            may be missing.
        optimizers: one optimizer of all parameters, or {"trunk_optimizer": ...,
            "embedder_optimizer": ...}. None: AdamW with one cycle of learning rates.
        batch_size: pictures in a batch, of all processes together; each comes in two views.
        loss_funcs: named losses, added up: an AttentionConsistencyLoss gets feature maps and
            points, PML's SelfSupervisedLoss the two views, any other the embeddings of both
            views with their pseudo-labels. Losses of centres get them wherever they are, within
            PML's wrappers or a module of the user's, and with them need no wrapper: within
            SelfSupervisedLoss or CrossBatchMemory such a loss is called itself.
        dataset: items (picture, anything), the picture as ``transform`` takes it; labels, if it
            has them, are not read. Or the path of a folder of images.
        image_size: side or (height, width) in pixels, for the transforms that are left out; None
            is the model's own.
        run: folder that :meth:`finish` writes to; None is "runs/" and the name of the data set's
            folder.
        transform: picture -> (view, transformed view, points): a :class:`SiameseTransform`.
        eval_transform: picture -> (3, S, S), for the embedding pass.
        labeler: embeddings (N, D) -> PseudoLabels, as :class:`KMeansPseudoLabeler`; label -1 is
            noise and is not drawn.
        mining_funcs: "tuple_miner" for the metric losses, "attention_miner" (feature maps and
            labels of the first views) for the attention losses.
        images_per_cluster: pictures of one cluster in a batch; divides batch_size.
        recluster_every: epochs between two clusterings, at least 1.
        recluster_when_moved: cluster an epoch that is due only if the embeddings have moved by
            this much since the last clustering: the mean cosine distance, in [0, 2], of 1000
            pictures from where they were (0.02 is little, 0.2 much). None: always.
        warmup_epochs: epochs before the first clustering.
        centroid_momentum: in [0, 1], of centres that follow the batches of a training
            (``ContrastiveClusteringLoss.move_centroids``); at 1 they stay where clustering left
            them.
        swap: a :class:`BackgroundSwap` of both views, or None.
        amp_dtype: of autocast, torch.bfloat16 or torch.float16 (scales the loss); None for none.
        accumulation_steps: chunks that a batch goes through the model in, to save memory. The
            losses see the whole batch, so the step is that of one chunk, but for BatchNorm.
        ema_decay: in (0, 1), of averaged weights, ``ema_model``; None for none. They are for
            evaluation and export; clusters come from the weights that are trained, since their
            centres are compared with those weights' embeddings.
        compile: torch.compile trunk and embedder, as one; names of parameters stay.
        max_unreadable: pictures that may turn unreadable before the training stops; until then
            each becomes noise, and another of its cluster takes its place.
        checkpoint_folder: a checkpoint is written there at the end of each epoch, and SIGINT or
            SIGTERM end the training after one, with :class:`Interrupted` (a SystemExit, 130 or
            143); a second signal ends it at once. None: only :meth:`save_checkpoint` writes.
        checkpoint_every: iterations between two more of them, within an epoch; None for none.
        keep: how many of the last checkpoints stay, at least 1.
        record_keeper: record-keeper's RecordKeeper (``hooks.record_keeper``), whose records are
            part of the checkpoints: none is lost after a crash, or there twice.
        progress: show bars.
        **kwargs: as of PML's BaseTrainer (loss_weights, iterations_per_epoch, lr_schedulers,
            gradient_clippers, freeze_these, dataloader_num_workers, end_of_epoch_hook, ...),
            but for those about labels of the data set (sampler, dataset_labels, ...), which are
            refused.
        guard: keep the better network by a criterion without labels, the untrained one included,
            and end early where it falls (:class:`pml_tacl.trainers.guard.Guard`). Needs a
            clustering before the first epoch, so no warm-up. None: as the recipe says, where there
            is no warm-up.

    Attributes:
        labels: pseudo-labels (N,), -1 for noise. Each picture's own before the first clustering.
        centroids: (K, D), moved with the losses' own; None before the first clustering.
        embeddings: (N, D) of the last embedding pass, NaN for unreadable pictures; not kept in
            checkpoints, and only on the first of many processes.
        extra: a dict of the user's tensors, numbers, strings and containers, in checkpoints too.
            NumPy's numbers become plain ones there, and arrays tensors; other types are refused.

    Raises:
        ValueError: for an argument that does not fit, before anything is computed.
        FloatingPointError: in training, if the loss is NaN or infinite.
        OSError: in training, for more unreadable pictures than ``max_unreadable``, for a
            checkpoint that cannot be written, or for a loader's process that was killed.
    """

    def __init__(
        self,
        models: nn.Module | dict[str, nn.Module],
        optimizers: torch.optim.Optimizer | dict[str, torch.optim.Optimizer] | None = None,
        batch_size: int | None = None,
        loss_funcs: dict[str, nn.Module] | None = None,
        dataset: Dataset[Any] | str | Path | None = None,
        *,
        image_size: int | tuple[int, int] | None = None,
        run: str | Path | None = None,
        guard: bool | None = None,
        transform: Callable[[Any], tuple[Tensor, Tensor, Tensor]] | None = None,
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
            raise InputError("dataset must be given: a data set, or the path of a folder of images")
        models, whole, compiled = as_models(models)
        self.recipe = recipe = recipe_for(whole)
        self.run: Path | None = None
        if isinstance(dataset, str | Path):
            self.run = Path("runs", Path(dataset).resolve().name) if run is None else Path(run)
            _check_unused(self.run)
            dataset = ImageFiles(dataset, progress=progress)
        elif run is not None:
            raise InputError("run is for a dataset that is the path of a folder: leave run out")
        count = len(dataset)  # type: ignore[arg-type]
        plain_pml = loss_funcs is not None
        if loss_funcs is None:
            defaults.check_enough(count)
            loss_funcs, own_miners = defaults.default_losses()
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
        if isinstance(swap, str):
            swap = None if plain_pml else defaults.default_swap(recipe, transform)
        # Of networks from scratch half of the epochs, whose number `train` is told.
        self._warmup_is_open = warmup_epochs is None and not plain_pml and recipe.warmup > 0
        warmup_epochs = warmup_epochs or 0
        self._schedule_is_own = optimizers is None and not kwargs.get("lr_schedulers")
        if optimizers is None:
            optimizers = defaults.default_optimizer(whole, recipe)
        if guard is None:
            guard = recipe.guard and not plain_pml and not warmup_epochs
        self.guard = Guard(recipe.trained_share) if guard else None
        if self.guard is not None and warmup_epochs:
            raise InputError(
                "guard compares with the untrained network, which warm-up epochs leave before the "
                "first clustering: give warmup_epochs=0, or guard=False"
            )
        self._last: dict[str, Any] | None = None  # the network that was trained last
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
        check_warm_up(loss_funcs, labeler, count, warmup_epochs)
        self.transform, self.eval_transform, self.labeler = transform, eval_transform, labeler
        self.swap, self.amp_dtype, self.progress = swap, amp_dtype, progress
        self.checkpoint_folder = None if checkpoint_folder is None else Path(checkpoint_folder)
        # Plain numbers, for loaders and checkpoints: NumPy's are neither's.
        self.images_per_cluster, self.warmup_epochs = int(images_per_cluster), int(warmup_epochs)
        self.recluster_every = int(recluster_every)
        self.recluster_when_moved = plain_number(recluster_when_moved)
        self.accumulation_steps = int(accumulation_steps)
        self.centroid_momentum = float(centroid_momentum)
        self.checkpoint_every, self.keep = plain_number(checkpoint_every), int(keep)
        self.record_keeper = record_keeper
        self.labels = torch.arange(count)
        self.centroids: Tensor | None = None
        self.embeddings: Tensor | None = None
        self.moved_from: Tensor | None = None
        self.unreadable = Unreadable(int(max_unreadable))
        self.stand_at_start()
        kwargs.setdefault("data_device", device_of(models["trunk"]))
        kwargs.setdefault("iterations_per_epoch", max(1, count // batch_size))
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
        self.set_up_step(whole, compile, None if ema_decay is None else float(ema_decay))

    def modify_schema(self) -> None:
        """Any names of losses; PML's checker would also pass names that only begin right."""
        self.schema["loss_funcs"].keys = [name for name in self.loss_names if name != "total_loss"]
        self.schema["mining_funcs"].keys = ["tuple_miner", "attention_miner"]
        self.schema["optimizers"].important = []

    def train(self, start_epoch: int = 1, num_epochs: int = 1) -> None:
        """Train the epochs from ``start_epoch`` to ``num_epochs``, both included.

        After :meth:`load_checkpoint`, ``start_epoch`` is ``trainer.epoch + 1``. A hook at the end
        of an epoch that returns False ends the training.

        Raises:
            ValueError: if a checkpoint was loaded from within another epoch, or checkpoint_folder
                holds checkpoints of a training that was not loaded.
            Interrupted: after SIGINT or SIGTERM, with a checkpoint_folder.
        """
        start_epoch, num_epochs = plain_number(start_epoch), plain_number(num_epochs)
        if self._last is not None:
            load_network(self, self._last)
            self._last = None
        if isinstance(self.whole, AttentionEmbedder):
            self.whole.reset_projection()  # it is fitted to what is learned here
        if self._warmup_is_open:
            self.warmup_epochs = self.recipe.warmup_epochs(num_epochs)
        self._make_schedule(num_epochs * self.iterations_per_epoch)
        with Signals(self.checkpoint_folder is not None) as self._signals, lost_workers_named():
            self._begin(start_epoch)
            for epoch in range(start_epoch, num_epochs + 1):
                if self.stopped:
                    _LOGGER.info("end_of_epoch_hook has ended the training in epoch %d", self.ended)
                    break
                self.epoch = epoch
                try:
                    self._begin_epoch()
                except InputError as error:
                    # The clusters of an untrained network are the caller's to mend.
                    if self.guard is None or not self.ended:
                        raise
                    _LOGGER.warning("the training ends before epoch %d: %s", epoch, error)
                    self.guard.note_collapse(self)
                    self.epoch, self.stopped = self.ended, True
                    break
                self._train_epoch(num_epochs)
                self.step_lr_schedulers(end_of_epoch=True)
                self.zero_losses()
                self.ended, self.done, self.order = epoch, 0, None
                self.stopped = end_of_epoch(self) or (self.guard is not None and self.guard.falls)
                self._between_iterations(due=True)
            if self.guard is not None and (self.stopped or self.ended >= num_epochs):
                self._keep_better(self.guard)
        self.stopped = False
        if self.run is not None:
            self.finish()

    def prepare_for(self, state: Mapping[str, Any]) -> None:
        """Make the schedule that a checkpoint's state is restored into."""
        saved = state["lr_schedulers"].get(defaults.SCHEDULE)
        if saved is not None and self._schedule_is_own and not self.lr_schedulers:
            self._make_schedule(saved["total_steps"] - 1)

    def _make_schedule(self, steps: int) -> None:
        """Make the default schedule of a training of so many steps, where this one stands."""
        made: dict[str, Any] = self.lr_schedulers
        earlier = made.get(defaults.SCHEDULE) if self._schedule_is_own else None
        if not self._schedule_is_own or (earlier and earlier.total_steps == steps + 1):
            return
        (optimizer,) = self.optimizers.values()
        if earlier is not None:  # more epochs, or fewer, than when it was made
            for group in optimizer.param_groups:
                group["lr"] = group["max_lr"]
        made[defaults.SCHEDULE] = defaults.default_schedule(optimizer, steps)
        self.schedules = fresh_schedules(self) if earlier is not None else self.schedules
        if self.ended or self.done:
            replay(self, self.ended, self.done, [defaults.SCHEDULE])

    def _keep_better(self, guard: Guard) -> None:
        """Compare the last network too, and go on with what the guard keeps."""
        found = embed_pictures(self)
        guard.look(self, None if found is None else found[0])
        self._last = network_state(self)
        guard.restore_kept(self)
        _LOGGER.info("%s", guard.verdict())

    @property
    def verdict(self) -> str:
        """Whether the training was worth it, in one line; "" without a guard."""
        return "" if self.guard is None else self.guard.verdict()

    def fit_projection(self, max_images: int = 10_000) -> None:
        """Fit the projection of an :class:`AttentionEmbedder` to the images that are trained on.

        All processes fit to the same images. Other models have no projection, and are left alone;
        so is one whose images all look the same, with a warning.

        Args:
            max_images: a random sample of so many, if there are more.
        """
        images = OneView(self.dataset, self.eval_transform)
        workers, progress = self.dataloader_num_workers, self.progress and is_first()
        fit_to(self._model_to_keep, images, workers, max_images, progress)

    def reset_projection(self) -> None:
        """Go back to the embedding that is trained."""
        if isinstance(self._model_to_keep, AttentionEmbedder):
            self._model_to_keep.reset_projection()

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
        run, dataset, model = self.run, self.dataset, self.whole
        assert isinstance(model, AttentionEmbedder)
        self.fit_projection()
        seen = dataset.with_transform(self.eval_transform)
        found = embed_together(
            model, seen, num_workers=self.dataloader_num_workers, progress=self.progress
        )

        def write() -> None:
            assert found is not None
            model.save_pretrained(run / "model")
            size = size_in_pixels(model.data_config, self._image_size)
            images = str(dataset.root.resolve())
            # For a search, which embeds its queries at the size that was trained at.
            write_json(
                run / "run.json", {"images": images, "image_size": size, "epochs": self.ended}
            )
            PictureIndex(found[0], dataset.names, dataset.root).save(run)

        on_first(write, "writing the run")
        if self.progress and is_first():
            print(f"{self.verdict}\n{len(dataset)} images indexed in {run}".strip())

    def _begin_epoch(self) -> None:
        if not self._loaded_within_epoch:
            with self._signals.at_once(f"saved at the end of epoch {self.ended}"):
                if clustering_is_due(self):
                    self.relabel()
        self.hand_over_centroids(new=False)
        self.initialize_dataloader()
        self.set_to_train()

    def _train_epoch(self, num_epochs: int) -> None:
        with tqdm(
            total=self.iterations_per_epoch * self.batch_size,
            initial=self.done * self.batch_size,
            desc=f"epoch {self.epoch}/{num_epochs}",
            unit="img",
            disable=not (self.progress and is_first()),
        ) as bar:
            for iteration in range(self.done, self.iterations_per_epoch):
                self.iteration = iteration
                self._within_step = True
                self.forward_and_backward()
                if is_first():
                    self.end_of_iteration_hook(self)
                self.step_lr_schedulers(end_of_epoch=False)
                self._within_step = False
                self.done = iteration + 1
                made = self.get_global_iteration() + 1
                due = self.checkpoint_every is not None and made % self.checkpoint_every == 0
                ends = self.done == self.iterations_per_epoch
                if ends or made % self.look_every == 0:
                    bar.set_postfix_str(self.look_at_losses(), refresh=False)
                bar.update(self.batch_size)
                # A test that fails must not cost the epoch: it is whole but for its end.
                self._between_iterations(self.epoch in self.test_epochs if ends else due)
        del self.dataloader_iter  # its processes end, and leave the memory to the hook

    def relabel(self) -> None:
        """Embed the whole data set, cluster it, and set the pseudo-labels and centres found.

        Raises:
            ValueError: if the clusters cannot fill a batch, or what the labeler raises.
        """
        relabel(self)

    def set_pseudo_labels(self, labels: Tensor, centroids: Tensor | None) -> None:
        """Set the pseudo-labels (N,), -1 for noise, and the centres (K, D) that they index.

        Every loss and miner that holds centres gets them, also one within another, and every
        memory of earlier labels is emptied (``reset_queue``, of PML's CrossBatchMemory).

        Raises:
            ValueError: if there are fewer clusters than a batch needs or more than a loss has
                classes for, or labels and centres do not fit each other or the images.
        """
        labels = pseudo_labels(labels).cpu()
        if labels.shape != self.labels.shape:
            raise InputError(
                f"labels must be one for each of the {len(self.labels)} images, got shape "
                f"{tuple(labels.shape)}"
            )
        needed = int(labels.max()) + 1
        if centroids is not None and needed > len(centroids):
            raise InputError(
                f"labels must index the {len(centroids)} centroids, got label {needed - 1}: give "
                "those of the same clustering"
            )
        there = int(labels[labels >= 0].unique().numel())
        check_clusters(there, self.batch_size, self.images_per_cluster)
        check_classes(self.loss_funcs, needed, "clusters: give as many classes, or fewer clusters")
        self.labels, self.centroids = labels, centroids
        self.hand_over_centroids()
        for memory in within({**self.loss_funcs, **self.mining_funcs}, "reset_queue"):
            memory.reset_queue()

    def initialize_dataloader(self) -> None:
        """Draw an epoch, or take what is left of a loaded one, for a new loader.

        A loader already running would hand out old pseudo-labels.
        """
        if not self._loaded_within_epoch or self.order is None:
            self.order, self.done = draw_together(self), 0
        self._loaded_within_epoch = False
        self.dataloader = make_loader(
            TwoViews(self.dataset, self.transform, self.labels),
            share_of(self.order[self.done * self.batch_size :], self.batch_size),
            self.batch_size // world_size(),
            num_workers=self.dataloader_num_workers,
            collate_fn=self.collate_fn,
            pin_memory=torch.device(self.data_device).type == "cuda",
        )
        self.dataloader_iter = iter(self.dataloader)

    def get_batch(self) -> Batch:
        *tensors, index, troubles = next(self.dataloader_iter)
        for trouble in filter(None, troubles):
            self.unreadable.add(trouble)
        views, transformed, points = (t.to(self.data_device, non_blocking=True) for t in tensors)
        return Batch(views, transformed, points, self.labels[index].to(self.data_device))


def _check_unused(run: Path) -> None:
    """Raise InputError if a run lies there, before anything is computed."""
    if (run / "model").exists() or (run / "run.json").exists():
        raise InputError(f"run={str(run)!r} holds another run: give another folder, run=...")
