"""Runs that `test_fsdp.py` compares: on some processes that share the weights (FSDP2), and on one that has them."""

import sys
from functools import partial
from pathlib import Path

import torch
from distributed_worker import options
from helpers import make_samples, make_trainer
from processes import fork
from safetensors.torch import load_file

from hf_selfkd import AuxiliaryHeadsConfig
from hf_selfkd.sharded import sharded_modules, whole_state


LAYERS = {"plain_deep_vit": "ViTLayer", "vit": "ViTLayer", "plain_bert_tokens": "BertLayer", "plain_gpt2": "GPT2Block"}
NAMES = ("loss", "hard_loss", "soft_loss", "rows_with_history", "past_agreement", "target_entropy", "head0_loss")

STAGES = {"auxiliary_heads": "lsskd_full"}
MODEL, SIZE = "plain_deep_vit", 32  # of the runs that are resumed


def sharding(model, world):
    """Arguments that shard a model, where there are processes to share it."""
    config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": LAYERS[model], "reshard_after_forward": True}
    return {"optim_args": "momentum=0.5"} | ({} if world == 1 else {"fsdp": True, "fsdp_config": config})


def trainer_for(out, world, model, size, **more):
    """A trainer whose steps are of 8 samples however many processes there are."""
    given = options(world, **sharding(model, world)) | more
    return make_trainer(out, model, make_samples(model, size), **given)


def outcome(trainer, size):
    """Everything that processes are to agree on, in one piece."""
    result = {"weights": whole_state(trainer.model, trainer.model), "sharded": len(sharded_modules(trainer.model))}
    result["per_token"] = trainer.distiller.task.per_token
    if trainer.teacher.kind == "history":
        result["stored"] = trainer.teacher.stored(torch.arange(size))
    states = dict(trainer.teacher.states())
    if trainer.teacher.kind in ("snapshot", "ema"):
        result["teacher"] = states["teacher"][0]
    logs = [entry for entry in trainer.state.log_history if "hard_loss" in entry]
    result["logs"] = [{name: entry[name] for name in NAMES if name in entry} for entry in logs]
    return result


def equal(out, world, model="plain_deep_vit", size=32, **more):
    """Three epochs of data that divide into the steps, with an evaluation after each."""
    held = {"eval_dataset": make_samples(model, 12, seed=5), "eval_strategy": "epoch"}
    held |= {"per_device_eval_batch_size": 12 // world}
    trainer = trainer_for(out, world, model, size, **held | more)
    trainer.train()
    return outcome(trainer, size) | {"eval": [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]}


def shown(out, world):
    """A training, an evaluation and what they leave behind: the model and its card."""
    held = {"eval_dataset": make_samples(MODEL, 12, seed=5), "per_device_eval_batch_size": 12 // world}
    trainer = trainer_for(out, world, MODEL, SIZE, teacher="snapshot", **STAGES, **held)
    trainer.train()
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card()
    result = outcome(trainer, SIZE) | {"eval": [loss]}
    if trainer.is_world_process_zero():
        result |= {"card": (out / "README.md").read_text(), "saved": load_file(out / "model.safetensors")}
    return result


def resumed(name, out, world):
    """A run, and the same run resumed inside its second epoch."""
    more = RESUMED[name] | {"save_strategy": "steps", "save_steps": 5}
    more |= {"eval_dataset": make_samples(MODEL, 12, seed=5), "eval_strategy": "steps", "eval_steps": 5}
    runs = [trainer_for(out, world, MODEL, SIZE, **more) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=f"{out}/checkpoint-5")
    return {"full": outcome(runs[0], SIZE), "again": outcome(runs[1], SIZE)}


def go_on(name, checkpoints, out, world):
    """The end of such a run that another number of processes has begun."""
    trainer = trainer_for(out, world, MODEL, SIZE, **RESUMED[name])
    trainer.train(resume_from_checkpoint=f"{checkpoints}/{name}/checkpoint-5")
    return outcome(trainer, SIZE)


RESUMED = {
    "resume_history": {},
    "resume_snapshot": {"teacher": "snapshot"},
    "resume_ema": {"teacher": "ema"},
    "resume_heads": {"teacher": "snapshot", "save_heads": True, **STAGES},
}
SCENARIOS = {
    "history": lambda out, world: equal(out, world),
    "none": lambda out, world: equal(out, world, alpha=0.0),
    "rank": lambda out, world: equal(out, world, teacher="rank", alpha=0.4),
    "snapshot": lambda out, world: equal(out, world, teacher="snapshot"),
    "ema": lambda out, world: equal(out, world, teacher="ema"),
    "accumulation": lambda out, world: equal(
        out, world, teacher="snapshot", per_device_train_batch_size=4 // world, gradient_accumulation_steps=2
    ),
    "warm_start": lambda out, world: equal(out, world, warm_start_teacher=True),
    "tokens": lambda out, world: equal(out, world, "plain_bert_tokens", 24),
    "causal": lambda out, world: equal(out, world, "plain_gpt2", 24, teacher="ema"),
    "causal_chunked": lambda out, world: equal(out, world, "plain_gpt2", 24, chunked_logits=True),
    "causal_top_k": lambda out, world: equal(out, world, "plain_gpt2", 24, history_top_k=4, history_device="disk"),
    "shown": shown,
    "heads": lambda out, world: equal(out, world, **STAGES),
    "heads_history": lambda out, world: equal(out, world, teacher="history", **STAGES),
    "heads_teach": lambda out, world: equal(
        out, world, auxiliary_heads=AuxiliaryHeadsConfig(head="stages", heads_to_model_weight=1.0)
    ),
    "heads_native": lambda out, world: equal(out, world, auxiliary_heads="exits"),
    "heads_causal": lambda out, world: equal(out, world, "plain_gpt2", 24, auxiliary_heads="byot"),
    **{name: partial(resumed, name) for name in RESUMED},
}
OF_FOUR = ["history", "snapshot", "ema", "heads"]


def of_four(checkpoints):
    """What four processes do: some of the above, and go on from the checkpoints of two."""
    return {name: SCENARIOS[name] for name in OF_FOUR} | {name: partial(go_on, name, checkpoints) for name in RESUMED}


def shard_on_cpu():
    """
    Let accelerate shard models of processes without accelerators: it does so for every other kind of device, and
    trains whole copies on CPUs without a word.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    find_out = PartialState.__init__

    def of_another_kind(self, *arguments, **keywords):
        find_out(self, *arguments, **keywords)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU  # the device is chosen by now

    PartialState.__init__ = of_another_kind
    return PartialState(cpu=True)


def main(scenarios, out):
    """Run scenarios; the first process writes what came out."""
    import torch.distributed as dist

    state = shard_on_cpu()
    results = {name: run(Path(out) / name, state.num_processes) for name, run in scenarios.items()}
    if state.process_index == 0:
        torch.save(results, Path(out) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    out, *checkpoints = sys.argv[1:]
    if checkpoints:
        fork(4, lambda: main(of_four(*checkpoints), out))
    else:
        main(SCENARIOS, out)
