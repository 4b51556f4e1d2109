"""What a training is doing, told through a pipe; and work on files that takes long enough to be interrupted."""

import io
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import transformers.modeling_utils
import transformers.trainer
import transformers.trainer_utils

import hf_selfkd.files
import hf_selfkd.history.predictions
from hf_selfkd import SelfKDTrainer
from hf_selfkd.teachers.history import HistoryTeacher
from hf_selfkd.teachers.weights import EMATeacher, SnapshotTeacher


PHASES = ("resume", "step", "end of an epoch", "checkpoint", "rotation", "final model", "upload")
PIECES = 3  # of a file that is written slowly


class Marks:
    """Tells the parent where this process is: one byte at the beginning and at the end of a phase."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __call__(self, phase, begins):
        os.write(self.pipe, bytes([2 * PHASES.index(phase) + begins]))

    def around(self, phase, function):
        """The function, as a phase."""

        def marked(*arguments, **named):
            self(phase, True)
            result = function(*arguments, **named)
            self(phase, False)
            return result

        return marked


def watch(mark, pause):
    """Make this process tell its phases, and write and delete with pauses (in seconds); gives a trainer class."""

    class Watched(SelfKDTrainer):
        training_step = mark.around("step", SelfKDTrainer.training_step)
        _save_checkpoint = mark.around("checkpoint", SelfKDTrainer._save_checkpoint)

    hf_selfkd.history.predictions.exchange_rows = _between_pauses(hf_selfkd.history.predictions.exchange_rows, pause)
    SnapshotTeacher._copy = _between_pauses(SnapshotTeacher._copy, pause)
    for teacher in (HistoryTeacher, SnapshotTeacher, EMATeacher):
        teacher.begin_epoch = mark.around("end of an epoch", teacher.begin_epoch)
    rotate = mark.around("rotation", transformers.trainer_utils.rotate_checkpoints)
    transformers.trainer.rotate_checkpoints = rotate
    api = huggingface_hub.HfApi
    api.create_commit = mark.around("upload", api.create_commit)  # in a thread of its own, beside the next steps
    _write_slowly(pause)
    _delete_slowly(pause)
    return Watched


def _between_pauses(function, pause):
    def slow(*arguments, **named):
        time.sleep(5 * pause)
        result = function(*arguments, **named)
        time.sleep(5 * pause)
        return result

    return slow


def _write_slowly(pause):
    save = torch.save

    def write(path, content):
        size = -(-len(content) // PIECES) or 1
        with open(path, "wb") as file:
            for start in range(0, len(content), size):
                file.write(content[start : start + size])
                file.flush()
                time.sleep(pause)

    def save_slowly(value, path, *arguments, **named):
        buffer = io.BytesIO()
        save(value, buffer, *arguments, **named)
        write(path, buffer.getvalue())

    def save_file_slowly(tensors, path, metadata=None):
        write(path, safetensors.torch.save(tensors, metadata=metadata))

    torch.save = save_slowly
    hf_selfkd.files.save_file = save_file_slowly
    transformers.modeling_utils.safe_save_file = save_file_slowly
    Path.write_text = lambda path, text, encoding=None: write(path, text.encode())
    transformers.trainer.TrainerState.save_to_json = _state_written_by(write)


def _state_written_by(write):
    original = transformers.trainer.TrainerState.save_to_json

    def save_to_json(state, path):
        original(state, path + ".whole")
        content = Path(path + ".whole").read_bytes()
        os.unlink(path + ".whole")
        write(path, content)

    return save_to_json


def _delete_slowly(pause):
    remove = shutil.rmtree

    def remove_slowly(folder, ignore_errors=False, onerror=None):
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
            time.sleep(pause)
        remove(folder, ignore_errors)

    shutil.rmtree = remove_slowly
