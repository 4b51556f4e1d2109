"""A short answer to the question whether two runs see the same inputs: a hash of a few samples."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch


WHOLE_BATCH = "batch"  # the name under which a batch that is not a mapping is hashed


def content_probe(batches: Iterable[Any]) -> dict[str, str]:
    """
    Hash what a few fixed samples hold, field by field, so that another run can tell whether it sees the same.

    The hash depends on values, types and shapes; on the order of batches and lists, but not on the order in which a
    mapping has its keys, nor on the device, the process or the run. Numbers are compared by their bytes. Of an object
    of unknown kind only its class counts.

    Args:
        batches (`Iterable`):
            samples or collated batches: mappings, sequences and dataclasses, of tensors, arrays, images of PIL,
            numbers, text and bytes, nested as one likes.

    Returns:
        `dict[str, str]`: a hash of 16 digits for each field; of batches that are no mappings, for `"batch"`.
    """
    hashes: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        named = batch if isinstance(batch, Mapping) else {WHOLE_BATCH: batch}
        for name, value in named.items():
            found = hashes.setdefault(str(name), hashlib.blake2b(digest_size=8))
            found.update(struct.pack("<q", number))
            found.update(_digest(value))
    return {name: hashes[name].hexdigest() for name in sorted(hashes)}


def _digest(value: Any) -> bytes:
    """A hash of 8 bytes."""
    found = hashlib.blake2b(digest_size=8)
    for piece in _pieces(value):
        found.update(struct.pack("<q", len(piece)))  # or ("ab", "c") would be ("a", "bc")
        found.update(piece)
    return found.digest()


def _pieces(value: Any) -> list[bytes]:
    """The bytes that a value stands for, the first of which say its kind."""
    if isinstance(value, torch.Tensor):
        return _tensor_pieces(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return _array_pieces(np.asarray(value))
    if isinstance(value, Enum):
        return [b"enum", type(value).__name__.encode(), value.name.encode()]
    if value is None or isinstance(value, (bool, int, str)):
        return [type(value).__name__.encode() if value is not None else b"none", str(value).encode("utf-8", "replace")]
    if isinstance(value, (float, complex)):
        return [b"float", struct.pack("<dd", complex(value).real, complex(value).imag)]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [b"bytes", bytes(value)]
    if isinstance(value, os.PathLike):
        return [b"path", os.fspath(value).encode() if isinstance(os.fspath(value), str) else os.fspath(value)]
    if isinstance(value, Mapping):
        return [b"mapping", *sorted(_digest(key) + _digest(item) for key, item in value.items())]
    if isinstance(value, (set, frozenset)):
        return [b"set", *sorted(map(_digest, value))]
    if isinstance(value, (list, tuple)):
        return [b"sequence", *map(_digest, value)]
    if is_dataclass(value) and not isinstance(value, type):
        return _pieces({field.name: getattr(value, field.name) for field in fields(value)})
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # an image of PIL
        palette = value.getpalette() if value.mode == "P" else None
        return [b"image", str(value.mode).encode(), _digest(tuple(value.size)), _digest(palette), value.tobytes()]
    kind = type(value)
    return [b"object", f"{kind.__module__}.{kind.__qualname__}".encode()]


def _tensor_pieces(tensor: torch.Tensor) -> list[bytes]:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.cpu().contiguous()
    kind = str(tensor.dtype).removeprefix("torch.").encode()
    values = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_zeros(0, dtype=torch.uint8)
    return [b"array", kind, repr(tuple(tensor.shape)).encode(), values.numpy().tobytes()]


def _array_pieces(array: np.ndarray) -> list[bytes]:
    shape = repr(array.shape).encode()
    if array.dtype.hasobject:
        return [b"objects", shape, *map(_digest, array.reshape(-1).tolist())]
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return [b"array", array.dtype.name.encode(), shape, array.tobytes()]
