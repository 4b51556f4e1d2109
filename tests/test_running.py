"""The means of the log against sums over rows in float64; how rarely soft targets are read for them."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_selfkd.losses import SoftTargets, progressive_cross_entropy
from hf_selfkd.losses.soft_targets import Target
from hf_selfkd.metrics import running
from hf_selfkd.metrics.running import RunningMeans


CLASSES = 10


def alone(sums):
    return sums


def make_batch(seed, rows=16, top_k=None, known=0.7, ignored=True, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, requires_grad=True)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    if ignored:
        labels[::5] = -100
    past = torch.randn(rows, classes, generator=generator).log_softmax(-1)
    mask = torch.rand(rows, generator=generator) < known
    if top_k is None:
        return logits, labels, SoftTargets(past, mask)
    return logits, labels, SoftTargets(past.topk(top_k).values, mask, past.topk(top_k).indices)


def add(means, batch, alpha=0.4, hard=None):
    logits, labels, soft = batch
    losses = [progressive_cross_entropy(logits, labels, soft, alpha)]
    means.update([Target(labels, soft, None)], losses, alpha, hard)


def expected(batches, alpha=0.4):
    """The means over the rows of batches with whole soft targets, row by row."""
    sums = dict.fromkeys(("rows", "known", "hard", "soft", "entropy", "agree"), 0.0)
    for logits, labels, soft in batches:
        log_probs = logits.detach().double().log_softmax(-1)
        for row, label, past, known in zip(
            log_probs, labels.tolist(), soft.log_probs, soft.mask.tolist(), strict=True
        ):
            if label == -100:
                continue
            sums["rows"] += 1
            sums["hard"] -= row[label].item()
            if known:
                probs = past.double().exp()
                target = alpha * probs + (1 - alpha) * F.one_hot(torch.tensor(label), len(probs))
                sums["known"] += 1
                sums["soft"] -= (probs * row).sum().item()
                sums["entropy"] -= torch.special.xlogy(target, target).sum().item()
                sums["agree"] += probs.argmax().item() == label
    return {
        "alpha": alpha,
        "hard_loss": sums["hard"] / sums["rows"],
        "rows_with_history": sums["known"] / sums["rows"],
        "soft_loss": sums["soft"] / sums["known"],
        "target_entropy": sums["entropy"] / sums["rows"],
        "past_agreement": sums["agree"] / sums["known"],
    }


def losses_of(means):
    return {name: value for name, value in means.items() if name not in ("target_entropy", "past_agreement")}


@pytest.mark.parametrize("count", [1, 5])
def test_means_are_those_of_the_rows(count):
    means, batches = RunningMeans(), [make_batch(seed) for seed in range(count)]
    for _ in range(2):  # nothing of the first window is left in the second
        for batch in batches:
            add(means, batch)
        assert means.take(alone, distils=True) == pytest.approx(expected(batches), rel=1e-5)
    assert means.take(alone, distils=True) == {}


def test_without_soft_targets_there_is_the_hard_loss_alone():
    means, (_, labels, _) = RunningMeans(), make_batch(0)
    for total in (3.0, 5.0):
        means.update([Target(labels, None, None)], [], 0.0, torch.tensor(total))
    rows = 2 * (labels != -100).sum().item()
    assert means.take(alone, distils=False) == {"alpha": 0, "hard_loss": pytest.approx(8 / rows)}


def test_a_hard_loss_of_ones_own_stands_for_that_of_the_rows():
    means, batches = RunningMeans(), [make_batch(seed) for seed in range(3)]
    for batch in batches:
        add(means, batch, hard=torch.tensor(2.5))
    values, others = means.take(alone, distils=True), expected(batches)
    rows = sum((labels != -100).sum().item() for _, labels, _ in batches)
    assert values.pop("hard_loss") == pytest.approx(7.5 / rows)
    del others["hard_loss"]
    assert values == pytest.approx(others, rel=1e-5)


def test_mixed_images_count_both_sides_and_have_no_entropy():
    logits, labels, soft = make_batch(0, ignored=False)
    order, weight = torch.arange(16).flip(0), torch.tensor(0.7)
    targets = [Target(labels, soft, weight), Target(labels[order], soft.select(order), 1 - weight)]
    means = RunningMeans()
    for _ in range(2):
        losses = [progressive_cross_entropy(logits, side.labels, side.soft_targets, 0.4) for side in targets]
        means.update(targets, losses, 0.4)
    values = means.take(alone, distils=True)
    sides = [expected([(logits, side.labels, side.soft_targets)]) for side in targets]
    assert values["hard_loss"] == pytest.approx(0.7 * sides[0]["hard_loss"] + 0.3 * sides[1]["hard_loss"], rel=1e-5)
    assert values["past_agreement"] == pytest.approx(sides[0]["past_agreement"])
    assert "target_entropy" not in values


# Soft targets are read rarely


def counted(monkeypatch):
    """The number of rows of each call that reads soft targets for the log."""
    rows, read = [], running.target_entropy
    monkeypatch.setattr(
        running, "target_entropy", lambda soft, *rest: rows.append(len(soft.mask)) or read(soft, *rest)
    )
    return rows


@pytest.mark.parametrize("top_k", [None, 4])
def test_soft_targets_are_read_when_they_are_logged_only(monkeypatch, top_k):
    rows = counted(monkeypatch)
    means, batches = RunningMeans(), [make_batch(seed, 1000, top_k) for seed in range(60)]
    for batch in batches:
        add(means, batch)
    assert rows == []
    values = means.take(alone, distils=True)
    width = top_k or CLASSES
    assert running.MAX_HELD / 2 < sum(rows) * width <= 2 * running.MAX_HELD
    if top_k is None:
        exact, latest = expected(batches), expected(batches[-sum(rows) // 1000 :])
        assert losses_of(values) == pytest.approx(losses_of(exact), rel=1e-5)
        for name in ("target_entropy", "past_agreement"):
            assert values[name] == pytest.approx(latest[name], rel=1e-5)


@pytest.mark.parametrize(("rows", "classes", "read"), [(1000, 10, 500), (700, 10, 350), (600, 100, 200)])
def test_of_a_large_batch_a_sample_is_read(monkeypatch, rows, classes, read):
    monkeypatch.setattr(running, "MAX_HELD", 5000)
    calls = counted(monkeypatch)
    means, batches = RunningMeans(), [make_batch(seed, rows, classes=classes) for seed in range(3)]
    for batch in batches:
        add(means, batch)
        assert all(kept.soft_targets.log_probs.numel() <= read * classes for kept in means._recent)
        assert not means._waiting
    values, step = means.take(alone, distils=True), math.ceil(rows / max(256, 5000 // classes))
    assert calls == [read]
    logits, labels, soft = batches[-1]
    sample = [(logits[::step], labels[::step], soft.select(slice(None, None, step)))]
    assert losses_of(values) == pytest.approx(losses_of(expected(batches)), rel=1e-5)
    for name in ("target_entropy", "past_agreement"):
        assert values[name] == pytest.approx(expected(sample)[name], rel=1e-5)


def test_what_waits_keeps_no_graph_and_no_logits():
    means = RunningMeans()
    add(means, make_batch(0))
    (waiting,) = means._waiting
    tensors = [value for value in vars(waiting).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4 and not any(tensor.requires_grad for tensor in tensors)


# Terms of others


def test_terms_of_others_are_summed_and_divided_by_their_weight():
    means = RunningMeans()
    for loss, right in ((6.0, 1), (2.0, 3)):
        add(means, make_batch(0))
        means._add(
            {n: (torch.tensor(v), torch.tensor(4)) for n, v in (("head0_loss", loss), ("head0_accuracy", right))}
        )
    means._add({"head1_loss": (torch.tensor(5.0), torch.tensor(2.0))})
    values = means.take(alone, distils=True)
    assert values == pytest.approx(
        expected([make_batch(0)]) | {"head0_loss": 1.0, "head0_accuracy": 0.5, "head1_loss": 2.5}, rel=1e-5
    )
    add(means, make_batch(0))
    assert "head0_loss" not in means.take(alone, distils=True)


def test_a_name_in_several_groups_is_one_mean():
    means = RunningMeans()
    add(means, make_batch(0))
    means._add({n: (torch.tensor(v), torch.tensor(3.0)) for n, v in (("head0_loss", 3.0), ("head1_loss", 1.0))})
    means._add({"head0_loss": (torch.tensor(5.0), torch.tensor(1.0))})
    values = means.take(alone, distils=True)
    assert values["head0_loss"] == 2 and values["head1_loss"] == pytest.approx(1 / 3)


def test_processes_reduce_the_same_vector_once():
    """One process had heads in this window and the other none: announced terms keep their sums in one place."""
    names, sums = ("head0_loss", "head0_accuracy"), []
    for process in range(2):
        means = RunningMeans(terms=names)
        add(means, make_batch(process))
        if process:
            means._add({name: (torch.tensor(2.0), torch.tensor(4.0)) for name in names})
        means.take(lambda values: sums.append(values.clone()) or values, distils=True)
    assert len(sums) == 2 and len(sums[0]) == len(sums[1])
    means = RunningMeans(terms=names)
    add(means, make_batch(0))
    together = means.take(lambda values: sums[0] + sums[1], distils=True)
    assert together == pytest.approx(expected([make_batch(0), make_batch(1)]) | dict.fromkeys(names, 0.5), rel=1e-5)
