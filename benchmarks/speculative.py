"""
Translation with exits: what each exit is worth, and whether an exit that drafts makes the whole model faster.

A Marian with a deep decoder is trained once with the preset `exits`. The test sentences are then translated greedily,
one at a time, by the whole model, by each exit, and by the whole model with each exit as its draft (`assistant_model`
of transformers). Drafted translations must be those of the whole model, token by token.

    python benchmarks/speculative.py --train_files "train-*.parquet" --test_files "test-*.parquet"
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import sacrebleu
import torch
from comparison import machine
from transformers import DataCollatorForSeq2Seq, MarianMTModel, PreTrainedModel, set_seed
from translation import make_task

from hf_selfkd import AuxiliaryHeadsConfig, Seq2SeqSelfKDConfig, Seq2SeqSelfKDTrainer, exit_model


def train(task: dict, args: argparse.Namespace) -> MarianMTModel:
    """The whole model, with its exits."""
    set_seed(args.seed)
    task["config"].decoder_layers = args.decoder_layers
    model = MarianMTModel(task["config"])
    with tempfile.TemporaryDirectory() as folder:
        config = Seq2SeqSelfKDConfig(
            folder,
            alpha=0.0,
            seed=args.seed,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=64,
            learning_rate=args.learning_rate,
            lr_scheduler_type="inverse_sqrt",
            warmup_steps=300,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="epoch",
        )
        trainer = Seq2SeqSelfKDTrainer(
            model,
            config,
            train_dataset=task["train"],
            data_collator=DataCollatorForSeq2Seq(task["tokenizer"], model=model),
            auxiliary_heads=AuxiliaryHeadsConfig.preset("exits", layers=[exit - 1 for exit in args.exits]),
        )
        trainer.train()
    return model.eval()


def translate(model: PreTrainedModel, sentences: list[list[int]], draft: PreTrainedModel | None = None) -> tuple:
    """Greedy translations, one sentence at a time, and their seconds."""
    start, written = time.perf_counter(), []
    options = {"max_length": 64, "num_beams": 1, "do_sample": False, "bad_words_ids": None}
    for words in sentences:
        with torch.no_grad():
            found = model.generate(torch.tensor([words]), assistant_model=draft, **options)
        written.append(found[0].tolist())
    return written, time.perf_counter() - start


def measure(model: MarianMTModel, task: dict, args: argparse.Namespace) -> list[dict]:
    """A row for the whole model, each exit and each draft; the whole model is timed before each, for the ratio."""
    test = task["test"].select(range(min(args.sentences, len(task["test"]))))
    tokenizer, sentences = task["tokenizer"], list(test["input_ids"])
    references = tokenizer.batch_decode(list(test["labels"]), skip_special_tokens=True)
    translate(model, sentences[:20])  # warm up
    rows = []

    def row(name: str, written: list[list[int]], ratio: float, whole: list[list[int]]) -> None:
        texts = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        bleu = sacrebleu.corpus_bleu(texts, [[text.strip() for text in references]]).score
        same = sum(one == other for one, other in zip(written, whole, strict=True))
        rows.append({"member": name, "bleu": bleu, "time_ratio": ratio, "same": same, "sentences": len(written)})
        print(rows[-1], flush=True)

    for exit in args.exits:
        small = exit_model(model, exit)
        for name, arguments in ((f"exit {exit}", (small, sentences)), (f"draft {exit}", (model, sentences, small))):
            whole, seconds = translate(model, sentences)
            if not rows:
                row("whole", whole, 1.0, whole)
            written, own = translate(*arguments)
            row(name, written, own / seconds, whole)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_files", nargs="+", help="local parquet files; the Hub otherwise")
    parser.add_argument("--test_files", nargs="+")
    parser.add_argument("--source", default="de")
    parser.add_argument("--target", default="en")
    parser.add_argument("--max_train_samples", type=int, default=6000)
    parser.add_argument("--vocab_size", type=int, default=4000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--decoder_layers", type=int, default=6)
    parser.add_argument("--exits", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=Path("results_speculative.jsonl"))
    args = parser.parse_args()
    task = make_task(args)
    rows = measure(train(task, args), task, args)
    settings = {name: getattr(args, name) for name in ("epochs", "width", "layers", "decoder_layers", "seed")}
    with args.results.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | settings | machine()) + "\n")


if __name__ == "__main__":
    main()
