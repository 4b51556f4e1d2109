"""
How often `hf-selfkd doctor` is right about softer targets: it sees the plain trainings of a comparison, the answer is
what PS-KD then did to the negative log-likelihood on the same test set.

    python benchmarks/doctor.py outputs/doctor                  # trains small models on digits, then judges
    python benchmarks/doctor.py --folders outputs/compare ...   # judges comparisons that are there already

Handwritten digits of scikit-learn: few and many images, right and wrong training labels, short and long trainings;
three seeds each of plain training and PS-KD, all defaults.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from hf_selfkd.comparison.cells import ROWS_FILE, RUNS_FILE, Cell
from hf_selfkd.comparison.statistics import compare
from hf_selfkd.doctor import Symptoms, softer_targets_help


TEST = 600
MODEL = '{"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}'
SIZES, WRONG, EPOCHS = (200, 1000), (0.0, 0.2), (5, 40)


def write_images(folder: Path, size: int, wrong: float) -> None:
    """Training and test images in a folder a class; a share of the training labels is wrong."""
    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.images))
    for place, index in enumerate(order[: TEST + size]):
        label, split = int(digits.target[index]), "test" if place < TEST else "train"
        if split == "train" and rng.random() < wrong:
            label = (label + int(rng.integers(1, 10))) % 10
        path = folder / split / str(label) / f"{place:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(15.9 * digits.images[index])).convert("RGB").save(path)


def run_regime(folder: Path, size: int, wrong: float, epochs: int) -> Path:
    """Compare plain training and PS-KD; gives the folder of the comparison."""
    data = folder / f"digits_{size}_{wrong:g}"
    if not data.is_dir():
        write_images(data, size, wrong)
    words = ["--train_dir", data / "train", "--validation_dir", data / "test", "--test_dir", data / "test"]
    words += ["--model_type", "resnet", "--config_overrides", MODEL, "--image_size", 16, "--augmentation", "none"]
    words += ["--num_train_epochs", epochs, "--per_device_train_batch_size", 32, "--learning_rate", 2e-3]
    words += ["--save_strategy", "no", "--do_predict", "--use_cpu"]
    out = folder / f"{size}_{wrong:g}_{epochs}"
    command = [sys.executable, "-m", "hf_selfkd", "compare", "image-classification", "--folder", out]
    subprocess.run([*map(str, command), "--methods", "plain,history", *map(str, words)], check=True)
    return out


def finished(folder: Path) -> list[Cell]:
    """The runs of a comparison."""
    runs = [json.loads(line) for line in (folder / RUNS_FILE).read_text().splitlines()]
    return [
        Cell(run["method"], run["seed"], {}, dict(np.load(folder / f"{run['method']}_{run['seed']}" / ROWS_FILE)))
        for run in runs
    ]


def judge(cells: list[Cell]) -> tuple[Symptoms, bool | None, dict]:
    """What the doctor says of the plain trainings, taken together, and what PS-KD did."""
    plain = [cell for cell in cells if cell.method == "plain"]
    confidence, accuracy = (float(np.mean([cell.rows[name] for cell in plain])) for name in ("confidence", "correct"))
    symptoms = Symptoms(accuracy=accuracy, confidence=confidence, samples=len(plain[0].rows["correct"]))
    return symptoms, softer_targets_help(symptoms), compare(cells, "history", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="where to train on digits; a second call goes on")
    parser.add_argument("--folders", nargs="*", type=Path, default=[], help="of `hf-selfkd compare`, to judge as well")
    args = parser.parse_args()
    folders = list(args.folders)
    if args.output is not None:
        folders += [run_regime(args.output, *regime) for regime in itertools.product(SIZES, WRONG, EPOCHS)]
    right = said = 0
    print("| comparison | plain: confidence - accuracy | doctor | PS-KD: NLL | PS-KD: error % | PS-KD: AURC | right |")
    print("|---|---|---|---|---|---|---|")
    for folder in folders:
        symptoms, helps, found = judge(finished(folder))
        truth = found["nll"].mean < 0
        verdict = "" if helps is None else "yes" if helps == truth else "no"
        said, right = said + (helps is not None), right + (verdict == "yes")
        words = {True: "helps", False: "does not help", None: "cannot be told"}[helps]
        figures = " | ".join(f"{found[name].mean:+.3g}" for name in ("nll", "error", "aurc"))
        print(f"| {folder.name} | {symptoms.gap:+.1f} | {words} | {figures} | {verdict} |")
    print(f"\nRight in {right} of {said} judgements; {len(folders) - said} times nothing was said.")


if __name__ == "__main__":
    main()
