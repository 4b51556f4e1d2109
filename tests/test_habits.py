"""The project's habits: canaries that report, versions that agree, deprecations that tests do not overlook."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from packaging.version import Version


ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
# Modules of an extra: what imports them does so in a function, or says which extra is missing.
LAZY = {"cldr_corpus.py", *(f"detection/{name}.py" for name in ("data", "predictions", "transforms"))}  # of scripts
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # where the name is not the module's

# Canaries

SUITE = """
import warnings
import pytest
from canaries import canary

@pytest.mark.parametrize("is_right", [True, False])
@canary("library#1", "its correction (fixes.py)")
def test_of_a_fault(tmp_path, is_right):
    assert tmp_path.is_dir()
    return is_right

@canary("library#2", "another correction")
def test_that_fails():
    raise KeyError("no such thing")

def test_of_something_else():
    pass
"""


def run_canaries(folder, *flags, text=SUITE):
    (folder / "test_upstream.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "canaries", "-q", "-p", "no:cacheprovider", *flags]
    environment = {"PYTHONPATH": str(ROOT / "tests"), "PATH": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("flags", [(), ("-W", "error"), ("-n", "1")], ids=str)
def test_a_canary_reports_and_does_not_fail(tmp_path, flags):
    ran = run_canaries(tmp_path, *flags)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 passed" in ran.stdout
    section = re.search(r"^=+ canaries =+\n(.*)\n(.*)\n", ran.stdout, re.MULTILINE)
    assert section.group(1) == "upstream has fixed: library#1; hf_selfkd can lose its correction (fixes.py)"
    assert section.group(2).startswith("cannot tell whether upstream has fixed: library#2 (KeyError: ")
    assert "CanaryWarning" in ran.stdout  # and among the warnings, with the name of the test


def test_a_fault_that_is_there_is_not_reported(tmp_path):
    text = SUITE.replace("[True, False]", "[False]").replace('raise KeyError("no such thing")', "return False")
    ran = run_canaries(tmp_path, text=text)
    assert ran.returncode == 0
    assert "canaries ==" not in ran.stdout and "CanaryWarning" not in ran.stdout


# Versions


def lower_bounds(text):
    """Each `"name>=version"` of a part of pyproject.toml; every name has one bound."""
    bounds = {}
    for name, version in re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?:,<[\d.]+)?"', text):
        assert bounds.setdefault(name, version) == version, f"{name} has two lower bounds"
    return bounds


def section(start, end):
    return PYPROJECT[PYPROJECT.index(start) : PYPROJECT.index(end)]


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = lower_bounds(section("dependencies = [", "[tool."))
    lines = (ROOT / "requirements/oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins.keys() == bounds.keys()
    assert {name: Version(pin) for name, pin in pins.items()} == {name: Version(low) for name, low in bounds.items()}


def test_the_lowest_python_is_said_once_and_the_same():
    lowest = re.search(r'requires-python = ">=(3\.\d+)"', PYPROJECT).group(1)
    assert f"OLDEST_PYTHON ?= python{lowest}" in (ROOT / "Makefile").read_text()
    short = lowest.replace(".", "")
    assert f'target-version = "py{short}"' in PYPROJECT


def test_pre_commit_has_the_ruff_of_the_linter():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = [entry for entry in config["repos"] if "ruff" in entry["repo"]]
    version = repository["rev"].removeprefix("v")
    assert f'"ruff~={version}"' in PYPROJECT
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


def imported(tree):
    """The top-level names of all modules that a tree imports from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_every_import_is_declared():
    """What a module imports at once is a dependency; what it imports in a function or for types may be in an extra."""
    needed = set(re.findall(r'^    "([\w-]+)', section("dependencies = [", "[project.optional"), re.MULTILINE))
    extras = set(re.findall(r'"([\w-]+)[\[>=~"]', section("[project.optional", "[tool.")))
    for path in (ROOT / "hf_selfkd").rglob("*.py"):
        tree = ast.parse(path.read_text())
        body = [] if path in {ROOT / "hf_selfkd/scripts" / name for name in LAZY} else tree.body
        always = ast.Module([node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        for names, declared in ((set(imported(always)), needed), (set(imported(tree)), needed | extras)):
            names = {DISTRIBUTIONS.get(name, name) for name in names - sys.stdlib_module_names - {"hf_selfkd"}}
            assert names <= declared, f"{path.name} imports {sorted(names - declared)}: declare them in pyproject.toml"


# Deprecations and forms


def test_a_deprecation_of_ours_is_an_error_in_tests():
    with pytest.raises(FutureWarning):
        warnings.warn("hf_selfkd: old_name is new_name now, and goes in 0.3.", FutureWarning, stacklevel=1)


@pytest.mark.parametrize("form", ["bug_report", "feature_request"])
def test_issue_forms_are_valid(form):
    content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    assert content["name"] and content["description"]
    ids = [entry["id"] for entry in content["body"] if entry["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    assert all(entry["attributes"].get("label") for entry in content["body"] if entry["type"] != "markdown")
