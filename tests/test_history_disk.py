"""A history on disk: files of one run, room that is there before it is used, checkpoints that are not loaded whole."""

import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from test_history import CPU, Dictionary, Processes, batch, check, draw_plan, make, reference, write

from hf_selfkd.files import load_tensors, save_tensors
from hf_selfkd.history import journal, saving, storage
from hf_selfkd.history.storage import TableStorage, reserve


NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SENTENCE = "needs .* bytes more on disk and could not write them .*make room there"


def runs(tmp_path):
    return sorted(path for path in (tmp_path / "history").glob("run-*"))


@pytest.mark.parametrize("missing", [None, "function", errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_room_is_there_before_it_is_used(tmp_path, monkeypatch, missing):
    """Files have all their blocks, also where the system cannot reserve them; what they held stays."""
    if missing == "function":
        monkeypatch.delattr(os, "posix_fallocate")
    elif missing is not None:
        monkeypatch.setattr(os, "posix_fallocate", lambda *rest: (_ for _ in ()).throw(OSError(missing, "no")))
    path = tmp_path / "file"
    for size in (5, 3_000_000, 3_000_001, 7):
        reserve(path, size)
        if size == 5:
            path.write_bytes(b"abcde")
    assert path.stat().st_size == 3_000_001 <= path.stat().st_blocks * 512
    assert path.read_bytes()[:6] == b"abcde\0" and not any(path.read_bytes()[5:])
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(3_000_000)
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 3_000_000  # so the file system can tell


def full(descriptor, offset, length):
    raise NO_ROOM


def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path, monkeypatch):
    """One sentence that names the bytes and the folder; not a signal in the middle of the next epoch."""
    table = make(tmp_path, place="disk")
    write(table, [0, 1], 1)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="the history needs 200 bytes more on disk.*history_device='cpu'") as error:
        table.end_epoch(0)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "history")
    assert table.table == {}


def test_a_disk_that_is_full_when_zeros_are_written(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(storage, "bytes", lambda size: (_ for _ in ()).throw(NO_ROOM), raising=False)
    table = make(tmp_path, place="disk")
    write(table, [0, 1], 1)
    with pytest.raises(OSError, match=SENTENCE):
        table.end_epoch(0)


def test_every_process_stops_when_one_cannot_write(tmp_path, monkeypatch):
    """Those that write nothing would wait for ever."""
    monkeypatch.setattr(os, "posix_fallocate", full)
    said = [None, None]

    def process(rank, gather):
        table = make(tmp_path, place="disk", writes=rank == 0)
        write(table, [rank], 1)
        try:
            table.end_epoch(0, gather, rank)
        except OSError as error:
            said[rank] = str(error)

    Processes(2).run(process)
    assert "bytes more on disk" in said[0] and "another process could not write its history" in said[1]


def test_a_disk_that_is_full_while_an_epoch_is_written(tmp_path, monkeypatch):
    class Full:
        def seek(self, place): ...

        def write(self, values):
            raise NO_ROOM

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    monkeypatch.setattr(journal, "BUFFER_BYTES", 40)
    monkeypatch.setattr(journal, "MAX_HELD", 0)
    table = make(tmp_path, place="disk")
    with pytest.raises(OSError, match=SENTENCE) as error:
        for step in range(3):
            write(table, [0, 1], step)
    assert error.value.errno == errno.ENOSPC


# Files of one run


@pytest.mark.parametrize("target", [None, "right"])
def test_two_runs_in_one_folder(tmp_path, target):
    """Neither reads nor resizes what is the other's, however they take turns."""
    tables = [make(tmp_path, place="disk", ragged=target is not None) for _ in range(2)]
    expected = [Dictionary(), Dictionary()]
    for epoch in range(3):
        for number, (table, mine) in enumerate(zip(tables, expected, strict=True)):
            ids = list(range(3 * epoch + number + 1))
            write(table, ids, epoch, number, target=target)
            mine.write(ids, epoch, number, target=target)
            table.end_epoch(epoch)
            mine.end_epoch(epoch)
            for other, theirs in zip(tables, expected, strict=True):
                check(other, theirs, list(range(10)), target)
    assert len(runs(tmp_path)) == 2


def test_files_are_gone_with_their_history(tmp_path):
    """And with it the file that held the lock."""
    gc.collect()
    tables = [make(tmp_path, place="disk") for _ in range(2)]
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for table in tables:
        write(table, [0], 1)
        table.end_epoch(0)
    assert len(runs(tmp_path)) == 2
    del table
    tables.pop()
    gc.collect()
    (left,) = runs(tmp_path)
    assert left == tables[0].storage.folder
    tables.pop()
    gc.collect()
    assert list((tmp_path / "history").iterdir()) == []
    if opened is not None:
        assert len(os.listdir("/proc/self/fd")) == opened


OTHER_RUN = """
import fcntl, os, sys, time
os.mkdir(sys.argv[1])
lock = os.open(sys.argv[1] + "/lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
print("ready", flush=True)
time.sleep(60)
"""


def test_files_of_a_run_that_was_killed_are_removed_by_the_next(tmp_path):
    """And not before: those of a run that lives are left alone."""
    (tmp_path / "history").mkdir()
    theirs = tmp_path / "history" / "run-0"
    other = subprocess.Popen([sys.executable, "-c", OTHER_RUN, str(theirs)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "ready\n"
        table = make(tmp_path, place="disk")
        write(table, [0], 1)
        table.end_epoch(0)
        mine = table.storage.folder
        assert runs(tmp_path) == sorted([theirs, mine])
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    again = make(tmp_path, place="disk")
    write(again, [0], 1)
    again.end_epoch(0)
    assert runs(tmp_path) == sorted([mine, again.storage.folder])


def test_where_there_are_no_locks_nothing_is_removed(tmp_path, monkeypatch):
    old = tmp_path / "history" / "run-0"
    old.mkdir(parents=True)
    monkeypatch.setattr(storage, "fcntl", None)
    table, expected = make(tmp_path, place="disk"), Dictionary()
    write(table, [0], 1)
    expected.write([0], 1)
    table.end_epoch(0)
    expected.end_epoch(0)
    check(table, expected, [0, 1])
    assert old.is_dir() and len(runs(tmp_path)) == 2


def test_processes_of_a_node_agree_on_a_folder(tmp_path):
    """Four processes on two nodes that see the same disk: each node has a folder, which its processes share."""
    plan = draw_plan(4, epochs=2)

    def process(rank, gather):
        table = make(tmp_path, place="disk", writes=rank % 2 == 0)
        for epoch, steps in enumerate(plan):
            for step, ranks in enumerate(steps):
                write(table, ranks[rank], epoch, step, rank)
            table.end_epoch(epoch, gather, rank)
        return table

    tables = Processes(4).run(process)
    folders = [table.storage.folder for table in tables]
    assert folders[0] == folders[1] != folders[2] == folders[3] and runs(tmp_path) == sorted({folders[0], folders[2]})
    for table in tables:
        check(table, reference(plan), list(range(10)))


def test_a_forked_worker_removes_nothing(tmp_path, monkeypatch):
    """It has a copy of the history, which ends with it."""
    table = make(tmp_path, place="disk")
    write(table, [0], 1)
    table.end_epoch(0)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    folder = table.storage.folder
    del table
    gc.collect()
    assert (folder / "log_probs.bin").is_file()


# Checkpoints


def test_what_is_loaded_is_not_read_before_it_is_used(tmp_path):
    """Tensors of a checkpoint are views of its file: a change of the file still shows."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"table": torch.zeros(5000), "small": torch.ones(3)}, {"size": "1"})
    tensors, _ = load_tensors(path)
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(len(content) - 5000 * 4)
        file.write(np.float32(7).tobytes() * 5000)
    assert 7 in (tensors["table"][4000], tensors["table"][-1])


@pytest.mark.parametrize("place", ["accelerator", "disk"])
@pytest.mark.parametrize("target", [None, "right"])
def test_a_table_is_taken_over_some_rows_at_a_time(tmp_path, monkeypatch, place, target):
    monkeypatch.setattr(saving, "COPIED_ROWS", 3)
    plan = draw_plan(1, epochs=2)
    first = make(tmp_path, place=place, ragged=target is not None)
    for epoch, steps in enumerate(plan):
        for step, ranks in enumerate(steps):
            write(first, ranks[0], epoch, step, 0, target=target)
        first.end_epoch(epoch)
    save_tensors(tmp_path / "a.safetensors", *first.state())
    tensors, _ = load_tensors(tmp_path / "a.safetensors")
    copied, index_copy = [], torch.Tensor.index_copy_

    def count(self, dim, index, source):
        copied.append(len(index))
        return index_copy(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_copy_", count)
    second = make(tmp_path, place=place, ragged=target is not None)
    second.load_state(tensors)
    assert max(copied) == 3 and sum(copied) == len(first.table["log_probs"])
    check(second, reference(plan, target), list(range(10)), target)


def test_only_the_writer_of_a_node_copies(tmp_path, monkeypatch):
    """The others map its files."""
    first = make(tmp_path, place="disk")
    write(first, list(range(10)), 1)
    first.end_epoch(0)
    state = {name: tensor.clone() for name, tensor in first.state()[0].items()}

    def process(rank, gather):
        table = make(tmp_path, place="disk", writes=rank == 0)
        if rank:
            monkeypatch.setattr(table.storage, "device", "nowhere")  # which a copy would ask for
        table.load_state(state, gather)
        return table

    tables = Processes(2).run(process)
    for table in tables:
        assert torch.equal(table.table["log_probs"], first.table["log_probs"])
    tables[0].table["log_probs"][3] = 5
    assert (tables[1].table["log_probs"][3] == 5).all()


def test_storage_keeps_what_it_holds(tmp_path):
    for place in ("cpu", "disk"):
        table = TableStorage({"log_probs": (2, torch.bfloat16)}, place, CPU, tmp_path, True)
        for rows in (1, 1, 5, 3, 9):
            table.grow(rows)
            table.parts["log_probs"][rows - 1] = rows
        assert table.parts["log_probs"][:, 0].tolist() == [1, 0, 3, 0, 5, 0, 0, 0, 9]


def test_reading_a_batch_of_a_growing_table(tmp_path):
    """A table on disk that grew in a later epoch is the same file, longer."""
    table = make(tmp_path, place="disk", ragged=True)
    write(table, [0], 1, target="right")
    table.end_epoch(0)
    first = table.read(batch([0], 0, target="right")[0], 5, CPU).log_probs
    (folder,) = runs(tmp_path)
    write(table, [1, 2, 4], 2, target="right")
    table.end_epoch(1)
    assert runs(tmp_path) == [folder]
    assert torch.equal(table.read(batch([0], 0, target="right")[0], 5, CPU).log_probs, first)
