"""The model that a command is asked to use: of a run, or of timm."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pml_tacl.models import AttentionEmbedder
from pml_tacl.utils.errors import InputError


class Loaded(NamedTuple):
    """A model to embed with, the (height, width) of its images, and whether a run fitted it."""

    model: AttentionEmbedder
    image_size: tuple[int, int]
    of_run: bool

    @property
    def transform(self) -> Any:
        """From a PIL image to what the model takes."""
        return self.model.transform(image_size=self.image_size)


def load_model(
    name: str | Path,
    weights: bool | str = True,
    image_size: int | None = None,
    device: torch.device | None = None,
) -> Loaded:
    """Load the model of a run, or build one of timm.

    Args:
        name: the folder of a run, a folder of `AttentionEmbedder.save_pretrained`, or a timm name.
        weights: as `pretrained` of :class:`AttentionEmbedder`; for a timm name alone.
        image_size: pixels of a side; None is that of the run, or the model's own.
        device: None is a GPU if there is one.

    Returns:
        The model, on the device. The projection of a timm model is not fitted.

    Raises:
        InputError: for a folder that holds no model, or an unknown name.
        OSError: if the weights cannot be had.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(name)
    of_run = folder.is_dir()
    if of_run:
        model, kept = _of_folder(folder)
    else:
        model, kept = AttentionEmbedder(str(name), weights).eval(), None
    height, width = kept or model.data_config["input_size"][1:]
    size = (int(height), int(width)) if image_size is None else (image_size, image_size)
    return Loaded(model.to(device, memory_format=torch.channels_last), size, of_run)  # type: ignore


def _of_folder(folder: Path) -> tuple[AttentionEmbedder, Any]:
    for home in (folder / "model", folder):
        if (home / "model.safetensors").is_file():
            model = AttentionEmbedder.from_pretrained(home)
            break
    else:
        raise InputError(f"{folder} holds no model: give the folder of a run, or a timm name")
    try:
        size = json.loads((folder / "run.json").read_text("utf-8")).get("image_size")
    except (OSError, ValueError, AttributeError):
        size = None
    return model, size if isinstance(size, list) and len(size) == 2 else None
