"""Which hard loss a run has: decided once, by the class of the model and by the arguments, never by numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from ..models import base_model, class_of, forward_owner, is_stock, takes
from ..tasks.base import Task
from ..tasks.ctc import CTC
from ..tasks.segmentation import SemanticSegmentation
from .chunked_cross_entropy import ChunkedCrossEntropy
from .ctc import CTCLoss
from .detection import choose_detection_loss
from .hard import CrossEntropy, ModelLoss, SmoothedLoss, UserLoss
from .segmentation import choose_segmentation_loss


# Classes of transformers whose loss is not (only) the mean cross-entropy of their rows, though their names say so.
OTHER_LOSSES = ("ProphetNet", "XLMProphetNet", "Blip", "Csm", "PocketTTS", "Moshi", "Musicgen", "Parler")


def choose_hard_loss(
    task: Task,
    asked: str = "auto",
    temperature: float = 1.0,
    chunked: bool = False,
    function: Callable[..., torch.Tensor] | None = None,
    smoother: Callable[..., torch.Tensor] | None = None,
) -> CrossEntropy:
    """
    Choose the hard loss of a run.

    Args:
        task ([`~hf_selfkd.tasks.Task`]): of the model.
        asked (`str`, *optional*): the field `hard_loss` of the arguments.
        temperature (`float`, *optional*): of the soft part.
        chunked (`bool`, *optional*): whether the logits of all tokens must not be held.
        function (`Callable`, *optional*): `compute_loss_func` of the trainer.
        smoother (`Callable`, *optional*): its label smoother, which a loss of the user's own takes the place of.

    Raises:
        ValueError: if the choices contradict each other.
    """
    if task.per_object:
        own = (
            "compute_loss_func" if function is not None else "label_smoothing_factor" if smoother is not None else None
        )
        return choose_detection_loss(task, asked, temperature, "chunked_logits=True" if chunked else own)
    if function is None and smoother is not None and not task.has_known_rows:
        raise ValueError(
            f"label_smoothing_factor smooths the logits of the model, and {type(task).__name__} makes rows of its own "
            "of them: set label_smoothing_factor=0."
        )
    if function is None and smoother is not None and task.unsmoothed is not None:
        raise ValueError(f"label_smoothing_factor with {task.name}: {task.unsmoothed}. Set it to 0.")
    if isinstance(task, CTC):
        return _ctc_loss(task, asked, temperature, chunked, function)
    if isinstance(task, SemanticSegmentation):
        return _segmentation_loss(task, asked, temperature, chunked, function)
    if function is not None or smoother is not None:
        if chunked:
            raise ValueError(
                "chunked_logits=True needs plain cross-entropy as the hard loss, and this run has one of its own: set "
                "it to False."
            )
        return SmoothedLoss(task, temperature, smoother) if function is None else UserLoss(task, temperature, function)
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


def _ctc_loss(
    task: CTC, asked: str, temperature: float, chunked: bool, function: Callable[..., torch.Tensor] | None
) -> CTCLoss:
    if asked not in ("auto", "model") or chunked or function is not None:
        told = f"hard_loss={asked!r}" if asked not in ("auto", "model") else "chunked_logits=True"
        told = "compute_loss_func" if function is not None else told
        raise ValueError(f"{told} with {task.name}: the hard loss is the model's own, leave {told} out.")
    return CTCLoss(task, temperature)


def _segmentation_loss(
    task: SemanticSegmentation,
    asked: str,
    temperature: float,
    chunked: bool,
    function: Callable[..., torch.Tensor] | None,
) -> CrossEntropy:
    if chunked:
        raise ValueError(f"chunked_logits=True with {task.name}: it is for language models, set it to False.")
    kinds = {"cross_entropy": "stock", "unchecked": "cross_entropy"}
    kind = hard_loss_kind(task)
    return choose_segmentation_loss(task, kinds.get(kind, kind) if asked == "auto" else asked, temperature, function)


def hard_loss_kind(task: Task) -> str:
    """
    What the class of a model tells of its loss: `"cross_entropy"` (a class of transformers for this task),
    `"unchecked"` (no loss of its own, or none of the rows that a task of the user's makes), `"additive"`
    (cross-entropy and further terms), `"unshifted"` (a causal model that learns to copy) or `"model"` (of unknown
    make).
    """
    model = task.model
    if task.per_object:
        return "additive"
    if isinstance(task, CTC):
        return "model"
    if not any(takes(model, name) for name in task.label_names):
        return "unchecked"
    if not is_stock(model) or hasattr(model, "_loss_function") or _patched(model):
        return "model"
    if not task.has_known_rows:
        return "unchecked"
    if class_of(model).__name__.startswith(OTHER_LOSSES):
        return "model"
    if type(task).shifts_labels and not _shifts(model):
        return "unshifted"
    return "additive" if _balances_experts(model) else "cross_entropy"


def _shifts(model: nn.Module) -> bool:
    """Whether a causal language model of transformers compares a prediction with the next label, as most do."""
    code = inspect.unwrap(forward_owner(model).forward).__code__
    return "loss_function" in code.co_names or any("shift" in name for name in code.co_varnames)


def _patched(model: nn.Module) -> bool:
    """Whether somebody has replaced the forward of this very object by a function of another make."""
    held = vars(base_model(model))
    # Accelerate wraps the forward for autocast and for models that are spread over devices, and keeps the original.
    own = held.get("_original_forward", held.get("_old_forward", held.get("forward")))
    if own is None:
        return False
    function = inspect.unwrap(own)  # which may end at a method of the object
    return getattr(function, "__func__", function) is not inspect.unwrap(forward_owner(model).forward)


def _balances_experts(model: nn.Module) -> bool:
    """Whether a mixture of experts adds a term that balances its experts."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weights = [getattr(text, name, None) for name in ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha")]
    always = any(kind in class_of(model).__name__ for kind in ("SwitchTransformers", "NllbMoe"))
    return any(weights) and (always or bool(getattr(text, "output_router_logits", False)))
