"""From a classifier to a detector: the weights that self-distillation made, as the backbone of another model."""

from __future__ import annotations

import torch
from torch import nn

from .models import base_model


COUNTER = "num_batches_tracked"  # of batch normalization, which frozen layers do not have


def load_backbone(detector: nn.Module, classifier: nn.Module) -> list[str]:
    """
    Put the weights of a classifier into the backbone of a detector.

    ```python
    trainer = SelfKDTrainer(classifier, args, train_dataset=train)
    trainer.train()
    detector = DetrForObjectDetection(DetrConfig(backbone_config=backbone_config, use_timm_backbone=False))
    load_backbone(detector, trainer.model)
    ```

    Args:
        detector (`nn.Module`): its backbone has the architecture of the classifier; it is changed.
        classifier (`nn.Module`): of transformers, in any wrapper, with or without auxiliary heads.

    Returns:
        `list[str]`: the names of all weights of the detector that are now those of the classifier, statistics of
        batches included; each of them was compared.

    Raises:
        ValueError: if no part of the detector is built as the classifier is; nothing is changed then.
    """
    detector, classifier = base_model(detector), base_model(classifier)
    source = getattr(classifier, "base_model", classifier).state_dict()
    name, backbone = _like(detector, source)
    if backbone is None:
        raise ValueError(
            f"no part of {type(detector).__name__} has all its weights in {type(classifier).__name__}: make the "
            "detector with backbone_config=classifier.config (ResNet for DETR, HGNetV2 for D-FINE), or train a "
            "classifier of the architecture of its backbone."
        )
    with torch.no_grad():
        for key, value in backbone.state_dict().items():
            if key in source:
                value.copy_(source[key])
    loaded = {key: value for key, value in backbone.state_dict().items() if key in source}
    different = [key for key, value in loaded.items() if not torch.equal(value, source[key].to(value))]
    if different:
        raise ValueError(f"{name}.{different[0]} of {type(detector).__name__} did not keep the weights it was given.")
    return [f"{name}.{key}" for key in loaded]


def _like(detector: nn.Module, source: dict[str, torch.Tensor]) -> tuple[str, nn.Module | None]:
    """The largest part of a detector whose weights all have their like, by name and shape, in `source`."""
    best, size = ("", None), 0
    for name, module in detector.named_modules():
        weights = {key: value for key, value in module.state_dict().items() if not key.endswith(COUNTER)}
        fits = all(key in source and source[key].shape == value.shape for key, value in weights.items())
        # As many as a backbone has: a single layer is like many another.
        if fits and len(weights) > len(source) / 2 and sum(map(torch.numel, weights.values())) > size:
            best, size = (name, module), sum(map(torch.numel, weights.values()))
    return best
