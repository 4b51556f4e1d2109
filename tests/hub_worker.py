"""Trainings that upload, where `HF_ENDPOINT` is a test server: `hub_worker.py SCENARIO FOLDER` prints JSON."""

import json
import logging
import sys
from pathlib import Path

import torch
from helpers import make_samples, make_trainer

from hf_selfkd.metrics import compute_classification_metrics


class Told(logging.Handler):
    """Keeps warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def trained(folder, name, strategy="end", **options):
    options = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": f"me/{name}"} | options
    options |= {"eval_dataset": make_samples("vit", 8, seed=3), "compute_metrics": compute_classification_metrics}
    trainer = make_trainer(folder / name, "vit", make_samples("vit", 8), save_strategy="epoch", **options)
    trainer.train()
    trainer.evaluate()
    return trainer


def strategies(folder):
    """Every strategy, and what the models say of an image."""
    images = torch.stack([item["pixel_values"] for item in make_samples("vit", 4, seed=9).items])
    torch.save(images, folder / "images.pt")
    result = {}
    for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
        trainer = trained(folder, strategy, strategy, hub_always_push=True)
        trainer.push_to_hub(dataset_tags="me/data", license="mit")
        with torch.no_grad():
            trainer.model.eval()
            result[strategy] = trainer.model(pixel_values=images).logits.tolist()
    return result


def early(folder):
    """What is said when a trainer is made, with a wrong token and with that of the environment."""
    result = []
    for token in ("hf_wrong", None):
        try:
            options = {"push_to_hub": True, "hub_model_id": "me/early", "hub_token": token}
            make_trainer(folder, "vit", make_samples("vit", 8), **options)
        except Exception as error:
            result.append([type(error).__name__, str(error)])
    return result


def late(folder):
    """An upload that fails at the end."""
    told = Told()
    logging.getLogger("hf_selfkd").addHandler(told)
    trainer = trained(folder, "late", "every_save", hub_always_push=True)
    try:
        trainer.push_to_hub()
    except Exception as error:
        files = sorted(path.name for path in (folder / "late").iterdir())
        return {"kind": type(error).__name__, "text": str(error), "files": files, "warnings": told.lines}
    return {}


if __name__ == "__main__":
    scenario, folder = globals()[sys.argv[1]], Path(sys.argv[2])
    print("RESULT" + json.dumps(scenario(folder)))
