"""The scripts of classification and the examples: tiny data made on the spot, tiny models, no network."""

import csv
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers import results, same_weights
from PIL import Image as PILImage
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.scripts import data
from hf_selfkd.scripts import image_classification as images
from hf_selfkd.scripts import text_classification as texts
from hf_selfkd.scripts.arguments import ImageDataArguments
from hf_selfkd.scripts.common import parse_arguments


EXAMPLES = Path(__file__).parents[1] / "examples"
FIGURES = ("accuracy", "nll", "brier", "ece", "aurc", "loss")
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
RUN = {
    "do_train": True,
    "do_eval": True,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-3",
    "save_strategy": "epoch",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
IMAGE_RUN = RUN | {"model_type": "vit", "config_overrides": VIT, "image_size": 16, "validation_split_fraction": 0.25}
TEXT_RUN = RUN | {"model_type": "bert", "config_overrides": BERT, "tokenizer_vocab_size": 300}


@pytest.fixture
def run(run_script):
    return run_script


def picture(rng, bright):
    return PILImage.fromarray(rng.integers(128 * bright, 128 + 127 * bright, (20, 24, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """An imagefolder: 8 dark and 8 bright pictures, one of them gray."""
    rng = np.random.default_rng(0)
    for bright, name in enumerate(("dark", "bright")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            image = picture(rng, bright)
            (image.convert("L") if i == 0 else image).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def table(tmp_path):
    """A JSON lines file of 24 texts, pairs and classes 3 and 10."""
    file = tmp_path / "train.jsonl"
    words = (("sunny and warm", 10), ("rain and cold", 3))
    rows = [{"text": f"{words[i % 2][0]} {i}", "second": "a day", "label": words[i % 2][1]} for i in range(24)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def predictions(out):
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def resumed_equals_whole(run, script, settings, model_class, out):
    """Run again from the checkpoint after the first epoch, into another folder, and compare the weights."""
    resumed = out.parent / "resumed"
    first = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    shutil.copytree(first, resumed / first.name)
    run(script, settings | {"output_dir": resumed})
    assert json.loads((resumed / "trainer_state.json").read_text())["log_history"]
    fresh = model_class.from_pretrained(first)
    whole, again = model_class.from_pretrained(out), model_class.from_pretrained(resumed)
    assert not same_weights(fresh, whole)
    return same_weights(whole, again)


def test_images_from_a_folder(run, folder):
    settings = IMAGE_RUN | {"train_dir": folder, "test_dir": folder, "do_predict": True, "seed_transforms": True}
    out = run(images, settings)
    for split in ("eval", "predict"):
        assert {f"{split}_{name}" for name in FIGURES} <= results(out, split).keys()
    assert results(out, "train")["train_samples"] == 12 and results(out, "eval")["eval_samples"] == 4
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert (out / "README.md").is_file() and history[-1]["step"] == 6
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.id2label == {0: "bright", 1: "dark"}
    processor = AutoImageProcessor.from_pretrained(out)
    path = sorted(folder.rglob("*.png"))[0]
    answer = pipeline("image-classification", model=model, image_processor=processor)(str(path))[0]
    row = predictions(out)[0]
    if "label" in row:  # as the metrics have it
        found = results(out, "predict")
        rows = predictions(out)
        assert np.mean([row["prediction"] == row["label"] for row in rows]) == pytest.approx(found["predict_accuracy"])
        nll = -np.log([float(row["label_probability"]) for row in rows]).mean()
        assert nll == pytest.approx(found["predict_nll"], abs=1e-4) and found["predict_temperature"] > 0
        assert (out / "reliability.png").is_file() and (out / "risk_coverage.png").is_file()
    assert len(predictions(out)) == 16
    told = json.loads((out / "_selfkd_samples.json").read_text())  # for the report
    assert told["samples"] == 12 and all(sample["image"].startswith("data:image/png") for sample in told["suspicious"])
    assert answer["label"] == row["prediction"] and abs(answer["score"] - float(row["confidence"])) < 1e-3
    assert resumed_equals_whole(run, images, settings, AutoModelForImageClassification, out)


def test_self_distillation_acts(run, folder):
    settings = IMAGE_RUN | {"train_dir": folder, "augmentation": "none", "logging_steps": 1}
    weights = []
    for alpha in (0.8, 0.0):
        out = run(images, settings, "--alpha", alpha, "--no_horizontal_flip")
        weights.append(AutoModelForImageClassification.from_pretrained(out))
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        shares = [entry["rows_with_history"] for entry in history if "rows_with_history" in entry]
        assert shares == ([0, 0, 0, 1, 1, 1] if alpha else [])
        shutil.rmtree(out)
    assert not same_weights(*weights)


def test_images_from_tables(run, folder, tmp_path):
    paths = sorted(folder.rglob("*.png"))
    with open(tmp_path / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "kind"), *((p.relative_to(tmp_path), p.parent.name) for p in paths)])
    features = Features({"file": Image(), "kind": ClassLabel(names=["dark", "bright"])})
    rows = {"file": [str(path) for path in paths], "kind": [path.parent.name for path in paths]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "validation.parquet")
    data = {"train_file": tmp_path / "train.csv", "validation_file": tmp_path / "validation.parquet"}
    columns = {"image_column_name": "file", "label_column_name": "kind", "augmentation": "pad_crop"}
    out = run(images, IMAGE_RUN | data | columns | {"num_train_epochs": 8, "learning_rate": 0.01})
    # The classes of the two files are numbered the other way round: agreement means that they go by name.
    assert results(out, "eval")["eval_samples"] == 16 and results(out, "eval")["eval_accuracy"] == 1


def test_auxiliary_heads_on_few_images(run, folder):
    options = {"auxiliary_heads": "lsskd", "few_shot_fraction": 0.5, "evaluate_heads": True, "logging_steps": 1}
    out = run(images, IMAGE_RUN | options | {"train_dir": folder, "validation_dir": folder})
    assert results(out, "train")["train_samples"] == 8
    assert 0 <= results(out)["eval_head0_accuracy"] <= 1
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("head0_loss" in entry for entry in log)
    model, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"] and not any("selfkd" in name for name in model.state_dict())


def test_few_shots_keep_a_share_of_each_class():
    labels = [0] * 40 + [1] * 8 + [2]
    dataset = Dataset.from_dict({"labels": labels, "row": list(range(49))})
    kept = images.few_shot(dataset, 0.25)
    assert np.bincount(kept["labels"][:]).tolist() == [10, 2, 1]
    assert kept["row"][:] == images.few_shot(dataset, 0.25)["row"][:] != list(range(13))
    assert images.few_shot(dataset, 1) is dataset


def test_mixing(run, folder):
    settings = IMAGE_RUN | {"train_dir": folder, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    with pytest.raises(ValueError, match="teacher='snapshot'"):
        run(images, settings, "--teacher", "history")
    run(images, settings)


def test_texts_and_a_tokenizer_of_their_own(run, table, tmp_path):
    with open(tmp_path / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text",), ("sunny and warm",), ("",), ("rain",)])
    settings = TEXT_RUN | {"train_file": table, "test_file": tmp_path / "test.csv", "do_predict": True}
    out = run(texts, settings, "--num_train_epochs", 2)
    assert {f"eval_{name}" for name in FIGURES} <= results(out, "eval").keys()
    assert "predict_nll" not in results(out, "predict") and len(predictions(out)) == 3
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.id2label == {0: "3", 1: "10"}
    assert model.config.vocab_size == len(tokenizer) and model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer("sunny and warm")["input_ids"]) == "[CLS] sunny and warm[SEP]"
    answer = pipeline("text-classification", model=model, tokenizer=tokenizer)("sunny and warm")[0]
    row = predictions(out)[0]
    assert answer["label"] == row["prediction"] and abs(answer["score"] - float(row["confidence"])) < 1e-3
    assert resumed_equals_whole(run, texts, settings, AutoModelForSequenceClassification, out)


def test_a_trained_model_is_tuned_and_evaluated(run, table, tmp_path):
    settings = TEXT_RUN | {"train_file": table, "text_pair_column_name": "second"}
    first = run(texts, settings)
    settings = settings | {"model_type": None, "model_name_or_path": first, "output_dir": tmp_path / "second"}
    again = run(texts, settings | {"do_train": False})
    assert results(again, "eval")["eval_nll"] == pytest.approx(results(first, "eval")["eval_nll"])
    tuned = run(texts, settings, "--alpha", 0, "--label_smoothing_factor", 0.1, "--learning_rate", 0.01)
    assert results(tuned, "eval")["eval_nll"] != results(first, "eval")["eval_nll"]


def test_a_dataset_of_the_hub_is_shared(run, table, tmp_path, monkeypatch):
    """A folder in place of the dataset's name, and no upload."""
    for split in ("learn", "validation"):
        (tmp_path / "dataset" / split).mkdir(parents=True)
        shutil.copy(table, tmp_path / "dataset" / split / "part.jsonl")
    (tmp_path / "dataset" / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: learn\n    path: learn/*\n"
        "  - split: validation\n    path: validation/*\n---\n"
    )
    cards = []
    monkeypatch.setattr(SelfKDTrainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(SelfKDTrainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(SelfKDTrainer, "push_to_hub", lambda self, **card: cards.append(card))
    data = {"dataset_name": str(tmp_path / "dataset"), "dataset_config_name": "all", "push_to_hub": True}
    with pytest.raises(ValueError, match="No train data, only validation: give .* right --train_split_name"):
        run(texts, TEXT_RUN | data)
    out = run(texts, TEXT_RUN | data, "--train_split_name", "learn")
    assert results(out, "eval")["eval_samples"] == 24
    assert cards[-1]["tasks"] == "text-classification" and not cards[-1]["dataset_tags"]  # no path of this machine
    inspect.signature(SelfKDTrainer.create_model_card).bind(None, **cards[-1])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_column_name": "img"}, "--image_column_name img is not a column of the train data: .* image, label"),
        ({"label_column_name": "kind"}, "--label_column_name kind is not a column"),
        ({"train_dir": None}, "No data: give --dataset_name, --train_file or --train_dir"),
        ({"do_predict": True}, "No test data, only train: give --test_file, --test_dir"),
        ({"do_train": False, "do_eval": False}, "Nothing to do"),
        ({"model_type": None}, "No model: give --model_name_or_path"),
        ({"config_overrides": {"depths": [1]}}, "ViTConfig has no depths"),
        ({"validation_split_fraction": 1.5}, "validation_split_fraction 1.5 is outside"),
        ({"train_dir": None, "train_file": "images.txt"}, "is not a .csv, .json, .jsonl or .parquet file"),
        ({"augmentaton": "none"}, "unknown settings: augmentaton"),
    ],
)
def test_what_is_wrong_with_images_is_told(run, folder, setting, message):
    with pytest.raises(ValueError, match=message):
        run(images, IMAGE_RUN | {"train_dir": folder} | setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"text_column_name": "sentence"}, "--text_column_name sentence is not a column of the train data"),
        ({"text_pair_column_name": "other"}, "--text_pair_column_name other is not a column"),
        ({"label_column_name": "score"}, "score holds .*float.*: one class per text"),
        ({"text_column_name": "score"}, "Column score holds .*float64.*: it must be text"),
        ({"label_column_name": "language"}, r"language has 1 classes \(en\): .* training data with at least 2"),
        ({"do_train": False}, "No tokenizer: give --tokenizer_name"),
    ],
)
def test_what_is_wrong_with_texts_is_told(run, tmp_path, setting, message):
    file = tmp_path / "train.csv"
    file.write_text("text,label,score,language\ngood,1,0.5,en\nbad,0,0.25,en\n")
    if setting == {"do_train": False}:
        setting = setting | {"config_overrides": BERT | {"id2label": {0: "0", 1: "1"}}}
    with pytest.raises(ValueError, match=message):
        run(texts, TEXT_RUN | {"train_file": file} | setting)


def test_a_file_with_nothing_but_a_header_is_named(run, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="--train_file .*train.csv has no rows: give a file with at least one sample"):
        run(texts, TEXT_RUN | {"train_file": tmp_path / "train.csv"})


def test_labels():
    rows = Dataset.from_dict({"text": ["x", "y", "z"], "label": ["b", None, "a"]})
    assert data.with_labels(rows, "label", ["a", "b"], "validation")["labels"][:] == [1, -100, 0]
    with pytest.raises(ValueError, match="Row 1 of the training data has no label"):
        data.with_labels(rows, "label", ["a", "b"], "train")
    with pytest.raises(ValueError, match="test data have classes that the model does not know: b"):
        data.with_labels(rows, "label", ["a", "c"], "test")
    hidden = rows.remove_columns("label").add_column("label", [-1] * 3, feature=ClassLabel(names=["a", "b"]))
    assert data.with_labels(hidden, "label", ["a", "b"], "test").column_names == ["text"]
    numbers = Dataset.from_dict({"label": [10, 9, 10]}, features=Features({"label": Value("int32")}))
    assert data.class_names(numbers, "label") == ["9", "10"]
    nothing = Dataset.from_dict({"label": [None]}, features=Features({"label": Value("string")}))
    with pytest.raises(ValueError, match=r"label has 0 classes \(no label at all\)"):
        data.class_names(nothing, "label")


def test_augmentation_without_torchvision(monkeypatch):
    monkeypatch.setattr(images, "is_torchvision_available", lambda: False)
    data_args = ImageDataArguments()
    with pytest.raises(ImportError, match=r"hf_selfkd\[vision\]"):
        images.make_augmentation(None, data_args)
    data_args.augmentation, data_args.horizontal_flip = "none", False
    assert images.make_augmentation(None, data_args) is None


def test_timm_images_have_the_statistics_of_the_model():
    from transformers import TimmWrapperImageProcessor

    cfg = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    processor = TimmWrapperImageProcessor(cfg, "resnet18")
    augment = images.make_augmentation(processor, ImageDataArguments())
    transform = images.ImageTransform(processor, "image", augment)
    batch = transform({"image": [PILImage.new("RGB", (30, 20), "white")], "labels": [1]})
    assert batch["pixel_values"].shape == (1, 3, 16, 16) and batch["labels"] == [1]
    assert torch.allclose(batch["pixel_values"], torch.tensor(2.0))


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("script", [images, texts])
def test_settings_of_a_file_and_flags(script, suffix, tmp_path, monkeypatch):
    file = tmp_path / f"settings{suffix}"
    settings = {"model_type": "vit", "alpha": 0.5, "seed": 7, "do_train": True, "config_overrides": {"depths": [1]}}
    file.write_text((yaml.safe_dump if suffix == ".yaml" else json.dumps)(settings))
    if suffix == ".yaml":
        file.write_text(file.read_text() + "learning_rate: 1e-4\n")
    flags = ["--alpha", "0.25", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["script", str(file), *flags])
    model_args, _, training_args = parse_arguments(script.make_parser())
    assert (training_args.alpha, training_args.seed, training_args.do_train) == (0.25, 7, True)
    assert training_args.learning_rate == (1e-4 if suffix == ".yaml" else 5e-5)
    assert model_args.config_overrides == {"depths": [1]} and model_args.cache_dir is None


READY = {"cifar100": images, "ag_news": texts}


@pytest.mark.parametrize("name", sorted(file.stem for file in (EXAMPLES / "configs").glob("[ac]*.yaml")))
def test_ready_runs_are_valid(name, monkeypatch):
    script = next(script for start, script in READY.items() if name.startswith(start))
    monkeypatch.setattr(sys, "argv", ["script", str(EXAMPLES / "configs" / f"{name}.yaml")])
    model_args, data_args, training_args = parse_arguments(script.make_parser())
    assert isinstance(training_args.learning_rate, float) and isinstance(training_args.weight_decay, float)
    assert training_args.alpha == (0.0 if name.endswith(("sla", "exits")) else 0.8)
    assert data_args.dataset_name and not data_args.local
    if model_args.model_name_or_path is None:
        config = script.make_config(model_args, ["a", "b", "c"])
        assert config.num_labels == 3 and all(getattr(config, k) == v for k, v in model_args.config_overrides.items())


def test_accelerate_configs_are_valid():
    files = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))
    kinds = {file.stem: str(load_config_from_file(str(file)).distributed_type.value) for file in files}
    assert kinds == {
        "cpu": "NO",
        "deepspeed_zero2": "DEEPSPEED",
        "deepspeed_zero3": "DEEPSPEED",
        "fsdp2": "FSDP",
        "multi_gpu": "MULTI_GPU",
        "single_gpu": "NO",
        "tpu": "XLA",
    }
    for stage in (2, 3):
        settings = load_config_from_file(str(EXAMPLES / "accelerate_configs" / f"deepspeed_zero{stage}.yaml"))
        assert settings.deepspeed_config["zero_stage"] == stage


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    args = SelfKDConfig(str(tmp_path), use_cpu=True, report_to="none")
    for name, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):  # torchrun without --use_cpu, and no accelerator
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 processes.*use_cpu=True"):
        SelfKDTrainer(None, args)


@pytest.mark.slow
def test_two_processes(tmp_path, table):
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    settings = TEXT_RUN | {"train_file": str(table), "validation_file": str(table), "output_dir": str(out)}
    file.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [EXAMPLES / "text_classification.py", file, "--alpha", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("***** eval metrics *****") == 1 and "Process 1 of 2" in done.stdout
    metrics = results(out, "eval")
    assert metrics["eval_samples"] == 24 and results(out, "train")["train_samples"] == 24
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"], rel=1e-3)
    steps = json.loads((out / "trainer_state.json").read_text())["global_step"]
    assert steps == 2 * 24 // (2 * 4)
    AutoModelForSequenceClassification.from_pretrained(out)
