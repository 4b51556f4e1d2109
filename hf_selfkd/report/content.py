"""What a sample looks like to people: its picture, its text, or its tokens."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from ..samples import SampleIdDataset, is_hf_dataset


PIXELS = 128  # of the longer side of a picture, at most
CHARACTERS = 600  # of a text, at most


def raw_item(dataset: Any, row: int) -> Mapping[str, Any]:
    """A sample without the transform that makes inputs of it, where the dataset has one that can be left out."""
    while isinstance(dataset, (SampleIdDataset, Subset)):
        row = int(dataset.indices[row]) if isinstance(dataset, Subset) else row
        dataset = dataset.dataset
    item = dataset.with_format(None)[row] if is_hf_dataset(dataset) else dataset[row]
    return item if isinstance(item, Mapping) else {}


def content_of(item: Mapping[str, Any], tokenizer: Any = None) -> dict[str, str]:
    """
    A picture or a text of a sample.

    Args:
        item (`Mapping`): the sample.
        tokenizer (`Any`, *optional*): what can `decode` tokens.

    Returns:
        `dict[str, str]`: `image` as a data address, or `text`; empty if the sample has neither.
    """
    for value in item.values():
        if hasattr(value, "convert") and hasattr(value, "save"):  # a picture of Pillow
            return {"image": _address(value)}
    pixels = item.get("pixel_values")
    if pixels is not None and np.ndim(pixels) == 3:
        return _picture(np.asarray(pixels, dtype=np.float32))
    texts = [value for value in item.values() if isinstance(value, str)]
    if not texts and "input_ids" in item and hasattr(tokenizer, "decode"):
        texts = [tokenizer.decode(_listed(item["input_ids"]), skip_special_tokens=True)]
    return {"text": _cut(max(texts, key=len))} if texts else {}  # the others may be names, paths, labels


def _listed(tokens: Any) -> list[int]:
    return torch.as_tensor(tokens).reshape(-1).tolist()


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"


def _picture(pixels: np.ndarray) -> dict[str, str]:
    """Of an array `[C, H, W]` or `[H, W, C]`; nothing without Pillow."""
    if find_spec("PIL") is None:
        return {}
    if pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[2] not in (1, 3):
        return {}
    return {"image": _address(_grey(pixels[..., 0] if pixels.shape[2] == 1 else pixels))}


def _grey(pixels: np.ndarray) -> Any:
    """A picture of an array `[H, W]` or `[H, W, 3]`, stretched to the whole range."""
    from PIL import Image

    low, high = float(pixels.min()), float(pixels.max())
    return Image.fromarray(np.uint8(255 * (pixels - low) / max(high - low, 1e-6)))


def _address(image: Any) -> str:
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel: stretched, as they would be white or black
        values = np.asarray(image, dtype=np.float32)
        image = _grey(values)
    elif "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = image.copy()
        paper.paste((255, 255, 255, 255), (0, 0, *image.size))
        paper.alpha_composite(image)
        image = paper
    image = image.convert("RGB")
    image.thumbnail((PIXELS, PIXELS))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
