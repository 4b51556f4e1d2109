"""Scripts that work with `Trainer` and once broke when the class was changed: data, labels, models and arguments."""

import logging
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import lines_of
from helpers import (
    CLASSES,
    MASK,
    Samples,
    Stream,
    collate,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    same_weights,
    train,
)
from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from hf_selfkd import SelfKDTrainer, Seq2SeqSelfKDTrainer
from hf_selfkd.models import num_classes_of
from hf_selfkd.tasks import task_for


pytestmark = pytest.mark.trains


def told(lines):
    """What was said of the choice of a teacher."""
    return [line for line in lines if "teacher='auto'" in line]


# Collators


def drops_last(items):
    return collate(items[:-1] if len(items) > 1 else items)


def two_views(items):
    return collate([item for item in items for _ in range(2)])


def tokens_packed(items):
    """All samples of a batch in one row."""
    batch = collate(items)
    row = {name: value.reshape(1, -1) for name, value in batch.items()}
    return {name: row[name][:, :16] for name in row}


def by_views(items):
    """Two views of all, one after the other."""
    batch = collate(items)
    return {name: torch.cat([value, value]) for name, value in batch.items()}


COLLATORS = {
    "drops": ("bert", drops_last),
    "two views": ("vit", two_views),
    "views in a row": ("vit", by_views),
    "packed": ("gpt2", tokens_packed),
}


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"teacher": "snapshot"}, {"teacher": "ema"}, {}], ids=str)
@pytest.mark.parametrize("kind", COLLATORS)
def test_collators_of_other_numbers_of_rows_train(tmp_path, kind, options):
    """Where no ids are needed they are not missed; `auto` finds the snapshot, and alpha 0 is plain training."""
    name, collator = COLLATORS[kind]
    samples = make_samples(name, 12)
    with lines_of("hf_selfkd") as lines:
        ours = train(tmp_path, name, samples, data_collator=collator, **options)
    assert bool(logged(ours, "soft_loss")) == (options.get("alpha") != 0)
    assert len(told(lines)) == (options == {}) and all("snapshot" in line for line in told(lines))
    if options.get("alpha") == 0:
        stock = train(tmp_path, name, samples, trainer=Trainer, data_collator=collator)
        assert same_weights(ours.model, stock.model) or name == "gpt2"  # whose count upstream takes wrong


@pytest.mark.parametrize("kind", COLLATORS)
def test_collators_of_other_numbers_of_rows_have_no_history(tmp_path, kind):
    name, collator = COLLATORS[kind]
    trainer = make_trainer(tmp_path, name, make_samples(name, 12), data_collator=collator, teacher="history")
    refused(trainer.train, "collator", "teacher='history'", "teacher='snapshot'")
    assert trainer.state.global_step == 0


def masks_tensors(items):
    batch = collate(items)
    words, masked = batch["input_ids"], torch.rand(batch["input_ids"].shape) < 0.5
    masked[:, 0] = True
    return batch | {"labels": words.masked_fill(~masked, -100), "input_ids": words.masked_fill(masked, MASK)}


def masks_arrays(items):
    """With the generator of NumPy, and only a few words."""
    batch = collate(items)
    masked = torch.from_numpy(np.random.rand(*batch["input_ids"].shape) < 0.2)
    return batch | {"labels": batch["input_ids"].masked_fill(~masked, -100)}


def masks_items(item):
    """Not in the collator but in the dataset."""
    words = torch.tensor(item["input_ids"])
    masked = torch.rand(len(words)) < 0.5
    masked[0] = True
    return item | {"labels": words.masked_fill(~masked, -100).tolist()}


@pytest.mark.parametrize(
    ("collator", "transform"), [(masks_tensors, None), (masks_arrays, None), (collate, masks_items)]
)
def test_random_masks_are_known_before_the_first_step(tmp_path, collator, transform):
    samples = Samples(make_samples("texts", 12).items, transform)
    samples.items = [{"input_ids": item["input_ids"]} for item in samples.items]
    options = {"data_collator": collator}
    if transform is None:
        options["data_collator"] = lambda items: collator([item | {"labels": 0} for item in items])
    with lines_of("hf_selfkd") as lines:
        auto = train(tmp_path, "bert_mlm", samples, **options)
    assert len(told(lines)) == 1 and "snapshot" in told(lines)[0] and logged(auto, "soft_loss")[-1] > 0
    named = make_trainer(tmp_path, "bert_mlm", samples, teacher="history", **options)
    refused(named.train, "random masking", "teacher='snapshot'")
    assert named.state.global_step == 0


# Labels


LABELLED = [{}, {"teacher": "snapshot"}, {"alpha": 0.0}, {"teacher": "ema"}, {"dataloader_num_workers": 1}]


@pytest.mark.parametrize("options", LABELLED, ids=str)
@pytest.mark.parametrize("name", ["bert", "bert_tokens", "gpt2", "marian"])
@pytest.mark.parametrize("label", [99, -1])
def test_a_label_out_of_range_in_a_later_batch_is_named(tmp_path, name, label, options):
    """Labels are on the host: every batch is checked before the model sees it, and the sample is told."""
    samples = make_samples(name, 12)
    bad = samples.items[9]
    bad["labels"] = [*bad["labels"][:-1], label] if isinstance(bad["labels"], list) else label
    options = options | {"train_sampling_strategy": "sequential"}
    options |= {"trainer": Seq2SeqSelfKDTrainer} if name == "marian" else {}
    trainer = make_trainer(tmp_path, name, samples, **options)
    refused(trainer.train, f"label {label}", "sample_id=9", "classes")
    assert trainer.state.global_step == 2


def test_soft_labels_of_torchvision_are_refused_by_their_name(tmp_path):
    """As MixUp and CutMix make them in a collator; at alpha 0 the model learns from them as with `Trainer`."""

    def mixes(items):
        batch = collate(items)
        labels = F.one_hot(batch["labels"], CLASSES).float()
        return batch | {"labels": 0.7 * labels + 0.3 * labels.roll(1, 0)}

    trainer = make_trainer(tmp_path, "vit", make_samples("vit", 8), data_collator=mixes)
    message = refused(trainer.train, "MixUp", "CutMix", "SelfKDDataCollator")
    assert "regression" not in message and trainer.state.global_step == 0
    plain = [
        train(tmp_path, "vit", make_samples("vit", 8), data_collator=mixes, trainer=trainer, **options)
        for trainer, options in ((Trainer, {}), (SelfKDTrainer, {"alpha": 0.0}), (SelfKDTrainer, {"teacher": "none"}))
    ]
    assert all(same_weights(one.model, plain[0].model) for one in plain)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", ["B", "B1"])
@pytest.mark.parametrize("heads", [None, "byot", "joint"])
def test_labels_of_other_types_and_shapes(tmp_path, dtype, shape, heads):
    def collator(items):
        batch = collate(items)
        labels = batch["labels"].to(dtype)
        return batch | {"labels": labels if shape == "B" else labels.unsqueeze(1)}

    samples = make_samples("plain_deep_vit", 8)
    options = {"num_train_epochs": 2, "auxiliary_heads": heads, "teacher": "history" if heads is None else "auto"}
    ours = train(tmp_path, "plain_deep_vit", samples, data_collator=collator, **options)
    plain = train(tmp_path, "plain_deep_vit", samples, **options)
    assert same_weights(ours.model, plain.model)


# Models


class OwnNames(nn.Module):
    """A module with `config.num_classes` and no `num_labels`, whose forward takes no labels."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_classes=classes)
        self.layer = nn.Linear(3 * 16 * 16, classes)

    def forward(self, pixel_values):
        return {"logits": self.layer(pixel_values.flatten(1))}


class TakesTarget(OwnNames):
    """Labels under a name of their own."""

    def forward(self, pixel_values, target=None):
        logits = self.layer(pixel_values.flatten(1))
        return {"logits": logits} if target is None else {"loss": F.cross_entropy(logits, target), "logits": logits}


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
@pytest.mark.parametrize("classes", [1 + CLASSES, CLASSES])
def test_models_with_a_number_of_classes_of_their_own(tmp_path, teacher, classes):
    """Without `num_labels`, and with a forward that takes no labels: the rows have plain cross-entropy."""
    model = OwnNames(classes)
    assert num_classes_of(model) is None
    options = {"remove_unused_columns": False, "teacher": teacher, "label_names": ["labels"]}
    trainer = train(tmp_path, model, make_samples("vit", 8), **options)
    assert logged(trainer, "soft_loss")[-1] > 0


def test_a_label_name_that_is_told_works_and_one_that_is_not_is_asked_for(tmp_path):
    items = [{"pixel_values": i["pixel_values"], "target": i["labels"]} for i in make_samples("vit", 8).items]
    samples = Samples(items)

    def collator(items):
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "target": torch.tensor([item["target"] for item in items]),
        }

    told_name = train(tmp_path, TakesTarget(), samples, data_collator=collator, label_names=["target"])
    assert logged(told_name, "soft_loss")[-1] > 0
    untold = make_trainer(tmp_path, TakesTarget(), samples, data_collator=collator)
    refused(untold.train, "label_names", "target")


def test_warm_start_with_rotated_heads(tmp_path):
    """The pass before training shows upright views to the model alone."""
    options = {"auxiliary_heads": "joint", "warm_start_teacher": True, "num_train_epochs": 1}
    for teacher in ("history", "snapshot"):
        for size in (1, 3, 8):
            trainer = train(
                tmp_path, "vit", make_samples("vit", 8), teacher=teacher, per_device_eval_batch_size=size, **options
            )
            assert logged(trainer, "soft_loss")[0] > 0 and logged(trainer, "rows_with_history")[0] == 1


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("name", ["bert", "gpt2", "bert_tokens"])
def test_warm_start_does_not_depend_on_the_size_of_evaluation_batches(tmp_path, name, size):
    options = {"teacher": "history", "warm_start_teacher": True, "num_train_epochs": 1, "learning_rate": 0.0}
    trainer = train(tmp_path, name, make_samples(name, 8), per_device_eval_batch_size=size, **options)
    assert logged(trainer, "rows_with_history") == [1.0, 1.0]


def test_a_head_whose_weights_are_elsewhere_tells_no_classes():
    """Weights sharded by ZeRO-3 have no elements: the outputs tell how many classes there are."""
    model = make_model("gpt2")
    assert num_classes_of(model) == 30
    model.lm_head.weight = nn.Parameter(torch.empty(0, 16))
    assert num_classes_of(model) is None
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    assert num_classes_of(model) is None and task_for(model).num_classes is None


# What the user reads


QUIET = [(name, Trainer, SelfKDTrainer) for name in ("bert", "vit", "gpt2", "llama", "bert_mlm", "wav2vec2")]
QUIET += [(name, Seq2SeqTrainer, Seq2SeqSelfKDTrainer) for name in ("marian", "bart", "t5", "m2m100", "mbart")]


def said(run):
    """Every warning of a run, and every line that transformers logs, without numbers."""
    logging.Logger.warning_once.cache_clear()  # what is said once in a process may be said again
    with lines_of("transformers") as lines, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    found = [line.split(":")[0] for line in lines] + [str(warning.message) for warning in caught]
    return {"".join(c for c in line[:60] if not c.isdigit()) for line in found}


@pytest.mark.parametrize(("name", "stock", "own"), QUIET)
def test_a_run_says_nothing_that_a_stock_run_does_not_say(tmp_path, caplog, name, stock, own):
    """No deprecation of arguments that nobody gave, no warning of caches, in training and evaluation."""
    samples = make_samples(name, 8)
    options = {"eval_dataset": samples, "eval_strategy": "epoch", "num_train_epochs": 2}
    expected = said(lambda: train(tmp_path / "stock", name, samples, trainer=stock, **options))
    found = said(lambda: train(tmp_path / "ours", name, samples, trainer=own, **options))
    assert found <= expected and len(expected) > 2
    ours = [record for record in caplog.records if record.name.startswith("hf_selfkd")]
    assert not [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


# Choosing a teacher


@pytest.mark.parametrize(
    ("make", "options", "kind"),
    [
        (lambda: make_samples("bert", 8), {}, "history"),
        (lambda: make_samples("bert", 8), {"num_train_epochs": 1}, "none"),
        (lambda: make_samples("bert", 8), {"max_steps": 2}, "none"),
        (lambda: make_samples("bert", 8), {"num_train_epochs": 1, "warm_start_teacher": True}, "history"),
        (lambda: Stream(make_samples("bert", 8)), {"max_steps": 6}, "snapshot"),
        (lambda: make_samples("bert", 8), {"teacher_dropout": True}, "snapshot"),
        (lambda: make_samples("bert", 8), {"auxiliary_heads": "lsskd"}, "snapshot"),
    ],
)
def test_auto_is_what_data_and_length_allow_and_says_so_once(tmp_path, make, options, kind):
    name = "vit" if "auxiliary_heads" in options else "bert"
    samples = make_samples("vit", 8) if name == "vit" else make()
    with lines_of("hf_selfkd") as lines:
        trainer = train(tmp_path, name, samples, **options)
    assert trainer.teacher.kind == kind
    assert len(told(lines)) == (kind != "history") and all(repr(kind) in line for line in told(lines))


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_a_teacher_asked_for_by_name_is_refused_by_name(tmp_path, teacher):
    short = make_trainer(tmp_path, "bert", make_samples("bert", 8), teacher=teacher, num_train_epochs=1)
    refused(short.train, f"teacher={teacher!r}", "2 epochs")
    assert short.state.global_step == 0
