"""What a training left in its folder, read again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
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
STATE = "trainer_state.json"
EVALUATION = re.compile(r"eval(_\w+)?_loss$")


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
        log = _log_of(folder)
        facts = CardFacts.find(folder)
        if facts is not None and not _is_of(facts, log):
            facts = None
        found = folder / "all_results.json"
        results = read_json(found) if found.is_file() else {}
        if results.get("train_runtime") not in (None, *(entry.get("train_runtime") for entry in log)):
            results = {}
        samples = folder / SAMPLES_FILE
        told = (
            read_json(samples, "samples", "epochs", "per_token", "histogram", "suspicious")
            if samples.is_file()
            else None
        )
        rows = read_rows(folder / "predictions.csv") if (folder / "predictions.csv").is_file() else None
        run = cls(folder, log, results, facts, told)
        tested = next((one.metrics.get("accuracy") for one in run.evaluations if one.split == "test"), None)
        if rows is not None and tested is not None and abs(rows["correct"].mean() - tested) < 1e-6:
            run.rows = rows
        return run

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """`list[Evaluation]`: of the model as it is now, the test set last."""
        if self.facts is not None and self.facts.evaluations:
            return sorted(self.facts.evaluations, key=lambda one: one.split == "test")
        found = [(prefix, measured(self.results, prefix)) for prefix in ("eval", "predict")]
        if not any(metrics for _, metrics in found):
            found = list(self._logged_evaluations())
        return [
            Evaluation("test" if prefix == "predict" else prefix, metrics, self.results.get(f"{prefix}_samples"))
            for prefix, metrics in found
            if metrics
        ]

    def _logged_evaluations(self) -> Iterator[tuple[str, dict[str, float]]]:
        """The last logged metrics of each evaluation set."""
        prefixes = {name.removesuffix("_loss"): None for entry in self.log for name in entry if EVALUATION.match(name)}
        for prefix in prefixes:
            last = next(entry for entry in reversed(self.log) if f"{prefix}_loss" in entry)
            yield prefix, measured(last, prefix)

    @property
    def diverged_at(self) -> int | None:
        """`int`: the first step whose training loss was not a number, if there is one."""
        bad = [entry["step"] for entry in self.log if "step" in entry and not np.isfinite(entry.get("loss", 0.0))]
        return min(bad, default=None)

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


def _log_of(folder: Path) -> list[dict[str, Any]]:
    """What the training of a folder logged: that of the end, or of the newest checkpoint if it never came there."""
    end, checkpoints = folder / STATE, sorted(folder.glob(f"checkpoint-*/{STATE}"), key=_written)
    if not end.is_file() and not checkpoints:
        raise ValueError(
            f"{folder} has no {STATE}: choose the --output_dir of a training (in Python, call trainer.save_state() "
            "after train())."
        )
    if not end.is_file():
        return _logged(checkpoints[-1])
    whole = _logged(end)
    if checkpoints and _written(checkpoints[-1]) > _written(end):
        part = _logged(checkpoints[-1])
        # An earlier part of the same training begins in the same way, whatever the times of the files are.
        return whole if part[:2] == whole[:2] else part
    return whole


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _logged(state: Path) -> list[dict[str, Any]]:
    return read_json(state, "log_history")["log_history"]


def _is_of(facts: CardFacts, log: list[dict[str, Any]]) -> bool:
    """Whether a card is of the training that logged this, and not of another one into the same folder."""
    seconds = facts.training.get("seconds")
    return seconds is None or seconds in [entry.get("train_runtime") for entry in log]


def read_json(path: Path, *names: str) -> dict[str, Any]:
    """
    Read an object.

    Raises:
        ValueError: if the file holds something else, or lacks one of these names.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): it was cut off or changed; make it again.") from None
    if not isinstance(found, dict) or not set(names) <= found.keys():
        raise ValueError(f"{path} is not what hf_selfkd or transformers write: it lacks {', '.join(names)}.")
    return found


def find_runs(folder: str | Path) -> list[Path]:
    """
    The folders of trainings that a path stands for: itself, or the cells of a comparison whose models were kept.

    Raises:
        ValueError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: choose the --output_dir of a training or the --folder of compare.")
    if (folder / STATE).is_file() or list(folder.glob(f"checkpoint-*/{STATE}")):
        return [folder]
    cells = sorted(path.parent for pattern in (f"model/{STATE}", f"*/model/{STATE}") for path in folder.glob(pattern))
    return cells or [folder]


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name a run, the shortest end of its path that tells it from the others."""
    paths = [run.folder.resolve().parts for run in runs]
    paths = [path[:-1] if path[-1] == "model" else path for path in paths]  # of a comparison's cells
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]
