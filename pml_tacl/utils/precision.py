"""Sums and products in at least fp32, whatever autocast and the process say."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in float32 within, whatever the process or autocast allows.

    ``torch.set_float32_matmul_precision`` and the settings behind it are as before afterwards.
    """
    settings: Any = torch.backends  # torch types not all of it
    backends = (settings.cuda.matmul, settings.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        usual = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch can not tell where only one of the two was set
        usual = None
    torch.set_float32_matmul_precision("highest")
    try:
        with without_autocast(device):
            yield
    finally:
        if usual is not None:
            torch.set_float32_matmul_precision(usual)
        for backend, precision in zip(backends, before, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
