"""
Native heads: copies of what follows the last layer of a model, so that an exit is the architecture with fewer layers.

The forward pass of such a head is that of the model's own class, with fewer layers, in which everything up to the exit
answers what the model has answered already. So pooling, masks and scales are those of the class, whatever it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..models import base_model, decoder_input_ids, is_encoder_decoder, logits_of, takes
from .kinds import Context, pool, to_channels_last
from .layout import Layout
from .taps import remove_taps, tensor_of
from .truncated import (
    build_empty,
    call_order,
    check_configured,
    is_inside,
    plain_tensors,
    put,
    shared_modules,
    top_modules,
    truncated_config,
)


# What a model may be called with that is nothing to a head.
_NOT_INPUTS = {
    "labels",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "return_dict",
    "use_cache",
}


@dataclass
class Replayed:
    """
    What the model has answered in a forward pass.

    Args:
        model (`nn.Module`): the bare model.
        outputs (`dict`): what its modules returned, by name.
        inputs (`dict`): what it was called with.
    """

    model: nn.Module
    outputs: dict[str, Any]
    inputs: dict[str, Any]


class _Tape:
    """Holds what is replayed while a head runs; the stand-ins of the head share it."""

    def __init__(self):
        self.now: Replayed | None = None

    def module(self, name: str) -> nn.Module:
        """The module of this name in the whole model."""
        return self.now.model.get_submodule(name)


class _StandIn(nn.Module):
    """
    Stands for a module of the model, and has its attributes: some models read types of weights.

    Args:
        name (`str`): of the module.
        tape ([`_Tape`]): knows the model while the head runs.
    """

    def __init__(self, name: str, tape: _Tape):
        super().__init__()
        self.name, self.tape = name, tape

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            tape = vars(self).get("tape")
            if tape is None or tape.now is None or name.startswith("__"):
                raise
            return getattr(tape.module(self.name), name)


class _Live(_StandIn):
    """Calls the module: the head has it in common with the model, such as the output embedding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.tape.module(self.name)(*args, **kwargs)


class _Replay(_StandIn):
    """Returns what the module has returned; of one that was skipped (LayerDrop), what it was called with."""

    def __init__(self, name: str, tape: _Tape, in_tuple: bool):
        super().__init__(name, tape)
        self.in_tuple = in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.name in self.tape.now.outputs:
            return self.tape.now.outputs[self.name]
        features = args[0] if args else kwargs.get("hidden_states")
        return (features,) if self.in_tuple else features


def _while_running(tape: _Tape, find: Callable[[], nn.Module]) -> nn.Module | None:
    """Input embeddings, which are stand-ins: none for those who look for some at rest (gradient checkpointing)."""
    return None if tape.now is None else find()


class NativeHead(nn.Module):
    """
    A copy of what follows the last layer of a model, as [`NativeHeads`] makes it.

    Args:
        model ([`~transformers.PreTrainedModel`]): with fewer layers, and with stand-ins for all but the copy.
        config ([`~transformers.PreTrainedConfig`]): of the architecture with fewer layers.
        tail (`list[str]`): the modules that are copied.
        taps (`list[str]`): the modules whose outputs are replayed; the last one has the features.
        prefix (`str`): what stands before these names in the model that the heads are on: PEFT wraps the bare model.
        exit (`int`): how many layers, or stages, come before the head.
        tied (`set[str]`): tensors in the copied modules that are the model's own.
        pooled (`bool`): whether there is one prediction a sample, and not one a position.
        channels_last (`bool`): whether the features are maps `[B, H, W, C]`.
        tape ([`_Tape`]): of the stand-ins.
    """

    classifier = None  # as of a head whose classifier is the model's

    def __init__(
        self,
        model: PreTrainedModel,
        config: PreTrainedConfig,
        tail: list[str],
        taps: list[str],
        prefix: str,
        exit: int,
        tied: set[str],
        pooled: bool,
        channels_last: bool,
        tape: _Tape,
    ):
        super().__init__()
        self.model, self.config, self.tail, self.taps, self.prefix, self.exit = model, config, tail, taps, prefix, exit
        self.pooled, self.channels_last, self.tape = pooled, channels_last, tape
        self.common = _take_tensors(model, set(tail), tied)
        for part in model.modules():
            if hasattr(part, "get_input_embeddings"):
                part.get_input_embeddings = partial(_while_running, tape, part.get_input_embeddings)

    @property
    def tap(self) -> str:
        """`str`: the module whose features the head works on."""
        return self.prefix + self.taps[-1]

    def forward(self, features: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        whole, prefix, last = context.replayed, self.prefix, self.taps[-1]
        outputs = {name: whole.outputs[prefix + name] for name in self.taps if prefix + name in whole.outputs}
        own = to_channels_last(features) if self.channels_last else features
        in_tuple = self.model.get_submodule(last).in_tuple
        outputs[last] = _with_features(outputs.get(last, (own,) if in_tuple else own), own)
        self.tape.now = Replayed(whole.model, outputs, whole.inputs)
        try:
            for owner, name in self.common:
                vars(self.model.get_submodule(owner))[name] = getattr(self.tape.module(owner), name)
            logits = logits_of(self.model(**whole.inputs), has_loss=False)
        finally:
            self.tape.now = None
            for owner, name in self.common:
                vars(self.model.get_submodule(owner)).pop(name, None)
        return logits, pool(features, context.mask) if self.pooled else features

    def plain_model(self, base: PreTrainedModel) -> PreTrainedModel:
        """
        The exit as a model of transformers, in evaluation mode. It shares its weights with the whole model, but for
        those of the head.

        Args:
            base ([`~transformers.PreTrainedModel`]): the bare model, with the weights that the head was trained with.
        """
        made = build_empty(base, self.config)
        memo = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
        for name in self.taps:
            put(made, name, copy.deepcopy(base.get_submodule(name), memo))
        for name in self.tail:
            put(made, name, copy.deepcopy(self.model.get_submodule(name)))
        for name, module in list(made.named_modules()):
            if isinstance(module, _Live):
                put(made, name, copy.deepcopy(base.get_submodule(name), memo))
        for owner, name in self.common:
            theirs, ours = base.get_submodule(owner), made.get_submodule(owner)
            if name in theirs._parameters:
                ours.register_parameter(name, theirs._parameters[name])
            else:
                ours.register_buffer(name, theirs._buffers[name], name not in theirs._non_persistent_buffers_set)
        for module in made.modules():
            remove_taps(module)
        if base.can_generate():
            made.generation_config = copy.deepcopy(base.generation_config)
        return made.eval()


def _with_features(output: Any, features: torch.Tensor) -> Any:
    """What a layer returned, with other features in it."""
    if isinstance(output, (tuple, list)):
        place = next(place for place, value in enumerate(output) if tensor_of(value) is not None)
        return type(output)([*output[:place], _with_features(output[place], features), *output[place + 1 :]])
    if isinstance(output, dict):
        name = next(name for name, value in output.items() if tensor_of(value) is not None)
        changed = dict(output) | {name: _with_features(output[name], features)}
        return type(output)(**changed) if isinstance(output, ModelOutput) else changed
    return features


def _take_tensors(model: PreTrainedModel, tail: set[str], tied: set[str]) -> list[tuple[str, str]]:
    """Take away the tensors that are not the head's own: it borrows the model's. Returns their owners and names."""
    taken = []
    for owner, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name in [name for name, value in held.items() if value is not None]:
                if not is_inside(owner, tail) or f"{owner}.{name}" in tied:
                    del held[name]
                    taken.append((owner, name))
    return taken


def replayed_inputs(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """
    What a native head is called with, in a forward pass of the model.

    Args:
        model (`nn.Module`): the bare model.
        arguments (`dict`): of its forward pass, by name.
    """
    inputs = {name: value for name, value in arguments.items() if name not in _NOT_INPUTS}
    given = ("decoder_input_ids", "decoder_inputs_embeds")
    if is_encoder_decoder(model) and arguments.get("labels") is not None and takes(model, given[0]):
        words = model.get_output_embeddings() is not None
        if words and all(inputs.get(name) is None for name in given):
            inputs[given[0]] = decoder_input_ids(model, arguments["labels"])
    return inputs


def check_equal(found: torch.Tensor, expected: torch.Tensor, kind: str, exit: int) -> None:
    """
    Raises:
        ValueError: if a model of fewer layers gives other logits than the exit that it is made of.
    """
    away, size = float((found.float() - expected.float()).abs().max()), float(expected.float().abs().max())
    if not away <= max(1e-5, 8 * torch.finfo(found.dtype).eps) * max(size, 1.0):
        raise ValueError(
            f"head='native': {kind} with {exit} layers gives other logits than the head after {exit} layers (by "
            f"{away:.1e}), so what follows the layers needs more than the last one's output: choose another head."
        )


class NativeHeads:
    """
    Makes the native heads of a model.

    Args:
        model (`nn.Module`): a model of transformers, PEFT-wrapped or not.
        layout ([`~hf_selfkd.heads.layout.Layout`]): of the model.
        inputs (`dict`): a small batch.
    """

    def __init__(self, model: nn.Module, layout: Layout, inputs: dict[str, Any]):
        self.base, self.layout = base_model(model), layout
        check_configured(self.base)
        found = next(name for name, module in model.named_modules() if module is self.base)
        self.prefix = f"{found}." if found else ""
        self.blocks = [name.removeprefix(self.prefix) for name in layout.layers]
        stages = list(dict.fromkeys(name.rpartition(".")[0] for name in self.blocks))
        self.order = call_order(self.base, self.blocks, inputs)
        # Blocks in lists of their own are stages: the architecture counts these.
        self.layers = stages if len(stages) > 1 else self.blocks
        embedding = self.base.get_output_embeddings()
        named = self.base.named_modules(remove_duplicate=False)
        self.embeddings = {name for name, module in named if embedding is not None and module is embedding}
        tied = set() if embedding is None else set(map(id, embedding.parameters()))
        named = self.base.named_parameters(remove_duplicate=False)
        self.tied = {name for name, parameter in named if id(parameter) in tied}

    def exit_of(self, name: str) -> int:
        """
        How many layers, or stages, a head on a layer comes after.

        Raises:
            ValueError: if it is on something else, inside a stage, or on the last layer.
        """
        kind, own = type(self.base).__name__, name.removeprefix(self.prefix)
        stage = next((place for place, layer in enumerate(self.layers) if is_inside(own, {layer})), None)
        blocks = (
            []
            if stage is None
            else [n for n in self.layout.layers if is_inside(n, {self.prefix + self.layers[stage]})]
        )
        if blocks[-1:] != [name]:
            raise ValueError(
                f"head='native' on {name!r}, which is not the end of a layer or stage of {kind}: choose among "
                f"{', '.join(self.layers)}, by their numbers or 'auto'."
            )
        if len(self.layers) == 1:
            raise ValueError(
                f"head='native': {kind} has one layer, so no smaller model is in it: choose another head."
            )
        if stage == len(self.layers) - 1:
            raise ValueError(
                f"head='native' on {name!r}, the last layer of {kind}, where its own head is: leave the layer out."
            )
        return stage + 1

    def make(self, name: str) -> NativeHead:
        """
        The head on a layer.

        Args:
            name (`str`): one of the layers.

        Raises:
            ValueError: if the architecture with fewer layers is none of transformers.
        """
        exit = self.exit_of(name)
        config, empty = truncated_config(self.base, self.layers, exit, self.order.tail)
        shared = shared_modules(empty, self.base, self.order.tail)
        last = self._last(shared, exit)
        taps = [part for part in shared if part != last] + [last]
        made, tape = build_empty(self.base, _in_training(config)), _Tape()
        for part in taps:
            put(made, part, _Replay(part, tape, part in self.order.tuples))
        names = {part for part, _ in made.named_modules()}
        for part in self.embeddings & names:
            put(made, part, _Live(part, tape))
        tail = [part for part in top_modules(self.order.tail) if part in names]
        for part in tail:
            if part not in self.embeddings:
                self._fill(made.get_submodule(part), self.base.get_submodule(part))
        maps = self.prefix + last in self.layout.channels_last
        return NativeHead(made, config, tail, taps, self.prefix, exit, self.tied, self.layout.pooled, maps, tape)

    def _last(self, shared: list[str], exit: int) -> str:
        """
        The module whose features leave at an exit: what feeds the next layer, which may be something that stands
        between the two, or else the last part of the last layer that is kept.
        """
        following = next(layer for layer in self.blocks if is_inside(layer, {self.layers[exit]}))
        fed = [part for part in shared if part in self.order.sources.get(following, ())]
        inside = [part for part in shared if is_inside(part, {self.layers[exit - 1]})]
        return max(fed or inside, key=lambda part: self.order.ends.get(part, -1))

    def _fill(self, module: nn.Module, theirs: nn.Module) -> None:
        """Give a module of the tail its weights: those of the model where they fit, else fresh ones."""
        module.to_empty(device="cpu")
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        module.apply(self.base._init_weights)
        kept = dict(theirs.named_buffers()) | plain_tensors(theirs)
        with torch.no_grad():
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                if name in kept and kept[name].shape == value.shape:
                    value.copy_(kept[name])
        module.requires_grad_(True)


def _in_training(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same without what a forward pass in training does to its layers by chance: the model has done it already."""
    config = copy.deepcopy(config)
    for name, value in vars(config).items():
        if "layerdrop" in name and isinstance(value, (int, float)):
            setattr(config, name, 0.0)
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False
    return config
