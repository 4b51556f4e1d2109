"""
Which checkpoints are whole: a list of the files that a resumed training reads, with their checksums.

`Trainer` writes the state of the run last. When that file is there, the list is, and when the list is, all that it
names is on the disk, that of other processes too.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from .files import BLOCK_BYTES, sync


logger = logging.getLogger(__name__)

STATE_FOLDER = "_selfkd"  # in a checkpoint and, for a history on disk, in the output folder
LIST_NAME = "files.json"  # in that folder of a checkpoint
SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".distcp"}  # of weights and states; other files may be edited


def write_list(folder: str | Path) -> None:
    """
    List the weights and states of a checkpoint, when they are on the disk to stay.

    Args:
        folder (`str` or `Path`): a checkpoint, written to the end by all processes but for the state of the run.
    """
    folder, files = Path(folder), {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES and path.name != TRAINING_ARGS_NAME and path.is_file():
            sync(path)
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _checksum(folder, path)]
    target = folder / STATE_FOLDER / LIST_NAME
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(LIST_NAME + ".partial")
    partial.write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
    sync(partial)
    os.replace(partial, target)
    for parent in (target.parent, folder, folder.parent):
        sync(parent)


def forget_list(folder: str | Path) -> None:
    """Say that a checkpoint is not whole, before another one is written in its place."""
    for name in (TRAINER_STATE_NAME, f"{STATE_FOLDER}/{LIST_NAME}"):
        (Path(folder) / name).unlink(missing_ok=True)


def fault_of(folder: Path) -> str | None:
    """
    What a checkpoint lacks, by names and lengths: a crash leaves no file behind that is as long as it should be.

    Args:
        folder (`Path`): a checkpoint.

    Returns:
        `str` or `None`: a file that is missing or cut; `None` if the checkpoint is whole.
    """
    try:
        TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return f"{TRAINER_STATE_NAME} is missing or cut"
    try:
        for name, (size, _) in _read_list(folder).items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                return f"{folder / name} is missing or cut"
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{folder / STATE_FOLDER / LIST_NAME} cannot be read"
    return None


def check_files(folder: str | Path) -> None:
    """
    Compare the files of a checkpoint with its list, if it has one: those of other versions and of `Trainer` have none.

    Args:
        folder (`str` or `Path`): a checkpoint.

    Raises:
        ValueError: if the checkpoint was not written to its end, or a file was changed since.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return  # which `Trainer` says
    fault = fault_of(folder)
    if fault is not None:
        raise ValueError(
            f"{folder} is not whole ({fault}): resume from another checkpoint; resume_from_checkpoint=True takes the "
            "newest whole one."
        )
    for name, (_, checksum) in _read_list(folder).items():
        if checksum is not None and checksum != _checksum(folder, folder / name):
            raise ValueError(
                f"{folder / name} is corrupted, its checksum does not match: resume from another checkpoint. If you "
                f"changed the file yourself, remove {folder / STATE_FOLDER / LIST_NAME}."
            )


def whole_checkpoint(output_dir: str | Path, at_most: float = float("inf")) -> int:
    """
    The newest whole checkpoint of a folder. `Trainer` takes the newest folder, whole or not, and fails until somebody
    deletes it; here those that a crash cut short are named in a warning.

    Args:
        output_dir (`str` or `Path`): where checkpoints are.
        at_most (`float`, *optional*): leave out those of later steps.

    Returns:
        `int`: its step; -1 if there is none.
    """
    folders = {_step_of(folder): folder for folder in Path(output_dir).glob("checkpoint-*") if folder.is_dir()}
    for step in sorted((step for step in folders if 0 <= step <= at_most), reverse=True):
        fault = fault_of(folders[step])
        if fault is None:
            return step
        logger.warning(f"{folders[step]} was not written to its end ({fault}): left out.")
    return -1


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest whole checkpoint of a folder, as `transformers.trainer_utils.get_last_checkpoint` gives the newest one.

    Args:
        output_dir (`str` or `Path`): where checkpoints are.

    Returns:
        `str` or `None`: its folder.
    """
    step = whole_checkpoint(output_dir)
    return None if step < 0 else os.path.join(output_dir, f"checkpoint-{step}")


def _read_list(folder: Path) -> dict[str, list]:
    path = folder / STATE_FOLDER / LIST_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _checksum(folder: Path, path: Path) -> str | None:
    """Of a file; `None` for those of self-distillation, which have one inside."""
    if path.parent == folder / STATE_FOLDER:
        return None
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _step_of(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
