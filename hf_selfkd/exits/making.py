"""Exits of a folder exported, measured and evaluated: what `hf-selfkd export` does."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..cards import Evaluation
from ..heads import strip_auxiliary_heads
from . import onnx, quantized
from .card import write_exit_card
from .costs import count_parameters, latencies, multiply_adds
from .export import export_exit
from .family import Family, Member, size_of
from .memory import peak_memory
from .quality import evaluate, run_of
from .samples import Samples, made_up, samples_of
from .source import Source


@dataclass
class Order:
    """
    What to make of a folder.

    Args:
        task (`str`): the name of the script in `SCRIPTS`.
        exits (`list[int]`): which ones.
        output_dir (`Path`): where to.
        onnx, int8 (`bool`): whether ONNX files are made, too, and quantised ones.
        own_folders (`bool`): whether each exit has a folder of its own there, and the whole model its ONNX files.
        script (`module`, *optional*): of the task, to evaluate with; without it nothing is evaluated.
        words (`list[str]`): that say on which data.
        split (`str`): `"predict"` or `"eval"`.
    """

    task: str
    exits: list[int]
    output_dir: Path
    onnx: bool = False
    int8: bool = False
    own_folders: bool = False
    script: ModuleType | None = None
    words: list[str] = field(default_factory=list)
    split: str = "predict"

    def folder(self, exit: int | None) -> Path:
        """Where an exit, or what is made of the whole model (`None`), goes."""
        if not self.own_folders:
            return self.output_dir
        return self.output_dir / ("whole" if exit is None else f"exit-{exit}")


@dataclass
class _Made:
    """A model of the family: its folder, and the files that were made of it, by their engine."""

    exit: int | None
    model: nn.Module
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, Path]:
        return {"torch": self.folder, **self.files}


def make_family(source: Source, order: Order) -> Family:
    """
    Export exits with their cards, and measure them and the whole model.

    Args:
        source ([`Source`]): the whole model; its heads are taken off.
        order ([`Order`]): what to make.

    Returns:
        [`Family`]
    """
    with tempfile.TemporaryDirectory() as scratch:
        samples = _samples(source, order, scratch)
        made = [_export(source, order, exit, samples) for exit in order.exits]
        made.append(_Made(None, strip_auxiliary_heads(source.model), source.folder))
        for one in made:
            if order.own_folders or one.exit is not None:
                _convert(one, order, samples, Path(scratch))
        family = Family(order.task, source.name, samples.told(), torch.get_num_threads(), source.of_decoder)
        _measure(family, source, made, samples)
        _evaluate(family, source, order, made, scratch)
    return family


def _samples(source: Source, order: Order, scratch: str) -> Samples:
    """Of the data, which are so checked before anything is made."""
    if order.script is None:
        return made_up(source.model, source.processing_class)
    return samples_of(run_of(order.script, order.words, source.folder, order.split, scratch))


def _export(source: Source, order: Order, exit: int, samples: Samples) -> _Made:
    folder = order.folder(exit)
    model = export_exit(source.model, exit, folder, source.processing_class, samples.batches[-1])
    write_exit_card(source, exit, model, folder)
    return _Made(exit, model, folder)


def _convert(made: _Made, order: Order, samples: Samples, scratch: Path) -> None:
    """The ONNX files that are asked for; one of floats that is not is only made on the way."""
    if not (order.onnx or order.int8):
        return
    folder = order.folder(made.exit)
    floats = (folder if order.onnx else scratch / str(made.exit)) / onnx.FILE
    onnx.export_onnx(made.model, floats, samples.batches)
    if order.onnx:
        made.files["onnx"] = floats
    if order.int8:
        made.files["int8"] = quantized.quantize(floats, folder / quantized.FILE)


def _measure(family: Family, source: Source, made: list[_Made], samples: Samples) -> None:
    """Costs of all members: latencies in turn, memory in processes of their own."""
    rows = [(one, engine, place) for one in made for engine, place in one.places.items()]
    calls = [_call(one.model, engine, place, family.threads, samples.one) for one, engine, place in rows]
    memory = peak_memory([place for *_, place in rows], samples.one, family.threads) or [None] * len(rows)
    for (one, engine, place), latency, peak in zip(rows, latencies(calls), memory, strict=True):
        layers = source.layers if one.exit is None else one.exit
        costs = layers, count_parameters(one.model), multiply_adds(one.model, samples.one)
        family.members.append(Member(one.exit, engine, *costs, size_of(place), latency, peak))


def _call(model: nn.Module, engine: str, place: Path, threads: int, inputs: dict[str, Any]) -> Any:
    run = model if engine == "torch" else onnx.OnnxModel(place, threads)
    return lambda: run(**inputs)


def _evaluate(family: Family, source: Source, order: Order, made: list[_Made], scratch: str) -> None:
    """Quality of all members by the script of the task, and the cards of the exits with it."""
    if order.script is None:
        return
    members = iter(family.members)
    for one in made:
        for engine, place in one.places.items():
            member = next(members)
            member.evaluation = _evaluated(one.folder, engine, place, order, family.threads, scratch)
            if engine == "torch" and one.exit is not None:
                write_exit_card(source, one.exit, one.model, one.folder, member.evaluation)


def _evaluated(folder: Path, engine: str, place: Path, order: Order, threads: int, scratch: str) -> Evaluation:
    run = run_of(order.script, order.words, folder, order.split, scratch)
    return evaluate(run, order.split, None if engine == "torch" else onnx.OnnxModel(place, threads))
