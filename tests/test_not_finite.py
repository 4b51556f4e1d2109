"""Losses, gradients and rows that are not finite: what they reach, what they do not, and that they are told."""

import math

import pytest
import torch
from helpers import logged, make_samples, make_trainer, state_of, train

from hf_selfkd import SelfKDTrainer
from hf_selfkd.teachers.weights import EMATeacher


STEP, ROW, POISONED = 7, 1, 5  # in the second step of the second epoch, the image of sample 5


class Skips(torch.optim.SGD):
    """Passes over a step with a gradient that is not finite, as the scaler of mixed precision does."""

    skipped = 0

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(grad.isfinite().all()) for grad in grads):
            return super().step(closure)
        self.skipped += 1


class Poisons(SelfKDTrainer):
    """Puts an image that is not finite into one step."""

    poison = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.poison is not None and self.state.global_step == STEP:
            assert self.sample_ids[ROW] == POISONED
            inputs["pixel_values"][ROW] = self.poison
        return super().training_step(model, inputs, num_items_in_batch)


def run(folder, poison=None, skips=True, resume=None, **options):
    """Three epochs of 6 steps of 4 samples, in order."""
    options = {"train_sampling_strategy": "sequential", "learning_rate": 0.05} | options
    if skips:
        options["optimizer_cls_and_kwargs"] = (Skips, {"lr": 0.05})
    trainer_class = type("Poisons", (Poisons,), {"poison": poison})
    return train(folder, "plain_vit", make_samples("plain_vit"), trainer=trainer_class, resume=resume, **options)


def row_of(trainer):
    return trainer.teacher.stored([POISONED])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_row_is_not_stored_and_the_others_of_its_batch_are(tmp_path, poison):
    """The sample keeps the prediction of the epoch before; until the step after, nothing else differs."""
    poisoned = run(tmp_path, poison, max_steps=8)
    assert poisoned.optimizer.optimizer.skipped == 1
    clean = run(tmp_path, max_steps=8)
    others = [n for n in range(22) if n != POISONED]
    assert torch.equal(poisoned.teacher.stored(others), clean.teacher.stored(others))
    before = run(tmp_path, max_steps=7)
    assert torch.equal(row_of(poisoned), row_of(before)) and not torch.equal(row_of(clean), row_of(before))


def test_a_poisoned_row_is_told_by_its_id_at_the_end_of_the_epoch(tmp_path, caplog):
    run(tmp_path, math.nan)
    (line,) = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert "1 samples" in line and f"(sample_id={POISONED})" in line and "past predictions" in line
    caplog.clear()
    run(tmp_path)
    assert not [record for record in caplog.records if "not finite" in record.getMessage()]


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema", "rank"])
def test_training_goes_on_after_a_step_that_was_skipped(tmp_path, teacher):
    """With finite weights, teacher and losses; NaN stands in the log of that one step."""
    trainer = run(tmp_path, math.nan, teacher=teacher, ema_decay=0.5)
    assert trainer.optimizer.optimizer.skipped == 1 and trainer.state.global_step == 18
    assert all(tensor.isfinite().all() for tensor in state_of(trainer).values())
    bad = [step for step, value in enumerate(logged(trainer, "hard_loss"), start=1) if not math.isfinite(value)]
    assert bad == [8]
    states = dict(trainer.teacher.states())["teacher"][0]
    assert all(part.isfinite().all() for name, part in states.items() if "weights" in name or "log_probs" in name)
    if teacher != "rank":
        assert logged(trainer, "rows_with_history")[-1] == 1 and logged(trainer, "soft_loss")[-1] > 0


def test_an_average_of_weights_counts_a_skipped_step(tmp_path, monkeypatch):
    """It takes the weights, which are those of the step before, once more: the naive formula, step by step."""
    expected, live, after = {}, [], EMATeacher.after_step

    def note(teacher):
        after(teacher)
        now = {name: p.detach().double().clone() for name, p in teacher.model.named_parameters()}
        weight = max(1 - 0.5, 9 / (10 + len(live)))
        for name, value in now.items():
            expected[name] = value if not live else expected[name] + weight * (value - expected[name])
        live.append(now)

    monkeypatch.setattr(EMATeacher, "after_step", note)
    trainer = run(tmp_path, math.nan, teacher="ema", ema_decay=0.5)
    assert len(live) == 18 and all(
        torch.equal(one, other) for one, other in zip(live[6].values(), live[7].values(), strict=True)
    )
    for name, value in expected.items():
        torch.testing.assert_close(trainer.teacher.weights[name].double(), value, atol=1e-5, rtol=1e-5)


def test_without_a_scaler_weights_are_lost_as_with_trainer_and_stored_rows_are_not(tmp_path, caplog):
    """What was stored before stays; every later epoch says that nothing could be stored."""
    trainer = run(tmp_path, math.nan, skips=False, save_strategy="steps", save_steps=6)
    assert not all(tensor.isfinite().all() for tensor in state_of(trainer).values())
    assert trainer.teacher.stored(range(22)).isfinite().all()
    lines = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(lines) == 2 and "22 samples" in lines[1] and lines[1].count("sample_id") == 5
    again = run(tmp_path, skips=False, resume=6)
    assert all(tensor.isfinite().all() for tensor in state_of(again).values())


def test_a_poisoned_row_of_words_costs_its_sample_alone(tmp_path, caplog):
    """Of a language model: one word whose embedding overflows, in one epoch."""
    samples = make_samples("plain_gpt2", 8)
    trainer = make_trainer(tmp_path, "plain_gpt2", samples, optimizer_cls_and_kwargs=(Skips, {"lr": 0.05}))
    embedding, calls = trainer.model.get_input_embeddings(), [0]
    rare = samples.items[3]["input_ids"][0]
    only = [n for n, item in enumerate(samples.items) if rare in item["input_ids"]]

    def overflow(module, inputs, output):
        calls[0] += module.training
        return output.masked_fill((inputs[0] == rare).unsqueeze(-1), math.inf) if calls[0] in (3, 4) else output

    embedding.register_forward_hook(overflow)
    trainer.train()
    (line,) = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert all(f"sample_id={n}" in line for n in only[:5]) and f"{len(only)} samples" in line
    assert trainer.optimizer.optimizer.skipped >= 1
    assert all(tensor.isfinite().all() for tensor in state_of(trainer).values())
