# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd"]
# ///
"""
Train a text classifier with progressive self-distillation, from a pretrained model or from scratch.

```bash
# fine-tune a pretrained model on a dataset of the Hub; in so few epochs, the first one should have a past as well
python examples/text_classification.py --model_name_or_path distilbert/distilbert-base-uncased \
    --dataset_name fancyzhx/ag_news --do_train --do_eval --num_train_epochs 3 --warm_start_teacher \
    --output_dir outputs/ag_news

# train model and tokenizer from scratch on local files; no network needed
python examples/text_classification.py --model_type bert --config_overrides '{"num_hidden_layers": 4}' \
    --train_file train.csv --text_column_name text --label_column_name label \
    --do_train --do_eval --num_train_epochs 6 --output_dir outputs/texts

# settings from a YAML (or JSON) file, some of them overridden
python examples/text_classification.py examples/configs/ag_news_bert.yaml --alpha 0.5
```

Two baselines are the same command with `--alpha 0` (plain training) and with `--alpha 0 --label_smoothing_factor 0.1`
(label smoothing). The arguments of training are those of `SelfKDConfig`, hence of `TrainingArguments`.
"""

from __future__ import annotations

import csv
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, Value, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.metrics import compute_classification_metrics


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
LABEL_TYPES = ("bool", "int", "uint", "string", "large_string")
NO_LABEL = -100


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model, of the Hub or a local folder; leave out to train from scratch."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of a model trained from scratch, such as bert or distilbert."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a model trained from scratch, of the Hub or a local folder."}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": 'Fields of the configuration to change, as JSON: {"num_hidden_layers": 4}.'}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not the one of the pretrained model."}
    )
    tokenizer_vocab_size: int = field(
        default=8192, metadata={"help": "Tokens of the byte-level BPE that is trained when there is no tokenizer."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Make a new classifier where the pretrained one has other classes."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the pretrained model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep downloaded models and data."})
    token: str | None = field(default=None, metadata={"help": "Token of the Hub, if not the one you logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a model of the Hub brings."})

    def __post_init__(self):
        if not (self.model_name_or_path or self.model_type or self.config_name):
            raise ValueError("No model: give --model_name_or_path, or --model_type or --config_name for a new one.")

    @property
    def hub(self) -> dict[str, Any]:
        """`dict`: what every `from_pretrained` needs."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class DataArguments:
    """Which texts to train on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of the Hub or a local folder; not used when files are given."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON or Parquet file, or glob pattern."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same, for prediction; labels are optional."})
    train_split_name: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    test_split_name: str = field(default="test", metadata={"help": "Split to predict."})
    validation_split_fraction: float = field(
        default=0.1, metadata={"help": "Share of the training data held out when there are no validation data."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column of the texts."})
    text_pair_column_name: str | None = field(
        default=None, metadata={"help": "Column of the second texts, to classify pairs."}
    )
    label_column_name: str = field(default="label", metadata={"help": "Column of the classes: integers or text."})
    max_seq_length: int = field(default=128, metadata={"help": "Cut texts to so many tokens."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if that was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many random samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many random samples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict so many random samples only."})

    def __post_init__(self):
        if not 0 < self.validation_split_fraction < 1:
            raise ValueError(f"--validation_split_fraction {self.validation_split_fraction} is outside (0, 1).")

    @property
    def local(self) -> bool:
        """`bool`: whether files are given."""
        return any(getattr(self, f"{split}_file") is not None for split in SPLITS)


def parse_arguments() -> tuple[ModelArguments, DataArguments, SelfKDConfig]:
    """The flags, over the settings of the YAML or JSON file that may stand first."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SelfKDConfig), allow_abbrev=False)
    flags = sys.argv[1:]
    if flags and flags[0].endswith((".yaml", ".yml", ".json")):
        file = flags.pop(0)
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        unknown = settings.keys() - vars(parser.parse_args([])).keys()
        if unknown:
            raise ValueError(f"{file} has unknown settings: {', '.join(sorted(unknown))}.")
        # As text, so that argparse reads them like flags: to YAML, 1e-4 is text and not a number.
        as_is = (dict, list, type(None))
        parser.set_defaults(**{k: v if isinstance(v, as_is) else str(v) for k, v in settings.items()})
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def set_up_logging(training_args: SelfKDConfig) -> None:
    """Log to the terminal; only the main process tells what goes well."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    level = training_args.get_process_log_level()
    tells = training_args.should_log and training_args.log_level == "passive"
    for name in (__name__, "hf_selfkd"):
        logging.getLogger(name).setLevel(logging.INFO if tells else level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    logger.warning(
        f"Process {training_args.process_index} of {training_args.world_size} on {training_args.device}, "
        f"{training_args.parallel_mode.value}."
    )


# Data


def load_splits(data_args: DataArguments, model_args: ModelArguments) -> dict[str, Dataset]:
    """The splits that there are, by their names in `SPLITS`."""
    if data_args.local:
        if data_args.dataset_name is not None:
            logger.info(f"Local data are given: --dataset_name {data_args.dataset_name} is not used.")
        splits = {split: load_local(split, data_args, model_args.cache_dir) for split in SPLITS}
        return {split: dataset for split, dataset in splits.items() if dataset is not None}
    if data_args.dataset_name is None:
        raise ValueError("No data: give --dataset_name or --train_file.")
    loaded = load_dataset(
        data_args.dataset_name, data_args.dataset_config_name, cache_dir=model_args.cache_dir, token=model_args.token
    )
    logger.info(f"{data_args.dataset_name} has the splits {', '.join(loaded)}.")
    names = {split: getattr(data_args, f"{split}_split_name") for split in SPLITS}
    return {split: loaded[name] for split, name in names.items() if name in loaded}


def load_local(split: str, data_args: DataArguments, cache_dir: str | None) -> Dataset | None:
    """A split from the file that is given for it, if any."""
    file = getattr(data_args, f"{split}_file")
    if file is None:
        return None
    kind = Path(file).suffix.lstrip(".").replace("jsonl", "json")
    if kind not in ("csv", "json", "parquet"):
        raise ValueError(f"--{split}_file {file} is not a .csv, .json, .jsonl or .parquet file.")
    return load_dataset(kind, data_files=file, split="train", cache_dir=cache_dir)


def needed_splits(
    splits: dict[str, Dataset], data_args: DataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """Leave out the splits that the run does not use; fail early if one, or a column of one, is missing."""
    doing = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    if not any(doing.values()):
        raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    if training_args.do_eval and "validation" not in splits:
        doing |= {"train": True, "validation": False}  # to be split off
    missing = [split for split in SPLITS if doing[split] and split not in splits]
    if missing:
        raise ValueError(
            f"No {missing[0]} data, only {', '.join(splits)}: give --{missing[0]}_file or the right "
            f"--{missing[0]}_split_name."
        )
    splits = {split: splits[split] for split in SPLITS if doing[split]}
    for split, dataset in splits.items():
        for name in ("text_column_name", "text_pair_column_name", "label_column_name"):
            column = getattr(data_args, name)
            if (
                column is not None
                and column not in dataset.column_names
                and (split, name) != ("test", "label_column_name")
            ):
                raise ValueError(
                    f"--{name} {column} is not a column of the {split} data: choose among "
                    f"{', '.join(dataset.column_names)}."
                )
    return splits


def class_names(dataset: Dataset, column: str) -> list[str]:
    """The names of the classes, in the order of their numbers."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    if not isinstance(feature, Value) or not feature.dtype.startswith(LABEL_TYPES):
        raise ValueError(
            f"--label_column_name {column} holds {feature}: one class per text, an integer or text, is supported."
        )
    return [str(value) for value in sorted(value for value in dataset.unique(column) if value is not None)]


def with_labels(dataset: Dataset, column: str, names: list[str], split: str) -> Dataset:
    """Replace the label column by `labels`: numbers into `names`, -100 where a row has no label."""
    if column not in dataset.column_names:
        return dataset
    feature = dataset.features[column]
    own = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}
    number = {name: i for i, name in enumerate(names)} | {None: NO_LABEL}
    # On the Hub, the label of an unlabelled row is -1.
    found = [own.get(value) if own else value for value in dataset.with_format(None)[column][:]]
    found = [None if value is None else str(value) for value in found]
    unknown = set(found) - number.keys()
    if unknown:
        raise ValueError(f"The {split} data have classes that the model does not know: {', '.join(sorted(unknown))}.")
    if split == "train" and None in found:
        raise ValueError(f"Row {found.index(None)} of the training data has no {column}.")
    dataset = dataset.remove_columns(column)
    if set(found) == {None}:
        return dataset
    return dataset.add_column("labels", [number[name] for name in found])


def subset(dataset: Dataset, size: int | None) -> Dataset:
    """So many random samples: the same in every run, whatever its seed."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.shuffle(seed=0).select(range(size))


def prepare_splits(
    splits: dict[str, Dataset], names: list[str], data_args: DataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """Splits with `labels`, cut to the size that was asked for."""
    for split, dataset in splits.items():
        splits[split] = with_labels(dataset, data_args.label_column_name, names, split)
    if training_args.do_eval and "validation" not in splits:
        # One seed for all runs: they are compared on the same texts.
        parts = splits["train"].train_test_split(data_args.validation_split_fraction, seed=0)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    sizes = (data_args.max_train_samples, data_args.max_eval_samples, data_args.max_predict_samples)
    return {split: subset(splits[split], size) for split, size in zip(SPLITS, sizes, strict=True) if split in splits}


def text_columns(dataset: Dataset, data_args: DataArguments) -> list[str]:
    """The column of the texts and, if there is one, that of the second texts."""
    columns = [data_args.text_column_name, data_args.text_pair_column_name]
    columns = [column for column in columns if column is not None]
    for column in columns:
        feature = dataset.features[column]
        if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string"):
            raise ValueError(f"Column {column} holds {feature}: it must be text.")
    return columns


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    data_args: DataArguments,
    training_args: SelfKDConfig,
) -> Dataset:
    """Replace the texts by tokens; a missing text is an empty one."""
    columns = text_columns(dataset, data_args)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [[text or "" for text in batch[column]] for column in columns]
        return tokenizer(*texts, truncation=True, max_length=max_length)

    kept = ("labels", training_args.sample_id_column)
    with training_args.main_process_first(desc="tokenizing"):
        return dataset.map(
            encode,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=[column for column in dataset.column_names if column not in kept],
            load_from_cache_file=not data_args.overwrite_cache,
            desc="Tokenizing",
        )


# Tokenizer and model


def train_tokenizer(texts: Any, vocab_size: int, max_length: int, token_types: bool) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer: `[CLS] text [SEP]` or `[CLS] text [SEP] second text [SEP]`.

    Args:
        texts (`Iterator[list[str]]`): batches of texts; the same texts always give the same tokenizer.
        vocab_size (`int`): number of tokens.
        max_length (`int`): most tokens of an input.
        token_types (`bool`): whether the model tells first and second texts apart.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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


def input_length(data_args: DataArguments, config: PreTrainedConfig) -> int:
    """The tokens of the longest input: as many as asked for, if the model takes so many."""
    return min(data_args.max_seq_length, getattr(config, "max_position_embeddings", None) or data_args.max_seq_length)


def make_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, config: PreTrainedConfig, train_dataset: Dataset | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, that of the pretrained model, or one trained on the texts."""
    source = model_args.tokenizer_name or model_args.model_name_or_path
    if source is not None:
        tokenizer = AutoTokenizer.from_pretrained(source, **model_args.hub)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    elif train_dataset is not None:
        columns = text_columns(train_dataset, data_args)
        texts = ([text or "" for text in batch[column]] for batch in train_dataset.iter(1000) for column in columns)
        token_types = getattr(config, "type_vocab_size", 0) > 1
        max_length = input_length(data_args, config)
        tokenizer = train_tokenizer(texts, model_args.tokenizer_vocab_size, max_length, token_types)
        logger.info(f"Trained a tokenizer of {len(tokenizer)} tokens.")
    else:
        raise ValueError("No tokenizer: give --tokenizer_name, or --do_train to train one.")
    return tokenizer


def make_config(model_args: ModelArguments, names: list[str] | None) -> PreTrainedConfig:
    """The configuration, with the overrides and, if `names` are given, these classes."""
    overrides = model_args.config_overrides or {}
    overrides = yaml.safe_load(overrides) if isinstance(overrides, str) else dict(overrides)
    source = model_args.config_name or model_args.model_name_or_path
    if source is not None:
        base = AutoConfig.from_pretrained(source, **model_args.hub)
    else:
        base = AutoConfig.for_model(model_args.model_type)
    unknown = [name for name in overrides if not hasattr(base, name)]
    if unknown:
        raise ValueError(f"--config_overrides: {type(base).__name__} has no {', '.join(unknown)}.")
    if names is not None:
        overrides["id2label"] = dict(enumerate(names))
        overrides["label2id"] = {name: i for i, name in enumerate(names)}
    if source is not None:
        return AutoConfig.from_pretrained(source, **overrides, **model_args.hub)
    return AutoConfig.for_model(model_args.model_type, **overrides)


def make_model(
    model_args: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> torch.nn.Module:
    """A pretrained model, or a new one for this tokenizer."""
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if model_args.model_name_or_path is not None:
        return AutoModelForSequenceClassification.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            **model_args.hub,
        )
    config.vocab_size = len(tokenizer)
    for name in ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"):
        if hasattr(config, name):
            setattr(config, name, getattr(tokenizer, name))
    return AutoModelForSequenceClassification.from_config(config, trust_remote_code=model_args.trust_remote_code)


# The run


def find_checkpoint(training_args: SelfKDConfig) -> str | None:
    """The checkpoint to resume from: the one asked for, or the last one in the output folder."""
    if training_args.resume_from_checkpoint is not None or not os.path.isdir(training_args.output_dir):
        return training_args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}. To train from the start, choose another --output_dir.")
    return checkpoint


def train(trainer: SelfKDTrainer) -> None:
    """Train, and save model, metrics and state."""
    result = trainer.train(resume_from_checkpoint=find_checkpoint(trainer.args))
    trainer.save_model()
    metrics = result.metrics | {"train_samples": len(trainer.train_dataset)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: SelfKDTrainer) -> None:
    """Evaluate, and save the metrics."""
    metrics = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def predict(trainer: SelfKDTrainer, dataset: Dataset) -> None:
    """Write `predictions.csv` (row, class, its probability) and, where there are labels, the metrics."""
    result = trainer.predict(dataset, metric_key_prefix="predict")
    metrics = result.metrics | {"predict_samples": len(dataset)}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    if not trainer.is_world_process_zero():
        return
    logits = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
    confidence, best = torch.from_numpy(logits).float().softmax(dim=-1).max(dim=-1)
    names = trainer.model.config.id2label
    with open(os.path.join(trainer.args.output_dir, "predictions.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "prediction", "confidence"])
        pairs = zip(best.tolist(), confidence.tolist(), strict=True)
        writer.writerows((row, names[i], f"{p:.4f}") for row, (i, p) in enumerate(pairs))


def share(trainer: SelfKDTrainer, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Write the model card, which names what is on the Hub, and upload with `--push_to_hub`."""
    local = data_args.local or os.path.isdir(data_args.dataset_name)
    card = {
        "tasks": "text-classification",
        "tags": ["text-classification", "self-distillation"],
        "finetuned_from": None
        if os.path.isdir(model_args.model_name_or_path or "")
        else model_args.model_name_or_path,
        "dataset_tags": [] if local else [data_args.dataset_name],
        "dataset_args": [] if local else [data_args.dataset_config_name],
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def main() -> None:
    model_args, data_args, training_args = parse_arguments()
    set_up_logging(training_args)
    set_seed(training_args.seed)

    splits = needed_splits(load_splits(data_args, model_args), data_args, training_args)
    names = class_names(splits["train"], data_args.label_column_name) if training_args.do_train else None
    config = make_config(model_args, names)
    names = [config.id2label[i] for i in range(config.num_labels)]
    splits = prepare_splits(splits, names, data_args, training_args)

    tokenizer = make_tokenizer(model_args, data_args, config, splits["train"] if training_args.do_train else None)
    model = make_model(model_args, config, tokenizer)
    max_length = min(input_length(data_args, config), tokenizer.model_max_length)
    splits = {
        split: tokenize(dataset, tokenizer, max_length, data_args, training_args) for split, dataset in splits.items()
    }

    trainer = SelfKDTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"] if training_args.do_train else None,
        eval_dataset=splits["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        compute_metrics=compute_classification_metrics,
    )
    if training_args.do_train:
        train(trainer)
    if training_args.do_eval:
        evaluate(trainer)
    if training_args.do_predict:
        predict(trainer, splits["test"])
    if training_args.do_train:
        share(trainer, model_args, data_args)


if __name__ == "__main__":
    main()
