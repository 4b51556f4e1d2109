"""Runs that `test_nodes.py` compares: on two machines of two processes each, and on one process."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from distributed_worker import equal, options
from helpers import make_samples, make_trainer, state_of


MODEL, SIZE = "plain_vit", 32
ON_DISK = {"history_device": "disk", "history_top_k": 3}


def saved(out, world, node, **more):
    """A run that keeps checkpoints, whole or with the newest one damaged on the second machine, and how it goes on."""
    more |= {"save_strategy": "steps", "save_steps": 2, "save_on_each_node": True}
    full, again, older = (make_trainer(out, MODEL, make_samples(MODEL, SIZE), **options(world, **more)) for _ in "123")
    full.train()
    again.train(resume_from_checkpoint=f"{out}/checkpoint-6")
    result = {"full": state_of(full), "again": state_of(again)}
    if node == "1" and os.environ["LOCAL_RANK"] == "0":
        Path(out, "checkpoint-12", "trainer_state.json").unlink()
    torch.distributed.barrier()
    older.train(resume_from_checkpoint=True)
    first = next(entry["step"] for entry in older.state.log_history if "loss" in entry and entry["step"] > 10)
    return result | {"older": state_of(older), "first_step": first}


def machine(out, world, node):
    """What is in the folder of each machine."""
    trainer = make_trainer(out, MODEL, make_samples(MODEL, SIZE), **options(world, **ON_DISK))
    trainer.train()
    kept = sorted(path.name for path in Path(out, "_selfkd").iterdir())
    files = [None] * world
    torch.distributed.all_gather_object(files, (node, kept))
    return {"weights": state_of(trainer), "files": files}


def scenarios(node):
    """By name; each takes a folder and the number of processes."""
    return {
        "memory": equal,
        "disk": partial(equal, **ON_DISK),
        "snapshot": partial(equal, teacher="snapshot"),
        "saved": partial(saved, node=node, **ON_DISK),
        "machine": partial(machine, node=node),
    }


if __name__ == "__main__":
    from accelerate import PartialState

    results, out = Path(sys.argv[1]), Path(sys.argv[2])
    world, node = PartialState(cpu=True).num_processes, os.environ["GROUP_RANK"]
    found = {name: run(out / name, world) for name, run in scenarios(node).items()}
    if PartialState().process_index == 0:
        torch.save(found, results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    shutil.rmtree(out, ignore_errors=True)
