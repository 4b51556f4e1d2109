"""The temperature at which predictions are calibrated, from sums that need no logits to be kept."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..losses.soft_targets import chunks, label_entries, labelled, where_mask


LOG_TEMPERATURES = torch.linspace(-1.5, 1.5, 31)  # temperatures 0.22 to 4.5


def temperature_in_words(temperature: float) -> str:
    """A fitted temperature as text; at an end of the range that is searched it may lie beyond."""
    low, high = (float(LOG_TEMPERATURES[end].exp()) for end in (0, -1))
    beyond = " or more" if temperature > 0.999 * high else " or less" if temperature < 1.001 * low else ""
    return f"{temperature:.2f}{beyond}"


def at_temperature(log_probs: torch.Tensor, log_temperature: float) -> torch.Tensor:
    """
    Log-probabilities `[R]` of labels at a temperature, given its natural log, between those of
    [`TemperatureFit.update`].
    """
    last = len(LOG_TEMPERATURES) - 1
    low, high = float(LOG_TEMPERATURES[0]), float(LOG_TEMPERATURES[-1])
    place = min(max((log_temperature - low) / (high - low), 0.0), 1.0) * last
    first = min(int(place), last - 1)
    return torch.lerp(log_probs[:, first], log_probs[:, first + 1], place - first)


class TemperatureFit:
    """
    Temperature scaling (Guo et al., ICML 2017): the temperature that minimizes the negative log-likelihood of labels.

    With `b = 1 / temperature`, the derivative of that likelihood to `b`, the sum over rows of `E_p[z] - z_label` under
    `p = softmax(b * z)`, only rises with `b`. Its sums at 31 temperatures show where it is zero.

    Args:
        device (`torch.device`, *optional*): of the sums.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(len(LOG_TEMPERATURES), device=device)

    @torch.no_grad()
    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Take note of rows.

        Args:
            logits (`torch.FloatTensor` of shape `[R, C]`): scores.
            labels (`torch.LongTensor` of shape `[R]`): classes; rows with -100 do not count.

        Returns:
            `torch.FloatTensor` of shape `[R, 31]`: log-probability of each label at each temperature, for
            [`at_temperature`].
        """
        parts = [self._add(logits[part].float(), labels[part]) for part in chunks(logits)]
        return torch.cat(parts) if parts else logits.new_zeros(0, len(LOG_TEMPERATURES), dtype=torch.float32)

    def _add(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        known, logits = labelled(labels), logits - logits.amax(dim=-1, keepdim=True)
        at_label = label_entries(logits, labels)
        allowed = logits.clamp_min(torch.finfo(torch.float32).min)  # scores of -inf: 0 * inf would be NaN
        sums, log_probs = [], []
        for scale in LOG_TEMPERATURES.exp().tolist():
            scores = (logits / scale).log_softmax(dim=-1)
            log_probs.append(label_entries(scores, labels))
            mean = (scores.exp() * allowed).sum(dim=-1)
            sums.append(where_mask(mean - at_label, known).sum())
        self.sums += torch.stack(sums).to(self.sums.device)
        return torch.stack(log_probs, dim=-1)

    def log_temperature(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> float:
        """
        The natural log of the temperature, above 0 where predictions are over-confident. It ends at -1.5 and 1.5, and
        is 0 if no row had a label or the scores are not finite.

        Args:
            reduce (`Callable`, *optional*): adds the sums of all processes up.
        """
        sums = reduce(self.sums).cpu()
        if not bool(sums.isfinite().all()) or not bool(sums.any()):
            return 0.0
        above = int((sums > 0).sum())  # the sums fall with the temperature
        if above in (0, len(sums)):
            return float(LOG_TEMPERATURES[0 if above == 0 else -1])
        (before, after), (left, right) = sums[above - 1 : above + 1], LOG_TEMPERATURES[above - 1 : above + 1]
        return float(left + (right - left) * before / (before - after))
