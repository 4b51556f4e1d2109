"""What loss and history need of rows that are too wide to be kept: log-normalizers and largest entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .soft_targets import chunks


@dataclass
class Summary:
    """
    What loss and history need of rows `[R, C]` that are too wide to be kept: their log-normalizer `[R]`, float32, and
    the largest scores `[R, k]` with their classes, in descending order.
    """

    log_norm: torch.Tensor
    top: torch.Tensor | None = None
    index: torch.Tensor | None = None


@torch.no_grad()
def summarize(logits: torch.Tensor, top_k: int | None = None) -> Summary:
    """The [`Summary`] of rows `[R, C]`, in one pass and without a temporary of their size."""
    # Results are written where they belong: kept one by one, they would scatter the memory of the pieces.
    log_norm = torch.empty(len(logits), device=logits.device)
    top = index = None
    if top_k is not None:
        top = torch.empty(len(logits), top_k, device=logits.device)
        index = torch.empty(len(logits), top_k, dtype=torch.int64, device=logits.device)
    for part in chunks(logits):
        rows = logits[part].float()
        if top_k is not None:
            top[part], index[part] = top_entries(rows, top_k)
        largest = rows.amax(-1) if top_k is None else top[part, 0]
        # On a CPU log_softmax takes half the time of logsumexp, and its largest entry is the rest of it.
        log_norm[part] = largest - F.log_softmax(rows, dim=-1).amax(-1)
    return Summary(log_norm, top, index)


def top_entries(rows: torch.Tensor, k: int, block: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest entries of each row, in descending order.

    Wide rows are searched by blocks: the k largest entries lie in the k blocks with the largest maxima, so one fast
    pass for the maxima spares the selection most of the row.

    Args:
        rows (`torch.Tensor` of shape `[R, C]`): scores.
        k (`int`): how many entries, at most C.
        block (`int`, *optional*, defaults to 64): classes of a block.

    Returns:
        `tuple`: values and `torch.LongTensor` indices, `[R, k]` each.
    """
    classes = rows.shape[-1]
    blocks = classes // block
    if blocks < 4 * k:
        return rows.topk(k, dim=-1)
    split = rows[:, : blocks * block].unflatten(-1, (blocks, block))
    best = split.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    found = split.gather(1, best.unsqueeze(-1).expand(-1, -1, block)).flatten(1)
    chosen = torch.cat((found, rows[:, blocks * block :]), dim=-1).topk(k, dim=-1)
    inside = best.gather(-1, (chosen.indices // block).clamp_max(k - 1)) * block + chosen.indices % block
    tail = chosen.indices + (blocks - k) * block
    return chosen.values, torch.where(chosen.indices < k * block, inside, tail)
