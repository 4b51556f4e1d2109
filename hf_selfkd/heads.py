"""Auxiliary heads: how a model grows them, what they say in its forward pass, how it loses them again."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, make_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .head_kinds import (
    Blocks,
    Context,
    EncoderLayer,
    Head,
    RemainingLayers,
    Same,
    SeparableConvolution,
    grid_of,
    pool,
)
from .heads_config import ROTATIONS, AuxiliaryHeadsConfig
from .rows import adapter_for, base_model, causal_rows, is_encoder_decoder, logits_of
from .samples import seeded
from .taps import (
    Layout,
    Recorder,
    choose_layers,
    evaluating,
    example_inputs,
    lists_of_layers,
    measure,
    named,
)


logger = logging.getLogger(__name__)

ATTRIBUTE = "selfkd_heads"  # under which a model holds its heads
AUXILIARY = "auxiliary"  # the field of a model's outputs, in training, that holds what its heads say


@dataclass
class HeadResults:
    """
    What the heads say of a batch, from shallow to deep.

    Args:
        logits (`list` of `torch.FloatTensor`): `[B, outputs]` or `[B, L, outputs]` of each head.
        features (`list` of `torch.FloatTensor`): adapted features of each head, `None` where they are not compared.
        deep (`torch.FloatTensor`, *optional*): features of the last layer, without a gradient.
    """

    logits: list[torch.Tensor]
    features: list[torch.Tensor | None]
    deep: torch.Tensor | None


class AuxiliaryHeads(nn.Module):
    """
    The heads of a model, as [`attach_auxiliary_heads`] makes them; the model holds them as `selfkd_heads`.

    They run within the model's own forward, in training: their predictions come back in the field `auxiliary` of its
    outputs, so that `DistributedDataParallel` sees them. In evaluation they are off.

    Args:
        config ([`AuxiliaryHeadsConfig`]): with everything decided.
        names (`list[str]`): the modules that the heads are on.
        layout ([`~hf_selfkd.taps.Layout`]): what those return.
        recorder ([`~hf_selfkd.taps.Recorder`]): listens to them.
        heads (`list[Head]`): one a module.
    """

    def __init__(
        self, config: AuxiliaryHeadsConfig, names: list[str], layout: Layout, recorder: Recorder, heads: list[Head]
    ):
        super().__init__()
        self.config, self.names, self.layout, self.recorder = config, names, layout, recorder
        self.heads = nn.ModuleList(heads)
        self.adapters = nn.ModuleDict()
        self.deepest = layout.deepest or names[-1]
        if config.feature_weight > 0:
            for index, (name, head) in enumerate(zip(names, heads, strict=True)):
                if name != self.deepest:
                    width = head.classifier.in_features if head.classifier is not None else layout.width(name)
                    self.adapters[str(index)] = nn.Linear(width, layout.width(self.deepest))
        self.enabled = config.trains  # in training
        self.watching = False  # whether what the heads say is kept in `results`, and not returned
        self.results: HeadResults | None = None
        self.handles: list[Any] = []

    def register(self, model: nn.Module) -> None:
        """Listen to a model and run within its forward."""
        self.recorder.register(model)
        self.handles.append(model.register_forward_pre_hook(self._begin))
        self.handles.append(model.register_forward_hook(self._end, with_kwargs=True))

    def remove(self) -> None:
        """Leave the model as it was."""
        self.recorder.remove()
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def watched(self, on: bool = True) -> Iterator[None]:
        """Keep what the heads say in `results`, in any mode, or (`on=False`) run none; the outputs are the model's."""
        enabled, self.enabled, self.watching = self.enabled, False, on
        try:
            yield
        finally:
            self.enabled, self.watching = enabled, False

    def _begin(self, model: nn.Module, args: tuple) -> None:
        if self.watching or (self.enabled and model.training):
            self.recorder.start()

    def _end(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        if not self.recorder.on:
            return None
        self.recorder.on = False  # a head may call what it listens to
        autocast = self.recorder.autocast  # of the model's forward, which is over
        try:
            with nullcontext() if autocast is None else torch.autocast(autocast[0], autocast[1]):
                results = None if self.recorder.silent else self._run(model, _arguments(model, args, kwargs))
        finally:
            self.recorder.clear()
        if not self.watching:
            return with_auxiliary(outputs, results)
        self.results = results
        return None

    def _run(self, model: nn.Module, arguments: dict[str, Any]) -> HeadResults:
        features = [self._features(name) for name in self.names]
        images = arguments.get("pixel_values")
        size = None if images is None else tuple(images.shape[-2:])
        context = Context(None, self.recorder.calls, _embedding_of(model), size)
        results = []
        for head, part in zip(self.heads, features, strict=True):
            context.mask = self._mask(model, arguments, part)
            results.append(head(part, context))
        logits, adapted, deep = [result[0] for result in results], [None] * len(results), None
        if self.adapters and torch.is_grad_enabled():
            deep = self._features(self.deepest).detach()
            deep = pool(deep, self._mask(model, arguments, deep)) if self.layout.pooled else deep
            for index, adapter in self.adapters.items():
                adapted[int(index)] = adapter(results[int(index)][1])
        return HeadResults(logits, adapted, deep)

    def _features(self, name: str) -> torch.Tensor:
        features = self.recorder.features(name)
        return features.permute(0, 3, 1, 2) if name in self.layout.channels_last else features

    def _mask(self, model: nn.Module, arguments: dict[str, Any], features: torch.Tensor) -> torch.Tensor | None:
        """Which positions of features `[B, L, D]` are no padding; `None` if all count or it does not matter."""
        base, mask = base_model(model), arguments.get("attention_mask")
        if is_encoder_decoder(base):
            mask = arguments.get("decoder_attention_mask", mask if self.layout.pooled else None)
        matters = self.layout.pooled or self.config.head == "transformer"
        if mask is None or mask.dim() != 2 or features.dim() != 3 or not matters:
            return None
        have, need = mask.shape[1], features.shape[1]
        if have == need:
            return mask
        if hasattr(base, "_get_feature_vector_attention_mask"):  # of audio models
            lengths = base._get_feat_extract_output_lengths(torch.tensor(have))
            if int(lengths) == need:
                return base._get_feature_vector_attention_mask(need, mask)
        if need < have:  # downsampled: a position counts if anything of it does
            return nn.functional.adaptive_max_pool1d(mask.float().unsqueeze(1), need).squeeze(1)
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            return torch.cat((mask.new_ones(len(mask), need - have), mask), dim=1)  # virtual tokens stand first
        raise ValueError(
            f"attention_mask has {have} positions and the features of a layer have {need}: a head cannot tell which "
            "of them are padding. Choose other layers."
        )

    def class_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores of the classes alone, `[..., N]`: rotations are summed over as probabilities, not as scores."""
        if self.config.views != "rotation":
            return logits
        return torch.logsumexp(logits.float().unflatten(-1, (-1, ROTATIONS)), dim=-1)


@lru_cache
def _with_field(kind: type) -> type:
    return make_dataclass(f"{kind.__name__}WithHeads", [(AUXILIARY, tuple | None, None)], bases=(kind,))


def with_auxiliary(outputs: Any, results: HeadResults | None) -> Any:
    """
    A model's outputs with one field more: everything of the heads that has a gradient, in one tuple. It is empty in a
    step that has skipped all layers (LayerDrop).

    Raises:
        ValueError: if the outputs are no dictionary.
    """
    parts = ()
    if results is not None:
        compared = [part for part in results.features if part is not None]
        parts = (*results.logits, *compared, *([] if results.deep is None else [results.deep]))
    if isinstance(outputs, ModelOutput):
        return _with_field(type(outputs))(**outputs, **{AUXILIARY: parts})
    if isinstance(outputs, dict):
        return {**outputs, AUXILIARY: parts}
    raise ValueError(
        f"auxiliary_heads need a model that returns a dictionary, not a {type(outputs).__name__}: set "
        "return_dict=True."
    )


def split_auxiliary(heads: AuxiliaryHeads, outputs: Any) -> tuple[Any, HeadResults | None]:
    """Take the field of the heads off a model's outputs again; `None` if they said nothing."""
    parts = list(outputs[AUXILIARY])
    rest = {name: value for name, value in outputs.items() if name != AUXILIARY}
    kind = type(outputs).__base__
    rest = kind(**rest) if isinstance(outputs, ModelOutput) else rest
    if not parts:
        return rest, None
    count = len(heads.heads)
    features: list[torch.Tensor | None] = [None] * count
    for index, part in zip(heads.adapters, parts[count:], strict=False):
        features[int(index)] = part
    return rest, HeadResults(parts[:count], features, parts[-1] if heads.adapters else None)


def _arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model was called with, by name."""
    if not args:
        return kwargs
    return inspect.signature(base_model(model).forward).bind_partial(*args, **kwargs).arguments


def _embedding_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """From normalised features to words, as the model itself does it."""
    base = base_model(model)
    embedding = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if embedding is None:
        return None
    bias = getattr(base, "final_logits_bias", None)
    return embedding if bias is None else lambda features: embedding(features) + bias


# Growing and losing heads


def heads_of(model: nn.Module) -> AuxiliaryHeads | None:
    """The heads that a model has, if any."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, AuxiliaryHeads) else None


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
            _try(model, heads, inputs)
        except Exception:
            strip_auxiliary_heads(model)
            raise
    heads.requires_grad_(config.trains)  # an optimizer or a process group would wait for gradients that never come
    if isinstance(model, PreTrainedModel):
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | head_names(model)
    on = ", ".join(heads.names)
    logger.info(f"Auxiliary heads {heads.config.head!r} on {on}; views={heads.config.views!r}.")
    return model


def _try(model: nn.Module, heads: AuxiliaryHeads, inputs: dict[str, Any]) -> None:
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


def head_names(model: nn.Module) -> set[str]:
    """The names in a model's state that belong to its heads."""
    return {name for name in model.state_dict() if name.startswith(f"{ATTRIBUTE}.")}


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
    factory = _Factory(model, config, layout, words, patch)
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


class _Factory:
    """Makes the head of each layer."""

    def __init__(
        self,
        model: nn.Module,
        config: AuxiliaryHeadsConfig,
        layout: Layout,
        words: bool,
        patch: tuple[int, int] | None,
    ):
        self.model, self.base, self.config = model, base_model(model), config
        self.layout, self.words, self.patch, self.names = layout, words, patch, layout.layers
        joint = ROTATIONS if config.views == "rotation" else 1
        self.num_outputs = layout.num_classes * joint
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.to = {"device": parameter.device, "dtype": parameter.dtype}

    def make(self, name: str) -> Head:
        """The head on a module."""
        body, width = self._body(name)
        tied = self.config.head == "lm_head" or (self.words and self.config.head in ("stages", "transformer"))
        norm = len(self.layout.shapes[name]) == 3 and self.config.head != "conv"
        head = Head(body, width, self.num_outputs, norm, self.layout.pooled, self.config.head == "mlp", tied)
        if tied:  # a fresh head starts undecided, also where embeddings are of size 1, as T5's are
            embedding = self.base.get_output_embeddings().weight.detach()
            nn.init.constant_(head.norm.weight, min(1.0, 1 / (math.sqrt(width) * float(embedding.std()))))
        return head

    def _body(self, name: str) -> tuple[nn.Module, int]:
        kind, width = self.config.head, self.layout.width(name)
        deep = self.layout.deepest or name
        if kind == "conv":
            return SeparableConvolution(width, self.layout.width(deep), self.patch), self.layout.width(deep)
        if kind == "transformer":
            causal = is_encoder_decoder(self.base) or adapter_for(self.model) is causal_rows
            return EncoderLayer(width, causal and not self.layout.pooled), width
        if kind == "stages":
            return self._stages(name), self.layout.width(deep)
        return Same(), width

    def _stages(self, name: str) -> nn.Module:
        if name not in self.names:
            raise ValueError(f"head='stages' copies the layers after {name!r}, which is none of {self.names}.")
        place = self.names.index(name)
        places = [i for i in range(place + 1, len(self.names)) if self.names[i] in self.layout.shapes]
        if places:
            return RemainingLayers(self._fresh([self.names[i] for i in places]), places)
        # On the last layer HSAKD puts one more of it, without change of resolution.
        if name in self.layout.preserving:
            return RemainingLayers(self._fresh([name]), [place])
        lists = lists_of_layers(self.model.get_submodule(name))
        blocks = [f"{name}.{block}" for block in list(lists[0])[1:]] if lists else []  # the first one changes it
        body = Blocks(self._fresh(blocks))
        if blocks and self._keeps_shape(body, name):
            return body
        width = self.layout.width(name)
        return SeparableConvolution(width, width, self.patch)

    def _keeps_shape(self, body: nn.Module, name: str) -> bool:
        features = torch.zeros(self.layout.shapes[name])
        try:
            with evaluating(body):
                return body.float().cpu()(features, Context(None, {}, None)).shape == features.shape
        except Exception:  # a block that takes something else than the map
            return False

    def _fresh(self, names: list[str]) -> nn.ModuleList:
        copies = copy.deepcopy(nn.ModuleList([self.model.get_submodule(name) for name in names]))
        for name, module in list(copies.named_modules()):
            if hasattr(module, "get_base_layer"):  # an adapter of PEFT: its name would be saved with the adapters
                parent, _, child = name.rpartition(".")
                setattr(copies.get_submodule(parent), child, module.get_base_layer())
        for parameter in copies.parameters():
            vars(parameter).pop("_is_hf_initialized", None)  # else transformers would leave pretrained weights alone
            parameter.requires_grad_(True)
        for module in copies.modules():
            vars(module).pop("_is_hf_initialized", None)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if isinstance(self.base, PreTrainedModel):
            copies.apply(self.base._init_weights)
        return copies
