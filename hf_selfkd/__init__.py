"""Self-distillation for the Hugging Face stack."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    from .collator import SelfKDDataCollator
    from .config import MethodArguments, SelfKDConfig, Seq2SeqSelfKDConfig
    from .early_exit import EarlyExit
    from .exits import exit_model, export_exit
    from .heads import (
        attach_auxiliary_heads,
        load_auxiliary_heads,
        save_auxiliary_heads,
        strip_auxiliary_heads,
    )
    from .heads.config import AuxiliaryHeadsConfig
    from .loop import LoopDistiller
    from .samples import with_sample_ids
    from .sentences import as_classifier
    from .seq2seq import Seq2SeqSelfKDTrainer
    from .trainer import SelfKDMixin, SelfKDTrainer


# The module of each name. It is imported when the name is first used: torch and transformers take seconds, which the
# help of the command line must not cost.
_MODULES = {
    "AuxiliaryHeadsConfig": "heads.config",
    "EarlyExit": "early_exit",
    "LoopDistiller": "loop",
    "MethodArguments": "config",
    "SelfKDConfig": "config",
    "SelfKDDataCollator": "collator",
    "SelfKDMixin": "trainer",
    "SelfKDTrainer": "trainer",
    "Seq2SeqSelfKDConfig": "config",
    "Seq2SeqSelfKDTrainer": "seq2seq",
    "as_classifier": "sentences",
    "attach_auxiliary_heads": "heads",
    "exit_model": "exits",
    "export_exit": "exits",
    "load_auxiliary_heads": "heads",
    "save_auxiliary_heads": "heads",
    "strip_auxiliary_heads": "heads",
    "with_sample_ids": "samples",
}

__all__ = [
    "AuxiliaryHeadsConfig",
    "EarlyExit",
    "LoopDistiller",
    "MethodArguments",
    "SelfKDConfig",
    "SelfKDDataCollator",
    "SelfKDMixin",
    "SelfKDTrainer",
    "Seq2SeqSelfKDConfig",
    "Seq2SeqSelfKDTrainer",
    "__version__",
    "as_classifier",
    "attach_auxiliary_heads",
    "exit_model",
    "export_exit",
    "load_auxiliary_heads",
    "save_auxiliary_heads",
    "strip_auxiliary_heads",
    "with_sample_ids",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
