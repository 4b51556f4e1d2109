"""Two and four processes that share the weights of a model (FSDP2, gloo) against one process that has all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_worker import OF_FOUR, RESUMED, SCENARIOS
from helpers import difference


pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NOT_RESUMED = [name for name in SCENARIOS if name not in RESUMED]


def run_worker(out, *options):
    worker = Path(__file__).with_name("fsdp_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, *([] if options else TORCHRUN), worker, out, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out / "results.pt", weights_only=False), out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What every scenario gave on two processes, started by torchrun, and the folder of their checkpoints."""
    return run_worker(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(two, tmp_path_factory):
    """What some scenarios gave on four processes, and how four went on from the checkpoints of two."""
    return run_worker(tmp_path_factory.mktemp("four"), two[1])[0]


def check_same(one, several):
    """Weights of the model and of its teacher, stored rows, evaluations and logged means, to rounding."""
    assert several["sharded"] > 1
    assert difference(one["weights"], several["weights"]) < 1e-6
    assert difference(one.get("teacher", {"": torch.zeros(1)}), several.get("teacher", {"": torch.zeros(1)})) < 1e-6
    if "stored" in one:
        torch.testing.assert_close(several["stored"], one["stored"], atol=1e-6, rtol=0)
    if "eval" in one and several["per_token"] is False:  # which the stock class averages over batches as they are
        assert several["eval"] == pytest.approx(one["eval"], abs=2e-6)
    assert len(several["logs"]) == len(one["logs"]) > 2
    for alone, together in zip(one["logs"], several["logs"], strict=True):
        assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", NOT_RESUMED)
def test_two_processes_with_shards_follow_one(name, two, tmp_path):
    check_same(SCENARIOS[name](tmp_path, 1), two[0][name])


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_with_shards_follow_one(name, four, tmp_path):
    check_same(SCENARIOS[name](tmp_path, 1), four[name])


def test_what_is_left_behind_is_the_bare_model(two, tmp_path):
    """Whole weights under their names, without heads; the card names the class that the model had."""
    left = two[0]["shown"]
    assert "ViTForImageClassification" in left["card"] and "FSDPViT" not in left["card"]
    one = SCENARIOS["shown"](tmp_path, 1)
    assert left["saved"].keys() == one["saved"].keys() and not any("heads" in name for name in left["saved"])
    assert difference(left["saved"], one["saved"]) < 1e-6


@pytest.mark.parametrize("name", ["history", "rank", "snapshot", "ema", "heads"])
def test_the_comparison_can_tell(name, two):
    """The control: plain training ends elsewhere, by far more than the tolerance above."""
    plain, taught = (two[0][run]["weights"] for run in ("none", name))
    assert difference(plain, {key: taught[key] for key in plain}) > 1e-4


@pytest.mark.parametrize("name", RESUMED)
def test_resume_with_shards_is_exact(name, two):
    full, again = (two[0][name][run] for run in ("full", "again"))
    assert difference(full["weights"], again["weights"]) == 0
    assert difference(full.get("teacher", {"": torch.zeros(1)}), again.get("teacher", {"": torch.zeros(1)})) == 0
    if "stored" in full:
        assert torch.equal(full["stored"], again["stored"])


@pytest.mark.parametrize("name", RESUMED)
def test_four_processes_resume_the_shards_of_two(name, two, four):
    check_same(two[0][name]["full"], four[name])


def test_saved_teacher_is_in_one_piece(two):
    """One process could go on with it, and reads the same numbers as the many hold in parts."""
    from safetensors.torch import load_file

    saved = load_file(two[1] / "resume_snapshot" / "checkpoint-12" / "_selfkd" / "teacher.safetensors")
    held = two[0]["resume_snapshot"]["full"]["teacher"]
    shapes = {name: tensor.shape for name, tensor in two[0]["resume_snapshot"]["full"]["weights"].items()}
    assert {name.removeprefix("weights."): tensor.shape for name, tensor in saved.items()} == shapes
    assert saved.keys() == held.keys()
