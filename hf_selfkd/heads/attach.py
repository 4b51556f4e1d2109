"""How a model grows auxiliary heads, and how it loses them again."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models import base_model, logits_of
from ..samples import seeded
from .auxiliary import ATTRIBUTE, AuxiliaryHeads, _embedding_of, head_names, heads_of
from .config import AuxiliaryHeadsConfig
from .factory import HeadFactory
from .kinds import grid_of
from .taps import Layout, Recorder, choose_layers, evaluating, example_inputs, measure, named, tensor_of, training_once


logger = logging.getLogger(__name__)


def attach_auxiliary_heads(
    model: nn.Module,
    config: AuxiliaryHeadsConfig | str,
    inputs: dict[str, Any] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """
    Grow auxiliary heads on a model. Its weights, its outputs in evaluation and what it saves stay as they are.

    [`SelfKDTrainer`] does this by itself; call it before if the model cannot be run on a made-up sample, or if you
    build the optimizer.

    Args:
        model (`nn.Module`): a transformers model, PEFT-wrapped or not, or a module that returns a dictionary.
        config ([`AuxiliaryHeadsConfig`] or `str`): or the name of a preset.
        inputs (`dict`, *optional*): a small batch for the model, without labels; made up by default.
        seed (`int`, *optional*):
            of the heads' weights; the seed of torch's generator by default. No random number is taken from it.

    Returns:
        `nn.Module`: the same object.

    Raises:
        ValueError: if the model has heads already, a layer does not exist, or a head does not fit its features.
    """
    config = AuxiliaryHeadsConfig.resolve(config)
    if heads_of(model) is not None:
        raise ValueError("the model has auxiliary heads already: call strip_auxiliary_heads(model) first.")
    inputs = example_inputs(model) if inputs is None else {k: v for k, v in inputs.items() if k != "labels"}
    with seeded(torch.initial_seed() % 2**63 if seed is None else seed):  # LayerDrop draws in evaluation mode too
        heads = _build(model, config, inputs)
        setattr(model, ATTRIBUTE, heads)
        heads.register(model)
        try:
            _check_outputs(model, heads, inputs)
            _check_gradients(model, heads, inputs)
        except Exception:
            strip_auxiliary_heads(model)
            raise
    heads.requires_grad_(config.trains)  # an optimizer or a process group would wait for gradients that never come
    if isinstance(model, PreTrainedModel):
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | head_names(model)
    on = ", ".join(heads.names)
    logger.info(f"Auxiliary heads {heads.config.head!r} on {on}; views={heads.config.views!r}.")
    return model


def _check_outputs(model: nn.Module, heads: AuxiliaryHeads, inputs: dict[str, Any]) -> None:
    """Run the heads once, so that what does not fit is told before training."""
    told = f"head={heads.config.head!r} does not fit {', '.join(heads.names)} of {type(base_model(model)).__name__}"
    remedy = "choose another head or other layers."
    try:
        with evaluating(model), heads.watched():
            logits = logits_of(model(**inputs), has_loss=False)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{told} ({reason}): {remedy}") from error
    results, heads.results = heads.results, None
    for name, part in zip(heads.names, results.logits, strict=True):
        if part.shape[:-1] != logits.shape[:-1]:
            raise ValueError(
                f"{told}: on {name} it gives {list(part.shape)} for logits {list(logits.shape)}, so its features do "
                f"not keep samples apart as the model does; {remedy}"
            )


def _check_gradients(model: nn.Module, heads: AuxiliaryHeads, inputs: dict[str, Any]) -> None:
    """See that what each head learns reaches the layer that the head is on, so that none is told in vain."""
    if not heads.config.trains or not any(p.requires_grad for p in model.parameters()):
        return
    if "pixel_values" in inputs:  # a black image may leave every unit silent
        noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
        inputs = inputs | {"pixel_values": noise.to(inputs["pixel_values"])}
    taken: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: taken.update({name: output}))
        for name in heads.names
    ]
    try:
        with training_once(model), heads.watched():
            model(**inputs)
            results, heads.results = heads.results, None
            for name, logits in zip(heads.names, results.logits if results else [], strict=False):
                if not _reaches(logits, tensor_of(taken.get(name))):
                    spread = float(tensor_of(taken[name]).std())
                    raise ValueError(
                        f"head={heads.config.head!r} on {name} of {type(base_model(model)).__name__} passes no "
                        f"gradient to its layer, whose features have a standard deviation of {spread:.1g}: load "
                        "pretrained weights or give the norms weights around 1 if that is next to nothing, else "
                        "choose another head or other layers."
                    )
    finally:
        for handle in handles:
            handle.remove()


def _reaches(logits: torch.Tensor, features: torch.Tensor | None) -> bool:
    """Whether the features of a layer matter to the logits; yes where there are none (LayerDrop) or nothing learns."""
    if features is None or not features.requires_grad or not logits.requires_grad:
        return True
    weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    (gradient,) = torch.autograd.grad((logits.float() * weights).sum(), features, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.abs().sum() > 0)


def strip_auxiliary_heads(model: nn.Module) -> nn.Module:
    """
    Take the auxiliary heads off a model: parameters, names, hooks and outputs are those of the bare model again.

    Args:
        model (`nn.Module`): changed in place; one without heads is left alone.

    Returns:
        `nn.Module`: the same object.
    """
    heads = heads_of(model)
    if heads is None:
        return model
    if isinstance(model, PreTrainedModel):
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) - head_names(model)
    heads.remove()
    delattr(model, ATTRIBUTE)
    return model


def _build(model: nn.Module, config: AuxiliaryHeadsConfig, inputs: dict[str, Any]) -> AuxiliaryHeads:
    asked = [] if config.layers == "auto" else [layer for layer in config.layers if isinstance(layer, str)]
    others = [named(layer, [], model) for layer in asked]
    layout = measure(model, others, inputs)
    others = [name for name in others if name not in layout.layers]
    images = inputs.get("pixel_values")
    size = tuple(images.shape[-2:]) if images is not None and images.dim() == 4 and layout.pooled else None
    words = not layout.pooled and _embedding_of(model) is not None
    views = config.views if config.views != "auto" else "rotation" if size is not None else "none"
    taps = choose_layers(config.layers, layout, model, last=views == "rotation")
    patch = _patch_of(model)
    maps = size is not None and all(_is_map(layout.shapes[name], size, patch) for name in taps)
    config = config.with_choices("lm_head" if words else "conv" if maps else "mlp", views)
    _check(config, layout, taps, size is not None, maps, words, type(base_model(model)).__name__)
    factory = HeadFactory(model, config, layout, words, patch)
    heads = [factory.make(name) for name in taps]
    return AuxiliaryHeads(config, taps, layout, Recorder(layout.layers, others), heads).to(**factory.to)


def _patch_of(model: nn.Module) -> tuple[int, int] | None:
    patch = getattr(getattr(base_model(model), "config", None), "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    return tuple(patch) if isinstance(patch, (list, tuple)) and len(patch) == 2 else None


def _is_map(shape: tuple[int, ...], size: tuple[int, int], patch: tuple[int, int] | None) -> bool:
    return len(shape) == 4 or len(shape) == 3 and grid_of(shape[1], size, patch) is not None


def _check(
    config: AuxiliaryHeadsConfig, layout: Layout, taps: list[str], image: bool, maps: bool, words: bool, kind: str
) -> None:
    if config.views == "rotation" and not image:
        raise ValueError(f"views='rotation' is for image classifiers, and {kind} is none: set views='none'.")
    if config.head == "lm_head" and not words:
        raise ValueError(f"head='lm_head' is for language models, and {kind} is none: choose another head.")
    if config.head == "conv" and not maps:
        shapes = [list(layout.shapes[name]) for name in taps]
        raise ValueError(
            f"head='conv' needs maps or tokens on a grid of the image's shape, and the layers of {kind} return "
            f"{shapes}: choose head='mlp', 'linear' or 'transformer'."
        )
