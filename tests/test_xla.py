"""
XLA, as on TPUs: what is compiled, and when the host waits. Needs torch_xla, whose own CPU device is enough:

    pip install torch==2.9.0 torch_xla==2.9.0 && pytest tests/test_xla.py
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, collate, difference, make_samples, make_trainer, state_of
from torch.nn.functional import pad
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDTrainer


os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
metrics = pytest.importorskip("torch_xla.debug.metrics")
# What the stock trainer itself calls on XLA.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use torch_xla.sync:DeprecationWarning")]

LENGTH = 12  # to which all texts are padded
SIZE = 18  # of which an epoch has 16; of texts 16, so that their words are as many in every epoch


def of_one_shape(items):
    batch = collate(items)
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        if name in batch and batch[name].dim() == 2:
            batch[name] = pad(batch[name], (0, LENGTH - batch[name].shape[1]), value=filler)
    return batch


def count(name):
    found = metrics.metric_data(name)
    return 0 if found is None else found[0]


class Counts(TrainerCallback):
    """What was compiled in each epoch, and how often the host waited for the device in each step but the first."""

    def __init__(self):
        self.compiled, self.waited = [], []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.compiled.append(count("CompileTime"))
        self.waited.append([])

    def on_step_end(self, args, state, control, **kwargs):
        self.waited[-1].append(count("TransferFromDeviceTime"))

    def on_train_end(self, args, state, control, **kwargs):
        self.compiled.append(count("CompileTime"))

    @property
    def compiles(self):
        return np.diff(self.compiled).tolist()

    @property
    def waits(self):
        return [np.diff(epoch).tolist() for epoch in self.waited]


class Shuffled(Sampler):
    """Another order in every epoch, the same on every device: accelerate draws others on XLA."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def __len__(self):
        return self.size

    def __iter__(self):
        self.epoch += 1
        return iter(np.random.default_rng(self.epoch).permutation(self.size).tolist())


class ShuffledTrainer(SelfKDTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return Shuffled(len(self.train_dataset))


def run(out, model, trainer=ShuffledTrainer, device="xla", **more):
    """Six epochs of four steps."""
    counts = Counts()
    options = {"use_cpu": device == "cpu", "optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 6}
    options |= {"logging_strategy": "epoch", "dataloader_drop_last": True, "data_collator": of_one_shape}
    size = SIZE if model.endswith("vit") else 16
    made = make_trainer(out, model, make_samples(model, size), trainer, [counts], **options | more)
    assert made.args.device.type == device
    made.train()
    return made, counts


def outcome(trainer):
    """Weights and what the history holds."""
    ids = range(len(trainer.train_dataset))
    stored = trainer.teacher.stored(ids) if trainer.teacher.kind == "history" else torch.zeros(1)
    return {name: tensor.cpu() for name, tensor in state_of(trainer).items()}, stored


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """How often the host waits in a step of the stock trainer, for each model."""

    @cache
    def waits(model):
        _, counts = run(tmp_path_factory.mktemp("stock"), model, Trainer)
        assert count("CompileTime") > 0 and count("TransferFromDeviceTime") > 0  # they do count
        return max(counts.waits[-1])

    return waits


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """What each case gives without XLA, which is left out of a process as a whole."""
    out = tmp_path_factory.mktemp("cpu")
    environment = os.environ | {"USE_TORCH_XLA": "0", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, __file__, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out / "results.pt")


def past(tmp_path):
    tmp_path.mkdir(parents=True, exist_ok=True)
    path = tmp_path / "past.npz"
    np.savez(path, probs=np.random.default_rng(0).dirichlet(np.ones(CLASSES), SIZE))
    return str(path)


CASES = {
    "history": ("plain_vit", {}),
    "history_cpu": ("plain_vit", {"history_device": "cpu"}),
    "history_disk": ("plain_vit", {"history_device": "disk"}),
    "history_top_k": ("plain_vit", {"history_top_k": 2}),
    "linear_step": ("plain_vit", {"alpha_schedule": "linear_step"}),
    "snapshot": ("plain_vit", {"teacher": "snapshot"}),
    "ema": ("plain_vit", {"teacher": "ema"}),
    "rank": ("plain_vit", {"teacher": "rank", "alpha": 0.4}),
    "predictions": ("plain_vit", {"teacher_predictions": past}),
    "tokens": ("plain_bert_tokens", {}),
    "causal_top_k": ("plain_gpt2", {"history_top_k": 4}),
    "causal_chunked": ("plain_gpt2", {"chunked_logits": True}),
    "heads": ("plain_vit", {"auxiliary_heads": "lsskd_full"}),
    "heads_history": ("plain_vit", {"auxiliary_heads": "lsskd", "teacher": "history"}),
    "heads_teach": ("plain_vit", {"auxiliary_heads": AuxiliaryHeadsConfig(heads_to_model_weight=1.0)}),
    "heads_native": ("plain_deep_vit", {"auxiliary_heads": "exits"}),
    "heads_causal": ("plain_gpt2", {"auxiliary_heads": "byot"}),
}


def run_case(name, out, device):
    model, more = CASES[name]
    more = {key: value(out) if callable(value) else value for key, value in more.items()}
    return run(out, model, device=device, **more)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_again_and_nobody_waits(name, stock, on_cpu, tmp_path):
    """
    The first past prediction and the first exchange of tables come with the second and third epoch: these compile.
    After them no step does (the end of the training, in the sixth, may). In a step the host waits no more than in one
    of the stock trainer.
    """
    made, counts = run_case(name, tmp_path, "xla")
    # A shape that changed would compile in each of four steps. The end of an epoch has a program or two of its own.
    assert counts.compiles[3] <= 2 and max(counts.compiles[4:]) <= 1, counts.compiles
    assert max(counts.waits[-1]) <= stock(CASES[name][0]), counts.waits
    (weights, stored), (expected, rows) = outcome(made), on_cpu[name]
    assert difference(weights, expected) < 1e-4
    torch.testing.assert_close(stored, rows, atol=1e-4, rtol=0, equal_nan=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save({name: outcome(run_case(name, folder / name, "cpu")[0]) for name in CASES}, folder / "results.pt")
