"""Context manager for evaluation mode."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode for the block, then restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # modules may do more in their own train()
        for module, training in modes:
            module.training = training


def for_functional_call(model: nn.Module) -> nn.Module:
    """Return the model, or a copy of it if a module has several names.

    torch's functional_call would leave the given tensors in such a module.
    """
    names = sum(1 for _ in model.named_modules(remove_duplicate=False))
    return model if names == sum(1 for _ in model.modules()) else copy.deepcopy(model)
