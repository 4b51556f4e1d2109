"""
The command line `hf-selfkd`: a module for each command.

These modules import nothing heavy at the top, so that every help answers at once; a command imports what it runs.
"""

from __future__ import annotations

import typer

from .._version import __version__
from . import card, compare, doctor, evaluate, export, predict, push, report, train
from .common import PASSES_ON


app = typer.Typer(
    help="Self-distillation for the Hugging Face stack.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # the last line of a plain traceback is the sentence that says what to do
)
app.add_typer(train.app, name="train")
app.command("card")(card.card)
app.command("push")(push.push)
app.command("report")(report.report)
app.command("evaluate", context_settings=PASSES_ON)(evaluate.evaluate)
app.command("export", context_settings=PASSES_ON)(export.export)
app.command("predict", context_settings=PASSES_ON)(predict.predict)
app.command("doctor", context_settings=PASSES_ON)(doctor.doctor)
app.command("compare", context_settings=PASSES_ON)(compare.compare)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf_selfkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_print_version, is_eager=True
    ),
) -> None:
    """The options before the command."""


def main() -> None:
    """Run the command of the process."""
    app(prog_name="hf-selfkd")
