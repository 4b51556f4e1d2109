"""Arguments of a user's own, precision, compilation, adapters, search: whatever the stock class does with them."""

import os
import sys
from dataclasses import dataclass, field

import pytest
import torch
import transformers.integrations
import transformers.trainer
from conformance import Linear, Points, classes, with_each_class
from helpers import collate, make_model, make_samples, same_weights
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import TrainingArguments
from transformers.trainer_utils import HPSearchBackend


pytestmark = pytest.mark.trains


def texts(case, folder, model="bert", kind=None, **options):
    kind = kind or model
    model = make_model(model) if isinstance(model, str) else model
    return case.train(folder, model, make_samples(kind, 10), data_collator=collate, **options)


# The arguments object


@with_each_class("history")
def test_the_arguments_stay_the_users_own(case, tmp_path):
    def script(case, folder):
        args = case.arguments(folder)
        before = dict(vars(args))
        trainer = case.make(folder, Linear(), Points(), args=args)
        assert trainer.args is args
        trainer.train()
        assert trainer.args is args and type(args) is case.config
        assert vars(args) == before
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_no_arguments(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = case.trainer(Linear(), train_dataset=Points())
    assert isinstance(trainer.args, TrainingArguments)
    assert trainer.args.output_dir == "tmp_trainer"


@with_each_class("history")
def test_a_class_of_arguments_of_ones_own(case, tmp_path):
    def script(case, folder):
        @dataclass
        class Own(case.config):
            extra: float = field(default=0.5)

            @property
            def double(self):
                return 2 * self.extra

            def to_dict(self):
                return super().to_dict() | {"mine": self.double}

        class Uses(case.trainer):
            def training_step(self, *args, **kwargs):
                assert self.args.double == 3.0
                return super().training_step(*args, **kwargs)

        args = case.arguments(folder, Own, extra=1.5)
        trainer = case.train(folder, Linear(), Points(), trainer=Uses, args=args)
        assert type(trainer.args) is Own and trainer.args.to_dict()["mine"] == 3.0
        return trainer

    case.check(script, tmp_path)


CHANGES = {
    "learning_rate": {"learning_rate": 1e-3},
    "epochs": {"num_train_epochs": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "max_steps": {"max_steps": 4},
    "logging": {"logging_steps": 2},
    "seed": {"data_seed": 3},
    "save": {"save_strategy": "epoch"},
}


@pytest.mark.parametrize(("case", "changes"), classes({name: ("history", value) for name, value in CHANGES.items()}))
def test_arguments_changed_after_the_trainer_was_made(case, changes, tmp_path):
    def script(case, folder):
        args = case.arguments(folder)
        trainer = case.make(folder, Linear(), Points(), args=args)
        for name, value in changes.items():
            setattr(args, name, value)
        trainer.train()
        return trainer, len(list(folder.glob("checkpoint-*")))

    case.check(script, tmp_path)


@with_each_class("history")
def test_arguments_in_a_checkpoint_are_readable_without_the_package(case, tmp_path, monkeypatch):
    def script(case, folder):
        trainer = texts(case, folder, save_strategy="epoch")
        trainer.save_model(folder / "final")
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] == "hf_selfkd"]:
                patch.setitem(sys.modules, name, None)  # an import of the module is an ImportError
            for place in ("checkpoint-3", "final"):
                args = torch.load(folder / place / "training_args.bin", weights_only=False)
                assert isinstance(args, TrainingArguments)
                assert args.learning_rate == 1e-2 and args.output_dir == str(folder)
        return trainer

    case.check(script, tmp_path)


# Searching for parameters


class Trial(dict):
    """What a search gives to a run."""

    number = 0

    @property
    def params(self):
        return dict(self)


def search(asked):
    """A backend of `hyperparameter_search` that tries what it is given."""

    class Backend:
        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            found = []
            for number, values in enumerate(asked[:n_trials]):
                trial = Trial(values)
                trial.number = number
                trainer.train(trial=trial)
                found.append(trainer.compute_objective(trainer.evaluate()))
            trainer.found = found
            return min(found)

    return Backend


@with_each_class("history")
def test_hyperparameter_search(case, tmp_path, monkeypatch):
    tried = [{"learning_rate": 1e-4}, {"learning_rate": 3e-2, "num_train_epochs": 3}]
    backends = {HPSearchBackend.OPTUNA: search(tried)}
    monkeypatch.setattr(transformers.trainer, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends)
    monkeypatch.setattr(transformers.integrations, "hp_params", dict)

    def script(case, folder):
        trainer = case.make(folder, None, Points(), model_init=lambda: Linear(), eval_dataset=Points(8))
        best = trainer.hyperparameter_search(hp_space=dict, n_trials=2, backend="optuna")
        assert best == min(trainer.found) and trainer.found[0] > trainer.found[1]
        alone = case.train(folder, None, Points(), model_init=lambda: Linear(), **tried[1])
        assert same_weights(alone.model, trainer.model)
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_model_init(case, tmp_path):
    def script(case, folder):
        trainer = case.make(folder, None, Points(), model_init=lambda trial: Linear())
        trainer.train()
        first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        assert all(torch.equal(first[name], value) for name, value in trainer.model.state_dict().items())
        return trainer

    case.check(script, tmp_path)


# Batch size, determinism, compilation, precision


@with_each_class("history")
def test_auto_find_batch_size(case, tmp_path):
    class Small(Linear):
        def forward(self, x, labels=None):
            if len(x) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().forward(x, labels)

    def script(case, folder):
        options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
        trainer = case.train(folder, Small(), Points(), **options)
        assert trainer.state.train_batch_size <= 2
        return trainer, trainer.state.train_batch_size

    case.check(script, tmp_path)


@pytest.fixture
def determinism_restored(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    torch.use_deterministic_algorithms(False)


@with_each_class("history")
def test_full_determinism(case, tmp_path, determinism_restored):
    def script(case, folder):
        return texts(case, folder, full_determinism=True)

    case.check(script, tmp_path)


@with_each_class("history")
def test_compiled_with_the_eager_backend(case, tmp_path):
    def script(case, folder):
        torch.compiler.reset()
        return case.train(folder, Linear(), Points(), torch_compile=True, torch_compile_backend="eager")

    case.check(script, tmp_path)


@with_each_class("history")
def test_a_compiled_model_is_given(case, tmp_path):
    class TakesAnything(Linear):  # as the stock class thinks of a compiled model
        def forward(self, x, labels=None, **others):
            return super().forward(x, labels)

    def script(case, folder):
        torch.compiler.reset()
        model = torch.compile(TakesAnything(), backend="eager")
        return case.train(folder, model, Points(), label_names=["labels"], remove_unused_columns=False)

    case.check(script, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@with_each_class("history")
def test_weights_of_another_type(case, dtype, tmp_path):
    def script(case, folder):
        model = make_model("bert").to(dtype)
        trainer = texts(case, folder, model, "bert", optim="sgd", learning_rate=0.1, save_strategy="epoch")
        assert {value.dtype for value in trainer.model.parameters()} == {dtype}
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_bf16_autocast(case, tmp_path):
    def script(case, folder):
        return texts(case, folder, "llama", bf16=True, bf16_full_eval=True)

    case.check(script, tmp_path)


# Adapters


# The prompt predicts the first token too, which the stock class does not count: nothing is expected to the bit there.
ADAPTERS = {
    "lora_classifier": ("history", "bert", LoraConfig("SEQ_CLS", r=2, target_modules=["query"]), True),
    "lora_tokens": ("history", "bert_tokens", LoraConfig("TOKEN_CLS", r=2, target_modules=["query"]), True),
    "lora_causal": ("history", "llama", LoraConfig("CAUSAL_LM", r=2, target_modules=["q_proj"]), True),
    "prompt_causal": ("history", "llama", PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3), True),
    "prompt_causal_whole": ("history", "llama", PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3), False),
    "prompt_classifier": ("history", "bert", PromptTuningConfig("SEQ_CLS", num_virtual_tokens=3), True),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
@pytest.mark.parametrize(("case", "name", "config", "exact"), classes(ADAPTERS))
def test_adapters(case, name, config, exact, tmp_path):
    def script(case, folder):
        base = make_model(name)
        frozen = {key: value.clone() for key, value in base.state_dict().items()}
        model = get_peft_model(base, config)
        samples = make_samples(name, 10)
        if exact and name == "llama":
            samples = [item | {"labels": [-100, *item["labels"][1:]]} for item in samples]
        options = {"save_strategy": "epoch", "eval_strategy": "epoch", "eval_dataset": samples}
        options |= {"label_names": ["labels"], "remove_unused_columns": False, "data_collator": collate}
        trainer = case.train(folder, model, samples, **options)
        assert "adapter_config.json" in {path.name for path in (folder / "checkpoint-6").iterdir()}
        loaded = PeftModel.from_pretrained(make_model(name), folder / "checkpoint-6")
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[key])
        assert any(torch.equal(frozen[key], value) for key, value in make_model(name).state_dict().items())
        resumed = case.train(folder, get_peft_model(make_model(name), config), samples, resume=3, **options)
        assert same_weights(trainer.model, resumed.model)
        return trainer

    case.check(script, tmp_path, close=None if exact else 0.1)
