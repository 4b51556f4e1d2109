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

from ..models import base_model
from .cross_entropy import cross_entropy_sum
from .progressive import progressive_cross_entropy
from .soft_targets import RowLosses, SoftTargets, distilled_rows, label_entries
from .summary import Summary, summarize


WATCHED_SPREAD = 30.0  # standard deviation of the logits with which a head is compared
# What some configurations do to the logits behind the head, and the values with which they do nothing.
BEHIND_THE_HEAD = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}


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
        ValueError: if its head is none.
    """

    def __init__(self, model: nn.Module):
        base = base_model(model)
        self.head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if type(self.head) is not nn.Linear:
            raise ValueError(
                f"chunked_logits=True needs a language model whose head is an nn.Linear, not "
                f"{type(self.head).__name__} ({type(base).__name__}): set it to False."
            )
        config = getattr(base, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name, neutral in BEHIND_THE_HEAD.items():
            value = getattr(text, name, neutral)
            if value not in (neutral, None):
                raise ValueError(
                    f"chunked_logits=True with {name}={value} of {type(base).__name__}: its logits are scaled or "
                    "capped behind the head, set chunked_logits to False."
                )
        # Marian, BART and their kin add a constant of their own to what the head gives.
        self.constant: torch.Tensor | None = getattr(base, "final_logits_bias", None)
        self.task: ChunkedRows | None = None
        self.hidden: torch.Tensor | None = None
        self.watching = False
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
            if not self.watching:
                return None
            # Logits of some size, which a cap or a scale behind the head would show.
            spread = F.linear(arguments[0].detach()[:, :2], head.weight).float().std().clamp_min(1e-6)
            self.hidden = (arguments[0] * (WATCHED_SPREAD / spread)).detach()
            return (self.hidden,)
        self.hidden = arguments[0]
        return (arguments[0][:, :1],)  # not detached: DDP follows the outputs to find out which parameters are used

    def _learn(self, head: nn.Linear, arguments: tuple, output: Any) -> None:
        if self.task is None:
            return
        task, hidden, self.hidden = self.task, self.hidden.flatten(0, 1), None
        task.total = _LinearRows.apply(hidden, head.weight, head.bias, self.constant, task)

    def check(self, logits: torch.Tensor) -> None:
        """
        Compare the logits `[B, L, V]` of a forward that was watched with those that this class would compute.

        Raises:
            ValueError: if the model does more with them than its head does.
        """
        hidden, self.hidden, self.watching = self.hidden, None, False
        expected, tolerance = None, 1e-3 if logits.dtype == torch.float32 else 3e-2
        if hidden is not None:
            expected = F.linear(hidden[:, :2], self.head.weight, self.head.bias).detach()
            expected = expected if self.constant is None else expected + self.constant
        if expected is None or not torch.allclose(
            expected.float(), logits[:, :2].float(), rtol=tolerance, atol=10 * tolerance
        ):
            raise ValueError(
                "chunked_logits=True: the model's logits are not just what its head makes of the hidden states (they "
                "are scaled or capped): set it to False."
            )


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
    """Sum of the losses of a piece of the rows and its gradient for their logits; notes the parts of each row."""
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
