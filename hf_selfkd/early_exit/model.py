"""`EarlyExit`: a classifier whose samples leave it as soon as an exit is sure of them."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .._version import __version__
from ..heads.auxiliary import arguments_of, heads_of, trained_heads
from ..heads.inputs import varied_inputs
from ..heads.saving import load_auxiliary_heads, save_auxiliary_heads
from ..models import base_model, evaluating, forward_owner, main_parameter, uncompiled
from ..tasks import task_for
from ..tasks.by_shape import ByShape
from ..tasks.sample_classification import SampleClassification
from .calibration import EarlyExitSummary, Target, batches_of, calibrated, collect
from .cost import shares_of_work
from .measured import samples_in
from .outputs import with_exits
from .passing import ExitPass, at_full_depth
from .planning import make_plan
from .replay import Plan


FILE_NAME = "early_exit.json"
_REFUSED = {
    "labels": "early exit answers and learns nothing",
    "output_hidden_states": "samples that have left have no states of later layers",
    "output_attentions": "samples that have left have no attention of later layers",
    "past_key_values": "a classifier reads a sample as a whole",
}


class EarlyExit(nn.Module):
    """
    A classifier with trained heads, each sample of which is answered by the first head that is sure enough of it.

    A head is sure if the largest probability, of its logits divided by its temperature, reaches its threshold. Samples
    that are answered leave the batch: later layers run for the others only, and not at all if there are none. Which
    samples go on is read from the device once an exit; nothing else waits for it. The model itself stays as it is and
    may be used beside. It can be in one forward pass at a time, and is not to be compiled.

    Which part of what the model's modules return belongs to which sample is measured by running batches of two sizes,
    and tried out against a run at full depth: of made-up samples here, and again of the first batch that has other
    arguments than those.

    Args:
        model (`nn.Module`): a classifier of sequences, images or sounds, with auxiliary heads of any kind.
        thresholds (`float` or `list[float]`, *optional*):
            How probable the answer of each exit has to be: at 0 all samples leave, above 1 none. Found by
            [`~EarlyExit.calibrate`] if left out.
        temperatures (`list[float]`, *optional*):
            What logits are divided by, of each exit and of the model itself; 1 by default.
        inputs (`dict`, *optional*): a small batch, without labels, for a model that does not run on made-up samples.

    Raises:
        ValueError:
            if the model is no classifier of samples, has no heads, none before its last layer or two after the same
            one, or its batches cannot be cut safely.

    Example:

    ```python
    from transformers import AutoModelForImageClassification
    from hf_selfkd import EarlyExit, load_auxiliary_heads

    model = load_auxiliary_heads(AutoModelForImageClassification.from_pretrained("out"), "out")
    early = EarlyExit(model.eval())
    print(early.calibrate(validation, max_accuracy_loss=0.01).guarantee)
    outputs = early(pixel_values=images)  # outputs.logits, outputs.exits
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        thresholds: float | list[float] | None = None,
        temperatures: list[float] | None = None,
        inputs: dict[str, Any] | None = None,
    ):
        super().__init__()
        model = uncompiled(model)
        self.indices, self.exits = exits_of(model)
        self.model, self.training = model, model.training
        self.register_buffer("layers_run", torch.tensor(self.exits, device=main_parameter(model).device), False)
        self.summary: EarlyExitSummary | None = None
        self.thresholds, self.temperatures = thresholds, 1.0 if temperatures is None else temperatures
        parameters = inspect.signature(forward_owner(model).forward).parameters
        self._extra = {"use_cache": False} if "use_cache" in parameters else {}
        self._small = varied_inputs(model, 3) if inputs is None else {k: v for k, v in inputs.items() if k != "labels"}
        self._plans: dict[Any, Plan] = {}
        with evaluating(model):
            self._plan(self._small | self._extra)
            outputs = model(**self._small, **self._extra)
        self._kind = type(outputs) if isinstance(outputs, ModelOutput) else dict
        self.reset()

    @property
    def thresholds(self) -> list[float] | None:
        """`list[float]`: how probable the answer of each exit has to be; one number may be given for all."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, value: float | list[float] | None) -> None:
        self._thresholds = None if value is None else _numbers("thresholds", value, len(self.indices))

    @property
    def temperatures(self) -> list[float]:
        """`list[float]`: what the logits of each exit and of the model itself are divided by."""
        return self._temperatures

    @temperatures.setter
    def temperatures(self, value: float | list[float]) -> None:
        numbers = _numbers("temperatures", value, len(self.exits))
        if min(numbers) <= 0:
            raise ValueError(f"temperatures={value} must be positive: 1.0 leaves logits as they are.")
        self._temperatures = numbers

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Answer a batch.

        Args:
            *args, **kwargs: those of the model, without labels.

        Returns:
            `ModelOutput`: of the model's class, with `logits` (`torch.FloatTensor` of shape `[B, C]`), divided by the
            temperature of the exit that has answered, and `exits` (`torch.LongTensor` of shape `[B]`), how many layers
            were run for each sample.

        Raises:
            ValueError: in training mode, without thresholds, or for arguments that make no sense here.
        """
        if self.thresholds is None:
            raise ValueError("EarlyExit has no thresholds: call calibrate(...) first, or give thresholds=0.9.")
        inputs = self._inputs(args, kwargs)
        per_sample, size = samples_in(self.model, inputs)
        plan = self._plan(inputs) if size > 1 else None  # one sample stays or leaves as a whole
        run = ExitPass(self.model, self.indices, self.temperatures, plan)
        run.run(inputs, per_sample, size, self._staying)
        self.counts = [before + new for before, new in zip(self.counts, run.counts, strict=True)]
        return with_exits(self._kind, run.logits, self.layers_run.to(run.places.device)[run.places])

    def _staying(self, place: int, logits: torch.Tensor) -> torch.Tensor:
        """The samples that an exit is not sure of. The only thing that the host waits for."""
        confidence = logits.softmax(dim=-1).amax(dim=-1)
        return (confidence >= self.thresholds[place]).logical_not().nonzero().squeeze(1)  # NaN stays

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.model.training:
            raise ValueError("EarlyExit is for inference, and the model is in training mode: call .eval() first.")
        inputs = {name: value for name, value in arguments_of(self.model, args, kwargs).items() if value is not None}
        for name, reason in _REFUSED.items():
            if inputs.get(name) is not None and inputs[name] is not False:
                raise ValueError(f"{name}: {reason}: leave it out.")
        if inputs.get("return_dict") is False:
            raise ValueError("return_dict=False: which exit has answered has no place in a tuple: leave it out.")
        return inputs | self._extra

    def _plan(self, inputs: dict[str, Any]) -> Plan:
        """The plan for batches with such arguments."""
        per_sample, size = samples_in(self.model, inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        key = frozenset((name, value.dim(), name in per_sample) for name, value in tensors.items())
        if key not in self._plans:
            self._plans[key] = make_plan(self.model, self.indices, inputs, per_sample, size)
        return self._plans[key]

    def reset(self) -> None:
        """Forget which exits have answered."""
        self.counts = [0] * len(self.exits)

    def shares(self) -> dict[int, float]:
        """
        The share of samples that each exit has answered since [`~EarlyExit.reset`].

        Returns:
            `dict[int, float]`: by the number of layers; the last is the whole model. All 0 if there were no samples.
        """
        total = max(sum(self.counts), 1)
        return {exit: count / total for exit, count in zip(self.exits, self.counts, strict=True)}

    @cached_property
    def costs(self) -> list[float]:
        """`list[float]`: the share of the whole model's operations that a sample costs that is answered at each exit,
        heads included."""
        kinds = {name: self.dtype if part.is_floating_point() else part.dtype for name, part in self._small.items()}
        inputs = {name: part.to(self.device, kinds[name]) for name, part in self._small.items()} | self._extra
        return shares_of_work(self.model, self.indices, self.exits, inputs, samples_in(self.model, inputs)[1])

    @torch.no_grad()
    def calibrate(
        self,
        data: Any,
        target_accuracy: float | None = None,
        max_accuracy_loss: float | None = None,
        target_cost: float | None = None,
        confidence: float = 0.95,
        data_collator: Callable | None = None,
        batch_size: int = 32,
        temperature_share: float = 0.2,
    ) -> EarlyExitSummary:
        """
        Find temperatures and thresholds on validation data, which is run once, at full depth.

        Temperatures are fitted on a random part of the samples. On the others, one threshold for all exits is lowered
        in fixed steps as long as an exact binomial bound shows that the promise is kept (Learn then Test, Angelopoulos
        et al., 2021; for early exits Jazbec et al., 2024). It holds if these samples are independent draws of what the
        model will see and nothing was trained or chosen on them, and for one calibration: who calibrates until they
        like the outcome has no promise.

        Args:
            data: batches (a `DataLoader` or a list of dictionaries with `labels`), or a dataset of samples.
            target_accuracy (`float`, *optional*): that early exit shall have at least.
            max_accuracy_loss (`float`, *optional*):
                The share of samples that the whole model may tell right and early exit wrong: accuracy is lower by no
                more than that; 0.01 is a percentage point.
            target_cost (`float`, *optional*):
                The share of the whole model's operations, in (0, 1], that samples shall cost on average. Nothing is
                promised of the accuracy then.
            confidence (`float`, *optional*, defaults to 0.95):
                The probability, over draws of the validation samples, that the promise is kept.
            data_collator (`Callable`, *optional*): makes batches of samples.
            batch_size (`int`, *optional*, defaults to 32): for a dataset of samples.
            temperature_share (`float`, *optional*, defaults to 0.2): of the samples, for the temperatures.

        Returns:
            [`EarlyExitSummary`]: which the object keeps as `summary`, too.

        Raises:
            ValueError:
                if not exactly one target is given, the data is unusable, or the target cannot be shown to be met. The
                thresholds are what they were then.
        """
        target = Target(target_accuracy, max_accuracy_loss, target_cost, confidence)
        if not 0 < temperature_share < 1:
            raise ValueError(
                f"temperature_share={temperature_share} must be between 0 and 1: 0.2 leaves most samples."
            )
        batches = batches_of(data, data_collator, batch_size)
        with evaluating(self.model):
            logits, labels = collect(batches, lambda inputs: self._at_full_depth(inputs), self.device)
        summary = calibrated(logits, labels, target, self.exits, self.costs, temperature_share)
        self.thresholds, self.temperatures, self.summary = summary.thresholds, summary.temperatures, summary
        return summary

    def _at_full_depth(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        return at_full_depth(self.model, self.indices, self._inputs((), inputs))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """
        Save the model, its heads (in `auxiliary_heads`) and `early_exit.json`. The model loads in transformers as any.

        Args:
            save_directory (`str` or `Path`): the folder.
            **kwargs: for `save_pretrained` of the model.

        Raises:
            ValueError: if the model is none of transformers, or wrapped by PEFT.
        """
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError(
                f"{type(self.model).__name__} is no model of transformers and cannot be saved with its exits: "
                "merge_and_unload() a PEFT model and load the heads into what comes out."
            )
        self.model.save_pretrained(save_directory, **kwargs)
        save_auxiliary_heads(self.model, save_directory)
        content = {
            "hf_selfkd_version": __version__,
            "model_class": type(self.model).__name__,
            "exits": self.exits,
            "thresholds": self.thresholds,
            "temperatures": self.temperatures,
            "summary": None if self.summary is None else self.summary.to_dict(),
        }
        path = Path(save_directory) / FILE_NAME
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, model: nn.Module | None = None, **kwargs: Any) -> EarlyExit:
        """
        Load what [`~EarlyExit.save_pretrained`] saved, in evaluation mode.

        Args:
            name_or_path (`str` or `Path`): the folder.
            model (`nn.Module`, *optional*): already loaded, with or without heads; else one of transformers is loaded.
            **kwargs: for `from_pretrained` of the model, such as `dtype`.

        Raises:
            ValueError: if the folder holds no early exits, or the model has other ones.
        """
        path = Path(name_or_path) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind, exits = content["model_class"], content["exits"]
            thresholds, temperatures, summary = (content[n] for n in ("thresholds", "temperatures", "summary"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}): save_pretrained an EarlyExit first.") from error
        if model is None:
            if not hasattr(transformers, kind):
                raise ValueError(f"{path}: {kind} is no class of transformers: give model=..., loaded by yourself.")
            model = getattr(transformers, kind).from_pretrained(name_or_path, **kwargs)
        made = cls(load_auxiliary_heads(model, name_or_path).eval(), thresholds, temperatures)
        if made.exits != exits:
            raise ValueError(
                f"{path} is for exits after {exits} layers, and the model has {made.exits}: load its own."
            )
        made.summary = None if summary is None else EarlyExitSummary(**summary)
        return made

    # What pipelines ask a model

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return base_model(self.model).config

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return main_parameter(self.model).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights."""
        return main_parameter(self.model).dtype

    @property
    def name_or_path(self) -> str:
        """Where the model came from."""
        return getattr(base_model(self.model), "name_or_path", "")

    @property
    def main_input_name(self) -> str | None:
        """The name of the model's main input."""
        return getattr(base_model(self.model), "main_input_name", None)

    @property
    def input_modalities(self) -> Any:
        """What the model takes: texts, images or sounds."""
        return getattr(base_model(self.model), "input_modalities", None)

    @staticmethod
    def can_generate() -> bool:
        """Classifiers do not."""
        return False


def exits_of(model: nn.Module) -> tuple[list[int], list[int]]:
    """
    The heads that samples may leave at: those before the last layer, where the model's own classifier is.

    Args:
        model (`nn.Module`): not compiled.

    Returns:
        `tuple`: their indices, and how many layers come before each of them and before the model's own classifier.

    Raises:
        ValueError: if it is no classifier of samples, or has no such heads.
    """
    heads, kind = heads_of(model), type(base_model(model)).__name__
    task = task_for(model)
    if task.bernoulli:
        raise ValueError(f"{kind} is of {task.name}: early exit needs a classifier with one label a sample.")
    if not isinstance(task, (SampleClassification, ByShape)) or (heads and not heads.layout.pooled):
        raise ValueError(
            f"{kind} predicts every position of a sample: early exit needs a classifier with one prediction a sample."
        )
    heads = trained_heads(model)
    if heads.config.head == "stages":
        raise ValueError(
            f"head='stages' of {kind} is a copy of the layers that follow, so that leaving early would save nothing: "
            "train with another head, such as auxiliary_heads='exits'."
        )
    total = len(heads.layout.layers)
    for name, exit in zip(heads.names, heads.exits, strict=True):
        if exit is None or heads.exits.count(exit) > 1:
            told = "is on no layer" if exit is None else f"is not the only one after {exit} layers"
            raise ValueError(f"early exit: the head on {name!r} of {kind} {told}: train heads on layers, one on each.")
    found = [(index, exit) for index, exit in enumerate(heads.exits) if exit < total]
    if not found:
        raise ValueError(f"{kind} has no head before its last layer: train with heads on earlier ones.")
    return [index for index, _ in found], [exit for _, exit in found] + [total]


def _numbers(name: str, value: float | list[float], count: int) -> list[float]:
    numbers = [value] * count if isinstance(value, (int, float)) else list(value)
    if len(numbers) != count or any(not math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}={value} must be {count} finite numbers, one an exit: give as many.")
    return [float(number) for number in numbers]
