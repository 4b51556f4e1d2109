"""Exits as plain models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..heads import AuxiliaryHeads, heads_of
from ..heads.auxiliary import trained_heads
from ..heads.inputs import example_inputs
from ..heads.native import NativeHead, check_equal
from ..models import base_model, evaluating, logits_of, uncompiled


def native_head(model: nn.Module, exit: int) -> NativeHead:
    """
    The native head after a number of layers.

    Args:
        model (`nn.Module`): with native heads.
        exit (`int`): how many layers, or stages, come before.

    Raises:
        ValueError: if there is none.
    """
    heads = trained_heads(uncompiled(model))
    kind = type(base_model(model)).__name__
    if heads.config.head != "native":
        raise ValueError(
            f"head={heads.config.head!r} is no part of the architecture of {kind}: train with head='native' to export "
            "exits."
        )
    found = {head.exit: head for head in heads.heads}
    if exit not in found:
        raise ValueError(f"exit={exit} of {kind} does not exist: choose one of {', '.join(map(str, found))}.")
    return found[exit]


def exit_model(model: nn.Module, exit: int) -> PreTrainedModel:
    """
    An exit as a plain model of transformers, in evaluation mode.

    The exit shares the weights of its layers with the model, so that it costs no memory beside it: an assistant for
    `model.generate(assistant_model=exit_model(model, 2))`, for example. Further training would change both.

    Args:
        model ([`~transformers.PreTrainedModel`]): with native heads (`auxiliary_heads="exits"`).
        exit (`int`): how many layers, or stages, it has.

    Returns:
        [`~transformers.PreTrainedModel`]: of the same class, with fewer layers.

    Raises:
        ValueError: if there is no such exit, or the model is wrapped by PEFT.
    """
    head, base = native_head(model, exit), base_model(model)
    if hasattr(uncompiled(model), "get_base_model"):
        raise ValueError(
            f"{type(base).__name__} is wrapped by PEFT: save_auxiliary_heads(model, folder), then "
            "load_auxiliary_heads(model.merge_and_unload(), folder)."
        )
    return head.plain_model(base)


def export_exit(
    model: nn.Module,
    exit: int,
    output_dir: str | Path,
    processing_class: Any = None,
    inputs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """
    Save an exit as a plain model of transformers, which loads where this package is not installed.

    Before anything is written, the exit's logits are compared with those of the head that it is made of.

    Args:
        model ([`~transformers.PreTrainedModel`]): with native heads (`auxiliary_heads="exits"`).
        exit (`int`): how many layers, or stages, it has.
        output_dir (`str` or `Path`): where it is saved.
        processing_class (*optional*): tokenizer, image processor or feature extractor that is saved along.
        inputs (`dict`, *optional*): a small batch to compare on, without labels; made up by default.

    Returns:
        [`~transformers.PreTrainedModel`]: the exit, which shares weights with the model.

    Raises:
        ValueError: if there is no such exit, or its logits are not those of the head.
    """
    made, heads, base = exit_model(model, exit), heads_of(uncompiled(model)), base_model(model)
    inputs = example_inputs(model) if inputs is None else inputs
    with evaluating(model), heads.watched():
        model(**inputs)
        expected = _logits_of_exit(heads, exit)
        check_equal(logits_of(made(**inputs), has_loss=False), expected, type(base).__name__, exit)
    made.save_pretrained(output_dir)
    if processing_class is not None:
        processing_class.save_pretrained(output_dir)
    return made


def _logits_of_exit(heads: AuxiliaryHeads, exit: int) -> Any:
    return heads.take_results().logits[heads.exits.index(exit)]
