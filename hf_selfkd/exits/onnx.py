"""Classifiers as ONNX files, which are kept only if onnxruntime answers what torch answers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quiet import quietly


FILE = Path("onnx", "model.onnx")  # where the Hub, optimum and transformers.js look for it
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
TOLERANCE = 1e-4  # of the largest logit


def check_packages(flag: str) -> None:
    """
    Raises:
        ValueError: if a package that a flag needs is missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f'{flag} needs {", ".join(missing)}: pip install "hf_selfkd[onnx]"')


class _Logits(nn.Module):
    """A model that takes tensors in an order and returns its logits."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


class OnnxModel:
    """
    An ONNX file of a classifier, run by onnxruntime on the CPU.

    Args:
        path (`Path`): of the file.
        threads (`int`): that it may use.
    """

    def __init__(self, path: Path, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """The logits of a batch; what the file does not take is left alone."""
        feeds = {name: inputs[name].detach().cpu().numpy() for name in self.names}
        return torch.from_numpy(self.session.run(["logits"], feeds)[0])


def export_onnx(model: nn.Module, path: Path, batches: list[dict[str, torch.Tensor]]) -> Path:
    """
    Write a classifier as an ONNX file that takes batches of any size and texts of any length.

    Args:
        model (`nn.Module`): in evaluation mode.
        path (`Path`): of the file.
        batches (`list[dict]`): what the outputs are compared on; the last one, of several samples, is traced.

    Raises:
        ValueError: if the outputs differ; then the file is not kept.
    """
    names, traced = list(batches[-1]), tuple(batches[-1].values())
    path.parent.mkdir(parents=True, exist_ok=True)
    free = tuple(dict.fromkeys(range(2 if name in _PER_TOKEN else 1), torch.export.Dim.DYNAMIC) for name in names)
    try:
        with torch.no_grad(), quietly():
            torch.onnx.export(
                _Logits(model, names),
                traced,
                str(path),
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(free,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # of torch.export, of the translation: what a model does may be known to neither
        path.unlink(missing_ok=True)
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"--onnx: torch.onnx cannot export {type(model).__name__} ({told}).") from error
    _strip(path)
    check_same(model, path, batches)
    return path


def _strip(path: Path) -> None:
    """Take out where each node comes from: stack traces, with the paths of this machine."""
    import onnx

    stored = onnx.load(path)
    for part in (*stored.graph.node, *stored.graph.value_info, *stored.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(stored, path)


def check_same(model: nn.Module, path: Path, batches: list[dict[str, torch.Tensor]]) -> None:
    """
    Compare the logits of an ONNX file with those of its model.

    Raises:
        ValueError: if they differ; then the file is removed.
    """
    session = OnnxModel(path, torch.get_num_threads())
    for inputs in batches:
        with torch.no_grad():
            expected = model(**inputs).logits.float()
        found = session(**inputs)
        away = float((found - expected).abs().max()) if found.shape == expected.shape else float("nan")
        if not away <= TOLERANCE * max(float(expected.abs().max()), 1e-6):
            path.unlink()
            shapes = {name: list(value.shape) for name, value in inputs.items()}
            raise ValueError(
                f"--onnx: the ONNX file of {type(model).__name__} answers otherwise than the model (by {away:.1e} on "
                f"{shapes}), so it is not kept: leave the flag out."
            )
