"""Weights that FSDP2 keeps in shards, one a process: the shard, the whole of them, a run with other values in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from .models import uncompiled


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """
    The modules of a model whose weights FSDP2 gathers for a pass and shards again; none without FSDP2.

    Args:
        model (`nn.Module`): in one piece, or after `fully_shard`, which shards at least what is in no other module.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    model = uncompiled(model)
    return [part for part in model.modules() if isinstance(part, FSDPModule)] if isinstance(model, FSDPModule) else []


def reshard(model: nn.Module) -> bool:
    """
    Bring all weights back to shards: a pass without a gradient leaves some of them gathered.

    Args:
        model (`nn.Module`): in one piece, or after `fully_shard`.

    Returns:
        `bool`: whether there are shards at all.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.reshard()
    return bool(modules)


@torch.no_grad()
def shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, in the same memory; a tensor in one piece is its own part."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


@torch.no_grad()
def whole(part: torch.Tensor, like: torch.Tensor | None, keeps: bool = True) -> torch.Tensor:
    """
    A tensor of which each process holds a part, in one piece on the CPU. Every process must call this.

    Args:
        part (`torch.Tensor`): what this process holds.
        like (`torch.Tensor`, *optional*): a tensor that is sharded in the same way; else `part` is the whole.
        keeps (`bool`, *optional*, defaults to `True`): `False` gives nothing to a process that has no use for it.
    """
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    full = DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    full = full.full_tensor()
    return full.cpu() if keeps else full.new_empty(0)


@torch.no_grad()
def shard_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """
    The part of a tensor in one piece that belongs to this process. Every process must call this, with the same tensor.

    Args:
        tensor (`torch.Tensor`): whole.
        like (`torch.Tensor`): a tensor of that shape, sharded or not.
    """
    if not hasattr(like, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements).to_local()


def whole_state(model: nn.Module, module: nn.Module, keeps: bool = True) -> dict[str, torch.Tensor]:
    """
    The state of a module of a model that may be sharded, in one piece. Every process must call this.

    Args:
        model (`nn.Module`): the model.
        module (`nn.Module`): a part of the model, whose weights are in the model's shards.
        keeps (`bool`, *optional*, defaults to `True`): as in [`whole`].
    """
    reshard(model)
    return {name: whole(shard(tensor), tensor, keeps) for name, tensor in module.state_dict().items()}


def load_whole_state(model: nn.Module, module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """
    Give a module of a model that may be sharded a state in one piece. Every process must call this, with the same
    state.

    Args:
        model, module (`nn.Module`): as in [`whole_state`].
        state (`dict[str, torch.Tensor]`): what `whole_state` gave.

    Raises:
        RuntimeError: as `nn.Module.load_state_dict`, where names or shapes differ.
    """
    if not reshard(model):
        module.load_state_dict(state)
        return
    own = module.state_dict()
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise RuntimeError(f"{type(module).__name__} has other weights than the state that it is given.")
    for name, tensor in own.items():
        shard(tensor).copy_(shard_of(state[name], tensor))


@contextmanager
def exchanged(model: nn.Module, live: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> Iterator[None]:
    """
    Run a sharded model with other values in its shards, which are exchanged with the model's own and back again.

    Nothing is gathered but what the pass of the model itself gathers, and there is room for one shard more.

    Args:
        model (`nn.Module`): after `fully_shard`.
        live (`dict`): the shards of the model, by name, as [`shard`] gives them.
        others (`dict`): the values to run with, by the same names.
    """
    reshard(model)
    _exchange(live, others)
    try:
        yield
    finally:
        reshard(model)  # or what is gathered of the others would be taken for the model's own
        _exchange(live, others)


@torch.no_grad()
def _exchange(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    for name, other in others.items():
        held = ones[name].clone()
        ones[name].copy_(other)
        other.copy_(held)
