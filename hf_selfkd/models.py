"""What a model tells of itself, whatever it is wrapped in."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.models.auto import modeling_auto


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile(model)` returns, or the model itself."""
    return getattr(model, "_orig_mod", model)


def guard_hooks() -> None:
    """Let code that was compiled for a model without hooks not be taken for one with hooks, as is the default."""
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled before it is imported
    if dynamo is not None and getattr(dynamo.config, "skip_nnmodule_hook_guards", False):
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile` and of data parallelism, with the adapters of PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        else:
            return model


def base_model(model: nn.Module) -> nn.Module:
    """The bare model inside the wrappers of `torch.compile`, of data parallelism and of PEFT, in any order."""
    while True:
        model = unwrapped(model)
        if not hasattr(model, "get_base_model"):
            return model
        model = model.get_base_model()


def class_of(module: nn.Module) -> type:
    """The class of a module, as it was before FSDP2 gave the object one of its own."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed.fsdp"))


def forward_owner(model: nn.Module) -> type:
    """The class that defines the forward of a model."""
    return next(cls for cls in type(base_model(model)).__mro__ if "forward" in vars(cls))


def is_stock(model: nn.Module) -> bool:
    """Whether the forward of a model, and with it the loss, is that of a class of transformers."""
    return forward_owner(model).__module__.startswith("transformers.")


def classes_of(*tasks: str) -> set[str]:
    """The names of the classes that transformers has for some tasks (`"CAUSAL_LM"`, ...)."""
    names: set[str] = set()
    for task in tasks:
        for value in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).values():
            names.update((value,) if isinstance(value, str) else value)
    return names


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward of a model has an argument of this name, or any."""
    parameters = inspect.signature(forward_owner(model).forward).parameters
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def main_parameter(model: nn.Module) -> nn.Parameter:
    """The first parameter of numbers that a model calculates with; its type and device are those of the model."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return next((parameter for parameter in floating if not parameter.is_meta), floating[0])  # meta: kept elsewhere


def output_embeddings_of(model: nn.Module) -> nn.Module | None:
    """The head of a language model, if the model tells of one."""
    base = base_model(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def num_classes_of(model: nn.Module) -> int | None:
    """Classes of a model's rows, as far as the model tells before it has run."""
    base, head = base_model(model), output_embeddings_of(model)
    if head is not None:
        weight = getattr(head, "weight", None)
        known = weight is not None and weight.dim() == 2 and weight.numel()  # no elements: they are elsewhere (ZeRO-3)
        return weight.shape[0] if known else None
    # A configuration has `num_labels`, 2 by default, whether a model of one's own uses the field or not.
    return getattr(getattr(base, "config", None), "num_labels", None) if is_stock(base) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def drops_cache(model: nn.Module) -> bool:
    """Whether a model that is given labels keeps no cache of keys and values; without them the model would."""
    code = inspect.unwrap(forward_owner(model).forward).__code__
    return any(isinstance(text, str) and "use_cache" in text and "labels" in text for text in code.co_consts[1:])


def virtual_tokens_of(model: nn.Module) -> int:
    """Positions that prompt tuning puts before those of the labels; 0 for any other model."""
    model = uncompiled(model)
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or getattr(config, "peft_type", None) == "PREFIX_TUNING":
        return 0
    return int(config.num_virtual_tokens)


def decoder_input_ids(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """
    What the decoder of a model starts from, made of the labels `[B, L]`.

    Raises:
        ValueError: if the model does not tell how.
    """
    model = base_model(model)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    if hasattr(model, "_shift_right"):  # T5's kin
        return model._shift_right(labels)
    # M2M100 and NLLB have no such method, but a function beside the class that their forward calls.
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]
    shift = next((module.shift_tokens_right for module in modules if hasattr(module, "shift_tokens_right")), None)
    if shift is None:
        raise ValueError(
            f"the batch has no decoder_input_ids, and {type(model).__name__} cannot make them from the labels: add "
            "them in your data collator."
        )
    config = model.config
    if getattr(config, "decoder_start_token_id", None) is None:  # of models for several modalities
        config = config.get_text_config(decoder=True)
    return shift(labels, config.pad_token_id, config.decoder_start_token_id)


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


def loss_of(outputs: Any) -> torch.Tensor | None:
    """The loss that a model computed itself from its labels, if the model did."""
    if isinstance(outputs, dict):
        return outputs.get("loss")
    return outputs[0] if isinstance(outputs, (tuple, list)) and outputs else None


@contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode, without gradients by default; every module is put back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, training in modes:
            module.training = training
