"""The notebooks run, cut short, and are committed with the outputs of a full run."""

import ast
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers.utils import logging as transformers_logging


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples/notebooks"
SHORT = {
    "vision": {"EPOCHS": 2, "TRAIN_IMAGES": 200, "SHORT_EPOCHS": 2},
    "translation": {"EPOCHS": 2, "TRAIN_PAIRS": 64, "TEST_PAIRS": 8},
}
PLACES = r"(?<![\w.:/])/(?:home|root|work|tmp|usr|opt|content|Users|private|mnt)/"
MACHINE = re.compile(rf"{PLACES}|[A-Z]:\\\\|site-packages")


def load(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(notebook):
    """The source of each code cell, without the commands of IPython."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).split("\n")
            yield "\n".join(line for line in lines if not line.startswith("%"))


def shortened(cells, settings):
    """With other values of the settings, each of which is given once."""
    source = "\n\n".join(cells)
    for name in settings:
        assert len(re.findall(rf"^{name} = \d+", source, re.MULTILINE)) == 1
    for cell in cells:
        for name, value in settings.items():
            cell = re.sub(rf"^{name} = \d+", f"{name} = {value}", cell, flags=re.MULTILINE)
        yield cell


@pytest.fixture
def restored():
    """Notebooks are quiet, and take one thread: not what other tests expect."""
    verbosity, threads, bars = (
        transformers_logging.get_verbosity(),
        torch.get_num_threads(),
        datasets.are_progress_bars_disabled(),
    )
    yield
    transformers_logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)
    if not bars:
        datasets.enable_progress_bars()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_runs(tmp_path, monkeypatch, capsys, restored, name):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, cell in enumerate(shortened(list(code(load(name))), SHORT[name])):
        exec(compile(cell, f"{name}.ipynb, code cell {number}", "exec"), names)
    for trainer in names["trainers"].values():
        assert trainer.state.epoch == 2
        assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert {"plain", "label smoothing 0.1", "PS-KD"} <= names["trainers"].keys()
    assert names["trainers"]["PS-KD"].teacher.kind == "history" and names["trainers"]["plain"].method.alpha == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*")), ids=lambda path: path.name)
def test_a_notebook_is_whole(path):
    assert path.stem in SHORT and path.suffix == ".ipynb" and path.stat().st_size < 400_000
    notebook = load(path.stem)
    assert notebook["nbformat"] == 4 and notebook["metadata"].keys() <= {"kernelspec", "language_info"}
    assert notebook["cells"][0]["cell_type"] == "markdown" and "".join(notebook["cells"][0]["source"])[:2] == "# "
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["metadata"] == {} and "".join(cell["source"]).strip()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "%pip install" in "".join(cells[0]["source"])
    assert [cell["execution_count"] for cell in cells[1:]] == list(range(2, len(cells) + 1))


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_has_the_outputs_of_a_run(name):
    outputs = [output for cell in load(name)["cells"] for output in cell.get("outputs", ())]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    tables = [output["data"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("PS-KD" in "".join(table["text/html"]) for table in tables)
    if name == "vision":
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    for output in outputs:
        texts = [output.get("text", ""), *output.get("data", {}).get("text/plain", ())]
        assert "\x1b" not in "".join("".join(text) for text in texts) and "%|" not in "".join(map("".join, texts))


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_names_no_place_of_a_machine(name):
    for cell in load(name)["cells"]:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
        found = MACHINE.search(json.dumps(cell, ensure_ascii=False))
        assert not found, found
    assert MACHINE.search('"/home/somebody/model"') and not MACHINE.search("https://arxiv.org/tmp/1 and a/tmp/b")


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_imports_what_its_extra_installs(name):
    """The first cell installs one extra of pyproject.toml."""
    extra = re.search(r"\[(\w+)\]", "".join(load(name)["cells"][2]["source"])).group(1)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    installed = re.search(rf"^{extra} = \[(.*)\]$", pyproject, re.MULTILINE).group(1)
    installed += pyproject[pyproject.index("dependencies = [") : pyproject.index("[project.scripts]")]
    known = {"pandas": "datasets", "sklearn": "scikit-learn"}  # the first is a dependency of the second
    for cell in code(load(name)):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ImportFrom) or isinstance(node, ast.Import):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                top = module.split(".")[0]
                assert top in ("hf_selfkd", "logging", "pathlib") or f'"{known.get(top, top)}' in installed, top


def test_the_examples_name_the_notebooks():
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert all(f"(notebooks/{name}.ipynb)" in page for name in SHORT)
