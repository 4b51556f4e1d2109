"""Self-distillation for the Hugging Face stack."""

from ._version import __version__
from .config import SelfKDConfig
from .samples import SelfKDDataCollator, with_sample_ids
from .trainer import SelfKDMixin, SelfKDTrainer


__all__ = [
    "SelfKDConfig",
    "SelfKDDataCollator",
    "SelfKDMixin",
    "SelfKDTrainer",
    "__version__",
    "with_sample_ids",
]
