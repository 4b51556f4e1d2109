"""The architecture of a model with fewer layers: its configuration, and which of the modules are whose."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models import evaluating, is_encoder_decoder
from .taps import tensor_of


# Of backbones: they are made anew from the number of stages.
_DERIVED = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
_REMEDY = "choose head='conv' (images), 'mlp' or 'linear', which can be trained and used, but not exported"


@dataclass
class CallOrder:
    """
    In which order a model calls its modules.

    Args:
        ends (`dict[str, int]`): when each module returned for the last time before what follows the layers began.
        tail (`set[str]`): modules that are called after the last layer; their owners are called before.
        tuples (`set[str]`): modules that return a tuple.
        sources (`dict[str, set[str]]`): of each layer, the modules that returned the very features that it works on.
    """

    ends: dict[str, int] = field(default_factory=dict)
    tail: set[str] = field(default_factory=set)
    tuples: set[str] = field(default_factory=set)
    sources: dict[str, set[str]] = field(default_factory=dict)


def call_order(model: nn.Module, layers: list[str], inputs: dict[str, Any]) -> CallOrder:
    """
    Run a model once, to see what it calls after its last layer.

    Args:
        model (`nn.Module`): the bare model.
        layers (`list[str]`): its layers.
        inputs (`dict`): a small batch.
    """
    events: list[tuple[str, bool]] = []
    handles, tuples, sources = [], set(), {}
    returned: dict[str, torch.Tensor | None] = {}

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        events.append((name, True))
        if name in layers:
            features = tensor_of(args) if args else kwargs.get("hidden_states")
            sources[name] = {other for other, value in returned.items() if value is not None and value is features}

    def leave(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        events.append((name, False))
        returned[name] = tensor_of(output)
        if isinstance(output, tuple):
            tuples.add(name)

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(leave, name)))
    try:
        with evaluating(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    last = max((place for place, (name, begins) in enumerate(events) if not begins and name in layers), default=-1)
    ends = {name: place for place, (name, begins) in enumerate(events[: last + 1]) if not begins}
    return CallOrder(ends, {name for name, begins in events[last + 1 :] if begins}, tuples, sources)


def build_empty(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class and another configuration, without memory for its weights."""
    with torch.device("meta"):
        return type(model)(config)


def truncated_config(
    model: PreTrainedModel, layers: list[str], count: int, tail: set[str]
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """
    The configuration of a model that keeps the first layers only, and an empty model of it.

    Which field says the number of layers, or of stages, is found out: a field that has this number is changed, and the
    model that comes out has to lack these layers and nothing else.

    Args:
        model ([`~transformers.PreTrainedModel`]): the bare model.
        layers (`list[str]`): the names of its layers, or stages.
        count (`int`): how many are kept.
        tail (`set[str]`): what follows the layers; these modules may be of another width.

    Raises:
        ValueError: if no field says so.
    """
    shapes = plain_shapes(model)
    for config in _candidates(model.config, len(layers), count, is_encoder_decoder(model)):
        try:
            made = build_empty(model, config)
        except Exception:  # a combination that the class refuses
            continue
        if _keeps(made, shapes, layers, count, tail):
            return config, made
    raise ValueError(
        f"head='native': no field of {type(model.config).__name__} says that {type(model).__name__} has "
        f"{count} instead of {len(layers)} layers ({layers[0]} to {layers[-1]}): {_REMEDY}."
    )


def check_configured(model: nn.Module) -> None:
    """
    Raises:
        ValueError: if a model is not what a configuration of transformers says, so that none can say what an exit is.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"head='native' needs a model of transformers, and {type(model).__name__} is none: {_REMEDY}."
        )
    shapes = plain_shapes(model)
    told = plain_shapes(build_empty(model, model.config))
    differing = next((name for name in [*shapes, *told] if shapes.get(name) != told.get(name)), None)
    if differing is not None:
        raise ValueError(
            f"head='native': {type(model).__name__} was changed after it had been made of its configuration "
            f"({differing} is not what that says), and an exit is saved as a configuration: {_REMEDY}."
        )


def _keeps(
    made: PreTrainedModel, shapes: dict[str, torch.Size], layers: list[str], count: int, tail: set[str]
) -> bool:
    """Whether a model has the first layers, none of the others, and all else as it was."""
    names = {name for name, _ in made.named_modules()}
    if not names.issuperset(layers[:count]) or not names.isdisjoint(layers[count:]):
        return False
    kept = made.state_dict()
    same = all(shapes.get(name) == tensor.shape or is_inside(name, tail) for name, tensor in kept.items())
    lost = [name for name in shapes.keys() - kept.keys() if not is_inside(name, set(layers))]
    # What is lost outside of the layers belongs to those that are lost, as norms of stages do; never to the tail.
    return same and not any(is_inside(name, tail) for name in lost)


def is_inside(name: str, modules: set[str]) -> bool:
    """Whether a name is that of one of some modules, or of something in it."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _candidates(config: PreTrainedConfig, whole: int, count: int, decoder: bool) -> Iterator[PreTrainedConfig]:
    """Configurations in which one number of layers is another, the likely ones first."""
    parts = [("", config)] + [
        (name, value) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)
    ]
    for name, part in parts:
        lists = [key for key, value in _fields(part) if isinstance(value, (list, tuple)) and len(value) == whole]
        numbers = [key for key, value in _fields(part) if type(value) is int and value == whole]
        numbers.sort(key=lambda key: ("decoder" in key) != decoder)
        numbers.sort(key=lambda key: not ("layer" in key or "stage" in key or "block" in key))
        for chosen in [*([key] for key in numbers), [], numbers]:
            try:
                yield _changed(config, name, lists, chosen, count)
            except Exception:  # noqa: BLE001, PERF203 - a combination that the class refuses
                continue


def _fields(config: PreTrainedConfig) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in vars(config).items() if not key.startswith("_")]


def _changed(
    config: PreTrainedConfig, part: str, lists: list[str], numbers: list[str], count: int
) -> PreTrainedConfig:
    content = copy.deepcopy(config.to_dict())
    inner = content[part] if part else content
    inner |= {key: list(inner[key])[:count] for key in lists if inner.get(key) is not None}
    inner |= dict.fromkeys(numbers, count)
    for key in _DERIVED:
        inner.pop(key, None)
    made = type(config)(**content)
    made._attn_implementation = config._attn_implementation
    return made


def plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state, by the names that it has without PEFT: no adapters, and the copies that PEFT trains."""
    inner = {}
    for name, part in module.named_modules():
        if hasattr(part, "get_base_layer"):
            inner[name] = "base_layer."
        elif hasattr(part, "original_module"):
            inner[name] = next((f"modules_to_save.{key}." for key in part.modules_to_save), "original_module.")
    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        owner = next((wrapper for wrapper in inner if is_inside(name, {wrapper}) or not wrapper), None)
        if owner is None:
            found[name] = tensor
            continue
        prefix = f"{owner}." if owner else ""
        rest = name.removeprefix(prefix)
        if rest.startswith(inner[owner]):
            found[prefix + rest.removeprefix(inner[owner])] = tensor
    return found


def plain_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of [`plain_tensors`]."""
    return {name: tensor.shape for name, tensor in plain_tensors(module).items()}


def shared_modules(made: nn.Module, model: nn.Module, tail: set[str]) -> list[str]:
    """
    The largest modules of a truncated model that the whole model has in the same form; not the tail and its owners.

    Args:
        made (`nn.Module`): the truncated model.
        model (`nn.Module`): the whole one.
        tail (`set[str]`): see [`CallOrder`].
    """
    theirs, found = dict(model.named_modules(remove_duplicate=False)), []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in tail:
                continue
            owner = any(other.startswith(f"{full}.") for other in tail)
            listed = isinstance(child, (nn.ModuleList, nn.ModuleDict))  # which nobody calls
            if not owner and not listed and full in theirs and plain_shapes(child) == plain_shapes(theirs[full]):
                found.append(full)
            else:
                visit(child, f"{full}.")

    visit(made, "")
    return found


def top_modules(names: set[str]) -> list[str]:
    """Those of some modules that are inside none of the others."""
    return sorted(name for name in names if not is_inside(name.rpartition(".")[0], names))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
