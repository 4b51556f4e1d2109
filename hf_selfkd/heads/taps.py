"""Taps: what the layers of a model are called with and what they return in a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..models import guard_hooks


def tensor_of(output: Any) -> torch.Tensor | None:
    """The features among what a layer returns: the first tensor, if any."""
    if isinstance(output, torch.Tensor):
        return output
    if not isinstance(output, (dict, list, tuple)):
        return None
    found = (tensor_of(value) for value in (output.values() if isinstance(output, dict) else output))
    return next((value for value in found if value is not None), None)


def remove_taps(module: nn.Module) -> None:
    """Take the hooks of any [`Recorder`] off a module."""
    for hooks, marked in (
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
        (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
    ):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(getattr(hook, "func", None), "__self__", None), Recorder):
                del hooks[key]
                for marks in marked:
                    marks.pop(key, None)


@dataclass
class Call:
    """
    What a layer was called with, besides the features that it works on.

    Args:
        args (`tuple`, *optional*): by position.
        kwargs (`dict`, *optional*): by name.
        grid (`tuple`, *optional*): height and width of the features, if they were maps `[B, C, H, W]`.
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None

    def to(self, device: torch.device) -> Call:
        """The same with all tensors on a device."""
        return Call(_moved(self.args, device), _moved(self.kwargs, device), self.grid)

    def repeat(self, layer: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """Call another layer the same way, with other features; it gets no cache, which belongs to the first."""
        args = [None if isinstance(value, Cache) else value for value in self.args]
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in self.kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        if self.grid is not None and features.dim() == 3 and features.shape[1] == self.grid[0] * self.grid[1]:
            # The stage before returns a sequence, of which the model makes a map (PVTv2).
            features = features.transpose(1, 2).unflatten(-1, self.grid)
        return tensor_of(layer(features, *args, **kwargs))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return {name: _moved(item, device) for name, item in value.items()} if type(value) is dict else value


class Recorder:
    """
    Notes what layers are called with and what they return, while it is on.

    Args:
        names (`list[str]`): all layers, in their order.
        others (`list[str]`): further modules to listen to.
        replayed (`Iterable[str]`, *optional*): modules of which everything that they return is kept, in `replay`.
    """

    def __init__(self, names: list[str], others: list[str], replayed: Iterable[str] = ()):
        self.names, self.others, self.replayed = names, others, list(replayed)
        self.handles: list[Any] = []
        self.clear()

    def register(self, model: nn.Module) -> None:
        """Listen to the modules of a model."""
        guard_hooks()
        for index, name in enumerate(self.names):
            module = model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True))
            self.handles.append(module.register_forward_hook(partial(self._leave, name)))
        for name in self.others:
            self.handles.append(model.get_submodule(name).register_forward_hook(partial(self._leave, name)))
        for name in self.replayed:
            self.handles.append(model.get_submodule(name).register_forward_hook(partial(self._keep, name)))

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
        self.replay: dict[str, Any] = {}
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
        shape = getattr(tensor_of(features), "shape", ())
        self.calls[index] = Call(args, kwargs, tuple(shape[2:]) if len(shape) == 4 else None)

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        features = tensor_of(output) if self.on else None
        if features is None:
            return
        self.outputs[name] = features
        self.counts[name] += 1
        kind = features.device.type
        if torch.is_autocast_enabled(kind):  # which is over when the model's forward is
            self.autocast = kind, torch.get_autocast_dtype(kind)

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self.on:
            self.replay[name] = output

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
