"""The hooks of `Trainer` for evaluation: metrics of language models and heads, and a loss that is scaled correctly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from .batch import Batch
from .heads import heads_of
from .heads.layered import HeadMetrics
from .losses.choose import hard_loss_kind
from .metrics import ClassificationMetrics, is_lower_better
from .metrics.tokens import TokenMetrics
from .samples import IGNORE_INDEX
from .tasks import Task


logger = logging.getLogger(__name__)


class Evaluation:
    """Part of [`~hf_selfkd.SelfKDMixin`]: evaluation reads and writes nothing of self-distillation."""

    _head_metrics: HeadMetrics | None = None  # in an evaluation, if heads are asked for
    _token_metrics: TokenMetrics | None = None  # in an evaluation of a language model
    _eval_labels: torch.Tensor | None = None

    def _check_metrics(self, task: Task | None) -> None:
        given = self.compute_metrics
        shifts = task is not None and task.shifts_labels and self.preprocess_logits_for_metrics is None
        if isinstance(given, ClassificationMetrics) and shifts:
            raise ValueError(
                f"compute_metrics={type(given).__name__} compares the prediction at a position with the label at the "
                f"same one, and {type(task.model).__name__} predicts the next: leave compute_metrics out, every "
                "evaluation has token_nll, token_accuracy, token_ece and perplexity."
            )

    def _evaluation_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """The loss of the stock Trainer, with what it gets wrong put right."""
        own = self.compute_loss_func is None and self.label_smoother is None
        task = self._find_task_quietly()
        if task is not None and self.args.world_size > 1 and own:
            # Many models ignore the count, and the stock Trainer then multiplies their mean by the processes.
            num_items_in_batch = None
        if task is not None and task.language_model and "labels" in inputs and not own:
            # The stock Trainer takes the labels off, and with them what the decoder starts from.
            others = {name: value for name, value in inputs.items() if name != "labels"}
            inputs = task.inputs_without_labels(Batch(others, inputs["labels"])) | {"labels": inputs["labels"]}
        if task is not None and own and self._loss_is_of_rows(task):
            return self._loss_of_rows(model, task, inputs, return_outputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss_is_of_rows(self, task: Task) -> bool:
        """Whether the rows of a task of the user's are what is learned, and not what the model makes of its labels."""
        asked = self.method.hard_loss
        return not task.has_known_rows and (
            hard_loss_kind(task) == "unchecked" if asked == "auto" else asked != "model"
        )

    def _loss_of_rows(self, model, task, inputs, return_outputs):
        batch = task.split(inputs)
        outputs = model(**task.inputs_without_labels(batch))
        rows = task.rows(task.logits(outputs, has_loss=False), batch.labels)
        loss = F.cross_entropy(rows.logits.float(), rows.labels, ignore_index=IGNORE_INDEX)
        # The stock Trainer takes the first of a tuple for the loss.
        return (loss, outputs if isinstance(outputs, dict) else (loss, *outputs)) if return_outputs else loss

    def _find_task_quietly(self) -> Task | None:
        """The task of the model; `None` for one that is not supported."""
        if self.distiller is not None:
            return self.distiller.task
        try:
            return self._find_task(self.method)
        except ValueError:
            return None

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As in the trainer class; metrics of tokens and heads are noted."""
        labels = None
        if self._head_metrics is not None or self._token_metrics is not None:
            task = self._find_task_quietly()
            labels = None if task is None else task.labels_in(self._prepare_inputs(inputs))
        # Without generation the stock Trainer may take the labels off before it runs the model.
        self._eval_labels = None if getattr(self.args, "predict_with_generate", False) else labels
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        if self._head_metrics is not None:
            self._head_metrics.update(labels)
        if self._token_metrics is not None:
            self._token_metrics.gather()
        return result

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        As in the trainer class. Language models have `token_nll` (nats), `token_accuracy`, `token_ece` (per cent, 10
        right-closed bins) and `perplexity` over all target tokens among the metrics, without their logits being kept;
        with `evaluate_heads=True` every head is a classifier of its own.
        """
        task, gather = self._find_task_quietly(), self.accelerator.gather_for_metrics
        asked = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        heads = heads_of(self.model) if self.method.evaluate_heads else None
        handle = None
        if task is not None and task.language_model:
            self._token_metrics = TokenMetrics(gather)
            handle = self.model.register_forward_hook(self._note_tokens, with_kwargs=True)
        try:
            if heads is None:
                output = super().evaluation_loop(*asked)
            else:
                self._head_metrics = HeadMetrics(heads, task, gather)
                with heads.watched():
                    output = super().evaluation_loop(*asked)
                output.metrics.update(self._head_metrics.compute(metric_key_prefix))
            if self._token_metrics is not None:
                computed = self._token_metrics.compute()
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in computed.items()})
        finally:
            self._head_metrics = self._token_metrics = self._eval_labels = None
            if handle is not None:
                handle.remove()
        self._note_evaluation(output, metric_key_prefix)
        return output

    def _note_tokens(self, model: torch.nn.Module, arguments: tuple, named: dict[str, Any], outputs: Any) -> None:
        labels = named.get("labels")
        labels = self._eval_labels if labels is None else labels
        if labels is None or self._token_metrics is None:
            return  # one of the steps of generation
        task = self._find_task_quietly()
        rows = task.rows(task.logits(outputs, has_loss=named.get("labels") is not None), labels)
        self._token_metrics.update(rows.logits.view(*labels.shape, -1), rows.labels.view_as(labels))

    def call_model_init(self, trial: Any = None) -> torch.nn.Module:
        """As in [`~transformers.Trainer`]; the arguments are those of the trial before the model is made of them."""
        if trial is not None and self.hp_search_backend is not None:
            self._hp_search_setup(trial)
        return super().call_model_init(trial)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ):
        """
        As in [`~transformers.Trainer`]; without a `compute_objective` the evaluation loss is minimized. The default of
        the stock class adds all metrics up, of which some are better when lower.

        Raises:
            ValueError: if the default is to be maximized.
        """
        if compute_objective is None:
            if direction != "minimize":
                raise ValueError(
                    f"direction={direction!r} without compute_objective: say which metric to use, for instance "
                    "compute_objective=lambda metrics: metrics['eval_accuracy']."
                )
            compute_objective = _evaluation_loss_of
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction, backend, hp_name, **kwargs
        )


def _evaluation_loss_of(metrics: dict[str, float]) -> float:
    losses = [value for name, value in metrics.items() if name.endswith("_loss") and not is_lower_better(name)]
    if not losses:
        raise ValueError("the evaluation has no loss to minimize: pass compute_objective to hyperparameter_search.")
    return losses[0]
