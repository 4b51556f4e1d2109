"""Losses of many or wide rows, chunk by chunk: nothing but the gradient is as large as the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .soft_targets import CHUNK_ABOVE, chunks


RowFunction = Callable[..., tuple[torch.Tensor, ...]]


def by_chunks(function: RowFunction, logits: torch.Tensor, *of_rows: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """
    What a function says of rows. A few rows are given to the function at once; of many or wide ones the function gets
    a chunk at a time, in the forward and once more in the backward.

    Args:
        function (`Callable`):
            `function(logits, *of_rows)` gives float32 tensors `[R]`, in which no row depends on another one. Only the
            first of them has a gradient.
        logits (`torch.FloatTensor` of shape `[R, C]`): scores.
        *of_rows (`torch.Tensor` with `R` rows, *optional*): what else the function takes; no gradient flows into them.
    """
    if logits.numel() <= CHUNK_ABOVE:
        return function(logits, *of_rows)
    return _ByChunks.apply(function, logits, *of_rows)


def _parts(logits: torch.Tensor, of_rows: tuple) -> Iterator[tuple[slice, list[torch.Tensor | None]]]:
    for part in chunks(logits):
        yield part, [None if rows is None else rows[part] for rows in of_rows]


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, logits, *of_rows):
        results: list[torch.Tensor] = []
        for part, rows in _parts(logits, of_rows):
            values = function(logits[part], *rows)
            results = results or [torch.empty(len(logits), device=logits.device) for _ in values]
            for result, value in zip(results, values, strict=True):
                result[part] = value
        ctx.function = function
        ctx.save_for_backward(logits, *of_rows)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        logits, *of_rows = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part, rows in _parts(logits, tuple(of_rows)):
            leaf = logits[part].detach().requires_grad_()
            with torch.enable_grad():
                value = ctx.function(leaf, *rows)[0]
            (gradient[part],) = torch.autograd.grad(value, leaf, grad[part])
        return None, gradient, *(None for _ in of_rows)
