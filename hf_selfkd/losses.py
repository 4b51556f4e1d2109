"""The loss of progressive self-distillation, as pure functions of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from .samples import IGNORE_INDEX


Remainder = Literal["bucket", "label", "uniform", "renormalize"]


WHOLE = 2**21  # logits up to which a loss is computed in one piece
MAX_HELD = 2**18  # elements of the rows of small batches that may wait, to be worked off together
LOG_ZERO = -1.0e4  # a finite stand-in for log(0): exp gives exactly 0 and 0 * LOG_ZERO is 0, not NaN


@dataclass
class Past:
    """
    Past predictions for the rows of a batch, as log-probabilities at temperature 1.

    Args:
        log_probs (`torch.FloatTensor` of shape `[R, C]`, or `[R, k]` with `index`): float32; where `mask` is false the
            values are arbitrary.
        mask (`torch.BoolTensor` of shape `[R]`): which rows have a past prediction.
        index (`torch.LongTensor` of shape `[R, k]`, *optional*):
            classes of the entries, each once, the most probable first.
        remainder (`str`, *optional*, defaults to `"bucket"`):
            where the mass goes that the entries lack: `"bucket"` (to the other classes together: their total mass is
            compared, no gradient among them), `"label"` (to the label), `"uniform"` (evenly to the other classes) or
            `"renormalize"` (nowhere: the entries are scaled up to the whole mass).
        whole (`bool`, *optional*, defaults to `False`):
            the host knows that every row has a past and a label, which spares the masking.
    """

    log_probs: torch.Tensor
    mask: torch.Tensor
    index: torch.Tensor | None = None
    remainder: Remainder = "bucket"
    whole: bool = False

    def select(self, order: torch.Tensor | slice) -> Past:
        """The rows in another order (`torch.LongTensor` of shape `[R]`), or some of them."""
        index = None if self.index is None else self.index[order]
        return Past(self.log_probs[order], self.mask[order], index, self.remainder, self.whole)


@dataclass
class Side:
    """Labels `[R]` and past rows to learn from; `weight` is a scalar tensor for mixed images."""

    labels: torch.Tensor
    past: Past | None
    weight: torch.Tensor | None


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """Which rows `[R]` have a label."""
    return labels != IGNORE_INDEX


def of_label(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The entry `[R]` of each row `[R, C]` that belongs to its label; that of class 0 where there is none."""
    return values.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)


def learners_of(past: Past, labels: torch.Tensor) -> torch.Tensor | None:
    """Which rows `[R]` have both a label and a past prediction; `None` for all."""
    return None if past.whole else past.mask & labelled(labels)


def only(values: torch.Tensor, mask: torch.Tensor | None, otherwise: torch.Tensor | float = 0.0) -> torch.Tensor:
    """The values where the mask, if there is one, is true."""
    return values if mask is None else torch.where(mask, values, otherwise)


def weighted(values: list[torch.Tensor], sides: list[Side]) -> torch.Tensor:
    """The values of the sides as one, by their weights; a single value comes back untouched."""
    if len(values) == 1:
        return values[0]
    return sum(side.weight * value for side, value in zip(sides, values, strict=True))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32, with `LOG_ZERO` for classes of probability 0."""
    return F.log_softmax(logits, dim=-1, dtype=torch.float32).clamp_min_(LOG_ZERO)


def chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows `[R, C]` that are small enough to stay in a cache while several operations pass over them."""
    size = max(1, (2**24 if logits.is_cuda else 2**18) // logits.shape[-1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


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


@dataclass
class RowLosses:
    """
    Losses of each row, `[R]`, float32, in nats. Only `total` has a gradient.

    Args:
        total: the loss of the row.
        hard: its cross-entropy with the label; 0 where there is none.
        soft: its cross-entropy with the past; 0 where nothing was learned from one.
        learners (`torch.BoolTensor`, *optional*): which rows have both a label and a past; `None` for all.
    """

    total: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor
    learners: torch.Tensor | None


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Sum of the hard cross-entropies of rows `[R, C]` with labels `[R]`; label -100 counts nothing. The value and the
    gradient are those of `F.cross_entropy` to the bit; large logits are worked off in pieces, which takes a third of
    its memory.
    """
    if logits.numel() <= WHOLE:
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    return _InPieces.apply(logits, labels)


class _InPieces(torch.autograd.Function):
    """The sum of the cross-entropies of many rows, with nothing but the gradient as large as the logits."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        log_probs = torch.empty(len(logits), device=logits.device)
        for part in chunks(logits):
            log_probs[part] = of_label(F.log_softmax(logits[part], -1, dtype=torch.float32), labels[part])
        only_class = torch.where(labelled(labels), 0, IGNORE_INDEX)
        return F.nll_loss(log_probs.unsqueeze(-1), only_class, reduction="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        label, at_label = labels.clamp_min(0).unsqueeze(-1), torch.where(labelled(labels), -grad, 0.0).unsqueeze(-1)
        for part in chunks(logits):
            log_probs = F.log_softmax(logits[part], -1, dtype=torch.float32)
            piece = torch.zeros_like(log_probs).scatter_(-1, label[part], at_label[part])
            gradient[part] = torch._log_softmax_backward_data(piece, log_probs, -1, torch.float32)
        return gradient, None


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the given probabilities) along the last dimension, finite also where nothing is left."""
    kept = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp_max(-1e-6)
    return torch.log(-torch.expm1(kept))


def _soften(log_probs: torch.Tensor, temperature: float, rest_classes: int) -> torch.Tensor:
    """Log-probabilities at a temperature; the last of them stands for `rest_classes` even ones, if not 0."""
    if temperature == 1.0:
        return log_probs
    scaled = log_probs / temperature
    if rest_classes:
        even = math.log(rest_classes)
        scaled = torch.cat((scaled[..., :-1], (log_probs[..., -1:] - even) / temperature + even), dim=-1)
    return F.log_softmax(scaled, dim=-1)


def _columns(
    log_probs: torch.Tensor, past: Past, labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Present and past log-probabilities of the stored entries, the remainder as one more column; its classes."""
    present, stored = log_probs.gather(-1, past.index), past.log_probs
    others = log_probs.shape[-1] - past.index.shape[-1]
    if past.remainder == "renormalize":
        return present, stored - torch.logsumexp(stored, dim=-1, keepdim=True), 0
    if not others:
        return present, stored, 0
    rest = _log_rest(stored)
    if past.remainder == "label":
        label = labels.clamp_min(0).unsqueeze(-1)
        hit = past.index == label
        stored = torch.where(hit, torch.logaddexp(stored, rest), stored)
        rest = rest.masked_fill(hit.any(-1, keepdim=True), LOG_ZERO)
        return torch.cat((present, log_probs.gather(-1, label)), -1), torch.cat((stored, rest), -1), 0
    if past.remainder == "uniform":
        column = (log_probs.sum(-1, keepdim=True) - present.sum(-1, keepdim=True)) / others
    else:
        column = _log_rest(present)
    return torch.cat((present, column), -1), torch.cat((stored, rest), -1), others


def soft_cross_entropy(
    logits: torch.Tensor, past: Past, temperature: float = 1.0, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Cross-entropy of the present predictions under the past ones, one value per row, at any temperature.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        past ([`Past`]): targets; no gradient flows into them.
        temperature (`float`, *optional*, defaults to 1.0):
            softens both sides; the result is multiplied by its square (Hinton et al., 2015).
        labels (`torch.LongTensor` of shape `[R]`, *optional*): for a past whose remainder goes to the label.

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats, float32; 0 where `past.mask` is false.
    """
    present, stored, others = F.log_softmax(logits.float() / temperature, dim=-1), past.log_probs, 0
    present = present.clamp_min(LOG_ZERO)
    if past.index is not None:
        present, stored, others = _columns(present, past, labels)
    target = _soften(stored.detach(), temperature, others).exp()
    # The target and not only the result: its gradient would be 0 * NaN.
    target = target.masked_fill(~past.mask.unsqueeze(-1), 0.0)
    return -(target * present).sum(dim=-1) * temperature**2


def progressive_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    past: Past,
    alpha: float,
    temperature: float = 1.0,
    normalized: torch.Tensor | None = None,
) -> RowLosses:
    """
    Cross-entropy with the target `(1 - alpha) * onehot + alpha * past` (PS-KD, Kim et al., ICCV 2021, section 3).

    Hard and soft part are kept apart, so that a poisoned past row cannot reach a row that does not learn from it, and
    a row without a past costs its hard cross-entropy (with whole rows: to the bit). At temperature 1 both come from
    one pass over the logits with a backward of its own; with stored entries or many rows, nothing but the gradient is
    as large as the logits.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        labels (`torch.LongTensor` of shape `[R]`): classes; -100 for rows that do not count.
        past ([`Past`]): past predictions and which rows have one; no gradient flows into them.
        alpha (`float`): weight of the past, in [0, 1].
        temperature (`float`, *optional*, defaults to 1.0):
            softens both sides of the soft part, which is multiplied by its square (Hinton et al., 2015).
        normalized (`torch.FloatTensor`, *optional*):
            [`log_softmax`] of the logits or, for a past with `index`, their log-normalizer `[R]`, if known already.

    Returns:
        [`RowLosses`]: one value per row.
    """
    learners = learners_of(past, labels) if alpha > 0 else torch.zeros_like(past.mask)
    log_probs = past.log_probs.detach()
    if past.index is None:
        function, parts = _WholeRows if logits.numel() <= WHOLE else _WholeRowsInPieces, (log_probs,)
    else:
        function, parts = _StoredEntries, (log_probs, past.index, past.remainder)
    if temperature == 1.0:
        return RowLosses(*function.apply(logits, normalized, labels, learners, alpha, *parts), learners)
    logits = logits.float()  # once, so that both parts of the gradient are added in float32
    hard = F.cross_entropy(logits, labels, reduction="none")
    if learners is not None:
        past = replace(past, mask=learners)
    soft = only(soft_cross_entropy(logits, past, temperature, labels), learners)
    total = only((1 - alpha) * hard + alpha * soft, learners, hard)
    return RowLosses(total, hard.detach(), soft.detach(), learners)


def _learned(log_probs: torch.Tensor, learners: torch.Tensor | None) -> torch.Tensor:
    """Past probabilities; 0 in rows that learn nothing."""
    probs = log_probs.exp()
    # Not only the result is masked: its gradient would be 0 * NaN.
    return probs if learners is None else probs.masked_fill_(~learners.unsqueeze(-1), 0.0)


def _whole_losses(
    log_probs: torch.Tensor, labels: torch.Tensor, learners: torch.Tensor | None, probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard and soft losses of rows with whole past rows."""
    hard = F.nll_loss(log_probs, labels, reduction="none")
    return hard, only((probs * log_probs).sum(-1).neg_(), learners)


def _whole_gradient(
    grad: torch.Tensor,
    log_probs: torch.Tensor,
    labels: torch.Tensor,
    learners: torch.Tensor | None,
    probs: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """The gradient for the logits, given that of the total of each row."""
    if learners is None:
        return _unit_gradient(log_probs, labels, probs * -alpha, alpha) * grad.unsqueeze(-1)
    gradient = probs * (grad * -alpha).unsqueeze(-1)
    at_label = torch.where(learners, grad * (alpha - 1), -grad).masked_fill_(~labelled(labels), 0.0)
    gradient.scatter_add_(-1, labels.clamp_min(0).unsqueeze(-1), at_label.unsqueeze(-1))
    # What log_softmax itself would do with it: rows without a past get the very bits of F.cross_entropy.
    return torch._log_softmax_backward_data(gradient, log_probs, -1, torch.float32)


def _unit_gradient(
    log_probs: torch.Tensor, labels: torch.Tensor, gradient: torch.Tensor, alpha: float
) -> torch.Tensor:
    """The gradient of the totals for the logits, where all rows learn; `gradient`, of the soft part, is reused."""
    gradient.scatter_(-1, labels.unsqueeze(-1), alpha - 1, reduce="add")
    return torch._log_softmax_backward_data(gradient, log_probs, -1, torch.float32)


class _WholeRows(torch.autograd.Function):
    """
    [`progressive_cross_entropy`] with whole past rows: total, hard and soft loss of each row. If all rows learn, the
    gradient is made at once, from what is still in the processor's cache.
    """

    @staticmethod
    def forward(ctx, logits, normalized, labels, learners, alpha, past_log_probs):
        log_probs = log_softmax(logits) if normalized is None else normalized
        probs = _learned(past_log_probs, learners)
        hard, soft = _whole_losses(log_probs, labels, learners, probs)
        total = only(torch.lerp(hard, soft, alpha), learners, hard)
        if learners is None:
            ctx.save_for_backward(_unit_gradient(log_probs, labels, probs.mul_(-alpha), alpha))
        else:
            ctx.save_for_backward(log_probs, labels, learners, probs)
        ctx.alpha, ctx.dtype = alpha, logits.dtype
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        saved = ctx.saved_tensors
        gradient = saved[0] * grad.unsqueeze(-1) if len(saved) == 1 else _whole_gradient(grad, *saved, ctx.alpha)
        return gradient.to(ctx.dtype), None, None, None, None, None


class _WholeRowsInPieces(torch.autograd.Function):
    """The same to the bit, with nothing but the gradient as large as the logits; for many or wide rows."""

    @staticmethod
    def forward(ctx, logits, normalized, labels, learners, alpha, past_log_probs):
        hard, soft = (torch.empty(len(logits), device=logits.device) for _ in range(2))
        for part in chunks(logits):
            log_probs = log_softmax(logits[part]) if normalized is None else normalized[part]
            mask = None if learners is None else learners[part]
            probs = _learned(past_log_probs[part], mask)
            hard[part], soft[part] = _whole_losses(log_probs, labels[part], mask, probs)
        total = only(torch.lerp(hard, soft, alpha), learners, hard)
        ctx.save_for_backward(logits, normalized, labels, learners, past_log_probs)
        ctx.alpha = alpha
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        logits, normalized, labels, learners, past_log_probs = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part in chunks(logits):
            log_probs = log_softmax(logits[part]) if normalized is None else normalized[part]
            mask = None if learners is None else learners[part]
            probs = _learned(past_log_probs[part], mask)
            gradient[part] = _whole_gradient(grad[part], log_probs, labels[part], mask, probs, ctx.alpha)
        return gradient, None, None, None, None, None


class _StoredEntries(torch.autograd.Function):
    """[`progressive_cross_entropy`] with the top entries of past rows: total, hard and soft loss of each row."""

    @staticmethod
    def forward(ctx, logits, normalized, labels, learners, alpha, past_log_probs, index, remainder):
        log_norm = summarize(logits).log_norm if normalized is None else normalized
        log_probs = logits.gather(-1, index).float().sub_(log_norm.unsqueeze(-1)).clamp_min_(LOG_ZERO)
        hard = (log_norm - of_label(logits, labels).float()).masked_fill_(~labelled(labels), 0.0)
        probs, rest = _entries(past_log_probs, learners, remainder, logits.shape[-1])
        soft = -(probs * log_probs).sum(-1)
        outside = offset = None
        if remainder == "bucket":
            outside = (1 - log_probs.exp().sum(-1)).clamp_min_(1e-6)
            soft -= rest * outside.log()
        elif remainder == "label":
            soft += rest * hard
        elif remainder == "uniform":
            offset = rest / max(logits.shape[-1] - index.shape[-1], 1)
            soft -= offset * (_log_prob_sums(logits, log_norm) - log_probs.sum(-1))
        soft = only(soft, learners)
        total = only(torch.lerp(hard, soft, alpha), learners, hard)
        ctx.save_for_backward(logits, log_norm, labels, learners, probs, index, log_probs, rest, outside, offset)
        ctx.alpha, ctx.to_label = alpha, remainder == "label"
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        logits, log_norm, labels, learners, probs, index, log_probs, rest, outside, offset = ctx.saved_tensors
        grad = grad.masked_fill(~labelled(labels), 0.0)
        soft_grad = only(grad * ctx.alpha, learners)
        scale = grad if outside is None else grad - soft_grad * rest / outside
        gradient = torch.empty_like(logits)
        for part in chunks(logits):
            place = gradient[part] if gradient.dtype == torch.float32 else None
            # On a CPU softmax takes half the time of exp(logits - log_norm), though it sums once more.
            piece = torch.softmax(logits[part].float(), dim=-1, out=place).mul_(scale[part].unsqueeze(-1))
            if offset is not None:
                piece -= (soft_grad * offset)[part].unsqueeze(-1)
            if place is None:
                gradient[part] = piece
        # Set, in float32, and not added to: in a bucket of almost no mass the scale is huge, and a difference would be
        # noise; in half precision a sum would be rounded twice.
        label = labels.clamp_min(0).unsqueeze(-1)
        at_label = soft_grad - grad if not ctx.to_label else soft_grad * (1 - rest) - grad
        hit = index == label
        entries = log_probs.exp() * grad.unsqueeze(-1) - probs * soft_grad.unsqueeze(-1) + hit * at_label.unsqueeze(-1)
        base = (of_label(logits, labels).float() - log_norm).exp() * scale
        if offset is not None:
            base = base - soft_grad * offset
        at_label = torch.where(hit.any(-1), (entries * hit).sum(-1), base + at_label).masked_fill_(grad == 0, 0.0)
        gradient.scatter_(-1, index, entries.to(gradient.dtype))
        gradient.scatter_(-1, label, at_label.unsqueeze(-1).to(gradient.dtype))
        return gradient, None, None, None, None, None, None, None


def _log_prob_sums(logits: torch.Tensor, log_norm: torch.Tensor) -> torch.Tensor:
    """Sum of the log-probabilities of each row, with `LOG_ZERO` for classes of probability 0."""
    result = torch.empty_like(log_norm)
    for part in chunks(logits):
        result[part] = (logits[part] - log_norm[part].unsqueeze(-1)).clamp_min_(LOG_ZERO).sum(-1)
    return result


def _entries(
    log_probs: torch.Tensor, learners: torch.Tensor | None, remainder: str, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of stored entries `[R, k]` and the mass that they lack `[R]`; 0 for rows that learn nothing."""
    probs = _learned(log_probs, learners)
    kept = probs.sum(-1)
    if remainder == "renormalize":
        return probs / kept.clamp_min(1e-30).unsqueeze(-1), torch.zeros_like(kept)
    if log_probs.shape[-1] == classes:
        return probs, torch.zeros_like(kept)
    return probs, only((1 - kept).clamp_min_(0.0), learners)


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the present predictions from those of a teacher, one value per row, times the square
    of the temperature (Hinton et al., 2015).

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        teacher_logits (`torch.FloatTensor` of shape `[R, C]`): the teacher's; no gradient flows into them.
        temperature (`float`, *optional*, defaults to 1.0): softens both.

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats, float32.
    """
    present = F.log_softmax(logits.float() / temperature, dim=-1).clamp_min(LOG_ZERO)
    teacher = log_softmax(teacher_logits.detach().float() / temperature)
    return (teacher.exp() * (teacher - present)).sum(dim=-1) * temperature**2


def target_entropy(past: Past, labels: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    Entropy of the targets `(1 - alpha) * onehot + alpha * past`, one value per row, without making them.

    Args:
        past ([`Past`]): past predictions.
        labels (`torch.LongTensor` of shape `[R]`): classes; a row with -100 gives an arbitrary value.
        alpha (`float`): weight of the past, in (0, 1].

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats; with stored entries, the mass that they lack counts as one class
        (the label's if it is not among the entries), which makes it a lower bound.
    """
    if past.index is None:
        # Sums of p and p log(p) over all classes, and the label's share of both.
        sum_prob, sum_plogp = 1.0, torch.empty(len(labels), device=labels.device)
        for part in chunks(past.log_probs):
            sum_plogp[part] = (past.log_probs[part].exp() * past.log_probs[part]).sum(-1)
        label_logp = of_label(past.log_probs, labels)
        label_prob = label_logp.exp()
        label_plogp = label_prob * label_logp
    else:
        probs, rest = _entries(past.log_probs, None, past.remainder, math.inf)
        hit, plogp = past.index == labels.unsqueeze(-1), -torch.special.entr(probs)
        at_label = 1.0 if past.remainder == "label" else 1.0 - hit.any(-1).float()
        label_prob, label_plogp = (probs * hit).sum(-1) + rest * at_label, (plogp * hit).sum(-1)
        sum_prob, sum_plogp = probs.sum(-1) + rest, plogp.sum(-1) - torch.special.entr(rest) * (1 - at_label)
    others = (sum_plogp - label_plogp) * alpha + (sum_prob - label_prob) * (alpha * math.log(alpha))
    return torch.special.entr((1 - alpha) + alpha * label_prob) - others
