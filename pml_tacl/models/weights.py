"""Create timm models and load weights into them."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from pml_tacl.utils.errors import InputError, InputTypeError

Pretrained: TypeAlias = bool | str | PathLike[str]

_OURS = ("num_classes", "features_only", "pretrained_cfg", "pretrained_cfg_overlay")
# Names of the weight files that timm looks for in a repository of the hub.
_HUB_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_SECONDS = 5.0  # to wait for the first response of the hub
# If a file contains two networks that were trained as a pair: names of the one to use.
_USED = ("ema", "teacher", "q", "online", "student", "base")
# Single tensors that are used only in training, not by the backbone.
_LOOSE = (
    "mask_token", "logit_scale", "logit_bias", "queue", "queue_ptr",
    "n_averaged", "num_updates", "initted", "step", "decay",  # counters of averaged weights
)  # fmt: skip
_NETWORK_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "requests", "urllib3", "urllib"}


def create_timm_model(name: str, pretrained: Pretrained, timm_kwargs: dict[str, Any]) -> nn.Module:
    """Return a timm model without classifier, with the weights selected by `pretrained`.

    Args:
        name: a timm model name, with or without a weights tag (`resnet50.a1_in1k`). A prefix
            `timm/` or `hf-hub:timm/`, as on the pages of the hub, does not change the model. For
            another repository of the hub give `hf-hub:OWNER/NAME`, for a folder
            `local-dir:FOLDER`.
        pretrained: False, True (through timm) or a path to a local state dict. It may contain the
            backbone under a prefix or in a dict (`module.`, `backbone.`, `teacher`), and heads.
        timm_kwargs: further arguments of `timm.create_model`.

    Raises:
        ValueError: for an unknown name, or weights that do not fit the model.
        OSError: if the weights cannot be read or downloaded.
        TypeError: for an argument that the model does not accept.
    """
    for key in _OURS:
        if key in timm_kwargs:
            raise InputError(f"{key}={timm_kwargs[key]!r} cannot be set: the trunk has no head")
    known = _known_name(name)
    if pretrained is False or pretrained is None:
        return _create(name, known, timm_kwargs)
    if pretrained is True:
        return _create_downloaded(name, known, timm_kwargs)
    if not isinstance(pretrained, str | PathLike):
        raise InputTypeError(f"pretrained must be True, False or a path, got {pretrained!r}")
    return _create_from_file(name, known, Path(pretrained), timm_kwargs)


def fixed_size(name: str) -> tuple[int, int] | None:
    """Return the only (height, width) that a timm model takes unless `img_size` is given.

    It is None for models that take images of several sizes, such as CNNs. No weights are read.

    Raises:
        ValueError: for an unknown name.
        OSError: if the config of a model of the hub cannot be read.
    """
    known = _known_name(name)
    if not known.startswith(("hf-hub:", "local-dir:")):
        try:
            cfg = timm.get_pretrained_cfg(known)
        except RuntimeError:  # unknown tag: building the model raises a clear error
            return None
        if cfg is not None and not cfg.fixed_input_size:
            return None
    with torch.device("meta"):
        patches = getattr(_create(name, known, {}), "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is None or not getattr(patches, "strict_img_size", True):
        return None
    return int(size[0]), int(size[1])


def _known_name(name: str) -> str:
    """Return the name for timm: without the hub prefix if timm knows the model itself."""
    source, colon, repository = name.partition(":")
    if colon and source.lower() in ("hf-hub", "hf_hub"):
        hub = repository
    elif name.startswith("timm/"):
        hub = name
    elif source == "local-dir":
        return name
    else:
        _check_name(name)
        return name
    plain = hub.removeprefix("timm/")
    with suppress(RuntimeError):  # this version of timm does not know the tag
        if plain != hub and timm.get_pretrained_cfg(plain) is not None:
            return plain
    return f"hf-hub:{hub}"


def _check_name(name: str) -> None:
    architecture = name.split(".")[0]
    if timm.is_model(architecture):
        return
    if any(sign in name for sign in "/\\:"):
        hint = f"a repository of the hub is 'hf-hub:{name}', a folder 'local-dir:{name}'"
    else:
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
    raise InputError(f"backbone={name!r} is not a timm model: {hint}")


def _create(name: str, known: str, timm_kwargs: dict[str, Any]) -> nn.Module:
    try:
        if known.startswith("hf-hub:"):
            _check_reachable(known, timm_kwargs)
        return cast(nn.Module, timm.create_model(known, num_classes=0, **timm_kwargs))
    except Exception as error:
        if isinstance(error, RuntimeError):  # for example an unknown tag
            raise InputError(f"backbone={name!r}: {_one_line(error, 200)}") from error
        if not known.startswith(("hf-hub:", "local-dir:")) or not _is_of_files(error):
            raise
        raise OSError(
            f"backbone={name!r}: no config of the model ({_one_line(error, 120)}); without a "
            "network connection, pass the name of a timm model"
        ) from error


def _create_downloaded(name: str, known: str, timm_kwargs: dict[str, Any]) -> nn.Module:
    try:
        _check_reachable(known, timm_kwargs)
        return cast(nn.Module, timm.create_model(known, True, num_classes=0, **timm_kwargs))
    except Exception as error:
        no_weights = isinstance(error, RuntimeError) and "pretrained" in str(error)
        if not _is_of_files(error) and not no_weights:
            raise
        if not known.startswith("hf-hub:"):
            with suppress(OSError):
                _create(name, known, timm_kwargs)  # raises if another argument is wrong, too
        raise OSError(
            f"pretrained=True: no weights for {name!r} ({_one_line(error, 120)}); without a "
            "network connection, pass a local file, pretrained='weights.safetensors', or "
            "pretrained=False"
        ) from error


def _is_of_files(error: Exception) -> bool:
    package = type(error).__module__.split(".")[0]
    return isinstance(error, OSError) or package in _NETWORK_PACKAGES


def _check_reachable(known: str, timm_kwargs: dict[str, Any]) -> None:
    """Check once that the hub can be reached if a file is not cached.

    timm itself would retry for most of a minute.

    Raises:
        OSError or a network error: if there is no response.
    """
    if known.startswith("local-dir:"):
        return
    if known.startswith("hf-hub:"):
        hub, names = known.removeprefix("hf-hub:"), ["config.json"]
    else:
        try:
            cfg = timm.get_pretrained_cfg(known)
        except RuntimeError:  # timm raises a clearer error later
            return
        hub = str(cfg.hf_hub_id or "") if cfg is not None else ""
        names = [str(cfg.hf_hub_filename)] if hub and cfg.hf_hub_filename else [*_HUB_FILES]
    if not hub:
        return
    repository, _, revision = hub.partition("@")
    where = {"revision": revision or None}
    folder = timm_kwargs.get("cache_dir")
    for file in names:
        if isinstance(try_to_load_from_cache(repository, file, cache_dir=folder, **where), str):
            return
    try:
        get_hf_file_metadata(hf_hub_url(repository, names[0], **where), timeout=_SECONDS)
    except Exception as error:
        if getattr(error, "response", None) is None:  # else the hub responded, and timm handles it
            raise


def _create_from_file(name: str, known: str, path: Path, timm_kwargs: dict[str, Any]) -> nn.Module:
    if path.is_dir():
        raise IsADirectoryError(f"pretrained={str(path)!r} is a folder: give the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"pretrained={str(path)!r}: no such file")
    if known.startswith("hf-hub:"):
        raise InputError(
            f"pretrained={str(path)!r} is a local file, but backbone={name!r} is read from the "
            "hub: pass the name of a timm model, or local-dir:FOLDER"
        )
    try:
        content = dict(load_state_dict(str(path), weights_only=True))
    except Exception as error:
        raise OSError(
            f"pretrained={str(path)!r} is not a readable state dict ({_one_line(error, 120)})"
        ) from error
    with torch.device("meta"):
        empty = _create(name, known, timm_kwargs)
    wrong = f"pretrained={str(path)!r} does not fit {name!r}: "
    state, filled = _weights_for(empty, content, wrong)
    # Equal class counts make timm load strictly, after its own renaming and resizing. Empty
    # sources keep it from loading other weights.
    nowhere = ("file", "url", "hf_hub_id", "hf_hub_filename")
    settings = {"num_classes": 0, "label_offset": 0, "custom_load": False, "source": ""}
    overlay = {**dict.fromkeys(nowhere), **settings, "state_dict": dict(state)}
    try:
        model = timm.create_model(
            known, True, pretrained_cfg_overlay=overlay, num_classes=0, **timm_kwargs
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
        text = _one_line(error, 400)
        if 2 * filled < len(empty.state_dict()):
            named = ", ".join([*state][:5]) + (", ..." if len(state) > 5 else "")
            text = (
                f"it contains {filled} of the {len(empty.state_dict())} tensors of the backbone; "
                f"its tensors are {named}"
            )
        elif "trunk" in content or any(key.startswith("trunk.model.") for key in content):
            text += "; AttentionEmbedder.from_pretrained(FOLDER) loads a saved model as it is"
        raise InputError(wrong + text) from error
    model.pretrained_cfg.pop("state_dict", None)  # else every copy of the model would contain it
    return cast(nn.Module, model)


def _weights_for(
    empty: nn.Module, content: dict[str, Any], wrong: str
) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a file that belong to a backbone, and the number that match by name.

    If most names of the backbone are found under one prefix (`module.`, `backbone.`, `teacher`,
    ...), remove the prefix and leave out tensors of other modules (heads, projections, queues).
    Otherwise return all tensors: timm can translate some other naming schemes.

    Args:
        empty: the backbone.
        content: content of the file: tensors and dicts of them.
        wrong: start of an error message.

    Raises:
        ValueError: if there are no tensors, or if several networks fit equally well.
    """
    wanted = empty.state_dict().keys()
    networks = dict(_networks("", content))
    if not networks:
        raise InputError(f"{wrong}it contains no weights")
    found = {
        (place, prefix): count
        for place, tensors in networks.items()
        for prefix, count in _prefixes(tensors, wanted).items()
    }
    most = max(found.values(), default=0)
    if 2 * most < len(wanted):
        return max(networks.values(), key=len), most
    best = sorted((at for at in found if found[at] == most), key=lambda at: _rank("".join(at)))
    names = ["".join(at) for at in best if _rank("".join(at)) == _rank("".join(best[0]))]
    if len(names) > 1:
        raise InputError(f"{wrong}it contains several networks, {' and '.join(names)}: keep one")
    place, prefix = best[0]
    modules = {name.partition(".")[0] for name in wanted}
    state = {}
    for key, value in networks[place].items():
        name = key.removeprefix(prefix)
        single = "." not in name and name not in _LOOSE
        if key.startswith(prefix) and (single or name.partition(".")[0] in modules):
            state[name] = value
    classifiers = getattr(empty, "pretrained_cfg", {}).get("classifier") or ()
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        for name in (f"{classifier}.weight", f"{classifier}.bias"):
            state.pop(name, None)
    return state, most


def _prefixes(tensors: dict[str, Tensor], wanted: Collection[str]) -> Counter[str]:
    """Count the names that are found under each prefix."""
    found: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            if (name := ".".join(parts[start:])) in wanted:
                found[key.removesuffix(name)] += 1
    return found


def _networks(place: str, content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the dicts of tensors at any depth, with their position as a prefix."""
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict):
            yield from _networks(f"{place}{key}.", value)


def _rank(place: str) -> int:
    """Return the rank of a copy of a network: the first index in _USED of a word in its name."""
    parts = place.replace("_", ".").split(".")
    return next((at for at, word in enumerate(_USED) if word in parts), len(_USED))


def model_data_config(model: nn.Module, timm_kwargs: dict[str, Any], named: bool) -> dict[str, Any]:
    """Return timm's data config of a model, with the channels and image size it was built for.

    Args:
        model: the model.
        timm_kwargs: arguments of which `in_chans` and `img_size` are read.
        named: whether timm built the model from a name; else the number of channels is read from
            its first convolution.

    Returns:
        `input_size` (C, H, W), `interpolation`, `mean`, `std` (one per channel), `crop_pct`,
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
    """Return a state dict for safetensors: contiguous tensors that share no memory."""
    return {key: value.detach().clone().contiguous() for key, value in state.items()}
