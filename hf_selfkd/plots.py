"""Reliability diagrams, risk-coverage curves and the like, several methods side by side (matplotlib, extra `plots`).

Figures are built through matplotlib's object interface: no `pyplot`, no global state, no display needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import ReliabilityCurve, reliability_curve, risk_coverage_curve


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GREY = "#555555"
_GAP: dict[str, Any] = {"facecolor": "none", "edgecolor": _GREY, "linewidth": 0.6, "hatch": "////"}
_DIAGONAL: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": "--"}
_COLUMNS = 4  # at most this many panels in a row


def reliability_diagram(
    results: Mapping[str, Any],
    path: str | Path | None = None,
    title: str | None = None,
    bins: int = 10,
    from_logits: bool = True,
) -> Figure:
    """Accuracy against confidence, one panel per method, with the share of samples per bin below it.

    Bars are accuracies; the hatched part is the gap to the bin's mean confidence, whose mean over samples is the ECE
    in the legend. A well calibrated model's bars end on the dashed diagonal; over-confidence leaves them below it.

    Args:
        results (`dict[str, tuple]` or `dict[str, PredictionOutput]`):
            Method name -> `(predictions, labels)`, as [`~hf_selfkd.metrics.calibration_metrics`] takes them, or what
            `trainer.predict` returns; what follows the labels is left alone. Or a
            [`~hf_selfkd.metrics.ReliabilityCurve`], of whatever bins.
        path (`str` or `Path`, *optional*): Where to save the figure; the ending gives the format (png, pdf, svg).
        title (`str`, *optional*): Title above all panels.
        bins (`int`, *optional*, defaults to 10): Number of equal, right-closed confidence bins.
        from_logits (`bool`, *optional*, defaults to `True`): `False` if the predictions are probabilities.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ImportError`: matplotlib is missing.
        `ValueError`: no results, or results that `reliability_curve` refuses.

    Example:
        ```python
        reliability_diagram({"baseline": (logits_a, labels), "PS-KD": (logits_b, labels)}, path="reliability.png")
        ```
    """
    _check(results)
    rows = -(-len(results) // _COLUMNS)
    columns = -(-len(results) // rows)
    figure = _figure(2.9 * columns + 0.5, 4.2 * rows + (0.7 if title else 0.3), title)
    curves = {
        name: result
        if isinstance(result, ReliabilityCurve)
        else reliability_curve(*_pair(name, result), bins, from_logits)
        for name, result in results.items()
    }
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3.4, 1] * rows)
    tallest = max(curve.count.max() / curve.count.sum() for curve in curves.values())
    for place, (name, curve) in enumerate(curves.items()):
        row, column = divmod(place, columns)
        upper = figure.add_subplot(grid[2 * row, column])
        lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper)
        colour = _COLOURS[place % len(_COLOURS)]
        _draw_reliability(upper, curve, colour)
        _draw_counts(lower, curve, colour, tallest)
        upper.set_title(name, pad=21)  # leaves a line for the panel's legend
        if column == 0:
            upper.set_ylabel("Accuracy")
            lower.set_ylabel("Samples")
    _explain(figure)
    return _saved(figure, path)


def risk_coverage_plot(
    results: Mapping[str, Any],
    path: str | Path | None = None,
    title: str | None = None,
    from_logits: bool = True,
) -> Figure:
    """Error rate among the most confident samples against the fraction kept, one line per method.

    The lower and the further right a line stays low, the better the model ranks its own mistakes; the area under it is
    the AURC in the legend, and its right end is the plain error rate.

    Args:
        results, path, title, from_logits: As for [`reliability_diagram`], with the same errors.

    Returns:
        `matplotlib.figure.Figure`
    """
    _check(results)
    figure = _figure(5.6, 4.0, title)
    curves = {name: risk_coverage_curve(*_pair(name, result), from_logits) for name, result in results.items()}
    axes = figure.add_subplot()
    for place, (name, curve) in enumerate(curves.items()):
        # More methods than colours: the next round is dashed, the one after dotted.
        style = ("-", "--", ":")[place // len(_COLOURS) % 3]
        axes.plot(
            100 * curve.coverage,
            100 * curve.risk,
            style,
            color=_COLOURS[place % len(_COLOURS)],
            label=f"{name} (AURC {curve.aurc:.1f})",
        )
    axes.set(xlabel="Coverage: most confident samples kept (%)", ylabel="Error rate among them (%)", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.grid(color="#e6e6e6")
    axes.legend(frameon=False, loc="upper left")
    _bare(axes)
    return _saved(figure, path)


def loss_curves(results: Mapping[str, np.ndarray], path: str | Path | None = None, title: str | None = None) -> Figure:
    """Losses over the steps of a training, one line each.

    Args:
        results (`dict[str, np.ndarray]`): Name -> array of shape `[n, 2]` of steps and losses.
        path, title: As for [`reliability_diagram`].

    Returns:
        `matplotlib.figure.Figure`
    """
    figure = _figure(5.6, 3.4, title)
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(results.items()):
        axes.plot(points[:, 0], points[:, 1], color=_COLOURS[place % len(_COLOURS)], label=name)
    axes.set(xlabel="Step", ylabel="Loss")
    axes.grid(color="#e6e6e6")
    axes.legend(frameon=False)
    _bare(axes)
    return _saved(figure, path)


def quality_against_cost(
    results: Mapping[str, Mapping[str, tuple[float, float]]],
    path: str | Path | None = None,
    title: str | None = None,
    xlabel: str = "Latency (ms)",
    ylabel: str = "Accuracy (%)",
) -> Figure:
    """Quality of several models against what they cost, one line per kind of model, each point with its name.

    Args:
        results (`dict[str, dict]`): Kind -> name of a model -> its cost and its quality.
        path, title: As for [`reliability_diagram`].
        xlabel (`str`, *optional*, defaults to `"Latency (ms)"`): What the cost is.
        ylabel (`str`, *optional*, defaults to `"Accuracy (%)"`): What the quality is.

    Returns:
        `matplotlib.figure.Figure`
    """
    _check(results)
    figure = _figure(5.6, 4.0, title)
    axes = figure.add_subplot()
    for place, (kind, points) in enumerate(results.items()):
        colour, marker = _COLOURS[place % len(_COLOURS)], "os^D"[place % 4]
        axes.plot(*zip(*points.values(), strict=True), color=colour, marker=marker, label=kind)
        for name, point in points.items():
            axes.annotate(name, point, (4, 4), textcoords="offset points", fontsize="small", color=colour)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.grid(color="#e6e6e6")
    if len(results) > 1:
        axes.legend(frameon=False)
    _bare(axes)
    return _saved(figure, path)


def _draw_reliability(axes: Axes, curve: ReliabilityCurve, colour: str) -> None:
    filled = curve.count > 0
    left, width = curve.edges[:-1][filled], np.diff(curve.edges)[filled]
    accuracy, confidence = curve.accuracy[filled], curve.confidence[filled]
    bars = axes.bar(left, accuracy, width, align="edge", color=colour, alpha=0.75, edgecolor="white")
    axes.bar(left, confidence - accuracy, width, bottom=accuracy, align="edge", **_GAP)
    axes.plot([0, 1], [0, 1], **_DIAGONAL)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.tick_params(labelbottom=False)
    # Above the axes: inside, it would hide the bars of an under-confident model.
    axes.legend([bars], [f"ECE {curve.ece:.1f} %"], loc="lower center", bbox_to_anchor=(0.5, 0.98), frameon=False)
    _bare(axes)


def _explain(figure: Figure) -> None:
    """One legend for what all panels share."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    accuracy = Patch(color="#aaaaaa", label="Accuracy")
    gap = Patch(**_GAP, label="Gap to confidence")
    figure.legend(
        handles=[accuracy, gap, Line2D([], [], **_DIAGONAL, label="Calibrated")],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize="small",
        handlelength=1.4,
        columnspacing=1.0,
    )


def _draw_counts(axes: Axes, curve: ReliabilityCurve, colour: str, tallest: float) -> None:
    share = curve.count / curve.count.sum()
    axes.bar(curve.edges[:-1], 100 * share, np.diff(curve.edges), align="edge", color=colour, edgecolor="white")
    axes.set(xlabel="Confidence", ylim=(0, 108 * tallest))
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.yaxis.set_major_locator(_ticks(3))
    _bare(axes)


def _check(results: Mapping[str, Any]) -> None:
    if not isinstance(results, Mapping):
        raise ValueError(f"results: a {type(results).__name__}; pass {{name: (predictions, labels)}}.")
    if not results:
        raise ValueError("results: empty; pass at least one {name: (predictions, labels)}.")


def _pair(name: str, result: Any) -> tuple[Any, Any]:
    if hasattr(result, "predictions") and hasattr(result, "label_ids"):  # what `Trainer` hands out
        return result.predictions, result.label_ids
    if not isinstance(result, (tuple, list)) or len(result) < 2:
        raise ValueError(
            f"results: {name!r} is a {type(result).__name__}; pass (predictions, labels) or what trainer.predict "
            "returns."
        )
    return result[0], result[1]


def _figure(width: float, height: float, title: str | None) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib; install it with `pip install hf_selfkd[plots]`.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def _ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
