"""A model's outputs with one field more: which exit has answered."""

from __future__ import annotations

from dataclasses import make_dataclass
from functools import lru_cache
from typing import Any

import torch


@lru_cache
def _with_field(kind: type) -> type:
    """The class of outputs with `exits`; it has no name to be imported by, so objects tell how to be made again."""
    made = make_dataclass(f"{kind.__name__}WithExits", [("exits", torch.Tensor | None, None)], bases=(kind,))
    made.__reduce__ = lambda self: (_made_again, (kind, dict(self)))
    return made


def _made_again(kind: type, values: dict[str, Any]) -> Any:
    return _with_field(kind)(**values)


def with_exits(kind: type, logits: torch.Tensor, exits: torch.Tensor) -> Any:
    """
    Answers in a class of outputs.

    Args:
        kind (`type`): of the model's outputs, or `dict`.
        logits (`torch.FloatTensor` of shape `[B, C]`): the answers.
        exits (`torch.LongTensor` of shape `[B]`): how many layers were run for each.
    """
    values = {"logits": logits, "exits": exits}
    return values if kind is dict else _with_field(kind)(**values)
