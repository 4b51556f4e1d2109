"""`hf-selfkd evaluate`: all figures of a saved model, and how far it can be trusted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ..scripts.arguments import SCRIPTS
from .common import check_output, check_task, one_line_errors, predicts, print_table, script_of


def evaluate(
    ctx: typer.Context,
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(SCRIPTS)}.")],
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.")],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "--output_dir", help="For predictions, figures and pictures.")
    ] = Path("outputs/evaluate"),
) -> None:
    """
    Evaluate a model on data: accuracy, calibration, ranking of its own errors, the temperature that calibrates it.

    Flags that follow say which data, as for `hf-selfkd train TASK`:

    hf-selfkd evaluate text-classification outputs/texts --test_file test.csv
    """
    from ..cards.names import measured

    with one_line_errors():
        check_task(task)
        check_output(output_dir)
        split, begin = "predict" if predicts(task) else "eval", time.time()
        words = ["--model_name_or_path", model, f"--do_{split}", "--do_train", "False", "--report_to", "none"]
        script_of(task).main([*ctx.args, *words, "--output_dir", str(output_dir)])
        results = output_dir / f"{split}_results.json"
        if not results.is_file():  # only the first of several processes writes it
            return
        found = measured(json.loads(results.read_text()), split)
        if not found:
            raise ValueError(f"the data have no labels to evaluate on: use `hf-selfkd predict {task}`.")
    show(found)
    for name in ("reliability.png", "risk_coverage.png", "predictions.csv", "predictions.jsonl"):
        if (output_dir / name).is_file() and (output_dir / name).stat().st_mtime >= begin - 1:
            typer.echo(f"Wrote {output_dir / name}")


def show(found: dict[str, float]) -> None:
    """Print a table of the figures, and what the temperature says in words."""
    from ..cards.names import METRICS, metric

    temperature = found.pop("temperature", None)
    if found.get("top5_accuracy") == 1:  # few classes: it is always right
        del found["top5_accuracy"]
    names = [name for name in METRICS if name in found] + sorted(found.keys() - METRICS.keys())
    typer.echo()
    print_table(["metric", "value"], [[metric(name).name, metric(name).shown(found[name])] for name in names])
    if temperature is not None:
        typer.echo(f"\n{_said(temperature)}")


def _said(temperature: float) -> str:
    from ..metrics.temperature import temperature_in_words

    told = f"Temperature that would calibrate the model: {temperature_in_words(temperature)}"
    if abs(temperature - 1) < 0.05:
        return f"{told}, so it is calibrated as it is."
    word = "over-confident" if temperature > 1 else "not confident enough"
    return f"{told}, so it is {word} (divide its logits by it)."
