"""The journal of a history: buffers that stay where they are, copies that are waited for, rows that are counted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_history import CODECS, CPU, Dictionary, batch, check, make, write
from torch.utils._python_dispatch import TorchDispatchMode

from hf_selfkd import devices
from hf_selfkd.history import journal
from hf_selfkd.history.codec import Codec
from hf_selfkd.samples import sample_index


def visits(epoch, steps=12):
    rng = np.random.default_rng(epoch)
    return [rng.integers(0, 10, rng.integers(1, 5)).tolist() for _ in range(steps)]


@pytest.fixture
def late_copies(monkeypatch):
    """A device whose copies to the host arrive when somebody waits for them, and not before."""
    pending, copy, empty = [], torch.Tensor.copy_, torch.empty

    def copy_later(target, source, non_blocking=False):
        if not non_blocking:
            return copy(target, source)
        pending.append((target, source.clone()))
        return copy(target, torch.full_like(target, 77))  # what is there until then

    def wait(until=None):
        for target, source in pending[:until]:
            copy(target, source)
        del pending[:until]

    class Event:
        def record(self, stream):
            self.number = len(pending) + done[0]

        def synchronize(self):
            count = max(self.number - done[0], 0)
            done[0] += count
            wait(count)

    done = [0]  # copies that arrived

    def synchronize(device):
        done[0] += len(pending)
        wait()

    monkeypatch.setattr(torch.Tensor, "copy_", copy_later)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(journal, "copies_in_background", lambda device: True)
    monkeypatch.setattr(journal, "synchronize", synchronize)
    monkeypatch.setattr(journal, "MAX_HELD", 0)
    return pending


@pytest.mark.parametrize("buffer_bytes", [60, 200, 10**6])
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("target", [None, "right"])
def test_copies_that_arrive_late(tmp_path, monkeypatch, late_copies, place, target, buffer_bytes):
    """The journal grows while copies are under way, is saved in the middle, and ends: always the dictionary's rows."""
    monkeypatch.setattr(journal, "BUFFER_BYTES", buffer_bytes)
    table, expected, late = make(tmp_path, place=place, ragged=target is not None, trace_epochs=3), Dictionary(), 0
    for epoch in range(3):
        for step, ids in enumerate(visits(epoch)):
            write(table, ids, epoch, step, target=target)
            expected.write(ids, epoch, step, target=target)
            late = max(late, len(late_copies))
            if step == 7:
                table.journal_state()
        table.end_epoch(epoch)
        expected.end_epoch(epoch)
        check(table, expected, list(range(10)), target)
    assert late > 1  # so somebody had to wait


def test_only_cuda_copies_in_the_background(monkeypatch):
    """Nobody waits for a copy from or to another accelerator, so such a copy is never left under way."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: seen.append(non_blocking))
    devices.to_device(torch.ones(2), torch.device("meta"))
    assert seen == [False]
    kept = torch.ones(2)
    assert devices.to_device(kept, CPU) is kept
    assert [devices.copies_in_background(torch.device(name)) for name in ("cuda", "cpu", "mps", "xpu")] == [
        True,
        False,
        False,
        False,
    ]
    for place in ("accelerator", "cpu", "disk"):
        device = torch.device("mps") if place == "accelerator" else CPU
        assert not journal.Journal(Codec(3, torch.float32), device, torch.device("mps")).in_background


@pytest.mark.parametrize("type_", ["cuda", "mps", "xpu"])
def test_the_device_that_is_waited_for(monkeypatch, type_):
    """By torch's common name for accelerators where there is one, by the device's own name otherwise."""
    seen = []
    monkeypatch.setattr(torch, "accelerator", SimpleNamespace(synchronize=lambda device: seen.append(device.type)))
    devices.synchronize(torch.device(type_))
    monkeypatch.delattr(torch, "accelerator")
    monkeypatch.setattr(torch, type_, SimpleNamespace(synchronize=lambda: seen.append(f"own {type_}")))
    devices.synchronize(torch.device(type_))
    devices.synchronize(CPU)
    assert seen == [type_, f"own {type_}"]


@pytest.mark.parametrize("place", ["accelerator", "cpu"])
def test_buffers_stay_where_they_are(tmp_path, monkeypatch, place):
    """Also from epoch to epoch; one that is not full is filled up."""
    monkeypatch.setattr(journal, "BUFFER_BYTES", 100)  # 5 rows of 5 classes
    monkeypatch.setattr(journal, "MAX_HELD", 0)
    table, pointers = make(tmp_path, place=place), []
    for epoch in range(2):
        for step in range(7):
            write(table, [step, step + 1, step + 2], epoch, step)
            now = [buffer["log_probs"].data_ptr() for buffer in table.journal.buffers]
            assert now[: len(pointers)] == pointers and len(now) == max(len(pointers), -(-table.journal.filled // 5))
            pointers = now
        table.end_epoch(epoch)
    assert len(pointers) == 5


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("target", [None, "left"])
def test_a_journal_on_disk_holds_two_buffers_in_memory(tmp_path, monkeypatch, codec, target):
    """The rest is in files without a name; what is stored and saved is what a journal in memory stores and saves."""
    arguments, atol = CODECS[codec]
    monkeypatch.setattr(journal, "BUFFER_BYTES", 90)
    monkeypatch.setattr(journal, "MAX_HELD", 20)
    tables = [
        make(tmp_path, place=place, ragged=target is not None, trace_epochs=3, **arguments)
        for place in ("cpu", "disk")
    ]
    expected = Dictionary()
    for epoch in range(3):
        for step, ids in enumerate(visits(epoch, 25)):
            for table in tables:
                write(table, ids, epoch, step, target=target)
            expected.write(ids, epoch, step, target=target)
            if step % 9 == 0:
                memory, disk = (table.journal_state() for table in tables)
                assert memory.keys() == disk.keys()
                assert all(torch.equal(memory[name].nan_to_num(), disk[name].nan_to_num()) for name in memory)
        held = sum(part.nbytes for buffer in tables[1].journal.buffers for part in buffer.values())
        assert held <= 2 * 90 < tables[1].journal.filled * tables[1].journal.row_bytes
        assert [path.name for path in (tmp_path / "history").iterdir() if path.is_file()] == []
        expected.end_epoch(epoch)
        for table in tables:
            table.end_epoch(epoch)
            check(table, expected, list(range(10)), target, atol)
        assert torch.equal(tables[0].trace.nan_to_num(), tables[1].trace.nan_to_num())


def labels_of_length(*lengths):
    labels = torch.full((len(lengths), max(lengths)), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = row % 5
    return labels


def token_epoch(table, lengths, per_batch=4):
    """An epoch in which sample i has lengths[i] tokens, the longest first, as when batches are grouped by length."""
    for start in range(0, len(lengths), per_batch):
        labels = labels_of_length(*lengths[start : start + per_batch])
        ids = torch.arange(start, start + len(labels))
        rows = torch.randn(labels.numel(), 5).log_softmax(-1)
        table.write(sample_index(ids, labels), rows, labels.reshape(-1))


LENGTHS = [200] * 4 + [3] * 396  # the first batch: 4 samples, 800 rows


@pytest.mark.parametrize("place", ["accelerator", "cpu", "disk"])
def test_memory_comes_from_the_rows_and_not_from_an_estimate(tmp_path, monkeypatch, place):
    """An estimate by the first batch would be 80,000 rows, where there are 1,988."""
    monkeypatch.setattr(journal, "BUFFER_BYTES", 4096)
    table = make(tmp_path, size=400, ragged=True, place=place, expected_rows=80_000)
    token_epoch(table, LENGTHS)
    table.journal.encode()
    held = sum(part.nbytes for buffer in table.journal.buffers for part in buffer.values())
    assert held <= (2 * 4096 if place == "disk" else sum(LENGTHS) * 20 + 4096)
    table.end_epoch(0)
    assert len(table.table["log_probs"]) == sum(LENGTHS) == 1988


def test_a_small_epoch_has_a_small_buffer(tmp_path):
    table = make(tmp_path, expected_rows=12)
    write(table, [0, 1, 2], 1)
    table.journal.encode()
    assert [len(buffer["log_probs"]) for buffer in table.journal.buffers] == [12]
    write(table, list(range(10)), 2)
    table.journal.encode()
    assert [len(buffer["log_probs"]) for buffer in table.journal.buffers] == [12, 12]


def test_a_guess_that_is_far_too_low_makes_few_buffers(tmp_path):
    """The first batch may hold the shortest samples."""
    table = make(tmp_path, size=400, ragged=True, expected_rows=2)
    token_epoch(table, LENGTHS[::-1])
    table.journal.encode()
    assert len(table.journal.buffers) == 1


def test_more_rows_than_fit(tmp_path, monkeypatch):
    """Known at the end of the first epoch, or earlier where even the journal of this process takes more."""
    total = sum(LENGTHS)
    fits = make(tmp_path, size=400, ragged=True, max_bytes=2 * total * 20)
    token_epoch(fits, LENGTHS)
    fits.end_epoch(0)
    token_epoch(fits, LENGTHS)
    fits.end_epoch(1)
    table = make(tmp_path, size=400, ragged=True, max_bytes=2 * total * 20 - 1)
    token_epoch(table, LENGTHS)
    message = f"have {total} rows, whose history needs {2 * total * 20} bytes and may take {2 * total * 20 - 1} "
    with pytest.raises(ValueError, match=message + r"\(history_max_bytes\): set a history_top_k below 5"):
        table.end_epoch(0)
    assert table.table == {}
    monkeypatch.setattr(journal, "BUFFER_BYTES", 1000)
    for place in ("cpu", "disk"):
        table = make(tmp_path, size=400, ragged=True, max_bytes=20_000, place=place)
        with pytest.raises(ValueError, match="rows so far, whose history needs 21000 bytes and may take 20000"):
            for _ in range(20):
                token_epoch(table, LENGTHS[:8])
                table.journal.encode()


def test_a_trace_that_is_turned_on_in_the_middle_of_an_epoch(tmp_path):
    """What was predicted before has no probability of the true class; later epochs have."""
    before, after = make(tmp_path), make(tmp_path, trace_epochs=3)
    write(before, [0, 1], 1)
    after.load_state(before.state()[0])
    after.add_journal(before.journal_state())
    write(after, [2], 2)
    after.end_epoch(0)
    assert after.trace[:3, 0].isnan().tolist() == [True, True, False]
    write(after, [0, 1, 2], 3)
    after.end_epoch(1)
    assert after.trace[:3, 1].isfinite().all() and after.stamps[:4].tolist() == [1, 1, 1, -2]


class NoFloat64(TorchDispatchMode):
    """Some devices have no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("target", [None, "right"])
def test_nothing_needs_float64(tmp_path, codec, target):
    """Neither writing nor reading, nor the end of an epoch but for the trace, which is on the host."""
    table = make(tmp_path, ragged=target is not None, **CODECS[codec][0])
    with NoFloat64():
        for epoch in range(2):
            samples, rows, labels = batch([0, 1, 2, 4], epoch, target=target)
            table.read(samples, len(rows), CPU)
            table.write(samples, rows, labels)
            table.end_epoch(epoch)
    with pytest.raises(AssertionError), NoFloat64():
        torch.ones(2).double()
