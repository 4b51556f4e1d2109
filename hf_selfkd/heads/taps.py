"""Taps: the layers of a model that heads can be put on, and what those layers see and say in a forward pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..models import base_model, is_encoder_decoder, logits_of


_NUMBERED = re.compile(r"(layer|stage|block|level)s?_?\d+")  # layer1, layer2, ... of torchvision and timm
MANY = 6  # layers from which on those of a CNN are its blocks and not its stages


def lists_of_layers(model: nn.Module) -> list[dict[str, nn.Module]]:
    """
    What may be the layers of a model in their order, by name: lists of blocks (stages of a CNN or hierarchical model,
    layers of a transformer; of the decoder if there is one), the one with most weights first.
    """
    base = base_model(model)
    root = base.get_decoder() if is_encoder_decoder(base) and hasattr(base, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is root), "")
    found = []
    for name, module in root.named_modules(prefix=prefix):
        blocks = _blocks(module)
        count = sum(p.numel() for block in blocks.values() for p in block.parameters())
        if count:
            found.append((count, {f"{name}.{child}".removeprefix("."): block for child, block in blocks.items()}))
    return [blocks for _, blocks in sorted(found, key=lambda pair: -pair[0])]


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    children = dict(module.named_children())
    lists = isinstance(module, (nn.ModuleList, nn.Sequential))
    if lists and children and all(isinstance(child, nn.ModuleList) for child in children.values()):
        # Stages that are lists themselves, which nobody calls: their blocks, one after the other.
        return {f"{i}.{j}": block for i, child in children.items() for j, block in _blocks(child).items()}
    if lists:
        whole = all(any(True for _ in child.children()) for child in children.values())
        return children if children and whole else {}
    numbered = {name: child for name, child in children.items() if _NUMBERED.fullmatch(name)}
    return numbered if len(numbered) > 1 else {}


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Two made-up samples, to find out the sizes of a model's features.

    Raises:
        ValueError: if the model does not tell what it takes.
    """
    base = base_model(model)
    config, name = getattr(base, "config", None), getattr(base, "main_input_name", None)
    device = next(model.parameters()).device
    if name == "pixel_values":
        return {name: _images(model, base, config).to(device)}
    if name == "input_ids":
        words = _words(config).to(device)
        return {name: words} | ({"decoder_input_ids": words} if is_encoder_decoder(base) else {})
    shape = _sound(name, config)
    if shape is not None:
        return {name: torch.zeros(2, *shape, device=device)}
    raise ValueError(
        f"{type(base).__name__} does not tell what a sample looks like (main_input_name={name!r}): call "
        "attach_auxiliary_heads(model, config, inputs=...) with a small batch before you make the trainer."
    )


def _images(model: nn.Module, base: nn.Module, config: Any) -> torch.Tensor:
    timm = getattr(getattr(base, "timm_model", None), "pretrained_cfg", None) or {}
    config = getattr(config, "vision_config", None) or config  # of models for images and texts
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    shape = timm.get("input_size", (getattr(config, "num_channels", 3), height, width))
    frames = [config.num_frames] if getattr(config, "num_frames", None) else []
    return torch.zeros(2, *frames, *shape, dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()))


def _words(config: Any) -> torch.Tensor:
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos", "decoder_start")}
    size = getattr(config, "vocab_size", None) or 100
    word = next((number for number in range(min(size, 100)) if number not in special), 0)
    # Without padding, models that classify by the last word take one sample only.
    words = torch.full((1 if getattr(config, "pad_token_id", None) is None else 2, 8), word)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < size:
        words[:, -1] = end  # by which BART classifies
    return words


def _sound(name: str | None, config: Any) -> tuple[int, ...] | None:
    if name == "input_values" and getattr(config, "num_mel_bins", None) and getattr(config, "max_length", None):
        return config.max_length, config.num_mel_bins
    if name == "input_values":
        return (16000,)
    if name == "input_features" and getattr(config, "max_source_positions", None) and hasattr(config, "num_mel_bins"):
        return config.num_mel_bins, 2 * config.max_source_positions
    if name == "input_features" and getattr(config, "feature_projection_input_dim", None):
        return 64, config.feature_projection_input_dim
    return None


def tensor_of(output: Any) -> torch.Tensor | None:
    """The features among what a layer returns: the first tensor, if any."""
    if isinstance(output, torch.Tensor):
        return output
    if not isinstance(output, (dict, list, tuple)):
        return None
    found = (tensor_of(value) for value in (output.values() if isinstance(output, dict) else output))
    return next((value for value in found if value is not None), None)


@dataclass
class Call:
    """What a layer was called with, besides the features that it works on."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def repeat(self, layer: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """Call another layer the same way, with other features; it gets no cache, which belongs to the first."""
        args = [None if isinstance(value, Cache) else value for value in self.args]
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in self.kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return tensor_of(layer(features, *args, **kwargs))


class Recorder:
    """
    Notes what layers are called with and what they return, while it is on.

    Args:
        names (`list[str]`): all layers, in their order.
        others (`list[str]`): further modules to listen to.
    """

    def __init__(self, names: list[str], others: list[str]):
        self.names, self.others = names, others
        self.handles: list[Any] = []
        self.clear()

    def register(self, model: nn.Module) -> None:
        """Listen to the modules of a model."""
        for index, name in enumerate(self.names):
            module = model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True))
            self.handles.append(module.register_forward_hook(partial(self._leave, name)))
        for name in self.others:
            self.handles.append(model.get_submodule(name).register_forward_hook(partial(self._leave, name)))

    def remove(self) -> None:
        """Listen no more."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def start(self) -> None:
        """Forget what was noted, and note what comes."""
        self.clear()
        self.on = True

    def clear(self) -> None:
        """Forget what was noted, and note nothing."""
        self.on, self.stem = False, None
        self.calls: dict[int, Call] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.counts: Counter = Counter()
        self.chained = 0  # layers whose input is the very output of the one before
        self.autocast: tuple[str, torch.dtype] | None = None

    def _enter(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.on:
            return
        kwargs = dict(kwargs)
        if args:
            features, args = args[0], args[1:]
        else:
            features = kwargs.pop("hidden_states", None)
        if self.stem is None:
            self.stem = tensor_of(features)
        before = self.outputs.get(self.names[index - 1]) if index else None
        self.chained += before is not None and tensor_of(features) is before
        self.calls[index] = Call(args, kwargs)

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        features = tensor_of(output) if self.on else None
        if features is None:
            return
        self.outputs[name] = features
        self.counts[name] += 1
        kind = features.device.type
        if torch.is_autocast_enabled(kind):  # which is over when the model's forward is
            self.autocast = kind, torch.get_autocast_dtype(kind)

    @property
    def silent(self) -> bool:
        """`bool`: whether every layer was skipped (LayerDrop), so that nothing was noted."""
        return not self.calls and not self.outputs

    def features(self, name: str) -> torch.Tensor:
        """What a module returned; of a layer that was skipped (LayerDrop), what went past it.

        Raises:
            ValueError: if the module was not called.
        """
        if name in self.outputs:
            return self.outputs[name]
        before = self.names[: self.names.index(name)] if name in self.names else []
        done = [self.outputs[other] for other in before if other in self.outputs]
        found = done[-1] if done else self.stem
        if found is None or name not in self.names:
            raise ValueError(f"layers={[name]}: the module was not called in the forward pass: choose another.")
        return found


@dataclass
class Layout:
    """
    What a forward pass of a small batch told.

    Args:
        layers (`list[str]`): the layers of the model.
        shapes (`dict`): shape of the features of each module, in the order of their calls; maps as `[B, C, H, W]`.
        channels_last (`set[str]`): modules whose maps are `[B, H, W, C]`.
        preserving (`set[str]`): layers that return features of the shape that they get.
        counts (`dict`): how often each module was called.
        chained (`bool`): whether each layer works on what the one before it returned.
        num_classes (`int`): width of the logits.
        pooled (`bool`): whether there is one prediction a sample, and not one a position.
    """

    layers: list[str]
    shapes: dict[str, tuple[int, ...]]
    channels_last: set[str]
    preserving: set[str]
    counts: dict[str, int]
    chained: bool
    num_classes: int
    pooled: bool

    @property
    def deepest(self) -> str | None:
        """`str`: the last of the layers that was called, if any was."""
        return next((name for name in reversed(self.layers) if name in self.shapes), None)

    def width(self, name: str) -> int:
        """Channels of the features of a module."""
        shape = self.shapes[name]
        return shape[1] if len(shape) == 4 else shape[-1]


def measure(model: nn.Module, others: list[str], inputs: dict[str, Any]) -> Layout:
    """
    Run a model on a small batch, in evaluation mode, to find its layers and see their features.

    Args:
        model (`nn.Module`): the model.
        others (`list[str]`): further modules to look at.
        inputs (`dict`): for the model.

    Raises:
        ValueError: if it cannot be run on these inputs.
    """
    lists = lists_of_layers(model)
    everything = list(dict.fromkeys([name for blocks in lists for name in blocks] + others))
    _, recorder = _watch(model, [], everything, inputs)
    # The largest list whose blocks are called: some lists hold lists.
    called = [[name for name in blocks if name in recorder.outputs] for blocks in lists]
    layers = next(
        (list(blocks) for blocks, some in zip(lists, called, strict=True) if 2 * len(some) > len(blocks)), []
    )
    outputs, recorder = _watch(model, layers, [name for name in others if name not in layers], inputs)
    logits = logits_of(outputs, has_loss=False)
    layout = Layout(layers, {}, set(), set(), dict(recorder.counts), True, logits.shape[-1], logits.dim() == 2)
    images = inputs.get("pixel_values")
    ratio = images.shape[-2] / images.shape[-1] if images is not None else 1.0
    previous = recorder.stem
    for name, features in recorder.outputs.items():
        shape = tuple(features.shape)
        if len(shape) == 4 and abs(shape[1] / shape[2] - ratio) < abs(shape[2] / shape[3] - ratio):
            layout.channels_last.add(name)
            shape = (shape[0], shape[3], shape[1], shape[2])
        if name in layers:
            if previous is not None and previous.shape == features.shape:
                layout.preserving.add(name)
            previous = features
        layout.shapes[name] = shape
    alike = len({layout.shapes[name] for name in layers if name in layout.shapes}) == 1
    layout.chained = not alike or 2 * recorder.chained >= len(layers) - 1  # stages may be reshaped in between
    return layout


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module is put back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def training_once(model: nn.Module) -> Iterator[None]:
    """Training mode with gradients, for one forward; modes, batch statistics and other buffers are put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _watch(model: nn.Module, names: list[str], others: list[str], inputs: dict[str, Any]) -> tuple[Any, Recorder]:
    recorder = Recorder(names, others)
    recorder.register(model)
    recorder.start()
    try:
        with evaluating(model):
            return model(**inputs), recorder
    except Exception as error:
        shapes = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{type(base_model(model)).__name__} does not run on samples of {shapes} ({told}): call "
            "attach_auxiliary_heads(model, config, inputs=...) with a small batch before you make the trainer."
        ) from error
    finally:
        recorder.remove()


def choose_layers(asked: list[int | str] | str, layout: Layout, model: nn.Module, last: bool = True) -> list[str]:
    """
    The modules to put heads on, from shallow to deep.

    Args:
        asked (`list` or `"auto"`): as in [`AuxiliaryHeadsConfig`].
        layout ([`Layout`]): of the model.
        model (`nn.Module`): to look up names.
        last (`bool`, *optional*, defaults to `True`): whether `"auto"` may choose the last layer, if it has others.

    Raises:
        ValueError: if one does not exist (the message lists those that do), is not called, is called several times, or
            does not keep samples apart.
    """
    kind, names = type(base_model(model)).__name__, layout.layers
    if asked == "auto":
        called = [name for name in names if name in layout.shapes]
        if not called or not layout.chained:
            raise ValueError(
                f"layers='auto' found no layers in {kind} that follow one another: name modules of it in layers=[...]."
            )
        chosen = _evenly(called, layout, last)
    else:
        chosen = [named(layer, names, model) for layer in asked]
        twice = [name for name, count in Counter(chosen).items() if count > 1]
        if twice:
            raise ValueError(f"layers={asked} names {twice[0]} twice: give each layer once.")
    silent = [name for name in chosen if name not in layout.shapes]
    if silent:
        raise ValueError(f"layers: {silent[0]!r} was not called in a forward pass: choose another module.")
    shared = [name for name in chosen if layout.counts[name] > 1]
    if shared:
        raise ValueError(
            f"layers: {shared[0]!r} of {kind} is called {layout.counts[shared[0]]} times in a forward pass, and a "
            "head would see the last call only: choose modules that are called once."
        )
    order = list(layout.shapes)
    return sorted(chosen, key=order.index)


def _evenly(called: list[str], layout: Layout, last: bool) -> list[str]:
    ends = _stage_ends(called, [layout.shapes[name] for name in called])
    if ends is None:
        parts = 3 if last else 4
        ends = list(dict.fromkeys(called[-(-len(called) * part // parts) - 1] for part in range(1, 4)))
    return ends if last or ends == called[-1:] else [name for name in ends if name != called[-1]]


def _stage_ends(names: list[str], shapes: list[tuple[int, ...]]) -> list[str] | None:
    """The last layer of each stage of a hierarchical model; `None` if all layers are alike."""
    parents = [name.rpartition(".")[0] for name in names]
    if len(set(parents)) > 1:  # a list for each stage
        return [name for i, name in enumerate(names) if parents[i] not in parents[i + 1 :]]
    if len(set(shapes)) == 1:
        return None
    if len(names) <= MANY:
        return names
    sides = [shape[2:] if len(shape) == 4 else shape[1:-1] for shape in shapes]
    return [name for i, name in enumerate(names) if i + 1 == len(names) or sides[i] != sides[i + 1]]


def named(layer: int | str, names: list[str], model: nn.Module) -> str:
    """The name of a layer that was asked for by its number or name.

    Raises:
        ValueError: if it does not exist; the message lists those that do.
    """
    if isinstance(layer, int):
        if -len(names) <= layer < len(names):
            return names[layer]
        raise ValueError(
            f"layers: {layer} does not exist, {type(base_model(model)).__name__} has {len(names)} layers"
            f"{f' (0 to {len(names) - 1}: {names[0]} to {names[-1]})' if names else ': name modules instead'}."
        )
    modules = [name for name, _ in model.named_modules() if name]
    if layer in modules:
        return layer
    shown = names or [name for name in modules if name.count(".") < 3]
    raise ValueError(f"layers: {layer!r} does not exist. There are {', '.join(shown)}, and modules inside them.")
