"""
XLA, as on TPUs: what is compiled, and when the host waits. Needs torch_xla, whose own CPU device is enough:

    pip install torch==2.9.0 torch_xla==2.9.0 && pytest tests/test_xla.py
"""

import os

import numpy as np
import pytest
import torch
from helpers import CLASSES, collate, difference, make_samples, make_trainer, state_of
from torch.nn.functional import pad
from transformers import Trainer, TrainerCallback

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDTrainer


os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
metrics = pytest.importorskip("torch_xla.debug.metrics")
# What the stock trainer itself calls on XLA.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use torch_xla.sync:DeprecationWarning")]

LENGTH = 12  # to which all texts are padded


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


def run(out, model, trainer=SelfKDTrainer, device="xla", size=18, **more):
    """Five epochs of four steps; two samples are left out of each epoch."""
    counts = Counts()
    options = {"use_cpu": device == "cpu", "optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 5}
    options |= {"logging_strategy": "epoch", "dataloader_drop_last": True, "data_collator": of_one_shape}
    made = make_trainer(out, model, make_samples(model, size), trainer, [counts], **options | more)
    assert made.args.device.type == device
    made.train()
    return made, counts


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """How often the host waits in a step of the stock trainer."""
    _, counts = run(tmp_path_factory.mktemp("stock"), "plain_vit", Trainer)
    return max(counts.waits[-1])


def past(tmp_path):
    path = tmp_path / "past.npz"
    np.savez(path, probs=np.random.default_rng(0).dirichlet(np.ones(CLASSES), 18))
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


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_again_and_nobody_waits(name, stock, tmp_path):
    """
    The first past prediction and the first exchange of tables come with the second and third epoch: these compile,
    the ones after them do not. In a step the host waits as often as the stock trainer's.
    """
    model, more = CASES[name]
    more = {key: value(tmp_path) if callable(value) else value for key, value in more.items()}
    made, counts = run(tmp_path / "xla", model, **more)
    assert counts.compiles[0] > 0 and counts.compiles[3:] == [0, 0], counts.compiles
    held_by_host = more.get("history_device") in ("cpu", "disk") or name == "causal_chunked"
    assert max(counts.waits[-1]) <= stock or held_by_host, counts.waits
    plain, _ = run(tmp_path / "cpu", model, device="cpu", **more)
    weights = {key: tensor.cpu() for key, tensor in state_of(made).items()}
    assert difference(weights, state_of(plain)) < 1e-4
    if made.teacher.kind == "history":
        ids = range(18)
        torch.testing.assert_close(
            made.teacher.stored(ids), plain.teacher.stored(ids), atol=1e-4, rtol=0, equal_nan=True
        )
