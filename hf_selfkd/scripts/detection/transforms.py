"""From images and boxes to what detectors take: augmentation that keeps track of objects, and the collator."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ..arguments import DetectionDataArguments
from .data import OBJECTS


FILL = (124, 116, 104)  # around an image that is made smaller: the mean of ImageNet


class ScaleJitter:
    """
    Makes objects larger, by a random crop, or smaller, by a random place on a larger canvas; pixels stay as they are,
    and the image processor resizes the result to what the model takes.

    Args:
        low, high (`float`): the factors are spread evenly between them.
    """

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def __call__(self, image: Image, boxes: tv_tensors.BoundingBoxes) -> tuple[Image, tv_tensors.BoundingBoxes]:
        factor, across, down = torch.rand(3).tolist()
        factor = self.low + factor * (self.high - self.low)
        height, width = boxes.canvas_size
        new_height, new_width = max(1, round(height / factor)), max(1, round(width / factor))
        top, left = round(down * abs(height - new_height)), round(across * abs(width - new_width))
        if factor >= 1:
            place = (top, left, new_height, new_width)
            return functional.crop(image, *place), functional.crop(boxes, *place)
        padding = [left, top, new_width - width - left, new_height - height - top]
        return functional.pad(image, padding, fill=list(FILL)), functional.pad(boxes, padding)


class IoUCrop:
    """The random crops of SSD ([`~torchvision.transforms.v2.RandomIoUCrop`]), of images that have objects."""

    def __init__(self) -> None:
        self.crop = v2.RandomIoUCrop()

    def __call__(self, image: Image, boxes: tv_tensors.BoundingBoxes) -> tuple[Image, tv_tensors.BoundingBoxes]:
        return self.crop(image, boxes) if len(boxes) else (image, boxes)


class Augmentation:
    """
    The random part of the training transform. All boxes come back, in their order, however little is left of them.

    Args:
        data_args ([`DetectionDataArguments`]): say which steps.
    """

    def __init__(self, data_args: DetectionDataArguments):
        crops = {"scale_jitter": [ScaleJitter(*data_args.scale_range)], "iou_crop": [IoUCrop()], "none": []}
        self.steps = crops[data_args.augmentation]
        self.steps += [v2.RandomHorizontalFlip()] if data_args.horizontal_flip else []
        self.steps += [v2.RandomVerticalFlip()] if data_args.vertical_flip else []

    def __call__(self, image: Image, boxes: torch.Tensor) -> tuple[Image, torch.Tensor]:
        """
        Args:
            image (`PIL.Image.Image`): in RGB.
            boxes (`torch.FloatTensor` of shape `[n, 4]`): left, top, right, bottom in pixels.
        """
        size = (image.height, image.width)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        for step in self.steps:
            image, boxes = step(image, boxes)
        return image, functional.clamp_bounding_boxes(boxes).as_subclass(torch.Tensor)


class DetectionTransform:
    """
    From images and objects to `pixel_values` and `labels`, for [`~datasets.Dataset.with_transform`].

    The labels of an image are `class_labels`, `boxes` (center, width, height as shares of the image), `annotation_id`
    (the place of an object among those of its image, before anything was cropped) and `orig_size` (height, width).
    Crowds are nothing to learn; in evaluation they are `crowd_labels` and `crowd_boxes`.

    Args:
        processor: the image processor, which is saved with the model; it resizes and normalises.
        column (`str`): the image column.
        augment ([`Augmentation`], *optional*): for training.
        min_visibility (`float`, *optional*): share of a box that must be left of it.
    """

    def __init__(self, processor: Any, column: str, augment: Augmentation | None = None, min_visibility: float = 0.0):
        self.processor, self.column = processor, column
        self.augment, self.min_visibility = augment, min_visibility

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        items = [self.item(*pair) for pair in zip(batch[self.column], batch[OBJECTS], strict=True)]
        return {name: [item[name] for item in items] for name in ("pixel_values", "labels")}

    def item(self, image: Image, objects: dict[str, list]) -> dict[str, Any]:
        """One image; the labels of one without known objects have its size only."""
        image, labels = image.convert("RGB"), {"orig_size": torch.tensor(objects["size"])}
        if objects.get("labels") is not None:
            boxes = torch.tensor(objects["boxes"], dtype=torch.float32).reshape(-1, 4)
            classes = torch.tensor(objects["labels"], dtype=torch.int64)
            crowd = torch.tensor(objects["iscrowd"], dtype=torch.bool)
            kept = ~crowd
            if self.augment is not None:
                before = areas(boxes)
                image, boxes = self.augment(image, boxes)
                left = areas(boxes)
                kept &= (left > 0) & (left >= self.min_visibility * before)
            boxes = v2.functional.convert_bounding_box_format(
                boxes, old_format=tv_tensors.BoundingBoxFormat.XYXY, new_format=tv_tensors.BoundingBoxFormat.CXCYWH
            ) / torch.tensor([image.width, image.height] * 2)
            labels |= {"class_labels": classes[kept], "boxes": boxes[kept], "annotation_id": kept.nonzero().flatten()}
            if self.augment is None and crowd.any():
                labels |= {"crowd_labels": classes[crowd], "crowd_boxes": boxes[crowd]}
        # Alone, so that it is not padded; a model with masks is trained on shares of the image without padding.
        pixels = self.processor(images=[image], do_pad=False, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": labels}


def areas(boxes: torch.Tensor) -> torch.Tensor:
    """Areas `[n]` of boxes `[n, 4]` by their corners."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(dim=-1)


class DetectionCollator:
    """
    Stacks images; those of several sizes are padded at the right and below, with a `pixel_mask` that says so.

    Args:
        model (`nn.Module`): which must take the mask then.
    """

    def __init__(self, model: nn.Module):
        self.name = type(model).__name__
        self.masks = "pixel_mask" in inspect.signature(model.forward).parameters

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        images, labels = ([item[name] for item in items] for name in ("pixel_values", "labels"))
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        if all(image.shape[1:] == (height, width) for image in images):
            return {"pixel_values": torch.stack(images), "labels": labels}
        if not self.masks:
            raise ValueError(
                f"{self.name} takes no pixel_mask, so it cannot tell images of several sizes from their padding: give "
                "--image_size."
            )
        room = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
        pixels = [F.pad(image, around) for image, around in zip(images, room, strict=True)]
        masks = [F.pad(torch.ones(image.shape[1:]), a) for image, a in zip(images, room, strict=True)]
        return {"pixel_values": torch.stack(pixels), "pixel_mask": torch.stack(masks).long(), "labels": labels}
