"""What a comparison says: a table, differences with intervals, and a verdict in words; Markdown, JSON and HTML."""

from __future__ import annotations

import json
import math
import statistics as means
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..cards.facts import finite
from ..cards.names import METRICS, metric
from ..markup import html_table, markdown_table, safe
from .cells import Cell
from .methods import BASELINE
from .statistics import Difference, compare, figures


def summarize(cells: Sequence[Cell], baseline: str = BASELINE) -> dict[str, Any]:
    """
    The figures of each method, its differences from the baseline, and the verdicts.

    Args:
        cells (`Sequence[Cell]`): the finished runs.
        baseline (`str`, *optional*): the method that the others are compared with.
    """
    methods = list(dict.fromkeys(cell.method for cell in cells))
    known = [{name for name in figures(cell) if name in METRICS and name != "loss"} for cell in cells]
    names = [name for name in METRICS if all(name in part for part in known)]
    rows = []
    for method in methods:
        own = [figures(cell) for cell in cells if cell.method == method]
        seconds = [cell.metrics["train_seconds"] for cell in cells if cell.method == method]
        found = compare(cells, method, baseline) if method != baseline and baseline in methods else {}
        differences = {name: part for name, part in found.items() if name in names}
        rows.append(
            {
                "method": method,
                "seeds": len(own),
                "figures": {name: _spread([part[name] for part in own]) for name in names},
                "train_seconds": means.mean(seconds) if None not in seconds else None,
                "differences": {name: asdict(part) for name, part in differences.items()},
                "verdict": verdict(method, differences, len(own)) if differences else "",
            }
        )
    return {"baseline": baseline, "names": names, "methods": rows}


def _spread(values: list[float]) -> dict[str, float | None]:
    return {"mean": means.mean(values), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def verdict(method: str, differences: dict[str, Difference], seeds: int) -> str:
    """What can be said of a method against the baseline, and what cannot."""
    better, worse = [], []
    for name, difference in differences.items():
        if difference.clear:
            known = metric(name)
            sign = -1 if known.lower else 1
            shown = f"{known.name} {known.factor * difference.mean:+.{known.digits}f}"
            (better if sign * difference.mean > 0 else worse).append(shown)
    parts = [f"{word} in {', '.join(found)}" for word, found in (("better", better), ("worse", worse)) if found]
    said = " and ".join(parts) if parts else "nothing can be concluded: every interval holds 0"
    limit = ""
    if seeds < 3:
        limit = f" With {seeds} seed{'s' if seeds > 1 else ''}, another seed may say otherwise: run at least 3."
    return f"{method}: {said}.{limit}"


def _figure(name: str, spread: dict[str, float | None]) -> str:
    return metric(name).with_spread(spread["mean"], spread["std"])


def _difference(name: str, part: dict[str, Any]) -> str:
    known = metric(name)
    values = [f"{known.factor * part[key]:+.{known.digits}f}" for key in ("mean", "low", "high")]
    if not math.isfinite(part["low"]):
        return values[0]
    return f"{values[0]} ({values[1]} to {values[2]})"


def tables(summary: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """The figures, and the differences from the baseline, each as a head and rows of text."""
    names, rows = summary["names"], summary["methods"]
    head = ["method", "seeds", *(metric(name).name for name in names), "seconds"]
    body = []
    for row in rows:
        seconds = "" if row["train_seconds"] is None else f"{row['train_seconds']:.0f}"
        cells = [_figure(name, row["figures"][name]) for name in names]
        body.append([row["method"], str(row["seeds"]), *cells, seconds])
    against = [row for row in rows if row["differences"]]
    found = [name for name in names if all(name in row["differences"] for row in against)]
    gaps = [[row["method"], *(_difference(name, row["differences"][name]) for name in found)] for row in against]
    tables = [(head, body)]
    if gaps:
        tables.append(([f"minus {summary['baseline']}, 95 % interval", *(metric(name).name for name in found)], gaps))
    return tables


def verdicts(summary: dict[str, Any]) -> list[str]:
    """A sentence a method."""
    return [row["verdict"] for row in summary["methods"] if row["verdict"]]


def markdown(summary: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    parts = [markdown_table(head, body) for head, body in tables(summary)]
    return "\n\n".join([*parts, "\n".join(f"- {text}" for text in verdicts(summary))]).strip() + "\n"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #8886; padding: .35rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


def html_tables(summary: dict[str, Any]) -> str:
    """The tables and verdicts of a comparison, as HTML within a page."""
    said = "".join(f"<li>{safe(text)}</li>" for text in verdicts(summary))
    return "".join(html_table(head, body) for head, body in tables(summary)) + f"<ul>{said}</ul>"


def page(summary: dict[str, Any], title: str) -> str:
    """The comparison as one HTML page that needs nothing beside it."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title><style>{_STYLE}</style>"
        f"<body><h1>{safe(title)}</h1>{html_tables(summary)}</body></html>\n"
    )


def write(summary: dict[str, Any], folder: Path, title: str) -> list[Path]:
    """Write `comparison.md`, `comparison.json` and `comparison.html`."""
    texts = {
        "md": markdown(summary),
        "json": json.dumps(finite(summary), indent=2) + "\n",
        "html": page(summary, title),
    }
    paths = []
    for ending, text in texts.items():
        paths.append(folder / f"comparison.{ending}")
        paths[-1].write_text(text, encoding="utf-8")
    return paths
