"""
Eight small regimes, from under-trained to over-fitted: which method helps where, and whether `hf-selfkd doctor` knows.

    python benchmarks/regimes.py outputs/regimes                    # trains small models on digits, then judges
    python benchmarks/regimes.py --folders outputs/compare ...      # judges comparisons that are there already

Handwritten digits of scikit-learn: few and many images, right and wrong training labels, short and long trainings;
three seeds of each method, all defaults. The doctor sees the plain trainings; the answer is what PS-KD then did to the
negative log-likelihood on the same test set.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from hf_selfkd.comparison.cells import Cell, read_cells
from hf_selfkd.comparison.report import summarize, tables
from hf_selfkd.comparison.statistics import compare
from hf_selfkd.doctor import Symptoms, softer_targets_help


TEST = 600
MODEL = '{"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}'
METHODS = "plain,label-smoothing,history,calibrated,sla"
SIZES, WRONG, EPOCHS = (200, 1000), (0.0, 0.2), (5, 40)
SHOWN = ("Error (%)", "NLL (nats)", "ECE (%)", "AURC (x1000)")


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


def run_regime(folder: Path, methods: str, size: int, wrong: float, epochs: int) -> Path:
    """Compare methods; gives the folder of the comparison."""
    data = folder / f"digits_{size}_{wrong:g}"
    if not data.is_dir():
        write_images(data, size, wrong)
    words = ["--train_dir", data / "train", "--validation_dir", data / "test", "--test_dir", data / "test"]
    words += ["--model_type", "resnet", "--config_overrides", MODEL, "--image_size", 16, "--augmentation", "none"]
    words += ["--num_train_epochs", epochs, "--per_device_train_batch_size", 32, "--learning_rate", 2e-3]
    words += ["--save_strategy", "no", "--do_predict", "--use_cpu"]
    out = folder / f"{size}_{wrong:g}_{epochs}"
    command = [sys.executable, "-m", "hf_selfkd", "compare", "image-classification", "--folder", out]
    subprocess.run([*map(str, command), "--methods", methods, *map(str, words)], check=True, stdout=sys.stderr)
    return out


def print_methods(folders: list[Path]) -> None:
    """A row a method and regime."""
    print(f"| regime | method | {' | '.join(SHOWN)} |")
    print("|---" * (2 + len(SHOWN)) + "|")
    for folder in folders:
        head, body = tables(summarize(read_cells(folder)[0]))[0]
        for row in body:
            values = dict(zip(head, row, strict=True))
            print(f"| {folder.name} | {values['method']} | {' | '.join(values[name] for name in SHOWN)} |")


def judge(cells: list[Cell]) -> tuple[Symptoms, bool | None]:
    """What the doctor says of the plain trainings, taken together."""
    plain = [cell for cell in cells if cell.method == "plain"]
    confidence, accuracy = (float(np.mean([cell.rows[name] for cell in plain])) for name in ("confidence", "correct"))
    symptoms = Symptoms(accuracy=accuracy, confidence=confidence, samples=len(plain[0].rows["correct"]))
    return symptoms, softer_targets_help(symptoms)


def print_judgements(folders: list[Path]) -> None:
    """What the doctor says, and what PS-KD did."""
    right = said = 0
    print("| regime | plain: confidence - accuracy | doctor | PS-KD: NLL | PS-KD: error % | PS-KD: AURC | right |")
    print("|---|---|---|---|---|---|---|")
    for folder in folders:
        cells, _ = read_cells(folder)
        (symptoms, helps), found = judge(cells), compare(cells, "history", "plain")
        verdict = "" if helps is None else "yes" if helps == (found["nll"].mean < 0) else "no"
        said, right = said + (helps is not None), right + (verdict == "yes")
        words = {True: "helps", False: "does not help", None: "cannot be told"}[helps]
        figures = " | ".join(f"{found[name].mean:+.3g}" for name in ("nll", "error", "aurc"))
        print(f"| {folder.name} | {symptoms.gap:+.1f} | {words} | {figures} | {verdict} |")
    print(f"\nRight in {right} of {said} judgements; {len(folders) - said} times nothing was said.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="where to train on digits; a second call goes on")
    parser.add_argument("--methods", default=METHODS, help="of `hf-selfkd compare`, with commas")
    parser.add_argument("--folders", nargs="*", type=Path, default=[], help="of `hf-selfkd compare`, to judge as well")
    args = parser.parse_args()
    regimes = [] if args.output is None else list(itertools.product(SIZES, WRONG, EPOCHS))
    folders = [run_regime(args.output, args.methods, *regime) for regime in regimes]
    print_methods(folders)
    print()
    print_judgements([*folders, *args.folders])


if __name__ == "__main__":
    main()
