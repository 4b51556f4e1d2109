"""
Dynamic quantisation of the linear layers to int8, of ONNX files by onnxruntime.

`torch.ao.quantization` warns that it will be removed, and keeps its weights in pickles. torchao, which takes its
place, is made for `torch.compile` and needs torch where the model runs. A file of onnxruntime needs neither, and is
made of the file that `--onnx` writes.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..quiet import quietly


FILE = Path("onnx", "model_int8.onnx")
SMALLEST = 0.1  # share of the parameters in linear layers below which there is nothing to gain


def linear_share(model: nn.Module) -> float:
    """The share of the parameters of a model that are weights of linear layers."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return sum(part.weight.numel() for part in model.modules() if isinstance(part, (nn.Linear, Conv1D))) / total


def check_linear(model: nn.Module) -> None:
    """
    Raises:
        ValueError: if a model has hardly any linear layer.
    """
    share = linear_share(model)
    if share < SMALLEST:
        raise ValueError(
            f"--int8 is for linear layers, and {type(model).__name__} has {100 * share:.1f} % of its parameters in "
            "them: leave it out."
        )


def quantize(path: Path, target: Path) -> Path:
    """
    Write an ONNX file with linear layers of int8: each row of weights has its scale, inputs get theirs as they come.
    Products of activations, as in attention, stay as they are.

    The weights have 7 bits, so that the sums of 16 bits of processors without VNNI do not overflow.

    Args:
        path (`Path`): the file of floats.
        target (`Path`): the file to write.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target.parent.mkdir(parents=True, exist_ok=True)
    with quietly():
        quantize_dynamic(
            str(path),
            str(target),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
    return target
