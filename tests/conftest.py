"""
One thread: the tests are small, and several run side by side. The call of an example, which several files make. Tests
that are marked `gpu` are collected only where there is one. In files marked `trains` the quick suite runs the first
and the last case of each test.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from canaries import pytest_terminal_summary, pytest_warning_recorded  # noqa: F401, hooks of pytest


torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def mark_cases_between(items):
    """Mark as slow what is between the first and the last case of a test that trains."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("trains"):
            cases[item.path, item.cls, item.originalname].append(item)
    for case in (case for found in cases.values() for case in found[1:-1]):
        case.add_marker("slow")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    mark_cases_between(items)
    # Files with slow tests first: the last ones to begin should be short, or one process waits for the other.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=needs_gpu)
    items[:] = [item for item in items if item not in set(needs_gpu)]


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Call the `main` of a script with settings, as from a JSON file, and flags after it; without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(script, settings, *flags, entry="main"):
        file = tmp_path / "settings.json"
        settings = {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")} | settings
        file.write_text(json.dumps(settings, default=str))
        monkeypatch.setattr(sys, "argv", [script.__name__, str(file), *map(str, flags)])
        getattr(script, entry)()
        return Path(settings["output_dir"])

    return run
