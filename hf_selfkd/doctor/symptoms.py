"""The symptoms of a training that is over, from what it left in its folder."""

from __future__ import annotations

import numpy as np

from ..runs import Run
from .diagnosis import Symptoms


LAST = 0.1  # share of the logged steps whose mean is the loss at the end


def symptoms_of(run: Run) -> Symptoms:
    """
    What the figures of a run tell; the test set counts before the evaluation set.

    Args:
        run ([`Run`]): of a folder.
    """
    method = {} if run.facts is None else run.facts.method
    symptoms = Symptoms(
        teacher=method.get("teacher", "none"),
        alpha=method.get("alpha", 0.0),
        alpha_reached=method.get("alpha_reached", 0.0),
        smoothing=method.get("label_smoothing", 0.0),
        augmented=bool(method.get("auxiliary_heads") or method.get("mixing")),
    )
    losses = run.curve("hard_loss") if len(run.curve("hard_loss")) else run.curve("loss")
    if len(losses):
        count = max(1, round(LAST * len(losses)))
        symptoms.train_loss = float(losses[-count:, 1].mean())
    for evaluation in run.evaluations:
        metrics = evaluation.metrics
        nll = next((metrics[name] for name in ("nll", "token_nll", "loss") if name in metrics), None)
        symptoms.nll = nll if nll is not None and np.isfinite(nll) else symptoms.nll
        symptoms.temperature = metrics.get("temperature", symptoms.temperature)
        symptoms.reliability(evaluation)
    if run.rows is not None:
        symptoms.accuracy, symptoms.confidence = (float(run.rows[name].mean()) for name in ("correct", "confidence"))
        symptoms.samples = len(run.rows["correct"])
    symptoms.temperature = run.results.get("predict_temperature", symptoms.temperature)
    return symptoms
