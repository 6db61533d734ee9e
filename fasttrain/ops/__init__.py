"""The fused operations. Each lives in one file with its formula, its plain PyTorch reference and its dispatch."""

from ._dispatch import backend_info
from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .sample import sample

__all__ = ["backend_info", "cross_entropy", "linear_cross_entropy", "sample"]
