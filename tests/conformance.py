"""
The same script with each class: the stock trainer, ours at `alpha=0`, ours as it comes.

A test gives a `script(case, folder)` that does what a user would do, with `case.trainer` in the place of `Trainer` and
`case.config` in that of `TrainingArguments`. [`Case.check`] runs the script with the stock class too, and compares.
"""

import inspect
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from helpers import same_weights
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_selfkd import SelfKDConfig, SelfKDTrainer, Seq2SeqSelfKDConfig, Seq2SeqSelfKDTrainer


SHORT_RUN = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
OF_THE_TRAINER = set(inspect.signature(Trainer.__init__).parameters) - {"self", "model", "args"}
STOCK_OUTCOMES = {}  # by the name of the test
CLOCKS = ("runtime", "per_second", "preparation_time")


@dataclass
class Case:
    """
    One of the classes.

    Args:
        name (`str`): `"stock"`, `"alpha_0"` or `"defaults"`.
        expected (`str` or `tuple`):
            What ours does as it comes: the teacher that `teacher="auto"` finds (`"history"`, `"snapshot"`, `"none"`),
            `"plain"` where nothing is trained by the loop, or the parts of the sentence with which ours refuses.
    """

    name: str
    expected: str | tuple[str, ...] = "history"
    made: list[Trainer] = field(default_factory=list)

    @property
    def trainer(self):
        return Trainer if self.name == "stock" else SelfKDTrainer

    @property
    def seq2seq(self):
        return Seq2SeqTrainer if self.name == "stock" else Seq2SeqSelfKDTrainer

    @property
    def config(self):
        """The class of the arguments: ours only where a field of ours is set."""
        return SelfKDConfig if self.name == "alpha_0" else TrainingArguments

    @property
    def seq2seq_config(self):
        return Seq2SeqSelfKDConfig if self.name == "alpha_0" else Seq2SeqTrainingArguments

    def arguments(self, folder, config=None, **options):
        """Arguments of a short run on the CPU."""
        method = {"alpha": 0.0} if self.name == "alpha_0" else {}
        return (config or self.config)(str(folder), **(SHORT_RUN | method | options))

    def make(self, folder, model, dataset, trainer=None, args=None, config=None, **options):
        """A trainer; `options` are fields of the arguments or parameters of the trainer."""
        own = {name: options.pop(name) for name in list(options) if name in OF_THE_TRAINER}
        args = self.arguments(folder, config, **options) if args is None else args
        made = (trainer or self.trainer)(model, args, train_dataset=dataset, **own)
        made.remove_callback(PrinterCallback)
        self.made.append(made)
        return made

    def train(self, folder, model, dataset, resume=None, **options):
        """[`make`], trained, from the checkpoint of step `resume` if given."""
        trainer = self.make(folder, model, dataset, **options)
        trainer.train(resume_from_checkpoint=None if resume is None else f"{folder}/checkpoint-{resume}")
        return trainer

    def check(self, script, folder, close=None):
        """
        Run a script and hold the outcome against that of the stock class.

        Args:
            script (`Callable`): `script(case, folder)`; gives a trainer, or a trainer and facts that all share.
            folder (`Path`): for the runs.
            close (`float`, *optional*): how far weights may be from those of the stock class; equal by default.
        """
        self.made.clear()
        if self.name == "stock":
            self._stock_outcome(script, folder)
            return
        if self.name == "defaults" and isinstance(self.expected, tuple):
            self._check_refusal(script, folder)
            return
        stock, facts = self._stock_outcome(script, folder)
        with lines_of("hf_selfkd") as lines:
            ours, ours_facts = split(script(self, folder / "ours"))
        assert ours_facts == facts
        assert_same_steps(stock, ours)
        if self.name == "alpha_0" or self.expected in ("none", "plain"):
            assert_same_training(stock, ours, close)
        else:
            assert all(bool(value.isfinite().all()) for value in ours.model.state_dict().values())
            assert not same_weights(stock.model, ours.model)
        self._check_teacher(ours, [line for line in lines if "teacher='auto'" in line])

    def _stock_outcome(self, script, folder):
        """What the stock class makes of the script; one run serves the three cases of a test."""
        key = os.environ["PYTEST_CURRENT_TEST"].replace(self.name, "stock")
        if key not in STOCK_OUTCOMES:
            trainer, facts = split(script(Case("stock"), folder / "stock"))
            STOCK_OUTCOMES[key] = SimpleNamespace(model=trainer.model, state=trainer.state), facts
        return STOCK_OUTCOMES[key]

    def _check_refusal(self, script, folder):
        with pytest.raises(ValueError) as caught:
            script(self, folder / "ours")
        message = str(caught.value)
        assert "\n" not in message
        for part in self.expected:
            assert part in message
        assert all(trainer.state.global_step == 0 for trainer in self.made)

    def _check_teacher(self, trainer, lines):
        if self.name == "alpha_0" or self.expected == "plain":
            assert lines == []
            return
        kind = type(trainer.teacher).__name__.removesuffix("Teacher").lower() or "none"
        assert kind == self.expected
        if kind != "history":
            assert len(lines) == 1 and repr(kind) in lines[0]


def with_each_class(defaults="history"):
    """Run a test as `stock`, `alpha_0` and `defaults`; see [`Case`] for what `defaults` may be."""
    cases = [Case("stock"), Case("alpha_0"), Case("defaults", defaults)]
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def classes(expected):
    """The cases of a table: `expected` maps an id to what is expected as it comes and to further parameters."""
    return [
        pytest.param(case, *further, id=f"{name}-{case.name}")
        for name, (defaults, *further) in expected.items()
        for case in (Case("stock"), Case("alpha_0"), Case("defaults", defaults))
    ]


def split(outcome):
    """The trainer and the facts of a script."""
    return outcome if isinstance(outcome, tuple) else (outcome, None)


def assert_same_steps(stock, ours):
    """The same steps were taken, and everything was logged that the stock class logs."""
    assert ours.state.global_step == stock.state.global_step
    history, expected = ours.state.log_history, stock.state.log_history
    assert [entry["step"] for entry in history] == [entry["step"] for entry in expected]
    for entry, plain in zip(history, expected, strict=True):
        assert plain.keys() <= entry.keys()
        assert entry["epoch"] == plain["epoch"]


def assert_same_training(stock, ours, close=None):
    """The same weights, to the bit or to `close`, and the same log, whose sums may be rounded otherwise."""
    if close is None:
        assert same_weights(stock.model, ours.model)
    else:
        for one, other in zip(ours.model.state_dict().values(), stock.model.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=close)
        return
    for entry, plain in zip(ours.state.log_history, stock.state.log_history, strict=True):
        known = without_clocks(plain)
        assert {name: entry[name] for name in known} == pytest.approx(known, rel=1e-6, nan_ok=True)


def without_clocks(metrics):
    """What a run logs or returns, without what depends on the time."""
    return {name: value for name, value in metrics.items() if not name.endswith(CLOCKS)}


@contextmanager
def lines_of(name, level="INFO"):
    """What a logger and those below say meanwhile."""
    lines, logger = [], logging.getLogger(name)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


# Data and models of a user's own


class Points(Dataset):
    """Points `x [4]` of three classes that can be told, as dictionaries; `make` makes something else of each."""

    def __init__(self, size=10, make=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(3, (size,), generator=generator)
        self.x = torch.randn(size, 4, generator=generator) + self.y[:, None]
        self.make = make or (lambda x, y, index: {"x": x, "labels": y})

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.make(self.x[index], int(self.y[index]), index)


def columns(points):
    """The same points as columns."""
    return {"x": [points[n]["x"].tolist() for n in range(len(points))], "labels": points.y.tolist()}


def stack(pairs):
    """A batch of pairs `(x, label)`."""
    pairs = list(pairs)
    return {"x": torch.stack([x for x, _ in pairs]), "labels": torch.tensor([y for _, y in pairs])}


class Linear(nn.Module):
    """A linear classifier of points; `kind` is the loss it computes itself."""

    def __init__(self, outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, outputs)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def cross_entropy_of(outputs, labels, num_items_in_batch=None):
    """A `compute_loss_func` for outputs of any make."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else outputs
    total = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
