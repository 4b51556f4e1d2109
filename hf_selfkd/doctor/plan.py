"""What a training is going to do, told before its first step."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..heads import heads_of
from ..models import uncompiled
from ..schedule import alpha_at
from ..teachers import HistoryTeacher


if TYPE_CHECKING:
    from ..distiller import SelfDistiller
    from ..trainer import SelfKDMixin

SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


class _Prepared(Exception):
    """Training is about to begin."""


class _StopBeforeTheFirstStep(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise _Prepared


def plan_of(trainer: SelfKDMixin) -> dict[str, str]:
    """
    What a trainer is going to do. The trainer is used up: make another one to train.

    Args:
        trainer ([`SelfKDTrainer`]): with a training set, before `train()`.

    Returns:
        `dict[str, str]`: a sentence each about `data`, `model`, `steps`, `method`, `history` and `heads`, those that
        there are.

    Raises:
        ValueError: as `train()` would, if data and arguments do not allow what is asked.
    """
    trainer.callback_handler.callbacks.insert(0, _StopBeforeTheFirstStep())
    with suppress(_Prepared):
        trainer.train()
    distiller = trainer.distiller
    plan = {"data": _data(trainer), "model": _model(trainer), "steps": _steps(trainer)}
    if distiller is None:
        return plan | {"method": "Plain training: nothing is distilled."}
    plan["method"] = _method(distiller, trainer.method.warm_start_teacher)
    if isinstance(distiller.teacher, HistoryTeacher):
        plan["history"] = _history(trainer, distiller)
    heads = heads_of(trainer.model)
    if heads is not None and heads.config.trains:
        plan["heads"] = _heads(trainer)
    return plan


def size_of(num_bytes: float) -> str:
    """Bytes as people read them."""
    for size, name in SIZES:
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {name}"
    return f"{num_bytes:.0f} bytes"


def _data(trainer: SelfKDMixin) -> str:
    data = trainer.train_dataset
    told = f"{len(data):,} training samples" if has_length(data) else "a stream of training samples"
    held_out = trainer.eval_dataset
    if held_out is None:
        return told + "; no evaluation set while training (do_eval)"
    sets = held_out.values() if isinstance(held_out, dict) else [held_out]
    if all(has_length(part) for part in sets):
        return told + f", {sum(len(part) for part in sets):,} to evaluate on"
    return told + ", and a stream to evaluate on"


def _model(trainer: SelfKDMixin) -> str:
    model = uncompiled(trainer.model)
    heads = heads_of(model)
    own = sum(parameter.numel() for parameter in model.parameters())
    own -= 0 if heads is None else sum(parameter.numel() for parameter in heads.parameters())
    return f"{type(model).__name__}, {own:,} parameters, on {trainer.args.device}"


def _steps(trainer: SelfKDMixin) -> str:
    args, steps, epochs = trainer.args, trainer.state.max_steps, trainer.state.num_train_epochs
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    told = f"{steps:,} step{'s' if steps > 1 else ''} of {batch} samples"
    return told + f", {epochs} epoch{'s' if epochs > 1 else ''}" if has_length(trainer.train_dataset) else told


def _method(distiller: SelfDistiller, warm_start: bool) -> str:
    kind, alpha = distiller.teacher.kind, distiller.alpha
    if kind == "none" or not alpha:
        return "labels as they are (no teacher)"
    when = (
        "from the first epoch on" if warm_start or distiller.teacher.first_epoch == 0 else "from the second epoch on"
    )
    told = f"teacher {kind!r}, which acts {when}; alpha by the schedule {distiller.schedule!r}"
    if distiller.schedule in ("linear", "cosine"):
        epochs = distiller.num_epochs
        first, last = (alpha_at(alpha, distiller.schedule, epoch, epochs) for epoch in (0, epochs - 1))
        return told + f", {first:.2g} in the first epoch and {last:.2g} in the last"
    return told + f", at most {alpha:.2g}"


def _history(trainer: SelfKDMixin, distiller: SelfDistiller) -> str:
    store, task = distiller.teacher.store, distiller.task
    rows = round(store.size * (store.rows_per_sample or 1))
    if task.num_classes is None:
        return f"about {rows:,} rows; the first batch tells how many classes they have"
    plan = store.plan(rows, task.num_classes)
    kept = "all classes" if plan.codec.top_k is None else f"the {plan.codec.top_k} most probable classes"
    where = {"accelerator": f"beside the model ({trainer.args.device})", "cpu": "in memory", "disk": "on disk"}
    kind = str(plan.codec.dtype).removeprefix("torch.")
    told = f"{size_of(plan.num_bytes)} {where[plan.place]}: {rows:,} rows, {kept}, {kind}"
    return told if not distiller.teacher.head_stores else told + "; and one for each head"


def _heads(trainer: SelfKDMixin) -> str:
    heads = heads_of(trainer.model)
    size = sum(parameter.numel() for parameter in heads.parameters())
    views = heads.config.views_per_step if heads.config.views == "rotation" else 0
    seen = f", {views} rotated view{'s' if views > 1 else ''} beside the upright one" if views else ""
    return f"{heads.config.head!r} on {', '.join(heads.names)}; {size:,} parameters, dropped at the end{seen}"
