"""What the commands share: errors in one line, tasks and their scripts."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import typer

from ..markup import markdown_table
from ..quiet import quietly
from ..scripts.arguments import SCRIPTS


if TYPE_CHECKING:
    from rich.table import Table

# Of a command that passes the words which it does not know on to a script.
PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Tell an error of the user's in one line, and end with status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def silence() -> Iterator[None]:
    """Keep what a training prints, logs and warns of to itself; errors are raised as ever."""
    with quietly(), redirect_stdout(io.StringIO()):
        yield


def check_task(task: str) -> None:
    """
    Raises:
        ValueError: if there is no such task.
    """
    if task not in SCRIPTS:
        raise ValueError(f"there is no task {task!r}: choose one of {', '.join(SCRIPTS)}.")


def predicts(task: str) -> bool:
    """Whether the script of a task writes predictions of a test split."""
    return any("test" in getattr(kind, "SPLITS", ()) for kind in SCRIPTS[task].arguments)


def check_output(output_dir: Path) -> None:
    """
    Raises:
        ValueError: if the folder is that of a training, whose predictions and figures would be overwritten.
    """
    from ..runs import STATE

    if (output_dir / STATE).is_file():
        raise ValueError(f"--output-dir {output_dir} is the folder of a training, whose figures stay: choose another.")


def script_of(task: str) -> ModuleType:
    """The script of a task."""
    return import_module(f"hf_selfkd.scripts.{SCRIPTS[task].module}")


def print_pairs(pairs: dict[str, str]) -> None:
    """Names and what is said of them, in two columns as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", min_width=7)
    table.add_column()
    for name, text in pairs.items():
        table.add_row(name, text)
    Console(highlight=False).print(table)


def print_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """A table: drawn on a terminal, if need be with what is in parentheses below, else as Markdown, to be copied."""
    from rich.console import Console

    console = Console(highlight=False)
    for below in (" (", "\n(") if console.is_terminal else ():
        table = _drawn(head, [[cell.replace(" (", below) for cell in row] for row in body])
        if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
            return console.print(table)
    typer.echo(markdown_table(head, body))


def _drawn(head: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(header_style="bold")
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table
