"""A model and its exits in one table: what each costs, and how good it is."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from ..cards import Evaluation
from ..cards.facts import finite
from ..cards.names import metric
from ..markup import markdown_table
from .costs import Latency
from .quality import FIGURES


WHOLE = "whole model"
BUSY = 0.5  # width of the middle half of the rounds, as a share of the median, from which on it is told
ENGINES = ("torch", "onnx", "int8")
_SAID = {"torch": "", "onnx": ", ONNX", "int8": ", ONNX int8"}


@dataclass
class Member:
    """
    A row of the table.

    Args:
        exit (`int`, *optional*): layers of the exit; `None` for the whole model.
        engine (`str`): one of `"torch"`, `"onnx"` and `"int8"`.
        layers (`int`): how many it has.
        parameters (`int`): of the model, before any quantisation.
        multiply_adds (`int`): of one sample.
        bytes (`int`): of the file of its weights.
        latency ([`Latency`]): of one sample.
        memory (`int`, *optional*): bytes that loading it and running it once add at most.
        evaluation ([`~hf_selfkd.cards.Evaluation`], *optional*): on the data that were given.
    """

    exit: int | None
    engine: str
    layers: int
    parameters: int
    multiply_adds: int
    bytes: int
    latency: Latency
    memory: int | None = None
    evaluation: Evaluation | None = None

    @property
    def name(self) -> str:
        """`str`: as the table has it."""
        return (WHOLE if self.exit is None else f"exit {self.exit}") + _SAID[self.engine]

    @property
    def quality(self) -> dict[str, float]:
        """`dict[str, float]`: the figures that were measured, by name."""
        return {} if self.evaluation is None else self.evaluation.metrics


@dataclass
class Family:
    """
    The rows, and how they were measured.

    Args:
        task (`str`): the name of the script in `SCRIPTS`.
        model (`str`): the name of the whole model.
        sample (`str`): what was run, in words.
        threads (`int`): that each model had.
        of_decoder (`bool`, *optional*, defaults to `False`): whether layers are those of a decoder.
        members (`list[Member]`): the rows.
    """

    task: str
    model: str
    sample: str
    threads: int
    of_decoder: bool = False
    members: list[Member] = field(default_factory=list)

    @property
    def figures(self) -> list[str]:
        """`list[str]`: the figures of quality that there are, the most important one first."""
        return [name for name in FIGURES[self.task] if any(name in member.quality for member in self.members)]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and body of the table."""
        memory = [member.memory for member in self.members if member.memory is not None]
        head = ["model", "layers", "parameters", "multiply-adds", "on disk (MB)", "latency (ms)"]
        head += (["memory (MB)"] if memory else []) + [metric(name).name for name in self.figures]
        return head, [self._row(member, bool(memory)) for member in self.members]

    def _row(self, member: Member, memory: bool) -> list[str]:
        row = [member.name, str(member.layers), f"{member.parameters:,}", f"{member.multiply_adds:,}"]
        row += [f"{member.bytes / 1e6:.2f}", f"{member.latency.median:.2f}"]
        if memory:
            row.append("" if member.memory is None else f"{member.memory / 1e6:.1f}")
        known = member.quality
        return row + [metric(name).shown(known[name]) if name in known else "" for name in self.figures]

    def notes(self) -> list[str]:
        """How it was measured, in sentences."""
        timed = [member.latency for member in self.members]
        engines = {"torch": f"torch {torch.__version__}"}
        if any(member.engine != "torch" for member in self.members):
            import onnxruntime

            engines["onnx"] = f"onnxruntime {onnxruntime.__version__}"
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        parts = [
            f"Latency: median of {timed[0].rounds} rounds over all rows in turn, of a forward pass of {self.sample}, "
            f"after a warm-up; {', '.join(engines.values())}, {platform.machine()} CPU, {threads}.",
            *self._busy(timed),
            "Multiply-adds: of matrix products, convolutions and attention in that pass.",
        ]
        if self.of_decoder:
            parts.insert(0, "Layers: those of the decoder; every exit has the whole encoder.")
        if self.task in ("translation", "language-modeling"):
            parts.append("A pass is over known tokens; to write takes a pass for each token.")
        if any(member.memory is not None for member in self.members):
            parts.append(
                "Memory: the peak of what loading the model and that pass add to a process that has its libraries "
                "imported."
            )
        found = next((member.evaluation for member in self.members if member.evaluation is not None), None)
        if found is not None:
            count = "" if found.samples is None else f", {found.samples:,} samples"
            parts.append(f"Quality: on the split `{found.split}` of the data given{count}.")
        return parts

    def _busy(self, timed: list[Latency]) -> list[str]:
        spread = max((third - first) / one.median for one in timed for first, third in [one.quartiles])
        if spread <= BUSY:
            return []
        return [
            f"This machine was busy: the middle half of the rounds of a row is {100 * spread:.0f} % of its median "
            "wide, so measure again before you choose by it."
        ]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data."""
        return {
            "task": self.task,
            "model": self.model,
            "measured": self.notes(),
            "threads": self.threads,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "members": [_plain(member) for member in self.members],
        }

    def write(self, folder: Path) -> list[Path]:
        """Write `family.md`, `family.json` and, where there are figures of quality and matplotlib, `family.png`."""
        head, body = self.table()
        texts = {
            "family.md": f"# {self.model} and its exits\n\n{markdown_table(head, body)}\n\n"
            + "\n\n".join(self.notes())
            + "\n",
            "family.json": json.dumps(finite(self.to_dict()), indent=2, ensure_ascii=False) + "\n",
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        written = [folder / name for name in texts]
        if self.figures and find_spec("matplotlib") is not None:
            self._draw(folder / "family.png")
            written.append(folder / "family.png")
        return written

    def _draw(self, path: Path) -> None:
        from ..plots import quality_against_cost

        best, points = self.figures[0], {}
        shown = metric(best)
        for engine in ENGINES:
            rows = [one for one in self.members if one.engine == engine and best in one.quality]
            if rows:
                points[_SAID[engine].removeprefix(", ") or "torch"] = {
                    "whole" if one.exit is None else str(one.exit): (
                        one.latency.median,
                        float(shown.shown(one.quality[best])),
                    )
                    for one in rows
                }
        quality_against_cost(points, path, f"{self.model}: its exits by their layers", "Latency (ms)", shown.name)


def _plain(member: Member) -> dict[str, Any]:
    latency = member.latency
    return {
        "name": member.name,
        "exit": member.exit,
        "engine": member.engine,
        "layers": member.layers,
        "parameters": member.parameters,
        "multiply_adds": member.multiply_adds,
        "bytes": member.bytes,
        "latency_ms": latency.median,
        "latency_ms_quartiles": list(latency.quartiles),
        "memory_bytes": member.memory,
        "quality": member.quality,
    }


def size_of(place: Path) -> int:
    """Bytes of a file, or of the weights in a folder of a model."""
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))
