"""Model cards: what they tell is what was measured and done, nothing private is in them, a user's own card stays."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import make_model, make_samples, make_trainer, refused, train
from huggingface_hub import ModelCard
from test_cli import call
from test_faults_memory import Hub
from transformers import Trainer, TrainerCallback

from hf_selfkd import SelfKDConfig, SelfKDDataCollator
from hf_selfkd.cards import CardFacts, Evaluation, render, write_card
from hf_selfkd.cards.collect import collect, task_of
from hf_selfkd.cards.merge import BEGIN, END
from hf_selfkd.cards.names import METRICS, TASKS
from hf_selfkd.cards.render import metadata, usage
from hf_selfkd.metrics import calibration_metrics, compute_classification_metrics, reliability_curve


EVALUATED = {"compute_metrics": compute_classification_metrics}


def evaluated(tmp_path, **options):
    """A trained classifier that was evaluated after its training."""
    held = make_samples("vit", 16, seed=3)
    trainer = train(tmp_path, "vit", make_samples("vit", 18), eval_dataset=held, **(EVALUATED | options))
    trainer.evaluate()
    return trainer


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def facts(**given):
    """Facts of a small model, to be rendered without a training."""
    known = {
        "model_name": "digits",
        "model_class": "ResNetForImageClassification",
        "parameters": 78_000,
        "task": "image-classification",
        "method": {"teacher": "history", "alpha": 0.8, "alpha_schedule": "linear", "alpha_reached": 0.8},
        "evaluations": [Evaluation("eval", {"accuracy": 0.9, "nll": 0.31, "ece": 4.2}, 100, 50)],
        "training": {"steps": 50, "epochs": 5.0},
        "versions": {"torch": "2"},
    }
    return CardFacts(**(known | given))


# What is told


def test_classes_and_the_length_of_inputs_are_told():
    text = render(facts(classes=["cat", "dog"], input_length=512))
    assert "It tells 2 classes: `cat`, `dog`. Inputs have at most 512 tokens." in text
    text = render(facts(classes=[f"c{n}" for n in range(100)]))
    assert "`c11` and 88 more, which `config.json` names." in text and "`c12`" not in text and "tokens" not in text


@pytest.mark.parametrize(
    ("model", "kind", "classes"), [("resnet", "images", 5), ("bert", "texts", 5), ("plain_gpt2", "words", 0)]
)
def test_classes_are_those_of_the_model(tmp_path, model, kind, classes):
    trainer = make_trainer(tmp_path, model, make_samples(kind), max_steps=1)
    assert len(collect(trainer).classes) == classes and collect(trainer).input_length is None  # no tokenizer
    trainer.processing_class = SimpleNamespace(model_max_length=8)
    assert collect(trainer).input_length == 8


@pytest.mark.parametrize(
    ("samples", "said"), [(40, "40 samples cannot tell a difference below 13.8 points"), (4000, "is over-confident")]
)
def test_chance_is_not_called_over_confidence(samples, said):
    curve = {"count": [samples], "confidence": [0.8], "accuracy": [0.7]}
    text = render(facts(evaluations=[Evaluation("eval", {"accuracy": 0.7}, samples, 50, {}, curve)]))
    assert "mean confidence is 80.0 %, its accuracy 70.0 %" in text and said in text


def test_energy_is_told_where_it_was_measured(tmp_path):
    trainer = make_trainer(tmp_path, "resnet", make_samples("images"), max_steps=1)
    trainer.train()
    assert "energy" not in collect(trainer).training
    callback = TrainerCallback()
    callback.tracker = SimpleNamespace(final_emissions_data=SimpleNamespace(energy_consumed=0.25, emissions=0.1))
    trainer.add_callback(callback)
    told = collect(trainer)
    assert "0.25 kWh, 0.1 kg of CO2 (measured by CodeCarbon)" in render(told)
    assert metadata(told)["co2_eq_emissions"] == {"emissions": pytest.approx(100), "source": "codecarbon"}


def test_figures_are_those_of_the_model(tmp_path):
    trainer = evaluated(tmp_path)
    trainer.create_model_card()
    seen = trainer.predict(trainer.eval_dataset)
    expected = calibration_metrics(seen.predictions, seen.label_ids)
    told = {result.metric_type: result.metric_value for result in card_of(tmp_path).data.eval_results}
    assert told.keys() == expected.keys()
    assert told == pytest.approx(expected, abs=1e-5)
    text = card_of(tmp_path).text
    assert f"| Accuracy (%) | {100 * expected['accuracy']:.2f} | higher |" in text
    assert f"| {expected['ece']:.2f} | lower |" in text and "16 samples" in text
    curve = reliability_curve(seen.predictions, seen.label_ids)
    stored = CardFacts.load(tmp_path).evaluations[0].reliability
    assert stored["count"] == curve.count.tolist()
    sure = 100 * torch.tensor(seen.predictions).softmax(-1).amax(-1).mean().item()
    assert f"mean confidence is {sure:.1f} %" in text


def test_what_was_done_is_told_and_nothing_else(tmp_path):
    trainer = evaluated(tmp_path / "private" / "digits", auxiliary_heads="sla", weight_decay=0.03, logging_steps=1)
    trainer.args.hub_token = "hf_secret"
    trainer.create_model_card(
        license="mit", language="en", tags="mine", dataset_tags="me/digits", dataset_args="small"
    )
    folder = tmp_path / "private" / "digits"
    card = card_of(folder)
    assert card.data.license == "mit" and card.data.language == ["en"] and card.data.datasets == ["me/digits"]
    assert {"mine", "hf_selfkd", "self-distillation", "ps-kd", "hsakd", "sla"} == set(card.data.tags)
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    for said in (
        "`teacher=history`",
        "up to 0.8 and was 0.8",
        "2 auxiliary heads",
        "preset `sla`",
        "taught to the classifier",
        "| `weight_decay` | 0.03 |",
        "| `learning_rate` | 0.01 |",
        "18 samples",
        "[me/digits](https://huggingface.co/datasets/me/digits)",
        "kim2021pskd",
        "lee2020sla",
        f"{sum(p.numel() for p in make_model('vit').parameters()):,} parameters",  # without heads
    ):
        assert said in card.text, said
    written = "".join(file.read_text() for file in (folder / "README.md", folder / "selfkd_card.json"))
    assert "hf_secret" not in written and str(tmp_path) not in written and "private" not in written
    assert "sample_id" not in written


@pytest.mark.parametrize(
    ("options", "said", "tags"),
    [
        ({"alpha": 0.0}, "Plain training on the labels.", {"hf_selfkd"}),
        ({"alpha": 0.0, "label_smoothing_factor": 0.1}, "smoothed by 0.1", {"hf_selfkd"}),
        ({"teacher": "rank"}, "Zipf's law", {"hf_selfkd", "self-distillation", "zipf-label-smoothing"}),
        ({"teacher": "snapshot"}, "end of the previous epoch", {"hf_selfkd", "self-distillation", "ps-kd"}),
        ({"alpha": 0.0, "auxiliary_heads": "byot"}, "learned the labels", {"hf_selfkd", "self-distillation", "byot"}),
        (
            {"auxiliary_heads": "lsskd"},
            "class and rotation",
            {"hf_selfkd", "self-distillation", "ps-kd", "hsakd"} | {"lsskd"},
        ),
        ({"data_collator": SelfKDDataCollator(cutmix_alpha=1.0, mix_probability=0.5)}, "50 % of the batches", None),
    ],
    ids=["plain", "smoothed", "rank", "snapshot", "byot", "lsskd", "cutmix"],
)
def test_the_method_that_was_used(tmp_path, options, said, tags):
    trainer = train(tmp_path, "vit", make_samples("vit", 18), num_train_epochs=2, **options)
    trainer.create_model_card()
    card = card_of(tmp_path)
    assert said in card.text
    assert tags is None or set(card.data.tags) == tags
    how = "without self-distillation" if tags == {"hf_selfkd"} else "with self-distillation"
    assert how in card.text and "was not evaluated" in card.text and card.data.eval_results is None


def test_the_checkpoint_that_a_metric_chose(tmp_path):
    """The figures are those of the weights that are shipped, not of the last ones."""
    accuracies = iter((0.9, 0.5, 0.4, 0.9))  # of the epochs, and once more of the weights that are loaded
    trainer = train(
        tmp_path,
        "vit",
        make_samples("vit", 18),
        eval_dataset=make_samples("vit", 16, seed=3),
        compute_metrics=lambda prediction: {"accuracy": next(accuracies)},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer.create_model_card()
    (told,) = CardFacts.load(tmp_path).evaluations
    assert told.metrics["accuracy"] == 0.9 and told.step == 5
    assert told.metrics["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    text = card_of(tmp_path).text
    assert "those of step 5, where `eval_accuracy` was best (0.9)" in text and "after step 5 of 15" in text


def test_language_models_and_several_evaluations(tmp_path):
    sets = {"one": make_samples("gpt2", 6, seed=1), "two": make_samples("gpt2", 6, seed=2)}
    trainer = train(tmp_path, "gpt2", make_samples("gpt2", 8), eval_dataset=sets)
    metrics = trainer.evaluate()
    trainer.predict(sets["one"], metric_key_prefix="predict")
    trainer.create_model_card()
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card_of(tmp_path).data.eval_results}
    assert {split for split, _ in results} == {"eval_one", "eval_two", "test"}
    for name in sets:
        assert results[f"eval_{name}", "token_nll"] == pytest.approx(metrics[f"eval_{name}_token_nll"], abs=1e-5)
    assert "Perplexity" in card_of(tmp_path).text and card_of(tmp_path).data.pipeline_tag == "text-generation"


def test_pictures(tmp_path, monkeypatch):
    trainer = evaluated(tmp_path)
    trainer.create_model_card()
    for name in ("reliability", "loss"):
        assert (tmp_path / f"selfkd_card/{name}.png").stat().st_size > 5000
        assert f"(selfkd_card/{name}.png)" in card_of(tmp_path).text
    monkeypatch.setattr("hf_selfkd.cards.pictures.find_spec", lambda name: None)
    (tmp_path / "bare").mkdir()
    write_card(CardFacts.load(tmp_path), tmp_path / "bare")
    assert ".png" not in card_of(tmp_path / "bare").text


def test_facts_are_read_as_they_were_written(tmp_path):
    trainer = evaluated(tmp_path, auxiliary_heads="sla")
    trainer.create_model_card()
    before = (tmp_path / "README.md").read_text()
    write_card(CardFacts.load(tmp_path), tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    (tmp_path / "selfkd_card.json").write_text("{}")
    refused(lambda: CardFacts.load(tmp_path), "selfkd_card.json", "not what this version")
    refused(lambda: CardFacts.load(tmp_path / "nowhere"), "has no selfkd_card.json")


def test_tasks_of_classes():
    for name, task in (
        ("vit", "image-classification"),
        ("bert_tokens", "token-classification"),
        ("gpt2", "text-generation"),
    ):
        assert task_of(make_model(name)) == task
    assert task_of(make_model("bert_mlm")) == "fill-mask" and task_of(make_model("bart")) == "text2text-generation"
    assert task_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("task", [*TASKS, None])
@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_the_code_that_loads_a_model_is_python(task, library):
    code = usage(facts(task=task, library=library, repo_id="me/digits"))
    compile(code, "card", "exec")
    assert '"me/digits"' in code
    if library == "transformers":
        names = code.splitlines()[0].removeprefix("from transformers import ").split(", ")
        assert all(hasattr(transformers, name) for name in names)
        if "pipeline(" in code:
            assert task in transformers.pipelines.SUPPORTED_TASKS


def test_a_saved_model_is_used_as_the_card_says(tmp_path, capsys):
    trainer = train(tmp_path, "bart", make_samples("bart", 8), num_train_epochs=2)
    trainer.save_model()
    exec(compile(usage(facts(task=task_of(trainer.model), repo_id=str(tmp_path))), "card", "exec"), {})
    assert capsys.readouterr().out.startswith("[")


# A card of the user's own


def test_a_card_of_the_users_own_stays(tmp_path):
    own = "---\nlicense: cc-by-4.0\ntags:\n- insects\nmine: 3\n---\n\n# Beetles\n\nI counted them myself.\n"
    (tmp_path / "README.md").write_text(own)
    for _ in range(2):
        write_card(facts(license="mit"), tmp_path)
        card = card_of(tmp_path)
        assert card.text.index("I counted them myself.") < card.text.index(BEGIN) < card.text.index("## Results")
        assert card.text.count(BEGIN) == card.text.count(END) == card.text.count("## Results") == 1
        assert card.data.to_dict()["mine"] == 3 and {"insects", "hf_selfkd"} <= set(card.data.tags)
        assert len(card.data.eval_results) == 3
    (tmp_path / "README.md").write_text(str(card) + "\nAfter it.\n")
    write_card(facts(evaluations=[Evaluation("eval", {"accuracy": 0.5})]), tmp_path)
    text = card_of(tmp_path).text
    assert "I counted them myself." in text and "After it." in text and "| Accuracy (%) | 50.00 |" in text
    told = {result.metric_type: result.metric_value for result in card_of(tmp_path).data.eval_results}
    assert told == {"accuracy": 0.5}  # what we wrote before is gone


def test_metadata_of_a_card_of_the_users_own_counts(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\npipeline_tag: other\n---\n\n# Beetles\n")
    write_card(facts(license="mit"), tmp_path)
    assert card_of(tmp_path).data.license == "cc-by-4.0" and card_of(tmp_path).data.pipeline_tag == "other"


def test_the_stock_card_gives_way(tmp_path):
    trainer = evaluated(tmp_path)
    Trainer.create_model_card(trainer)
    assert "generated automatically" in card_of(tmp_path).text
    trainer.create_model_card()
    text = card_of(tmp_path).text
    assert "generated automatically" not in text and text.count("# ") and "More information needed" not in text


def test_a_card_with_metadata_that_the_hub_would_refuse_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nmodel-index: none\nlicense: mit\n---\n\n# Beetles\n")
    write_card(facts(), tmp_path)
    assert "# Beetles" in card_of(tmp_path).text and card_of(tmp_path).data.license == "mit"


# Comparison and command line


def test_a_comparison(tmp_path):
    runs = [
        {"method": m, "seed": s, "error": e + s, "ece": 2.0} for m, e in (("plain", 20), ("PS-KD", 18)) for s in (0, 1)
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run | {"train_seconds": 3}) + "\n" for run in runs))
    assert "No comparison was run" in render(facts())
    facts().save(tmp_path)
    status, said = call("card", str(tmp_path), "--comparison", str(tmp_path / "runs.jsonl"), "--repo-id", "me/digits")
    assert status == 0 and "README.md" in said
    text = card_of(tmp_path).text
    assert "| plain | 2 | 20.50 ± 0.71 | 2.00 ± 0.00 |" in text and "| PS-KD | 2 | 18.50 ± 0.71 |" in text
    assert "No comparison was run" not in text and 'model="me/digits"' in text and "train_seconds" not in text
    data = ("--dataset", "me/insects", "--dataset", "a walk in the garden", "--language", "en")
    assert call("card", str(tmp_path), *data)[0] == 0
    assert card_of(tmp_path).data.datasets == ["me/insects"] and card_of(tmp_path).data.language == ["en"]
    (tmp_path / "runs.jsonl").write_text('{"method": "plain"}\n')
    status, said = call("card", str(tmp_path), "--comparison", str(tmp_path / "runs.jsonl"))
    assert status == 1 and said.startswith("Error: line 1 of") and said.count("\n") == 1
    status, said = call("card", str(tmp_path / "nowhere"))
    assert status == 1 and "selfkd_card.json" in said


def test_every_upload_has_a_card(tmp_path, monkeypatch):
    uploads = []

    class Api(Hub):
        def upload_folder(self, *arguments, folder_path, **options):
            uploads.append((Path(folder_path) / "README.md").read_text())
            return super().upload_folder(*arguments, folder_path=folder_path, **options)

    monkeypatch.setattr("transformers.trainer.hf_api", lambda *arguments, **keywords: Api())
    options = {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": "me/digits", "hub_always_push": True}
    trainer = make_trainer(tmp_path, "vit", make_samples("vit", 8), save_strategy="epoch", **options)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer.train()
    trainer.push_to_hub(dataset_tags="me/data", tasks="image-classification")
    assert len(uploads) == 4 and all(BEGIN in upload for upload in uploads)
    assert "2 epochs" in uploads[1] and "3 epochs" in uploads[-1] and "me/data" in uploads[-1]


def test_every_metric_of_the_package_is_known():
    assert calibration_metrics(np.eye(3), np.arange(3)).keys() <= METRICS.keys()


# What a reviewer tried


@pytest.mark.parametrize(
    "text",
    [
        "---\n- a list\n---\n# Mine\n",
        "---\nkey: [broken\n---\n# Mine\n",
        "---\n2024: x\n---\n# Mine\n",
        "caf\xe9 # Mine",
    ],
    ids=str,
)
def test_a_card_that_cannot_be_read_is_kept_under_another_name(tmp_path, text, caplog):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    write_card(facts(), tmp_path)
    kept = tmp_path / "README.kept.md"
    assert "## Results" in card_of(tmp_path).text
    if kept.is_file():
        assert b"# Mine" in kept.read_bytes() and "README.kept.md" in caplog.text
    else:
        assert "# Mine" in card_of(tmp_path).text


def test_metadata_of_the_user_counts_every_time_and_ours_is_made_anew(tmp_path):
    own = "---\nlicense: cc-by-4.0\npipeline_tag: other\ntags:\n- insects\n---\n\n# Beetles\n"
    (tmp_path / "README.md").write_bytes(("\ufeff" + own).encode("utf-8"))
    for datasets in (["me/wrong"], ["me/right"], ["me/right"]):
        write_card(facts(license="mit", datasets=datasets), tmp_path)
        data = card_of(tmp_path).data
        assert data.license == "cc-by-4.0" and data.pipeline_tag == "other" and data.datasets == datasets
    write_card(facts(method={"teacher": "none"}, evaluations=[]), tmp_path)
    data = card_of(tmp_path).data
    assert data.tags == ["insects", "hf_selfkd"] and data.eval_results is None and data.datasets is None


def test_a_stock_card_that_was_written_into_stays(tmp_path):
    trainer = evaluated(tmp_path)
    Trainer.create_model_card(trainer)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("More information needed", "I counted beetles.", 1))
    trainer.create_model_card()
    assert "I counted beetles." in card_of(tmp_path).text and "## Results" in card_of(tmp_path).text


@pytest.mark.parametrize(
    ("name", "told"),
    [("me/digits", True), ("digits", True), ("./outputs/x", False), ("~/secret/m", False), ("s3://bucket/m", False)],
)
def test_only_names_of_the_hub_are_told(tmp_path, name, told):
    trainer = train(tmp_path, "vit", make_samples("vit", 8), num_train_epochs=2)
    trainer.model.config._name_or_path = name
    trainer.create_model_card()
    assert (card_of(tmp_path).data.base_model == name) == told and (name in card_of(tmp_path).text) == told


def test_fields_of_a_class_of_the_users_own_are_not_told(tmp_path):
    @dataclasses.dataclass
    class Config(SelfKDConfig):
        wandb_api_key: str = ""

    trainer = train(tmp_path, "vit", make_samples("vit", 8), config_class=Config, wandb_api_key="SECRET")
    trainer.create_model_card()
    assert "SECRET" not in (tmp_path / "README.md").read_text() + (tmp_path / "selfkd_card.json").read_text()


def test_predictions_that_are_no_scores_of_classes(tmp_path):
    """An evaluation never fails for the card, and nothing is told of what is not known."""
    held = make_samples("vit", 8, seed=3)
    trainer = make_trainer(
        tmp_path,
        "vit",
        make_samples("vit", 8),
        eval_dataset=held,
        preprocess_logits_for_metrics=lambda logits, labels: logits.topk(2).indices,
        compute_metrics=lambda prediction: {"hits": 0.5},
    )
    trainer.evaluate()
    trainer.preprocess_logits_for_metrics = None
    unlabelled = [item | {"labels": -100} for item in held.items]
    trainer.compute_metrics = None
    trainer.predict(unlabelled)
    assert all(one.reliability is None for one in trainer.evaluations.values())
    trainer.create_model_card()


def test_a_card_of_an_evaluation_in_a_new_process_keeps_what_is_known(tmp_path):
    first = evaluated(tmp_path)
    first.create_model_card()
    write_card(
        dataclasses.replace(CardFacts.load(tmp_path), comparison=[{"method": "plain", "seed": 0, "error": 20.0}]),
        tmp_path,
    )
    second = make_trainer(
        tmp_path, first.model, make_samples("vit", 18), eval_dataset=make_samples("vit", 16, seed=3), **EVALUATED
    )
    second.evaluate()
    second.create_model_card()
    text = card_of(tmp_path).text
    assert "`teacher=history`" in text and "3 epochs" in text and "| plain | 1 | 20.00 |" in text
    elsewhere = make_trainer(tmp_path / "new", first.model, make_samples("vit", 18))
    elsewhere.create_model_card()
    assert "How it was trained is not known" in card_of(tmp_path / "new").text


def test_evaluations_of_other_weights_are_not_told(tmp_path):
    trainer = make_trainer(
        tmp_path, "vit", make_samples("vit", 18), eval_dataset=make_samples("vit", 16, seed=3), **EVALUATED
    )
    trainer.evaluate()
    trainer.train()
    trainer.create_model_card()
    assert "was not evaluated" in card_of(tmp_path).text and card_of(tmp_path).data.eval_results is None


def test_figures_in_per_cent_already_and_runs_that_went_astray():
    text = render(facts(evaluations=[Evaluation("eval", {"accuracy": 92.5, "nll": float("nan")}, 10, 50)]))
    assert "| Accuracy (%) | 92.50 |" in text and "nan" not in text
    runs = [{"method": "plain", "seed": seed, "error": 20.0, "nll": float("nan")} for seed in (0, 1)]
    assert "| plain | 2 | 20.00 ± 0.00 | nan" in render(facts(comparison=runs))


def test_a_loss_that_was_no_number_does_not_stop_the_card(tmp_path):
    nan = float("nan")
    curves = {"loss": [[1, 2.0], [2, nan], [3, 1.0]]}
    write_card(facts(curves=curves, evaluations=[Evaluation("eval", {"accuracy": 0.5, "nll": nan}, 10, 50)]), tmp_path)
    text = (tmp_path / "README.md").read_text()
    json.loads((tmp_path / "selfkd_card.json").read_text(), parse_constant=pytest.fail)
    write_card(CardFacts.load(tmp_path), tmp_path)
    assert (tmp_path / "README.md").read_text() == text and "| Accuracy (%) | 50.00 |" in text


def test_a_spread_has_the_unit_of_its_mean():
    for mean, std in ((0.932, 0.004), (93.2, 0.4)):
        assert METRICS["accuracy"].with_spread(mean, std) == "93.20 ± 0.40"
    assert METRICS["nll"].with_spread(0.5, None) == METRICS["nll"].shown(0.5) == "0.500"
