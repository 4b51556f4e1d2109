"""The project's habits: canaries that report, versions that agree, deprecations that tests do not overlook."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

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
