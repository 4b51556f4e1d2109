"""
A small detector with self-distillation in its backbone, in its loss, in both and in neither, with the same budget.

    python benchmarks/detection.py --voc BCCD_Dataset/BCCD
    python benchmarks/detection.py --train_files "train-*.parquet" --validation_files ... --test_files ...

The detector is that of `examples/configs/bccd_dfine.yaml`, trained by the script behind `hf-selfkd train
object-detection` on images that were made smaller beforehand. The backbones are classifiers of the training objects:
squares around the boxes, and as many squares of background as there are images, four times. Every finished training
appends a JSON line to `--results`; what is there is not repeated. `--table` prints the table and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from comparison import DETECTION, read_results, run_missing, table
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import HGNetV2Config, HGNetV2ForImageClassification, set_seed

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.metrics import compute_classification_metrics
from hf_selfkd.metrics.detection import detection_metrics, detections_of, detections_that_are_right, objects_of
from hf_selfkd.scripts.arguments import DetectionDataArguments
from hf_selfkd.scripts.detection import object_detection
from hf_selfkd.scripts.detection.data import OBJECTS, box_format_of, category_names, read_split, with_objects
from hf_selfkd.scripts.detection.predictions import draw


SETTINGS = Path(__file__).parents[1] / "examples" / "configs" / "bccd_dfine.yaml"
METHODS = {  # weight of the past in the loss of the detector, and in that of the classifier, if there is one
    "plain": (0.0, None),
    "loss": (0.8, None),
    "backbone": (0.0, 0.8),
    "backbone and loss": (0.8, 0.8),
    "backbone of a plain classifier": (0.0, 0.0),
}
SMALL = (192, 144)  # width and height of the images that are kept
CROP = 48  # pixels of an object for the classifier
RESAMPLES = 20


# Data


def splits_of(args: argparse.Namespace) -> tuple[dict[str, Dataset], list[str]]:
    """The images as they are, with `objects` as the script makes them, and the names of the classes."""
    names = {"train": "train", "validation": "val", "test": "test"}
    flags = {f"{split}_split_name": name for split, name in names.items()}
    for split in names:
        files = getattr(args, f"{split}_files")
        flags |= {f"{split}_dir": args.voc} if args.voc else {f"{split}_file": files}
    data_args = DetectionDataArguments(**flags)
    loaded = {split: read_split(split, data_args, None) for split in names}
    classes = category_names(loaded["train"], data_args)
    return {
        split: with_objects(dataset, classes, data_args, split, box_format_of(split, data_args))
        for split, dataset in loaded.items()
    }, classes


def make_small(dataset: Dataset, classes: list[str], path: Path) -> None:
    """Write the images, smaller, and their boxes by their corners to a Parquet file."""
    rows = []
    for row in dataset:
        height, width = row[OBJECTS]["size"]
        scale = np.array([SMALL[0] / width, SMALL[1] / height] * 2)
        boxes = (np.array(row[OBJECTS]["boxes"]).reshape(-1, 4) * scale).tolist()
        names = [classes[label] for label in row[OBJECTS]["labels"]]
        picture = row["image"].convert("RGB").resize(SMALL)
        rows.append({"image": picture, "objects": {"bbox": boxes, "category": names}})
    objects = {"bbox": [[Value("float64")]], "category": [Value("string")]}
    Dataset.from_list(rows, features=Features({"image": Image(), "objects": objects})).to_parquet(path)


def crops_of(dataset: Dataset, classes: list[str]) -> list[tuple[np.ndarray, int]]:
    """Squares around all objects, and around places without one: `[CROP, CROP, 3]` and a class."""
    rng, found = np.random.default_rng(0), []
    for row in dataset:
        image = row["image"].convert("RGB")
        boxes = np.array(row[OBJECTS]["boxes"]).reshape(-1, 4)
        squares = [
            ((box[:2] + box[2:]) / 2, 1.5 * max(box[2:] - box[:2]), label)
            for box, label in zip(boxes, row[OBJECTS]["labels"], strict=True)
        ]
        side = float(np.median([square[1] for square in squares])) if squares else 100.0
        for _ in range(4):
            center = rng.uniform((0, 0), image.size)
            inside = ((boxes[:, :2] < center) & (center < boxes[:, 2:])).all(axis=1)
            if not inside.any():
                squares.append((center, side, len(classes)))
        for center, side, label in squares:
            place = (*(center - side / 2), *(center + side / 2))
            crop = image.transform((CROP, CROP), 0, data=_to_square(place), resample=2)
            found.append((np.asarray(crop), label))
    return found


def _to_square(place: tuple[float, ...]) -> tuple[float, ...]:
    """The affine map of PIL from a crop to a place of its image."""
    left, top, right, bottom = place
    return ((right - left) / CROP, 0, left, 0, (bottom - top) / CROP, top)


class Crops(torch.utils.data.Dataset):
    """Crops as a classifier takes them; flipped at random."""

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def __init__(self, crops: list[tuple[np.ndarray, int]], flips: bool):
        self.crops, self.flips = crops, flips

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, place: int) -> dict:
        pixels, label = self.crops[place]
        image = ((torch.from_numpy(pixels.copy()) / 255 - self.mean) / self.std).permute(2, 0, 1)
        axes = [axis for axis in (1, 2) if self.flips and torch.rand(()) < 0.5]
        return {"pixel_values": image.flip(axes), "labels": label}


# Trainings


def train_backbone(splits: dict, classes: list[str], alpha: float, seed: int, epochs: int, folder: Path) -> dict:
    """Train the classifier of crops, and save it."""
    if folder.is_dir():
        return {}
    set_seed(seed)
    sizes = yaml.safe_load(SETTINGS.read_text())["config_overrides"]["backbone_config"]
    sizes = {name: value for name, value in sizes.items() if name not in ("model_type", "out_features")}
    model = HGNetV2ForImageClassification(HGNetV2Config(**sizes, num_labels=len(classes) + 1))
    config = SelfKDConfig(
        str(folder) + "_run",
        seed=seed,
        alpha=alpha,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    train, test = Crops(crops_of(splits["train"], classes), True), Crops(crops_of(splits["test"], classes), False)
    trainer = SelfKDTrainer(model, config, train_dataset=train, compute_metrics=compute_classification_metrics)
    start = time.process_time()
    trainer.train()
    trainer.save_model(str(folder))
    metrics = trainer.evaluate(test)
    found = {f"classifier_{name}": metrics[f"eval_{name}"] for name in ("accuracy", "nll", "ece")}
    print(alpha, seed, len(train), found, flush=True)
    return found | {"classifier_cpu_seconds": time.process_time() - start}


def train_detector(args: argparse.Namespace, data: tuple, method: str, seed: int, folder: Path) -> dict:
    """Train a detector by the script, and measure it on the test images."""
    (splits, classes), (alpha, of_classifier) = data, METHODS[method]
    settings = yaml.safe_load(SETTINGS.read_text())
    for split in ("train", "validation", "test"):
        del settings[f"{split}_dir"]
        settings[f"{split}_file"] = str(folder / f"{split}.parquet")
    settings |= {"num_train_epochs": args.epochs, "box_format": "voc", "report_to": "none", "log_level": "error"}
    settings |= {"alpha": alpha, "seed": seed, "output_dir": str(folder / "run"), "disable_tqdm": True}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    flags = [str(folder / "settings.yaml")]
    found = {}
    if of_classifier is not None:
        backbone = folder / f"backbone_{of_classifier}_{seed}"
        found = train_backbone(splits, classes, of_classifier, seed, args.classifier_epochs, backbone)
        flags += ["--backbone_from", str(backbone)]
    run = object_detection.build(flags)
    trainer, test, _ = run.predict.args
    start = time.process_time()
    trainer.train()
    found |= {"cpu_seconds": time.process_time() - start}
    found |= {f"validation_{name.removeprefix('eval_')}": v for name, v in trainer.evaluate().items()}
    result = trainer.predict(test)
    found |= {name.removeprefix("test_"): value for name, value in result.metrics.items()}
    images = detections_of(result.predictions), objects_of(result.label_ids)
    if args.keep:
        object_detection.predict(trainer, test, run.data_args)
        (folder / "run").rename(Path(args.keep) / f"{method.replace(' ', '_')}_{seed}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    scores, right = detections_that_are_right(*images)
    counted = {"counted": len(scores), "score": float(scores.mean()), "precision": float(right.mean())}
    return (
        {"method": method, "seed": seed, "epochs": args.epochs, "losses": losses}
        | counted
        | {name: value for name, value in found.items() if not name.endswith(("second", "runtime", "epoch"))}
        | resampled(*images)
    )


def resampled(predictions: list[dict], targets: list[dict]) -> dict[str, float]:
    """The standard deviation of the figures over test sets drawn from this one, with replacement."""
    rng, figures = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(targets), size=len(targets))
        figures.append(detection_metrics([predictions[i] for i in chosen], [targets[i] for i in chosen]))
    return {f"{name}_of_images": float(np.std([one[name] for one in figures], ddof=1)) for name in figures[0]}


def draw_predictions(dataset: Dataset, classes: list[str], run: Path, path: Path, shown: tuple[int, ...]) -> None:
    """Draw what a kept run said of some test images, in rows of two, on the images as they were."""
    lines = (run / "predictions.jsonl").read_text().splitlines()
    sheet = PILImage.new("RGB", (2 * 480, (len(shown) + 1) // 2 * 360))
    for place, row in enumerate(shown):
        image, objects = dataset[row]["image"], dataset[row][OBJECTS]
        scale = np.array([image.width / SMALL[0], image.height / SMALL[1]] * 2)
        found = json.loads(lines[row])["detections"]
        rows = [[*(scale * list(one["box"].values())), one["score"], classes.index(one["label"])] for one in found]
        truth = [[*box, label, 0] for box, label in zip(objects["boxes"], objects["labels"], strict=True)]
        drawn = draw(image, np.array(rows).reshape(-1, 6), dict(enumerate(classes)), 0.3, np.array(truth))
        sheet.paste(drawn.resize((480, 360)), (480 * (place % 2), 360 * (place // 2)))
    sheet.quantize(256, PILImage.Quantize.FASTOCTREE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", help="folder of Pascal VOC with the lists train, val and test")
    parser.add_argument("--train_files", help="or Parquet files")
    parser.add_argument("--validation_files")
    parser.add_argument("--test_files")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--classifier_epochs", type=int, default=6)
    parser.add_argument("--keep", help="folder for models, predictions and pictures")
    parser.add_argument("--picture", type=Path, help="draw predictions of a kept run, 'backbone and loss', here")
    parser.add_argument("--results", type=Path, default=Path("bccd_detection.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    args = parser.parse_args()
    if not args.table:
        if not args.voc and not args.train_files:
            parser.error("give --voc or --train_files, --validation_files and --test_files")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        data = splits_of(args)
        with tempfile.TemporaryDirectory() as folder:
            for split, dataset in data[0].items():
                make_small(dataset, data[1], Path(folder) / f"{split}.parquet")

            def train(method: str, seed: int) -> dict:
                return train_detector(args, data, method, seed, Path(folder))

            run_missing(args.results, args.seeds, args.methods, train, tuple(DETECTION))
        if args.picture:
            kept = Path(args.keep) / "backbone_and_loss_0"
            draw_predictions(data[0]["test"], data[1], kept, args.picture, (3, 5, 8, 12))
    print(table(read_results(args.results), list(METHODS), DETECTION), file=sys.stdout)


if __name__ == "__main__":
    main()
