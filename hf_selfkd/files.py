"""Tensors on disk that are either whole or refused: written atomically, with a checksum."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


BLOCK_BYTES = 2**20  # read at a time to compare the checksum of a file


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: str | Path | None = None) -> str:
    """Of names, types, shapes and values; the values are those of the tensors or, with a path, those of that file."""
    crc = zlib.crc32(repr(sorted(metadata.items())).encode())
    ranges = {} if path is None else _byte_ranges(path)
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        if path is None:
            values = tensor.contiguous().view(-1)
            crc = zlib.crc32(values.view(torch.uint8).numpy(), crc) if len(values) else crc
        else:
            crc = _checksum_of_range(path, *ranges[name], crc)
    return f"{crc:08x}"


def _byte_ranges(path: str | Path) -> dict[str, tuple[int, int]]:
    """Where the values of each tensor begin and end in a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: tuple(8 + length + offset for offset in entry["data_offsets"]) for name, entry in header.items()}


def _checksum_of_range(path: str | Path, start: int, end: int, crc: int) -> int:
    # Read, not mapped: checking a table that is larger than the memory must not make it resident in every process.
    with open(path, "rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(BLOCK_BYTES, end - start))
            if not block:
                raise OSError("the file ends early")
            crc, start = zlib.crc32(block, crc), start + len(block)
    return crc


def sync(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    if os.path.isdir(path) and os.name != "posix":
        return  # other systems do not open folders, and write names without being asked
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """
    Write tensors and metadata so that no reader ever sees half a file, not even after a loss of power.

    The values are written under another name, `*.partial`, which nobody reads; the file takes its own name when all
    of it is on the disk.

    Args:
        path (`str` or `Path`): a `.safetensors` file; its folder is made if it is missing.
        tensors (`dict[str, torch.Tensor]`): on any device.
        metadata (`dict[str, str]`): kept beside them.

    Raises:
        OSError: if the disk is full or takes no files; a file of this name is as it was.
    """
    path = Path(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={**metadata, "crc32": _checksum(tensors, metadata)})
        sync(partial)
        os.replace(partial, path)
        for folder in (path, *missing):
            sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}): make room, or choose another folder.") from error


def cause_of_writing(error: BaseException) -> str | None:
    """What an error says of a file that could not be written, in one line; `None` for errors of another kind."""
    text = " ".join(str(error).split())
    # What the writer of torch raises when a file ends early is a `RuntimeError`, as is much else.
    if isinstance(error, (OSError, SafetensorError)) or "inline_container" in text or "PytorchStreamWriter" in text:
        return text.rstrip(".")
    return None


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Read what [`save_tensors`] wrote.

    The tensors are views of the file, mapped into memory: a value is read when it is used, and processes that read the
    same file share what they read. Keep a copy of what is to be changed.

    Returns:
        `tuple`: the tensors, on the CPU, and the metadata.

    Raises:
        ValueError: if the file is missing, truncated or corrupted.
    """
    remedy = "resume from another checkpoint."
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        stored = metadata.pop("crc32", None)
        computed = _checksum(tensors, metadata, path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): {remedy}") from error
    if stored != computed:
        raise ValueError(f"{path} is corrupted, its checksum does not match: {remedy}")
    return tensors, metadata
