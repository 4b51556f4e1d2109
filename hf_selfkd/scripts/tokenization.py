"""The tokenizer of a script: one that is named, that of the pretrained model, or one trained on the texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .arguments import TokenizerArguments


logger = logging.getLogger(__name__)

SPECIAL_IDS = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")


def make_tokenizer(
    model_args: TokenizerArguments, train: Callable[[], PreTrainedTokenizerBase] | None
) -> PreTrainedTokenizerBase:
    """
    The tokenizer that is named, that of the pretrained model, or a new one.

    Args:
        model_args ([`TokenizerArguments`]): say which one.
        train (`Callable`, *optional*): trains one; `None` where there are no texts to train on.
    """
    source = model_args.tokenizer_name or model_args.model_name_or_path
    if source is not None:
        tokenizer = AutoTokenizer.from_pretrained(source, **model_args.hub)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    if train is None:
        raise ValueError("No tokenizer: give --tokenizer_name, or --do_train to train one.")
    tokenizer = train()
    logger.info(f"Trained a tokenizer of {len(tokenizer)} tokens.")
    return tokenizer


def train_bpe(
    texts: Iterable[list[str]],
    vocab_size: int,
    special: list[str],
    prefix_space: bool = True,
    single_digits: bool = False,
) -> Tokenizer:
    """
    Train a byte-level BPE, which has a token for every byte and therefore knows every text.

    Args:
        texts (`Iterable[list[str]]`): batches of texts; the same texts always give the same tokens.
        vocab_size (`int`): number of tokens.
        special (`list[str]`): the first tokens, which no text has.
        prefix_space (`bool`): whether the first word of a text is a word like the others.
        single_digits (`bool`): whether numbers are written digit by digit.
    """
    splitter: Any = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    if single_digits:
        splitter = pre_tokenizers.Sequence([splitter, pre_tokenizers.Digits(individual_digits=True)])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def fit_config(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, new: bool) -> None:
    """
    Tell a configuration the tokens.

    Args:
        config ([`~transformers.PreTrainedConfig`]): is changed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): knows them.
        new (`bool`): whether the weights are new; pretrained ones keep their tokens and get the padding only.
    """
    if not new:
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        return
    config.vocab_size = len(tokenizer)
    for name in SPECIAL_IDS:
        if hasattr(config, name):
            setattr(config, name, getattr(tokenizer, name))
