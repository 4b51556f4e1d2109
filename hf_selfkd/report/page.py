"""The report as one HTML page that needs nothing beside it: no network, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..cards import CardFacts
from ..cards.names import METRICS, metric
from ..cards.render import describe_method
from ..doctor.diagnosis import diagnose
from ..doctor.symptoms import symptoms_of
from ..markup import html_table, safe
from ..metrics.calibration import risk_coverage_of
from ..runs import Run, names_of
from .gallery import gallery
from .parts import figure, heading, with_code
from .svg import line_chart, reliability_chart


# What is logged, how its axis is called, and what it means; what is not known here is drawn under its own name.
CURVES = {
    "loss": ("Training loss", "Of the targets as they were, softened or not; nats a row."),
    "hard_loss": ("Hard loss", "Against the labels alone, on the training data; nats a row."),
    "eval_loss": ("Evaluation loss", "Against the labels, on held-out data."),
    "alpha": ("alpha", "Weight of the past in the targets."),
    "soft_loss": ("Soft loss", "Against the past predictions."),
    "target_entropy": ("Entropy of the targets", "Nats; 0 for hard labels. It rises as targets soften."),
    "past_agreement": ("Agreement with the past", "Share of rows where model and teacher name the same class."),
    "rows_with_history": ("Rows with a past", "Share of rows that had a past prediction to learn from."),
    "temperature": ("Fitted temperature", "Of held-out data; above 1 where the model is over-confident."),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "Before clipping."),
}
FIRST = ("loss", "hard_loss", "eval_loss", "alpha", "target_entropy", "past_agreement", "eval_accuracy", "eval_ece")


def make_page(runs: Sequence[Run], comparison: str = "", title: str | None = None) -> str:
    """
    The report of some trainings.

    Args:
        runs (`Sequence[Run]`): drawn together; each has its verdict.
        comparison (`str`, *optional*): HTML of the tables of `hf-selfkd compare`.
        title (`str`, *optional*): the names of the runs by default.
    """
    names = names_of(runs)
    title = title or " · ".join(names[:4]) + (" …" if len(names) > 4 else "")
    parts = [f"<h1>{safe(title)}</h1>", _opening(runs)]
    parts += [_verdict(run, name if len(runs) > 1 else "") for run, name in zip(runs, names, strict=True)]
    parts += [comparison, _results(runs, names), _calibration(runs, names), _curves(runs, names)]
    parts += [gallery(run, name if len(runs) > 1 else "") for run, name in zip(runs, names, strict=True)]
    parts += [_settings(run, name if len(runs) > 1 else "") for run, name in zip(runs, names, strict=True)]
    parts.append(f"<footer><p>Made by <code>hf-selfkd report</code>, hf_selfkd {__version__}.</p></footer>")
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _opening(runs: Sequence[Run]) -> str:
    facts = [run.facts for run in runs if run.facts is not None]
    if runs and not facts:
        told = "Without a model card the method of these runs is not known: trainer.create_model_card() writes one."
        return f'<p class="soft">{told}</p>'
    if not facts:
        return ""
    told = "".join(f"<p>{safe(line)}</p>" for line in dict.fromkeys(_model(one) for one in facts))
    return told + (f"<p>{with_code(describe_method(facts[0]))}</p>" if len(runs) == 1 else "")


def _model(facts: CardFacts) -> str:
    size = f", {facts.parameters:,} parameters" if facts.parameters else ""
    samples = facts.data.get("samples")
    return f"{facts.model_class}{size}{f', trained on {samples:,} samples' if samples else ''}."


def _verdict(run: Run, name: str) -> str:
    sentences = "".join(f"<p>{with_code(sentence)}</p>" for sentence in diagnose(symptoms_of(run)))
    return f'<section class="verdict">{f"<strong>{safe(name)}</strong>" if name else ""}{sentences}</section>'


def _results(runs: Sequence[Run], names: Sequence[str]) -> str:
    """One table: a column for each split of each run."""
    columns = {}
    for run, name in zip(runs, names, strict=True):
        for one in run.evaluations:
            columns[f"{name}, {one.split}" if len(runs) > 1 else one.split] = one.metrics
    known = {key for metrics in columns.values() for key in metrics}
    few = all(found.get("top5_accuracy", 1) == 1 for found in columns.values())  # classes: it is always right
    known -= {"temperature"} | ({"top5_accuracy"} if few else set())
    keys = [key for key in METRICS if key in known] + sorted(known - METRICS.keys())
    body = [
        [
            metric(key).name,
            *(metric(key).shown(found[key]) if _finite(found.get(key)) else "" for found in columns.values()),
        ]
        for key in keys
    ]
    return "<h2>Results</h2>" + html_table(["", *columns], body) if columns else ""


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    figures: dict[bool, list[str]] = {True: [], False: []}
    logged = list(dict.fromkeys(key for run in runs for key in run.logged()))
    for key in [*(key for key in CURVES if key in logged), *(key for key in logged if key not in CURVES)]:
        known = metric(key.removeprefix("eval_"))
        label, words = CURVES.get(key, (known.name if key.startswith("eval_") else key, ""))
        factor = known.factor if key.startswith("eval_") else 1
        lines = {name: run.curve(key) * (1, factor) for run, name in zip(runs, names, strict=True)}
        lines = {name: line for name, line in lines.items() if len(line) > 1}
        if any(np.ptp(line[:, 1]) or (key == "alpha" and line[:, 1].any()) for line in lines.values()):
            drawing = line_chart(lines, "Step", from_zero=key == "alpha")
            figures[key in FIRST].append(figure(drawing, label, words))
    shown, folded = (f'<div class="charts">{"".join(figures[first])}</div>' for first in (True, False))
    more = f"<details><summary>More curves</summary>{folded}</details>" if figures[False] else ""
    return f"<h2>Curves</h2>{shown if figures[True] else ''}{more}" if figures[True] or figures[False] else ""


def _calibration(runs: Sequence[Run], names: Sequence[str]) -> str:
    figures = []
    for run, name in zip(runs, names, strict=True):
        for one in run.evaluations:
            if one.reliability and sum(one.reliability["count"]):
                caption = f"{name}, split {one.split}" if len(runs) > 1 else f"Split {one.split}"
                words = "Bars: accuracy. Dashed: the gap to the confidence. A calibrated model follows the diagonal."
                figures.append(figure(reliability_chart(one.reliability), caption, words))
    rows = {name: run.rows for run, name in zip(runs, names, strict=True) if run.rows is not None}
    if rows:
        curves = {name: risk_coverage_of(row["confidence"], row["correct"]) for name, row in rows.items()}
        lines = {
            f"{name} (AURC {curve.aurc:.1f})": np.stack((100 * curve.coverage, 100 * curve.risk), axis=1)
            for name, curve in curves.items()
        }
        words = "Error rate among the samples that the model is surest of: low and flat is good."
        drawing = line_chart(lines, "Coverage, %", "Error, %", from_zero=True)
        aurc = "" if len(lines) > 1 else f" AURC {next(iter(curves.values())).aurc:.1f}."
        figures.append(figure(drawing, "Risk and coverage, test", words + aurc))
    return f'<h2>Confidence</h2><div class="charts">{"".join(figures)}</div>' if figures else ""


def _settings(run: Run, name: str) -> str:
    if run.facts is None or not run.facts.settings:
        return ""
    body = [
        [key, f"{value:g}" if isinstance(value, float) else str(value)] for key, value in run.facts.settings.items()
    ]
    return heading("Settings", name) + html_table(["", "value"], body)
