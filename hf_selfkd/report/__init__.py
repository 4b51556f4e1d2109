"""One HTML page that shows how trainings went, and the samples that look wrong."""

from .saving import save_samples
from .writing import write_report


__all__ = ["save_samples", "write_report"]
