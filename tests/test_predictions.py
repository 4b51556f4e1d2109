"""Predictions of one's own as the teacher: files, addresses, losses against the formula, what is refused."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import (
    CLASSES,
    Samples,
    Stream,
    collate,
    difference,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    same_weights,
    train,
)
from safetensors.torch import save_file
from test_resume import check_resume, saves

from hf_selfkd import SelfKDConfig, SelfKDDataCollator
from hf_selfkd.teachers import Predictions


pytestmark = pytest.mark.trains


SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def probabilities(size, classes=CLASSES, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(classes), size)).float()


def write(path, ids=None, **arrays):
    arrays |= {} if ids is None else {"ids": torch.as_tensor(ids)}
    if path.suffix == ".safetensors":
        save_file({name: torch.as_tensor(array).contiguous() for name, array in arrays.items()}, path)
    else:
        np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return str(path)


# Files


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("kind", ["probs", "log_probs", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_kind_of_file_says_the_same(tmp_path, suffix, kind, dtype):
    probs = probabilities(20)
    values = {"probs": probs, "log_probs": probs.log(), "logits": 3 + probs.log()}[kind]
    path = write(tmp_path / f"past{suffix}", **{kind: values.to(dtype)})
    log_probs, known = Predictions.load(path).log_probs(np.array([3, 0, 19, 20, -1]))
    assert known.tolist() == [True, True, True, False, False] and log_probs.dtype == torch.float32
    torch.testing.assert_close(
        log_probs[:3].exp(), probs[[3, 0, 19]], atol=1e-2 if dtype == torch.float16 else 1e-6, rtol=0
    )


def test_ids_may_stand_in_any_order():
    probs, ids = probabilities(6), np.array([40, 7, 100, 0, 9, 23])
    log_probs, known = Predictions(probs, "probs", ids).log_probs(np.array([7, 8, 100, 40, 101]))
    assert known.tolist() == [True, False, True, True, False]
    torch.testing.assert_close(log_probs[known].exp(), probs[[1, 2, 0]])


def test_rows_without_a_number_say_nothing():
    probs = probabilities(3)
    probs[1] = torch.nan
    probs[2] = torch.tensor([1.0, 0, 0, 0, 0])
    log_probs, known = Predictions(probs, "probs").log_probs(np.arange(3))
    assert known.tolist() == [True, False, True]
    assert log_probs[2].exp().tolist() == [1, 0, 0, 0, 0] and bool(log_probs[2].isfinite().all())


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"scores": torch.zeros(4, 5)}, ["holds scores", "probs, log_probs, logits"]),
        ({"probs": probabilities(4), "logits": torch.zeros(4, 5)}, ["needs one of"]),
        ({"probs": torch.full((4, 5), 0.3)}, ["row 0 of probs adds up to 1.5", "logits"]),
        ({"logits": torch.zeros(4)}, ["logits of shape [4]", "[samples, classes]"]),
        ({"logits": torch.zeros(4, 5, dtype=torch.int64)}, ["int64", "floats"]),
        ({"logits": torch.zeros(4, 5), "ids": torch.tensor([1, 2, 2, 3])}, ["ids", "none twice"]),
        ({"logits": torch.zeros(4, 5), "ids": torch.tensor([1, 2])}, ["ids of shape [2] for 4 rows"]),
    ],
    ids=str,
)
def test_files_that_do_not_fit(tmp_path, arrays, parts):
    refused(lambda: Predictions.load(write(tmp_path / "past.npz", **arrays)), "teacher_predictions", *parts)


def test_files_that_are_none(tmp_path):
    (tmp_path / "past.npz").write_bytes(b"nothing of the kind")
    refused(lambda: Predictions.load(tmp_path / "past.npz"), "cannot be read")
    for name in ("none.npz", "past.pt"):
        refused(lambda name=name: Predictions.load(tmp_path / name), ".npz or .safetensors")
    np.savez(tmp_path / "objects.npz", probs=np.array([{"a": 1}], dtype=object))
    refused(lambda: Predictions.load(tmp_path / "objects.npz"), "cannot be read")


# Training


def naive(model, samples, visits, probs, alpha_of, temperature=1.0):
    """Offline distillation in a plain loop over the batches of a trainer."""
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    for step, ids in visits:
        batch = collate([samples[n] for n in ids])
        labels, alpha = batch.pop("labels"), alpha_of(step)
        log_probs = model(**batch).logits.log_softmax(-1)
        target = (1 - alpha) * F.one_hot(labels, CLASSES) + alpha * probs[ids]
        (-(target * log_probs).sum(-1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def visited(tmp_path, name, samples, **options):
    """A trained trainer and the ids of every step."""
    from transformers import TrainerCallback

    visits = []

    class Noting(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            step = trainer.compute_loss

            def compute_loss(*arguments, **named):
                visits.append((state.global_step, trainer.sample_ids.tolist()))
                return step(*arguments, **named)

            trainer.compute_loss = compute_loss

    trainer = make_trainer(tmp_path, name, samples, callbacks=[Noting()], **(SGD | options))
    trainer.train()
    return trainer, visits


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_training_is_offline_distillation(tmp_path, schedule):
    samples = make_samples("plain_vit", 18)
    probs = probabilities(18)
    path = write(tmp_path / "past.npz", probs=probs)
    model = make_model("plain_vit")
    reference = copy.deepcopy(model)
    options = {"teacher_predictions": path, "alpha_schedule": schedule, "num_train_epochs": 3, "alpha": 0.6}
    trainer, visits = visited(tmp_path, model, samples, **options)
    assert trainer.teacher.kind == "predictions" and len(visits) == 15
    naive(reference, samples, visits, probs, lambda step: 0.6 if schedule == "constant" else 0.6 * (step // 5 + 1) / 3)
    assert difference(reference, trainer) < 2e-6
    control = train(tmp_path, "plain_vit", samples, alpha=0.0, num_train_epochs=3, **SGD)
    assert difference(control, trainer) > 1e-4


def test_one_epoch_is_enough(tmp_path, caplog):
    path = write(tmp_path / "past.npz", probs=probabilities(18))
    options = {
        "teacher": "predictions",
        "teacher_predictions": path,
        "num_train_epochs": 1,
        "alpha_schedule": "constant",
    }
    trainer = train(tmp_path, "plain_vit", make_samples("plain_vit", 18), **options)
    assert logged(trainer, "alpha")[0] == 0.8 and "never taught" not in caplog.text
    torch.testing.assert_close(trainer.teacher.stored([4, 2]), probabilities(18)[[4, 2]])


def test_own_history_is_a_file_for_the_next_run(tmp_path):
    """Last month's run: what a history holds, written down, teaches the next model."""
    samples = make_samples("plain_vit", 18)
    first = train(tmp_path, "plain_vit", samples, teacher="history", num_train_epochs=2)
    path = write(tmp_path / "past.npz", probs=first.teacher.stored(range(18)))
    second = train(tmp_path, "plain_vit", samples, teacher_predictions=path)
    assert torch.equal(second.teacher.stored(range(18)).isnan(), first.teacher.stored(range(18)).isnan())
    torch.testing.assert_close(second.teacher.stored(range(18)), first.teacher.stored(range(18)), equal_nan=True)


def test_samples_without_a_prediction_learn_their_labels(tmp_path):
    samples = make_samples("plain_vit", 18)
    empty = write(tmp_path / "past.npz", probs=torch.full((1, CLASSES), torch.nan), ids=[3])
    plain = train(tmp_path, "plain_vit", samples, alpha=0.0, **SGD)
    ours = train(tmp_path, "plain_vit", samples, teacher_predictions=empty, **SGD)
    assert difference(plain, ours) < 1e-6


def test_ids_of_ones_own(tmp_path):
    probs = probabilities(18)
    items = [item | {"uid": 1000 - n} for n, item in enumerate(make_samples("plain_vit", 18).items)]
    path = write(tmp_path / "own.npz", probs=probs, ids=[1000 - n for n in range(18)])
    rows = write(tmp_path / "rows.npz", probs=probs)
    ours = train(tmp_path, "plain_vit", Samples(items), teacher_predictions=path, sample_id_column="uid", **SGD)
    by_row = train(tmp_path, "plain_vit", make_samples("plain_vit", 18), teacher_predictions=rows, **SGD)
    assert same_weights(ours.model, by_row.model)
    options = {"teacher_predictions": rows, "sample_id_column": "uid"}
    refused(make_trainer(tmp_path, "plain_vit", Samples(items), **options).train, "sample_id_column='uid'", "ids")


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_mixed_images_learn_from_both_predictions(tmp_path, probability):
    path = write(tmp_path / "past.npz", probs=probabilities(18))
    collator = SelfKDDataCollator(collate, cutmix_alpha=1.0, mix_probability=probability)
    samples = make_samples("plain_vit", 18)
    trainer = train(tmp_path, "plain_vit", samples, data_collator=collator, teacher_predictions=path)
    plain = train(tmp_path, "plain_vit", samples, data_collator=collator, alpha=0.0)
    assert difference(trainer, plain) > 1e-5 and all(np.isfinite(logged(trainer, "loss")))


def test_heads_learn_beside(tmp_path):
    path = write(tmp_path / "past.npz", probs=probabilities(18))
    trainer = train(
        tmp_path, "vit", make_samples("vit", 18), teacher_predictions=path, auxiliary_heads="lsskd", num_train_epochs=2
    )
    assert trainer.teacher.kind == "predictions" and logged(trainer, "head0_loss")


def test_resume_is_exact_and_finds_another_file(tmp_path):
    samples = make_samples("vit")
    path = write(tmp_path / "past.npz", probs=probabilities(len(samples)))
    options = saves(4) | {"teacher_predictions": path}
    check_resume(tmp_path, "vit", samples, [4, 8], **options)
    write(tmp_path / "past.npz", probs=probabilities(len(samples), seed=1))
    again = make_trainer(tmp_path / "again", "vit", samples, **options)
    checkpoint = str(tmp_path / "whole/checkpoint-8")
    refused(lambda: again.train(resume_from_checkpoint=checkpoint), "teacher_predictions", "same file")


# What does not fit


@pytest.mark.parametrize(
    ("name", "arrays", "parts"),
    [
        ("vit", {"probs": probabilities(18, 7)}, ["7 classes", f"the model {CLASSES}"]),
        ("vit", {"probs": probabilities(17)}, ["17 rows", "18 training samples", "ids"]),
        ("vit", {"probs": probabilities(2), "ids": torch.tensor([90, 91])}, ["no row for any"]),
        ("bert_tokens", {"probs": probabilities(18)}, ["one label a sample"]),
        ("gpt2", {"probs": probabilities(18, 30)}, ["one label a sample"]),
    ],
)
def test_files_of_other_data_are_found_before_the_first_step(tmp_path, name, arrays, parts):
    path = write(tmp_path / "past.npz", **arrays)
    trainer = make_trainer(tmp_path, name, make_samples(name, 18), teacher_predictions=path)
    refused(trainer.train, "teacher_predictions", *parts)
    assert trainer.state.global_step == 0


def test_a_stream_needs_ids(tmp_path):
    path = write(tmp_path / "past.npz", probs=probabilities(18))
    options = {"teacher_predictions": path, "max_steps": 4}
    refused(lambda: make_trainer(tmp_path, "vit", Stream(make_samples("vit", 18)), **options).train(), "sample ids")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"teacher": "predictions"}, ["teacher='predictions'", "teacher_predictions=None"]),
        ({"teacher": "snapshot", "teacher_predictions": "x.npz"}, ["teacher='snapshot'", "x.npz"]),
        ({"teacher_predictions": "x.npz", "warm_start_teacher": True}, ["warm_start_teacher=True", "'predictions'"]),
        ({"teacher_predictions": "x.npz", "history_trace": True}, ["history_trace=True", "'predictions'"]),
        ({"teacher_predictions": "x.npz", "chunked_logits": True}, ["chunked_logits=True", "'predictions'"]),
    ],
)
def test_fields(tmp_path, options, parts):
    refused(lambda: SelfKDConfig(str(tmp_path), use_cpu=True, **options), *parts)


def test_ids_of_a_column_that_the_file_does_not_know(tmp_path, caplog):
    rows = [
        {name: value.tolist() if torch.is_tensor(value) else value for name, value in item.items()}
        for item in make_samples("texts", 8)
    ]
    known = Dataset.from_list([row | {"uid": 1000 + n} for n, row in enumerate(rows)])
    path = write(tmp_path / "past.npz", probs=probabilities(8), ids=torch.arange(8))
    options = {"teacher_predictions": str(path), "sample_id_column": "uid"}
    refused(lambda: train(tmp_path, "bert", known, **options), "no row for any of the ids")
    with caplog.at_level("WARNING"):
        train(
            tmp_path, "bert", [item | {"uid": 1000 + n} for n, item in enumerate(make_samples("texts", 8))], **options
        )
    assert "no prediction for any sample" in caplog.text
