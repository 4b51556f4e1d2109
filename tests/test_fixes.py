"""Faults of the stock Trainer: ours is right; a canary in the stock Trainer's name reports when upstream is, too."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from canaries import canary
from helpers import (
    Stream,
    add_noise,
    collate,
    difference,
    logged,
    make_model,
    make_samples,
    state_of,
    train,
)
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import PushInProgress

from hf_selfkd import SelfKDTrainer
from hf_selfkd.fixes import (
    EpochLengthGroupedSampler,
    load_renamed_weights,
    pushed_folder,
    stream_position,
    written_on_each_node,
)


pytestmark = pytest.mark.trains


def resumed_difference(folder, trainer, name, samples, step, **options):
    """How far a resumed run (with other initial weights) ends from the run that was not interrupted."""
    options |= {"trainer": trainer, "save_strategy": "steps", "save_steps": step}
    options |= {"alpha": 0.0} if trainer is SelfKDTrainer else {}
    whole = train(folder / "whole", name, samples, **options)
    resumed = train(
        folder / "resumed", make_model(name, seed=1), samples, resume=folder / f"whole/checkpoint-{step}", **options
    )
    return difference(whole, resumed)


# Weights under their old names: transformers#48805

RENAMED = ("transformers#48805 (PR #48822)", "load_renamed_weights (fixes.py)")


def test_resume_restores_renamed_weights(tmp_path):
    assert resumed_difference(tmp_path, SelfKDTrainer, "vit", make_samples("vit"), step=8) == 0


@canary(*RENAMED)
def test_upstream_still_loses_renamed_weights_on_resume(tmp_path):
    return resumed_difference(tmp_path, Trainer, "vit", make_samples("vit"), step=8) == 0


def test_a_resnet_would_not_show_it(tmp_path):
    assert resumed_difference(tmp_path, Trainer, "resnet", make_samples("resnet"), step=8) == 0


def best_model_difference(folder, trainer, **options):
    """How far the model at the end is from the best checkpoint, which is the first."""
    count = []

    def worse_every_time(prediction):
        count.append(1)
        return {"quality": -len(count)}

    samples = make_samples("vit")
    ended = train(
        folder,
        "vit",
        samples,
        trainer=trainer,
        eval_dataset=samples,
        compute_metrics=worse_every_time,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        **options,
    )
    assert Path(ended.state.best_model_checkpoint).name == "checkpoint-6"
    return difference(ended.model, type(ended.model).from_pretrained(folder / "checkpoint-6"))


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_best_model_has_the_renamed_weights_of_the_best_checkpoint(tmp_path, alpha):
    assert best_model_difference(tmp_path, SelfKDTrainer, alpha=alpha) == 0


@canary(*RENAMED)
def test_upstream_still_mixes_the_best_model_with_the_last(tmp_path):
    return best_model_difference(tmp_path, Trainer) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "timm", "bert", "wav2vec2"])
def test_load_renamed_weights_restores_every_bit(tmp_path, name, dtype):
    saved, other = make_model(name).to(dtype), make_model(name, seed=1).to(dtype)
    saved.save_pretrained(tmp_path)
    assert difference(saved, other) > 0
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)  # as the Trainer does before
    load_renamed_weights(other, tmp_path)
    assert difference(saved, other) == 0


def test_load_renamed_weights_keeps_precision_of_mixed_types(tmp_path):
    saved, other = make_model("vit").bfloat16(), make_model("vit", seed=1).bfloat16()
    for model in (saved, other):
        model.classifier.float()
    torch.nn.init.normal_(saved.classifier.weight)  # values that bfloat16 would round
    saved.save_pretrained(tmp_path)
    config = other.config.to_dict()
    load_renamed_weights(other, tmp_path)
    assert difference(saved, other) == 0
    assert other.config.to_dict() == config


def test_load_renamed_weights_of_several_files(tmp_path):
    saved, other = make_model("vit"), make_model("vit", seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_renamed_weights(other, tmp_path)
    assert difference(saved, other) == 0


def test_resume_of_a_model_that_from_pretrained_cannot_make(tmp_path):
    class ScaledForImageClassification(type(make_model("resnet"))):
        def __init__(self, config, scale):  # a second parameter
            super().__init__(config)
            self.scale = scale

    def make(seed):
        set_seed(seed)
        return ScaledForImageClassification(make_model("resnet").config, 2.0)

    samples, options = make_samples("resnet"), {"save_strategy": "steps", "save_steps": 8}
    whole = train(tmp_path, make(0), samples, **options)
    assert difference(whole, train(tmp_path, make(1), samples, resume=8, **options)) == 0


def test_load_renamed_weights_draws_no_random_numbers_that_matter(tmp_path):
    make_model("vit").save_pretrained(tmp_path)
    model = make_model("vit", seed=1)
    before = torch.get_rng_state()
    load_renamed_weights(model, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_load_renamed_weights_leaves_other_modules_alone(tmp_path):
    module = torch.nn.Linear(2, 2)
    before = state_of(module)
    load_renamed_weights(module, tmp_path)
    assert difference(before, module) == 0


# Loss inflated by accumulation: transformers#47688


def first_loss_by_accumulation(folder, name, **options):
    """The loss of the first optimizer step over the same 16 samples, as 16 x 1 and as 4 x 4."""
    samples, losses, norms = make_samples(name, size=16), [], []
    for batch, accumulation in ((16, 1), (4, 4)):
        ran = train(
            folder,
            name,
            samples,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
            num_train_epochs=1,
            **options,
        )
        losses += logged(ran, "loss")
        norms += logged(ran, "grad_norm")
    return losses, norms


@pytest.mark.parametrize("name", ["resnet", "plain_bert", "plain_bert_tokens", "plain_vit"])
def test_loss_does_not_depend_on_accumulation(tmp_path, name):
    losses, norms = first_loss_by_accumulation(tmp_path, name, alpha=0.0)
    if name == "resnet":  # statistics of batches of 4 are not those of 16, but the loss stays one loss
        assert losses[1] == pytest.approx(losses[0], rel=0.3)
    else:
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("name", ["resnet", "plain_bert", "plain_bert_tokens"])
@canary("transformers#47688", "nothing, but the guide's list of corrections names it")
def test_upstream_still_inflates_the_loss_by_accumulation(tmp_path, name):
    losses, _ = first_loss_by_accumulation(tmp_path, name, trainer=Trainer)
    return losses[1] < 2 * losses[0]


# Order by length after a resume


class Seen:
    """Notes the first word of each sample of each step; every sample has its own."""

    def compute_loss(self, model, inputs, *arguments, **keywords):
        self.__dict__.setdefault("seen", []).append((self.state.global_step, inputs["input_ids"][:, 0].tolist()))
        return super().compute_loss(model, inputs, *arguments, **keywords)


class StockSeen(Seen, Trainer):
    pass


class OurSeen(Seen, SelfKDTrainer):
    pass


def seen_after_resume(folder, trainer, step=8):
    samples = make_samples("bert")
    for n, item in enumerate(samples.items):
        item["input_ids"][0] = 3 + n
    options = {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": step}
    whole = train(folder / "whole", "bert", samples, trainer=trainer, **options)
    resumed = train(
        folder / "resumed", "bert", samples, trainer=trainer, resume=folder / f"whole/checkpoint-{step}", **options
    )
    return [visit for visit in whole.seen if visit[0] >= step], resumed.seen


def test_group_by_length_visits_the_same_samples_after_a_resume(tmp_path):
    whole, resumed = seen_after_resume(tmp_path, OurSeen)
    assert whole == resumed
    last_epoch = sorted(word for step, words in resumed if step >= 12 for word in words)
    assert last_epoch == list(range(3, 25))


@canary("the order of group_by_length on resume", "EpochLengthGroupedSampler (fixes.py)")
def test_upstream_still_visits_other_samples_after_a_resume_by_length(tmp_path):
    whole, resumed = seen_after_resume(tmp_path, StockSeen)
    return whole == resumed


def test_length_sampler_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = EpochLengthGroupedSampler(4, lengths=[3 + n % 7 for n in range(30)], seed=seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # of no consequence
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(30))
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


# Random augmentation after a resume: accelerate#4191


def test_random_augmentation_resumes_with_seeded_transforms(tmp_path):
    samples = make_samples("resnet", transform=add_noise)
    assert resumed_difference(tmp_path, SelfKDTrainer, "resnet", samples, step=8, seed_transforms=True) == 0


@canary("accelerate#4191", "nothing: seed_transforms stays useful for workers, but the guide names the issue")
def test_upstream_still_loses_the_random_numbers_of_prefetched_batches(tmp_path):
    samples = make_samples("resnet", transform=add_noise)
    return resumed_difference(tmp_path, Trainer, "resnet", samples, step=8) == 0


# A dataset without length after a resume: transformers#26413


@pytest.mark.parametrize("trainer", [SelfKDTrainer, Trainer])
def test_stream_resumes_within_its_first_pass(tmp_path, trainer):
    stream = Stream(make_samples("resnet"))
    options = {"max_steps": 15, "alpha_schedule": "linear_step"} if trainer is SelfKDTrainer else {"max_steps": 15}
    assert resumed_difference(tmp_path, trainer, "resnet", stream, step=4, **options) == 0


def test_stream_resumes_within_its_second_pass(tmp_path):
    stream, options = Stream(make_samples("resnet")), {"max_steps": 15, "alpha_schedule": "linear_step"}
    assert resumed_difference(tmp_path, SelfKDTrainer, "resnet", stream, step=8, **options) == 0
    assert stream_position(tmp_path / "whole/checkpoint-8", 1) == (1, 2)


@canary("transformers#26413 (PR #33544)", "stream_position (fixes.py)")
def test_upstream_still_skips_too_much_of_a_stream(tmp_path):
    return resumed_difference(tmp_path, Trainer, "resnet", Stream(make_samples("resnet")), step=8, max_steps=15) == 0


# The order of predictions


def predicted_labels(folder, trainer):
    """The labels of `predict`, whose data are of different lengths, in the order in which they come back."""
    options = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 1, "processing_class": Words()}
    options |= {"alpha": 0.0} if trainer is SelfKDTrainer else {}
    made = train(folder, "bert", make_samples("bert"), trainer=trainer, **options)
    return made.predict(make_samples("bert", 21, seed=1)).label_ids.tolist()


class Words:
    """All that grouping by length asks of a tokenizer."""

    model_input_names = ["input_ids"]

    def save_pretrained(self, folder):
        pass


def test_predictions_come_in_the_order_of_the_dataset(tmp_path):
    expected = [sample["labels"] for sample in make_samples("bert", 21, seed=1).items]
    assert predicted_labels(tmp_path, SelfKDTrainer) == expected


@canary("the order of predict with group_by_length (transformers#48025)", "SelfKDMixin._get_eval_sampler")
def test_predictions_of_the_stock_trainer_come_in_another_order(tmp_path):
    expected = [sample["labels"] for sample in make_samples("bert", 21, seed=1).items]
    return predicted_labels(tmp_path, Trainer) == expected


# Tokens that a causal language model is said to predict


def without_first_label(items):
    """The same task: no position predicts the first word."""
    batch = collate(items)
    batch["labels"][:, 0] = -100
    return batch


def first_label_matters(folder, name, trainer):
    """How far the label that nothing predicts changes a training, which it should not."""
    samples, options = make_samples(name), {"alpha": 0.0} if trainer is SelfKDTrainer else {}
    whole = train(folder, name, samples, trainer=trainer, **options)
    cut = train(folder, name, samples, trainer=trainer, data_collator=without_first_label, **options)
    assert logged(cut, "loss")[0] > 1
    return difference(whole, cut)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_label_that_nothing_predicts_is_not_counted(tmp_path, name):
    assert first_label_matters(tmp_path, name, SelfKDTrainer) == 0


def test_upstream_counts_right_for_llama(tmp_path):
    assert first_label_matters(tmp_path, "llama", Trainer) == 0


@canary("the count of labels for GPT2LMHeadModel", "nothing, but the guide's list of corrections names it")
def test_upstream_still_counts_the_first_label_of_gpt2(tmp_path):
    """The loss is divided by too many: `LOSS_MAPPING` has no key for the class, and `loss_type` is None."""
    return first_label_matters(tmp_path, "gpt2", Trainer) == 0


# Weights on every machine


def saved_weights(folder, monkeypatch, model, saves=True):
    """Whether the first process of the second machine writes weights, which `Trainer` lets it do."""
    mixin = pytest.importorskip("transformers.distributed.mixin")
    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 8)
    model.save_pretrained(folder, is_main_process=saves)
    return (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(("on_each_node", "saves"), [(True, True), (True, False), (False, True)])
def test_weights_are_written_on_each_machine(tmp_path, monkeypatch, on_each_node, saves):
    model = make_model("vit")
    args = SimpleNamespace(save_on_each_node=on_each_node, should_save=saves)
    with written_on_each_node(model, args):
        assert saved_weights(tmp_path, monkeypatch, model, saves) is (on_each_node and saves)
    assert not saved_weights(tmp_path / "after", monkeypatch, model)


@canary("save_on_each_node writes no weights on other machines", "written_on_each_node (fixes.py)")
def test_upstream_still_writes_weights_on_the_first_machine_only(tmp_path, monkeypatch):
    return saved_weights(tmp_path, monkeypatch, make_model("vit"))


# The copy for the Hub


class Pushing:
    """What `pushed_folder` asks of a trainer."""

    def __init__(self, output_dir, strategy="checkpoint", jobs=(), zero=True):
        self.args = TrainingArguments(str(output_dir), hub_strategy=strategy, report_to="none")
        self.push_in_progress = PushInProgress(list(jobs)) if jobs else None
        self.is_world_process_zero = lambda: zero

    def upload(self, *jobs):
        before = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress([*before, *jobs])


def make_checkpoint(folder):
    checkpoint = folder / "checkpoint-3"
    for name in ("model.bin", "_selfkd/teacher.bin", "nested/kept.bin"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(name)
    return checkpoint


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.bin"))


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_the_hub_sees_a_checkpoint_without_what_is_private(tmp_path, strategy):
    """Until the folder itself, the last job, is uploaded; again, over what an older upload left behind."""
    checkpoint = make_checkpoint(tmp_path)
    for _ in range(2):
        model_job, folder_job, trainer = Future(), Future(), Pushing(tmp_path, strategy)
        with pushed_folder(trainer, checkpoint, "_selfkd") as seen:
            copy = Path(seen)
            assert copy != checkpoint and copy.name == checkpoint.name
            assert files_in(copy) == ["model.bin", "nested/kept.bin"]
            assert (copy / "model.bin").read_text() == "model.bin"
            trainer.upload(model_job, folder_job)
        model_job.set_result(None)
        assert files_in(copy) == ["model.bin", "nested/kept.bin"]
        (copy / "older.bin").write_text("of an upload that was cut short")
    folder_job.set_result(None)
    assert not copy.exists() and list(tmp_path.iterdir()) == [checkpoint]
    assert files_in(checkpoint) == ["_selfkd/teacher.bin", "model.bin", "nested/kept.bin"]


def test_an_upload_under_way_does_not_hold_the_copy_of_the_next(tmp_path):
    """Each copy goes with its own job; what holds them goes with the last."""
    checkpoint, older, newer = make_checkpoint(tmp_path), Future(), Future()
    (tmp_path / "_hub/checkpoint-2").mkdir(parents=True)
    trainer = Pushing(tmp_path, jobs=[older])
    with pushed_folder(trainer, checkpoint, "_selfkd") as copy:
        trainer.upload(newer)
    older.set_result(None)
    assert Path(copy).is_dir()
    newer.set_result(None)
    assert not Path(copy).exists() and (tmp_path / "_hub/checkpoint-2").is_dir()


def test_a_copy_that_nothing_uploads_is_gone_at_once(tmp_path):
    """The Trainer skips a push while another is under way; one that fails raises an error."""
    checkpoint = make_checkpoint(tmp_path)
    with pushed_folder(Pushing(tmp_path, jobs=[Future()]), checkpoint, "_selfkd") as copy:
        assert Path(copy).is_dir()
    assert list(tmp_path.iterdir()) == [checkpoint]
    with pytest.raises(OSError, match="no network"), pushed_folder(Pushing(tmp_path), checkpoint, "_selfkd"):
        raise OSError("no network")
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    ("strategy", "private", "zero"),
    [("every_save", "_selfkd", True), ("end", "_selfkd", True), ("checkpoint", "none", True)]
    + [("checkpoint", "_selfkd", False)],
)
def test_no_copy_where_no_folder_is_uploaded(tmp_path, strategy, private, zero):
    """Or nothing in it is private, or another process uploads."""
    checkpoint = make_checkpoint(tmp_path)
    with pushed_folder(Pushing(tmp_path, strategy, zero=zero), checkpoint, private) as seen:
        assert Path(seen) == checkpoint
    assert list(tmp_path.iterdir()) == [checkpoint]


# Tied weights


def test_tied_weights_that_are_saved_under_another_name_do_not_load_the_model_again(tmp_path, monkeypatch):
    """The checkpoint holds one of two names of the same weight; every other name is in the file."""
    saved, other = make_model("plain_gpt2"), make_model("plain_gpt2", seed=1)
    saved.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors").keys()
    assert "lm_head.weight" not in held and "lm_head.weight" in other.state_dict()
    calls, load = [], type(other).from_pretrained
    monkeypatch.setattr(type(other), "from_pretrained", lambda *a, **k: calls.append(a) or load(*a, **k))
    before = state_of(other)
    load_renamed_weights(other, tmp_path)
    assert not calls and difference(before, other) == 0
    untied = make_model("plain_gpt2", seed=1)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())  # of a weight that is nowhere else
    load_renamed_weights(untied, tmp_path)
    assert len(calls) == 1
