"""How many cells a backbone's feature maps have, and where those really look."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.modes import evaluating

_STEPS = {torch.float64: 1e-6, torch.float32: 1e-3}  # of coordinates laid over a grey image
_FARTHEST = 2.0  # cells: no convolution looks farther off
_NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize"}
_NORMS |= {"local_response_norm"}
_ACTIVATIONS = {"dropout", "relu", "relu_", "relu6", "hardtanh", "gelu", "silu", "hardswish"}
_ACTIVATIONS |= {"mish", "elu", "selu", "celu", "leaky_relu", "prelu", "softplus", "tanh"}
_ACTIVATIONS |= {"sigmoid", "hardsigmoid"}


@torch.inference_mode()
def measure_grid(
    trunk: nn.Module, image_size: tuple[int, int], channels: int = 3, least: int = 1
) -> tuple[int, int]:
    """Rows and columns of the feature maps.

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
    """How far from the middle of its cell a feature looks, in cells, as (x, y).

    A convolution of kernel 3, stride 2 and padding 1 looks half a pixel up and left of the middle
    of what it stands for, and each stride doubles that: ResNet's maps of stride 16 look half a
    cell up and left (-0.47, -0.47), EfficientNets with TensorFlow's padding down and right; ViT,
    Swin and ConvNeXt look straight on.

    The offset belongs to the architecture (kernels, strides, paddings) and the image size, and
    does not depend on the weights or on random numbers. It is measured by one forward pass in
    double precision, in which the weights are replaced by equal ones, normalisations and
    activations do nothing, and a padding goes on as the image does: an image of its own
    coordinates then comes out as where each cell looks. Where paths of a network differ, their
    mean counts. A network in which that pass leads nowhere is measured by gradients, through
    weights that are drawn from a fixed seed. Definition ours.

    Args:
        trunk: images (N, C, H, W) -> an output with `feature_maps` (N, C', h, w).
        image_size: (H, W) in pixels.
        channels: C.
        least: cells that a map must have.
        through_weights: measure what the weights that are there make of it: the centroid of the
            squared gradient of central cells with respect to noise images.

    Raises:
        ValueError: if images of that size are too small.
    """
    with evaluating(trunk), _too_small_named(trunk, image_size):
        measure_grid(trunk, image_size, channels, least)
        if through_weights:
            return _by_gradients(trunk, image_size, channels, own_weights=True)
        for measure in (_by_coordinates, _by_gradients):
            x, y = measure(trunk, image_size, channels)
            if abs(x) <= _FARTHEST and abs(y) <= _FARTHEST:  # not so where they are NaN
                return _rounded(x), _rounded(y)
    raise InputError(
        f"the backbone's cells look at no place of images of {image_size} px: give cell_offset "
        "yourself, (0.0, 0.0) for straight on"
    )


def _rounded(value: float) -> float:
    """Without the last digits, which depend on the machine."""
    return round(value, 6) + 0.0  # no negative zero


def _by_coordinates(
    trunk: nn.Module, image_size: tuple[int, int], channels: int
) -> tuple[float, float]:
    """The mean distance of what the cells see of coordinates from their middles."""
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
        maps = functional_call(trunk, _replaced(trunk, equal), (images,)).feature_maps
    # Differences, so that what is added or multiplied on the way does not count.
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
    """The centroid of the squared gradient of central cells with respect to noise.

    Cells opposite each other are averaged, so that what the image's border cuts off cancels.
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
        dtype = torch.float32  # of any precision, and also if they were made in inference mode
        named = (*trunk.named_parameters(), *trunk.named_buffers())
        wide = {name: v.float() if v.is_floating_point() else v for name, v in named}
        state = {name: v.clone() if v.is_inference() else v for name, v in wide.items()}
    else:
        state = _replaced(trunk, drawn)
    images = draw(4, channels, *image_size).requires_grad_()
    maps = functional_call(trunk, state, (images,)).feature_maps
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
    """Parameters by what stands for them; buffers as they are, statistics as before training."""
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
            state[name] = value.clone()  # a network may count in it
    return state


class _StraightThrough(TorchFunctionMode):
    """Within, layers look where they look and do nothing else.

    Each takes the mean of what its window shows, over all channels, and gives it to all of its
    own. Attention looks at its own place, and what is pooled over a whole image says nothing of
    places: it is that of the first image, which is grey.
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
            found = found / size if size else found  # or it would grow from layer to layer
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
        return seen.expand(shape).contiguous()  # an activation may be written to

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
        pooled = value.mean(-2, keepdim=True)[:1]  # of fewer places
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
    """Pad the last dimensions of x by (before, after) so that it goes on as at its border."""
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
    """Of images that are too small torch says something about its paddings and kernels."""
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
    """Of weights along a line, as a fraction of its length."""
    places = (torch.arange(len(weight), device=weight.device) + 0.5) / len(weight)
    return (weight * places).sum() / weight.sum()
