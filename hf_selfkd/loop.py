"""`LoopDistiller`: self-distillation in a training loop of one's own, without a trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from .assembly import Setting, make_distiller, make_heads, make_teacher
from .batch import BatchRecord
from .checks import check_detection, check_headless
from .config import MethodArguments
from .distiller import SelfDistiller
from .heads import heads_of
from .losses.choose import choose_hard_loss
from .losses.hard import CrossEntropy
from .models import main_parameter, unwrapped
from .processes import Processes
from .samples import SAMPLE_ID
from .schedule import Progress
from .tasks import Task, task_for
from .teachers import Teacher
from .teachers.choose import Facts, choose_teacher


logger = logging.getLogger(__name__)

# Fields of the arguments that ask something of a trainer, and what to do without one.
_OF_THE_TRAINER = {
    "auxiliary_heads": "call attach_auxiliary_heads(model, ...) before you make the optimizer",
    "save_heads": "call save_auxiliary_heads(model, folder)",
    "evaluate_heads": "evaluate outputs of the heads yourself",
    "seed_transforms": "seed the transforms of your dataset yourself",
    "sample_id_column": "give the ids to step()",
}


class LoopDistiller:
    """
    Progressive self-distillation in a training loop of your own: plain PyTorch, Accelerate, Lightning.

    Make it when the model is where it is trained and the processes know one another. Every process makes one and calls
    `step` for each micro-batch, `end_epoch` after each pass over the data. Evaluation and saving of the model have
    nothing to do with it.

    Args:
        model (`nn.Module`):
            Any model that [`SelfKDTrainer`] takes, bare or wrapped by `torch.compile` or `DistributedDataParallel`; or
            a module of your own whose outputs are logits or have them.
        method ([`~hf_selfkd.config.MethodArguments`] or [`SelfKDConfig`], *optional*):
            What is asked; fields that are not of self-distillation are left alone.
        num_samples (`int` or `None`):
            Samples of the training set, of all processes together. `None` for a stream, which has no `history`.
        num_epochs (`int`): passes over the data, as planned: alpha grows with them.
        total_steps (`int`, *optional*): optimizer steps as planned; for `alpha_schedule="linear_step"`.
        accumulation_steps (`int`, *optional*, defaults to `1`):
            Micro-batches of an optimizer step. What is left at the end of an epoch counts as a step.
        task (`type`, *optional*): a subclass of [`~hf_selfkd.tasks.Task`] for a task of your own.
        label_names (`Sequence[str]`, *optional*, defaults to `("labels",)`):
            names under which a batch may hold the labels.
        compute_loss_func (`Callable`, *optional*): a hard loss of your own, as for [`~transformers.Trainer`].
        seed (`int`, *optional*, defaults to 42): chooses the rotations of views, where auxiliary heads tell them.
        folder (`str` or `Path`, *optional*, defaults to `"selfkd_history"`): for a history that is kept on disk.

    Attributes:
        distiller ([`~hf_selfkd.distiller.SelfDistiller`]): the method itself.
        epoch (`int`): epochs that are over.
        steps (`int`): optimizer steps so far.
        teacher ([`~hf_selfkd.teachers.Teacher`]): its `stored(sample_ids)` gives what it holds.

    Raises:
        ValueError: if model, data or arguments do not allow what is asked; the message says what does.

    Example:

    ```python
    import torch
    from torch.utils.data import DataLoader
    from hf_selfkd import LoopDistiller, MethodArguments, with_sample_ids

    loader = DataLoader(with_sample_ids(train), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    distiller = LoopDistiller(model, MethodArguments(alpha=0.8), num_samples=len(train), num_epochs=3)
    for epoch in range(3):
        for batch in loader:
            loss = distiller.step(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        distiller.end_epoch()
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        method: MethodArguments | None = None,
        *,
        num_samples: int | None,
        num_epochs: int,
        total_steps: int | None = None,
        accumulation_steps: int = 1,
        task: type[Task] | None = None,
        label_names: Sequence[str] = ("labels",),
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        seed: int = 42,
        folder: str | Path = "selfkd_history",
    ):
        method = MethodArguments() if method is None else method
        _check_numbers(num_samples=num_samples, num_epochs=num_epochs, total_steps=total_steps)
        _check_numbers(accumulation_steps=accumulation_steps)
        _check_method(method, total_steps)
        if isinstance(model, DataParallel):
            raise ValueError("nn.DataParallel is not supported: start one process for each device with torchrun.")
        self.num_samples, self.num_epochs, self.total_steps = num_samples, num_epochs, total_steps
        self.accumulation_steps = accumulation_steps
        self.processes = Processes.of_torch(main_parameter(model).device)
        bare, names = unwrapped(model), tuple(label_names)
        if heads_of(bare) is not None:
            check_headless(bare, task)
        found = task_for(bare, names) if task is None else task(bare, names)
        found.bare_logits = True  # as modules of plain PyTorch return them
        if found.per_object:
            check_detection(method, found)
        function = compute_loss_func
        hard_loss = choose_hard_loss(found, method.hard_loss, method.temperature, method.chunked_logits, function)
        self.distiller = self._make(bare, method, found, hard_loss, seed, Path(folder))
        self.epoch, self.steps = 0, 0
        self._open = False  # whether an epoch has begun
        self._seen = 0  # samples of this process in the present epoch
        self._micro_batches = 0  # since the last optimizer step

    def _make(
        self, model: nn.Module, method: MethodArguments, task: Task, hard_loss: CrossEntropy, seed: int, folder: Path
    ) -> SelfDistiller:
        heads = make_heads(method, task, hard_loss, seed)
        facts = Facts(self.num_epochs, heads.uses_past, no_rows=task.no_history)
        if self.num_samples is None:
            facts.no_ids = (
                "num_samples=None has no sample ids for teacher='history': give the number of training samples, or "
                "use teacher='snapshot'"
            )
        kind, reason = choose_teacher(method, facts)
        if reason:
            logger.warning(f"teacher='auto' is {kind!r}: {reason}.")
        _check_whole(model, kind, heads.learns)
        if kind == "history" and method.warm_start_teacher:
            raise ValueError(
                "warm_start_teacher=True with teacher='history' is a pass over the data that SelfKDTrainer makes: use "
                "teacher='snapshot' in a loop of your own, or leave it out."
            )
        node = folder / f"node{os.environ.get('GROUP_RANK', '0')}"
        device, size = main_parameter(model).device, self.num_samples or 0
        setting = Setting(model, self.num_epochs, device, node, size, processes=self.processes)
        teacher = make_teacher(kind, method, task, heads, setting)
        return make_distiller(method, hard_loss, teacher, heads, method.alpha_schedule, self.num_epochs)

    @property
    def teacher(self) -> Teacher:
        """[`~hf_selfkd.teachers.Teacher`]: where past predictions come from."""
        return self.distiller.teacher

    # The loop

    def step(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        ids: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        num_items: torch.Tensor | float | None = None,
        return_outputs: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        The loss of a micro-batch, to call `backward` on.

        Args:
            model (`nn.Module`): the model, wrapped as it is trained.
            batch (`dict`): the inputs of the model with labels, where the model is; left as it is.
            ids (`Sequence[int]`, `np.ndarray` or `torch.LongTensor` of shape `[B]`, *optional*):
                which samples these are, 0 to `num_samples - 1`. By default what the batch holds as `sample_id`, as
                that of a dataset `with_sample_ids` does.
            num_items (`torch.Tensor` or `float`, *optional*):
                What the sum of the losses of the rows is divided by; the rows of this micro-batch by default. See
                [`~LoopDistiller.num_items`].
            return_outputs (`bool`, *optional*, defaults to `False`): whether to give the outputs of the model too.

        Returns:
            `torch.Tensor`, a scalar; with `return_outputs` a `tuple` of the loss and the outputs.

        Raises:
            ValueError: if ids are missing, an epoch was not ended, or all planned epochs are over.
        """
        if not torch.is_grad_enabled():
            raise ValueError("step() without gradients (torch.no_grad): it is for training, evaluate model(**batch).")
        batch, ids = dict(batch), self._ids(batch, ids)
        batch.pop(SAMPLE_ID, None)
        self._count_optimizer_step()
        self._check_place()
        if not self._open:
            self.distiller.hard_loss.open()
            self.distiller.begin_epoch()
            self._open = True
        labels = self.distiller.task.labels_in(batch)
        progress, record = Progress(self.steps, self.total_steps or 0), BatchRecord(ids)
        loss, outputs = self.distiller.step(model, batch, progress, num_items, record)
        self._seen += len(ids) if ids is not None else len(labels)
        self._micro_batches += 1
        return (loss, outputs) if return_outputs else loss

    def _ids(self, batch: dict[str, Any], ids: Any) -> np.ndarray | None:
        ids = batch.get(SAMPLE_ID) if ids is None else ids
        if ids is None and self.teacher.needs_ids:
            raise ValueError(
                f"step() got no ids for teacher={self.teacher.kind!r}: pass the numbers of the samples, make the "
                "dataset with_sample_ids(dataset), or use teacher='snapshot'."
            )
        if ids is None:
            return None
        ids = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids of shape {list(ids.shape)} and type {ids.dtype}: one integer for each sample.")
        return ids.astype(np.int64)

    def _check_place(self) -> None:
        """
        Raises:
            ValueError: if the run was planned to be over, or the epoch has no samples left.
        """
        if self.epoch >= self.num_epochs:
            raise ValueError(
                f"step() after num_epochs={self.num_epochs} epochs: training was planned to end there, plan more of "
                "them when you make the distiller."
            )
        if self.total_steps is not None and self.steps >= self.total_steps:
            raise ValueError(
                f"step() after total_steps={self.total_steps} optimizer steps: training was planned to end there, "
                "plan more of them when you make the distiller."
            )
        if self.num_samples is not None and self._seen * self.processes.count >= self.num_samples:
            raise ValueError(
                f"step() after all num_samples={self.num_samples} samples of epoch {self.epoch + 1}: call end_epoch() "
                "after each pass over the data, or after each num_samples samples of an endless one."
            )

    def _count_optimizer_step(self, force: bool = False) -> None:
        """Take note of the optimizer step that followed the last micro-batches."""
        if self._micro_batches == self.accumulation_steps or (force and self._micro_batches):
            self.teacher.after_step()
            self.steps += 1
            self._micro_batches = 0

    def end_epoch(self) -> None:
        """
        End an epoch, after its last optimizer step. Every process must call this.

        Raises:
            ValueError: if no step was made since the last time.
        """
        if not self._open:
            raise ValueError("end_epoch() without a step since the epoch began: call step() for each batch first.")
        self._count_optimizer_step(force=True)
        self._open, self._seen = False, 0
        self.epoch += 1
        self.teacher.begin_epoch(self.distiller.epoch + 1)
        if self.epoch >= self.num_epochs:
            self.close()

    def close(self) -> None:
        """Leave the model as it was; [`~LoopDistiller.end_epoch`] does this after the last planned epoch."""
        self.distiller.hard_loss.close()

    def num_items(self, batches: Sequence[dict[str, Any]]) -> torch.Tensor:
        """
        What the losses of the micro-batches of one optimizer step are divided by, so that each row of the step counts
        the same: their sum is then the loss of the step, and no loss is divided again. Every process must call this.

        Args:
            batches (`Sequence[dict]`): the micro-batches of this process.

        Returns:
            `torch.Tensor`: labelled rows of all processes over the number of processes, whose gradients data
            parallelism averages.
        """
        task = self.distiller.task
        count = sum(task.num_items(task.labels_in(batch)) for batch in batches)
        return (self.processes.sum(count) / self.processes.count).clamp_min(1 / self.processes.count)

    def take_metrics(self) -> dict[str, float]:
        """What is to be logged since the last call, of all processes. Every process must call this."""
        return self.distiller.take_metrics(self.processes.sum)

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """
        All that the method needs to go on to the bit, of all processes. Every process must call this; one saves it.
        The tensors are those in use: a state that is kept in memory must be copied.
        """
        self._count_optimizer_step()
        inner = self.distiller
        return {
            "version": 1,
            "teacher": self.teacher.kind,
            "epoch": self.epoch,
            "open": self._open,
            "steps": self.steps,
            "micro_batches": self._micro_batches,
            "seen": self._seen * self.processes.count,
            "states": {
                name: {"tensors": tensors, "metadata": metadata} for name, (tensors, metadata) in inner.states()
            },
            "journals": {name: self.processes.gather_parts(parts) for name, parts in inner.process_states()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where [`~LoopDistiller.state_dict`] was called, also with another number of processes; the loop itself
        skips the batches that the epoch has had. Every process must call this, with the model in its place.

        Args:
            state (`dict`): of `state_dict`, made with the same teacher and training set.

        Raises:
            ValueError: if the state is of another teacher, other samples or another model.
        """
        teacher = self.teacher
        if state["teacher"] != teacher.kind:
            raise ValueError(
                f"the state was made with teacher={state['teacher']!r}, this distiller has teacher={teacher.kind!r}: "
                "go on with the same teacher."
            )
        for name in [name for name, _ in teacher.states()]:
            if name not in state["states"]:
                raise ValueError(f"the state has nothing of {name!r}: go on with the same auxiliary heads.")
            part, journals = state["states"][name], state["journals"].get(name, [])
            taken = journals[self.processes.rank :: self.processes.count]
            teacher.load(name, (part["tensors"], part["metadata"]), taken)
        self.epoch, self._open, self.steps = state["epoch"], state["open"], state["steps"]
        self._micro_batches, self._seen = state["micro_batches"], state["seen"] // self.processes.count
        begun = self.epoch + self._open
        self.distiller.epoch, self.distiller.next_epoch = begun - 1, begun
        teacher.epoch = self.epoch if begun else -1
        if self._open:
            self.distiller.hard_loss.open()


def _check_numbers(**numbers: int | None) -> None:
    """
    Raises:
        ValueError: if one of them is given and not positive.
    """
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def _check_method(method: MethodArguments, total_steps: int | None) -> None:
    """
    Raises:
        ValueError: if something is asked that only a trainer does, or that a number is missing for.
    """
    for name, remedy in _OF_THE_TRAINER.items():
        if getattr(method, name):
            raise ValueError(f"{name}={getattr(method, name)!r} is for SelfKDTrainer: in a loop of your own {remedy}.")
    if method.alpha_schedule == "calibrated" and method.distils:
        raise ValueError(
            "alpha_schedule='calibrated' looks at held-out data, which only SelfKDTrainer does: use 'linear'."
        )
    if method.alpha_schedule == "linear_step" and method.distils and total_steps is None:
        raise ValueError("alpha_schedule='linear_step' grows with the optimizer steps of the run: give total_steps.")


def _check_whole(model: nn.Module, kind: str, with_heads: bool) -> None:
    """
    Raises:
        ValueError: if the weights are spread over devices and what is asked needs whole ones.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    sharded = names & {"FullyShardedDataParallel", "FSDPModule"}
    if "DeepSpeedEngine" in names and model.zero_optimization_stage() == 3:  # the other stages shard no weights
        sharded.add("DeepSpeedEngine")
    asked = f"teacher={kind!r}" if kind in ("snapshot", "ema") else "auxiliary heads" if with_heads else None
    if sharded and asked is not None:
        raise ValueError(
            f"{asked} with {min(sharded)}, which shards the weights: use teacher='history' without heads."
        )
