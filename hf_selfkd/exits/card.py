"""The model card of an exit: what its training's card says, as far as it is true of the exit."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from ..cards import CardFacts, Evaluation, write_card
from ..cards.collect import task_of
from .costs import count_parameters
from .source import Source


def exit_facts(source: Source, exit: int, model: nn.Module, evaluation: Evaluation | None = None) -> CardFacts:
    """
    The facts of the card of an exit.

    Args:
        source ([`Source`]): the whole model.
        exit (`int`): layers of the exit.
        model (`nn.Module`): the exit.
        evaluation ([`~hf_selfkd.cards.Evaluation`], *optional*): of the exit itself.
    """
    whole = source.facts or CardFacts(source.name, type(model).__name__, task=task_of(model))
    facts = copy.deepcopy(whole)
    facts.exit = {"layers": exit, "of": source.layers, "whole": source.name, "repo_id": whole.repo_id}
    facts.exit["decoder"] = source.of_decoder
    facts.model_name = f"{source.name}-exit-{exit}"
    facts.parameters = count_parameters(model)
    facts.evaluations = [] if evaluation is None else [evaluation]
    # Figures and curves of the whole model are none of its exits.
    facts.repo_id, facts.chosen_by, facts.curves, facts.comparison, facts.written = None, None, {}, [], {}
    return facts


def write_exit_card(
    source: Source, exit: int, model: nn.Module, folder: Path, evaluation: Evaluation | None = None
) -> Path:
    """Write the card of an exit into its folder; the arguments are those of [`exit_facts`]."""
    return write_card(exit_facts(source, exit, model, evaluation), folder)
