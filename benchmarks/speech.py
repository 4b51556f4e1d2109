"""
Speech to text with CTC: plain training and PS-KD (`teacher="snapshot"`) at equal numbers of epochs.

The data are the prompts of a telephone exchange, read by one speaker: the sounds of Asterisk (Debian package
asterisk-core-sounds-en-wav, 8 kHz, CC-BY-SA 3.0) and the list of their texts that comes with the sounds, "name: text"
a line. Left out are noises, silence, prompts longer than `--max_seconds`, and texts whose sound cannot be told:
single letters, numbers of several digits, abbreviations. A quarter is for tests, chosen by a hash of the text, so that
two prompts of the same text are on the same side.

    python benchmarks/speech.py --sounds sounds/en --transcripts core-sounds-en.txt

Each finished run appends a JSON line to `--results`; what is there is not repeated. `--table` prints the table.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import wave
import zlib
from pathlib import Path

import numpy as np
import torch
from comparison import SPEECH, add_flags, read_results, run_missing, table
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForCTC, Wav2Vec2CTCTokenizer, set_seed
from transformers.audio_utils import mel_filter_bank

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.metrics import compute_speech_metrics


METHODS = {
    "plain": {"alpha": 0.0},
    "PS-KD, alpha 0.1": {"alpha": 0.1, "teacher": "snapshot"},
    "PS-KD, alpha 0.3": {"alpha": 0.3, "teacher": "snapshot"},
}
RATE, WINDOW, HOP, MELS = 8000, 200, 80, 40  # samples a second; of 25 ms, each 10 ms
STACKED = 3  # spectra of 10 ms that are one input of the model
SYMBOLS = " 'abcdefghijklmnopqrstuvwxyz"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def normalized(text: str) -> str | None:
    """A text in small letters, digits written out; `None` where nobody can tell how it is spoken."""
    text = re.sub(r"\[.*?\]|\(.*?\)", " ", text)
    if re.search(r"[A-Z]{2}|\d\d|[A-Z]\.\d", text):
        return None
    text = text.replace("*", " star ").replace("#", " pound ")
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text.lower())
    text = " ".join(re.sub(r"[^a-z']", " ", text).split())
    return text if len(text) > 1 else None


def read_sound(path: Path) -> np.ndarray:
    """The waves of a file of 16 bits, one channel and 8 kHz, from -1 to 1."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise ValueError(f"{path}: {file.getparams()} is not 8 kHz, one channel, 16 bits; convert it.")
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768


def spectra(sound: np.ndarray) -> torch.Tensor:
    """Logarithms of the spectra in 40 bands of mel, each band with mean 0 and deviation 1, `STACKED` a row."""
    bands = mel_filter_bank(129, MELS, 40.0, RATE / 2, RATE, norm=None, mel_scale="htk")
    powers = torch.stft(
        torch.from_numpy(sound), 256, HOP, WINDOW, torch.hann_window(WINDOW), return_complex=True
    ).abs().square()  # fmt: skip
    rows = (torch.from_numpy(bands).float().T @ powers + 1e-6).log().T
    rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-3)
    return rows[: len(rows) // STACKED * STACKED].reshape(-1, STACKED * MELS)


class Prompts(torch.utils.data.Dataset):
    """
    Spectra and texts, in memory.

    Args:
        pairs (`list`): of files and texts.
    """

    def __init__(self, pairs: list[tuple[Path, str]]):
        self.seconds, self.items = 0.0, []
        for path, text in pairs:
            sound = read_sound(path)
            self.seconds += len(sound) / RATE
            self.items.append(
                {"input_features": spectra(sound), "labels": [1 + SYMBOLS.index(symbol) for symbol in text]}
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


def read_prompts(sounds: Path, transcripts: Path, max_seconds: float) -> dict[str, Prompts]:
    """Training and test prompts; which is which depends on the text alone."""
    pairs: dict[str, list] = {"train": [], "test": []}
    for name, text in re.findall(r"^([^;:\s]+):(.*)$", transcripts.read_text(encoding="utf-8"), flags=re.MULTILINE):
        path, said = sounds / f"{name.removesuffix('.wav')}.wav", normalized(text)
        if said is not None and path.is_file() and len(read_sound(path)) <= max_seconds * RATE:
            pairs["train" if zlib.crc32(said.encode()) % 4 else "test"].append((path, said))
    return {split: Prompts(sorted(found)) for split, found in pairs.items()}


def padded(items: list[dict]) -> dict[str, torch.Tensor]:
    """Spectra padded with zeros, with a mask; texts with -100."""
    pad = torch.nn.utils.rnn.pad_sequence
    features = [item["input_features"] for item in items]
    return {
        "input_features": pad(features, batch_first=True),
        "attention_mask": pad([torch.ones(len(rows), dtype=torch.long) for rows in features], batch_first=True),
        "labels": pad([torch.tensor(item["labels"]) for item in items], batch_first=True, padding_value=-100),
    }


def tokenizer_of_symbols(folder: str) -> Wav2Vec2CTCTokenizer:
    """What turns symbols into text; 0 is the blank."""
    path = Path(folder) / "vocab.json"
    names = ["<pad>", *SYMBOLS.replace(" ", "|")]
    path.write_text(json.dumps({name: number for number, name in enumerate(names)}))
    return Wav2Vec2CTCTokenizer(str(path), unk_token="<pad>", model_input_names=["input_features"])


def small_conformer(width: int, layers: int) -> Wav2Vec2BertForCTC:
    """A Wav2Vec2-BERT from scratch, with the masks of SpecAugment."""
    return Wav2Vec2BertForCTC(
        Wav2Vec2BertConfig(
            vocab_size=1 + len(SYMBOLS),
            pad_token_id=0,
            feature_projection_input_dim=STACKED * MELS,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=3 * width,
            conv_depthwise_kernel_size=9,
            position_embeddings_type="rotary",
            feat_proj_dropout=0.1,
            hidden_dropout=0.1,
            final_dropout=0.1,
            layerdrop=0.0,
            mask_time_prob=0.1,
            mask_time_length=4,
            mask_time_min_masks=1,
            mask_feature_prob=0.1,
            mask_feature_length=8,
            ctc_loss_reduction="mean",
            ctc_zero_infinity=True,
        )
    )


def run(method: str, seed: int, data: dict[str, Prompts], args: argparse.Namespace) -> dict:
    """Train once and judge on the test prompts."""
    set_seed(seed)
    model, start = small_conformer(args.width, args.layers), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of_symbols(folder)
        config = SelfKDConfig(
            folder,
            seed=seed,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=1,  # what is said of padding would be read, too
            train_sampling_strategy="group_by_length",
            learning_rate=args.learning_rate,
            weight_decay=0.01,
            warmup_steps=100,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=200,
            use_cpu=True,
            **METHODS[method],
        )
        trainer = SelfKDTrainer(
            model,
            config,
            data_collator=padded,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=tokenizer,
            compute_metrics=compute_speech_metrics(tokenizer),
        )
        trainer.train()
        seconds = time.process_time() - start
        metrics = trainer.evaluate()
        fitted = trainer.evaluate(data["train"], metric_key_prefix="train")
    figures = {name: 100 * metrics[f"eval_{name}"] for name in ("cer", "wer")} | {"nll": metrics["eval_loss"]}
    figures |= {"train_cer": 100 * fitted["train_cer"], "train_nll": fitted["train_loss"]}
    size = {"train_samples": len(data["train"]), "test_samples": len(data["test"]), "epochs": args.epochs}
    size["parameters"] = model.num_parameters()
    return {"method": method, "seed": seed} | size | figures | {"cpu_seconds": seconds}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=Path, help="folder of the sounds")
    parser.add_argument("--transcripts", type=Path, help="their texts, a line each: 'name: text'")
    parser.add_argument("--max_seconds", type=float, default=5.0, help="longer prompts are left out")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    add_flags(parser, METHODS, [0, 1, 2], "outputs/speech.jsonl")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.table:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        data = read_prompts(args.sounds, args.transcripts, args.max_seconds)
        told = (f"{len(part)} {split} prompts, {part.seconds / 60:.1f} minutes" for split, part in data.items())
        print("; ".join(told), flush=True)
        run_missing(args.results, args.seeds, args.methods, lambda *one: run(*one, data, args), tuple(SPEECH))
    print(table(read_results(args.results), list(METHODS), SPEECH))


if __name__ == "__main__":
    main()
