"""Comparisons: figures against the package's metrics, intervals, cells that are done once, and what is said."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import refused
from test_cli import call

from hf_selfkd.cards.facts import finite
from hf_selfkd.comparison import report, statistics
from hf_selfkd.comparison.cells import Cell, Comparison, read_rows
from hf_selfkd.comparison.methods import METHODS
from hf_selfkd.metrics import calibration_metrics
from hf_selfkd.scripts.arguments import SCRIPTS
from hf_selfkd.scripts.common import parse_arguments


def rows_of(logits, labels):
    logits = logits - logits.max(-1, keepdims=True)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return {
        "label_probability": probs[np.arange(len(labels)), labels],
        "confidence": probs.max(-1),
        "correct": probs.argmax(-1) == labels,
    }


def cell(method, seed, gain=0.0, size=400, data=0):
    """A run on the same samples, with `gain` more score for the right class."""
    rng = np.random.default_rng(data)
    labels, logits = rng.integers(0, 5, size), rng.normal(size=(size, 5))
    logits[np.arange(size), labels] += 1 + gain
    logits += 0.1 * np.random.default_rng(seed + 10).normal(size=logits.shape)
    rows = rows_of(logits, labels)
    return Cell(method, seed, {"accuracy": float(rows["correct"].mean()), "train_seconds": 2.0}, rows)


# Figures and intervals


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_the_metrics(seed):
    rng = np.random.default_rng(seed)
    logits, labels = 2 * rng.normal(size=(500, 7)), rng.integers(0, 7, 500)
    expected, rows = calibration_metrics(logits, labels), rows_of(logits, labels)
    assert statistics.error(rows) == pytest.approx(100 * (1 - expected["accuracy"]))
    for name in ("nll", "ece", "aurc"):
        assert statistics.FIGURES[name](rows) == pytest.approx(expected[name], rel=1e-6), name


def test_intervals_hold_what_is_there():
    """No difference is not found, a large one is; samples are the same for both runs of a pair."""
    plain = [cell("plain", seed) for seed in range(3)]
    same = statistics.compare([*plain, *(cell("same", seed + 50) for seed in range(3))], "same", "plain")
    assert same == {}  # no seed in common
    again = [Cell("again", one.seed, one.metrics, one.rows) for one in plain]
    for difference in statistics.compare([*plain, *again], "again", "plain").values():
        assert difference.mean == difference.low == difference.high == 0 and not difference.clear
    other = statistics.compare([*plain, *(cell("other", seed, data=0) for seed in range(3))], "other", "plain")
    assert not any(part.clear for part in other.values())
    better = statistics.compare([*plain, *(cell("better", seed, gain=1.0) for seed in range(3))], "better", "plain")
    assert better["error"].clear and better["error"].high < 0 and better["nll"].high < 0
    assert better["error"].low < better["error"].mean < better["error"].high
    assert better["error"].by == "samples and seeds"


def test_the_bootstrap_is_as_wide_as_theory_says():
    """One seed, paired errors: the interval of a mean of differences, by the normal approximation."""
    rng = np.random.default_rng(1)
    first, second = rng.random(2000) < 0.7, rng.random(2000) < 0.75
    base = {"label_probability": np.full(2000, 0.5), "confidence": np.full(2000, 0.6)}
    cells = [Cell("plain", 0, {}, base | {"correct": first}), Cell("new", 0, {}, base | {"correct": second})]
    found = statistics.compare(cells, "new", "plain")["error"]
    gaps = 100 * (first.astype(float) - second)
    half = 1.96 * gaps.std(ddof=1) / math.sqrt(2000)
    assert found.mean == pytest.approx(gaps.mean()) and found.by == "samples; one seed"
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_metrics_without_samples_are_compared_over_seeds():
    """Student's interval, worked out by hand; with one seed there is none."""
    scores = {"plain": (20.0, 21.0, 22.0), "new": (22.0, 22.5, 24.0)}
    cells = [
        Cell(method, seed, {"bleu": value, "train_seconds": None})
        for method, values in scores.items()
        for seed, value in enumerate(values)
    ]
    found = statistics.compare(cells, "new", "plain")["bleu"]
    half = 4.303 * np.std([2.0, 1.5, 2.0], ddof=1) / math.sqrt(3)
    assert (found.mean, found.low) == pytest.approx((5.5 / 3, 5.5 / 3 - half)) and found.clear
    alone = statistics.compare([cells[0], cells[3]], "new", "plain")["bleu"]
    assert math.isinf(alone.high) and not alone.clear


# Report


def test_the_report(tmp_path):
    cells = [cell("plain", seed) for seed in range(3)] + [cell("sla", seed, gain=1.0) for seed in range(3)]
    summary = report.summarize(cells)
    text = report.markdown(summary)
    errors = [statistics.error(one.rows) for one in cells[:3]]
    assert f"| plain | 3 | {np.mean(errors):.2f} ± {np.std(errors, ddof=1):.2f} |" in text
    assert "- sla: better in Error (%) -" in text and "worse in ECE (%) +" in text and "run at least 3" not in text
    paths = report.write(summary, tmp_path, "a <title>")
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored["methods"][1]["differences"]["error"]["mean"] < 0 and len(paths) == 3
    page = (tmp_path / "comparison.html").read_text()
    assert "a &lt;title&gt;" in page and "http" not in page and "<script" not in page


def test_a_verdict_that_says_when_nothing_can_be_concluded():
    cells = [cell("plain", 0), cell("other", 0)]
    (_, other) = report.summarize(cells)["methods"]
    assert "nothing can be concluded" in other["verdict"] and "With 1 seed, another seed" in other["verdict"]
    worse = report.summarize([cell("plain", 0, gain=1.0), cell("other", 0)])["methods"][1]["verdict"]
    assert " worse in Error (%) +" in worse
    bleu = [Cell(m, s, {"bleu": 20.0 + s, "train_seconds": 1.0}) for m in ("plain", "new") for s in (0, 1)]
    assert "nothing can be concluded" in report.summarize(bleu)["methods"][1]["verdict"]
    single = report.summarize(bleu[::2])
    assert "(" not in report.markdown(single).split("\n- ")[0].split("interval")[1]  # one seed has no interval
    json.loads(json.dumps(finite(single), allow_nan=False))


# Cells


class Trainings:
    """Stands for the processes that train: notes their words, writes what a script writes."""

    def __init__(self, fails=()):
        self.words, self.fails = [], set(fails)

    def run(self, command, stdout, stderr, check):
        words = command[4:]
        self.words.append(words)
        seed, out = int(words[words.index("--seed") + 1]), words[words.index("--output_dir") + 1]
        if seed in self.fails:
            stdout.write("a line\nValueError: the last line says why\n")
            return SimpleNamespace(returncode=1)
        from pathlib import Path

        Path(out).mkdir(parents=True)
        found = {"predict_accuracy": 0.5, "predict_samples": 2, "train_runtime": 3.0, "eval_accuracy": 0.1}
        (Path(out) / "all_results.json").write_text(json.dumps(found))
        with (Path(out) / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "prediction", "confidence", "label", "label_probability"])
            writer.writerows([[0, "cat", 0.9, "cat", 0.9], [1, "dog", 0.6, "cat", 0.4]])
        return SimpleNamespace(returncode=0)


@pytest.fixture
def trainings(monkeypatch):
    made = Trainings()
    monkeypatch.setattr("hf_selfkd.comparison.cells.subprocess.run", lambda *a, **k: made.run(*a, **k))
    return made


def test_cells_are_trained_once(tmp_path, trainings):
    comparison, told = Comparison("text-classification", ["--alpha", "0.5"], tmp_path), []
    cells = comparison.run_missing(["plain", "history"], [0, 1], told.append)
    assert [(one.method, one.seed) for one in cells] == [("plain", 0), ("history", 0), ("plain", 1), ("history", 1)]
    assert cells[0].metrics["accuracy"] == 0.5 and cells[0].metrics["train_seconds"] == 3.0
    assert statistics.figures(cells[0])["error"] == 50 and cells[0].rows["correct"].tolist() == [True, False]
    assert not (tmp_path / "plain_0/model").exists() and (tmp_path / "plain_0/log.txt").is_file()
    again = comparison.run_missing(["plain", "history", "rank"], [0, 1], told.append)
    assert len(trainings.words) == 6 and len(again) == 6 and told[-3].startswith("4 of 6 runs are done")
    other = Comparison("text-classification", ["--alpha", "0.6"], tmp_path)
    refused(lambda: other.run_missing(["plain"], [0], told.append), "runs.jsonl", "other settings", "--folder")


def test_the_settings_file_counts(tmp_path, trainings):
    (tmp_path / "run.yaml").write_text("alpha: 0.5\n")
    words = [str(tmp_path / "run.yaml")]
    before = Comparison("translation", words, tmp_path).settings
    (tmp_path / "run.yaml").write_text("alpha: 0.6\n")
    assert Comparison("translation", words, tmp_path).settings != before
    refused(lambda: Comparison("translation", ["--seed", "1"], tmp_path), "--seed", "--seeds of compare")


def test_a_failed_training_is_told_and_tried_again(tmp_path, trainings):
    trainings.fails = {1}
    comparison = Comparison("translation", [], tmp_path)
    refused(
        lambda: comparison.run_missing(["plain"], [0, 1], lambda text: None),
        "plain, seed 1 failed",
        "log.txt",
        "ValueError: the last line says why",
    )
    trainings.fails = set()
    assert len(comparison.run_missing(["plain"], [0, 1], lambda text: None)) == 2 and len(trainings.words) == 3


def test_predictions_without_labels_have_no_rows(tmp_path):
    (tmp_path / "predictions.csv").write_text("row,prediction,confidence\n0,cat,0.5\n")
    assert read_rows(tmp_path / "predictions.csv") is None


@pytest.mark.parametrize("method", [name for name in METHODS if name != "given"])
def test_methods_undo_what_the_settings_ask_for(tmp_path, method):
    """Every method is a valid run, whatever the shared settings say of self-distillation."""
    from hf_selfkd.scripts import text_classification

    shared = ["--model_type", "bert", "--train_file", "x.csv", "--output_dir", str(tmp_path), "--use_cpu"]
    shared += ["--teacher", "snapshot", "--alpha", "0.3", "--auxiliary_heads", "byot", "--alpha_schedule", "cosine"]
    *_, args = parse_arguments(text_classification.make_parser(), [*shared, *METHODS[method]])
    assert (args.alpha > 0) == (method in ("history", "snapshot", "ema", "rank", "calibrated", "sla+history", "lsskd"))
    heads = method.split("+")[0] if method.split("+")[0] in ("sla", "lsskd", "byot", "deep_supervision") else None
    assert args.auxiliary_heads == heads
    assert args.teacher == (
        method.split("+")[-1]
        if method.split("+")[-1] in ("history", "snapshot", "ema", "rank")
        else "history"
        if method == "calibrated"
        else "auto"
    )
    assert args.label_smoothing_factor == (0.1 if method == "label-smoothing" else 0.0)


def test_the_command(tmp_path, trainings):
    words = [
        "compare",
        "text-classification",
        "--folder",
        str(tmp_path),
        "--seeds",
        "0,1,2",
        "--methods",
        "plain,rank",
    ]
    words += ["--do_predict", "--num_train_epochs", "3", "--model_type", "bert", "--train_file", "texts.csv"]
    status, said = call(*words)
    assert status == 0 and "rank: nothing can be concluded" in said and (tmp_path / "comparison.html").is_file()
    assert len(trainings.words) == 6 and trainings.words[0][1:4] == ["--do_predict", "--num_train_epochs", "3"]
    assert trainings.words[0][0] == "text-classification" in SCRIPTS


def test_settings_that_are_refused_are_found_before_the_first_training(tmp_path, trainings):
    flags = ["--model_type", "bert", "--train_file", "texts.csv", "--calibration_fraction", "2"]
    status, said = call("compare", "text-classification", "--folder", str(tmp_path), *flags)
    assert status == 1 and "given: calibration_fraction=2.0" in said and trainings.words == []
    status, said = call("compare", "text-classification", "--folder", str(tmp_path), *flags[:4], "--aplha", "1")
    assert status == 1 and "plain: --aplha 1: no such flag" in said and trainings.words == []


def test_a_task_without_label_smoothing(tmp_path, trainings):
    """Left out, with a sentence, where no methods are named; refused where the method is."""
    words = ["compare", "object-detection", "--folder", str(tmp_path), "--seeds", "0"]
    flags = ["--model_type", "detr", "--train_dir", "voc", "--alpha", "0.3"]
    status, said = call(*words, *flags)
    assert status == 0 and said.startswith("label-smoothing is left out: the losses of detectors"), said
    assert len(trainings.words) == 2 and not any("0.1" in line for line in trainings.words)
    cells = json.loads((tmp_path / "comparison.json").read_text())["methods"]
    assert [row["method"] for row in cells] == ["plain", "given"]
    status, said = call(*words, "--methods", "plain,label-smoothing", *flags)
    assert status == 1 and "leave out label-smoothing; the losses of detectors" in said
    assert len(trainings.words) == 2
    status, said = call("compare", "text-classification", *words[2:3], str(tmp_path / "texts"), *words[4:],
                        "--model_type", "bert", "--train_file", "texts.csv")  # fmt: skip
    assert status == 0 and "left out" not in said and len(trainings.words) == 5


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["fishing"], ["no task 'fishing'", "translation"]),
        (["translation", "--methods", "plain,best"], ["--methods plain,best", "choose among"]),
        (["translation", "--methods", "history"], ["add plain"]),
        (["translation", "--seeds", "0,x"], ["--seeds 0,x", "whole numbers"]),
    ],
)
def test_commands_that_cannot_be_done(tmp_path, words, parts):
    status, said = call("compare", *words, "--folder", str(tmp_path))
    assert status == 1 and said.startswith("Error: ") and said.count("\n") == 1
    assert all(part in said for part in parts)


def test_runs_that_went_astray_do_not_end_the_comparison(tmp_path):
    rows = {"label_probability": np.full(10, np.nan), "confidence": np.full(10, np.nan), "correct": np.ones(10, bool)}
    assert math.isnan(statistics.ece(rows))
    (tmp_path / "predictions.csv").write_text("row,prediction,confidence,label,label_probability\n0,a,nan,a,nan\n")
    assert read_rows(tmp_path / "predictions.csv") is None
    cells = [Cell(m, s, {"perplexity": math.nan, "train_seconds": 1.0}) for m in ("plain", "new") for s in (0, 1, 2)]
    assert "nan" in report.markdown(report.summarize(cells))


def test_intervals_over_a_few_seeds_are_not_too_narrow():
    """Two equal methods whose seeds differ: about one comparison in twenty may be called clear, not one in four."""
    rng, clear = np.random.default_rng(0), 0
    for _ in range(60):
        cells = [
            Cell(
                method,
                seed,
                {},
                {"label_probability": np.full(1000, 0.5), "confidence": np.full(1000, 0.6)}
                | {"correct": rng.random(1000) < 0.7 + 0.03 * rng.normal()},
            )
            for method in ("plain", "new")
            for seed in range(3)
        ]
        found = statistics.FIGURES
        gaps = [found["error"](cells[seed + 3].rows) - found["error"](cells[seed].rows) for seed in range(3)]
        clear += abs(np.mean(gaps)) > statistics._student(gaps)
    assert clear <= 8
