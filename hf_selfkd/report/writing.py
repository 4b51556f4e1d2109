"""Writing the report of trainings or of a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..comparison.report import html_tables
from ..runs import Run, find_runs
from .page import make_page


COMPARISON = "comparison.json"


def write_report(folders: Sequence[str | Path], output: str | Path | None = None, title: str | None = None) -> Path:
    """
    Write one HTML page about trainings that are over.

    Args:
        folders (`Sequence` of `str` or `Path`):
            their output folders, or that of `hf-selfkd compare`, whose tables are shown, and its models if they were
            kept.
        output (`str` or `Path`, *optional*): the page; `report.html` in the first folder by default.
        title (`str`, *optional*): the names of the runs by default.

    Returns:
        `Path`: of the page.

    Raises:
        ValueError: if a folder holds no training.
    """
    folders, comparison, runs = [Path(folder) for folder in folders], "", []
    for folder in folders:
        if (folder / COMPARISON).is_file():
            comparison += html_tables(json.loads((folder / COMPARISON).read_text(encoding="utf-8")))
            runs += [Run.load(path) for path in find_runs(folder) if path != folder]
        else:
            runs += [Run.load(path) for path in find_runs(folder)]
    if not runs and not comparison:
        raise ValueError("no training given: name at least one output folder.")
    path = folders[0] / "report.html" if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make_page(runs, comparison, title or (folders[0].name if comparison else None)), encoding="utf-8")
    return path
