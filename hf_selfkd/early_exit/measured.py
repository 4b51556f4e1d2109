"""What early exits need to know of a model, found out by running it on batches of two sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models import base_model, logits_of
from .replay import Dim, with_tensors


_UNCLEAR = (-1, 0)  # where nobody knows


def samples_in(model: nn.Module, inputs: dict[str, Any]) -> tuple[set[str], int]:
    """
    Which inputs have the samples in their first dimension, and how many samples there are.

    Args:
        model (`nn.Module`): that they are for.
        inputs (`dict`): a batch.

    Raises:
        ValueError: if there is no tensor, or something that holds tensors.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim()}
    odd = next((name for name, value in inputs.items() if isinstance(value, (dict, list, tuple))), None)
    if odd is not None:
        raise ValueError(f"{odd} is a {type(inputs[odd]).__name__}: early exit takes tensors; convert it.")
    if not tensors:
        raise ValueError("early exit: the batch holds no tensor: pass the inputs of the model by name.")
    main = tensors.get(getattr(base_model(model), "main_input_name", None), next(iter(tensors.values())))
    return {name for name, value in tensors.items() if len(value) == len(main)}, len(main)


def rows_of(inputs: dict[str, Any], per_sample: set[str], rows: list[int]) -> dict[str, Any]:
    """Some samples of a batch, in this order."""
    return {
        name: value[torch.tensor(rows, device=value.device)] if name in per_sample else value
        for name, value in inputs.items()
    }


def replayable(model: nn.Module, exits: list[str], inputs: dict[str, Any]) -> list[str]:
    """
    The largest modules that have returned when an exit is reached: together they have done all the work before it.

    Args:
        model (`nn.Module`): in evaluation mode.
        exits (`list[str]`): modules.
        inputs (`dict`): a small batch.
    """
    open_calls: list[tuple[str, list[str]]] = [("", [])]  # calls that have not returned, with those in them that have
    found: dict[str, None] = {}
    handles = []

    def enter(name: str, module: nn.Module, args: tuple) -> None:
        open_calls.append((name, []))

    def leave(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        open_calls.pop()
        open_calls[-1][1].append(name)
        if name in exits:
            found.update(dict.fromkeys(done for _, inside in open_calls for done in inside))

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles.append(module.register_forward_hook(partial(leave, name)))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


def _noted(model: nn.Module, names: list[str], inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, list[Any]]]:
    """Logits, and all that some modules return, a list a call of tensors and a description of the rest."""
    found: dict[str, list[Any]] = {name: [] for name in names}

    def note(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        tensors: list[torch.Tensor] = []
        try:
            rest = with_tensors(output, lambda tensor: tensors.append(tensor))
        except ValueError as error:
            raise ValueError(
                f"early exit: {name} of {type(base_model(model)).__name__} returns {error}, of which nobody knows "
                "what belongs to which sample: put heads on other layers."
            ) from None
        found[name].append(([tuple(tensor.shape) for tensor in tensors], repr(rest)))

    handles = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    try:
        return logits_of(model(**inputs), has_loss=False), found
    finally:
        for handle in handles:
            handle.remove()


def sample_dims(
    model: nn.Module, names: list[str], inputs: dict[str, Any], per_sample: set[str]
) -> dict[str, list[Dim | None]]:
    """
    In which dimension of what modules return the samples are, see [`~hf_selfkd.early_exit.replay.Plan`].

    Args:
        model (`nn.Module`): in evaluation mode.
        names (`list[str]`): of the modules.
        inputs (`dict`): a batch of at least 3 samples, of which 2 and 3 are run.
        per_sample (`set[str]`): the inputs that have the samples in their first dimension.

    Raises:
        ValueError: if something cannot be cut, or the model says of a sample what depends on the others.
    """
    kind = type(base_model(model)).__name__
    few, two = _noted(model, names, rows_of(inputs, per_sample, [0, 1]))
    more, three = _noted(model, names, rows_of(inputs, per_sample, [0, 1, 2]))
    if not close(few, more[:2]):
        raise ValueError(
            f"early exit: {kind} says something else of a sample when there are others in the batch: run it on one "
            "sample at a time."
        )
    found = {}
    for name in names:
        calls = [list(_dims(*pair)) for pair in zip(two[name], three[name], strict=False)]
        if len(two[name]) != len(three[name]) or any(dims != calls[0] for dims in calls) or _UNCLEAR in calls[0]:
            shapes = [[list(shape) for shape in call[0]] for call in two[name]]
            raise ValueError(
                f"early exit: nobody knows which part of what {name} of {kind} returns, of shape {shapes} for 2 "
                "samples, belongs to which: put heads on other layers."
            )
        found[name] = calls[0]
    return found


def _dims(two: tuple[list[tuple], str], three: tuple[list[tuple], str]) -> Iterator[Dim | None]:
    """The dimension of each tensor that is `2 * n` for 2 samples and `3 * n` for 3, and `n`."""
    if two[1] != three[1] or len(two[0]) != len(three[0]):
        yield _UNCLEAR
        return
    for small, large in zip(two[0], three[0], strict=True):
        if len(small) != len(large):
            yield _UNCLEAR
            continue
        places = [(place, b - a) for place, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
        fits = len(places) == 1 and places[0][1] > 0 and small[places[0][0]] == 2 * places[0][1]
        yield None if not places else places[0] if fits else _UNCLEAR


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    tolerance = 1e-4 if min(torch.finfo(part.dtype).bits for part in (found, expected)) >= 32 else 5e-2
    found, expected = found.float(), expected.float()
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    )
