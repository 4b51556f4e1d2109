"""A resumed run is the uninterrupted one, bit for bit; what cannot be resumed is refused."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from helpers import (
    SizedStream,
    Stream,
    add_noise,
    collate,
    difference,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    state_of,
    train,
)
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer, TrainerCallback, set_seed

from hf_selfkd import SelfKDDataCollator
from hf_selfkd.teachers.history import HistoryTeacher
from hf_selfkd.teachers.weights import EMATeacher, SnapshotTeacher


pytestmark = pytest.mark.trains


TEACHERS = {"history": HistoryTeacher, "snapshot": SnapshotTeacher, "ema": EMATeacher}
LOGGED = ("loss", "grad_norm", "learning_rate", "alpha", "hard_loss", "soft_loss", "target_entropy", "past_agreement")


def everything(trainer, after):
    """What must not depend on an interruption at step `after`."""
    teacher = dict(trainer.teacher.states())["teacher"][0]
    if trainer.teacher.kind == "history":
        size, ids = trainer._size_and_ids()
        teacher |= {"stored": trainer.teacher.stored(range(size) if ids is None else ids)}
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "weights and buffers": state_of(trainer),
        "optimizer": {f"{n} {name}": value for n, state in optimizer.items() for name, value in state.items()},
        "teacher": teacher,
        "random numbers": {"cpu": torch.get_rng_state()},
        "log": {name: torch.tensor(logged(trainer, name, after)) for name in LOGGED},
    }


def assert_same(one, other):
    for part in one:
        assert one[part].keys() == other[part].keys()
        changed = [
            n for n, t in one[part].items() if not torch.equal(torch.nan_to_num(t), torch.nan_to_num(other[part][n]))
        ]
        assert not changed, f"{part}: {changed}"


def check_resume(folder, name, samples, steps, resumed_options=None, **options):
    """Resume at each of these steps, with other initial weights, and compare with the run that was not interrupted."""
    whole = train(folder / "whole", name, samples, **options)
    now = {step: everything(whole, after=step) for step in steps}
    for step in steps:
        resumed = train(
            folder / "resumed",
            make_model(name, seed=1),
            samples,
            resume=folder / f"whole/checkpoint-{step}",
            **(options | {"save_strategy": "no"} | (resumed_options or {})),
        )
        assert_same(now[step], everything(resumed, after=step))
    return whole


def saves(every, accumulation=1):
    return {"save_strategy": "steps", "save_steps": every, "gradient_accumulation_steps": accumulation}


@pytest.mark.parametrize(("name", "accumulation"), [("vit", 1), ("vit", 2), ("resnet", 1)])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_resume_is_exact(tmp_path, name, teacher, accumulation):
    every = 4 // accumulation  # within epochs 1, 2 and 3 and at the end of epoch 2
    steps = [every, 2 * every, 3 * every, 4 * every]
    options = saves(every, accumulation) | {"teacher": teacher, "ema_decay": 0.9}
    whole = check_resume(tmp_path, name, make_samples(name), steps, **options)
    assert difference(whole, train(tmp_path, name, make_samples(name), alpha=0.0)) > 1e-4


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", ["vit", "resnet", "bert_tokens"])
def test_resume_from_the_end_of_an_epoch_is_exact(tmp_path, name, teacher):
    check_resume(tmp_path, name, make_samples(name), [6, 12], save_strategy="epoch", teacher=teacher)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_resume_depends_on_the_state_of_the_teacher(tmp_path, teacher, monkeypatch):
    """The control: the comparison of the tests above sees a teacher that was not loaded."""
    monkeypatch.setattr(TEACHERS[teacher], "load", lambda *arguments: None)
    with pytest.raises(AssertionError, match="weights and buffers"):
        check_resume(tmp_path, "vit", make_samples("vit"), [8], **saves(8), teacher=teacher)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit", {"warm_start_teacher": True}),
        ("vit", {"warm_start_teacher": True, "teacher": "snapshot"}),
        ("vit", {"history_device": "disk"}),
        ("bert_tokens", {"history_device": "disk"}),
        ("vit", {"history_device": "cpu"}),
        ("vit", {"history_top_k": 2}),
        ("bert_tokens", {"history_top_k": 3, "history_dtype": "float16"}),
        ("resnet", {"history_dtype": "bfloat16"}),
        ("vit", {"history_trace": True}),
        ("bert", {"train_sampling_strategy": "group_by_length"}),
        ("bert_tokens", {"train_sampling_strategy": "group_by_length"}),
        ("bert_tokens", {"train_sampling_strategy": "group_by_length", "data_seed": 7, "teacher": "snapshot"}),
        ("vit", {"dataloader_drop_last": True}),
        ("resnet", {"alpha_schedule": "linear_step", "temperature": 2.0}),
        ("vit", {"num_train_epochs": 2.5}),
        ("vit", {"max_steps": 16}),
        ("timm", {}),
        ("wav2vec2", {"save_steps": 6}),
        ("vit", {"label_smoothing_factor": 0.1, "alpha": 0.0}),
    ],
    ids=str,
)
def test_resume_with_option_is_exact(tmp_path, name, options):
    options = saves(4) | options
    check_resume(tmp_path, name, make_samples(name), [options["save_steps"], 2 * options["save_steps"]], **options)


@pytest.mark.parametrize("place", ["accelerator", "cpu", "disk"])
def test_resume_with_history_in_another_place_is_exact(tmp_path, place):
    options = saves(4) | {"history_device": "disk" if place != "disk" else "accelerator"}
    check_resume(tmp_path, "vit", make_samples("vit"), [4, 8], {"history_device": place}, **options)


@pytest.mark.parametrize(
    "workers, resumed_workers", [(0, 0), (0, 2), pytest.param(2, 2, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_resume_with_random_augmentation_is_exact(tmp_path, name, workers, resumed_workers):
    check_resume(
        tmp_path,
        name,
        make_samples(name, transform=add_noise),
        [8],
        {"dataloader_num_workers": resumed_workers},
        dataloader_num_workers=workers,
        seed_transforms=True,
        **saves(8),
    )


@pytest.mark.parametrize("teacher", TEACHERS)
def test_resume_with_mixing_and_augmentation_is_exact(tmp_path, teacher):
    probability = 0.5 if teacher == "history" else 1.0
    collator = SelfKDDataCollator(collate, mixup_alpha=1.0, cutmix_alpha=1.0, mix_probability=probability)
    options = saves(4) | {"data_collator": collator, "seed_transforms": True, "teacher": teacher}
    check_resume(tmp_path, "vit", make_samples("vit", transform=add_noise), [4, 8, 12], **options)


def test_resume_with_loss_of_its_own_is_exact(tmp_path):
    def weighted(outputs, labels, num_items_in_batch):
        weight = torch.linspace(0.5, 2.0, 5)
        return torch.nn.functional.cross_entropy(outputs.logits, labels, weight, reduction="sum") / num_items_in_batch

    check_resume(tmp_path, "vit", make_samples("vit"), [4, 8], **saves(4), compute_loss_func=weighted)


@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_resume_of_an_iterable_dataset_is_exact(tmp_path, teacher):
    check_resume(tmp_path, "vit", SizedStream(make_samples("vit")), [4, 8, 12], **saves(4), teacher=teacher)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_resume_of_a_stream_without_length_is_exact(tmp_path, teacher, accumulation):
    """In its first pass, in its second, and at the end of the second."""
    every = 4 // accumulation
    options = saves(every, accumulation) | {"teacher": teacher, "max_steps": 15, "alpha_schedule": "linear_step"}
    whole = check_resume(tmp_path, "vit", Stream(make_samples("vit")), [every, 2 * every, 3 * every], **options)
    assert {0.0, 1.0} == set(logged(whole, "rows_with_history"))


def test_resume_in_the_same_trainer_is_exact(tmp_path):
    trainer = train(tmp_path, "vit", make_samples("vit"), **saves(8))
    before = everything(trainer, after=8)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-8")
    assert_same(before, everything(trainer, after=8))


def test_resume_of_the_last_checkpoint_of_the_folder(tmp_path):
    whole = train(tmp_path, "vit", make_samples("vit"), **saves(8))
    shutil.rmtree(tmp_path / "checkpoint-18")
    resumed = make_trainer(tmp_path, make_model("vit", seed=1), make_samples("vit"))
    resumed.train(resume_from_checkpoint=True)
    assert_same(everything(whole, after=16), everything(resumed, after=16))


def test_resumed_run_may_be_resumed(tmp_path):
    samples, options = make_samples("vit"), saves(4)
    whole = train(tmp_path / "whole", "vit", samples, **options)
    train(tmp_path / "first", "vit", samples, resume=tmp_path / "whole/checkpoint-4", **options)
    second = train(tmp_path / "second", "vit", samples, resume=tmp_path / "first/checkpoint-8", **options)
    assert_same(everything(whole, after=8), everything(second, after=8))


# Refusals


def checkpoint(tmp_path, name="vit", trainer=None, samples=None, **options):
    """The checkpoint of step 8, in the middle of epoch 2."""
    options |= {} if trainer is None else {"trainer": trainer}
    train(tmp_path, name, samples or make_samples(name), max_steps=8, **(saves(8) | options))
    return tmp_path / "checkpoint-8"


def refused_resume(folder, *parts, name="vit", samples=None, at=8, **options):
    """Resume from this checkpoint must be refused before any step."""
    trainer = make_trainer(folder.parent / "refused", name, samples or make_samples(name), **options)
    steps = []

    class Steps(TrainerCallback):
        def on_optimizer_step(self, *arguments, **keywords):
            steps.append(1)

    trainer.add_callback(Steps)
    message = refused(lambda: trainer.train(resume_from_checkpoint=str(folder)), *parts)
    assert not steps
    return message


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("options", [{"trainer": Trainer}, {"save_only_model": True}], ids=str)
def test_checkpoint_without_state_is_refused(tmp_path, teacher, options):
    folder = checkpoint(tmp_path, **options)
    refused_resume(folder, str(folder), f"teacher={teacher!r}", "resume a run of SelfKDTrainer", teacher=teacher)


def test_checkpoint_without_state_resumes_without_teacher(tmp_path):
    plain = train(tmp_path / "plain", "vit", make_samples("vit"), trainer=Trainer, **saves(8))
    ours = train(tmp_path, "vit", make_samples("vit"), resume=tmp_path / "plain/checkpoint-8", alpha=0.0)
    assert difference(plain, ours) == 0


@pytest.mark.parametrize("now", [*TEACHERS, "none"])
@pytest.mark.parametrize("then", [*TEACHERS, "none"])
def test_state_of_another_teacher_is_refused(tmp_path, then, now):
    if then == now:
        return
    folder = checkpoint(tmp_path, teacher=then)
    refused_resume(folder, str(folder), f"teacher={then!r}", f"teacher={now!r}", "same teacher", teacher=now)


def test_state_of_a_dataset_of_another_size_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    refused_resume(folder, "22 samples", "has 23", "same dataset", samples=make_samples("vit", size=23))


def test_state_of_a_dataset_with_other_ids_is_refused(tmp_path):
    samples = make_samples("vit")
    columns = {key: [item[key] for item in samples.items] for key in ("pixel_values", "labels")}
    with_ids = datasets.Dataset.from_dict(columns | {"uid": [3 * n for n in range(22)]}).with_format("torch")
    folder = checkpoint(tmp_path, samples=with_ids, sample_id_column="uid")
    refused_resume(folder, "ids of their own", "row numbers", "sample_id_column", samples=with_ids)
    other = datasets.Dataset.from_dict(columns | {"uid": [3 * n + 1 for n in range(22)]}).with_format("torch")
    refused_resume(folder, "sample_id_column", samples=other, sample_id_column="uid")


def test_shuffled_dataset_is_refused_at_the_first_batch_that_shows_it(tmp_path):
    folder = checkpoint(tmp_path)
    samples = make_samples("vit")
    samples.items = samples.items[1:] + samples.items[:1]
    refused_resume(folder, "holds other inputs", str(folder), "same dataset", samples=samples)
    for item in samples.items:
        item["pixel_values"] = torch.zeros(3, 16, 16)  # which a few samples do not tell apart
    others = make_samples("vit")
    others.items = [item | {"labels": 0} for item in samples.items[:4]] + samples.items[4:]
    folder = checkpoint(tmp_path / "same", samples=others)
    refused_resume(folder, "labels of sample_id=", "shuffled", "sample_id_column", samples=samples)


@pytest.mark.parametrize("field, then, now", [
    ("history_top_k", None, 3),
    ("history_top_k", 2, 3),
    ("history_dtype", "float32", "float16"),
])  # fmt: skip
def test_state_in_another_format_is_refused(tmp_path, field, then, now):
    folder = checkpoint(tmp_path, **{field: then})
    refused_resume(folder, f"{field}={now}", f"has {then}", f"{field}={then}", **{field: now})


def test_state_in_the_same_format_by_another_name_is_taken(tmp_path):
    samples = make_samples("vit")
    check_resume(tmp_path, "vit", samples, [8], {"history_top_k": 5, "history_dtype": "float32"}, **saves(8))


@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_weights_of_another_model_are_refused(tmp_path, teacher):
    folder = checkpoint(tmp_path, teacher=teacher)
    own = tmp_path / "other"
    other = checkpoint(own, name="resnet", teacher=teacher)
    shutil.copy(other / "_selfkd/teacher.safetensors", folder / "_selfkd/teacher.safetensors")
    (folder / "_selfkd/files.json").unlink()
    refused_resume(folder, teacher, "resume with the model that made", teacher=teacher)


def test_history_of_a_model_with_other_classes_is_refused(tmp_path):
    folder, samples = checkpoint(tmp_path), make_samples("vit")
    config = make_model("vit").config
    config.num_labels = 7
    other = type(make_model("vit"))(config)
    other.save_pretrained(folder)
    torch.save(make_trainer(tmp_path, other, samples).create_optimizer().state_dict(), folder / "optimizer.pt")
    (folder / "_selfkd/files.json").unlink()
    refused_resume(folder, "7 classes", "5", "resume with the model that made", name=other, samples=samples)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, empty, lambda path: flip(path, -1)], ids=["cut", "empty", "flipped"])
@pytest.mark.parametrize(
    "teacher, file",
    [
        ("history", "teacher"),
        ("history", "journal_0"),
        ("snapshot", "teacher"),
        ("ema", "teacher"),
    ],
)
def test_damaged_state_is_refused(tmp_path, teacher, file, damage):
    folder = checkpoint(tmp_path, teacher=teacher)
    path = folder / f"_selfkd/{file}.safetensors"
    damage(path)
    refused_resume(folder, str(path), "resume from another checkpoint", teacher=teacher)


def test_damaged_header_of_the_state_is_refused(tmp_path):
    """Every byte of it: a wrong epoch would be as wrong as a wrong row."""
    folder = checkpoint(tmp_path)
    path = folder / "_selfkd/teacher.safetensors"
    trainer = make_trainer(tmp_path / "refused", "vit", make_samples("vit"), max_steps=8)
    intact = path.read_bytes()
    header = intact[8 : 8 + int.from_bytes(intact[:8], "little")]
    where = header.index(b'"epoch":"') + 8 + 9
    flip(path, where)
    refused(lambda: trainer.train(resume_from_checkpoint=str(folder)), str(path), "resume from another checkpoint")


@pytest.mark.parametrize("file", ["teacher", "journal_0"])
def test_missing_file_of_the_state_is_refused(tmp_path, file):
    folder = checkpoint(tmp_path)
    (folder / f"_selfkd/{file}.safetensors").unlink()
    refused_resume(folder, str(folder), "resume")


def test_file_of_another_program_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    shutil.copy(folder / "model.safetensors", folder / "_selfkd/teacher.safetensors")
    refused_resume(folder, "teacher.safetensors", "resume from another checkpoint")


# Starting afresh

SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_training_twice_starts_afresh(tmp_path, teacher):
    samples = make_samples("resnet")
    twice = train(tmp_path, "resnet", samples, teacher=teacher, **SGD)
    model = make_model("resnet")
    model.load_state_dict(twice.model.state_dict())
    set_seed(42)  # as a new trainer does
    twice.train()
    once = train(tmp_path, model, samples, teacher=teacher, **SGD)
    assert_same(everything(once, after=0), everything(twice, after=0))
    assert logged(twice, "rows_with_history") == [0.0] * 6 + [1.0] * 12


@pytest.mark.parametrize("teacher", TEACHERS)
def test_auto_find_batch_size_starts_afresh(tmp_path, teacher):
    states = []

    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 8 and not states:
                states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
                raise RuntimeError("CUDA out of memory.")

    samples, options = make_samples("resnet"), SGD | {"teacher": teacher}
    restarted = train(tmp_path, "resnet", samples, callbacks=[OutOfMemory()], auto_find_batch_size=True, **options)
    assert restarted.state.train_batch_size == 3
    model = make_model("resnet")
    model.load_state_dict(states[0])
    once = train(tmp_path, model, samples, per_device_train_batch_size=3, **options)
    assert_same(everything(once, after=0), everything(restarted, after=0))


# The Hub


class FakeHub:
    """Notes which files an upload would read, when it reads them: at the end, as uploads are asynchronous."""

    def __init__(self):
        self.pending, self.uploaded, self.later = [], {}, []

    def create_repo(self, name, **keywords):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, path_in_repo="", ignore_patterns=None, run_as_future=False, **keywords):
        self.pending.append((folder_path, path_in_repo, ignore_patterns))
        self.later.append(Future())
        if not run_as_future:
            self.read()
        return self.later[-1]

    def read(self):
        for folder, target, ignored in self.pending:
            files = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
            self.uploaded.setdefault(target, set()).update(filter_repo_objects(files, ignore_patterns=ignored))
        self.pending = []
        for future in self.later:
            if not future.done():
                future.set_result(None)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
@pytest.mark.parametrize("place", ["accelerator", "disk"])
def test_stored_predictions_never_reach_the_hub(tmp_path, monkeypatch, strategy, place):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *arguments, **keywords: hub)
    read_later = Trainer._finish_current_push

    def finish(trainer):
        hub.read()
        read_later(trainer)

    monkeypatch.setattr(Trainer, "_finish_current_push", finish)
    options = saves(8) | {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "run"}
    options |= {"hub_always_push": True}
    trainer = train(tmp_path, "vit", make_samples("vit"), history_device=place, **options)
    trainer.push_to_hub()
    hub.read()
    files = {f"{target}/{name}" for target, names in hub.uploaded.items() for name in names}
    assert "/model.safetensors" in files
    assert not any("_selfkd" in name for name in files)
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {f"checkpoint-{n}" for n in (8, 16, 18)}}
    assert hub.uploaded.keys() - {""} == expected.get(strategy, set())
    for target in hub.uploaded.keys() - {""}:
        assert {"optimizer.pt", "model.safetensors", "trainer_state.json"} <= hub.uploaded[target]
    assert (tmp_path / "checkpoint-8/_selfkd/teacher.safetensors").is_file()
    assert not (tmp_path / "_hub").exists()
