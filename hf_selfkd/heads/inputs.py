"""Made-up samples, to find out what the features of a model look like."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..models import base_model, is_encoder_decoder, main_parameter


LENGTH = 7  # words of a made-up sample: not a length that a model which pads its samples would leave as it is


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Two made-up samples, to find out the sizes of a model's features.

    Raises:
        ValueError: if the model does not tell what it takes.
    """
    base = base_model(model)
    config, name = getattr(base, "config", None), getattr(base, "main_input_name", None)
    parameter = main_parameter(model)
    if name == "pixel_values":
        samples = {name: _images(base, config)} | _decoder_inputs(base, config)
    elif name == "input_ids":
        samples = _sentences(base, config)
    else:
        samples = _sounds(base, config, name)
    if not samples:
        raise ValueError(
            f"{type(base).__name__} does not tell what a sample looks like (main_input_name={name!r}): call "
            "attach_auxiliary_heads(model, config, inputs=...) with a small batch before you make the trainer."
        )
    to = {key: parameter.dtype if value.is_floating_point() else value.dtype for key, value in samples.items()}
    return {key: value.to(parameter.device, to[key]) for key, value in samples.items()}


def varied_inputs(model: nn.Module, rows: int) -> dict[str, torch.Tensor]:
    """
    Made-up samples that differ from one another, the same every time: of the shapes of [`example_inputs`].

    Args:
        model (`nn.Module`): that they are for.
        rows (`int`): how many.
    """
    generator, found = torch.Generator().manual_seed(0), {}
    for name, value in example_inputs(model).items():
        value = value[:1].expand(rows, *value.shape[1:]).clone()
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value = noise.to(value.device, value.dtype)
        elif name.endswith("input_ids"):
            value[:, :-1] = _varied_words(model, value[:, :-1].shape, generator).to(value.device)
        found[name] = value
    return found


def _varied_words(model: nn.Module, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Words without a meaning of their own; the last one of a sentence, which may have one, is left alone."""
    base = base_model(model)
    try:
        count = base.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        count = getattr(base.config, "vocab_size", None) or 100
    special = {getattr(base.config, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos", "decoder_start")}
    words = torch.tensor([word for word in range(min(count, 1000)) if word not in special] or [0])
    return words[torch.randint(len(words), shape, generator=generator)]


def _images(base: nn.Module, config: Any) -> torch.Tensor:
    timm = getattr(base, "timm_model", None)
    # Of models for images and texts.
    config = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    shape = (getattr(config, "num_channels", 3), height, width)
    if timm is not None:
        shape = (getattr(timm, "pretrained_cfg", None) or {}).get("input_size", shape)
        size = getattr(getattr(timm, "patch_embed", None), "img_size", None)  # as the model was made, not as published
        shape = (shape[0], *size) if isinstance(size, (tuple, list)) else shape
    frames = [config.num_frames] if getattr(config, "num_frames", None) else []
    return torch.zeros(2, *frames, *shape)


def _words(base: nn.Module, config: Any) -> torch.Tensor:
    """Sentences of one word, which is none of those with a meaning of their own, and of words that there are."""
    try:
        embedding = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model of one's own; CANINE, which hashes letters
        embedding = None
    count = getattr(embedding, "num_embeddings", None) or getattr(config, "vocab_size", None) or 100
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos", "decoder_start")}
    word = next((number for number in range(count) if number not in special), 0)
    # Without padding, models that classify by the last word take one sample only.
    words = torch.full((1 if getattr(config, "pad_token_id", None) is None else 2, _length(config)), word)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < count:
        words[:, -1] = end  # by which BART classifies
    return words


def _length(config: Any) -> int:
    if getattr(config, "attention_type", None) != "block_sparse":
        return getattr(config, "segment_means_seq_len", None) or LENGTH  # Nystromformer takes no other
    # At a shorter sentence BigBird gives up its sparse attention for good.
    needed = (5 + 2 * config.num_random_blocks) * config.block_size + 1
    return needed if needed <= config.max_position_embeddings else LENGTH


def _sentences(base: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    words = _words(base, config)
    samples = {"input_ids": words}
    if "attention_mask" in _parameters(base):
        samples["attention_mask"] = torch.ones_like(words)
    return samples | ({"decoder_input_ids": words} if is_encoder_decoder(base) else {})


def _sounds(base: nn.Module, config: Any, name: str | None) -> dict[str, torch.Tensor]:
    shape = _sound(name, config)
    if shape is None:
        return {}
    return {name: torch.zeros(2, *shape)} | _decoder_inputs(base, config)


def _decoder_inputs(base: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    """What a decoder behind an encoder of sounds or images starts from."""
    if not is_encoder_decoder(base) or "decoder_input_ids" not in _parameters(base):
        return {}
    return {"decoder_input_ids": _words(base, config)[:1].expand(2, -1)}


def _sound(name: str | None, config: Any) -> tuple[int, ...] | None:
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if name == "input_values":
        length = getattr(config, "max_length", None)
        return (length, bins) if bins and length else (16000,)
    if name != "input_features":
        return None
    if bins and positions:  # spectrograms of a fixed length, as of Whisper
        return bins, 2 * positions
    width = getattr(config, "feature_projection_input_dim", None)
    width = width or getattr(config, "input_feat_per_channel", 0) * getattr(config, "input_channels", 1)
    return (64, width) if width else None


def _parameters(base: nn.Module) -> set[str]:
    return set(inspect.signature(base.forward).parameters)
