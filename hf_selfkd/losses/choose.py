"""Which hard loss a run has: decided once, by the class of the model and by the arguments, never by numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from ..models import base_model, forward_owner, is_stock, takes
from ..tasks.base import Task
from .chunked_cross_entropy import ChunkedCrossEntropy
from .hard import CrossEntropy, ModelLoss, UserLoss


# Classes of transformers whose loss is not (only) the mean cross-entropy of their rows, though their names say so.
OTHER_LOSSES = ("ProphetNet", "XLMProphetNet", "Blip", "Csm", "PocketTTS", "Moshi", "Musicgen", "Parler")


def choose_hard_loss(
    task: Task,
    asked: str = "auto",
    temperature: float = 1.0,
    chunked: bool = False,
    function: Callable[..., torch.Tensor] | None = None,
) -> CrossEntropy:
    """
    Choose the hard loss of a run.

    Args:
        task ([`~hf_selfkd.tasks.Task`]): of the model.
        asked (`str`, *optional*): the field `hard_loss` of the arguments.
        temperature (`float`, *optional*): of the soft part.
        chunked (`bool`, *optional*): whether the logits of all tokens must not be held.
        function (`Callable`, *optional*): `compute_loss_func` or the label smoother of the trainer.

    Raises:
        ValueError: if the choices contradict each other.
    """
    if function is not None:
        if chunked:
            raise ValueError(
                "chunked_logits=True needs plain cross-entropy as the hard loss, and this run has one of its own: set "
                "it to False."
            )
        return UserLoss(task, temperature, function)
    kind = hard_loss_kind(task) if asked == "auto" else asked
    if kind == "unshifted":
        raise ValueError(
            f"{type(task.model).__name__} compares each position with its own label and not with the next one, as "
            "causal language models do: it is not supported."
        )
    if chunked:
        if kind not in ("cross_entropy", "unchecked"):
            raise ValueError(
                f"chunked_logits=True needs plain cross-entropy as the hard loss, and {type(task.model).__name__} has "
                "a loss of its own: set it to False, or hard_loss='cross_entropy' if you know better."
            )
        return ChunkedCrossEntropy(task, temperature)
    if kind in ("cross_entropy", "unchecked"):
        return CrossEntropy(task, temperature, check=asked == "auto" and kind == "cross_entropy")
    return ModelLoss(task, temperature, additive=kind == "additive")


def hard_loss_kind(task: Task) -> str:
    """
    What the class of a model tells of its loss: `"cross_entropy"` (a class of transformers for this task),
    `"unchecked"` (no loss of its own, or none of the rows that a task of one's own makes), `"additive"` (cross-entropy
    and further terms), `"unshifted"` (a causal model that learns to copy) or `"model"` (of unknown make).
    """
    model = task.model
    if not any(takes(model, name) for name in task.label_names):
        return "unchecked"
    if not is_stock(model) or hasattr(model, "_loss_function") or _patched(model):
        return "model"
    if type(model).__name__.startswith(OTHER_LOSSES):
        return "model"
    if not _has_known_rows(task):
        return "unchecked"
    if task.shifts_labels and not _shifts(model):
        return "unshifted"
    return "additive" if _balances_experts(model) else "cross_entropy"


def _has_known_rows(task: Task) -> bool:
    """Whether the rows of a task are made here; of rows that a user's task makes, transformers computes no loss."""
    owner = next(cls for cls in type(task).__mro__ if "rows" in vars(cls))
    return owner.__module__.partition(".")[0] == __name__.partition(".")[0]


def _shifts(model: nn.Module) -> bool:
    """Whether a causal language model of transformers compares a prediction with the next label, as most do."""
    code = inspect.unwrap(forward_owner(model).forward).__code__
    return "loss_function" in code.co_names or any("shift" in name for name in code.co_varnames)


def _patched(model: nn.Module) -> bool:
    """Whether somebody has replaced the forward of this very object by a function of another make."""
    own = vars(base_model(model)).get("forward")
    original = inspect.unwrap(own) if own is not None else None
    forward = inspect.unwrap(forward_owner(model).forward)  # as deep as the one above: decorators of the class are off
    return original is not None and getattr(original, "__func__", original) is not forward


def _balances_experts(model: nn.Module) -> bool:
    """Whether a mixture of experts adds a term that balances its experts."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weights = [getattr(text, name, None) for name in ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha")]
    always = "SwitchTransformers" in type(model).__name__ or "NllbMoe" in type(model).__name__
    return any(weights) and (always or bool(getattr(text, "output_router_logits", False)))
