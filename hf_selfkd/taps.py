"""Taps: the layers of a model that heads can be put on, and what those layers see and say in a forward pass."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .rows import base_model, is_encoder_decoder, logits_of


_NUMBERED = re.compile(r"(layer|stage|block|level)s?_?\d+")  # layer1, layer2, ... of torchvision and timm
MANY = 6  # layers from which on those of a CNN are its blocks and not its stages


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """
    The layers of a model in their order, by name: its largest list of blocks (stages of a CNN or hierarchical model,
    layers of a transformer; of the decoder if there is one). Empty if there is no such list.
    """
    base = base_model(model)
    root = base.get_decoder() if is_encoder_decoder(base) and hasattr(base, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is root), "")
    best: dict[str, nn.Module] = {}
    size = 0
    for name, module in root.named_modules(prefix=prefix):
        blocks = _blocks(module)
        count = sum(p.numel() for block in blocks.values() for p in block.parameters())
        if count > size:  # a list inside another one is smaller
            best, size = {f"{name}.{child}".removeprefix("."): block for child, block in blocks.items()}, count
    return best


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    children = dict(module.named_children())
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        whole = all(any(True for _ in child.children()) for child in children.values())
        return children if children and whole else {}
    numbered = {name: child for name, child in children.items() if _NUMBERED.fullmatch(name)}
    return numbered if len(numbered) > 1 else {}


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    One made-up sample, to find out the sizes of a model's features.

    Raises:
        ValueError: if the model does not tell what it takes.
    """
    base = base_model(model)
    config, name = getattr(base, "config", None), getattr(base, "main_input_name", None)
    device = next(model.parameters()).device
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else size
        timm = getattr(getattr(base, "timm_model", None), "pretrained_cfg", None) or {}
        shape = timm.get("input_size", (getattr(config, "num_channels", 3), height, width))
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {name: torch.zeros(1, *shape, device=device, dtype=dtype)}
    if name == "input_ids":
        words = torch.ones(1, 8, dtype=torch.int64, device=device)
        return {name: words} | ({"decoder_input_ids": words} if is_encoder_decoder(base) else {})
    if name == "input_values" and getattr(config, "num_mel_bins", None) and getattr(config, "max_length", None):
        return {name: torch.zeros(1, config.max_length, config.num_mel_bins, device=device)}  # a spectrogram
    if name == "input_values":
        return {name: torch.zeros(1, 16000, device=device)}
    raise ValueError(
        f"{type(base).__name__} does not tell what a sample looks like (main_input_name={name!r}): call "
        "attach_auxiliary_heads(model, config, inputs=...) with a batch of one sample before you make the trainer."
    )


def tensor_of(output: Any) -> torch.Tensor:
    """The features among what a layer returns: the first tensor."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, torch.Tensor))


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
        self.on = False
        self.stem: torch.Tensor | None = None
        self.calls: dict[int, Call] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.handles: list[Any] = []

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
        self.on, self.stem, self.calls, self.outputs = False, None, {}, {}

    def _enter(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.on:
            return
        kwargs = dict(kwargs)
        if args:
            features, args = args[0], args[1:]
        else:
            features = kwargs.pop("hidden_states", None)
        if self.stem is None:
            self.stem = features
        self.calls[index] = Call(args, kwargs)

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self.on:
            self.outputs[name] = tensor_of(output)

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
    What a forward pass of one sample told.

    Args:
        shapes (`dict`): shape of the features of each layer, maps as `[1, C, H, W]`.
        channels_last (`set[str]`): layers whose maps are `[1, H, W, C]`.
        preserving (`set[str]`): layers that return features of the shape that they get.
        num_classes (`int`): width of the logits.
        pooled (`bool`): whether there is one prediction a sample, and not one a position.
    """

    shapes: dict[str, tuple[int, ...]]
    channels_last: set[str]
    preserving: set[str]
    num_classes: int
    pooled: bool

    def width(self, name: str) -> int:
        """Channels of the features of a layer."""
        shape = self.shapes[name]
        return shape[1] if len(shape) == 4 else shape[-1]


@torch.no_grad()
def measure(model: nn.Module, names: list[str], others: list[str], inputs: dict[str, Any]) -> Layout:
    """
    Run a model on a sample, in evaluation mode, to see its features.

    Raises:
        ValueError: if it cannot be run on these inputs.
    """
    recorder = Recorder(names, others)
    recorder.register(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    recorder.start()
    try:
        outputs = model(**inputs)
    except Exception as error:
        shapes = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        raise ValueError(
            f"{type(base_model(model)).__name__} does not run on a sample of {shapes} ({error}): call "
            "attach_auxiliary_heads(model, config, inputs=...) with a batch of yours before you make the trainer."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
        recorder.remove()
    logits = logits_of(outputs, has_loss=False)
    called = [name for name in (*names, *others) if name in recorder.outputs]
    shapes, channels_last, preserving = {}, set(), set()
    previous = recorder.stem
    for name in called:
        features = recorder.outputs[name]
        shape = tuple(features.shape)
        if len(shape) == 4 and shape[1] == shape[2] != shape[3]:
            channels_last.add(name)
            shape = (shape[0], shape[3], shape[1], shape[2])
        if name in names:
            if previous is not None and previous.shape == features.shape:
                preserving.add(name)
            previous = features
        shapes[name] = shape
    return Layout(shapes, channels_last, preserving, logits.shape[-1], logits.dim() == 2)


def choose_layers(
    asked: list[int | str] | str, names: list[str], layout: Layout, model: nn.Module, last: bool = True
) -> list[str]:
    """
    The modules to put heads on, from shallow to deep.

    Args:
        asked (`list` or `"auto"`): as in [`AuxiliaryHeadsConfig`].
        names (`list[str]`): the layers of the model.
        layout ([`Layout`]): what they return.
        model (`nn.Module`): to look up names.
        last (`bool`, *optional*, defaults to `True`): whether `"auto"` may choose the last layer, if it has others.

    Raises:
        ValueError: if one does not exist; the message lists those that do.
    """
    if asked != "auto":
        return [_named(layer, names, model) for layer in asked]
    called = [name for name in names if name in layout.shapes]
    if not called:
        raise ValueError(
            f"layers='auto' found no list of layers in {type(base_model(model)).__name__}: name modules of it."
        )
    ends = _stage_ends(called, [layout.shapes[name] for name in called])
    if ends is None:
        parts = 3 if last else 4
        ends = list(dict.fromkeys(called[-(-len(called) * part // parts) - 1] for part in range(1, 4)))
    return ends if last or ends == called[-1:] else [name for name in ends if name != called[-1]]


def _stage_ends(names: list[str], shapes: list[tuple[int, ...]]) -> list[str] | None:
    """The last layer of each stage of a hierarchical model; `None` if all layers are alike."""
    if len(set(shapes)) == 1:
        return None
    if len(names) <= MANY:
        return names
    sides = [shape[2:] if len(shape) == 4 else shape[1:-1] for shape in shapes]
    return [name for i, name in enumerate(names) if i + 1 == len(names) or sides[i] != sides[i + 1]]


def _named(layer: int | str, names: list[str], model: nn.Module) -> str:
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
