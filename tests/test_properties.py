"""What holds for any ids, shapes, types and settings: examples are drawn by hypothesis, the same every time."""

import math
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_history import CLASSES, CPU, Dictionary, batch, check
from test_losses import reference, stored, stored_reference
from torch.utils.data import Dataset

from hf_selfkd import SelfKDConfig, SelfKDDataCollator, with_sample_ids
from hf_selfkd.batch import BatchRecord
from hf_selfkd.collator import TrainingCollator
from hf_selfkd.config import MethodArguments
from hf_selfkd.files import load_tensors, save_tensors
from hf_selfkd.history.codec import Codec
from hf_selfkd.history.exchange import first_of_each
from hf_selfkd.history.predictions import PredictionHistory
from hf_selfkd.losses.progressive import progressive_cross_entropy
from hf_selfkd.losses.soft_targets import LOG_ZERO, SoftTargets
from hf_selfkd.samples import checked_ids, sample_index
from hf_selfkd.schedule import alpha_at


def examples(number):
    """So many, always the same; files of an earlier example do not matter to the next."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


SEEDS = st.integers(0, 2**31 - 1)
IDS = st.integers(0, 2**63 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def one_line(action):
    """The error of an action, which must be one clear line; `None` if there was none."""
    try:
        action()
    except (ValueError, TypeError) as error:
        assert str(error) and "\n" not in str(error)
        return str(error)
    return None


# Histories


@st.composite
def visits(draw):
    """Ids of samples, and for some epochs the batches that are visited: in any order, some twice, some never."""
    ids = sorted(draw(st.sets(IDS, min_size=1, max_size=8)))
    some = st.lists(st.sampled_from(ids), min_size=1, max_size=4, unique=True)
    return ids, draw(st.lists(st.lists(some, max_size=4), min_size=1, max_size=3))


@examples(60)
@given(
    visits(),
    st.sampled_from([None, 1, 3, CLASSES]),
    st.sampled_from([None, "left", "right"]),
    st.sampled_from(["accelerator", "cpu", "disk"]),
    st.integers(0, 20),
)
def test_a_history_is_a_dictionary_of_the_last_epoch(tmp_path, drawn, top_k, target, place, saved_after):
    """Whatever was visited, and with a checkpoint after any batch, which another history takes over."""
    ids, epochs = drawn

    def make():
        codec = Codec(CLASSES, torch.float32, top_k)
        return PredictionHistory(
            len(ids), codec, place, CPU, tmp_path / "history", ids=np.array(ids), ragged=target is not None
        )

    history, expected, step = make(), Dictionary(), 0
    for epoch, batches in enumerate(epochs):
        for group in batches:
            samples, rows, labels = batch(group, epoch, step, target=target)
            history.write(samples, rows, labels)
            expected.write(group, epoch, step, target=target)
            step += 1
            if step == saved_after:
                save_tensors(tmp_path / "table.safetensors", *history.state())
                save_tensors(tmp_path / "journal.safetensors", history.journal_state(), {})
                history = make()
                history.load_state(load_tensors(tmp_path / "table.safetensors")[0])
                history.add_journal(load_tensors(tmp_path / "journal.safetensors")[0])
        history.end_epoch(epoch)
        expected.end_epoch(epoch)
        check(history, expected, ids, target)


@examples(60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_first_prediction_of_a_sample_is_kept_whatever_the_processes(visited):
    """Of journals that stand one after the other: by step, then by process."""
    samples = np.array([(slot, step, 0, 1) for slot, step in visited])
    kept = first_of_each(samples, 6)
    expected = [
        next(n for n, (slot, step) in enumerate(visited) if slot == wanted and step == earliest)
        for wanted, earliest in ((w, min(step for slot, step in visited if slot == w)) for w, _ in set(visited))
    ]
    assert sorted(kept.tolist()) == sorted(set(expected))


@examples(100)
@given(SEEDS, st.integers(2, 40), st.integers(1, 6), st.integers(1, 40), DTYPES, st.floats(0.0, 60.0))
def test_a_codec_keeps_the_largest_and_rounds_no_more_than_its_type(seed, classes, rows, k, dtype, sharpness):
    """Also where rows have ties, classes of probability 0 and certainty."""
    k = None if k > classes else k
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(rows, classes, generator=generator)
    logits[torch.rand(rows, classes, generator=generator) < 0.2] = logits.flatten()[0]
    logits[0, : classes // 2] = -math.inf
    log_probs = logits.log_softmax(-1).clamp_min(LOG_ZERO)
    codec = Codec(classes, dtype, k)
    parts = codec.encode(log_probs)
    assert sum(part.element_size() * part.shape[1] for part in parts.values()) == codec.row_bytes
    read = codec.decode(parts, torch.ones(rows, dtype=torch.bool))
    probs = read.log_probs.double().exp()
    assert torch.isfinite(read.log_probs).all() and (probs.sum(-1) <= 1 + 1e-5).all()
    true = log_probs.double().exp()
    if k is not None:
        assert all(len(set(row)) == k for row in read.index.tolist())
        assert torch.equal(log_probs.gather(-1, read.index), log_probs.topk(k).values)
        true = true.gather(-1, read.index)
    unit = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    # p log p is at most 1 / e: a log-probability that is off by a share of itself costs p less than that share.
    torch.testing.assert_close(probs, true, atol=2 * unit * math.log(classes) + unit, rtol=unit)
    assert codec.probabilities(read).sum(-1).sub(1).abs().max() < 1e-4 + classes * unit


# Ids and labels


@examples(150)
@given(st.lists(st.one_of(st.integers(-5, 9), st.integers(-(2**66), 2**66)), max_size=6), st.booleans())
def test_ids_are_taken_as_they_are_or_refused_in_one_line(ids, as_dataset):
    class Rows(Dataset):
        def __len__(self):
            return len(ids)

        def __getitem__(self, index):
            return {"uid": ids[index], "labels": 0}

    read = []

    def take():
        if as_dataset:
            wrapped = with_sample_ids(Rows(), "uid")
            read.extend(wrapped[n]["sample_id"] for n in range(len(ids)))
        else:
            read.extend(checked_ids(ids, "uid").tolist())

    message = one_line(take)
    fits = all(-(2**63) <= one < 2**63 for one in ids)
    if as_dataset:  # which sees one sample at a time
        assert (message is None) == fits
    elif ids:
        assert (message is None) == (fits and min(ids) >= 0 and len(set(ids)) == len(ids))
    assert message is not None or read == ids
    assert message is None or "uid" in message


@examples(40)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4, unique=True))
def test_unsigned_ids_do_not_wrap(ids):
    read = []
    message = one_line(lambda: read.extend(checked_ids(np.array(ids, dtype=np.uint64), "uid").tolist()))
    assert (message is None) == (max(ids) < 2**63) and read == ([] if message else ids)


SEQUENCES = st.lists(st.lists(st.integers(0, 40), max_size=5), min_size=1, max_size=5)


@examples(100)
@given(SEQUENCES, st.integers(0, 3), st.sampled_from(["left", "right", "between"]), SEEDS)
def test_the_hash_of_labels_is_that_of_the_labels_alone(sequences, extra, side, seed):
    """Padding may stand anywhere; another label, or another order, is another hash."""
    rng = np.random.default_rng(seed)

    def padded(row, width):
        places = {"left": range(width - len(row), width), "right": range(len(row))}.get(side)
        places = sorted(rng.permutation(width)[: len(row)]) if places is None else places
        full = np.full(width, -100)
        full[list(places)] = row
        return full

    width = max(map(len, sequences)) + extra
    assume(width > 0)
    batched = sample_index(
        np.arange(len(sequences)), torch.tensor(np.stack([padded(row, width) for row in sequences]))
    )
    alone = [sample_index(np.zeros(1, int), torch.tensor(row or [-100])[None]) for row in sequences]
    assert batched.label_hash.tolist() == [int(one.label_hash[0]) for one in alone]
    assert batched.counts.tolist() == [len(row) for row in sequences] and batched.total == sum(map(len, sequences))
    different = {tuple(row) for row in sequences}
    assert len(set(batched.label_hash.tolist())) == len(different)


# Schedules


@examples(150)
@given(
    st.floats(0, 1),
    st.sampled_from(["linear", "constant", "cosine", "linear_step"]),
    st.integers(1, 400),
    st.integers(1, 50),
)
def test_alpha_grows_from_its_first_share_to_alpha(alpha, schedule, epochs, steps):
    values = [
        alpha_at(alpha, schedule, step // steps, epochs, step, epochs * steps)
        for step in range(0, epochs * steps, max(1, epochs * steps // 40))
    ]
    last = alpha_at(alpha, schedule, epochs - 1, epochs, epochs * steps - 1, epochs * steps)
    beyond = alpha_at(alpha, schedule, 2 * epochs, epochs, 3 * epochs * steps, epochs * steps)
    assert last == pytest.approx(alpha) and beyond == pytest.approx(alpha)
    assert all(0 <= one <= alpha * (1 + 1e-12) for one in values) and values == sorted(values)
    first = {"constant": 1, "linear": Fraction(1, epochs), "linear_step": Fraction(1, epochs * steps)}
    if schedule in first:
        assert values[0] == pytest.approx(alpha * float(first[schedule]))


# Losses


@examples(120)
@given(
    SEEDS,
    st.integers(1, 6),
    st.integers(2, 9),
    st.integers(1, 9),
    st.sampled_from(["bucket", "label", "uniform", "renormalize"]),
    st.floats(0, 1),
    st.sampled_from([1.0, 0.5, 2.0, 4.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(0, 5),
)
def test_the_loss_is_the_naive_one_in_float64(seed, rows, classes, k, rule, alpha, tau, dtype, sharpness):
    """Value and gradient, for any rows without a label or a past; dense, or with stored entries and any tail."""
    generator = torch.Generator().manual_seed(seed)
    logits = (sharpness * torch.randn(rows, classes, generator=generator)).to(dtype)
    past = (2 * torch.randn(rows, classes, generator=generator)).double().softmax(-1).float()
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    mask = torch.rand(rows, generator=generator) < 0.7
    if k >= classes:
        soft = SoftTargets(past.log().clamp_min(LOG_ZERO), mask)
        total, gradient = reference(logits, labels, past, mask, alpha, tau)
    else:
        soft = stored(past, k, rule, mask)
        total, *_, gradient = stored_reference(logits, labels, past, soft.index, mask, alpha, rule, tau)
    given_logits = logits.clone().requires_grad_()
    losses = progressive_cross_entropy(given_logits, labels, soft, alpha, tau)
    losses.total.sum().backward()
    torch.testing.assert_close(losses.total.detach().double(), total, atol=2e-5, rtol=2e-5)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(given_logits.grad.double(), gradient, atol=2e-5 + rounding / 8, rtol=2e-5 + rounding)
    assert (given_logits.grad[labels == -100] == 0).all()


@examples(60)
@given(SEEDS, st.integers(2, 6), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_a_poisoned_row_reaches_no_other_row(seed, rows, poison, in_past):
    """One sample whose logits, or whose past, are not finite: the other rows have the losses that they had."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 5, generator=generator)
    past = torch.randn(rows, 5, generator=generator).log_softmax(-1)
    labels = torch.randint(5, (rows,), generator=generator)
    bad = seed % rows
    others = torch.arange(rows) != bad

    def run(logits, past):
        logits = logits.clone().requires_grad_()
        losses = progressive_cross_entropy(logits, labels, SoftTargets(past, torch.ones(rows, dtype=torch.bool)), 0.6)
        losses.total.sum().backward()
        return losses.total.detach()[others], logits.grad[others]

    poisoned = (past if in_past else logits).clone()
    poisoned[bad] = poison
    clean, dirty = run(logits, past), run(*((logits, poisoned) if in_past else (poisoned, past)))
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))


# Settings


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(["auto", "history", "snapshot", "linear", "float16", "disk", "bucket", "byot", "none"]),
)


@examples(200)
@given(st.dictionaries(st.sampled_from([field.name for field in fields(MethodArguments)]), ODD, max_size=2))
def test_settings_are_taken_or_refused_in_one_line(tmp_path, values):
    """Never an error from the depths, and never a value of another type that is kept in silence."""
    made = []
    message = one_line(lambda: made.append(SelfKDConfig(str(tmp_path), report_to="none", **values)))
    if message is None:
        method = MethodArguments.read(made[0])
        assert 0 <= method.alpha <= 1 and method.temperature > 0 and math.isfinite(method.temperature)
        assert 0 <= method.ema_decay <= 1 and 0 <= method.calibration_fraction <= 0.5
        assert method.history_top_k is None or method.history_top_k >= 1
    else:
        assert any(name in message for name in values), message


# Collators


@examples(80)
@given(
    SEEDS,
    st.integers(1, 6),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.2, 0.4)]),
    st.floats(0, 1),
    st.lists(IDS, min_size=6, max_size=6, unique=True),
)
def test_mixed_images_are_what_their_record_says(seed, size, shape, alphas, probability, ids):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, *shape, generator=generator)
    record, again = BatchRecord(np.array(ids[:size])), BatchRecord(np.array(ids[:size]))
    mixer = SelfKDDataCollator(None, *alphas, mix_probability=probability)
    batches = [{"pixel_values": images.clone()} for _ in range(2)]
    for one, note in zip(batches, (record, again), strict=True):
        mixer.mix(one, note, seed, 3)
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"]) and record.weight == again.weight
    mixed = batches[0]["pixel_values"]
    if record.partner is None:
        assert torch.equal(mixed, images)
        return
    assert sorted(record.partner.tolist()) == list(range(size)) and 0 <= record.weight <= 1
    others = images[record.partner]
    blend = record.weight * images + (1 - record.weight) * others
    cut = ((mixed == images) | (mixed == others)).all()
    assert torch.allclose(mixed, blend, atol=1e-6) or (alphas[1] > 0 and cut)
    if alphas[0] == 0:  # the share of the image that is its own
        share = (mixed == images).double().mean().item()
        assert cut and share >= record.weight - 1e-6


@examples(60)
@given(st.lists(IDS, min_size=1, max_size=5, unique=True), st.integers(0, 3), st.sampled_from(["", "labels", "extra"]))
def test_what_a_collator_gives_reaches_the_model_untouched(ids, width, dropped):
    """Any batch that a collator makes of any number of samples: ids go beside it, if its labels can be addressed."""
    items = [{"uid": one, "x": torch.full((width,), float(n)), "labels": n} for n, one in enumerate(ids)]

    def collate(features):
        assert all("uid" not in feature for feature in features)
        made = {"x": torch.stack([f["x"] for f in features]), "labels": torch.tensor([f["labels"] for f in features])}
        if dropped == "labels":
            made.pop("labels")
        return made | ({"extra": object()} if dropped == "extra" else {})

    found = TrainingCollator(collate, id_column="uid", index=sample_index)(items)
    record = next((value for name, value in found.items() if isinstance(value, BatchRecord)), None)
    names = {name for name, value in found.items() if value is not record}
    assert names == {"x", "labels", "extra"} - {"labels" if dropped == "labels" else ""} - (
        set() if dropped == "extra" else {"extra"}
    )
    assert record is not None and record.ids.tolist() == ids
    assert (record.samples is None) == (dropped == "labels")


# Files


SHAPES = st.lists(st.integers(0, 3), max_size=3)
TYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.float64,
]


@examples(60)
@given(
    st.dictionaries(st.text("abz._0", min_size=1, max_size=4), st.tuples(SHAPES, st.sampled_from(TYPES)), max_size=3),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    st.floats(0, 1, exclude_max=True),
    SEEDS,
)
def test_a_file_is_whole_or_refused(tmp_path, tensors, metadata, kept, seed):
    """Any names, shapes, types and metadata come back; cut anywhere, the file is refused by its name."""
    assume("crc32" not in metadata and "format" not in metadata)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, (shape, dtype) in tensors.items()
    }
    path = tmp_path / "any.safetensors"
    save_tensors(path, tensors, metadata)
    read, told = load_tensors(path)
    assert told == metadata and read.keys() == tensors.keys()
    assert all(read[n].dtype == one.dtype and torch.equal(read[n], one) for n, one in tensors.items())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert str(path) in (one_line(lambda: load_tensors(path)) or "")
