"""Data that a run is calibrated on and never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from .config import MethodArguments
from .losses.soft_targets import labelled
from .metrics.mixture import Look
from .metrics.temperature import LOG_TEMPERATURES, TemperatureFit, at_temperature
from .samples import SampleIdDataset, ids_in, is_hf_dataset, seeded
from .tasks.rows import Rows


LIMIT = 2048  # samples, and rows, that are looked at: the error of a temperature is then some per cent


def select(dataset: Any, indices: np.ndarray) -> Any:
    """Some samples of a map-style dataset, with the ids that they have, if they have any."""
    if isinstance(dataset, SampleIdDataset):
        ids = indices if dataset.ids is None else dataset.ids[indices]
        return SampleIdDataset(select(dataset.dataset, indices), None if dataset.id_column else ids, dataset.id_column)
    return dataset.select(indices) if is_hf_dataset(dataset) else Subset(dataset, indices.tolist())


def shares(dataset: Any, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Divide the rows of a map-style dataset by chance.

    Args:
        dataset: with a length.
        fraction (`float`): share of the second part, which has at least one row.
        seed (`int`): decides which rows.

    Returns:
        `tuple`: the rows of the rest and of the part, both in the order of the dataset.

    Raises:
        ValueError: if the dataset has no length or is too small.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or len(dataset) < 2:
        raise ValueError(
            f"calibration_fraction={fraction} needs a map-style train_dataset of at least 2 samples, and this is a "
            f"{type(dataset).__name__}: give an eval_dataset instead, and leave calibration_fraction out."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    count = max(round(fraction * len(dataset)), 1)
    return np.sort(order[count:]), np.sort(order[:count])


def ids_of_part(part: Any, rows: np.ndarray, column: str | None) -> np.ndarray | None:
    """
    The ids of a part of a dataset, those that its samples have in the whole; `None` where the part tells them itself.

    Args:
        part: some rows of a map-style dataset.
        rows (`np.ndarray`): their numbers in the whole, which are the ids where nothing else is.
        column (`str`, *optional*): where samples have their ids.
    """
    if isinstance(part, SampleIdDataset):
        if part.ids is not None:
            return None
        part, column = part.dataset, part.id_column
    if column is None:
        return rows
    if is_hf_dataset(part):
        return None
    with seeded(0):  # a transform may draw
        return np.concatenate([ids_in([part[row]], column) for row in range(len(part))])


class HeldOut:
    """
    Samples that a model is looked at with; each process reads its share.

    Args:
        dataset: map-style or iterable; up to 2,048 samples of it are read, of a map-style one evenly from all of it.
        collator (`Callable`): makes batches of its items.
        batch_size (`int`): samples of a batch.
        num_workers (`int`, *optional*): of the dataloader.
        rank (`int`, *optional*): of this process.
        processes (`int`, *optional*): number of processes.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Callable[[list[Any]], Any],
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        processes: int = 1,
    ):
        if isinstance(dataset, IterableDataset):
            samples = list(islice(dataset, rank, LIMIT, processes))
        else:
            every = np.linspace(0, len(dataset), min(len(dataset), LIMIT), endpoint=False).astype(np.int64)
            samples = Subset(dataset, every[rank::processes].tolist())
        self.loader = DataLoader(samples, batch_size, collate_fn=collator, num_workers=num_workers)

    def look(
        self,
        rows_of: Callable[[dict[str, Any]], Rows],
        device: torch.device,
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> Look:
        """
        What a model says of the samples. Every process must call this.

        Args:
            rows_of (`Callable`): runs the model on a batch and gives its rows.
            device (`torch.device`): of the sums.
            reduce (`Callable`): adds the sums of all processes up.
        """
        fit, log_probs = TemperatureFit(device), [torch.zeros(0, len(LOG_TEMPERATURES), device=device)]
        for inputs in self.loader:
            rows = rows_of(inputs)
            known = labelled(rows.labels).nonzero().squeeze(-1)
            known = known[:: max(math.ceil(len(known) * len(self.loader) / LIMIT), 1)]
            log_probs.append(fit.update(rows.logits[known], rows.labels[known]).to(device))
        log_temperature = fit.log_temperature(reduce)
        return Look(math.exp(log_temperature), at_temperature(torch.cat(log_probs), log_temperature))


class Calibration:
    """Part of [`~hf_selfkd.SelfKDMixin`]: the data that `alpha_schedule="calibrated"` looks at, and the looking."""

    _split_off: Any = None  # the part of the training set that calibrates and is not trained on
    _kept_ids: np.ndarray | None = None  # of the other part, where it does not tell them itself
    _held_out: HeldOut | None = None  # of the present training, once it was looked at

    def _split_training_set(self, method: MethodArguments) -> None:
        """Take the share for calibration off the training set."""
        if method.calibration_fraction > 0 and method.distils and self.train_dataset is not None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            kept, held_out = shares(self.train_dataset, method.calibration_fraction, seed)
            self._split_off = select(self.train_dataset, held_out)
            self.train_dataset = select(self.train_dataset, kept)
            self._kept_ids = ids_of_part(self.train_dataset, kept, method.sample_id_column)

    def _calibration_set(self) -> Any:
        """
        The data that `alpha_schedule="calibrated"` looks at.

        Raises:
            ValueError: if there are none, or several sets of them.
        """
        fraction = self.method.calibration_fraction
        if fraction > 0 and self._split_off is None:
            raise ValueError(
                f"calibration_fraction={fraction} came after the trainer was made, which has held nothing out: give "
                "it in the arguments that the trainer is made with."
            )
        dataset = self.eval_dataset if self._split_off is None else self._split_off
        if dataset is None or isinstance(dataset, dict):
            found = "there is no eval_dataset" if dataset is None else "eval_dataset is a dictionary of several"
            raise ValueError(
                f"alpha_schedule='calibrated' looks at data that are not trained on, and {found}: set "
                "calibration_fraction=0.1 to hold a part of the training set out."
            )
        return dataset

    def _make_held_out(self) -> HeldOut:
        args, dataset = self.args, self._calibration_set()
        collator = self._collator_without_mixing()
        if is_hf_dataset(dataset):
            dataset = self._remove_unused_columns(dataset, "calibration")
        else:
            collator = super()._get_collator_with_removed_columns(collator, "calibration")
        share = (args.process_index, args.world_size)
        return HeldOut(dataset, collator, args.eval_batch_size, args.dataloader_num_workers, *share)

    def _look_at_held_out(self) -> Look:
        """What the model says of held-out data."""
        with self._looking():
            if self._held_out is None:
                self._held_out = self._make_held_out()
            return self._held_out.look(
                lambda inputs: self._predict(inputs)[0], self.args.device, self._sum_over_processes
            )
