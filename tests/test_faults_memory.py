"""Faults of memory, disk and speed, and states that fall apart: what is kept, copied, loaded and restored."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    make_samples,
    make_trainer,
    same_weights,
    state_of,
    train,
)
from transformers import PreTrainedModel, TrainerCallback

from hf_selfkd import AuxiliaryHeadsConfig
from hf_selfkd.heads import heads_of
from hf_selfkd.losses.progressive import progressive_cross_entropy
from hf_selfkd.losses.soft import soft_cross_entropy
from hf_selfkd.losses.soft_targets import SoftTargets
from hf_selfkd.teachers import SnapshotTeacher


pytestmark = pytest.mark.trains


# The Hub


class Hub:
    """Notes which folders wait for an upload; an upload ends when it is told to."""

    def __init__(self):
        self.waiting = []

    def create_repo(self, name, **keywords):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, path_in_repo="", **keywords):
        self.waiting.append((Path(folder_path), Future()))
        return self.waiting[-1][1]

    def end(self):
        for folder, future in self.waiting:
            assert folder.is_dir()  # as long as it may be read
            if not future.done():
                future.set_result(None)
        self.waiting = []


class LooksAtFolders(TrainerCallback):
    """Notes after each checkpoint whether there is a copy, and lets the uploads end."""

    def __init__(self, hub, folder):
        self.hub, self.folder, self.during, self.after = hub, folder, [], []

    def on_save(self, args, state, control, **kwargs):
        self.during.append((self.folder / "_hub").exists())
        self.hub.end()
        self.after.append((self.folder / "_hub").exists())


@pytest.mark.parametrize(
    ("strategy", "copies"), [("end", 0), ("every_save", 0), ("checkpoint", 3), ("all_checkpoints", 3)]
)
def test_a_checkpoint_is_copied_only_while_its_folder_is_uploaded(tmp_path, monkeypatch, strategy, copies):
    """`save_total_limit` frees what it deletes: no hard link is left behind, whatever the strategy."""
    hub, copied = Hub(), []
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *arguments, **keywords: hub)
    copytree = shutil.copytree
    monkeypatch.setattr("hf_selfkd.fixes.shutil.copytree", lambda *a, **k: (copied.append(a[0]), copytree(*a, **k))[1])
    options = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "run", "hub_always_push": True}
    options |= {"save_strategy": "epoch", "save_total_limit": 1}
    looks = LooksAtFolders(hub, tmp_path)
    trainer = make_trainer(tmp_path, "vit", make_samples("vit", 8), callbacks=[looks], **options)
    monkeypatch.setattr(type(trainer), "_finish_current_push", lambda self: hub.end())
    trainer.train()
    assert len(copied) == copies
    assert looks.during == [copies > 0] * 3 and looks.after == [False] * 3
    assert not (tmp_path / "_hub").exists()
    (left,) = tmp_path.glob("checkpoint-*")
    assert all(file.stat().st_nlink == 1 for file in left.rglob("*") if file.is_file())


# Loading


class Loads:
    """Counts the calls of `from_pretrained`."""

    def __init__(self, monkeypatch):
        self.calls = 0
        original = PreTrainedModel.from_pretrained.__func__

        def counted(cls, *arguments, **keywords):
            self.calls += 1
            return original(cls, *arguments, **keywords)

        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))


@pytest.mark.parametrize("name", ["gpt2", "bart", "marian", "t5", "bert_mlm"])
def test_models_with_tied_weights_are_loaded_once_on_resume(tmp_path, monkeypatch, name):
    samples = make_samples(name, 8)
    full = train(tmp_path, name, samples, save_strategy="epoch")
    loads = Loads(monkeypatch)
    again = train(tmp_path, name, samples, resume=4, save_strategy="epoch")
    assert loads.calls == 0
    assert same_weights(full.model, again.model)


def test_a_model_whose_weights_were_renamed_is_still_loaded(tmp_path, monkeypatch):
    """The control: where names differ, `from_pretrained` is what restores them."""
    samples = make_samples("vit", 8)
    full = train(tmp_path, "vit", samples, save_strategy="epoch")
    loads = Loads(monkeypatch)
    again = train(tmp_path, "vit", samples, resume=4, save_strategy="epoch")
    assert loads.calls <= 1 and same_weights(full.model, again.model)


# The teacher's forward


def shown_to_teacher(monkeypatch, tmp_path, heads):
    """How many images the teacher runs for each batch of 4."""
    counts, run = [], SnapshotTeacher._run

    def counted(self, inputs):
        counts.append(len(inputs["pixel_values"]))
        return run(self, inputs)

    monkeypatch.setattr(SnapshotTeacher, "_run", counted)
    samples = make_samples("plain_deep_vit", 8)
    trainer = train(tmp_path, "plain_deep_vit", samples, teacher="snapshot", auxiliary_heads=heads)
    return counts, heads_of(trainer.model).config


def test_a_snapshot_runs_upright_views_only_where_heads_learn_nothing_from_the_past(tmp_path, monkeypatch):
    """`joint` shows four views, of which the teacher of the model itself needs one."""
    counts, config = shown_to_teacher(monkeypatch, tmp_path, "joint")
    assert config.views == "rotation" and not config.uses_past
    assert counts == [4] * 4  # two epochs of two batches


def test_a_snapshot_runs_all_views_that_heads_learn_from(tmp_path, monkeypatch):
    """The control."""
    config = AuxiliaryHeadsConfig.resolve("lsskd_full")
    counts, config = shown_to_teacher(monkeypatch, tmp_path, config)
    views = 1 + config.views_per_step if config.views == "rotation" else 1
    assert config.uses_past and counts == [4 * views] * 4


# Temperature


def peak_of(action):
    """Bytes of float tensors that live at once, as the allocator of a profiler sees them, above those before."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def drawn(rows, classes, k=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    past = (2 * torch.randn(rows, classes, generator=generator)).log_softmax(-1)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[::7], mask = -100, torch.arange(rows) % 5 != 1
    past[~mask] = float("nan")
    if k is None:
        return logits, labels, SoftTargets(past, mask)
    past, index = past.nan_to_num(-50.0).topk(k, dim=-1)
    return logits, labels, SoftTargets(past, mask, index)


def naive(logits, labels, soft_targets, alpha, temperature):
    """Row by row in float64: `(1 - alpha) * hard + alpha * T**2 * soft` of whole past rows."""
    total = []
    for row, label, past, known in zip(logits, labels, soft_targets.log_probs, soft_targets.mask, strict=True):
        if label == -100:
            total.append(row.sum() * 0)
            continue
        hard = -row.log_softmax(-1)[label]
        target = (past.double() / temperature).softmax(-1)
        soft = -(target * (row / temperature).log_softmax(-1)).sum() * temperature**2
        total.append((1 - alpha) * hard + alpha * soft if known else hard)
    return torch.stack(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_many_wide_rows_at_a_temperature_equal_a_naive_formula(temperature, dtype):
    rows, classes, alpha = 80, 32_000, 0.7
    logits, labels, soft_targets = drawn(rows, classes)
    logits = logits.to(dtype).requires_grad_()
    weights = torch.linspace(-1, 2, rows)
    losses = progressive_cross_entropy(logits, labels, soft_targets, alpha, temperature)
    (weights * losses.total).sum().backward()
    assert "ByChunks" in type(losses.total.grad_fn).__name__
    wide = logits.detach().double().requires_grad_()
    expected = naive(wide, labels, soft_targets, alpha, temperature)
    (weights.double() * expected).sum().backward()
    torch.testing.assert_close(losses.total.double(), expected, atol=1e-4, rtol=1e-5)
    tolerance = {"atol": 1e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-5, "rtol": 1e-2}
    torch.testing.assert_close(logits.grad.double(), wide.grad, **tolerance)


@pytest.mark.parametrize("k", [None, 8])
@pytest.mark.parametrize("tail", ["bucket", "label", "uniform", "renormalize"])
def test_chunks_at_a_temperature_are_one_piece_to_the_bit(monkeypatch, k, tail):
    if k is None and tail != "bucket":
        return
    logits, labels, soft_targets = drawn(530, 1000, k)
    soft_targets.tail = tail
    found = []
    for limit in (0, 2**30):
        monkeypatch.setattr("hf_selfkd.losses.by_chunks.CHUNK_ABOVE", limit)
        one, other = (logits.clone().requires_grad_() for _ in range(2))
        losses = progressive_cross_entropy(one, labels, soft_targets, 0.7, 2.0)
        soft = soft_cross_entropy(other, soft_targets, 2.0, labels)
        (losses.total.sum() / 7 + soft.sum() / 3).backward()
        found.append((losses.total, losses.hard, losses.soft, soft, one.grad, other.grad))
    for chunked, whole in zip(*found, strict=True):
        assert torch.equal(chunked, whole)


@pytest.mark.parametrize("k", [None, 32])
@pytest.mark.parametrize("kind", ["progressive", "soft"])
def test_a_temperature_over_a_vocabulary_holds_little_more_than_the_gradient(k, kind):
    """Six float32 tensors of the size of the logits once; now the gradient and a chunk of a few."""
    rows, classes = 512, 32_000
    logits, labels, soft_targets = drawn(rows, classes, k)
    logits.requires_grad_()

    def step():
        if kind == "soft":
            soft_cross_entropy(logits, soft_targets, 2.0, labels).sum().backward()
        else:
            progressive_cross_entropy(logits, labels, soft_targets, 0.5, 2.0).total.sum().backward()

    size = logits.numel() * 4
    assert 0.9 * size < peak_of(step) < 1.5 * size
    assert peak_of(lambda: F.cross_entropy(logits, labels.clamp_min(0)).backward()) > 1.9 * size  # the measure sees it


# Heads and the best model


class WorsensLater(TrainerCallback):
    """Notes the heads at each checkpoint."""

    def __init__(self):
        self.heads = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.heads[state.global_step] = state_of(heads_of(model))


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("heads", ["byot", "lsskd"])
@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_heads_of_the_best_model_are_restored_with_it(tmp_path, name, heads, save_only_model):
    notes, scores = WorsensLater(), iter([0.1, 0.9, 0.2])
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "accuracy", "compute_metrics": lambda _: {"accuracy": next(scores)}}
    options |= {"eval_dataset": make_samples(name, 4), "save_only_model": save_only_model}
    trainer = train(tmp_path, name, make_samples(name, 8), callbacks=[notes], auxiliary_heads=heads, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    restored = state_of(heads_of(trainer.model))
    assert all(torch.equal(tensor, notes.heads[4][part]) for part, tensor in restored.items())
    assert any(not torch.equal(tensor, notes.heads[6][part]) for part, tensor in restored.items())
