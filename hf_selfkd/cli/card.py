"""`hf-selfkd card`: make the model card of a folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import one_line_errors


def card(
    folder: Annotated[Path, typer.Argument(help="Of the model; selfkd_card.json stands there.")],
    comparison: Annotated[
        Path | None,
        typer.Option(help="JSON lines with method, seed and metrics of each run: the table against training without."),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Title of the card.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where the model is on the Hub: user/name.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Data it was trained on: user/name of the Hub, or words; several times.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For instance apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Of the texts; several times for several.")] = None,
) -> None:
    """
    Make README.md and its pictures from selfkd_card.json. What you wrote outside the marks stays.

    hf-selfkd card outputs/images --comparison results.jsonl --repo-id me/digits --license apache-2.0
    """
    from ..cards import CardFacts, write_card
    from ..cards.comparison import read_comparison
    from ..cards.names import HUB_ID

    with one_line_errors():
        facts = CardFacts.load(folder)
        if comparison is not None:
            facts.comparison = read_comparison(comparison)
    if dataset:
        facts.datasets = [name for name in dataset if "/" in name and HUB_ID.fullmatch(name)]
        facts.data["description"] = ", ".join(name for name in dataset if name not in facts.datasets)
    given = {"model_name": model_name, "repo_id": repo_id, "license": license, "language": language}
    for name, value in given.items():
        if value:
            setattr(facts, name, value)
    typer.echo(f"Wrote {write_card(facts, folder)}")
