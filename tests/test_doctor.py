"""The doctor: what a training will do is what it then does, and judgements follow from the figures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import Stream, make_model, make_samples, make_trainer, refused
from test_cli import call
from test_report import run_folder

from hf_selfkd.cards import Evaluation
from hf_selfkd.doctor import Symptoms, diagnose, plan_of, short_epochs, step_times, symptoms_of
from hf_selfkd.doctor.plan import size_of
from hf_selfkd.heads import heads_of
from hf_selfkd.runs import Run
from hf_selfkd.teachers import HistoryTeacher


pytestmark = pytest.mark.trains


ROOT = Path(__file__).parents[1]


# Before


def both(out, model, data, **options):
    """A plan, and the trainer of the same settings after its training."""
    plan = plan_of(make_trainer(out / "plan", model, data, **options))
    made = make_trainer(out / "run", model, data, **options)
    made.train()
    return plan, made


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "history"},
        {"teacher": "snapshot", "alpha": 0.5},
        {"teacher": "rank", "alpha_schedule": "constant"},
        {"alpha": 0.0},
        {"auxiliary_heads": "sla", "alpha": 0.0},
        {"auxiliary_heads": "lsskd"},
        {"max_steps": 7, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 1},
    ],
    ids=range(8),
)
def test_the_plan_is_what_is_done(tmp_path, options):
    plan, made = both(tmp_path, "resnet", make_samples("images"), **options)
    assert plan["data"].startswith("22 training samples; no evaluation set")
    heads = heads_of(made.model)
    own = sum(p.numel() for p in make_model("resnet").parameters())
    assert f"{own:,} parameters" in plan["model"] and "ResNetForImageClassification" in plan["model"]
    epochs = made.state.num_train_epochs
    assert plan["steps"].startswith(f"{made.state.global_step:,} steps of")
    assert plan["steps"].endswith(f", {epochs} epoch{'s' if epochs > 1 else ''}")
    kind = made.teacher.kind
    assert ("no teacher" in plan["method"] or "Plain" in plan["method"]) == (kind == "none")
    if kind != "none":
        assert f"teacher {kind!r}" in plan["method"]
    assert ("history" in plan) == isinstance(made.teacher, HistoryTeacher) and ("heads" in plan) == (heads is not None)
    if heads is not None:
        assert all(name in plan["heads"] for name in heads.names)
    if made.distiller.schedule == "linear" and kind != "none":
        assert f"{made.distiller.alpha_reached:.2g} in the last" in plan["method"]


def test_the_history_has_the_bytes_that_were_told(tmp_path):
    plan, made = both(tmp_path, "resnet", make_samples("images", 64), teacher="history")
    history = made.teacher.history
    table = sum(part.numel() * part.element_size() for part in history.table.values())
    told = float(re.match(r"([\d.]+) KiB", plan["history"])[1]) * 1024
    assert told == pytest.approx(2 * table, rel=0.05)  # the table, and the journal of an epoch
    assert "64 rows, all classes, float32" in plan["history"] and "in memory" not in plan["history"]


def test_the_history_of_tokens_is_estimated(tmp_path):
    plan = plan_of(make_trainer(tmp_path, "plain_gpt2", make_samples("words"), teacher="history"))
    assert re.search(r"bytes|KiB", plan["history"]) and int(re.search(r"(\d+) rows", plan["history"])[1]) > 22


def test_a_stream_has_a_plan(tmp_path):
    warm = {"teacher": "history", "warm_start_teacher": True}
    plan = plan_of(make_trainer(tmp_path, "resnet", make_samples("images"), max_steps=1, **warm))
    assert "acts from the first epoch on" in plan["method"] and plan["steps"].startswith("1 step of")
    plan = plan_of(make_trainer(tmp_path, "resnet", Stream(make_samples("images")), max_steps=12))
    assert "a stream of training samples" in plan["data"] and plan["steps"].startswith("12 steps")


def test_what_cannot_be_trained_is_told_as_ever(tmp_path):
    trainer = make_trainer(tmp_path, "resnet", make_samples("images"), teacher="history", num_train_epochs=1)
    refused(lambda: plan_of(trainer), "1 epoch with teacher='history'", "warm_start_teacher=True")


def test_step_times_are_measured_and_the_run_is_cut_short(tmp_path):
    trainer = make_trainer(tmp_path, "resnet", make_samples("images"), num_train_epochs=50)
    assert 0 < step_times(trainer) < 60 and trainer.state.global_step == 14
    short = make_trainer(tmp_path, "resnet", make_samples("images"), max_steps=2)
    assert np.isnan(step_times(short))


@pytest.mark.parametrize(("number", "shown"), [(12, "12 bytes"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB")])
def test_sizes_in_words(number, shown):
    assert size_of(number) == shown


def texts(folder, samples=24):
    words = ("sunny and warm,good", "rain and cold,bad")
    rows = [words[i % 2] for i in range(samples)]
    for name in ("train", "eval"):
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    flags = ["--train_file", folder / "train.csv", "--validation_file", folder / "eval.csv", "--model_type", "bert"]
    flags += ["--config_overrides", json.dumps(small), "--tokenizer_vocab_size", 300, "--cache_dir", folder / "cache"]
    flags += ["--per_device_train_batch_size", 4, "--num_train_epochs", 3, "--use_cpu", "--do_eval"]
    return [str(word) for word in flags]


def test_before_a_training(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    status, said = call("doctor", "text-classification", *texts(tmp_path), "--plain-run")
    assert status == 0, said
    for name, text in {
        "data": "24 training samples, 24 to evaluate on",
        "steps": "18 steps of 4 samples, 3 epochs",
        "method": "teacher 'history', which acts from the second epoch on",
        "history": r"384 bytes beside the model \(cpu\): 24 rows, all classes, float32",
        "cost": r"[\d.]+ ms a step, [\d.]+ ms in plain training( \([\d.]+ times\)|: no difference|; this machine)",
    }.items():
        assert re.search(rf"{name} +{text}", said), (name, said)
    assert "Training plainly" in said and "mean confidence" in said and "held-out NLL" in said
    assert "metrics" not in said and "WARNING" not in said  # of the trainings within
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "eval.csv", "train.csv"]


def test_of_plain_training_and_without_cost(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, said = call("doctor", "text-classification", *texts(tmp_path), "--alpha", "0", "--no-cost")
    assert status == 0 and ("no teacher" in said or "Plain training" in said) and "cost" not in said
    status, said = call("doctor", "text-classification", *texts(tmp_path), "--alpha", "0")
    assert status == 0 and re.search(r"cost +[\d.]+ ms a step\n", "\n".join(map(str.rstrip, said.splitlines())) + "\n")


@pytest.mark.parametrize("epochs", [1, 5])
def test_the_past_teaches_in_what_is_measured(tmp_path, epochs):
    data = make_samples("images", 64)
    trainer = make_trainer(tmp_path, "resnet", data, num_train_epochs=epochs, teacher="rank")
    plan_of(trainer)
    flags = dict(zip(short_epochs(trainer)[::2], short_epochs(trainer)[1::2], strict=True))
    if epochs == 1:
        assert flags == {}
        return
    assert flags["--max_train_samples"] == "24"  # six steps of four
    short = make_trainer(tmp_path, "resnet", make_samples("images", 24), num_train_epochs=4, teacher="snapshot")
    assert step_times(short) > 0 and short.state.global_step == 14 and short.distiller.epoch == 2


def test_what_is_neither_a_task_nor_a_folder():
    status, said = call("doctor", "fishing")
    assert status == 1 and "fishing is neither a task" in said


# After


def test_symptoms_of_a_run(tmp_path):
    symptoms = symptoms_of(Run.load(run_folder(tmp_path / "run")))
    assert symptoms.teacher == "history" and symptoms.alpha == symptoms.alpha_reached == 0.8
    assert (
        symptoms.split == "test" and symptoms.nll == 0.9 and symptoms.train_loss == pytest.approx(0.5)
    )  # of the last logged step
    assert symptoms.samples == 3 and symptoms.accuracy == pytest.approx(2 / 3)  # of predictions.csv
    assert symptoms.confidence == pytest.approx(2.3 / 3)
    run = Run.load(tmp_path / "run")
    run.facts.evaluations.pop()
    del run.evaluations  # it is kept
    symptoms = symptoms_of(run)
    assert symptoms.split == "eval" and symptoms.samples == 40 and symptoms.gap == pytest.approx(77.5 - 65)


def test_the_noise_of_a_gap():
    symptoms = Symptoms(accuracy=0.8, confidence=0.83, samples=100_000)
    assert symptoms.gap == pytest.approx(3) and symptoms.noise == pytest.approx(196 * (0.16 / 1e5) ** 0.5, rel=1e-3)
    assert Symptoms(accuracy=1.0, confidence=0.4, samples=3).noise > 30  # all right, of three
    assert Symptoms(accuracy=0.8, confidence=0.83).noise == 0 and Symptoms().gap is None


def made(gap=0.0, loss=None, nll=1.0, samples=10000, **others):
    confidence = 0.7 + gap / 100
    return Symptoms(nll=nll, accuracy=0.7, confidence=confidence, samples=samples, train_loss=loss, **others)


@pytest.mark.parametrize(
    ("symptoms", "said", "not_said"),
    [
        (
            made(gap=20, loss=0.1),
            ["Over-confident", "far better than others", "likely to help: try"],
            ["Under", "sla"],
        ),
        (made(gap=20, loss=0.1, images=True), ["likely to help", "auxiliary_heads='sla'"], []),
        (made(gap=20, loss=0.95), ["Over-confident", "Has not fitted", "cannot be told"], ["likely to help"]),
        (made(gap=-9, loss=0.9), ["Under-confident", "Has not fitted", "not likely to help"], ["Over-confident"]),
        (made(gap=-9, loss=1.5), ["Under-confident", "harder than others", "labels are wrong"], ["not fitted"]),
        (made(gap=0.5, loss=0.7), ["Calibrated", "about as well"], ["confident:"]),
        (made(gap=0.5, loss=0.005, nll=0.003), ["Fits its training data and others"], ["harder", "not fitted"]),
        (made(gap=3.5), ["Over-confident", "cannot be told"], ["training loss"]),
        (
            made(gap=10, samples=30),
            ["as far as can be told", "30 samples cannot tell less", "cannot be told"],
            ["likely"],
        ),
        (made(gap=-10, samples=30), ["cannot be told"], ["likely to help"]),
        (made(gap=-9, teacher="history", alpha=0.8, alpha_reached=0.8), ["a lower alpha", "AURC"], ["Softer targets"]),
        (made(gap=9, teacher="history", alpha=0.8, alpha_reached=0.8), ["To try: a higher alpha"], ["Softer", "sla"]),
        (made(gap=9, teacher="history", alpha=1.0, alpha_reached=1.0), ["To try: dividing"], ["higher alpha"]),
        (made(gap=-9, smoothing=0.1, loss=0.5), ["do not compare", "label_smoothing_factor"], ["lower alpha", "far"]),
        (made(gap=9, smoothing=0.1), ["in place of label smoothing"], ["higher alpha"]),
        (made(gap=9, heads=True, loss=0.1), ["do not compare", "alpha=0.8 beside it"], ["far better", "plain", "sla"]),
        (made(gap=-9, heads=True, images=True), ["To try: dividing the logits", "AURC"], ["alpha", "plain", "sla"]),
        (made(gap=9, mixed=True, images=True), ["alpha=0.8 beside it", "sla"], ["plain"]),
        (made(gap=9, temperature=1.7), ["A temperature of 1.70 would"], []),
        (made(gap=9, temperature=4.4817), ["A temperature of 4.48 or more would"], []),
        (made(teacher="history", alpha=0.8, alpha_reached=0.1), ["alpha reached 0.1 of 0.8"], []),
        (
            made(gap=-9, teacher="history", alpha=0.8, schedule="calibrated"),
            ["a lower alpha"],
            ["reached", "calibrated'"],
        ),
        (made(gap=-9, teacher="history", alpha=0.8), ["a lower alpha", "calibrated'"], []),
        (made(gap=-9, teacher="rank", alpha=0.8), ["a lower alpha"], ["calibrated'"]),
        (made(gap=9, loss=0.1, known=False), ["Over-confident"], ["Fit", "try", "Softer"]),
        (made(gap=9, diverged_at=120), ["Diverged: the loss of step 120", "learning_rate"], ["confident"]),
        (Symptoms(), ["Nothing can be said"], ["None"]),
        (
            Symptoms(nll=2.0, train_loss=0.4),
            ["far better than others", "nothing can be said of softer"],
            ["confident:"],
        ),
        (Symptoms(accuracy=float("nan"), confidence=float("nan"), samples=3, known=False), ["Nothing can"], ["nan"]),
    ],
    ids=range(29),
)
def test_what_is_said(symptoms, said, not_said):
    text = " ".join(diagnose(symptoms))
    assert all(part in text for part in said), text
    assert not any(part in text for part in not_said), text


def test_an_evaluation_without_bins_says_nothing_of_confidence():
    symptoms = Symptoms()
    symptoms.reliability(Evaluation("eval", {"nll": 1.0}))
    symptoms.reliability(Evaluation("eval", {}, reliability={"count": [0], "confidence": [0], "accuracy": [0]}))
    assert symptoms.gap is None


DETECTED = {"loss": 3.1, "map": 0.3, "map_50": 0.5, "map_75": 0.3, "d_ece": 17.7}


@pytest.mark.parametrize("known", [True, False])
def test_after_the_training_of_a_detector(tmp_path, known):
    """Its loss is no likelihood, and its calibration is D-ECE."""
    folder = run_folder(tmp_path / "run", task="object-detection", evaluations=[Evaluation("eval", DETECTED, 8, 6)],
                        method={"teacher": "none"})  # fmt: skip
    (folder / "predictions.csv").unlink()
    if not known:  # as a trainer leaves it that writes no card
        (folder / "selfkd_card.json").unlink()
        figures = {f"eval_{name}": value for name, value in DETECTED.items()}
        (folder / "all_results.json").write_text(json.dumps(figures | {"eval_samples": 8, "train_runtime": 12.5}))
    status, said = call("doctor", str(folder))
    assert status == 0 and "17.7 points on average (D-ECE, split eval)" in said, said
    assert not any(word in said for word in ("NLL", "classification", "accuracy 0", "Over-confident"))
    assert ("compare (`hf-selfkd compare`)" in said) == known


def test_a_detector_without_figures_is_told_of_its_own_metrics(tmp_path):
    folder = run_folder(tmp_path / "run", task="object-detection", evaluations=[Evaluation("eval", {"loss": 3.1})])
    (folder / "predictions.csv").unlink()
    said = call("doctor", str(folder))[1]
    assert "Nothing can be said" in said and "compute_metrics=DetectionMetrics()" in said and "NLL" not in said


def test_after_a_training(tmp_path):
    run_folder(tmp_path / "run")
    status, said = call("doctor", str(tmp_path / "run"))
    assert status == 0 and said.startswith("run:\n") and "mean confidence 76.7 %, accuracy 66.7 % (split test)" in said
    status, said = call("doctor", str(tmp_path / "run"), "--plain-run", "--alpha", "1")
    assert status == 1 and "--alpha 1: of a training that is over" in said
    status, said = call("doctor", str(tmp_path))
    assert status == 1 and "has no trainer_state.json" in said
