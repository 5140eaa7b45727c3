"""Embed a data set and measure retrieval on it."""

from pml_tacl.evaluation.calculator import RetrievalCalculator
from pml_tacl.evaluation.inference import embed, evaluate, make_tester

__all__ = ["RetrievalCalculator", "embed", "evaluate", "make_tester"]
