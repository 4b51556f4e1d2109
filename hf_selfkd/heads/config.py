"""`AuxiliaryHeadsConfig`: which auxiliary heads a model grows and what they learn. No torch, no model: plain data."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from .._version import __version__


logger = logging.getLogger(__name__)

HeadKind = Literal["auto", "linear", "mlp", "conv", "stages", "transformer", "lm_head", "native"]
Views = Literal["auto", "none", "rotation"]
LayerWeights = Literal["uniform", "linear"]
CONFIG_NAME = "auxiliary_heads_config.json"
ROTATIONS = 4  # M: by 0, 90, 180 and 270 degrees


def _is_a(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


@dataclass
class AuxiliaryHeadsConfig:
    """
    Layered self-distillation: classifiers on intermediate layers, trained beside the model and dropped at inference.

    The loss of a head, per row, is

    ```
    hard_weight * H((1 - a) * onehot + a * past, q) + deep_to_shallow_weight * temperature**2 * KL(q_deep || q)
        + feature_weight * mean((adapter(features) - deep_features)**2),        a = past_weight * alpha_t
    ```

    averaged over the views of a sample, and added to the loss of the model itself, which is that of upright images
    only; with `deep_to_shallow_trust` the divergence is multiplied by `q_deep(y)` at temperature 1, for the label
    `y`. `alpha_t` is the weight of the past that the trainer has for the model itself. What the heads know is taught
    to the model in turn, by one more term of its loss:

    ```
    heads_to_model_weight * temperature**2 * KL(softmax(z / temperature) || p)
    ```

    where `p` is the model's prediction at that temperature and `z` the mean of the scores of all heads (of a rotated
    view, those of its own rotation) over heads and views, which learns nothing from the model.

    Args:
        layers (`list` of `int` or `str`, `"auto"` or `"all"`, *optional*, defaults to `"auto"`):
            Where the heads are: indices of layers (negative ones count from the end), names of modules, `"all"` layers
            or `"auto"`: the end of every stage of a CNN or hierarchical model, three evenly spaced layers of a
            transformer (of the decoder, if it has one). `"all"` and `"auto"` have the last layer among them with
            rotated views only: without, the model's own classifier stands there.
        head (`str`, *optional*, defaults to `"auto"`):
            `"linear"` (pooling and a linear layer), `"mlp"` (one hidden layer more), `"conv"` (a depthwise separable
            convolution before), `"stages"` (a fresh copy of the layers that follow, as HSAKD has it), `"transformer"`
            (one encoder layer before), `"lm_head"` (a norm, then the model's own output embedding), `"native"` (a copy
            of what follows the model's last layer, so that [`export_exit`] can save the layers up to the head as a
            smaller model of the same architecture) or `"auto"`: `"lm_head"` for language models, `"conv"` for images,
            `"mlp"` otherwise.
        views (`str`, *optional*, defaults to `"auto"`):
            The self-supervised task: `"rotation"` (heads tell class and rotation of an image jointly), `"none"` (heads
            tell the class) or `"auto"`: `"rotation"` for image classifiers, `"none"` otherwise and for native heads.
        views_per_step (`int`, *optional*, defaults to 1):
            Rotated views beside the upright one, 0 to 3. With fewer than 3, a sample sees one after the other in
            successive epochs.
        hard_weight (`float`, *optional*, defaults to 1.0): weight of the cross-entropy with the (softened) label.
        past_weight (`float`, *optional*, defaults to 0.0):
            How much of the trainer's alpha softens the labels of the heads, in [0, 1]; 0 leaves them hard.
        deep_to_shallow_weight (`float`, *optional*, defaults to 0.0):
            Weight of the divergence from the deepest classifier with the same classes, which learns nothing from it:
            the deepest head with rotated views, the model itself without.
        deep_to_shallow_trust (`bool`, *optional*, defaults to `False`):
            Whether the deepest classifier teaches as far as it knows: the divergence of a row counts by the
            probability that it gives to the label of the row. Before it has learned, it then teaches next to nothing.
        feature_weight (`float`, *optional*, defaults to 0.0):
            Weight of the squared distance between the features of a head and those of the last layer, which learns
            nothing from it; a linear adapter is in between.
        heads_to_model_weight (`float`, *optional*, defaults to 0.0):
            Weight of the divergence of the model itself from the aggregate of its heads (SLA+SD, Lee et al., ICML
            2020, has it of one head and all views). The heads must learn from labels.
        temperature (`float`, *optional*, defaults to 3.0): of the divergences, which are multiplied by its square.
        layer_weights (`str` or `list[float]`, *optional*, defaults to `"uniform"`):
            How much the loss of each head counts: `"uniform"` (1), `"linear"` (the share of the layers that come
            before the head, so that deep heads count more) or a positive number for each head, the shallowest first.

    Raises:
        ValueError: if a field is out of range.
    """

    layers: list[int | str] | Literal["auto", "all"] = "auto"
    head: HeadKind = "auto"
    views: Views = "auto"
    views_per_step: int = 1
    hard_weight: float = 1.0
    past_weight: float = 0.0
    deep_to_shallow_weight: float = 0.0
    deep_to_shallow_trust: bool = False
    feature_weight: float = 0.0
    heads_to_model_weight: float = 0.0
    temperature: float = 3.0
    layer_weights: LayerWeights | list[float] = "uniform"

    def __post_init__(self):
        choices = {"head": HeadKind, "views": Views}
        for name, allowed in ((name, get_args(kind)) for name, kind in choices.items()):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        if isinstance(self.layers, (list, tuple)):
            self.layers = list(self.layers)
        self._check_layer_weights()
        known = isinstance(self.layers, list) and all(_is_a(layer, (int, str)) for layer in self.layers)
        if self.layers not in ("auto", "all") and not (known and self.layers):
            raise ValueError(
                f"layers={self.layers!r}: give a list of layer indices or module names, or leave out for 'auto' (or "
                "'all')."
            )
        if not _is_a(self.views_per_step, int) or self.views_per_step not in range(ROTATIONS):
            raise ValueError(f"views_per_step={self.views_per_step} is not one of 0, 1, 2, 3 rotated views.")
        weights = ("hard_weight", "past_weight", "deep_to_shallow_weight", "feature_weight", "heads_to_model_weight")
        for name in weights:
            value = getattr(self, name)
            if not (_is_a(value, (int, float)) and value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} must be a number of at least 0: it is the weight of a loss.")
        if not isinstance(self.deep_to_shallow_trust, bool):
            raise ValueError(f"deep_to_shallow_trust={self.deep_to_shallow_trust!r} must be True or False.")
        if self.past_weight > 1:
            raise ValueError(f"past_weight={self.past_weight} is above 1: it is a share of the trainer's alpha.")
        if self.heads_to_model_weight > 0 and self.hard_weight == 0:
            raise ValueError(
                f"heads_to_model_weight={self.heads_to_model_weight} with hard_weight=0: heads that learn no labels "
                "have nothing to teach; set hard_weight=1.0."
            )
        value = self.temperature
        if not (_is_a(value, (int, float)) and value > 0 and math.isfinite(value)):
            raise ValueError(f"temperature={value!r} must be positive and finite: 3.0 is HSAKD's value.")

    def _check_layer_weights(self) -> None:
        weights = self.layer_weights
        if isinstance(weights, str) and weights in get_args(LayerWeights):
            return
        numbers = isinstance(weights, (list, tuple)) and all(_is_a(weight, (int, float)) for weight in weights)
        if not numbers or not weights or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"layer_weights={weights!r} is unknown: choose one of {', '.join(get_args(LayerWeights))}, or give a "
                "list with a positive number for each head."
            )
        self.layer_weights = list(weights)
        if isinstance(self.layers, list) and len(self.layers) != len(weights):
            raise ValueError(
                f"layer_weights={weights!r} for {len(self.layers)} layers: give a number for each of {self.layers}."
            )

    @property
    def trains(self) -> bool:
        """`bool`: whether any term has a weight; without one no views are made and no head is run in training."""
        return self.hard_weight + self.deep_to_shallow_weight + self.feature_weight > 0

    @property
    def uses_past(self) -> bool:
        """`bool`: whether the heads learn from past predictions."""
        return self.hard_weight > 0 and self.past_weight > 0

    @classmethod
    def preset(cls, name: str, **changes: Any) -> AuxiliaryHeadsConfig:
        """
        A published method, or this project's default.

        - `"lsskd"`: softened joint labels, deep to shallow divergence and features (LSSKD, Dahri et al., 2025) at a
          price of at most three plain steps: light heads and one rotated view a step. LSSKD publishes no weights:
          those here are this project's choice.
        - `"lsskd_full"`: the same at the papers' cost: heads that copy the remaining stages, all four views.
        - `"joint"`: hard joint labels only, the teacher-free part of HSAKD (Yang et al., IJCAI 2021): heads that copy
          the remaining stages, all four views, all weights 1, as published.
        - `"sla"`: light heads on every stage that learn hard joint labels and teach the model what they know together
          (SLA+SD, Lee et al., ICML 2020, which has one head and all four views). Weight and temperature are untuned.
        - `"byot"`: Be Your Own Teacher (Zhang et al., ICCV 2019): heads tell the class, learn from the label and from
          the model itself. 0.9 and 0.1 at temperature 3 are those of a reproduction that reached the published figure
          with the square of the temperature as a factor; the features are compared after pooling, averaged over their
          dimensions, with this project's weight.
        - `"deep_supervision"`: heads tell the class (Lee et al., 2015), weight 1. The original lets weights decay.
        - `"exits"`: native heads, each of which is the end of a smaller model of the same architecture: they learn
          from (softened) labels and from the whole model, as far as that knows them. `layers="all"` puts an exit after
          every layer.

        Args:
            name (`str`): one of these.
            **changes: fields to set otherwise.

        Raises:
            ValueError: if there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"auxiliary_heads={name!r} is no preset: choose one of {', '.join(PRESETS)}.")
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def resolve(cls, heads: AuxiliaryHeadsConfig | str | None) -> AuxiliaryHeadsConfig | None:
        """
        What `auxiliary_heads` of the trainer and of its arguments may be: a configuration, the name of a preset or
        where one was saved.

        Args:
            heads ([`AuxiliaryHeadsConfig`], `str` or `None`): a configuration and `None` stay as they are.

        Raises:
            ValueError: if it is neither.
        """
        if heads is None or isinstance(heads, cls):
            return heads
        if not isinstance(heads, str):
            raise ValueError(
                f"auxiliary_heads={heads!r} is a {type(heads).__name__}: give an AuxiliaryHeadsConfig, a preset "
                f"({', '.join(PRESETS)}) or the path of a saved configuration."
            )
        if heads in PRESETS:
            return cls.preset(heads)
        if os.path.exists(heads):
            return cls.from_pretrained(heads)
        raise ValueError(
            f"auxiliary_heads={heads!r} is neither a preset ({', '.join(PRESETS)}) nor a file or folder that exists."
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain data."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Write `auxiliary_heads_config.json`.

        Args:
            save_directory (`str` or `Path`): the folder, which is made if it is missing.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        content = self.to_dict() | {"hf_selfkd_version": __version__}
        (Path(save_directory) / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> AuxiliaryHeadsConfig:
        """
        Read what [`~AuxiliaryHeadsConfig.save_pretrained`] wrote; fields of a later version are left out, with a
        warning.

        Args:
            name_or_path (`str` or `Path`): a folder, a JSON file, or a repository of the Hub.
            **hub: for [`~huggingface_hub.hf_hub_download`], such as `revision` and `token`.

        Raises:
            ValueError: if it is no JSON, or a value is out of range.
        """
        path = Path(name_or_path)
        if path.is_dir():
            path = path / CONFIG_NAME
        elif not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME, **hub))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no auxiliary heads configuration ({error}): save one first.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__} and no auxiliary heads configuration.")
        version = content.pop("hf_selfkd_version", "unknown")
        unknown = content.keys() - {field.name for field in fields(cls)}
        if unknown:
            logger.warning(
                f"{path} (hf_selfkd {version}) has fields that hf_selfkd {__version__} does not know; they are left "
                f"out: {', '.join(sorted(unknown))}."
            )
        return cls(**{name: value for name, value in content.items() if name not in unknown})

    def with_choices(self, head: HeadKind, views: Views) -> AuxiliaryHeadsConfig:
        """
        The same with every `"auto"` of `head` and `views` decided.

        Args:
            head (`str`): what `head` is, if it is `"auto"`.
            views (`str`): what `views` is, if it is `"auto"`.
        """
        return replace(
            self,
            head=head if self.head == "auto" else self.head,
            views=views if self.views == "auto" else self.views,
        )


_LSSKD = {"hard_weight": 1.0, "past_weight": 1.0, "deep_to_shallow_weight": 0.1, "feature_weight": 0.03}
PRESETS: dict[str, dict[str, Any]] = {
    "lsskd": {**_LSSKD, "views_per_step": 1},
    "lsskd_full": {**_LSSKD, "head": "stages", "views_per_step": 3},
    "joint": {"head": "stages", "views_per_step": 3},
    "sla": {"heads_to_model_weight": 1.0},
    "byot": {"views": "none", "hard_weight": 0.9, "deep_to_shallow_weight": 0.1, "feature_weight": 0.03},
    "deep_supervision": {"head": "linear", "views": "none"},
    "exits": {
        "head": "native",
        "views": "none",
        "past_weight": 1.0,
        "deep_to_shallow_weight": 2.0,
        "deep_to_shallow_trust": True,
    },
}
