"""The hooks of `Trainer` for checkpoints: what self-distillation saves, loads and keeps off the Hub."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from .files import load_tensors, save_tensors
from .fixes import hub_copy, load_renamed_weights
from .heads.auxiliary import head_names, heads_of
from .teachers.base import Teacher


logger = logging.getLogger(__name__)

STATE_FOLDER = "_selfkd"  # in a checkpoint and, for a history on disk, in the output folder
HEADS_FILE = "auxiliary_heads.safetensors"  # in that folder of a checkpoint


class Checkpoints:
    """Part of [`~hf_selfkd.SelfKDMixin`]: teachers and heads in checkpoints, bare models everywhere else."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not hasattr(self.model, "save_pretrained"):  # which leaves the heads out by itself
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            heads = head_names(self.model)
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in heads}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir) / STATE_FOLDER
        if self.args.should_save:
            own = {
                "version": "1",
                "passes": str(self._passes),
                "cross_entropy": json.dumps(self._ours),
                "drops_cache": json.dumps(self._drops_cache),
                "processes": str(self.args.world_size),
                "schedule": self._schedule(),
            }
            heads = heads_of(self.model)
            if heads is not None:
                save_tensors(folder / HEADS_FILE, heads.state_dict(), {"config": json.dumps(heads.config.to_dict())})
        for name, teacher in self._teachers.items():
            if self.args.should_save:
                tensors, metadata = teacher.state()
                metadata = metadata | own | {"teacher": teacher.kind, "epoch": str(teacher.epoch)}
                save_tensors(folder / f"{name}.safetensors", tensors, metadata)
            journal = teacher.process_state()
            if journal:
                save_tensors(folder / self._journal_file(name, self.args.process_index), journal, {})

    @staticmethod
    def _journal_file(name: str, rank: int) -> str:
        return f"journal_{rank}.safetensors" if name == "teacher" else f"{name}_journal_{rank}.safetensors"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_heads(Path(checkpoint) / STATE_FOLDER / HEADS_FILE)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._make_teachers()
        self._passes, self._resumed = -1, True
        folder = Path(checkpoint) / STATE_FOLDER
        if not (folder / "teacher.safetensors").is_file():
            if self.teacher.kind == "none":
                return
            raise ValueError(
                f"{checkpoint} has no self-distillation state for teacher={self.teacher.kind!r} (plain Trainer, "
                "save_only_model or a download from the Hub): resume a run of SelfKDTrainer, or start a new run from "
                "these weights with from_pretrained."
            )
        for name, teacher in self._teachers.items():
            metadata = self._load_teacher(folder, name, teacher)
        self._passes = int(metadata["passes"])
        self._ours = json.loads(metadata["cross_entropy"])
        self._drops_cache = json.loads(metadata["drops_cache"])
        if metadata["schedule"] != self._schedule():
            logger.warning(f"The schedule of alpha was {metadata['schedule']} and is now {self._schedule()}.")

    def _load_teacher(self, folder: Path, name: str, teacher: Teacher) -> dict[str, str]:
        tensors, metadata = load_tensors(folder / f"{name}.safetensors")
        if metadata["teacher"] != teacher.kind:
            raise ValueError(
                f"{folder.parent} was written with teacher={metadata['teacher']!r}, this run has "
                f"teacher={teacher.kind!r}: resume with the same teacher."
            )
        written, now = int(metadata["processes"]), self.args.world_size
        ranks = range(self.args.process_index, written, now) if teacher.needs_ids and tensors else ()
        journals = [load_tensors(folder / self._journal_file(name, rank))[0] for rank in ranks]
        teacher.load(tensors, metadata, journals)
        teacher.epoch = int(metadata["epoch"])
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
        written = json.loads(metadata["config"])
        if written != heads.config.to_dict():
            changed = [name for name, value in heads.config.to_dict().items() if written.get(name) != value]
            raise ValueError(
                f"the checkpoint's auxiliary heads have other settings ({', '.join(changed)}): {written}, this run "
                f"{heads.config.to_dict()}: resume with the same auxiliary_heads."
            )
        heads.load_state_dict(tensors)

    def _schedule(self) -> str:
        args, state = self.args, self.state
        return f"{args.alpha_schedule} to {args.alpha} in {state.num_train_epochs} epochs ({state.max_steps} steps)"

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
        super()._load_best_model()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            load_renamed_weights(self.model, self.state.best_model_checkpoint)
        heads = Path(self.state.best_model_checkpoint or "") / STATE_FOLDER / HEADS_FILE
        if heads.is_file() and heads_of(self.model) is not None:
            self._load_heads(heads)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Stored predictions never reach the Hub; with hub_strategy="checkpoint" the whole folder would.
        if (Path(checkpoint_folder) / STATE_FOLDER).is_dir() and self.is_world_process_zero():
            checkpoint_folder = str(hub_copy(checkpoint_folder, self.args.output_dir, STATE_FOLDER))
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / "_hub", ignore_errors=True)
