"""
Two machines of two processes each, against one process.

The machines are network namespaces of one: they reach each other through a pair of virtual interfaces only, and each
has its own shared memory and its own disk where it writes, under one and the same path. Needs Linux and root.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import difference
from nodes_worker import scenarios


pytestmark = pytest.mark.slow

NODES = {"selfkd0": "10.211.0.1", "selfkd1": "10.211.0.2"}


def shell(*lines):
    return subprocess.run(["sh", "-e", "-c", "\n".join(lines)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def network():
    """Two namespaces that are connected; skipped where they cannot be made."""
    lines = [f"ip netns add {name}" for name in NODES]
    lines.append("ip link add veth0 netns selfkd0 type veth peer name veth1 netns selfkd1")
    for number, (name, address) in enumerate(NODES.items()):
        lines += [f"ip -n {name} addr add {address}/24 dev veth{number}", f"ip -n {name} link set veth{number} up"]
        lines.append(f"ip -n {name} link set lo up")
    made = shell(*lines)
    try:
        if made.returncode:
            pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        yield
    finally:
        for name in NODES:
            shell(f"ip netns del {name}")


def start(number, results, out):
    """Two processes of a machine, whose disk and shared memory end with them."""
    name = list(NODES)[number]
    worker = Path(__file__).with_name("nodes_worker.py")
    run = f"{sys.executable} -m torch.distributed.run --nnodes 2 --node-rank {number} --nproc-per-node 2 "
    run += f"--master-addr {NODES['selfkd0']} --master-port 29571 {worker} {results} {out}"
    mounted = f"mount -t tmpfs none /dev/shm && mount -t tmpfs none {out} && exec {run}"
    environment = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "GLOO_SOCKET_IFNAME": f"veth{number}"}
    return subprocess.Popen(
        ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", mounted],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def together(network, tmp_path_factory):
    """What every scenario gave on two machines."""
    folder = tmp_path_factory.mktemp("nodes")
    results, out = folder / "results.pt", folder / "out"
    out.mkdir()
    machines = [start(number, results, out) for number in range(2)]
    errors = [machine.communicate(timeout=540)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    assert not any(out.iterdir())  # nothing was written beside the disks of the machines
    return torch.load(results, weights_only=False)


@pytest.mark.parametrize("name", ["memory", "disk", "snapshot"])
def test_two_machines_follow_one_process(name, together, tmp_path):
    one, two = scenarios("0")[name](tmp_path, 1), together[name]
    assert difference(one["weights"], two["weights"]) < 1e-6
    if "stored" in one:
        torch.testing.assert_close(two["stored"], one["stored"], atol=1e-6, rtol=0)
    for alone, several in zip(one["logs"], two["logs"], strict=True):
        assert several == pytest.approx(alone, abs=1e-5)


def test_each_machine_has_a_table_of_its_own(together):
    kept = dict(together["machine"]["files"])
    assert kept == {"0": ["node0"], "1": ["node1"]}


def test_machines_with_disks_of_their_own_resume_exactly(together):
    assert difference(together["saved"]["full"], together["saved"]["again"]) == 0


def test_a_checkpoint_that_one_machine_lacks_is_passed_over_by_both(together):
    assert together["saved"]["first_step"] == 11
    assert difference(together["saved"]["full"], together["saved"]["older"]) == 0
