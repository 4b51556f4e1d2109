# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd[vision]"]
# ///
"""
Train an image classifier with progressive self-distillation, from a pretrained model or from scratch.

```bash
# fine-tune a pretrained model on a dataset of the Hub
python examples/image_classification.py --model_name_or_path microsoft/resnet-18 --ignore_mismatched_sizes \
    --dataset_name AI-Lab-Makerere/beans --image_column_name image --label_column_name labels \
    --do_train --do_eval --num_train_epochs 10 --output_dir outputs/beans

# train from scratch on a folder with one sub-folder of images per class; no network needed
python examples/image_classification.py --model_type resnet --config_overrides '{"depths": [2, 2, 2, 2]}' \
    --image_size 64 --train_dir images/train --do_train --do_eval --num_train_epochs 30 --output_dir outputs/images

# settings from a YAML (or JSON) file, some of them overridden
python examples/image_classification.py examples/configs/cifar100_resnet.yaml --alpha 0.7
```

Layered self-distillation, on a quarter of each class: add `--auxiliary_heads lsskd --few_shot_fraction 0.25`.
Two baselines are the same command with `--alpha 0` (plain training) and with `--alpha 0 --label_smoothing_factor 0.1`
(label smoothing). With random augmentation, `--seed_transforms` makes a resumed run follow the uninterrupted one.
The arguments of training are those of `SelfKDConfig`, hence of `TrainingArguments`.
"""

from __future__ import annotations

import csv
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, Image, Value, load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    ViTImageProcessor,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torchvision_available

from hf_selfkd import SelfKDConfig, SelfKDDataCollator, SelfKDTrainer
from hf_selfkd.metrics import compute_classification_metrics


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
LABEL_TYPES = ("bool", "int", "uint", "string", "large_string")
NO_LABEL = -100


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model, of the Hub or a local folder; leave out to train from scratch."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of a model trained from scratch, such as resnet or vit."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a model trained from scratch, of the Hub or a local folder."}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": 'Fields of the configuration to change, as JSON: {"depths": [2, 2, 2, 2]}.'}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if it is not the one of the pretrained model."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Make an image processor for square images of this size instead of loading one."},
    )
    image_mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406],
        metadata={"help": "Channel means of an image processor that is made, for pixels in [0, 1]."},
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.229, 0.224, 0.225],
        metadata={"help": "Channel standard deviations of an image processor that is made."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Make a new classifier where the pretrained one has other classes."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the pretrained model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep downloaded models and data."})
    token: str | None = field(default=None, metadata={"help": "Token of the Hub, if not the one you logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a model of the Hub brings."})

    def __post_init__(self):
        if not (self.model_name_or_path or self.model_type or self.config_name):
            raise ValueError("No model: give --model_name_or_path, or --model_type or --config_name for a new one.")

    @property
    def hub(self) -> dict[str, Any]:
        """`dict`: what every `from_pretrained` needs."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class DataArguments:
    """Which images to train on, and what to do to them."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset of the Hub or a local folder; not used when files or folders are given."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "CSV, JSON or Parquet file or glob pattern; image paths in it are relative to its folder."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same, for prediction; labels are optional."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one sub-folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    test_dir: str | None = field(default=None, metadata={"help": "The same, for prediction."})
    train_split_name: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    test_split_name: str = field(default="test", metadata={"help": "Split to predict."})
    validation_split_fraction: float = field(
        default=0.1, metadata={"help": "Share of the training data held out when there are no validation data."}
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the classes: integers or text."})
    augmentation: Literal["random_resized_crop", "pad_crop", "none"] = field(
        default="random_resized_crop",
        metadata={"help": "Random crops of training images: random_resized_crop, pad_crop (small images) or none."},
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Flip half of the training images."})
    few_shot_fraction: float = field(
        default=1.0, metadata={"help": "Train on this share of each class only: the same images in every run."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Beta parameter of mixup; 0 is off."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "Beta parameter of CutMix; 0 is off."})
    mix_probability: float = field(default=1.0, metadata={"help": "Share of the batches that are mixed."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many random samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many random samples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict so many random samples only."})

    def __post_init__(self):
        if not 0 < self.validation_split_fraction < 1:
            raise ValueError(f"--validation_split_fraction {self.validation_split_fraction} is outside (0, 1).")
        if not 0 < self.few_shot_fraction <= 1:
            raise ValueError(f"--few_shot_fraction {self.few_shot_fraction} is outside (0, 1].")

    @property
    def local(self) -> bool:
        """`bool`: whether files or folders are given."""
        return any(getattr(self, f"{split}_{kind}") is not None for split in SPLITS for kind in ("file", "dir"))


def parse_arguments() -> tuple[ModelArguments, DataArguments, SelfKDConfig]:
    """The flags, over the settings of the YAML or JSON file that may stand first."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SelfKDConfig), allow_abbrev=False)
    flags = sys.argv[1:]
    if flags and flags[0].endswith((".yaml", ".yml", ".json")):
        file = flags.pop(0)
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        unknown = settings.keys() - vars(parser.parse_args([])).keys()
        if unknown:
            raise ValueError(f"{file} has unknown settings: {', '.join(sorted(unknown))}.")
        # As text, so that argparse reads them like flags: to YAML, 1e-4 is text and not a number.
        as_is = (dict, list, type(None))
        parser.set_defaults(**{k: v if isinstance(v, as_is) else str(v) for k, v in settings.items()})
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def set_up_logging(training_args: SelfKDConfig) -> None:
    """Log to the terminal; only the main process tells what goes well."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    level = training_args.get_process_log_level()
    tells = training_args.should_log and training_args.log_level == "passive"
    for name in (__name__, "hf_selfkd"):
        logging.getLogger(name).setLevel(logging.INFO if tells else level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    logger.warning(
        f"Process {training_args.process_index} of {training_args.world_size} on {training_args.device}, "
        f"{training_args.parallel_mode.value}."
    )


# Data


def load_splits(data_args: DataArguments, model_args: ModelArguments) -> dict[str, Dataset]:
    """The splits that there are, by their names in `SPLITS`."""
    if data_args.local:
        if data_args.dataset_name is not None:
            logger.info(f"Local data are given: --dataset_name {data_args.dataset_name} is not used.")
        splits = {split: load_local(split, data_args, model_args.cache_dir) for split in SPLITS}
        return {split: dataset for split, dataset in splits.items() if dataset is not None}
    if data_args.dataset_name is None:
        raise ValueError("No data: give --dataset_name, --train_file or --train_dir.")
    loaded = load_dataset(
        data_args.dataset_name, data_args.dataset_config_name, cache_dir=model_args.cache_dir, token=model_args.token
    )
    logger.info(f"{data_args.dataset_name} has the splits {', '.join(loaded)}.")
    names = {split: getattr(data_args, f"{split}_split_name") for split in SPLITS}
    return {split: loaded[name] for split, name in names.items() if name in loaded}


def load_local(split: str, data_args: DataArguments, cache_dir: str | None) -> Dataset | None:
    """A split from the folder or the file that is given for it, if any."""
    file, folder = getattr(data_args, f"{split}_file"), getattr(data_args, f"{split}_dir")
    if folder is not None:
        files = {"train": os.path.join(folder, "**")}
        return load_dataset("imagefolder", data_files=files, split="train", cache_dir=cache_dir)
    if file is None:
        return None
    kind = Path(file).suffix.lstrip(".").replace("jsonl", "json")
    if kind not in ("csv", "json", "parquet"):
        raise ValueError(f"--{split}_file {file} is not a .csv, .json, .jsonl or .parquet file.")
    return load_dataset(kind, data_files=file, split="train", cache_dir=cache_dir)


def needed_splits(
    splits: dict[str, Dataset], data_args: DataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """Leave out the splits that the run does not use; fail early if one, or a column of one, is missing."""
    doing = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    if not any(doing.values()):
        raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    if training_args.do_eval and "validation" not in splits:
        doing |= {"train": True, "validation": False}  # to be split off
    missing = [split for split in SPLITS if doing[split] and split not in splits]
    if missing:
        raise ValueError(
            f"No {missing[0]} data, only {', '.join(splits)}: give --{missing[0]}_file, --{missing[0]}_dir or the "
            f"right --{missing[0]}_split_name."
        )
    splits = {split: splits[split] for split in SPLITS if doing[split]}
    for split, dataset in splits.items():
        for name in ("image_column_name", "label_column_name"):
            column = getattr(data_args, name)
            if column not in dataset.column_names and (split, name) != ("test", "label_column_name"):
                raise ValueError(
                    f"--{name} {column} is not a column of the {split} data: choose among "
                    f"{', '.join(dataset.column_names)}."
                )
    return splits


def class_names(dataset: Dataset, column: str) -> list[str]:
    """The names of the classes, in the order of their numbers."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    if not isinstance(feature, Value) or not feature.dtype.startswith(LABEL_TYPES):
        raise ValueError(
            f"--label_column_name {column} holds {feature}: one class per image, an integer or text, is supported."
        )
    return [str(value) for value in sorted(value for value in dataset.unique(column) if value is not None)]


def with_labels(dataset: Dataset, column: str, names: list[str], split: str) -> Dataset:
    """Replace the label column by `labels`: numbers into `names`, -100 where a row has no label."""
    if column not in dataset.column_names:
        return dataset
    feature = dataset.features[column]
    own = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}
    number = {name: i for i, name in enumerate(names)} | {None: NO_LABEL}
    # On the Hub, the label of an unlabelled row is -1.
    found = [own.get(value) if own else value for value in dataset.with_format(None)[column][:]]
    found = [None if value is None else str(value) for value in found]
    unknown = set(found) - number.keys()
    if unknown:
        raise ValueError(f"The {split} data have classes that the model does not know: {', '.join(sorted(unknown))}.")
    if split == "train" and None in found:
        raise ValueError(f"Row {found.index(None)} of the training data has no {column}.")
    dataset = dataset.remove_columns(column)
    if set(found) == {None}:
        return dataset
    return dataset.add_column("labels", [number[name] for name in found])


def with_images(dataset: Dataset, column: str, file: str | None) -> Dataset:
    """Decode the image column; paths in a file are relative to its folder."""
    feature = dataset.features[column]
    if isinstance(feature, Image):
        return dataset
    if isinstance(feature, Value) and file is not None:
        folder = Path(file).resolve().parent
        dataset = dataset.map(lambda path: {column: str(folder / path)}, input_columns=column)
    return dataset.cast_column(column, Image())


def subset(dataset: Dataset, size: int | None) -> Dataset:
    """So many random samples: the same in every run, whatever its seed."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.shuffle(seed=0).select(range(size))


def few_shot(dataset: Dataset, fraction: float) -> Dataset:
    """A share of the images of each class, at least one: the same in every run, whatever its seed."""
    if fraction == 1:
        return dataset
    labels, rng = np.asarray(dataset.with_format(None)["labels"][:]), np.random.default_rng(0)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    kept = [rows[: max(1, round(fraction * len(rows)))] for rows in classes]
    return dataset.select(np.sort(np.concatenate(kept)))


def prepare_splits(
    splits: dict[str, Dataset], names: list[str], data_args: DataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """Splits with decoded images and `labels`, cut to the size that was asked for."""
    with training_args.main_process_first(desc="reading the images"):
        for split, dataset in splits.items():
            dataset = with_images(dataset, data_args.image_column_name, getattr(data_args, f"{split}_file"))
            splits[split] = with_labels(dataset, data_args.label_column_name, names, split)
    if training_args.do_eval and "validation" not in splits:
        # One seed for all runs: they are compared on the same images.
        parts = splits["train"].train_test_split(data_args.validation_split_fraction, seed=0)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    if "train" in splits:
        splits["train"] = few_shot(splits["train"], data_args.few_shot_fraction)
    sizes = (data_args.max_train_samples, data_args.max_eval_samples, data_args.max_predict_samples)
    return {split: subset(splits[split], size) for split, size in zip(SPLITS, sizes, strict=True) if split in splits}


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


def make_augmentation(processor: Any, data_args: DataArguments) -> Any:
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


# Model


def make_config(model_args: ModelArguments, names: list[str] | None) -> PreTrainedConfig:
    """The configuration, with the overrides and, if `names` are given, these classes."""
    overrides = model_args.config_overrides or {}
    overrides = yaml.safe_load(overrides) if isinstance(overrides, str) else dict(overrides)
    source = model_args.config_name or model_args.model_name_or_path
    if source is not None:
        base = AutoConfig.from_pretrained(source, **model_args.hub)
    else:
        base = AutoConfig.for_model(model_args.model_type)
    if model_args.image_size is not None and model_args.model_name_or_path is None and hasattr(base, "image_size"):
        overrides.setdefault("image_size", model_args.image_size)
    unknown = [name for name in overrides if not hasattr(base, name)]
    if unknown:
        raise ValueError(f"--config_overrides: {type(base).__name__} has no {', '.join(unknown)}.")
    if names is not None:
        overrides["id2label"] = dict(enumerate(names))
        overrides["label2id"] = {name: i for i, name in enumerate(names)}
    if source is not None:
        return AutoConfig.from_pretrained(source, **overrides, **model_args.hub)
    return AutoConfig.for_model(model_args.model_type, **overrides)


def make_image_processor(model_args: ModelArguments, config: PreTrainedConfig) -> Any:
    """The image processor of the pretrained model, or one that resizes and normalises."""
    source = model_args.image_processor_name or model_args.model_name_or_path
    if source is not None and model_args.image_size is None:
        return AutoImageProcessor.from_pretrained(source, **model_args.hub)
    size = model_args.image_size or getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=model_args.image_mean, image_std=model_args.image_std
    )


def make_model(model_args: ModelArguments, config: PreTrainedConfig) -> torch.nn.Module:
    """A pretrained model, or a new one."""
    if model_args.model_name_or_path is None:
        return AutoModelForImageClassification.from_config(config, trust_remote_code=model_args.trust_remote_code)
    return AutoModelForImageClassification.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **model_args.hub,
    )


# The run


def find_checkpoint(training_args: SelfKDConfig) -> str | None:
    """The checkpoint to resume from: the one asked for, or the last one in the output folder."""
    if training_args.resume_from_checkpoint is not None or not os.path.isdir(training_args.output_dir):
        return training_args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}. To train from the start, choose another --output_dir.")
    return checkpoint


def train(trainer: SelfKDTrainer) -> None:
    """Train, and save model, metrics and state."""
    result = trainer.train(resume_from_checkpoint=find_checkpoint(trainer.args))
    trainer.save_model()
    metrics = result.metrics | {"train_samples": len(trainer.train_dataset)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: SelfKDTrainer) -> None:
    """Evaluate, and save the metrics."""
    metrics = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def predict(trainer: SelfKDTrainer, dataset: Dataset) -> None:
    """Write `predictions.csv` (row, class, its probability) and, where there are labels, the metrics."""
    result = trainer.predict(dataset, metric_key_prefix="predict")
    metrics = result.metrics | {"predict_samples": len(dataset)}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    if not trainer.is_world_process_zero():
        return
    logits = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
    confidence, best = torch.from_numpy(logits).float().softmax(dim=-1).max(dim=-1)
    names = trainer.model.config.id2label
    with open(os.path.join(trainer.args.output_dir, "predictions.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "prediction", "confidence"])
        pairs = zip(best.tolist(), confidence.tolist(), strict=True)
        writer.writerows((row, names[i], f"{p:.4f}") for row, (i, p) in enumerate(pairs))


def share(trainer: SelfKDTrainer, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Write the model card, which names what is on the Hub, and upload with `--push_to_hub`."""
    local = data_args.local or os.path.isdir(data_args.dataset_name)
    card = {
        "tasks": "image-classification",
        "tags": ["image-classification", "vision", "self-distillation"],
        "finetuned_from": None
        if os.path.isdir(model_args.model_name_or_path or "")
        else model_args.model_name_or_path,
        "dataset_tags": [] if local else [data_args.dataset_name],
        "dataset_args": [] if local else [data_args.dataset_config_name],
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def main() -> None:
    model_args, data_args, training_args = parse_arguments()
    set_up_logging(training_args)
    set_seed(training_args.seed)

    splits = needed_splits(load_splits(data_args, model_args), data_args, training_args)
    names = class_names(splits["train"], data_args.label_column_name) if training_args.do_train else None
    config = make_config(model_args, names)
    names = [config.id2label[i] for i in range(config.num_labels)]
    processor = make_image_processor(model_args, config)
    model = make_model(model_args, config)

    splits = prepare_splits(splits, names, data_args, training_args)
    plain = ImageTransform(processor, data_args.image_column_name)
    augmented = ImageTransform(processor, data_args.image_column_name, make_augmentation(processor, data_args))
    splits = {
        split: dataset.with_transform(augmented if split == "train" else plain) for split, dataset in splits.items()
    }
    training_args.remove_unused_columns = False  # the transform needs the image column, and leaves nothing unused

    trainer = SelfKDTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"] if training_args.do_train else None,
        eval_dataset=splits["validation"] if training_args.do_eval else None,
        processing_class=processor,
        data_collator=SelfKDDataCollator(
            mixup_alpha=data_args.mixup_alpha,
            cutmix_alpha=data_args.cutmix_alpha,
            mix_probability=data_args.mix_probability,
        ),
        compute_metrics=compute_classification_metrics,
    )
    if training_args.do_train:
        train(trainer)
    if training_args.do_eval:
        evaluate(trainer)
    if training_args.do_predict:
        predict(trainer, splits["test"])
    if training_args.do_train:
        share(trainer, model_args, data_args)


if __name__ == "__main__":
    main()
