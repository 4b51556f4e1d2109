"""`Seq2SeqSelfKDTrainer`: `Seq2SeqTrainer` with progressive self-distillation of every target token."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput

from .config import Seq2SeqSelfKDConfig
from .fixes import generation_gather
from .metrics.tokens import TokenMetrics
from .models import logits_of
from .trainer import SelfKDMixin


class Seq2SeqSelfKDTrainer(SelfKDMixin, Seq2SeqTrainer):
    """
    [`~transformers.Seq2SeqTrainer`] with progressive self-distillation of every target token.

    Every argument keeps its meaning, `predict_with_generate` and the other generation arguments included. A plain
    [`~transformers.Seq2SeqTrainingArguments`] is accepted and takes the defaults of [`Seq2SeqSelfKDConfig`].

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*): an encoder-decoder model with a language modeling head.
        args ([`Seq2SeqSelfKDConfig`] or [`~transformers.Seq2SeqTrainingArguments`], *optional*): the arguments.
        auxiliary_heads ([`AuxiliaryHeadsConfig`] or `str`, *optional*): as for [`SelfKDTrainer`].
        *arguments, **keywords: as for [`~transformers.Seq2SeqTrainer`].
    """

    _config_class = Seq2SeqSelfKDConfig

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
        processes, and with `token_nll` (nats), `token_accuracy` and `token_ece` (per cent, 10 right-closed bins) over
        all target tokens among the metrics, generated or not.
        """
        if not self._several_sequences():
            self.gather_function = generation_gather(self.accelerator)
        self._token_figures = TokenMetrics(self.accelerator.gather_for_metrics)
        self._eval_labels: torch.Tensor | None = None
        handle = self.model.register_forward_hook(self._see_outputs, with_kwargs=True)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            handle.remove()
        for name, value in self._token_figures.compute().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _several_sequences(self) -> bool:
        generation = getattr(self.model, "generation_config", None)
        asked = getattr(self, "_gen_kwargs", {}).get("num_return_sequences")
        return ((asked if asked is not None else getattr(generation, "num_return_sequences", None)) or 1) > 1

    def _see_outputs(self, model: torch.nn.Module, arguments: tuple, keywords: dict[str, Any], outputs: Any) -> None:
        labels = keywords.get("labels", self._eval_labels)
        if labels is not None:  # and not one of the steps of generation
            self._token_figures.update(logits_of(outputs, has_loss="labels" in keywords), labels)

    def prediction_step(self, model, inputs, *arguments: Any, **keywords: Any):
        """As in [`~transformers.Seq2SeqTrainer`]; the figures of the target tokens are noted."""
        # Without generation the stock Trainer may take the labels off before it runs the model.
        self._eval_labels = None if self.args.predict_with_generate else self._prepare_inputs(inputs).get("labels")
        result = super().prediction_step(model, inputs, *arguments, **keywords)
        self._token_figures.gather()
        return result
