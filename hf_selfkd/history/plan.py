"""How and where a history is kept, or why it does not fit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ..config import MethodArguments
from .codec import Codec


SMALL = 256 * 2**20  # bytes up to which a history is kept whole, in float32, beside the model


@dataclass
class Plan:
    """Codec, place and rows of a history; see [`plan_history`]."""

    codec: Codec
    place: str
    num_bytes: int
    num_rows: int
    max_bytes: int


def plan_history(
    config: MethodArguments,
    num_rows: int,
    num_classes: int,
    device: torch.device,
    folder: str | Path,
    local_processes: int = 1,
    bernoulli: bool = False,
) -> Plan:
    """
    Choose how and where to keep a history, or refuse it.

    Args:
        config ([`MethodArguments`]): its `history_*` fields.
        num_rows (`int`): rows of all samples together; for tokens an estimate.
        num_classes (`int`): classes of a row.
        device (`torch.device`): where the model is.
        folder (`str` or `Path`): where `history_device="disk"` keeps its files.
        local_processes (`int`, *optional*, defaults to 1):
            processes of this node: in the memory of the host each of them holds a table, on disk they share one.
        bernoulli (`bool`, *optional*): whether the classes are no and yes, whose odds are one number.

    Returns:
        [`Plan`]: with `num_bytes` for both the table and the journals of one epoch, and the `max_bytes` that they may
        take.

    Raises:
        ValueError: if `history_top_k` exceeds the classes, or more bytes are needed than allowed.
    """
    if config.history_top_k is not None and config.history_top_k > num_classes:
        raise ValueError(
            f"history_top_k={config.history_top_k} exceeds the {num_classes} classes of the model: set at most "
            f"{num_classes}, or leave it out."
        )
    generations = 2  # the table and the journals
    small = generations * num_rows * num_classes * 4 <= SMALL
    top_k = config.history_top_k
    if top_k is None and (config.chunked_logits or (num_classes > 64 and not small)):
        top_k = min(32, num_classes)
    whole = top_k == num_classes and not config.chunked_logits  # whole rows are made from whole logits
    dtype = config.history_dtype
    if dtype == "auto":
        dtype = "float32" if small else "float16"
    codec = Codec(
        num_classes, getattr(torch, dtype), None if whole else top_k, config.history_tail, bernoulli=bernoulli
    )
    place = config.history_device
    if place == "auto":
        place = "accelerator" if generations * num_rows * codec.row_bytes <= SMALL else "disk"
    if place == "cpu" or (place == "accelerator" and device.type == "cpu"):
        generations = local_processes + 1
    num_bytes = generations * num_rows * codec.row_bytes
    limit = (
        config.history_max_bytes if config.history_max_bytes is not None else _free_bytes(place, device, folder) // 2
    )
    if num_bytes > limit:
        fitting = limit // (generations * num_rows * (2 + codec.index_dtype.itemsize))
        remedy = (
            f"set history_top_k={min(fitting, num_classes)} with history_dtype='float16'"
            if fitting >= 1 and not bernoulli
            else "use teacher='snapshot', which stores no rows"
        )
        raise ValueError(
            f"the history of {num_rows} rows x {num_classes} classes needs {num_bytes} bytes on {place!r} and may "
            f"take {limit} (history_max_bytes): {remedy}, or raise history_max_bytes."
        )
    return Plan(codec, place, num_bytes, num_rows, limit)


def too_many_rows(rows: str, codec: Codec, num_bytes: int, max_bytes: int) -> ValueError:
    """What to say when the samples turned out to have more rows than the plan allowed for."""
    return ValueError(
        f"the samples turned out to have {rows}, whose history needs {num_bytes} bytes and may take "
        f"{max_bytes} (history_max_bytes): set a history_top_k below {codec.top_k or codec.num_classes}, "
        "history_dtype='float16' or history_device='disk', use teacher='snapshot', or raise history_max_bytes."
    )


def _free_bytes(place: str, device: torch.device, folder: str | Path) -> int:
    if place == "disk":
        Path(folder).mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free
    if place == "accelerator" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
