"""Quality of a model on data, by the script of its task: as `hf-selfkd evaluate` does, and of ONNX files, too."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..cards import Evaluation
from ..comparison.methods import METHODS
from ..scripts.common import Run, carry_out
from .onnx import OnnxModel


# The figures of the table, by task; the first is that of the picture.
FIGURES = {
    "image-classification": ("accuracy", "nll", "ece", "aurc"),
    "text-classification": ("accuracy", "nll", "ece", "aurc"),
    "translation": ("bleu", "chrf"),
    "language-modeling": ("perplexity",),
}
# What the settings of a training may ask for that is nothing to a model which is evaluated.
_ONLY = (
    *METHODS["plain"],
    *("--do_train", "False", "--report_to", "none", "--push_to_hub", "False", "--load_best_model_at_end", "False"),
    *("--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "True", "--log_level", "warning"),
)


def run_of(script: ModuleType, words: list[str], model: Path, split: str, output_dir: str) -> Run:
    """
    The run of a script that evaluates a model.

    Args:
        script (`module`): of `hf_selfkd.scripts`.
        words (`list[str]`): which say on which data.
        model (`Path`): its folder.
        split (`str`): `"predict"` or `"eval"`.
        output_dir (`str`): for what the script writes.
    """
    asked = [f"--do_{split}", f"--do_{'eval' if split == 'predict' else 'predict'}", "False"]
    return script.build([*words, *_ONLY, *asked, "--model_name_or_path", str(model), "--output_dir", output_dir])


def evaluate(run: Run, split: str, onnx: OnnxModel | None = None) -> Evaluation:
    """
    Carry out a run that evaluates.

    Args:
        run ([`~hf_selfkd.scripts.common.Run`]): from [`run_of`].
        split (`str`): as there.
        onnx ([`OnnxModel`], *optional*): what answers in the place of the model.

    Returns:
        [`~hf_selfkd.cards.Evaluation`]

    Raises:
        ValueError: if the data have no labels.
    """
    if onnx is not None:
        _answer_by(run.trainer.model, onnx)
    carry_out(run)
    found = run.trainer.evaluations.get(split)
    if found is None or not found.metrics.keys() - {"loss"}:
        raise ValueError("the data have no labels to evaluate on: give others, or none.")
    found.step = None  # the trainer has made none
    found.data = _name_of_data(run)
    return found


def _name_of_data(run: Run) -> str:
    """The dataset of the Hub, if it is one."""
    data = run.data_args
    named = data.dataset_name is not None and not data.local and not Path(data.dataset_name).exists()
    return data.dataset_name if named else "unknown"


def _answer_by(model: nn.Module, onnx: OnnxModel) -> None:
    """Let a model, of which the trainer knows the class, return the logits of an ONNX file."""
    own = model.forward

    @functools.wraps(own)
    def forward(**inputs: Any) -> ModelOutput:
        logits = onnx(**inputs).to(model.device)
        labels = inputs.get("labels")
        loss = {} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)}
        return ModelOutput(**loss, logits=logits)

    model.forward = forward
