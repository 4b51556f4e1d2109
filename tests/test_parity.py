"""Where nothing is distilled, training is the plain Trainer's, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, difference, logged, make_model, make_samples, state_of, train
from transformers import Trainer


pytestmark = pytest.mark.trains


MODELS = "vit resnet convnext swin mobilenet timm bert distilbert bert_tokens wav2vec2".split()


def scaled_loss(outputs, labels, num_items_in_batch):
    """Cross-entropy over the rows of the whole optimizer step, as a `compute_loss_func`."""
    return F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch


def weighted_loss(outputs, labels, num_items_in_batch):
    """A `compute_loss_func` that needs the labels in the shape in which the collator gave them."""
    logits, weight = outputs.logits.movedim(-1, 1), torch.linspace(0.5, 2.0, CLASSES)
    return F.cross_entropy(logits, labels, weight, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("name", MODELS)
def test_alpha_0_is_bit_identical_to_trainer(tmp_path, name):
    samples = make_samples(name)
    plain = train(tmp_path, name, samples, trainer=Trainer, num_train_epochs=2)
    ours = train(tmp_path, name, samples, alpha=0.0, num_train_epochs=2)
    assert difference(plain, ours) == 0
    assert logged(plain, "loss") == logged(ours, "loss")
    assert logged(plain, "grad_norm") == logged(ours, "grad_norm")
    assert difference(plain, make_model(name)) > 1e-3  # it did train
    distilled = train(tmp_path, name, samples, alpha=0.8, num_train_epochs=2)
    assert difference(plain, distilled) > 1e-4


# The last step: a whole and a half micro-batch; a lone half one.
@pytest.mark.parametrize(("name", "size"), [(name, 22) for name in MODELS] + [("vit", 18), ("bert_tokens", 18)])
def test_alpha_0_with_accumulation_is_bit_identical_to_trainer_with_scaled_loss(tmp_path, name, size):
    samples = make_samples(name, size)
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    plain = train(tmp_path, name, samples, trainer=Trainer, compute_loss_func=scaled_loss, **options)
    ours = train(tmp_path, name, samples, alpha=0.0, **options)
    assert difference(plain, ours) == 0
    assert logged(plain, "loss") == logged(ours, "loss")
    distilled = train(tmp_path, name, samples, alpha=0.8, **options)
    assert difference(plain, distilled) > 1e-4


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
@pytest.mark.parametrize("name", ["vit", "resnet", "bert_tokens"])
def test_first_epoch_is_bit_identical_to_trainer(tmp_path, name, teacher):
    samples, model_class = make_samples(name), type(make_model(name))
    options = {"num_train_epochs": 2, "save_strategy": "epoch"}
    plain = train(tmp_path / "plain", name, samples, trainer=Trainer, **options)
    ours = train(tmp_path / "ours", name, samples, alpha=0.8, teacher=teacher, **options)
    after = [model_class.from_pretrained(tmp_path / run / "checkpoint-6") for run in ("plain", "ours")]
    assert difference(*after) == 0
    assert logged(plain, "loss")[:6] == logged(ours, "loss")[:6]
    assert logged(ours, "rows_with_history") == [0.0] * 6 + [1.0] * 6
    assert difference(plain, ours) > 1e-4


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_teacher_none_is_bit_identical_to_trainer(tmp_path, name):
    samples = make_samples(name)
    plain = train(tmp_path, name, samples, trainer=Trainer)
    assert difference(plain, train(tmp_path, name, samples, teacher="none", alpha=0.8)) == 0


@pytest.mark.parametrize("name", ["vit", "resnet", "bert_tokens"])
def test_label_smoothing_at_alpha_0_is_bit_identical_to_trainer(tmp_path, name):
    samples = make_samples(name)
    plain = train(tmp_path, name, samples, trainer=Trainer, label_smoothing_factor=0.1)
    ours = train(tmp_path, name, samples, alpha=0.0, label_smoothing_factor=0.1)
    assert difference(plain, ours) == 0
    assert difference(plain, train(tmp_path, name, samples, alpha=0.0)) > 1e-4


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["vit", "resnet", "bert_tokens"])
def test_custom_loss_at_alpha_0_is_bit_identical_to_trainer(tmp_path, name, accumulation):
    samples = make_samples(name)
    options = {"gradient_accumulation_steps": accumulation, "compute_loss_func": weighted_loss}
    plain = train(tmp_path, name, samples, trainer=Trainer, **options)
    ours = train(tmp_path, name, samples, alpha=0.0, **options)
    assert difference(plain, ours) == 0
    assert difference(plain, train(tmp_path, name, samples, alpha=0.8, **options)) > 1e-4


class WeightedLoss(torch.nn.Module):
    """A model with a loss of its own that is more than cross-entropy."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, pixel_values, labels=None):
        outputs = self.inner(pixel_values=pixel_values)
        if labels is not None:
            weight = torch.linspace(0.5, 2.0, CLASSES)
            outputs["loss"] = F.cross_entropy(outputs.logits, labels, weight) + 0.01 * outputs.logits.square().mean()
        return outputs


def test_models_own_loss_is_kept_bit_identical_at_alpha_0(tmp_path):
    samples = make_samples("vit")
    plain = train(tmp_path, WeightedLoss(make_model("vit")), samples, trainer=Trainer)
    ours = train(tmp_path, WeightedLoss(make_model("vit")), samples, alpha=0.0)
    assert difference(plain, ours) == 0
    assert difference(plain.model.inner, train(tmp_path, "vit", samples, alpha=0.0)) > 1e-4


def test_training_draws_no_random_numbers_of_its_own(tmp_path):
    samples = make_samples("resnet")
    states = []
    for options in ({"trainer": Trainer}, {"alpha": 0.0}, {"alpha": 0.8}, {"alpha": 0.8, "warm_start_teacher": True}):
        train(tmp_path, "resnet", samples, num_train_epochs=2, **options)
        states.append(torch.get_rng_state())
    assert all(torch.equal(states[0], state) for state in states)


def test_bare_module_that_is_no_transformers_model(tmp_path):
    samples = make_samples("images")

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(samples[0]["pixel_values"].numel(), CLASSES)

        def forward(self, pixel_values, labels=None):
            logits = self.layer(pixel_values.flatten(1))
            return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)

    plain = train(tmp_path, Linear(), samples, trainer=Trainer)
    before = state_of(Linear())
    assert difference(plain, train(tmp_path, Linear(), samples, alpha=0.0)) == 0
    assert difference(plain, train(tmp_path, Linear(), samples, alpha=0.8)) > 1e-4
    assert difference(plain, before) > 1e-3
