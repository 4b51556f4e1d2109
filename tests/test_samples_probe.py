"""The probe of samples: the same contents, the same hash; any other contents, another one."""

import copy
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_selfkd.samples_probe import content_probe


@dataclass
class Item:
    left: int
    right: torch.Tensor


def image(pixel, mode="RGB"):
    picture = Image.new(mode, (3, 2))
    picture.putpixel((1, 1), pixel)
    return picture


def palette(first):
    picture = Image.new("P", (3, 2))
    picture.putpalette([first, 2, 3])
    return picture


# Pairs of values that differ, however little.
DIFFERENT = {
    "a value": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])),
    "a sign": (torch.tensor([0.0]), torch.tensor([-0.0])),
    "a shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "a number of dimensions": (torch.zeros(2), torch.zeros(2, 1)),
    "no elements": (torch.zeros(0, 3), torch.zeros(0, 4)),
    "a type": (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float32)),
    "half precision": (torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1.25], dtype=torch.bfloat16)),
    "booleans": (torch.tensor([True, False]), torch.tensor([False, True])),
    "arrays": (np.arange(3), np.array([0, 1, 3])),
    "texts in arrays": (np.array(["a", "b"]), np.array(["a", "c"])),
    "objects in arrays": (np.array([{"a": 1}, 2], dtype=object), np.array([{"a": 2}, 2], dtype=object)),
    "numbers": (1, 2),
    "large numbers": (2**70, 2**70 + 1),
    "number and truth": (1, True),
    "number and text": (1, "1"),
    "whole and real": (1, 1.0),
    "reals": (0.1, 0.1 + 1e-17 + 1e-16),
    "nothing": (None, 0),
    "text": ("cat", "cas"),
    "where texts end": (["ab", "c"], ["a", "bc"]),
    "where lists end": ([[1], [2, 3]], [[1, 2], [3]]),
    "order of lists": ([1, 2], [2, 1]),
    "sets": ({1, 2}, {1, 3}),
    "text and bytes": ("a", b"a"),
    "keys": ({"a": 1}, {"b": 1}),
    "keys and values": ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    "a nested value": ({"a": [{"b": torch.ones(2)}]}, {"a": [{"b": torch.zeros(2)}]}),
    "dataclasses": (Item(1, torch.ones(1)), Item(1, torch.zeros(1))),
    "a pixel": (image((1, 2, 3)), image((1, 2, 4))),
    "a kind of image": (image(1, "L"), image(1, "P")),
    "a palette": (palette(1), palette(9)),
    "paths": (Path("a"), Path("b")),
    "unknown classes": (object(), lambda: 0),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_same_and_something_else(name):
    one, other = DIFFERENT[name]
    if name != "unknown classes":
        assert content_probe([{"x": one}]) == content_probe([{"x": copy.deepcopy(one)}])
    assert content_probe([{"x": one}]) != content_probe([{"x": other}])
    assert content_probe([one]) != content_probe([other])


def test_only_the_field_that_differs_has_another_hash():
    """So a message can name it."""
    one = [{"ids": torch.arange(4), "labels": torch.tensor([i])} for i in range(3)]
    other = [batch | {"ids": batch["ids"] + (number == 2)} for number, batch in enumerate(one)]
    first, second = content_probe(one), content_probe(other)
    assert list(first) == ["ids", "labels"] and all(len(value) == 16 for value in first.values())
    assert first["labels"] == second["labels"] and first["ids"] != second["ids"]
    assert content_probe(one[::-1])["labels"] != first["labels"]
    assert content_probe(one[:2])["ids"] != first["ids"]
    assert content_probe([]) == {} and list(content_probe([(1, 2)])) == ["batch"]


def test_what_does_not_matter():
    """The order of keys, memory layout, gradients, the order of bytes of a machine, tuples for lists."""
    tensor = torch.arange(12.0).reshape(3, 4)
    one = content_probe([{"a": tensor.t().contiguous(), "b": {"x": 1, "y": (2, 3)}, "c": np.arange(3, dtype="<i4")}])
    same = {"c": np.arange(3, dtype=">i4"), "b": {"y": [2, 3], "x": 1}, "a": tensor.clone().requires_grad_().t()}
    assert content_probe([same]) == one
    assert content_probe([{"a": object()}]) == content_probe([{"a": object()}])  # the address of an object does not
    assert content_probe([{"a": tensor}]) == content_probe([{"a": tensor.numpy()}])


def test_sparse_tensors_are_their_values():
    dense = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert content_probe([{"a": dense.to_sparse()}]) == content_probe([{"a": dense}])


SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("probe", sys.argv[1])
probe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(probe)
print(sorted(probe.content_probe([{"a": {"x", "y", "z"}, "b": {"k": 1, "l": 2.5}, "c": "text"}]).items()))
"""


def test_every_run_of_python_finds_the_same():
    """Whose own hashes of text differ from run to run."""
    path = Path(sys.modules[content_probe.__module__].__file__)
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-c", SCRIPT, path]
    found = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    )
    here = content_probe([{"a": {"x", "y", "z"}, "b": {"k": 1, "l": 2.5}, "c": "text"}])
    assert found.stdout == f"{sorted(here.items())}\n"
