"""`LoopDistiller`: the method in loops without a trainer, against `SelfKDTrainer` and a loop by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectors import Scenes, collate_scenes, make_detector
from helpers import (
    CLASSES,
    VOCABULARY,
    Recording,
    difference,
    make_model,
    make_samples,
    make_trainer,
    refused,
    same_weights,
    state_of,
)
from loops import EPOCHS, SIZE, Loop, loader_of, sgd
from torch import nn
from transformers import Seq2SeqTrainer

from hf_selfkd import AuxiliaryHeadsConfig, LoopDistiller, MethodArguments, SelfKDMixin, attach_auxiliary_heads


pytestmark = pytest.mark.trains


BYOT, ROTATED = (AuxiliaryHeadsConfig.preset(name) for name in ("byot", "lsskd"))

# What is asked of both, the model, and the heads that it has.
RUNS = {
    "history": ({"teacher": "history"}, "plain_bert", None),
    "history_top_k": ({"teacher": "history", "history_top_k": 3, "history_device": "disk"}, "plain_bert", None),
    "history_temperature": ({"teacher": "history", "temperature": 2.0, "history_trace": True}, "resnet", None),
    "snapshot": ({"teacher": "snapshot"}, "resnet", None),
    "snapshot_warm": ({"teacher": "snapshot", "warm_start_teacher": True}, "plain_vit", None),
    "ema": ({"teacher": "ema", "ema_decay": 0.7}, "resnet", None),
    "rank": ({"teacher": "rank"}, "plain_vit", None),
    "predictions": ({"teacher": "predictions", "teacher_predictions": "predictions.npz"}, "plain_vit", None),
    "none": ({"teacher": "none"}, "plain_bert", None),
    "constant": ({"teacher": "history", "alpha_schedule": "constant", "alpha": 0.5}, "plain_vit", None),
    "linear_step": ({"teacher": "history", "alpha_schedule": "linear_step"}, "plain_vit", None),
    "auto": ({}, "plain_vit", None),
    "tokens": ({"teacher": "history"}, "plain_bert_tokens", None),
    "causal_chunked": ({"teacher": "history", "chunked_logits": True, "history_top_k": 4}, "plain_gpt2", None),
    "translation": ({"teacher": "history"}, "plain_marian", None),
    "heads": ({"teacher": "history"}, "plain_deep_vit", BYOT),
    "heads_rotated": ({}, "plain_deep_vit", ROTATED),
}


class Recorded(Recording):
    """A trainer that notes its batches."""


class RecordedSeq2Seq(SelfKDMixin, Seq2SeqTrainer):
    compute_loss = Recording.compute_loss


def trained(out, name, **options):
    """A run of the trainer by SGD, as it was made, and its micro-batches with their ids."""
    method, kind, heads = RUNS[name]
    model = make_model(kind)
    if heads is not None:
        attach_auxiliary_heads(model, heads)
    options = {"optimizers": (sgd(model), None), "lr_scheduler_type": "constant", "max_grad_norm": 0.0} | options
    trainer = make_trainer(out, model, make_samples(kind, SIZE), Recorded, **options, **method)
    trainer.train()
    return trainer, [batch for _, batch in trainer.visits]


class Replayed(Loop):
    """A loop over batches that are other ones in each epoch."""

    def run(self, steps=None):
        every, size = self.batches, len(self.batches) // EPOCHS
        for epoch in range(EPOCHS):
            self.batches, self.done = every[epoch * size : (epoch + 1) * size], 0
            super().run(size)
        return self


def looped(name, batches, **options):
    method, kind, heads = RUNS[name]
    model = make_model(kind)
    if heads is not None:
        attach_auxiliary_heads(model, heads)
    if "linear_step" in name:
        options["total_steps"] = len(batches)
    return Replayed(model, method, batches, **options).run()


@pytest.mark.parametrize("name", RUNS)
def test_a_loop_follows_the_trainer_to_the_bit(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    np.savez("predictions.npz", probs=np.random.default_rng(0).dirichlet(np.ones(CLASSES), SIZE).astype(np.float32))
    trainer, batches = trained(tmp_path, name)
    assert len({tuple(batch["sample_id"].tolist()) for batch in batches}) > len(batches) // EPOCHS  # shuffled anew
    loop = looped(name, batches)
    assert same_weights(loop.model, trainer.model)
    assert loop.distiller.epoch == EPOCHS and loop.distiller.steps == trainer.state.global_step
    if trainer.teacher.kind == "history":
        ids = np.arange(SIZE if RUNS[name][1] in ("plain_bert", "plain_vit", "resnet") else 3)
        torch.testing.assert_close(loop.distiller.teacher.stored(ids), trainer.teacher.stored(ids), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["history", "snapshot", "ema"])
def test_what_the_teacher_says_matters(tmp_path, name):
    """The control of the test above."""
    trainer, batches = trained(tmp_path, name)
    plain = Replayed(RUNS[name][1], {"teacher": "none"}, batches).run()
    assert difference(plain.model, trainer.model) > 1e-4


@pytest.mark.parametrize("name", ["history", "ema", "tokens", "translation"])
def test_accumulation_follows_the_trainer(tmp_path, name):
    """With what the rows of a step are divided by; 24 samples in steps of 2 x 4, the rows of which differ."""
    trainer, batches = trained(tmp_path, name, gradient_accumulation_steps=2)
    method, kind, _ = RUNS[name]
    loop = Loop(kind, method, batches, accumulation_steps=2)
    for first in range(0, len(batches), 2):
        group = batches[first : first + 2]
        num_items = loop.distiller.num_items(group)
        for batch in group:
            loop.distiller.step(loop.model, batch, num_items=num_items).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        if (first + 2) % (SIZE // 4) == 0:
            loop.distiller.end_epoch()
    assert loop.distiller.steps == trainer.state.global_step
    assert difference(loop.model, trainer.model) < 1e-7


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_object_detection(tmp_path, teacher):
    scenes = Scenes()
    options = {"data_collator": collate_scenes, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    model = make_detector()
    optimizers = (sgd(model), None)
    trainer = make_trainer(tmp_path, model, scenes, Recorded, optimizers=optimizers, teacher=teacher, **options)
    trainer.train()
    batches = [batch for _, batch in trainer.visits]
    found = Replayed(make_detector(), {"teacher": teacher}, batches, num_samples=len(scenes)).run()
    assert difference(found.model, trainer.model) < 1e-6
    plain = Replayed(make_detector(), {"teacher": "none"}, batches, num_samples=len(scenes)).run()
    assert difference(plain.model, trainer.model) > 1e-6


# By hand


def by_hand(model, batches, alpha, autocast=False):
    """PS-KD as its authors describe it: a table of predictions, soft targets, cross-entropy."""
    optimizer, past = sgd(model), {}
    for epoch in range(EPOCHS):
        weight, present = alpha * (epoch + 1) / EPOCHS, {}
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(pixel_values=batch["pixel_values"]).logits.float()
            hard = F.one_hot(batch["labels"], CLASSES).float()
            ids = batch["sample_id"].tolist()
            target = hard if not past else (1 - weight) * hard + weight * torch.stack([past[i] for i in ids])
            loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            present |= dict(zip(ids, logits.detach().softmax(-1), strict=True))
        past = present
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loop_by_hand_gives_the_same_weights(autocast):
    batches = list(loader_of())
    expected = by_hand(make_model("plain_vit").train(), batches, 0.8, autocast)
    found = Loop("plain_vit", {"teacher": "history", "alpha": 0.8}, batches, autocast).run()
    assert difference(found.model, expected) < (1e-3 if autocast else 1e-6)
    assert difference(by_hand(make_model("plain_vit").train(), batches, 0.0), expected) > 1e-4


class Net(nn.Module):
    """A model of plain PyTorch: positional names of its own, logits as they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))

    def forward(self, x):
        return self.layers(x)


def test_a_module_that_returns_logits():
    batches = list(loader_of())
    named = [{"x": b["pixel_values"], "labels": b["labels"], "sample_id": b["sample_id"]} for b in batches]
    found = Loop(Net(), {"teacher": "history", "alpha": 0.5}, named).run()

    class Wrapped(Net):
        def forward(self, pixel_values):
            return type("Outputs", (), {"logits": self.layers(pixel_values)})

    assert difference(found.model, by_hand(Wrapped(), batches, 0.5)) < 1e-6


# Saving


@pytest.mark.parametrize(
    "teacher, model, heads, stop",
    [
        ("history", "bert", None, 9),
        ("history", "vit", None, 6),
        ("snapshot", "vit", None, 8),
        ("snapshot", "resnet", None, 6),
        ("ema", "resnet", None, 9),
        ("history", "vit", BYOT, 8),
        ("rank", "vit", None, 7),
        ("history", "bert_tokens", None, 8),
        ("history", "vit", None, 0),
    ],
)
def test_a_loop_goes_on_to_the_bit(tmp_path, teacher, model, heads, stop):
    """With dropout; in the middle of an epoch, at its end, before the first step."""
    batches = [b | {"sample_id": torch.arange(4 * n, 4 * n + 4)} for n, b in enumerate(loader_of(model))]

    def make():
        bare = make_model(model)
        return Loop(bare if heads is None else attach_auxiliary_heads(bare, heads), {"teacher": teacher}, batches)

    torch.manual_seed(1)
    whole = make().run()
    torch.manual_seed(1)
    half = make().run(stop)
    half.save(tmp_path / "state.pt")
    half.run(2)  # what comes after does not reach the file
    torch.manual_seed(7)
    again = make().load(tmp_path / "state.pt").run()
    assert same_weights(again.model, whole.model)
    assert again.distiller.steps == whole.distiller.steps == EPOCHS * len(batches)


def test_a_state_with_accumulation(tmp_path):
    batches = list(loader_of())
    options = {"teacher": "ema", "ema_decay": 0.6}
    whole = Loop("plain_vit", options, batches, accumulation_steps=4).run()  # 4 + 2 micro-batches an epoch
    assert whole.distiller.steps == 2 * EPOCHS
    Loop("plain_vit", options, batches, accumulation_steps=4).run(10).save(tmp_path / "state.pt")
    again = Loop("plain_vit", options, batches, accumulation_steps=4).load(tmp_path / "state.pt").run()
    assert same_weights(again.model, whole.model)


def test_a_state_of_another_run_is_refused(tmp_path):
    batches = list(loader_of())
    state = Loop("plain_vit", {"teacher": "history"}, batches).run(7).distiller.state_dict()
    other = Loop("plain_vit", {"teacher": "snapshot"}, batches).distiller
    refused(lambda: other.load_state_dict(state), "'history'", "'snapshot'", "same teacher")
    smaller = Loop("plain_vit", {"teacher": "history"}, batches, num_samples=20).distiller
    refused(lambda: smaller.load_state_dict(state), "24 samples", "20")
    with_heads = attach_auxiliary_heads(make_model("vit"), ROTATED)
    heads = Loop(with_heads, {"teacher": "history"}, batches).distiller
    refused(lambda: heads.load_state_dict(state), "head0", "auxiliary heads")


# What is logged


def test_metrics_are_those_of_the_trainer(tmp_path):
    trainer, batches = trained(tmp_path, "history")
    loop = Loop("plain_bert", {"teacher": "history"}, batches[:6])
    logs = [entry for entry in trainer.state.log_history if "hard_loss" in entry]
    for batch, expected in zip(batches[:6], logs, strict=False):
        loss, outputs = loop.distiller.step(loop.model, batch, return_outputs=True)
        assert outputs.logits.shape == (4, CLASSES)
        loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        for name, value in loop.distiller.take_metrics().items():
            assert expected[name] == pytest.approx(value, abs=1e-4), name


# Misuse


def distiller_of(model=None, method=None, **options):
    options = {"num_samples": SIZE, "num_epochs": EPOCHS} | options
    return LoopDistiller(model or make_model("plain_vit"), MethodArguments(**(method or {})), **options)


@pytest.mark.parametrize(
    "method, parts",
    [
        ({"auxiliary_heads": "byot"}, ("auxiliary_heads='byot'", "attach_auxiliary_heads")),
        ({"seed_transforms": True}, ("seed_transforms=True", "dataset")),
        ({"sample_id_column": "number"}, ("sample_id_column='number'", "step()")),
        ({"alpha_schedule": "calibrated"}, ("calibrated", "'linear'")),
        ({"alpha_schedule": "linear_step"}, ("linear_step", "total_steps")),
        ({"teacher": "history", "warm_start_teacher": True}, ("warm_start_teacher", "snapshot")),
    ],
)
def test_what_only_a_trainer_does_is_refused(method, parts):
    refused(lambda: distiller_of(method=method), *parts)


def test_numbers_that_cannot_be(caplog):
    refused(lambda: distiller_of(num_epochs=0), "num_epochs=0")
    refused(lambda: distiller_of(num_epochs=1, method={"teacher": "history"}), "1 epoch", "no earlier epoch")
    refused(lambda: distiller_of(num_samples=None, method={"teacher": "history"}), "num_samples", "snapshot")
    assert distiller_of(num_samples=None).teacher.kind == "snapshot"
    assert "num_samples=None" in caplog.text


def test_models_that_cannot_be():
    refused(lambda: distiller_of(nn.DataParallel(make_model("plain_vit"))), "DataParallel", "torchrun")
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
    sharded.layer = nn.Linear(2, 2)
    refused(lambda: distiller_of(sharded, {"teacher": "snapshot"}), "snapshot", "FullyShardedDataParallel")


def test_misuse_of_a_step():
    model, batches = make_model("plain_vit"), list(loader_of())
    distiller = distiller_of(model, {"teacher": "history"})
    without = {name: value for name, value in batches[0].items() if name != "sample_id"}
    refused(lambda: distiller.step(model, without), "no ids", "history", "with_sample_ids")
    refused(lambda: distiller.step(model, without, ids=[0.5] * 4), "ids of shape [4]", "integer")
    refused(lambda: distiller.step(model, without, ids=[0, 1, 2]), "4 rows of labels for 3 samples")
    refused(lambda: distiller.step(model, without, ids=[0, 1, 2, SIZE]), str(SIZE))
    with torch.no_grad():
        refused(lambda: distiller.step(model, batches[0]), "no_grad", "evaluate")
    refused(distiller_of().end_epoch, "end_epoch()", "without a step")


def test_ids_may_be_given_in_any_form():
    batches = list(loader_of())
    expected = Loop("plain_vit", {"teacher": "history"}, batches).run().model
    for form in (list, np.array, torch.tensor):
        model = make_model("plain_vit").train()
        distiller, optimizer = distiller_of(model, {"teacher": "history"}), sgd(model)
        for _ in range(EPOCHS):
            for batch in batches:
                batch = dict(batch)
                ids = form(batch.pop("sample_id").tolist())
                distiller.step(model, batch, ids).backward()
                optimizer.step()
                optimizer.zero_grad()
            distiller.end_epoch()
        assert same_weights(model, expected)


def test_an_epoch_that_was_not_ended_and_one_too_many():
    loop = Loop("plain_vit", {"teacher": "snapshot"}, loader_of())
    for batch in loop.batches:
        assert set(batch) == {"pixel_values", "labels", "sample_id"}
        loop.distiller.step(loop.model, batch)
        assert "sample_id" in batch  # the user's batch is left as it is
    refused(lambda: loop.distiller.step(loop.model, loop.batches[0]), "epoch 1", "call end_epoch()")
    loop = Loop("plain_vit", {"teacher": "snapshot"}, loader_of()).run()
    refused(lambda: loop.distiller.step(loop.model, loop.batches[0]), f"num_epochs={EPOCHS}", "plan more")
    loop = Loop("plain_vit", {"alpha_schedule": "linear_step"}, loader_of(), total_steps=2).run(2)
    refused(lambda: loop.distiller.step(loop.model, loop.batches[2]), "total_steps=2", "plan more")


def test_the_last_batch_may_be_filled_up_with_samples_seen_before():
    batches = list(loader_of())
    batches[-1] = {name: torch.cat([value[:2], batches[0][name][:2]]) for name, value in batches[-1].items()}
    loop = Loop("plain_vit", {"teacher": "history"}, batches, num_samples=SIZE).run()
    assert np.isfinite(loop.losses).all()


def test_a_chunked_head_is_given_back():
    model = make_model("plain_gpt2").train()
    kind = type(model.get_output_embeddings())
    batches = [b | {"sample_id": torch.arange(4 * n, 4 * n + 4)} for n, b in enumerate(loader_of("plain_gpt2"))]
    loop = Loop(model, {"teacher": "history", "chunked_logits": True}, batches).run()
    assert type(loop.model.get_output_embeddings()) is kind
    assert loop.model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, VOCABULARY)
    assert state_of(loop.model).keys() == state_of(make_model("plain_gpt2")).keys()
