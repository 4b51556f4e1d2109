# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd", "lightning", "scikit-learn"]
# ///
"""
Self-distillation in a Lightning module, on the digits of `plain_loop.py`.

    python examples/lightning_loop.py
"""

import sys

import lightning
import torch
from torch import nn

from hf_selfkd import LoopDistiller, MethodArguments


class SelfDistilled(lightning.LightningModule):
    """A module that trains a model by self-distillation; a checkpoint of Lightning goes on to the bit."""

    def __init__(self, model: nn.Module, method: MethodArguments, num_samples: int, accumulation_steps: int = 1):
        super().__init__()
        self.model, self.method = model, method
        self.num_samples, self.accumulation_steps = num_samples, accumulation_steps
        self.saved = None

    def on_fit_start(self):  # the model is on its device now, and the processes know one another
        self.distiller = LoopDistiller(
            self.model,
            self.method,
            num_samples=self.num_samples,
            num_epochs=self.trainer.max_epochs,
            accumulation_steps=self.accumulation_steps,
        )
        if self.saved is not None:
            self.distiller.load_state_dict(self.saved)

    def training_step(self, batch, index):
        loss = self.distiller.step(self.model, batch)
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self):
        self.distiller.end_epoch()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["distiller"] = self.distiller.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.saved = checkpoint["distiller"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


def main(epochs=60):
    from plain_loop import Net, digits
    from torch.utils.data import DataLoader, default_collate

    from hf_selfkd import with_sample_ids
    from hf_selfkd.metrics import calibration_metrics

    train, pixels, labels = digits()
    lightning.seed_everything(0)
    module = SelfDistilled(Net(), MethodArguments(alpha=0.8), len(train))
    loader = DataLoader(with_sample_ids(train), batch_size=32, shuffle=True, collate_fn=default_collate)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    with torch.no_grad():
        figures = calibration_metrics(module.model(pixels), labels)
    print(", ".join(f"{name} {figures[name]:.3f}" for name in ("accuracy", "nll", "ece")))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
