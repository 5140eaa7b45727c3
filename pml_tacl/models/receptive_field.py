"""Grid size and receptive-field centres of a backbone's feature maps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.modes import evaluating, for_functional_call

_STEPS = {torch.float64: 1e-6, torch.float32: 1e-3}  # of coordinates added to a grey image
_FARTHEST = 2.0  # cells; offsets of convolutions are smaller
_NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize"}
_NORMS |= {"local_response_norm"}
_ACTIVATIONS = {"dropout", "relu", "relu_", "relu6", "hardtanh", "gelu", "silu", "hardswish"}
_ACTIVATIONS |= {"mish", "elu", "selu", "celu", "leaky_relu", "prelu", "softplus", "tanh"}
_ACTIVATIONS |= {"sigmoid", "hardsigmoid"}


@torch.inference_mode()
def measure_grid(
    trunk: nn.Module, image_size: tuple[int, int], channels: int = 3, least: int = 1
) -> tuple[int, int]:
    """Return the number of rows and columns of the feature maps.

    Args:
        trunk: images (N, C, H, W) -> an output with `feature_maps` (N, C', h, w).
        image_size: (H, W) in pixels.
        channels: C.
        least: cells that a map must have.

    Raises:
        ValueError: if images of that size are too small.
    """
    images = next(trunk.parameters(), torch.empty(0)).new_zeros(1, channels, *image_size)
    with evaluating(trunk), _too_small_named(trunk, image_size):
        rows, columns = trunk(images).feature_maps.shape[-2:]
    _check_cells(rows, columns, least, image_size)
    return rows, columns


@torch.no_grad()
def measure_cell_offset(
    trunk: nn.Module,
    image_size: tuple[int, int],
    channels: int = 3,
    least: int = 1,
    *,
    through_weights: bool = False,
) -> tuple[float, float]:
    """Return the offset (x, y) of receptive-field centres from their cell centres, in cells.

    A convolution with kernel 3, stride 2 and padding 1 is centred half a pixel up and left of
    its output cell, and each stride doubles that. ResNet maps of stride 16 are offset by half a
    cell up and left (-0.47, -0.47). EfficientNets with TensorFlow's padding are offset down and
    right. ViT, Swin and ConvNeXt have an offset of zero.

    The offset depends on the architecture (kernels, strides, paddings) and the image size. It
    does not depend on the weights or on random numbers. It is measured by one forward pass in
    double precision, on an image whose values are its own coordinates. In this pass all weights
    are equal, normalisations and activations do nothing, and paddings extrapolate the image. The
    output then holds the receptive-field centre of each cell. If a network has several paths, the
    result is their mean. If the pass gives no valid result, the offset is measured by gradients,
    with weights drawn from a fixed seed. The definition is our own.

    Args:
        trunk: images (N, C, H, W) -> an output with `feature_maps` (N, C', h, w).
        image_size: (H, W) in pixels.
        channels: C.
        least: smallest number of cells that a map may have.
        through_weights: measure the offset with the current weights, as the centroid of the
            squared gradient of central cells with respect to noise images.

    Raises:
        ValueError: if images of that size are too small, or the offset cannot be measured.
    """
    with evaluating(trunk), _too_small_named(trunk, image_size):
        measure_grid(trunk, image_size, channels, least)
        if through_weights:
            return _by_gradients(trunk, image_size, channels, own_weights=True)
        for measure in (_by_coordinates, _by_gradients):
            x, y = measure(trunk, image_size, channels)
            if abs(x) <= _FARTHEST and abs(y) <= _FARTHEST:  # False for NaN
                return _rounded(x), _rounded(y)
    raise InputError(
        f"cell_offset cannot be measured for images of {image_size} px: give it yourself, "
        "(0.0, 0.0) for no offset"
    )


def _rounded(value: float) -> float:
    """Round to 6 digits: further digits depend on the machine."""
    return round(value, 6) + 0.0  # turns -0.0 into 0.0


def _by_coordinates(
    trunk: nn.Module, image_size: tuple[int, int], channels: int
) -> tuple[float, float]:
    """Return the mean offset of the cells, by passing coordinates through the network."""
    device, dtype = _measuring_on(trunk)
    height, width = image_size
    x = ((torch.arange(width, device=device, dtype=dtype) + 0.5) / width).expand(height, width)
    y = ((torch.arange(height, device=device, dtype=dtype) + 0.5) / height)[:, None]
    one, step = torch.ones_like(x), _STEPS[dtype]
    images = torch.stack([one, one * (1 + step), one + step * x, one + step * y])
    images = images[:, None].expand(-1, channels, -1, -1)

    def equal(value: Tensor) -> Tensor:
        weight = 1.0 if value.ndim < 2 else value.shape[0] / value.numel()
        return torch.full((), weight, dtype=dtype, device=device).expand(value.shape)

    with _StraightThrough():
        model = for_functional_call(trunk)
        maps = functional_call(model, _replaced(trunk, equal), (images,)).feature_maps
    # Use differences, which cancel constants that the network adds or multiplies.
    maps = maps.to(dtype).mean(1)
    seen = (maps[2:] - maps[0]) / (maps[1] - maps[0])
    rows, columns = seen.shape[-2:]
    return (
        float(seen[0].mean() * columns - columns / 2),
        float(seen[1].mean() * rows - rows / 2),
    )


@torch.inference_mode(False)
@torch.enable_grad()
def _by_gradients(
    trunk: nn.Module, image_size: tuple[int, int], channels: int, own_weights: bool = False
) -> tuple[float, float]:
    """Return the centroid of the squared gradient of central cells with respect to noise images.

    Opposite cells are averaged, so that effects of the image border cancel.
    """
    device, dtype = _measuring_on(trunk)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def drawn(value: Tensor) -> Tensor:
        if value.ndim < 2:
            return torch.ones(value.shape, device=device, dtype=dtype)
        spread: float = (value.shape[0] / value.numel()) ** 0.5
        return draw(*value.shape) * spread

    if own_weights:
        dtype = torch.float32  # for any precision, also for weights made in inference mode
        named = (*trunk.named_parameters(), *trunk.named_buffers())
        wide = {name: v.float() if v.is_floating_point() else v for name, v in named}
        state = {name: v.clone() if v.is_inference() else v for name, v in wide.items()}
    else:
        state = _replaced(trunk, drawn)
    images = draw(4, channels, *image_size).requires_grad_()
    maps = functional_call(for_functional_call(trunk), state, (images,)).feature_maps
    rows, columns = maps.shape[-2:]
    cells = set()
    for inward in range(2):
        row, column = max(0, (rows - 1) // 2 - inward), max(0, (columns - 1) // 2 - inward)
        cells |= {(row, column), (rows - 1 - row, columns - 1 - column)}
    found = []
    for row, column in sorted(cells) * 2:
        feature = (maps[:, :, row, column] * draw(maps.shape[1])).sum()
        (gradient,) = torch.autograd.grad(feature, images, retain_graph=True)
        weight = gradient.double().square().sum(dim=(0, 1))
        x = _centroid(weight.sum(0)) * columns - (column + 0.5)
        y = _centroid(weight.sum(1)) * rows - (row + 0.5)
        found.append(torch.stack([x, y]))
    x, y = torch.stack(found).mean(0).tolist()
    return x, y


def _measuring_on(trunk: nn.Module) -> tuple[torch.device, torch.dtype]:
    device = next(trunk.parameters(), torch.empty(0)).device
    if device.type == "meta":
        device = torch.device("cpu")
    return device, torch.float32 if device.type == "mps" else torch.float64


def _replaced(trunk: nn.Module, new: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the state with new parameters, unchanged buffers and initial running statistics."""
    device, dtype = _measuring_on(trunk)
    state = {name: new(value) for name, value in trunk.named_parameters()}
    for name, value in trunk.named_buffers():
        last = name.rpartition(".")[2]
        if last in ("running_mean", "running_var"):
            start = torch.tensor(float(last == "running_var"), dtype=dtype, device=device)
            state[name] = start.expand(value.shape)
        elif value.is_meta:
            state[name] = torch.zeros(value.shape, dtype=value.dtype, device=device)
        elif value.is_floating_point():
            state[name] = value.detach().to(dtype)
        else:
            state[name] = value.clone()  # a network may change it in place
    return state


class _StraightThrough(TorchFunctionMode):
    """Mode in which layers only average their window, so that coordinates pass through.

    Each layer computes the mean of its window over all channels and writes it to all output
    channels. Attention returns the value of its own position. Values pooled over a whole image
    carry no position, so they are taken from the first image, which is grey.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").removeprefix("_")
        found = NotImplemented
        if name in _ACTIVATIONS or name in _NORMS:
            found = args[0] if args else kwargs["input"]
            size = float(found.abs().mean()) if name in _NORMS else 0.0
            found = found / size if size else found  # keep the scale constant over layers
        elif name in _OWN:
            found = getattr(self, f"_{name}")(*args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        kernel, dilation = tuple(weight.shape[-2:]), _pair(dilation)
        reach = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        if isinstance(padding, str):
            pads = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
        else:
            pads = [(p, p) for p in _pair(padding)]
        window = input.new_full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        one = _extended(input.mean(-3, keepdim=True), pads)
        batch: Tensor = one.reshape(-1, *one.shape[-3:])
        seen: Tensor = torch.conv2d(batch, window, None, _pair(stride), 0, dilation)
        seen = seen.reshape(*one.shape[:-3], *seen.shape[-3:])
        shape = (*seen.shape[:-3], weight.shape[0], *seen.shape[-2:])
        return seen.expand(shape).contiguous()  # later layers may write to it in place

    def _max_pool2d(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices or _pair(dilation) != (1, 1):
            return NotImplemented
        return self._avg_pool2d(input, kernel_size, stride, padding, ceil_mode)

    def _avg_pool2d(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Tensor:
        kernel = _pair(kernel_size)
        steps, around = _pair(stride or kernel), _pair(padding)
        pads = []
        for size, k, step, pad in zip(input.shape[-2:], kernel, steps, around, strict=True):
            over = (size + 2 * pad - k) % step
            starts_within = size + pad - (size + 2 * pad - k + step - over) >= 1
            more = step - over if ceil_mode and over and starts_within else 0
            pads.append((pad, pad + more))
        seen: Tensor = torch.nn.functional.avg_pool2d(_extended(input, pads), kernel, steps)
        return seen

    def _pad(self, input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
        if not input.is_floating_point():
            return NotImplemented
        flat = [int(amount) for amount in pad]
        pairs = list(zip(flat[::2], flat[1::2], strict=True))[::-1]
        return _extended(input, pairs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        seen = input.mean(-1, keepdim=True)
        return seen.expand(*seen.shape[:-1], weight.shape[0]).contiguous()

    def _scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> Any:
        if query.shape[-2] == value.shape[-2]:
            return value if query.shape[:-2] == value.shape[:-2] else NotImplemented
        pooled = value.mean(-2, keepdim=True)[:1]  # a pooled query has fewer positions
        return pooled.expand(*value.shape[:-2], query.shape[-2], -1)

    def _mean(self, input: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        dims = [dim] if isinstance(dim, int) else list(dim or ())
        pooled = input.ndim == 4 and len(dims) == 2 and all(d % 4 for d in dims)
        if not pooled:
            return NotImplemented
        of_grey = input.mean(dims, keepdim)[:1]
        return of_grey.expand(len(input), *of_grey.shape[1:])

    def _adaptive_avg_pool2d(self, input: Tensor, output_size: Any) -> Any:
        if input.ndim != 4 or output_size not in (1, (1, 1), [1, 1]):
            return NotImplemented
        return self._mean(input, (2, 3), True)

    def _adaptive_max_pool2d(self, input: Tensor, output_size: Any, *_: Any, **__: Any) -> Any:
        return self._adaptive_avg_pool2d(input, output_size)

    def _softmax(self, input: Tensor, dim: Any = None, *_: Any, **__: Any) -> Any:
        if dim is None:
            return NotImplemented
        if dim in (-1, input.ndim - 1) and input.ndim > 1 and input.shape[-1] == input.shape[-2]:
            own_place = torch.eye(input.shape[-1], dtype=input.dtype, device=input.device)
            return own_place.expand_as(input)
        return torch.full_like(input, 1 / input.shape[dim])


_OWN = {name.removeprefix("_") for name in vars(_StraightThrough) if not name.startswith("__")}


def _pair(value: Any) -> tuple[int, int]:
    values = [int(v) for v in value] if isinstance(value, tuple | list) else [int(value)]
    return values[0], values[-1]


def _extended(x: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    """Pad the last dimensions of x by (before, after), by linear extrapolation at the border."""
    for dim, (before, after) in zip(range(-len(pads), 0), pads, strict=True):
        if before < 0 or after < 0:
            x = x.narrow(dim, max(0, -before), x.shape[dim] + min(0, before) + min(0, after))
        parts = [x]
        for amount, at, inner in ((before, 0, 1), (after, -1, -2)):
            if amount > 0:
                border = x.narrow(dim, at % x.shape[dim], 1)
                slope = border - x.narrow(dim, inner % x.shape[dim], 1)
                steps = torch.arange(1, amount + 1, dtype=x.dtype, device=x.device)
                steps = (steps if at else steps.flip(0)).reshape(-1, *[1] * (-dim - 1))
                goes_on = border + slope * steps
                parts = [*parts, goes_on] if at else [goes_on, *parts]
        x = torch.cat(parts, dim) if len(parts) > 1 else x
    return x


@contextmanager
def _too_small_named(trunk: nn.Module, image_size: tuple[int, int]) -> Iterator[None]:
    """Turn torch's errors about kernels and paddings of small images into one about image_size."""
    own = getattr(trunk, "data_config", {}).get("input_size", (0, 0, 0))[1:]
    try:
        yield
    except RuntimeError as error:
        larger = all(side >= usual for side, usual in zip(image_size, own, strict=True))
        if larger or isinstance(error, torch.OutOfMemoryError):
            raise
        text = " ".join(str(error).split())
        raise InputError(
            f"image_size={image_size} is too small for the backbone ({text}): give more pixels"
        ) from error


def _check_cells(rows: int, columns: int, least: int, image_size: tuple[int, int]) -> None:
    if rows * columns < least:
        raise InputError(
            f"image_size={image_size} makes feature maps of {rows} x {columns} cells, and the "
            f"pooling needs at least {least}: give more pixels, or a model with pooling='average'"
        )


def _centroid(weight: Tensor) -> Tensor:
    """Return the centroid of weights along a line, as a fraction of its length."""
    places = (torch.arange(len(weight), device=weight.device) + 0.5) / len(weight)
    return (weight * places).sum() / weight.sum()
