"""Tiny models, datasets and runs that the tests share: random weights, CPU, no network."""

import atexit
import gc
import json
import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    set_seed,
)

from hf_selfkd import SelfKDTrainer


gc.freeze()  # every Trainer.train() collects garbage: it need not walk what was imported, which takes half a second
atexit.register(gc.unfreeze)
torch.set_num_threads(1)

CLASSES = 5
VOCABULARY, PAD, EOS, MASK = 30, 0, 1, 2  # of the language models
_TEXT = {"vocab_size": 30, "max_position_embeddings": 16, "num_labels": CLASSES}
_BERT = _TEXT | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, "decoder_start_token_id": PAD}
_SEQ2SEQ = _TOKENS | {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "forced_eos_token_id": None,
    "init_std": 0.3,
}
_CAUSAL = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": EOS,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 16}
_GPT2 |= {"initializer_range": 0.3, "bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": PAD}
_VIT = {"image_size": 16, "patch_size": 8, "num_labels": CLASSES, "hidden_size": 16, "intermediate_size": 16}

# name: (class, configuration, kind of data); with dropout where the architecture has it, unless "plain"
_MODELS = {
    "vit": (
        ViTForImageClassification,
        lambda: ViTConfig(
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            **_VIT,
        ),
        "images",
    ),
    "plain_vit": (
        ViTForImageClassification,
        lambda: ViTConfig(num_hidden_layers=1, num_attention_heads=2, **_NO_DROPOUT, **_VIT),
        "images",
    ),
    "plain_deep_vit": (
        ViTForImageClassification,
        lambda: ViTConfig(num_hidden_layers=2, num_attention_heads=2, **_NO_DROPOUT, **_VIT),
        "images",
    ),
    "resnet": (
        ResNetForImageClassification,
        lambda: ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
        ),
        "images",
    ),
    "convnext": (
        ConvNextForImageClassification,
        lambda: ConvNextConfig(
            patch_size=4, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, drop_path_rate=0.1, num_labels=CLASSES
        ),
        "images",
    ),
    "swin": (
        SwinForImageClassification,
        lambda: SwinConfig(
            image_size=16,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=2,
            num_labels=CLASSES,
        ),
        "images",
    ),
    "mobilenet": (
        MobileNetV2ForImageClassification,
        lambda: MobileNetV2Config(image_size=16, depth_multiplier=0.1, num_labels=CLASSES),
        "images",
    ),
    "timm": (
        TimmWrapperForImageClassification,
        lambda: TimmWrapperConfig.from_dict({"architecture": "test_resnet", "num_classes": CLASSES}),
        "images",
    ),
    "bert": (BertForSequenceClassification, lambda: BertConfig(**_BERT), "texts"),
    "plain_bert": (BertForSequenceClassification, lambda: BertConfig(**_BERT, **_NO_DROPOUT), "texts"),
    "distilbert": (
        DistilBertForSequenceClassification,
        lambda: DistilBertConfig(**_TEXT, dim=16, hidden_dim=16, n_layers=1, n_heads=2),
        "texts",
    ),
    "bert_tokens": (BertForTokenClassification, lambda: BertConfig(**_BERT), "tokens"),
    "plain_bert_tokens": (BertForTokenClassification, lambda: BertConfig(**_BERT, **_NO_DROPOUT), "tokens"),
    "wav2vec2": (
        Wav2Vec2ForSequenceClassification,
        lambda: Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=[8, 8],
            conv_kernel=[5, 3],
            conv_stride=[5, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.2,
            mask_time_length=2,
            classifier_proj_size=8,
            num_labels=CLASSES,
        ),
        "sounds",
    ),
    "marian": (MarianMTModel, lambda: MarianConfig(**_SEQ2SEQ), "pairs"),
    "plain_marian": (MarianMTModel, lambda: MarianConfig(dropout=0.0, **_SEQ2SEQ), "pairs"),
    "bart": (BartForConditionalGeneration, lambda: BartConfig(**_SEQ2SEQ), "pairs"),
    "mbart": (MBartForConditionalGeneration, lambda: MBartConfig(**_SEQ2SEQ), "pairs"),
    "m2m100": (M2M100ForConditionalGeneration, lambda: M2M100Config(**_SEQ2SEQ), "pairs"),
    "t5": (
        T5ForConditionalGeneration,
        lambda: T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **_TOKENS),
        "pairs",
    ),
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(attention_dropout=0.1, **_CAUSAL), "words"),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(attention_dropout=0.1, **_CAUSAL), "words"),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(**_GPT2), "words"),
    "plain_gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_GPT2),
        "words",
    ),
    "bert_mlm": (BertForMaskedLM, lambda: BertConfig(initializer_range=0.3, **_BERT), "masked"),
    "plain_bert_mlm": (
        BertForMaskedLM,
        lambda: BertConfig(initializer_range=0.3, **_BERT, **_NO_DROPOUT),
        "masked",
    ),
}


def make_model(name, seed=0):
    """A model of `_MODELS` with random weights that depend on the seed only."""
    model_class, config, _ = _MODELS[name]
    set_seed(seed)
    return model_class(config())


def make_speaker():
    """A translation model that says something else of every sentence: with random weights, only larger ones."""
    model = make_model("plain_marian")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    return model


class Samples(Dataset):
    """A map-style dataset of dictionaries, with a transform if one is given."""

    def __init__(self, items, transform=None):
        self.items, self.transform = items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = dict(self.items[index])
        return item if self.transform is None else self.transform(item)


class Stream(IterableDataset):
    """The samples one after the other, in the same order in every pass; without a length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return (self.samples[n] for n in range(len(self.samples)))


class SizedStream(Stream):
    """A stream that tells its length."""

    def __len__(self):
        return len(self.samples)


def add_noise(item):
    """Random augmentation that draws from every generator there is."""
    noise = torch.randn(item["pixel_values"].shape) * random.uniform(0.1, 0.3) + float(np.random.normal(scale=0.1))
    return item | {"pixel_values": item["pixel_values"] + noise}


def make_samples(kind, size=22, transform=None, seed=0):
    """Samples for the model of that name (or of that kind: images, texts, tokens, sounds, pairs, words, masked).

    The classes can be told; `pairs` are for encoder-decoder models, `words` for causal and `masked` for masked ones.
    """
    kind = _MODELS[kind][2] if kind in _MODELS else kind
    rng = np.random.default_rng(seed)
    items = []
    for label in rng.integers(CLASSES, size=size).tolist():
        if kind == "images":
            pixels = rng.normal(size=(3, 16, 16)) + np.linspace(-1, 1, 16) * (label - 2)
            item = {"pixel_values": torch.tensor(pixels, dtype=torch.float32), "labels": label}
        elif kind == "sounds":
            wave = np.sin(np.arange(160) * (label + 1) / 5) + rng.normal(size=160)
            item = {"input_values": torch.tensor(wave, dtype=torch.float32), "labels": label}
        else:
            words = rng.integers(3, 30, size=int(rng.integers(3, 10)))
            words[0] = 3 + label
            if kind in ("pairs", "words", "masked"):
                items.append(_language_item(kind, words, rng))
                continue
            labels = label if kind == "texts" else [-100, *(words[1:] % CLASSES).tolist()]
            item = {"input_ids": words.tolist(), "labels": labels}
        items.append(item)
    return Samples(items, transform)


def _language_item(kind, words, rng):
    if kind == "pairs":  # the target has a length of its own
        target = [(3 * word) % 27 + 3 for word in words[::-1][: int(rng.integers(1, 7))].tolist()]
        return {"input_ids": words.tolist(), "labels": [*target, EOS]}
    if kind == "words":  # every other sample starts with a prompt that is not to be learned
        prompt = 2 * int(rng.integers(2))
        return {"input_ids": words.tolist(), "labels": [-100] * prompt + words[prompt:].tolist()}
    masked = rng.random(len(words)) < 0.4
    masked[int(rng.integers(len(words)))] = True
    return {"input_ids": np.where(masked, MASK, words).tolist(), "labels": np.where(masked, words, -100).tolist()}


def collate(items):
    """Stack images and sounds, pad words with 0 and their labels with -100."""
    if "input_ids" not in items[0]:
        return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}

    def pad(values, filler):
        length = max(map(len, values))
        return torch.tensor([list(v) + [filler] * (length - len(v)) for v in values])

    batch = {"input_ids": pad([item["input_ids"] for item in items], 0)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    labels = [item["labels"] for item in items]
    batch["labels"] = pad(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels)
    return batch


def with_decoder_inputs(start=PAD):
    """A collator that shifts the targets to the right, which the stock trainer needs where it takes the labels out."""

    def collator(items):
        batch = collate(items)
        previous = batch["labels"].roll(1, dims=1)
        previous[:, 0] = start
        return batch | {"decoder_input_ids": previous.masked_fill(previous == -100, PAD)}

    return collator


def words_of(rows):
    """The tokens of each row, without what fills it up."""
    return [[token for token in row if token not in (PAD, -100)] for row in np.asarray(rows).tolist()]


class Seen:
    """A `compute_metrics` that keeps what it is shown."""

    def __call__(self, prediction):
        self.predictions, self.labels = prediction.predictions, prediction.label_ids
        return {"sentences": len(self.labels)}


def make_trainer(output_dir, model, dataset, trainer=SelfKDTrainer, callbacks=None, **options):
    """
    A trainer for a short run on the CPU: 3 epochs of batches of 4, every step logged, nothing saved.

    `options` are fields of the arguments or parameters of the trainer; `model` is a model or a name of `_MODELS`.
    """
    parameters = ("eval_dataset", "compute_loss_func", "compute_metrics", "optimizers", "processing_class")
    parameters += ("model_init", "preprocess_logits_for_metrics", "optimizer_cls_and_kwargs")
    parameters += () if isinstance(options.get("auxiliary_heads"), str) else ("auxiliary_heads",)
    own = {name: options.pop(name) for name in parameters if name in options}
    own["data_collator"] = options.pop("data_collator", collate)
    stock = Seq2SeqTrainingArguments if issubclass(trainer, Seq2SeqTrainer) else TrainingArguments
    config = options.pop("config_class", None) or getattr(trainer, "_config_class", stock)
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    model = make_model(model) if isinstance(model, str) else model
    args = config(str(output_dir), **(defaults | options))
    made = trainer(model, args, train_dataset=dataset, callbacks=callbacks, **own)
    made.remove_callback(PrinterCallback)
    return made


def train(output_dir, model, dataset, resume=None, **options):
    """[`make_trainer`], trained, from checkpoint `resume` of its output folder (a step or a path) if given."""
    trainer = make_trainer(output_dir, model, dataset, **options)
    if isinstance(resume, int):
        resume = f"{output_dir}/checkpoint-{resume}"
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def results(out, split="eval"):
    """The figures that an example wrote of a split."""
    return json.loads((out / f"{split}_results.json").read_text())


def same_weights(a, b):
    """Whether two models have the same weights, to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def state_of(model):
    """Copies of all parameters and buffers of a model, or of a trainer's model."""
    model = model if isinstance(model, torch.nn.Module) else model.model
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def difference(one, other):
    """The largest difference of two models, trainers or [`state_of`], which must have the same names."""
    one, other = (part if isinstance(part, dict) else state_of(part) for part in (one, other))
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def logged(trainer, name, after=0):
    """The logged values of `name` after a step, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry and entry["step"] > after]


class Recording(SelfKDTrainer):
    """Notes what each micro-batch of training was, as `(step, inputs)`."""

    def compute_loss(self, model, inputs, *arguments, **keywords):
        if model.training:
            record = self._batches.present
            ids = {} if record is None or record.ids is None else {"sample_id": torch.from_numpy(record.ids)}
            if record is not None and record.partner is not None:
                ids |= {"mix_partner": record.partner, "mix_lambda": torch.full((len(record.partner),), record.weight)}
            self.__dict__.setdefault("visits", []).append((self.state.global_step, dict(inputs) | ids))
        return super().compute_loss(model, inputs, *arguments, **keywords)


def refused(action, *parts):
    """Assert that the action raises one clear line that contains all these parts; gives the message."""
    with pytest.raises((ValueError, TypeError)) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message
