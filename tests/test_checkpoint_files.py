"""A checkpoint is whole or said not to be: crashes, full disks, files that were changed, files with code in them."""

import errno
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from helpers import logged, make_model, make_samples, make_trainer, refused, same_weights, train
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from hf_selfkd import SelfKDTrainer
from hf_selfkd.checkpoint_files import check_files, forget_list, last_whole_checkpoint, whole_checkpoint, write_list
from hf_selfkd.checkpoints import _being_written
from hf_selfkd.files import save_tensors


pytestmark = pytest.mark.trains


LISTED = ["_selfkd/journal_0.safetensors", "_selfkd/teacher.safetensors", "model.safetensors", "optimizer.pt"]
LISTED += ["rng_state.pth", "scheduler.pt"]
EVERY_FOUR = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "teacher": "history"}
EVERY_FOUR |= {"lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training of 8 steps with checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, "vit", make_samples("vit"), **EVERY_FOUR)
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """A copy of its folder, which a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def resume(folder, at=True, steps=8, **options):
    """Resume a run of `EVERY_FOUR`; gives the trainer and the step at which training began."""
    begun = []

    class Begins(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    options = EVERY_FOUR | {"max_steps": steps} | options
    trainer = make_trainer(folder, make_model("vit", seed=1), make_samples("vit"), callbacks=[Begins()], **options)
    trainer.train(resume_from_checkpoint=at)
    return trainer, begun


# The list


def test_weights_and_states_are_listed(run):
    files = json.loads((run / "checkpoint-8/_selfkd/files.json").read_text())
    assert sorted(files) == LISTED
    assert all((run / "checkpoint-8" / name).stat().st_size == size for name, (size, _) in files.items())
    assert not list(run.rglob("*.partial"))


def test_a_run_of_plain_training_has_a_list_too(tmp_path):
    train(tmp_path, "vit", make_samples("vit"), **(EVERY_FOUR | {"alpha": 0.0, "teacher": "none"}))
    assert "optimizer.pt" in json.loads((tmp_path / "checkpoint-8/_selfkd/files.json").read_text())
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


def test_the_last_whole_checkpoint(tmp_path, caplog):
    """By number and not by name; newer ones without a readable state are named; other names are no checkpoints."""
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    for step, text in ((8, "{}"), (9, "{}"), (10, "{}"), (90, '{"epoch": 1.0, "glo'), (100, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-1000").write_text("no folder")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2 and "checkpoint-100 " in named[0] and "checkpoint-90 " in named[1]
    assert whole_checkpoint(tmp_path, at_most=9) == 9 and whole_checkpoint(tmp_path, at_most=7) == -1
    for step in (8, 9, 10):
        (tmp_path / f"checkpoint-{step}/trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", [*LISTED, "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_checkpoint_that_lacks_a_file_is_passed_over(copied, name, damage, caplog):
    """As one that was half deleted, or of which another process had not written its part."""
    path = copied / "checkpoint-8" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    assert last_whole_checkpoint(copied) == str(copied / "checkpoint-4")
    assert any("checkpoint-8 was not written" in record.getMessage() for record in caplog.records)
    refused(lambda: check_files(copied / "checkpoint-8"), "checkpoint-8 is not whole", name, "newest whole one")
    check_files(copied / "checkpoint-4")


def test_training_goes_on_from_the_newest_whole_checkpoint(run, copied):
    """And ends where a run ends that was not disturbed; asked for by name the other one is refused."""
    whole, _ = resume(Path(shutil.copytree(run, copied.parent / "whole")), steps=12)
    (copied / "checkpoint-8/optimizer.pt").write_bytes(b"")
    refused(lambda: resume(copied, str(copied / "checkpoint-8")), "optimizer.pt is missing or cut")
    trainer, begun = resume(copied, steps=12)
    assert begun == [4] and same_weights(trainer.model, whole.model)
    assert logged(trainer, "loss") == logged(whole, "loss")
    assert last_whole_checkpoint(copied) == str(copied / "checkpoint-12")
    check_files(copied / "checkpoint-8")  # which was written again


@pytest.mark.parametrize("trainer", [SelfKDTrainer, Trainer])
def test_a_run_that_is_over_trains_no_step_more(tmp_path, trainer):
    """One that was killed while it saved the model that it had trained; the stock class is the control."""
    options = {key: value for key, value in EVERY_FOUR.items() if key != "teacher" or trainer is SelfKDTrainer}
    whole = train(tmp_path, "vit", make_samples("vit"), trainer=trainer, **options)
    again = train(tmp_path, "vit", make_samples("vit"), trainer=trainer, resume=8, **options)
    same = again.state.global_step == 8 and same_weights(whole.model, again.model)
    assert same == (trainer is SelfKDTrainer)
    if same:
        assert torch.equal(whole.teacher.stored(range(22)), again.teacher.stored(range(22)))


def test_no_whole_checkpoint_is_an_error_before_training(copied):
    shutil.rmtree(copied / "checkpoint-4")
    (copied / "checkpoint-8/trainer_state.json").unlink()
    refused(lambda: resume(copied), "resume_from_checkpoint=True", str(copied), "no whole checkpoint")


def test_a_checkpoint_that_is_written_again_is_not_whole_until_it_is(copied, monkeypatch):
    """The state of the old one must not vouch for the files of the new one."""

    def killed(self, output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        resume(copied, str(copied / "checkpoint-4"))
    assert (copied / "checkpoint-8/optimizer.pt").is_file()
    assert last_whole_checkpoint(copied) == str(copied / "checkpoint-4")


def test_machines_with_folders_of_their_own_agree(copied, monkeypatch):
    """Each has what it could write before the crash: the newest that all have is taken."""
    trainer = make_trainer(copied, "vit", make_samples("vit"), **EVERY_FOUR)
    asked = []

    def gather(steps):
        asked.append(steps.tolist())
        return torch.tensor([*asked[-1], 4])  # the other one has no more

    monkeypatch.setattr(trainer, "_gather", gather)
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    assert trainer._last_whole_checkpoint() == str(copied / "checkpoint-4") and asked == [[8], [4]]


def test_a_half_deleted_list_is_no_crash(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"state")
    write_list(folder)
    (folder / "trainer_state.json").write_text("{}")
    check_files(folder)
    for text in ("", "[1, 2]", '{"optimizer.pt": 3}', '{"optimizer.pt": [5'):
        (folder / "_selfkd/files.json").write_text(text)
        refused(lambda: check_files(folder), "files.json")
        assert last_whole_checkpoint(tmp_path) is None
    forget_list(folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["_selfkd", "optimizer.pt"]
    forget_list(tmp_path / "nowhere")


# Files that were changed


@pytest.mark.parametrize("name", LISTED)
def test_a_flipped_bit_is_an_error_that_names_the_file(copied, name):
    path = copied / "checkpoint-8" / name
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(bytes(content))
    refused(lambda: resume(copied), str(path), "resume from another checkpoint")
    assert resume(copied, str(copied / "checkpoint-4"))[1] == [4]


def test_a_damaged_best_model_is_not_loaded_at_the_end(tmp_path):
    def damage(trainer):
        path = Path(trainer.state.best_model_checkpoint) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))

    class Damages(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                damage(made)

    options = EVERY_FOUR | {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    made = make_trainer(
        tmp_path, "vit", make_samples("vit"), eval_dataset=make_samples("vit"), callbacks=[Damages()], **options
    )
    refused(made.train, "model.safetensors", "corrupted")


def test_a_file_that_the_user_changed_on_purpose_is_taken_without_the_list(copied):
    state = torch.load(copied / "checkpoint-8/optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        group["weight_decay"] = 0.25
    torch.save(state, copied / "checkpoint-8/optimizer.pt")
    message = refused(lambda: resume(copied), "optimizer.pt", "files.json")
    (copied / "checkpoint-8/_selfkd/files.json").unlink()
    assert "remove" in message or "not whole" in message
    trainer, begun = resume(copied, steps=9)
    assert begun == [8] and trainer.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_files_that_nothing_reads_may_be_edited(copied):
    for name in ("config.json", "training_args.bin"):
        with open(copied / "checkpoint-8" / name, "ab") as file:
            file.write(b"\n")
    (copied / "checkpoint-8/notes.txt").write_text("mine")
    assert resume(copied)[1] == [8]


# Disks that are full or take nothing


@pytest.fixture
def small_files():
    """No file may grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def largest_below(folder, name):
    """A limit under which files smaller than `name` fit, and `name` does not."""
    size = (folder / name).stat().st_size
    smaller = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_size < size]
    return max([*smaller, size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_an_error_that_names_the_file(copied, small_files, name):
    """Not before training: while it writes a checkpoint. The one before is as it was, and training goes on from it."""
    before = {path: path.read_bytes() for path in (copied / "checkpoint-4").rglob("*") if path.is_file()}
    shutil.rmtree(copied / "checkpoint-8")
    limit = largest_below(copied / "checkpoint-4", name)

    class Fills(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                small_files(limit)

    options = EVERY_FOUR | {"save_total_limit": 1}
    trainer = make_trainer(copied, "vit", make_samples("vit"), callbacks=[Fills()], **options)
    with pytest.raises(OSError) as caught:
        trainer.train(resume_from_checkpoint=True)
    small_files(resource.RLIM_INFINITY)
    message = str(caught.value)
    assert (
        "\n" not in message
        and f"checkpoint-8/{'*' + Path(name).suffix if 'model' in name else name}" in message
        and "Make room" in message
    )
    assert before == {path: path.read_bytes() for path in (copied / "checkpoint-4").rglob("*") if path.is_file()}
    assert resume(copied)[1] == [4] and last_whole_checkpoint(copied) == str(copied / "checkpoint-8")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_the_file_a_full_disk_cut_is_named_where_the_clock_is_too_coarse(tmp_path, name):
    """Files written within one tick of the file system's clock, some milliseconds, have the same time."""
    for other in ("training_args.bin", "scheduler.pt", "a.pt", "z.pt"):
        torch.save({"a": torch.zeros(9)}, tmp_path / other)
    (tmp_path / name).write_bytes((tmp_path / "a.pt").read_bytes()[:-30])
    for path in tmp_path.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    assert _being_written(tmp_path, RuntimeError("PytorchStreamWriter failed writing file")) == tmp_path / name


@pytest.mark.parametrize("name", ["teacher", "journal_0"])
def test_a_disk_that_fills_while_the_state_of_the_teacher_is_written(copied, monkeypatch, name):
    def full(tensors, path, metadata):
        if f"{name}.safetensors" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save_file(tensors, path, metadata=metadata)

    shutil.rmtree(copied / "checkpoint-8")
    monkeypatch.setattr("hf_selfkd.files.save_file", full)
    with pytest.raises(OSError, match=rf"checkpoint-8/_selfkd/{name}.*No space left.*earlier checkpoints"):
        resume(copied)
    monkeypatch.undo()
    assert resume(copied)[1] == [4]


def test_a_folder_that_takes_no_files(copied, monkeypatch):
    """Read-only since the run began: rights do not stop a superuser, so the system's answer is given here."""
    shutil.rmtree(copied / "checkpoint-8")
    makedirs = os.makedirs

    def refuse(path, *arguments, **named):
        if "checkpoint-8" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return makedirs(path, *arguments, **named)

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(OSError, match="Read-only file system.*checkpoint-8 is not whole.*output_dir"):
        resume(copied)
    monkeypatch.undo()
    assert last_whole_checkpoint(copied) == str(copied / "checkpoint-4")


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is read-only for a superuser")
def test_a_read_only_folder(copied):
    shutil.rmtree(copied / "checkpoint-8")
    copied.chmod(0o500)
    try:
        with pytest.raises(OSError, match="Permission denied.*output_dir"):
            resume(copied)
    finally:
        copied.chmod(0o700)


def test_tensors_that_cannot_be_written_name_their_file(tmp_path, small_files):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(4)}, {})
    before = path.read_bytes()
    small_files(100)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written.*make room"):
        save_tensors(path, {"x": torch.ones(400)}, {})
    small_files(resource.RLIM_INFINITY)
    assert path.read_bytes() == before


def test_errors_that_are_none_of_the_disk_stay_what_they_are(copied, monkeypatch):
    """A training that another error ends, and an upload that fails after the checkpoint is whole."""
    shutil.rmtree(copied / "checkpoint-8")
    for error, method in ((RuntimeError("CUDA out of memory."), "_save_scaler"), (OSError("offline"), "after")):

        def fails(self, *arguments, error=error):
            raise error

        class After(SelfKDTrainer):
            _save_scaler = fails if method == "_save_scaler" else SelfKDTrainer._save_scaler

            def _push_from_checkpoint(self, folder):
                raise OSError("offline")

        made = make_trainer(copied, "vit", make_samples("vit"), trainer=After, **EVERY_FOUR)
        made.args.push_to_hub = method == "after"
        with pytest.raises(type(error)) as caught:
            made.train(resume_from_checkpoint=str(copied / "checkpoint-4"))
        assert str(caught.value) == str(error)


# Files with code in them


class Code:
    """What a pickle does when it is read without care: it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_the_code_of_a_pickle_runs_where_nobody_takes_care(tmp_path):
    """The control of the test below."""
    torch.save({"x": Code(tmp_path / "ran")}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    "pickled", [pickle.dump, lambda value, file: torch.save(value, file)], ids=["pickle", "torch"]
)
@pytest.mark.parametrize("name", [*LISTED, "training_args.bin", "_selfkd/files.json", "trainer_state.json"])
def test_code_in_a_file_of_a_checkpoint_does_not_run(copied, name, pickled):
    """Whoever may write the file may write its list, too, or leave that out."""
    folder, ran = copied / "checkpoint-8", copied / "ran"
    for with_list in (True, False):
        with open(folder / name, "wb") as file:
            pickled({"state": Code(ran), "param_groups": [], "python": Code(ran)}, file)
        if with_list and name != "_selfkd/files.json":
            write_list(folder)
        elif name != "_selfkd/files.json":
            (folder / "_selfkd/files.json").unlink()
        if name == "training_args.bin":
            assert resume(copied, str(folder), steps=9)[1] == [8]  # which nothing reads
        else:
            with pytest.raises(Exception):  # noqa: B017, of torch, safetensors or json
                resume(copied, str(folder), steps=9)
        assert not ran.exists()


@pytest.mark.parametrize("name", ["auxiliary_heads.safetensors", "auxiliary_heads_config.json"])
def test_code_in_saved_heads_does_not_run(tmp_path, name):
    from hf_selfkd import load_auxiliary_heads

    train(tmp_path, "vit", make_samples("vit"), auxiliary_heads="byot", save_heads=True).save_model()
    found = [path for path in tmp_path.rglob(name) if "checkpoint" not in str(path)]
    assert found
    for path in found:
        path.write_bytes(pickle.dumps(Code(tmp_path / "ran")))
        with pytest.raises(Exception):  # noqa: B017
            load_auxiliary_heads(make_model("vit"), path.parent)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["rows.npz", "rows.npy", "rows.safetensors"])
def test_code_in_a_file_of_predictions_does_not_run(tmp_path, name):
    import numpy as np

    path, ran = tmp_path / name, tmp_path / "ran"
    values = np.array([Code(ran)], dtype=object)
    if name.endswith(".npz"):
        np.savez(path, predictions=values, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(values))
    with pytest.raises(Exception):  # noqa: B017
        train(tmp_path, "vit", make_samples("vit"), teacher="predictions", teacher_predictions=str(path))
    assert not ran.exists()
