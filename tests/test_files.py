"""Saved tensors are either whole or refused."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_selfkd import files
from hf_selfkd.files import load_tensors, save_tensors


TENSORS = {
    "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "bfloat": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "index": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16),
    "long": torch.tensor([2**62, -1]),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "nan": torch.tensor([float("nan"), float("inf")]),
}
METADATA = {"size": "100", "dtype": "float16"}


@pytest.fixture
def saved(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS, METADATA)
    return tmp_path / "a.safetensors"


def same(left, right):
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and left[n].contiguous().numpy(force=True).tobytes() == right[n].contiguous().numpy(force=True).tobytes()
        if left[n].dtype != torch.bfloat16
        else torch.equal(left[n], right[n])
        for n in left
    )


def test_round_trip(saved):
    """Every type, scalars, empty tensors, NaN; the metadata come back without the checksum."""
    tensors, metadata = load_tensors(saved)
    assert same(tensors, TENSORS) and metadata == METADATA
    assert not same(tensors, TENSORS | {"scalar": torch.tensor(8)})


def test_makes_folders_and_takes_strings_views_and_gradients(tmp_path):
    """Whatever the caller has."""
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    path = str(tmp_path / "new" / "deep" / "b.safetensors")
    save_tensors(path, {"view": weight.t(), "row": weight[1]}, {})
    tensors, metadata = load_tensors(path)
    assert same(tensors, {"view": weight.detach().t(), "row": weight.detach()[1].clone()}) and metadata == {}


def test_nothing_but_the_file_is_left(saved):
    """Also after it has been replaced."""
    save_tensors(saved, {"scalar": torch.tensor(8)}, {"size": "1"})
    assert os.listdir(saved.parent) == [saved.name]
    tensors, metadata = load_tensors(saved)
    assert tensors["scalar"] == 8 and list(tensors) == ["scalar"] and metadata == {"size": "1"}


@pytest.mark.parametrize("fault", ["while writing", "before replacing"])
def test_a_writer_that_dies_leaves_the_old_file(saved, monkeypatch, fault):
    """No reader ever sees half a file under the name."""

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        raise OSError("disk full")

    def refuse(*arguments):
        raise OSError("killed")

    if fault == "while writing":
        monkeypatch.setattr(files, "save_file", half)
    else:
        monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError):
        save_tensors(saved, {"scalar": torch.tensor(8)}, {})
    with pytest.raises(OSError):
        save_tensors(saved.with_name("new.safetensors"), {"scalar": torch.tensor(8)}, {})
    assert same(load_tensors(saved)[0], TENSORS)
    with pytest.raises(ValueError, match="new.safetensors is missing"):
        load_tensors(saved.with_name("new.safetensors"))
    monkeypatch.undo()
    save_tensors(saved, {"scalar": torch.tensor(9)}, {})  # what the dead writer left is no obstacle
    assert load_tensors(saved)[0]["scalar"] == 9


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And its name, and that of new folders, before the writer goes on: then a loss of power leaves it whole."""
    events, fsync, replace = [], os.fsync, os.replace
    whole = save_file

    def saved(tensors, path, metadata):
        whole(tensors, path, metadata=metadata)
        events.append("written")

    def synced(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(old, new):
        events.append("named")
        replace(old, new)

    monkeypatch.setattr(files, "save_file", saved)
    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    path = tmp_path.resolve() / "new" / "deep" / "a.safetensors"
    save_tensors(path, {"scalar": torch.tensor(8)}, {})
    partial = path.with_name("a.safetensors.partial")
    assert events == ["written", partial, "named", path.parent, path.parent.parent, path.parent.parent.parent]
    events.clear()
    save_tensors(path, {"scalar": torch.tensor(9)}, {})
    assert events == ["written", partial, "named", path.parent]


def test_half_written_files_are_nobodys(saved):
    """What a writer that died has left beside a file is neither read nor in the way."""
    partial = saved.with_name(saved.name + ".partial")
    partial.write_bytes(saved.read_bytes()[:100])
    assert same(load_tensors(saved)[0], TENSORS)
    save_tensors(saved, {"scalar": torch.tensor(9)}, {})
    assert not partial.exists() and load_tensors(saved)[0]["scalar"] == 9
    with pytest.raises(ValueError, match="b.safetensors is missing"):
        saved.with_name("b.safetensors.partial").write_bytes(saved.read_bytes())
        load_tensors(saved.with_name("b.safetensors"))


def test_the_checksum_is_read_block_by_block(saved, monkeypatch):
    """However small the blocks are; a file whose end was cut off while it was read is refused too."""
    for size in (1, 7, 64):
        monkeypatch.setattr(files, "BLOCK_BYTES", size)
        assert same(load_tensors(saved)[0], TENSORS)
    monkeypatch.setattr(files, "_byte_ranges", lambda path: {name: (10**6, 10**6 + 1) for name in TENSORS})
    with pytest.raises(ValueError, match="the file ends early"):
        load_tensors(saved)


def test_missing(tmp_path):
    with pytest.raises(ValueError, match="nothing.safetensors is missing: resume from another checkpoint"):
        load_tensors(tmp_path / "nothing.safetensors")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        load_tensors(tmp_path)


def test_truncated_anywhere(saved):
    """However little is left."""
    whole = saved.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.safetensors is .*resume from another checkpoint"):
            load_tensors(saved)
    saved.write_bytes(whole)
    assert same(load_tensors(saved)[0], TENSORS)


def test_longer_than_written(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="a.safetensors is"):
        load_tensors(saved)


def test_one_flipped_bit_in_any_byte(saved):
    """Header, names, shapes, metadata, values: nothing goes unseen."""
    whole = saved.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 7)
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match="a.safetensors is .*resume from another checkpoint"):
            load_tensors(saved)
            pytest.fail(f"byte {position}, near {whole[max(position - 20, 0) : position + 20]!r}")


@pytest.mark.parametrize("content", [b"", b"not a tensor", b"{}", b"\xff" * 64])
def test_not_a_safetensors_file(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("metadata", [None, {"size": "100"}])
def test_a_file_of_someone_else_has_no_checksum(tmp_path, metadata):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="corrupted, its checksum does not match"):
        load_tensors(tmp_path / "a.safetensors")
