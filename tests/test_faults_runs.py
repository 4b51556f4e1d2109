"""Faults of the worst kind: whole runs that choose, resume, schedule or share the wrong thing in silence."""

import copy
import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node
from helpers import (
    Samples,
    collate,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    train,
)
from PIL import Image
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDConfig, SelfKDTrainer, Seq2SeqSelfKDConfig
from hf_selfkd.checks import sharded_by
from hf_selfkd.heads import heads_of


pytestmark = pytest.mark.trains


# Which checkpoint is the best

LOWER = ["nll", "brier", "ece", "ece_15", "aurc", "eaurc", "token_nll", "token_ece", "perplexity"]


@pytest.mark.parametrize("config", [SelfKDConfig, Seq2SeqSelfKDConfig])
@pytest.mark.parametrize("prefix", ["", "eval_", "eval_validation_", "eval_head0_"])
@pytest.mark.parametrize("name", LOWER)
def test_metrics_that_are_better_when_lower_are_minimized(tmp_path, config, prefix, name):
    assert config(str(tmp_path), metric_for_best_model=prefix + name).greater_is_better is False
    asked = {"metric_for_best_model": prefix + name, "greater_is_better": True}
    refused(lambda: config(str(tmp_path), **asked), "metric_for_best_model", "greater_is_better=False")


@pytest.mark.parametrize("name", ["accuracy", "eval_accuracy", "eval_token_accuracy", "f1", "eval_balance", "spiece"])
def test_other_metrics_are_left_to_the_stock_class(tmp_path, name):
    expected = TrainingArguments(str(tmp_path), metric_for_best_model=name).greater_is_better
    assert SelfKDConfig(str(tmp_path), metric_for_best_model=name).greater_is_better is expected is True


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_the_checkpoint_with_the_lowest_error_is_kept(tmp_path, alpha):
    scores = iter([0.4, 0.1, 0.3])
    options = {"metric_for_best_model": "ece", "load_best_model_at_end": True, "alpha": alpha}
    options |= {"save_strategy": "epoch", "eval_strategy": "epoch", "eval_dataset": make_samples("vit", 4)}
    trainer = train(
        tmp_path, "vit", make_samples("vit", 8), compute_metrics=lambda _: {"ece": next(scores)}, **options
    )
    assert trainer.state.best_metric == 0.1 and trainer.state.best_model_checkpoint.endswith("checkpoint-4")


def test_plain_arguments_that_would_keep_the_worst_checkpoint_are_refused(tmp_path):
    """The stock class has put `greater_is_better=True` there: a sentence says so, and nothing is changed."""
    args = TrainingArguments(str(tmp_path), metric_for_best_model="eval_nll", use_cpu=True)
    assert args.greater_is_better is True
    made = lambda: SelfKDTrainer(make_model("vit"), args, train_dataset=make_samples("vit"))  # noqa: E731
    refused(made, "metric_for_best_model='eval_nll'", "greater_is_better=False")
    args.greater_is_better = False
    made()


def test_a_search_without_an_objective_minimizes_the_loss_of_the_evaluation(tmp_path, monkeypatch):
    """The stock default adds all metrics up, of which some are better when lower."""
    asked = {}

    def search(self, *arguments, **named):
        given = inspect.signature(stock).bind(self, *arguments, **named).arguments
        asked.update(objective=given["compute_objective"], direction=given["direction"])

    stock = Trainer.hyperparameter_search
    monkeypatch.setattr(Trainer, "hyperparameter_search", search)
    trainer = make_trainer(tmp_path, None, make_samples("vit"), model_init=lambda: make_model("vit"))
    trainer.hyperparameter_search()
    assert asked["direction"] == "minimize"
    assert asked["objective"]({"eval_accuracy": 0.9, "eval_loss": 0.5, "eval_ece": 70.0}) == 0.5
    refused(lambda: trainer.hyperparameter_search(direction="maximize"), "direction='maximize'", "compute_objective")
    own = lambda metrics: metrics["eval_accuracy"]  # noqa: E731
    trainer.hyperparameter_search(compute_objective=own, direction="maximize")
    assert asked["objective"] is own and asked["direction"] == "maximize"


# Resuming


def other_inputs(samples, kind):
    """The same labels of other samples."""
    items = copy.deepcopy(samples.items)
    if kind == "all":
        inputs = [item["input_ids"] for item in items][::-1]
    else:  # the last word of the last sample only
        inputs = [item["input_ids"] for item in items]
        inputs[-1] = [*inputs[-1][:-1], 3 + inputs[-1][-1] % 26]
    return Samples([item | {"input_ids": words} for item, words in zip(items, inputs, strict=True)])


@pytest.mark.parametrize("kind", ["all", "one"])
@pytest.mark.parametrize("step", [6, 4])
def test_other_inputs_with_the_same_labels_are_refused_on_resume(tmp_path, kind, step):
    """A history of other samples would be served, whose labels tell nothing; the error names both sides."""
    samples = make_samples("texts")
    train(tmp_path, "bert", samples, save_strategy="steps", save_steps=2, teacher="history")
    refused(
        lambda: train(tmp_path, "bert", other_inputs(samples, kind), resume=step, teacher="history"),
        "other inputs",
        f"checkpoint-{step}",
        "from_pretrained",
    )
    train(tmp_path, "bert", samples, resume=step, teacher="history")


@dataclass(slots=True)
class Slotted:
    """An item with fields and no dictionary of them."""

    image: Image.Image
    label: int


def pictures(seed):
    """Images as files give them, with the labels of every seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(256, size=(8, 16, 16, 3), dtype=np.uint8)
    return [Slotted(Image.fromarray(image), number % 5) for number, image in enumerate(pixels)]


def as_tensors(items):
    images = torch.stack([torch.from_numpy(np.array(item.image)).permute(2, 0, 1) / 255 for item in items])
    return {"pixel_values": images, "labels": torch.tensor([item.label for item in items])}


def test_other_images_in_items_of_any_make_are_refused_on_resume(tmp_path):
    options = {"data_collator": as_tensors, "teacher": "history", "remove_unused_columns": False}
    train(tmp_path, "vit", pictures(0), save_strategy="epoch", **options)
    refused(lambda: train(tmp_path, "vit", pictures(1), resume=4, **options), "other inputs", "checkpoint-4")
    assert train(tmp_path, "vit", pictures(0), resume=4, **options).state.global_step == 6


def test_random_augmentation_is_not_taken_for_other_inputs(tmp_path):
    def noisy(item):
        return item | {"pixel_values": item["pixel_values"] + 0.1 * torch.randn(3, 16, 16)}

    samples = make_samples("images", transform=noisy)
    train(tmp_path, "vit", samples, save_strategy="steps", save_steps=3, teacher="history")
    assert train(tmp_path, "vit", samples, resume=3, teacher="history").state.global_step == 18


RESUMED = [(8, 2, 3), (8, 4, 9), (2, 4, 8), (4, 8, 9), (4, 3, 8)]  # batch size before, after, and the step between
SCHEDULES = [("history", "cosine"), ("history", "linear_step"), ("snapshot", "linear"), ("ema", "cosine")]


@pytest.mark.parametrize(
    ("before", "after", "at", "teacher", "schedule"),
    [(*resumed, "history", "linear") for resumed in RESUMED]
    + [(*RESUMED[place], *schedule) for place, schedule in enumerate(SCHEDULES)],
)
def test_alpha_stays_in_its_range_whatever_batches_a_run_is_resumed_with(
    tmp_path, before, after, at, teacher, schedule
):
    """Epochs of the method are counted by the method: alpha grows, never passes what is asked and ends there."""
    options = {"alpha_schedule": schedule, "teacher": teacher, "num_train_epochs": 4, "save_strategy": "steps"}
    samples = make_samples("vit", 24)
    train(tmp_path, "vit", samples, per_device_train_batch_size=before, save_steps=at, **options)
    again = train(tmp_path, "vit", samples, per_device_train_batch_size=after, resume=at, save_steps=100, **options)
    alphas = logged(again, "alpha", after=at)
    assert len(alphas) > 1 and alphas == sorted(alphas) and max(alphas) < 0.8 + 1e-6
    assert 0 < alphas[0] and alphas[-1] == pytest.approx(0.8, abs=1e-6)


# What the user hears


class StopsEarly(TrainerCallback):
    """Ends training after so many epochs."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch >= self.epochs


@pytest.mark.parametrize("schedule", ["linear", "cosine", "linear_step"])
@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_a_run_that_stops_before_alpha_has_grown_says_so(tmp_path, caplog, teacher, schedule):
    options = {"num_train_epochs": 12, "teacher": teacher, "alpha_schedule": schedule, "logging_steps": 100}
    trainer = train(tmp_path, "vit", make_samples("vit", 8), callbacks=[StopsEarly(3)], **options)
    (line,) = [record.getMessage() for record in caplog.records if "alpha reached" in record.getMessage()]
    reached = trainer.distiller.alpha_reached
    assert 0 < reached < 0.3 and f"{reached:.3g} of 0.8" in line and "epoch 3 of the 12" in line
    assert "constant" in line


def test_early_stopping_says_it_and_a_whole_run_does_not(tmp_path, caplog):
    scores = iter([0.9] + [0.1] * 30)
    options = {"num_train_epochs": 20, "eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 100}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    options |= {"eval_dataset": make_samples("vit", 4), "compute_metrics": lambda _: {"accuracy": next(scores)}}
    train(tmp_path / "stopped", "vit", make_samples("vit", 8), callbacks=[EarlyStoppingCallback(2)], **options)
    assert any("alpha reached" in record.getMessage() for record in caplog.records)
    caplog.clear()
    train(tmp_path / "whole", "vit", make_samples("vit", 8), num_train_epochs=4)
    train(tmp_path / "constant", "vit", make_samples("vit", 8), callbacks=[StopsEarly(2)], alpha_schedule="constant")
    assert not any("alpha reached" in record.getMessage() for record in caplog.records)


def test_another_planned_length_on_resume_is_told(tmp_path, caplog):
    samples = make_samples("vit", 8)
    train(tmp_path, "vit", samples, save_strategy="epoch")
    train(tmp_path, "vit", samples, save_strategy="epoch", resume=4, num_train_epochs=9)
    (line,) = [record.getMessage() for record in caplog.records if "schedule of alpha was" in record.getMessage()]
    assert "in 3 epochs" in line and "in 9 epochs" in line


# Models that are spread over devices


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
@pytest.mark.parametrize("options", [{}, {"teacher": "snapshot"}, {"teacher": "ema"}])
def test_parallelism_that_splits_samples_is_refused_by_name(tmp_path, monkeypatch, kind, options):
    names = {"tp": "tensor", "cp": "context", "sp": "sequence"}
    monkeypatch.setattr(SelfKDTrainer, f"get_{kind}_size", lambda self: 2)
    refused(lambda: make_trainer(tmp_path, "gpt2", make_samples("gpt2"), **options), f"{names[kind]} parallelism")


def spread(**facts):
    """What is asked of a trainer to find out what shards its model."""
    sizes = {f"get_{kind}_size": (lambda size: lambda: size)(facts.pop(kind, 1)) for kind in ("tp", "cp", "sp")}
    return SimpleNamespace(**({"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | sizes | facts))


def plugged(engine, **facts):
    """An accelerator with a plugin for an engine."""
    return SimpleNamespace(state=SimpleNamespace(**{f"{engine}_plugin": SimpleNamespace(**facts)}))


SHARDED = {
    "FSDP1": {"is_fsdp_enabled": True, "accelerator": plugged("fsdp", fsdp_version=1)},
    "FSDP2": {"is_fsdp_enabled": True, "accelerator": plugged("fsdp", fsdp_version=2)},
    "DeepSpeed ZeRO-3": {"is_deepspeed_enabled": True, "accelerator": plugged("deepspeed", zero_stage=3)},
    "sharding at load time": {"is_distributed_loading_by_transformers": True},
    "tensor parallelism": {"tp": 2},
    "context parallelism": {"cp": 2},
    "sequence parallelism": {"sp": 4},
}


def test_what_shards_a_model_is_found():
    assert sharded_by(spread()) is None
    for stage in (1, 2):  # which leave the weights whole
        facts = {"is_deepspeed_enabled": True, "accelerator": plugged("deepspeed", zero_stage=stage)}
        assert sharded_by(spread(**facts)) is None
    assert {name: sharded_by(spread(**facts)) for name, facts in SHARDED.items()} == {name: name for name in SHARDED}


@pytest.mark.parametrize("name", ["FSDP1", "DeepSpeed ZeRO-3", "sharding at load time"])
@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_teachers_that_copy_weights_are_refused_where_weights_are_sharded(tmp_path, monkeypatch, name, teacher):
    """And at their first word by name, where `teacher="auto"` would have chosen one."""
    monkeypatch.setattr("hf_selfkd.checks.sharded_by", lambda trainer: name)
    refused(lambda: make_trainer(tmp_path, "gpt2", make_samples("gpt2"), teacher=teacher), name, "teacher='history'")
    samples = make_samples("gpt2")
    auto = make_trainer(tmp_path, "gpt2", samples, data_collator=lambda items: collate(items[:1]))
    refused(auto.train, name, "teacher='snapshot'")
    assert auto.state.global_step == 0
    assert train(tmp_path, "gpt2", samples, teacher="history", num_train_epochs=2).state.global_step == 12


@pytest.mark.parametrize("files", [1, 2])
def test_streams_that_are_split_already_are_refused(tmp_path, monkeypatch, files):
    """Accelerate would split them once more: of 32 samples the two processes would read 16 or fewer together."""
    stream = datasets.Dataset.from_list(make_samples("plain_bert", 32).items).to_iterable_dataset(num_shards=files)
    parts = [split_dataset_by_node(stream, rank, 2) for rank in range(2)]
    loaders = [prepare_data_loader(DataLoader(parts[n], 2), num_processes=2, process_index=n) for n in range(2)]
    read = [inputs for loader in loaders for inputs in loader.dataset]
    assert len(read) <= 16
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    options = {"teacher": "snapshot", "max_steps": 8, "alpha_schedule": "linear_step"}
    refused(
        lambda: make_trainer(tmp_path, "plain_bert", parts[0], **options),
        "is split between processes already",
        "whole",
    )
    make_trainer(tmp_path, "plain_bert", stream, **options)


# What one trainer leaves to the next


@pytest.mark.parametrize("heads", ["byot", AuxiliaryHeadsConfig.resolve("lsskd")])
@pytest.mark.parametrize("config", [SelfKDConfig, TrainingArguments])
def test_arguments_are_never_changed_and_the_next_trainer_has_no_heads(tmp_path, heads, config):
    args = config(str(tmp_path), use_cpu=True, report_to=[])
    before = copy.deepcopy(vars(args))
    first = SelfKDTrainer(make_model("vit"), args, train_dataset=make_samples("vit"), auxiliary_heads=heads)
    assert first.args is args and heads_of(first.model) is not None
    second = SelfKDTrainer(make_model("vit"), args, train_dataset=make_samples("vit"))
    assert heads_of(second.model) is None
    changed = [name for name, value in vars(args).items() if before.get(name, value) != value]
    assert set(changed) <= {"distributed_state"}  # an object that compares by identity


FAILING = {
    "fields": {"metric_for_best_model": "ece", "greater_is_better": True},
    "engine": {"use_liger_kernel": True},
    "upstream": {"callbacks": 3},
    "optimizer": {"optimizers": "foreign"},
    "metrics": {"evaluate_heads": True, "chunked_logits": True},
}


@pytest.mark.parametrize("reason", FAILING)
def test_a_constructor_that_fails_leaves_the_model_as_it_was(tmp_path, reason):
    model, options = make_model("vit"), dict(FAILING[reason])
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    forward, ignored = model.forward.__func__, model._keys_to_ignore_on_save
    if reason == "optimizer":
        options["optimizers"] = (torch.optim.SGD(model.parameters(), 0.1), None)
    with pytest.raises((ValueError, TypeError)):
        make_trainer(tmp_path, model, make_samples("vit"), auxiliary_heads=AuxiliaryHeadsConfig(), **options)
    assert heads_of(model) is None
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert model.forward.__func__ is forward and model._keys_to_ignore_on_save == ignored
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Trial(dict):
    """What a search gives to a run."""

    number = 0

    @property
    def params(self):
        return dict(self)


def test_each_trial_of_a_search_trains_its_own_heads(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    options = {"model_init": lambda: make_model("vit"), "num_train_epochs": 2}
    trainer = make_trainer(tmp_path, None, make_samples("vit", 8), **options)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, dict
    for asked in (None, "byot", "joint", "byot"):
        trainer.train(trial=Trial(auxiliary_heads=asked))
        heads = heads_of(trainer.model)
        assert bool(logged(trainer, "head0_loss")) == (heads is not None) == (asked is not None)
        if heads is not None:
            expected = AuxiliaryHeadsConfig.resolve(asked)
            assert heads.config == expected.with_choices(heads.config.head, heads.config.views)
            held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
            assert {id(p) for p in heads.parameters()} <= held


# Names that are the user's


@pytest.mark.parametrize("name", ["sample_id", "id", "ids", "mix_partner", "mix_lambda", "index"])
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_columns_of_the_users_own_reach_collator_and_model(tmp_path, name, teacher):
    """Names that self-distillation once used for itself are the user's, in training and evaluation."""
    samples = make_samples("texts", 8)
    items = Samples([item | {name: 100 + n} for n, item in enumerate(samples.items)])
    seen = {"collator": set(), "model": set()}

    def collator(batch):
        seen["collator"].update(item[name] for item in batch)
        return collate(batch) | {name: torch.tensor([item[name] for item in batch])}

    model = make_model("bert")
    forward = type(model).forward

    class Takes(type(model)):
        def forward(self, **inputs):
            seen["model"].update(inputs.pop(name).tolist())
            return forward(self, **inputs)

    model.__class__ = Takes
    options = {"remove_unused_columns": False, "eval_dataset": items, "eval_strategy": "epoch", "teacher": teacher}
    train(tmp_path, model, items, data_collator=collator, **options)
    assert seen == {"collator": set(range(100, 108)), "model": set(range(100, 108))}


def test_alpha_of_a_trial_is_that_of_its_teacher(tmp_path):
    options = {"model_init": lambda: make_model("vit"), "num_train_epochs": 1}
    trainer = make_trainer(tmp_path, None, make_samples("vit", 8), **options)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, dict
    for trial, expected in (
        (Trial(teacher="rank"), 0.1),
        (Trial(teacher="history"), 0.8),
        (Trial(teacher="rank", alpha="0.8"), 0.8),
    ):
        trainer._hp_search_setup(trial)
        assert trainer.method.alpha == expected
