"""The symptoms of a training that is over, from what it left in its folder."""

from __future__ import annotations

import numpy as np

from ..cards import Evaluation
from ..runs import Run
from .diagnosis import Symptoms


DETECTION = "object-detection"  # as the Hub names the task
LAST = 0.1  # share of the logged steps whose mean is the loss at the end
# What gives held-out figures where it is not `compute_classification_metrics`.
_MEASURES = {DETECTION: "DetectionMetrics()", "image-segmentation": "compute_segmentation_metrics"}


def symptoms_of(run: Run) -> Symptoms:
    """
    What the figures of a run tell; the test set counts before the evaluation set.

    Args:
        run ([`Run`]): of a folder.
    """
    method, task = ({}, None) if run.facts is None else (run.facts.method, run.facts.task)
    symptoms = Symptoms(
        teacher=method.get("teacher", "none"),
        alpha=method.get("alpha", 0.0),
        alpha_reached=method.get("alpha_reached", 0.0),
        schedule=method.get("alpha_schedule", "linear"),
        smoothing=method.get("label_smoothing", 0.0),
        heads=bool(method.get("auxiliary_heads")),
        mixed=bool(method.get("mixing")),
        images=task == "image-classification",
        compute_metrics=_MEASURES.get(task, "compute_classification_metrics"),
        known=bool(method),
        diverged_at=run.diverged_at,
    )
    losses = run.curve("hard_loss") if len(run.curve("hard_loss")) else run.curve("loss")
    if len(losses) and not _detects(run):
        count = max(1, round(LAST * len(losses)))
        symptoms.train_loss = float(losses[-count:, 1].mean())
    if run.evaluations:
        _take(symptoms, run.evaluations[-1], run)
    return symptoms


def _detects(run: Run) -> bool:
    """Whether the model finds objects: its loss is of boxes, too, and no likelihood."""
    known = run.facts is not None and run.facts.task == DETECTION
    return known or any("map_50" in evaluation.metrics for evaluation in run.evaluations)


def _take(symptoms: Symptoms, evaluation: Evaluation, run: Run) -> None:
    """The held-out figures, all of one evaluation."""
    metrics, symptoms.split = evaluation.metrics, evaluation.split
    names = ("nll", "token_nll") if _detects(run) else ("nll", "token_nll", "loss")
    nll = next((metrics[name] for name in names if name in metrics), None)
    symptoms.nll = nll if nll is not None and np.isfinite(nll) else None
    symptoms.reliability(evaluation)
    symptoms.temperature, symptoms.d_ece = metrics.get("temperature"), metrics.get("d_ece")
    if evaluation.split == "test" and run.rows is not None:
        symptoms.accuracy, symptoms.confidence = (float(run.rows[name].mean()) for name in ("correct", "confidence"))
        symptoms.samples = len(run.rows["correct"])
        symptoms.temperature = run.results.get("predict_temperature")
