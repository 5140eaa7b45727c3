"""Computation in at least fp32, independent of autocast and global precision settings."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of ``x``, promoted to at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; return wider dtypes unchanged."""
    return x.to(wide_dtype(x))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context with autocast off; it does nothing on devices without autocast."""
    # torch 2.11 cannot trace is_autocast_available; all devices that compile have autocast.
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in full float32 precision inside the block, without autocast.

    ``torch.set_float32_matmul_precision`` and its backend settings are restored afterwards.
    """
    settings: Any = torch.backends  # not fully typed by torch
    backends = (settings.cuda.matmul, settings.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        usual = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised if only one of the two backends was set
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
