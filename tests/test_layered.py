"""Layered self-distillation in the trainer: views, losses, histories, figures, checkpoints."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    Recording,
    Samples,
    Stream,
    collate,
    difference,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    state_of,
    train,
)
from test_resume import check_resume, saves
from torch import nn
from transformers import Trainer, ViTForImageClassification

from hf_selfkd import (
    AuxiliaryHeadsConfig,
    SelfKDConfig,
    SelfKDDataCollator,
    Seq2SeqSelfKDTrainer,
    attach_auxiliary_heads,
    strip_auxiliary_heads,
)
from hf_selfkd.batch import Batch
from hf_selfkd.files import load_tensors, save_tensors
from hf_selfkd.heads.auxiliary import heads_of
from hf_selfkd.heads.config import PRESETS
from hf_selfkd.heads.rotation import choose_rotations, rotate
from hf_selfkd.losses.soft import divergence


pytestmark = pytest.mark.trains


MODELS = "resnet vit convnext swin mobilenet timm bert bert_tokens wav2vec2 marian gpt2".split()
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
ZERO = AuxiliaryHeadsConfig(hard_weight=0.0)


def bare(state):
    """A state without what belongs to heads."""
    state = state if isinstance(state, dict) else state_of(state)
    return {name: tensor for name, tensor in state.items() if not name.startswith("selfkd_heads")}


# Views


def test_rotation_turns_counter_clockwise_and_back():
    """Invariant 27."""
    image = torch.arange(4.0).view(1, 1, 2, 2)
    views = rotate(image, np.arange(4)[None])
    assert views[1, 0].tolist() == [[1, 3], [0, 2]]
    images = torch.randn(3, 2, 5, 5)
    views = rotate(images, np.tile(np.arange(4), (3, 1)))
    assert views.shape == (12, 2, 5, 5)
    assert torch.equal(views[0::4], images)
    for row, view in enumerate(views):
        back = rotate(view[None], np.array([[(4 - row % 4) % 4]]))
        assert torch.equal(back[0], images[row // 4])
        assert np.array_equal(view.numpy(), np.rot90(images[row // 4].numpy(), row % 4, axes=(1, 2)))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4)])
def test_rotation_of_what_is_not_square_is_refused(shape):
    refused(lambda: rotate(torch.zeros(shape), np.zeros((2, 2), np.int64)), "square", str(list(shape)))


def test_images_that_are_not_square_are_refused_before_the_first_step(tmp_path):
    samples = Samples([item | {"pixel_values": item["pixel_values"][:, :8]} for item in make_samples("resnet").items])
    trainer = make_trainer(tmp_path, "resnet", samples, auxiliary_heads="lsskd")
    refused(trainer.train, "square", "[4, 3, 8, 16]", "views='none'")
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("views", [0, 1, 2, 3])
def test_turns_are_upright_first_and_differ(views):
    rotations = choose_rotations(np.arange(1000), views, epoch=4, seed=1)
    assert rotations.shape == (1000, 1 + views) and (rotations[:, 0] == 0).all()
    assert all(len(set(row)) == 1 + views and set(row) <= {0, 1, 2, 3} for row in rotations.tolist())
    assert np.array_equal(rotations[7:9], choose_rotations(np.arange(7, 9), views, epoch=4, seed=1))
    if views in (1, 2):
        counts = np.bincount(rotations[:, 1:].ravel(), minlength=4)[1:]
        assert (abs(counts - 1000 * views / 3) < 80).all()


def test_every_rotation_comes_within_three_epochs():
    epochs = [choose_rotations(np.arange(50), 1, epoch, seed=0)[:, 1] for epoch in range(6)]
    assert np.array_equal(np.sort(np.stack(epochs[:3]), axis=0), np.tile([[1], [2], [3]], 50))
    assert np.array_equal(epochs[0], epochs[3]) and not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], choose_rotations(np.arange(50), 1, 0, seed=1)[:, 1])


def test_joint_labels():
    """Invariant 27: labels [3, 7] are 12 to 15 and 28 to 31."""
    model = attach_auxiliary_heads(make_model("resnet"), "joint")
    from hf_selfkd.heads.layered import Layered
    from hf_selfkd.losses.hard import upright_labels
    from hf_selfkd.tasks import task_for

    layered = Layered(task_for(model))
    rotations = np.tile(np.arange(4), (3, 1))
    labels = layered.joint_labels(torch.tensor([3, 7, -100]), rotations)
    assert labels.tolist() == [12, 13, 14, 15, 28, 29, 30, 31, -100, -100, -100, -100]
    assert (labels[:8] // 4).tolist() == [3] * 4 + [7] * 4 and (labels[:8] % 4).tolist() == [0, 1, 2, 3] * 2
    batch = Batch({}, torch.tensor([3, 7]), rotations=rotations[:2])
    assert upright_labels(batch).tolist() == [3, -100, -100, -100, 7, -100, -100, -100]


# Weights of 0


@pytest.mark.parametrize(("name", "alpha"), [(name, 0.0) for name in MODELS] + [("vit", 0.8), ("gpt2", 0.8)])
def test_weights_0_are_plain_training_bit_for_bit(tmp_path, name, alpha):
    """Invariants 26 and 32: no views, no forward, no random number; and the control."""
    samples = make_samples(name)
    plain = train(tmp_path, name, samples, alpha=alpha, num_train_epochs=2)
    muted = train(tmp_path, name, samples, alpha=alpha, num_train_epochs=2, auxiliary_heads=ZERO)
    assert difference(bare(plain), bare(muted)) == 0
    assert logged(plain, "loss") == logged(muted, "loss") and logged(plain, "grad_norm") == logged(muted, "grad_norm")
    assert not logged(muted, "head0_loss")
    taught = train(tmp_path, name, samples, alpha=alpha, num_train_epochs=2, auxiliary_heads="deep_supervision")
    assert difference(bare(plain), bare(taught)) > 1e-5
    if alpha == 0:
        stock = train(tmp_path, name, samples, trainer=Trainer, num_train_epochs=2)
        if name not in ("gpt2",):  # whose tokens the stock Trainer miscounts
            assert difference(stock, bare(muted)) == 0


def test_weights_0_show_the_model_upright_images_only(tmp_path):
    seen = []
    for heads in (ZERO, "joint"):
        trainer = make_trainer(
            tmp_path, "resnet", make_samples("resnet", 8), num_train_epochs=2, auxiliary_heads=heads
        )
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        trainer.train()
    assert seen == [4] * 4 + [16] * 4


def test_past_weight_0_does_not_depend_on_alpha_nor_the_teacher(tmp_path):
    """Invariant 32: with alpha 0, softened joint labels are joint labels."""
    samples = make_samples("vit")
    soft = AuxiliaryHeadsConfig.preset("joint", past_weight=1.0)
    runs = [train(tmp_path, "vit", samples, alpha=0.0, auxiliary_heads=heads) for heads in (soft, "joint")]
    assert difference(*runs) == 0
    with_past = train(tmp_path, "vit", samples, alpha=0.8, auxiliary_heads=soft)
    assert difference(runs[0], with_past) > 1e-4


# Losses, against the formulas


def naive(model, samples, visits, epochs, per_epoch, config, alpha, teacher, seed=42):
    """Layered self-distillation as its formulas say, in a plain loop over the batches of a trainer; SGD."""
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    heads, other, table, fresh = heads_of(model), None, {}, {}
    rotated, count = heads.config.views == "rotation", 1 + config.views_per_step
    for step, inputs in visits:
        epoch = step // per_epoch
        if step % per_epoch == 0:
            table, fresh = table | fresh, {}
            other = copy.deepcopy(model).eval() if epoch and teacher == "snapshot" else None
        a = alpha * (epoch + 1) / epochs
        ids = inputs["sample_id"].tolist()
        batch = collate([samples[n] for n in ids])
        labels = batch.pop("labels")
        keys = [(n, 0) for n in ids]
        if rotated:
            rotations = [t for row in choose_rotations(np.array(ids), config.views_per_step, epoch, seed) for t in row]
            images = [np.rot90(batch["pixel_values"][i // count].numpy(), t, (1, 2)) for i, t in enumerate(rotations)]
            batch = {"pixel_values": torch.from_numpy(np.stack(images))}
            keys = [(ids[i // count], t) for i, t in enumerate(rotations)]
            targets = torch.tensor([4 * int(labels[i // count]) + t for i, t in enumerate(rotations)])
        else:
            targets, count = labels, 1
        model.train()
        outputs = model(**batch)
        parts, logits = outputs["auxiliary"], outputs.logits[::count]
        soft_targets, pasts = [None] * len(ids), [[None] * len(keys)] * len(heads.heads)
        if other is not None:
            heads_of(other).watching = True
            with torch.no_grad():
                soft_targets = list(other(**batch).logits.softmax(-1)[::count])
                pasts = [list(part.softmax(-1)) for part in heads_of(other).results.logits]
        elif teacher == "history":
            soft_targets = [table.get((n, -1)) for n in ids]
            pasts = [[table.get((key, h)) for key in keys] for h in range(len(heads.heads))]

        def cross_entropy(scores, labels, soft_targets, a):
            total = 0.0
            for row, label, before in zip(scores, labels, soft_targets, strict=True):
                target = F.one_hot(label, scores.shape[-1]).float()
                target = target if before is None else (1 - a) * target + a * before
                total = total - (target * row.log_softmax(-1)).sum()
            return total

        loss = cross_entropy(logits, labels, soft_targets, a)
        deepest = parts[len(heads.heads) - 1] if rotated else outputs.logits
        for h in range(len(heads.heads)):
            own = config.hard_weight * cross_entropy(parts[h], targets, pasts[h], config.past_weight * a)
            if not rotated or h < len(heads.heads) - 1:
                now, then = (s / config.temperature for s in (parts[h], deepest.detach()))
                kl = F.kl_div(now.log_softmax(-1), then.softmax(-1), reduction="none").sum(-1)
                if config.deep_to_shallow_trust:
                    kl = kl * torch.stack(
                        [row.softmax(-1)[y] for row, y in zip(deepest.detach(), targets, strict=True)]
                    )
                kl = kl.sum()
                own = own + config.deep_to_shallow_weight * config.temperature**2 * kl
            if str(h) in heads.adapters:
                index = list(heads.adapters).index(str(h))
                adapted, deep = parts[len(heads.heads) + index], parts[-1].detach()
                own = own + config.feature_weight * F.mse_loss(adapted, deep, reduction="sum") / deep.shape[-1]
            loss = loss + own / count
        for row in range(len(ids) if config.heads_to_model_weight else 0):  # what the heads know, to the model
            views, said = range(row * count, (row + 1) * count), 0.0
            for part in parts[: len(heads.heads)]:
                turned = [part[v][rotations[v] :: 4] if rotated else part[v] for v in views]
                said = said + sum(turned).detach() / count / len(heads.heads)
            now, then = (s / config.temperature for s in (logits[row], said))
            kl = F.kl_div(now.log_softmax(-1), then.softmax(-1), reduction="sum")
            loss = loss + config.heads_to_model_weight * config.temperature**2 * kl
        fresh |= {(n, -1): row for n, row in zip(ids, logits.detach().softmax(-1), strict=True)}
        for h in range(len(heads.heads)):
            fresh |= {(key, h): row for key, row in zip(keys, parts[h].detach().softmax(-1), strict=True)}
        (loss / len(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("teacher", ["snapshot", "history", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"views_per_step": 1, "head": "stages"},
        {"views_per_step": 2, "head": "linear"},
        {"views_per_step": 3, "head": "stages"},
        {"views": "none", "head": "mlp"},
        {"views": "none", "head": "mlp", "deep_to_shallow_trust": True},
        {"views_per_step": 2, "head": "linear", "deep_to_shallow_trust": True},
    ],
    ids=str,
)
def test_training_is_the_formulas(tmp_path, options, teacher):
    """Against dense targets made row by row: 3 epochs of SGD, a ViT without dropout, all five terms."""
    weights = {"past_weight": 0.7, "deep_to_shallow_weight": 0.4, "feature_weight": 0.3, "hard_weight": 0.9}
    weights["heads_to_model_weight"] = 0.6
    config = AuxiliaryHeadsConfig(layers=[0, 1], temperature=2.0, **weights, **options)
    samples = make_samples("vit", 18)

    start = make_model("plain_deep_vit")
    state = copy.deepcopy(start.state_dict())
    common = SGD | {"auxiliary_heads": config, "teacher": teacher}
    trainer = train(tmp_path, start, samples, trainer=Recording, **common)
    reference = make_model("plain_deep_vit")
    reference.load_state_dict(state)
    attach_auxiliary_heads(reference, config, seed=42)
    alpha = 0.0 if teacher == "none" else 0.8
    naive(reference, samples, trainer.visits, 3, 5, config, alpha, teacher)
    assert difference(reference, trainer) < 2e-6
    control = make_model("plain_deep_vit")
    control.load_state_dict(state)
    control = train(tmp_path, control, samples, **(common | {"alpha": 0.0 if alpha else 0.8, "teacher": "snapshot"}))
    assert difference(reference, control) > 1e-4


@pytest.mark.parametrize("name", ["plain_gpt2", "plain_marian", "plain_bert_tokens", "plain_bert"])
def test_heads_of_text_teach_the_model_token_by_token(tmp_path, name):
    """The first step's loss, against a loop over the labelled tokens; and the model learns from the term."""
    samples = make_samples(name, 4)
    config = AuxiliaryHeadsConfig(heads_to_model_weight=0.5, temperature=2.0, layers=[0])
    options = {"alpha": 0.0, "num_train_epochs": 2} | SGD
    model = attach_auxiliary_heads(make_model(name), config)
    batch = collate([samples[n] for n in range(4)])
    labels = batch.pop("labels")
    if "marian" in name:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        outputs = model.train()(**batch)
    total, rows = 0.0, 0
    own, said, labels = outputs.logits, outputs["auxiliary"][0], labels.reshape(4, -1)
    for sentence in range(4):
        for place in range(labels.shape[1]):
            at = place - 1 if "gpt2" in name else place
            if at < 0 or labels[sentence, place] == -100:
                continue
            now, then = (s.reshape(4, -1, s.shape[-1])[sentence, at] / 2 for s in (own, said))
            total += 4 * float(F.kl_div(now.log_softmax(-1), then.softmax(-1), reduction="sum"))
            rows += 1
    trainer = train(tmp_path, copy.deepcopy(model), samples, auxiliary_heads=config, **options)
    assert logged(trainer, "heads_to_model")[0] == pytest.approx(total / rows, rel=1e-4)
    config = AuxiliaryHeadsConfig(temperature=2.0, layers=[0])
    without = train(tmp_path, attach_auxiliary_heads(make_model(name), config), samples, **options)
    assert logged(trainer, "loss")[0] == pytest.approx(logged(without, "loss")[0] + 0.5 * total / rows, rel=1e-4)
    assert difference(bare(trainer), bare(without)) > 1e-5


def test_divergence_is_torchs_and_gives_the_teacher_no_gradient():
    """Invariant 30."""
    logits, teacher = (torch.randn(5, 7, requires_grad=True) for _ in range(2))
    ours = divergence(logits, teacher, 3.0)
    expected = F.kl_div((logits / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="none").sum(-1) * 9
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    assert teacher.grad is None and logits.grad.abs().max() > 0
    with torch.no_grad():
        masked = torch.tensor([[1.0, -math.inf, 0.0]])
        assert torch.isfinite(divergence(masked, masked, 2.0)).all()


@pytest.mark.parametrize("term", ["deep_to_shallow_weight", "feature_weight"])
def test_the_deepest_learns_nothing_from_those_below(tmp_path, term):
    """Invariant 30, in training: with that term alone, the deepest head has no gradient."""
    config = AuxiliaryHeadsConfig(layers=[0, 1], head="linear", hard_weight=0.0, **{term: 1.0})
    trainer = train(tmp_path, "plain_deep_vit", make_samples("vit"), auxiliary_heads=config, alpha=0.0, **SGD)
    before = state_of(attach_auxiliary_heads(make_model("plain_deep_vit"), config, seed=trainer.args.seed))
    changed = {name for name, tensor in state_of(trainer).items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("selfkd_heads.heads.1") for name in changed)
    taught = "selfkd_heads.heads.0.classifier" if term == "deep_to_shallow_weight" else "selfkd_heads.adapters.0"
    assert f"{taught}.weight" in changed
    plain = train(tmp_path, "plain_deep_vit", make_samples("vit"), alpha=0.0, **SGD)
    layers = [name for name in state_of(plain) if ".layers." in name]
    differ = [name for name in layers if not torch.equal(state_of(trainer)[name], state_of(plain)[name])]
    assert any(".layers.0." in name for name in differ)  # the backbone below the shallow head learns


def test_a_batch_twice_has_the_same_loss(tmp_path):
    """Invariant 29: losses are means over samples and views."""
    losses = []
    for times in (1, 2):
        items = make_samples("plain_vit", 4).items * times
        trainer = make_trainer(
            tmp_path,
            "plain_vit",
            Samples(items),
            auxiliary_heads="joint",
            alpha=0.0,
            max_steps=1,
            per_device_train_batch_size=4 * times,
        )
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_does_not_depend_on_accumulation(tmp_path, preset):
    # No batch statistics: those of a CNN's heads see smaller batches.
    name = "plain_deep_vit" if preset == "exits" else "plain_vit"
    kept = preset in ("deep_supervision", "exits")
    config = AuxiliaryHeadsConfig.preset(preset, **({} if kept else {"head": "stages"}))
    options = SGD | {"num_train_epochs": 2, "auxiliary_heads": config}
    one = train(tmp_path, name, make_samples(name, 16), per_device_train_batch_size=8, **options)
    two = train(
        tmp_path,
        name,
        make_samples(name, 16),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **options,
    )
    assert difference(one, two) < 2e-6
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), abs=2e-4)
    assert logged(one, "head0_loss") == pytest.approx(logged(two, "head0_loss"), abs=1e-4)


def test_final_classifier_learns_from_upright_rows_only(tmp_path):
    """Rotated views of a label that says nothing leave it as it was: heads of weight almost 0 are plain training."""
    config = AuxiliaryHeadsConfig(views_per_step=3, head="linear", hard_weight=1e-30)
    samples = make_samples("plain_vit", 16)
    heads = train(tmp_path, "plain_vit", samples, alpha=0.0, auxiliary_heads=config, **SGD)
    plain = train(tmp_path, "plain_vit", samples, alpha=0.0, **SGD)
    assert difference(bare(heads), bare(plain)) < 1e-6
    assert logged(heads, "hard_loss") == pytest.approx(logged(plain, "hard_loss"), abs=1e-5)


def test_batch_statistics_see_rotated_images(tmp_path):
    """As documented: the views of a step share one batch."""
    config = AuxiliaryHeadsConfig(views_per_step=3, head="linear", hard_weight=1e-30)
    samples = make_samples("resnet", 16)
    heads = train(tmp_path, "resnet", samples, alpha=0.0, auxiliary_heads=config, **SGD)
    plain = train(tmp_path, "resnet", samples, alpha=0.0, **SGD)
    assert difference(bare(heads), bare(plain)) > 1e-4


@pytest.mark.parametrize(
    "options", [{"compute_loss_func": True}, {"label_smoothing_factor": 0.1, "alpha": 0.0}], ids=str
)
def test_other_hard_losses_see_upright_rows(tmp_path, options):
    shapes = []

    def loss(outputs, labels, num_items_in_batch):
        shapes.append((len(outputs.logits), len(labels), "auxiliary" in outputs))
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    own = {"compute_loss_func": loss} if "compute_loss_func" in options else options
    trainer = train(tmp_path, "vit", make_samples("vit", 16), auxiliary_heads="lsskd", **own)
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert set(shapes) <= {(4, 4, False)} and (shapes or "compute_loss_func" not in options)


def test_loss_of_ones_own_with_rotated_views_is_refused(tmp_path):
    class Weighted(ViTForImageClassification):
        def forward(self, pixel_values=None, labels=None, **kwargs):
            outputs = super().forward(pixel_values=pixel_values, **kwargs)
            if labels is not None:
                outputs.loss = 3 * F.cross_entropy(outputs.logits, labels)
            return outputs

    model = Weighted(make_model("vit").config)
    with torch.no_grad():
        model.classifier.weight.normal_()
    refused(make_trainer(tmp_path, model, make_samples("vit"), auxiliary_heads="lsskd").train, "compute_loss_func")
    strip_auxiliary_heads(model)
    trainer = train(tmp_path, model, make_samples("vit"), auxiliary_heads="byot")
    assert logged(trainer, "head0_loss")


@pytest.mark.parametrize("teacher", ["snapshot", "history"])
@pytest.mark.parametrize("preset", ["byot", "lsskd"])
def test_mixed_images(tmp_path, preset, teacher):
    collator = SelfKDDataCollator(collate, mixup_alpha=0.5, mix_probability=0.5)
    options = {"data_collator": collator, "auxiliary_heads": preset, "teacher": teacher}
    if preset == "lsskd" and teacher == "history":
        refused(lambda: make_trainer(tmp_path, "vit", make_samples("vit"), **options), "teacher='snapshot'")
        return
    trainer = train(tmp_path, "vit", make_samples("vit"), **options)
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"optim": "sgd"}, True),
        ({"optim": "sgd", "max_grad_norm": 0.0}, False),
        ({}, False),
        ({"optim": "sgd", "auxiliary_heads": None}, False),
    ],
    ids=str,
)
def test_clipping_of_sgd_is_named(tmp_path, caplog, options, warned):
    train(tmp_path, "vit", make_samples("vit", 8), **({"auxiliary_heads": "byot", "num_train_epochs": 2} | options))
    assert ("max_grad_norm=1.0 with SGD" in caplog.text) is warned


def test_clipping_of_an_sgd_of_ones_own_is_named(tmp_path, caplog):
    model = attach_auxiliary_heads(make_model("vit"), "byot")
    optimizers = (torch.optim.SGD(model.parameters(), 0.01), None)
    train(tmp_path, model, make_samples("vit", 8), optimizers=optimizers, num_train_epochs=2)
    assert "max_grad_norm=1.0 with SGD" in caplog.text


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path):
    """It knows nothing of a field that has come since."""
    samples, options = make_samples("vit"), saves(4) | {"auxiliary_heads": "byot", "teacher": "history"}
    whole = train(tmp_path, "vit", samples, **options)
    path = tmp_path / "checkpoint-4/_selfkd/auxiliary_heads.safetensors"
    tensors, metadata = load_tensors(path)
    written = json.loads(metadata["config"])
    del written["heads_to_model_weight"]
    save_tensors(path, tensors, {"config": json.dumps(written)})
    (path.parent / "files.json").unlink()  # which has come since, too
    resumed = train(tmp_path / "again", "vit", samples, resume=tmp_path / "checkpoint-4", **options)
    assert difference(whole, resumed) == 0


# Histories of heads


def test_history_is_kept_by_head_and_view(tmp_path):
    """Invariant 33: what is stored of a view is what was said of it when it was last seen."""
    seen = {}

    class Watching(Recording):
        def compute_loss(self, model, inputs, *arguments, **keywords):
            ids = self.sample_ids.tolist()
            handle = heads_of(model).register_forward_hook(lambda *_: None)
            run = heads_of(model)._run

            def watched(*args):
                results = run(*args)
                rotations = choose_rotations(np.array(ids), 1, int(self.state.epoch or 0), self.args.seed)
                for head, logits in enumerate(results.logits):
                    for row, (b, v) in enumerate((b, v) for b in range(len(ids)) for v in range(2)):
                        key = (head, ids[b], int(rotations[b, v]))
                        seen.setdefault(int(self.state.epoch or 0), {})[key] = logits[row].detach().softmax(-1)
                return results

            heads_of(model)._run = watched
            try:
                return super().compute_loss(model, inputs, *arguments, **keywords)
            finally:
                del heads_of(model)._run
                handle.remove()

    trainer = train(tmp_path, "vit", make_samples("vit"), trainer=Watching, auxiliary_heads="lsskd", teacher="history")
    assert len(trainer.teacher.head_stores) == 2
    latest = seen[0] | seen[1] | seen[2]
    for head, teacher in enumerate(trainer.teacher.head_stores):
        stored = teacher.stored(range(4 * 22)).view(22, 4, -1)
        for sample in range(22):
            for turn in range(4):
                expected = latest[head, sample, turn]
                torch.testing.assert_close(stored[sample, turn], expected, atol=1e-6, rtol=0)
    upright = trainer.teacher.head_stores[0].stored([0])
    assert not torch.allclose(upright, trainer.teacher.head_stores[0].stored([1]))  # another view, another row


def test_history_of_heads_with_ids_of_ones_own(tmp_path):
    import datasets

    items = make_samples("vit").items
    columns = {name: [item[name] for item in items] for name in items[0]}
    data = datasets.Dataset.from_dict(columns | {"number": [7 * n + 3 for n in range(22)]}).with_format("torch")
    trainer = train(tmp_path, "vit", data, auxiliary_heads="lsskd", teacher="history", sample_id_column="number")
    stored = trainer.teacher.head_stores[0].stored([4 * 3, 4 * 10])
    assert stored.shape == (2, 4 * CLASSES) and torch.isfinite(stored).all()
    refused(lambda: trainer.teacher.head_stores[0].stored([4 * 4]), "sample_id=16")


def test_heads_share_the_rows_of_tokens(tmp_path):
    trainer = train(
        tmp_path,
        "marian",
        make_samples("marian"),
        trainer=Seq2SeqSelfKDTrainer,
        auxiliary_heads="lsskd",
        teacher="history",
    )
    (teacher,) = trainer.teacher.head_stores
    assert teacher.stored(range(22)).shape == trainer.teacher.stored(range(22)).shape


@pytest.mark.parametrize(
    "options, kind",
    [
        ({}, "history"),
        ({"auxiliary_heads": "joint"}, "history"),
        ({"auxiliary_heads": "lsskd"}, "snapshot"),
        ({"auxiliary_heads": "lsskd", "teacher": "history"}, "history"),
    ],
)
def test_teacher_auto(tmp_path, options, kind):
    assert train(tmp_path, "vit", make_samples("vit", 8), num_train_epochs=2, **options).teacher.kind == kind


def test_streams_without_ids_take_turns(tmp_path):
    stream = Stream(make_samples("vit", 16))
    options = {"auxiliary_heads": "lsskd", "alpha_schedule": "linear_step", "max_steps": 10}
    trainer = train(tmp_path, "vit", stream, **options)
    assert logged(trainer, "head1_loss") and trainer.teacher.kind == "snapshot"


# What is logged and evaluated


def test_figures_of_the_heads_are_logged(tmp_path):
    """Against a forward pass by hand: the first step's loss and accuracy, before any update."""
    samples = make_samples("plain_vit", 8)
    options = {"auxiliary_heads": "joint", "alpha": 0.0, "per_device_train_batch_size": 8, "max_steps": 1}
    trainer = train(tmp_path, "plain_vit", samples, **options)
    reference = attach_auxiliary_heads(make_model("plain_vit"), "joint", seed=42).train()
    batch = collate(samples.items)
    views = rotate(batch["pixel_values"], np.tile(np.arange(4), (8, 1)))
    logits = reference(pixel_values=views)["auxiliary"][0].detach()
    labels = (4 * batch["labels"][:, None] + torch.arange(4)).flatten()
    assert logged(trainer, "head0_loss")[0] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    accuracy = float((logits.argmax(-1) == labels).float().mean())
    assert logged(trainer, "head0_accuracy")[0] == pytest.approx(accuracy, abs=1e-6)
    hard = F.cross_entropy(reference(pixel_values=batch["pixel_values"]).logits, batch["labels"]).item()
    total = hard + float(F.cross_entropy(logits, labels))
    assert logged(trainer, "loss")[0] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("preset", ["joint", "byot"])
def test_evaluation_without_and_with_heads(tmp_path, preset):
    samples, test = make_samples("vit"), make_samples("vit", 11, seed=3)
    trainer = train(tmp_path, "vit", samples, auxiliary_heads=preset, eval_dataset=test)
    plain = trainer.evaluate()
    predicted = trainer.predict(test)
    assert not any("head" in name for name in plain)
    assert predicted.predictions.shape == (11, CLASSES)
    trainer.args.evaluate_heads = True
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == plain["eval_loss"]
    assert trainer.predict(test).predictions.shape == (11, CLASSES)
    model = trainer.model.eval()
    heads_of(model).watching = True
    batch = collate(test.items)
    with torch.no_grad():
        model(pixel_values=batch["pixel_values"])
    for index, logits in enumerate(heads_of(model).results.logits):
        probs = logits.softmax(-1)
        probs = probs.view(11, CLASSES, 4).sum(-1) if preset == "joint" else probs
        accuracy = float((probs.argmax(-1) == batch["labels"]).float().mean())
        assert metrics[f"eval_head{index}_accuracy"] == pytest.approx(accuracy)
        nll = float(F.nll_loss(probs.log(), batch["labels"]))
        assert metrics[f"eval_head{index}_nll"] == pytest.approx(nll, rel=1e-4)
        assert 0 <= metrics[f"eval_head{index}_ece"] <= 100


def test_evaluation_of_heads_of_a_translation_model(tmp_path):
    trainer = train(
        tmp_path,
        "marian",
        make_samples("marian"),
        trainer=Seq2SeqSelfKDTrainer,
        auxiliary_heads="byot",
        eval_dataset=make_samples("marian", 7, seed=2),
        predict_with_generate=True,
        generation_max_length=6,
        evaluate_heads=True,
    )
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_head0_nll"]) and math.isfinite(metrics["eval_token_nll"])


def test_outputs_in_training_are_those_of_the_bare_model(tmp_path):
    kinds = set()

    class Watching(Recording):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            kinds.add((type(outputs).__name__, tuple(outputs), len(outputs.logits)))
            return (loss, outputs) if return_outputs else loss

    train(tmp_path, "vit", make_samples("vit", 8), trainer=Watching, auxiliary_heads="lsskd")
    assert {kind[0] for kind in kinds} == {"ImageClassifierOutput"}
    assert all("auxiliary" not in kind[1] and kind[2] == 4 for kind in kinds)


# Checkpoints


@pytest.mark.parametrize(("name", "accumulation"), [("vit", 1), ("vit", 2), ("resnet", 1)])
@pytest.mark.parametrize("teacher", ["snapshot", "history", "ema"])
def test_resume_is_exact(tmp_path, name, teacher, accumulation):
    every = 4 // accumulation
    options = saves(every, accumulation) | {"teacher": teacher, "auxiliary_heads": "lsskd", "ema_decay": 0.9}
    check_resume(tmp_path, name, make_samples(name), [every, 2 * every, 4 * every], **options)


@pytest.mark.parametrize("teacher", ["snapshot", "history"])
@pytest.mark.parametrize("name", ["bert_tokens", "gpt2", "wav2vec2"])
def test_resume_of_other_models_is_exact(tmp_path, name, teacher):
    check_resume(tmp_path, name, make_samples(name), [8], **saves(4), teacher=teacher, auxiliary_heads="lsskd_full")


@pytest.mark.parametrize("heads", [None, "lsskd"])
def test_resume_with_dropout_of_the_teacher_is_exact(tmp_path, heads):
    options = {"teacher": "snapshot", "teacher_dropout": True, "auxiliary_heads": heads}
    whole = check_resume(tmp_path, "vit", make_samples("vit"), [8, 16], **saves(4), **options)
    sure = train(tmp_path, "vit", make_samples("vit"), **(options | {"teacher_dropout": False}))
    assert difference(whole, sure) > 1e-5


def test_resume_depends_on_the_weights_of_the_heads(tmp_path, monkeypatch):
    """The control."""
    from hf_selfkd import SelfKDTrainer

    monkeypatch.setattr(SelfKDTrainer, "_load_heads", lambda *arguments: None)
    with pytest.raises(AssertionError, match="weights and buffers"):
        check_resume(tmp_path, "vit", make_samples("vit"), [8], **saves(8), auxiliary_heads="lsskd")


def test_checkpoint_loads_as_the_bare_model(tmp_path):
    trainer = train(tmp_path, "vit", make_samples("vit"), auxiliary_heads="joint", save_strategy="epoch")
    loaded, info = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-18", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert difference(loaded, bare(trainer)) == 0
    trainer.save_model(str(tmp_path / "model"))
    assert difference(ViTForImageClassification.from_pretrained(tmp_path / "model"), loaded) == 0
    strip_auxiliary_heads(trainer.model)
    assert difference(trainer, loaded) == 0


class Own(nn.Module):
    """A model that transformers cannot save by itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Flatten(), nn.Linear(n, 12), nn.ReLU()) for n in (768, 12, 12)])
        self.out = nn.Linear(12, CLASSES)

    def forward(self, pixel_values, labels=None):
        for block in self.blocks:
            pixel_values = block(pixel_values)
        return {"logits": self.out(pixel_values)}


def test_model_of_ones_own_is_saved_without_heads(tmp_path):
    from safetensors.torch import load_file

    model = attach_auxiliary_heads(Own(), "deep_supervision", inputs={"pixel_values": torch.zeros(1, 3, 16, 16)})
    trainer = train(tmp_path, model, make_samples("images"), save_strategy="epoch")
    assert logged(trainer, "head1_accuracy")
    assert load_file(tmp_path / "checkpoint-18/model.safetensors").keys() == Own().state_dict().keys()


@pytest.mark.parametrize(
    "then, now, parts",
    [
        ("joint", None, ("with auxiliary heads", "resume with the same")),
        (None, "joint", ("without auxiliary heads", "resume with the same")),
        ("joint", "lsskd_full", ("other settings", "past_weight")),
    ],
)
def test_checkpoint_of_other_heads_is_refused(tmp_path, then, now, parts):
    train(tmp_path, "vit", make_samples("vit"), auxiliary_heads=then, alpha=0.0, **saves(4))
    trainer = make_trainer(tmp_path, "vit", make_samples("vit"), auxiliary_heads=now, alpha=0.0)
    refused(lambda: trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")), *parts)


def test_best_model_has_its_heads(tmp_path):
    trainer = train(
        tmp_path,
        "vit",
        make_samples("vit"),
        auxiliary_heads="joint",
        eval_dataset=make_samples("vit", 8, seed=1),
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst: not the last
        learning_rate=1e-2,
    )
    from hf_selfkd.files import load_tensors

    best = f"{trainer.state.best_model_checkpoint}/_selfkd/auxiliary_heads.safetensors"
    stored, _ = load_tensors(best)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in heads_of(trainer.model).state_dict().items())


# Arguments


def test_heads_by_name_object_and_file_are_the_same(tmp_path):
    AuxiliaryHeadsConfig.preset("joint").save_pretrained(tmp_path / "heads")
    samples = make_samples("vit", 8)
    runs = [train(tmp_path, "vit", samples, auxiliary_heads=h) for h in ("joint", str(tmp_path / "heads"))]
    from hf_selfkd import SelfKDTrainer

    args = SelfKDConfig(
        str(tmp_path), per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no", use_cpu=True
    )
    given = SelfKDTrainer(
        make_model("vit"), args, collate, samples, auxiliary_heads=AuxiliaryHeadsConfig.preset("joint")
    )
    given.train()
    before = attach_auxiliary_heads(make_model("vit"), "joint", seed=42)
    runs += [given, train(tmp_path, before, samples)]
    assert all(difference(runs[0], run) == 0 for run in runs[1:])
    assert args.to_json_string()


def test_contradictions_are_refused(tmp_path):
    from hf_selfkd import SelfKDTrainer

    model, samples = make_model("vit"), make_samples("vit")
    args = SelfKDConfig(str(tmp_path), auxiliary_heads="joint", use_cpu=True)
    refused(lambda: SelfKDTrainer(model, args, collate, samples, auxiliary_heads="lsskd"), "'joint'", "leave out")
    attach_auxiliary_heads(model, "byot")
    refused(lambda: SelfKDTrainer(model, args, collate, samples), "has heads already", "strip_auxiliary_heads")
    refused(lambda: SelfKDConfig("out", auxiliary_heads="none"), "auxiliary_heads='none'", "lsskd")
    refused(lambda: SelfKDConfig("out", auxiliary_heads=AuxiliaryHeadsConfig()), "SelfKDTrainer(..., auxiliary_heads")
    refused(lambda: make_trainer(tmp_path, "vit", samples, evaluate_heads=True), "evaluate_heads=True")
    heads = {"auxiliary_heads": "lsskd", "teacher": "none", "chunked_logits": True}
    refused(lambda: make_trainer(tmp_path, "gpt2", make_samples("gpt2"), **heads), "chunked_logits=True")


@pytest.mark.parametrize("kind", ["FSDP1", "DeepSpeed ZeRO-3"])
def test_sharded_weights_are_refused(tmp_path, kind, monkeypatch):
    heads = make_trainer(tmp_path, "vit", make_samples("vit"), auxiliary_heads="joint")
    teacher = make_trainer(tmp_path, "vit", make_samples("vit"), teacher="snapshot")
    monkeypatch.setattr("hf_selfkd.checks.sharded_by", lambda trainer: kind)
    refused(heads._check_setup, "auxiliary_heads do not work", kind, "torchrun")
    refused(teacher._check_setup, "teacher='snapshot'", kind, "teacher='history'")
    monkeypatch.setattr("hf_selfkd.checks.sharded_by", lambda trainer: "FSDP2")
    heads._check_setup()
    teacher._check_setup()


def test_optimizer_without_the_heads_is_refused(tmp_path):
    model, samples = make_model("vit"), make_samples("vit")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"auxiliary_heads": "joint", "optimizers": (optimizer, None)}
    refused(lambda: make_trainer(tmp_path, model, samples, **options), "attach_auxiliary_heads(model, config)")
    strip_auxiliary_heads(model)
    attach_auxiliary_heads(model, "joint")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(tmp_path, model, samples, **(options | {"optimizers": (optimizer, None)}))


def test_model_init_and_search_grow_heads(tmp_path):
    trainer = make_trainer(
        tmp_path, None, make_samples("vit", 8), model_init=lambda: make_model("vit"), auxiliary_heads="joint"
    )
    assert heads_of(trainer.model) is not None
    trainer.train()
    assert logged(trainer, "head1_loss") and heads_of(trainer.model) is not None


def test_gradient_checkpointing_reaches_the_backbone(tmp_path):
    samples = make_samples("plain_vit", 8)
    options = SGD | {"auxiliary_heads": "joint", "num_train_epochs": 2}
    plain = train(tmp_path, "plain_vit", samples, **options)
    new = "activation_checkpointing"  # gradient_checkpointing before transformers 5.21
    saving = {new if hasattr(SelfKDConfig, new) else "gradient_checkpointing": True}
    saving = train(tmp_path, "plain_vit", samples, **saving, **options)
    assert difference(plain, saving) < 1e-6


@pytest.mark.parametrize(
    ("name", "preset"),
    [(name, preset) for name in ("resnet", "bert", "gpt2") for preset in PRESETS if preset != "exits"]
    + [(name, "exits") for name in ("vit", "resnet", "convnext", "swin")]  # of more than one layer
    + [
        (name, preset) for name in MODELS if name not in ("resnet", "bert", "gpt2") for preset in ("lsskd_full", "sla")
    ],
)
def test_every_preset_trains_every_model(tmp_path, name, preset):
    model = make_model(name)
    before = state_of(model)
    trainer = train(tmp_path, model, make_samples(name, 8), auxiliary_heads=preset, num_train_epochs=2)
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    layer = heads_of(model).recorder.names[0]
    changed = [n for n, t in state_of(model).items() if n.startswith(layer) and not torch.equal(t, before[n])]
    assert changed or name == "wav2vec2"  # whose only layer may be skipped
    assert len(logged(trainer, "head0_accuracy")) >= 1


# Half precision


@pytest.mark.parametrize("preset", ["lsskd", "joint", "byot"])
@pytest.mark.parametrize("name", ["resnet", "swin", "vit", "t5"])
def test_heads_under_autocast(tmp_path, name, preset):
    """The model's forward is under autocast and its hooks are not: heads run as the forward did."""
    options = {"bf16": True, "auxiliary_heads": preset, "eval_dataset": make_samples(name, 8), "evaluate_heads": True}
    trainer = train(tmp_path, name, make_samples(name, 8), **options)
    assert logged(trainer, "head0_loss") and math.isfinite(logged(trainer, "loss")[-1])
    assert math.isfinite(trainer.evaluate()["eval_head0_nll"])


@pytest.mark.parametrize("preset", ["lsskd", "joint", "byot"])
@pytest.mark.parametrize("name", ["resnet", "vit", "gpt2"])
def test_heads_of_a_model_in_half_precision(tmp_path, name, preset):
    model = make_model(name).to(torch.bfloat16)

    def half(items):
        batch = collate(items)
        return {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}

    trainer = train(tmp_path, model, make_samples(name, 8), auxiliary_heads=preset, data_collator=half)
    assert trainer.distiller.hard_loss.plain and math.isfinite(logged(trainer, "loss")[-1])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
