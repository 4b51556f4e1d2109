"""What auxiliary heads are made of: a body for each kind, pooling, a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .taps import Call


@dataclass
class Context:
    """
    What heads need of the forward pass besides features.

    Args:
        mask (`torch.Tensor` of shape `[B, L]`, *optional*): 0 where a position of the features is padding.
        calls (`dict`): what each layer was called with.
        embed (`Callable`, *optional*): from features to the scores of words, as the model itself does it.
        size (`tuple`, *optional*): height and width of the images.
        length (`int`, *optional*): positions that there are, of features `[B, L, D]` that the model has padded behind.
        replayed (`Replayed`, *optional*): what native heads need, which run the model's own class.
    """

    mask: torch.Tensor | None
    calls: dict[int, Call]
    embed: Callable[[torch.Tensor], torch.Tensor] | None
    size: tuple[int, int] | None = None
    length: int | None = None
    replayed: Any = None


def grid_of(length: int, size: tuple[int, int], patch: tuple[int, int] | None) -> tuple[int, int] | None:
    """
    Rows and columns that the tokens of an image make; class and register tokens, up to 8, stand before them.

    Args:
        length (`int`): number of tokens.
        size (`tuple`): height and width of the image.
        patch (`tuple`, *optional*): height and width of a patch.

    Returns:
        `tuple`: or `None` if no grid of the image's shape fits.
    """
    height, width = size
    if patch is not None:
        rows, columns = height // patch[0], width // patch[1]
        if 0 <= length - rows * columns <= 8:
            return rows, columns
    for count in range(length, max(length - 9, 0), -1):
        rows = round(math.sqrt(count * height / width))
        if rows and count % rows == 0 and rows * width == count // rows * height:
            return rows, count // rows
    return None


def pool(features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    One vector a sample.

    Args:
        features (`torch.FloatTensor` of shape `[B, C, H, W]`, `[B, L, D]` or `[B, D]`): of a layer.
        mask (`torch.Tensor` of shape `[B, L]`, *optional*): 0 where a position is padding.

    Returns:
        `torch.FloatTensor` of shape `[B, C]` or `[B, D]`: the mean over places.
    """
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    if features.dim() == 2:
        return features
    if mask is None or mask.shape != features.shape[:2]:
        return features.mean(dim=1)
    weights = mask.to(features.dtype).unsqueeze(-1)
    return (features * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def to_channels_last(maps: torch.Tensor) -> torch.Tensor:
    """Maps `[B, C, H, W]` as `[B, H, W, C]`; other features stay."""
    return maps.permute(0, 2, 3, 1) if maps.dim() == 4 else maps


def to_channels_first(maps: torch.Tensor) -> torch.Tensor:
    """Maps `[B, H, W, C]` as `[B, C, H, W]`; other features stay."""
    return maps.permute(0, 3, 1, 2) if maps.dim() == 4 else maps


# Bodies: what stands between the features of a layer and the pooling


class UnchangedFeatures(nn.Module):
    """The features as they are: a head without a body."""

    def forward(self, features: torch.Tensor, context: Context) -> torch.Tensor:
        return features


class SeparableConvolution(nn.Module):
    """
    A depthwise separable 3 x 3 convolution with stride 2; the tokens of an image are put on their grid.

    Args:
        channels (`int`): of the features.
        width (`int`): channels that it returns.
        patch (`tuple`, *optional*): see [`grid_of`].
        batch_norm (`bool`, *optional*, defaults to `True`):
            Whether to normalise over the batch, as models with batch normalisation do; otherwise over each sample, so
            that a sample's prediction does not depend on the others.
    """

    def __init__(self, channels: int, width: int, patch: tuple[int, int] | None = None, batch_norm: bool = True):
        super().__init__()
        self.patch = patch
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width) if batch_norm else nn.GroupNorm(1, width),
            nn.ReLU(),
        )

    def forward(self, features: torch.Tensor, context: Context) -> torch.Tensor:
        if features.dim() == 3:
            rows, columns = grid_of(features.shape[1], context.size, self.patch)
            tokens = features[:, features.shape[1] - rows * columns :]
            features = tokens.transpose(1, 2).unflatten(-1, (rows, columns))
        return self.layers(features)


class RemainingLayers(nn.Module):
    """
    Copies of the layers that follow, called as those are called.

    Args:
        copies (`nn.ModuleList`): with fresh weights.
        places (`list[int]`): the layers that they are copies of.
        channels_last (`bool`, *optional*, defaults to `False`): whether they take and return maps `[B, H, W, C]`.
    """

    def __init__(self, copies: nn.ModuleList, places: list[int], channels_last: bool = False):
        super().__init__()
        self.copies, self.places, self.channels_last = copies, places, channels_last

    def forward(self, features: torch.Tensor, context: Context) -> torch.Tensor:
        features = to_channels_last(features) if self.channels_last else features
        for place, layer in zip(self.places, self.copies, strict=True):
            if place in context.calls:  # else the layer was skipped in this step, and so is its copy
                features = context.calls[place].repeat(layer, features)
        return to_channels_first(features) if self.channels_last else features


class Blocks(nn.Module):
    """Copies of blocks that take features and nothing else; `channels_last` as in [`RemainingLayers`]."""

    def __init__(self, copies: nn.ModuleList, channels_last: bool = False):
        super().__init__()
        self.copies, self.channels_last = copies, channels_last

    def forward(self, features: torch.Tensor, context: Context) -> torch.Tensor:
        features = to_channels_last(features) if self.channels_last else features
        for block in self.copies:
            features = Call().repeat(block, features)
        return to_channels_first(features) if self.channels_last else features


class EncoderLayer(nn.Module):
    """One transformer layer; maps are read as sequences, and a causal model's positions do not see what follows."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal = causal
        heads = next(number for number in (8, 6, 4, 3, 2, 1) if width % number == 0)
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, features: torch.Tensor, context: Context) -> torch.Tensor:
        if features.dim() == 4:
            features = features.flatten(2).transpose(1, 2)
        length, padding, ahead = features.shape[1], None, None
        if context.mask is not None and context.mask.shape == features.shape[:2]:
            padding = context.mask == 0
            padding = padding & ~padding.all(dim=1, keepdim=True)  # attention to nothing at all would be NaN
        if self.causal:
            ahead = torch.ones(length, length, dtype=torch.bool, device=features.device).triu(1)
            padding = None  # behind the last word, or before the first: what is there is not learned from
        return self.layer(features, src_mask=ahead, src_key_padding_mask=padding)


class Head(nn.Module):
    """
    An auxiliary classifier.

    Args:
        body (`nn.Module`): from features and [`Context`] to features.
        width (`int`): channels that it returns.
        num_outputs (`int`): classes, or classes times rotations.
        norm (`bool`): whether features are normalised, as those of transformers need to be.
        pooled (`bool`): one prediction a sample, or one a position.
        hidden (`bool`): a hidden layer before the classifier.
        tied (`bool`): whether the classifier is the model's output embedding.
    """

    def __init__(
        self, body: nn.Module, width: int, num_outputs: int, norm: bool, pooled: bool, hidden: bool, tied: bool
    ):
        super().__init__()
        self.body, self.pooled = body, pooled
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.GELU()) if hidden else nn.Identity()
        self.classifier = None if tied else nn.Linear(width, num_outputs)

    def forward(self, features: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(features, context)
        if self.pooled:
            features = pool(features, context.mask)
        elif context.length is not None:
            features = features[:, : context.length]
        features = self.hidden(self.norm(features))
        return (context.embed if self.classifier is None else self.classifier)(features), features
