"""`hf-selfkd report`: one HTML page of trainings that are over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import one_line_errors


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of trainings, or the --folder of a comparison.")],
    output: Annotated[Path | None, typer.Option(help="The page; _report.html in the first folder by default.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; the names of the runs by default.")] = None,
) -> None:
    """
    Write one HTML page: verdict, results, curves, confidence, and the training samples that look wrong.

    The page needs no network and no script. It shows training samples: mind whom you send it to. Under its own name,
    _report.html, no upload takes it along.

    hf-selfkd report outputs/texts

    hf-selfkd report outputs/plain outputs/history --output report.html
    """
    from ..report.writing import write_report

    with one_line_errors():
        typer.echo(f"Wrote {write_report(runs, output, title)}")
