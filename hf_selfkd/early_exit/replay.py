"""Replay: a forward pass is begun anew for some of its samples, and what has been computed is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput


Dim = tuple[int, int]
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """
    What a module returned, with every tensor in it changed.

    Args:
        value: tensors in tuples, lists and dictionaries.
        change (`Callable`): from a tensor to a tensor; they come in a fixed order.

    Raises:
        ValueError: if there is something else in it.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        items = {name: with_tensors(part, change) for name, part in value.items()}
        return type(value)(**items) if isinstance(value, ModelOutput) else items
    if isinstance(value, (tuple, list)):
        parts = [with_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, _PLAIN):
        return value
    raise ValueError(f"a {type(value).__name__}")


@dataclass
class Plan:
    """
    How a forward pass is cut down to some of its samples.

    Args:
        dims (`dict`): by the name of each module whose calls are noted, for each tensor that it returns, the dimension
            that samples have in it and how many places of it each has, one after the other (attention heads may be
            folded in); `None` for a tensor that all samples have in common.
        chain (`set[str]`): those of the modules that nobody but the next of them works on, so that only the last one's
            output has to be kept.
    """

    dims: dict[str, list[Dim | None]]
    chain: set[str] = field(default_factory=set)


@dataclass
class _Call:
    """A call of a module: with its output, if it has returned, else with the calls inside of it."""

    name: str
    inside: list[_Call] = field(default_factory=list)
    done: bool = False
    output: Any = None
    empty: bool = False  # whether the output has its shape only


@dataclass
class _Level:
    """Calls inside of one call, and how many of them have been played."""

    calls: list[_Call]
    played: int = 0


class Tape:
    """
    The calls of some modules in a forward pass. Those that are on the tape are answered from it in their order, the
    others are run, and put on it.

    Args:
        plan ([`Plan`]): which modules, and how their outputs are cut.
    """

    def __init__(self, plan: Plan):
        self.plan, self.paused = plan, False
        self.calls: list[_Call] = []
        self.start()

    def start(self) -> None:
        """Play from the beginning."""
        self.levels = [_Level(self.calls)]

    def call(self, name: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """
        Answer a call of a module.

        Raises:
            ValueError: if the tape has another module in this place.
        """
        if self.paused:
            return forward(*args, **kwargs)
        level = self.levels[-1]
        if level.played == len(level.calls):
            level.calls.append(_Call(name))
        known = level.calls[level.played]
        level.played += 1
        if known.name != name:
            raise ValueError(
                f"early exit: for fewer samples of the batch the model calls {name} where it called {known.name}: run "
                "it on one sample at a time."
            )
        if not known.done:
            self.levels.append(_Level(known.inside))
            known.output = forward(*args, **kwargs)
            known.done, known.inside = True, []
            self.levels.pop()
            self._empty(level.calls[: level.played - 1], name)
        return known.output

    def _empty(self, calls: list[_Call], name: str) -> None:
        """Forget the values that layers before one have returned: only its own are worked on further."""
        if name in self.plan.chain:
            for call in calls:
                if call.name in self.plan.chain and not call.empty:
                    call.output, call.empty = with_tensors(call.output, lambda t: _hollow(t, t.shape)), True

    def keep(self, rows: torch.Tensor, size: int) -> None:
        """
        Cut everything on the tape down to some samples.

        Args:
            rows (`torch.LongTensor`): the samples, by their place in the batch.
            size (`int`): how many there were.

        Raises:
            ValueError: if an output has another number of samples.
        """
        self._keep(self.calls, rows, size)

    def _keep(self, calls: list[_Call], rows: torch.Tensor, size: int) -> None:
        for call in calls:
            if call.done:
                call.output = self._cut(call, rows, size)
            else:
                self._keep(call.inside, rows, size)

    def _cut(self, call: _Call, rows: torch.Tensor, size: int) -> Any:
        dims = iter(self.plan.dims[call.name])

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            place = next(dims, (-1, 1))
            if place is None:
                return tensor
            dim, fold = place
            if not 0 <= dim < tensor.dim() or tensor.shape[dim] != size * fold:
                raise ValueError(
                    f"early exit: {call.name} returned {list(tensor.shape)} for {size} samples, unlike for those that "
                    "it was measured with: run the model on one sample at a time."
                )
            if call.empty:
                return _hollow(tensor, (*tensor.shape[:dim], len(rows) * fold, *tensor.shape[dim + 1 :]))
            own = tensor.unflatten(dim, (size, fold)).index_select(dim, rows.to(tensor.device))
            return own.flatten(dim, dim + 1)

        return with_tensors(call.output, cut)


def _hollow(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros of a shape, which take the memory of one number."""
    return tensor.new_zeros(()).expand(shape)


@contextmanager
def noted(model: nn.Module, tape: Tape) -> Iterator[None]:
    """
    Let a tape answer the calls of its modules. They are as before afterwards, whatever happens.

    Args:
        model (`nn.Module`): that they are in.
        tape ([`Tape`]): of a forward pass.
    """
    before: list[tuple[nn.Module, Any]] = []
    try:
        for name in tape.plan.dims:
            module = model.get_submodule(name)
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = _through(tape, name, module.forward)
        yield
    finally:
        for module, forward in reversed(before):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def _through(tape: Tape, name: str, forward: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        return tape.call(name, forward, args, kwargs)

    return update_wrapper(call, forward)  # some models read signatures
