"""
The pages of docs/reference, made from the package itself: its docstrings, dataclasses and commands.

    python docs/generate_reference.py

What would differ from one Python or transformers to the next is left out: inherited fields, paths, addresses.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields
from importlib import import_module
from pathlib import Path, PurePath
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

import hf_selfkd
from hf_selfkd.cli import app
from hf_selfkd.config import MethodArguments
from hf_selfkd.heads.config import PRESETS, AuxiliaryHeadsConfig
from hf_selfkd.scripts.arguments import SCRIPTS, command_of


FOLDER = Path(__file__).parent / "reference"
MODULES = (
    "hf_selfkd",
    "hf_selfkd.metrics",
    "hf_selfkd.plots",
    "hf_selfkd.report",
    "hf_selfkd.heads",
    "hf_selfkd.tasks",
)
SOME = {"hf_selfkd.tasks": ["Task", "Rows"]}  # of a module that is public in part: what a task of one's own is made of
REMAKE = "python docs/generate_reference.py"
LINE = 119  # of the formatter
NOTE = f"<!-- Made by `{REMAKE}`: change the docstrings of the package, not this page. -->"
WIDTH = 100  # of a signature on one line


# Docstrings


SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Examples?):")
ITEMS = ("Args", "Attributes", "Raises")
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?:\(#[\w.]+\))?")


@dataclass
class Part:
    """A part of a docstring: plain text (without a title) or a section."""

    title: str | None
    text: str


@dataclass
class Item:
    """An entry of a section: names, what stands in parentheses behind them, and the meaning."""

    names: list[str]
    kind: str
    text: str


def parts_of(docstring: str) -> list[Part]:
    """The parts of a docstring, which `inspect.cleandoc` has been through."""
    found, fenced = [Part(None, "")], False
    for line in docstring.splitlines():
        fence = line.lstrip().startswith("```")
        title = None if fenced or fence else SECTION.fullmatch(line)
        inside = not line or line.startswith(" ")
        if title:
            found.append(Part(title[1], ""))
        elif found[-1].title and not inside:
            found.append(Part(None, line))
        else:
            found[-1].text += f"\n{line}"
        fenced ^= fence
    parts = [Part(part.title, textwrap.dedent(part.text).strip()) for part in found]
    return [part for part in parts if part.title or part.text]


def items_of(section: str) -> list[Item]:
    """The entries of `Args`, `Attributes` or `Raises`."""
    entries: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" ") and (not entries or _colon(entries[-1]) is not None):
            entries.append(line)
        else:
            entries[-1] += f"\n{line}"
    return [_item(entry) for entry in entries]


def _colon(entry: str) -> int | None:
    """Where the names of an entry end."""
    depth, quoted = 0, False
    for place, letter in enumerate(entry):
        quoted ^= letter == "`"
        if not quoted:
            depth += (letter in "([") - (letter in ")]")
            if letter == ":" and not depth:
                return place
    return None


def _item(entry: str) -> Item:
    place = _colon(entry)
    if place is None:
        raise ValueError(f"{entry!r} has no colon behind its names.")
    names, kind = re.fullmatch(r"([^(]*?)\s*(?:\((.*)\))?", entry[:place], re.DOTALL).groups()
    first, _, others = entry[place + 1 :].strip().partition("\n")
    text = f"{first}\n{textwrap.dedent(others)}".strip()
    return Item([name.strip().strip("`") for name in names.split(",")], " ".join((kind or "").split()), text)


def section_of(docstring: str | None, *titles: str) -> list[Item]:
    """The entries of the sections of these titles."""
    parts = parts_of(inspect.cleandoc(docstring or ""))
    return [item for part in parts if part.title in titles for item in items_of(part.text)]


# Markdown


class Links:
    """Where the names are that cross references may lead to."""

    def __init__(self):
        self.places = {"MethodArguments": ("configuration.md", "methodarguments")}

    def add(self, name: str) -> None:
        """A heading of the page of names."""
        self.places[name] = ("api.md", slug(name))

    def resolve(self, text: str, page: str) -> str:
        """Replace the cross references of a text, but for those in blocks of code."""
        blocks = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
        return "".join(
            block if place % 2 else REFERENCE.sub(lambda match: self._link(match, page), block)
            for place, block in enumerate(blocks)
        )

    def _link(self, match: re.Match, page: str) -> str:
        short, name = match.groups()
        shown = name.rpartition(".")[2] if short else name
        words = name.split(".")
        own = words[0] == "hf_selfkd" or words[0] in self.places
        keys = (".".join(words[-2:]), words[-1]) if own else ()
        place = next((self.places[key] for key in keys if key in self.places), None)
        if place is None:
            return f"`{shown}`"
        return f"[`{shown}`]({'' if place[0] == page else place[0]}#{place[1]})"


def slug(title: str) -> str:
    """The anchor of a heading, as MkDocs and GitHub make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def spaced(text: str) -> str:
    """The same with an empty line before every list, without which it is none."""
    lines: list[str] = []
    for line in text.splitlines():
        before = lines[-1] if lines else ""
        if line.startswith("- ") and before and not before.startswith(("- ", "  ")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def render(docstring: str | None) -> str:
    """A docstring as Markdown, with its cross references as they are."""
    blocks = []
    for part in parts_of(inspect.cleandoc(docstring or "")):
        if part.title is None:
            blocks.append(spaced(part.text))
            continue
        blocks.append(f"**{part.title}**")
        if part.title in ITEMS:
            blocks.append("\n".join(_entry(item) for item in items_of(part.text)))
        elif part.text:
            blocks.append(spaced(part.text))
    return "\n\n".join(blocks)


def _entry(item: Item) -> str:
    names = ", ".join(f"`{name}`" for name in item.names)
    head = f"{names} ({item.kind})" if item.kind else names
    return "- " + f"{head}: {item.text}".replace("\n", "\n    ")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """
    Raises:
        ValueError: if a cell holds what would end it.
    """
    for row in rows:
        if any("|" in cell or "\n" in cell for cell in row):
            raise ValueError(f"{row}: a cell of a table holds | or a new line.")
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def page(title: str, intro: str, blocks: list[str]) -> str:
    return "\n\n".join([NOTE, f"# {title}", intro, *blocks]) + "\n"


def code(value: Any) -> str:
    """A value as it would be typed."""
    return f"`{value.as_posix() if isinstance(value, PurePath) else _literal(value)}`"


def _literal(value: Any) -> str:
    return quoted(repr(value))


def _in_lines(value: Any, before: int) -> str:
    """A value as code, with a line for each of many entries, as the formatter has them."""
    whole = _literal(value)
    if not isinstance(value, tuple) or before + len(whole) <= LINE:
        return whole
    return "(\n" + "".join(f"    {_literal(entry)},\n" for entry in value) + ")"


def quoted(text: str) -> str:
    """The same with double quotes, as the source has them."""
    return text if '"' in text else text.replace("'", '"')


# Types


def kinds_of(hint: Any) -> list[str]:
    """The types that a hint allows, one by one; the values of a `Literal`; without `None`."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in kinds_of(part)]
    if get_origin(hint) is Literal:
        return [_literal(value) for value in get_args(hint)]
    if get_origin(hint) in (list, dict, tuple):
        return [f"{get_origin(hint).__name__}[{', '.join(' | '.join(kinds_of(part)) for part in get_args(hint))}]"]
    return [] if hint is type(None) else [hint.__name__]


def any_of(words: list[str]) -> str:
    """Words as a choice."""
    words = [f"`{word}`" for word in words]
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def default_of(spec: Field) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


# Configuration


def configuration(links: Links) -> str:
    blocks = ["## `MethodArguments`", *described(MethodArguments)]
    blocks += ["## `AuxiliaryHeadsConfig`", *described(AuxiliaryHeadsConfig, "AuxiliaryHeadsConfig.")]
    blocks += ["### Presets", presets()]
    blocks += [block for task in SCRIPTS for block in flags(task)]
    intro = (
        "The fields of self-distillation, those of auxiliary heads, and the flags of every task of `hf-selfkd train`. "
        "[`SelfKDConfig`] and [`Seq2SeqSelfKDConfig`] have the fields of [`MethodArguments`] beside those of "
        "[`~transformers.TrainingArguments`], which keep their meaning and are not repeated here. On the command line "
        "each field is a flag: `--alpha 0.5`."
    )
    return links.resolve(page("Configuration", intro, blocks), "configuration.md")


def described(kind: type, prefix: str = "") -> Iterator[str]:
    """What a dataclass is, and a heading for each of its fields."""
    hints, meanings = get_type_hints(kind), {}
    for item in section_of(kind.__doc__, "Args"):
        meanings |= dict.fromkeys(item.names, item.text)
    for part in parts_of(inspect.cleandoc(kind.__doc__)):
        if part.title is None:
            yield spaced(part.text)
    for spec in fields(kind):
        words = kinds_of(hints[spec.name]) + (["None"] if type(None) in get_args(hints[spec.name]) else [])
        text = meanings[spec.name]
        yield f"### `{prefix}{spec.name}`"
        yield f"{any_of(words)}, default {code(default_of(spec))}"
        yield text[0].upper() + text[1:]


def presets() -> str:
    plain, rows = AuxiliaryHeadsConfig(), []
    for name in PRESETS:
        preset = AuxiliaryHeadsConfig.preset(name).to_dict()
        changes = [f"{key}={_literal(value)}" for key, value in preset.items() if value != getattr(plain, key)]
        rows.append((f'`"{name}"`', ", ".join(f"`{change}`" for change in changes) or "none"))
    told = "What they are, and whose: [`AuxiliaryHeadsConfig.preset`]."
    return f"{told}\n\n" + table(("Preset", "Values that differ from the defaults"), rows)


def flags(task: str) -> Iterator[str]:
    """The flags of a task of its own."""
    script = SCRIPTS[task]
    yield f"## `{command_of(task)}`"
    yield (
        f"{script.summary} Its own flags are below; the fields of [`{script.config}`], hence of "
        "[`~transformers.TrainingArguments`], are flags, too."
    )
    for kind in script.arguments:
        hints = get_type_hints(kind)
        rows = [_flag(spec, hints[spec.name]) for spec in fields(kind)]
        yield f"**{kind.__doc__.strip().rstrip('.')}**"
        yield table(("Flag", "Type", "Default", "Meaning"), rows)


def _flag(spec: Field, hint: Any) -> tuple[str, str, str, str]:
    default = default_of(spec)
    names = f"`--{spec.name}`" + (f", `--no_{spec.name}`" if hint is bool and default else "")
    return names, any_of(kinds_of(hint)), "" if default is None else code(default), spec.metadata["help"]


# Names


def public_names(module: ModuleType) -> list[str]:
    """The names that a module lists; without a list, those of its functions and classes."""
    if module.__name__ in SOME:
        return SOME[module.__name__]
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    ]
    return list(getattr(module, "__all__", own))


def documented() -> Iterator[tuple[ModuleType, str, Any]]:
    """Every public name once, with the module that has it first."""
    seen = set()
    for module in map(import_module, MODULES):
        for name in public_names(module):
            if name not in seen:
                seen.add(name)
                yield module, name, getattr(module, name)


def is_constant(value: Any) -> bool:
    return not callable(value)


def comment_of(module: ModuleType, name: str) -> str:
    """What a comment says of a constant, above it or behind it, where it is assigned."""
    source = inspect.getsource(module)
    match = re.search(rf"^((?:#.*\n)*){name} = [^#\n]*(#.*)?$", source, re.MULTILINE)
    if match:
        lines = (match[1] + (match[2] or "")).splitlines()
        return " ".join(line.lstrip("# ") for line in lines)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return comment_of(import_module("." * node.level + node.module, module.__name__), name)
    return ""


def members_of(kind: type) -> dict[str, tuple[type, Any]]:
    """The public methods and properties that classes of this package define, each with the class that does."""
    found: dict[str, tuple[type, Any]] = {}
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] != hf_selfkd.__name__:
            continue
        for name, value in vars(owner).items():
            public = not name.startswith("_") or name == "__call__"
            if public and isinstance(value, (property, classmethod, staticmethod, type(members_of))):
                found.setdefault(name, (owner, value))
    return found


def function_of(member: Any) -> Callable:
    """The function behind a method or property."""
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


def inherits_fields(kind: type) -> bool:
    """Whether a class is a dataclass with fields of transformers, which differ between its versions."""
    return hasattr(kind, "__dataclass_fields__") and any(
        hasattr(owner, "__dataclass_fields__") and owner.__module__.startswith("transformers")
        for owner in kind.__mro__
    )


def signature(name: str, value: Any, bound: bool = False) -> str:
    """A signature as it stands in the source; over several lines if it is long."""
    found = inspect.signature(value)
    shown, marked = [], False
    for place, one in enumerate(found.parameters.values()):
        if bound and place == 0:
            continue
        if one.kind is one.VAR_POSITIONAL:
            marked = True
        if one.kind is one.KEYWORD_ONLY and not marked:
            shown.append("*")
            marked = True
        shown.append(_parameter(one))
    end = "" if found.return_annotation in (found.empty, None, "None") else f" -> {_hint(found.return_annotation)}"
    line = f"{name}({', '.join(shown)}){end}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + f"){end}"
    return f"```python\n{line}\n```"


def _parameter(one: inspect.Parameter) -> str:
    star = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    hint = "" if one.annotation is one.empty else f": {_hint(one.annotation)}"
    if one.default is one.empty:
        return f"{star}{one.name}{hint}"
    return f"{one.name}{hint} = {_literal(one.default)}" if hint else f"{one.name}={_literal(one.default)}"


def _hint(annotation: Any) -> str:
    text = getattr(annotation, "__forward_arg__", annotation)
    return quoted(text) if isinstance(text, str) else text.__name__


def api(links: Links) -> str:
    blocks: list[str] = []
    entries: dict[str, list[str]] = {}  # the names of each module
    told: dict[tuple[type, str], str] = {}  # the heading of each member of a class of the package
    for module, name, value in documented():
        links.add(name)
        entries.setdefault(module.__name__, []).append(name)
        if inspect.isclass(value):
            for member, (owner, _) in members_of(value).items():
                told.setdefault((owner, member), f"{name}.{member}")
    for name in told.values():
        links.add(name)
    for module in map(import_module, MODULES):
        own = entries[module.__name__]
        blocks += [f"## `{module.__name__}`", render(module.__doc__)]
        others = [f"[`{name}`]" for name in public_names(module) if name not in own]
        if others:
            blocks.append(f"Also here: {', '.join(others)}.")
        for name in own:
            blocks += named(module, name, getattr(module, name), told)
    intro = "Every public name, with the methods and properties that this package adds to what transformers has."
    return links.resolve(page("Python names", intro, blocks), "api.md")


def named(module: ModuleType, name: str, value: Any, told: dict[tuple[type, str], str]) -> Iterator[str]:
    """A public name, and the members of a class that no class before it has told."""
    yield f"### `{name}`"
    if is_constant(value):
        if not name.startswith("__"):  # the version is another one with each release
            yield f"```python\n{name} = {_in_lines(value, len(name) + 3)}\n```"
        yield comment_of(module, name)
        return
    if not inspect.isclass(value):
        yield signature(name, value)
        if inspect.isroutine(value):
            yield render(value.__doc__)
        else:
            yield f"A ready [`{type(value).__name__}`]."
        return
    if inherits_fields(value):
        yield f"```python\nclass {name}({', '.join(base.__name__ for base in value.__bases__)})\n```"
    else:
        yield signature(f"class {name}", value)
    yield render(value.__doc__)
    before: dict[str, None] = {}  # the classes that have told a member
    for member, (owner, found) in members_of(value).items():
        place = told[owner, member]
        if place != f"{name}.{member}":
            before[place.partition(".")[0]] = None
            continue
        yield f"#### `{place}`"
        function = function_of(found)
        if not isinstance(found, property):
            shown = f"@{type(found).__name__} {member}" if isinstance(found, (classmethod, staticmethod)) else member
            shown = shown.replace(" ", "\n")
            yield signature(shown, function, bound=not isinstance(found, staticmethod))
        yield render(function.__doc__)
    if before:
        yield f"Methods and properties as in {', '.join(f'[`{other}`]' for other in before)}."


# Command line


@dataclass
class Word:
    """An argument or option of a command."""

    names: list[str]
    kind: str
    default: Any  # `inspect.Parameter.empty` if it must be given
    text: str
    option: bool


def words_of(function: Callable) -> Iterator[Word]:
    """The arguments and options of a command, from the signature that typer reads."""
    for one in inspect.signature(function, eval_str=True).parameters.values():
        hint, info, default = one.annotation, one.default, one.default
        if get_origin(hint) is Annotated:
            hint, info = get_args(hint)
        else:
            default = getattr(info, "default", None)
        if not isinstance(info, (ArgumentInfo, OptionInfo)):
            continue  # the context
        text = info.help + (f" Read from `{info.envvar}` if it is left out." if info.envvar else "")
        several = any(get_origin(part) is list for part in (hint, *get_args(hint)))
        part = next((get_args(part)[0] for part in (hint, *get_args(hint)) if get_origin(part) is list), hint)
        kinds = [{"str": "text", "Path": "path"}.get(kind, kind) for kind in kinds_of(part)]
        option, dashed = isinstance(info, OptionInfo), one.name.replace("_", "-")
        # In an `Annotated`, typer finds the first of the names that are given where the default would be.
        given = (info.default, *(info.param_decls or ()))
        declared = [word for word in given if isinstance(word, str) and word.startswith("--")]
        if not option:
            names = [one.name.upper()]
        elif declared:
            names = declared
        else:
            names = [f"--{dashed}", f"--no-{dashed}"] if hint is bool else [f"--{dashed}"]
        yield Word(names, kinds[0] + (", several" if several else ""), default, text, option)


def commands(parent: typer.Typer, path: str) -> Iterator[tuple[str, typer.Typer | None, Any]]:
    """The commands of a typer application, as they are typed: each with its group, if it is one, and what it is."""
    for group in parent.registered_groups:
        name = f"{path} {group.name}"
        yield name, group.typer_instance, group.typer_instance.info
        yield from commands(group.typer_instance, name)
    for command in parent.registered_commands:
        yield f"{path} {command.name}", None, command


def tail_of(parent: typer.Typer) -> str:
    """What may follow a command that passes words on: as the group of it says."""
    metavar = parent.info.subcommand_metavar
    return metavar.partition(" ")[2] if isinstance(metavar, str) else "[SETTINGS.yaml] [FLAGS]"


def command_line(links: Links) -> str:
    root = list(words_of(app.registered_callback.callback))
    blocks = ["## `hf-selfkd`", _usage("hf-selfkd [OPTIONS] COMMAND"), app.info.help, *_words(root)]
    for name, group, info in commands(app, "hf-selfkd"):
        blocks += [f"## `{name}`", *command(name, group, info)]
    intro = (
        "Every command answers `--help` (`-h`). A command with `[FLAGS]` passes words that it does not know on to the "
        "script of the task: its flags are in [Configuration](configuration.md), and a YAML or JSON file of settings "
        "may stand before them."
    )
    return links.resolve(page("Command line", intro, blocks), "command_line.md")


def command(name: str, group: typer.Typer | None, info: Any) -> Iterator[str]:
    if group is not None:
        yield _usage(f"{name} {info.subcommand_metavar}")
        yield info.help
        return
    words = list(words_of(info.callback))
    must = [f"{word.names[0]} {_metavar(word)}" for word in words if word.option and _required(word)]
    pieces = [name, *(_argument(word) for word in words if not word.option), *must]
    if any(word.option and not _required(word) for word in words):
        pieces.append("[OPTIONS]")
    task = next((task for task in SCRIPTS if command_of(task) == name), None)
    if (info.context_settings or {}).get("allow_extra_args"):
        pieces.append(tail_of(_group_of(name)))
    yield _usage(" ".join(pieces))
    yield from _described(inspect.cleandoc(info.help or info.callback.__doc__))
    yield from _words(words)
    if task is not None:
        flag_list = f"[Configuration](configuration.md#{slug(name)})"
        yield f"Flags: {flag_list}. `--help` lists them, and `--help-all` those of the training arguments, too."


def _group_of(name: str) -> typer.Typer:
    path = name.rpartition(" ")[0]
    return next((group for found, group, _ in commands(app, "hf-selfkd") if found == path), app)


def _described(text: str) -> Iterator[str]:
    """The paragraphs of a help; one that is a command is code."""
    examples: list[str] = []
    for paragraph in [*text.split("\n\n"), ""]:
        if paragraph.startswith("hf-selfkd "):
            examples.append(" ".join(paragraph.split()))
            continue
        if examples:
            yield _usage("\n".join(examples))
            examples = []
        if paragraph:
            yield paragraph


def _required(word: Word) -> bool:
    return word.default is inspect.Parameter.empty


def _metavar(word: Word) -> str:
    return word.kind.partition(",")[0].upper()


def _argument(word: Word) -> str:
    shown = word.names[0] + ("..." if "several" in word.kind else "")
    return shown if _required(word) else f"[{shown}]"


def _usage(line: str) -> str:
    return f"```console\n{line}\n```"


def _words(words: list[Word]) -> Iterator[str]:
    for title, option in (("Argument", False), ("Option", True)):
        rows = [
            (
                ", ".join(f"`{name}`" for name in word.names),
                word.kind,
                "required" if _required(word) else "" if word.default is None else _shown(word.default),
                word.text,
            )
            for word in words
            if word.option is option
        ]
        if rows:
            yield table((title, "Type", "Default", "Meaning"), rows)


def _shown(default: Any) -> str:
    return f"`{default}`" if isinstance(default, (str, bool)) else code(default)


# Pages


def pages() -> dict[str, str]:
    """The text of each page, by the name of its file."""
    links = Links()
    names = api(links)  # finds the headings that the others link to
    return {"configuration.md": configuration(links), "api.md": names, "command_line.md": command_line(links)}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"Wrote docs/reference/{name}")


if __name__ == "__main__":
    main()
