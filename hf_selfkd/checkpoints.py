"""The hooks of `Trainer` for checkpoints: what self-distillation saves, loads and keeps off the Hub."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoint_files import STATE_FOLDER, check_files, fault_of, forget_list, whole_checkpoint, write_list
from .distiller import HELD_OUT
from .files import cause_of_writing, load_tensors, save_tensors
from .fixes import forget_copies, load_renamed_weights, pushed_folder, written_on_each_node
from .heads import AuxiliaryHeadsConfig, head_names, heads_of, save_auxiliary_heads
from .models import unwrapped
from .sharded import load_whole_state, whole_state


logger = logging.getLogger(__name__)

HEADS_FILE = "auxiliary_heads.safetensors"  # in that folder of a checkpoint


class Checkpoints:
    """Part of [`~hf_selfkd.SelfKDMixin`]: teachers and heads in checkpoints, bare models everywhere else."""

    # Saving

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """
        As in [`~transformers.Trainer`].

        Raises:
            OSError: if the disk takes no more; the checkpoint before is as it was.
        """
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.args.should_save:
                forget_list(folder)
            super()._save_checkpoint(model, trial)
        except Exception as error:
            cause = cause_of_writing(error)
            if cause is None or fault_of(folder) is None:  # an upload failed, for one
                raise
            raise OSError(
                f"{_being_written(folder, error)} could not be written ({cause}): {folder} is not whole, earlier "
                "checkpoints are as they were. Make room or choose another output_dir, then train with "
                "resume_from_checkpoint=True."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state of the run is written next and says that the checkpoint is whole: also what other processes write.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_list(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not hasattr(self.model, "save_pretrained"):  # which leaves the heads out by itself
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            heads = head_names(self.model)
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in heads}
        with written_on_each_node(unwrapped(self.model), self.args):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._save_readable_args(self.args.output_dir if output_dir is None else output_dir)

    def _save_readable_args(self, folder: str) -> None:
        """
        Write the arguments as an object that can be read where this package is not installed, and without a token of
        the Hub, as the file is uploaded; no other field is lost.
        """
        kind = next(cls for cls in type(self.args).__mro__ if not cls.__module__.startswith(__package__))
        if kind is not type(self.args) or self.args.hub_token is not None:
            plain = copy.copy(self.args)
            plain.__class__, plain.hub_token = kind, None
            torch.save(plain, os.path.join(folder, TRAINING_ARGS_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in [`~transformers.Trainer`]: the bare model. A checkpoint has the heads beside the model."""
        super().save_model(output_dir, _internal_call)
        heads, saves = heads_of(self.model), self.args.should_save
        if heads is None:
            return
        if _internal_call and output_dir is not None and (saves or self.is_fsdp_enabled):
            tensors, config = whole_state(self.model, heads, saves), {"config": json.dumps(heads.config.to_dict())}
            if saves:
                save_tensors(Path(output_dir) / STATE_FOLDER / HEADS_FILE, tensors, config)
        if self.method.save_heads and (saves or self.is_fsdp_enabled):
            folder = self.args.output_dir if output_dir is None else output_dir
            save_auxiliary_heads(self.model, folder, saves)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder, distiller = Path(output_dir) / STATE_FOLDER, self.distiller
        if distiller is None:
            return
        for name, (tensors, metadata) in distiller.states(self.args.should_save):
            if self.args.should_save:
                save_tensors(folder / f"{name}.safetensors", tensors, metadata | self._metadata())
        for name, journal in distiller.process_states():
            save_tensors(folder / _journal_file(name, self.args.process_index), journal, {})

    def _metadata(self) -> dict[str, str]:
        distiller = self.distiller
        return {
            "version": "2",
            "teacher": distiller.teacher.kind,
            "epoch": str(distiller.epoch),
            "processes": str(self.args.world_size),
            "schedule": self._schedule(),
            "content": str(self._probe.content),
            **({} if distiller.calibrated is None else distiller.calibrated.state()),
        }

    def _schedule(self) -> str:
        method, state = self.method, self.state
        return (
            f"{method.alpha_schedule} to {method.alpha} in {state.num_train_epochs} epochs ({state.max_steps} steps)"
        )

    # Loading

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        """
        As in [`~transformers.Trainer`]; `True` resumes from the newest checkpoint that was written to its end.

        Raises:
            ValueError: if there is no such checkpoint, or the one asked for is not whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_whole_checkpoint()
        if resume_from_checkpoint:
            check_files(resume_from_checkpoint)
        forget_copies(self)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _last_whole_checkpoint(self) -> str:
        """The newest checkpoint that is whole for every process: machines may have folders of their own."""
        steps = [whole_checkpoint(self.args.output_dir)]
        while self.args.world_size > 1:
            steps = self._gather(torch.tensor(steps)).tolist()
            if len(set(steps)) == 1:
                break
            steps = [whole_checkpoint(self.args.output_dir, at_most=min(steps))]
        if steps[0] < 0:
            raise ValueError(
                f"resume_from_checkpoint=True but {self.args.output_dir} has no whole checkpoint: leave it out to "
                "train from the start."
            )
        return os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{steps[0]}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_heads(Path(checkpoint) / STATE_FOLDER / HEADS_FILE)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.distiller is not None:
            self._load_distiller(Path(checkpoint) / STATE_FOLDER)

    def _load_distiller(self, folder: Path) -> None:
        distiller, (epochs_over, half) = self.distiller, self._resumed
        teacher = distiller.teacher
        if not (folder / "teacher.safetensors").is_file():
            if teacher.kind != "none":
                raise ValueError(
                    f"{folder.parent} has no self-distillation state for teacher={teacher.kind!r} (plain Trainer, "
                    "save_only_model or a download from the Hub): resume a run of SelfKDTrainer, or start a new run "
                    "from these weights with from_pretrained."
                )
            distiller.next_epoch = epochs_over
            return
        for name, _ in list(teacher.states()):
            metadata = self._load_teacher(folder, name)
        epoch = int(metadata["epoch"])
        teacher.epoch = distiller.epoch = epoch
        # The method counts its epochs itself: with another batch size the Trainer's are of another length.
        distiller.next_epoch = epoch if half and epoch >= 0 else epoch + 1
        if self.state.num_train_epochs < 2**31:
            distiller.num_epochs = distiller.next_epoch + max(self.state.num_train_epochs - epochs_over, 1)
        if distiller.calibrated is not None:
            file = folder / _journal_file(HELD_OUT, self.args.process_index)
            shared_alike = metadata["processes"] == str(self.args.world_size) and file.is_file()
            seen = load_tensors(file)[0] if shared_alike else {}
            distiller.calibrated.load(metadata, seen.get("log_probs"))
        if metadata["schedule"] != self._schedule():
            logger.warning(f"The schedule of alpha was {metadata['schedule']} and is now {self._schedule()}.")

    def _load_teacher(self, folder: Path, name: str) -> dict[str, str]:
        teacher = self.distiller.teacher
        tensors, metadata = load_tensors(folder / f"{name}.safetensors")
        if metadata["teacher"] != teacher.kind:
            raise ValueError(
                f"{folder.parent} was written with teacher={metadata['teacher']!r}, this run has "
                f"teacher={teacher.kind!r}: resume with the same teacher."
            )
        processes, now = int(metadata["processes"]), self.args.world_size
        ranks = range(self.args.process_index, processes, now) if teacher.needs_ids and tensors else ()
        journals = [load_tensors(folder / _journal_file(name, rank))[0] for rank in ranks]
        teacher.load(name, (tensors, metadata), journals)
        written, content = metadata.get("content", "None"), str(self._probe.content)
        if "None" not in (written, content) and written != content:
            raise ValueError(
                f"the training set holds other inputs (checksum {content} of a few samples) than when {folder.parent} "
                f"was written ({written}), with the same number of samples: give the same dataset, or start a new run "
                "from these weights with from_pretrained."
            )
        return metadata

    def _load_heads(self, path: Path) -> None:
        """Give the heads the weights of a checkpoint; the model's own file does not have them."""
        heads = heads_of(self.model)
        if heads is None and not path.is_file():
            return
        if heads is None or not path.is_file():
            raise ValueError(
                f"{path.parent.parent} was written {'without' if heads else 'with'} auxiliary heads and this run is "
                f"{'with' if heads else 'without'}: resume with the same auxiliary_heads."
            )
        tensors, metadata = load_tensors(path)
        # Of an earlier version, which did not know every field.
        written = AuxiliaryHeadsConfig().to_dict() | json.loads(metadata["config"])
        if written != heads.config.to_dict():
            changed = [name for name, value in heads.config.to_dict().items() if written.get(name) != value]
            raise ValueError(
                f"the checkpoint's auxiliary heads have other settings ({', '.join(changed)}): {written}, this run "
                f"{heads.config.to_dict()}: resume with the same auxiliary_heads."
            )
        load_whole_state(self.model, heads, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            load_renamed_weights(self.model if model is None else model, resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The heads are in a file of their own: it is no fault that the model's has none.
        heads = head_names(self.model)
        missing = [name for name in load_result.missing_keys if name not in heads]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def _load_best_model(self) -> None:
        check_files(self.state.best_model_checkpoint)
        super()._load_best_model()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            load_renamed_weights(self.model, self.state.best_model_checkpoint)
        heads = Path(self.state.best_model_checkpoint or "") / STATE_FOLDER / HEADS_FILE
        if heads.is_file() and heads_of(self.model) is not None:
            self._load_heads(heads)

    # The Hub

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Stored predictions never reach the Hub; some strategies would upload the checkpoint as it is.
        with pushed_folder(self, checkpoint_folder, STATE_FOLDER) as folder:
            super()._push_from_checkpoint(folder)
        if self.is_world_process_zero():
            self._save_readable_args(self.args.output_dir)


def _being_written(folder: Path, error: Exception) -> Path:
    """The file of a checkpoint that an error stopped."""
    if isinstance(error, SafetensorError):  # which takes away what it could not write
        return folder / "*.safetensors"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: (path.stat().st_mtime_ns, _looks_cut(path)), default=folder)


def _looks_cut(path: Path) -> int:
    """
    Tells files apart that were written within one tick of the file system's clock: what `torch.save` writes is an
    archive, and its list of contents, by which archives are known, comes last.
    """
    if is_zipfile(path):
        return 0
    return 2 if path.suffix in {".bin", ".pt", ".pth"} else 1


def _journal_file(name: str, rank: int) -> str:
    return f"journal_{rank}.safetensors" if name == "teacher" else f"{name}_journal_{rank}.safetensors"
