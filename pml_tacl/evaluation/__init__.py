"""Embed data sets and measure retrieval."""

from pml_tacl.evaluation.calculator import RetrievalCalculator
from pml_tacl.evaluation.inference import embed, evaluate, make_tester

__all__ = ["RetrievalCalculator", "embed", "evaluate", "make_tester"]
