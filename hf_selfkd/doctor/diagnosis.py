"""
What the figures of a training say about it, in words: over- or under-confident, over- or under-fitted, what to try.

The thresholds are this project's choice. docs/doctor.md tells how often the judgement was right on the trainings of
docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..cards.facts import Evaluation
from ..metrics.calibration import noise_of_gap
from ..metrics.temperature import temperature_in_words


CALM = 2.0  # points that confidence and accuracy may differ before that is worth a word
CONFIDENT = 5.0  # points of over-confidence from which softer targets have been worth their while
FITTED = 0.5  # of the held-out NLL: a training loss below it means that training samples are known by heart
UNFITTED = 0.85  # of the held-out NLL: a training loss above it means that there is more to learn
NEARLY_NOTHING = 0.05  # nats: of losses below it ratios say nothing
NOISIER = 1.25  # of the held-out NLL: a training loss above it means that training labels or inputs are harder


@dataclass
class Symptoms:
    """
    The figures of a training that tell how it went.

    Args:
        split (`str`): of the held-out figures.
        nll (`float`, *optional*): negative log-likelihood of held-out labels, in nats.
        accuracy, confidence (`float`, *optional*): of held-out samples, as fractions; the confidence is a mean.
        samples (`int`, *optional*): number of held-out samples.
        train_loss (`float`, *optional*): hard loss of the last logged steps of training, in nats.
        temperature (`float`, *optional*): that would calibrate the model.
        teacher (`str`): that taught; `"none"` for plain training.
        alpha, alpha_reached (`float`): planned for the last epoch, and at the end.
        schedule (`str`): of alpha.
        smoothing (`float`): of the labels.
        heads (`bool`): whether auxiliary heads learned.
        mixed (`bool`): whether images were mixed.
        images (`bool`): whether the model classifies images.
        d_ece (`float`, *optional*): of held-out detections, in per cent.
        compute_metrics (`str`): what gives the held-out figures of the task.
        known (`bool`): whether what was done is known, and not only logged figures.
        diverged_at (`int`, *optional*): the first step whose loss was not a number.
    """

    split: str = "eval"
    nll: float | None = None
    accuracy: float | None = None
    confidence: float | None = None
    samples: int | None = None
    train_loss: float | None = None
    temperature: float | None = None
    teacher: str = "none"
    alpha: float = 0.0
    alpha_reached: float = 0.0
    schedule: str = "linear"
    smoothing: float = 0.0
    heads: bool = False
    mixed: bool = False
    images: bool = False
    d_ece: float | None = None
    compute_metrics: str = "compute_classification_metrics"
    known: bool = True
    diverged_at: int | None = None

    @property
    def gap(self) -> float | None:
        """`float`: mean confidence minus accuracy, in points; above 0 where the model is over-confident."""
        if self.accuracy is None or self.confidence is None:
            return None
        return 100 * (self.confidence - self.accuracy)

    @property
    def noise(self) -> float:
        """`float`: points by which the gap may differ from 0 by chance, with 95 % confidence."""
        if not self.samples or self.accuracy is None:
            return 0.0
        return noise_of_gap(self.accuracy, self.samples)

    @property
    def plain(self) -> bool:
        """`bool`: whether nothing but labels and samples as they are was learned from, as far as is known."""
        return self.known and self.teacher == "none" and not (self.smoothing or self.heads or self.mixed)

    @property
    def fitted(self) -> bool | None:
        """`bool`: whether training samples are fitted as well as others are, `None` if that cannot be told."""
        if self.train_loss is None or self.nll is None or not self.nll > 0 or not self.known:
            return None
        if self.smoothing or self.heads or self.mixed:
            return None  # the training loss is of other targets or inputs
        return self.train_loss <= UNFITTED * self.nll or max(self.train_loss, self.nll) < NEARLY_NOTHING

    def reliability(self, evaluation: Evaluation) -> None:
        """Take accuracy and confidence over from an evaluation, where it has them."""
        curve = evaluation.reliability
        if curve and sum(curve["count"]):
            self.accuracy, self.confidence = (
                float(np.average(curve[name], weights=curve["count"])) for name in ("accuracy", "confidence")
            )
            self.samples = sum(curve["count"])


def softer_targets_help(symptoms: Symptoms) -> bool | None:
    """
    Whether softer targets are likely to lower the negative log-likelihood of a plain training.

    Args:
        symptoms ([`Symptoms`]): of plain training on the same data and with the same budget.

    Returns:
        `bool` or `None`: `None` where it cannot be told.
    """
    gap = symptoms.gap
    if gap is None or abs(gap) <= symptoms.noise:
        return None
    if gap >= CONFIDENT:
        return None if symptoms.fitted is False else True
    return False if gap < CALM else None


def diagnose(symptoms: Symptoms) -> list[str]:
    """
    What can be said of a training, a sentence or two each: confidence, fit, and what to try.

    Args:
        symptoms ([`Symptoms`]): what is known of it.
    """
    if symptoms.diverged_at is not None:
        return [
            f"Diverged: the loss of step {symptoms.diverged_at:,} was not a number. Lower learning_rate, clip "
            "gradients (max_grad_norm=1), or look for broken samples."
        ]
    said = [_confidence(symptoms), _detections(symptoms), _fit(symptoms), _progress(symptoms), _advice(symptoms)]
    return [sentence for sentence in said if sentence] or [
        "Nothing can be said: no held-out figures were found. Evaluate with "
        f"compute_metrics={symptoms.compute_metrics}, and write a card (trainer.create_model_card())."
    ]


def _confidence(symptoms: Symptoms) -> str:
    gap = symptoms.gap
    if gap is None or not math.isfinite(gap):
        return ""
    shown = (
        f"mean confidence {100 * symptoms.confidence:.1f} %, accuracy {100 * symptoms.accuracy:.1f} % "
        f"(split {symptoms.split})"
    )
    if abs(gap) <= max(CALM, symptoms.noise):
        limit = f"; {symptoms.samples:,} samples cannot tell less than {symptoms.noise:.1f} points" if gap else ""
        return f"Calibrated, as far as can be told: {shown}{limit if symptoms.noise > CALM else ''}."
    word = "Over-confident" if gap > 0 else "Under-confident"
    known = symptoms.temperature
    cure = (
        f" A temperature of {temperature_in_words(known)} would calibrate it."
        if known and abs(known - 1) >= 0.05
        else ""
    )
    return f"{word}: {shown}.{cure}"


def _detections(symptoms: Symptoms) -> str:
    error = symptoms.d_ece
    if error is None or not math.isfinite(error):
        return ""
    return (
        f"Scores differ from the precision of detections by {error:.1f} points on average (D-ECE, split "
        f"{symptoms.split}); the figure does not tell in which direction."
    )


def _fit(symptoms: Symptoms) -> str:
    loss, nll = symptoms.train_loss, symptoms.nll
    if loss is None or nll is None or not nll > 0 or not symptoms.known:
        return ""
    shown = f"training loss {loss:.3g}, held-out NLL {nll:.3g}"
    if symptoms.fitted is None:
        return (
            f"Fit: {shown}; the training loss is of other inputs or targets than the NLL, so the two do not compare."
        )
    if max(loss, nll) < NEARLY_NOTHING:
        return f"Fits its training data and others: {shown}."
    if loss < FITTED * nll:
        return f"Fits its training data far better than others: {shown}."
    if loss > NOISIER * nll:
        return (
            f"Its training data are harder than others: {shown}. Augmentation or dropout is strong, or some labels "
            "are wrong (the report shows the most suspicious)."
        )
    if not symptoms.fitted:
        return (
            f"Has not fitted its training data: {shown}. More epochs, a higher learning rate, or with SGD "
            "max_grad_norm=0 come first."
        )
    return f"Fits its training data about as well as others: {shown}."


def _progress(symptoms: Symptoms) -> str:
    planned = symptoms.alpha if symptoms.schedule != "calibrated" else 0  # which goes where held-out data say
    if symptoms.alpha_reached < 0.75 * planned:
        return (
            f"alpha reached {symptoms.alpha_reached:.2g} of {symptoms.alpha:.2g}: the run ended before the length it "
            "was planned for, and self-distillation did little. Plan fewer epochs, or alpha_schedule='constant'."
        )
    return ""


def _advice(symptoms: Symptoms) -> str:
    gap = symptoms.gap
    if not symptoms.known:
        return ""
    if gap is None:
        told = "Confidence was not compared with accuracy, so nothing can be said of softer targets: compare"
        judged = symptoms.nll is not None or symptoms.d_ece is not None
        return f"{told} (`hf-selfkd compare`)." if symptoms.plain and judged else ""
    if not symptoms.plain:
        return _advice_on_method(symptoms)
    helps = softer_targets_help(symptoms)
    if helps:
        heads = " for images also auxiliary_heads='sla' with alpha=0," * symptoms.images
        return f"Softer targets are likely to help: try alpha=0.8,{heads} beside this run."
    if helps is None:
        return "Whether softer targets would help cannot be told from this: compare (`hf-selfkd compare`)."
    return (
        "Softer targets are not likely to help calibration: plain training is not over-confident. If labels may be "
        "wrong they can still help accuracy and the ranking of errors (AURC): compare (`hf-selfkd compare`)."
    )


def _advice_on_method(symptoms: Symptoms) -> str:
    """What to change where targets were softened, heads taught or images mixed."""
    beyond = max(CALM, symptoms.noise)
    if abs(symptoms.gap) <= beyond:
        return ""
    tries = list(_softer(symptoms) if symptoms.gap > 0 else _harder(symptoms))
    last = " Under-confidence alone does not hurt the ranking: look at AURC first." if symptoms.gap < 0 else ""
    return f"To try: {', or '.join(tries)}.{last}"


def _softer(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.teacher != "none":
        if symptoms.alpha < 1:
            yield "a higher alpha"
    elif symptoms.smoothing:
        yield "PS-KD (alpha=0.8) in place of label smoothing"
    else:
        yield "alpha=0.8 beside it"
    if symptoms.images and not symptoms.heads:
        yield "auxiliary_heads='sla'"
    yield "dividing the logits by the temperature"


def _harder(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.teacher != "none":
        yield "a lower alpha"
        if symptoms.schedule != "calibrated" and symptoms.teacher not in ("rank", "predictions"):
            yield "alpha_schedule='calibrated'"
    if symptoms.smoothing:
        yield "a lower label_smoothing_factor"
    yield "dividing the logits by the temperature"
