"""Model cards: what is known of a run, and the README.md that tells it."""

from .facts import CardFacts, Evaluation
from .render import render, write_card


__all__ = ["CardFacts", "Evaluation", "render", "write_card"]
