"""Export the model of a run to ONNX, for any batch size."""

import logging
import warnings
from pathlib import Path
from typing import Any, TextIO

import torch

from pml_tacl.cli.models import Loaded, given_run
from pml_tacl.utils.errors import InputError, MissingPackageError
from pml_tacl.utils.files import write_json
from pml_tacl.utils.runs import MARK, STOPPED

OPSET = 20


# Files of a run that the description of the preprocessing must not overwrite.
_OF_RUN = (MARK, "metrics.json", "files.json", STOPPED)


def run(args: Any, results: TextIO) -> dict[str, Any]:
    """Write the model and its preprocessing; see `pml_tacl.cli.main`."""
    described = args.onnx.with_suffix(".json")
    if described.name in _OF_RUN and (described.parent / MARK).exists():
        raise InputError(
            f"--onnx {args.onnx} would overwrite {described} of the run: give another name"
        )
    args.device = torch.device("cpu")
    if args.run.is_dir():
        _check_packages()  # fail before the work, not after it
    loaded = given_run(args)
    export_onnx(loaded, args.onnx)
    channels = int(loaded.model.data_config["input_size"][0])
    height, width = loaded.image_size
    print(
        f"{args.onnx}: images (n, {channels}, {height}, {width}) -> embeddings; the preprocessing "
        f"is described in {described}"
    )
    return {
        "onnx": str(args.onnx),
        "preprocessing": str(described),
        "input_size": [channels, height, width],
    }


def export_onnx(loaded: Loaded, path: str | Path) -> None:
    """Write a model as ONNX: ``images`` (n, C, H, W) float32 -> ``embeddings`` (n, D).

    A JSON file with the same stem describes the preprocessing: size, mean, std and so on.

    Args:
        loaded: model from :func:`pml_tacl.cli.models.load_model`, on the CPU.
        path: path of the file; its folder is created if needed.

    Raises:
        MissingPackageError: if onnx or onnxscript is not installed.
    """
    _check_packages()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = loaded.model.data_config
    # Not a batch size of 1, which the exporter would treat as a constant.
    images = torch.zeros(2, int(config["input_size"][0]), *loaded.image_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # from the exporter's internals
        torch.onnx.export(
            loaded.model.to(memory_format=torch.contiguous_format).eval(),
            (images,),
            path,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
            input_names=["images"],
            output_names=["embeddings"],
            verbose=False,
        )
    write_json(
        path.with_suffix(".json"),
        {"input_size": [int(config["input_size"][0]), *loaded.image_size]}
        | {
            name: config[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        },
    )


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "--onnx needs onnx and onnxscript: pip install onnx onnxscript"
        ) from error
