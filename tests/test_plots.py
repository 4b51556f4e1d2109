"""Plots: what is drawn is what the metrics say, several methods fit, and nothing global is touched."""

import importlib
import sys

import numpy as np
import pytest
import torch
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from hf_selfkd.metrics import calibration_metrics, reliability_curve, risk_coverage_curve
from hf_selfkd.plots import reliability_diagram, risk_coverage_plot


def make_results(names):
    rng = np.random.default_rng(0)
    results = {}
    for place, name in enumerate(names):
        labels = rng.integers(0, 5, 200)
        logits = rng.normal(size=(200, 5))
        logits[np.arange(200), labels] += 1
        results[name] = ((1 + place) * logits, labels)
    return results


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_reliability_diagram_draws_the_curve_of_each_method(tmp_path):
    results = make_results(["baseline", "PS-KD"])
    figure = reliability_diagram(results, path=tmp_path / "new" / "plot.png", title="CIFAR-100")

    assert is_png(tmp_path / "new" / "plot.png")
    assert figure.get_suptitle() == "CIFAR-100"
    panels = figure.axes[::2]
    assert [panel.get_title() for panel in panels] == ["baseline", "PS-KD"]
    for panel, counts, result in zip(panels, figure.axes[1::2], results.values(), strict=True):
        curve = reliability_curve(*result)
        filled = curve.count > 0
        accuracy, gap = panel.containers
        np.testing.assert_allclose([bar.get_height() for bar in accuracy], curve.accuracy[filled])
        tops = [bar.get_y() + bar.get_height() for bar in gap]
        np.testing.assert_allclose(tops, curve.confidence[filled])
        np.testing.assert_allclose([bar.get_height() for bar in counts.containers[0]], curve.count / 2)  # % of 200
        legend = panel.get_legend().get_texts()[0].get_text()
        assert legend == f"ECE {calibration_metrics(*result)['ece']:.1f} %"


def test_risk_coverage_plot_draws_the_curve_of_each_method(tmp_path):
    results = make_results(["baseline", "PS-KD"])
    figure = risk_coverage_plot(results, path=tmp_path / "plot.png", title="CIFAR-100")

    assert is_png(tmp_path / "plot.png")
    for line, (name, result) in zip(figure.axes[0].lines, results.items(), strict=True):
        curve = risk_coverage_curve(*result)
        np.testing.assert_allclose(line.get_xdata(), 100 * curve.coverage)
        np.testing.assert_allclose(line.get_ydata(), 100 * curve.risk)
        assert line.get_label() == f"{name} (AURC {calibration_metrics(*result)['aurc']:.1f})"


@pytest.mark.parametrize("plot", [reliability_diagram, risk_coverage_plot])
def test_many_methods_and_probabilities(plot, tmp_path):
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    results = {f"method {place}": (probabilities, [0, 1, 1]) for place in range(7)}
    figure = plot(results, path=tmp_path / "plot.svg", from_logits=False)
    assert (tmp_path / "plot.svg").stat().st_size > 0
    assert len(figure.axes) == (14 if plot is reliability_diagram else 1)


@pytest.mark.parametrize("plot", [reliability_diagram, risk_coverage_plot])
def test_what_a_trainer_predicts(plot):
    ((predictions, labels),) = make_results(["PS-KD"]).values()
    figure = plot({"PS-KD": (predictions, labels)})
    legends = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    batches, parts = np.array_split(predictions, 3), np.array_split(labels, 3)
    for result in (
        PredictionOutput(predictions, labels, {"test_loss": 1.0}),
        PredictionOutput((predictions, np.zeros((200, 3, 2))), labels, None),
        EvalPrediction(predictions, labels),
        EvalPrediction(predictions, labels, np.zeros(200), np.zeros(200)),
        EvalPrediction(batches, parts),
        (predictions, labels, {}, None),
        [torch.tensor(predictions), torch.tensor(labels)],
    ):
        axes = plot({"PS-KD": result}).axes[0]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == legends


@pytest.mark.parametrize("plot", [reliability_diagram, risk_coverage_plot])
def test_binary_scores_and_masked_classes(plot):
    scores, labels = np.array([0.9, 0.2, 0.6, 0.4]), [1, 0, 0, 1]
    both = np.stack([1 - scores, scores], axis=1)
    masked = np.concatenate([np.log(both), np.full((4, 2), -np.inf)], axis=1)
    plots = [
        plot({"a": (scores, labels)}, from_logits=False),
        plot({"a": (both, labels)}, from_logits=False),
        plot({"a": (masked, labels)}),
    ]
    one, two, three = ([text.get_text() for text in each.axes[0].get_legend().get_texts()] for each in plots)
    assert one == two == three


@pytest.mark.parametrize("plot", [reliability_diagram, risk_coverage_plot])
@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a": np.zeros((4, 3))}, r"results: 'a' is a ndarray; pass \(predictions, labels\) or what trainer.predict"),
        ({"a": {"predictions": 0}}, r"results: 'a' is a dict; pass"),
        ({"a": (np.zeros((4, 3)),)}, r"results: 'a' is a tuple; pass"),
        (PredictionOutput(np.zeros((4, 3)), np.zeros(4, int), None), r"results: a PredictionOutput; pass {name: "),
        ({"a": PredictionOutput(np.zeros((4, 3)), None, None)}, r"labels: None; pass the labels"),
    ],
)
def test_results_of_other_kinds_are_one_line_errors(plot, results, message):
    with pytest.raises(ValueError, match="^" + message):
        plot(results)


@pytest.mark.parametrize("plot", [reliability_diagram, risk_coverage_plot])
def test_no_results_and_no_matplotlib_are_one_line_errors(plot, monkeypatch):
    with pytest.raises(ValueError, match=r"^results: empty; pass .*\.$"):
        plot({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf_selfkd\[plots\]"):
        plot(make_results(["baseline"]))


def test_pyplot_is_never_imported_and_matplotlib_only_to_draw(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    reliability_diagram(make_results(["baseline"]))
    risk_coverage_plot(make_results(["baseline"]))
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "hf_selfkd.plots")
    assert importlib.import_module("hf_selfkd.plots").reliability_diagram is not reliability_diagram
