"""The losses of self-distillation, as functions of rows."""

from .cross_entropy import cross_entropy_sum
from .progressive import progressive_cross_entropy
from .soft import divergence, soft_cross_entropy, target_entropy
from .soft_targets import LOG_ZERO, RowLosses, SoftTargets, Tail, Target
from .summary import Summary, summarize, top_entries


__all__ = [
    "LOG_ZERO",
    "RowLosses",
    "SoftTargets",
    "Summary",
    "Tail",
    "Target",
    "cross_entropy_sum",
    "divergence",
    "progressive_cross_entropy",
    "soft_cross_entropy",
    "summarize",
    "target_entropy",
    "top_entries",
]
