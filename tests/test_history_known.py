"""A history that was made for other samples is taken over as far as their ids are known."""

import shutil

import numpy as np
import pytest
import torch
from test_history import CLASSES, CODECS, Dictionary, Processes, check, labels_of, log_rows, make, write

from hf_selfkd.files import load_tensors, save_tensors
from hf_selfkd.history.table import NEVER
from hf_selfkd.samples import sample_index


def through_file(tmp_path, tensors, metadata=None):
    save_tensors(tmp_path / "saved.safetensors", tensors, metadata or {})
    return load_tensors(tmp_path / "saved.safetensors")[0]


OLD, NEW = np.array([0, 2, 3, 5, 6, 7]), np.array([1, 2, 4, 5, 7, 9])  # 2, 5 and 7 are in both


@pytest.mark.parametrize("place", ["accelerator", "disk"])
@pytest.mark.parametrize("codec", ["dense", "half top"])
@pytest.mark.parametrize("target", [None, "right"])
def test_rows_of_known_ids_are_kept(tmp_path, place, codec, target):
    """And the journal of the epoch that was interrupted; the rest begins without a past, and training goes on."""
    codec, atol = CODECS[codec]
    arguments = codec | {"size": 6, "place": place, "ragged": target is not None, "trace_epochs": 3}
    old, expected = make(tmp_path / "old", ids=OLD, **arguments), Dictionary()
    for epoch, visits in enumerate([[[7, 0], [2, 3]], [[5, 6], [2, 7]]]):
        for step, ids in enumerate(visits):
            write(old, ids, epoch, step, target=target)
            expected.write(ids, epoch, step, target=target)
        if epoch == 0:
            old.end_epoch(0)
            expected.end_epoch(0)
    state, journal = through_file(tmp_path, *old.state()), through_file(tmp_path / "j", old.journal_state())
    new = make(tmp_path / "new", ids=NEW, **arguments)
    moved = new.load_state(state, keep_known=True)
    assert moved.tolist() == [-1, 1, -1, 3, -1, 4]
    kept = Dictionary()
    kept.rows = {i: entry for i, entry in expected.rows.items() if i in NEW}
    check(new, kept, NEW.tolist(), target, atol)
    assert kept.rows.keys() == {2, 7}
    assert torch.equal(new.trace[[1, 4], 0], old.trace[[1, 5], 0]) and new.trace[[0, 2, 3, 5]].isnan().all()
    new.add_journal(journal, moved)
    write(new, [1, 7], 1, 9, target=target)
    new.end_epoch(1)
    kept.new = {i: rows for i, rows in expected.new.items() if i in NEW}
    kept.write([1, 7], 1, 9, target=target)  # 7 was seen before in this epoch
    kept.end_epoch(1)
    check(new, kept, NEW.tolist(), target, atol)
    assert kept.rows.keys() == {1, 2, 5, 7}
    write(new, NEW.tolist(), 2, target=target)
    kept.write(NEW.tolist(), 2, target=target)
    new.end_epoch(2)
    kept.end_epoch(2)
    check(new, kept, NEW.tolist(), target, atol)


@pytest.mark.parametrize(("before", "after"), [(6, 10), (10, 6)])
def test_more_or_fewer_samples_with_row_numbers_as_ids(tmp_path, before, after):
    old, expected = make(tmp_path, size=before), Dictionary()
    write(old, list(range(before)), 1)
    expected.write(list(range(before)), 1)
    old.end_epoch(0)
    expected.end_epoch(0)
    new = make(tmp_path, size=after)
    moved = new.load_state(old.state()[0], keep_known=True)
    assert moved.tolist() == [i if i < after else -1 for i in range(before)]
    check(new, expected, list(range(min(before, after))))
    assert (new.stamps[before:] == NEVER).all()


def test_row_numbers_become_ids_of_ones_own(tmp_path):
    """Whoever gave the same numbers in a column has the same samples."""
    old, expected = make(tmp_path, size=4), Dictionary()
    write(old, [0, 1, 2, 3], 1)
    expected.write([0, 1, 2, 3], 1)
    old.end_epoch(0)
    expected.end_epoch(0)
    new = make(tmp_path, size=3, ids=np.array([1, 3, 7]))
    assert new.load_state(old.state()[0], keep_known=True).tolist() == [-1, 0, -1, 1]
    check(new, expected, [1, 3])


def test_a_known_id_with_other_labels_is_still_refused(tmp_path):
    old = make(tmp_path, size=4)
    write(old, [0, 1, 2, 3], 1)
    old.end_epoch(0)
    new = make(tmp_path, size=6)
    new.load_state(old.state()[0], keep_known=True)
    labels = (labels_of([2]) + 1) % CLASSES
    with pytest.raises(ValueError, match="labels of sample_id=2 are not those its stored prediction was made for"):
        new.write(sample_index(torch.tensor([2]), labels), log_rows(1, 1), labels)


@pytest.mark.parametrize("target", [None, "right"])
def test_nothing_known(tmp_path, target):
    """No id in common, or a checkpoint of the first epoch: an empty history, whose journal counts on."""
    old = make(tmp_path, size=2, ids=np.array([0, 2]), ragged=target is not None)
    write(old, [0, 2], 1, target=target)
    for ended in (False, True):
        new = make(tmp_path, size=2, ids=np.array([4, 7]), ragged=target is not None)
        moved = new.load_state(old.state()[0], keep_known=True)
        new.add_journal(old.journal_state(), moved)
        assert (new.stamps == NEVER).all() and new.journal.filled == 0 and new.visits == (0 if ended else 1)
        expected = Dictionary()
        write(new, [4], 2, target=target)
        expected.write([4], 2, target=target)
        new.end_epoch(0)
        expected.end_epoch(0)
        check(new, expected, [4, 7], target)
        old.end_epoch(0)


@pytest.mark.parametrize("place", ["accelerator", "disk"])
def test_several_processes_keep_the_same_rows(tmp_path, place):
    old, expected = make(tmp_path / "old", size=6, ids=OLD, ragged=True), Dictionary()
    write(old, OLD.tolist(), 1, target="right")
    expected.write(OLD.tolist(), 1, target="right")
    old.end_epoch(0)
    expected.end_epoch(0)
    state = {name: tensor.clone() for name, tensor in old.state()[0].items()}
    shutil.rmtree(tmp_path / "old", ignore_errors=True)

    def process(rank, gather):
        new = make(tmp_path / "new", size=6, ids=NEW, ragged=True, place=place, writes=rank == 0)
        new.load_state(state, gather, keep_known=True)
        return new

    expected.rows = {i: entry for i, entry in expected.rows.items() if i in NEW}
    for new in Processes(2).run(process):
        check(new, expected, NEW.tolist(), "right")
