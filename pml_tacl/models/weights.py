"""Creating timm models and getting weights into them."""

import difflib
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import timm
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

Pretrained: TypeAlias = bool | str | PathLike[str]

_OURS = ("num_classes", "features_only", "pretrained_cfg", "pretrained_cfg_overlay")
_NETWORK_PACKAGES = {"huggingface_hub", "httpx", "requests", "urllib3", "urllib"}


def create_timm_model(name: str, pretrained: Pretrained, timm_kwargs: dict[str, Any]) -> nn.Module:
    """A timm model without classifier, with the weights that `pretrained` asks for.

    Args:
        name: a timm model name, with or without a weights tag (`resnet50.a1_in1k`).
        pretrained: False, True (through timm) or a path to a local state dict.
        timm_kwargs: further arguments of `timm.create_model`.

    Raises:
        ValueError: for an unknown name, or weights that do not fit the model.
        OSError: if the weights can not be read or downloaded.
        TypeError: for an argument that the model does not take.
    """
    for key in _OURS:
        if key in timm_kwargs:
            raise ValueError(f"{key}={timm_kwargs[key]!r} can not be set: the trunk has no head")
    architecture = name.split(".")[0]
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(
        architecture
    ):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"backbone={name!r} is no timm model: {hint}")
    if pretrained is False or pretrained is None:
        try:
            return cast(nn.Module, timm.create_model(name, num_classes=0, **timm_kwargs))
        except RuntimeError as error:  # such as a tag that timm does not know
            raise ValueError(f"backbone={name!r}: {_one_line(error, 200)}") from error
    if pretrained is True:
        return _create_downloaded(name, timm_kwargs)
    if not isinstance(pretrained, str | PathLike):
        raise TypeError(f"pretrained must be True, False or a path, got {pretrained!r}")
    return _create_from_file(name, Path(pretrained), timm_kwargs)


def _create_downloaded(name: str, timm_kwargs: dict[str, Any]) -> nn.Module:
    try:
        return cast(nn.Module, timm.create_model(name, True, num_classes=0, **timm_kwargs))
    except Exception as error:
        package = type(error).__module__.split(".")[0]
        no_weights = isinstance(error, RuntimeError) and "pretrained" in str(error)
        if not isinstance(error, OSError) and package not in _NETWORK_PACKAGES and not no_weights:
            raise
        raise OSError(
            f"pretrained=True: no weights for {name!r} ({_one_line(error, 120)}); without a "
            "network pass a local file, pretrained='weights.safetensors', or pretrained=False (in "
            "the examples: --weights FILE, or --weights none)"
        ) from error


def _create_from_file(name: str, path: Path, timm_kwargs: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"pretrained={str(path)!r}: no such file")
    try:
        state = dict(load_state_dict(str(path), weights_only=True))
    except Exception as error:
        raise OSError(
            f"pretrained={str(path)!r} is no readable state dict ({_one_line(error, 120)})"
        ) from error
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    classifiers = (cfg.classifier if cfg is not None else None) or ()
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        for key in [key for key in state if key.startswith(f"{classifier}.")]:
            del state[key]
    # Equal class counts make timm load strictly, after its own renaming and resizing.
    overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0, "custom_load": False}
    try:
        model = timm.create_model(
            name, True, pretrained_cfg_overlay=overlay, num_classes=0, **timm_kwargs
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"pretrained={str(path)!r} does not fit {name!r}: {_one_line(error, 400)}"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # it would travel with every copy of the model
    return cast(nn.Module, model)


def model_data_config(model: nn.Module, timm_kwargs: dict[str, Any], named: bool) -> dict[str, Any]:
    """timm's data config of a model, with the channels and the size that it was built for.

    Args:
        model: the model.
        timm_kwargs: of these `in_chans` and `img_size`.
        named: whether timm built it under a name; else its first convolution tells the channels.

    Returns:
        `input_size` (C, H, W), `interpolation`, `mean`, `std` (one each a channel), `crop_pct`,
        `crop_mode`.
    """
    config = dict(resolve_data_config({}, model=model))
    channels, height, width = config["input_size"]
    if not named:
        channels = _input_channels(model, channels)
    channels = timm_kwargs.get("in_chans") or channels
    size = timm_kwargs.get("img_size") or getattr(_patch_embed(model), "img_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    config["input_size"] = (channels, height, width)
    for key in ("mean", "std"):
        values = tuple(float(value) for value in config[key])
        if len(values) != channels:
            values = (sum(values) / len(values),) * channels
        config[key] = values
    return config


def _patch_embed(model: nn.Module) -> Any:
    return getattr(model, "patch_embed", None)


def _input_channels(model: nn.Module, usual: int) -> int:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    # Some stems fold 2 x 2, 4 x 4 or 8 x 8 pixels into channels before the first convolution.
    if first is None or first.in_channels in (4 * usual, 16 * usual, 64 * usual):
        return usual
    return first.in_channels


def _one_line(error: BaseException, limit: int) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def flat_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict as safetensors takes it: contiguous tensors that share no memory."""
    return {key: value.detach().clone().contiguous() for key, value in state.items()}
