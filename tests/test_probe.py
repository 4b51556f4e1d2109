"""What a few samples tell of a training set: whether labels and rows stay, and a checksum of what it holds."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import Samples, add_noise, collate, make_samples
from torch import nn
from transformers import BatchFeature

from hf_selfkd.probe import SAMPLES, DataProbe, checksum, probe_data
from hf_selfkd.samples import with_sample_ids
from hf_selfkd.tasks.causal_lm import CausalLM
from hf_selfkd.tasks.token_classification import TokenClassification


def probe(samples, collator=collate, batch_size=SAMPLES, row_labels=None, seed=None, **wrapping):
    task = TokenClassification(nn.Identity())
    task.row_labels = row_labels or task.row_labels
    dataset = with_sample_ids(samples, **wrapping)
    dataset.transform_seed = seed
    return probe_data(dataset, collator, task, batch_size)


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# Labels and rows


@pytest.mark.parametrize("kind", ["images", "texts", "sounds"])
def test_one_label_a_sample(kind):
    """No rows to count: sample b is row b."""
    found = probe(make_samples(kind))
    assert found.labels_stay and found.rows_fit and found.rows_per_sample is None and found.content is not None


@pytest.mark.parametrize("generator", ["torch", "numpy", "python"])
def test_random_masking_is_seen(generator):
    """Whatever generator the collator draws from; a collator that masks by content is no random one."""
    draw = {"torch": lambda: torch.rand(()).item(), "numpy": np.random.rand, "python": random.random}[generator]

    def masking(items):
        batch = collate(items)
        keep = torch.tensor([[draw() < 0.5 for _ in row] for row in batch["input_ids"]])
        return batch | {"labels": torch.where(keep, batch["labels"], -100)}

    def fixed(items):
        batch = collate(items)
        return batch | {"labels": torch.where(batch["input_ids"] % 3 == 0, batch["labels"], -100)}

    words = make_samples("words")
    assert not probe(words, masking).labels_stay
    assert probe(words, fixed).labels_stay and probe(words).labels_stay


def test_random_inputs_are_no_random_labels():
    """Augmentation is fine; labels that a transform draws are not, seeded or not: each epoch has other ones."""
    found = probe(make_samples("images", transform=add_noise))
    assert found.labels_stay and found.rows_fit

    def drawn(item):
        return item | {"labels": int(torch.randint(10_000, ()))}

    assert not probe(make_samples("images", transform=drawn)).labels_stay
    assert not probe(make_samples("images", transform=drawn), seed=3).labels_stay


def packed(items):
    batch = collate(items)
    return {name: value.reshape(1, -1) for name, value in batch.items()}


def first_half(items):
    return collate(items[: len(items) // 2])


def twice(items):
    return collate([*items, *items])


@pytest.mark.parametrize("collator", [packed, first_half, twice])
def test_packing_dropping_and_repeating_are_seen(collator):
    """Another number of rows of labels than of samples."""
    found = probe(make_samples("words"), collator)
    assert not found.rows_fit and found.rows_per_sample is None and found.labels_stay


def test_rows_of_a_sample():
    """The mean number of labels that count where the task has its rows: the next word for causal models."""
    words = Samples([{"input_ids": [3] * n, "labels": [-100] + [3] * (n - 1)} for n in (3, 5, 7)])
    assert probe(words, row_labels=TokenClassification(nn.Linear(1, 1)).row_labels).rows_per_sample == 4
    words = Samples([{"input_ids": [3] * n, "labels": [3] * n} for n in (3, 5, 7)])
    assert probe(words, row_labels=TokenClassification(nn.Linear(1, 1)).row_labels).rows_per_sample == 5
    assert probe(words, row_labels=CausalLM(nn.Linear(1, 1)).row_labels).rows_per_sample == 4


@pytest.mark.parametrize(
    ("size", "batch_size", "batches"),
    [(100, 32, [8]), (100, 3, [3, 3, 2]), (5, 32, [5]), (1, 8, [1]), (9, 8, [8]), (100, 1, [1] * 8)],
)
def test_few_samples_are_read_evenly_spread(size, batch_size, batches):
    """In batches as large as those of a training, the first and the last among them; thrice the same ones."""
    read = []

    def collator(items):
        read.append([item["labels"] for item in items])
        return {"labels": torch.tensor(read[-1])}

    probe(Samples([{"labels": n} for n in range(size)]), collator, batch_size)
    assert [len(batch) for batch in read] == 3 * batches
    count = len(batches)
    assert read[:count] == read[count : 2 * count] == read[2 * count :]
    places = sum(read[:count], [])
    assert len(places) == min(size, SAMPLES) and places == sorted(set(places))
    assert places[0] == 0 and places[-1] == size - 1
    gaps = np.diff(places)
    assert len(places) < 3 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("made", [None, (1, 2), {"x": torch.ones(3)}, {"labels": torch.tensor(1)}, {"labels": [1, 2]}])
def test_batches_that_tell_nothing(made):
    """Of labels and rows; the items themselves have a checksum all the same."""
    found = probe(make_samples("images"), lambda items: made)
    assert found == DataProbe(content=probe(make_samples("images")).content)
    assert probe(Samples([])) == DataProbe()


def test_labels_that_are_no_integers_have_no_rows_to_count():
    found = probe(make_samples("images"), lambda items: {"labels": torch.zeros(len(items), 4)})
    assert found.rows_fit and found.rows_per_sample is None


# The generators


@pytest.mark.parametrize("fails", [False, True])
def test_the_generators_are_put_back(fails):
    """Training draws the same random numbers with and without the probe."""

    def drawing(items):
        random.random(), np.random.rand(), torch.rand(())
        if fails:
            raise KeyError("a fault of the user's")
        return collate(items)

    before = states()
    if fails:
        with pytest.raises(KeyError):
            probe(make_samples("images", transform=add_noise), drawing)
    else:
        probe(make_samples("images", transform=add_noise), drawing)
    assert states() == before


# What a training set holds


def test_the_checksum_of_a_training_set_is_that_of_its_inputs():
    """Other inputs give another one, other labels do not; a second set of the same inputs gives the same."""
    for kind in ("images", "texts", "words", "sounds"):
        content = probe(make_samples(kind)).content
        assert content == probe(make_samples(kind)).content is not None
        assert content != probe(make_samples(kind, seed=1)).content is not None
    images = make_samples("images")
    relabelled = Samples([item | {"labels": (item["labels"] + 1) % 5} for item in images.items])
    assert probe(images).content == probe(relabelled).content
    shuffled = Samples(images.items[::-1])
    assert probe(images).content != probe(shuffled).content


def test_seeded_augmentation_is_the_same_every_time():
    """Random numbers that a probe seeds do not make another training set of it."""
    noisy = make_samples("images", transform=add_noise)
    assert probe(noisy).content == probe(noisy).content is not None
    assert probe(noisy, seed=1).content == probe(noisy, seed=1).content is not None


def test_no_checksum_of_inputs_that_nobody_can_read_twice():
    """A generator of its own, a clock, a counter."""
    own = np.random.default_rng(0)

    def restless(item):
        return item | {"extra": float(own.random())}

    found = probe(make_samples("images", transform=restless))
    assert found.content is None and found.labels_stay and found.rows_fit


NESTED = """{
    "b": torch.arange(6).reshape(2, 3),
    "a": [np.linspace(0, 1, 5), (1, 2.5, None, True), "text", b"bytes"],
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "deep": {"x": torch.tensor(3.0), 7: []},
    "other": object(),
}"""


def test_checksums_are_the_same_in_every_process():
    """Whatever the seed of Python's own hashes is, and where an object happens to be."""
    script = f"import numpy as np, torch\nfrom hf_selfkd.probe import checksum\nprint(checksum({NESTED}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == checksum(eval(NESTED))


def test_checksums_tell_values_types_shapes_and_names_apart():
    """The order of the keys does not matter, that of a list does."""
    values = [
        torch.arange(6),
        torch.arange(6).reshape(2, 3),
        torch.arange(6).reshape(3, 2),
        torch.arange(6).float(),
        torch.arange(1, 7),
        [1, 2],
        [2, 1],
        [1, [2]],
        [],
        None,
        0,
        False,
        "0",
        "1",
        {"x": 1},
        {"y": 1},
        {"x": 2},
    ]
    assert len({checksum(value) for value in values}) == len(values)
    assert checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1}) == checksum(BatchFeature({"a": 1, "b": 2}))
    assert checksum(torch.arange(6).numpy()) == checksum(torch.arange(6))
    assert checksum(torch.arange(12).reshape(3, 4).t()) == checksum(torch.arange(12).reshape(3, 4).t().contiguous())
    assert checksum({"a": object()}) == checksum({"a": object()})
