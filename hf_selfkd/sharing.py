"""The hooks of `Trainer` for the Hub: every upload has a model card that tells what was done."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from transformers.trainer_utils import EvalLoopOutput, HubStrategy

from .cards import Evaluation as Evaluated
from .cards import write_card
from .cards.collect import collect
from .cards.names import measured
from .hub import HUB_ERRORS, is_of_the_hub, reason
from .metrics import reliability_curve


logger = logging.getLogger(__name__)

SPLITS = {"predict": "test"}  # names of splits, by the prefix of their metrics


class Sharing:
    """Part of [`~hf_selfkd.SelfKDMixin`]: model cards, and uploads that fail early or lose nothing."""

    def _note_evaluation(self, output: EvalLoopOutput, prefix: str) -> None:
        """Remember what an evaluation says of the weights as they are now."""
        metrics = measured(output.metrics, prefix)
        signatures = getattr(self.compute_metrics, "signatures", {})
        self.evaluations[prefix] = Evaluated(
            SPLITS.get(prefix, prefix),
            metrics,
            output.num_samples,
            self.state.global_step,
            {name: text for name, text in signatures.items() if name in metrics},
            self._reliability(output),
        )

    def _reliability(self, output: EvalLoopOutput) -> dict[str, list] | None:
        """Accuracy against confidence in ten bins, of classifiers whose predictions were gathered."""
        task, predictions, labels = self._find_task_quietly(), output.predictions, output.label_ids
        predictions = predictions[0] if isinstance(predictions, tuple) and predictions else predictions
        fits = isinstance(predictions, np.ndarray) and isinstance(labels, np.ndarray) and predictions.ndim == 2
        if task is None or task.per_token or not fits or labels.shape != predictions.shape[:1]:
            return None
        if self.preprocess_logits_for_metrics is not None or predictions.dtype.kind != "f":
            return None  # then they need not be scores of the classes
        if predictions.shape[1] < 2 or predictions.shape[1] != (task.num_classes or predictions.shape[1]):
            return None
        known = labels.dtype.kind in "iu" and bool((labels >= 0).any()) and labels.max() < predictions.shape[1]
        if not known or not np.isfinite(predictions).all():
            return None
        curve = reliability_curve(predictions, labels)
        columns = {name: [float(value) for value in getattr(curve, name)] for name in ("confidence", "accuracy")}
        # JSON knows no NaN: an empty bin has zeros.
        columns = {name: [0.0 if value != value else value for value in column] for name, column in columns.items()}
        return {"count": [int(count) for count in curve.count], **columns}

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best, self.best_is_loaded = self.state.best_global_step, True
        for prefix in list(self.evaluations):
            noted = self.evaluations[prefix]
            entries = [measured(entry, prefix) for entry in self.state.log_history if entry.get("step") == best]
            found = [metrics for metrics in entries if metrics.keys() == noted.metrics.keys()]
            if noted.step != best and found:
                self.evaluations[prefix] = Evaluated(noted.split, found[-1], noted.samples, best, noted.signatures)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **others: Any,
    ) -> None:
        """
        Write the model card: results, calibration, what was done and with which settings, how to use the model. A card
        of your own keeps its text and metadata, and gets ours below. What the card tells stands in `selfkd_card.json`
        beside it, and `hf-selfkd card` makes the card again.

        Args:
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args:
                as in [`~transformers.Trainer`].
            **others: `dataset_name`, as other trainers call it; what is not known is left out with a warning.
        """
        if not self.is_world_process_zero():
            return
        named = others.pop("dataset_name", None)
        if others:
            logger.warning(f"The model card knows nothing of {', '.join(others)}: left out.")
        facts = collect(
            self,
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=named if dataset is None else dataset,
            dataset_args=dataset_args,
        )
        facts.remember(self.args.output_dir)
        write_card(facts, self.args.output_dir)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        As in [`~transformers.Trainer`], when it is made.

        Raises:
            ValueError: if the Hub cannot be reached or refuses the token, before anything is trained.
        """
        try:
            super().init_hf_repo(token, **_if_given(private))
        except HUB_ERRORS as error:
            asked = "push_to_hub=True" if self.args.push_to_hub else "push_to_hub()"
            raise ValueError(
                f"{asked}: {reason(error)}. Log in with `hf auth login` or give hub_token, check "
                f"hub_model_id={self.args.hub_model_id!r}, or leave {asked} out and upload later with "
                "`hf-selfkd push`."
            ) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As in [`~transformers.Trainer`]; further words are for the model card.

        Raises:
            RuntimeError: if the upload fails; the model and its card are whole in the output folder.
        """
        try:
            return super().push_to_hub(commit_message, blocking, token, revision, **_if_given(private), **kwargs)
        except Exception as error:
            if not is_of_the_hub(error):
                raise
            raise RuntimeError(
                f"The upload failed ({reason(error)}). Nothing is lost: model and card are in {self.args.output_dir}; "
                f"repeat with `hf-selfkd push {self.args.output_dir} --repo-id {self.hub_model_id}`."
            ) from error

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        push = getattr(self, "push_in_progress", None)
        for job in [] if push is None else push.jobs:
            if job.done() and job.exception() is not None and job not in self._failed_pushes:
                self._failed_pushes.append(job)
                logger.warning(f"An upload during training failed: {reason(job.exception())}. Training went on.")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            try:
                self.create_model_card()
            except Exception as error:  # a card is not worth a training
                logger.warning(f"The model card could not be written: {type(error).__name__}: {error}")
        super()._push_from_checkpoint(checkpoint_folder)


def _if_given(private: bool | None) -> dict[str, bool]:
    """The argument for versions of transformers that know it."""
    return {} if private is None else {"private": private}
