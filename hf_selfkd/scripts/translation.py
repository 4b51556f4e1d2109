"""
Train a translation model with progressive self-distillation, from a pretrained model or from scratch.

```bash
# no arguments: plain training, label smoothing and PS-KD on a small corpus that comes with it, in one table
hf-selfkd train translation

# fine-tune a pretrained model on a dataset of the Hub; T5 is told what to do by a prefix
hf-selfkd train translation --model_name_or_path google-t5/t5-small \
    --source_prefix 'translate English to German: ' \
    --dataset_name bentrevett/multi30k --source_lang en --target_lang de \
    --do_train --do_eval --num_train_epochs 3 --warm_start_teacher --output_dir outputs/multi30k_t5

# train model and tokenizer from scratch on local files; no network needed
hf-selfkd train translation --model_type marian --config_overrides '{"d_model": 256, "num_hidden_layers": 3}' \
    --train_file train.jsonl --source_column english --target_column german \
    --do_train --do_eval --num_train_epochs 20 --output_dir outputs/translation

# settings from a YAML (or JSON) file, some of them overridden
hf-selfkd train translation examples/configs/multi30k_marian.yaml --alpha 0.5
```

Two baselines are the same command with `--alpha 0` (plain training) and with `--alpha 0 --label_smoothing_factor 0.1`
(label smoothing). The arguments of training are those of `Seq2SeqSelfKDConfig`, hence of `Seq2SeqTrainingArguments`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, Translation
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_selfkd import Seq2SeqSelfKDConfig, Seq2SeqSelfKDTrainer
from hf_selfkd.metrics import compute_translation_metrics

from . import common, data, tokenization
from .arguments import TranslationDataArguments, TranslationModelArguments


logger = logging.getLogger(__name__)

TASK = "translation"


def make_parser() -> HfArgumentParser:
    """The parser of all flags."""
    parser = common.make_parser(TASK)
    parser.set_defaults(predict_with_generate=True)  # without it there is no BLEU
    return parser


# Data


def load_splits(data_args: TranslationDataArguments, model_args: TranslationModelArguments) -> dict[str, Dataset]:
    """The splits that there are; with `--cldr_corpus` those of the corpus that needs no download."""
    if not data_args.cldr_corpus:
        return data.load_splits(data_args, model_args)
    try:
        from .cldr_corpus import make_corpus
    except ImportError as error:
        raise ImportError(f'{error}; for the corpus: pip install "hf_selfkd[translation]"') from error
    return {split: Dataset.from_list(pairs) for split, pairs in make_corpus().items()}


def prepare_splits(
    splits: dict[str, Dataset], data_args: TranslationDataArguments, training_args: Seq2SeqSelfKDConfig
) -> dict[str, Dataset]:
    """The splits of the run, with the columns `source` and `target`, cut to the size that was asked for."""
    splits = data.needed_splits(splits, data_args, training_args)
    kept = training_args.sample_id_column
    splits = {split: as_pairs(dataset, split, data_args, kept) for split, dataset in splits.items()}
    return data.cut(data.hold_out(splits, data_args, training_args), data_args)


def as_pairs(dataset: Dataset, split: str, data_args: TranslationDataArguments, kept: str | None) -> Dataset:
    """The columns `source` and `target` only, without incomplete pairs; a test set may lack the targets."""
    columns = {
        "source": data_args.source_column or data_args.source_lang,
        "target": data_args.target_column or data_args.target_lang,
    }
    nested = dataset.features.get(data_args.translation_column)
    if isinstance(nested, (dict, Translation)):  # WMT style: {"translation": {"de": ..., "en": ...}}
        dataset = dataset.flatten()
        columns = {role: f"{data_args.translation_column}.{name}" for role, name in columns.items()}
    if split == "test" and columns["target"] not in dataset.column_names:
        del columns["target"]
    for role, column in columns.items():
        data.check_column(dataset, column, f"{role}_column", split)
        data.check_text(dataset, column)
    dataset = dataset.select_columns([*columns.values(), *({kept} & set(dataset.column_names))])
    dataset = dataset.rename_columns({column: role for role, column in columns.items() if column != role})
    whole = dataset.filter(lambda *texts: all(texts), input_columns=list(columns)) if split != "test" else dataset
    if len(whole) < len(dataset):
        logger.warning(f"{len(dataset) - len(whole)} of {len(dataset)} {split} pairs lack a sentence: left out.")
    return whole


def tokenize(
    dataset: Dataset,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    data_args: TranslationDataArguments,
    training_args: Seq2SeqSelfKDConfig,
) -> Dataset:
    """Replace the sentences by tokens."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        sources = [data_args.source_prefix + (text or "") for text in batch["source"]]
        encoded = dict(tokenizer(sources, truncation=True, max_length=data_args.max_source_length))
        if "target" in batch:
            targets = [text or "" for text in batch["target"]]
            encoded["labels"] = tokenizer(
                text_target=targets, truncation=True, max_length=data_args.max_target_length
            )["input_ids"]
        else:  # Seq2SeqTrainer cannot do without labels: these stand in, and their figures are not reported
            encoded["labels"] = [[tokenizer.eos_token_id]] * len(sources)
        return encoded

    texts = [name for name in dataset.column_names if name in ("source", "target")]
    tokens = data.map_once(dataset, encode, data_args, training_args, "Tokenizing", batched=True, remove_columns=texts)
    full = sum(len(labels) >= data_args.max_target_length for labels in tokens["labels"])
    if full:  # BLEU sees only what was kept of the references, too
        logger.warning(f"{full} {split} targets reach --max_target_length and may have been cut.")
    return tokens


# Tokenizer and model


def train_tokenizer(texts: Iterable[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer for both languages, of the form `text </s>`, with numbers as single digits.

    Args:
        texts (`Iterable[list[str]]`): batches of texts; the same texts always give the same tokenizer.
        vocab_size (`int`): number of tokens.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = tokenization.train_bpe(texts, vocab_size, special, single_digits=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer(
    model_args: TranslationModelArguments, data_args: TranslationDataArguments, train_dataset: Dataset | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, that of the pretrained model, or one trained on both languages of the data."""

    def train() -> PreTrainedTokenizerFast:
        texts = (batch[side] for batch in train_dataset.iter(1000) for side in ("source", "target"))
        return train_tokenizer(texts, model_args.tokenizer_vocab_size)

    tokenizer = tokenization.make_tokenizer(model_args, None if train_dataset is None else train)
    if hasattr(tokenizer, "src_lang"):  # mBART, M2M100, NLLB
        tokenizer.src_lang = data_args.source_lang_code or data_args.source_lang
        tokenizer.tgt_lang = data_args.target_lang_code or data_args.target_lang
    return tokenizer


def make_config(model_args: TranslationModelArguments) -> PreTrainedConfig:
    """The configuration, with the overrides."""
    config = common.make_config(model_args)
    if not config.is_encoder_decoder:
        raise ValueError(f"{type(config).__name__} has no encoder and decoder: choose marian, t5, bart or the like.")
    return config


def make_model(
    model_args: TranslationModelArguments,
    data_args: TranslationDataArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """A pretrained model that knows its target language, or a new one for this tokenizer."""
    if model_args.model_name_or_path is None:
        return new_model(config, tokenizer, data_args.max_target_length, model_args.trust_remote_code)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path, config=config, **model_args.hub)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    if hasattr(tokenizer, "src_lang"):
        # Translations start with the token of the language; in mBART-25 it takes the place of the start token.
        code = data_args.target_lang_code or data_args.target_lang
        find = getattr(tokenizer, "get_lang_id", tokenizer.convert_tokens_to_ids)
        model.generation_config.forced_bos_token_id = find(code)
        if model.config.decoder_start_token_id is None:
            model.config.decoder_start_token_id = find(code)
            model.generation_config.decoder_start_token_id = find(code)
    return model


def new_model(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model with random weights; it starts to write with the padding token, as Marian and T5 do."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
    for name, value in {**ids, "vocab_size": len(tokenizer), "decoder_vocab_size": len(tokenizer)}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=trust_remote_code)
    model.generation_config = GenerationConfig(
        **ids, max_length=max_length + 1, num_beams=1, suppress_tokens=[tokenizer.pad_token_id]
    )
    return model


def check_lengths(config: PreTrainedConfig, data_args: TranslationDataArguments) -> None:
    """Fail early where sentences could be longer than the model can see."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(data_args.max_source_length, data_args.max_target_length)
    if positions is not None and longest > positions:
        raise ValueError(
            f"{type(config).__name__} has {positions} positions: set --max_source_length and --max_target_length "
            f"to at most that, not {longest}."
        )


# The run


def predict(trainer: Seq2SeqSelfKDTrainer, dataset: Dataset, has_targets: bool) -> None:
    """Write `predictions.txt`, a translation a line, and, where there are targets, the metrics."""
    trainer.args.train_sampling_strategy = "random"  # grouped by length, the test set would come back in another order
    trainer.compute_metrics = trainer.compute_metrics if has_targets else None
    result = trainer.predict(dataset, metric_key_prefix="predict")
    metrics = {k: v for k, v in result.metrics.items() if has_targets or k.endswith(("runtime", "per_second"))}
    common.record(trainer, "predict", metrics | {"predict_samples": len(dataset)})
    if not trainer.args.predict_with_generate or not trainer.is_world_process_zero():
        return
    texts = decode(trainer.processing_class, result.predictions)
    file = Path(trainer.args.output_dir, "predictions.txt")
    file.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")


def decode(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> list[str]:
    """Token ids as texts; where translations of several batches were joined, -100 fills the shorter ones."""
    return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)


def build(argv: Sequence[str] | None = None) -> common.Run:
    """The run that the flags ask for: data, model and trainer, checked and not yet started."""
    model_args, data_args, training_args = common.start(make_parser(), argv)
    if training_args.generation_max_length is None:
        training_args.generation_max_length = data_args.max_target_length + 1  # and the token that starts it

    config = make_config(model_args)
    check_lengths(config, data_args)
    splits = prepare_splits(load_splits(data_args, model_args), data_args, training_args)
    tokenizer = make_tokenizer(model_args, data_args, splits.get("train"))
    model = make_model(model_args, data_args, config, tokenizer)
    has_targets = "test" in splits and "target" in splits["test"].column_names
    splits = {
        split: tokenize(dataset, split, tokenizer, data_args, training_args) for split, dataset in splits.items()
    }

    trainer = Seq2SeqSelfKDTrainer(
        model=model,
        args=training_args,
        **data.datasets_of(splits),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, model=model, pad_to_multiple_of=8 if training_args.fp16 else None
        ),
        # Without it, the trainer reports the metrics of the tokens and need not keep all logits.
        compute_metrics=compute_translation_metrics(tokenizer, data_args.bleu_tokenizer)
        if training_args.predict_with_generate
        else None,
    )
    languages = [data_args.source_lang, data_args.target_lang]
    predict_test = partial(predict, trainer, splits.get("test"), has_targets)
    return common.Run(trainer, model_args, data_args, TASK, predict_test, {"language": languages})


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv:
        return common.carry_out(build(argv))
    from .translation_demo import compare

    compare()
