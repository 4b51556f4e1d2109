"""Tensors on disk that are either whole or refused: written atomically, with a checksum."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    crc = zlib.crc32(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """
    Write tensors and metadata so that no reader ever sees half a file.

    Args:
        path (`str` or `Path`): a `.safetensors` file; its folder is made if it is missing.
        tensors (`dict[str, torch.Tensor]`): on any device.
        metadata (`dict[str, str]`): kept beside them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={**metadata, "crc32": _checksum(tensors, metadata)})
    os.replace(partial, path)


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Read what [`save_tensors`] wrote.

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
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): {remedy}") from error
    if metadata.pop("crc32", None) != _checksum(tensors, metadata):
        raise ValueError(f"{path} is corrupted, its checksum does not match: {remedy}")
    return tensors, metadata
