"""`hf-selfkd export`: smaller models out of one with exits, and what each costs and is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..scripts.arguments import SCRIPTS
from .common import check_output, check_task, one_line_errors, predicts, print_table, script_of, silence


if TYPE_CHECKING:
    from ..exits.source import Source

CLASSIFIERS = ("image-classification", "text-classification")


def export(
    ctx: typer.Context,
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(SCRIPTS)}.")],
    model: Annotated[Path, typer.Argument(help="Folder of a training with --auxiliary_heads exits --save_heads.")],
    output_dir: Annotated[
        Path,
        typer.Option("--output-dir", "--output_dir", help="The exit; with --all, exit-1, exit-2, ... and the table."),
    ],
    exit: Annotated[int | None, typer.Option(help="Layers, or stages, of the exit.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Export every exit.")] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also as ONNX files, whose answers are compared (classifiers).")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also as ONNX files with linear layers of int8 (classifiers).")
    ] = False,
) -> None:
    """
    Export exits as plain models of transformers, and compare them with the whole model: size, latency, quality.

    Flags that follow say on which data, as for `hf-selfkd evaluate TASK`; without any, quality is not measured:

    hf-selfkd export text-classification outputs/texts --exit 2 --output-dir outputs/small

    hf-selfkd export text-classification outputs/texts --all --output-dir outputs/family --test_file test.csv
    """
    with one_line_errors():
        check_task(task)
        if every == (exit is not None):
            raise ValueError("give either --exit, one of the exits, or --all.")
        _check_folders(model, output_dir)
        _check_engines(task, onnx, int8)
        _quiet_bars()
        source = _load(task, model, exit, int8)
        _export(ctx.args, task, source, output_dir, exit, onnx, int8)


def _check_folders(model: Path, output_dir: Path) -> None:
    from ..exits.source import check_heads

    check_heads(model)
    if output_dir.resolve() == model.resolve():
        raise ValueError(f"--output-dir {output_dir} is the folder of the model itself: choose another.")
    check_output(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output-dir {output_dir} is a file: choose a folder.")


def _check_engines(task: str, onnx: bool, int8: bool) -> None:
    from ..exits.onnx import check_packages

    flag = "--onnx" if onnx else "--int8"
    if not (onnx or int8):
        return
    if task not in CLASSIFIERS:
        raise ValueError(
            f"{flag} is for classifiers; models that write need one file for each part: leave it out, and use optimum "
            "on the exported folder (pip install optimum-onnx; optimum-cli export onnx)."
        )
    check_packages(flag)


def _quiet_bars() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _load(task: str, model: Path, exit: int | None, int8: bool) -> Source:
    """The source, with the exit that is asked for."""
    from ..exits.export import native_head
    from ..exits.quantized import check_linear
    from ..exits.source import load_source

    with silence():
        source = load_source(task, model)
    if exit is not None:
        native_head(source.model, exit)
    if int8:
        check_linear(source.model)
    return source


def _export(
    words: list[str], task: str, source: Source, output_dir: Path, exit: int | None, onnx: bool, int8: bool
) -> None:
    from ..exits.making import Order, make_family

    order = Order(task, source.exits if exit is None else [exit], output_dir, onnx, int8, exit is None)
    for one in order.exits:
        check_output(order.folder(one))
    if words:
        order.script, order.words, order.split = script_of(task), words, "predict" if predicts(task) else "eval"
    with silence():
        family = make_family(source, order)
    print_table(*family.table())
    typer.echo("\n" + "\n".join(family.notes()) + "\n")
    for one in order.exits:
        typer.echo(f"Wrote {order.folder(one)}")
    for path in family.write(output_dir):
        typer.echo(f"Wrote {path}")
