"""Runs that `test_distributed.py` compares: torchrun runs this file on two processes, the test calls it on one."""

import os
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import test_ctc as frames
import test_multi_label as multi_label
import test_multiple_choice as choices
import test_next_sentence as pairs
import test_question_answering as question_answering
import test_segmentation as segments
import test_speech_seq2seq as transcripts
import torch
from detectors import Scenes, collate_scenes, drop_and_permute, make_detector
from helpers import (
    CLASSES,
    Seen,
    make_samples,
    make_speaker,
    make_trainer,
    state_of,
    with_decoder_inputs,
    words_of,
)
from processes import fork
from torch.utils.data import IterableDataset
from transformers import Seq2SeqTrainer

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDTrainer, Seq2SeqSelfKDTrainer


class Stream(IterableDataset):
    """The samples one after the other, with an id of their own."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __iter__(self):
        for number in range(len(self.samples)):
            yield self.samples[number] | {"number": number}


class FirstPredictions(SelfKDTrainer):
    """Notes every prediction in the order (epoch, step, process), independently of the history."""

    def compute_loss(self, model, inputs, *arguments, **keywords):
        ids = None if self.sample_ids is None else torch.from_numpy(self.sample_ids)
        loss, outputs = super().compute_loss(model, inputs, True, **keywords)
        if model.training:
            probs = outputs["logits"].detach().softmax(-1)
            ids, probs = self.accelerator.gather((ids, probs))  # in the order of the processes
            seen = self.__dict__.setdefault("seen", {}).setdefault(int(self.state.epoch or 0), {})
            for sample_id, row in zip(ids.tolist(), probs, strict=True):
                seen.setdefault(sample_id, row)
        return loss


def answers(out, world):
    """All texts padded to one length, which two processes would not agree on."""
    texts = question_answering.texts(16, outside=True)
    more = options(world, data_collator=lambda items: question_answering.pad(items, 10))
    return {"weights": state_of(question_answering.run(out, "plain_bert", texts, **more))}


def several_labels(out, world):
    samples = multi_label.samples_for("plain_vit", 16)
    return {"weights": state_of(multi_label.run(out, "plain_vit", samples, **options(world)))}


def segmentation(out, world, **more):
    """Images with another number of labelled pixels each, one of them without any."""
    trainer = segments.run(out, "plain_segformer", segments.maps_for("", 16), **options(world, **more))
    result = {"weights": state_of(trainer)}
    return result | ({"stored": trainer.teacher.stored(range(16))} if trainer.teacher.kind == "history" else {})


def ctc(out, world, name, **more):
    """Sounds padded to one length, which two processes would not agree on."""
    more |= {"data_collator": lambda items: frames.pad_sounds(items, 240), "learning_rate": 0.001}
    return {"weights": state_of(frames.run(out, name, frames.Spoken(16), **options(world) | more))}


def speech(out, world, name="plain_whisper", **more):
    """Sounds with their texts, or images with captions."""
    samples = transcripts.spoken(name, 16)
    return {"weights": state_of(transcripts.run(out, name, samples, **options(world, **more)))}


def multiple_choice(out, world):
    trainer = choices.run(out, "plain_bert", choices.questions(16), **options(world))
    return {"weights": state_of(trainer), "stored": trainer.teacher.stored(range(16))}


def next_sentence(out, world, **more):
    return {"weights": state_of(pairs.run(out, "plain_bert", pairs.pairs(16), **options(world, **more)))}


def options(world, **more):
    """Arguments of a run whose steps are of 8 samples however many processes there are."""
    return {
        "per_device_train_batch_size": 8 // world,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
    } | more


def equal(out, world, model="plain_vit", size=32, **more):
    """Weights and stored predictions after 3 epochs of data that divide into the steps."""
    samples = make_samples(model, size)
    trainer = make_trainer(out, model, samples, **options(world, **more))
    trainer.train()
    result = {"weights": state_of(trainer)}
    if getattr(trainer.teacher, "head_stores", []):
        result["heads"] = [teacher.stored(torch.arange(4 * size)) for teacher in trainer.teacher.head_stores]
    if trainer.teacher.kind == "history":
        result["stored"] = trainer.teacher.stored(torch.arange(size))
    names = (
        "head0_loss",
        "head0_accuracy",
        "alpha",
        "hard_loss",
        "soft_loss",
        "rows_with_history",
        "past_agreement",
        "target_entropy",
        "heads_to_model",
        "held_out_temperature",
        "held_out_past_weight",
        "loss",
    )
    result["logs"] = [
        {name: entry[name] for name in names if name in entry}
        for entry in trainer.state.log_history
        if "hard_loss" in entry
    ]
    return result


def ragged(out, world, **more):
    """What the history holds of 22 samples in steps of 8, and the first predictions that it should hold."""
    trainer = make_trainer(out, "vit", make_samples("vit", 22), trainer=FirstPredictions, **options(world, **more))
    trainer.train()
    seen = trainer.seen[2]
    return {
        "stored": trainer.teacher.stored(torch.arange(22)),
        "first": torch.stack([seen[number] for number in range(22)]),
        "trace": trainer.teacher.trace if more.get("history_trace") else None,
    }


def resumed(out, world, model, save=3, **more):
    """The end of a run, and of the same run resumed inside its second epoch."""
    more = options(world, save_strategy="steps", save_steps=save, **more)
    full = make_trainer(out, model, make_samples(model, 22), **more)
    full.train()
    again = make_trainer(out, model, make_samples(model, 22), **more)
    step = 6 if save == 3 else 2 * save
    again.train(resume_from_checkpoint=f"{out}/checkpoint-{step}")
    return {"full": state_of(full), "again": state_of(again)}


def stream(out, world, **more):
    """A stream with ids and a declared size."""
    trainer = make_trainer(
        out, "plain_vit", Stream(make_samples("plain_vit", 32)), **options(world, sample_id_column="number", **more)
    )
    trainer.train()
    return {"weights": state_of(trainer), "stored": trainer.teacher.stored(np.arange(32))}


def stream_of_datasets(out, world):
    """A stream of the library `datasets`, which does not tell its length."""
    dataset = datasets.Dataset.from_list(make_samples("plain_bert", 32).items).to_iterable_dataset()
    more = {"teacher": "snapshot", "accelerator_config": {"dispatch_batches": False}, "max_steps": 12}
    trainer = make_trainer(out, "plain_bert", dataset, **options(world, alpha_schedule="linear_step", **more))
    trainer.train()
    return {"weights": state_of(trainer)}


# Checkpoints of some processes in the middle of an epoch, for another number of processes to resume.
CHANGED = {
    "changed": {},
    "changed_disk": {"history_device": "disk", "history_trace": True},
    "changed_snapshot": {"teacher": "snapshot"},
    "changed_ema": {"teacher": "ema"},
    "changed_heads": {"teacher": "history", "auxiliary_heads": "lsskd_full"},
}


def with_processes_changed(name, out, world, resume=None):
    """A run that saves, or one that resumes what another number of processes saved."""
    more = options(world, save_strategy="steps" if resume is None else "no", save_steps=6, **CHANGED[name])
    trainer = make_trainer(out, "plain_vit", make_samples("plain_vit", 32), **more)
    trainer.train(resume_from_checkpoint=resume)
    result = {"weights": state_of(trainer)}
    if trainer.teacher.kind == "history":
        result["stored"] = trainer.teacher.stored(np.arange(32))
        result["heads"] = [teacher.stored(torch.arange(128)) for teacher in trainer.teacher.head_stores]
    if more.get("history_trace"):
        result["trace"] = trainer.teacher.trace.clone()
    return result


def translation(out, world, accumulation=1, **more):
    """The end of a Seq2SeqSelfKDTrainer whose steps are of 8 sentences, in so many micro-batches."""
    more |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // world // accumulation}
    return equal(out, world, "plain_marian", 24, trainer=Seq2SeqSelfKDTrainer, **more)


def evaluated(out, world, trainer=Seq2SeqSelfKDTrainer, generate=True, batch_size=4, **more):
    """What an evaluation of 11 sentences shows to `compute_metrics`, and its figures."""
    seen = Seen()
    made = make_trainer(
        out,
        make_speaker(),
        make_samples("pairs"),
        trainer=trainer,
        eval_dataset=make_samples("pairs", 11, seed=5),
        compute_metrics=seen,
        predict_with_generate=generate,
        generation_max_length=8,
        per_device_eval_batch_size=batch_size,
        data_collator=with_decoder_inputs(),
        **more,
    )
    metrics = made.evaluate()
    predictions = words_of(seen.predictions) if generate else np.asarray(seen.predictions[0])
    return {"metrics": metrics, "labels": words_of(seen.labels), "predictions": predictions}


def evaluated_heads(out, world):
    """The figures of the heads in an evaluation of 11 samples."""
    test = make_samples("plain_vit", 11, seed=5)
    options = {"auxiliary_heads": "joint", "evaluate_heads": True, "eval_dataset": test}
    trainer = make_trainer(out, "plain_vit", make_samples("plain_vit", 32), **options)
    return {"metrics": {name: value for name, value in trainer.evaluate().items() if "head" in name}}


def calibrated(out, world):
    """A weight that follows 13 held-out samples, which do not divide into the processes."""
    held = make_samples("plain_vit", 13, seed=5)
    return equal(out, world, alpha_schedule="calibrated", eval_dataset=held)


def detection(out, world, name, **more):
    """A detector whose objects come and go, and the same run resumed inside its second epoch."""
    more |= {"save_strategy": "steps", "save_steps": 2, "seed_transforms": True, "learning_rate": 1e-3}
    more |= {"data_collator": collate_scenes, "remove_unused_columns": False}
    scenes = Scenes(22, transform=drop_and_permute)
    runs = [make_trainer(out, make_detector(name), scenes, **options(world) | more) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=f"{out}/checkpoint-4")
    return {
        "weights": [state_of(run) for run in runs],
        "stored": [run.teacher.stored(range(22)) for run in runs],
        "ids": runs[0].teacher.history.ids,
    }


def predictions(out, world):
    """Predictions from a file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"past{world}_{os.environ.get('RANK', 0)}.npz"
    np.savez(path, probs=np.random.default_rng(0).dirichlet(np.ones(CLASSES), 32))
    return equal(out, world, teacher_predictions=str(path))


# Heads without batch statistics, which each process would have for itself.
STAGES = {"auxiliary_heads": "lsskd_full"}
SMOOTHING = {"label_smoothing_factor": 0.1, "alpha": 0.0}
SCENARIOS = {
    "history": lambda out, world: equal(out, world),
    "snapshot": lambda out, world: equal(out, world, teacher="snapshot"),
    "ema": lambda out, world: equal(out, world, teacher="ema"),
    "rank": lambda out, world: equal(out, world, teacher="rank", alpha=0.4),
    "plain": lambda out, world: equal(out, world, alpha=0.0),
    "plain_resnet": lambda out, world: equal(out, world, "resnet", alpha=0.0),
    "accumulation": lambda out, world: equal(
        out, world, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2
    ),
    "tokens": lambda out, world: equal(out, world, "plain_bert_tokens", 24),
    "disk": lambda out, world: equal(out, world, history_device="disk"),
    "warm_start": lambda out, world: equal(out, world, warm_start_teacher=True),
    "ragged": lambda out, world: ragged(out, world, history_trace=True),
    "ragged_disk": lambda out, world: ragged(out, world, history_device="disk", history_top_k=CLASSES),
    "answers": lambda out, world: answers(out, world),
    "segmentation": lambda out, world: segmentation(out, world),
    "segmentation_history": lambda out, world: segmentation(out, world, teacher="history"),
    "ctc": lambda out, world: ctc(out, world, "plain_wav2vec2"),
    "ctc_mean": lambda out, world: ctc(out, world, "plain_wav2vec2_mean"),
    "speech": lambda out, world: speech(out, world, teacher="history"),
    "captions": lambda out, world: speech(out, world, "plain_captions", teacher="history"),
    "multiple_choice": multiple_choice,
    "next_sentence": lambda out, world: next_sentence(out, world),
    "several_labels": lambda out, world: several_labels(out, world),
    "resume_history": lambda out, world: resumed(out, world, "vit"),
    "resume_snapshot": lambda out, world: resumed(out, world, "resnet", teacher="snapshot"),
    "resume_ema": lambda out, world: resumed(out, world, "resnet", teacher="ema", save=2),
    "calibrated": calibrated,
    "resume_calibrated": lambda out, world: resumed(
        out, world, "vit", alpha_schedule="calibrated", eval_dataset=make_samples("vit", 13, seed=5)
    ),
    "predictions": predictions,
    "detection": lambda out, world: detection(out, world, "detr"),
    "detection_denoising": lambda out, world: detection(out, world, "rt_detr", history_device="disk"),
    "stream": lambda out, world: stream(out, world),
    **{name: partial(with_processes_changed, name) for name in CHANGED},
    "dropped_ends": lambda out, world: equal(
        out, world, size=22, dataloader_drop_last=True, accelerator_config={"even_batches": False}
    ),
    "dropped_ends_snapshot": lambda out, world: equal(
        out, world, size=22, teacher="snapshot", dataloader_drop_last=True
    ),
    "ends_inside_a_step": lambda out, world: equal(
        out, world, size=20, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2
    ),
    "by_length": lambda out, world: equal(
        out, world, "plain_bert_tokens", 32, train_sampling_strategy="group_by_length"
    ),
    "rebalanced": lambda out, world: equal(
        out, world, "plain_bert_tokens", 32, train_sampling_strategy="batch_rebalance"
    ),
    "workers": lambda out, world: equal(out, world, size=16, teacher="ema", dataloader_num_workers=1),
    "dispatched": lambda out, world: equal(out, world, accelerator_config={"dispatch_batches": True}),
    "split_batches": lambda out, world: equal(
        out, world, per_device_train_batch_size=8, accelerator_config={"split_batches": True}
    ),
    "stream_by_itself": lambda out, world: stream(out, world, accelerator_config={"dispatch_batches": False}),
    "stream_of_datasets": stream_of_datasets,
    "translation": lambda out, world: translation(out, world),
    "translation_accumulation": lambda out, world: translation(out, world, accumulation=2),
    "translation_top_k": lambda out, world: translation(out, world, history_top_k=4, history_device="disk"),
    "translation_chunked": lambda out, world: translation(out, world, history_top_k=4, chunked_logits=True),
    "translation_plain": lambda out, world: translation(out, world, alpha=0.0),
    "heads": lambda out, world: equal(out, world, **STAGES),
    "heads_teach": lambda out, world: equal(
        out, world, auxiliary_heads=AuxiliaryHeadsConfig(head="stages", heads_to_model_weight=1.0)
    ),
    "heads_native": lambda out, world: equal(out, world, "plain_deep_vit", auxiliary_heads="exits"),
    "heads_history": lambda out, world: equal(out, world, teacher="history", **STAGES),
    "heads_accumulation": lambda out, world: equal(
        out, world, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, **STAGES
    ),
    "heads_muted": lambda out, world: equal(
        out, world, alpha=0.0, auxiliary_heads=AuxiliaryHeadsConfig(hard_weight=0.0)
    ),
    "heads_translation": lambda out, world: translation(out, world, **STAGES),
    "heads_causal": lambda out, world: equal(out, world, "plain_gpt2", 24, auxiliary_heads="byot"),
    "heads_of_a_cnn": lambda out, world: equal(out, world, "resnet", auxiliary_heads="lsskd"),
    "resume_heads_snapshot": lambda out, world: resumed(out, world, "vit", auxiliary_heads="lsskd"),
    "resume_heads_history": lambda out, world: resumed(out, world, "vit", auxiliary_heads="lsskd", teacher="history"),
    "evaluated_heads": evaluated_heads,
    "causal": lambda out, world: equal(out, world, "plain_gpt2", 24),
    "causal_chunked": lambda out, world: equal(out, world, "plain_gpt2", 24, chunked_logits=True),
    "masked": lambda out, world: equal(out, world, "plain_bert_mlm", 24),
    "generated": lambda out, world: evaluated(out, world),
    "generated_by_threes": lambda out, world: evaluated(out, world, batch_size=3),
    "generated_smoothed": lambda out, world: evaluated(out, world, **SMOOTHING),
    "not_generated": lambda out, world: evaluated(out, world, generate=False),
    "not_generated_smoothed": lambda out, world: evaluated(out, world, generate=False, **SMOOTHING),
    "generated_by_stock": lambda out, world: evaluated(out, world, trainer=Seq2SeqTrainer),
}


def of_four(checkpoints):
    """What four processes do: some of the above, and go on from the checkpoints of two."""
    names = ["history", "snapshot", "ema", "rank", "accumulation", "tokens", "dropped_ends", "heads_history"]
    resumed = {
        name: partial(with_processes_changed, name, resume=f"{checkpoints}/{name}/checkpoint-6") for name in CHANGED
    }
    return {name: SCENARIOS[name] for name in names} | resumed


def main(scenarios, out):
    """Run scenarios; the first process writes what came out."""
    import torch.distributed as dist
    from accelerate import PartialState

    rank, world = PartialState(cpu=True).process_index, PartialState().num_processes
    results = {name: run(Path(out) / name, world) for name, run in scenarios.items()}
    if rank == 0:
        torch.save(results, Path(out) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    out, *checkpoints = sys.argv[1:]
    if checkpoints:
        fork(4, lambda: main(of_four(*checkpoints), out))
    else:
        main(SCENARIOS, out)
