"""Auxiliary heads: layered self-distillation."""

from .attach import attach_auxiliary_heads, strip_auxiliary_heads
from .auxiliary import AuxiliaryHeads, HeadResults, head_names, heads_of, split_auxiliary
from .config import AuxiliaryHeadsConfig
from .saving import load_auxiliary_heads, save_auxiliary_heads


__all__ = [
    "AuxiliaryHeads",
    "AuxiliaryHeadsConfig",
    "HeadResults",
    "attach_auxiliary_heads",
    "head_names",
    "heads_of",
    "load_auxiliary_heads",
    "save_auxiliary_heads",
    "split_auxiliary",
    "strip_auxiliary_heads",
]
