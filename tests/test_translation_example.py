"""The translation script and its corpus: tiny data made on the spot, tiny models, no network."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Translation, Value
from helpers import results, same_weights
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_selfkd import Seq2SeqSelfKDTrainer
from hf_selfkd.scripts import cldr_corpus as corpus
from hf_selfkd.scripts import translation, translation_demo
from hf_selfkd.scripts.arguments import TranslationDataArguments, TranslationModelArguments
from hf_selfkd.scripts.common import parse_arguments


EXAMPLES = Path(__file__).parents[1] / "examples"
FIGURES = ("bleu", "chrf", "gen_len", "token_nll", "token_ece", "token_accuracy", "loss")
MARIAN = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
}
RUN = {
    "model_type": "marian",
    "config_overrides": MARIAN,
    "tokenizer_vocab_size": 300,
    "max_source_length": 24,
    "max_target_length": 24,
    "validation_split_fraction": 0.25,
    "do_train": True,
    "do_eval": True,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": "1e-3",
    "save_strategy": "epoch",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
DEMO_MARIAN = MARIAN | {"max_position_embeddings": 128}
PAIRS = [{"en": f"{i} days and {i + 1} nights", "de": f"{i} Tage und {i + 1} Nächte"} for i in range(1, 25)]


@pytest.fixture
def run(run_script):
    return partial(run_script, translation)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "train.jsonl", PAIRS)


# The corpus


@pytest.fixture(scope="module")
def splits():
    return corpus.make_corpus()


def test_corpus_sizes_and_determinism(splits):
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 8000, "validation": 1000, "test": 1000}
    assert corpus.make_corpus() == splits
    other = corpus.make_corpus(seed=1, size=5000, held_out=200)
    assert {split: len(pairs) for split, pairs in other.items()} == {"train": 4600, "validation": 200, "test": 200}
    assert other["test"] != splits["test"][:200]
    with pytest.raises(ValueError, match="size: 1000 is too small; at least"):
        corpus.make_corpus(size=1000)


@pytest.mark.parametrize("target", ["en", "de"])
def test_corpus_does_not_leak(splits, target):
    sentences = [pair[target] for pairs in splits.values() for pair in pairs]
    assert all(text.strip() == text and text for text in sentences)
    bags = [tuple(sorted(text.replace(",", " ").split())) for text in sentences]
    assert len(set(bags)) == len(bags) == 10000  # not even in another order


def test_corpus_can_be_learnt_but_not_copied(splits):
    seen = {word for pair in splits["train"] for word in pair["de"].replace(",", " ").split()}
    words = [word for pair in splits["test"] for word in pair["de"].replace(",", " ").split()]
    assert sum(word in seen for word in words) > 0.85 * len(words)
    assert sum(pair["en"] == pair["de"] for pair in splits["test"]) < 50


def test_corpus_is_made_of_locale_data():
    both = corpus.both
    assert both(lambda locale: corpus.format_unit(3, "length-mile", locale=locale)) == ("3 miles", "3 Meilen")
    assert corpus.spelled(21, "ordinal") == ("twenty-first", "einundzwanzigste")
    names = corpus.names()
    assert ("Germany", "Deutschland") in names["territories"] and ("Monday", "Montag") in names["days"]
    assert ("Serbian (Cyrillic, Kosovo)", "Serbisch (Kyrillisch, Kosovo)") in corpus.locale_names()
    texts = " ".join(text for pair in corpus.Phrases(corpus.random.Random(0)).glossary() for text in pair)
    assert "length-" not in texts and "\u00a0" not in texts


def test_corpus_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cldr_corpus.py", str(tmp_path / "corpus"), "--size", "5000"])
    corpus.main()
    lines = (tmp_path / "corpus" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == corpus.make_corpus(size=5000)["test"]


# The script


def test_from_scratch_on_local_files(run, table, tmp_path):
    test = write(tmp_path / "test.jsonl", [{"en": "3 days"}, {"en": ""}, {"en": "twenty nights and a day"}])
    settings = RUN | {"train_file": table, "test_file": test, "do_predict": True}
    out = run(settings)
    metrics = results(out, "eval")
    assert {f"eval_{name}" for name in FIGURES} <= metrics.keys()
    assert "nrefs:1" in metrics["eval_bleu_signature"] and "nc:6" in metrics["eval_chrf_signature"]
    assert metrics["eval_samples"] == 6 and results(out, "train")["train_samples"] == 18
    assert not {"predict_bleu", "predict_loss", "predict_token_nll"} & results(out, "predict").keys()
    lines = (out / "predictions.txt").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 4 and lines[-1] == ""
    assert (out / "README.md").is_file()

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForSeq2SeqLM.from_pretrained(out)
    assert type(model).__name__ == "MarianMTModel" and model.config.vocab_size == len(tokenizer)
    ids = model.generate(**tokenizer(["3 days"], return_tensors="pt"))
    assert ids[0, 0] == tokenizer.pad_token_id == model.generation_config.decoder_start_token_id
    assert ids.shape[1] <= model.generation_config.max_length == 25
    assert " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split()) == lines[0]


def test_the_same_command_resumes(run, table, tmp_path):
    settings = RUN | {"train_file": table, "do_eval": False}
    out, resumed = run(settings), tmp_path / "resumed"
    first = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    shutil.copytree(first, resumed / first.name)
    run(settings | {"output_dir": resumed})
    half, whole, again = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (first, out, resumed))
    assert same_weights(whole, again) and not same_weights(whole, half)


def test_self_distillation_acts(run, table):
    weights = []
    for alpha in (0.8, 0.0):
        out = run(RUN | {"train_file": table}, "--alpha", alpha, "--predict_with_generate", "false")
        assert {"eval_token_nll", "eval_token_ece"} <= results(out, "eval").keys() - {"eval_bleu"}
        weights.append(AutoModelForSeq2SeqLM.from_pretrained(out))
        shutil.rmtree(out)
    assert not same_weights(*weights)


def test_translations_keep_the_order_of_the_test_set(run, table, tmp_path, monkeypatch):
    rows = [{"en": "day " * (1 + 5 * i % 7), "de": "x"} for i in range(14)]
    seen = []
    inner = translation.decode
    monkeypatch.setattr(translation, "decode", lambda tokenizer, ids: seen.append(len(ids)) or inner(tokenizer, ids))
    monkeypatch.setattr(
        Seq2SeqSelfKDTrainer,
        "prediction_step",
        lambda self, model, inputs, *a, **k: echo(model, inputs),
        raising=False,
    )
    settings = RUN | {"train_file": table, "test_file": write(tmp_path / "test.jsonl", rows), "do_eval": False}
    settings |= {"do_predict": True, "train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 4}
    out = run(settings)
    lines = (out / "predictions.txt").read_text().splitlines()
    assert seen == [14] and lines == [row["en"].strip() for row in rows]


def echo(model, inputs):
    """A prediction step that returns the source."""
    return torch.tensor(0.0), inputs["input_ids"], inputs["labels"]


def test_a_pretrained_t5_is_tuned_with_a_prefix(run, table, tmp_path):
    tokenizer = translation.train_tokenizer([[pair["en"] for pair in PAIRS]], 300)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    first = T5ForConditionalGeneration(config)
    first.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    settings = RUN | {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "t5"}
    settings |= {"train_file": table, "source_prefix": "translate: "}
    before = results(run(settings | {"do_train": False, "validation_file": table}), "eval")
    tuned = run(settings | {"validation_file": table}, "--learning_rate", 0.01)
    assert results(tuned, "eval")["eval_token_nll"] < before["eval_token_nll"]
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tuned)).__name__ == "T5ForConditionalGeneration"


class Multilingual:
    """What the script needs to know of a tokenizer with languages."""

    src_lang = tgt_lang = None

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def convert_tokens_to_ids(self, token):
        return {"de_DE": 7}[token]


def test_languages_of_a_multilingual_model(tmp_path, monkeypatch):
    tokenizer = Multilingual(translation.train_tokenizer([["one text"]], 270))
    config = MBartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    MBartForConditionalGeneration(config).save_pretrained(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **keywords: tokenizer)
    model_args = TranslationModelArguments(model_name_or_path=str(tmp_path))
    data_args = TranslationDataArguments(source_lang_code="en_XX", target_lang_code="de_DE")
    assert translation.make_tokenizer(model_args, data_args, None) is tokenizer
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", "de_DE")
    model = translation.make_model(model_args, data_args, translation.make_config(model_args), tokenizer)
    assert model.generation_config.forced_bos_token_id == 7
    assert model.config.decoder_start_token_id == 7  # mBART-25 has no other start token


def test_wmt_style_columns_and_a_dataset_of_the_hub(run, tmp_path, monkeypatch):
    """A folder in place of the dataset's name, and no upload."""
    features = Features({"id": Value("int64"), "translation": Translation(["de", "en"])})
    rows = {"id": list(range(24)), "translation": PAIRS}
    (tmp_path / "dataset").mkdir()
    for split in ("train", "validation", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "dataset" / f"{split}.parquet")
    cards = []
    monkeypatch.setattr(Seq2SeqSelfKDTrainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(Seq2SeqSelfKDTrainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(Seq2SeqSelfKDTrainer, "push_to_hub", lambda self, **card: cards.append(card))
    settings = RUN | {"dataset_name": str(tmp_path / "dataset"), "push_to_hub": True}
    settings |= {"source_lang": "de", "target_lang": "en", "do_predict": True, "max_predict_samples": 5}
    out = run(settings)
    assert results(out, "eval")["eval_samples"] == 24 and results(out, "predict")["predict_samples"] == 5
    assert "predict_bleu" in results(out, "predict") and len((out / "predictions.txt").read_text().splitlines()) == 5
    assert cards[-1]["tasks"] == "translation" and cards[-1]["language"] == ["de", "en"]
    assert not cards[-1]["dataset_tags"]  # no path of this machine


def test_pairs():
    rows = [{"en": "a", "de": "b", "id": 1}, {"en": None, "de": "c", "id": 2}, {"en": "d", "de": "", "id": 3}]
    data_args = TranslationDataArguments()
    assert translation.as_pairs(Dataset.from_list(rows), "train", data_args, "id").to_list() == [
        {"source": "a", "target": "b", "id": 1}
    ]
    test = translation.as_pairs(Dataset.from_list(rows), "test", data_args, None)
    assert len(test) == 3 and test.column_names == ["source", "target"]
    named = TranslationDataArguments(source_column="target", target_column="source")
    swapped = Dataset.from_list([{"source": "Ziel", "target": "aim"}])
    assert translation.as_pairs(swapped, "train", named, None).to_list() == [{"source": "aim", "target": "Ziel"}]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"source_column": "english"}, "--source_column english is not a column of the train data: .* en, de"),
        ({"target_lang": "fr"}, "--target_column fr is not a column"),
        ({"train_file": None}, "No data: give --dataset_name, --train_file or --cldr_corpus"),
        ({"do_predict": True}, "No test data, only train: give --test_file"),
        ({"do_train": False, "do_eval": False}, "Nothing to do"),
        ({"do_train": False}, "No tokenizer: give --tokenizer_name"),
        ({"model_type": None}, "No model: give --model_name_or_path"),
        ({"model_type": "bert", "config_overrides": None}, "BertConfig has no encoder and decoder"),
        ({"config_overrides": {"depths": [1]}}, "MarianConfig has no depths"),
        ({"max_target_length": 64}, "MarianConfig has 32 positions: set --max_source_length"),
        ({"train_file": "pairs.txt"}, "is not a .csv, .json, .jsonl or .parquet file"),
        ({"source_langage": "en"}, "unknown settings: source_langage"),
    ],
)
def test_what_is_wrong_is_told(run, table, setting, message):
    with pytest.raises(ValueError, match=message):
        run(RUN | {"train_file": table} | setting)


def test_columns_of_text_only(run, tmp_path):
    table = write(tmp_path / "train.jsonl", [{"en": 1, "de": "eins"}, {"en": 2, "de": "zwei"}])
    with pytest.raises(ValueError, match="Column en holds .*int64.*: it must be text"):
        run(RUN | {"train_file": table})


def test_tokenizer_from_scratch(tmp_path):
    texts = [[pair[target] for pair in PAIRS] for target in ("en", "de")]
    tokenizer = translation.train_tokenizer(texts, 400)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    special = [getattr(tokenizer, f"{name}_token") for name in ("pad", "bos", "eos", "unk")]
    assert special == ["<pad>", "<s>", "</s>", "<unk>"]
    text = "1,204.5 Nächte – 12 days, 漢字"
    for ids in (tokenizer(text)["input_ids"], tokenizer(text_target=text)["input_ids"]):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert tokenizer.tokenize("12 Tage") == ["Ġ", "1", "2", "ĠTage"]
    assert "token_type_ids" not in tokenizer(text)


def test_comparison_without_arguments(tmp_path, monkeypatch, capsys):
    small = {"seeds": (1, 2), "train_samples": 64, "test_samples": 8, "epochs": 2}
    inner = translation_demo.compare
    monkeypatch.setattr(
        translation_demo, "compare", lambda: inner(**small, output_dir=str(tmp_path), config_overrides=DEMO_MARIAN)
    )
    monkeypatch.setattr(sys, "argv", ["translation.py"])
    translation.main()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in translation_demo.METHODS for s in (1, 2)]
    assert all(row.keys() >= {"bleu", "chrf", "token_nll", "token_ece", "seconds"} for row in rows)
    printed = capsys.readouterr().out
    assert "over 2 seeds" in printed and all(f"\n{method} " in printed for method in translation_demo.METHODS)
    assert translation_demo.table(rows[:1] + rows[2:3] + rows[4:5]).count("±") == 0


def test_the_ready_run_is_valid(monkeypatch):
    file = EXAMPLES / "configs" / "multi30k_marian.yaml"
    monkeypatch.setattr(sys, "argv", ["script", str(file)])
    model_args, data_args, training_args = parse_arguments(translation.make_parser())
    assert (training_args.learning_rate, training_args.predict_with_generate, training_args.alpha) == (2e-3, True, 0.8)
    config = translation.make_config(model_args)
    assert all(getattr(config, name) == value for name, value in model_args.config_overrides.items())
    translation.check_lengths(config, data_args)
    assert yaml.safe_load(Path(file).read_text())["dataset_name"] == data_args.dataset_name == "bentrevett/multi30k"
