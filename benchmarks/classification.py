"""
Plain training, label smoothing and PS-KD with each teacher, side by side, with the same budget and several seeds.

Every finished run appends one JSON line to `--results`; runs that are already there are not repeated, so the command
can be stopped and started again. `--table` prints the Markdown table of what is there and trains nothing.

    python benchmarks/classification.py cifar100 --train_files "train-00000*.parquet" --test_files "test-*.parquet"
    python benchmarks/classification.py ag_news --train_files "train*.parquet" --test_files "test*.parquet"
    python benchmarks/classification.py cifar100 --layered --train_files "train-00000*.parquet" ...
    python benchmarks/classification.py ag_news --pretrained MODEL --max_train_samples 400 --label_noise 0.3 ...
    python benchmarks/classification.py digits --layered --few_shot_fraction 0.1 --batch_size 32 --learning_rate 0.05

`--layered` compares auxiliary heads instead of teachers, `--history` what is stored of past predictions;
`--few_shot_fraction` keeps a part of each class. What looks at held-out data (`PS-KD calibrated`) sees
`--validation_files` or, of CIFAR-100, the ten images a class after the `--images_per_class` that are trained on; never
the test set, which every figure is of, unless settings are to be chosen: `--judge_on_held_out` leaves it alone.

Without files the data come from the Hub (`uoft-cs/cifar100`, `fancyzhx/ag_news`); the digits are scikit-learn's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from comparison import COST, FIGURES, load, read_results, run_missing, table
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDConfig, SelfKDDataCollator, SelfKDTrainer
from hf_selfkd.metrics import compute_classification_metrics


METHODS = {
    "plain": {"alpha": 0.0},
    "label smoothing 0.1": {"alpha": 0.0, "label_smoothing_factor": 0.1},
    "PS-KD history": {"teacher": "history"},
    "PS-KD history, constant": {"teacher": "history", "alpha_schedule": "constant"},
    "PS-KD snapshot": {"teacher": "snapshot"},
    "PS-KD ema": {"teacher": "ema"},
    "rank": {"teacher": "rank", "alpha_schedule": "constant"},
    "rank, label weights": {"teacher": "rank", "alpha_schedule": "constant", "rank_label_weights": True},
    "PS-KD calibrated": {"teacher": "history", "alpha_schedule": "calibrated"},
    "PS-KD calibrated, tenth of the training set": {
        "teacher": "history",
        "alpha_schedule": "calibrated",
        "calibration_fraction": 0.1,
    },
}
# Of images: every second batch is mixed, so that the history has unmixed ones to keep.
CUTMIX = {
    "CutMix": {"alpha": 0.0},
    "PS-KD history x CutMix": {"teacher": "history"},
    "PS-KD snapshot x CutMix": {"teacher": "snapshot"},
}
METHODS |= {name: {"cutmix": 0.5} | settings for name, settings in CUTMIX.items()}
LAYERED = {
    "plain": METHODS["plain"],
    "label smoothing 0.1": METHODS["label smoothing 0.1"],
    "PS-KD history": METHODS["PS-KD history"],
    "PS-KD calibrated": METHODS["PS-KD calibrated"],
    "rank": METHODS["rank"],
    **{name: METHODS[name] for name in CUTMIX},
    "deep_supervision": {"alpha": 0.0, "auxiliary_heads": "deep_supervision"},
    "byot": {"alpha": 0.0, "auxiliary_heads": "byot"},
    "joint": {"alpha": 0.0, "auxiliary_heads": "joint"},
    "sla, alpha 0": {"alpha": 0.0, "auxiliary_heads": "sla"},
    "sla": {"auxiliary_heads": "sla"},
    "sla x CutMix, alpha 0": {"alpha": 0.0, "auxiliary_heads": "sla", "cutmix": 0.5},
    "lsskd, alpha 0": {"alpha": 0.0, "auxiliary_heads": "lsskd"},
    "lsskd": {"auxiliary_heads": "lsskd"},
    "lsskd_full, alpha 0": {"alpha": 0.0, "auxiliary_heads": "lsskd_full"},
    "lsskd_full": {"auxiliary_heads": "lsskd_full"},
}
# The terms of `lsskd` one at a time, all at alpha 0 unless stated: what each gives and takes.
TERMS = {
    "heads": {},
    "heads + deep to shallow": {"deep_to_shallow_weight": 0.1},
    "heads + features": {"feature_weight": 0.03},
    "heads, no rotation": {"views": "none", "layers": [0, 1, 2]},
    "heads, 3 views": {"views_per_step": 3},
}
# The term of `sla` with other weights, for a choice on held-out images.
SLA = {
    "sla, weight 0.3": {"heads_to_model_weight": 0.3},
    "sla, weight 3": {"heads_to_model_weight": 3.0},
    "sla, temperature 1": {"heads_to_model_weight": 1.0, "temperature": 1.0},
    "sla, temperature 6": {"heads_to_model_weight": 1.0, "temperature": 6.0},
    "sla, 3 views": {"heads_to_model_weight": 1.0, "views_per_step": 3},
}
LAYERED |= {
    name: {"alpha": 0.0, "auxiliary_heads": AuxiliaryHeadsConfig(**({"views": "rotation"} | terms))}
    for name, terms in (TERMS | SLA).items()
}
# What is kept of a past prediction, and where the mass goes that is not: `benchmarks/history_bytes.py` compares them.
HALF = {"teacher": "history", "history_dtype": "float16"}
HISTORY = {
    "plain": METHODS["plain"],
    "float32": {"teacher": "history", "history_dtype": "float32"},
    "float16": HALF,
    **{f"top {k}": HALF | {"history_top_k": k} for k in (32, 16, 8, 4, 2, 1)},
    **{
        f"top {k}, {tail}": HALF | {"history_top_k": k, "history_tail": tail}
        for k in (16, 8, 4)
        for tail in ("label", "uniform", "renormalize")
    },
}
REPORTED = ("accuracy", "confidence", "top5_accuracy", "nll", "brier", "ece", "ece_15", "aurc", "eaurc")
MEAN, STD = torch.tensor((0.5071, 0.4865, 0.4409)), torch.tensor((0.2673, 0.2564, 0.2762))


class Images(torch.utils.data.Dataset):
    """Decoded images; for training with the usual CIFAR augmentation (crop from a border of an eighth, flip)."""

    def __init__(self, dataset: Dataset, image_column: str, label_column: str, augment: bool, size: int = 32):
        stacked = np.stack([np.asarray(image.convert("RGB")) for image in dataset[image_column]])
        pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(255)
        if pixels.shape[-1] != size:
            pixels = nn.functional.interpolate(pixels, size=size, mode="area")
        pixels = (pixels - MEAN[:, None, None]) / STD[:, None, None]
        self.size, self.augment, self.border = size, augment, size // 8
        self.pixels = nn.functional.pad(pixels, (self.border,) * 4) if augment else pixels
        self.labels = list(dataset[label_column])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        image = self.pixels[index]
        if self.augment:
            top, left, flip = torch.randint(0, 2 * self.border + 1, (2,)).tolist() + [bool(torch.rand(()) < 0.5)]
            image = image[:, top : top + self.size, left : left + self.size]
            image = image.flip(-1) if flip else image
        return {"pixel_values": image, "labels": self.labels[index]}


def small_resnet(name: str, num_labels: int, channels: int = 3) -> ResNetForImageClassification:
    """A ResNet with the stem that small images need: three for a CPU, `resnet18` as in the papers for a GPU."""
    sizes = {
        "digits": ([16, 32, 64], [1, 1, 1], 1),
        "resnet8_narrow": ([16, 32, 64], [1, 1, 1], 2),
        "resnet8": ([32, 64, 128], [1, 1, 1], 2),
        "resnet14": ([32, 64, 128], [2, 2, 2], 1),
        "resnet14_narrow": ([16, 32, 64], [2, 2, 2], 1),
        "resnet18": ([64, 128, 256, 512], [2, 2, 2, 2], 1),
    }
    widths, depths, stride = sizes[name]
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=widths[0],
        hidden_sizes=widths,
        depths=depths,
        layer_type="basic",
        num_labels=num_labels,
    )
    model = ResNetForImageClassification(config)
    stem = nn.Conv2d(channels, widths[0], 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.resnet.embedder = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())
    return model


def cifar_vit(num_labels: int) -> ViTForImageClassification:
    """A ViT of 0.2 million parameters for images of 32 x 32 pixels."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=num_labels,
        )
    )


def of_each_class(dataset: Dataset, column: str, start: int, count: int | None) -> Dataset:
    """Some samples of each class, in the order of the dataset; all without a `count`."""
    if count is None:
        return dataset
    labels, part = np.asarray(dataset[column]), slice(start, start + count)
    return dataset.select(np.concatenate([np.flatnonzero(labels == label)[part] for label in np.unique(labels)]))


def few_shot(dataset: Dataset, column: str, fraction: float) -> Dataset:
    """A part of each class, the same in every run."""
    if fraction == 1:
        return dataset
    return dataset.train_test_split(train_size=fraction, stratify_by_column=column, seed=0)["train"]


SGD = {
    "optim": "sgd",
    "optim_args": "momentum=0.9,nesterov=True",
    "weight_decay": 5e-4,
    "lr_scheduler_type": "cosine",
}
VIT = {"learning_rate": 1e-3, "optim": "adamw_torch", "optim_args": None, "weight_decay": 0.05, "warmup_steps": 200}


def cifar100(args: argparse.Namespace) -> dict:
    """What the trainer needs for CIFAR-100."""
    train, test = (
        load(getattr(args, f"{split}_files"), "uoft-cs/cifar100", split, getattr(args, f"max_{split}_samples"))
        for split in ("train", "test")
    )
    image, label = ("image", "label") if "label" in train.column_names else ("img", "fine_label")
    classes = train.features[label].num_classes
    kept = args.images_per_class
    train, every = of_each_class(few_shot(train, label, args.few_shot_fraction), label, 0, kept), train
    held_out = (
        None
        if kept is None
        else Images(of_each_class(every, label, kept, args.held_out_per_class), image, label, False, args.pixels)
    )
    name = args.model or "resnet8"
    return {
        "make_model": lambda: cifar_vit(classes) if name == "vit" else small_resnet(name, classes),
        "train_dataset": Images(train, image, label, True, args.pixels),
        "validation_dataset": held_out,
        "eval_dataset": Images(test, image, label, False, args.pixels),
        "arguments": {
            "per_device_train_batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "num_train_epochs": args.epochs or 30,
            **SGD,
        }
        | (VIT if name == "vit" else {}),
    }


def digits(args: argparse.Namespace) -> dict:
    """What the trainer needs for scikit-learn's handwritten digits, 8 x 8 pixels: 1,000 to train on, 797 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy((pixels / 16 - 0.3) / 0.37).float().view(-1, 1, 8, 8)
    items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    train, test = train_test_split(items, train_size=1000, stratify=labels, random_state=0)
    if args.few_shot_fraction < 1:
        own = [item["labels"] for item in train]
        train, _ = train_test_split(train, train_size=args.few_shot_fraction, stratify=own, random_state=0)
    return {
        "make_model": lambda: small_resnet("digits", 10, channels=1),
        "train_dataset": train,
        "eval_dataset": test,
        "arguments": {
            "per_device_train_batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "num_train_epochs": args.epochs or 60,
            **SGD,
        },
    }


def ag_news(args: argparse.Namespace) -> dict:
    """What the trainer needs for AG News: a pretrained model, or a small BERT from scratch with its own tokenizer."""
    train, test = (
        load(getattr(args, f"{split}_files"), "fancyzhx/ag_news", split, getattr(args, f"max_{split}_samples"))
        for split in ("train", "test")
    )
    validation = load(args.validation_files, "fancyzhx/ag_news", "train", 1000) if args.validation_files else None
    if args.pretrained:
        return pretrained_texts(args, train, validation, test)
    return small_bert(args, train, test)


def wrong_labels(dataset: Dataset, share: float, classes: int) -> Dataset:
    """The dataset with a share of its labels replaced by another class, the same ones in every run."""
    rng, labels = np.random.default_rng(0), np.asarray(dataset["label"])
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return dataset.remove_columns("label").add_column("label", labels)


def pretrained_texts(args: argparse.Namespace, train: Dataset, validation: Dataset | None, test: Dataset) -> dict:
    """Fine-tuning of a pretrained encoder, clean or with wrong labels; held-out and test labels stay as they are."""
    tokenizer = AutoTokenizer.from_pretrained(args.pretrained)

    def encode(batch: dict) -> dict:
        return dict(tokenizer(batch["text"], truncation=True, max_length=48))

    train = wrong_labels(train, args.label_noise, 4).map(encode, batched=True)
    return {
        "make_model": lambda: AutoModelForSequenceClassification.from_pretrained(args.pretrained, num_labels=4),
        "train_dataset": train,
        "validation_dataset": None if validation is None else validation.map(encode, batched=True),
        "eval_dataset": test.map(encode, batched=True),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "arguments": {
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-4,
            "warmup_steps": 20,
            "num_train_epochs": args.epochs or 6,
        },
    }


def small_bert(args: argparse.Namespace, train: Dataset, test: Dataset) -> dict:
    """A small BERT from scratch and a tokenizer trained on the training texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    raw.train_from_iterator(
        train["text"], trainers.BpeTrainer(vocab_size=8000, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")

    def encode(batch: dict) -> dict:
        return {"input_ids": tokenizer(batch["text"], truncation=True, max_length=64)["input_ids"]}

    config = BertConfig(
        vocab_size=8000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=64,
        num_labels=4,
    )
    return {
        "make_model": lambda: BertForSequenceClassification(config),
        "train_dataset": train.map(encode, batched=True),
        "eval_dataset": test.map(encode, batched=True),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "arguments": {
            "per_device_train_batch_size": 64,
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "weight_decay": 0.01,
            "num_train_epochs": args.epochs or 5,
        },
    }


def in_bf16(task: dict) -> dict:
    """The task in mixed precision; convolutions in bfloat16 are fastest with the channels last."""
    make_model = task["make_model"]
    return task | {
        "make_model": lambda: make_model().to(memory_format=torch.channels_last),
        "arguments": task["arguments"] | {"bf16": True, "use_cpu": not torch.cuda.is_available()},
    }


def figures_of(prediction: EvalPrediction) -> dict[str, float]:
    """The figures of classification, and how sure the model is: above the accuracy, it is over-confident."""
    confidence = torch.from_numpy(prediction.predictions).float().softmax(-1).amax(-1).mean()
    return compute_classification_metrics(prediction) | {"confidence": float(confidence)}


def run(task: dict, method: str, seed: int, max_grad_norm: float = 1.0) -> dict:
    """Train once and evaluate the last epoch on the test set."""
    task, settings = dict(task), dict((METHODS | LAYERED | HISTORY)[method])
    heads, held_out = settings.pop("auxiliary_heads", None), task.pop("validation_dataset", None)
    test = task.pop("eval_dataset")
    if settings.get("alpha_schedule") == "calibrated" and held_out is None:
        settings["calibration_fraction"] = 0.1
    if "cutmix" in settings:
        task["data_collator"] = SelfKDDataCollator(
            task.get("data_collator"), cutmix_alpha=1.0, mix_probability=settings.pop("cutmix")
        )
    make_model, arguments = task.pop("make_model"), task.pop("arguments")
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = SelfKDConfig(
            folder,
            seed=seed,
            per_device_eval_batch_size=256,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            logging_strategy="epoch",
            max_grad_norm=max_grad_norm,
            **arguments,
            **settings,
        )
        trainer = SelfKDTrainer(
            make_model(),
            config,
            eval_dataset=held_out,
            compute_metrics=figures_of,
            auxiliary_heads=heads,
            **task,
        )
        start = time.perf_counter(), time.process_time()
        trainer.train()
        history = getattr(trainer.teacher, "history", None)
        seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        metrics = trainer.evaluate(test)
    metrics = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    return {
        "method": method,
        "seed": seed,
        "epochs": arguments["num_train_epochs"],
        "train_samples": len(task["train_dataset"]),
        "max_grad_norm": max_grad_norm,
        "precision": "bf16" if arguments.get("bf16") else "float32",
        "error": 100 * (1 - metrics["accuracy"]),
        **{key: metrics[key] for key in REPORTED},
        "train_seconds": seconds,
        **({} if history is None else {"row_bytes": history.codec.row_bytes}),
        "cpu_ms_per_image": 1000 * cpu / len(task["train_dataset"]) / arguments["num_train_epochs"],
        "train_loss_by_epoch": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "alpha_by_epoch": [entry["alpha"] for entry in trainer.state.log_history if "alpha" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("cifar100", "digits", "ag_news"))
    parser.add_argument("--train_files", nargs="+", help="local parquet files; the Hub otherwise")
    parser.add_argument("--test_files", nargs="+")
    parser.add_argument("--validation_files", nargs="+", help="held-out texts")
    parser.add_argument("--pretrained", help="folder or name of the model that AG News fine-tunes")
    parser.add_argument("--label_noise", type=float, default=0.0, help="share of wrong training labels, AG News")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_test_samples", type=int)
    parser.add_argument("--batch_size", type=int, default=128, help="images of a step")
    parser.add_argument("--learning_rate", type=float, default=0.1, help="of SGD, for images")
    parser.add_argument("--layered", action="store_true", help="compare auxiliary heads instead of teachers")
    parser.add_argument("--history", action="store_true", help="compare what is stored of past predictions instead")
    parser.add_argument("--methods", nargs="+", help="all of the comparison by default")
    parser.add_argument("--few_shot_fraction", type=float, default=1.0, help="part of each class of images")
    parser.add_argument("--images_per_class", type=int, help="the first ones of each class, for training")
    parser.add_argument("--held_out_per_class", type=int, default=10, help="images after those, not trained on")
    parser.add_argument("--judge_on_held_out", action="store_true", help="instead of on the test set")
    parser.add_argument("--pixels", type=int, default=32, help="size of the images of CIFAR-100")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="of the Trainer; 0 does not clip")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--bf16", action="store_true", help="mixed precision; images with their channels last")
    models = ("resnet8_narrow", "resnet8", "resnet14_narrow", "resnet14", "resnet18", "vit")
    parser.add_argument("--model", choices=models)
    parser.add_argument("--results", type=Path, help="JSON lines; results_TASK.jsonl by default")
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    args = parser.parse_args()
    known = HISTORY if args.history else LAYERED if args.layered else METHODS
    methods = args.methods or list(known)
    if set(methods) - known.keys():
        parser.error(f"--methods: choose among {', '.join(known)}")
    path = args.results or Path(f"results_{args.task}.jsonl")
    if not args.table:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        task = {"cifar100": cifar100, "digits": digits, "ag_news": ag_news}[args.task](args)
        if args.bf16:
            task = in_bf16(task)
        if args.judge_on_held_out:
            if task.get("validation_dataset") is None:
                parser.error("--judge_on_held_out: give --validation_files or --images_per_class")
            task["eval_dataset"] = task["validation_dataset"]

        def train(method: str, seed: int) -> dict:
            return run(task, method, seed, args.max_grad_norm)

        run_missing(path, args.seeds, methods, train, tuple(FIGURES))
    cost = {"cpu_ms_per_image": COST["cpu_ms_per_image"]} if args.layered else {}
    print(table(read_results(path), list(known), FIGURES | cost))


if __name__ == "__main__":
    main()
