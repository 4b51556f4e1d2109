"""`hf-selfkd doctor`: what a training is going to do, or what one that is over tells."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..comparison.methods import METHODS
from ..scripts.arguments import SCRIPTS
from .common import one_line_errors, print_pairs, script_of, silence


if TYPE_CHECKING:
    from ..trainer import SelfKDTrainer


BUSY = 0.5  # by which the same steps may differ before they say nothing

# Of a run in a temporary folder, of which nothing is kept.
_QUIET = (
    *("--save_strategy", "no", "--report_to", "none", "--push_to_hub", "False"),
    *("--load_best_model_at_end", "False", "--disable_tqdm", "True", "--log_level", "warning", "--do_train"),
)


def doctor(
    ctx: typer.Context,
    patient: Annotated[str, typer.Argument(help=f"A task ({', '.join(SCRIPTS)}), or the folder of a training.")],
    cost: Annotated[bool, typer.Option(help="Measure what a step costs, beside plain training.")] = True,
    plain_run: Annotated[
        bool,
        typer.Option(
            "--plain-run",
            "--plain_run",
            help="Train plainly with these settings, and say whether softer targets may help.",
        ),
    ] = False,
) -> None:
    """
    Before a training: say what it will do and cost. After it: say how it went, and what to try.

    Settings and flags that follow a task are those of `hf-selfkd train TASK`:

    hf-selfkd doctor text-classification texts.yaml --num_train_epochs 6

    hf-selfkd doctor text-classification texts.yaml --num_train_epochs 6 --plain-run

    hf-selfkd doctor outputs/texts
    """
    with one_line_errors():
        if patient in SCRIPTS:
            _before(patient, ctx.args, cost, plain_run)
        elif Path(patient).is_dir():
            if ctx.args or plain_run:
                given = " ".join(ctx.args) or "--plain-run"
                raise ValueError(f"{given}: of a training that is over, the folder {patient} says all; leave it out.")
            _after(Path(patient))
        else:
            raise ValueError(f"{patient} is neither a task ({', '.join(SCRIPTS)}) nor the folder of a training.")


def _before(task: str, words: list[str], cost: bool, plain_run: bool) -> None:
    from ..doctor import plan_of

    with tempfile.TemporaryDirectory() as folder:
        quiet = [*words, *_QUIET, "--output_dir", folder]
        with silence():
            trainer = script_of(task).build(quiet).trainer
            plan = plan_of(trainer)
        print_pairs(plan)
        if cost:
            print_pairs({"cost": _cost(task, quiet, trainer)})
        if plain_run:
            _plain_run(task, quiet, folder)


def _cost(task: str, words: list[str], planned: SelfKDTrainer) -> str:
    """What a step takes in milliseconds, as asked and plainly: each in turn, twice, as a machine has its moods."""
    from ..doctor import short_epochs, step_times

    teaches = planned.distiller is not None and planned.distiller.teaches
    methods = ((), METHODS["plain"]) if teaches else ((),)
    words = [*words, "--eval_strategy", "no", *short_epochs(planned)]
    times: list[list[float]] = [[] for _ in methods]
    for _ in range(2):
        for place, flags in enumerate(methods):
            with silence():
                times[place].append(1000 * step_times(script_of(task).build([*words, *flags]).trainer))
    asked, *plain = [min(part) for part in times]
    if not all(math.isfinite(one) for part in times for one in part):
        return "the training is too short to measure a step"
    if not plain:
        return f"{asked:.1f} ms a step"
    told = f"{asked:.1f} ms a step, {plain[0]:.1f} ms in plain training"
    mood = max(max(part) / min(part) for part in times) - 1
    if mood > BUSY:
        return f"{told}; this machine is too busy to compare the two"
    if abs(asked / plain[0] - 1) <= mood:
        return f"{told}: no difference beyond the {100 * mood:.0f} % that this machine varies by"
    return f"{told} ({asked / plain[0]:.2f} times)"


def _plain_run(task: str, words: list[str], folder: str) -> None:
    """Train without self-distillation, and judge."""
    from ..doctor import diagnose, symptoms_of
    from ..runs import Run

    typer.echo("Training plainly ...")
    with silence():
        script_of(task).main([*words, *METHODS["plain"], "--do_eval", "--logging_steps", "0.02"])
    for sentence in diagnose(symptoms_of(Run.load(folder))):
        typer.echo(sentence)


def _after(folder: Path) -> None:
    from ..doctor import diagnose, symptoms_of
    from ..runs import Run, find_runs, names_of

    runs = [Run.load(path) for path in find_runs(folder)]
    for run, name in zip(runs, names_of(runs), strict=True):
        typer.echo(f"{name}:")
        for sentence in diagnose(symptoms_of(run)):
            typer.echo(f"  {sentence}")
