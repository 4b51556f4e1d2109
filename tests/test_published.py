"""Every published table has its settings, with which its benchmark gives the table again, and its log."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
BENCHMARKS, CONFIGS = ROOT / "benchmarks", ROOT / "examples" / "configs" / "results"
EIGHT = "digits_regimes"  # one command, and a log for each regime


def runs(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


LOGS = {path.stem: runs(path) for path in sorted((ROOT / "docs" / "results").glob("*.jsonl"))}
TABLES = [name for name, rows in LOGS.items() if "method" in rows[0]]
PRINTED = [name for name in TABLES if not name.startswith(("digits_", "early_exit_", "ag_news_pretrained_400_"))]
# Tables whose page has all figures of a row, and not only some of them.
WHOLE = [
    name for name in TABLES if not name.startswith(("digits_", "early_exit_", "calibrated_", "family_", "history_"))
]


def config_of(name: str) -> Path:
    regime = name.startswith("digits_") and name.endswith("_epochs")
    return CONFIGS / f"{EIGHT if regime else name}.yaml"


@pytest.fixture
def words(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "run.py"))["words"]


def test_every_table_has_its_settings_and_all_settings_a_table():
    assert len(TABLES) > 20
    assert {config_of(name) for name in TABLES} == set(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", TABLES)
def test_the_settings_are_those_of_the_log(name):
    settings, rows = yaml.safe_load(config_of(name).read_text()), LOGS[name]
    for key in {"epochs", "max_grad_norm", "max_train_samples", "train_samples"} & settings.keys():
        logged = "train_samples" if key == "max_train_samples" else key
        assert {float(row.get(logged, settings[key])) for row in rows} == {float(settings[key])}, key
    assert all((row.get("precision") == "bf16") == settings.get("bf16", False) for row in rows)
    if isinstance(settings.get("methods"), list):
        assert {row.get("training", row["method"]) for row in rows} == set(settings["methods"])
    if isinstance(settings.get("seeds"), list):
        assert {row["seed"] for row in rows} == set(settings["seeds"])


@pytest.mark.parametrize("name", WHOLE)
def test_the_page_has_the_figures_of_the_log(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results = runpy.run_path(str(BENCHMARKS / "results.py"))
    page = (ROOT / "docs" / "results.md").read_text()
    figures = [cell.strip() for line in results["table_of"](LOGS[name])[2:] for cell in line.split("|")[3:7]]
    assert len(figures) > 3
    assert [figure for figure in figures if f" {figure} |" not in page] == []


@pytest.mark.parametrize("name", PRINTED)  # the others print reports, which have tests of their own
def test_the_benchmark_prints_the_table_of_the_log(name, words, monkeypatch, capsys):
    log = ROOT / "docs" / "results" / f"{name}.jsonl"
    _, script, *flags = words(config_of(name), ["--table", "--results", str(log)])
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    printed = capsys.readouterr().out
    for method in {row["method"] for row in LOGS[name]}:
        seeds = len({row["seed"] for row in LOGS[name] if row["method"] == method})
        assert f"| {method} | {seeds} |" in printed
