"""Accelerate loops of `test_loop_processes.py`: torchrun runs this file on two processes, the test calls it on one."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from helpers import collate, make_model, make_samples, state_of
from loops import EPOCHS, SIZE, sgd
from torch.utils.data import DataLoader

from hf_selfkd import LoopDistiller, MethodArguments, attach_auxiliary_heads, with_sample_ids


GLOBAL_BATCH = 4


def run(
    out, world, teacher="history", stop=None, resume=None, heads=None, accumulation=1, size=SIZE, engine=None, **method
):
    """
    Accelerate's loop over global batches of 4, from a saved state and up to a step if asked; what came out. `engine`
    is a plugin of DeepSpeed.
    """
    options = {"gradient_accumulation_steps": accumulation, "deepspeed_plugin": engine}
    wrapper = DistributedDataParallelKwargs(find_unused_parameters=heads is not None)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[wrapper], **options)
    model = make_model("plain_deep_vit")
    if heads is not None:
        attach_auxiliary_heads(model, heads)
    size_of_batch = GLOBAL_BATCH // world // accumulation
    loader = DataLoader(with_sample_ids(make_samples("images", size)), size_of_batch, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, sgd(model), loader)
    method = MethodArguments(teacher=teacher, **method)
    options = {"num_samples": size, "num_epochs": EPOCHS, "accumulation_steps": accumulation}
    distiller = LoopDistiller(model, method, folder=Path(out) / "history", **options)
    accelerator.register_for_checkpointing(distiller)
    if resume is not None:
        accelerator.load_state(resume)
    model.train()
    done, skipped = 0, distiller.steps * accumulation
    logs = []
    for _ in range(EPOCHS):
        for batch in loader:
            done += 1
            if done <= skipped:
                continue
            with accelerator.accumulate(model):
                accelerator.backward(distiller.step(model, batch))
                optimizer.step()
                optimizer.zero_grad()
            if done == stop:
                accelerator.save_state(Path(out) / "state", safe_serialization=False)
                return None
        if done > skipped:
            distiller.end_epoch()
            logs.append(distiller.take_metrics())
    result = {"weights": state_of(accelerator.unwrap_model(model)), "logs": logs, "steps": distiller.steps}
    if teacher == "history":
        result["stored"] = distiller.teacher.stored(torch.arange(size))
    return result


def resumed(out, world, stop, **options):
    """Stopped in the middle of an epoch, and gone on in new objects."""
    run(out, world, stop=stop, **options)
    return run(out, world, resume=str(Path(out) / "state"), **options)


SCENARIOS = {
    "history": run,
    "disk": lambda out, world: run(out, world, history_device="disk", history_top_k=4),
    "snapshot": lambda out, world: run(out, world, teacher="snapshot"),
    "ema": lambda out, world: run(out, world, teacher="ema", ema_decay=0.7),
    "none": lambda out, world: run(out, world, teacher="none"),
    "accumulation": lambda out, world: run(out, world, accumulation=2),
    "heads": lambda out, world: run(out, world, heads="byot"),
    "heads_history": lambda out, world: run(out, world, heads="lsskd"),
    "uneven": lambda out, world: run(out, world, size=22),
    "resume_history": lambda out, world: resumed(out, world, 9),
    "resume_snapshot": lambda out, world: resumed(out, world, 8, teacher="snapshot"),
    "resume_heads": lambda out, world: resumed(out, world, 7, heads="lsskd"),
}


def main(out):
    """Run every scenario; the first process writes what came out."""
    import torch.distributed as dist

    accelerator = Accelerator(cpu=True)
    results = {name: act(Path(out) / name, accelerator.num_processes) for name, act in SCENARIOS.items()}
    if accelerator.is_main_process:
        torch.save(results, Path(out) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
