"""Self-distillation for the Hugging Face stack."""

from ._version import __version__
from .config import SelfKDConfig, Seq2SeqSelfKDConfig
from .heads.attach import attach_auxiliary_heads, strip_auxiliary_heads
from .heads.config import AuxiliaryHeadsConfig
from .samples import SelfKDDataCollator, with_sample_ids
from .seq2seq import Seq2SeqSelfKDTrainer
from .trainer import SelfKDMixin, SelfKDTrainer


__all__ = [
    "AuxiliaryHeadsConfig",
    "SelfKDConfig",
    "SelfKDDataCollator",
    "SelfKDMixin",
    "SelfKDTrainer",
    "Seq2SeqSelfKDConfig",
    "Seq2SeqSelfKDTrainer",
    "__version__",
    "attach_auxiliary_heads",
    "strip_auxiliary_heads",
    "with_sample_ids",
]
