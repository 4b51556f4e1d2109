"""Where the samples of a history are kept: ids as slots, and the rows of slots."""

from __future__ import annotations

import numpy as np


NEVER, WARM_START = -2, -1  # epoch stamps of samples without a prediction, and of those made before training


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0] .. starts[0] + counts[0] - 1, starts[1] .. and so on, in one array."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    found = np.repeat(starts - (ends - counts), counts)
    found += np.arange(total)
    return found


def find_slots(ids: np.ndarray, size: int, held: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """
    The slots of these ids in a history of `size` samples with the ids `held` (sorted; `None` for `0..size - 1`), and
    which ids are known; `None` for all. The slot of an id that is not known says nothing.
    """
    if held is None:
        values = ids.tolist()  # Python finds the ends of a batch sooner than NumPy
        if not values or (min(values) >= 0 and max(values) < size):
            return ids, None
        return ids, (ids >= 0) & (ids < size)
    slots = np.minimum(np.searchsorted(held, ids), size - 1)
    known = held[slots] == ids
    return slots, None if known.all() else known
