"""What the layers of a model return, and which of them heads are put on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import base_model, evaluating, logits_of
from .layers import beside, lists_of_blocks, lists_of_layers, named
from .taps import Recorder


_PADDING = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")  # Longformer and its kin
MANY = 6  # layers from which on those of a CNN are its blocks and not its stages


@dataclass
class Layout:
    """
    What a forward pass of a small batch told.

    Args:
        layers (`list[str]`): the layers of the model.
        chain (`list[str]`): the same and what stands between them, in the order of their calls.
        shapes (`dict`): shape of the features of each module, in the order of their calls; maps as `[B, C, H, W]`.
        channels_last (`set[str]`): modules whose maps are `[B, H, W, C]`.
        preserving (`set[str]`): layers that return features of the shape that they get.
        counts (`dict`): how often each module was called.
        chained (`bool`): whether each layer works on what the one before it returned.
        num_classes (`int`): width of the logits.
        length (`int`, *optional*): predictions a sample, one a position; `None` if there is one a sample.
        pads (`bool`, *optional*): whether the model pads samples behind, to whole windows of its attention.
    """

    layers: list[str]
    chain: list[str]
    shapes: dict[str, tuple[int, ...]]
    channels_last: set[str]
    preserving: set[str]
    counts: dict[str, int]
    chained: bool
    num_classes: int
    length: int | None
    pads: bool = False

    @property
    def pooled(self) -> bool:
        """`bool`: whether there is one prediction a sample, and not one a position."""
        return self.length is None

    @property
    def deepest(self) -> str | None:
        """`str`: the last of the layers that was called and has features of each position, if there is one."""
        called = [name for name in self.layers if name in self.shapes]
        return next((name for name in reversed(called) if self.keeps_positions(name)), None)

    def keeps_positions(self, name: str) -> bool:
        """Whether a layer has features of each position that is predicted for; the later ones of Funnel have not."""
        shape = self.shapes[name]
        return self.length is None or len(shape) != 3 or shape[1] >= self.length

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
    called_once = [name for name in recorder.outputs if recorder.counts[name] == 1]
    # The largest list whose blocks are called: some lists hold lists.
    called = [[name for name in blocks if name in recorder.outputs] for blocks in lists]
    layers = next(
        (list(blocks) for blocks, some in zip(lists, called, strict=True) if 2 * len(some) > len(blocks)), []
    )
    between = beside(layers, lists)
    chain = [name for name in called_once if name in layers or name in between] if between else layers
    outputs, recorder = _watch(model, chain, [name for name in others if name not in chain], inputs)
    logits = logits_of(outputs, has_loss=False)
    length = None if logits.dim() == 2 else logits.shape[1]
    layout = Layout(layers, chain, {}, set(), set(), dict(recorder.counts), True, logits.shape[-1], length)
    layout.pads = any(hasattr(module, name) for module in base_model(model).modules() for name in _PADDING)
    images = inputs.get("pixel_values")
    ratio = images.shape[-2] / images.shape[-1] if images is not None else 1.0
    previous = recorder.stem
    shapes = {name: tuple(features.shape) for name, features in recorder.outputs.items()}
    layout.channels_last = _channels_last(shapes, ratio)
    for name, features in recorder.outputs.items():
        shape = shapes[name]
        if name in layout.channels_last:
            shape = (shape[0], shape[3], shape[1], shape[2])
        if name in chain:
            if previous is not None and previous.shape == features.shape:
                layout.preserving.add(name)
            previous = features
        layout.shapes[name] = shape
    alike = len({layout.shapes[name] for name in layers if name in layout.shapes}) == 1
    layout.chained = not alike or 2 * recorder.chained >= len(layers) - 1  # stages may be reshaped in between
    return layout


def _channels_last(shapes: dict[str, tuple[int, ...]], ratio: float) -> set[str]:
    """Which maps are `[B, H, W, C]`: height and width of the images (`ratio`) tell; of cubes, the other maps do."""
    first, last, unclear = set(), set(), set()
    for name, shape in shapes.items():
        if len(shape) == 4:
            away_last, away_first = abs(shape[1] / shape[2] - ratio), abs(shape[2] / shape[3] - ratio)
            (unclear if away_last == away_first else last if away_last < away_first else first).add(name)
    return last | unclear if len(last) > len(first) else last


def _watch(model: nn.Module, names: list[str], others: list[str], inputs: dict[str, Any]) -> tuple[Any, Recorder]:
    recorder = Recorder(names, others)
    try:
        recorder.register(model)
        recorder.start()
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
        asked (`list`, `"auto"` or `"all"`): as in [`AuxiliaryHeadsConfig`].
        layout ([`Layout`]): of the model.
        model (`nn.Module`): to look up names.
        last (`bool`, *optional*, defaults to `True`):
            Whether `"auto"` and `"all"` may choose the last layer, if there are others.

    Raises:
        ValueError: if one does not exist (the message lists those that do), is not called, is called several times, or
            does not keep samples apart.
    """
    kind, names = type(base_model(model)).__name__, layout.layers
    if asked in ("auto", "all"):
        called = [name for name in names if name in layout.shapes]
        if not called or not layout.chained:
            raise ValueError(
                f"layers={asked!r} found no layers in {kind} that follow one another: name modules of it in "
                "layers=[...]."
            )
        fitting = [name for name in called if layout.keeps_positions(name)] or called
        if asked == "auto":
            chosen = _evenly(fitting, layout, last, model)
        else:
            chosen = fitting if last or fitting == called[-1:] else [name for name in fitting if name != called[-1]]
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


def _evenly(called: list[str], layout: Layout, last: bool, model: nn.Module) -> list[str]:
    ends = _stage_ends(called, [layout.shapes[name] for name in called], model)
    if ends is None:
        parts = 3 if last else 4
        ends = list(dict.fromkeys(called[-(-len(called) * part // parts) - 1] for part in range(1, 4)))
    return ends if last or ends == called[-1:] else [name for name in ends if name != called[-1]]


def _stage_ends(names: list[str], shapes: list[tuple[int, ...]], model: nn.Module) -> list[str] | None:
    """The last layer of each stage of a hierarchical model; `None` if all layers are alike."""
    stages: list[Any] = [name.rpartition(".")[0] for name in names]  # the list that a layer stands in
    if len(set(stages)) == 1:
        if len(set(shapes)) == 1:
            return None
        if len(names) <= MANY and any(lists_of_blocks(model.get_submodule(name)) for name in names):
            return names
        # The names are blocks: a stage is a resolution, or a shape where there are few blocks.
        stages = shapes if len(names) <= MANY else [shape[2:] if len(shape) == 4 else shape[1:-1] for shape in shapes]
    return [name for i, name in enumerate(names) if i + 1 == len(names) or stages[i] != stages[i + 1]]
