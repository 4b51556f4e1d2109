"""The prediction history against a dictionary: same epochs, same visits, one process or several."""

import re
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from hf_selfkd import SelfKDConfig
from hf_selfkd.files import load_tensors, save_tensors
from hf_selfkd.history import exchange, journal
from hf_selfkd.history.codec import Codec
from hf_selfkd.history.plan import SMALL, plan_history
from hf_selfkd.history.predictions import PredictionHistory
from hf_selfkd.history.table import NEVER, WARM_START
from hf_selfkd.samples import sample_index


CPU = torch.device("cpu")
CLASSES = 5
LENGTHS = (2, 1, 4, 0, 3)  # labelled positions of sample i, for tokens: LENGTHS[i % 5]


def log_rows(rows, *seed, classes=CLASSES):
    """Different predictions for every seed."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    return (2 * torch.randn(rows, classes, generator=generator)).log_softmax(-1)


def labels_of(ids, target=None):
    """Labels that belong to the ids: one each, or (with a padding side) sequences of their length, -100 between."""
    if target is None:
        return torch.tensor([i % CLASSES for i in ids])
    width = 2 * max((LENGTHS[i % 5] for i in ids), default=0) + 1
    labels = torch.full((len(ids), width), -100)
    for row, i in enumerate(ids):
        for position in range(LENGTHS[i % 5]):
            labels[row, 2 * position if target == "right" else width - 1 - 2 * (LENGTHS[i % 5] - 1 - position)] = (
                3 * i + position
            ) % CLASSES
    return labels


def batch(ids, *seed, target=None, classes=CLASSES):
    """Keys, log-probabilities of all rows (padding included), and labels."""
    labels = labels_of(ids, target)
    samples = sample_index(torch.tensor(ids, dtype=torch.int64), labels)
    return samples, log_rows(labels.numel(), *seed, classes=classes), labels.reshape(-1)


def make(tmp_path, size=10, dtype=torch.float32, top_k=None, place="accelerator", classes=CLASSES, **extra):
    return PredictionHistory(size, Codec(classes, dtype, top_k), place, CPU, tmp_path / "history", **extra)


def write(history, ids, *seed, target=None):
    samples, rows, labels = batch(ids, *seed, target=target)
    history.write(samples, rows, labels)
    return rows


class Dictionary:
    """What a history means: sample id -> (its labelled rows, the epoch they are from)."""

    def __init__(self):
        self.rows, self.new = {}, {}

    def write(self, ids, *seed, target=None):
        _, rows, labels = batch(ids, *seed, target=target)
        rows, labels = rows.reshape(len(ids), -1, CLASSES), labels.reshape(len(ids), -1)
        for i, own, valid in zip(ids, rows, labels != -100, strict=True):
            if valid.any() and torch.isfinite(own[valid]).all():
                self.new.setdefault(i, own[valid])

    def end_epoch(self, epoch):
        self.rows |= {i: (rows, epoch) for i, rows in self.new.items()}
        self.new = {}


def check(history, expected, ids, target=None, atol=0.0):
    """Everything that can be read of these samples, together and one by one."""
    for group in [ids, ids[::-1]] + [[i] for i in ids]:
        samples, rows, labels = batch(group, 0, target=target)
        soft_targets = history.read(samples, len(rows), CPU)
        known = [i for i in group if i in expected.rows]
        if not known:
            assert soft_targets is None
            continue
        mask = torch.zeros(len(group), len(rows) // len(group), dtype=torch.bool)
        for place, i in enumerate(group):
            mask[place] = (labels.reshape(mask.shape)[place] != -100) & (i in expected.rows)
        assert torch.equal(soft_targets.mask, mask.reshape(-1)) and soft_targets.log_probs.dtype == torch.float32
        assert torch.isfinite(soft_targets.log_probs).all()
        wanted = torch.cat([expected.rows[i][0] for i in known])
        held = soft_targets.log_probs[soft_targets.mask]
        if soft_targets.index is not None:
            wanted = wanted.gather(-1, soft_targets.index[soft_targets.mask])
            assert (
                wanted.amin(-1) >= torch.cat([expected.rows[i][0] for i in known]).topk(held.shape[1])[0][:, -1]
            ).all()
        torch.testing.assert_close(held, wanted, atol=atol, rtol=0)
    stamps = [expected.rows[i][1] if i in expected.rows else NEVER for i in ids]
    assert history.stamps[history.slots(np.array(ids))].tolist() == stamps


# Codec


@pytest.mark.parametrize("top_k", [None, 3, CLASSES])
def test_float32_is_exact(top_k):
    """Bit for bit; top-k keeps the largest."""
    rows = log_rows(50, 1)
    codec = Codec(CLASSES, torch.float32, top_k)
    soft_targets = codec.decode(codec.encode(rows), torch.ones(50, dtype=torch.bool))
    if top_k is None:
        assert torch.equal(soft_targets.log_probs, rows) and soft_targets.index is None
    else:
        ordered = rows.sort(dim=-1, descending=True)
        assert torch.equal(soft_targets.log_probs, ordered.values[:, :top_k])
        assert torch.equal(soft_targets.index, ordered.indices[:, :top_k]) and soft_targets.index.dtype == torch.int64


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("classes", [3, 1000])
def test_half_precision_error_is_bounded(dtype, unit, classes):
    """Invariant 19: rounding costs unit * |log p|, renormalising at most unit * entropy more; the mass stays 1."""
    rows = log_rows(200, 2, classes=classes)
    codec = Codec(classes, dtype)
    stored = codec.encode(rows)
    soft_targets = codec.decode(stored, torch.ones(200, dtype=torch.bool))
    entropy = -(rows.exp() * rows).sum(-1, keepdim=True)
    error = (soft_targets.log_probs - rows).abs()
    assert (error <= 1.05 * unit * (rows.abs() + entropy) + 1e-5).all()
    assert stored["log_probs"].dtype == dtype and soft_targets.log_probs.dtype == torch.float32
    total = soft_targets.log_probs.double().exp().sum(-1)
    assert (total - 1).abs().max() < 1e-5
    assert (stored["log_probs"].double().exp().sum(-1) - 1).abs().max() > 1e-5  # so renormalising matters
    assert (error > 0.2 * unit * rows.abs()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_targets_are_probabilities(dtype):
    """Invariant 4: no target has a negative entry or more than the whole mass, sharp or flat."""
    sharp = torch.tensor([[0.0, 60, 0, 0, 0], [20, 20, 0, 0, -40], [0, 0, 0, 0, 0], [9, 8, 7, 6, 5.0]]).log_softmax(-1)
    for top_k in (None, 1, 2, 4, 5):
        codec = Codec(CLASSES, dtype, top_k)
        soft_targets = codec.decode(codec.encode(sharp), torch.ones(4, dtype=torch.bool))
        total = soft_targets.log_probs.exp().sum(-1)
        assert (total <= 1 + 1e-6).all() and torch.isfinite(soft_targets.log_probs).all()
        if top_k is None:
            torch.testing.assert_close(total, torch.ones(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32), (50_257, torch.int32), (2, torch.int16)]
)
def test_index_type_holds_every_class(classes, dtype):
    """The first and the last class survive."""
    codec = Codec(classes, torch.float16, 2)
    rows = torch.full((1, classes), -20.0)
    rows[0, [0, -1]] = torch.tensor([-1.0, -0.5])
    stored = codec.encode(rows)
    assert stored["index"].dtype == codec.index_dtype == dtype
    soft_targets = codec.decode(stored, torch.ones(1, dtype=torch.bool))
    assert soft_targets.index.tolist() == [[classes - 1, 0]] and soft_targets.log_probs.tolist() == [[-0.5, -1.0]]


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (Codec(100, torch.float32), 400),
        (Codec(100, torch.bfloat16), 200),
        (Codec(1000, torch.float16, 32), 32 * 4),
        (Codec(50_000, torch.float16, 32), 32 * 6),
        (Codec(50_000, torch.float32, 1), 8),
    ],
)
def test_row_bytes_are_what_is_stored(codec, expected):
    stored = codec.encode(log_rows(3, 1, classes=codec.num_classes))
    assert codec.row_bytes == expected == sum(part.numel() * part.element_size() for part in stored.values()) // 3
    assert {name: (part.shape[1], part.dtype) for name, part in stored.items()} == codec.widths


@pytest.mark.parametrize("top_k", [None, 2])
def test_nan_stays_nan(top_k):
    rows = log_rows(2, 1)
    rows[1] = float("nan")
    stored = Codec(CLASSES, torch.float16, top_k).encode(rows)["log_probs"]
    assert torch.isfinite(stored[0]).all() and stored[1].isnan().any()


# One process: read and write


CODECS = {
    "dense": ({}, 0.0),
    "half": ({"dtype": torch.float16}, 0.02),
    "bfloat": ({"dtype": torch.bfloat16}, 0.12),
    "top": ({"top_k": 2}, 0.0),
    "half top": ({"top_k": 3, "dtype": torch.float16}, 0.02),
}


def test_what_is_written_is_read_in_the_next_epoch(tmp_path):
    """Invariants 11 and 12: nothing before, and not the new row after."""
    table, ids = make(tmp_path), [3, 1, 8]
    samples, _, _ = batch(ids, 0)
    assert table.read(samples, 3, CPU) is None
    first = write(table, ids, 1)
    assert table.read(samples, 3, CPU) is None
    table.end_epoch(0)
    assert torch.equal(table.read(samples, 3, CPU).log_probs, first)
    second = write(table, ids, 2)
    assert torch.equal(table.read(samples, 3, CPU).log_probs, first)
    table.end_epoch(1)
    assert torch.equal(table.read(samples, 3, CPU).log_probs, second) and not torch.equal(first, second)


@pytest.mark.parametrize("place", ["accelerator", "disk"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("target", [None, "right", "left"])
def test_epochs_equal_a_dictionary(tmp_path, codec, place, target):
    """Shuffled, in batches of any size, some samples skipped and some repeated; the last batch is short."""
    arguments, atol = CODECS[codec]
    table, expected = make(tmp_path, place=place, ragged=target is not None, **arguments), Dictionary()
    rng = np.random.default_rng(0)
    for epoch in range(4):
        visits = rng.permutation(10).tolist()[: 4 + 2 * epoch] + rng.integers(0, 10, 3).tolist()
        size = epoch + 2
        for step, start in enumerate(range(0, len(visits), size)):
            ids = visits[start : start + size]
            write(table, ids, epoch, step, target=target)
            expected.write(ids, epoch, step, target=target)
        check_before = {i: rows for i, (rows, _) in expected.rows.items()}
        expected.end_epoch(epoch)
        table.end_epoch(epoch)
        check(table, expected, list(range(10)), target, atol)
        assert epoch == 0 or any(not torch.equal(expected.rows[i][0], check_before[i]) for i in check_before)


def test_the_padding_side_may_change(tmp_path):
    """Rows belong to labelled positions, wherever these stand."""
    table, expected = make(tmp_path, ragged=True), Dictionary()
    write(table, [0, 1, 2], 1, target="left")
    expected.write([0, 1, 2], 1, target="left")
    expected.end_epoch(0)
    table.end_epoch(0)
    check(table, expected, [2, 1, 0], "right")


def test_first_prediction_of_an_epoch_wins(tmp_path):
    """Replayed in a later batch, or twice in one; the next epoch takes over as usual."""
    table = make(tmp_path)
    first = write(table, [4, 5, 4], 1)
    write(table, [5, 4, 6], 2)
    table.end_epoch(0)
    stored = table.read(batch([4, 5], 0)[0], 2, CPU).log_probs
    assert torch.equal(stored, first[:2]) and not torch.equal(first[0], first[2])
    later = write(table, [4], 3)
    table.end_epoch(1)
    assert torch.equal(table.read(batch([4], 0)[0], 1, CPU).log_probs, later)


def test_samples_not_visited_keep_their_row_and_its_stamp(tmp_path):
    """Invariant 17; a sample never visited has no row at all, not zeros."""
    table = make(tmp_path)
    first = write(table, [0, 1], 1)
    table.end_epoch(WARM_START)
    for epoch in range(3):
        write(table, [1], 2 + epoch)
        table.end_epoch(epoch)
    assert table.stamps[:3].tolist() == [WARM_START, 2, NEVER]
    soft_targets = table.read(batch([0, 2], 0)[0], 2, CPU)
    assert soft_targets.mask.tolist() == [True, False] and torch.equal(soft_targets.log_probs[0], first[0])


def test_an_epoch_without_visits_changes_nothing(tmp_path):
    table, expected = make(tmp_path), Dictionary()
    table.end_epoch(0)
    check(table, expected, [0, 1])
    write(table, [0], 1)
    expected.write([0], 1)
    table.end_epoch(1)
    expected.end_epoch(1)
    table.end_epoch(2)
    check(table, expected, [0, 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("top_k", [None, 2])
def test_predictions_that_are_not_finite_are_dropped(tmp_path, bad, top_k):
    """The sample keeps its earlier row; those beside it in the batch are stored."""
    table, expected = make(tmp_path, top_k=top_k), Dictionary()
    write(table, [0, 1, 2], 1)
    expected.write([0, 1, 2], 1)
    table.end_epoch(0)
    expected.end_epoch(0)
    samples, rows, labels = batch([2, 1, 3], 2)
    rows[1, rows[1].argmax()] = bad
    rows[2] = float("nan")
    if bad == -float("inf") and top_k is not None:
        rows[1] = bad
    table.write(samples, rows, labels)
    table.end_epoch(1)
    expected.rows[2] = (rows[:1], 1)
    check(table, expected, [0, 1, 2, 3])


def test_a_first_prediction_that_is_not_finite_gives_way(tmp_path):
    """The replay is then the first good one."""
    table = make(tmp_path)
    samples, rows, labels = batch([7], 1)
    table.write(samples, rows * float("nan"), labels)
    good = write(table, [7], 2)
    table.end_epoch(0)
    assert torch.equal(table.read(samples, 1, CPU).log_probs, good)


def test_one_bad_token_drops_its_sample_only(tmp_path):
    table, expected = make(tmp_path, ragged=True), Dictionary()
    ids = [0, 2, 4]
    samples, rows, labels = batch(ids, 1, target="right")
    bad = int(samples.rows[3])  # the second token of sample 2
    assert samples.counts.tolist() == [2, 4, 3]
    rows[bad] = float("nan")
    table.write(samples, rows, labels)
    table.end_epoch(0)
    expected.write([0, 2, 4], 1, target="right")
    expected.end_epoch(0)
    del expected.rows[2]
    check(table, expected, ids, "right")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("place", ["accelerator", "disk"])
def test_an_epoch_in_which_every_prediction_overflowed(tmp_path, ragged, place):
    """Even the first."""
    target = "right" if ragged else None
    table, expected = make(tmp_path, ragged=ragged, place=place, trace_epochs=2), Dictionary()
    samples, rows, labels = batch([0, 1, 2], 1, target=target)
    table.write(samples, rows * float("nan"), labels)
    table.end_epoch(0)
    check(table, expected, [0, 1, 2], target)
    assert table.trace.isnan().all()
    write(table, [0, 1, 2], 2, target=target)
    expected.write([0, 1, 2], 2, target=target)
    table.end_epoch(1)
    expected.end_epoch(1)
    check(table, expected, [0, 1, 2], target)
    assert table.trace[:3, 1].isfinite().all()


def test_samples_without_a_label_are_not_stored_for_tokens(tmp_path):
    """A sequence of padding only."""
    table = make(tmp_path, ragged=True)
    write(table, [3, 0], 1, target="right")
    table.end_epoch(0)
    assert LENGTHS[3] == 0 and table.stamps[[3, 0]].tolist() == [NEVER, 0]
    soft_targets = table.read(*[(k, len(r), CPU) for k, r, _ in [batch([3, 0], 0, target="right")]][0])
    assert soft_targets.mask.sum() == 2


def test_sequences_of_one_token(tmp_path):
    """A batch of length 1 is still a batch of sequences, and its samples those of a longer batch."""
    table = make(tmp_path, ragged=True)
    rows = log_rows(3, 1)
    alone = sample_index(torch.tensor([1]), torch.tensor([[4]]))
    padded = sample_index(torch.tensor([1, 2]), torch.tensor([[-100, 4], [3, 2]]))
    table.write(alone, rows[:1], torch.tensor([4]))
    table.end_epoch(0)
    soft_targets = table.read(padded, 4, CPU)
    assert soft_targets.mask.tolist() == [False, True, False, False] and torch.equal(
        soft_targets.log_probs[1], rows[0]
    )
    table.write(padded, log_rows(4, 2), torch.tensor([-100, 4, 3, 2]))
    table.end_epoch(1)
    assert torch.equal(table.read(alone, 1, CPU).log_probs[0], log_rows(4, 2)[1])


# Ids and labels


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_ids_out_of_range(tmp_path, bad):
    """Reading and writing; the message names the id and the range."""
    table = make(tmp_path)
    samples = sample_index(torch.tensor([0, bad]), torch.tensor([0, 0]))
    message = f"sample_id={bad} is out of range: the history was made for 10 samples with ids 0 to 9"
    with pytest.raises(ValueError, match=message):
        table.read(samples, 2, CPU)
    with pytest.raises(ValueError, match=message):
        table.write(samples, log_rows(2, 1), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=message):
        table.probabilities(np.array([0, bad]))


def test_ids_of_ones_own(tmp_path):
    """Sparse and large; unknown ones raise, on either side and between."""
    ids = np.array([7, 100, 2**40, 2**62])
    table = make(tmp_path, size=4, ids=ids)
    samples = sample_index(torch.from_numpy(ids[[3, 0, 2]]), torch.tensor([1, 2, 3]))
    rows = log_rows(3, 1)
    table.write(samples, rows, torch.tensor([1, 2, 3]))
    table.end_epoch(0)
    assert torch.equal(table.read(samples, 3, CPU).log_probs, rows)
    assert table.slots(ids).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(table.probabilities(np.array([7, 100, 2**62]))[[0, 2]], rows.exp()[[1, 0]])
    assert table.probabilities(np.array([100])).isnan().all()
    for unknown in (0, 8, 2**62 + 1, -1):
        with pytest.raises(ValueError, match=f"sample_id={unknown} is out of range"):
            table.slots(np.array([7, unknown]))


@pytest.mark.parametrize("target", [None, "right"])
def test_changed_labels_raise(tmp_path, target):
    """The message names the sample; samples without a row have nothing to compare."""
    table = make(tmp_path, ragged=target is not None)
    write(table, [0, 2], 1, target=target)
    table.end_epoch(0)
    labels = labels_of([4, 2], target)
    table.read(sample_index(torch.tensor([4, 2]), labels), labels.numel(), CPU)
    changed = labels.clone()
    changed[1] = torch.where(changed[1] != -100, (changed[1] + 1) % CLASSES, -100)
    samples = sample_index(torch.tensor([4, 2]), changed)
    with pytest.raises(ValueError, match="labels of sample_id=2 are not those its stored prediction was made for"):
        table.read(samples, labels.numel(), CPU)
    changed = labels.clone()
    changed[0] = torch.where(changed[0] != -100, (changed[0] + 1) % CLASSES, -100)
    table.read(sample_index(torch.tensor([4, 2]), changed), labels.numel(), CPU)


@pytest.mark.parametrize("own", [None, np.array([40, 50, 60])])
def test_an_id_with_two_labels_in_one_epoch(tmp_path, own):
    """Two samples share it: found at the end of the epoch, also when they are on two processes."""
    ids = torch.tensor([1, 2]) if own is None else torch.tensor([50, 60])

    def process(rank, gather):
        table = make(tmp_path, size=3, ids=own)
        labels = torch.tensor([1, 2 + rank])
        table.write(sample_index(ids, labels), log_rows(2, rank), labels)
        table.end_epoch(0, gather, rank)

    with pytest.raises(ValueError, match=f"sample_id={ids[1]} came with two different labels in one epoch"):
        Processes(2).run(process)
    for others, unique in (((2, 2, 2), True), ((2, 2, 3), False)):
        table = make(tmp_path, size=3, ids=own)
        for label in others:
            table.write(sample_index(ids[1:], torch.tensor([label])), log_rows(1, label), torch.tensor([label]))
        if unique:
            table.end_epoch(0)
            continue
        with pytest.raises(ValueError, match="the ids of sample_id_column are not unique"):
            table.end_epoch(0)


def test_token_labels_that_change_while_nobody_reads(tmp_path):
    """At alpha 0 (trace only) the table is written and never read: rows of another length must not spill over."""
    table = make(tmp_path, ragged=True, trace_epochs=3)
    write(table, [0, 1, 2], 1, target="right")
    table.end_epoch(0)
    longer = torch.tensor([[0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="labels of sample_id=0 are not those"):
        table.write(sample_index(torch.tensor([0]), longer), log_rows(5, 2), longer[0])
        table.end_epoch(1)


# Looking inside


def test_probabilities(tmp_path):
    """In the order asked, on the CPU; NaN rows where there is nothing."""
    table = make(tmp_path)
    assert table.probabilities(np.array([0, 1])).isnan().all()
    rows = write(table, [3, 1], 1)
    table.end_epoch(0)
    found = table.probabilities(np.array([1, 0, 3, 1]))
    assert found.shape == (4, CLASSES) and found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2, 3]], rows.exp()[[1, 0, 1]])
    assert table.probabilities(np.array([], dtype=np.int64)).shape == (0, CLASSES)


def test_probabilities_of_top_k_spread_the_rest(tmp_path):
    """Evenly over the classes that are not stored; rows sum to 1."""
    table = make(tmp_path, top_k=2)
    rows = write(table, [3], 1).exp()[0]
    table.end_epoch(0)
    kept = rows.topk(2).indices.tolist()
    rest = 1 - rows[kept].sum()
    expected = torch.tensor([rows[c] if c in kept else rest / 3 for c in range(CLASSES)])
    found = table.probabilities(np.array([3]))[0]
    torch.testing.assert_close(found, expected)
    assert found.sum().item() == pytest.approx(1) and (found - rows).abs().max() > 1e-3


def test_probabilities_of_tokens(tmp_path):
    """All rows of each sample, one NaN row for a sample without any."""
    table = make(tmp_path, ragged=True)
    rows = write(table, [2, 0], 1, target="right").exp()
    samples, _, _ = batch([2, 0], 1, target="right")
    table.end_epoch(0)
    found = table.probabilities(np.array([0, 1, 2]))
    assert found.shape == (2 + 1 + 4, CLASSES) and found[2].isnan().all()
    torch.testing.assert_close(found[[0, 1, 3, 4, 5, 6]], rows[samples.rows[[4, 5, 0, 1, 2, 3]]])


def test_trace_of_samples(tmp_path):
    """float16 probability of the true class; NaN where not visited; epochs before training have no column."""
    table = make(tmp_path, size=4, trace_epochs=3, top_k=1)
    write(table, [0, 1], 9)
    table.end_epoch(WARM_START)
    assert table.trace.shape == (4, 3) and table.trace.dtype == torch.float16 and table.trace.isnan().all()
    first = write(table, [1, 0, 2], 1)
    write(table, [1], 8)  # a replay
    table.end_epoch(0)
    last = write(table, [3, 1], 2)
    table.end_epoch(2)
    expected = torch.full((4, 3), float("nan"))
    expected[1, 0], expected[0, 0], expected[2, 0] = first[0, 1].exp(), first[1, 0].exp(), first[2, 2].exp()
    expected[3, 2], expected[1, 2] = last[0, 3].exp(), last[1, 1].exp()
    torch.testing.assert_close(table.trace.float(), expected, atol=5e-4, rtol=1e-3, equal_nan=True)


def test_trace_of_tokens_is_the_mean_over_positions(tmp_path):
    table = make(tmp_path, size=5, trace_epochs=1, ragged=True)
    ids = [2, 3, 0]
    rows = write(table, ids, 1, target="left")
    table.end_epoch(0)
    labels = labels_of(ids, "left").reshape(-1)
    true = rows.exp()[torch.arange(len(labels)), labels.clamp_min(0)].reshape(3, -1)
    valid = (labels != -100).reshape(3, -1)
    for place, i in ((0, 2), (2, 0)):
        assert table.trace[i, 0].item() == pytest.approx(true[place][valid[place]].mean().item(), abs=1e-3)
    assert table.trace[[1, 3, 4], 0].isnan().all()


def test_trace_of_a_sample_without_a_label(tmp_path):
    """There is no true class, so there is no probability of it."""
    table = make(tmp_path, size=2, trace_epochs=1)
    labels = torch.tensor([1, -100])
    table.write(sample_index(torch.tensor([0, 1]), labels), log_rows(2, 1), labels)
    table.end_epoch(0)
    assert table.trace[0].isfinite() and table.trace[1].isnan()


# On disk


def test_files_on_disk(tmp_path):
    """As large as declared; an earlier run that still holds its files is not disturbed."""
    first = make(tmp_path, place="disk", top_k=2, dtype=torch.float16)
    rows = write(first, [0, 1], 1)
    first.end_epoch(0)
    (folder,) = (tmp_path / "history").iterdir()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes == {"log_probs.bin": 10 * 2 * 2, "index.bin": 10 * 2 * 2, "lock": 0}
    second = make(tmp_path, place="disk", top_k=2, dtype=torch.float16)
    assert second.read(batch([0, 1], 0)[0], 2, CPU) is None
    write(second, [0, 1], 2)
    second.end_epoch(0)
    torch.testing.assert_close(first.probabilities(np.array([0, 1])).amax(-1), rows.exp().amax(-1), atol=2e-3, rtol=0)


def test_nothing_on_disk_unless_asked(tmp_path):
    table, expected = make(tmp_path, place="cpu"), Dictionary()
    write(table, [0], 1)
    expected.write([0], 1)
    table.end_epoch(0)
    expected.end_epoch(0)
    check(table, expected, [0, 1])
    assert not (tmp_path / "history").exists()


# Several processes


class Processes:
    """`world` threads in lockstep; `gather` concatenates equal tensors of all, as accelerate's does."""

    def __init__(self, world):
        self.world, self.barrier, self.box = world, threading.Barrier(world, timeout=30), [None] * world
        self.calls = [0] * world

    def gather(self, rank):
        def gather(tensor):
            self.calls[rank] += 1
            self.box[rank] = tensor.clone()
            self.barrier.wait()
            assert len({(t.shape, t.dtype) for t in self.box}) == 1, [t.shape for t in self.box]
            result = torch.cat(self.box)
            self.barrier.wait()
            return result

        return gather

    def run(self, function):
        """`function(rank, gather)` on every process; their results."""
        results, errors = [None] * self.world, []

        def body(rank):
            try:
                results[rank] = function(rank, self.gather(rank))
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        assert len(set(self.calls)) == 1
        return results


def draw_plan(world, epochs=3, steps=4, size=10, idle=None, seed=0):
    """plan[epoch][step][rank] is a list of ids: repeated across steps and ranks, of uneven length."""
    rng = np.random.default_rng((seed, world))
    plan = [
        [[rng.integers(0, size, rng.integers(1, 4)).tolist() for _ in range(world)] for _ in range(steps)]
        for _ in range(epochs)
    ]
    for step in plan[0]:
        step[1 % world] = list(step[0])  # the same samples on two processes in the same steps
    if idle is not None:
        for step in plan[1]:
            step[idle] = []
    return plan


def simulate(tmp_path, world, plan, target=None, keep=None, **arguments):
    """Run a plan on `world` processes; their histories."""

    def process(rank, gather):
        table = make(tmp_path, ragged=target is not None, writes=rank == 0, **arguments)
        for epoch, steps in enumerate(plan):
            for step, ranks in enumerate(steps):
                if ranks[rank]:
                    write(table, ranks[rank], epoch, step, rank, target=target)
            table.end_epoch(epoch, gather, rank)
            if keep is not None:
                keep(rank, table)
        return table

    return Processes(world).run(process)


def reference(plan, target=None):
    """The same plan by a dictionary: steps in order, ranks in order within a step."""
    expected = Dictionary()
    for epoch, steps in enumerate(plan):
        for step, ranks in enumerate(steps):
            for rank, ids in enumerate(ranks):
                if ids:
                    expected.write(ids, epoch, step, rank, target=target)
        expected.end_epoch(epoch)
    return expected


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("place, block_bytes", [("accelerator", 2**29), ("disk", 2**29), ("disk", 100), ("disk", 1)])
@pytest.mark.parametrize("codec", ["dense", "half top"])
@pytest.mark.parametrize("target", [None, "right"])
def test_processes_equal_one(tmp_path, monkeypatch, world, place, block_bytes, codec, target):
    """
    Invariant 15: uneven batches, duplicates on several ranks, a rank without rows, more rows than go at once, a table
    that is written in blocks of a few rows or of one.
    """
    monkeypatch.setattr(exchange, "EXCHANGE_ROWS", 3)
    monkeypatch.setattr(exchange, "BLOCK_BYTES", block_bytes)
    arguments, atol = CODECS[codec]
    plan = draw_plan(world, idle=world - 1)
    tables = simulate(tmp_path, world, plan, target, place=place, trace_epochs=3, **arguments)
    expected = reference(plan, target)
    for table in tables:
        check(table, expected, list(range(10)), target, atol)
        assert torch.equal(table.trace.isnan(), tables[0].trace.isnan())
        assert torch.equal(table.trace.nan_to_num(), tables[0].trace.nan_to_num())
        assert table.journal.samples == [] and table.journal.filled == table.visits == 0
    assert len(expected.rows) > 4
    swapped = reference([[ranks[::-1] for ranks in steps] for steps in plan], target)
    assert any(not torch.equal(swapped.rows[i][0], expected.rows[i][0]) for i in expected.rows if i in swapped.rows)


@pytest.mark.parametrize("block_bytes", [1, 100, 2**29])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("target", [None, "right"])
def test_one_process_writes_its_table_in_blocks(tmp_path, monkeypatch, block_bytes, codec, target):
    monkeypatch.setattr(exchange, "EXCHANGE_ROWS", 2)
    monkeypatch.setattr(exchange, "BLOCK_BYTES", block_bytes)
    arguments, atol = CODECS[codec]
    plan, expected = draw_plan(1), Dictionary()
    table = make(tmp_path, ragged=target is not None, place="disk", **arguments)
    for epoch, steps in enumerate(plan):
        for step, [ids] in enumerate(steps):
            expected.write(ids, epoch, step, 0, target=target)
            write(table, ids, epoch, step, 0, target=target)
        expected.end_epoch(epoch)
        table.end_epoch(epoch)
        check(table, expected, list(range(10)), target, atol)


def test_the_size_of_an_exchange_does_not_matter(tmp_path, monkeypatch):
    """1, 2 and all rows at a time, of a shape that does not divide."""
    plan, tables = draw_plan(2, epochs=1, steps=5), []
    for rows in (1, 2, 65536):
        monkeypatch.setattr(exchange, "EXCHANGE_ROWS", rows)
        tables += simulate(tmp_path, 2, plan)
    known = tables[0].stamps != NEVER
    assert known.sum() > 5
    for table in tables:
        assert torch.equal(table.table["log_probs"][known], tables[0].table["log_probs"][known])


@pytest.mark.parametrize("target", [None, "right"])
@pytest.mark.parametrize("codec", CODECS)
def test_when_rows_are_encoded_does_not_matter(tmp_path, monkeypatch, codec, target):
    """Each batch at once, some together, or all at the end of the epoch: the dictionary's rows, the same bytes."""
    arguments, atol = CODECS[codec]
    plan, tables = draw_plan(2, epochs=2), []
    for held in (0, 40, 2**18):
        monkeypatch.setattr(journal, "MAX_HELD", held)
        tables += simulate(tmp_path / str(held), 2, plan, target, trace_epochs=2, **arguments)
        one = make(tmp_path / "one")
        write(one, [1, 2], 1)
        assert len(one.journal.waiting) == (held > 0)  # so the three ways differ
    for table in tables:
        check(table, reference(plan, target), list(range(10)), target, atol)
        assert all(torch.equal(part, tables[0].table[name]) for name, part in table.table.items())
        assert torch.equal(table.trace.nan_to_num(), tables[0].trace.nan_to_num())


@pytest.mark.parametrize("target", [None, "right"])
@pytest.mark.parametrize("codec", CODECS)
def test_shapes_that_do_not_depend_on_the_data_keep_the_same_rows(tmp_path, monkeypatch, codec, target):
    """As where shapes are compiled anew (XLA): the dictionary's rows, the same bytes, whatever the size of buffers."""
    arguments, atol = CODECS[codec]
    plan = draw_plan(2, epochs=3)
    tables = simulate(tmp_path / "any", 2, plan, target, trace_epochs=3, **arguments)
    for module in ("journal", "table"):
        monkeypatch.setattr(f"hf_selfkd.history.{module}.compiles_shapes", lambda device: True)
    for buffer in (journal.BUFFER_BYTES, 90):
        monkeypatch.setattr(journal, "BUFFER_BYTES", buffer)
        tables += simulate(tmp_path / str(buffer), 2, plan, target, trace_epochs=3, **arguments)
        assert tables[-1].journal.fixed_shapes
    assert tables[-1].journal.buffer_rows < 8 < tables[-3].journal.buffer_rows
    for one in tables:
        check(one, reference(plan, target), list(range(10)), target, atol)
        assert all(torch.equal(part, tables[0].table[name]) for name, part in one.table.items())
        assert torch.equal(one.trace.nan_to_num(), tables[0].trace.nan_to_num())


def test_processes_and_one_process_with_the_same_batches(tmp_path):
    """The ranks of a step as micro-batches of one process: the same table, byte for byte."""
    plan = draw_plan(2, epochs=2)
    plan = [[[sorted(set(ids)) for ids in ranks] for ranks in steps] for steps in plan]
    table = make(tmp_path / "one")
    for epoch, steps in enumerate(plan):
        for step, ranks in enumerate(steps):
            for rank, ids in enumerate(ranks):
                write(table, ids, epoch, step, rank)
        table.end_epoch(epoch)
    for other in simulate(tmp_path / "two", 2, plan):
        assert torch.equal(other.table["log_probs"], table.table["log_probs"])
        assert (other.stamps == table.stamps).all() and (other.hashes == table.hashes).all()


@pytest.mark.parametrize("target", [None, "right"])
@pytest.mark.parametrize("place", ["accelerator", "disk"])
def test_no_process_has_any_rows(tmp_path, target, place):
    """An epoch of skipped steps, first and later."""
    empty = [[[[], []]]]
    plan = empty + draw_plan(2, epochs=1) + empty
    tables = simulate(tmp_path, 2, plan, target, place=place, trace_epochs=3)
    expected = reference(plan, target)
    for table in tables:
        check(table, expected, list(range(10)), target)
        assert table.trace[:, [0, 2]].isnan().all() and table.trace[:, 1].isfinite().any()


def test_bad_rows_on_one_process(tmp_path):
    """Dropped there, while the other's copy of the same sample is stored."""

    def process(rank, gather):
        table = make(tmp_path)
        samples, rows, labels = batch([4, 5 + rank], rank)
        table.write(samples, rows * float("nan") if rank == 0 else rows, labels)
        table.end_epoch(0, gather, rank)
        return table

    for table in Processes(2).run(process):
        soft_targets = table.read(batch([4, 5, 6], 0)[0], 3, CPU)
        assert soft_targets.mask.tolist() == [True, False, True]
        assert torch.equal(soft_targets.log_probs[soft_targets.mask], batch([4, 6], 1)[1])


def test_two_nodes_on_disk(tmp_path):
    """Four processes, two folders, a writer in each."""
    plan = draw_plan(4)

    def process(rank, gather):
        table = make(tmp_path / f"node{rank // 2}", place="disk", ragged=True, writes=rank % 2 == 0)
        for epoch, steps in enumerate(plan):
            for step, ranks in enumerate(steps):
                write(table, ranks[rank], epoch, step, rank, target="right")
            table.end_epoch(epoch, gather, rank)
        return table

    expected = reference(plan, "right")
    for table in Processes(4).run(process):
        check(table, expected, list(range(10)), "right")


# Saving and loading


def through_file(tmp_path, tensors, metadata=None):
    save_tensors(tmp_path / "saved.safetensors", tensors, metadata or {})
    return load_tensors(tmp_path / "saved.safetensors")[0]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("place", ["accelerator", "disk"])
@pytest.mark.parametrize("target", [None, "right"])
def test_resumed_in_the_middle_of_an_epoch(tmp_path, before, after, place, target):
    """Invariant 16: state and journals through files; the number of processes may change."""
    first, second = draw_plan(before, epochs=2, seed=1), draw_plan(after, epochs=2, seed=2)
    arguments = {"ragged": target is not None, "place": place, "trace_epochs": 3}

    def start(rank, gather):
        table = make(tmp_path / "a", writes=rank == 0, **arguments)
        for step, ranks in enumerate(first[0]):
            write(table, ranks[rank], 0, step, rank, target=target)
        table.end_epoch(0, gather, rank)
        for step, ranks in enumerate(first[1]):
            write(table, ranks[rank], 1, step, rank, target=target)
        journal = through_file(tmp_path / f"journal{rank}", table.journal_state())
        return table, journal

    started = Processes(before).run(start)
    state = through_file(tmp_path, *started[0][0].state())
    shutil.rmtree(tmp_path / "a", ignore_errors=True)

    def resume(rank, gather):
        gather = gather if after > 1 else None
        table = make(tmp_path / "b", writes=rank == 0, **arguments)
        table.load_state(state, gather)
        for old in range(rank, before, after):
            table.add_journal(started[old][1])
        for step, ranks in enumerate(second[0]):
            write(table, ranks[rank], 1, 10 + step, rank, target=target)
        table.end_epoch(1, gather, rank)
        for step, ranks in enumerate(second[1]):
            write(table, ranks[rank], 2, step, rank, target=target)
        table.end_epoch(2, gather, rank)
        return table

    expected = Dictionary()
    for step, ranks in enumerate(first[0]):
        for rank, ids in enumerate(ranks):
            expected.write(ids, 0, step, rank, target=target)
    expected.end_epoch(0)
    for part, offset in ((first[1], 0), (second[0], 10)):
        for step, ranks in enumerate(part):
            for rank, ids in enumerate(ranks):
                expected.write(ids, 1, offset + step, rank, target=target)
    expected.end_epoch(1)
    for step, ranks in enumerate(second[1]):
        for rank, ids in enumerate(ranks):
            expected.write(ids, 2, step, rank, target=target)
    expected.end_epoch(2)
    for table in Processes(after).run(resume):
        check(table, expected, list(range(10)), target)
        kept = started[0][0].trace[:, 0]
        assert torch.equal(table.trace[:, 0].nan_to_num(), kept.nan_to_num()) and kept.isfinite().any()
        assert table.trace[:, 1:].isfinite().any()


def test_saving_does_not_disturb_the_epoch(tmp_path):
    """The journal is still there, and the first prediction still wins."""
    table, expected = make(tmp_path), Dictionary()
    for step, ids in enumerate([[0, 1], [1, 2], [0, 3]]):
        table.journal_state()
        table.state()
        write(table, ids, step)
        expected.write(ids, step)
    table.end_epoch(0)
    expected.end_epoch(0)
    check(table, expected, list(range(5)))


def test_state_before_the_first_epoch_ends(tmp_path):
    """A journal and an empty table."""
    table = make(tmp_path)
    rows = write(table, [0, 1], 1)
    state, journal = through_file(tmp_path, *table.state()), table.journal_state()
    other = make(tmp_path)
    other.load_state(state)
    assert other.read(batch([0, 1], 0)[0], 2, CPU) is None
    other.add_journal(journal)
    other.end_epoch(0)
    assert torch.equal(other.read(batch([0, 1], 0)[0], 2, CPU).log_probs, rows)


def test_a_replay_after_resuming_is_still_later(tmp_path):
    """Also on a process that had seen more batches than the first, whose state is saved (it mixed fewer images)."""
    idle, busy = make(tmp_path), make(tmp_path)
    rows = [write(busy, [i], i) for i in range(3)]
    other = make(tmp_path)
    other.load_state(idle.state()[0])
    other.add_journal(busy.journal_state())
    write(other, [2, 3], 9)
    other.end_epoch(0)
    assert torch.equal(other.read(batch([2], 0)[0], 1, CPU).log_probs, rows[2])
    assert other.stamps[:4].tolist() == [0, 0, 0, 0]


def test_state_says_what_it_is(tmp_path):
    """Enough to refuse another dataset or another codec."""
    ids = np.array([5, 9])
    table = make(tmp_path, size=2, ids=ids, top_k=3, dtype=torch.float16, ragged=True)
    tensors, metadata = table.state()
    expected = {"size": "2", "num_classes": "5", "dtype": "float16", "top_k": "3", "ragged": "True"}
    assert expected.items() <= metadata.items()
    assert tensors["ids"].tolist() == [5, 9]


def test_loading_copies(tmp_path):
    """Training on does not change what was loaded."""
    table = make(tmp_path)
    write(table, [0, 1], 1)
    table.end_epoch(0)
    state = {name: tensor.clone() for name, tensor in table.state()[0].items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    other = make(tmp_path)
    other.load_state(state)
    write(other, [0, 1, 2], 2)
    other.end_epoch(1)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert not torch.equal(other.state()[0]["table.log_probs"], kept["table.log_probs"])


# Plans


def plan(tmp_path, rows, classes, limit=None, **fields):
    config = SelfKDConfig(str(tmp_path), report_to="none", history_max_bytes=limit, **fields)
    return plan_history(config, rows, classes, CPU, tmp_path / "history")


@pytest.mark.parametrize(
    ("rows", "classes", "fields", "expected"),
    [
        (50_000, 100, {}, ("float32", None, "accelerator", 2 * 50_000 * 400)),
        (SMALL // 800, 100, {}, ("float32", None, "accelerator", SMALL // 800 * 800)),
        (SMALL // 800 + 1, 100, {}, ("float16", 32, "accelerator", 2 * (SMALL // 800 + 1) * 128)),
        (1_281_167, 1000, {}, ("float16", 32, "disk", 2 * 1_281_167 * 128)),
        (10_000_000, 10, {}, ("float16", None, "disk", 2 * 10_000_000 * 20)),
        (2_000_000, 32_768, {}, ("float16", 32, "disk", 2 * 2_000_000 * 128)),
        (1_000_000, 50_257, {}, ("float16", 32, "disk", 2 * 1_000_000 * 192)),
        (1000, 100, {"history_top_k": 4}, ("float32", 4, "accelerator", 2 * 1000 * 24)),
        (1000, 100, {"history_top_k": 100}, ("float32", None, "accelerator", 2 * 1000 * 400)),
        (1000, 100, {"history_dtype": "bfloat16"}, ("bfloat16", None, "accelerator", 2 * 1000 * 200)),
        (1000, 100, {"history_device": "disk"}, ("float32", None, "disk", 2 * 1000 * 400)),
        (1000, 100, {"history_device": "cpu"}, ("float32", None, "cpu", 2 * 1000 * 400)),
        (1_281_167, 1000, {"history_top_k": 1000, "history_device": "disk"}, ("float16", None, "disk", 5_124_668_000)),
    ],
)
def test_decisions(tmp_path, rows, classes, fields, expected):
    """What is kept, how, where and in how many bytes: those of the table and of one epoch's journals."""
    made = plan(tmp_path, rows, classes, limit=10**11, **fields)
    dtype, top_k, place, num_bytes = expected
    assert made.codec == Codec(classes, getattr(torch, dtype), top_k)
    assert (made.place, made.num_bytes) == (place, num_bytes)


def test_declared_bytes_are_those_of_the_table_and_the_journals(tmp_path):
    """Invariant 20, by counting."""
    made = plan(tmp_path, 40, CLASSES, history_top_k=2, history_dtype="float16")
    table = make(tmp_path, size=40, top_k=2, dtype=torch.float16)
    for _ in range(2):
        write(table, list(range(40)), 1)
        parts = table.journal_state().items()
        predicted = sum(part.nbytes for name, part in parts if name not in ("samples", "visits"))
        table.end_epoch(0)
    assert made.num_bytes == predicted + sum(part.nbytes for part in table.table.values())


@pytest.mark.parametrize(
    ("rows", "classes", "limit"),
    [
        (1000, 100, 100_000),
        (1000, 100, 799_999),
        (1000, 10, 60_000),
        (1000, 3, 23_999),
        (1_281_167, 1000, 10**8),
        (1000, 50_000, 150_000),
        (7, 9, 28 * 2),
    ],
)
def test_a_history_that_is_too_large_is_refused_with_a_remedy_that_fits(tmp_path, rows, classes, limit):
    """The message names the bytes, the limit and a setting; the setting is then accepted, one entry more is not."""
    with pytest.raises(ValueError, match="history_max_bytes") as error:
        plan(tmp_path, rows, classes, limit)
    message = str(error.value)
    found = re.search(
        r"needs (\d+) bytes on '(\w+)' and may take (\d+) .*set history_top_k=(\d+) with (\w+)='(\w+)'", message
    )
    needed, place, allowed, top_k, field, dtype = found.groups()
    assert (int(allowed), field) == (limit, "history_dtype") and int(needed) > limit
    assert plan(tmp_path, rows, classes, int(needed)).num_bytes == int(needed)
    with pytest.raises(ValueError):
        plan(tmp_path, rows, classes, int(needed) - 1)
    made = plan(tmp_path, rows, classes, limit, history_top_k=int(top_k), history_dtype=dtype)
    assert made.num_bytes <= limit
    if int(top_k) + 1 < classes:
        with pytest.raises(ValueError):
            plan(tmp_path, rows, classes, limit, history_top_k=int(top_k) + 1, history_dtype=dtype)


def test_when_not_even_one_entry_fits(tmp_path):
    """The remedy is another teacher."""
    with pytest.raises(ValueError, match="needs 800000 bytes .*may take 7999 .*use teacher='snapshot'"):
        plan(tmp_path, 1000, 100, 7999)
    with pytest.raises(ValueError, match="use teacher='snapshot'"):
        plan(tmp_path, 1000, 100, 7999, history_top_k=1, history_dtype="float16")
    assert plan(tmp_path, 1000, 100, 8000, history_top_k=1, history_dtype="float16").num_bytes == 8000


def test_more_entries_than_classes(tmp_path):
    with pytest.raises(ValueError, match="history_top_k=11 exceeds the 10 classes of the model: set at most 10"):
        plan(tmp_path, 5, 10, history_top_k=11)


@pytest.mark.parametrize("place", ["accelerator", "cpu", "disk"])
def test_half_of_what_is_free_is_the_default_limit(tmp_path, monkeypatch, place):
    """Of the disk or of the memory, whichever it is to live in."""
    free = {"disk": 1_599_999, "memory": 1_599_999}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free["disk"]))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free["memory"]))
    with pytest.raises(ValueError, match=f"needs 800000 bytes on '{place}' and may take 799999"):
        plan(tmp_path, 1000, 100, history_device=place)
    free["disk" if place == "disk" else "memory"] = 1_600_000
    assert plan(tmp_path, 1000, 100, history_device=place).place == place


@pytest.mark.parametrize(("place", "expected"), [("cpu", 5), ("accelerator", 5), ("disk", 2)])
def test_every_process_of_a_node_has_a_table_in_memory(tmp_path, place, expected):
    """On disk they share one; all journals are one epoch. On an accelerator each has its own memory."""
    config = SelfKDConfig(str(tmp_path), report_to="none", history_device=place, history_max_bytes=10**7)
    made = plan_history(config, 1000, 100, CPU, tmp_path / "history", local_processes=4)
    assert (made.num_bytes, made.max_bytes) == (expected * 1000 * 400, 10**7)
    if place == "accelerator":
        made = plan_history(config, 1000, 100, torch.device("cuda"), tmp_path / "history", local_processes=4)
        assert made.num_bytes == 2 * 1000 * 400
