"""Whether a head sends a gradient into the layers below it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .kinds import Context, Head


NO_GRADIENT = 1e-10  # of the loss of a row, for features of size 1; heads that learn have 1e-5 and more
ROWS = 4  # samples that statistics of a batch are made of: of two they say nothing


def gradient_size(head: Head, features: torch.Tensor, context: Context) -> float:
    """
    The largest gradient of a head's loss for its features, which are replaced by noise of size 1: made-up samples may
    give none. No gradient, statistic of a batch or random number is left behind.

    Args:
        head ([`~hf_selfkd.heads.kinds.Head`]): freshly made.
        features (`torch.FloatTensor`): of the layer that it is on, as the head takes them.
        context ([`~hf_selfkd.heads.kinds.Context`]): of the forward pass that they come from.

    Returns:
        `float`: 0 if the loss does not depend on them, NaN if it is none.
    """
    shape = list(features.shape)
    batch_norms = [module for module in head.modules() if isinstance(module, _BatchNorm)]
    if batch_norms and not any(_holds_tensors((call.args, call.kwargs)) for call in context.calls.values()):
        shape[0] = max(shape[0], ROWS)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(features.device, features.dtype).requires_grad_()
    with torch.enable_grad(), _batch_statistics(batch_norms):
        logits = head(noise, context)[0].float()
        loss = (logits.logsumexp(dim=-1) - logits[..., 0]).sum()
        (gradient,) = torch.autograd.grad(loss, noise, allow_unused=True) if loss.requires_grad else (None,)
    return 0.0 if gradient is None else float(gradient.abs().max())


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, torch.Tensor) or isinstance(value, (list, tuple)) and any(map(_holds_tensors, value))


@contextmanager
def _batch_statistics(modules: list[nn.Module]) -> Iterator[None]:
    """Batch normalisation as in training; the averages that it keeps are put back."""
    kept = [[(buffer, buffer.clone()) for buffer in module.buffers()] for module in modules]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module, buffers, training in zip(modules, kept, modes, strict=True):
            module.training = training
            for buffer, value in buffers:
                buffer.copy_(value)
