"""The layers of a model, by name, in the order in which they follow one another."""

from __future__ import annotations

import re

from torch import nn

from ..models import base_model, is_encoder_decoder


_NUMBERED = re.compile(r"(layer|stage|(dense)?block|level)s?_?\d+")  # layer1, layer2, ... of torchvision and timm


def lists_of_layers(model: nn.Module) -> list[dict[str, nn.Module]]:
    """
    What may be the layers of a model in their order, by name: lists of blocks (stages of a CNN or hierarchical model,
    layers of a transformer; of the decoder if there is one), the one with most weights first. Of stages that are lists
    themselves, a list has the blocks: the model calls blocks and not lists.
    """
    base = base_model(model)
    root = base.get_decoder() if is_encoder_decoder(base) and hasattr(base, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is root), "")
    return lists_of_blocks(root, prefix)


def lists_of_blocks(root: nn.Module, prefix: str = "") -> list[dict[str, nn.Module]]:
    """The lists of blocks in a module, whose name is `prefix`, the one with most weights first."""
    found = []
    for name, module in root.named_modules(prefix=prefix):
        blocks = _blocks(module)
        count = sum(p.numel() for block in blocks.values() for p in block.parameters())
        if count:
            found.append((count, {f"{name}.{child}".removeprefix("."): block for child, block in blocks.items()}))
    return [blocks for _, blocks in sorted(found, key=lambda pair: -pair[0])]


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    children = dict(module.named_children())
    listed = isinstance(module, (nn.ModuleList, nn.Sequential))
    if listed and all(list(child.children()) for child in children.values()):
        return _called(children)
    if isinstance(module, nn.ModuleList):
        return {}
    numbered = {name: child for name, child in children.items() if _NUMBERED.fullmatch(name)}
    return numbered if len(numbered) > 1 else {}


def _called(children: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The same modules, and in place of a list, which nobody calls, the modules in it."""
    found = {}
    for name, child in children.items():
        if isinstance(child, nn.ModuleList):
            found |= {f"{name}.{inner}": block for inner, block in _called(dict(child.named_children())).items()}
        else:
            found[name] = child
    return found


def beside(layers: list[str], lists: list[dict[str, nn.Module]]) -> list[str]:
    """
    What stands between the stages, if `layers` are blocks of stages that are lists: the modules of the lists beside
    the list of stages, such as patch embeddings.
    """
    stages = {name.rpartition(".")[0] for name in layers}
    if len(stages) < 2:
        return []
    owner = min(stages, key=len).rpartition(".")[0].rpartition(".")[0]  # which holds the list of stages
    names = [name for blocks in lists for name in blocks]
    return [name for name in names if name not in layers and name.rpartition(".")[0].rpartition(".")[0] == owner]


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
