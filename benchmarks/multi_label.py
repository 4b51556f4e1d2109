"""
Several labels an image: which digits are in a mosaic. Plain training, smoothed labels and PS-KD (`teacher="history"`)
at equal numbers of epochs.

The data are made of scikit-learn's handwritten digits (8 x 8 pixels): a mosaic is 20 x 20 pixels and has four of them,
one a quarter, each moved by up to two pixels; its labels are ten yes-or-no answers, a digit each. Training mosaics
have digits of the first 1,200 images, test mosaics of the other 597. Mosaics are made once and do not change between
epochs.

    python benchmarks/multi_label.py

Each finished run appends a JSON line to `--results`; what is there is not repeated. `--table` prints the table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from comparison import MULTI_LABEL, add_flags, read_results, run_missing, table
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, set_seed

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.metrics import compute_multi_label_metrics


METHODS = {
    "plain": {"alpha": 0.0},
    "smoothed labels": {"alpha": 0.0},  # and a loss of its own: the task has no label smoothing
    "PS-KD, alpha 0.4": {"alpha": 0.4},
    "PS-KD": {"alpha": 0.8},
}
SMOOTHING = 0.1
FIRST_TEST_IMAGE = 1200
SIDE, ROOM = 8, 10  # pixels of a digit, and of the quarter in which it is moved


def smoothed_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Binary cross-entropy with 0.95 for yes and 0.05 for no."""
    targets = labels * (1 - SMOOTHING) + SMOOTHING / 2
    return F.binary_cross_entropy_with_logits(outputs.logits, targets, reduction="sum") / num_items_in_batch


class Mosaics(torch.utils.data.Dataset):
    """
    Mosaics of digits, in memory.

    Args:
        size (`int`): number of mosaics.
        digits, classes (`np.ndarray` of shape `[N, 8, 8]` and `[N]`): what they are made of.
        seed (`int`): of the choice of digits and places.
    """

    def __init__(self, size: int, digits: np.ndarray, classes: np.ndarray, seed: int):
        rng = np.random.default_rng(seed)
        self.pixels = torch.zeros(size, 1, 2 * ROOM, 2 * ROOM)
        self.labels = torch.zeros(size, 10)
        for mosaic, labels in zip(self.pixels[:, 0], self.labels, strict=True):
            for quarter, number in enumerate(rng.integers(len(digits), size=4)):
                top, left = ROOM * np.array(divmod(quarter, 2)) + rng.integers(ROOM - SIDE + 1, size=2)
                mosaic[top : top + SIDE, left : left + SIDE] = torch.from_numpy(digits[number] / 8 - 1)
                labels[classes[number]] = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def make_data(train_samples: int, test_samples: int) -> dict[str, Mosaics]:
    """Training and test mosaics, which share no digit's image."""
    digits, classes = (values[:] for values in (load_digits().images, load_digits().target))
    parts = {"train": (train_samples, slice(FIRST_TEST_IMAGE)), "test": (test_samples, slice(FIRST_TEST_IMAGE, None))}
    return {
        split: Mosaics(size, digits[images], classes[images], seed)
        for seed, (split, (size, images)) in enumerate(parts.items())
    }


def small_resnet() -> ResNetForImageClassification:
    """A ResNet of 80,000 parameters."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[1, 1, 1],
            layer_type="basic",
            num_labels=10,
            problem_type="multi_label_classification",
        )
    )


def run(method: str, seed: int, data: dict[str, Mosaics], args: argparse.Namespace) -> dict:
    """Train once and judge on the test mosaics."""
    set_seed(seed)
    model, start = small_resnet(), time.process_time()
    # The stem of ResNet makes images four times smaller before the first block; these are small already.
    model.resnet.embedder.embedder.convolution.stride = (1, 1)
    model.resnet.embedder.pooler = torch.nn.Identity()
    with tempfile.TemporaryDirectory() as folder:
        config = SelfKDConfig(
            folder,
            seed=seed,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            learning_rate=2e-3,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **METHODS[method],
        )
        trainer = SelfKDTrainer(
            model,
            config,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            compute_metrics=compute_multi_label_metrics,
            compute_loss_func=smoothed_loss if method == "smoothed labels" else None,
        )
        trainer.train()
        seconds = time.process_time() - start
        metrics = trainer.evaluate()
        fitted = trainer.evaluate(data["train"], metric_key_prefix="train")
    figures = {name: metrics[f"eval_{name}"] for name in ("map", "micro_f1", "macro_f1", "bce", "ece")}
    figures |= {f"train_{name}": fitted[f"train_{name}"] for name in ("map", "bce")}
    size = {"train_samples": len(data["train"]), "epochs": args.epochs}
    return {"method": method, "seed": seed} | size | figures | {"cpu_seconds": seconds}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_samples", type=int, default=400, help="training mosaics")
    parser.add_argument("--test_samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=40)
    add_flags(parser, METHODS, [0, 1, 2], "outputs/multi_label.jsonl")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.table:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        data = make_data(args.train_samples, args.test_samples)
        run_missing(args.results, args.seeds, args.methods, lambda *one: run(*one, data, args), tuple(MULTI_LABEL))
    print(table(read_results(args.results), list(METHODS), MULTI_LABEL))


if __name__ == "__main__":
    main()
