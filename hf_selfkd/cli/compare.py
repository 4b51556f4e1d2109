"""`hf-selfkd compare`: methods and seeds with equal budgets, and what can be concluded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..comparison.methods import BASELINE, DEFAULT, METHODS, SMOOTHED
from ..scripts.arguments import SCRIPTS
from .common import check_task, one_line_errors, print_table, script_of


def compare(
    ctx: typer.Context,
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(SCRIPTS)}.")],
    folder: Annotated[Path, typer.Option(help="Runs, logs and the report; a second call goes on where one stopped.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"With commas, of {', '.join(METHODS)}; 'given' is your settings as they are. If left out: "
            f"{','.join(DEFAULT)}, of which a task may lack {SMOOTHED}."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="With commas; at least three to see a spread.")] = "0,1,2",
    keep_models: Annotated[
        bool, typer.Option("--keep-models", "--keep_models", help="Keep the trained models.")
    ] = False,
) -> None:
    """
    Train each method with each seed, everything else equal, and say what can be concluded.

    Settings and flags that follow are those of `hf-selfkd train TASK`, the same for all methods:

    hf-selfkd compare text-classification --folder outputs/compare --methods plain,label-smoothing,history
    texts.yaml --do_predict --num_train_epochs 6
    """
    from ..comparison import report
    from ..comparison.cells import Comparison

    with one_line_errors():
        chosen, numbers = _chosen(task, methods, seeds)
        comparison = Comparison(task, ctx.args, folder, keep_models)
        _check(task, ctx.args, chosen, folder)
        cells = comparison.run_missing(chosen, numbers, typer.echo)
    summary = report.summarize(cells)
    for head, body in report.tables(summary):
        typer.echo()
        print_table(head, body)
    typer.echo("\n" + "\n".join(report.verdicts(summary)))
    for path in report.write(summary, folder, f"{task}: {', '.join(chosen)}"):
        typer.echo(f"Wrote {path}")


def _chosen(task: str, methods: str | None, seeds: str) -> tuple[list[str], list[int]]:
    check_task(task)
    methods = ",".join(_default(task)) if methods is None else methods
    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in METHODS]
    if unknown or not chosen:
        raise ValueError(f"--methods {methods}: choose among {', '.join(METHODS)}.")
    if BASELINE not in chosen:
        raise ValueError(f"--methods {methods}: add {BASELINE}, which the others are compared with.")
    if SMOOTHED in chosen and SCRIPTS[task].unsmoothed is not None:
        raise ValueError(f"--methods {methods}: leave out {SMOOTHED}; {SCRIPTS[task].unsmoothed}.")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {seeds}: give whole numbers with commas, such as 0,1,2.") from None
    return list(dict.fromkeys(chosen)), list(dict.fromkeys(numbers))


def _default(task: str) -> list[str]:
    """The methods of a comparison for which none are named; says which the task lacks."""
    reason = SCRIPTS[task].unsmoothed
    if reason is not None:
        typer.echo(f"{SMOOTHED} is left out: {reason}.")
    return [name for name in DEFAULT if name != SMOOTHED or reason is None]


def _check(task: str, words: list[str], methods: list[str], folder: Path) -> None:
    """
    Raises:
        ValueError: if the settings of a method are refused, before the first of them is trained.
    """
    from ..scripts.common import parse_arguments

    parser = script_of(task).make_parser()
    for method in methods:
        try:
            parse_arguments(parser, [*words, *METHODS[method], "--output_dir", str(folder)])
        except ValueError as error:
            raise ValueError(f"{method}: {error}") from None
