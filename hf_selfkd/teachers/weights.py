"""The teachers that are copies of the model: the weights of an earlier epoch, or a moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batch import Batch
from ..losses.soft_targets import SoftTargets
from ..sharded import exchanged, reshard, shard, shard_of, whole
from ..tasks.rows import Rows
from .base import State, Taught, Teacher


Predict = Callable[[Callable[[dict[str, Any]], Any], Batch], list[Rows]]


class SnapshotTeacher(Teacher):
    """
    The weights at the end of the previous epoch, in evaluation mode, on the very view that is trained on.

    Only what training changes is copied (trainable parameters and buffers), so a PEFT model costs its adapters. Of
    weights that FSDP2 shards, each process copies its own shard, and runs the model with these shards in it.

    Args:
        model (`nn.Module`): the model that is trained, unwrapped.
        predict (`Callable`):
            `predict(run, batch)` gives the rows of the model itself, then those of its heads, if they are to learn
            from the past; `run(inputs)` gives the outputs of the teacher for inputs of the model.
        broadcast (`Callable`, *optional*):
            gives every process the tensor of the first one; `None` for one process. Processes agree on weights but not
            on batch statistics: those of the first one count. One call serves all buffers of a type.
        warm_start (`bool`): let the initial weights teach the first epoch.
        dropout (`bool`): whether dropout stays on; statistics of batches are those of evaluation all the same.

    """

    kind = "snapshot"
    has_past = True

    def __init__(
        self,
        model: nn.Module,
        predict: Predict,
        broadcast: Callable[[torch.Tensor], torch.Tensor] | None = None,
        warm_start: bool = False,
        dropout: bool = False,
    ):
        super().__init__()
        self.model, self.predict, self.warm_start = model, predict, warm_start
        self.broadcast, self.dropout = broadcast, dropout
        persistent = model.state_dict().keys()  # the others are constants such as position ids
        self.buffers = [name for name, _ in model.named_buffers() if name in persistent]
        self.weights: dict[str, torch.Tensor] = {}

    def _parameters(self) -> dict[str, nn.Parameter]:
        reshard(self.model)
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _live(self) -> dict[str, torch.Tensor]:
        """This process's part of the trainable weights of the model, and the buffers of the first process."""
        live = {name: shard(parameter) for name, parameter in self._parameters().items()}
        buffers = {name: self.model.get_buffer(name).detach() for name in self.buffers}
        return live | (buffers if self.broadcast is None else _broadcast_together(buffers, self.broadcast))

    def _copy(self) -> None:
        live = self._live()
        if self.weights.keys() != live.keys():
            self.weights = {name: tensor.clone() for name, tensor in live.items()}
        for name, tensor in live.items():
            self.weights[name].copy_(tensor)

    def begin_epoch(self, epoch: int) -> None:
        if epoch != self.epoch and (epoch > 0 or self.warm_start):
            self._copy()
        self.epoch = epoch

    @torch.no_grad()
    def targets(self, batch: Batch) -> Taught:
        if not self.weights:
            return Taught()
        modes = [(module, module.training) for module in self.model.modules()]
        for module, _ in modes:  # many a forward asks its own module, not a Dropout, whether it is training
            module.training = self.dropout and not isinstance(module, _BatchNorm)
        try:
            predictions = self.predict(self._run, batch)
        finally:
            for module, training in modes:
                module.training = training
        model, *heads = [_dense_targets(rows) for rows in predictions]
        return Taught(model, heads if self.epoch > 0 else [])  # before, even a warm start has untrained heads

    def _run(self, inputs: dict[str, Any]) -> Any:
        if not reshard(self.model):
            return torch.func.functional_call(self.model, self.weights, kwargs=inputs)
        live = {name: shard(parameter) for name, parameter in self._parameters().items()}
        live |= {name: self.model.get_buffer(name) for name in self.buffers}
        with exchanged(self.model, live, self.weights):
            return self.model(**inputs)

    def states(self, keeps: bool = True) -> Iterator[tuple[str, State]]:
        yield "teacher", (self._whole(self.weights, keeps), {})

    def _whole(self, weights: dict[str, torch.Tensor], keeps: bool) -> dict[str, torch.Tensor]:
        """Weights in one piece, under the names that a checkpoint has for them."""
        like = self._parameters() if weights else {}
        return {f"weights.{name}": whole(tensor, like.get(name), keeps) for name, tensor in weights.items()}

    def load(self, name: str, state: State, journals: list[dict[str, torch.Tensor]]) -> None:
        tensors, _ = state
        live = self._live()
        stored = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        if not stored:
            return  # saved before the teacher had acted
        like = live | self._parameters()
        for name, tensor in like.items():
            if name not in stored or stored[name].shape != tensor.shape:
                raise ValueError(
                    f"the checkpoint's {self.kind} has no {name} of shape {list(tensor.shape)}: resume with the model "
                    "that made it."
                )
        stored = {name: shard_of(stored[name], tensor) for name, tensor in like.items()}
        # Into memory of its own, laid out as the live weights are: what is read from a file is not aligned, and some
        # kernels then round otherwise.
        self.weights = {name: torch.empty_like(tensor).copy_(stored[name]) for name, tensor in live.items()}


def _broadcast_together(
    tensors: dict[str, torch.Tensor], broadcast: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of the first process, sent as one for each type: a network may have a hundred small buffers."""
    result = {}
    for dtype in sorted({tensor.dtype for tensor in tensors.values()}, key=str):
        group = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        flat = broadcast(torch.cat([tensor.reshape(-1) for tensor in group.values()]))
        pieces = flat.split([tensor.numel() for tensor in group.values()])
        result |= {name: piece.view(group[name].shape) for name, piece in zip(group, pieces, strict=True)}
    return result


def _dense_targets(rows: Rows) -> SoftTargets:
    log_probs = rows.log_probs
    mask = torch.isfinite(log_probs).all(dim=-1)
    return SoftTargets(log_probs.nan_to_num_(nan=0.0), mask, categorical=not rows.independent)


class EMATeacher(SnapshotTeacher):
    """
    A moving average of the weights, in evaluation mode, from the second epoch on; buffers are copied.

    The average of half-precision weights is kept in float32 and rounded where it is used: a step of it is smaller than
    what half precision can tell.

    Args:
        model (`nn.Module`): the model that is trained, unwrapped.
        predict (`Callable`): as in [`SnapshotTeacher`].
        decay (`float`):
            of the average, at most `(1 + t) / (10 + t)` after `t` steps: with the full decay from the start the random
            initial weights would rule for 1 / (1 - decay) steps.
        broadcast (`Callable`, *optional*): as in [`SnapshotTeacher`].
        dropout (`bool`): as in [`SnapshotTeacher`].
    """

    kind = "ema"

    def __init__(
        self,
        model: nn.Module,
        predict: Predict,
        decay: float,
        broadcast: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dropout: bool = False,
    ):
        super().__init__(model, predict, broadcast, dropout=dropout)
        self.decay, self.updates = decay, 0
        self.masters: dict[str, torch.Tensor] = {}  # float32 averages of half-precision weights

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.weights:
            self._copy()
        else:
            live = self._live()
            weight = max(1 - self.decay, 9 / (10 + self.updates))
            averages = {name: tensor for name, tensor in self.weights.items() if name not in self.buffers}
            averages |= self.masters
            now = [live[name].to(average.dtype) for name, average in averages.items()]
            torch._foreach_lerp_(list(averages.values()), now, weight)
            for name in self.buffers:
                self.weights[name].copy_(live[name])
            self._round()
        self.updates += 1

    def _copy(self) -> None:
        super()._copy()
        self.masters = {name: self.weights[name].float() for name in self._half_precision()}

    def _half_precision(self) -> list[str]:
        averages = {name: tensor for name, tensor in self.weights.items() if name not in self.buffers}
        return [name for name, tensor in averages.items() if tensor.is_floating_point() and tensor.element_size() < 4]

    def _round(self) -> None:
        for name, master in self.masters.items():
            self.weights[name].copy_(master)

    def targets(self, batch: Batch) -> Taught:
        return super().targets(batch) if self.epoch > 0 else Taught()

    def states(self, keeps: bool = True) -> Iterator[tuple[str, State]]:
        yield "teacher", (self._whole(self.weights | self.masters, keeps), {"updates": str(self.updates)})

    def load(self, name: str, state: State, journals: list[dict[str, torch.Tensor]]) -> None:
        super().load(name, state, journals)
        like = self._parameters()
        self.masters = {
            key: torch.empty_like(self.weights[key], dtype=torch.float32).copy_(
                shard_of(state[0][f"weights.{key}"], like[key])
            )
            for key in self._half_precision()
        }
        self.updates = int(state[1]["updates"])
