"""What exits are measured and compared on: samples of the data, or made-up ones."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..heads.inputs import varied_inputs


if TYPE_CHECKING:
    from ..scripts.common import Run

LOOKED_AT = 200  # rows of the data among which one of the median length is looked for
_NO_INPUTS = ("labels", "num_items_in_batch")


@dataclass
class Samples:
    """
    What a model is run on.

    Args:
        one (`dict`): a batch of one sample, to measure on.
        batches (`list[dict]`): two batches of other sizes and, of texts, other lengths, to compare outputs on.
        of_data (`bool`): whether they are of the data, and not made up.
    """

    one: dict[str, torch.Tensor]
    batches: list[dict[str, torch.Tensor]]
    of_data: bool

    def told(self) -> str:
        """What the sample is, in words."""
        shapes = ", ".join(f"{name} {' x '.join(map(str, value.shape))}" for name, value in self.one.items())
        return f"one {'sample of the data' if self.of_data else 'made-up sample'} ({shapes})"


def samples_of(run: Run) -> Samples:
    """
    Samples of the data that a run evaluates on; the one to measure on has the median length.

    Args:
        run ([`~hf_selfkd.scripts.common.Run`]): before it is carried out.
    """
    dataset = run.trainer.eval_dataset if run.predict is None else run.predict.args[1]
    rows = [dataset[place] for place in range(min(len(dataset), LOOKED_AT))]
    rows.sort(key=lambda row: len(row.get("input_ids", ())))
    model, collate = run.trainer.model, run.trainer.data_collator
    median, few = rows[len(rows) // 2], [rows[place % len(rows)] for place in (0, len(rows) // 2, -1)]
    one, *batches = (_inputs(model, collate(part)) for part in ([median], rows[:1], few))
    return Samples(one, batches, True)


def made_up(model: nn.Module, processing_class: Any = None) -> Samples:
    """
    Samples of random pixels or tokens, the same every time.

    Args:
        model (`nn.Module`): that they are for.
        processing_class (*optional*): its tokenizer, which tells what else it makes of texts.
    """
    batches = [varied_inputs(model, count) for count in (1, 3)]
    if "token_type_ids" in getattr(processing_class, "model_input_names", ()):
        batches = [batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in batches]
    mask = batches[1].get("attention_mask")
    padding = getattr(model.config, "pad_token_id", None)
    if mask is not None and padding is not None:  # a padded sample
        batches[1]["input_ids"][1, -2:], mask[1, -2:] = padding, 0
    if "input_ids" in batches[0]:
        batches[0] = {name: value[:, 1:] for name, value in batches[0].items()}
    return Samples({name: value[:1] for name, value in batches[1].items()}, batches, False)


def _inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a batch that a model takes, without the labels."""
    known = inspect.signature(model.forward).parameters
    return {
        name: value.cpu()
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and name in known and name not in _NO_INPUTS
    }
