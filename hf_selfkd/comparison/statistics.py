"""Figures of methods with their spread, and intervals of their differences from a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics.calibration import reliability_of, risk_coverage_of
from .cells import Cell


DRAWS = 1000
# Two-sided 95 % quantiles of Student's distribution by degrees of freedom: seeds are few.
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Rows = dict[str, np.ndarray]


def error(rows: Rows) -> float:
    """Share of samples that are told wrongly, in per cent."""
    return 100 * (1 - float(rows["correct"].mean()))


def nll(rows: Rows) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return float(-np.log(rows["label_probability"].clip(1e-12)).mean())


def ece(rows: Rows, bins: int = 10) -> float:
    """Expected calibration error in per cent, of equal, right-closed bins."""
    if not np.isfinite(rows["confidence"]).all():
        return math.nan
    return reliability_of(rows["confidence"], rows["correct"], bins).ece


def aurc(rows: Rows) -> float:
    """Area under the risk-coverage curve, x1000."""
    return risk_coverage_of(rows["confidence"], rows["correct"]).aurc


FIGURES: dict[str, Callable[[Rows], float]] = {"error": error, "nll": nll, "ece": ece, "aurc": aurc}


@dataclass
class Difference:
    """How much a figure of a method differs from that of the baseline: mean over seeds, with a 95 % interval."""

    mean: float
    low: float
    high: float
    by: str  # what the interval is made of

    @property
    def clear(self) -> bool:
        """`bool`: whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def compare(cells: Sequence[Cell], method: str, baseline: str) -> dict[str, Difference]:
    """
    The differences of a method from the baseline, for each figure, over the seeds that both have.

    With predictions of each sample: a paired bootstrap over samples, the same for all runs, or Student's interval over
    the differences of the seeds, whichever reaches further on a side; a bootstrap over a few seeds would be far too
    narrow. Without: Student's interval, of the metrics that both report.
    """
    runs = {(cell.method, cell.seed): cell for cell in cells}
    seeds = sorted(seed for name, seed in runs if name == method and (baseline, seed) in runs)
    pairs = [(runs[method, seed], runs[baseline, seed]) for seed in seeds]
    if not pairs:
        return {}
    if all(cell.rows is not None for pair in pairs for cell in pair):
        return _bootstrap(pairs)
    return _over_seeds(pairs)


def _bootstrap(pairs: list[tuple[Cell, Cell]]) -> dict[str, Difference]:
    rng, count = np.random.default_rng(0), len(pairs[0][0].rows["correct"])
    drawn: dict[str, list[float]] = {name: [] for name in FIGURES}
    for _ in range(DRAWS):
        samples = rng.integers(count, size=count)
        parts = [[_taken(cell.rows, samples) for cell in pair] for pair in pairs]
        for name, figure in FIGURES.items():
            drawn[name].append(float(np.mean([figure(own) - figure(base) for own, base in parts])))
    by = "samples and seeds" if len(pairs) > 1 else "samples; one seed"
    result = {}
    for name, figure in FIGURES.items():
        gaps = [figure(own.rows) - figure(base.rows) for own, base in pairs]
        mean, half = float(np.mean(gaps)), _student(gaps) if len(gaps) > 1 else 0.0
        low, high = np.percentile(drawn[name], [2.5, 97.5])
        result[name] = Difference(mean, min(float(low), mean - half), max(float(high), mean + half), by)
    return result


def _student(gaps: list[float]) -> float:
    """Half of Student's 95 % interval of a mean."""
    return T95[min(len(gaps) - 1, len(T95) - 1)] * float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps))


def _taken(rows: Rows, samples: np.ndarray) -> Rows:
    return {name: values[samples] for name, values in rows.items()}


def _over_seeds(pairs: list[tuple[Cell, Cell]]) -> dict[str, Difference]:
    from ..cards.names import METRICS

    result = {}
    for name in METRICS:
        gaps = [
            own.metrics[name] - base.metrics[name]
            for own, base in pairs
            if name in own.metrics and name in base.metrics
        ]
        if len(gaps) < len(pairs):
            continue
        mean, half = float(np.mean(gaps)), _student(gaps) if len(gaps) > 1 else math.inf
        result[name] = Difference(mean, mean - half, mean + half, "seeds" if len(gaps) > 1 else "one seed")
    return result


def figures(cell: Cell) -> dict[str, float]:
    """The figures of a run: of each sample where these are known, else the metrics that were reported."""
    if cell.rows is not None:
        return {name: figure(cell.rows) for name, figure in FIGURES.items()}
    return dict(cell.metrics)
