"""Two processes under DeepSpeed, on its CPU accelerator (gloo), against one process without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_worker import ANY_STAGE, RESUMED, SCENARIOS, trainer_for
from helpers import difference, refused


pytest.importorskip("deepspeed", reason="needs `pip install deepspeed` (DS_BUILD_OPS=0 without a compiler)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3])
def stage(request, tmp_path_factory):
    """A stage, and what its scenarios gave on two processes."""
    out = tmp_path_factory.mktemp(f"stage{request.param}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
    worker = Path(__file__).with_name("deepspeed_worker.py")
    done = subprocess.run(
        [sys.executable, worker, out, str(request.param)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, torch.load(out / "results.pt", weights_only=False)


def check_same(one, two):
    """Weights of the model and of its teacher, stored rows and logged means, to rounding."""
    # DeepSpeed saves an output embedding that is the input embedding twice.
    assert difference(one["weights"], {name: two["weights"][name] for name in one["weights"]}) < 1e-6
    assert difference(one.get("teacher", {"": torch.zeros(1)}), two.get("teacher", {"": torch.zeros(1)})) < 1e-6
    if "stored" in one:
        torch.testing.assert_close(two["stored"], one["stored"], atol=1e-6, rtol=0)
    assert len(two["logs"]) == len(one["logs"]) > 2
    for alone, together in zip(one["logs"], two["logs"], strict=True):
        assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in SCENARIOS[2] if name not in RESUMED])
def test_two_processes_follow_one(name, stage, tmp_path):
    number, two = stage
    if name not in SCENARIOS[number]:
        pytest.skip("refused: needs whole weights")
    check_same(SCENARIOS[number][name](tmp_path, None), two[name])


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(name, stage):
    number, two = stage
    if name not in SCENARIOS[number]:
        pytest.skip("refused: needs whole weights")
    full, again = (two[name][run] for run in ("full", "again"))
    for part in ("weights", "teacher"):
        assert difference(full.get(part, {"": torch.zeros(1)}), again.get(part, {"": torch.zeros(1)})) == 0
    if "stored" in full:
        assert torch.equal(full["stored"], again["stored"])


# Another model, or the same method again, is no control.
@pytest.mark.parametrize("name", [name for name in ANY_STAGE if name not in ("none", "causal_top_k", *RESUMED)])
def test_the_comparison_can_tell(name, stage):
    """The control: another method ends elsewhere, by far more than the tolerance above."""
    other = "history" if name == "plain_accumulation" else "none"
    assert difference(stage[1][other]["weights"], stage[1][name]["weights"]) > 1e-4


@pytest.mark.parametrize("options", [{"teacher": "snapshot"}, {"teacher": "ema"}, {"auxiliary_heads": "byot"}])
def test_weights_in_parts_are_refused(tmp_path, options, monkeypatch):
    """One process is enough to see the stage."""
    facts = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
    for name, value in (facts | {"DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    refused(lambda: trainer_for(tmp_path, 3, **options).train(), "DeepSpeed ZeRO-3", "ZeRO-2")
