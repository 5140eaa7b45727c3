"""Indexing of a stopped training with the model of its last checkpoint."""

import sys
from pathlib import Path

import torch

from pml_tacl.cli import flags
from pml_tacl.cli.building import training_model
from pml_tacl.datasets import ImageFiles
from pml_tacl.evaluation import embed
from pml_tacl.search import ImageIndex
from pml_tacl.trainers.checkpoint import checkpoints, load_checkpoint
from pml_tacl.trainers.fitting import fit_to
from pml_tacl.utils.device import device_or_default
from pml_tacl.utils.files import write_json
from pml_tacl.utils.runs import STOPPED, read_config, remove_index, stopped_at


def index_stopped(
    run: str | Path,
    *,
    images: str | Path | None = None,
    device: torch.device | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> bool:
    """Write model and index of a stopped training from its last checkpoint.

    Do nothing for a completed run, for other folders, or if the last checkpoint is indexed
    already. For a stopped training, print a note to standard error.

    Args:
        run: folder of the run.
        images: folder of the images, if it has moved.
        device: device of the model; None for a GPU if there is one.
        num_workers: processes that read images.
        progress: show progress bars.

    Returns:
        Whether an index was written.
    """
    run = Path(run)
    saved = checkpoints(run / "checkpoints")
    if not saved or (run / "metrics.json").exists() or not (run / "run.json").is_file():
        return False
    config = read_config(run)
    if not {"images", "backbone", "embedding_dim", "image_size"} <= config.keys():
        return False
    place = stopped_at(run)
    known = place == saved[-1].name and (run / "index.faiss").is_file()
    doing = "searching" if known else "indexing its images"
    print(
        f"the training of {run} was not completed: {doing} with the model of {saved[-1].name}; "
        f"{flags.command_line('train', '--resume', '--run', run)} resumes it",
        file=sys.stderr,
    )
    if known:
        return False
    state = load_checkpoint(run / "checkpoints")
    model = training_model(config, False)
    for name in ("trunk", "embedder"):
        model.get_submodule(name).load_state_dict(state["parts"]["models"][name])
    model.from_scratch = False
    model.to(device_or_default(device), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    dataset = ImageFiles(
        images or config["images"],
        transform=model.transform(image_size=config["image_size"]),
        exclude=config.get("exclude") or (),
        files=config.get("files"),
        progress=progress,
    )
    fit_to(model, dataset, num_workers, progress=progress)
    found, _ = embed(model, dataset, num_workers=num_workers, progress=progress)
    remove_index(run)
    model.save_pretrained(run / "model")
    ImageIndex.of(dataset, found).save(run)
    write_json(run / STOPPED, {"checkpoint": saved[-1].name})
    return True
