"""Bad input: one clear line with the field, its value and the remedy, before the first optimizer step."""

import copy

import datasets
import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    VOCABULARY,
    Samples,
    SizedStream,
    Stream,
    collate,
    difference,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    state_of,
)
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2DoubleHeadsModel,
    Trainer,
    TrainingArguments,
)

from hf_selfkd import (
    SelfKDConfig,
    SelfKDDataCollator,
    SelfKDMixin,
    SelfKDTrainer,
    Seq2SeqSelfKDTrainer,
    with_sample_ids,
)
from hf_selfkd.collator import TrainingCollator


def refused_at_training(tmp_path, *parts, model="vit", samples=None, **options):
    """Refused when the trainer is made or at the latest by `train`, with the weights as they were."""
    model = make_model(model) if isinstance(model, str) else model
    before = state_of(model)
    samples = make_samples("vit") if samples is None else samples
    message = refused(lambda: make_trainer(tmp_path, model, samples, **options).train(), *parts)
    after = state_of(model)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in parameters)
    return message


def changed(samples, **values):
    """The samples with some items changed: `name={index: value}`, or a value for all."""
    items = [dict(item) for item in samples.items]
    for name, value in values.items():
        for index, item in enumerate(items):
            item[name] = value.get(index, item.get(name)) if isinstance(value, dict) else value
    return Samples(items)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"alpha": 1.5}, ["alpha=1.5", "[0, 1]"]),
        ({"alpha": -0.1}, ["alpha=-0.1", "[0, 1]"]),
        ({"alpha": float("nan")}, ["alpha=nan", "[0, 1]"]),
        ({"alpha_schedule": "sigmoid"}, ["alpha_schedule='sigmoid'", "cosine"]),
        ({"teacher": "big"}, ["teacher='big'", "history, snapshot, ema, predictions, rank, none"]),
        ({"history_dtype": "int8"}, ["history_dtype='int8'", "auto, float32, float16, bfloat16"]),
        ({"history_tail": "nowhere"}, ["history_tail='nowhere'", "bucket, label, uniform, renormalize"]),
        ({"history_device": "cuda"}, ["history_device='cuda'", "auto, accelerator, cpu, disk"]),
        ({"temperature": 0.0}, ["temperature=0.0", "positive"]),
        ({"temperature": float("inf")}, ["temperature=inf", "finite"]),
        ({"ema_decay": 1.0}, ["ema_decay=1.0", "[0, 1)"]),
        ({"history_top_k": 0}, ["history_top_k=0", "at least 1"]),
        ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor=0.1", "alpha=0.8", "Set label_smoothing_factor=0"]),
        ({"teacher": "ema", "warm_start_teacher": True}, ["warm_start_teacher=True", "teacher='ema'", "'snapshot'"]),
        ({"teacher": "snapshot", "history_trace": True}, ["history_trace=True", "'history'"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_fields(tmp_path, options, parts):
    refused(lambda: SelfKDConfig(str(tmp_path), **options), *parts)


def test_label_smoothing_in_plain_arguments(tmp_path):
    refused_at_training(
        tmp_path, "label_smoothing_factor=0.1", "alpha", config_class=TrainingArguments, label_smoothing_factor=0.1
    )


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
@pytest.mark.parametrize("options", [{"num_train_epochs": 1}, {"num_train_epochs": 0.5}, {"max_steps": 3}], ids=str)
def test_run_too_short_for_the_teacher(tmp_path, teacher, options):
    refused_at_training(
        tmp_path, "1 epoch", f"teacher={teacher!r}", "warm_start_teacher=True", teacher=teacher, **options
    )


def test_iterable_dataset_without_ids(tmp_path):
    stream = SizedStream(make_samples("vit"))
    parts = ("SizedStream", "teacher='snapshot'", "sample_id_column")
    refused_at_training(tmp_path, *parts, samples=stream, teacher="history")


def test_iterable_dataset_without_a_size(tmp_path):
    refused_at_training(
        tmp_path,
        "Stream",
        "__len__",
        "snapshot",
        samples=Stream(make_samples("vit")),
        sample_id_column="id",
        max_steps=8,
        teacher="history",
    )


def test_epoch_schedule_without_a_known_number_of_epochs(tmp_path):
    stream = Stream(make_samples("vit"))
    refused_at_training(tmp_path, "'linear'", "linear_step", samples=stream, teacher="snapshot", max_steps=8)


def test_seeded_transforms_of_an_iterable_dataset(tmp_path):
    stream = SizedStream(make_samples("vit"))
    refused_at_training(tmp_path, "seed_transforms=True", samples=stream, teacher="snapshot", seed_transforms=True)


@pytest.mark.parametrize(
    "ids, parts",
    [
        ([-1, *range(21)], ["sample_id_column='uid'", "-1", "negative"]),
        ([3, 3, *range(4, 24)], ["sample_id_column='uid'", "3 2 times", "unique"]),
        ([n + 0.5 for n in range(22)], ["sample_id_column='uid'", "float64", "integers"]),
    ],
    ids=["negative", "duplicate", "float"],
)
def test_ids_of_a_dataset(tmp_path, ids, parts):
    items = make_samples("vit").items
    columns = {"pixel_values": [i["pixel_values"].tolist() for i in items], "labels": [i["labels"] for i in items]}
    dataset = datasets.Dataset.from_dict(columns | {"uid": ids}).with_format("torch")
    refused_at_training(tmp_path, *parts, samples=dataset, sample_id_column="uid")


def test_id_column_that_is_missing(tmp_path):
    items = make_samples("vit").items
    columns = {"pixel_values": [i["pixel_values"].tolist() for i in items], "labels": [i["labels"] for i in items]}
    dataset = datasets.Dataset.from_dict(columns)
    refused_at_training(tmp_path, "sample_id_column='uid'", "pixel_values", samples=dataset, sample_id_column="uid")
    refused_at_training(tmp_path, "sample_id_column='uid'", "pixel_values", sample_id_column="uid")


@pytest.mark.parametrize("bad, part", [(-1, "sample_id=-1"), (22, "sample_id=22")])
def test_ids_of_a_torch_dataset_out_of_range(tmp_path, bad, part):
    samples = changed(make_samples("vit"), uid={n: bad for n in range(22)})
    refused_at_training(tmp_path, part, "out of range", "sample_id_column", samples=samples, sample_id_column="uid")


def test_ids_of_a_torch_dataset_that_are_not_unique(tmp_path):
    """Found out at the end of the first epoch, when the predictions of one id disagree in their labels."""
    samples = changed(make_samples("vit"), uid={n: n // 2 for n in range(22)})
    trainer = make_trainer(tmp_path, "vit", samples, sample_id_column="uid")
    refused(trainer.train, "two different labels", "not unique")


NAMES = ("pixel_values", "labels")


def test_items_that_are_no_dictionaries(tmp_path):
    """The trainer needs no dictionaries; `with_sample_ids` does."""

    class Pairs(Samples):
        def __getitem__(self, index):
            return tuple(self.items[index].values())

    samples = Pairs(make_samples("vit").items)
    refused(lambda: with_sample_ids(samples)[0], "tuple", "dictionaries")

    def collate_pairs(pairs):
        return collate([dict(zip(NAMES, pair, strict=True)) for pair in pairs])

    trainer = make_trainer(tmp_path, "vit", samples, data_collator=collate_pairs)
    trainer.train()
    expected = make_trainer(tmp_path, "vit", make_samples("vit"))
    expected.train()
    assert difference(expected, trainer) == 0 and trainer.teacher.stored([5]).isfinite().all()


@pytest.mark.parametrize(("problem", "name"), [("regression", "vit"), ("multi_label_classification", "bert_tokens")])
def test_problem_type(tmp_path, problem, name):
    model = make_model(name)
    model.config.problem_type = problem
    refused_at_training(tmp_path, f"problem_type='{problem}'", "single_label_classification", model=model)


def test_one_label_is_regression(tmp_path):
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
    model = BertForSequenceClassification(config)
    refused_at_training(tmp_path, "num_labels=1", "regression", model=model)


def test_labels_that_are_no_classes(tmp_path):
    multi = Samples([i | {"labels": torch.eye(CLASSES)[i["labels"]]} for i in make_samples("vit").items])
    refused_at_training(
        tmp_path, "float32", "multi_label_classification", "integer class", "SelfKDDataCollator", samples=multi
    )


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_labels_out_of_range(tmp_path, label):
    samples = changed(make_samples("vit"), labels=label)
    refused_at_training(tmp_path, f"label {label} of sample_id=", f"{CLASSES} classes", "num_labels", samples=samples)


def test_labels_that_are_missing(tmp_path):
    samples = Samples([{"pixel_values": i["pixel_values"]} for i in make_samples("vit").items])
    refused_at_training(tmp_path, "no 'labels'", "pixel_values", samples=samples)


def test_task_of_a_bert_that_is_not_supported(tmp_path):
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = BertForPreTraining(config)
    refused_at_training(tmp_path, "BertForPreTraining", "not supported yet", "image", model=model)


def test_model_with_two_heads_is_not_supported(tmp_path):
    model = GPT2DoubleHeadsModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    refused_at_training(tmp_path, "GPT2DoubleHeadsModel", "not supported yet", "sequence", model=model)


def test_model_without_logits(tmp_path):
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, pixel_values, labels=None):
            return {"loss": self.layer(pixel_values.mean((2, 3))).sum(), "scores": pixel_values}

    refused_at_training(tmp_path, "no logits", "scores", "outputs.logits", model=Blind())


def test_several_gpus_without_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    refused_at_training(tmp_path, "4 GPUs", "nn.DataParallel", "torchrun")


def test_liger_kernel(tmp_path):
    trainer = make_trainer(tmp_path, "vit", make_samples("vit"))
    trainer.args.use_liger_kernel = True
    refused(trainer._check_setup, "use_liger_kernel=True", "False")


@pytest.mark.parametrize("name, trainer", [("marian", Seq2SeqSelfKDTrainer), ("llama", SelfKDTrainer)])
def test_liger_kernel_of_language_models(tmp_path, name, trainer):
    made = make_trainer(tmp_path, name, make_samples(name), trainer=trainer)
    made.args.use_liger_kernel = True
    refused(made._check_setup, "use_liger_kernel=True", "False")


PACKED = {"data_collator": DataCollatorWithFlattening()}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_samples_that_the_collator_packs(tmp_path, name):
    samples = make_samples(name)
    parts = ("number of rows", "packs", "teacher='snapshot'")
    refused_at_training(tmp_path, *parts, model=name, samples=samples, teacher="history", **PACKED)
    auto = make_trainer(tmp_path, name, samples, **PACKED)
    auto.train()
    assert auto.teacher.kind == "snapshot"
    one = make_trainer(tmp_path, name, samples, per_device_train_batch_size=1, max_steps=30, **PACKED)
    one.train()  # nothing to merge
    assert logged(one, "rows_with_history")[-1] == 1


def test_samples_that_were_packed_when_the_dataset_was_made(tmp_path):
    packed = [
        {
            "input_ids": one["input_ids"][:7] + two["input_ids"][:7],
            "labels": one["input_ids"][:7] + two["input_ids"][:7],
        }
        for one, two in zip(make_samples("words").items, make_samples("words", seed=1).items, strict=True)
    ]
    trainer = make_trainer(tmp_path, "gpt2", Samples(packed))
    trainer.train()
    assert logged(trainer, "rows_with_history")[-1] == 1


@pytest.mark.parametrize("options", [{"teacher": "snapshot"}, {"teacher": "ema"}, {"alpha": 0.0}], ids=str)
def test_packed_samples_need_no_address_without_a_history(tmp_path, options):
    samples = make_samples("llama")
    trainer = make_trainer(tmp_path, "llama", samples, **PACKED, **options)
    trainer.train()
    plain = make_trainer(tmp_path, "llama", samples, trainer=Trainer, **PACKED)
    plain.train()
    assert (difference(trainer, plain) == 0) == ("alpha" in options)


def test_causal_model_that_does_not_shift(tmp_path):
    """Its loss compares every position with its own label: trained as it stands it would learn to copy."""
    config = BartConfig(vocab_size=VOCABULARY, d_model=8, decoder_layers=1, decoder_attention_heads=1, init_std=0.3)
    model, samples = BartForCausalLM(config), make_samples("words")
    for options in ({}, {"teacher": "snapshot"}):
        refused_at_training(tmp_path, "BartForCausalLM", "next one", model=model, samples=samples, **options)
    plain = make_trainer(tmp_path, copy.deepcopy(model), samples, trainer=Trainer)
    plain.train()
    ours = make_trainer(tmp_path, copy.deepcopy(model), samples, alpha=0.0)
    ours.train()
    assert difference(plain, ours) == 0


@pytest.mark.parametrize("label", [VOCABULARY, -1])
@pytest.mark.parametrize("name", ["marian", "gpt2", "bert_mlm"])
def test_token_labels_out_of_range(tmp_path, name, label):
    samples = make_samples(name)
    for item in samples.items:
        item["labels"] = [*item["labels"][:-1], label]
    refused_at_training(tmp_path, f"{VOCABULARY} classes", model=name, samples=samples)


def test_subclass_of_a_model_without_a_method_for_the_decoders_inputs(tmp_path):
    """Of the user's own, in another module than M2M100."""
    model = make_model("m2m100")
    model.__class__ = type("Own", (type(model),), {"__module__": __name__})
    own = make_trainer(tmp_path, model, make_samples("pairs"), trainer=Seq2SeqSelfKDTrainer)
    own.train()
    same = make_trainer(tmp_path, "m2m100", make_samples("pairs"), trainer=Seq2SeqSelfKDTrainer)
    same.train()
    assert difference(own, same) == 0


def test_labels_of_another_length_than_the_predictions(tmp_path):
    """A masked model with the labels of a translation."""

    def longer(items):
        batch = collate(items)
        return batch | {"labels": torch.cat((batch["labels"], batch["labels"]), dim=1)}

    refused_at_training(
        tmp_path,
        "predictions of tokens",
        model="bert_mlm",
        samples=make_samples("masked"),
        data_collator=longer,
        label_smoothing_factor=0.1,
        alpha=0.0,
    )


def test_compute_loss_that_would_be_passed_over(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

    class After(SelfKDMixin, Own):
        pass

    class Before(Own, SelfKDMixin, Trainer):
        pass

    refused_at_training(tmp_path, "Own.compute_loss", "compute_loss_func", "before SelfKDMixin", trainer=After)
    make_trainer(tmp_path, "vit", make_samples("vit"), trainer=Before)


def test_more_entries_than_classes(tmp_path):
    refused_at_training(tmp_path, "history_top_k=9", f"{CLASSES} classes", "leave it out", history_top_k=9)


def test_history_over_the_limit(tmp_path):
    message = refused_at_training(tmp_path, "22 rows x 5 classes", "880 bytes", "200", history_max_bytes=200)
    assert "history_top_k=1" in message
    smaller = make_trainer(
        tmp_path, "vit", make_samples("vit"), history_max_bytes=200, history_top_k=1, history_dtype="float16"
    )
    smaller.train()
    assert np.isfinite(smaller.state.log_history[-1]["train_loss"])


def test_history_that_nothing_fits(tmp_path):
    refused_at_training(tmp_path, "880 bytes", "teacher='snapshot'", history_max_bytes=20)


def test_mixing_every_batch_with_a_history(tmp_path):
    collator = SelfKDDataCollator(mixup_alpha=0.2)
    refused_at_training(
        tmp_path, "mix_probability=1.0", "snapshot", "below 1", data_collator=collator, teacher="history"
    )


def test_mixing_of_a_loss_that_takes_one_label(tmp_path):
    class Weighted(type(make_model("vit"))):
        def forward(self, pixel_values, labels=None, **keywords):
            outputs = super().forward(pixel_values=pixel_values)
            if labels is not None:
                weight = torch.arange(1.0, CLASSES + 1)
                outputs["loss"] = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight)
            return outputs

    model = Weighted(make_model("vit").config)
    collator = SelfKDDataCollator(mixup_alpha=0.2)
    refused_at_training(tmp_path, "compute_loss_func", model=model, data_collator=collator, teacher="snapshot")


def test_mixing_without_images(tmp_path):
    collator = SelfKDDataCollator(lambda items: {"input_ids": torch.zeros(4, 3), "labels": torch.zeros(4)}, 0.2)
    training = TrainingCollator(collator.collator, collator)
    refused(lambda: training([{"x": 1}] * 4), "mixup_alpha=0.2", "pixel_values", "input_ids")
    refused(lambda: collator([{"x": 1}] * 4), "SelfKDTrainer", "data_collator")


def test_poisoned_past_does_not_reach_plain_training(tmp_path):
    """Alpha 0 with a history kept for its trace: NaN in it changes nothing."""
    expected = make_trainer(tmp_path, "vit", make_samples("vit"), alpha=0.0)
    expected.train()
    trainer = make_trainer(tmp_path, "vit", make_samples("vit"), alpha=0.0, history_trace=True)

    def poison(*arguments, **keywords):
        if trainer.teacher.history is not None and trainer.teacher.history.table:
            trainer.teacher.history.table["log_probs"].fill_(float("nan"))

    step = trainer.training_step
    trainer.training_step = lambda *arguments: (poison(), step(*arguments))[1]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(state_of(expected).values(), state_of(trainer).values(), strict=True))
