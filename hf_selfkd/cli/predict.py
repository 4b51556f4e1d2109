"""`hf-selfkd predict`: what a saved model says of data, labelled or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..scripts.arguments import SCRIPTS
from .common import check_output, check_task, one_line_errors, predicts, script_of


def predict(
    ctx: typer.Context,
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(name for name in SCRIPTS if predicts(name))}.")],
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "--output_dir", help="For the predictions.")] = Path(
        "outputs/predict"
    ),
) -> None:
    """
    Write what a model says of every sample: its class and probability, its objects, or its translation. No labels are
    needed.

    Flags that follow say which data, as for `hf-selfkd train TASK`:

    hf-selfkd predict text-classification outputs/texts --test_file new.csv
    """
    with one_line_errors():
        check_task(task)
        if not predicts(task):
            raise ValueError(
                f"{task} has nothing to predict: use `hf-selfkd evaluate {task}`, or a pipeline to write."
            )
        check_output(output_dir)
        words = ["--model_name_or_path", model, "--do_predict", "--do_train", "False", "--report_to", "none"]
        script_of(task).main([*ctx.args, *words, "--output_dir", str(output_dir)])
    for name in ("predictions.csv", "predictions.jsonl", "predictions.txt"):
        if (output_dir / name).is_file():
            typer.echo(f"Wrote {output_dir / name}")
