"""
The loss of a language model without its logits: hidden states go through the head and the loss chunk by chunk.

The logits `[tokens, vocabulary]` are the largest tensor of a training step. Here the loss is computed where the head
stands, inside the model's own forward, from what goes into the head; the model gets logits of one position only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models import base_model, class_of, guard_hooks
from .cross_entropy import cross_entropy_sum
from .progressive import progressive_cross_entropy
from .soft_targets import RowLosses, SoftTargets, distilled_rows, label_entries
from .summary import Summary, summarize


@dataclass
class ChunkedRows:
    """What a forward is to learn from: labels `[R]`, past rows and their weight; entries to find for the history."""

    labels: torch.Tensor
    soft_targets: SoftTargets | None
    alpha: float
    temperature: float
    top_k: int | None
    total: torch.Tensor | None = None  # the results: sum of the losses, with a gradient
    losses: RowLosses | None = None  # of each row; `total` in it is not used
    summary: Summary | None = None


class ChunkedHead:
    """
    Takes the place of a model's head while [`ChunkedRows`] are set.

    Args:
        model (`nn.Module`): a language model whose head is an `nn.Linear`.

    Raises:
        ValueError: if its head is none, or its configuration says that the logits are scaled or capped behind it.
    """

    def __init__(self, model: nn.Module):
        base = base_model(model)
        self.head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if self.head is None or class_of(self.head) is not nn.Linear:
            raise ValueError(
                f"chunked_logits=True needs a language model whose head is an nn.Linear, not "
                f"{type(self.head).__name__} ({type(base).__name__}): set it to False."
            )
        changes = changes_of_logits(base)
        if changes:
            raise ValueError(
                f"chunked_logits=True: {type(base).__name__} scales or caps what its head gives "
                f"({', '.join(f'{name}={value}' for name, value in changes.items())}): set chunked_logits=False."
            )
        # Marian, BART and their kin add a constant of their own to what the head gives.
        self.constant: torch.Tensor | None = getattr(base, "final_logits_bias", None)
        self.task: ChunkedRows | None = None
        self.hidden: torch.Tensor | None = None
        self.watching = False  # whether the next forward is one to be checked
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the head then: what it is given, what it gives
        guard_hooks()
        self.handles = [
            self.head.register_forward_pre_hook(self._narrow),
            self.head.register_forward_hook(self._learn),
        ]

    def remove(self) -> None:
        """Give the head back."""
        for handle in self.handles:
            handle.remove()

    def _narrow(self, head: nn.Linear, arguments: tuple) -> tuple | None:
        if self.task is None:
            return None
        self.hidden = arguments[0]
        return (arguments[0][:, :1],)  # not detached: DDP follows the outputs to find out which parameters are used

    def _learn(self, head: nn.Linear, arguments: tuple, output: Any) -> Any:
        if self.task is None and self.watching:
            self.calls.append((arguments[0].detach()[:, :2], output.detach()[:, :2]))
            return known_logits(output, output.dtype)
        if self.task is None:
            return None
        task, hidden, self.hidden = self.task, self.hidden.flatten(0, 1), None
        task.total = _LinearRows.apply(hidden, head.weight, head.bias, self.constant, task)
        return None

    def check(self, logits: torch.Tensor) -> None:
        """
        Compare the logits `[B, L, V]` of a forward that was watched with those that this class would compute.

        In that forward the head gave numbers of all sizes in place of its own, so that a cap or a scale shows,
        however small the logits of an untrained model are.

        Raises:
            ValueError: if the model does more with them than its head does.
        """
        calls, self.calls, self.watching = self.calls, [], False
        same = len(calls) == 1 and calls[0][1].dim() == 3
        if same:
            hidden, given = calls[0]
            hidden = hidden.to(self.head.weight.dtype)  # autocast has been left
            same = _close(F.linear(hidden, self.head.weight, self.head.bias), given, float(given.abs().max()))
            expected = known_logits(logits, given.dtype)
            expected = expected if self.constant is None else expected + self.constant
            same = same and _close(expected, logits, 0.0)
        if not same:
            raise ValueError(
                "chunked_logits=True: the model's logits are not just what its head makes of the hidden states (they "
                "are scaled or capped): set it to False."
            )


# What models call a factor or a bound of their logits, and the values that change nothing.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def changes_of_logits(model: nn.Module) -> dict[str, Any]:
    """What a model's configuration says that it does with the logits behind its head, by the name of the field."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {name: getattr(config, name, None) for name in (*_SCALES, *_CAPS)}
    return {name: value for name, value in found.items() if value not in ((None, 1) if name in _SCALES else (None,))}


def known_logits(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Numbers of both signs and of sizes from 0.01 to 30, the same at each position: large enough for caps and scales to
    show, small enough for the terms that a model adds to its loss to show, too.
    """
    places = torch.arange(like.shape[-1], device=like.device)
    sizes = 0.01 * 3000 ** (places * 0.618 % 1)
    return torch.where(places % 2 == 0, sizes, -sizes).to(dtype).expand(like.shape).clone()


def _close(one: torch.Tensor, other: torch.Tensor, size: float) -> bool:
    """Whether two tensors are equal up to rounding, of each number or of numbers of that size."""
    if one.shape != other.shape:
        return False
    rounding = 2 * max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps, 1e-5)
    return torch.allclose(one.float(), other.float(), rtol=rounding, atol=rounding * size)


def rows_per_chunk(weight: torch.Tensor) -> int:
    """How many rows go through a head `[V, d]` at a time: enough for an efficient product, few enough to be small."""
    return max(1, (2**26 if weight.is_cuda else 2**23) // len(weight))


class _LinearRows(torch.autograd.Function):
    """Sum of the losses of rows, from their hidden states `[R, d]`; the gradients are made along with it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, constant, task):
        rows, device = len(hidden), hidden.device
        size = rows_per_chunk(weight)
        hard, soft, log_norm = (torch.zeros(rows, device=device) for _ in range(3))
        top = index = None
        if task.top_k is not None:
            top = torch.empty(rows, task.top_k, device=device)
            index = torch.empty(rows, task.top_k, dtype=torch.int64, device=device)
        total = torch.zeros((), device=device)
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, rows, size):
            part = slice(start, start + size)
            logits = F.linear(hidden[part], weight, bias)
            logits = logits if constant is None else logits + constant
            summary = summarize(logits, task.top_k)
            log_norm[part] = summary.log_norm
            if top is not None:
                top[part], index[part] = summary.top, summary.index
            loss, gradient = _chunk_loss(logits, task, part, summary, hard, soft)
            total += loss
            of_hidden[part] = gradient @ weight.to(gradient.dtype)
            if of_weight.dtype == gradient.dtype == hidden.dtype:
                of_weight.addmm_(gradient.T, hidden[part])
            else:
                of_weight += gradient.T @ hidden[part].to(gradient.dtype)
            if of_bias is not None:
                of_bias += gradient.sum(0)
        distilled = None if task.soft_targets is None else distilled_rows(task.soft_targets, task.labels)
        task.losses, task.summary = RowLosses(hard, hard, soft, distilled), Summary(log_norm, top, index)
        ctx.save_for_backward(of_hidden, of_weight.to(weight.dtype), None if bias is None else of_bias.to(bias.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        return of_hidden * grad, of_weight * grad, None if of_bias is None else of_bias * grad, None, None


def _chunk_loss(
    logits: torch.Tensor, task: ChunkedRows, part: slice, summary: Summary, hard: torch.Tensor, soft: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of a chunk of the rows and its gradient for their logits; notes the terms of each row."""
    leaf, labels = logits.detach().requires_grad_(), task.labels[part]
    with torch.enable_grad():
        if task.soft_targets is None:
            loss = cross_entropy_sum(leaf, labels)
            hard[part] = summary.log_norm - label_entries(logits, labels).float()
        else:
            soft_targets = task.soft_targets.select(part)
            known = None if soft_targets.index is None else summary.log_norm
            losses = progressive_cross_entropy(leaf, labels, soft_targets, task.alpha, task.temperature, known)
            hard[part], soft[part] = losses.hard, losses.soft
            loss = losses.total.sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
