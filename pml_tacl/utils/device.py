"""The device that is used if none is given."""

import torch


def device_or_default(device: torch.device | str | None = None) -> torch.device:
    """Return the given device; for None return CUDA if there is a GPU, otherwise the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
