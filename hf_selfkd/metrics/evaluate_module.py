"""The metrics of [`~hf_selfkd.metrics.calibration_metrics`] as an `evaluate.Metric`, loaded without a network.

`evaluate.load(hf_selfkd.metrics.evaluate_module_path())` copies this one file into the cache of `evaluate` and imports
it from there; hence absolute imports only, and only one metric class in the module's namespace. It is a module of its
own because `import evaluate` takes seconds, which `hf_selfkd.metrics` must not cost.
"""

from itertools import chain
from typing import Any

from hf_selfkd.metrics import calibration_metrics


try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError('CalibrationMetric needs the package evaluate: pip install "hf_selfkd[evaluate]".') from error


_METRICS = ("accuracy", "top5_accuracy", "nll", "brier", "ece", "ece_15", "aurc", "eaurc")
_DESCRIPTION = """
Calibration and ranking of a classifier: expected calibration error, negative log-likelihood, Brier score, area under
the risk-coverage curve, accuracy. Definitions as published with PS-KD (https://arxiv.org/abs/2006.12000).
"""
_INPUTS = """
Args:
    predictions (`[R, C]` or `[B, L, C]` floats): logits; L may differ between sequences. With two classes also `[R]`
        or `[R, 1]`: the logit or the probability of class 1.
    references (`[R]` or `[B, L]` integers): class indices, -100 = left out.
    from_logits (`bool`, *optional*, defaults to `True`): `False` if the predictions are probabilities.
Returns:
    `dict` of floats; one of them if the metric was loaded with its name, e.g. `evaluate.load(path, "ece")`.
"""
_CITATION = """
@inproceedings{kim2021self,
  title = {Self-Knowledge Distillation with Progressive Refinement of Targets},
  author = {Kim, Kyungyul and Ji, ByeongMoon and Yoon, Doyoung and Hwang, Sangheum},
  booktitle = {ICCV},
  year = {2021}
}
"""


class CalibrationMetric(evaluate.Metric):
    """[`~hf_selfkd.metrics.calibration_metrics`] with the `add`, `add_batch`, `compute` interface of `evaluate`.

    Args:
        config_name (`str`, *optional*): Name of the one metric to return, such as `"ece"`. All by default.
        **kwargs: Those of `evaluate.Metric`; predictions are stored on disk unless `keep_in_memory=True`.

    Raises:
        `ValueError`: an unknown metric; from `compute`, the errors of `calibration_metrics`.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", *_METRICS):
            raise ValueError(
                f"config_name: {self.config_name!r} is no metric; use one of {', '.join(_METRICS)}, or none for all."
            )
        row, label = datasets.Sequence(datasets.Value("float64")), datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": row, "references": label}),
                datasets.Features({"predictions": datasets.Sequence(row), "references": datasets.Sequence(label)}),
                datasets.Features({"predictions": datasets.Value("float64"), "references": label}),
            ],
            reference_urls=["https://arxiv.org/abs/2006.12000"],
        )

    def _compute(self, *, predictions: Any, references: Any, from_logits: bool = True) -> dict[str, float]:
        if references and isinstance(references[0], list):  # sequences, perhaps of different lengths
            predictions, references = list(chain(*predictions)), list(chain(*references))
        metrics = calibration_metrics(predictions, references, from_logits=from_logits)
        return metrics if self.config_name == "default" else {self.config_name: metrics[self.config_name]}
