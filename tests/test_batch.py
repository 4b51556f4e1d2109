"""What travels beside a batch: in plain dicts, through worker processes and through accelerate's dataloaders."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import send_to_device
from helpers import SizedStream, collate, make_samples
from torch.utils.data import DataLoader
from transformers import BatchEncoding, BatchFeature

from hf_selfkd import SelfKDDataCollator
from hf_selfkd.batch import BatchRecord, RecordedBatches, attach_record, peek_record, pop_record
from hf_selfkd.collator import TrainingCollator
from hf_selfkd.samples import BatchIdDataset, sample_index


def inputs(kind=dict, size=3):
    return kind({"x": torch.arange(size), "labels": torch.arange(size) % 2})


def record_of(size=3, mixed=True):
    ids = np.arange(size) + 10
    samples = sample_index(ids, torch.arange(size) % 2)
    return BatchRecord(ids, samples, torch.arange(size).flip(0), 0.3) if mixed else BatchRecord(ids, samples)


# In and out


@pytest.mark.parametrize("kind", [dict, BatchEncoding, BatchFeature])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_record_is_taken_out_as_it_was_put_in(kind, mixed):
    """The very object; the batch is then what the collator made. A second time there is none."""
    batch, record = inputs(kind), record_of(mixed=mixed)
    attach_record(batch, record, as_tensors=False)
    assert peek_record(batch) is record is peek_record(batch)
    assert pop_record(batch) is record
    assert batch.keys() == {"x", "labels"} and pop_record(batch) is None and peek_record(batch) is None


@pytest.mark.parametrize("kind", [dict, BatchEncoding, BatchFeature])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_record_as_tensors(kind, mixed):
    """A row for each sample, so that accelerate can cut and join batches; the address is found again later."""
    batch, record = inputs(kind), record_of(mixed=mixed)
    attach_record(batch, record, as_tensors=True)
    assert all(isinstance(value, torch.Tensor) and len(value) == 3 for value in batch.values())
    assert peek_record(batch) is None
    found = pop_record(batch)
    assert found.ids.tolist() == [10, 11, 12] and found.ids.dtype == np.int64 and found.samples is None
    assert (found.partner is None) is not mixed and found.weight == (pytest.approx(0.3) if mixed else None)
    assert not mixed or found.partner.tolist() == [2, 1, 0]
    assert batch.keys() == {"x", "labels"} and pop_record(batch) is None


def test_mixing_without_ids_as_tensors():
    batch = inputs()
    attach_record(batch, BatchRecord(partner=torch.tensor([1, 2, 0]), weight=0.25), as_tensors=True)
    found = pop_record(batch)
    assert found.ids is None and found.partner.tolist() == [1, 2, 0] and found.weight == 0.25


@pytest.mark.parametrize("batch", [None, "text", (1, 2), [torch.zeros(2)], torch.zeros(2), 3])
def test_batches_of_another_make_hold_no_record(batch):
    assert peek_record(batch) is None and pop_record(batch) is None


# The micro-batches of a step


def test_recorded_batches_tell_which_one_the_loop_is_at():
    """The records are out before anybody sees the batches; a batch without one is told as such."""
    batches, records = [inputs() for _ in range(3)], [record_of(), None, record_of(mixed=False)]
    for batch, record in zip(batches, records, strict=True):
        if record is not None:
            attach_record(batch, record, as_tensors=False)
    recorded = RecordedBatches(batches)
    assert len(recorded) == 3 and recorded[0] is batches[0] and recorded.present is None
    assert all(batch.keys() == {"x", "labels"} for batch in batches)
    for _ in range(2):  # the loop may be started again
        seen = [(id(batch), recorded.present) for batch in recorded]
        assert seen == list(zip(map(id, batches), records, strict=True))
        assert recorded.present is None
    assert [batch is given for (_, batch), given in zip(enumerate(recorded), batches, strict=True)] == [True] * 3


def test_recorded_batches_without_any():
    assert list(RecordedBatches([])) == [] and list(RecordedBatches([None, (1, 2)])) == [None, (1, 2)]


# Workers and accelerate

SAMPLES = make_samples("images", size=10)


def training_collator(mixes=False, **extra):
    mixer = SelfKDDataCollator(collate, mixup_alpha=1.0) if mixes else None
    return TrainingCollator(collate, mixer, index=sample_index, seed=1, **extra)


def passed(dataloader):
    """Every batch of a pass with its record."""
    pairs = []
    for batch in dataloader:
        record = pop_record(batch)
        assert batch.keys() == {"pixel_values", "labels"}
        pairs.append((batch, record))
    return pairs


def check(pairs, order, mixes, addressed=True):
    """Ids in order, each with the label and the pixels of its sample, and an address that fits them."""
    assert np.concatenate([record.ids for _, record in pairs]).tolist() == order
    for batch, record in pairs:
        labels = [SAMPLES.items[i]["labels"] for i in record.ids]
        assert batch["labels"].tolist() == labels
        pixels = torch.stack([SAMPLES.items[i]["pixel_values"] for i in record.ids])
        assert (record.partner is not None) is mixes
        if mixes:
            pixels = record.weight * pixels + (1 - record.weight) * pixels[record.partner]
        torch.testing.assert_close(batch["pixel_values"], pixels)
        if addressed:
            assert record.samples.ids.tolist() == record.ids.tolist() and record.samples.total == len(labels)
            assert record.samples.label_hash.tolist() == labels
        else:
            assert record.samples is None


ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_records_survive_worker_processes(workers, as_tensors, mixes):
    """The last batch is a smaller one."""
    dataloader = DataLoader(
        BatchIdDataset(SAMPLES),
        batch_size=4,
        sampler=ORDER,
        num_workers=workers,
        collate_fn=training_collator(mixes, as_tensors=as_tensors),
    )
    pairs = passed(dataloader)
    check(pairs, ORDER, mixes, addressed=not as_tensors)
    assert [len(record.ids) for _, record in pairs] == [4, 4, 2]


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"dispatch_batches": True}, {"split_batches": True}, {"non_blocking": True}])
def test_records_survive_the_dataloaders_of_accelerate(options, workers, mixes):
    """Also where one process reads for all of them, which sends batches as tensors."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    dataloader = DataLoader(
        BatchIdDataset(SAMPLES),
        batch_size=4,
        sampler=ORDER,
        num_workers=workers,
        collate_fn=training_collator(mixes, as_tensors="dispatch_batches" in options),
    )
    prepared = accelerator.prepare(dataloader)
    for _ in range(2):
        check(passed(prepared), ORDER, mixes, addressed="dispatch_batches" not in options)


def test_records_of_a_batch_that_is_skipped():
    """As after a resume: the rest of the pass has its own."""
    accelerator = Accelerator(cpu=True)
    dataloader = DataLoader(
        BatchIdDataset(SAMPLES), batch_size=4, sampler=ORDER, collate_fn=training_collator(mixes=True)
    )
    whole = passed(accelerator.prepare(dataloader))
    rest = passed(accelerator.skip_first_batches(accelerator.prepare(dataloader), 1))
    check(rest, ORDER[4:], mixes=True)
    assert torch.equal(rest[0][0]["pixel_values"], whole[1][0]["pixel_values"])


def test_records_of_a_stream():
    """Ids are in a column of the items; the collator of the user does not see the column."""
    items = copy.deepcopy(SAMPLES)
    for number, item in enumerate(items.items):
        item["uid"] = number
    collator = training_collator(id_column="uid")
    prepared = Accelerator(cpu=True).prepare(DataLoader(SizedStream(items), batch_size=4, collate_fn=collator))
    check(passed(prepared), list(range(10)), mixes=False)


def test_a_record_goes_to_no_device():
    """What moves batches to a device leaves the record as it is."""
    for kind in (dict, BatchEncoding):
        batch, record = inputs(kind), record_of()
        attach_record(batch, record, as_tensors=False)
        moved = send_to_device(batch, torch.device("meta"))
        assert pop_record(moved) is record and moved["x"].device.type == "meta"
