"""The trunk: a timm model or any other module, from images to feature maps in one pass."""

from typing import Any, NamedTuple, cast

import timm
import torch
from timm.layers import ClNormMlpClassifierHead, NormMlpClassifierHead
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from pml_tacl.models.weights import Pretrained, create_timm_model, model_data_config
from pml_tacl.utils.errors import InputError, InputTypeError
from pml_tacl.utils.modes import evaluating, for_functional_call

_USEFUL_STRIDE = 16  # a stride of 32 gives 7 x 7 cells at 224 px: too coarse to locate parts
_SIZES = {"in_chans", "img_size"}


class TrunkOutput(NamedTuple):
    """Output of `Trunk` and input of `Embedder`.

    Attributes:
        features: (N, C, H, W) maps of the last stage.
        feature_maps: (N, C', H', W') maps of the stage at `feature_index`, used for attention.
        pooled: (N, F), the embedding of the backbone, as `timm.create_model(name, num_classes=0)`
            returns it; None if the trunk was built without it.
    """

    features: Tensor
    feature_maps: Tensor
    pooled: Tensor | None = None


class Trunk(nn.Module):
    """Backbone that maps images to feature maps (N, C, H, W) in one forward pass.

    CNNs, ViTs (without class, register and other prefix tokens), hybrids and models that work
    in (N, H, W, C) all give the same shapes. The classifier head of a timm model is removed, so
    that every parameter gets a gradient. The head of a given timm module is removed in place. If
    the head starts with a LayerNorm after pooling (ConvNeXt, MaxViT), `head_norm` is that norm, for
    the `Embedder`; otherwise it is None.

    Args:
        backbone: a timm model name; a timm module; or any module that maps (N, C, H, W) images to
            (N, C, H, W) maps, or to a list of such maps, finest first.
        pretrained: False, True (through timm, which may download) or the path of a local
            `.safetensors`, `.pth` or `.bin` state dict. Only with a model name.
        feature_index: the stage (CNN) or block (ViT) whose maps are used for attention; negative
            counts from the end. None: the last one with stride 16 or finer, for a plain ViT its
            last block.
        freeze_batchnorm: keep running statistics and affine parameters of BatchNorm fixed, also
            in training mode.
        stop_at_maps: end at the maps used for attention, which are then also the features. Later
            stages are removed from a timm model.
        own_pooling: also return `pooled`, computed by timm's pooling (average, class token,
            attention pool) and its norms. For other modules it is the mean of the last maps. It
            is None for timm encoders without a pooling head; an `Embedder` then takes the mean of
            the last maps.
        **timm_kwargs: passed to `timm.create_model`: `in_chans`, `img_size`, `dynamic_img_size`,
            `output_stride`, `drop_path_rate` and so on. With a module, only `in_chans` and
            `img_size` are allowed; give them if they cannot be read from it.

    Raises:
        ValueError: for an unknown name (the message lists similar names), an index that the model
            does not have, or an argument that a module does not accept.
        OSError: if the weights cannot be read or downloaded.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        pretrained: Pretrained = False,
        *,
        feature_index: int | None = None,
        freeze_batchnorm: bool = False,
        stop_at_maps: bool = False,
        own_pooling: bool = False,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            self.model = create_timm_model(backbone, pretrained, timm_kwargs)
        elif isinstance(backbone, nn.Module):
            others = ["pretrained"] if pretrained is not False else [*timm_kwargs]
            if others := [name for name in others if name not in _SIZES]:
                raise InputError(f"{others[0]} needs a timm model name: a module is used as it is")
            self.model = backbone
        else:
            raise InputTypeError(
                f"backbone must be a timm model name or a module, got {backbone!r}"
            )
        self.freeze_batchnorm, self.stop_at_maps = freeze_batchnorm, stop_at_maps
        self.data_config = model_data_config(self.model, timm_kwargs, isinstance(backbone, str))
        reductions = _reductions(self.model)
        self.is_timm = bool(reductions)
        if isinstance(backbone, str) and not self.is_timm:
            raise InputError(
                f"timm {timm.__version__} cannot return feature maps of {backbone!r}: upgrade "
                "timm, or pass timm.create_model(..., features_only=True)"
            )
        # Blocks of isotropic models return raw residual streams, which need the last norm.
        self._isotropic = len(set(reductions)) == 1
        self.feature_index = _resolve_index(feature_index, reductions)
        self.own_pooling = own_pooling
        if own_pooling:
            if self.is_timm and not isinstance(backbone, str):
                cast(Any, self.model).reset_classifier(0)
        else:
            _normalise_before_pooling(self.model)
        stages = {self.feature_index or 0, *([] if stop_at_maps else [len(reductions) - 1])}
        self._indices = sorted(stages) if self.is_timm else []
        output, unused = self._probe()
        pooled = output.features if output.pooled is None else output.pooled
        self.num_features = pooled.shape[1]
        self.map_channels = output.feature_maps.shape[1]
        self.head_norm = None if own_pooling else _head_norm(self.model, self.num_features)
        if self.is_timm:
            _remove_unused(self.model, unused)
        if freeze_batchnorm:
            self._freeze_batchnorm()

    def forward(self, images: Tensor) -> TrunkOutput:
        """Run the backbone once.

        Args:
            images: (N, C, H, W), normalised as `data_config` says.

        Raises:
            ValueError: if the images have another shape, or the model does not accept images of
                this size.
        """
        if images.ndim != 4:
            raise InputError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}")
        if not self.is_timm:
            return self._select(self.model(images))
        channels = self.data_config["input_size"][0]
        if images.shape[1] != channels:
            raise InputError(
                f"number of channels of images must be {channels} for this backbone, got "
                f"{images.shape[1]}: "
                f"convert them, or build the model with in_chans={images.shape[1]}"
            )
        try:
            found = cast(Any, self.model).forward_intermediates(
                images,
                indices=self._indices,
                norm=self._isotropic,
                output_fmt="NCHW",
                stop_early=self.stop_at_maps,
                intermediates_only=self.stop_at_maps,
            )
        except (AssertionError, IndexError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not self._wrong_size(images):
                raise
            raise InputError(
                f"the backbone does not accept images of {tuple(images.shape[2:])} px ({error}): "
                "resize them, or pass img_size= or dynamic_img_size=True if the timm model "
                "supports it"
            ) from error
        if self.stop_at_maps:
            return TrunkOutput(found[0], found[0])
        final, maps = found
        pooled = self._pool(final) if self.own_pooling else None
        features = self._as_maps(final, maps[-1])
        if self.own_pooling and self._isotropic:
            # These models normalise after pooling; without the norm, cells cannot be compared.
            norm = _norm_after_pooling(self.model)
            if norm is not None:
                maps = [norm(m.movedim(1, -1)).movedim(-1, 1) for m in maps]
                features = norm(features.movedim(1, -1)).movedim(-1, 1)
        if self._isotropic and len(self._indices) == 1:
            return TrunkOutput(features, features, pooled)
        return TrunkOutput(features, maps[0], pooled)

    def train(self, mode: bool = True) -> "Trunk":
        """Set the training mode; with `freeze_batchnorm`, keep BatchNorm in evaluation mode."""
        super().train(mode)
        if self.freeze_batchnorm:
            self._freeze_batchnorm()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing on or off: more compute, less memory.

        Raises:
            ValueError: if the backbone has no gradient checkpointing.
        """
        if not hasattr(self.model, "set_grad_checkpointing"):
            raise InputError(
                f"backbone {type(self.model).__name__} has no gradient checkpointing: use a timm "
                "model, or leave checkpointing off"
            )
        try:
            cast(Any, self.model).set_grad_checkpointing(enable)
        except AssertionError as error:
            raise InputError(
                f"backbone {type(self.model).__name__} has no gradient checkpointing ({error}): "
                "leave checkpointing off"
            ) from error

    def _wrong_size(self, images: Tensor) -> bool:
        fixed = getattr(self.model, "pretrained_cfg", {}).get("fixed_input_size", False)
        return bool(fixed) and tuple(images.shape[1:]) != tuple(self.data_config["input_size"])

    def _freeze_batchnorm(self) -> None:
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval().requires_grad_(False)

    def _select(self, output: Any) -> TrunkOutput:
        stages = list(output) if isinstance(output, list | tuple) else [output]
        for maps in stages:
            if not isinstance(maps, Tensor) or maps.ndim != 4:
                got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
                raise InputError(
                    f"backbone must return (N, C, H, W) maps or a list of them, got {got}"
                )
        index = -1 if self.feature_index is None else self.feature_index
        if not -len(stages) <= index < len(stages):
            raise InputError(
                f"feature_index={index} must be in {-len(stages)}..{len(stages) - 1}: the backbone "
                f"returns {len(stages)} map(s)"
            )
        last = stages[index if self.stop_at_maps else -1]
        return TrunkOutput(last, stages[index], last.mean((2, 3)) if self.own_pooling else None)

    def _pool(self, final: Any) -> Tensor | None:
        try:
            pooled = cast(Any, self.model).forward_head(final)
        except NotImplementedError:  # raised by timm encoders without a classifier
            return None
        # A model that was built with global_pool="" does not pool.
        return pooled if isinstance(pooled, Tensor) and pooled.ndim == 2 else None

    def _as_maps(self, final: Any, last: Tensor) -> Tensor:
        """Return timm's final features as maps (N, C, H, W).

        They may be (N, C, H, W), (N, H, W, C) or (N, L, C).
        """
        height, width = last.shape[-2:]
        if isinstance(final, Tensor) and final.ndim == 4:
            return final.permute(0, 3, 1, 2) if self._channels_last(final, last) else final
        if not isinstance(final, Tensor) or final.ndim != 3 or final.shape[1] < height * width:
            return last
        tokens = final[:, final.shape[1] - height * width :]
        return tokens.transpose(1, 2).reshape(final.shape[0], -1, height, width)

    def _channels_last(self, final: Tensor, last: Tensor) -> bool:
        here, there = final.shape[1:3] == last.shape[-2:], final.shape[2:] == last.shape[-2:]
        if here != there:
            return here
        return str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")

    @torch.inference_mode(False)  # else models built in inference mode would have no gradients
    def _probe(self) -> tuple[TrunkOutput, set[str]]:
        """Return the output shapes and the unused parameters, from one pass without data."""
        with evaluating(self):
            state = {
                name: torch.empty_like(value, device="meta")
                for name, value in [*self.named_parameters(), *self.named_buffers()]
            }
            weights = {name: state[name].requires_grad_() for name, _ in self.named_parameters()}
            first = next(self.parameters(), torch.empty(0))
            images = torch.empty(1, *self.data_config["input_size"], dtype=first.dtype)
            try:
                with torch.enable_grad():
                    model = for_functional_call(self)
                    output = functional_call(model, state, (images.to("meta"),))
                    pooled = output.features if output.pooled is None else output.pooled
                    total = pooled.sum() + output.feature_maps.sum()
                    used = _used_by(total, weights)
            except Exception:  # the meta device is not supported; a real pass reports real errors
                with torch.no_grad():
                    return self(images.zero_().to(first.device)), set()
            return output, {name.removeprefix("model.") for name in weights.keys() - used}


def _used_by(total: Tensor, weights: dict[str, Tensor]) -> set[str]:
    """Return the names of the weights that get gradients of a sum.

    They are the leaves of its graph; finding them is faster than computing gradients. A function
    written in Python may use weights that are not among its inputs, so gradients are computed if
    the graph contains one.
    """
    seen, left = set(), [total.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or isinstance(node, torch.autograd.function.BackwardCFunction):
            found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
            return {n for n, g in zip(weights, found, strict=True) if g is not None}
        seen.add(node)
        before = (function for function, _ in node.next_functions)
        left += [function for function in before if function is not None and function not in seen]
    leaves = {id(getattr(node, "variable", None)) for node in seen}
    return {name for name, weight in weights.items() if id(weight) in leaves}


def _reductions(model: nn.Module) -> list[int]:
    info = getattr(model, "feature_info", None)
    if info is None or not hasattr(model, "forward_intermediates"):
        return []
    return [int(stage["reduction"]) for stage in getattr(info, "info", info)]


def _resolve_index(feature_index: int | None, reductions: list[int]) -> int | None:
    if not reductions:
        return feature_index
    count = len(reductions)
    if feature_index is None:
        limit = max(_USEFUL_STRIDE, min(reductions))
        return max(i for i, reduction in enumerate(reductions) if reduction <= limit)
    if not isinstance(feature_index, int) or not -count <= feature_index < count:
        raise InputError(
            f"feature_index={feature_index!r} must be in {-count}..{count - 1}: "
            f"the stages of this backbone have strides {reductions}"
        )
    return feature_index % count


def _norm_after_pooling(model: nn.Module) -> nn.LayerNorm | None:
    """Return the norm that average-pooled ViTs apply after pooling; None for other models."""
    norm, after = getattr(model, "norm", None), getattr(model, "fc_norm", None)
    if isinstance(norm, nn.Identity) and isinstance(after, nn.LayerNorm):
        return after
    return None


def _normalise_before_pooling(model: nn.Module) -> None:
    """Normalise before pooling instead of after it, so that cells can be compared."""
    after = _norm_after_pooling(model)
    if after is not None:
        model.norm, model.fc_norm = after, model.norm


def _head_norm(model: nn.Module, num_features: int) -> nn.LayerNorm | None:
    head = getattr(model, "head", None)
    if not isinstance(head, NormMlpClassifierHead | ClNormMlpClassifierHead | nn.Sequential):
        return None
    norm = getattr(head, "norm", None)
    if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (num_features,):
        return None
    plain = nn.LayerNorm(num_features, norm.eps, norm.elementwise_affine)
    plain.load_state_dict(norm.state_dict())
    return plain


def _remove_unused(model: nn.Module, unused: set[str]) -> None:
    """Remove modules whose parameters are all unused (such as a head); freeze single parameters."""
    removed: list[str] = []
    for name, module in list(model.named_modules()):
        inside = [f"{name}.{key}" for key, _ in module.named_parameters()]
        if not name or not inside or name.startswith(tuple(f"{other}." for other in removed)):
            continue
        if unused.issuperset(inside) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
            removed.append(name)
    for name, parameter in model.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)
