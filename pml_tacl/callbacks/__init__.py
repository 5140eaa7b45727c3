"""Hooks for trainers, and loggers."""

from pml_tacl.callbacks.hooks import (
    EarlyStopping,
    Evaluate,
    LogImages,
    LogLosses,
    chain,
)
from pml_tacl.callbacks.loggers import Logger, TensorBoardLogger, WandbLogger
from pml_tacl.callbacks.trainer_access import restore

__all__ = [
    "EarlyStopping",
    "Evaluate",
    "LogImages",
    "LogLosses",
    "Logger",
    "TensorBoardLogger",
    "WandbLogger",
    "chain",
    "restore",
]
