"""The runs of a comparison, from the JSON lines that benchmarks write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .names import METRICS


def read_comparison(path: str | Path) -> list[dict[str, Any]]:
    """
    Runs with `method`, `seed` and the metrics that a card knows.

    Raises:
        ValueError: naming the file and the line that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a file of JSON lines, one run each.")
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            run = json.loads(line)
            kept = {"method": str(run["method"]), "seed": run["seed"]}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"line {number} of {path} is no run ({error}): each needs method, seed and metrics, as JSON."
            ) from None
        figures = {name: value for name, value in run.items() if name in METRICS and value is not None}
        wrong = [
            name for name, value in figures.items() if isinstance(value, bool) or not isinstance(value, (int, float))
        ]
        if wrong:
            raise ValueError(f"line {number} of {path}: {wrong[0]}={figures[wrong[0]]!r} is no number.")
        runs.append(kept | figures)
    if not runs:
        raise ValueError(f"{path} has no runs: give a file of JSON lines, one run each.")
    return runs
