"""Streamed token metrics against the metrics of all rows at once, in float64."""

import math

import numpy as np
import pytest
import torch

from hf_selfkd.metrics import calibration_metrics, tokens
from hf_selfkd.metrics.tokens import TokenMetrics


NAMES = ["token_nll", "token_accuracy", "token_ece", "perplexity"]


def alone(sums):
    return sums


def make_batch(seed=0, size=4, length=6, vocabulary=30, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, length, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (size, length), generator=generator)
    logits.scatter_add_(2, labels.unsqueeze(-1), 4 * torch.rand(size, length, 1, generator=generator))
    labels[torch.rand(size, length, generator=generator) < 0.3] = -100
    return logits.to(dtype), labels


def streamed(batches, gather=alone):
    metrics = TokenMetrics(gather)
    for logits, labels in batches:
        metrics.update(logits, labels)
        metrics.gather()
    return metrics.compute()


def expected(batches):
    rows = [logits.flatten(0, 1).double() for logits, _ in batches]
    metrics = calibration_metrics(torch.cat(rows), torch.cat([labels.flatten() for _, labels in batches]))
    own = {f"token_{name}": metrics[name] for name in ("nll", "accuracy", "ece")}
    return own | {"perplexity": math.exp(metrics["nll"])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_batches_of_every_precision_equal_all_rows_at_once(dtype):
    batches = [
        make_batch(seed, size, length, dtype=dtype) for seed, (size, length) in enumerate([(4, 6), (4, 9), (1, 3)])
    ]
    metrics = streamed(batches)
    assert list(metrics) == NAMES and all(type(value) is float for value in metrics.values())
    assert metrics == pytest.approx(expected(batches), rel=2e-6)


def test_how_many_batches_are_held_changes_nothing(monkeypatch):
    batches = [make_batch(seed) for seed in range(7)]
    whole = streamed(batches)
    monkeypatch.setattr(tokens, "BATCHES_HELD", 3)
    assert streamed(batches) == pytest.approx(whole, rel=1e-12)
    assert whole == pytest.approx(expected(batches), rel=1e-6)


def test_many_batches_do_not_drift():
    """Sums of float32 alone would stop to grow: 40,000 times 300 tokens of nll 8 are more than 2**24."""
    metrics = TokenMetrics(alone)
    metrics.seen = torch.zeros(1, 31)
    metrics.seen[0, 0], metrics.seen[0, 1] = 2400.3, 300
    seen = metrics.seen
    for _ in range(40_000):
        metrics.seen = seen
        metrics.gather()
    assert metrics.compute()["token_nll"] == pytest.approx(2400.3 / 300, rel=1e-6)


def test_compute_may_be_called_in_between_and_empty_batches_may_come():
    first, second = make_batch(0), make_batch(1)
    nothing = (second[0], torch.full_like(second[1], -100))
    metrics = TokenMetrics(alone)
    metrics.gather()  # nothing was seen
    assert metrics.compute() == {}
    for logits, labels in (nothing, first):
        metrics.update(logits, labels)
        metrics.gather()
    assert metrics.compute() == pytest.approx(expected([first]), rel=1e-6)
    metrics.update(*second)
    metrics.gather()
    assert metrics.compute() == pytest.approx(expected([first, second]), rel=1e-6)


def test_repeated_samples_are_dropped_by_the_gather():
    batches = [make_batch(0), make_batch(1)]
    kept = [batches[0], tuple(part[:3] for part in batches[1])]
    sizes = iter([4, 3])
    assert streamed(batches, lambda sums: sums[: next(sizes)]) == pytest.approx(expected(kept), rel=1e-6)


def test_confidence_on_an_edge_belongs_to_the_bin_below():
    logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0]]])
    metrics = TokenMetrics(alone)
    metrics.update(logits, torch.tensor([[0, 0]]))
    assert metrics.seen[0, 1:11].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert metrics.seen[0, 21:].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]  # of equal scores the first class


# What models give


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_minus_infinity(dtype):
    logits, labels = make_batch(dtype=dtype)
    logits[..., 20:] = -torch.inf
    labels[labels >= 20] = 3
    metrics = streamed([(logits, labels)])
    assert metrics == pytest.approx(expected([(logits[..., :20], labels)]), rel=2e-6)
    labels[0, 0] = 25
    metrics = streamed([(logits, labels)])
    assert metrics["token_nll"] == metrics["perplexity"] == math.inf
    assert 0 < metrics["token_accuracy"] < 1 and 0 < metrics["token_ece"] < 100


def test_ignored_positions_may_hold_anything():
    logits, labels = make_batch()
    plain = streamed([(logits, labels)])
    for value in (torch.nan, torch.inf, -torch.inf):
        spoiled = logits.masked_fill((labels == -100).unsqueeze(-1), value)
        assert streamed([(spoiled, labels)]) == plain


def test_perplexity_overflows_to_infinity():
    metrics = streamed([(torch.tensor([[[0.0, 2000.0]]]), torch.tensor([[0]]))])
    assert metrics["token_nll"] == 2000 and metrics["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("value", "label", "told"),
    [
        (0.0, -100, "labels: all are -100; the token metrics"),
        (torch.nan, 1, "logits: NaN, +inf or nothing but -inf for a token; the token metrics"),
        (torch.inf, 1, "logits: NaN, +inf or nothing but -inf for a token; the token metrics"),
        (-torch.inf, 1, "logits: NaN, +inf or nothing but -inf for a token; the token metrics"),
    ],
)
def test_what_cannot_be_computed_is_nan_with_one_warning(value, label, told, caplog):
    batch = (torch.full((2, 3, 4), value), torch.full((2, 3), label))
    metrics = streamed([batch, batch])
    assert list(metrics) == NAMES and all(map(math.isnan, metrics.values()))
    assert len(caplog.records) == 1 and told in caplog.text


@pytest.mark.parametrize("shape", [(4, 6), (24,), (4, 5)])
def test_shapes_that_do_not_fit_are_one_clear_line(shape):
    logits, _ = make_batch()
    logits = logits[:, :, 0] if shape == (4, 6) else logits
    with pytest.raises(ValueError, match=r"^labels: shape \[.*\] does not fit logits of shape \[.*\]; pass \[B, L\]"):
        TokenMetrics(alone).update(logits, torch.zeros(shape, dtype=torch.int64))


# Memory and waiting


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest result that is made, the dtypes and the operations that wait for the device."""

    def __init__(self):
        super().__init__()
        self.largest, self.dtypes, self.waits = 0, set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)
        }  # a view makes nothing
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.numel())
            self.dtypes.add(result.dtype)
        if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
            self.waits.append(str(function))
        return result


@pytest.mark.parametrize("sliced", [False, True])
def test_no_copy_of_all_logits_no_float64_and_no_waiting_in_a_batch(monkeypatch, sliced):
    sizes = (2, 65, 1000) if sliced else (2, 64, 1000)
    logits, labels = make_batch(0, *sizes, dtype=torch.bfloat16)
    if sliced:  # all but the last position: no copy of that is made either
        logits, labels = logits[:, :-1], labels[:, 1:]
    whole = streamed([(logits, labels)])
    rows = 8
    monkeypatch.setattr(tokens, "chunks", lambda rows_: [slice(i, i + rows) for i in range(0, len(rows_), rows)])
    metrics = TokenMetrics(alone)
    with Watched() as watched:
        metrics.update(logits, labels)
        metrics.gather()
    assert watched.largest <= rows * 1000
    assert torch.float64 not in watched.dtypes and torch.float32 in watched.dtypes
    assert not watched.waits
    assert metrics.compute() == pytest.approx(whole, rel=1e-6)


def test_chunks_change_nothing(monkeypatch):
    batches = [make_batch(seed) for seed in range(2)]
    whole = streamed(batches)
    monkeypatch.setattr(tokens, "chunks", lambda rows: [slice(i, i + 5) for i in range(0, len(rows), 5)])
    assert streamed(batches) == pytest.approx(whole, rel=1e-6)
    assert streamed([(logits.transpose(0, 1), labels.T) for logits, labels in batches]) == pytest.approx(
        whole, rel=1e-6
    )


def test_the_host_is_told_rarely(monkeypatch):
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.dtype) or cpu(tensor))
    metrics, (logits, labels) = TokenMetrics(alone), make_batch()
    for _ in range(2 * tokens.BATCHES_HELD + 5):
        metrics.update(logits, labels)
        metrics.gather()
    assert copies == [torch.float32] * 2
    assert np.isfinite(list(metrics.compute().values())).all() and copies == [torch.float32] * 3
