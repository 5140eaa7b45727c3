"""One iteration of a trainer."""

import math
from typing import Any

import torch
from pytorch_metric_learning.trainers import BaseTrainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pml_tacl.clustering.centroids import Centroids
from pml_tacl.distributed.collectives import gather_batch
from pml_tacl.distributed.training import begin_together, sum_gradients
from pml_tacl.losses import AttentionConsistencyLoss
from pml_tacl.models.receptive_field import measure_grid
from pml_tacl.trainers._forward import forward_in_chunks, forward_of, in_precision
from pml_tacl.trainers._parts import within
from pml_tacl.trainers._steps import Step, loss_of
from pml_tacl.trainers._views import Batch, swap_background
from pml_tacl.utils.errors import DivergedError, InputError
from pml_tacl.utils.precision import wide_dtype

_LOOK_EVERY = 10  # iterations: reading a loss makes the CPU wait for a GPU


class TrainingStep(BaseTrainer):
    """Forward, losses, backward and step of an :class:`UnsupervisedTrainer`, from its settings."""

    centroids: Tensor | None
    centroid_momentum: float
    transform: Any

    def set_up_step(self, whole: nn.Module, compiled: bool, ema_decay: float | None) -> None:
        """What an iteration needs besides PML's own parts."""
        begin_together(self)
        device = torch.device(self.data_device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype is torch.float16)
        self.look_every = 1 if device.type == "cpu" else _LOOK_EVERY
        self.forward_features = forward_of(self.models)
        if compiled:
            self.forward_features = torch.compile(self.forward_features)
        self.whole = whole
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}  # by size of the views
        self.skipped: set[str] = set()  # optimizers whose last step GradScaler has left out
        self.average: AveragedModel | None = None
        if ema_decay is not None:
            averaged = get_ema_multi_avg_fn(ema_decay)
            self.average = AveragedModel(whole, multi_avg_fn=averaged, use_buffers=True)

    @property
    def ema_model(self) -> nn.Module:
        """The model with averaged weights: evaluate and export it like the other.

        An AttentionEmbedder if that is what is trained, else trunk and embedder as a Sequential.

        Raises:
            ValueError: without ``ema_decay``.
        """
        if self.average is None:
            raise InputError("ema_model needs averaged weights: give the trainer an ema_decay")
        averaged: nn.Module = self.average.module
        return averaged

    def hand_over_centroids(self, new: bool = True) -> None:
        """Give the centres to every loss and miner that holds some, also within others.

        The trainer is their one owner. What the losses hold is of unit norm and shared.

        Args:
            new: all get them; else those that have none, as after a checkpoint that knew no
                centres of theirs. The others have them to the last bit, which scaling would change.
        """
        ours, others = self._holders()
        if ours and (new or ours[0].centroids is None):
            ours[0].set_centroids(self.centroids)
        for holder in ours:
            if new or holder.centroids is None:
                holder.centroids = ours[0].centroids
        for other in others:
            other.set_centroids(self.centroids)

    def _move_centroids(self) -> None:
        """Let the centres follow the batch, if any loss or miner holds them."""
        ours, others = self._holders()
        if not ours or ours[0].centroids is None or self.centroid_momentum == 1:
            return
        ours[0].move_centroids(*self._embedded, self.centroid_momentum)
        self.centroids = ours[0].centroids  # where the next clustering begins
        for holder in ours:
            holder.centroids = self.centroids
        for other in others:
            other.set_centroids(self.centroids)

    def _holders(self) -> tuple[list[Centroids], list[Any]]:
        """Our losses and miners that hold centres, and what else takes some."""
        found = within({**self.loss_funcs, **self.mining_funcs}, "set_centroids")
        ours = [holder for holder in found if isinstance(holder, Centroids)]
        return ours, [holder for holder in found if not isinstance(holder, Centroids)]

    def calculate_loss(self, curr_batch: Batch) -> None:
        views, transformed, _, labels = curr_batch
        weights = None
        if self.swap is not None:
            grid = self._grid_of(views)
            settings = (grid, self.accumulation_steps, self.amp_dtype)
            views, transformed, weights = swap_background(
                self.swap, self.models["trunk"], curr_batch, *settings
            )
        images = torch.cat([views, transformed])
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        with in_precision(images.device, self.amp_dtype):
            features = forward_in_chunks(
                self.forward_features, images, self.accumulation_steps, list(self.models.values())
            )
        # Outside of autocast: PML's losses would round similarities to half precision, of which
        # they then take exponentials.
        embeddings = features.embeddings.to(wide_dtype(features.embeddings))
        embeddings = gather_batch(embeddings, 2)
        labels = gather_batch(labels)
        twice = torch.cat([labels, labels])
        pairs = self.maybe_mine_embeddings(embeddings, twice)
        miner, warming_up = self.mining_funcs.get("attention_miner"), self.centroids is None
        seen = (features, curr_batch, embeddings, labels)
        step = Step(*seen, weights, pairs, miner, warming_up)
        for name, loss_func in self.loss_funcs.items():
            if self.loss_weights[name] != 0:
                self.losses[name] = loss_of(loss_func, step)
        self._embedded = embeddings.detach(), twice

    def _grid_of(self, views: Tensor) -> tuple[int, int] | None:
        """Rows and columns of the maps that attention losses read; None if there are none of them.

        As the transform says; one of the user's own may not, and then the trunk does.
        """
        if not any(isinstance(loss, AttentionConsistencyLoss) for loss in self.loss_funcs.values()):
            return None
        grid: tuple[int, int] | None = getattr(self.transform, "grid", None)
        if grid is None:
            channels, *size = views.shape[1:]
            if (size[0], size[1]) not in self._grids:
                found = measure_grid(self.models["trunk"], (size[0], size[1]), channels)
                self._grids[size[0], size[1]] = found
            grid = self._grids[size[0], size[1]]
        return grid

    def backward(self) -> None:
        self.scaler.scale(self.losses["total_loss"]).backward()
        sum_gradients(self)
        for name, value in self.losses.items():  # the graph has done its work
            self.losses[name] = value.detach() if isinstance(value, Tensor) else value
        if self.look_every == 1:  # else a GPU would have to be waited for
            self.look_at_losses()

    def clip_gradients(self) -> None:
        if self.gradient_clippers:
            for optimizer in self.optimizers.values():
                self.scaler.unscale_(optimizer)
        super().clip_gradients()

    def step_optimizers(self) -> None:
        """Make a step; what follows the model stays where that was left out for an overflow."""
        due = {
            name: optimizer
            for name, optimizer in self.optimizers.items()
            if name.removesuffix("_optimizer") not in self.freeze_these
        }
        self.skipped = set()
        for name, optimizer in due.items():
            if self.scaler.is_enabled() and not self._steps(optimizer):
                self.skipped.add(name)
            elif not self.scaler.is_enabled():
                optimizer.step()
        self.scaler.update()
        if due and self.skipped == set(due):
            return
        self._move_centroids()
        if self.average is not None:
            self.average.update_parameters(self.whole)

    def _steps(self, optimizer: torch.optim.Optimizer) -> bool:
        """Make a scaled step; False if the scaler has left it out."""
        made: list[bool] = []
        noted = optimizer.register_step_post_hook(lambda *_: made.append(True))
        try:
            self.scaler.step(optimizer)
        finally:
            noted.remove()
        return bool(made)

    def step_lr_schedulers(self, end_of_epoch: bool = False) -> None:
        """As in PML, but a schedule by iteration waits for an optimizer whose step was left out."""
        waiting = {id(self.optimizers[name]) for name in self.skipped}
        if end_of_epoch or not waiting:
            super().step_lr_schedulers(end_of_epoch)
            return
        suffix = self.allowed_lr_scheduler_key_suffixes["iteration"]
        for name, schedule in self.lr_schedulers.items():
            if name.endswith(suffix) and id(getattr(schedule, "optimizer", None)) not in waiting:
                schedule.step()

    def look_at_losses(self) -> str:
        """The losses for the progress bar; FloatingPointError if they are not finite."""
        device = torch.device(self.data_device)
        values = [
            torch.as_tensor(v, dtype=torch.float32, device=device) for v in self.losses.values()
        ]
        # Together, so that a GPU is waited for once.
        shown = dict(zip(self.losses, torch.stack(values).tolist(), strict=True))
        if not math.isfinite(shown["total_loss"]):
            parts = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            raise DivergedError(
                f"loss is not finite in epoch {self.epoch}, iteration {self.iteration} ({parts}): "
                "lower the learning rate or resume from the last checkpoint"
            )
        return ", ".join(f"{name.removesuffix('_loss')} {v:.3f}" for name, v in shown.items())
