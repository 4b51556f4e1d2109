"""Whether what two trainings left behind is the same, to the bit."""

import json
from pathlib import Path

import numpy as np
import torch

from hf_selfkd.checkpoint_files import last_whole_checkpoint
from hf_selfkd.files import load_tensors


# How long it took, and a mean that the stock Trainer takes over the steps since the last start only.
TIMES = ("_runtime", "_per_second", "train_loss")


def difference(one, other):
    """What differs between the folders of two trainings that are over, or `None`."""
    one, other = Path(one), Path(other)
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        return "final weights"
    first, second = (last_whole_checkpoint(folder) for folder in (one, other))
    if first is None or second is None or Path(first).name != Path(second).name:
        return f"last checkpoints {first} and {second}"
    first, second = Path(first), Path(second)
    names, others = ({str(path.relative_to(top)) for path in top.rglob("*")} for top in (first, second))
    if names != others:
        return f"files {sorted(names ^ others)}"
    for name in sorted(names):
        if not _same(first / name, second / name):
            return name
    return None


def _same(one, other):
    if one.is_dir() or one.name in ("training_args.bin", "files.json"):  # which has checksums of archives
        return True
    if one.suffix in (".pt", ".pth"):
        return _equal(*(torch.load(path, weights_only=False) for path in (one, other)))
    if one.name == "trainer_state.json":
        return _equal(*(_untimed(json.loads(path.read_text())) for path in (one, other)))
    if one.suffix == ".safetensors" and one.parent.name == "_selfkd":  # whose metadata stand in any order
        (tensors, metadata), (others, other_metadata) = load_tensors(one), load_tensors(other)
        return metadata == other_metadata and _equal(_bits(tensors), _bits(others))
    return one.read_bytes() == other.read_bytes()


def _bits(tensors):
    """NaN equals NaN."""
    return {name: (value.dtype, value.reshape(-1).view(torch.uint8)) for name, value in tensors.items()}


def _untimed(state):
    state["log_history"] = [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)} for entry in state["log_history"]
    ]
    state["best_model_checkpoint"] = None
    return state


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other or one != one and other != other  # NaN
