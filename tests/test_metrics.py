"""Metrics against independent references: published vector, torchmetrics, scikit-learn, naive loops."""

import runpy
import socket
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

import hf_selfkd
from hf_selfkd.metrics import (
    LOWER_IS_BETTER,
    ClassificationMetrics,
    calibration_metrics,
    compute_classification_metrics,
    evaluate_module_path,
    is_lower_better,
    reliability_curve,
    risk_coverage_curve,
)
from hf_selfkd.metrics import calibration as metrics


KEYS = ["accuracy", "top5_accuracy", "nll", "brier", "ece", "ece_15", "aurc", "eaurc"]
CONFIDENCE = [0.95, 0.85, 0.75, 0.65, 0.55, 0.92]
CORRECT = [1, 1, 0, 1, 0, 0]


def binary(confidence, correct, dtype=np.float64):
    """Two-class probabilities of the given confidences in class 0, and labels that make them right or wrong."""
    confidence = np.asarray(confidence, dtype)
    return np.stack([confidence, 1 - confidence], axis=1), 1 - np.asarray(correct, np.int64)


def random_logits(rows=500, classes=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += rng.exponential(2, rows)
    return 2 * logits, labels


def softmax(logits):
    return torch.tensor(logits).softmax(-1).numpy()


def naive_aurc(confidence, correct):
    """Definition, by counting: for every k, the error rate among the k most confident rows. No ties."""
    risks = []
    for threshold in confidence:
        kept = [right for conf, right in zip(confidence, correct, strict=True) if conf >= threshold]
        risks.append(kept.count(False) / len(kept))
    return 1000 * sum(risks) / len(risks)


def naive_excess(correct):
    n, r = len(correct), list(correct).count(False)
    return 1000 * sum(k / (n - r + k) for k in range(1, r + 1)) / n


# Values


def test_published_vector():
    metrics = calibration_metrics(*binary(CONFIDENCE, CORRECT), from_logits=False)
    assert list(metrics) == KEYS and all(type(value) is float for value in metrics.values())
    assert metrics["ece"] == pytest.approx(44.5, abs=1e-9)
    assert metrics["aurc"] == pytest.approx(372.222, abs=5e-4)
    assert metrics["eaurc"] == pytest.approx(180.556, abs=5e-4)
    assert metrics["accuracy"] == 0.5
    assert metrics["nll"] == pytest.approx(-np.mean(np.log([0.95, 0.85, 0.25, 0.65, 0.45, 0.08])))
    assert metrics["brier"] == pytest.approx(np.mean([2 * (0.05**2), 2 * 0.15**2, 2 * 0.75**2, 0.245, 0.605, 1.6928]))


@pytest.mark.parametrize("seed", range(3))
def test_against_torchmetrics_and_sklearn(seed):
    logits, labels = random_logits(seed=seed)
    probabilities = softmax(logits)
    metrics = calibration_metrics(logits, labels)
    # torchmetrics works in float32 and with left-closed bins: the same away from the edges, where random data lie.
    for key, bins in (("ece", 10), ("ece_15", 15)):
        theirs = multiclass_calibration_error(torch.tensor(probabilities), torch.tensor(labels), 12, bins, "l1")
        assert metrics[key] == pytest.approx(100 * theirs.item(), abs=1e-4)
    assert metrics["accuracy"] == np.mean(probabilities.argmax(1) == labels)
    assert metrics["top5_accuracy"] == top_k_accuracy_score(labels, probabilities, k=5)
    assert metrics["nll"] == pytest.approx(log_loss(labels, probabilities))
    assert metrics["brier"] == pytest.approx(brier_score_loss(labels, probabilities, scale_by_half=False))


@pytest.mark.parametrize("seed", range(3))
def test_risk_coverage_against_a_naive_loop(seed):
    logits, labels = random_logits(rows=200, seed=seed)
    probabilities = softmax(logits)
    confidence, correct = probabilities.max(1).tolist(), (probabilities.argmax(1) == labels).tolist()
    metrics = calibration_metrics(logits, labels)
    assert metrics["aurc"] == pytest.approx(naive_aurc(confidence, correct))
    assert metrics["eaurc"] == pytest.approx(naive_aurc(confidence, correct) - naive_excess(correct))


def test_brier_by_hand():
    probabilities = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    by_hand = ((0.5 - 1) ** 2 + 0.3**2 + 0.2**2 + 0.1**2 + (0.1 - 1) ** 2 + 0.8**2) / 2
    assert calibration_metrics(probabilities, [0, 1], from_logits=False)["brier"] == pytest.approx(by_hand)


def test_logits_and_their_probabilities_agree():
    logits, labels = random_logits()
    assert calibration_metrics(logits, labels) == pytest.approx(
        calibration_metrics(softmax(logits), labels, from_logits=False)
    )


def test_perfect_and_hopeless_order_of_errors():
    assert calibration_metrics(*binary([0.9, 0.8, 0.7], [1, 1, 0]), from_logits=False)["eaurc"] == 0
    assert calibration_metrics(*binary([0.9, 0.8], [1, 1]), from_logits=False)["aurc"] == 0
    assert calibration_metrics(*binary([0.9, 0.8], [0, 0]), from_logits=False)["aurc"] == 1000
    assert calibration_metrics(*binary([0.9, 0.8], [0, 1]), from_logits=False)["aurc"] == 750


# Edges


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("tenths", range(1, 11))
def test_confidence_on_an_edge_belongs_to_the_bin_below(tenths, dtype):
    edge = np.array(tenths / 10, dtype)
    other = (1 - edge) / 20  # twenty more classes keep even 0.1 the largest
    row = np.concatenate([[edge], np.full(20, other)]).astype(dtype)
    curve = reliability_curve(row[None], [0], from_logits=False)
    assert curve.count.tolist() == [int(index == tenths - 1) for index in range(10)]
    if tenths < 10:
        row[0] = np.nextafter(edge, np.array(1, dtype))
        assert reliability_curve(row[None], [0], from_logits=False).count[tenths] == 1


def test_fifteen_bins_are_right_closed_too():
    curve = reliability_curve(*binary([9 / 15, 10 / 15, 1.0], [1, 1, 1]), bins=15, from_logits=False)
    assert np.flatnonzero(curve.count).tolist() == [8, 9, 14]


def test_confidence_exactly_and_almost_one():
    curve = reliability_curve([[1.0, 0.0], [1.0 + 1e-9, 0.0]], [0, 1], from_logits=False)
    assert curve.count.tolist() == [0] * 9 + [2] and curve.accuracy[9] == 0.5
    assert np.isnan(curve.accuracy[:9]).all() and np.isnan(curve.confidence[:9]).all()
    assert calibration_metrics([[1000.0, 0.0]], [0])["ece"] == 0


def test_confidence_zero_falls_in_the_first_bin():
    assert metrics.reliability_of(np.zeros(2), np.array([True, False]), 10).count.tolist() == [2] + [0] * 9


def test_extreme_logits_stay_finite():
    metrics = calibration_metrics(np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32), [0, 0])
    assert metrics["nll"] == 1e4 and metrics["brier"] == 1 and metrics["accuracy"] == 0.5


def test_probability_zero_of_the_label_stays_finite():
    nll = calibration_metrics(np.array([[1, 0]], np.float32), [1], from_logits=False)["nll"]
    assert nll == pytest.approx(87.3, abs=0.1)


def test_ties_take_the_first_class_everywhere():
    logits = np.zeros((7, 7))
    metrics = calibration_metrics(logits, np.arange(7))
    assert metrics["accuracy"] == 1 / 7 and metrics["top5_accuracy"] == 5 / 7


def test_top5_is_one_for_five_classes_or_fewer():
    for classes in (2, 4, 5):
        assert calibration_metrics(-np.eye(classes), np.arange(classes))["top5_accuracy"] == 1
    assert calibration_metrics(-np.eye(6), np.arange(6))["top5_accuracy"] == 0


def test_tied_confidence_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    probabilities, labels = binary(rng.choice([0.6, 0.7, 0.9], 60), rng.integers(0, 2, 60))
    metrics = [
        calibration_metrics(probabilities[order], labels[order], from_logits=False)
        for order in [np.arange(60), np.argsort(labels), np.argsort(-labels), rng.permutation(60)]
    ]
    assert all(other["aurc"] == metrics[0]["aurc"] for other in metrics)
    assert all(other == pytest.approx(metrics[0]) for other in metrics)


def test_tied_confidence_is_the_mean_over_all_orders():
    probabilities, labels = binary([0.9, 0.7, 0.7, 0.7, 0.7, 0.6], [1, 0, 1, 0, 1, 0])
    risks = []
    # Any order of the four tied rows is equally likely; break the ties at random, by distinct confidences.
    for order in permutations([1, 2, 3, 4]):
        confidence = [0.9, *(0.7 + 0.01 * place for place in order), 0.6]
        risks.append(risk_coverage_curve(*binary(confidence, 1 - labels), from_logits=False).risk)
    curve = risk_coverage_curve(probabilities, labels, from_logits=False)
    np.testing.assert_allclose(curve.risk, np.mean(risks, axis=0))
    np.testing.assert_allclose(curve.coverage, np.arange(1, 7) / 6)
    constant = calibration_metrics(*binary([0.8] * 5, [0, 0, 1, 1, 1]), from_logits=False)
    assert constant["aurc"] == pytest.approx(400)


# Input forms


def test_ignored_rows_and_sequences():
    logits, labels = random_logits(rows=24)
    expected = calibration_metrics(logits, labels)
    padded = np.full((6, 6, 12), np.nan)
    padded[:, :4] = logits.reshape(6, 4, 12)
    padded_labels = np.full((6, 6), -100)
    padded_labels[:, :4] = labels.reshape(6, 4)
    assert calibration_metrics(padded, padded_labels) == expected
    assert calibration_metrics(logits.reshape(6, 4, 12), labels.reshape(6, 4)) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_every_precision(dtype):
    logits, labels = random_logits(rows=40)
    tensor = torch.tensor(logits, dtype=dtype, requires_grad=True)
    expected = calibration_metrics(tensor.detach().double().numpy(), labels)
    assert calibration_metrics(tensor, torch.tensor(labels)) == expected
    assert calibration_metrics((tensor, torch.zeros(3, 4)), torch.tensor(labels, dtype=torch.int32)) == expected
    probabilities = tensor.detach().softmax(-1)
    assert calibration_metrics(probabilities, labels, from_logits=False) == pytest.approx(expected, rel=0.15)


def test_lists_and_tuples_of_rows():
    expected = calibration_metrics(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
    assert calibration_metrics([[2, 0], [0, 1]], [0, 0]) == expected
    assert calibration_metrics(([2, 0], [0, 1]), (0, 0)) == expected


def test_chunks_change_nothing(monkeypatch):
    logits, labels = random_logits(rows=101)
    labels[::7] = -100
    expected = calibration_metrics(logits, labels)
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", 36)
    assert calibration_metrics(logits, labels) == expected


@pytest.mark.parametrize(
    ("predictions", "labels", "from_logits", "message"),
    [
        (np.zeros((3, 2)), [0, 1], True, r"labels: shape \(2,\) does not fit predictions of shape \(3, 2\); pass"),
        (np.zeros(3), [0, 1], True, r"labels: shape \(2,\) does not fit predictions of shape \(3,\); pass"),
        (np.arange(2), [0, 1], True, r"predictions: integers of shape \(2,\) are classes; pass the scores"),
        (np.zeros(3), [0, 1, 2], True, r"labels: 2 is outside 0\.\.1; check"),
        (np.array([0.5, 1.5]), [0, 1], False, r"predictions: rows are not probabilities \(smallest value -0\.5"),
        (np.zeros((2, 3)), np.eye(3)[:2], True, r"labels: shape \(2, 3\) does not fit"),
        (np.zeros((2, 3)), None, True, r"labels: None; pass the labels"),
        (np.zeros((2, 3)), [None, 1], True, r"labels: got list that is no array of numbers"),
        (None, [0, 1], True, r"predictions: got NoneType that is no array of numbers"),
        (np.zeros((2, 3, 1)), np.zeros((2, 3), int), True, r"predictions: 1 class in the last dimension; pass"),
        ([np.zeros((2, 3))], [np.zeros(2, int)] * 2, True, r"labels: 2 batches for 1 of predictions; pass one for"),
        (np.zeros((2, 2)), [-100, -100], True, r"labels: none is a class \(all are -100.*pass labelled rows"),
        (np.zeros((0, 2)), [], True, r"labels: none is a class"),
        (np.zeros((2, 2)), [0, 2], True, r"labels: 2 is outside 0\.\.1; check"),
        (np.zeros((2, 2)), [0, -1], True, r"labels: -1 is outside 0\.\.1; check"),
        (np.zeros((2, 2)), [0.0, 1.5], True, r"labels: dtype float64 is not an integer type; pass"),
        (np.array([[np.nan, 0], [0, 1]]), [0, 1], True, r"predictions: NaN, \+inf or nothing but -inf in 1 of 2 "),
        (np.array([[0, np.inf]]), [0], True, r"predictions: NaN, \+inf or nothing but -inf in 1 of 1 labelled rows"),
        (np.array([[-np.inf, -np.inf]]), [0], True, r"predictions: NaN, \+inf or nothing but -inf"),
        (np.array([[np.nan, 0]]), [0], False, r"predictions: NaN, \+inf or nothing but -inf"),
        (np.array([[1, -np.inf]]), [0], False, r"predictions: rows are not probabilities"),
        (np.array([[1.2, -0.2]]), [0], False, r"predictions: rows are not probabilities \(smallest value -0\.2"),
        (np.array([[0.5, 0.49]]), [0], False, r"predictions: rows are not probabilities .* pass from_logits=True"),
        ([[1.0, 0.0], [1.0]], [0, 1], True, r"predictions: got list that is no array of numbers .*; pass one array"),
    ],
)
def test_bad_input_is_one_clear_line(predictions, labels, from_logits, message):
    with pytest.raises(ValueError, match="^" + message) as caught:
        calibration_metrics(predictions, labels, from_logits=from_logits)
    assert "\n" not in str(caught.value)


def test_curves_refuse_what_the_metrics_refuse():
    for curve in (reliability_curve, risk_coverage_curve):
        with pytest.raises(ValueError, match="labels: none is a class"):
            curve(np.zeros((1, 2)), [-100])
        with pytest.raises(ValueError, match="predictions: NaN"):
            curve(np.array([[np.nan, 0]]), [0])
    with pytest.raises(ValueError, match="bins: got 0; use at least 1"):
        reliability_curve(np.zeros((1, 2)), [0], bins=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_at_minus_infinity_have_probability_zero(dtype):
    logits, labels = random_logits(rows=60)
    tensor = torch.tensor(logits, dtype=dtype)
    tensor[:, -3:] = -torch.inf  # as models mask the classes that a task does not have
    labels[labels >= 9] = 0
    kept = tensor[:, :9]
    assert calibration_metrics(tensor, labels) == pytest.approx(calibration_metrics(kept, labels), rel=1e-12)
    assert calibration_metrics(tensor, labels)["nll"] == pytest.approx(log_loss(labels, kept.double().softmax(-1)))
    assert reliability_curve(tensor, labels).count.tolist() == reliability_curve(kept, labels).count.tolist()
    assert risk_coverage_curve(tensor, labels).aurc == risk_coverage_curve(kept, labels).aurc


def test_a_label_of_probability_zero_costs_infinitely_much_and_spoils_nothing_else():
    metrics = calibration_metrics([[0.0, -np.inf], [0.0, -np.inf]], [0, 1])
    assert metrics.pop("nll") == np.inf
    assert metrics["accuracy"] == 0.5 and metrics["brier"] == 1 and metrics["ece"] == 50
    assert all(np.isfinite(list(metrics.values())))


# Two classes


@pytest.mark.parametrize("shape", [(200,), (200, 1)])
@pytest.mark.parametrize("form", [np.asarray, torch.tensor, lambda values: torch.tensor(values).float()])
def test_binary_scores_of_one_class(shape, form):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=200)
    labels = (rng.random(200) < 1 / (1 + np.exp(-logits + 1))).astype(int)
    probabilities = 1 / (1 + np.exp(-logits))
    both = np.stack([1 - probabilities, probabilities], axis=1)
    expected = calibration_metrics(both, labels, from_logits=False)
    assert expected["nll"] == pytest.approx(log_loss(labels, probabilities))
    assert expected["brier"] == pytest.approx(2 * brier_score_loss(labels, probabilities))
    for values, from_logits in ((probabilities, False), (logits, True)):
        given = form(values.reshape(shape))
        assert calibration_metrics(given, labels, from_logits) == pytest.approx(expected, rel=1e-5)
        assert calibration_metrics(given, labels[:, None], from_logits) == pytest.approx(expected, rel=1e-5)
        assert reliability_curve(given, labels, from_logits=from_logits).ece == pytest.approx(expected["ece"])
        assert risk_coverage_curve(given, labels, from_logits).aurc == pytest.approx(expected["aurc"])


def test_the_bins_of_a_binary_classifier_are_of_its_confidence():
    # Unlike those of the probability of class 1: 0.1 is a confidence of 0.9 in class 0.
    curve = reliability_curve([0.1, 0.85, 0.3, 0.5], [0, 1, 1, 1], from_logits=False)
    assert np.flatnonzero(curve.count).tolist() == [4, 6, 8]
    assert curve.accuracy[[4, 6, 8]].tolist() == [0, 0, 1]
    assert calibration_metrics([-np.inf, 800.0], [0, 1])["nll"] == 0


# What a Trainer hands out


def test_lists_of_batches_of_different_shapes():
    logits, labels = random_logits(rows=25)
    expected = calibration_metrics(logits, labels)
    batches, parts = [logits[:10], logits[10:20], logits[20:]], [labels[:10], labels[10:20], labels[20:]]
    compute = ClassificationMetrics()
    assert calibration_metrics(batches, parts) == compute((batches, parts)) == expected
    assert calibration_metrics([(batch, None) for batch in batches], parts) == expected
    assert calibration_metrics([(None, batch, batch[:, :1]) for batch in batches], tuple(parts)) == expected
    sequences = [logits[:12].reshape(2, 6, 12), logits[12:20].reshape(2, 4, 12), logits[20:].reshape(1, 5, 12)]
    of_tokens = [labels[:12].reshape(2, 6), labels[12:20].reshape(2, 4), labels[20:].reshape(1, 5)]
    assert calibration_metrics(sequences, of_tokens) == expected
    assert calibration_metrics([x.tolist() for x in sequences], [x.tolist() for x in of_tokens]) == expected
    scores = [batch[:, 0] for batch in batches]
    assert calibration_metrics(scores, [part % 2 for part in parts]) == calibration_metrics(logits[:, 0], labels % 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lists_of_tensors(dtype):
    logits, labels = random_logits(rows=20)
    tensor = torch.tensor(logits, dtype=dtype)
    expected = calibration_metrics(tensor, labels)
    assert calibration_metrics(list(tensor), list(torch.tensor(labels))) == expected
    batches = [part.requires_grad_() for part in tensor.split(8)]
    assert calibration_metrics(batches, torch.tensor(labels).split(8)) == expected


def test_outputs_that_are_none_are_passed_over():
    logits, labels = random_logits(rows=20)
    expected, hidden = calibration_metrics(logits, labels), np.zeros((20, 3, 2))
    for outputs in ((logits, None), (None, logits), (logits, None, hidden), (None, logits, hidden)):
        assert calibration_metrics(outputs, labels) == expected
    binary = (logits[:, 0], hidden)
    assert calibration_metrics(binary, labels % 2) == calibration_metrics(logits[:, 0], labels % 2)
    with pytest.raises(ValueError, match="^predictions: got tuple that is no array of numbers"):
        calibration_metrics((None, None), labels)


@pytest.mark.parametrize(
    ("logits", "labels", "told"),
    [
        (np.zeros((6, 4)), np.full(6, -100), "labels: none is a class"),
        (np.zeros((0, 4)), np.zeros(0, int), "labels: none is a class"),
        (np.full((6, 4), np.nan), np.arange(6) % 4, "predictions: NaN, +inf or nothing but -inf in 6 of 6"),
        (np.full((6, 4), -np.inf), np.arange(6) % 4, "predictions: NaN, +inf or nothing but -inf in 6 of 6"),
        (np.diag([0, 0, 0, np.inf]), np.arange(4), "predictions: NaN, +inf or nothing but -inf in 1 of 4"),
    ],
)
def test_an_evaluation_without_metrics_has_nan_and_one_warning(logits, labels, told, caplog):
    compute = ClassificationMetrics()
    whole = compute((logits, labels))
    assert len(caplog.records) == 1 and caplog.text.count(told) == 1
    compute((logits[:2], labels[:2]), compute_result=False)
    compute((logits[2:4], labels[2:4]), compute_result=False)
    batched = compute((logits[4:], labels[4:]), compute_result=True)
    assert len(caplog.records) == 2 and caplog.text.count(told) == 2
    for values in (whole, batched):
        assert list(values) == KEYS and np.isnan(list(values.values())).all()
    assert compute(random_logits())["accuracy"] > 0


# Names


@pytest.mark.parametrize("before", ["", "eval_", "test_", "eval_my-set_", "eval_head0_", "head11_", "eval_a_b_"])
def test_which_metrics_are_better_when_lower(before):
    lower = {"nll", "bce", "brier", "ece", "ece_15", "aurc", "eaurc", "d_ece"}
    texts = {"token_nll", "token_ece", "perplexity", "wer", "cer"}
    assert set(LOWER_IS_BETTER) == lower | texts
    for name in lower | texts:
        assert is_lower_better(before + name)
    for name in (set(KEYS) - lower) | {"token_accuracy", "bleu", "chrf", "gen_len", "piece", "f1", "recce"}:
        assert not is_lower_better(before + name)


# Trainer


def test_accumulated_batches_equal_one_call():
    logits, labels = random_logits(rows=50)
    labels[10:20] = -100  # a batch without a labelled row
    compute = ClassificationMetrics()
    for start in range(0, 40, 10):
        assert compute((logits[start : start + 10], labels[start : start + 10]), compute_result=False) == {}
    metrics = compute((logits[40:], labels[40:]), compute_result=True)
    assert metrics == calibration_metrics(logits, labels)
    assert compute((logits[40:], labels[40:]), compute_result=True) == calibration_metrics(logits[40:], labels[40:])


def test_an_interrupted_evaluation_leaves_nothing_behind():
    logits, labels = random_logits(rows=20)
    compute = ClassificationMetrics()
    compute((logits[:10], labels[:10]), compute_result=False)
    assert compute((logits, labels)) == calibration_metrics(logits, labels)  # whole evaluations ignore the rest
    compute((logits[:10], labels[:10]), compute_result=False)
    with pytest.raises(ValueError, match="is outside"):
        compute((logits[:10], labels[:10] + 99), compute_result=False)
    compute((logits[:10], labels[:10]), compute_result=False)
    compute.reset()
    compute((logits[:10], labels[:10]), compute_result=False)
    assert compute((logits[10:], labels[10:]), compute_result=True) == calibration_metrics(logits, labels)


class TinyModel(torch.nn.Module):
    """Scores of two linear maps, as a model with two outputs."""

    def __init__(self):
        super().__init__()
        self.score = torch.nn.Linear(4, 6)

    def forward(self, features, labels=None):
        logits = self.score(features)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits, "hidden": logits[:, :2]}


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_trainer_evaluate(batch_eval_metrics, tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model, features, labels = TinyModel(), torch.randn(22, 4), torch.randint(0, 6, (22,))
    dataset = [{"features": row, "labels": label} for row, label in zip(features, labels, strict=True)]
    args = TrainingArguments(
        output_dir=tmp_path, per_device_eval_batch_size=8, batch_eval_metrics=batch_eval_metrics, use_cpu=True
    )
    trainer = Trainer(model, args, eval_dataset=dataset, compute_metrics=compute_classification_metrics)
    expected = calibration_metrics(model.score(features), labels)
    for _ in range(2):  # the second evaluation must not see the first
        metrics = trainer.evaluate()
        assert {key: metrics[f"eval_{key}"] for key in KEYS} == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_a_run_goes_on_after_an_evaluation_without_labels(batch_eval_metrics, tmp_path, caplog):
    from transformers import Trainer, TrainingArguments

    features, labels = torch.randn(16, 4), torch.randint(0, 6, (16,))
    dataset = [{"features": row, "labels": label} for row, label in zip(features, labels, strict=True)]
    args = TrainingArguments(
        output_dir=tmp_path,
        per_device_eval_batch_size=8,
        batch_eval_metrics=batch_eval_metrics,
        use_cpu=True,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        report_to="none",
    )
    evaluated = [row | {"labels": torch.tensor(-100)} for row in dataset]
    trainer = Trainer(TinyModel(), args, None, dataset, evaluated, compute_metrics=compute_classification_metrics)
    trainer.train()
    assert trainer.state.global_step == 4
    evaluations = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    assert len(evaluations) == 2 and all(np.isnan(entry[f"eval_{key}"]) for entry in evaluations for key in KEYS)
    assert caplog.text.count("labels: none is a class") == 2


def test_trainer_evaluate_with_batches_that_are_not_joined(tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model, features, labels = TinyModel(), torch.randn(22, 4), torch.randint(0, 6, (22,))
    dataset = [{"features": row, "labels": label} for row, label in zip(features, labels, strict=True)]
    args = TrainingArguments(
        output_dir=tmp_path, per_device_eval_batch_size=8, eval_do_concat_batches=False, use_cpu=True
    )
    trainer = Trainer(model, args, eval_dataset=dataset, compute_metrics=compute_classification_metrics)
    expected = calibration_metrics(model.score(features), labels)
    metrics = trainer.evaluate()
    assert {key: metrics[f"eval_{key}"] for key in KEYS} == pytest.approx(expected, rel=1e-5)


# evaluate


@pytest.fixture
def offline_evaluate(monkeypatch, tmp_path):
    """`evaluate` with its caches in a temporary folder and no way to open a connection."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(evaluate.loading, "init_dynamic_modules", lambda: module_cache(tmp_path, monkeypatch))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    return evaluate


def module_cache(tmp_path, monkeypatch):
    folder = tmp_path / "evaluate_test_modules"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return str(folder)


def test_evaluate_metric_loads_and_computes_offline(offline_evaluate):
    metric = offline_evaluate.load(evaluate_module_path())
    logits, labels = random_logits(rows=30)
    labels[3] = -100
    expected = calibration_metrics(logits, labels)
    assert metric.compute(predictions=logits, references=labels) == expected
    for start in range(0, 30, 10):
        metric.add_batch(
            predictions=torch.tensor(logits[start : start + 10]), references=torch.tensor(labels[start : start + 10])
        )
    assert metric.compute() == expected
    for row, label in zip(logits, labels, strict=True):
        metric.add(prediction=row, reference=label)
    assert metric.compute() == expected
    probabilities = softmax(logits)
    assert metric.compute(predictions=probabilities, references=labels, from_logits=False) == calibration_metrics(
        probabilities, labels, from_logits=False
    )


def test_evaluate_metric_takes_sequences_of_different_lengths(offline_evaluate):
    metric = offline_evaluate.load(evaluate_module_path(), keep_in_memory=True)
    logits, labels = random_logits(rows=24)
    metric.add_batch(predictions=logits[:14].reshape(2, 7, 12), references=labels[:14].reshape(2, 7))
    metric.add_batch(predictions=logits[14:].reshape(2, 5, 12), references=labels[14:].reshape(2, 5))
    assert metric.compute() == calibration_metrics(logits, labels)


@pytest.mark.parametrize("column", [False, True])
def test_evaluate_metric_takes_binary_scores(offline_evaluate, column):
    metric = offline_evaluate.load(evaluate_module_path(), keep_in_memory=True)
    rng = np.random.default_rng(0)
    scores, labels = rng.random(20), rng.integers(0, 2, 20)
    given = scores[:, None] if column else scores
    expected = calibration_metrics(np.stack([1 - scores, scores], axis=1), labels, from_logits=False)
    metrics = metric.compute(predictions=given, references=labels, from_logits=False)
    assert metrics == pytest.approx(expected)
    metric.add_batch(predictions=torch.tensor(given[:8]), references=torch.tensor(labels[:8]))
    metric.add_batch(predictions=torch.tensor(given[8:]), references=torch.tensor(labels[8:]))
    assert metric.compute(from_logits=True) == pytest.approx(calibration_metrics(scores, labels))


def test_evaluate_metric_combines_and_picks_one_metric(offline_evaluate):
    path = evaluate_module_path()
    logits, labels = random_logits(rows=30)
    expected = calibration_metrics(logits, labels)
    named = {key: offline_evaluate.load(path, key) for key in ("ece", "nll")}
    both = offline_evaluate.combine(named)
    both.add_batch(predictions=logits, references=labels)
    assert both.compute() == {"ece": expected["ece"], "nll": expected["nll"]}
    twice = offline_evaluate.combine({"a": path, "b": path}).compute(predictions=logits, references=labels)
    assert twice == {f"{name}_{key}": expected[key] for name in "ab" for key in KEYS}
    with pytest.raises(ValueError, match="^config_name: 'auc' is no metric; use one of accuracy, "):
        offline_evaluate.load(path, "auc")


def test_evaluate_metric_passes_errors_on_and_recovers(offline_evaluate):
    metric = offline_evaluate.load(evaluate_module_path(), keep_in_memory=True)
    with pytest.raises(ValueError, match="^labels: 7 is outside"):
        metric.compute(predictions=[[0.0, 1.0]], references=[7])
    assert metric.compute(predictions=[[0.0, 1.0]], references=[1])["accuracy"] == 1


def test_the_metric_class_can_be_imported(offline_evaluate):
    from hf_selfkd.metrics.evaluate_module import CalibrationMetric

    assert list(CalibrationMetric(keep_in_memory=True).compute(predictions=[[0.0, 1.0]], references=[1])) == KEYS


def test_the_metric_class_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r'^CalibrationMetric needs .*: pip install "hf_selfkd\[evaluate\]"\.$'):
        runpy.run_path(evaluate_module_path())


WITHOUT = """
import sys, types
package = types.ModuleType("hf_selfkd")
package.__path__ = [{path!r}]
sys.modules["hf_selfkd"] = package  # the package itself imports all of these
for name in ("evaluate", "torch", "transformers", "matplotlib"):
    sys.modules[name] = None
from hf_selfkd.metrics import calibration_metrics, is_lower_better
assert calibration_metrics([[2.0, 0.0]], [0])["accuracy"] == 1 and is_lower_better("eval_ece")
"""


def test_metrics_need_neither_evaluate_nor_torch():
    path = str(Path(hf_selfkd.__file__).parent)
    subprocess.run([sys.executable, "-c", WITHOUT.format(path=path)], check=True, timeout=60)
