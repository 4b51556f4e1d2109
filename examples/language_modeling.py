# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd"]
# ///
"""
Train a language model with progressive self-distillation of every predicted token, from a pretrained model or from
scratch: causal (`--objective causal`, the default) or masked (`--objective masked`).

```bash
# fine-tune a pretrained model on a dataset of the Hub; in so few epochs, the first one should have a past as well
python examples/language_modeling.py --model_name_or_path distilbert/distilgpt2 \
    --dataset_name roneneldan/TinyStories --max_train_samples 20000 --max_eval_samples 1000 --do_train --do_eval \
    --num_train_epochs 3 --warm_start_teacher --output_dir outputs/stories

# train model and tokenizer from scratch on local files, one text per line; no network needed
python examples/language_modeling.py --model_type gpt2 --config_overrides '{"n_layer": 4, "n_embd": 384}' \
    --train_file train.txt --validation_file validation.txt --do_train --do_eval --num_train_epochs 10 \
    --output_dir outputs/texts

# a masked language model; settings from a YAML (or JSON) file may stand first, flags override them
python examples/language_modeling.py --objective masked --model_type bert --train_file train.parquet \
    --do_train --do_eval --num_train_epochs 10 --output_dir outputs/masked
```

A sample is one text, or one block of a text longer than `--block_size`. Texts are never packed together: the history
knows a token by its sample and its place in it.

A masked language model is masked anew in every epoch, so a prediction stored in one epoch belongs to other tokens than
the labels of the next. The default teacher is therefore `snapshot` there, which looks at the very same masked text.
`--fixed_masking` chooses the masks of a text once, for all epochs, which `--teacher history` needs.

Two baselines are the same command with `--alpha 0` (plain training) and with `--alpha 0 --label_smoothing_factor 0.1`
(label smoothing); compare their `nll` and `perplexity`, since `loss` is smoothed too. The arguments of training are
those of `SelfKDConfig`, hence of `TrainingArguments`.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
import yaml
from datasets import Dataset, Value, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_selfkd import SelfKDConfig, SelfKDTrainer


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
LOADERS = {"txt": "text", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
NO_LABEL = -100


@dataclass
class ModelArguments:
    """Which model to train."""

    objective: Literal["causal", "masked"] = field(
        default="causal", metadata={"help": "Predict the next token (causal) or hidden ones (masked)."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model, of the Hub or a local folder; leave out to train from scratch."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of a model trained from scratch, such as gpt2 or bert."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a model trained from scratch, of the Hub or a local folder."}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": 'Fields of the configuration to change, as JSON: {"n_layer": 4}.'}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not the one of the pretrained model."}
    )
    tokenizer_vocab_size: int = field(
        default=8192, metadata={"help": "Tokens of the byte-level BPE that is trained when there is no tokenizer."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Type of the weights; for speed use --bf16, which keeps them in float32."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the pretrained model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep downloaded models and data."})
    token: str | None = field(default=None, metadata={"help": "Token of the Hub, if not the one you logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a model of the Hub brings."})

    def __post_init__(self):
        if not (self.model_name_or_path or self.model_type or self.config_name):
            raise ValueError("No model: give --model_name_or_path, or --model_type or --config_name for a new one.")

    @property
    def masked(self) -> bool:
        """`bool`: whether hidden tokens are predicted, and not the next one."""
        return self.objective == "masked"

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
    train_file: str | None = field(
        default=None, metadata={"help": "Text, CSV, JSON or Parquet file, or glob pattern; of .txt, a line is a text."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    train_split_name: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    validation_split_fraction: float = field(
        default=0.1, metadata={"help": "Share of the training texts held out when there are no validation data."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column of the texts."})
    block_size: int = field(
        default=256, metadata={"help": "Most tokens of a sample: a longer text is cut into several."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to predict, when masked."})
    fixed_masking: bool = field(
        default=False, metadata={"help": "Choose the masks of a training text once and not in every epoch."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if that was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many random texts only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many random texts only."})

    def __post_init__(self):
        if not 0 < self.validation_split_fraction < 1:
            raise ValueError(f"--validation_split_fraction {self.validation_split_fraction} is outside (0, 1).")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability {self.mlm_probability} is outside (0, 1).")
        if self.block_size < 2:
            raise ValueError(f"--block_size {self.block_size} leaves no token to predict: give at least 2.")

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


def settle_masking(model_args: ModelArguments, data_args: DataArguments, training_args: SelfKDConfig) -> None:
    """Choose what fits masks that change from epoch to epoch, and say so."""
    if not model_args.masked:
        if data_args.fixed_masking:
            raise ValueError("--fixed_masking is for --objective masked: a causal model predicts every token.")
        return
    if data_args.fixed_masking:
        return
    # Masks are drawn when a sample is read: seeded by epoch and sample, they are the same in a resumed run.
    training_args.seed_transforms = True
    if not training_args.distils and not training_args.history_trace:
        return
    if training_args.teacher == "auto" and not training_args.history_trace:
        training_args.teacher = "snapshot"
        logger.info("Masks change from epoch to epoch: teacher=snapshot. For the history, give --fixed_masking.")
    elif training_args.teacher_kind == "history":
        raise ValueError(
            "--teacher history stores predictions of tokens that are not masked in the next epoch: give "
            "--fixed_masking, or --teacher snapshot."
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
    kind = Path(file).suffix.lstrip(".")
    if kind not in LOADERS:
        raise ValueError(f"--{split}_file {file} is not a .txt, .csv, .json, .jsonl or .parquet file.")
    return load_dataset(LOADERS[kind], data_files=file, split="train", cache_dir=cache_dir)


def needed_splits(
    splits: dict[str, Dataset], data_args: DataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """Leave out the splits that the run does not use; fail early if one, or its column of texts, is missing."""
    doing = {"train": training_args.do_train, "validation": training_args.do_eval}
    if not any(doing.values()):
        raise ValueError("Nothing to do: give --do_train or --do_eval.")
    if training_args.sample_id_column is not None:
        raise ValueError("--sample_id_column is of texts, and a long text gives several samples: leave it out.")
    if training_args.do_eval and "validation" not in splits:
        doing = {"train": True, "validation": False}  # to be split off
    missing = [split for split in SPLITS if doing[split] and split not in splits]
    if missing:
        raise ValueError(
            f"No {missing[0]} data, only {', '.join(splits)}: give --{missing[0]}_file or the right "
            f"--{missing[0]}_split_name."
        )
    splits = {split: splits[split] for split in SPLITS if doing[split]}
    column = data_args.text_column_name
    for split, dataset in splits.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"--text_column_name {column} is not a column of the {split} data: choose among "
                f"{', '.join(dataset.column_names)}."
            )
        feature = dataset.features[column]
        if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string"):
            raise ValueError(f"Column {column} holds {feature}: it must be text.")
    return splits


def subset(dataset: Dataset, size: int | None) -> Dataset:
    """So many random texts: the same in every run, whatever its seed."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.shuffle(seed=0).select(range(size))


def prepare_splits(
    splits: dict[str, Dataset], data_args: DataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """
    Splits of the size that was asked for, without missing and blank texts, and with texts held out for evaluation
    where there were none.
    """
    column = data_args.text_column_name
    for split, dataset in splits.items():
        with training_args.main_process_first(desc="filtering"):
            splits[split] = dataset.filter(
                lambda texts: [bool(text and text.strip()) for text in texts], batched=True, input_columns=column
            )
        if not len(splits[split]):
            raise ValueError(f"Column {column} of the {split} data holds no text: {len(dataset)} rows, all blank.")
    if training_args.do_eval and "validation" not in splits:
        # One seed for all runs: they are compared on the same texts.
        parts = splits["train"].train_test_split(data_args.validation_split_fraction, seed=0)
        splits = {"train": parts["train"], "validation": parts["test"]}
    sizes = (data_args.max_train_samples, data_args.max_eval_samples)
    return {split: subset(splits[split], size) for split, size in zip(SPLITS, sizes, strict=True) if split in splits}


class CausalBlocks:
    """
    From texts to samples of at most `size` tokens, each of which predicts all of its tokens but the first.

    The next block of a long text starts with the last token of the one before, so that every token of the text is
    predicted once.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): if it has an end-of-text token, every text gets it.
        size (`int`): most tokens of a sample.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int):
        self.tokenizer, self.size = tokenizer, size

    def __call__(self, texts: list[str]) -> dict[str, list]:
        end, blocks = self.tokenizer.eos_token_id, []
        for tokens in self.tokenizer(texts, verbose=False)["input_ids"]:
            if end is not None and tokens[-1:] != [end]:
                tokens = [*tokens, end]
            blocks += [tokens[i : i + self.size] for i in range(0, len(tokens) - 1, self.size - 1)]
        return {
            "input_ids": blocks,
            "attention_mask": [[1] * len(block) for block in blocks],
            # Made here and not by a collator, which would take an end-of-text token that also pads for padding. The
            # first token is never predicted: as a label it would count in the number that the loss is divided by.
            "labels": [[NO_LABEL, *block[1:]] for block in blocks],
        }


class MaskedBlocks:
    """
    From texts to samples of at most `size` tokens, each with the special tokens that the model expects around it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): a fast one, which can cut texts.
        size (`int`): most tokens of a sample.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int):
        self.tokenizer, self.size = tokenizer, size

    def __call__(self, texts: list[str]) -> dict[str, list]:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.size, return_overflowing_tokens=True)
        return {name: encoded[name] for name in self.tokenizer.model_input_names if name in encoded}


class Masking:
    """
    Hide random tokens: for [`~datasets.Dataset.with_transform`] and, with fixed masks, [`~datasets.Dataset.map`].

    It masks samples and not batches, so that `seed_transforms` can seed every sample by itself.

    Args:
        collator ([`~transformers.DataCollatorForLanguageModeling`]): what masks.
    """

    def __init__(self, collator: DataCollatorForLanguageModeling):
        self.collator = collator

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        hidden, labels = zip(*map(self.hide, batch["input_ids"]), strict=True)
        return batch | {"input_ids": list(hidden), "labels": list(labels)}

    def hide(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Tokens, some of them hidden, and labels, -100 for the others."""
        for _ in range(100):  # short texts often get no mask at first, and a batch needs something to predict
            hidden, labels = self.collator.torch_mask_tokens(torch.tensor([tokens]))
            if (labels != NO_LABEL).any():
                break
        return hidden[0].tolist(), labels[0].tolist()

    def fixed(self, sample: dict[str, list], index: int) -> dict[str, list]:
        """One sample with the masks that depend on its number only."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(index)
            masked = self({name: [values] for name, values in sample.items()})
        return {name: values[0] for name, values in masked.items()}


def tokenize(
    dataset: Dataset, blocks: CausalBlocks | MaskedBlocks, data_args: DataArguments, training_args: SelfKDConfig
) -> Dataset:
    """Replace the texts by samples of tokens."""
    with training_args.main_process_first(desc="tokenizing"):
        return dataset.map(
            blocks,
            batched=True,
            input_columns=data_args.text_column_name,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=dataset.column_names,
            load_from_cache_file=not data_args.overwrite_cache,
            desc="Tokenizing",
        )


def mask(splits: dict[str, Dataset], masking: Masking, data_args: DataArguments, training_args: SelfKDConfig) -> None:
    """Hide tokens of masked splits: for evaluation always the same ones, so that all runs are compared on them."""
    for split, samples in splits.items():
        if split == "train" and not data_args.fixed_masking:
            splits[split] = samples.with_transform(masking)
            continue
        with training_args.main_process_first(desc="masking"):
            splits[split] = samples.map(
                masking.fixed,
                with_indices=True,
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=not data_args.overwrite_cache,
                desc="Masking",
            )


# Tokenizer and model


def train_tokenizer(texts: Any, vocab_size: int, masked: bool, token_types: bool) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer: `<|endoftext|>text` or, for a masked model, `[CLS] text [SEP]`.

    Args:
        texts (`Iterator[list[str]]`): batches of texts; the same texts always give the same tokenizer.
        vocab_size (`int`): number of tokens.
        masked (`bool`): whether it is for a masked language model.
        token_types (`bool`): whether the model tells first and second texts apart.
    """
    names = ["pad_token", "cls_token", "sep_token", "mask_token"] if masked else ["pad_token", "bos_token"]
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"] if masked else ["<|pad|>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=masked)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A causal model also starts from the end of the text before: so it predicts first tokens, and writes from nothing.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if masked else "<|endoftext|> $A",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special[2 if masked else 1],
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
        **dict(zip(names, special, strict=True)),
    )


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
        column = data_args.text_column_name
        texts = (batch[column] for batch in train_dataset.iter(1000))
        token_types = model_args.masked and getattr(config, "type_vocab_size", 0) > 1
        tokenizer = train_tokenizer(texts, model_args.tokenizer_vocab_size, model_args.masked, token_types)
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        logger.info(f"Trained a tokenizer of {len(tokenizer)} tokens.")
    else:
        raise ValueError("No tokenizer: give --tokenizer_name, or --do_train to train one.")
    return tokenizer


def make_config(model_args: ModelArguments) -> PreTrainedConfig:
    """The configuration, with the overrides."""
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
    if source is not None:
        return AutoConfig.from_pretrained(source, **overrides, **model_args.hub)
    return AutoConfig.for_model(model_args.model_type, **overrides)


def make_model(
    model_args: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> torch.nn.Module:
    """A pretrained model, or a new one for this tokenizer."""
    auto = AutoModelForMaskedLM if model_args.masked else AutoModelForCausalLM
    if model_args.model_name_or_path is not None:
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        model = auto.from_pretrained(
            model_args.model_name_or_path, config=config, dtype=model_args.dtype, **model_args.hub
        )
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    else:
        config.vocab_size = len(tokenizer)
        for name in ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"):
            if hasattr(config, name):
                setattr(config, name, getattr(tokenizer, name))
        model = auto.from_config(config, dtype=model_args.dtype, trust_remote_code=model_args.trust_remote_code)
    # An encoder such as BERT would see the token that it has to predict.
    if (
        not model_args.masked
        and type(config) in MODEL_FOR_MASKED_LM_MAPPING
        and not getattr(model.config, "is_decoder", True)
    ):
        raise ValueError(
            f"{type(model).__name__} looks ahead: give --objective masked, or --config_overrides "
            "'{\"is_decoder\": true}'."
        )
    return model


def sample_length(data_args: DataArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokens of the longest sample: as many as asked for, if the model takes so many."""
    limit = min(getattr(config, "max_position_embeddings", None) or sys.maxsize, tokenizer.model_max_length)
    if data_args.block_size > limit:
        logger.warning(f"--block_size {data_args.block_size} is more than the model takes: {limit} tokens are used.")
    return min(data_args.block_size, limit)


# Evaluation


class TokenScores:
    """
    Keep three numbers of every predicted token, where its logits are one number for each token of the vocabulary.

    The numbers, `[batch, length, 3]`, are its negative log-likelihood, the largest probability, and whether that is
    the token's own; -100 where there is no label, as in the padding that the trainer adds.

    Args:
        shifted (`bool`): whether logits are of the next token, as in causal models.
    """

    def __init__(self, shifted: bool):
        self.shifted = shifted

    def __call__(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        known = labels != NO_LABEL
        logits = logits[known].float()
        own = logits.gather(-1, labels[known, None])[:, 0]
        total, (largest, best) = logits.logsumexp(dim=-1), logits.max(dim=-1)
        scores = torch.full((*labels.shape, 3), float(NO_LABEL), device=logits.device)
        scores[known] = torch.stack([total - own, (largest - total).exp(), (best == labels[known]).float()], dim=-1)
        return scores


def compute_token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    The figures over all predicted tokens, each of which counts the same.

    Returns:
        `dict[str, float]`: `nll` (nats per token, temperature 1, without label smoothing), `perplexity` (its
        exponential), `accuracy` (fraction), `ece` (per cent, 10 right-closed bins) and `tokens` (their number).
    """
    scores = prediction.predictions
    nll, confidence, correct = scores[scores[..., 1] >= 0].T
    if not len(nll):
        raise ValueError("The evaluation data have no token to predict.")
    bins = np.searchsorted((np.arange(1, 10) / 10).astype(confidence.dtype), confidence, side="left")
    gaps = np.bincount(bins, weights=correct.astype(np.float64) - confidence, minlength=10)
    mean = float(nll.mean(dtype=np.float64))
    return {
        "nll": mean,
        "perplexity": float(np.exp(min(mean, 700))),
        "accuracy": float(correct.mean(dtype=np.float64)),
        "ece": float(100 * np.abs(gaps).sum() / len(nll)),
        "tokens": len(nll),
    }


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


def share(trainer: SelfKDTrainer, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Write the model card, which names what is on the Hub, and upload with `--push_to_hub`."""
    local = data_args.local or os.path.isdir(data_args.dataset_name)
    task = "fill-mask" if model_args.masked else "text-generation"
    card = {
        "tasks": task,
        "tags": [task, "self-distillation"],
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
    settle_masking(model_args, data_args, training_args)
    set_seed(training_args.seed)

    splits = needed_splits(load_splits(data_args, model_args), data_args, training_args)
    splits = prepare_splits(splits, data_args, training_args)
    config = make_config(model_args)
    tokenizer = make_tokenizer(model_args, data_args, config, splits["train"] if training_args.do_train else None)
    model = make_model(model_args, config, tokenizer)

    make_blocks = MaskedBlocks if model_args.masked else CausalBlocks
    blocks = make_blocks(tokenizer, sample_length(data_args, config, tokenizer))
    splits = {split: tokenize(dataset, blocks, data_args, training_args) for split, dataset in splits.items()}
    if model_args.masked:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability)
        mask(splits, Masking(collator), data_args, training_args)

    # Made for another task, but all that it does is to pad tokens and their labels.
    pad = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None)
    trainer = SelfKDTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"] if training_args.do_train else None,
        eval_dataset=splits["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=pad,
        compute_metrics=compute_token_metrics,
        preprocess_logits_for_metrics=TokenScores(shifted=not model_args.masked),
    )
    if training_args.do_train:
        train(trainer)
    if training_args.do_eval:
        evaluate(trainer)
    if training_args.do_train:
        share(trainer, model_args, data_args)


if __name__ == "__main__":
    main()
