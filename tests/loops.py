"""Training loops without a trainer, for the tests of `LoopDistiller`."""

import torch
from helpers import collate, make_model, make_samples
from torch.utils.data import DataLoader

from hf_selfkd import LoopDistiller, MethodArguments, with_sample_ids


EPOCHS, SIZE, BATCH = 3, 24, 4


def loader_of(kind="images", size=SIZE, batch=BATCH):
    """All samples in their order, with their ids."""
    return DataLoader(with_sample_ids(make_samples(kind, size)), batch, collate_fn=collate)


def sgd(model, learning_rate=0.05):
    return torch.optim.SGD(model.parameters(), lr=learning_rate)


class Loop:
    """A plain loop that can stop, be saved to a file and go on: `EPOCHS` epochs of `batches`, which hold their ids."""

    def __init__(self, model, method, batches, autocast=False, **options):
        self.autocast = autocast
        self.model = make_model(model) if isinstance(model, str) else model
        self.model.train()
        self.optimizer, self.batches = sgd(self.model), list(batches)
        options = {"num_samples": SIZE, "num_epochs": EPOCHS} | options
        self.distiller = LoopDistiller(self.model, MethodArguments(**method), **options)
        self.accumulation, self.done, self.losses = options.get("accumulation_steps", 1), 0, []

    def run(self, steps=None):
        """So many micro-batches, or all that are left."""
        total = EPOCHS * len(self.batches)
        for number in range(self.done, total if steps is None else self.done + steps):
            place = number % len(self.batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = self.distiller.step(self.model, self.batches[place])
            (loss / self.accumulation).backward()
            self.losses.append(loss.item())
            last = place + 1 == len(self.batches)
            if (place + 1) % self.accumulation == 0 or last:
                self.optimizer.step()
                self.optimizer.zero_grad()
            if last:
                self.distiller.end_epoch()
            self.done = number + 1
        return self

    def save(self, path):
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}
        torch.save(states | {"distiller": self.distiller.state_dict(), "rng": torch.get_rng_state()}, path)

    def load(self, path):
        states = torch.load(path, weights_only=True)
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.distiller.load_state_dict(states["distiller"])
        self.done = states["done"]
        torch.set_rng_state(states["rng"])
        return self
