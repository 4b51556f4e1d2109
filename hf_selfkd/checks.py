"""All checks of a trainer that need no data: what it is asked for, and what it runs on."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from .config import MethodArguments
from .heads import AuxiliaryHeads, heads_of
from .models import base_model, virtual_tokens_of
from .tasks import TASKS, Task


logger = logging.getLogger(__name__)


def check_launch(args: TrainingArguments, distils: bool) -> None:
    """
    Raises:
        ValueError: if processes or devices are used in a way that cannot train one model together.
    """
    if distils and args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (nn.DataParallel) are not supported: start with `torchrun` or "
            "`accelerate launch`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
        )
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"the launcher started {launched} processes, but without an accelerator each of them would train "
            "alone, into the same output_dir: set use_cpu=True to train on the CPU together."
        )


def sharded_by(trainer: Trainer) -> str | None:
    """What splits the weights or the batches of a model between devices, if anything does."""
    if trainer.is_fsdp_enabled:
        return f"FSDP{getattr(trainer.accelerator.state.fsdp_plugin, 'fsdp_version', 1)}"
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3"  # the other stages leave a whole model in every process
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "sharding at load time"
    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()}
    return next((f"{name} parallelism" for name, size in sizes.items() if size > 1), None)


def check_engine(trainer: Trainer, method: MethodArguments, kind: str) -> None:
    """
    Raises:
        ValueError: if the way in which a model is spread over devices does not go together with what is asked.
    """
    sharded = sharded_by(trainer)
    if sharded is not None and "parallelism" in sharded:
        raise ValueError(
            f"{sharded} splits samples between processes, whose rows self-distillation must see whole: turn it off, "
            "or set alpha=0 without auxiliary_heads."
        )
    in_parts = sharded not in (None, "FSDP2")  # whose shards are parts of single weights, in every process the same
    if in_parts and kind in ("snapshot", "ema"):
        raise ValueError(
            f"teacher={kind!r} keeps whole weights, which {sharded} shards: use teacher='history', FSDP2 "
            "(fsdp=True) or DeepSpeed ZeRO-2."
        )
    if trainer.args.use_liger_kernel:
        raise ValueError("use_liger_kernel=True hides the logits that self-distillation needs: set it to False.")
    if in_parts and heads_of(trainer.model) is not None:
        raise ValueError(
            f"auxiliary_heads do not work with weights sharded by {sharded}: train with whole copies of the model "
            "(torchrun, accelerate launch, DeepSpeed ZeRO-2), or with FSDP2 (fsdp=True)."
        )


def check_calibration(trainer: Trainer, method: MethodArguments) -> None:
    """
    Raises:
        ValueError: if `alpha_schedule="calibrated"` has no data to look at, or cannot run the model on its own.
    """
    if method.alpha_schedule != "calibrated" or not method.distils or trainer.train_dataset is None:
        return
    trainer._calibration_set()
    sharded = sharded_by(trainer)
    if sharded is not None:
        raise ValueError(
            f"alpha_schedule='calibrated' runs a whole model in every process, which {sharded} shards: use "
            "alpha_schedule='linear'."
        )


def check_detection(method: MethodArguments, task: Task, mixes: bool = False) -> None:
    """
    Raises:
        ValueError: if a detector is asked for what only other tasks have.
    """
    told = f"with {type(task.model).__name__}"
    asked = method.teacher_asked
    if asked in ("rank", "predictions"):
        raise ValueError(f"teacher={asked!r} {told}: object detection has no such teacher, use teacher='history'.")
    if method.alpha_schedule == "calibrated":
        raise ValueError(f"alpha_schedule='calibrated' {told}: object detection has no calibration, use 'linear'.")
    for name in ("history_trace", "teacher_dropout"):
        if getattr(method, name):
            raise ValueError(f"{name}=True {told}: object detection does not have it, set it to False.")
    if method.history_top_k is not None:
        raise ValueError(
            f"history_top_k={method.history_top_k} {told}: rows of objects are kept whole, leave history_top_k out."
        )
    if mixes:
        raise ValueError(
            f"SelfKDDataCollator mixes images {told}, and not boxes: set mixup_alpha=0 and cutmix_alpha=0."
        )


def check_task(method: MethodArguments, task: Task) -> None:
    """
    Raises:
        ValueError: if a task is asked for what only other tasks have.
    """
    asked = (
        ("alpha_schedule='calibrated'", method.alpha_schedule == "calibrated", task.uncalibrated, "'linear'"),
        ("history_trace=True", method.history_trace, task.untraced, "False"),
    )
    for name, is_asked, reason, remedy in asked:
        if is_asked and reason is not None:
            raise ValueError(f"{name} with {task.name}: {reason}. Set it to {remedy}.")


def check_heads(trainer: Trainer, method: MethodArguments, heads: AuxiliaryHeads | None) -> None:
    """
    Raises:
        ValueError: if auxiliary heads and what is asked do not go together.
    """
    if heads is None:
        for name in ("evaluate_heads", "save_heads"):
            if getattr(method, name):
                raise ValueError(f"{name}=True, but the model has no heads: set auxiliary_heads.")
        return
    if method.chunked_logits:
        raise ValueError("chunked_logits=True with auxiliary_heads: heads need whole logits, set it to False.")
    if trainer.optimizer is not None and heads.config.trains:
        groups = getattr(trainer.optimizer, "param_groups", [])
        held = {id(p) for group in groups for p in group["params"]}
        if not held.issuperset(map(id, heads.parameters())):
            raise ValueError(
                "the optimizer given does not hold the weights of the auxiliary heads: call "
                "attach_auxiliary_heads(model, config) before you build it."
            )


def check_headless(model: nn.Module, given: type[Task] | None) -> None:
    """
    Raises:
        ValueError: if the task of a model is one without auxiliary heads.
    """
    found = given or next((task for task in TASKS if task.matches(base_model(model))), None)
    if found is not None and found.headless is not None:
        raise ValueError(f"auxiliary_heads with {found.name}: {found.headless}. Leave auxiliary_heads out.")
    if found is not None and found.per_token and virtual_tokens_of(model):
        raise ValueError(
            f"auxiliary_heads with {found.name} and prompt tuning: virtual tokens have no labels that heads could "
            "learn. Use LoRA, or leave auxiliary_heads out."
        )


def warn_of_clipping(trainer: Trainer) -> None:
    """
    Say that clipped gradients slow SGD down, where auxiliary heads make them larger. Adam does not notice the scale.
    """
    args, given = trainer.args, trainer.optimizer
    sgd = args.optim == "sgd" if given is None else "SGD" in type(getattr(given, "optimizer", given)).__name__
    if sgd and args.max_grad_norm > 0:
        logger.warning(
            f"max_grad_norm={args.max_grad_norm} with SGD and auxiliary heads: a clipped gradient is a smaller step, "
            "and heads add to the gradient, so the model may underfit. Set max_grad_norm=0 to leave gradients whole."
        )


def check_compute_loss(trainer: Trainer, mixin: type) -> None:
    """
    Raises:
        ValueError: if a class of the user's has a `compute_loss` that self-distillation would never be part of.
    """
    classes = type(trainer).__mro__
    place = classes.index(mixin)
    for owner in classes[:place]:
        function = vars(owner).get("compute_loss")
        names = getattr(getattr(function, "__code__", None), "co_names", ("super",))
        if "super" not in names and "compute_loss" not in names and not {"step", "distiller"} & set(names):
            raise ValueError(never_called(owner.__name__))
    for owner in classes[place + 1 : classes.index(Trainer)]:
        if "compute_loss" in vars(owner):
            raise ValueError(
                f"{owner.__name__}.compute_loss would never be called in training: pass its loss as "
                f"compute_loss_func or, if it calls super().compute_loss, put {owner.__name__} before SelfKDMixin."
            )


def never_called(name: str) -> str:
    """What to say where a step was trained without the method."""
    return (
        f"{name}.compute_loss does not call super().compute_loss, so nothing would be distilled: give its loss as "
        "compute_loss_func=..., call super().compute_loss, or set alpha=0 without auxiliary_heads."
    )


def check_unsplit(dataset: Any, processes: int) -> None:
    """
    Raises:
        ValueError: if a stream is split between processes twice, so that most of its samples would never be read.
    """
    if processes > 1 and getattr(dataset, "_distributed", None) is not None:
        raise ValueError(
            f"train_dataset ({type(dataset).__name__}) is split between processes already (split_dataset_by_node): "
            f"each of the {processes} would read a part of its part. Give the whole stream, which is shared out here."
        )


def check_even(trainer: Trainer, model: nn.Module, dataset: Any) -> None:
    """
    Raises:
        ValueError: if processes would get different numbers of batches, and wait for one another for ever.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if (
        args.world_size == 1
        or accelerator.even_batches
        or args.dataloader_drop_last
        or not hasattr(dataset, "__len__")
    ):
        return
    together = args.world_size * args.train_batch_size
    if not isinstance(dataset, torch.utils.data.IterableDataset) and len(dataset) % together:
        raise ValueError(
            f"even_batches=False with {len(dataset)} samples in batches of {together} over all processes: some would "
            "wait for the others for ever. Set even_batches=True or dataloader_drop_last=True."
        )
