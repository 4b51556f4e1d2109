"""Metrics of a model's predictions. Importing this package needs NumPy only."""

from pathlib import Path

from .arrays import IGNORED_LABEL
from .calibration import (
    ClassificationMetrics,
    ReliabilityCurve,
    RiskCoverageCurve,
    RowScores,
    calibration_metrics,
    compute_classification_metrics,
    reliability_curve,
    risk_coverage_curve,
    row_scores,
)
from .detection import DetectionMetrics, detection_ece, detection_metrics
from .multi_label import MultiLabelMetrics, compute_multi_label_metrics, multi_label_metrics
from .segmentation import SegmentationMetrics, compute_segmentation_metrics, segmentation_metrics
from .speech import SpeechMetrics, compute_speech_metrics, error_rates
from .translation import TranslationMetrics, compute_translation_metrics


__all__ = [
    "IGNORED_LABEL",
    "LOWER_IS_BETTER",
    "ClassificationMetrics",
    "DetectionMetrics",
    "MultiLabelMetrics",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "RowScores",
    "SegmentationMetrics",
    "SpeechMetrics",
    "TranslationMetrics",
    "calibration_metrics",
    "compute_classification_metrics",
    "compute_multi_label_metrics",
    "compute_segmentation_metrics",
    "compute_speech_metrics",
    "compute_translation_metrics",
    "detection_ece",
    "detection_metrics",
    "error_rates",
    "evaluate_module_path",
    "is_lower_better",
    "multi_label_metrics",
    "reliability_curve",
    "risk_coverage_curve",
    "row_scores",
    "segmentation_metrics",
]


# Metrics of an evaluation that are better when lower; of losses, the stock Trainer knows it.
LOWER_IS_BETTER = ("nll", "bce", "brier", "ece", "ece_15", "aurc", "eaurc", "d_ece", "token_nll", "token_ece")
LOWER_IS_BETTER += ("perplexity", "wer", "cer")


def is_lower_better(name: str) -> bool:
    """
    Whether a metric of this package is better when lower.

    Args:
        name (`str`):
            Such as `"ece"`, with or without what a `Trainer` puts before it: `"eval_ece"`, `"test_head0_nll"`,
            `"eval_<name of the dataset>_token_ece"`.
    """
    return any(name == own or name.endswith(f"_{own}") for own in LOWER_IS_BETTER)


def evaluate_module_path() -> str:
    """Path for `evaluate.load(...)` of the same metrics as an `evaluate.Metric`; nothing is downloaded."""
    return str(Path(__file__).with_name("evaluate_module.py"))
