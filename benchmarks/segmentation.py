"""
Semantic segmentation of blood cells: plain training and PS-KD (`teacher="snapshot"`) at equal numbers of epochs.

The data are detections (BCCD: images with boxes of red cells, white cells and platelets). The masks are made of the
boxes: the ellipse in each box has its class, larger cells under smaller ones, the rest is background. They are wrong
at the edges of cells and for cells without a box, for all methods alike. Images are made smaller, and flipped at
random.

    python benchmarks/segmentation.py --train_files "train-*.parquet" --test_files "test-*.parquet"

Each finished run appends a JSON line to `--results`; what is there is not repeated. `--table` prints the table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import torch
from comparison import PIXELS, add_flags, load, read_results, run_missing, table
from transformers import SegformerConfig, SegformerForSemanticSegmentation, set_seed

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.metrics import SegmentationMetrics


CLASSES = {"RBC": 1, "WBC": 2, "Platelets": 3}
METHODS = {
    "plain": {"alpha": 0.0},
    "PS-KD, alpha 0.4": {"alpha": 0.4, "teacher": "snapshot"},
    "PS-KD": {"alpha": 0.8, "teacher": "snapshot"},
}
SHOWN = PIXELS | {"nll": ("NLL", 3), "ece": ("ECE %", 2), "cpu_seconds": ("CPU s", 0)}


def mask_of(boxes: list, classes: list[str], size: tuple[int, int], scale: float) -> np.ndarray:
    """Classes `[H, W]` of the ellipses in boxes `[x, y, w, h]` of the original image."""
    mask = np.zeros(size, dtype=np.int64)
    y, x = (np.arange(length) + 0.5 for length in size)
    for (left, top, width, height), name in sorted(
        zip(boxes, classes, strict=True), key=lambda pair: -pair[0][2] * pair[0][3]
    ):
        across = (x - scale * (left + width / 2)) / (scale * width / 2)
        down = (y - scale * (top + height / 2)) / (scale * height / 2)
        mask[down[:, None] ** 2 + across**2 <= 1] = CLASSES[name]
    return mask


class Cells(torch.utils.data.Dataset):
    """
    Images and masks, in memory.

    Args:
        dataset (`datasets.Dataset`): of BCCD.
        width (`int`): of the images; their height is three quarters of it.
        flips (`bool`): whether images are flipped at random.
    """

    def __init__(self, dataset: Any, width: int, flips: bool):
        names = dataset.features["objects"]["category"].feature.names
        self.flips, self.items = flips, []
        for row in dataset:
            image = row["image"].convert("RGB").resize((width, width * 3 // 4))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            classes = [names[number] for number in row["objects"]["category"]]
            scale = width / row["width"]
            mask = mask_of(row["objects"]["bbox"], classes, pixels.shape[1:], scale)
            self.items.append((pixels, torch.from_numpy(mask)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels, mask = self.items[index]
        turned = [dim for dim in (-2, -1) if self.flips and torch.rand(()) < 0.5]
        return {"pixel_values": pixels.flip(turned), "labels": mask.flip(turned)}


def small_segformer() -> SegformerForSemanticSegmentation:
    """A SegFormer of 0.5 million parameters, whose logits have a quarter of the side of the image."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 32, 64, 96],
            num_attention_heads=[1, 1, 2, 4],
            decoder_hidden_size=64,
            mlp_ratios=[2, 2, 2, 2],
            num_labels=1 + len(CLASSES),
        )
    )


def run(method: str, seed: int, data: dict[str, Cells], args: argparse.Namespace) -> dict:
    """Train once and judge on the test images."""
    set_seed(seed)
    model, start = small_segformer(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = SelfKDConfig(
            folder,
            seed=seed,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            learning_rate=2e-3,
            weight_decay=0.01,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            batch_eval_metrics=True,
            **METHODS[method],
        )
        trainer = SelfKDTrainer(
            model,
            config,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            compute_metrics=SegmentationMetrics(),
        )
        trainer.train()
        seconds = time.process_time() - start
        metrics = trainer.evaluate()
    figures = {name: metrics[f"eval_{name}"] for name in ("mean_iou", "mean_accuracy", "pixel_accuracy", "nll", "ece")}
    size = {"train_samples": len(data["train"]), "epochs": args.epochs, "width": args.width}
    settings = {"method": method, "seed": seed} | size
    return settings | figures | {"cpu_seconds": seconds}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_files", nargs="*", help="parquet files of BCCD")
    parser.add_argument("--test_files", nargs="*")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--width", type=int, default=96, help="pixels of an image's width")
    parser.add_argument("--epochs", type=int, default=25)
    add_flags(parser, METHODS, [0, 1], "outputs/segmentation.jsonl")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.table:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        limits = {"train": args.max_train_samples, "test": None}
        files = {"train": args.train_files, "test": args.test_files}
        data = {
            split: Cells(load(files[split], "bccd", split, limit), args.width, split == "train")
            for split, limit in limits.items()
        }
        run_missing(args.results, args.seeds, args.methods, lambda *one: run(*one, data, args), tuple(SHOWN))
    print(table(read_results(args.results), list(METHODS), SHOWN))


if __name__ == "__main__":
    main()
