"""The folder that exits are exported from: a model of transformers with its native heads beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ..cards import CardFacts
from ..heads import heads_of, load_auxiliary_heads
from ..heads.config import AuxiliaryHeadsConfig
from ..heads.inputs import example_inputs
from ..heads.layout import measure
from ..heads.saving import FOLDER, WEIGHTS_NAME
from ..models import classes_of, is_encoder_decoder


# The classes of transformers that the script of a task takes.
GROUPS = {
    "image-classification": ("IMAGE_CLASSIFICATION",),
    "text-classification": ("SEQUENCE_CLASSIFICATION",),
    "translation": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "language-modeling": ("CAUSAL_LM", "MASKED_LM"),
}


@dataclass
class Source:
    """
    A model with its exits.

    Args:
        folder (`Path`): where it is.
        model ([`~transformers.PreTrainedModel`]): with native heads, in evaluation mode.
        layers (`int`): of the whole model; of one with a decoder, those of the decoder.
        processing_class (*optional*): its tokenizer or image processor, if the folder has one.
        facts ([`~hf_selfkd.cards.CardFacts`], *optional*): of the card of its training.
    """

    folder: Path
    model: PreTrainedModel
    layers: int
    processing_class: Any = None
    facts: CardFacts | None = None

    @property
    def name(self) -> str:
        """`str`: of the whole model, as its card or its folder has it."""
        return self.facts.model_name if self.facts is not None else self.folder.resolve().name

    @property
    def of_decoder(self) -> bool:
        """`bool`: whether layers are those of a decoder, and every exit has the whole encoder."""
        return is_encoder_decoder(self.model) and hasattr(self.model, "get_decoder")

    @property
    def exits(self) -> list[int]:
        """`list[int]`: the exits that there are, by their layers."""
        return sorted(head.exit for head in heads_of(self.model).heads)


def check_heads(folder: Path) -> None:
    """
    Raises:
        ValueError: if a folder holds no native heads beside a model.
    """
    remedy = "train with --auxiliary_heads exits --save_heads, and name the --output_dir of that training."
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: {remedy}")
    if not (folder / FOLDER / WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} holds no {FOLDER}/{WEIGHTS_NAME}, so it has no exits: {remedy}")
    if not (folder / "config.json").is_file():
        adapter = (
            " but an adapter of PEFT: merge it, and save heads and merged model in one folder"
            * (folder / "adapter_config.json").is_file()
        )
        raise ValueError(f"{folder} holds no model of transformers (config.json){adapter}.")
    head = AuxiliaryHeadsConfig.from_pretrained(folder / FOLDER).head
    if head != "native":
        raise ValueError(f"the heads in {folder} are {head!r}, which are no part of the architecture: {remedy}")


def load_source(task: str, folder: Path) -> Source:
    """
    Load a model and its heads.

    Args:
        task (`str`): the name of the script in `SCRIPTS`.
        folder (`Path`): with native heads.

    Raises:
        ValueError: if it holds none, or its model is none for the task.
    """
    check_heads(folder)
    config = AutoConfig.from_pretrained(folder)
    kind = (config.architectures or ["a model of no class"])[0]
    if kind not in classes_of(*GROUPS[task]):
        raise ValueError(
            f"{folder} holds {kind}, which is no model for {task}: name the task that it was trained for."
        )
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    layers = len(measure(model, [], example_inputs(model)).layers)
    load_auxiliary_heads(model, folder)
    return Source(folder, model, layers, _processing_class(task, folder), CardFacts.find(folder))


def _processing_class(task: str, folder: Path) -> Any:
    auto = AutoImageProcessor if task == "image-classification" else AutoTokenizer
    names = ("preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "config.json")
    kept = names[:1] if auto is AutoImageProcessor else names[1:3]
    timm = auto is AutoImageProcessor and "TimmWrapper" in (folder / "config.json").read_text(encoding="utf-8")
    return auto.from_pretrained(folder) if timm or any((folder / name).is_file() for name in kept) else None
