"""
Train a text classifier with progressive self-distillation, from a pretrained model or from scratch.

```bash
# fine-tune a pretrained model on a dataset of the Hub; in so few epochs, the first one should have a past as well
hf-selfkd train text-classification --model_name_or_path distilbert/distilbert-base-uncased \
    --dataset_name fancyzhx/ag_news --do_train --do_eval --num_train_epochs 3 --warm_start_teacher \
    --output_dir outputs/ag_news

# train model and tokenizer from scratch on local files; no network needed
hf-selfkd train text-classification --model_type bert --config_overrides '{"num_hidden_layers": 4}' \
    --train_file train.csv --text_column_name text --label_column_name label \
    --do_train --do_eval --num_train_epochs 6 --output_dir outputs/texts

# settings from a YAML (or JSON) file, some of them overridden
hf-selfkd train text-classification examples/configs/ag_news_bert.yaml --alpha 0.5
```

Two baselines are the same command with `--alpha 0` (plain training) and with `--alpha 0 --label_smoothing_factor 0.1`
(label smoothing). The arguments of training are those of `SelfKDConfig`, hence of `TrainingArguments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from datasets import Dataset
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.metrics import compute_classification_metrics

from . import common, tokenization
from .arguments import TextDataArguments, TextModelArguments
from .common import make_config
from .data import (
    check_columns,
    check_text,
    class_names,
    cut,
    datasets_of,
    hold_out,
    load_splits,
    map_once,
    needed_splits,
    with_labels,
)


TASK = "text-classification"


def make_parser() -> HfArgumentParser:
    """The parser of all flags."""
    return common.make_parser(TASK)


def text_columns(data_args: TextDataArguments) -> list[str]:
    """The column of the texts and, if there is one, that of the second texts."""
    columns = [data_args.text_column_name, data_args.text_pair_column_name]
    return [column for column in columns if column is not None]


def prepare_splits(
    splits: dict[str, Dataset], names: list[str], data_args: TextDataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """The splits of the run, with `labels`, cut to the size that was asked for."""
    for split, dataset in splits.items():
        for column in text_columns(data_args):
            check_text(dataset, column)
        splits[split] = with_labels(dataset, data_args.label_column_name, names, split)
    return cut(hold_out(splits, data_args, training_args), data_args)


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    data_args: TextDataArguments,
    training_args: SelfKDConfig,
) -> Dataset:
    """Replace the texts by tokens; a missing text is an empty one."""
    columns, kept = text_columns(data_args), ("labels", training_args.sample_id_column)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [[text or "" for text in batch[column]] for column in columns]
        return tokenizer(*texts, truncation=True, max_length=max_length)

    unused = [column for column in dataset.column_names if column not in kept]
    return map_once(dataset, encode, data_args, training_args, "Tokenizing", batched=True, remove_columns=unused)


def train_tokenizer(
    texts: Iterable[list[str]], vocab_size: int, max_length: int, token_types: bool
) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer: `[CLS] text [SEP]` or `[CLS] text [SEP] second text [SEP]`.

    Args:
        texts (`Iterable[list[str]]`): batches of texts; the same texts always give the same tokenizer.
        vocab_size (`int`): number of tokens.
        max_length (`int`): most tokens of an input.
        token_types (`bool`): whether the model tells first and second texts apart.
    """
    tokenizer = tokenization.train_bpe(texts, vocab_size, special=["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
    )


def input_length(data_args: TextDataArguments, config: PreTrainedConfig) -> int:
    """The tokens of the longest input: as many as asked for, if the model takes so many."""
    return min(data_args.max_seq_length, getattr(config, "max_position_embeddings", None) or data_args.max_seq_length)


def make_tokenizer(
    model_args: TextModelArguments,
    data_args: TextDataArguments,
    config: PreTrainedConfig,
    train_dataset: Dataset | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, that of the pretrained model, or one trained on the texts."""

    def train() -> PreTrainedTokenizerFast:
        batches, columns = train_dataset.iter(1000), text_columns(data_args)
        texts = ([text or "" for text in batch[column]] for batch in batches for column in columns)
        token_types = getattr(config, "type_vocab_size", 0) > 1
        return train_tokenizer(texts, model_args.tokenizer_vocab_size, input_length(data_args, config), token_types)

    return tokenization.make_tokenizer(model_args, None if train_dataset is None else train)


def build(argv: Sequence[str] | None = None) -> common.Run:
    """The run that the flags ask for: data, model and trainer, checked and not yet started."""
    model_args, data_args, training_args = common.start(make_parser(), argv)
    splits = needed_splits(load_splits(data_args, model_args), data_args, training_args)
    check_columns(splits, data_args, ("text_column_name", "text_pair_column_name", "label_column_name"))
    names = class_names(splits["train"], data_args.label_column_name, "text") if training_args.do_train else None

    config = make_config(model_args, names)
    splits = prepare_splits(splits, common.class_list(config), data_args, training_args)
    tokenizer = make_tokenizer(model_args, data_args, config, splits.get("train"))
    tokenization.fit_config(config, tokenizer, new=model_args.model_name_or_path is None)
    model = common.make_classifier(AutoModelForSequenceClassification, model_args, config)
    max_length = min(input_length(data_args, config), tokenizer.model_max_length)
    splits = {
        split: tokenize(dataset, tokenizer, max_length, data_args, training_args) for split, dataset in splits.items()
    }

    trainer = SelfKDTrainer(
        model=model,
        args=training_args,
        **datasets_of(splits),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        compute_metrics=compute_classification_metrics,
    )
    predict = partial(common.predict_classes, trainer, splits.get("test"))
    return common.Run(trainer, model_args, data_args, TASK, predict)


def main(argv: Sequence[str] | None = None) -> None:
    common.carry_out(build(argv))
