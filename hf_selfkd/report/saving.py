"""What a training leaves for its report: the samples that its history finds suspicious, as they look."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..models import uncompiled
from ..runs import SAMPLES_FILE
from ..samples import IGNORE_INDEX
from ..teachers.history import HistoryTeacher
from .content import content_of, raw_item
from .suspects import Paths, most_suspicious, most_undecided, paths_of


if TYPE_CHECKING:
    from ..trainer import SelfKDMixin

logger = logging.getLogger(__name__)

SUSPICIOUS, UNDECIDED = 24, 12  # samples that are shown
BINS = 20  # of the histogram


def save_samples(trainer: SelfKDMixin, folder: str | Path | None = None) -> Path | None:
    """
    Write down, after training, the samples whose labels the model believed least and those on which the model changed
    its mind most, with their pictures or texts, for `hf-selfkd report`. `hf-selfkd train` does so by itself. The file
    stays on this machine: uploads leave it out.

    Args:
        trainer ([`SelfKDTrainer`]): after `train()`, with `teacher="history"`.
        folder (`str` or `Path`, *optional*): the output folder of the trainer by default.

    Returns:
        `Path`: of the file; `None` where no history tells of samples, and in all processes but the first.
    """
    if not trainer.is_world_process_zero():
        return None
    path = Path(trainer.args.output_dir if folder is None else folder) / SAMPLES_FILE
    path.unlink(missing_ok=True)  # of an earlier training
    paths = paths_of(trainer.teacher) if isinstance(trainer.teacher, HistoryTeacher) else None
    if paths is None:
        return None
    describe = _Describer(trainer)
    kinds = {"suspicious": most_suspicious(paths, SUSPICIOUS), "undecided": most_undecided(paths, UNDECIDED)}
    counts, edges = np.histogram(paths.mean, bins=BINS, range=(0, 1))
    told: dict[str, Any] = {
        "samples": len(paths.ids),
        "epochs": paths.probs.shape[1],
        "per_token": trainer.teacher.history.ragged,
        "histogram": {"count": counts.tolist(), "edges": edges.tolist()},
        **{kind: [describe(paths, place) for place in places] for kind, places in kinds.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


class _Describer:
    """Tells of one sample what a report shows."""

    def __init__(self, trainer: SelfKDMixin):
        self.dataset, self.tokenizer = trainer.train_dataset, trainer.processing_class
        self.task, self.teacher = trainer.distiller.task, trainer.teacher
        self.names = getattr(uncompiled(trainer.model).config, "id2label", None) or {}
        _, ids = trainer._size_and_ids()
        self.rows = None if ids is None else {int(key): row for row, key in enumerate(ids)}

    def __call__(self, paths: Paths, place: int) -> dict[str, Any]:
        key, probs = int(paths.ids[place]), paths.probs[place]
        told = {
            "id": key,
            "path": [None if np.isnan(value) else round(float(value), 4) for value in probs],
            "mean": round(float(np.nanmean(probs)), 4),
        }
        stored = self.teacher.stored([key])
        try:
            item = raw_item(self.dataset, key if self.rows is None else self.rows[key])
            told |= content_of(item, self.tokenizer)
            told |= self._tokens(item, stored) if self.teacher.history.ragged else self._classes(key, stored)
        except Exception as error:  # a dataset of any make; a picture less is no reason to lose a training
            logger.warning(f"Sample {key} cannot be shown in the report: {type(error).__name__}: {error}")
        return told

    def _name(self, number: int) -> str:
        """Of a class, or of a token where the classes are tokens."""
        if len(self.names) == self.teacher.history.codec.num_classes:
            return str(self.names.get(number, number))
        return self.tokenizer.decode([number]) if hasattr(self.tokenizer, "decode") else str(number)

    def _classes(self, key: int, stored: torch.Tensor) -> dict[str, Any]:
        """The label, and the classes that the model believed most at last."""
        history = self.teacher.history
        label = int(history.hashes[history.slots(np.array([key]))][0])
        probs, best = stored[0].topk(min(3, stored.shape[1]))
        believed = [[self._name(n), round(p, 4)] for n, p in zip(best.tolist(), probs.tolist(), strict=True)]
        return {"label": self._name(label), "believed": believed}

    def _tokens(self, item: Any, stored: torch.Tensor) -> dict[str, Any]:
        """The labelled tokens, each with its probability and what the model believed most."""
        labels = next((item[name] for name in self.task.label_names if name in item), None)
        if labels is None:  # a collator makes them
            return {}
        rows = self.task.row_labels(torch.as_tensor(labels).reshape(1, -1))
        known = rows[rows != IGNORE_INDEX]
        if len(known) != len(stored):
            return {}
        probs = stored.gather(-1, known[:, None])[:, 0].tolist()
        columns = zip(known.tolist(), probs, stored.argmax(dim=-1).tolist(), strict=True)
        return {"tokens": [[self._name(label), round(p, 4), self._name(best)] for label, p, best in columns]}
