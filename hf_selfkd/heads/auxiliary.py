"""What the auxiliary heads of a model say in its forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, make_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..models import base_model, is_encoder_decoder
from .config import ROTATIONS, AuxiliaryHeadsConfig
from .kinds import Context, Head, pool, to_channels_first
from .layout import Layout
from .native import Replayed, replayed_inputs
from .reach import gradient_size
from .taps import Recorder
from .truncated import is_inside


ATTRIBUTE = "selfkd_heads"  # under which a model holds its heads

AUXILIARY = "auxiliary"  # the field of a model's outputs, in training, that holds what its heads say


@dataclass
class HeadResults:
    """
    What the heads say of a batch, from shallow to deep.

    Args:
        logits (`list` of `torch.FloatTensor`): `[B, outputs]` or `[B, L, outputs]` of each head.
        features (`list` of `torch.FloatTensor`): adapted features of each head, `None` where they are not compared.
        deep (`torch.FloatTensor` or `None`): features of the last layer, without a gradient.
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
        layout ([`~hf_selfkd.heads.layout.Layout`]): what these modules return.
        recorder ([`~hf_selfkd.heads.taps.Recorder`]): listens to them.
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
        self.gradients: list[tuple[float, bool]] | None = None  # see [`measured`]
        self.ignored_before: list | None = None  # the list that the model had of what is not saved, if it had one
        self.handles: list[Any] = []

    def register(self, model: nn.Module) -> None:
        """
        Listen to a model and run within its forward.

        Args:
            model (`nn.Module`): the one that the heads were made for.
        """
        self.recorder.register(model)
        self.handles.append(model.register_forward_pre_hook(self._begin))
        self.handles.append(model.register_forward_hook(self._end, with_kwargs=True))

    def remove(self) -> None:
        """Leave the model as it was."""
        self.recorder.remove()
        for handle in self.handles:
            handle.remove()

    @property
    def places(self) -> list[int | None]:
        """`list[int]`: which of the layers each head is on, in or right after; `None` for a module outside of them."""
        layers, found = self.layout.layers, []
        for name, head in zip(self.names, self.heads, strict=True):
            place = next((place for place, layer in enumerate(layers) if is_inside(name, {layer})), None)
            after = getattr(head, "exit", None)  # of a native head, which may be on what follows a layer
            found.append(after - 1 if place is None and after is not None else place)
        return found

    @property
    def exits(self) -> list[int | None]:
        """`list[int]`: how many layers (stages, where native heads count these) are run up to each head."""
        places = [None if place is None else place + 1 for place in self.places]
        return [getattr(head, "exit", place) for head, place in zip(self.heads, places, strict=True)]

    @property
    def layer_weights(self) -> list[float]:
        """
        `list[float]`: how much the loss of each head counts; for `"linear"` the share of the layers that are run up to
        it, in (0, 1].

        Raises:
            ValueError: if a head is on a module that is no layer, or weights are given for another number of heads.
        """
        weights = self.config.layer_weights
        if weights == "uniform":
            return [1.0] * len(self.heads)
        if weights != "linear":
            if len(weights) != len(self.heads):
                raise ValueError(
                    f"layer_weights={weights!r} for heads on {', '.join(self.names)}: give {len(self.heads)} numbers."
                )
            return weights
        places = self.places
        if None in places:
            raise ValueError(
                f"layer_weights='linear' needs heads on layers, and {self.names[places.index(None)]} is none: choose "
                "layers, or layer_weights='uniform'."
            )
        return [(place + 1) / len(self.layout.layers) for place in places]

    @contextmanager
    def watched(self, on: bool = True) -> Iterator[None]:
        """
        Keep what the heads say in `results`, in any mode; the outputs are the model's.

        Args:
            on (`bool`, *optional*, defaults to `True`): `False` runs no head at all.
        """
        enabled, self.enabled, self.watching = self.enabled, False, on
        try:
            yield
        finally:
            self.enabled, self.watching = enabled, False

    def take_results(self) -> HeadResults | None:
        """[`HeadResults`] of the last forward pass that was [`watched`], which are then forgotten."""
        results, self.results = self.results, None
        return results

    @contextmanager
    def measured(self) -> Iterator[list[tuple[float, bool]]]:
        """
        In a forward pass that is [`watched`], note of each head the size of the gradient that it gives its features,
        and whether they pass it on.
        """
        self.gradients = []
        try:
            yield self.gradients
        finally:
            self.gradients = None

    def _begin(self, model: nn.Module, args: tuple) -> None:
        if self.watching or (self.enabled and model.training):
            self.recorder.start()
        else:
            self.recorder.clear()  # a forward pass that was broken off leaves it on

    def _end(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        if not self.recorder.on:
            return None
        self.recorder.on = False  # a head may call what it listens to
        autocast = self.recorder.autocast  # of the model's forward, which is over
        try:
            with nullcontext() if autocast is None else torch.autocast(autocast[0], autocast[1]):
                silent, arguments = self._silent(model), arguments_of(model, args, kwargs)
                results = None if silent else self._run(model, arguments, device_of(outputs))
        finally:
            self.recorder.clear()
        if not self.watching:
            return with_auxiliary(outputs, results)
        self.results = results
        return None

    def _silent(self, model: nn.Module) -> bool:
        """
        Whether every layer was skipped in this step.

        Raises:
            ValueError: if nothing was heard of the layers of a model that skips none.
        """
        silent, base = self.recorder.silent, base_model(model)
        config = getattr(base, "config", None)
        if silent and (config is None or "layerdrop" not in config.to_json_string(use_diff=False)):
            raise ValueError(
                f"the heads on {', '.join(self.names)} heard nothing of a forward pass of {type(base).__name__}: "
                "their hooks were taken off, or compiled code without them was run. Attach heads before you compile."
            )
        return silent

    def answer(self, model: nn.Module, index: int, arguments: dict[str, Any]) -> torch.Tensor:
        """
        What one head says within a forward pass of the model, as soon as the module that it is on has returned.

        Args:
            model (`nn.Module`): the one that the heads are on.
            index (`int`): of the head.
            arguments (`dict`): what the model was called with, by name.

        Returns:
            `torch.FloatTensor` of shape `[B, outputs]` or `[B, L, outputs]`: its logits.
        """
        listening, self.recorder.on = self.recorder.on, False  # a head may call what it listens to
        try:
            context, own = self._context(model, arguments, None)
            return self._say(index, model, arguments, context, own)[0][0]
        finally:
            self.recorder.on = listening

    def _context(
        self, model: nn.Module, arguments: dict[str, Any], device: torch.device | None
    ) -> tuple[Context, torch.device | None]:
        """What heads need of a forward pass besides features, and the device that they are on."""
        own = next((parameter.device for parameter in self.parameters()), device)  # native heads may have no weights
        images = arguments.get("pixel_values")
        size = None if images is None else tuple(images.shape[-2:])
        calls = self.recorder.calls
        if own is not None and any(features.device != own for features in self.recorder.outputs.values()):
            calls = {index: call.to(own) for index, call in calls.items()}
        context = Context(None, calls, output_embedding_of(model), size, self._length(arguments))
        if self.recorder.replay:
            base = base_model(model)
            context.replayed = Replayed(base, self.recorder.replay, replayed_inputs(base, arguments))
        return context, own

    def _say(
        self, index: int, model: nn.Module, arguments: dict[str, Any], context: Context, device: torch.device | None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Logits and features of a head, and what it made them of."""
        part = self._features(self.names[index], device)
        context.mask = self._mask(model, arguments, part)
        return self.heads[index](part, context), part

    def _run(self, model: nn.Module, arguments: dict[str, Any], device: torch.device | None) -> HeadResults:
        context, own = self._context(model, arguments, device)
        results = []
        for index, head in enumerate(self.heads):
            result, part = self._say(index, model, arguments, context, own)
            results.append(result)
            if self.gradients is not None:
                self.gradients.append((gradient_size(head, part, context), part.requires_grad))
        logits, adapted, deep = [result[0] for result in results], [None] * len(results), None
        if self.adapters and torch.is_grad_enabled():
            deep = self._features(self.deepest, own).detach()
            if self.layout.pooled:
                deep = pool(deep, self._mask(model, arguments, deep))
            elif context.length is not None:
                deep = deep[:, : context.length]
            for index, adapter in self.adapters.items():
                adapted[int(index)] = adapter(results[int(index)][1])
        return HeadResults([part.to(device or part.device) for part in logits], adapted, deep)

    def _features(self, name: str, device: torch.device | None) -> torch.Tensor:
        """Features of a module, on the device of the heads: the model may be spread over several."""
        features = self.recorder.features(name)
        features = features if device is None else features.to(device)
        return to_channels_first(features) if name in self.layout.channels_last else features

    def _length(self, arguments: dict[str, Any]) -> int | None:
        """Positions of a batch, if the model pads its samples further, to a whole number of windows (Longformer)."""
        given = next((arguments[n] for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None), None)
        return given.shape[1] if self.layout.pads and given is not None else None

    def _mask(self, model: nn.Module, arguments: dict[str, Any], features: torch.Tensor) -> torch.Tensor | None:
        """Which positions of features `[B, L, D]` are no padding; `None` if all count or it does not matter."""
        base, mask = base_model(model), arguments.get("attention_mask")
        if is_encoder_decoder(base):
            mask = arguments.get("decoder_attention_mask", mask if self.layout.pooled else None)
        matters = self.layout.pooled or self.config.head == "transformer"
        if mask is None or mask.dim() != 2 or features.dim() != 3 or not matters:
            return None
        mask = mask.to(features.device)
        have, need = mask.shape[1], features.shape[1]
        if have == need:
            return mask
        if have < need and self._length(arguments) is not None:
            return nn.functional.pad(mask, (0, need - have))
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
        """
        Scores of the classes alone, `[..., N]`: rotations are summed over as probabilities, not as scores.

        Args:
            logits (`torch.FloatTensor` of shape `[..., N]` or `[..., 4 * N]`): of a head.
        """
        if self.config.views != "rotation":
            return logits
        return torch.logsumexp(logits.float().unflatten(-1, (-1, ROTATIONS)), dim=-1)


@lru_cache
def _with_field(kind: type) -> type:
    """The class of outputs with the field of the heads; it has no name to be imported by, so objects tell how to be
    made again."""
    made = make_dataclass(f"{kind.__name__}WithHeads", [(AUXILIARY, tuple | None, None)], bases=(kind,))
    made.__reduce__ = lambda self: (_outputs_with_field, (kind, dict(self)))
    return made


def _outputs_with_field(kind: type, values: dict[str, Any]) -> Any:
    return _with_field(kind)(**values)


def device_of(outputs: Any) -> torch.device | None:
    """The device of the logits in a model's outputs."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    return logits.device if isinstance(logits, torch.Tensor) else None


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
    """
    Take the field of the heads off a model's outputs again.

    Args:
        heads ([`AuxiliaryHeads`]): those of the model.
        outputs (`ModelOutput` or `dict`): what the model returned, with the field `auxiliary`.

    Returns:
        `tuple`: the outputs without the field, and the [`HeadResults`]; `None` if the heads said nothing.
    """
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


def arguments_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model was called with, by name."""
    if not args:
        return kwargs
    return inspect.signature(base_model(model).forward).bind_partial(*args, **kwargs).arguments


def output_embedding_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """From normalised features to words, as the model itself does it."""
    base = base_model(model)
    embedding = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if embedding is None:
        return None
    bias = getattr(base, "final_logits_bias", None)
    weight = getattr(embedding, "weight", None)

    def embed(features: torch.Tensor) -> torch.Tensor:
        scores = embedding(features if weight is None else features.to(weight.device))
        return scores if bias is None else scores + bias.to(scores.device)

    return embed


def heads_of(model: nn.Module) -> AuxiliaryHeads | None:
    """
    The heads that a model has, if any.

    Args:
        model (`nn.Module`): with heads or without.
    """
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, AuxiliaryHeads) else None


def trained_heads(model: nn.Module) -> AuxiliaryHeads:
    """
    The heads that a model was trained with.

    Args:
        model (`nn.Module`): not compiled.

    Raises:
        ValueError: if it has none.
    """
    heads = heads_of(model)
    if heads is None:
        raise ValueError(
            f"{type(base_model(model)).__name__} has no auxiliary heads: train with auxiliary_heads='exits' and "
            "save_heads=True, then load_auxiliary_heads(model, folder)."
        )
    return heads


def head_names(model: nn.Module) -> set[str]:
    """
    The names in a model's state that belong to its heads.

    Args:
        model (`nn.Module`): with heads or without.
    """
    return {name for name in model.state_dict() if name.startswith(f"{ATTRIBUTE}.")}
