import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import BaseTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from pml_tacl._centroids import Centroids
from pml_tacl.clustering import PseudoLabeler
from pml_tacl.evaluation import embed
from pml_tacl.trainers._arguments import check_arguments, check_clusters
from pml_tacl.trainers._steps import Step, loss_of
from pml_tacl.trainers._views import Batch, OneView, TwoViews, swap_surroundings
from pml_tacl.trainers.checkpoint import (
    load_checkpoint,
    restore_trainer,
    save_checkpoint,
    trainer_state,
)
from pml_tacl.transforms import SurroundingsSwap

_LOGGER = logging.getLogger(__name__)


class UnsupervisedTrainer(BaseTrainer):
    """Train an embedding on pictures without labels: cluster, then learn from the clusters.

    A trainer of PML: models, loss_funcs, mining_funcs, optimizers, hooks and records are as
    there. Each epoch that is due begins with an embedding pass over the whole data set; its
    clusters are the pseudo-labels of the epoch, and a new sampler and loader draw by them.
    Both views of a picture share its pseudo-label. During ``warmup_epochs`` every picture is a
    cluster of its own. After Li et al. 2020; definition ours.

    Args:
        models: an :class:`AttentionEmbedder`, or {"trunk": ..., "embedder": ...}.
        optimizers: one optimizer of all parameters, or {"trunk_optimizer": ...,
            "embedder_optimizer": ...}.
        batch_size: pictures in a batch; each comes in two views.
        loss_funcs: named losses, added up: an AttentionConsistencyLoss gets feature maps and
            points, PML's SelfSupervisedLoss the two views, any other the embeddings of both
            views with their pseudo-labels.
        dataset: items (picture, anything), the picture as ``transform`` takes it; labels, if it
            has them, are not read.
        transform: picture -> (view, transformed view, points): a :class:`SiameseTransform`.
        eval_transform: picture -> (3, S, S), for the embedding pass.
        labeler: embeddings (N, D) -> PseudoLabels, as :class:`KMeansPseudoLabeler`; label -1 is
            noise and is not drawn.
        mining_funcs: "tuple_miner" for the metric losses, "attention_miner" (feature maps and
            labels of the first views) for the attention losses.
        images_per_cluster: pictures of one cluster in a batch; divides batch_size.
        recluster_every: epochs between two clusterings, at least 1.
        warmup_epochs: epochs before the first clustering.
        swap: a :class:`SurroundingsSwap` of both views, or None.
        amp_dtype: torch.bfloat16 or torch.float16 for autocast, None for none. float16 scales
            the loss.
        progress: show bars.
        **kwargs: as of PML's BaseTrainer (loss_weights, iterations_per_epoch, lr_schedulers,
            gradient_clippers, freeze_these, dataloader_num_workers, end_of_epoch_hook, ...).

    Raises:
        ValueError: for an argument that does not fit, before anything is computed.
        FloatingPointError: in training, if the loss is NaN or infinite.
    """

    def __init__(
        self,
        models: nn.Module | dict[str, nn.Module],
        optimizers: torch.optim.Optimizer | dict[str, torch.optim.Optimizer],
        batch_size: int,
        loss_funcs: dict[str, nn.Module],
        dataset: Dataset[Any],
        *,
        transform: Callable[[Any], tuple[Tensor, Tensor, Tensor]],
        eval_transform: Callable[[Any], Tensor],
        labeler: PseudoLabeler,
        mining_funcs: dict[str, nn.Module] | None = None,
        images_per_cluster: int = 4,
        recluster_every: int = 1,
        warmup_epochs: int = 0,
        swap: SurroundingsSwap | None = None,
        amp_dtype: torch.dtype | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(models, nn.Module):
            models = {name: models.get_submodule(name) for name in ("trunk", "embedder")}
        if isinstance(optimizers, torch.optim.Optimizer):
            optimizers = {"trunk_optimizer": optimizers}
        count = len(dataset)  # type: ignore[arg-type]
        mining_funcs = dict(mining_funcs or {})
        weights = dict(kwargs.pop("loss_weights", None) or {})
        check_arguments(
            count=count,
            batch_size=batch_size,
            images_per_cluster=images_per_cluster,
            recluster_every=recluster_every,
            warmup_epochs=warmup_epochs,
            amp_dtype=amp_dtype,
            labeler=labeler,
            miners=mining_funcs,
            weights=weights,
            losses=loss_funcs,
        )
        self.transform, self.eval_transform, self.labeler = transform, eval_transform, labeler
        self.images_per_cluster, self.recluster_every = images_per_cluster, recluster_every
        self.warmup_epochs, self.swap = warmup_epochs, swap
        self.amp_dtype, self.progress = amp_dtype, progress
        self.labels = torch.arange(count)
        self.centroids: Tensor | None = None
        self.epoch = 0
        kwargs.setdefault("data_device", next(models["trunk"].parameters()).device)
        kwargs.setdefault("iterations_per_epoch", max(1, count // batch_size))
        kwargs.setdefault("dataloader_num_workers", 0)
        super().__init__(
            models,
            optimizers,
            batch_size,
            dict(loss_funcs),
            dataset,
            mining_funcs=mining_funcs,
            loss_weights={name: weights.get(name, 1.0) for name in loss_funcs},
            **kwargs,
        )
        self.scaler = torch.amp.GradScaler(
            torch.device(self.data_device).type, enabled=amp_dtype is torch.float16
        )

    def modify_schema(self) -> None:
        """Any names of losses; PML's checker would also pass names that only begin right."""
        self.schema["loss_funcs"].keys = [name for name in self.loss_names if name != "total_loss"]
        self.schema["mining_funcs"].keys = ["tuple_miner", "attention_miner"]
        self.schema["optimizers"].important = []

    def train(self, start_epoch: int = 1, num_epochs: int = 1) -> None:
        """Train the epochs from ``start_epoch`` to ``num_epochs``, both included.

        A hook at the end of an epoch that returns False ends the training.
        """
        for epoch in range(start_epoch, num_epochs + 1):
            self.epoch = epoch
            since = self.epoch - self.warmup_epochs - 1
            if since >= 0 and (since % self.recluster_every == 0 or self.centroids is None):
                self.relabel()
            self.initialize_dataloader()
            self.set_to_train()
            with tqdm(
                total=self.iterations_per_epoch * self.batch_size,
                desc=f"epoch {self.epoch}/{num_epochs}",
                unit="img",
                disable=not self.progress,
            ) as bar:
                for iteration in range(self.iterations_per_epoch):
                    self.iteration = iteration
                    self.forward_and_backward()
                    self.end_of_iteration_hook(self)
                    self.step_lr_schedulers(end_of_epoch=False)
                    bar.update(self.batch_size)
                    bar.set_postfix_str(f"loss {float(self.losses['total_loss']):.3f}")
            self.step_lr_schedulers(end_of_epoch=True)
            self.zero_losses()
            if self.end_of_epoch_hook(self) is False:
                break

    @torch.no_grad()
    def relabel(self) -> None:
        """Embed the whole data set, cluster it, and hand the centres to losses and miners.

        Raises:
            ValueError: if the clusters cannot fill a batch, or what the labeler raises.
        """
        model = nn.Sequential(self.models["trunk"], self.models["embedder"])
        embeddings, _ = embed(
            model,
            OneView(self.dataset, self.eval_transform),
            batch_size=max(64, self.batch_size),
            num_workers=self.dataloader_num_workers,
            progress=self.progress,
        )
        found = self.labeler(embeddings, self.centroids)
        self.set_pseudo_labels(found.labels, found.centroids)
        _LOGGER.info(
            "epoch %d: %d clusters, %d pictures are noise",
            self.epoch,
            len(found.centroids),
            int((found.labels < 0).sum()),
        )

    def set_pseudo_labels(self, labels: Tensor, centroids: Tensor | None) -> None:
        """Set the pseudo-labels (N,), -1 for noise, and the centres (K, D) that they index.

        Raises:
            ValueError: if there are fewer clusters than a batch needs.
        """
        there = int(labels[labels >= 0].unique().numel())
        check_clusters(there, self.batch_size, self.images_per_cluster)
        self.labels, self.centroids = labels.cpu().long(), centroids
        for module in (*self.loss_funcs.values(), *self.mining_funcs.values()):
            if isinstance(module, Centroids):
                module.set_centroids(centroids)

    def initialize_dataloader(self) -> None:
        """A new sampler and loader: a loader already running would hand out old labels."""
        size = self.iterations_per_epoch * self.batch_size
        order: Any = RandomSampler(self.labels, num_samples=size)  # type: ignore[arg-type]
        if self.centroids is not None:
            chosen = torch.where(self.labels >= 0)[0]
            sampler = MPerClassSampler(
                self.labels[chosen], self.images_per_cluster, self.batch_size, size
            )
            order = chosen[list(sampler)].tolist()
        self.dataloader = DataLoader(
            TwoViews(self.dataset, self.transform),
            self.batch_size,
            sampler=order,
            num_workers=self.dataloader_num_workers,
            collate_fn=self.collate_fn,
            pin_memory=torch.device(self.data_device).type == "cuda",
        )
        self.dataloader_iter = iter(self.dataloader)

    def get_batch(self) -> Batch:
        *tensors, index = next(self.dataloader_iter)
        views, transformed, points = (t.to(self.data_device, non_blocking=True) for t in tensors)
        return Batch(views, transformed, points, self.labels[index].to(self.data_device))

    def calculate_loss(self, curr_batch: Batch) -> None:
        views, transformed, _, labels = curr_batch
        weights = None
        if self.swap is not None:
            grid = self.transform.grid  # type: ignore[attr-defined]
            views, transformed, weights = swap_surroundings(
                self.swap, self.models["trunk"], curr_batch, grid
            )
        images = torch.cat([views, transformed])
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            trunk_output = self.models["trunk"](images)
            embeddings = self.models["embedder"](trunk_output)
            pairs = self.maybe_mine_embeddings(embeddings, torch.cat([labels, labels]))
            miner, warming_up = self.mining_funcs.get("attention_miner"), self.centroids is None
            step = Step(trunk_output, embeddings, curr_batch, weights, pairs, miner, warming_up)
            for name, loss_func in self.loss_funcs.items():
                if self.loss_weights[name] != 0:
                    self.losses[name] = loss_of(loss_func, step)

    def backward(self) -> None:
        total = self.losses["total_loss"]
        self.scaler.scale(total).backward()
        for name, value in self.losses.items():  # the graph has done its work
            self.losses[name] = value.detach() if isinstance(value, Tensor) else value
        if not torch.isfinite(total):
            parts = ", ".join(f"{k} {float(v):.4g}" for k, v in self.losses.items())
            raise FloatingPointError(
                f"loss is not finite in epoch {self.epoch}, iteration {self.iteration} ({parts}): "
                "lower the learning rate or resume from the last checkpoint"
            )

    def clip_gradients(self) -> None:
        if self.gradient_clippers:
            for optimizer in self.optimizers.values():
                self.scaler.unscale_(optimizer)
        super().clip_gradients()

    def step_optimizers(self) -> None:
        for name, optimizer in self.optimizers.items():
            if name.removesuffix("_optimizer") not in self.freeze_these:
                self.scaler.step(optimizer)
        self.scaler.update()

    def save_checkpoint(
        self, folder: str | Path, keep: int = 2, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Write everything that :meth:`load_checkpoint` needs to go on as if never stopped.

        Args:
            folder: the file is ``epoch_NNNN.pt`` in it.
            keep: how many of the last checkpoints stay.
            extra: more to keep, of tensors, numbers, strings and containers.
        """
        return save_checkpoint(folder, self.epoch, trainer_state(self, extra), keep)

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Restore a checkpoint (a folder: its last one); train on from ``trainer.epoch + 1``.

        Returns:
            The ``extra`` that was saved.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is of another number of pictures.
        """
        return restore_trainer(self, load_checkpoint(path))
