"""A plan by which batches are cut down at exits, tried out before it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..heads.auxiliary import heads_of
from ..models import base_model
from .measured import close, replayable, rows_of, sample_dims
from .passing import ExitPass, at_full_depth
from .replay import Plan


MOST_ROWS = 16  # samples that a plan is tried out on


def make_plan(model: nn.Module, heads: list[int], inputs: dict[str, Any], per_sample: set[str], size: int) -> Plan:
    """
    How to cut batches with the inputs of one.

    The plan is tried out on samples each of which leaves at another exit: the answers have to be those of a run at
    full depth. First, that nobody needs the outputs of earlier layers is tried, too.

    Args:
        model (`nn.Module`): with heads, in evaluation mode.
        heads (`list[int]`): the indices of the heads that are exits.
        inputs (`dict`): a small batch; its samples are repeated where more are needed.
        per_sample (`set[str]`): those of the inputs that have the samples in their first dimension.
        size (`int`): how many samples there are.

    Raises:
        ValueError: if the model does not run on several samples, or does not keep them apart.
    """
    kind, own = type(base_model(model)).__name__, heads_of(model)
    count = max(3, min(len(heads) + 1, MOST_ROWS))
    batch = rows_of(inputs, per_sample, [row % size for row in range(count)])
    try:
        expected = at_full_depth(model, heads, batch)
    except Exception as error:
        raise ValueError(
            f"early exit: {kind} does not run on {count} samples of {_shapes(batch)} at once ({_first_line(error)}): "
            "see to that, or give EarlyExit inputs=..., a small batch."
        ) from error
    names = replayable(model, [own.names[index] for index in heads], rows_of(batch, per_sample, [0, 1]))
    dims = sample_dims(model, names, batch, per_sample)
    told = "the answers are not those of a run at full depth"
    for chain in (set(own.layout.chain) & set(dims), set()):
        plan = Plan(dims, chain)
        try:
            if _agrees(model, heads, plan, batch, per_sample, expected):
                return plan
        except Exception as error:  # noqa: BLE001 - told below
            told = _first_line(error)
    raise ValueError(f"early exit: batches of {kind} cannot be cut safely ({told}): run it on one sample at a time.")


def _agrees(
    model: nn.Module,
    heads: list[int],
    plan: Plan,
    batch: dict[str, Any],
    per_sample: set[str],
    expected: list[torch.Tensor],
) -> bool:
    """Whether samples get the answers that the exits they leave at give them at full depth."""
    count, last = len(expected[0]), len(heads)
    leave_at = torch.tensor([row * last // (count - 1) for row in range(count)], device=expected[0].device)
    tried = ExitPass(model, heads, [1.0] * (last + 1), plan)

    def decide(place: int, logits: torch.Tensor) -> torch.Tensor:
        return (leave_at[tried.active] > place).nonzero().squeeze(1)

    tried.run(batch, per_sample, count, decide)
    answers = torch.stack([expected[int(place)][row] for row, place in enumerate(leave_at)])
    return torch.equal(tried.places, leave_at) and close(tried.logits, answers)


def _shapes(batch: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
