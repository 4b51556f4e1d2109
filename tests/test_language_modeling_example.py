"""The language modeling script: tiny texts made on the spot, tiny models, no network."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import results, same_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

from hf_selfkd import SelfKDTrainer
from hf_selfkd.metrics import calibration_metrics
from hf_selfkd.scripts import language_modeling as script
from hf_selfkd.scripts.common import parse_arguments


EXAMPLES = Path(__file__).parents[1] / "examples"
FIGURES = {f"eval_{name}" for name in ("loss", "nll", "perplexity", "accuracy", "ece", "tokens", "samples")}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
RUN = {
    "do_train": True,
    "do_eval": True,
    "block_size": 8,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-3",
    "logging_steps": 1,
    "save_strategy": "epoch",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
CAUSAL = RUN | {"model_type": "gpt2", "config_overrides": GPT2, "tokenizer_vocab_size": 300}
MASKED = RUN | {
    "objective": "masked",
    "model_type": "bert",
    "config_overrides": BERT,
    "tokenizer_vocab_size": 300,
    "mlm_probability": 0.4,
}
WEATHER = ("sunny and warm", "rain and cold in the north")


@pytest.fixture
def run(run_script):
    return partial(run_script, script)


@pytest.fixture
def lines(tmp_path):
    """A text file of 12 texts, one a line, between blank lines."""
    file = tmp_path / "train.txt"
    file.write_text("\n\n".join(f"{WEATHER[i % 2]} {i}" for i in range(12)) + "\n \n")
    return file


def logged(out, name):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def resumed_equals_whole(run, settings, model_class, out, step):
    """Run again from the checkpoint of a step, into another folder, and compare the weights."""
    resumed = out.parent / "resumed"
    checkpoint = f"checkpoint-{step}"
    shutil.copytree(out / checkpoint, resumed / checkpoint)
    run(settings | {"output_dir": resumed})
    fresh = model_class.from_pretrained(out / checkpoint)
    whole, again = model_class.from_pretrained(out), model_class.from_pretrained(resumed)
    assert not same_weights(fresh, whole)
    return same_weights(whole, again)


@torch.no_grad()
def token_losses(model, rows):
    """What `-log p` is of every token but the first, one row at a time: no padding, no shift by the script."""
    losses = []
    for row in rows:
        logits = model(torch.tensor([row])).logits[0].double().log_softmax(dim=-1)
        losses += [-logits[i, token].item() for i, token in enumerate(row[1:])]
    return losses


def test_causal_from_text_lines(run, lines):
    settings = CAUSAL | {"train_file": lines, "validation_file": lines, "save_strategy": "steps", "save_steps": 1}
    out = run(settings | {"per_device_eval_batch_size": 5})
    metrics = results(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    texts = [line for line in lines.read_text().split("\n") if line.strip()]
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    assert all(row[0] == tokenizer.bos_token_id for row in rows) and max(map(len, rows)) > 8
    blocks = [row[i : i + 8] for row in rows for i in range(0, len(row) - 1, 7)]
    losses = torch.tensor(token_losses(model, blocks))
    assert FIGURES <= metrics.keys()
    assert metrics["eval_samples"] == len(blocks)
    assert metrics["eval_tokens"] == len(losses) == sum(len(row) - 1 for row in rows)
    assert metrics["eval_nll"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert model.config.vocab_size == len(tokenizer) and model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer("warm rain")["input_ids"], skip_special_tokens=True) == "warm rain"
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)("warm", max_new_tokens=3)
    assert answer[0]["generated_text"].startswith("warm")
    steps = logged(out, "rows_with_history")
    half = len(steps) // 2
    assert half > 1 and steps == [0] * half + [1] * half
    assert resumed_equals_whole(run, settings, AutoModelForCausalLM, out, half + 1)


def test_one_block_gives_the_eval_loss(run, lines):
    """All samples in one batch: then the loss of the model is a mean over all tokens, too."""
    out = run(CAUSAL | {"train_file": lines, "per_device_eval_batch_size": 64, "alpha": 0.0})
    metrics = results(out)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"], rel=1e-5)


def test_scores_are_those_of_whole_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 9, 11, generator=generator)
    labels = torch.randint(11, (6, 9), generator=generator)
    labels[torch.rand(6, 9, generator=generator) < 0.3] = -100
    for shifted in (False, True):
        scores = script.TokenScores(shifted)(logits, labels)
        # As the trainer joins batches of other lengths.
        scores = torch.nn.functional.pad(scores, (0, 0, 0, 2), value=-100).numpy()
        metrics = script.compute_token_metrics(EvalPrediction(scores, None))
        rows = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
        known = rows[1] != -100
        whole = calibration_metrics(rows[0], rows[1])
        assert metrics["tokens"] == int(known.sum())
        for name in ("nll", "accuracy", "ece"):
            assert metrics[name] == pytest.approx(whole[name], rel=1e-5)
        assert metrics["perplexity"] == pytest.approx(torch.tensor(whole["nll"]).exp().item())


def test_a_probability_on_the_edge_of_a_bin_is_in_the_lower_one():
    scores = torch.tensor([[[0.5, 0.6, 1.0], [0.5, 0.600001, 0.0]]]).numpy()
    # Two bins of one token each: |1 - 0.6| and |0 - 0.6|; in one bin it would be |0.5 - 0.6|.
    assert script.compute_token_metrics(EvalPrediction(scores, None))["ece"] == pytest.approx(50, abs=0.01)


def test_masked_defaults_to_snapshot_and_resumes(run, lines, caplog):
    settings = MASKED | {"train_file": lines, "save_strategy": "steps", "save_steps": 1}
    with caplog.at_level("INFO"):
        out = run(settings)
    assert "teacher=snapshot" in caplog.text
    assert FIGURES <= results(out).keys()
    steps = len(logged(out, "rows_with_history"))
    assert logged(out, "rows_with_history")[-1] == 1
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("warm rain")["input_ids"]) == "[CLS] warm rain[SEP]"
    answer = pipeline("fill-mask", model=model, tokenizer=tokenizer)("warm and [MASK]")
    assert len(answer) == 5
    assert resumed_equals_whole(run, settings, AutoModelForMaskedLM, out, steps // 2 + 1)


def test_fixed_masks_take_the_history(run, lines):
    settings = MASKED | {"train_file": lines, "fixed_masking": True}
    out = run(settings)
    shares = logged(out, "rows_with_history")
    assert shares and shares == [0] * (len(shares) // 2) + [1] * (len(shares) // 2)
    with pytest.raises(ValueError, match="--teacher history stores .* give --fixed_masking"):
        run(settings | {"fixed_masking": False, "teacher": "history", "output_dir": out.parent / "other"})


def test_masks_of_evaluation_do_not_depend_on_the_run(run, lines):
    out = run(MASKED | {"train_file": lines, "validation_file": lines})
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    dataset = Dataset.from_dict({"text": [line for line in lines.read_text().split("\n") if line.strip()]})
    blocks = script.MaskedBlocks(tokenizer, 8)
    samples = dataset.map(blocks, batched=True, input_columns="text", remove_columns="text")
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in samples["input_ids"])
    masking = script.Masking(script.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4))
    losses = []
    for i, sample in enumerate(samples):
        torch.rand(1)  # whatever was drawn before
        masked = masking.fixed(sample, i)
        with torch.no_grad():
            logits = model(**{name: torch.tensor([masked[name]]) for name in tokenizer.model_input_names}).logits[0]
        targets = [(place, label) for place, label in enumerate(masked["labels"]) if label != -100]
        losses += [-logits[place].log_softmax(-1)[label].item() for place, label in targets]
        pair = masked["input_ids"], masked["labels"]
        originals = [token if label == -100 else label for token, label in zip(*pair, strict=True)]
        assert originals == sample["input_ids"]
    metrics = results(out)
    assert metrics["eval_tokens"] == len(losses)
    assert metrics["eval_nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    again = run(
        MASKED
        | {"do_train": False, "validation_file": lines, "model_type": None, "model_name_or_path": out}
        | {"output_dir": out.parent / "again", "seed": 7}
    )
    assert results(again)["eval_nll"] == pytest.approx(metrics["eval_nll"])


def test_short_texts_have_something_to_predict(run, tmp_path):
    (tmp_path / "short.txt").write_text("a\nb\nc\nd\n")
    rare = {"mlm_probability": 0.1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    file = tmp_path / "short.txt"
    out = run(MASKED | rare | {"train_file": file, "validation_file": file})
    assert results(out)["eval_tokens"] >= 4
    assert results(out)["eval_nll"] < 100 and all(0 < loss < 100 for loss in logged(out, "hard_loss"))


def test_a_model_of_a_folder_is_tuned(run, lines, tmp_path):
    """Its tokenizer has one token for the end of a text and for padding, and adds none by itself, as GPT-2's."""
    tokenizer = script.train_tokenizer([lines.read_text().split("\n")], 300, masked=False, token_types=False)
    tokenizer.backend_tokenizer.post_processor = script.processors.ByteLevel()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(GPT2Config(**GPT2, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end))
    model.save_pretrained(tmp_path / "base")
    rows = [{"story": f"{WEATHER[i % 2]} {i}"} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows[:4]).to_csv(tmp_path / "validation.csv")
    settings = CAUSAL | {
        "model_type": None,
        "config_overrides": None,
        "model_name_or_path": tmp_path / "base",
        "train_file": tmp_path / "train.jsonl",
        "validation_file": tmp_path / "validation.csv",
        "text_column_name": "story",
        "block_size": 32,
        "warm_start_teacher": True,
    }
    out = run(settings)
    assert set(logged(out, "rows_with_history")) == {1}
    tokens = tokenizer([row["story"] for row in rows[:4]])["input_ids"]
    # The end of a text is a target although it pads as well; the first token is none.
    assert results(out)["eval_tokens"] == sum(map(len, tokens))
    assert not same_weights(GPT2LMHeadModel.from_pretrained(out), model)
    metrics = results(run(settings | {"do_train": False, "model_name_or_path": out, "output_dir": tmp_path / "eval"}))
    assert metrics["eval_nll"] == pytest.approx(results(out)["eval_nll"])


def test_label_smoothing_is_not_in_the_perplexity(run, lines):
    out = run(CAUSAL | {"train_file": lines}, "--alpha", 0, "--label_smoothing_factor", 0.1)
    metrics = results(out)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(metrics["eval_nll"]).exp().item(), rel=1e-5)
    assert abs(metrics["eval_loss"] - metrics["eval_nll"]) < 0.1 * 6  # off by at most the share of the uniform part


def test_a_dataset_of_the_hub_is_shared(run, lines, tmp_path, monkeypatch):
    """A folder in place of the dataset's name, and no upload."""
    (tmp_path / "dataset").mkdir()
    shutil.copy(lines, tmp_path / "dataset" / "train.txt")
    cards = []
    monkeypatch.setattr(SelfKDTrainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(SelfKDTrainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(SelfKDTrainer, "push_to_hub", lambda self, **card: cards.append(card))
    data = {"dataset_name": str(tmp_path / "dataset"), "push_to_hub": True, "max_train_samples": 4}
    out = run(CAUSAL | data | {"max_eval_samples": 1, "validation_split_fraction": 0.25, "block_size": 32})
    assert results(out)["eval_samples"] == 1 and results(out, "train")["train_samples"] == 4
    assert cards[-1]["tasks"] == "text-generation" and not cards[-1]["dataset_tags"]  # no path of this machine


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": None}, "No model: give --model_name_or_path"),
        ({"train_file": None}, "No data: give --dataset_name or --train_file"),
        ({"train_file": "texts.pdf"}, "is not a .txt, .csv, .json, .jsonl or .parquet file"),
        ({"text_column_name": "story"}, "--text_column_name story is not a column of the train data: .* text"),
        ({"do_train": False, "do_eval": False}, "Nothing to do: give --do_train or --do_eval"),
        ({"do_train": False}, "No tokenizer: give --tokenizer_name"),
        ({"block_size": 1}, "--block_size 1 leaves no token"),
        ({"mlm_probability": 0.0}, "--mlm_probability 0.0 is outside"),
        ({"validation_split_fraction": 1.5}, "validation_split_fraction 1.5 is outside"),
        ({"config_overrides": {"depths": [1]}}, "GPT2Config has no depths"),
        ({"model_type": "bert", "config_overrides": BERT}, "BertLMHeadModel looks ahead: give --objective masked"),
        ({"fixed_masking": True}, "--fixed_masking is for --objective masked"),
        ({"sample_id_column": "text"}, "--sample_id_column is of texts"),
        ({"objektive": "masked"}, "unknown settings: objektive"),
    ],
)
def test_what_is_wrong_is_told(run, lines, setting, message):
    with pytest.raises(ValueError, match=message):
        run(CAUSAL | {"train_file": lines} | setting)


def test_blank_texts_are_told(run, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n\n \n")
    with pytest.raises(ValueError, match="Column text of the train data holds no text: 4 rows"):
        run(CAUSAL | {"train_file": tmp_path / "blank.txt", "do_eval": False})


def test_nothing_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(ValueError, match="^No model: give --model_name_or_path.*$"):
        script.main()


def test_the_ready_run_is_valid(monkeypatch):
    file = EXAMPLES / "configs" / "wikitext2_gpt2.yaml"
    monkeypatch.setattr(sys, "argv", ["script", str(file)])
    model_args, data_args, training_args = parse_arguments(script.make_parser())
    assert isinstance(training_args.learning_rate, float) and training_args.alpha == 0.8
    config = script.make_config(model_args)
    assert all(getattr(config, name) == value for name, value in model_args.config_overrides.items())
    assert data_args.dataset_name == yaml.safe_load(file.read_text())["dataset_name"] and not data_args.local


@pytest.mark.slow
def test_two_processes(run, lines, tmp_path):
    file, out = tmp_path / "run.yaml", tmp_path / "two"
    settings = CAUSAL | {"train_file": str(lines), "validation_file": str(lines), "output_dir": str(out)}
    file.write_text(yaml.safe_dump(settings | {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [EXAMPLES / "language_modeling.py", file]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("***** eval metrics *****") == 1 and "Process 1 of 2" in done.stdout
    alone = run(settings | {"model_type": None, "model_name_or_path": out, "do_train": False, "output_dir": tmp_path})
    for name in ("tokens", "samples", "nll", "perplexity", "accuracy", "ece"):
        assert results(out)[f"eval_{name}"] == pytest.approx(results(alone)[f"eval_{name}"], rel=1e-5)
