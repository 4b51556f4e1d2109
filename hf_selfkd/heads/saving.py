"""Auxiliary heads on disk, in a folder of their own beside a saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import load_tensors, save_tensors
from ..models import base_model
from ..sharded import whole_state
from .attach import attach_auxiliary_heads, strip_auxiliary_heads
from .auxiliary import AuxiliaryHeads, heads_of
from .config import AuxiliaryHeadsConfig


FOLDER = "auxiliary_heads"
WEIGHTS_NAME = "auxiliary_heads.safetensors"


def save_auxiliary_heads(model: nn.Module, save_directory: str | Path, is_main_process: bool = True) -> Path:
    """
    Save the auxiliary heads of a model, to train them further or to make smaller models with them later.

    The heads are kept in the folder `auxiliary_heads` of the directory. transformers does not read this folder: a
    model that is saved in the same directory loads as before.

    Args:
        model (`nn.Module`): a model with heads.
        save_directory (`str` or `Path`): the directory; usually the model is saved there, too.
        is_main_process (`bool`, *optional*, defaults to `True`):
            whether this process writes. Of weights that FSDP2 shards, every process must call this, and one writes.

    Returns:
        `Path`: the folder of the heads.

    Raises:
        ValueError: if the model has no heads.
    """
    heads = heads_of(model)
    if heads is None:
        raise ValueError(
            f"{type(base_model(model)).__name__} has no auxiliary heads to save: call attach_auxiliary_heads(model, "
            "config) first."
        )
    folder = Path(save_directory) / FOLDER
    tensors = whole_state(model, heads, is_main_process)
    if is_main_process:
        heads.config.save_pretrained(folder)
        save_tensors(folder / WEIGHTS_NAME, tensors, {"layers": json.dumps(heads.names)})
    return folder


def load_auxiliary_heads(
    model: nn.Module, save_directory: str | Path, inputs: dict[str, Any] | None = None
) -> nn.Module:
    """
    Give a model the heads that [`save_auxiliary_heads`] saved. A model without heads grows them first.

    Args:
        model (`nn.Module`): a model of the architecture that the heads were saved of.
        save_directory (`str` or `Path`): the directory that the heads were saved in.
        inputs (`dict`, *optional*): as in [`attach_auxiliary_heads`].

    Returns:
        `nn.Module`: the same object.

    Raises:
        ValueError:
            if the directory holds no heads, they are damaged, or the model has or grows other ones. The model is left
            as it was.
    """
    folder = Path(save_directory) / FOLDER
    if not (folder / WEIGHTS_NAME).is_file():
        raise ValueError(f"{save_directory} holds no {FOLDER}/{WEIGHTS_NAME}: name a directory with saved heads.")
    config = AuxiliaryHeadsConfig.from_pretrained(folder)
    tensors, metadata = load_tensors(folder / WEIGHTS_NAME)
    grown = heads_of(model) is None
    if grown:
        attach_auxiliary_heads(model, config, inputs)
    heads = heads_of(model)
    try:
        _check_same(heads, config, json.loads(metadata["layers"]), tensors, folder)
    except ValueError:
        if grown:
            strip_auxiliary_heads(model)
        raise
    heads.load_state_dict(tensors)
    return model


def _check_same(
    heads: AuxiliaryHeads,
    config: AuxiliaryHeadsConfig,
    layers: list[str],
    tensors: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    own = {name: list(tensor.shape) for name, tensor in heads.state_dict().items()}
    saved = {name: list(tensor.shape) for name, tensor in tensors.items()}
    differing = next((name for name in sorted(own.keys() | saved.keys()) if own.get(name) != saved.get(name)), None)
    told, remedy = (
        f"{folder} holds other heads than the model has",
        "load them into the model that they were made for.",
    )
    if (heads.config.head, heads.config.views) != (config.head, config.views):
        raise ValueError(
            f"{told}: head={config.head!r}, views={config.views!r} and not head={heads.config.head!r}, "
            f"views={heads.config.views!r}: {remedy}"
        )
    if [_without_peft(name) for name in layers] != [_without_peft(name) for name in heads.names]:
        raise ValueError(f"{told}: on {', '.join(layers)} and not on {', '.join(heads.names)}: {remedy}")
    if differing is not None:
        raise ValueError(
            f"{told}: {differing} has shape {saved.get(differing)} and not {own.get(differing)}: {remedy}"
        )


def _without_peft(layer: str) -> str:
    """The name of a layer in the model that PEFT wraps: heads trained beside adapters fit the merged model."""
    return layer.removeprefix("base_model.model.")
