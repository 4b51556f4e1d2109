"""
Train a language model with progressive self-distillation of every predicted token, from a pretrained model or from
scratch: causal (`--objective causal`, the default) or masked (`--objective masked`).

```bash
# fine-tune a pretrained model on a dataset of the Hub; in so few epochs, the first one should have a past as well
hf-selfkd train language-modeling --model_name_or_path distilbert/distilgpt2 \
    --dataset_name roneneldan/TinyStories --max_train_samples 20000 --max_eval_samples 1000 --do_train --do_eval \
    --num_train_epochs 3 --warm_start_teacher --output_dir outputs/stories

# train model and tokenizer from scratch on local files, one text per line; no network needed
hf-selfkd train language-modeling --model_type gpt2 --config_overrides '{"n_layer": 4, "n_embd": 384}' \
    --train_file train.txt --validation_file validation.txt --do_train --do_eval --num_train_epochs 10 \
    --output_dir outputs/texts

# a masked language model; settings from a YAML (or JSON) file may stand first, flags override them
hf-selfkd train language-modeling --objective masked --model_type bert --train_file train.parquet \
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
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import processors
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_selfkd import SelfKDConfig, SelfKDTrainer

from . import common, tokenization
from .arguments import LanguageDataArguments, LanguageModelArguments
from .common import make_config
from .data import NO_LABEL, check_columns, check_text, cut, datasets_of, hold_out, load_splits, map_once, needed_splits


logger = logging.getLogger(__name__)

TASK = "language-modeling"


def make_parser() -> HfArgumentParser:
    """The parser of all flags."""
    return common.make_parser(TASK)


def settle_masking(
    model_args: LanguageModelArguments, data_args: LanguageDataArguments, training_args: SelfKDConfig
) -> None:
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
    elif training_args.teacher in ("history", "auto"):
        raise ValueError(
            "--teacher history stores predictions of tokens that are not masked in the next epoch: give "
            "--fixed_masking, or --teacher snapshot."
        )


# Data


def prepare_splits(
    splits: dict[str, Dataset], data_args: LanguageDataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """
    The splits of the run, of the size that was asked for, without missing and blank texts, and with texts held out for
    evaluation where there were none.
    """
    column = data_args.text_column_name
    for split, dataset in splits.items():
        check_text(dataset, column)
        with training_args.main_process_first(desc="filtering"):
            splits[split] = dataset.filter(
                lambda texts: [bool(text and text.strip()) for text in texts], batched=True, input_columns=column
            )
        if not len(splits[split]):
            raise ValueError(f"Column {column} of the {split} data holds no text: {len(dataset)} rows, all blank.")
    return cut(hold_out(splits, data_args, training_args), data_args)


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
    dataset: Dataset,
    blocks: CausalBlocks | MaskedBlocks,
    data_args: LanguageDataArguments,
    training_args: SelfKDConfig,
) -> Dataset:
    """Replace the texts by samples of tokens."""
    options = {"input_columns": data_args.text_column_name, "remove_columns": dataset.column_names}
    return map_once(dataset, blocks, data_args, training_args, "Tokenizing", batched=True, **options)


def mask(
    splits: dict[str, Dataset], masking: Masking, data_args: LanguageDataArguments, training_args: SelfKDConfig
) -> None:
    """Hide tokens of masked splits: for evaluation always the same ones, so that all runs are compared on them."""
    for split, samples in splits.items():
        if split == "train" and not data_args.fixed_masking:
            splits[split] = samples.with_transform(masking)
        else:
            splits[split] = map_once(samples, masking.fixed, data_args, training_args, "Masking", with_indices=True)


# Tokenizer and model


def train_tokenizer(
    texts: Iterable[list[str]], vocab_size: int, masked: bool, token_types: bool
) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer: `<|endoftext|>text` or, for a masked model, `[CLS] text [SEP]`.

    Args:
        texts (`Iterable[list[str]]`): batches of texts; the same texts always give the same tokenizer.
        vocab_size (`int`): number of tokens.
        masked (`bool`): whether it is for a masked language model.
        token_types (`bool`): whether the model tells first and second texts apart.
    """
    names = ["pad_token", "cls_token", "sep_token", "mask_token"] if masked else ["pad_token", "bos_token"]
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"] if masked else ["<|pad|>", "<|endoftext|>"]
    tokenizer = tokenization.train_bpe(texts, vocab_size, special, prefix_space=masked)
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
    model_args: LanguageModelArguments,
    data_args: LanguageDataArguments,
    config: PreTrainedConfig,
    train_dataset: Dataset | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, that of the pretrained model, or one trained on the texts."""

    def train() -> PreTrainedTokenizerFast:
        texts = (batch[data_args.text_column_name] for batch in train_dataset.iter(1000))
        token_types = model_args.masked and getattr(config, "type_vocab_size", 0) > 1
        tokenizer = train_tokenizer(texts, model_args.tokenizer_vocab_size, model_args.masked, token_types)
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        return tokenizer

    return tokenization.make_tokenizer(model_args, None if train_dataset is None else train)


def make_model(
    model_args: LanguageModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> torch.nn.Module:
    """A pretrained model, or a new one for this tokenizer."""
    auto = AutoModelForMaskedLM if model_args.masked else AutoModelForCausalLM
    new = model_args.model_name_or_path is None
    tokenization.fit_config(config, tokenizer, new)
    if new:
        model = auto.from_config(config, dtype=model_args.dtype, trust_remote_code=model_args.trust_remote_code)
    else:
        model = auto.from_pretrained(
            model_args.model_name_or_path, config=config, dtype=model_args.dtype, **model_args.hub
        )
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
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


def sample_length(
    data_args: LanguageDataArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> int:
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
        own = logits.gather(-1, labels[known][:, None])[:, 0]
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


def build(argv: Sequence[str] | None = None) -> common.Run:
    """The run that the flags ask for: data, model and trainer, checked and not yet started."""
    model_args, data_args, training_args = common.start(make_parser(), argv)
    settle_masking(model_args, data_args, training_args)
    if training_args.sample_id_column is not None:
        raise ValueError("--sample_id_column is of texts, and a long text gives several samples: leave it out.")

    splits = needed_splits(load_splits(data_args, model_args), data_args, training_args)
    check_columns(splits, data_args, ("text_column_name",))
    splits = prepare_splits(splits, data_args, training_args)
    config = make_config(model_args)
    tokenizer = make_tokenizer(model_args, data_args, config, splits.get("train"))
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
        **datasets_of(splits),
        processing_class=tokenizer,
        data_collator=pad,
        compute_metrics=compute_token_metrics,
        preprocess_logits_for_metrics=TokenScores(shifted=not model_args.masked),
    )
    return common.Run(trainer, model_args, data_args, "fill-mask" if model_args.masked else "text-generation")


def main(argv: Sequence[str] | None = None) -> None:
    common.carry_out(build(argv))
