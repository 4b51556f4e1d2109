"""Makes the head of each layer."""

from __future__ import annotations

import copy
import math

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from ..models import base_model, evaluating, is_encoder_decoder, main_parameter
from ..tasks.causal_lm import CausalLM
from .config import ROTATIONS, AuxiliaryHeadsConfig
from .kinds import Blocks, Context, EncoderLayer, Head, RemainingLayers, SeparableConvolution, UnchangedFeatures
from .layers import lists_of_blocks
from .layout import Layout


class HeadFactory:
    """Makes the head of each layer."""

    def __init__(
        self,
        model: nn.Module,
        config: AuxiliaryHeadsConfig,
        layout: Layout,
        words: bool,
        patch: tuple[int, int] | None,
    ):
        self.model, self.base, self.config = model, base_model(model), config
        self.layout, self.words, self.patch, self.names = layout, words, patch, layout.chain
        joint = ROTATIONS if config.views == "rotation" else 1
        # Statistics of the batch only where the model has them: else training would depend on how samples are batched.
        self.batch_norm = any(isinstance(module, _BatchNorm) for module in self.base.modules())
        self.num_outputs = layout.num_classes * joint
        parameter = main_parameter(model)
        self.to = {"device": parameter.device, "dtype": parameter.dtype}

    def make(self, name: str) -> Head:
        """The head on a module."""
        body, width = self._body(name)
        tied = self.config.head == "lm_head" or (self.words and self.config.head in ("stages", "transformer"))
        norm = len(self.layout.shapes[name]) == 3 and self.config.head != "conv"
        head = Head(body, width, self.num_outputs, norm, self.layout.pooled, self.config.head == "mlp", tied)
        if tied:  # a fresh head starts undecided, also where embeddings are of size 1, as T5's are
            embedding = self.base.get_output_embeddings().weight.detach()
            nn.init.constant_(head.norm.weight, min(1.0, 1 / (math.sqrt(width) * float(embedding.std()))))
        return head

    def _body(self, name: str) -> tuple[nn.Module, int]:
        kind, width = self.config.head, self.layout.width(name)
        deep = self.layout.deepest or name
        if kind == "conv":
            return self._convolution(width, self.layout.width(deep)), self.layout.width(deep)
        if kind == "transformer":
            causal = is_encoder_decoder(self.base) or CausalLM.matches(self.base)
            return EncoderLayer(width, causal and not self.layout.pooled), width
        if kind == "stages":
            return self._stages(name), self.layout.width(deep)
        return UnchangedFeatures(), width

    def _stages(self, name: str) -> nn.Module:
        if name not in self.names:
            raise ValueError(f"head='stages' copies the layers after {name!r}, which is none of {self.names}.")
        place, last = self.names.index(name), name in self.layout.channels_last
        places = [i for i in range(place + 1, len(self.names)) if self.names[i] in self.layout.shapes]
        if places:
            return RemainingLayers(self._fresh([self.names[i] for i in places]), places, last)
        # On the last layer HSAKD puts one more of it, without change of resolution.
        if name in self.layout.preserving:
            return RemainingLayers(self._fresh([name]), [place], last)
        lists = lists_of_blocks(self.model.get_submodule(name))
        blocks = [f"{name}.{block}" for block in list(lists[0])[1:]] if lists else []  # the first one changes it
        body = Blocks(self._fresh(blocks), last)
        if blocks and self._keeps_shape(body, name):
            return body
        width = self.layout.width(name)
        return self._convolution(width, width)

    def _convolution(self, channels: int, width: int) -> nn.Module:
        return SeparableConvolution(channels, width, self.patch, self.batch_norm)

    def _keeps_shape(self, body: nn.Module, name: str) -> bool:
        features = torch.zeros(self.layout.shapes[name])
        try:
            with evaluating(body):
                return body.float().cpu()(features, Context(None, {}, None)).shape == features.shape
        except Exception:  # a block that takes something else than the map
            return False

    def _fresh(self, names: list[str]) -> nn.ModuleList:
        copies = copy.deepcopy(nn.ModuleList([self.model.get_submodule(name) for name in names]))
        remove_hook_from_module(copies, recurse=True)  # of device_map, which would move what the copies are given
        copies = copies.float().cpu()  # random numbers that do not depend on the device
        for name, module in list(copies.named_modules()):
            if hasattr(module, "get_base_layer"):  # an adapter of PEFT: its name would be saved with the adapters
                parent, _, child = name.rpartition(".")
                setattr(copies.get_submodule(parent), child, module.get_base_layer())
        for parameter in copies.parameters():
            vars(parameter).pop("_is_hf_initialized", None)  # else transformers would leave pretrained weights alone
            parameter.requires_grad_(True)
        for module in copies.modules():
            vars(module).pop("_is_hf_initialized", None)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if isinstance(self.base, PreTrainedModel):
            copies.apply(self.base._init_weights)
        for module in copies.modules():
            if isinstance(module, _BatchNorm):  # EfficientNet draws its factors from around 0: nothing gets through
                module.reset_parameters()
        return copies
