"""Self-distillation for the Hugging Face stack."""

from ._version import __version__
from .config import SelfKDConfig, Seq2SeqSelfKDConfig
from .samples import SelfKDDataCollator, with_sample_ids
from .trainer import SelfKDMixin, SelfKDTrainer, Seq2SeqSelfKDTrainer


__all__ = [
    "SelfKDConfig",
    "SelfKDDataCollator",
    "SelfKDMixin",
    "SelfKDTrainer",
    "Seq2SeqSelfKDConfig",
    "Seq2SeqSelfKDTrainer",
    "__version__",
    "with_sample_ids",
]
