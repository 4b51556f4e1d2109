"""The command line, and that nothing heavy is imported before it is needed."""

import ast
import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import typer
from helpers import results
from typer.testing import CliRunner

import hf_selfkd
from hf_selfkd.cli import app
from hf_selfkd.cli.common import print_table
from hf_selfkd.cli.train import own_flags
from hf_selfkd.scripts.arguments import SCRIPTS
from hf_selfkd.scripts.common import parse_arguments


TASKS = ("image-classification", "object-detection", "text-classification", "translation", "language-modeling")
ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "numpy")


def call(*words):
    """The exit status and the text of a command, on a terminal of a fixed width."""
    done = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, list(words), catch_exceptions=False)
    return done.exit_code, done.output


def flags_of(parser):
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


def script_of(task):
    return import_module(f"hf_selfkd.scripts.{SCRIPTS[task].module}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], "train"),
        (["--version"], hf_selfkd.__version__),
        (["train", "--help"], "text-classification"),
        (["train", "translation", "--help"], "--source_lang"),
        (["train", "image"], "translation"),
    ],
)
def test_help_imports_nothing_heavy(words, said):
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('heavy:', [name for name in {HEAVY} if name in sys.modules]))\n"
        "from hf_selfkd.cli import main\n"
        f"sys.argv[1:] = {words}\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert said in done.stdout + done.stderr and "heavy: []" in done.stdout


def test_names_of_the_package_are_found_when_they_are_used():
    for name in hf_selfkd.__all__:
        assert name in dir(hf_selfkd) and getattr(hf_selfkd, name) is not None
    assert hf_selfkd.SelfKDTrainer.__name__ == "SelfKDTrainer"
    with pytest.raises(AttributeError, match="module 'hf_selfkd' has no attribute 'SelfKDTrainr'"):
        hf_selfkd.SelfKDTrainr  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SelfKDTrainr'"):
        from hf_selfkd import SelfKDTrainr  # noqa: F401


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(hf_selfkd.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_selfkd._MODULES and {*seen, "__version__"} == set(hf_selfkd.__all__)


def test_a_task_that_does_not_exist():
    status, text = call("train", "segmentation", "--alpha", "0")
    assert status == 2 and "There is no task 'segmentation': choose one of" in text
    assert ", ".join(TASKS) in text


@pytest.mark.parametrize("task", TASKS)
def test_help_of_a_task_is_the_truth(task):
    own, whole = own_flags(task), script_of(task).make_parser()
    shown = {name for name in flags_of(own) if not name.startswith("--no_")}
    assert shown == {f"--{spec.name}" for kind in SCRIPTS[task].arguments for spec in fields(kind)}
    assert flags_of(own) < flags_of(whole)
    assert {f"--{spec.name}" for spec in fields(getattr(hf_selfkd, SCRIPTS[task].config))} < flags_of(whole)
    status, text = call("train", task, "--help")
    assert status == 0 and all(name in text for name in shown) and SCRIPTS[task].summary in " ".join(text.split())
    status, text = call("train", task, "--help-all")
    assert status == 0 and all(name in text for name in (*shown, "--learning_rate", "--alpha", "--history_top_k"))


def test_help_shows_what_a_flag_takes():
    text = " ".join(own_flags("image-classification").format_help().split())
    assert "--augmentation {random_resized_crop,pad_crop,none} Random crops" in text
    assert "--image_mean FLOAT ... Channel means" in text and "(default: [0.485, 0.456, 0.406])" in text
    assert "--config_overrides STR Fields" in text and "--image_size INT Make" in text
    assert "--horizontal_flip, --no_horizontal_flip Flip half of the training images. (default: True)" in text


@pytest.mark.parametrize("task", TASKS)
def test_the_words_after_the_task_reach_the_script(task, monkeypatch):
    given = []
    monkeypatch.setattr(script_of(task), "main", given.append)
    words = ["run.yaml", "--alpha=0.5", "--do_train", "--model_type", "bert", "--learning_rate", "1e-3", "-x"]
    assert call("train", task, *words) == (0, "")
    assert call("train", task) == (0, "")
    assert given == [words, []]


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_the_scripts(task):
    name = SCRIPTS[task].module.split(".")[-1]
    assert runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"] is script_of(task).main


def test_training_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ("sunny and warm,good", "rain and cold,bad")
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(words[i % 2] for i in range(12)) + "\n")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    flags = {
        "--train_file": tmp_path / "texts.csv",
        "--model_type": "bert",
        "--config_overrides": json.dumps(small),
        "--tokenizer_vocab_size": 300,
        "--num_train_epochs": 2,
        "--output_dir": tmp_path / "out",
        "--cache_dir": tmp_path / "cache",
        "--report_to": "none",
    }
    flags = [str(word) for pair in flags.items() for word in pair]
    status, text = call("train", "text-classification", *flags, "--do_train", "--do_eval", "--use_cpu")
    assert status == 0 and "***** eval metrics *****" in text
    assert results(tmp_path / "out", "train")["train_samples"] == 10
    assert {"eval_accuracy", "eval_nll", "eval_ece"} <= results(tmp_path / "out").keys()


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (
            "text-classification",
            "--aplha 0.5",
            "^--aplha 0.5: no such flag. `hf-selfkd train text-.* --help` lists",
        ),
        ("text-classification", "--alpha 0.5 a.yaml", "^a.yaml: no such flag. .* a file of settings stands first"),
        ("translation", "--model_type t5 --cldr_corpus --train_file a.csv", "^--cldr_corpus is a corpus of its own"),
    ],
)
def test_what_is_wrong_is_told(task, words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(script_of(task).make_parser(), words.split())


def test_a_language_model_predicts_nothing(tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    flags = ["--model_type", "gpt2", "--train_file", str(tmp_path / "texts.txt"), "--output_dir", str(tmp_path)]
    flags += ["--do_train", "--do_predict", "--use_cpu", "--report_to", "none", "--cache_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="^--do_predict: .* give --validation_file"):
        script_of("language-modeling").main(flags)


@pytest.mark.parametrize(("task", "split"), [("text-classification", "predict"), ("language-modeling", "eval")])
def test_evaluate_runs_the_script_and_prints_the_figures(tmp_path, monkeypatch, task, split):
    seen = []

    def main(words):
        seen.extend(words)
        found = {f"{split}_accuracy": 0.75, f"{split}_ece": 4.0, f"{split}_temperature": 1.5, f"{split}_runtime": 3.0}
        (tmp_path / f"{split}_results.json").write_text(json.dumps(found))

    monkeypatch.setattr(script_of(task), "main", main)
    status, said = call("evaluate", task, "a/model", "--output-dir", str(tmp_path), "--validation_file", "x.csv")
    assert (
        status == 0
        and seen[:2] == ["--validation_file", "x.csv"]
        and seen[seen.index("--do_train") + 1] == "False"
        and f"--do_{split}" in seen
    )
    assert seen[seen.index("--model_name_or_path") + 1] == "a/model"
    assert "| Accuracy (%) | 75.00 |" in said and "1.50, so it is over-confident" in said and "runtime" not in said
    status, said = call("evaluate", "fishing", "a/model")
    assert status == 1 and "no task 'fishing'" in said
    (tmp_path / "trainer_state.json").write_text("{}")
    for command in ("evaluate", "predict"):
        status, said = call(command, "text-classification", "a/model", "--output_dir", str(tmp_path))
        assert status == 1 and "is the folder of a training" in said


def test_data_without_labels_are_not_evaluated(tmp_path, monkeypatch):
    def main(words):
        (tmp_path / "predict_results.json").write_text(json.dumps({"predict_runtime": 3.0, "predict_samples": 4}))

    monkeypatch.setattr(script_of("text-classification"), "main", main)
    status, said = call("evaluate", "text-classification", "a/model", "--output-dir", str(tmp_path))
    assert status == 1 and "use `hf-selfkd predict text-classification`" in said
    status, said = call("evaluate", "text-classification", "a/model", "none.yaml", "--output-dir", str(tmp_path / "x"))
    monkeypatch.undo()
    status, said = call("predict", "text-classification", "a/model", "none.yaml", "--output-dir", str(tmp_path / "x"))
    assert status == 1 and said.startswith("Error: ") and "none.yaml" in said


def test_tables_are_drawn_on_a_terminal_that_is_wide_enough():
    command = typer.Typer()
    command.command()(lambda: print_table(["name", "value"], [["one", "1.5"], ["two", "22"]]))
    for columns, forced, drawn in (("80", "1", True), ("8", "1", False), ("80", None, False)):
        environment = {"COLUMNS": columns, "FORCE_COLOR": forced, "TERM": "xterm"}
        said = CliRunner(env=environment).invoke(command, [], catch_exceptions=False).output
        assert ("┃" in said) == drawn and ("| two | 22 |" in said) == (not drawn), said
    command = typer.Typer()
    command.command()(lambda: print_table(["name", "difference"], [["one", "-1.5 (-2.0 to -1.0)"]]))
    for columns, lines in (("40", 5), ("28", 6)):
        environment = {"COLUMNS": columns, "FORCE_COLOR": "1", "TERM": "xterm"}
        said = CliRunner(env=environment).invoke(command, [], catch_exceptions=False).output
        assert "(-2.0 to -1.0) │" in said and len(said.splitlines()) == lines, said


def test_predict_runs_the_script_and_names_what_it_wrote(tmp_path, monkeypatch):
    seen = []

    def main(words):
        seen.extend(words)
        (tmp_path / "predictions.csv").write_text("row,prediction,confidence\n")

    monkeypatch.setattr(script_of("text-classification"), "main", main)
    words = ["a/model", "--output-dir", str(tmp_path), "--test_file", "x.csv"]
    status, said = call("predict", "text-classification", *words)
    assert status == 0 and seen[:2] == ["--test_file", "x.csv"] and "--do_predict" in seen
    assert f"Wrote {tmp_path / 'predictions.csv'}" in said
    status, said = call("predict", "language-modeling", "a/model")
    assert status == 1 and "language-modeling has nothing to predict" in said
    assert call("predict", "fishing", "a/model")[0] == 1


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_every_command_has_help_with_an_example(command):
    status, text = call(command, "--help")
    assert status == 0 and f"hf-selfkd {command} " in text
