"""Runs that `test_deepspeed.py` compares: on two processes under DeepSpeed (gloo), and on one without."""

import sys
from functools import partial
from pathlib import Path

import loop_worker
import torch
from accelerate import DeepSpeedPlugin
from accelerate.state import AcceleratorState
from distributed_worker import options
from fsdp_worker import MODEL, NAMES, SIZE, STAGES
from helpers import make_samples, make_trainer
from processes import fork
from safetensors.torch import load_file


def engine(stage):
    """The settings of a ZeRO stage, in which every weight of these small models is sharded."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True} | dict.fromkeys(sizes, "auto")


def trainer_for(out, stage, model=MODEL, size=SIZE, **more):
    """A trainer whose steps are of 8 samples; without a stage it is for one process."""
    given = options(1 if stage is None else 2, optim_args="momentum=0.5")
    given |= {} if stage is None else {"deepspeed": engine(stage)}
    return make_trainer(out, model, make_samples(model, size), **given | more)


def outcome(trainer, size=SIZE):
    """Everything that processes are to agree on."""
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    result = {"weights": load_file(f"{trainer.args.output_dir}/model.safetensors")}
    if trainer.teacher.kind == "history":
        result["stored"] = trainer.teacher.stored(torch.arange(size))
    if trainer.teacher.kind in ("snapshot", "ema"):
        result["teacher"] = dict(trainer.teacher.states())["teacher"][0]
    logs = [entry for entry in trainer.state.log_history if "hard_loss" in entry]
    return result | {"logs": [{name: entry[name] for name in NAMES if name in entry} for entry in logs]}


def equal(out, stage, model=MODEL, size=SIZE, **more):
    """Three epochs of data that divide into the steps."""
    trainer = trainer_for(out, stage, model, size, **more)
    trainer.train()
    return outcome(trainer, size)


def loop(out, stage, **more):
    """A loop of Accelerate's over steps of 4 samples."""
    if stage is None:
        return loop_worker.run(out, 1, **more)
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "train_batch_size": 4}
    settings = engine(stage) | sizes
    settings.pop("gradient_clipping")
    AcceleratorState._reset_state(reset_partial_state=True)  # of the trainings before, which had other sizes
    return loop_worker.run(out, 2, engine=DeepSpeedPlugin(hf_ds_config=settings), **more)


def resumed(out, stage, **more):
    """A run, and the same run resumed inside its second epoch."""
    more |= {"save_strategy": "steps", "save_steps": 5}
    runs = [trainer_for(out, stage, **more) for _ in range(2)]
    runs[0].train()
    full = outcome(runs[0])
    runs[1].train(resume_from_checkpoint=f"{out}/checkpoint-5")
    return {"full": full, "again": outcome(runs[1])}


RESUMED = {"resume_history": {}, "resume_ema": {"teacher": "ema"}, "resume_heads": {"save_heads": True, **STAGES}}
ANY_STAGE = {
    "history": equal,
    "none": partial(equal, alpha=0.0),
    "rank": partial(equal, teacher="rank", alpha=0.4),
    "accumulation": partial(equal, gradient_accumulation_steps=2),
    "plain_accumulation": partial(equal, gradient_accumulation_steps=2, alpha=0.0),
    "causal_top_k": partial(equal, model="plain_gpt2", size=24, history_top_k=4, history_device="disk"),
    "resume_history": resumed,
}
WHOLE_WEIGHTS = {
    "snapshot": partial(equal, teacher="snapshot"),
    "ema": partial(equal, teacher="ema"),
    "heads": partial(equal, teacher="snapshot", **STAGES),
    "heads_history": partial(equal, teacher="history", **STAGES),
    **{name: partial(resumed, **more) for name, more in RESUMED.items()},
    "loop": loop,
    "loop_snapshot": partial(loop, teacher="snapshot"),
    "loop_heads": partial(loop, heads="byot"),
}
SCENARIOS = {stage: ANY_STAGE | ({} if stage == 3 else WHOLE_WEIGHTS) for stage in (1, 2, 3)}


def main(stage, out):
    """Run the scenarios of a stage; the first process writes what came out."""
    results = {name: run(out / name, stage) for name, run in SCENARIOS[stage].items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, out / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    fork(2, partial(main, int(sys.argv[2]), Path(sys.argv[1])))
