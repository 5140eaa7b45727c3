"""The device that is used if none is given."""

import torch


def device_or_default(device: torch.device | str | None = None) -> torch.device:
    """Return a device; for None CUDA's if there is one, otherwise the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
