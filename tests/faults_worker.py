"""Runs on two processes that `test_faults_services.py` looks at; torchrun starts this file."""

import sys
from pathlib import Path

import torch
from helpers import logged, make_samples, make_trainer, state_of


def dispatched(out, name, **options):
    """The main process reads map-style data and sends batches to the others."""
    accelerator = {"dispatch_batches": True, "split_batches": False, "even_batches": True}
    options |= {"per_device_train_batch_size": 4, "accelerator_config": accelerator}
    samples = make_samples(name, 16)
    if name == "plain_gpt2":  # batches that are sent must be of equal length
        samples.items = [{key: value[:3] for key, value in item.items()} for item in samples.items]
        for item in samples.items:
            item["labels"] = item["input_ids"]
    trainer = make_trainer(out, name, samples, **options)
    trainer.train()
    found = {name: logged(trainer, name) for name in ("loss", "rows_with_history", "alpha")}
    return found | {"kind": trainer.teacher.kind, "weights": state_of(trainer)}


def uneven(out, size, **options):
    """What is said of batches that not all processes get; `None` if the run went through."""
    accelerator = {"even_batches": False, "dispatch_batches": False, "split_batches": False}
    options |= {"per_device_train_batch_size": 4, "accelerator_config": accelerator}
    trainer = make_trainer(out, "plain_vit", make_samples("plain_vit", size), **options)
    try:
        trainer.train()
    except ValueError as error:
        return str(error), trainer.state.global_step
    return None, trainer.state.global_step


SCENARIOS = {
    "dispatched": lambda out: dispatched(out, "plain_vit"),
    "dispatched_snapshot": lambda out: dispatched(out, "plain_vit", teacher="snapshot"),
    "dispatched_words": lambda out: dispatched(out, "plain_gpt2"),
    "dispatched_plain": lambda out: dispatched(out, "plain_vit", alpha=0.0),
    "uneven": lambda out: uneven(out, 22),
    "uneven_snapshot": lambda out: uneven(out, 22, teacher="snapshot"),
    "even": lambda out: uneven(out, 16),
    "dropped": lambda out: uneven(out, 22, dataloader_drop_last=True),
}


def main(out):
    """Run every scenario; the first process writes what came out."""
    import torch.distributed as dist
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    results = {name: scenario(Path(out) / name) for name, scenario in SCENARIOS.items()}
    if rank == 0:
        torch.save(results, Path(out) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
