"""The training loop: lengths, accumulation, logs, checkpoints, callbacks and optimizers of a user's own."""

from dataclasses import fields

import pytest
import torch
from conformance import Linear, Points, classes, lines_of, with_each_class
from helpers import collate, make_model, make_samples, same_weights
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup
from transformers.utils import logging


pytestmark = pytest.mark.trains


def points(case, folder, **options):
    return case.train(folder, Linear(), Points(), **options)


def texts(case, folder, name="bert", **options):
    return case.train(folder, make_model(name), make_samples(name, 10), data_collator=collate, **options)


# Lengths, accumulation, logging, saving


FIELDS = {spec.name for spec in fields(TrainingArguments)}
OPTIONS = {
    "max_steps": ("history", {"max_steps": 5}),
    "max_steps_within_an_epoch": ("none", {"max_steps": 2}),
    "one_epoch": ("none", {"num_train_epochs": 1}),
    "half_an_epoch": ("none", {"num_train_epochs": 0.5}),
    "one_and_a_half_epochs": ("history", {"num_train_epochs": 1.5}),
    "accumulation": ("history", {"gradient_accumulation_steps": 2}),
    "logging_epoch": ("history", {"logging_strategy": "epoch"}),
    "logging_no": ("history", {"logging_strategy": "no"}),
    "logging_fraction": ("history", {"logging_steps": 0.5}),
    "logging_first_step": ("history", {"logging_first_step": True, "logging_steps": 4}),
    "logging_nan_inf": ("history", {"logging_nan_inf_filter": False}),
    "tokens_seen": ("history", {"include_num_input_tokens_seen": True}),
    "sgd": ("history", {"optim": "sgd"}),
    "adafactor": ("history", {"optim": "adafactor"}),
    "cosine": ("history", {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "no_clipping": ("history", {"max_grad_norm": 0.0}),
    "weight_decay": ("history", {"weight_decay": 0.1}),
    "seed": ("history", {"seed": 11}),
    "empty_cache": ("history", {"torch_empty_cache_steps": 1}),
    "bf16": ("history", {"bf16": True}),
}
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in FIELDS)


@pytest.mark.parametrize(("case", "options"), classes(OPTIONS))
def test_options_of_the_loop(case, options, tmp_path):
    # A model that counts nothing itself: the stock class scales such a model correctly.
    case.check(lambda case, folder: points(case, folder, **options), tmp_path)


TEXT_OPTIONS = {
    "neftune": ("history", "bert", {"neftune_noise_alpha": 5.0}),
    "checkpointing": ("history", "bert", {CHECKPOINTING: True}),
    "bf16": ("history", "bert", {"bf16": True}),
    "no_average": ("history", "llama", {"average_tokens_across_devices": False}),
    "smoothing": (("label_smoothing_factor=0.1", "alpha=0.8"), "bert", {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize(("case", "name", "options"), classes(TEXT_OPTIONS))
def test_options_of_text_models(case, name, options, tmp_path):
    def script(case, folder):
        model = make_model(name)
        trainer = case.train(folder, model, make_samples(name, 10), data_collator=collate, **options)
        hooks = model.get_input_embeddings()._forward_hooks.values()
        assert not any("neftune" in repr(hook) for hook in hooks)
        return trainer

    case.check(script, tmp_path)


@pytest.mark.parametrize("step", [1, 3, 4])
@with_each_class("history")
def test_resume_at_any_step(case, step, tmp_path):
    def script(case, folder):
        options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
        whole = texts(case, folder, **options)
        resumed = texts(case, folder, resume=step, **options)
        assert same_weights(whole.model, resumed.model)
        assert resumed.state.log_history[step]["loss"] == whole.state.log_history[step]["loss"]
        return resumed

    case.check(script, tmp_path)


@with_each_class("history")
def test_resume_with_accumulation_from_the_latest_checkpoint(case, tmp_path):
    def script(case, folder):
        options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
        options |= {"num_train_epochs": 3}
        whole = points(case, folder, **options)
        (folder / "checkpoint-6").rename(folder / "last")
        resumed = case.make(folder, Linear(), Points(), **options)
        resumed.train(resume_from_checkpoint=True)
        assert same_weights(whole.model, resumed.model)
        return resumed

    case.check(script, tmp_path)


@with_each_class("history")
def test_resume_for_more_epochs(case, tmp_path):
    def script(case, folder):
        points(case, folder, save_strategy="epoch")
        trainer = points(case, folder, save_strategy="epoch", num_train_epochs=4, resume=6)
        assert trainer.state.global_step == 12
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_resume_of_what_is_finished(case, tmp_path):
    def script(case, folder):
        whole = points(case, folder, save_strategy="epoch")
        resumed = points(case, folder, save_strategy="epoch", resume=6)
        assert same_weights(whole.model, resumed.model)
        return resumed

    case.check(script, tmp_path)


@pytest.mark.parametrize("step", [2, 4])
@with_each_class("history")
def test_ignore_data_skip(case, step, tmp_path):
    def script(case, folder):
        options = {"save_strategy": "steps", "save_steps": step, "ignore_data_skip": True, "num_train_epochs": 3}
        points(case, folder, **options)
        trainer = points(case, folder, resume=step, **options)
        assert trainer.state.global_step == 9
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_best_model_and_limit_of_checkpoints(case, tmp_path):
    def script(case, folder):
        scores = iter([0.1, 0.9, 0.3, 0.2, 0.1])
        options = {"num_train_epochs": 5, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2}
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_dataset": Points(6)}
        trainer = points(case, folder, compute_metrics=lambda _: {"score": next(scores)}, **options)
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-6"]
        weights = load_file(folder / "checkpoint-6" / "model.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_save_only_model_and_save_model(case, tmp_path):
    def script(case, folder):
        trainer = texts(case, folder, save_strategy="epoch", save_only_model=True)
        trainer.save_model(folder / "final")
        loaded = type(trainer.model).from_pretrained(folder / "final")
        assert same_weights(loaded, trainer.model)
        names = {path.name for path in (folder / "checkpoint-3").iterdir()}
        assert "optimizer.pt" not in names and "model.safetensors" in names
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_training_twice(case, tmp_path):
    def script(case, folder):
        trainer = points(case, folder)
        trainer.train()
        return trainer

    case.check(script, tmp_path)


# Callbacks


EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Notes(TrainerCallback):
    """Notes every event and which keyword arguments came with the event."""

    def __init__(self):
        self.events = []
        for name in EVENTS:
            setattr(self, name, lambda args, state, control, name=name, **kwargs: self.note(name, state, kwargs))

    def note(self, name, state, kwargs):
        self.events.append((name, state.global_step, sorted(kwargs)))


@with_each_class("history")
def test_events_of_callbacks(case, tmp_path):
    def script(case, folder):
        notes = Notes()
        options = {"eval_dataset": Points(6), "eval_strategy": "epoch", "save_strategy": "epoch"}
        return points(case, folder, callbacks=[notes], gradient_accumulation_steps=2, **options), notes.events

    case.check(script, tmp_path)


class StopsEpochs(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step % 2 == 0


class StopsTraining(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


class StopsAfterAnEpoch(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 6


class Asks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_evaluate = control.should_save = state.global_step == 2


CALLBACKS = (StopsEpochs, StopsTraining, StopsAfterAnEpoch, Asks)


@pytest.mark.parametrize(("case", "callback"), classes({cls.__name__: ("history", cls) for cls in CALLBACKS}))
def test_callbacks_that_control_the_loop(case, callback, tmp_path):
    def script(case, folder):
        options = {"num_train_epochs": 4, "eval_dataset": Points(6), "callbacks": [callback]}
        return points(case, folder, **options), sorted(path.name for path in folder.glob("checkpoint-*"))

    case.check(script, tmp_path)


# Optimizers


@with_each_class("history")
def test_an_optimizer_of_ones_own(case, tmp_path):
    def script(case, folder):
        model = Linear()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        schedule = get_linear_schedule_with_warmup(optimizer, 2, 6)
        trainer = case.train(folder, model, Points(), optimizers=(optimizer, schedule))
        assert trainer.lr_scheduler is schedule
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_an_optimizer_class(case, tmp_path):
    def script(case, folder):
        return points(case, folder, optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.1}))

    case.check(script, tmp_path)


@with_each_class("history")
def test_create_optimizer_and_scheduler(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def create_optimizer(self, model=None):
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2)
                return self.optimizer

            def create_scheduler(self, num_training_steps, optimizer=None):
                self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
                return self.lr_scheduler

        return points(case, folder, trainer=Own)

    case.check(script, tmp_path)


@with_each_class("history")
def test_reduce_on_plateau(case, tmp_path):
    def script(case, folder):
        options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
        options |= {"metric_for_best_model": "score", "lr_scheduler_kwargs": {"patience": 0}}
        return points(case, folder, eval_dataset=Points(6), compute_metrics=lambda _: {"score": 1.0}, **options)

    case.check(script, tmp_path)


# What is said


@pytest.mark.parametrize("name", ["bert", "llama", "bert_tokens"])
@with_each_class("history")
def test_no_warning_that_the_stock_class_does_not_give(case, name, tmp_path):
    def script(case, folder):
        logging.warning_once.cache_clear()  # which transformers says once in a process
        with lines_of("transformers", level="WARNING") as lines:
            options = {"eval_dataset": make_samples(name, 4), "eval_strategy": "epoch", "save_strategy": "epoch"}
            trainer = texts(case, folder, name, **options)
        return trainer, sorted(set(lines))

    case.check(script, tmp_path)
