"""Writing the report of trainings or of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..comparison.report import html_tables
from ..runs import Run, find_runs, read_json
from .page import make_page


COMPARISON = "comparison.json"
REPORT = "_report.html"  # the underscore keeps the page from the Hub: it shows training samples


def write_report(
    folders: str | Path | Sequence[str | Path], output: str | Path | None = None, title: str | None = None
) -> Path:
    """
    Write one HTML page about trainings that are over.

    Args:
        folders (`str`, `Path` or a sequence of them):
            their output folders, or that of `hf-selfkd compare`, whose tables are shown, and its models if they were
            kept.
        output (`str` or `Path`, *optional*): the page; `_report.html` in the first folder by default, which uploads
            leave out.
        title (`str`, *optional*): the names of the runs by default.

    Returns:
        `Path`: of the page.

    Raises:
        ValueError: if a folder holds no training.
    """
    given = [folders] if isinstance(folders, (str, Path)) else folders
    folders, comparison, runs = list(dict.fromkeys(Path(folder) for folder in given)), "", []
    for folder in folders:
        compared = (folder / COMPARISON).is_file()
        comparison += html_tables(read_json(folder / COMPARISON, "methods", "names")) if compared else ""
        runs += [Run.load(path) for path in find_runs(folder) if not (compared and path == folder)]
    if not runs and not comparison:
        raise ValueError("no training given: name at least one output folder.")
    path = folders[0] / REPORT if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make_page(runs, comparison, title or (folders[0].name if comparison else None)), encoding="utf-8")
    return path
