"""How a model grows auxiliary heads, and how it loses them again."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models import base_model, evaluating, logits_of, main_parameter
from ..samples import seeded
from ..tasks.detection import ObjectDetection
from .auxiliary import ATTRIBUTE, AuxiliaryHeads, head_names, heads_of, output_embedding_of
from .config import AuxiliaryHeadsConfig
from .factory import HeadFactory
from .inputs import example_inputs
from .kinds import grid_of
from .layers import named
from .layout import Layout, choose_layers, measure
from .native import NativeHeads, check_equal
from .reach import NO_GRADIENT
from .taps import Recorder, remove_taps


logger = logging.getLogger(__name__)

_IGNORED = "_keys_to_ignore_on_save"  # of a model of transformers


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
        ValueError: if the model has heads already or is a detector, a layer does not exist, or a head does not fit its
            features.
    """
    config = AuxiliaryHeadsConfig.resolve(config)
    if heads_of(model) is not None:
        raise ValueError("the model has auxiliary heads already: call strip_auxiliary_heads(model) first.")
    if ObjectDetection.matches(base_model(model)):
        raise ValueError(
            f"auxiliary_heads on {type(base_model(model)).__name__}: the layers of a detector's decoder have losses "
            "of their own (auxiliary_loss=True in its configuration). Leave auxiliary_heads out."
        )
    inputs = example_inputs(model) if inputs is None else {k: v for k, v in inputs.items() if k != "labels"}
    with seeded(torch.initial_seed() % 2**63 if seed is None else seed):  # LayerDrop draws in evaluation mode too
        heads = _build(model, config, inputs)
        try:
            setattr(model, ATTRIBUTE, heads.train(model.training))
            heads.register(model)
            _check_run(model, heads, inputs)
            if heads.config.head == "native":
                _check_exits(model, heads, inputs)
            _ = heads.layer_weights  # an error, if they do not fit the heads
            heads.requires_grad_(config.trains)  # else optimizers and process groups wait for gradients without end
            _save_without_heads(model, heads)
        except BaseException:
            strip_auxiliary_heads(model)
            raise
    on = ", ".join(heads.names)
    logger.info(f"Auxiliary heads {heads.config.head!r} on {on}; views={heads.config.views!r}.")
    return model


def _save_without_heads(model: nn.Module, heads: AuxiliaryHeads) -> None:
    """Leave the heads out of what a model of transformers saves."""
    if isinstance(model, PreTrainedModel):
        heads.ignored_before = [vars(model)[_IGNORED]] if _IGNORED in vars(model) else []
        setattr(model, _IGNORED, set(getattr(model, _IGNORED) or ()) | head_names(model))


def _save_as_before(model: nn.Module, heads: AuxiliaryHeads) -> None:
    if heads.ignored_before is not None:
        vars(model).pop(_IGNORED, None)  # what the class says counts again
        for value in heads.ignored_before:
            setattr(model, _IGNORED, value)


def _check_run(model: nn.Module, heads: AuxiliaryHeads, inputs: dict[str, Any]) -> None:
    """Run the heads once, so that what does not fit is told before training."""
    kind, remedy = type(base_model(model)).__name__, "choose another head or other layers."
    told = f"head={heads.config.head!r} does not fit {', '.join(heads.names)} of {kind}"
    try:
        with evaluating(model, gradients=True), heads.watched(), heads.measured() as gradients:
            logits = logits_of(model(**inputs), has_loss=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{told} ({reason}): {remedy}") from error
    finally:
        results = heads.take_results()
    for name, part in zip(heads.names, results.logits, strict=True):
        if part.shape[:-1] != logits.shape[:-1]:
            raise ValueError(
                f"{told}: on {name} it gives {list(part.shape)} for logits {list(logits.shape)}, so its features do "
                f"not keep samples apart as the model does; {remedy}"
            )
    for name, (size, passed_on) in zip(heads.names, gradients, strict=True):
        frozen = not any(parameter.requires_grad for parameter in model.get_submodule(name).parameters())
        if not size > NO_GRADIENT or not (passed_on or frozen):
            where = f"gets lost in the head ({size:.0e})" if passed_on or frozen else "stops at its features"
            raise ValueError(
                f"head={heads.config.head!r} on {name!r} of {kind} would teach the layers below it nothing: the "
                f"gradient of its loss {where}; {remedy}"
            )


def _check_exits(model: nn.Module, heads: AuxiliaryHeads, inputs: dict[str, Any]) -> None:
    """Run each exit as a model of its own, so that what could not be exported is told before training."""
    base = base_model(model)
    with evaluating(model), heads.watched():
        model(**inputs)
        for head, logits in zip(heads.heads, heads.take_results().logits, strict=True):
            check_equal(
                logits_of(head.plain_model(base)(**inputs), has_loss=False), logits, type(base).__name__, head.exit
            )


def strip_auxiliary_heads(model: nn.Module) -> nn.Module:
    """
    Take the auxiliary heads off a model: parameters, names, hooks and outputs are those of the bare model again.

    The model that `merge_and_unload()` of PEFT returns has no heads, but its layers still have their hooks: this
    function takes those off, too.

    Args:
        model (`nn.Module`): changed in place; one without heads is left alone.

    Returns:
        `nn.Module`: the same object.
    """
    heads = heads_of(model)
    if heads is not None:
        _save_as_before(model, heads)
        heads.remove()
        delattr(model, ATTRIBUTE)
    for module in model.modules():
        remove_taps(module)
    return model


def _build(model: nn.Module, config: AuxiliaryHeadsConfig, inputs: dict[str, Any]) -> AuxiliaryHeads:
    """The heads for a model, which is only looked at."""
    asked = [layer for layer in config.layers if isinstance(layer, str)] if isinstance(config.layers, list) else []
    others = [named(layer, [], model) for layer in asked]
    layout = measure(model, others, inputs)
    others = [name for name in others if name not in layout.chain]
    images = inputs.get("pixel_values")
    size = tuple(images.shape[-2:]) if images is not None and images.dim() == 4 and layout.pooled else None
    words = not layout.pooled and output_embedding_of(model) is not None
    rotates = size is not None and config.head != "native"
    views = config.views if config.views != "auto" else "rotation" if rotates else "none"
    taps = choose_layers(config.layers, layout, model, last=views == "rotation")
    patch = _patch_of(model)
    maps = size is not None and all(_is_map(layout.shapes[name], size, patch) for name in taps)
    config = config.with_choices("lm_head" if words else "conv" if maps else "mlp", views)
    _check_choices(config, layout, taps, size is not None, maps, words, type(base_model(model)).__name__)
    if config.head == "native":
        return _native(model, config, layout, taps, inputs)
    factory = HeadFactory(model, config, layout, words, patch)
    heads = [factory.make(name) for name in taps]
    return AuxiliaryHeads(config, taps, layout, Recorder(layout.chain, others), heads).to(**factory.to)


def _native(
    model: nn.Module, config: AuxiliaryHeadsConfig, layout: Layout, layers: list[str], inputs: dict[str, Any]
) -> AuxiliaryHeads:
    factory = NativeHeads(model, layout, inputs)
    heads = [factory.make(name) for name in layers]
    taps = [head.tap for head in heads]
    others = [name for name in taps if name not in layout.chain]
    layout = measure(model, others, inputs) if others else layout
    replayed = dict.fromkeys(head.prefix + name for head in heads for name in head.taps)
    parameter = main_parameter(model)
    recorder = Recorder(layout.chain, others, replayed)
    return AuxiliaryHeads(config, taps, layout, recorder, heads).to(parameter.device, parameter.dtype)


def _patch_of(model: nn.Module) -> tuple[int, int] | None:
    patch = getattr(getattr(base_model(model), "config", None), "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    return tuple(patch) if isinstance(patch, (list, tuple)) and len(patch) == 2 else None


def _is_map(shape: tuple[int, ...], size: tuple[int, int], patch: tuple[int, int] | None) -> bool:
    return len(shape) == 4 or len(shape) == 3 and grid_of(shape[1], size, patch) is not None


def _check_choices(
    config: AuxiliaryHeadsConfig, layout: Layout, taps: list[str], image: bool, maps: bool, words: bool, kind: str
) -> None:
    if config.views == "rotation" and not image:
        raise ValueError(f"views='rotation' is for image classifiers, and {kind} is none: set views='none'.")
    if config.head == "native" and config.views == "rotation":
        raise ValueError(
            "head='native' with views='rotation': a copy of the model's head tells no rotations: set views='none'."
        )
    if config.head == "lm_head" and not words:
        raise ValueError(f"head='lm_head' is for language models, and {kind} is none: choose another head.")
    if config.head == "conv" and not maps:
        shapes = [list(layout.shapes[name]) for name in taps]
        raise ValueError(
            f"head='conv' needs maps or tokens on a grid of the image's shape, and the layers of {kind} return "
            f"{shapes}: choose head='mlp', 'linear' or 'transformer'."
        )
