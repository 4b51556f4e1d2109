"""The pictures of a card; without matplotlib (the extra `plots`) a card has none."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .facts import CardFacts


FOLDER = "selfkd_card"


def draw_pictures(facts: CardFacts, folder: Path) -> dict[str, str]:
    """
    Draw what the facts allow.

    Returns:
        `dict[str, str]`: paths relative to the folder, by name: `reliability`, `curves`.
    """
    if find_spec("matplotlib") is None:
        return {}
    drawn = {}
    curves = {evaluation.split: evaluation.reliability for evaluation in facts.evaluations if evaluation.reliability}
    if curves:
        drawn["reliability"] = _reliability(curves, folder)
    if facts.curves:
        drawn["curves"] = _curves(facts.curves, folder)
    return drawn


def _reliability(curves: dict[str, dict[str, list]], folder: Path) -> str:
    from ..metrics import ReliabilityCurve
    from ..plots import reliability_diagram

    path = f"{FOLDER}/reliability.png"
    results = {}
    for split, curve in curves.items():
        columns = {name: np.array(curve[name], dtype=float) for name in ("confidence", "accuracy")}
        edges = np.linspace(0, 1, len(curve["count"]) + 1)
        results[split] = ReliabilityCurve(edges, columns["confidence"], columns["accuracy"], np.array(curve["count"]))
    reliability_diagram(results, folder / path)
    return path


def _curves(curves: dict[str, list], folder: Path) -> str:
    from ..plots import loss_curves

    path = f"{FOLDER}/loss.png"
    loss_curves({name: np.array(points, dtype=float) for name, points in curves.items()}, folder / path)
    return path
