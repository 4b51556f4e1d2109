"""Where the table of a history lies: in memory, or in files that the processes of a node share."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from .codec import bytes_of


try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = "lock"  # in the folder of a run, locked by the process that made the folder for as long as it lives

Gather = Callable[[torch.Tensor], torch.Tensor]


def full_disk(error: OSError, folder: Path, num_bytes: int) -> OSError:
    """What to say of a history that could not be written."""
    return OSError(
        error.errno,
        f"the history needs {num_bytes} bytes more on disk and could not write them ({error.strerror or error}): make "
        "room there, set a smaller history_top_k, or keep the history elsewhere with history_device='cpu'",
        str(folder),
    )


def reserve(path: Path, num_bytes: int) -> None:
    """
    Make a file this long and make sure that its blocks exist: a page of a mapped file for which the disk has no room
    would end the process.
    """
    with open(path, "ab") as file:
        held = file.tell()
        if num_bytes <= held:
            return
        try:
            os.posix_fallocate(file.fileno(), held, num_bytes - held)
        except (AttributeError, OSError) as error:  # no such call, on this system or for this kind of disk
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            zeros = bytes(2**20)
            for start in range(held, num_bytes, len(zeros)):
                file.write(zeros[: num_bytes - start])
            file.flush()


def make_run_folder(parent: Path, token: int) -> tuple[Path, int | None]:
    """A folder for the files of one run and, where there are locks, the open file that holds its lock."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale_folders(parent)
    hidden = parent / f".run-{token:016x}"
    hidden.mkdir()
    lock = _lock(hidden)  # before the folder has a name by which others would find it
    return hidden.rename(run_folder(parent, token)), lock


def run_folder(parent: Path, token: int) -> Path:
    """The folder of the run with this number."""
    return parent / f"run-{token:016x}"


def remove_stale_folders(parent: Path) -> None:
    """Remove the folders of runs that ended without doing so: those whose lock nobody holds any more."""
    for folder in parent.glob("run-*"):
        descriptor = _lock(folder, create=False)
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _lock(folder: Path, create: bool = True) -> int | None:
    """An open file whose lock this process now holds, or `None` if another process does, or where none can be had."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | (os.O_CREAT if create else 0))
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


class TableStorage:
    """
    The parts of a table, which grow.

    Files lie in a folder of this run alone. The first process of a node makes and removes it and writes the files, all
    processes of the node map them.

    Args:
        columns (`dict`): width and type of each part.
        place (`str`): `"accelerator"`, `"cpu"` or `"disk"`.
        device (`torch.device`): where the parts are, unless on disk.
        folder (`Path`): that of the node, for `"disk"`.
        writes (`bool`): whether this process writes the files.

    Attributes:
        parts (`dict[str, torch.Tensor]`): each `[rows, width]`; empty before the first call of `grow`.
    """

    def __init__(
        self, columns: dict[str, tuple[int, torch.dtype]], place: str, device: torch.device, folder: Path, writes: bool
    ):
        self.columns, self.device = columns, device
        self.on_disk, self.parent, self.writes = place == "disk", folder, writes
        self.folder: Path | None = None  # of this run, from the first growth on
        self.parts: dict[str, torch.Tensor] = {}

    @property
    def filled_by_others(self) -> bool:
        """`bool`: whether another process writes what this one reads."""
        return self.on_disk and not self.writes

    def __len__(self) -> int:
        return len(self.parts["log_probs"]) if self.parts else 0

    def grow(self, num_rows: int, gather: Gather | None = None) -> None:
        """Make the parts at least this long, keeping what they hold. Every process must call this."""
        held = len(self)
        if held >= num_rows:
            return
        if self.on_disk:
            self._make_files(num_rows, gather)
        for name, (width, dtype) in self.columns.items():
            if self.on_disk:
                path = str(self.folder / f"{name}.bin")
                part = torch.from_file(path, shared=True, size=num_rows * width, dtype=dtype).view(num_rows, width)
            else:
                part = torch.zeros(num_rows, width, dtype=dtype, device=self.device)
                part[:held] = self.parts[name] if held else 0
            self.parts[name] = part

    def _make_files(self, num_rows: int, gather: Gather | None) -> None:
        """Nobody maps a file before all of it is there; if a writer fails, every process does."""
        error, token = None, uuid.uuid4().int >> 66  # 62 bits
        try:
            if self.writes:
                if self.folder is None:
                    self.folder, lock = make_run_folder(self.parent, token)
                    weakref.finalize(self, _remove, self.folder, lock, os.getpid())
                for name, (width, dtype) in self.columns.items():
                    reserve(self.folder / f"{name}.bin", num_rows * width * dtype.itemsize)
        except OSError as problem:
            error = full_disk(problem, self.parent, num_rows * bytes_of(self.columns))
        if gather is not None:
            said = gather(torch.tensor([[int(self.writes), token, int(error is not None)]])).view(-1, 3)
            if self.folder is None:
                self.folder = run_folder(self.parent, _token_of_the_node(said, token))
            if error is None and said[:, 2].any():
                error = OSError("another process could not write its history to the disk: see the error of that one")
        if error is not None:
            raise error


def _token_of_the_node(said: torch.Tensor, own: int) -> int:
    """The number of the run's folder on this node: that of its first process, the last writer up to this process."""
    rank = said[:, 1].tolist().index(own)
    return int(said[: rank + 1][said[: rank + 1, 0] == 1][-1, 1])


def _remove(folder: Path, lock: int | None, process: int) -> None:
    if os.getpid() != process:
        return  # a worker that was forked
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
