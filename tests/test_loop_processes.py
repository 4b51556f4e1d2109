"""Accelerate loops with `LoopDistiller`: two processes (gloo, started by torchrun) against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import difference, refused
from loop_worker import SCENARIOS, run

from hf_selfkd.processes import Processes


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What every scenario gave on two processes, and the folder of their states."""
    out = tmp_path_factory.mktemp("two")
    worker = Path(__file__).with_name("loop_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out / "results.pt", weights_only=True), out


@pytest.mark.parametrize("name", ["history", "disk", "snapshot", "ema", "accumulation", "heads", "heads_history"])
def test_two_processes_follow_one(name, two, tmp_path):
    results, _ = two
    one, found = SCENARIOS[name](tmp_path, 1), results[name]
    assert difference(one["weights"], found["weights"]) < 1e-6
    assert one["steps"] == found["steps"]
    if "stored" in one:
        torch.testing.assert_close(found["stored"], one["stored"], atol=1e-6, rtol=0)
    for alone, together in zip(one["logs"], found["logs"], strict=True):
        assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", ["history", "snapshot", "ema"])
def test_the_comparison_can_tell(name, two):
    results, _ = two
    assert difference(results["none"]["weights"], results[name]["weights"]) > 1e-4


@pytest.mark.parametrize("name", ["history", "snapshot"])
def test_a_saved_state_goes_on_to_the_bit(name, two):
    results, _ = two
    assert difference(results[name]["weights"], results[f"resume_{name}"]["weights"]) == 0
    assert difference(results["heads_history"]["weights"], results["resume_heads"]["weights"]) == 0


def test_one_process_goes_on_for_two(two, tmp_path):
    """The state of two processes holds the journals of both."""
    results, out = two
    found = run(tmp_path, 1, resume=str(out / "resume_history" / "state"))
    assert difference(found["weights"], results["history"]["weights"]) < 1e-6
    torch.testing.assert_close(found["stored"], results["history"]["stored"], atol=1e-6, rtol=0)


def test_a_last_batch_that_is_filled_up(two):
    results, _ = two
    stored = results["uneven"]["stored"]
    assert stored.shape[0] == 22 and torch.isfinite(stored).all()


def test_processes_that_do_not_know_one_another(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    refused(lambda: Processes.of_torch(torch.device("cpu")), "2 processes", "Accelerator", "init_process_group")


def test_parts_of_unequal_length_and_any_type():
    own = {"a": torch.arange(6, dtype=torch.int16).view(3, 2), "b": torch.tensor([True])}
    other = {"a": torch.zeros(0, 2, dtype=torch.int16), "b": torch.tensor([False, True])}
    answers = []  # of the other process, in the order in which it is asked
    for name in ("a", "b"):
        answers += [torch.tensor([len(other[name])]), other[name].reshape(-1).view(torch.uint8)]

    def gather(tensor):
        answer = answers.pop(0)
        return torch.cat([tensor, torch.cat([answer, answer.new_zeros(len(tensor) - len(answer))])])

    for expected, found in zip((own, other), Processes(0, 2, gather=gather).gather_parts(own), strict=True):
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
