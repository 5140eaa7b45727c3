"""Sums are made in at least fp32, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of ``x``, at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32, and anything wider as it is."""
    return x.to(wide_dtype(x))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off; nothing on a device that has none."""
    # torch 2.11 can not trace the question; devices without autocast are not compiled for.
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
