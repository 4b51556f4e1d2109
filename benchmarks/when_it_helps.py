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
    """The means of a method over its seeds; nothing where a figure is missing."""
    known = {"accuracy", "ece", "nll", "aurc"}
    of_method = [row for row in rows if row.get("method") == method and known <= row.keys()]
    figures = [row | {"error": 100 * (1 - row["accuracy"])} for row in of_method]
    return {name: statistics.mean(row[name] for row in figures) for name in ("ece", *FIGURES)} if figures else {}


def points(rows: list[dict]) -> dict[str, tuple[float, dict[str, float]]]:
    """For each method that is shown: ECE of plain training, and per cent of each figure that the method takes off."""
    found: dict[str, tuple[float, dict[str, float]]] = {}
    plain = means(rows, "plain")
    for method in SHOWN if plain else ():
        reached = means(rows, method)
        if reached:
            gains = {name: 100 * (1 - reached[name] / plain[name]) for name in FIGURES}
            found[SHOWN[method][0]] = (plain["ece"], gains)
    return found


def draw(settings: list[dict[str, tuple[float, dict[str, float]]]]) -> Figure:
    """A panel a figure."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, len(FIGURES))
    for axes, (name, title) in zip(panels, FIGURES.items(), strict=True):
        for label, colour, marker in dict.fromkeys(SHOWN.values()):
            values = [setting[label] for setting in settings if label in setting]
            x, y = [ece for ece, _ in values], [gains[name] for _, gains in values]
            axes.scatter(x, y, c=colour, marker=marker, s=34, label=label, alpha=0.85)
        axes.axhline(0, color="#555555", linewidth=1)
        axes.set(xlabel="ECE of plain training, %", ylabel=f"{title} taken off, %")
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
