"""What a detector says of images: from its outputs to detections, to a file and to pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from hf_selfkd.samples import IGNORE_INDEX


MOST = 100  # detections of an image, as in COCO's evaluation
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # of Okabe and Ito


def has_no_object(model: nn.Module) -> bool:
    """Whether the head of a detector is a softmax with a last class for no object; others ask each class by itself."""
    return getattr(model, "loss_function", None) is ForObjectDetectionLoss


def detections(outputs: Any, sizes: torch.Tensor, no_object: bool) -> torch.Tensor:
    """
    The best detections of each image.

    Args:
        outputs: of a detector: `logits` `[B, Q, C]` and `pred_boxes` `[B, Q, 4]`.
        sizes (`torch.LongTensor` of shape `[B, 2]`): height and width of the images.
        no_object (`bool`): [`has_no_object`]; a query is then one detection, else one for each class.

    Returns:
        `torch.FloatTensor` of shape `[B, K, 6]`: left, top, right, bottom in pixels, score, class; best first.
    """
    logits, boxes = outputs["logits"].float(), corners(outputs["pred_boxes"].float(), sizes)
    if no_object:
        scores, classes = logits.softmax(-1)[..., :-1].max(-1)
        scores, queries = scores.topk(min(MOST, scores.shape[1]))
        classes = classes.gather(1, queries)
    else:
        scores, best = logits.sigmoid().flatten(1).topk(min(MOST, logits.shape[1]))
        queries, classes = best // logits.shape[-1], best % logits.shape[-1]
    boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    return torch.cat([boxes, scores[..., None], classes[..., None]], dim=-1)


def objects(labels: list[Mapping[str, torch.Tensor]], sizes: torch.Tensor) -> torch.Tensor:
    """
    The objects of each image, as a table.

    Args:
        labels (`list` of `dict`): `class_labels`, `boxes` and, of crowds, `crowd_labels` and `crowd_boxes`.
        sizes (`torch.LongTensor` of shape `[B, 2]`): height and width of the images.

    Returns:
        `torch.FloatTensor` of shape `[B, L, 6]`: left, top, right, bottom in pixels, class, crowd; -100 is padding.
    """
    tables = []
    for target, size in zip(labels, sizes, strict=True):
        parts = []
        for crowd, (kinds, places) in enumerate((("class_labels", "boxes"), ("crowd_labels", "crowd_boxes"))):
            if kinds in target:
                rest = torch.stack([target[kinds].float(), torch.full_like(target[kinds], crowd).float()], dim=-1)
                parts.append(torch.cat([corners(target[places][None], size[None])[0], rest], dim=-1))
        tables.append(torch.cat(parts))
    result = sizes.new_full((len(tables), max(1, *map(len, tables)), 6), IGNORE_INDEX, dtype=torch.float32)
    for row, table in zip(result, tables, strict=True):
        row[: len(table)] = table
    return result


def corners(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Boxes `[B, n, 4]` (center, width, height as shares of images `[B, 2]`) by their corners in pixels."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    scale = sizes.flip(-1).to(boxes).repeat(1, 2)[:, None]
    return torch.cat([center - half, center + half], dim=-1) * scale


def in_words(table: np.ndarray, names: Mapping[int, str], threshold: float) -> list[dict[str, Any]]:
    """The detections `[K, 6]` of an image, as a pipeline of transformers tells them."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    return [
        {
            "score": round(float(score), 6),
            "label": names[int(label)],
            "box": {side: round(float(value), 2) for side, value in zip(sides, box, strict=True)},
        }
        for *box, score, label in table
        if score >= threshold and label >= 0
    ]


def write_predictions(path: Path, tables: np.ndarray, rows: list[dict], names: Mapping[int, str], threshold: float):
    """
    Write a JSON line for each image.

    Args:
        path (`Path`): of the file.
        tables (`np.ndarray` of shape `[N, K, 6]`): from [`detections`].
        rows (`list[dict]`): what else to tell of each image.
        names (`dict`): of the classes.
        threshold (`float`): least score.
    """
    with path.open("w", encoding="utf-8") as file:
        for table, row in zip(tables, rows, strict=True):
            line = row | {"detections": in_words(table, names, threshold)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def draw(
    image: Image.Image,
    table: np.ndarray,
    names: Mapping[int, str],
    threshold: float,
    truth: np.ndarray | None = None,
) -> Image.Image:
    """
    A copy of an image with the detections of it, a color a class; what is there is drawn in white and thin.

    Args:
        image (`PIL.Image.Image`): of any mode.
        table (`np.ndarray` of shape `[K, 6]`): from [`detections`].
        names (`dict`): of the classes.
        threshold (`float`): least score.
        truth (`np.ndarray` of shape `[L, 6]`, *optional*): from [`objects`].
    """
    image = image.convert("RGB")
    pen, width = ImageDraw.Draw(image), max(1, round(min(image.size) / 160))
    for *box, label, _ in [] if truth is None else truth:
        if label >= 0:
            pen.rectangle(box, outline="white", width=1)
    for *box, score, label in reversed([row for row in table if row[4] >= threshold and row[5] >= 0]):
        left, top, right, bottom = box
        box = [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]
        colour, words = COLOURS[int(label) % len(COLOURS)], f"{names[int(label)]} {score:.2f}"
        pen.rectangle(box, outline=colour, width=width)
        place = (box[0] + width, max(0, box[1]))
        pen.rectangle(pen.textbbox(place, words), fill=colour)
        pen.text(place, words, fill="white")
    return image
