"""What the commands share: errors in one line, tasks and their scripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import typer

from ..scripts.arguments import SCRIPTS


# Of a command that passes the words which it does not know on to a script.
PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Tell an error of the user's in one line, and end with status 1."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def check_task(task: str) -> None:
    """
    Raises:
        ValueError: if there is no such task.
    """
    if task not in SCRIPTS:
        raise ValueError(f"there is no task {task!r}: choose one of {', '.join(SCRIPTS)}.")


def script_of(task: str) -> ModuleType:
    """The script of a task."""
    return import_module(f"hf_selfkd.scripts.{SCRIPTS[task].module}")
