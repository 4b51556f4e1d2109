"""`Seq2SeqSelfKDTrainer`: `Seq2SeqTrainer` with progressive self-distillation of every target token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    BaseImageProcessor,
    DataCollator,
    EvalPrediction,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from .config import Seq2SeqSelfKDConfig
from .fixes import generation_gather
from .heads.config import AuxiliaryHeadsConfig
from .tasks import Task
from .trainer import SelfKDMixin


class Seq2SeqSelfKDTrainer(SelfKDMixin, Seq2SeqTrainer):
    """
    [`~transformers.Seq2SeqTrainer`] with progressive self-distillation of every target token.

    Every argument keeps its meaning, `predict_with_generate` and the other generation arguments included. Plain
    [`~transformers.Seq2SeqTrainingArguments`] are accepted and have the defaults of [`Seq2SeqSelfKDConfig`].

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*): an encoder-decoder model with a language modeling head.
        args ([`Seq2SeqSelfKDConfig`] or [`~transformers.Seq2SeqTrainingArguments`], *optional*): the arguments.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics,
        callbacks, optimizers, preprocess_logits_for_metrics: as for [`~transformers.Seq2SeqTrainer`].
        auxiliary_heads ([`AuxiliaryHeadsConfig`] or `str`, *optional*): as for [`SelfKDTrainer`].
        task (`type`, *optional*): as for [`SelfKDTrainer`].
    """

    _config_class = Seq2SeqSelfKDConfig

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase
        | BaseImageProcessor
        | FeatureExtractionMixin
        | ProcessorMixin
        | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        auxiliary_heads: AuxiliaryHeadsConfig | str | None = None,
        task: type[Task] | None = None,
    ):
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            compute_loss_func,
            compute_metrics,
            callbacks,
            optimizers,
            preprocess_logits_for_metrics,
            auxiliary_heads=auxiliary_heads,
            task=task,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        As in [`~transformers.Seq2SeqTrainer`], with every sentence once in `compute_metrics` for any number of
        processes, and the token metrics of every language model, generated or not.
        """
        if not self._several_sequences():
            self.gather_function = generation_gather(self.accelerator)
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def _several_sequences(self) -> bool:
        generation = getattr(self.model, "generation_config", None)
        asked = getattr(self, "_gen_kwargs", {}).get("num_return_sequences")
        return ((asked if asked is not None else getattr(generation, "num_return_sequences", None)) or 1) > 1
