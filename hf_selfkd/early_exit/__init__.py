"""Inference that ends early for easy samples, in a classifier that was trained with heads."""

from .calibration import EarlyExitSummary
from .model import EarlyExit


__all__ = ["EarlyExit", "EarlyExitSummary"]
