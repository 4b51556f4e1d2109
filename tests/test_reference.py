"""The reference pages say what the package says now, and docstrings tell of the arguments that there are."""

import ast
import importlib.util
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import typer
from test_docs import names_of
from transformers import Seq2SeqTrainingArguments, Trainer

import hf_selfkd
from hf_selfkd.cli import app
from hf_selfkd.config import MethodArguments
from hf_selfkd.heads.config import PRESETS
from hf_selfkd.scripts.arguments import SCRIPTS


ROOT = Path(__file__).parents[1]
REMAKE = "python docs/generate_reference.py"


def load_script():
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


script = load_script()


@pytest.fixture(scope="module")
def pages():
    return script.pages()


# Pages


def stale_pages(pages, folder):
    committed = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in pages.keys() | committed.keys() if pages.get(name) != committed.get(name))


def test_committed_pages_are_those_of_the_package(pages):
    stale = stale_pages(pages, script.FOLDER)
    assert not stale, f"docs/reference has pages of another time: {', '.join(stale)}. `{REMAKE}` remakes them."


def test_a_page_of_another_time_is_found(tmp_path, monkeypatch, pages):
    monkeypatch.setattr(script, "FOLDER", tmp_path / "reference")
    script.main()
    assert stale_pages(pages, script.FOLDER) == []
    text = (script.FOLDER / "api.md").read_text(encoding="utf-8")
    (script.FOLDER / "api.md").write_text(text.replace("alpha", "beta"), encoding="utf-8")
    (script.FOLDER / "old.md").write_text("")
    assert stale_pages(pages, script.FOLDER) == ["api.md", "old.md"]


def test_pages_do_not_depend_on_the_machine(monkeypatch, pages):
    monkeypatch.setenv("COLUMNS", "40")
    assert script.pages() == pages
    for text in pages.values():
        assert str(ROOT) not in text and str(Path.home()) not in text and " at 0x" not in text
        assert hf_selfkd.__version__ not in text and "<function" not in text and "<class" not in text
    assert not [spec.name for spec in fields(Seq2SeqTrainingArguments) if f"### `{spec.name}`" in pages["api.md"]]


def anchors_of(text):
    titles = [script.slug(title) for title in re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)]
    assert len(titles) == len(set(titles))
    return set(titles)


def without_code(text):
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_links_lead_to_headings(pages):
    anchors = {name: anchors_of(text) for name, text in pages.items()}
    links = [(page, *link) for page, text in pages.items() for link in re.findall(r"\]\(([\w.]*)#([^)]+)\)", text)]
    assert len(links) > 50
    assert not [(page, target, anchor) for page, target, anchor in links if anchor not in anchors[target or page]]
    assert not [line for text in pages.values() for line in without_code(text).splitlines() if "[`~" in line]


def test_pages_stand_in_the_navigation(pages):
    settings = (ROOT / "mkdocs.yml").read_text()
    assert all(f"reference/{name}\n" in settings for name in pages)


def test_every_field_and_flag_stands_on_its_page(pages):
    text = pages["configuration.md"]
    assert all(f"### `{spec.name}`\n" in text for spec in fields(MethodArguments))
    for field in fields(hf_selfkd.AuxiliaryHeadsConfig):
        assert f"### `AuxiliaryHeadsConfig.{field.name}`\n" in text
    assert all(f'| `"{name}"` | ' in text for name in PRESETS)
    for task, entry in SCRIPTS.items():
        section = text.partition(f"## `hf-selfkd train {task}`\n")[2].partition("\n## ")[0]
        names = [spec.name for kind in entry.arguments for spec in fields(kind)]
        assert re.findall(r"^\| `--(\w+)`", section, re.MULTILINE) == names


def commands(command, path):
    yield path, command
    for name, other in getattr(command, "commands", {}).items():
        yield from commands(other, f"{path} {name}")


def test_every_command_stands_on_its_page(pages):
    text, count = pages["command_line.md"], 0
    for path, command in commands(typer.main.get_command(app), "hf-selfkd"):
        section = text.partition(f"\n## `{path}`\n")[2].partition("\n## ")[0]
        assert section and " ".join(command.help.split("\n\n")[0].split()) in " ".join(section.split())
        words = [word for word in command.params if not word.name.endswith("_completion")]
        names = [name.upper() if name == word.name else name for word in words for name in [*word.opts]]
        names += [name for word in words for name in word.secondary_opts]
        assert [name for name in names if f"`{name}`" not in section] == []
        assert len(re.findall(r"^\| `", section, re.MULTILINE)) == len(words)
        assert section.count("| required |") == sum(word.required for word in words)
        count += 1
    assert count == len(re.findall(r"^## ", text, re.MULTILINE)) > 10


# Docstrings


EXAMPLE = """Do it.

- one
Args:
    one, two,
    *three: As for [`~transformers.Trainer`],
        and more: so.
    four (`dict[str, int]` or `(a: b)`, *optional*): [`reliability_curve`]
        - of a list

Raises:
    `ValueError`: never.

Example:

```python
Args: [`SelfKDTrainer`]
```
"""


def test_a_docstring_becomes_markdown():
    parts = script.parts_of(EXAMPLE)
    assert [part.title for part in parts] == [None, "Args", "Raises", "Example", None]
    first, second = script.items_of(parts[1].text)
    assert first.names == ["one", "two", "*three"] and first.text == "As for [`~transformers.Trainer`],\nand more: so."
    assert second.names == ["four"] and second.kind == "`dict[str, int]` or `(a: b)`, *optional*"
    links = script.Links()
    links.add("reliability_curve")
    links.add("SelfKDTrainer")
    text = links.resolve(script.render(EXAMPLE), "configuration.md")
    assert text.startswith("Do it.\n\n- one\n\n**Args**\n\n- `one`, `two`, `*three`: As for `Trainer`,\n    and more")
    assert "[`reliability_curve`](api.md#reliability_curve)\n    - of a list" in text
    assert "- `ValueError`: never." in text and text.endswith("```python\nArgs: [`SelfKDTrainer`]\n```")


def documented():
    """Every public name, and the members that this package gives to classes."""
    for module, name, value in script.documented():
        yield name, module, value
        if inspect.isclass(value):
            for member, (owner, found) in script.members_of(value).items():
                yield f"{owner.__name__}.{member}", module, found


def docstring_of(name, module, value):
    if not callable(value) and not isinstance(value, (property, classmethod, staticmethod)):
        return script.comment_of(module, name)
    return script.function_of(value).__doc__ or ""


def test_every_public_name_has_a_docstring():
    found = {name: docstring_of(name, module, value) for name, module, value in documented()}
    assert len(found) > 70
    assert [name for name, text in found.items() if not text.strip()] == []


def signatures():
    """The name, docstring and parameters of what has arguments: `None` for a method that may leave them out."""
    yield "MethodArguments", MethodArguments.__doc__, list(inspect.signature(MethodArguments).parameters.values())
    for name, _, value in documented():
        if isinstance(value, property) or not (callable(value) or hasattr(value, "__func__")):
            continue
        if inspect.isclass(value) and script.inherits_fields(value):
            continue  # its fields are those of MethodArguments
        function = value if inspect.isclass(value) else script.function_of(value)
        parameters = list(inspect.signature(function).parameters.values())
        if "." in name:
            parameters = parameters[1:]
            if hasattr(Trainer, name.partition(".")[2]) and not script.section_of(function.__doc__, "Args"):
                continue  # as there
        if inspect.isclass(value) or inspect.isroutine(value) or hasattr(value, "__func__"):
            yield name, function.__doc__, parameters


def told_of(docstring):
    return script.section_of(docstring, "Args") or script.section_of(docstring, "Attributes")


def spelled(parameter):
    return {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name


@pytest.mark.parametrize(
    ("docstring", "parameters"), [pytest.param(doc, found, id=name) for name, doc, found in signatures()]
)
def test_docstrings_tell_of_every_argument(docstring, parameters):
    told = told_of(docstring)
    assert sorted(name for item in told for name in item.names) == sorted(map(spelled, parameters))
    defaults = {parameter.name: parameter.default for parameter in parameters}
    for item in told:
        if not item.kind:
            continue  # several at once, or as elsewhere
        default = defaults[item.names[0]]
        assert ("*optional*" in item.kind) == (default is not inspect.Parameter.empty), item.names
        stated = re.search(r"defaults to (.*)", item.kind)
        if stated:
            assert ast.literal_eval(stated[1].strip("`")) == default, item.names
        else:
            assert default in (None, inspect.Parameter.empty), item.names


def test_configurations_add_no_fields_of_their_own():
    known = {spec.name for kind in (Seq2SeqTrainingArguments, MethodArguments) for spec in fields(kind)}
    for kind in (hf_selfkd.SelfKDConfig, hf_selfkd.Seq2SeqSelfKDConfig):
        assert {spec.name for spec in fields(kind)} <= known


# Examples

EXAMPLES = {  # what each runs on, as the sections of other pages do
    "EarlyExit": "exits",
    "LoopDistiller": "images",
    "SelfKDConfig": "images",
    "SelfKDTrainer": "images",
    "calibration_metrics": "images",
    "compute_speech_metrics": "speech",
    "compute_translation_metrics": "pairs",
    "error_rates": "images",
    "multi_label_metrics": "images",
    "reliability_diagram": "images",
    "segmentation_metrics": "images",
}


def examples():
    """The code under the heading `Example` of each public name that has some."""
    for name, _, value in documented():
        docstring = getattr(value, "__doc__", None) if callable(value) and "." not in name else None
        parts = script.parts_of(inspect.cleandoc(docstring or ""))
        places = [place for place, part in enumerate(parts) if part.title == "Example"]
        if places and hasattr(value, "__name__"):
            text = parts[places[0]].text or parts[places[0] + 1].text
            yield name, text.removeprefix("```python\n").removesuffix("```")


def test_every_example_has_what_it_runs_on():
    assert dict(examples()).keys() == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = {title: value for _, title, value in script.documented()} | names_of(EXAMPLES[name])
    names |= {key: rng.normal(size=(30, 5)) for key in ("logits_a", "logits_b")} | {"labels": rng.integers(5, size=30)}
    exec(compile(dict(examples())[name], name, "exec"), names)
    assert name != "reliability_diagram" or (tmp_path / "reliability.png").is_file()
    assert name != "SelfKDTrainer" or names["trainer"].state.global_step > 0
