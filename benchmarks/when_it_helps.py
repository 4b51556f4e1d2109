"""
The picture of docs/when_it_helps.md: what each method gains over plain training, against how far the confidence of
plain training is from its accuracy, drawn from every log of docs/results that has both.

    python benchmarks/when_it_helps.py
"""

from __future__ import annotations

import statistics
from pathlib import Path

from comparison import read_results
from matplotlib.figure import Figure


DOCS = Path(__file__).parents[1] / "docs"
FIGURES = {"error": "error", "nll": "NLL", "aurc": "AURC"}
SHOWN = {  # by the method of a log: name, colour, marker
    "label smoothing 0.1": ("label smoothing 0.1", "#999999", "x"),
    "label-smoothing": ("label smoothing 0.1", "#999999", "x"),
    "PS-KD history": ("PS-KD", "#0072B2", "o"),
    "history": ("PS-KD", "#0072B2", "o"),
    "PS-KD calibrated": ("PS-KD, calibrated", "#56B4E9", "^"),
    "calibrated": ("PS-KD, calibrated", "#56B4E9", "^"),
    "sla": ("sla", "#D55E00", "D"),  # of `hf-selfkd compare`, at alpha 0; elsewhere the next is there too
    "sla, alpha 0": ("sla", "#D55E00", "D"),
    "lsskd, alpha 0": ("lsskd", "#E69F00", "v"),
    "rank": ("rank", "#009E73", "s"),
}


def means(rows: list[dict], method: str) -> dict[str, float]:
    """The means of a method's figures over its seeds; nothing where one is missing."""
    known = {"accuracy", "ece", "nll", "aurc"}
    of_method = [row for row in rows if row.get("method") == method and known <= row.keys()]
    figures = [row | {"error": 100 * (1 - row["accuracy"])} for row in of_method]
    shared = set.intersection(*map(set, figures)) if figures else set()
    told = ("ece", "accuracy", *FIGURES, "confidence", "temperature")
    return {name: statistics.mean(row[name] for row in figures) for name in told if name in shared}


def overconfidence(rows: list[dict], plain: dict[str, float]) -> float:
    """
    Per cent by which plain training is surer than right, below 0 where it is too modest. Logs that tell no confidence
    have the ECE for it, with the sign of the fitted temperature or, without one, of what softer targets do to the ECE.
    """
    if "confidence" in plain:
        return 100 * (plain["confidence"] - plain["accuracy"])
    if "temperature" in plain:
        return plain["ece"] if plain["temperature"] > 1 else -plain["ece"]
    softer = next(filter(None, (means(rows, method) for method in ("label smoothing 0.1", "PS-KD history"))), plain)
    return plain["ece"] if softer["ece"] <= plain["ece"] else -plain["ece"]


def points(rows: list[dict]) -> dict[str, tuple[float, dict[str, float]]]:
    """For each method that is shown: how over-confident plain training is, and per cent of each figure taken off."""
    found: dict[str, tuple[float, dict[str, float]]] = {}
    plain = means(rows, "plain")
    for method in SHOWN if plain else ():
        reached = means(rows, method)
        if reached:
            gains = {name: 100 * (1 - reached[name] / plain[name]) for name in FIGURES}
            found[SHOWN[method][0]] = (overconfidence(rows, plain), gains)
    return found


def draw(settings: list[dict[str, tuple[float, dict[str, float]]]]) -> Figure:
    """A panel a figure."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, len(FIGURES))
    for axes, (name, title) in zip(panels, FIGURES.items(), strict=True):
        for label, colour, marker in dict.fromkeys(SHOWN.values()):
            values = [setting[label] for setting in settings if label in setting]
            x, y = [gap for gap, _ in values], [gains[name] for _, gains in values]
            axes.scatter(x, y, c=colour, marker=marker, s=34, label=label, alpha=0.85)
        axes.axhline(0, color="#555555", linewidth=1)
        axes.axvline(0, color="#555555", linewidth=1, linestyle=":")
        axes.set(xlabel="confidence of plain training above its accuracy, %", ylabel=f"{title} taken off, %")
        if name == "nll":
            axes.set_ylim(bottom=-60)
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    settings = [points(read_results(path)) for path in sorted((DOCS / "results").glob("*.jsonl"))]
    draw(settings).savefig(DOCS / "when_it_helps.png", dpi=110)
    for label in dict.fromkeys(name for name, _, _ in SHOWN.values()):
        gains = [setting[label][1] for setting in settings if label in setting]
        lower = ", ".join(f"{title} in {sum(gain[name] > 0 for gain in gains)}" for name, title in FIGURES.items())
        print(f"{label}: {len(gains)} settings; lower {lower}")


if __name__ == "__main__":
    main()
