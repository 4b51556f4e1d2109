"""
The picture of docs/when_it_helps.md: what each method gains over plain training, against how far the confidence of
plain training is from its accuracy, drawn from every table of docs/results.md that has both.

    python benchmarks/when_it_helps.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure


DOCS = Path(__file__).parents[1] / "docs"
FIGURES = ("error", "aurc")
SHOWN = {  # by how a row's method begins: name, colour, marker
    "label smoothing": ("label smoothing 0.1", "#999999", "x"),
    "PS-KD": ("PS-KD", "#0072B2", "o"),
    "sla": ("sla", "#D55E00", "D"),
    "lsskd": ("lsskd", "#E69F00", "v"),
    "rank": ("rank", "#009E73", "s"),
}
OTHERS = ("PS-KD snapshot", "PS-KD ema", "PS-KD calibrated", "PS-KD history x CutMix", "lsskd_full")


@dataclass
class Row:
    """A row of a table: the number of its table, what stands left of the method, the method, and figures."""

    table: int
    setting: str
    method: str
    figures: dict[str, float]


def rows_of(text: str) -> list[Row]:
    """The rows of all tables with a method, error or accuracy, ECE and AURC."""
    rows, table, head = [], 0, None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if head is None:
            head, table = cells, table + 1
            continue
        known = {"method", "ECE %", "AURC x1000"} <= set(head) and ({"error %", "accuracy %"} & set(head))
        if not known or set(line) <= set("|- :"):
            continue
        values = dict(zip(head, cells, strict=True))
        setting = ", ".join(cells[: head.index("method")])

        def number(name: str, values: dict[str, str] = values) -> float:
            return float(re.match(r"[\d.]+", values[name].replace(",", ""))[0])

        error = number("error %") if "error %" in values else 100 - number("accuracy %")
        figures = {"error": error, "ece": number("ECE %"), "aurc": number("AURC x1000")}
        rows.append(Row(table, setting, values["method"].replace("`", ""), figures))
    return rows


def points(rows: list[Row]) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """For each method that is shown: ECE of plain training, and the share of each figure that the method takes off."""
    plain = {(row.table, row.setting): row.figures for row in rows if row.method == "plain"}
    found: dict[str, list] = {}
    for row in rows:
        base = plain.get((row.table, row.setting))
        start = next((start for start in SHOWN if row.method.startswith(start)), None)
        if base is None or start is None or row.method.startswith(OTHERS):
            continue
        gains = {name: 100 * (1 - row.figures[name] / base[name]) for name in FIGURES}
        found.setdefault(start, []).append((base["ece"], gains))
    return found


def draw(found: dict[str, list[tuple[float, dict[str, float]]]]) -> Figure:
    """Two panels: what is taken off the error, and off AURC."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"error": "error taken off, %", "aurc": "AURC taken off, %"}
    for axes, name in zip(panels, FIGURES, strict=True):
        for start, values in found.items():
            label, colour, marker = SHOWN[start]
            x, y = [ece for ece, _ in values], [gains[name] for _, gains in values]
            axes.scatter(x, y, c=colour, marker=marker, s=34, label=label, alpha=0.85)
        axes.axhline(0, color="#555555", linewidth=1)
        axes.set(xlabel="ECE of plain training, %", ylabel=titles[name])
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    found = points(rows_of((DOCS / "results.md").read_text()))
    draw(found).savefig(DOCS / "when_it_helps.png", dpi=110)
    for start, values in found.items():
        gains = [gains["error"] for _, gains in values]
        print(f"{SHOWN[start][0]}: {len(values)} settings, error lower in {sum(gain > 0 for gain in gains)}")


if __name__ == "__main__":
    main()
