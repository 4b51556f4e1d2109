"""What a card tells, as plain data: written beside the model, so that the card can be made again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


FACTS_FILE = "selfkd_card.json"


@dataclass
class Evaluation:
    """
    One evaluation of the model that the card is of.

    Args:
        split (`str`): its prefix, such as `"eval"` or `"test"`.
        metrics (`dict`): values by name, without the prefix.
        samples (`int`, *optional*): how many samples were looked at.
        step (`int`, *optional*): optimizer steps that the evaluated weights had seen.
        signatures (`dict`): how metrics were computed, by name, where the metric says so.
        reliability (`dict`, *optional*): `count`, `confidence` and `accuracy` of equal bins of confidence.
        data (`str`, *optional*): the dataset, where that need not be the one of the training.
    """

    split: str
    metrics: dict[str, float]
    samples: int | None = None
    step: int | None = None
    signatures: dict[str, str] = field(default_factory=dict)
    reliability: dict[str, list] | None = None
    data: str | None = None


@dataclass
class CardFacts:
    """
    What is known of a model and the run that made it. Nothing in it tells samples, paths or tokens.

    Args:
        model_name (`str`): name of the model, as the title has it.
        repo_id (`str`, *optional*): where the model is, or will be, on the Hub.
        model_class (`str`): its class.
        parameters (`int`): without auxiliary heads.
        classes (`list[str]`): of a classifier, by their numbers.
        input_length (`int`, *optional*): most tokens of an input.
        base_model (`str`, *optional*): what was fine-tuned, if that is on the Hub.
        task (`str`, *optional*): as the Hub names it.
        library (`str`): `"transformers"` or `"peft"`.
        language, license, tags, datasets: as for the metadata of a card.
        data (`dict`): of the training set: `samples`, `columns`, `description`, whatever is known.
        method (`dict`): the self-distillation that was done.
        settings (`dict`): fields of the arguments that differ from their defaults, and those that always matter.
        evaluations (`list[Evaluation]`): of these weights, the last of each split.
        chosen_by (`dict`, *optional*): `metric`, `value` and `step`, if a metric chose the checkpoint.
        curves (`dict`): `loss` and `eval_loss` as lists of `[step, value]`.
        training (`dict`): `epochs`, `steps`, `seconds`, `device`, `processes`, whatever is known.
        comparison (`list[dict]`): the runs of a comparison, with `method`, `seed` and metrics.
        versions (`dict`): of what trained it.
        exit (`dict`): of an exit of a larger model: its `layers`, those `of` the `whole`, which is a name.
        written (`dict`): the metadata of the card that was made of this, to be told from what its user has added.
    """

    model_name: str
    model_class: str = ""
    parameters: int | None = None
    classes: list[str] = field(default_factory=list)
    input_length: int | None = None
    repo_id: str | None = None
    base_model: str | None = None
    task: str | None = None
    library: str = "transformers"
    language: list[str] = field(default_factory=list)
    license: str | None = None
    tags: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    chosen_by: dict[str, Any] | None = None
    curves: dict[str, list] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    comparison: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    exit: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write `selfkd_card.json` into a folder."""
        text = json.dumps(finite(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)
        (Path(folder) / FACTS_FILE).write_text(text + "\n", encoding="utf-8")

    def remember(self, folder: str | Path) -> None:
        """
        Take over from the facts of the same folder what this process does not know: the training, if it has trained
        nothing, and a comparison, if the training is the same.
        """
        stored = CardFacts.find(folder)
        if stored is None or stored.parameters != self.parameters or stored.model_class != self.model_class:
            return
        if not self.training:
            for name in ("method", "settings", "training", "curves", "data", "chosen_by", "base_model", "versions"):
                setattr(self, name, getattr(stored, name))
            self.datasets = self.datasets or stored.datasets
        if (stored.method, stored.settings, stored.training) == (self.method, self.settings, self.training):
            self.comparison = self.comparison or stored.comparison

    @classmethod
    def find(cls, folder: str | Path) -> CardFacts | None:
        """What `save` wrote, if the folder has it."""
        try:
            return cls.load(folder)
        except ValueError:
            return None

    @classmethod
    def load(cls, folder: str | Path) -> CardFacts:
        """
        Read what `save` wrote.

        Raises:
            ValueError: if the folder has no such file, or one of another make.
        """
        path = Path(folder) / FACTS_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {FACTS_FILE}, which trainer.create_model_card() and `hf-selfkd train` write beside "
                "the model: train with them, or choose the folder that they wrote."
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            evaluations = [Evaluation(**evaluation) for evaluation in stored.pop("evaluations", [])]
            for one in evaluations:
                one.metrics = {name: value for name, value in one.metrics.items() if value is not None}
            known = {spec.name for spec in fields(cls)}
            return cls(**{name: value for name, value in stored.items() if name in known}, evaluations=evaluations)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not what this version of hf_selfkd wrote ({error}): make it again.") from None


def finite(value: Any) -> Any:
    """The value with null where JSON has no number: for NaN and infinities."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
