"""Temperatures and thresholds of early exits, from validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..metrics.temperature import TemperatureFit
from .risk import failures_at, first_sure, laxest_shown, most_failures, strictest_affordable, upper_bound


@dataclass
class EarlyExitSummary:
    """
    What [`EarlyExit.calibrate`] has found.

    Args:
        exits (`list[int]`): how many layers come before each exit; the last is the whole model.
        thresholds (`list[float]`): of each exit before the last.
        temperatures (`list[float]`): of each exit.
        accuracy (`float`): of early exit, on the samples that the thresholds were chosen on.
        whole_accuracy (`float`): of the whole model, on the same samples.
        shares (`list[float]`): of these samples, answered at each exit.
        cost (`float`): operations per sample over those of the whole model, mean over these samples.
        costs (`list[float]`): the same of a sample that is answered at each exit.
        samples (`int`): that the thresholds were chosen on.
        temperature_samples (`int`): others, that the temperatures were fitted on.
        confidence (`float`): of the guarantee.
        guarantee (`str`): what is promised, as a sentence.
    """

    exits: list[int]
    thresholds: list[float]
    temperatures: list[float]
    accuracy: float
    whole_accuracy: float
    shares: list[float]
    cost: float
    costs: list[float]
    samples: int
    temperature_samples: int
    confidence: float
    guarantee: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain data."""
        return asdict(self)


@dataclass
class Target:
    """
    What thresholds are chosen for; exactly one of the first three.

    Args:
        accuracy (`float`, *optional*): that early exit shall have.
        loss (`float`, *optional*): share of samples that the whole model may tell right and early exit wrong.
        cost (`float`, *optional*): share of the whole model's work.
        confidence (`float`): of what is promised.

    Raises:
        ValueError: if none or several are given, or one is out of range.
    """

    accuracy: float | None
    loss: float | None
    cost: float | None
    confidence: float

    def __post_init__(self):
        given = {"target_accuracy": self.accuracy, "max_accuracy_loss": self.loss, "target_cost": self.cost}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            told = ", ".join(given) or "none"
            raise ValueError(
                f"calibrate needs one of target_accuracy, max_accuracy_loss and target_cost, and got {told}: give one."
            )
        for name, value in (given | {"confidence": self.confidence}).items():
            if not 0 < value < 1 and not (name == "target_cost" and value == 1):
                raise ValueError(f"{name}={value} must be between 0 and 1: it is a share, such as 0.95.")

    @property
    def rate(self) -> float:
        """`float`: of answers that may fail."""
        return self.loss if self.accuracy is None else 1 - self.accuracy

    def fails(self, correct: torch.Tensor) -> torch.Tensor:
        """From whether each exit `[E + 1, N]` is right to whether its answer is a failure."""
        return ~correct if self.loss is None else correct[-1] & ~correct


def batches_of(data: Any, data_collator: Callable | None, batch_size: int) -> Iterable[Mapping]:
    """
    Batches of validation data.

    Args:
        data: a dataset of samples, or batches: a `DataLoader`, or a list of dictionaries.
        data_collator (`Callable`, *optional*): makes batches of samples; that of transformers by default.
        batch_size (`int`): samples a batch.
    """
    whole = isinstance(data, (list, tuple, DataLoader)) or not hasattr(data, "__getitem__")
    if whole and data_collator is None:
        return data
    if data_collator is None:
        from transformers import default_data_collator as data_collator
    return DataLoader(data, batch_size, collate_fn=data_collator)


def collect(
    batches: Iterable[Mapping], say: Callable[[dict[str, Any]], list[torch.Tensor]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Run validation data at full depth. All logits are kept on the host: 4 bytes a sample, exit and class.

    Args:
        batches (`Iterable`): dictionaries with `labels`.
        say (`Callable`): from inputs to the logits of each exit.
        device (`torch.device`): of the model.

    Returns:
        `tuple`: logits `[E + 1, N, C]` and labels `[N]`, of the samples with a label.

    Raises:
        ValueError: if there are no labels, or none that is a class.
    """
    logits, labels = [], []
    for batch in batches:
        if not isinstance(batch, Mapping) or batch.get("labels") is None:
            raise ValueError(
                "calibrate: a batch is no dictionary with 'labels': give batches, or a dataset and data_collator=..."
            )
        own = torch.as_tensor(batch["labels"]).cpu()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        inputs = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in inputs.items()}
        said = torch.stack([part.cpu() for part in say(inputs)])
        if own.shape != said.shape[1:2] or own.is_floating_point():
            raise ValueError(
                f"calibrate: labels of shape {list(own.shape)} and type {own.dtype} for {said.shape[1]} samples: give "
                "one class a sample."
            )
        known = own >= 0
        logits.append(said[:, known])
        labels.append(own[known])
    if not labels or not sum(map(len, labels)):
        raise ValueError("calibrate: the validation data holds no sample with a label: give some.")
    return torch.cat(logits, dim=1), torch.cat(labels)


def calibrated(
    logits: torch.Tensor, labels: torch.Tensor, target: Target, exits: list[int], costs: list[float], share: float
) -> EarlyExitSummary:
    """
    Fit temperatures on some samples, then choose thresholds on the others: so the promise holds as if the temperatures
    had been known before.

    Args:
        logits (`torch.FloatTensor` of shape `[E + 1, N, C]`): of each exit and the whole model.
        labels (`torch.LongTensor` of shape `[N]`): classes.
        target ([`Target`]): what for.
        exits (`list[int]`): how many layers come before each exit.
        costs (`list[float]`): the share of work of each.
        share (`float`): of the samples, drawn at random from a fixed seed, that temperatures are fitted on.

    Raises:
        ValueError: if the target cannot be shown to be met.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = round(share * len(labels))
    fit, rest = order[:count], order[count:]
    if not count or not len(rest):
        raise ValueError(f"calibrate: {len(labels)} samples are too few for temperatures and thresholds: give more.")
    temperatures = [_temperature(part[fit], labels[fit]) for part in logits]
    scaled = logits[:, rest] / torch.tensor(temperatures).view(-1, 1, 1)
    correct = scaled.argmax(dim=-1) == labels[rest]
    confidences = torch.stack([part.softmax(dim=-1).amax(dim=-1) for part in scaled[:-1]])
    threshold = _choose(confidences, correct, target, costs, logits.shape[-1])
    places = first_sure(confidences, threshold)
    counts = torch.bincount(places, minlength=len(exits)).double() / len(rest)
    return EarlyExitSummary(
        exits=exits,
        thresholds=[threshold] * (len(exits) - 1),
        temperatures=temperatures,
        accuracy=float(correct.gather(0, places.unsqueeze(0)).double().mean()),
        whole_accuracy=float(correct[-1].double().mean()),
        shares=counts.tolist(),
        cost=float(counts @ torch.tensor(costs, dtype=torch.float64)),
        costs=costs,
        samples=len(rest),
        temperature_samples=count,
        confidence=target.confidence,
        guarantee=_guarantee(target, len(rest), failures_at(confidences, target.fails(correct), threshold)),
    )


def _temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    fit = TemperatureFit()
    fit.update(logits, labels)
    return float(torch.tensor(fit.log_temperature()).exp())


def _choose(
    confidences: torch.Tensor, correct: torch.Tensor, target: Target, costs: list[float], num_classes: int
) -> float:
    if target.cost is not None:
        return strictest_affordable(confidences, costs, target.cost, num_classes)
    fails, samples = target.fails(correct), correct.shape[1]
    threshold = laxest_shown(confidences, fails, target.rate, target.confidence, num_classes)
    if threshold is not None:
        return threshold
    if target.loss is not None or most_failures(samples, target.rate, target.confidence) < 0:
        name = "max_accuracy_loss" if target.loss is not None else "target_accuracy"
        raise ValueError(
            f"{name}={target.loss or target.accuracy}: {samples} samples cannot show it with confidence="
            f"{target.confidence}, whatever the answers are: give more validation data, or ask for less."
        )
    wrong = int(fails[-1].sum())
    shown = 1 - upper_bound(wrong, samples, target.confidence)
    raise ValueError(
        f"target_accuracy={target.accuracy} cannot be shown: the whole model is right for {samples - wrong} of "
        f"{samples} samples, which shows {shown:.4f} with confidence={target.confidence}: set target_accuracy below "
        "that, or max_accuracy_loss instead."
    )


def _guarantee(target: Target, samples: int, failures: int) -> str:
    if target.cost is not None:
        return (
            f"Chosen for a cost of {target.cost:g} of the whole model's work on {samples} validation samples: nothing "
            "is promised of the accuracy."
        )
    promise = (
        f"early exit is right for at least {target.accuracy:.2%} of samples"
        if target.loss is None
        else f"at most {target.loss:.2%} of samples are answered rightly by the whole model and wrongly by early "
        "exit, so that its accuracy is lower by no more than that"
    )
    return (
        f"With a probability of at least {target.confidence:.2%} over the draw of the {samples} validation samples, "
        f"{promise}, if they come from the same distribution (fixed sequence of exact binomial tests; {failures} "
        "failures were seen)."
    )
