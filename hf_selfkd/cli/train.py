"""`hf-selfkd train TASK`: the scripts of `hf_selfkd.scripts`, a command for each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from ..scripts.arguments import SCRIPTS, command_of
from .common import PASSES_ON, script_of


class TaskGroup(TyperGroup):
    """The tasks, which an unknown one is told."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            ctx.fail(f"There is no task {args[0]!r}: choose one of {', '.join(self.commands)}.")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=TaskGroup,
    help="Train, evaluate and share a model; `hf-selfkd train TASK --help` lists the flags of a task.",
    subcommand_metavar="TASK [SETTINGS.yaml] [FLAGS]",
    no_args_is_help=True,
)


def run(task: str, words: list[str]) -> None:
    """
    Run the script of a task, or print its help.

    Args:
        task (`str`): the name of the script in `SCRIPTS`.
        words (`list[str]`): what follows the task on the command line.
    """
    if {"-h", "--help"} & set(words):
        return own_flags(task).print_help()
    script = script_of(task)
    if "--help-all" in words:
        return script.make_parser().print_help()
    script.main(words)


def own_flags(task: str) -> argparse.ArgumentParser:
    """A parser that knows the flags of the task only, for its help; it imports neither torch nor transformers."""
    script = SCRIPTS[task]
    parser = argparse.ArgumentParser(
        usage=f"{command_of(task)} [SETTINGS.yaml] [FLAGS]",
        description=f"{script.summary} A YAML or JSON file of settings may stand first; flags override it.",
        epilog=f"All fields of {script.config}, hence of TrainingArguments, are flags, too: --do_train, --do_eval, "
        f"--output_dir, --num_train_epochs, --learning_rate, --alpha, --teacher and so on. "
        f"`{command_of(task)} --help-all` lists every one.",
        add_help=False,
    )
    for kind in script.arguments:
        group, hints = parser.add_argument_group(kind.__doc__.rstrip(".")), get_type_hints(kind)
        for spec in fields(kind):
            _add_flag(group, spec, hints[spec.name])
    return parser


def _add_flag(group: Any, spec: Field, hint: Any) -> None:
    default = spec.default if spec.default_factory is MISSING else spec.default_factory()
    text = spec.metadata["help"].replace("%", "%%")
    text = text if default in (None, "") else f"{text} (default: {default})"
    if hint is bool:
        names = [f"--{spec.name}", f"--no_{spec.name}"] if default else [f"--{spec.name}"]
        group.add_argument(*names, action="store_true", help=text)
    else:
        group.add_argument(f"--{spec.name}", metavar=_metavar(hint), help=text)


def _metavar(hint: Any) -> str:
    """What a flag takes: `INT` for `int | None`, `FLOAT ...` for `list[float]`, `{a,b}` for `Literal["a", "b"]`."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if get_origin(hint) is list:
        return f"{_metavar(get_args(hint)[0])} ..."
    kinds = [kind for kind in get_args(hint) or [hint] if kind not in (dict, type(None))]
    return kinds[0].__name__.upper()


def _command(task: str) -> Callable[[typer.Context], None]:
    def command(ctx: typer.Context) -> None:
        run(task, ctx.args)

    return command


for _task, _script in SCRIPTS.items():
    app.command(
        _task,
        help=_script.summary,
        add_help_option=False,  # the script's flags are no options of the command, which passes every word on
        context_settings=PASSES_ON,
    )(_command(_task))
