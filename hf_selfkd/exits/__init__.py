"""Smaller models out of one that was trained with native heads, and inference that ends early for easy samples."""

from .early_exit import EarlyExit
from .export import exit_model, export_exit


__all__ = ["EarlyExit", "exit_model", "export_exit"]
