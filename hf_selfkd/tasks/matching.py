"""Which query a detector matches with which object: what the model's own loss found, seen while the loss runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.loss.loss_for_object_detection import ImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from ..models import base_model


@dataclass
class Matching:
    """
    What the loss of a detector was given for the last layer of its decoder.

    Args:
        criterion (`nn.Module`): the loss itself, with its weights.
        logits (`torch.FloatTensor` of shape `[B, Q, C]`): with a gradient; without denoising queries.
        boxes (`torch.FloatTensor` of shape `[B, Q, 4]`): center, width and height.
        targets (`list` of `dict`): the labels.
        indices (`list` of `tuple`): for each image the queries and the objects that belong together.
        num_boxes (`float`): by which sums over objects are divided.
    """

    criterion: nn.Module
    logits: torch.Tensor
    boxes: torch.Tensor
    targets: list[dict[str, Any]]
    indices: list[tuple[torch.Tensor, torch.Tensor]]
    num_boxes: float

    def places(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each pair: its row among `[B * length]` objects, its image and its query."""
        device = self.logits.device
        images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(self.indices)])
        queries, objects = (torch.cat(parts) for parts in zip(*self.indices, strict=True))
        return tuple(part.to(device) for part in (images * length + objects, images, queries))


class Seen:
    """
    What was seen while a model ran.

    Attributes:
        matching ([`Matching`], *optional*): of the last layer; `None` before.
    """

    matching: Matching | None = None

    def note(self, criterion: nn.Module, arguments: tuple) -> None:
        """Watch a loss that is about to run: it treats the last layer first."""
        if self.matching is not None or not isinstance(criterion, (ImageLoss, RTDetrLoss)):
            return
        get_loss = criterion.get_loss

        def watched(loss, outputs, targets, indices, num_boxes):
            if self.matching is None:
                logits, boxes = outputs["logits"], outputs["pred_boxes"]
                self.matching = Matching(criterion, logits, boxes, targets, indices, num_boxes)
            return get_loss(loss, outputs, targets, indices, num_boxes)

        criterion.get_loss = watched


@contextmanager
def watched_matching(model: nn.Module) -> Iterator[Seen]:
    """
    See what the loss of a detector matches, when the model is run with labels inside this context. The model is
    afterwards as it was.

    Args:
        model (`nn.Module`): a detector of transformers, in any wrapper.
    """
    base, seen = base_model(model), Seen()
    own, had = base.loss_function, "_loss_function" in vars(base)

    def watched(*arguments: Any, **named: Any) -> Any:
        handle = register_module_forward_pre_hook(seen.note)  # the loss makes its criterion anew each time
        try:
            return own(*arguments, **named)
        finally:
            handle.remove()

    base.loss_function = watched
    try:
        yield seen
    finally:
        if had:
            base.loss_function = own
        else:
            del base._loss_function
