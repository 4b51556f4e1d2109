"""What only a CUDA device can show: late copies, overflows, compiled models, steps that never wait."""

import copy

import numpy as np
import pytest
import torch
from helpers import CLASSES, logged, make_model, make_samples, make_trainer
from test_history import Dictionary, batch, check

from hf_selfkd import SelfKDTrainer
from hf_selfkd.history import Codec, PredictionHistory, journal
from hf_selfkd.teachers.weights import EMATeacher


pytestmark = pytest.mark.gpu

PLACES = ["accelerator", "cpu", "disk"]


@pytest.fixture
def cuda():
    """The device, and whatever is set afterwards as it was."""
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_sync_debug_mode("default")


def make(tmp_path, place, device, top_k=None, **more):
    return PredictionHistory(10, Codec(CLASSES, torch.float32, top_k), place, device, tmp_path / "history", **more)


def write_late(table, device, ids, *seed):
    """Predictions that the device makes after it has done something that takes long."""
    samples, rows, labels = batch(ids, *seed, classes=CLASSES)
    rows, labels = rows.pin_memory(), labels.pin_memory()
    torch.cuda._sleep(2_000_000)
    table.write(samples, rows.to(device, non_blocking=True), labels.to(device, non_blocking=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("buffer_bytes", [64, 10**6])
def test_a_journal_grows_while_copies_are_under_way(tmp_path, monkeypatch, cuda, place, buffer_bytes):
    """What is stored is what a dictionary holds, from buffers of two or three rows and from one for all."""
    monkeypatch.setattr(journal, "BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(journal, "MAX_HELD", 0)
    table, expected, rng = make(tmp_path, place, cuda), Dictionary(), np.random.default_rng(0)
    for epoch in range(3):
        for step in range(12):
            ids = rng.integers(0, 10, 4).tolist()
            write_late(table, cuda, ids, epoch, step)
            expected.write(ids, epoch, step)
            if step == 6:
                saved = table.journal_state()
                assert len(saved["log_probs"]) == table.journal.filled == 28
        buffer = table.journal.buffers[0]["log_probs"]
        assert buffer.is_pinned() if place != "accelerator" else buffer.is_cuda
        table.end_epoch(epoch)
        expected.end_epoch(epoch)
        check(table, expected, list(range(10)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_reading_and_writing_never_wait(tmp_path, monkeypatch, cuda, place, top_k):
    """With a past for all samples of a batch, or for some."""
    monkeypatch.setattr(journal, "MAX_HELD", 0)
    table = make(tmp_path, place, cuda, top_k)
    batches = []
    for ids in ([0, 1, 2, 3], [3, 4, 8, 9]):
        samples, rows, labels = batch(ids, 1, classes=CLASSES)
        batches.append((samples, rows.to(cuda), labels.to(cuda)))
    for samples, rows, labels in batches[:1]:
        table.write(samples, rows, labels)
    table.end_epoch(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for samples, rows, labels in batches:
        assert table.read(samples, len(rows), cuda).log_probs.device == cuda
        table.write(samples, rows, labels)
    torch.cuda.set_sync_debug_mode("default")
    table.end_epoch(1)
    assert table.stamps[[0, 1, 2, 3, 4, 8, 9]].tolist() == [1] * 7


class NeverWaits(SelfKDTrainer):
    """From the second epoch on the loss may not wait for the device; the first batch is looked at by the host."""

    def compute_loss(self, model, inputs, *arguments, **keywords):
        self.watched = getattr(self, "watched", 0)
        if model.training and (self.state.epoch or 0) >= 1:
            self.watched += 1
            torch.cuda.set_sync_debug_mode("error")
        try:
            return super().compute_loss(model, inputs, *arguments, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("place", PLACES)
def test_a_step_with_a_history_never_waits(tmp_path, cuda, place):
    options = {"use_cpu": False, "trainer": NeverWaits, "history_device": place, "teacher": "history"}
    trainer = make_trainer(tmp_path, "plain_vit", make_samples("plain_vit", 24), **options)
    trainer.train()
    assert trainer.watched == 12 and logged(trainer, "rows_with_history")[-1] == 1


def test_every_place_holds_the_same(tmp_path, cuda):
    stored = []
    for place in PLACES:
        options = {"use_cpu": False, "history_device": place, "teacher": "history", "full_determinism": False}
        trainer = make_trainer(tmp_path / place, "plain_vit", make_samples("plain_vit", 24), **options)
        trainer.train()
        stored.append(trainer.teacher.stored(range(24)))
    assert torch.isfinite(stored[0]).all()
    for other in stored[1:]:
        torch.testing.assert_close(other, stored[0], atol=1e-4, rtol=0)


def test_steps_that_overflow_leave_no_trace(tmp_path, cuda):
    """float16 with a scaler that begins too high: its first steps are skipped, and what is stored is finite."""
    options = {"use_cpu": False, "fp16": True, "teacher": "history", "num_train_epochs": 4}
    trainer = make_trainer(tmp_path, "plain_vit", make_samples("plain_vit", 24), **options)
    trainer.train()
    stored = trainer.teacher.stored(range(24))
    assert torch.isfinite(stored).all() and (stored.sum(-1) - 1).abs().max() < 1e-3
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert logged(trainer, "rows_with_history")[-1] == 1


def test_a_compiled_model_learns_the_same(tmp_path, cuda):
    losses = []
    for compiled in (False, True):
        options = {"use_cpu": False, "torch_compile": compiled, "teacher": "history", "optim": "sgd"}
        trainer = make_trainer(tmp_path / str(compiled), "plain_vit", make_samples("plain_vit", 24), **options)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_an_average_of_half_precision_weights(cuda):
    """In float32 beside the model."""
    model = copy.deepcopy(make_model("plain_vit")).to(cuda, torch.bfloat16)
    teacher = EMATeacher(model, lambda outputs: [outputs["logits"]], 0.999)
    for _ in range(3):
        teacher.after_step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
    assert {master.dtype for master in teacher.masters.values()} == {torch.float32}
    assert {master.device for master in teacher.masters.values()} == {cuda}
    assert all(torch.equal(teacher.weights[n], master.bfloat16()) for n, master in teacher.masters.items())
