"""Ranks of the present scores as the teacher: against the formula row by row, in training, and what is refused."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    Stream,
    collate,
    difference,
    logged,
    make_model,
    make_samples,
    refused,
    train,
)
from test_predictions import SGD, visited
from test_resume import check_resume, saves

from hf_selfkd import SelfKDConfig, SelfKDDataCollator, SelfKDTrainer
from hf_selfkd.losses.rank import label_offset, zipf_divergence


pytestmark = pytest.mark.trains


def naive_divergence(logits, labels, ranks=None):
    """Zipf's label smoothing, row by row and class by class, in float64."""
    values = []
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        if label == -100:
            values.append(row.sum() * 0)
            continue
        others = torch.cat((row[:label], row[label + 1 :]))
        order = sorted(range(len(others)), key=lambda n: -others[n].item())
        law = torch.tensor([1 / (1 + place) for place in range(len(others))], dtype=torch.float64)
        if ranks is not None:
            law[ranks:] = law[ranks:].mean()
        law = law / law.sum()
        target = torch.zeros_like(others)
        for place, n in enumerate(order):
            target[n] = law[place]
        values.append(F.kl_div(others.log_softmax(-1), target, reduction="sum"))
    return torch.stack(values)


def naive_offset(logits, labels):
    """The target part of USKD less cross-entropy, from probabilities."""
    keep = labels != -100
    values = torch.zeros(len(logits), dtype=torch.float64)
    p = logits[keep].double().softmax(-1)[torch.arange(int(keep.sum())), labels[keep]]
    square = p.detach() ** 2
    values[keep] = -(square - square.mean()) * p.log()
    return values


@pytest.mark.parametrize("shape", [(1, 3), (7, 10), (5, 1025), (6, 1500), (400, 6000)], ids=str)
@pytest.mark.parametrize("term", [zipf_divergence, label_offset])
def test_values_and_gradients(shape, term):
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape)
    labels = torch.randint(0, shape[1], shape[:1])
    labels[1::3] = -100
    if shape[0] == 400:
        labels[40:] = -100  # the naive loop is slow; the chunks are walked through all the same
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = term(ours, labels)
    if term is label_offset:
        reference = naive_offset(theirs, labels)
    else:
        reference = naive_divergence(theirs, labels, None if shape[1] <= 1025 else 256)
    assert loss.dtype == torch.float32 and loss.shape == shape[:1]
    torch.testing.assert_close(loss.double(), reference, atol=2e-5, rtol=1e-5)
    weights = torch.rand(shape[0])
    (loss * weights).sum().backward()
    (reference * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)


def test_the_divergence_is_0_at_zipfs_law_and_blind_to_the_label():
    law = 1 / torch.arange(1, 10.0)
    logits = torch.cat((torch.zeros(1), (law / law.sum()).log()))[None].repeat(3, 1)
    logits[:, 0] = torch.tensor([-5.0, 0.0, 9.0])  # how sure the model is of the label
    logits.requires_grad_()
    loss = zipf_divergence(logits, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(3, 10), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_impossible_classes(dtype):
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, 3:6] = -torch.inf
    logits.requires_grad_()
    labels = torch.tensor([0, 1, 2, -100])
    loss = zipf_divergence(logits, labels)
    torch.testing.assert_close(loss, zipf_divergence(logits.float(), labels))
    (loss + label_offset(logits, labels)).sum().backward()
    assert bool(logits.grad.isfinite().all()) and bool((logits.grad[3] == 0).all())


# Training


@pytest.mark.parametrize("weighs", [False, True])
def test_training_is_the_formula(tmp_path, weighs):
    samples = make_samples("plain_vit", 18)
    model = make_model("plain_vit")
    reference = copy.deepcopy(model)
    options = {"teacher": "rank", "alpha": 0.4, "num_train_epochs": 2, "rank_label_weights": weighs}
    trainer, visits = visited(tmp_path, model, samples, **options)
    optimizer, soft = torch.optim.SGD(reference.parameters(), SGD["learning_rate"]), []
    for step, ids in visits:
        batch = collate([samples[n] for n in ids])
        labels, alpha = batch.pop("labels"), 0.4 * (step // 5 + 1) / 2
        logits = reference(**batch).logits
        divergence = naive_divergence(logits, labels)
        loss = F.cross_entropy(logits, labels, reduction="none") + alpha * divergence
        (loss + weighs * naive_offset(logits, labels)).mean().backward()
        soft.append((divergence.mean().item(), len(ids)))
        optimizer.step()
        optimizer.zero_grad()
    assert difference(reference, trainer) < 2e-6
    told = [value for value, _ in soft]
    np.testing.assert_allclose(logged(trainer, "soft_loss"), told, rtol=1e-4)
    assert not any("past_agreement" in entry or "rows_with_history" in entry for entry in trainer.state.log_history)
    control = train(tmp_path, "plain_vit", samples, alpha=0.0, num_train_epochs=2, **SGD)
    assert difference(control, trainer) > 1e-4


@pytest.mark.parametrize("name", ["bert_tokens", "gpt2", "bart", "bert_mlm"])
def test_tokens_learn_too(tmp_path, name):
    """One step over all tokens of a task, against the formula on the rows of its labels."""
    samples = make_samples(name, 4)
    options = {"teacher": "rank", "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1} | SGD
    trainer = train(tmp_path, name, samples, **options)
    plain = train(tmp_path, name, samples, **(options | {"alpha": 0.0}))
    first = trainer.state.log_history[0]
    assert first["alpha"] == pytest.approx(0.1) and first["soft_loss"] > 0
    assert first["loss"] == pytest.approx(first["hard_loss"] + 0.1 * first["soft_loss"], rel=1e-4)
    assert first["hard_loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-4)
    assert difference(plain, trainer) > 1e-6


def test_one_epoch_of_a_stream(tmp_path, caplog):
    """No ids, no past, no second epoch: what the other teachers cannot have."""
    options = {"teacher": "rank", "max_steps": 4, "alpha_schedule": "constant"}
    trainer = train(tmp_path, "vit", Stream(make_samples("vit", 18)), **options)
    assert logged(trainer, "alpha") == [0.1] * 4 and all(value > 0 for value in logged(trainer, "soft_loss"))
    assert "never taught" not in caplog.text and "alpha reached" not in caplog.text


def test_the_default_weight_is_the_published_one(tmp_path):
    for options, alpha in (({"teacher": "rank"}, 0.1), ({}, 0.8), ({"teacher": "rank", "alpha": 0.3}, 0.3)):
        assert SelfKDConfig(str(tmp_path), use_cpu=True, **options).alpha == alpha


def test_a_loss_of_ones_own_keeps_its_weight(tmp_path):
    """The term stands beside any hard loss and takes nothing from it."""

    def weighted_loss(outputs, labels, num_items_in_batch=None):
        losses = F.cross_entropy(outputs.logits, labels, reduction="none")
        return (losses * (1 + labels)).sum() / num_items_in_batch

    options = {"teacher": "rank", "num_train_epochs": 1, "compute_loss_func": weighted_loss} | SGD
    trainer = train(tmp_path, "plain_vit", make_samples("plain_vit", 18), **options)
    plain = train(tmp_path, "plain_vit", make_samples("plain_vit", 18), **(options | {"alpha": 0.0}))
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(plain.state.log_history[0]["loss"] + 0.1 * first["soft_loss"], rel=1e-4)


def test_accumulation_changes_nothing(tmp_path):
    samples, options = make_samples("plain_vit", 16), {"teacher": "rank", "num_train_epochs": 2} | SGD
    whole = train(tmp_path, "plain_vit", samples, per_device_train_batch_size=8, **options)
    parts = train(
        tmp_path, "plain_vit", samples, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    assert difference(whole, parts) < 1e-6


def test_mixed_images_rank_beside_both_labels(tmp_path):
    collator = SelfKDDataCollator(collate, cutmix_alpha=1.0)
    samples, options = make_samples("plain_vit", 18), {"data_collator": collator, "alpha_schedule": "constant"}
    trainer = train(tmp_path, "plain_vit", samples, teacher="rank", **options)
    plain = train(tmp_path, "plain_vit", samples, alpha=0.0, **options)
    assert difference(trainer, plain) > 1e-5
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(first["hard_loss"] + 0.1 * first["soft_loss"], rel=1e-4)


def test_heads_learn_their_labels_beside(tmp_path):
    samples, options = make_samples("vit", 18), {"auxiliary_heads": "sla", "num_train_epochs": 1}
    trainer = train(tmp_path, "vit", samples, teacher="rank", **options)
    assert logged(trainer, "head0_loss") and logged(trainer, "soft_loss")


def test_resume_is_exact(tmp_path):
    check_resume(tmp_path, "vit", make_samples("vit"), [4, 8], **(saves(4) | {"teacher": "rank"}))


# What does not fit


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"rank_label_weights": True}, ["rank_label_weights=True", "'auto'", "'rank'"]),
        ({"teacher": "rank", "temperature": 2.0}, ["temperature=2.0", "'rank'"]),
        ({"teacher": "rank", "history_trace": True}, ["history_trace=True", "'rank'"]),
        ({"teacher": "rank", "warm_start_teacher": True}, ["warm_start_teacher=True", "'rank'"]),
        ({"teacher": "rank", "chunked_logits": True}, ["chunked_logits=True", "'rank'"]),
        ({"teacher": "rank", "label_smoothing_factor": 0.1}, ["label_smoothing_factor=0.1"]),
    ],
)
def test_fields(tmp_path, options, parts):
    refused(lambda: SelfKDConfig(str(tmp_path), use_cpu=True, **options), *parts)


def test_two_classes_have_nothing_to_rank(tmp_path):
    model = make_model("vit")
    config = copy.deepcopy(model.config)
    config.num_labels = 2
    trainer = SelfKDTrainer(
        type(model)(config),
        SelfKDConfig(str(tmp_path), use_cpu=True, teacher="rank"),
        train_dataset=make_samples("vit"),
    )
    refused(trainer.train, "teacher='rank'", "2 classes")
    assert trainer.state.global_step == 0 and CLASSES > 2
