"""What a training left in its folder, read again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .cards import CardFacts, Evaluation
from .cards.names import NOT_METRICS, measured
from .comparison.cells import read_rows


# The underscore keeps the file from the Hub: it shows training samples.
SAMPLES_FILE = "_selfkd_samples.json"
COPYING = 5  # seconds by which files of a copied folder may be older than they were


@dataclass
class Run:
    """
    A training that is over.

    Args:
        folder (`Path`): its output folder.
        log (`list[dict]`): what was logged, entry by entry, each with its `step`.
        results (`dict`): the last metrics of each split, by their names with the prefix.
        facts ([`CardFacts`], *optional*): of the model card.
        samples (`dict`, *optional*): what [`save_samples`] wrote.
        rows (`dict[str, np.ndarray]`, *optional*):
            `label_probability`, `confidence` and `correct` of each test sample, of `predictions.csv`.
    """

    folder: Path
    log: list[dict[str, Any]]
    results: dict[str, Any] = field(default_factory=dict)
    facts: CardFacts | None = None
    samples: dict[str, Any] | None = None
    rows: dict[str, np.ndarray] | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """
        Read a folder that `hf-selfkd train`, or a trainer with `save_state()`, wrote.

        Raises:
            ValueError: if it holds no training.
        """
        folder = Path(folder)
        state = folder / "trainer_state.json"
        if not state.is_file():
            found = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
            if not found:
                raise ValueError(
                    f"{folder} has no trainer_state.json: choose the --output_dir of a training (in Python, call "
                    "trainer.save_state() after train())."
                )
            state = found[-1]

        def newer(name: str) -> Path | None:
            """A file that this training wrote, and not an earlier one into the same folder."""
            path = folder / name
            return path if path.is_file() and path.stat().st_mtime > state.stat().st_mtime - COPYING else None

        results, samples, predictions = map(newer, ("all_results.json", SAMPLES_FILE, "predictions.csv"))
        found = _read(results) if results else {}
        if predictions is None:  # then those of `all_results.json` may be of an earlier training
            found = {name: value for name, value in found.items() if not name.startswith("predict_")}
        return cls(
            folder,
            _read(state).get("log_history", []),
            found,
            CardFacts.find(folder),
            _read(samples) if samples else None,
            read_rows(predictions) if predictions else None,
        )

    @property
    def name(self) -> str:
        """`str`: of its folder."""
        return self.folder.resolve().name

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """`list[Evaluation]`: of the model as it is now, the test set last."""
        if self.facts is not None and self.facts.evaluations:
            return sorted(self.facts.evaluations, key=lambda one: one.split == "test")
        found = [(prefix, measured(self.results, prefix)) for prefix in ("eval", "predict")]
        if not any(metrics for _, metrics in found):
            last = next((entry for entry in reversed(self.log) if "eval_loss" in entry), {})
            found = [("eval", measured(last, "eval"))]
        return [
            Evaluation("test" if prefix == "predict" else prefix, metrics, self.results.get(f"{prefix}_samples"))
            for prefix, metrics in found
            if metrics
        ]

    def curve(self, name: str) -> np.ndarray:
        """What was logged under a name: an array `[n, 2]` of steps and finite values."""
        points = [
            (entry["step"], entry[name])
            for entry in self.log
            if isinstance(entry.get(name), (int, float)) and "step" in entry and np.isfinite(entry[name])
        ]
        return np.array(points, dtype=float).reshape(-1, 2)

    def logged(self) -> list[str]:
        """The names of everything that was logged more than once, in the order in which they appeared."""
        names = dict.fromkeys(name for entry in self.log for name in entry)
        left_out = {"step", *NOT_METRICS}
        return [name for name in names if name.removeprefix("eval_") not in left_out and len(self.curve(name)) > 1]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): it was cut off or changed; train again.") from None


def find_runs(folder: str | Path) -> list[Path]:
    """
    The folders of trainings that a path stands for: itself, or the cells of a comparison whose models were kept.

    Raises:
        ValueError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: choose the --output_dir of a training or the --folder of compare.")
    cells = sorted(path.parent for path in folder.glob("*/model/trainer_state.json"))
    return cells or [folder]
