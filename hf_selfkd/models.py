"""What a model tells of itself, whatever it is wrapped in."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def main_parameter(model: nn.Module) -> nn.Parameter:
    """The first parameter of numbers that a model calculates with; its type and device are those of the model."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return next((parameter for parameter in floating if not parameter.is_meta), floating[0])  # meta: kept elsewhere


def num_classes_of(model: nn.Module) -> int | None:
    """Classes of a model's rows, as far as it tells before it has run."""
    model = base_model(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and hasattr(head, "weight"):
        return head.weight.shape[0]
    config = getattr(model, "config", None)
    return getattr(config, "num_labels", None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def _decoder_input_ids(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    # M2M100 and NLLB have no such method, but a function beside the class that their forward calls.
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]
    shift = next((module.shift_tokens_right for module in modules if hasattr(module, "shift_tokens_right")), None)
    if shift is None:
        raise ValueError(
            f"the batch has no decoder_input_ids, and {type(model).__name__} cannot make them from the labels: add "
            "them in your data collator."
        )
    return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


def without_labels(model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> dict[str, Any]:
    """
    What a language model needs to be run without labels: an encoder-decoder model makes its decoder's inputs from
    them, others need nothing.

    Raises:
        ValueError: if the decoder's inputs are missing and the model cannot make them.
    """
    if not is_encoder_decoder(model):
        return inputs
    if not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        return inputs | {"decoder_input_ids": _decoder_input_ids(base_model(model), labels)}
    return inputs


def logits_of(outputs: Any, has_loss: bool) -> torch.Tensor:
    """
    Take the logits out of a model's outputs.

    Args:
        outputs: a `ModelOutput`, a dictionary or a tuple.
        has_loss (`bool`): whether a tuple starts with the loss.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(outputs, dict):
        logits = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)):
        logits = outputs[int(has_loss)] if len(outputs) > int(has_loss) else None
    else:
        logits = getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor):
        if isinstance(outputs, dict):
            found = ", ".join(outputs)
        else:
            found = f"a tuple of {len(outputs)}" if isinstance(outputs, (tuple, list)) else type(outputs).__name__
        raise ValueError(f"the model returned no logits but {found}: self-distillation needs outputs.logits.")
    return logits
