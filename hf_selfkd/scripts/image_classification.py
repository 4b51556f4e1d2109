"""
Train an image classifier with progressive self-distillation, from a pretrained model or from scratch.

```bash
# fine-tune a pretrained model on a dataset of the Hub
hf-selfkd train image-classification --model_name_or_path microsoft/resnet-18 --ignore_mismatched_sizes \
    --dataset_name AI-Lab-Makerere/beans --image_column_name image --label_column_name labels \
    --do_train --do_eval --num_train_epochs 10 --output_dir outputs/beans

# train from scratch on a folder with one sub-folder of images per class; no network needed
hf-selfkd train image-classification --model_type resnet --config_overrides '{"depths": [2, 2, 2, 2]}' \
    --image_size 64 --train_dir images/train --do_train --do_eval --num_train_epochs 30 --output_dir outputs/images

# settings from a YAML (or JSON) file, some of them overridden
hf-selfkd train image-classification examples/configs/cifar100_resnet.yaml --alpha 0.7
```

Layered self-distillation, on a quarter of each class: add `--auxiliary_heads lsskd --few_shot_fraction 0.25`.
Two baselines are the same command with `--alpha 0` (plain training) and with `--alpha 0 --label_smoothing_factor 0.1`
(label smoothing). With random augmentation, `--seed_transforms` makes a resumed run follow the uninterrupted one.
The arguments of training are those of `SelfKDConfig`, hence of `TrainingArguments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    ViTImageProcessor,
)
from transformers.utils import is_torchvision_available

from hf_selfkd import SelfKDConfig, SelfKDDataCollator, SelfKDTrainer
from hf_selfkd.metrics import compute_classification_metrics

from . import common
from .arguments import ImageDataArguments, ImageModelArguments
from .data import (
    check_columns,
    class_names,
    cut,
    datasets_of,
    hold_out,
    load_splits,
    needed_splits,
    with_images,
    with_labels,
)


TASK = "image-classification"


def make_parser() -> HfArgumentParser:
    """The parser of all flags."""
    return common.make_parser(TASK)


# Data


def few_shot(dataset: Dataset, fraction: float) -> Dataset:
    """A share of the images of each class, at least one: the same in every run, whatever its seed."""
    if fraction == 1:
        return dataset
    labels, rng = np.asarray(dataset.with_format(None)["labels"][:]), np.random.default_rng(0)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    kept = [rows[: max(1, round(fraction * len(rows)))] for rows in classes]
    return dataset.select(np.sort(np.concatenate(kept)))


def prepare_splits(
    splits: dict[str, Dataset], names: list[str], data_args: ImageDataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """The splits of the run, with decoded images and `labels`, cut to the size that was asked for."""
    with training_args.main_process_first(desc="reading the images"):
        for split, dataset in splits.items():
            file = getattr(data_args, f"{split}_file")
            dataset = with_images(dataset, data_args.image_column_name, file and Path(file).parent)
            splits[split] = with_labels(dataset, data_args.label_column_name, names, split)
    splits = hold_out(splits, data_args, training_args)
    if "train" in splits:
        splits["train"] = few_shot(splits["train"], data_args.few_shot_fraction)
    return cut(splits, data_args)


class ImageTransform:
    """
    From images to `pixel_values`, for [`~datasets.Dataset.with_transform`].

    Args:
        processor: the image processor, which is saved with the model and does all that is not random.
        column (`str`): the image column.
        augment (`Callable`, *optional*): from a PIL image to one of the size that the model takes.
    """

    def __init__(self, processor: Any, column: str, augment: Any = None):
        self.processor, self.column, self.augment = processor, column, augment

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[self.column]]
        if self.augment is not None and hasattr(self.processor, "data_config"):  # timm, which takes no options
            inputs = {"pixel_values": torch.stack([self.augment(image) for image in images])}
        elif self.augment is not None:
            images = [self.augment(image) for image in images]
            inputs = self.processor(images, return_tensors="pt", do_resize=False, do_center_crop=False)
        else:
            inputs = self.processor(images, return_tensors="pt")
        labels = {"labels": batch["labels"]} if "labels" in batch else {}
        return {"pixel_values": inputs["pixel_values"], **labels}


def input_size(processor: Any) -> tuple[int, int]:
    """Height and width of the images that a processor makes."""
    if hasattr(processor, "data_config"):  # timm
        return processor.data_config["input_size"][1:]
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    edge = size.get("shortest_edge")
    return (size["height"], size["width"]) if edge is None else (edge, edge)


def make_augmentation(processor: Any, data_args: ImageDataArguments) -> Any:
    """The random part of the training transform, or `None`."""
    if data_args.augmentation == "none" and not data_args.horizontal_flip:
        return None
    if not is_torchvision_available():
        raise ImportError(
            "Augmentation needs torchvision: `pip install hf_selfkd[vision]`, or turn it off with "
            "--augmentation none --no_horizontal_flip."
        )
    from torchvision.transforms import v2

    size = input_size(processor)
    steps = {
        "random_resized_crop": [v2.RandomResizedCrop(size)],
        "pad_crop": [v2.Resize(size), v2.RandomCrop(size, padding=max(size) // 8)],
        "none": [v2.Resize(size)],
    }[data_args.augmentation]
    if data_args.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    if hasattr(processor, "data_config"):  # timm
        config = processor.data_config
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    return v2.Compose(steps)


def transformed(splits: dict[str, Dataset], processor: Any, data_args: ImageDataArguments) -> dict[str, Dataset]:
    """Splits that give `pixel_values`; those of the training images are augmented."""
    augment = make_augmentation(processor, data_args) if "train" in splits else None
    plain, augmented = (ImageTransform(processor, data_args.image_column_name, step) for step in (None, augment))
    return {
        split: dataset.with_transform(augmented if split == "train" else plain) for split, dataset in splits.items()
    }


# Model


def make_config(model_args: ImageModelArguments, names: list[str] | None) -> PreTrainedConfig:
    """The configuration, for new models with the size of the images and, if `names` are given, with these classes."""
    size = model_args.image_size if model_args.model_name_or_path is None else None
    return common.make_config(model_args, names, image_size=size)


def make_image_processor(model_args: ImageModelArguments, config: PreTrainedConfig) -> Any:
    """The image processor of the pretrained model, or one that resizes and normalises."""
    source = model_args.image_processor_name or model_args.model_name_or_path
    if source is not None and model_args.image_size is None:
        return AutoImageProcessor.from_pretrained(source, **model_args.hub)
    size = model_args.image_size or getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=model_args.image_mean, image_std=model_args.image_std
    )


def build(argv: Sequence[str] | None = None) -> common.Run:
    """The run that the flags ask for: data, model and trainer, checked and not yet started."""
    model_args, data_args, training_args = common.start(make_parser(), argv)
    splits = needed_splits(load_splits(data_args, model_args), data_args, training_args)
    check_columns(splits, data_args, ("image_column_name", "label_column_name"))
    names = class_names(splits["train"], data_args.label_column_name, "image") if training_args.do_train else None

    config = make_config(model_args, names)
    processor = make_image_processor(model_args, config)
    model = common.make_classifier(AutoModelForImageClassification, model_args, config)
    splits = prepare_splits(splits, common.class_list(config), data_args, training_args)
    splits = transformed(splits, processor, data_args)
    training_args.remove_unused_columns = False  # the transform needs the image column, and leaves nothing unused

    trainer = SelfKDTrainer(
        model=model,
        args=training_args,
        **datasets_of(splits),
        processing_class=processor,
        data_collator=SelfKDDataCollator(
            mixup_alpha=data_args.mixup_alpha,
            cutmix_alpha=data_args.cutmix_alpha,
            mix_probability=data_args.mix_probability,
        ),
        compute_metrics=compute_classification_metrics,
    )
    predict = partial(common.predict_classes, trainer, splits.get("test"))
    return common.Run(trainer, model_args, data_args, TASK, predict, {"tags": ["vision"]})


def main(argv: Sequence[str] | None = None) -> None:
    common.carry_out(build(argv))
