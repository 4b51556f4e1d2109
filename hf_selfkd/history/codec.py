"""How a row of log-probabilities is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..losses.soft_targets import LOG_ZERO, SoftTargets, Tail


def bytes_of(columns: dict[str, tuple[int, torch.dtype]]) -> int:
    """Bytes of a row whose parts have these columns and types."""
    return sum(width * dtype.itemsize for width, dtype in columns.values())


@dataclass
class Codec:
    """
    How a row of log-probabilities is stored.

    Args:
        num_classes (`int`): C.
        dtype (`torch.dtype`): of the stored log-probabilities.
        top_k (`int`, *optional*): entries kept; `None` keeps all.
        tail (`str`, *optional*): where the mass goes that they lack; see [`~hf_selfkd.losses.SoftTargets`].
        categorical (`bool`): whether the probabilities of a row add up to 1.
        bernoulli (`bool`, *optional*): whether the two classes are no and yes: then the log-odds of yes are stored.
    """

    num_classes: int
    dtype: torch.dtype
    top_k: int | None = None
    tail: Tail = "bucket"
    categorical: bool = True
    bernoulli: bool = False

    @property
    def index_dtype(self) -> torch.dtype:
        """`torch.dtype`: the smallest that holds a class."""
        return torch.int16 if self.num_classes <= 2**15 else torch.int32

    @property
    def widths(self) -> dict[str, tuple[int, torch.dtype]]:
        """`dict`: columns and type of each stored part."""
        if self.bernoulli:
            return {"log_probs": (1, self.dtype)}
        if self.top_k is None:
            return {"log_probs": (self.num_classes, self.dtype)}
        return {"log_probs": (self.top_k, self.dtype), "index": (self.top_k, self.index_dtype)}

    @property
    def row_bytes(self) -> int:
        """`int`: bytes of a stored row."""
        return bytes_of(self.widths)

    def encode(self, log_probs: torch.Tensor, index: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Log-probabilities, `[R, C]` or those of the top entries `[R, k]` with `index`, as stored; NaN stays NaN."""
        if self.bernoulli:
            return {"log_probs": (log_probs[:, 1:] - log_probs[:, :1]).to(self.dtype)}
        if self.top_k is None:
            return {"log_probs": log_probs.to(self.dtype)}
        if index is None:
            log_probs, index = log_probs.topk(self.top_k, dim=-1)
        return {"log_probs": log_probs.to(self.dtype), "index": index.to(self.index_dtype)}

    def decode(self, parts: dict[str, torch.Tensor], mask: torch.Tensor) -> SoftTargets:
        """Stored parts as [`~hf_selfkd.losses.SoftTargets`]; rounding never leaves more than the whole mass."""
        log_probs = parts["log_probs"]
        if self.bernoulli:
            odds = log_probs.float()
            log_probs = F.logsigmoid(torch.cat((-odds, odds), dim=-1)).clamp_min_(LOG_ZERO)
            return SoftTargets(log_probs, mask, classes=self.num_classes)
        if self.dtype != torch.float32:
            log_probs = log_probs.float()
        if self.dtype != torch.float32 and self.categorical:
            total = torch.logsumexp(log_probs, dim=-1, keepdim=True)
            log_probs = log_probs - (total if self.top_k is None else total.clamp_min(0))
        index = None if self.top_k is None else parts["index"].long()
        return SoftTargets(log_probs, mask, index, self.tail, classes=self.num_classes, categorical=self.categorical)

    def probabilities(self, soft_targets: SoftTargets) -> torch.Tensor:
        """Of all classes, `[R, C]`; the mass that entries lack is spread evenly over the other classes."""
        probs = soft_targets.log_probs.exp()
        if soft_targets.index is None:
            return probs
        rest = (1 - probs.sum(-1, keepdim=True)).clamp_min(0)
        even = rest / max(self.num_classes - self.top_k, 1)
        return even.expand(-1, self.num_classes).scatter(-1, soft_targets.index, probs)
