"""
Train an object detector with progressive self-distillation, from a pretrained model or from scratch.

```bash
# fine-tune a pretrained detector on a dataset of the Hub
hf-selfkd train object-detection --model_name_or_path PekingU/rtdetr_r18vd --ignore_mismatched_sizes \
    --dataset_name rishitdagli/cppe-5 --do_train --do_eval --num_train_epochs 30 --output_dir outputs/cppe5

# a COCO file and the folder of its images, or a folder of Pascal VOC; no network needed
hf-selfkd train object-detection --model_name_or_path models/rtdetr --ignore_mismatched_sizes \
    --train_file annotations/train.json --train_dir images --do_train --do_eval --output_dir outputs/coco
hf-selfkd train object-detection --model_name_or_path models/rtdetr --ignore_mismatched_sizes \
    --train_dir VOC2007 --validation_dir VOC2007 --validation_split_name val \
    --do_train --do_eval --output_dir outputs/voc

# a small detector from scratch, whose backbone was trained as a classifier before
hf-selfkd train object-detection examples/configs/bccd_dfine.yaml --backbone_from outputs/cells
```

Objects are known by their image and their place in it, which random crops do not change, so `teacher="history"` works
with every augmentation. The baseline is the same command with `--alpha 0` (plain training). Label smoothing, MixUp and
auxiliary heads are not for detectors. The arguments of training are those of `SelfKDConfig`, hence of
`TrainingArguments`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    DetrImageProcessor,
    HfArgumentParser,
    PreTrainedConfig,
    RTDetrImageProcessor,
)

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.backbones import load_backbone
from hf_selfkd.metrics.detection import DetectionMetrics

from .. import common
from ..arguments import DetectionDataArguments, DetectorArguments
from ..data import check_column, cut, datasets_of, hold_out, load_splits, needed_splits, with_images


try:
    from .data import OBJECTS, box_format_of, category_names, read_split, with_objects
    from .predictions import detections, draw, has_no_object, objects, write_predictions
    from .transforms import Augmentation, DetectionCollator, DetectionTransform
except ImportError as error:
    raise ImportError(f'{error}; for object detection: pip install "hf_selfkd[detection]"') from error


logger = logging.getLogger(__name__)

TASK = "object-detection"


def make_parser() -> HfArgumentParser:
    """The parser of all flags."""
    return common.make_parser(TASK)


# Data


def check_columns(splits: dict[str, Dataset], data_args: DetectionDataArguments) -> None:
    """Fail where a column is missing; the test data need no objects."""
    for split, dataset in splits.items():
        check_column(dataset, data_args.image_column_name, "image_column_name", split)
        if split != "test":
            check_column(dataset, data_args.objects_column_name, "objects_column_name", split)


def prepare_splits(
    splits: dict[str, Dataset], names: list[str], data_args: DetectionDataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """The splits of the run, with checked `objects`, cut to the size that was asked for."""
    column = data_args.image_column_name
    splits = {
        split: with_objects(
            with_images(dataset, column, None), names, data_args, split, box_format_of(split, data_args)
        )
        for split, dataset in splits.items()
    }
    return cut(hold_out(splits, data_args, training_args), data_args)


def transformed(splits: dict[str, Dataset], processor: Any, data_args: DetectionDataArguments) -> dict[str, Dataset]:
    """Splits that give `pixel_values` and `labels`; the training images are augmented."""
    column, augment = data_args.image_column_name, Augmentation(data_args)
    plain = DetectionTransform(processor, column)
    augmented = DetectionTransform(processor, column, augment, data_args.min_visibility)
    return {
        split: dataset.with_transform(augmented if split == "train" else plain) for split, dataset in splits.items()
    }


def check_queries(dataset: Dataset | None, model: nn.Module) -> None:
    """Warn of images with more objects than the model can find."""
    queries = getattr(model.config, "num_queries", None) or getattr(model.config, "num_detection_tokens", None)
    if dataset is None or queries is None:
        return
    most = max(len(row["labels"]) for row in dataset.with_format(None)[OBJECTS][:])
    if most > queries:
        logger.warning(
            f"An image has {most} objects and {type(model).__name__} {queries} queries: the others are not learned. "
            "Set num_queries in --config_overrides."
        )


# Model


def make_config(model_args: DetectorArguments, names: list[str] | None) -> PreTrainedConfig:
    """The configuration, for new models that have it (YOLOS) with the size of the images."""
    size = model_args.image_size if model_args.model_name_or_path is None else None
    return common.make_config(model_args, names, image_size=None if size is None else [size, size])


def make_model(model_args: DetectorArguments, config: PreTrainedConfig) -> nn.Module:
    """A pretrained detector or a new one, with the weights of a classifier in its backbone if one is given."""
    model = common.make_classifier(AutoModelForObjectDetection, model_args, config)
    if model_args.backbone_from is not None:
        classifier = AutoModelForImageClassification.from_pretrained(model_args.backbone_from, token=model_args.token)
        weights = load_backbone(model, classifier)
        logger.info(f"{len(weights)} weights of the backbone are those of {model_args.backbone_from}.")
    return model


def make_image_processor(model_args: DetectorArguments, model: nn.Module) -> Any:
    """The image processor of the pretrained model, or one that resizes to a square and normalises."""
    source = model_args.image_processor_name or model_args.model_name_or_path
    if source is not None and model_args.image_size is None:
        return AutoImageProcessor.from_pretrained(source, **model_args.hub)
    size = model_args.image_size or 640
    kind = DetrImageProcessor if has_no_object(model) else RTDetrImageProcessor  # how scores are read in a pipeline
    return kind(
        size={"height": size, "width": size},
        do_normalize=True,
        image_mean=model_args.image_mean,
        image_std=model_args.image_std,
        do_pad=False,
    )


# The run


class DetectionTrainer(SelfKDTrainer):
    """A [`SelfKDTrainer`] whose predictions are detections, and whose labels are objects, in tables of six columns."""

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As in [`~transformers.Trainer`]; see [`~hf_selfkd.metrics.detection.DetectionMetrics`] for the tables."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        sizes = torch.stack([target["orig_size"] for target in labels])
        known = all("class_labels" in target for target in labels)
        loss = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if known:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss = loss.detach().mean()
            else:
                outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if prediction_loss_only:
            return loss, None, None
        found = detections(outputs, sizes, has_no_object(self.model))
        return loss, found, objects(labels, sizes) if known else None


def predict(trainer: SelfKDTrainer, dataset: Dataset, data_args: DetectionDataArguments) -> None:
    """
    Write `predictions.jsonl`, a line an image, and draw the first ones in `predictions/`. Where there are objects: the
    metrics.
    """
    result = trainer.predict(dataset, metric_key_prefix="predict")
    common.record(trainer, "predict", result.metrics | {"predict_samples": len(dataset)})
    if not trainer.is_world_process_zero():
        return
    folder, names = Path(trainer.args.output_dir), trainer.model.config.id2label
    plain = dataset.with_format(None)
    ids = plain["image_id"][:] if "image_id" in dataset.column_names else [None] * len(dataset)
    rows = [{"row": row} | ({} if image is None else {"image_id": image}) for row, image in enumerate(ids)]
    threshold, tables = data_args.score_threshold, result.predictions
    write_predictions(folder / "predictions.jsonl", tables, rows, names, threshold)
    os.makedirs(folder / "predictions", exist_ok=True)
    for row in range(min(data_args.max_drawn_images, len(dataset))):
        truth = None if result.label_ids is None else result.label_ids[row]
        picture = draw(plain[row][data_args.image_column_name], tables[row], names, threshold, truth)
        picture.save(folder / "predictions" / f"{row:04d}.png")


def build(argv: Sequence[str] | None = None) -> common.Run:
    """The run that the flags ask for: data, model and trainer, checked and not yet started."""
    model_args, data_args, training_args = common.start(make_parser(), argv)
    splits = needed_splits(load_splits(data_args, model_args, read_split), data_args, training_args)
    check_columns(splits, data_args)
    names = category_names(splits["train"], data_args) if training_args.do_train else None

    config = make_config(model_args, names)
    classes = common.class_list(config)
    splits = prepare_splits(splits, classes, data_args, training_args)
    model = make_model(model_args, config)
    check_queries(splits.get("train"), model)
    processor = make_image_processor(model_args, model)
    splits = transformed(splits, processor, data_args)
    training_args.remove_unused_columns = False  # the transform needs the image column, and leaves nothing unused

    trainer = DetectionTrainer(
        model=model,
        args=training_args,
        **datasets_of(splits),
        processing_class=processor,
        data_collator=DetectionCollator(model),
        compute_metrics=DetectionMetrics(
            classes if data_args.class_metrics else None, score_threshold=data_args.score_threshold
        ),
    )
    run = partial(predict, trainer, splits.get("test"), data_args)
    return common.Run(trainer, model_args, data_args, TASK, run, {"tags": ["vision"]})


def main(argv: Sequence[str] | None = None) -> None:
    common.carry_out(build(argv))
