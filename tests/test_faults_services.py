"""Scripts that work with `Trainer` and once broke when the class was changed: arguments, checkpoints, services."""

import dataclasses
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import logged, make_model, make_samples, make_trainer, refused, same_weights, train
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_selfkd import SelfKDConfig, SelfKDTrainer, Seq2SeqSelfKDTrainer
from hf_selfkd.batch import BatchRecord, attach_record, pop_record
from hf_selfkd.checks import check_even
from hf_selfkd.trainer import SelfKDMixin


pytestmark = pytest.mark.trains


SAVED = {"save_strategy": "steps", "save_steps": 2}


# Arguments


@dataclass
class Mine(TrainingArguments):
    """Arguments with a field, a property and a method of their own."""

    flavour: str = field(default="plain")

    @property
    def loud(self):
        return self.flavour.upper()

    def with_flavour(self, flavour):
        return dataclasses.replace(self, flavour=flavour)


@dataclass
class MineOfOurs(SelfKDConfig):
    """The brother: a subclass of our class."""

    flavour: str = field(default="plain")
    alpha: float = 0.5


@pytest.mark.parametrize("config", [Mine, MineOfOurs])
def test_a_class_of_arguments_of_ones_own_is_kept(tmp_path, config):
    trainer = train(tmp_path, "vit", make_samples("vit", 8), config_class=config, flavour="sweet")
    assert type(trainer.args) is config and trainer.args.flavour == "sweet"
    assert trainer.method.alpha == (0.5 if config is MineOfOurs else 0.8)
    if config is Mine:
        assert trainer.args.loud == "SWEET" and trainer.args.with_flavour("sour").flavour == "sour"


@pytest.mark.parametrize("config", [SelfKDConfig, TrainingArguments])
def test_fields_set_after_the_trainer_was_made_count(tmp_path, config):
    """One arguments object, as with `Trainer`: what is set later, by either name, is what is trained with."""
    samples, options = make_samples("vit", 8), {"config_class": config}
    late = make_trainer(tmp_path / "late", "vit", samples, **options)
    late.args.alpha, late.args.teacher = 0.0, "none"
    late.train()
    assert same_weights(late.model, train(tmp_path / "stock", "vit", samples, trainer=Trainer).model)
    soon = make_trainer(tmp_path / "soon", "vit", samples, **options)
    soon.args.alpha, soon.args.alpha_schedule, soon.args.teacher = 0.3, "constant", "snapshot"
    soon.train()
    assert set(logged(soon, "alpha")) == {0.3} and soon.teacher.kind == "snapshot"


def test_fields_set_later_are_checked_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, "vit", make_samples("vit", 8))
    trainer.args.alpha = 1.5
    refused(trainer.train, "alpha=1.5")
    assert trainer.state.global_step == 0


def test_a_trainer_that_logs_as_older_ones_did(tmp_path):
    class Older(Trainer):
        def log(self, logs):
            super().log({name: value for name, value in logs.items() if name != "grad_norm"})

    class Mixed(SelfKDMixin, Older):
        pass

    trainer = train(tmp_path, "vit", make_samples("vit", 8), trainer=Mixed)
    assert logged(trainer, "soft_loss")[-1] > 0 and not logged(trainer, "grad_norm")


# Checkpoints


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema", "auto"])
def test_the_checkpoint_of_a_plain_trainer_is_refused_with_the_way_on(tmp_path, teacher):
    samples = make_samples("bert", 8)
    train(tmp_path, "bert", samples, trainer=Trainer, **SAVED)
    refused(lambda: train(tmp_path, "bert", samples, resume=2, teacher=teacher), "checkpoint-2", "from_pretrained")
    checkpoint = str(tmp_path / "checkpoint-2")
    model = type(make_model("bert")).from_pretrained(checkpoint)
    assert logged(train(tmp_path / "on", model, samples, teacher=teacher), "soft_loss")[-1] > 0


def test_the_checkpoint_of_a_plain_trainer_goes_on_where_nothing_is_distilled(tmp_path):
    samples = make_samples("bert", 8)
    stock = train(tmp_path, "bert", samples, trainer=Trainer, **SAVED)
    assert same_weights(train(tmp_path, "bert", samples, resume=2, alpha=0.0).model, stock.model)


@pytest.mark.parametrize("size", [7, 12])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_more_or_fewer_data_than_before_are_refused_with_the_way_on(tmp_path, size, name):
    train(tmp_path, name, make_samples(name, 8), teacher="history", **SAVED)
    again = lambda: train(tmp_path, name, make_samples(name, size), teacher="history", resume=4)  # noqa: E731
    refused(again, "8 samples", f"{size}", "from_pretrained")


class Begins(TrainerCallback):
    """Notes the step at which training begins."""

    def __init__(self, seen):
        self.seen = seen

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


CUTS = {
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "state cut": lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 6, "log'),
    "state empty": lambda folder: (folder / "trainer_state.json").write_text(""),
    "weights only": lambda folder: [
        file.unlink() for file in folder.iterdir() if file.is_file() and file.name != "model.safetensors"
    ],
}


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("cut", CUTS)
def test_the_newest_whole_checkpoint_is_taken(tmp_path, caplog, cut, alpha):
    """A crash while a checkpoint was written leaves a folder behind that a resume must pass over, with a warning."""
    samples = make_samples("bert", 8)
    full = train(tmp_path, "bert", samples, alpha=alpha, **SAVED)
    CUTS[cut](tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-99").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    trainer = make_trainer(tmp_path, "bert", samples, alpha=alpha, **SAVED)
    begun = []
    trainer.add_callback(Begins(begun))
    trainer.train(resume_from_checkpoint=True)
    assert begun == [4] and same_weights(trainer.model, full.model)
    (line,) = [record.getMessage() for record in caplog.records if "was not written" in record.getMessage()]
    assert "checkpoint-6" in line


def test_a_folder_without_a_whole_checkpoint_says_so(tmp_path):
    train(tmp_path, "bert", make_samples("bert", 8), save_strategy="steps", save_steps=6)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    trainer = make_trainer(tmp_path, "bert", make_samples("bert", 8))
    with pytest.raises((ValueError, OSError)):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


def test_a_trace_that_is_turned_on_at_resume_begins_there(tmp_path):
    """What was not noted is NaN, and the epochs after the resume are noted."""
    samples = make_samples("bert", 8)
    train(tmp_path, "bert", samples, teacher="history", **SAVED)
    again = train(tmp_path, "bert", samples, teacher="history", history_trace=True, resume=2, **SAVED)
    trace = again.teacher.trace
    assert torch.isnan(trace).any() and not torch.isnan(trace).all()


# Services


def test_what_is_stored_before_training_is_asked_for_in_vain(tmp_path):
    trainer = make_trainer(tmp_path, "bert", make_samples("bert", 8), teacher="history")
    message = refused(lambda: trainer.teacher.stored([0]), "train first")
    assert "none" not in message


def test_a_sequence_trainer_evaluates_a_classifier(tmp_path):
    """Nothing is generated where nothing can be."""
    samples = make_samples("bert", 8)
    options = {"trainer": Seq2SeqSelfKDTrainer, "eval_dataset": samples}
    trainer = make_trainer(tmp_path, "bert", samples, **options)
    stock = make_trainer(tmp_path, "bert", samples, trainer=Trainer, eval_dataset=samples)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-6)
    trainer.train()
    assert logged(trainer, "soft_loss")[-1] > 0


# Devices without doubles


def test_batches_that_are_sent_hold_no_doubles():
    batch, record = {}, BatchRecord(np.arange(4), None, torch.arange(4), 0.3)
    attach_record(batch, record, as_tensors=True)
    assert {value.dtype for value in batch.values()} == {torch.int64, torch.float32}
    found = pop_record(batch)
    assert found.weight == pytest.approx(0.3) and found.ids.tolist() == [0, 1, 2, 3] and batch == {}


class NoDoubles(TorchDispatchMode):
    """Refuses every operation on tensors that gives a float64 of more than one element."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        wide = [
            one for one in made if isinstance(one, torch.Tensor) and one.dtype == torch.float64 and one.numel() > 1
        ]
        assert not wide, f"{function} gave float64"
        return result


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"teacher": "history"}),
        ("vit", {"auxiliary_heads": "joint", "temperature": 2.0}),
        ("resnet", {"auxiliary_heads": "lsskd"}),
        ("gpt2", {"history_top_k": 4}),
        ("gpt2", {"chunked_logits": True, "history_top_k": 4}),
        ("bert_tokens", {"teacher": "ema"}),
    ],
)
def test_a_step_makes_no_doubles(tmp_path, name, options):
    class Watched(SelfKDTrainer):
        def training_step(self, *arguments, **named):
            with NoDoubles():
                return super().training_step(*arguments, **named)

    trainer = train(tmp_path, name, make_samples(name, 8), trainer=Watched, **options)
    assert logged(trainer, "soft_loss")[-1] > 0


# Several processes


def together(even=False, drop=False, world=2):
    args = SimpleNamespace(world_size=world, dataloader_drop_last=drop, train_batch_size=4)
    return SimpleNamespace(args=args, accelerator=SimpleNamespace(even_batches=even))


@pytest.mark.parametrize("size", [1, 9, 22])
def test_batches_that_do_not_divide_are_refused_where_nobody_evens_them(size):
    data = range(size)
    refused(lambda: check_even(together(), None, data), "even_batches=False", f"{size} samples", "drop_last")
    for fine in (together(even=True), together(drop=True), together(world=1)):
        check_even(fine, None, data)
    check_even(together(), None, range(24))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What every scenario gave on two processes."""
    out = tmp_path_factory.mktemp("two")
    worker = Path(__file__).with_name("faults_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out / "results.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dispatched", "dispatched_snapshot", "dispatched_words"])
def test_batches_that_the_main_process_sends_are_distilled(two, name):
    found = two[name]
    assert found["kind"] == ("snapshot" if name == "dispatched_snapshot" else "history")
    assert len(found["loss"]) == 6 and found["rows_with_history"] == [0, 0, 1, 1, 1, 1]
    assert all(bool(tensor.isfinite().all()) for tensor in found["weights"].values())


@pytest.mark.slow
def test_batches_that_the_main_process_sends_change_the_weights_by_distillation(two):
    plain, ours = two["dispatched_plain"]["weights"], two["dispatched"]["weights"]
    assert max((plain[name] - ours[name]).abs().max().item() for name in plain) > 1e-4


@pytest.mark.slow
def test_uneven_batches_are_an_error_at_once_and_do_not_hang(two):
    for name in ("uneven", "uneven_snapshot"):
        message, step = two[name]
        assert "even_batches=False" in message and step == 0
    assert two["even"] == (None, 6) and two["dropped"] == (None, 6)
