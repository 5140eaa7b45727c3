"""Loading of the models, indices and images that a command needs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pml_tacl.cli import flags
from pml_tacl.cli.building import sized_model
from pml_tacl.cli.unfinished import index_stopped
from pml_tacl.datasets import ImageFiles
from pml_tacl.models import AttentionEmbedder
from pml_tacl.search import ImageIndex
from pml_tacl.utils.device import device_or_default
from pml_tacl.utils.errors import InputError


class Loaded(NamedTuple):
    """A model, the (height, width) of its images in pixels, and whether it comes from a run."""

    model: AttentionEmbedder
    image_size: tuple[int, int]
    of_run: bool

    @property
    def transform(self) -> Any:
        """Transform from a PIL image to an input of the model."""
        return self.model.transform(image_size=self.image_size)


def load_model(
    name: str | Path,
    weights: bool | str = True,
    image_size: int | None = None,
    device: torch.device | None = None,
) -> Loaded:
    """Load the model of a run, or build a timm model.

    Args:
        name: folder of a run, folder of `AttentionEmbedder.save_pretrained`, or timm name.
        weights: `pretrained` of :class:`AttentionEmbedder`; only for timm names.
        image_size: side in pixels; None for the size of the run, or the model's own.
        device: device of the model; None for a GPU if there is one.

    Returns:
        The model on the device. The projection of a timm model is not fitted.

    Raises:
        InputError: for a folder without a model, or an unknown name.
        OSError: if the weights cannot be loaded.
    """
    device = device_or_default(device)
    folder = Path(name)
    of_run = folder.is_dir()
    if of_run:
        model, kept = _of_folder(folder)
    else:
        model, kept = sized_model(str(name), weights, image_size).eval(), None
    height, width = kept or model.data_config["input_size"][1:]
    size = (int(height), int(width)) if image_size is None else (image_size, image_size)
    return Loaded(model.to(device, memory_format=torch.channels_last), size, of_run)  # type: ignore


def given_run(args: Any) -> Loaded:
    """Load the model of the run ``args.run``, even if its training was stopped.

    Raises:
        InputError: if ``args.run`` is not a folder, or contains no model.
    """
    if not args.run.is_dir():
        raise InputError(f"{args.run} is not a folder: give the folder of a run")
    index_stopped(args.run, **_settings(args))
    return load_model(args.run, device=getattr(args, "device", None))


def given_index(args: Any, folder: Path | None = None) -> ImageIndex:
    """Load the index of a run, even if its training was stopped.

    Args:
        args: parsed arguments; ``args.images`` is the folder of the images if they have moved.
        folder: folder of the run; None for ``args.run``.

    Raises:
        InputError: if the folder of the images does not exist.
        FileNotFoundError: if the run contains no index.
    """
    folder = args.run if folder is None else folder
    moved = getattr(args, "images", None)
    index_stopped(folder, images=moved, **_settings(args))
    if (folder / "run.json").is_file() and not (folder / "index.faiss").exists():
        again = flags.command_line("train", "--resume", "--run", folder)
        if (folder / "metrics.json").exists():
            raise InputError(
                f"{folder} contains no index: the command was stopped before it was written; "
                f"{again} writes it (for a run of index, give index --overwrite again)"
            )
        raise InputError(
            f"{folder} contains no index: its training was stopped before the first checkpoint; "
            f"{again} starts again"
        )
    index = ImageIndex.load(folder)
    index.root = moved.absolute() if moved else index.root
    if not index.root.is_dir():
        raise InputError(f"the indexed images are not in {index.root}: give --images FOLDER")
    return index


def given_folder(args: Any, folder: Path) -> tuple[Loaded, ImageFiles]:
    """Load the model of --model, and the images of a folder that --exclude and --files select.

    Raises:
        InputError: if the model does not exist, or the folder contains no readable image.
    """
    if Path(args.model).is_dir():
        index_stopped(args.model, **_settings(args))
    loaded = load_model(args.model, args.weights, args.image_size, args.device)
    progress = flags.bars(args)
    images = ImageFiles(folder, transform=loaded.transform, progress=progress, **flags.choice(args))
    return loaded, images


def _settings(args: Any) -> dict[str, Any]:
    return {
        "device": getattr(args, "device", None),
        "num_workers": getattr(args, "workers", 0),
        "progress": flags.bars(args),
    }


def _of_folder(folder: Path) -> tuple[AttentionEmbedder, Any]:
    for home in (folder / "model", folder):
        if (home / "model.safetensors").is_file():
            model = AttentionEmbedder.from_pretrained(home)
            break
    else:
        raise InputError(f"{folder} contains no model: give the folder of a run, or a timm name")
    try:
        size = json.loads((folder / "run.json").read_text("utf-8")).get("image_size")
    except (OSError, ValueError, AttributeError):
        size = None
    return model, size if isinstance(size, list) and len(size) == 2 else None
