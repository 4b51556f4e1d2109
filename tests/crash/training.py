"""The training that is killed: small enough for a second, with all that a checkpoint can hold."""

from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, ViTConfig, ViTForImageClassification, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.checkpoint_files import last_whole_checkpoint


CLASSES, SIDE = 5, 8
CASES = {
    "history": {"teacher": "history"},
    "history on disk": {"teacher": "history", "history_device": "disk", "history_top_k": 3},
    "snapshot": {"teacher": "snapshot"},
    "ema": {"teacher": "ema", "ema_decay": 0.9},
    "heads": {"teacher": "history", "auxiliary_heads": "byot"},
}
# Needs the server of hub.py, and is not among "all".
UPLOADS = {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_always_push": True}
CASES |= {"uploads": {"teacher": "history", **UPLOADS}}


class Digits(Dataset):
    """Images of a few strokes a class, with noise that is drawn anew whenever an image is read."""

    def __init__(self, size, seed=0):
        rng = np.random.default_rng(seed)
        strokes = np.random.default_rng(7).normal(size=(CLASSES, 1, SIDE, SIDE))
        self.labels = rng.integers(CLASSES, size=size)
        self.images = torch.tensor(strokes[self.labels] + rng.normal(size=(size, 1, SIDE, SIDE)), dtype=torch.float32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        noise = torch.randn(1, SIDE, SIDE) / 5
        return {"pixel_values": self.images[index] + noise, "labels": int(self.labels[index])}


class Resumes(TrainerCallback):
    """Notes where training begins."""

    def __init__(self, folder, mark):
        self.folder, self.mark = Path(folder), mark

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark("resume", False)
        if state.is_world_process_zero:
            with (self.folder / "begun.txt").open("a") as file:
                file.write(f"{state.global_step}\n")


def make_trainer(folder, case, processes, mark, trainer_class=SelfKDTrainer):
    """A trainer for 36 steps in 4 epochs, a checkpoint every 5 of which the last two are kept."""
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=SIDE, patch_size=4, num_channels=1, num_labels=CLASSES, **sizes)
    config.hidden_dropout_prob = 0.1
    args = SelfKDConfig(
        str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=4 // processes,
        learning_rate=1e-2,
        seed_transforms=True,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        hub_model_id=f"me/{Path(folder).name}",
        **CASES[case],
    )
    model = ViTForImageClassification(config)
    callbacks = [Resumes(folder, mark)]
    trainer = trainer_class(
        model, args, train_dataset=Digits(36), eval_dataset=Digits(12, seed=1), callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def warm(folder):
    """Import what a training imports late, in the process that is forked."""
    trainer = make_trainer(folder, "history", 1, lambda phase, begins: None)
    trainer.model(pixel_values=trainer.train_dataset[0]["pixel_values"][None])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(folder, case, processes, mark, trainer_class):
    """Train to the end, from the last checkpoint of the folder if there is one, as a script that is started again."""
    mark("resume", True)
    trainer = make_trainer(folder, case, processes, mark, trainer_class)
    newest, whole = get_last_checkpoint(folder), last_whole_checkpoint(folder)
    if trainer.is_world_process_zero():
        with (Path(folder) / "choices.txt").open("a") as file:
            file.write(f"{newest == whole}\n")
    trainer.train(resume_from_checkpoint=whole is not None)
    mark("final model", True)
    trainer.save_model()
    mark("final model", False)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
