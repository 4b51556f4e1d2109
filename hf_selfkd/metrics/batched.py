"""What all `compute_metrics` callables share: an evaluation at once, or its batches one by one."""

from __future__ import annotations

from typing import Any


class BatchedMetrics:
    """
    A `compute_metrics` callable for `Trainer`, also with `batch_eval_metrics=True`.

    A subclass says what it keeps of a batch, and what metrics come out of all that was kept. One instance serves one
    evaluation at a time.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def __call__(self, eval_prediction: Any, compute_result: bool | None = None) -> dict[str, float]:
        """
        Metrics of an evaluation, or of its batches one by one.

        Args:
            eval_prediction (`EvalPrediction` or `(predictions, labels)`): One evaluation, or one batch of it.
            compute_result (`bool`, *optional*):
                What `batch_eval_metrics=True` passes: `False` remembers the batch and returns `{}`, `True` (the last
                batch) returns the metrics over all batches. Left out, `eval_prediction` is a whole evaluation.

        Raises:
            `ValueError`: for shapes and labels that do not fit; batches remembered so far are then dropped.
        """
        kept, self._kept = self._kept, []
        if compute_result is None:
            kept = []  # an evaluation interrupted half-way must not leak into this one
        kept = self._add(kept, self._read(eval_prediction[0], eval_prediction[1]))
        if compute_result is False:
            self._kept = kept
            return {}
        return self._result(kept)

    def reset(self) -> None:
        """Forget remembered batches: call it after a `batch_eval_metrics` evaluation that was interrupted."""
        self._kept = []

    def _add(self, kept: list[Any], read: list[Any]) -> list[Any]:
        """What is kept of all batches so far; `kept` may be changed."""
        kept.extend(read)
        return kept

    def _read(self, predictions: Any, labels: Any) -> list[Any]:
        """What is kept of a batch."""
        raise NotImplementedError

    def _result(self, kept: list[Any]) -> dict[str, float]:
        """The metrics of all that was kept."""
        raise NotImplementedError
