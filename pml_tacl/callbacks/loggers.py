"""Loggers for scalars and images of a training: TensorBoard, Weights & Biases, or user-defined."""

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError, MissingPackageError
from pml_tacl.utils.images import to_rgb

Pixels = Any  # a matplotlib figure, a PIL image, or an array or tensor that visualize takes
Thumbnails = Sequence[Image.Image] | None


@runtime_checkable
class Logger(Protocol):
    """Interface of loggers. Any class with these methods works.

    ``step`` is the iteration for losses, and the epoch for everything else.
    """

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by name; the part of a name before a slash is its group."""

    def log_images(self, step: int, images: Mapping[str, Pixels]) -> None:
        """Write figures or images by name."""

    def log_embeddings(
        self, step: int, embeddings: Tensor, names: Sequence[str], thumbnails: Thumbnails = None
    ) -> None:
        """Write embeddings (N, D) with N names and, if given, N small images."""

    def close(self) -> None:
        """Write buffered data and close the logger."""


class TensorBoardLogger:
    """Logger for TensorBoard: scalars, images and the embedding projector.

    Args:
        folder: folder for the event files; ``tensorboard --logdir FOLDER`` shows them.
        side: width and height of a thumbnail in the projector, in pixels, at least 1.

    Raises:
        ImportError: if tensorboard is not installed.
        ValueError: for ``side`` out of range.
    """

    def __init__(self, folder: str | PathLike[str], *, side: int = 48) -> None:
        check_count("side", side, 1)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackageError(
                "TensorBoardLogger needs tensorboard: pip install tensorboard"
            ) from (error)
        self.side = side
        self._writer: Any = SummaryWriter(str(folder))

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def log_images(self, step: int, images: Mapping[str, Pixels]) -> None:
        for name, image in images.items():
            self._writer.add_image(name, np.array(as_image(image)), step, dataformats="HWC")

    def log_embeddings(
        self, step: int, embeddings: Tensor, names: Sequence[str], thumbnails: Thumbnails = None
    ) -> None:
        check_embeddings(embeddings, names, thumbnails)
        sprites = None
        if thumbnails is not None:
            size = (self.side, self.side)
            small = [np.array(as_image(image).resize(size)) for image in thumbnails]
            sprites = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255
        self._writer.add_embedding(
            embeddings.detach().float().cpu(),
            metadata=[" ".join(name.split()) for name in names],  # one line each, no tabs
            label_img=sprites,
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Logger for Weights & Biases: scalars, images and tables of embeddings.

    Args:
        run: an open run (from ``wandb.init()``); None opens a new run.
        **kwargs: arguments of ``wandb.init`` for a new run: project, name, config,
            mode="offline", ...

    Raises:
        ImportError: if wandb is not installed.
        ValueError: if both a run and arguments for a new run are given.
    """

    def __init__(self, run: Any = None, **kwargs: Any) -> None:
        try:
            wandb: Any = import_module("wandb")
        except ImportError as error:
            raise MissingPackageError("WandbLogger needs wandb: pip install wandb") from error
        if run is not None and kwargs:
            raise InputError(f"run is open already: leave out {', '.join(sorted(kwargs))}")
        self._wandb = wandb
        self._mine = run is None
        self._run: Any = self._wandb.init(**kwargs) if run is None else run
        self._steps: set[str] = set()

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, {name: float(value) for name, value in values.items()})

    def log_images(self, step: int, images: Mapping[str, Pixels]) -> None:
        self._log(step, {k: self._wandb.Image(as_image(v)) for k, v in images.items()})

    def log_embeddings(
        self, step: int, embeddings: Tensor, names: Sequence[str], thumbnails: Thumbnails = None
    ) -> None:
        check_embeddings(embeddings, names, thumbnails)
        columns = ["name", *(["image"] if thumbnails is not None else [])]
        table = self._wandb.Table(
            columns=[*columns, *(f"d{at}" for at in range(embeddings.shape[1]))]
        )
        for row, values in enumerate(embeddings.detach().float().cpu().tolist()):
            images = [] if thumbnails is None else [self._wandb.Image(thumbnails[row])]
            table.add_data(names[row], *images, *values)
        self._log(step, {"embeddings": table})

    def close(self) -> None:
        if self._mine:
            self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        # Steps are iterations or epochs, but W&B's own step must never decrease. So each group
        # has its own step, over which its names are plotted.
        by_group: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            by_group.setdefault(name.partition("/")[0], {})[name] = value
        for group, members in by_group.items():
            axis = f"step/{group}"
            for name in members.keys() - self._steps:
                self._run.define_metric(name, step_metric=axis)
                self._steps.add(name)
            self._run.log({**members, axis: step})


def as_image(image: Pixels) -> Image.Image:
    """Convert a matplotlib figure, PIL image, array or tensor to an RGB image.

    Raises:
        TypeError, ValueError: for other inputs, see :func:`pml_tacl.utils.images.to_rgb`.
    """
    if hasattr(image, "savefig"):
        content = io.BytesIO()
        image.savefig(content, format="png")
        image = Image.open(content)
    return to_rgb(image)


def check_embeddings(embeddings: Tensor, names: Sequence[str], thumbnails: Thumbnails) -> None:
    """Check that there are N names, and N thumbnails if any, for embeddings (N, D).

    Raises:
        ValueError: if a shape or number is wrong.
    """
    if embeddings.ndim != 2:
        raise InputError(f"embeddings must be (N, D), got {tuple(embeddings.shape)}")
    for name, values in (("names", names), ("thumbnails", thumbnails)):
        if values is not None and len(values) != len(embeddings):
            raise InputError(
                f"{name} must have as many entries as embeddings, {len(embeddings)}, "
                f"got {len(values)}"
            )
