"""
Plain training, label smoothing and PS-KD on a real translation task, with the same budget and several seeds.

PS-KD comes with several sizes and tail rules of the stored rows, and with the snapshot teacher; R-Drop reads every
batch twice with other dropout. Every finished run appends one JSON line to `--results`; runs that are already there
are not repeated, so the command can be stopped and started again. `--table` prints the Markdown table of what is
there and trains nothing.

    python benchmarks/translation.py --train_files "train-*.parquet" --test_files "test-*.parquet"

Without files the data come from the Hub (`bentrevett/multi30k`). Columns are named by language.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

from comparison import COST, TRANSLATION, add_flags, load, read_results, run_missing, table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from variants import variant

from hf_selfkd import Seq2SeqSelfKDConfig
from hf_selfkd.metrics import compute_translation_metrics


HUB_NAME = "bentrevett/multi30k"
METHODS = {
    "plain": {"alpha": 0.0},
    "label smoothing 0.1": {"alpha": 0.0, "label_smoothing_factor": 0.1},
    "PS-KD history, top 16, bucket": {"history_top_k": 16, "history_tail": "bucket"},
    "PS-KD history, top 16, bucket, alpha 0.4": {"history_top_k": 16, "history_tail": "bucket", "alpha": 0.4},
    "PS-KD history, top 16, bucket, alpha 0.4, label smoothing 0.1": {
        "history_top_k": 16,
        "history_tail": "bucket",
        "alpha": 0.4,
        "smoothing": 0.1,
    },
    "R-Drop, alpha 1": {"alpha": 0.0, "r_drop": 1.0},
    "R-Drop, alpha 5": {"alpha": 0.0, "r_drop": 5.0},
    "R-Drop, alpha 1, label smoothing 0.1": {"alpha": 0.0, "r_drop": 1.0, "label_smoothing_factor": 0.1},
    "PS-KD history, top 16, label": {"history_top_k": 16, "history_tail": "label"},
    "PS-KD history, top 16, renormalize": {"history_top_k": 16, "history_tail": "renormalize"},
    "PS-KD history, top 16, uniform": {"history_top_k": 16, "history_tail": "uniform"},
    "PS-KD history, top 4, bucket": {"history_top_k": 4, "history_tail": "bucket"},
    "PS-KD history, top 64, bucket": {"history_top_k": 64, "history_tail": "bucket"},
    "PS-KD snapshot": {"teacher": "snapshot"},
    # What tells history and snapshot apart: dropout, the mass that is not stored, and the age of the predictions.
    "PS-KD snapshot with dropout": {"teacher": "snapshot", "teacher_dropout": True},
    "PS-KD snapshot with dropout, alpha 0.4": {"teacher": "snapshot", "teacher_dropout": True, "alpha": 0.4},
}
FIGURES = TRANSLATION | {"cpu_minutes": COST["cpu_minutes"]}


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A joint byte-level BPE that ends every sentence with `</s>`."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def small_marian(words: int, width: int, layers: int, dropout: float) -> MarianConfig:
    """A Marian from scratch; 0 pads and starts, 1 ends a sentence."""
    return MarianConfig(
        vocab_size=words,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=128,
        dropout=dropout,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        scale_embedding=True,
        init_std=width**-0.5,  # 0.02 is for wide models: a narrow one takes long to find what to attend to
    )


def greedy_marian(config: MarianConfig) -> MarianMTModel:
    """A model with random weights that writes greedily."""
    model = MarianMTModel(config)
    model.generation_config.update(max_length=64, num_beams=1, bad_words_ids=None)
    return model


def make_task(args: argparse.Namespace) -> dict:
    """What the trainer needs."""
    train, test = (
        load(args.train_files, HUB_NAME, "train", args.max_train_samples),
        load(args.test_files, HUB_NAME, "test", None),
    )
    tokenizer = train_tokenizer([*train[args.source], *train[args.target]], args.vocab_size)

    def encode(batch: dict) -> dict:
        return tokenizer(batch[args.source], text_target=batch[args.target], truncation=True, max_length=64)

    return {
        "config": small_marian(len(tokenizer), args.width, args.layers, args.dropout),
        "tokenizer": tokenizer,
        "train": train.map(encode, batched=True, remove_columns=train.column_names),
        "test": test.map(encode, batched=True, remove_columns=test.column_names),
    }


def recipe(folder: str, seed: int, args: argparse.Namespace, **settings) -> Seq2SeqSelfKDConfig:
    """What all methods are trained with, and `settings` of one."""
    return Seq2SeqSelfKDConfig(
        folder,
        seed=seed,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=100,
        learning_rate=args.learning_rate,
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=300,
        train_sampling_strategy="group_by_length",
        predict_with_generate=True,
        generation_max_length=64,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        logging_strategy="epoch",
        **settings,
    )


def run(task: dict, method: str, seed: int, args: argparse.Namespace) -> dict:
    """Train once; translate the test set with the weights of the last epoch."""
    set_seed(seed)
    trainer_class, settings = variant(METHODS[method])
    model = greedy_marian(task["config"])
    compute_metrics = compute_translation_metrics(task["tokenizer"])
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(folder, seed, args, **settings)
        trainer = trainer_class(
            model,
            config,
            train_dataset=task["train"],
            eval_dataset=task["test"],
            processing_class=task["tokenizer"],
            data_collator=DataCollatorForSeq2Seq(task["tokenizer"], model=model),
            compute_metrics=compute_metrics,
        )
        start = time.process_time()
        trainer.train()
        minutes = (time.process_time() - start) / 60
        metrics = trainer.evaluate()
    metrics = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    return {
        "method": method,
        "seed": seed,
        "epochs": args.epochs,
        "train_samples": len(task["train"]),
        **{key: metrics[key] for key in ("bleu", "chrf", "token_nll", "token_ece", "token_accuracy", "gen_len")},
        "signatures": compute_metrics.signatures,
        "cpu_minutes": minutes,
        "hard_loss_by_epoch": [entry["hard_loss"] for entry in trainer.state.log_history if "hard_loss" in entry],
    }


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `recipe` and of the model."""
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="of encoder and decoder")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_files", nargs="+", help="local parquet files; the Hub otherwise")
    parser.add_argument("--test_files", nargs="+")
    parser.add_argument("--source", default="de", help="column of the source sentences")
    parser.add_argument("--target", default="en", help="column of the target sentences")
    parser.add_argument("--max_train_samples", type=int, default=6000)
    parser.add_argument("--vocab_size", type=int, default=4000)
    add_recipe_flags(parser)
    add_flags(parser, METHODS, [0, 1], "results_translation.jsonl")
    args = parser.parse_args()
    if not args.table:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        task = make_task(args)
        run_missing(
            args.results, args.seeds, args.methods, lambda method, seed: run(task, method, seed, args), tuple(FIGURES)
        )
    print(table(read_results(args.results), list(METHODS), FIGURES))


if __name__ == "__main__":
    main()
