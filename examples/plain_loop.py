# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd", "scikit-learn"]
# ///
"""
Self-distillation in a plain PyTorch loop: 300 digits, a fifth of them with wrong labels, and a network of two layers.

    python examples/plain_loop.py            # plain training and PS-KD
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, default_collate

from hf_selfkd import LoopDistiller, MethodArguments, with_sample_ids
from hf_selfkd.metrics import calibration_metrics


TRAIN, CLASSES = 300, 10


class Net(nn.Module):
    """Any module whose outputs are logits; batches name its arguments."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, CLASSES))

    def forward(self, pixels):
        return self.layers(pixels)


def digits():
    """Training samples, a fifth with another label, and test pixels and labels."""
    images, labels = load_digits(return_X_y=True)
    pixels, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=random)
    pixels, labels = pixels[order], labels[order]
    wrong = torch.rand(TRAIN, generator=random) < 0.2
    noisy = torch.where(wrong, torch.randint(CLASSES, (TRAIN,), generator=random), labels[:TRAIN])
    train = [{"pixels": image, "labels": label} for image, label in zip(pixels[:TRAIN], noisy, strict=True)]
    return train, pixels[TRAIN:], labels[TRAIN:]


def fit(train, alpha, epochs):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(with_sample_ids(train), batch_size=32, shuffle=True, collate_fn=default_collate)
    distiller = LoopDistiller(model, MethodArguments(alpha=alpha), num_samples=len(train), num_epochs=epochs)
    for _ in range(epochs):
        for batch in loader:
            loss = distiller.step(model, batch)  # the ids are in the batch
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        distiller.end_epoch()
    return model


def main(epochs=60):
    train, pixels, labels = digits()
    for alpha in (0.0, 0.8):
        model = fit(train, alpha, epochs)
        with torch.no_grad():
            figures = calibration_metrics(model(pixels), labels)
        told = ", ".join(f"{name} {figures[name]:.3f}" for name in ("accuracy", "nll", "ece"))
        print(f"alpha {alpha}: {told}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
