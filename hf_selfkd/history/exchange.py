"""What the processes tell one another about a history between two epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from .codec import bytes_of
from .journal import Journal
from .storage import Gather, TableStorage


EXCHANGE_ROWS = 65536  # rows sent at a time between processes
BLOCK_BYTES = 2**29  # of a table on disk that are written before the next ones are begun


def only_finite(samples: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the samples with a prediction that is not finite (a step that overflowed): they keep what they had.

    Returns the samples left and where the rows of each begin in the journal.
    """
    starts = np.cumsum(samples[:, 3]) - samples[:, 3]
    if finite.all():
        return samples, starts
    keep = np.ones(len(samples), dtype=bool)
    keep[np.repeat(np.arange(len(samples)), samples[:, 3])[~finite]] = False
    return samples[keep], starts[keep]


def gather_samples(samples: np.ndarray, gather: Gather | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The journals' samples of all processes, whose each is, and its number there."""
    if gather is None:
        return samples, np.zeros(len(samples), dtype=np.int16), np.arange(len(samples))
    lengths = gather(torch.tensor([len(samples)])).tolist()
    sent = torch.zeros(max(lengths), 4, dtype=torch.int64)
    sent[: len(samples)] = torch.from_numpy(samples)
    received = gather(sent).view(len(lengths), len(sent), 4).numpy()
    everyone = np.concatenate([received[owner, :length] for owner, length in enumerate(lengths)])
    owners = np.repeat(np.arange(len(lengths), dtype=np.int16), lengths)  # of each row, in the end: many
    return everyone, owners, np.concatenate([np.arange(length) for length in lengths])


def first_of_each(samples: np.ndarray, size: int) -> np.ndarray:
    """Where the first prediction of each of `size` samples stands, by step and then by process; grouped by process."""
    latest_first = np.argsort(samples[:, 1], kind="stable")[::-1]  # equal steps in the order of processes
    first = np.empty(size, dtype=np.int64)
    first[samples[latest_first, 0]] = latest_first  # of several assignments the last one stays
    return np.flatnonzero(first[samples[:, 0]] == np.arange(len(samples)))


def check_labels_agree(samples: np.ndarray, first: np.ndarray, size: int, name_of: Callable[[int], str]) -> None:
    """Refuse an epoch in which a sample, which `name_of` its slot names, came with two different labels."""
    expected = np.empty(size, dtype=np.int64)
    expected[samples[first, 0]] = samples[first, 2]
    different = samples[:, 2] != expected[samples[:, 0]]
    if different.any():
        slot = samples[np.flatnonzero(different)[0], 0]
        raise ValueError(
            f"{name_of(slot)} came with two different labels in one epoch: the ids of sample_id_column are not unique."
        )


def exchange_rows(
    journal: Journal,
    rows: np.ndarray,
    destination: np.ndarray,
    owners: np.ndarray,
    table: TableStorage,
    gather: Gather | None,
    rank: int = 0,
) -> None:
    """
    Write this process's rows, and those of the others, where they belong in the table.

    Args:
        journal ([`Journal`]): of this process.
        rows (`np.ndarray`): which of its rows are to be stored, ascending.
        destination (`np.ndarray`): rows of the table for the rows of all processes, one process after the other.
        owners (`np.ndarray`): the process of each of them.
        table ([`TableStorage`]): long enough.
        gather (`Callable`, *optional*): `None` for one process.
        rank (`int`, *optional*, defaults to 0): of this process.
    """
    block_rows = max(1, BLOCK_BYTES // bytes_of(table.columns))
    if not table.on_disk or len(table) <= block_rows:
        return _exchange(journal, rows, destination, owners, table, gather)
    # Rows come in random order. Those of all the table at once would touch each of its pages again and again, and a
    # file larger than the memory that may wait to be written would be written as often.
    own = owners == rank
    for first in range(0, len(table), block_rows):
        inside = (destination >= first) & (destination < first + block_rows)
        _exchange(journal, rows[inside[own]], destination[inside], owners[inside], table, gather)


def _exchange(
    journal: Journal,
    rows: np.ndarray,
    destination: np.ndarray,
    owners: np.ndarray,
    table: TableStorage,
    gather: Gather | None,
) -> None:
    """As `exchange_rows`, of one block of the table."""
    if gather is None:
        for start, parts in zip(range(0, len(rows), EXCHANGE_ROWS), journal.select(rows, EXCHANGE_ROWS), strict=True):
            _put(table, torch.from_numpy(destination[start : start + EXCHANGE_ROWS]), parts)
        return
    lengths = gather(torch.tensor([len(rows)])).tolist()
    places = [torch.from_numpy(destination[owners == owner]) for owner in range(len(lengths))]
    own = _then_empty(journal, rows)
    for start in range(0, max(lengths), EXCHANGE_ROWS):
        size = min(EXCHANGE_ROWS, max(lengths) - start)
        for name, part in next(own).items():
            piece = part.contiguous().view(torch.uint8)  # not every backend sends int16
            sent = piece.new_zeros(size, part.shape[1] * part.element_size())
            sent[: len(piece)] = piece
            received = gather(sent).view(len(lengths), size, -1)
            if table.filled_by_others:
                continue
            for owner, place in enumerate(places):
                place = place[start : start + size]
                values = received[owner, : len(place)].contiguous().view(part.dtype)
                _put(table, place, {name: values})
    if table.on_disk:
        gather(torch.zeros(1))  # nobody reads before the writer of the node is done


def _then_empty(journal: Journal, rows: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of this process, piece by piece, and then nothing as long as others still send theirs."""
    yield from journal.select(rows, EXCHANGE_ROWS)
    while True:
        yield journal.empty()


def _put(table: TableStorage, rows: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
    rows = rows.to(table.device)
    for name, part in parts.items():
        table.parts[name].index_copy_(0, rows, part.to(table.device))
