"""The cells of a comparison: one training each, in a process of its own; finished ones are used again."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cards.names import measured
from .methods import METHODS


RUNS_FILE = "runs.jsonl"
ROWS_FILE = "rows.npz"
OWN_FLAGS = ("--output_dir", "--seed")


@dataclass
class Cell:
    """One training of a comparison, and what it gave."""

    method: str
    seed: int
    metrics: dict[str, float]
    rows: dict[str, np.ndarray] | None = None  # `label_probability`, `confidence` and `correct` of each test sample


@dataclass
class Comparison:
    """
    A comparison in a folder: `runs.jsonl` with a line a run, and a folder of each cell.

    Args:
        task (`str`): a task of `hf-selfkd train`.
        words (`Sequence[str]`): settings file and flags that all methods share.
        folder (`Path`): where runs and cells are kept.
        keep_models (`bool`): whether the trained models stay.
    """

    task: str
    words: Sequence[str]
    folder: Path
    keep_models: bool = False

    def __post_init__(self):
        given = [flag for flag in OWN_FLAGS if any(word.split("=")[0] == flag for word in self.words)]
        if given:
            raise ValueError(f"{' and '.join(given)}: every run has its own; use --folder and --seeds of compare.")

    @property
    def settings(self) -> str:
        """`str`: what tells whether finished runs are of these settings: flags, and the text of the settings file."""
        digest = hashlib.sha256(json.dumps([self.task, *self.words]).encode())
        for word in self.words[:1]:
            if Path(word).is_file():
                digest.update(Path(word).read_bytes())
        return digest.hexdigest()[:16]

    def place(self, method: str, seed: int) -> Path:
        """The folder of a cell."""
        return place_of(self.folder, method, seed)

    def finished(self) -> list[Cell]:
        """
        The runs that are done.

        Raises:
            ValueError: if some are of other settings.
        """
        cells, settings = read_cells(self.folder)
        if settings - {self.settings}:
            raise ValueError(
                f"{self.folder / RUNS_FILE} has runs of other settings: choose another --folder, or delete this one "
                "to start again."
            )
        return cells

    def run_missing(self, methods: Sequence[str], seeds: Sequence[int], tell: Callable[[str], None]) -> list[Cell]:
        """
        Train what is not done yet, one after the other.

        Raises:
            ValueError: if a training fails; the message names its log.
        """
        done = {(cell.method, cell.seed) for cell in self.finished()}
        missing = [(method, seed) for seed in seeds for method in methods if (method, seed) not in done]
        tell(f"{len(methods) * len(seeds) - len(missing)} of {len(methods) * len(seeds)} runs are done already.")
        begin = time.perf_counter()
        for number, (method, seed) in enumerate(missing, 1):
            start = time.perf_counter()
            self._train(method, seed)
            now = time.perf_counter()
            left = (now - begin) / number * (len(missing) - number)
            to_come = f"; about {left / 60:.0f} min to come" if left > 30 else ""
            tell(f"{number} of {len(missing)}: {method}, seed {seed}, {now - start:.0f} s{to_come}")
        wanted = {(method, seed) for method in methods for seed in seeds}
        return [cell for cell in self.finished() if (cell.method, cell.seed) in wanted]

    def _train(self, method: str, seed: int) -> None:
        place = self.place(method, seed)
        shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
        place.mkdir(parents=True)
        words = [*self.words, "--do_train", "--do_eval", "--report_to", "none", "--push_to_hub", "False"]
        words += METHODS[method]
        words += ["--seed", str(seed), "--output_dir", str(place / "model")]
        with (place / "log.txt").open("w") as log:
            command = [sys.executable, "-m", "hf_selfkd", "train", self.task, *words]
            failed = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if failed:
            lines = (place / "log.txt").read_text(errors="replace").strip().splitlines()
            raise ValueError(f"{method}, seed {seed} failed ({place / 'log.txt'}): {lines[-1] if lines else failed}")
        self._record(method, seed, place)

    def _record(self, method: str, seed: int, place: Path) -> None:
        found = json.loads((place / "model" / "all_results.json").read_text())
        metrics = measured(found, "predict") or measured(found, "eval")  # a test set may have no labels
        run: dict[str, Any] = {"method": method, "seed": seed, "settings": self.settings, **metrics}
        run["train_seconds"] = found.get("train_runtime")
        predictions = place / "model" / "predictions.csv"
        if predictions.is_file():
            rows = read_rows(predictions)
            if rows is not None:
                np.savez(place / ROWS_FILE, **rows)
        if not self.keep_models:
            shutil.rmtree(place / "model")
        with (self.folder / RUNS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


def place_of(folder: Path, method: str, seed: int) -> Path:
    """The folder of a cell."""
    return folder / f"{method}_{seed}"


def read_cells(folder: Path) -> tuple[list[Cell], set[str]]:
    """The runs of a comparison that are done, and the settings that they are of."""
    path, cells, settings = folder / RUNS_FILE, [], set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        run = json.loads(line)
        settings.add(run.pop("settings"))
        method, seed = run.pop("method"), run.pop("seed")
        rows = place_of(folder, method, seed) / ROWS_FILE
        cells.append(Cell(method, seed, run, dict(np.load(rows)) if rows.is_file() else None))
    return cells, settings


def read_rows(path: Path) -> dict[str, np.ndarray] | None:
    """What `predictions.csv` says of each sample; `None` if it has no labels."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"prediction", "label", "confidence", "label_probability"} <= rows[0].keys():
        return None
    numbers = {name: np.array([float(row[name]) for row in rows]) for name in ("label_probability", "confidence")}
    if not all(np.isfinite(values).all() for values in numbers.values()):
        return None  # of a training that went astray: the metrics say so
    return numbers | {"correct": np.array([row["prediction"] == row["label"] for row in rows])}
