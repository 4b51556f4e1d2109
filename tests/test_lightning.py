"""A Lightning module with `LoopDistiller`, against the plain loop."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import make_model, same_weights
from loops import EPOCHS, SIZE, Loop, loader_of, sgd


pytest.importorskip("lightning")

import lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from lightning_loop import SelfDistilled  # noqa: E402

from hf_selfkd import MethodArguments  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Module(SelfDistilled):
    """The example's module, with the optimizer of the other tests; it may stop after a step."""

    stop = None

    def configure_optimizers(self):
        return sgd(self)

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == self.stop:
            self.trainer.save_checkpoint(self.path)
            self.trainer.should_stop = True


def fit(out, teacher, model="plain_vit", batches=None, callbacks=(), resume=None, stop=None, path=None, **options):
    accumulation = options.get("accumulate_grad_batches", 1)
    method = MethodArguments(teacher=teacher, alpha=0.8)
    module = Module(make_model(model), method, SIZE, accumulation)
    module.stop, module.path = stop, path
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        default_root_dir=out,
        **options,
    )
    trainer.fit(module, loader_of() if batches is None else batches, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize("teacher, model", [("history", "plain_vit"), ("snapshot", "resnet"), ("ema", "resnet")])
def test_lightning_follows_the_plain_loop(tmp_path, teacher, model):
    found = fit(tmp_path, teacher, model)
    expected = Loop(model, {"teacher": teacher, "alpha": 0.8}, loader_of()).run()
    assert same_weights(found.model, expected.model)
    assert not same_weights(found.model, Loop(model, {"teacher": "none"}, loader_of()).run().model)
    assert found.distiller.epoch == EPOCHS


def test_accumulation(tmp_path):
    found = fit(tmp_path, "ema", accumulate_grad_batches=4)
    expected = Loop("plain_vit", {"teacher": "ema", "alpha": 0.8}, loader_of(), accumulation_steps=4).run()
    assert same_weights(found.model, expected.model)
    assert found.distiller.steps == expected.distiller.steps == 2 * EPOCHS


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_a_run_goes_on_from_a_checkpoint_of_an_epoch(tmp_path, teacher):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = fit(tmp_path, teacher, callbacks=[keep])
    resumed = fit(tmp_path, teacher, resume=str(tmp_path / "epoch=1.ckpt"))
    assert same_weights(resumed.model, whole.model)
    assert resumed.distiller.epoch == EPOCHS


def test_the_state_of_a_checkpoint_is_plain(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, "history", callbacks=[keep])
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["distiller"]
    assert state["epoch"] == 1 and not state["open"] and state["teacher"] == "history"
