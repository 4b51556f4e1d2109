"""One forward pass with early exits: samples that are answered leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ..heads.auxiliary import AuxiliaryHeads, heads_of
from ..models import logits_of
from .replay import Plan, Tape, noted


class _Leave(BaseException):
    """Ends a forward pass at an exit, because some samples need not go on. No error, so nobody may catch it."""


# Of an exit, by its place, and its logits [R, C]: which of the R samples stay, as their places, or `None` for all.
Decide = Callable[[int, torch.Tensor], "torch.Tensor | None"]


def at_full_depth(model: nn.Module, heads: list[int], inputs: dict[str, Any]) -> list[torch.Tensor]:
    """
    What every exit and the model itself say of a batch.

    Args:
        model (`nn.Module`): with heads, in evaluation mode.
        heads (`list[int]`): the indices of the heads that are exits.
        inputs (`dict`): for the model.

    Returns:
        `list[torch.FloatTensor]`: logits `[B, C]` of the exits, from shallow to deep, and of the model.
    """
    own = heads_of(model)
    with own.watched():
        logits = logits_of(model(**inputs), has_loss=False)
    said = own.take_results().logits
    return [own.class_logits(said[index]).float() for index in heads] + [logits.float()]


class ExitPass:
    """
    Runs a model on a batch. When some samples leave at an exit, the forward pass of the model is begun anew for the
    others, with cut inputs, and whatever has been computed up to the exit is replayed (see [`Tape`]): so masks,
    pooling and everything else between the modules is what the class of the model makes of these samples.

    Args:
        model (`nn.Module`): with heads, in evaluation mode.
        heads (`list[int]`): the indices of the heads that may answer, from shallow to deep.
        temperatures (`list[float]`): that logits are divided by, of each of these heads and of the model itself.
        plan ([`Plan`], *optional*): how to cut; without one, samples leave together or not at all.
    """

    def __init__(self, model: nn.Module, heads: list[int], temperatures: list[float], plan: Plan | None):
        self.model, self.indices, self.temperatures = model, heads, temperatures
        self.heads: AuxiliaryHeads = heads_of(model)
        self.tape = None if plan is None else Tape(plan)
        self.passed = 0  # exits that have been decided at
        self.logits: torch.Tensor | None = None
        self.counts = [0] * (len(heads) + 1)

    def run(self, inputs: dict[str, Any], per_sample: set[str], size: int, decide: Decide) -> Any:
        """
        Answer every sample. Then `logits` `[B, C]` has the answers, `places` `[B]` the exit of each, and `counts` how
        many there are of each.

        Args:
            inputs (`dict`): for the model.
            per_sample (`set[str]`): those of them that have the samples in their first dimension.
            size (`int`): the number of samples.
            decide (`Callable`): see [`Decide`].

        Returns:
            `ModelOutput`: what the model itself says of the last samples, `None` if all have left before.
        """
        self.inputs, self.size, self.decide, outputs = inputs, size, decide, None
        self.active: torch.Tensor | None = None  # the samples of the batch that have not been answered
        try:
            with self._listening(), nullcontext() if self.tape is None else noted(self.model, self.tape):
                while outputs is None:
                    self.heads.watching = self.passed < len(self.indices)  # else no head has to listen
                    try:
                        outputs = self.model(**self.inputs)
                    except _Leave:
                        if not self.size:
                            return None
                        self._cut(per_sample)
            self._note(len(self.indices), logits_of(outputs, has_loss=False))
            self.counts[-1] = self.size
            return outputs
        finally:
            self.heads.recorder.clear()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        handles = []
        try:
            for place, index in enumerate(self.indices):
                module = self.model.get_submodule(self.heads.names[index])
                handles.append(module.register_forward_hook(partial(self._at_exit, place)))
            with self.heads.watched():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _at_exit(self, place: int, module: nn.Module, args: tuple, output: Any) -> None:
        if place < self.passed:  # replayed
            return
        self.passed = place + 1
        logits = self._say(place)
        if self.passed == len(self.indices):
            self.heads.recorder.clear()  # no head has to be run at the end
        self._note(place, logits)
        self.stay = self.decide(place, logits / self.temperatures[place])
        if self.stay is None or len(self.stay) == self.size:
            return
        self.counts[place] = self.size - len(self.stay)
        self.before, self.size = self.size, len(self.stay)
        raise _Leave

    def _say(self, place: int) -> torch.Tensor:
        if self.tape is not None:
            self.tape.paused = True
        try:
            return self.heads.class_logits(self.heads.answer(self.model, self.indices[place], self.inputs)).float()
        finally:
            if self.tape is not None:
                self.tape.paused = False

    def _note(self, place: int, logits: torch.Tensor) -> None:
        """Write the answers of all samples that are left; those that go on are answered anew later."""
        if self.logits is None:
            self.logits = logits.new_empty(logits.shape, dtype=torch.float32)
            self.places = torch.empty(len(logits), dtype=torch.long, device=logits.device)
            self.active = torch.arange(len(logits), device=logits.device)
        scaled = (logits.float() / self.temperatures[place]).to(self.logits.device)
        self.logits.index_copy_(0, self.active, scaled)
        self.places.index_fill_(0, self.active, place)

    def _cut(self, per_sample: set[str]) -> None:
        """Begin anew with the samples that stay."""
        rows = self.stay
        self.active = self.active[rows]
        self.tape.keep(rows, self.before)
        self.tape.start()
        self.inputs = {
            name: value.index_select(0, rows.to(value.device)) if name in per_sample else value
            for name, value in self.inputs.items()
        }
