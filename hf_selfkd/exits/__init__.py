"""Smaller models out of one that was trained with native heads."""

from .export import exit_model, export_exit


__all__ = ["exit_model", "export_exit"]
