"""Object detection: rows are matched objects, softened class targets in the loss of the model itself."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectors import (
    DETECTORS,
    FOCAL,
    SOFTMAX,
    Scenes,
    collate_scenes,
    drop_and_permute,
    make_detector,
    take,
    tiny_resnet,
)
from helpers import collate, difference, logged, make_samples, make_trainer, refused, same_weights, train
from transformers import ResNetForImageClassification, Trainer, TrainerCallback
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher, box_iou
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from hf_selfkd import SelfKDDataCollator, SelfKDTrainer
from hf_selfkd.backbones import load_backbone
from hf_selfkd.history.codec import Codec
from hf_selfkd.history.objects import ObjectHistory
from hf_selfkd.losses.detection import DetectionLoss
from hf_selfkd.losses.soft_targets import SoftTargets, make_targets
from hf_selfkd.tasks import task_for
from hf_selfkd.tasks.detection import ObjectDetection
from hf_selfkd.tasks.matching import watched_matching


pytestmark = pytest.mark.trains


OPTIONS = {"data_collator": collate_scenes, "remove_unused_columns": False, "learning_rate": 1e-3}


def detect(folder, name="detr", dataset=None, **options):
    model = make_detector(name) if isinstance(name, str) else name
    return train(folder, model, Scenes() if dataset is None else dataset, **OPTIONS | options)


def confident(model):
    """A model whose scores of classes differ, as those of fresh weights hardly do."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("class_embed", "class_labels_classifier", "model.decoder.class_embed")):
                torch.nn.init.normal_(weight, std=0.5) if weight.dim() > 1 else None
    return model


def past_for(task, model, batch, seed=1):
    """A past for every second object, and poison in the rows without one; as `(SoftTargets, probabilities)`."""
    generator = torch.Generator().manual_seed(seed)
    classes = model.config.num_labels + (task.class_term == "softmax")
    scores = torch.randn(batch.labels.numel(), classes, generator=generator)
    log_probs = F.logsigmoid(scores) if task.independent else F.log_softmax(scores, -1)
    mask = torch.arange(len(scores)) % 2 == 0
    poisoned = torch.where(mask.unsqueeze(-1), log_probs, torch.nan)
    return SoftTargets(poisoned, mask, categorical=not task.independent), log_probs.exp()


# An independent implementation: soft targets for all queries, and the formula of each loss evaluated at them


def naive_matching(model, batch):
    """The matcher of the model's own loss, made anew from its configuration."""
    config, name = model.config, type(model).__name__
    if "RTDetr" in name or "DFine" in name:
        return RTDetrHungarianMatcher(config)
    costs = {key: getattr(config, key) for key in ("class_cost", "bbox_cost", "giou_cost")}
    softmax = any(key in name for key in ("Yolos", "TableTransformer")) or name.startswith("Detr")
    return (HungarianMatcher if softmax else DeformableDetrHungarianMatcher)(**costs)


def last_layer(outputs):
    logits, boxes = outputs.logits, outputs.pred_boxes
    meta = outputs.get("denoising_meta_values")
    if meta is not None:
        logits, boxes = (part.split(meta["dn_num_split"], dim=1)[1] for part in (logits, boxes))
    return logits, boxes


def corners(boxes):
    center, size = boxes.split(2, dim=-1)
    return torch.cat((center - size / 2, center + size / 2), -1)


def naive_class_term(name, model, outputs, targets, past, alpha):
    """The classification term of the last layer, by loops over images and objects; `past[b][j]` or `None`."""
    logits, boxes = last_layer(outputs)
    config, total, weights = model.config, 0.0, 0.0
    clamped = boxes.clamp(0, 1) if name == "d_fine" else boxes
    indices = naive_matching(model, None)({"logits": logits, "pred_boxes": clamped}, targets)
    num_boxes = max(sum(len(t["class_labels"]) for t in targets), 1)
    for b, (queries, objects) in enumerate(indices):
        object_of = dict(zip(queries.tolist(), objects.tolist(), strict=True))
        for q in range(logits.shape[1]):
            row, j = logits[b, q].double(), object_of.get(q)
            if name in SOFTMAX:
                target = torch.zeros(len(row)).double()
                target[-1 if j is None else targets[b]["class_labels"][j]] = 1
                if j is not None and past[b][j] is not None:
                    target = (1 - alpha) * target + alpha * past[b][j].double()
                weight = config.eos_coefficient if j is None else 1.0
                total, weights = total - weight * (target * row.log_softmax(-1)).sum(), weights + weight
                continue
            onehot = torch.zeros(len(row)).double()
            if j is not None:
                onehot[targets[b]["class_labels"][j]] = 1
            learns = j is not None and past[b][j] is not None
            old = past[b][j].double() if learns else onehot
            target = (1 - alpha) * onehot + alpha * old if learns else onehot
            p = row.sigmoid()
            if name in FOCAL:
                ce = -(target * p.log() + (1 - target) * (1 - p).log())
                p_t = p * target + (1 - p) * (1 - target)
                a_t = config.focal_alpha * target + (1 - config.focal_alpha) * (1 - target)
                total = total + (a_t * ce * (1 - p_t) ** 2).sum() / num_boxes
                continue
            iou = 0.0
            if j is not None:
                iou = box_iou(corners(clamped[b, q][None]), corners(targets[b]["boxes"][j][None]))[0][0, 0].item()
            score = (1 - alpha) * iou * onehot + alpha * old if learns else iou * onehot
            weight = config.focal_loss_alpha * p.detach() ** config.focal_loss_gamma * (1 - target) + score
            ce = -(score * p.log() + (1 - score) * (1 - p).log())
            total = total + config.weight_loss_vfl * (weight * ce).sum() / num_boxes
    return total / weights if name in SOFTMAX else total


def step_of(name, alpha, poison=True):
    """A batch through the loss, and what an independent implementation needs of it."""
    model = confident(make_detector(name)).train()
    task = task_for(model)
    inputs = collate_scenes(list(Scenes(4)))
    batch = task.split(inputs)
    loss = DetectionLoss(task)
    torch.manual_seed(5)  # of denoising
    outputs = loss.forward(model, batch, None, alpha)
    soft, probs = past_for(task, model, batch)
    matching, rows = loss.matching, loss.rows(outputs, batch)
    losses = loss(outputs, rows, make_targets(rows.labels, soft, None, True), alpha, loss.num_items(rows, batch))
    length = batch.labels.shape[1]
    past = [
        [probs[b * length + j] if soft.mask[b * length + j] else None for j in range(length)]
        for b in range(len(batch.labels))
    ]
    return model, outputs, inputs["labels"], losses, past, matching


@pytest.mark.parametrize("name", DETECTORS)
def test_the_loss_is_that_of_soft_targets(name):
    """Value and gradient: all but the class targets of matched objects with a past is the model's own loss."""
    alpha = 0.6
    model, outputs, targets, losses, past, _ = step_of(name, alpha)
    hard, soft = (naive_class_term(name, model, outputs, targets, past, a) for a in (0.0, alpha))
    own = outputs.loss_dict.get("loss_ce", outputs.loss_dict.get("loss_vfl"))
    assert own.item() == pytest.approx(hard.item(), rel=1e-4)  # the scale is the model's
    assert losses.loss.item() == pytest.approx((outputs.loss + soft - hard).item(), rel=1e-5)
    assert abs((soft - hard).item()) > 1e-3
    expected = torch.autograd.grad(outputs.loss + soft - hard, outputs.logits, retain_graph=True)[0]
    found = torch.autograd.grad(losses.loss, outputs.logits, retain_graph=True)[0]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", DETECTORS)
def test_the_matching_is_the_models_own(name):
    """The one that an independent matcher finds for the last layer, without denoising queries."""
    model, outputs, targets, _, _, matching = step_of(name, 0.5)
    logits, boxes = last_layer(outputs)
    assert torch.equal(matching.logits, logits) and matching.num_boxes == 6
    boxes = boxes.clamp(0, 1) if name == "d_fine" else boxes
    expected = naive_matching(model, None)({"logits": logits, "pred_boxes": boxes}, targets)
    assert [(q.tolist(), o.tolist()) for q, o in matching.indices] == [(q.tolist(), o.tolist()) for q, o in expected]
    assert "_loss_function" not in vars(model) and not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr"])
def test_alpha_zero_adds_nothing(name):
    _, outputs, _, losses, _, _ = step_of(name, 0.0)
    assert losses.loss.item() == outputs.loss.item()


# On paper


def one_object(name, logits, past, alpha, box):
    """The class term for one object, of class 1, with two queries, one of them on it; without and with a past."""
    model = make_detector(name)
    model.config.num_labels, model.config.auxiliary_loss = 2, False
    targets = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    logits, boxes = torch.tensor([logits], dtype=torch.float32), torch.tensor([[box, [0.1, 0.1, 0.1, 0.1]]])

    def forward(labels):
        loss, loss_dict, _ = model.loss_function(logits, labels, "cpu", boxes, model.config, None, None)
        return {"loss": loss, "loss_dict": loss_dict}

    model.forward = forward
    task = task_for(model)
    batch, loss = task.split({"labels": targets}), DetectionLoss(task)
    outputs = loss.forward(model, batch, None, alpha)
    rows = loss.rows(outputs, batch)
    soft = SoftTargets(torch.tensor([past]).log(), torch.tensor([True]), categorical=not task.independent)
    losses = loss(outputs, rows, make_targets(rows.labels, soft, None, True), alpha, 1)
    term = outputs["loss_dict"].get("loss_ce", outputs["loss_dict"].get("loss_vfl"))
    return term.item(), (losses.loss - outputs["loss"]).item() + term.item()


LOG = np.log


def test_softmax_on_paper():
    """Probabilities 2/9, 6/9, 1/9 at the object and thirds at the other query, which weighs 0.1; target .2, .7, .1."""
    logits = [[LOG(2), LOG(6), 0.0], [0.0, 0.0, 0.0]]
    hard, soft = one_object("detr", logits, [0.5, 0.25, 0.25], 0.4, [0.5, 0.5, 0.4, 0.4])
    assert hard == pytest.approx((-LOG(6 / 9) + 0.1 * LOG(3)) / 1.1, rel=1e-5)
    expected = (-0.2 * LOG(2 / 9) - 0.7 * LOG(6 / 9) - 0.1 * LOG(1 / 9) + 0.1 * LOG(3)) / 1.1
    assert soft == pytest.approx(expected, rel=1e-5)


def test_focal_on_paper():
    """Probabilities 3/4, 1/2; past .4, .8; targets .2, .9: p_t is .35 and .5, the weights are .65 and .3."""
    hard, soft = one_object("deformable_detr", [[LOG(3), 0.0], [0.0, 0.0]], [0.4, 0.8], 0.5, [0.5, 0.5, 0.4, 0.4])
    other_query = 2 * 0.75 * 0.25 * LOG(2)
    assert hard == pytest.approx(0.75 * 0.75**2 * LOG(4) + 0.25 * 0.25 * LOG(2) + other_query, rel=1e-5)
    first = 0.65 * 0.65**2 * (0.2 * LOG(4 / 3) + 0.8 * LOG(4))
    assert soft == pytest.approx(first + 0.3 * 0.25 * LOG(2) + other_query, rel=1e-5)


def test_varifocal_on_paper():
    """The box of the query overlaps by half: scores are .2 and .65, the weights .5375 and .66875."""
    logits, box = [[LOG(3), 0.0], [0.0, 0.0]], [0.5, 0.5, 0.4, 0.8]
    hard, soft = one_object("rt_detr", logits, [0.4, 0.8], 0.5, box)
    other_query = 2 * 0.75 * 0.25 * LOG(2)
    assert hard == pytest.approx(0.75 * 0.75**2 * LOG(4) + 0.5 * LOG(2) + other_query, rel=1e-5)
    expected = 0.5375 * (0.2 * LOG(4 / 3) + 0.8 * LOG(4)) + 0.66875 * LOG(2) + other_query
    assert soft == pytest.approx(expected, rel=1e-5)


# Whole runs


class AfterFirstEpoch(TrainerCallback):
    def on_epoch_end(self, args, state, control, model, **kwargs):
        if round(state.epoch) == 1:
            self.model = copy.deepcopy(model)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_trains(tmp_path, name):
    """Until there is a past to the bit as the stock trainer, with or without alpha; then otherwise."""
    options = {"lr_scheduler_type": "constant", "num_train_epochs": 2}
    watches = [AfterFirstEpoch() for _ in range(3)]
    kinds = [{"trainer": Trainer}, {"alpha": 0.0}, {}]
    stock, without, trainer = (
        detect(tmp_path / str(n), name, callbacks=[watch], **kind, **options)
        for n, (kind, watch) in enumerate(zip(kinds, watches, strict=True))
    )
    assert same_weights(stock.model, without.model)
    assert same_weights(watches[0].model, watches[2].model) and not same_weights(stock.model, trainer.model)
    assert logged(trainer, "rows_with_history") == [0, 0, 1, 1] and type(trainer.distiller.task) is ObjectDetection
    assert ("target_entropy" in trainer.state.log_history[-2]) == (name in SOFTMAX)
    stored = trainer.teacher.stored([3, 1])
    assert stored.shape == (4, 3 + (name in SOFTMAX)) and torch.isfinite(stored).all()
    assert torch.allclose(stored.sum(-1), torch.ones(4)) == (name in SOFTMAX)


class Watching(SelfKDTrainer):
    """Notes the batches of training."""

    def compute_loss(self, model, inputs, *arguments, **named):
        if model.training:
            self.__dict__.setdefault("visits", []).append((self.sample_ids.tolist(), copy.deepcopy(dict(inputs))))
        return super().compute_loss(model, inputs, *arguments, **named)


def naive_run(name, model, visits, alpha, epochs, per_epoch):
    """SGD by hand, with a dictionary of what was said of each object in an earlier epoch."""
    optimizer, past, now = torch.optim.SGD(model.parameters(), 0.01), {}, {}
    matcher = naive_matching(model, None)
    for step, (ids, inputs) in enumerate(visits):
        epoch, targets = step // per_epoch, inputs["labels"]
        if step % per_epoch == 0:
            past.update(now)
            now = {}
        outputs = model.train()(**inputs)
        keys = [[(i, int(k)) for k in t["annotation_id"]] for i, t in zip(ids, targets, strict=True)]
        old = [[past.get(key) for key in of_image] for of_image in keys]
        a = alpha * (epoch + 1) / epochs
        terms = [naive_class_term(name, model, outputs, targets, old, weight) for weight in (0.0, a)]
        loss = outputs.loss + (terms[1] - terms[0])
        logits = outputs.logits.detach()
        for b, (queries, objects) in enumerate(matcher({"logits": logits, "pred_boxes": outputs.pred_boxes}, targets)):
            for q, j in zip(queries.tolist(), objects.tolist(), strict=True):
                now[keys[b][j]] = logits[b, q].softmax(-1) if name in SOFTMAX else logits[b, q].sigmoid()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["detr", "yolos", "deformable_detr", "rt_detr"])
def test_weights_are_those_of_a_naive_run(tmp_path, name):
    """With objects that are dropped and permuted, and images without any."""

    def model():
        made = confident(make_detector(name))
        made.config.num_denoising = 0  # which draws random numbers
        return made

    options = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.01}
    options |= {"num_train_epochs": 4, "alpha": 0.9}
    scenes = Scenes(8, transform=drop_and_permute)
    trainer = detect(tmp_path, model(), scenes, trainer=Watching, **options)
    shares = logged(trainer, "rows_with_history")
    assert shares[:2] == [0, 0] and 0 < min(shares[2:]) < 1  # some have no past yet
    expected = naive_run(name, model(), trainer.visits, 0.9, 4, 2)
    assert difference(trainer, expected) < 2e-5
    plain = detect(tmp_path, model(), scenes, **options | {"alpha": 0.0})
    assert difference(trainer, plain) > 2e-4


@pytest.mark.parametrize(("name", "step"), [("detr", 3), ("detr", 4), ("rt_detr", 3)])
def test_resume_is_exact(tmp_path, name, step):
    """In the middle of an epoch and at its end, with objects that come and go."""
    options = {"dataset": Scenes(8, transform=drop_and_permute), "save_strategy": "steps", "save_steps": 1}
    options |= {"seed_transforms": True}
    whole = detect(tmp_path, name, **options)
    again = detect(tmp_path, make_detector(name, seed=3), resume=step, **options)
    assert same_weights(whole.model, again.model)
    stored = [trainer.teacher.stored(range(8)) for trainer in (whole, again)]
    assert torch.equal(*stored) and len(stored[0]) > 0


def test_a_history_of_other_images_is_refused(tmp_path):
    detect(tmp_path, save_strategy="steps", save_steps=1)
    refused(
        lambda: detect(tmp_path, dataset=Scenes(12), resume=2, save_strategy="steps", save_steps=1), "8 images", "12"
    )


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr"])
@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_copies_of_the_weights_match_by_themselves(tmp_path, name, teacher):
    trainer = detect(tmp_path, name, dataset=Scenes(8, drop_and_permute, ids=False), teacher=teacher)
    assert trainer.teacher.kind == teacher and logged(trainer, "rows_with_history") == [0, 0, 1, 1, 1, 1]
    task, model = trainer.distiller.task, trainer.model
    batch = task.split(collate_scenes(list(Scenes(4))))
    taught = trainer.teacher.targets(batch).model
    copied = copy.deepcopy(model).eval()
    copied.load_state_dict(trainer.teacher.weights, strict=False)
    with torch.no_grad():
        outputs = copied(**batch.inputs, labels=batch.targets)
    outputs = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
    for b, (queries, objects) in enumerate(naive_matching(model, None)(outputs, batch.targets)):
        for q, j in zip(queries.tolist(), objects.tolist(), strict=True):
            row, logits = taught.log_probs[b * batch.labels.shape[1] + j].exp(), outputs["logits"][b, q]
            torch.testing.assert_close(row, logits.softmax(-1) if name in SOFTMAX else logits.sigmoid())


def test_a_warm_start_gives_the_first_epoch_a_past(tmp_path):
    trainer = detect(tmp_path, "rt_detr", warm_start_teacher=True, num_train_epochs=1)
    assert logged(trainer, "rows_with_history") == [1, 1]


def test_micro_batches_count_by_their_images(tmp_path):
    """As in the stock trainer, where they are equal; an image without objects counts too."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    options |= {"num_train_epochs": 2, "optim": "sgd", "max_grad_norm": 0.0}
    watches = [AfterFirstEpoch(), AfterFirstEpoch()]
    detect(tmp_path, trainer=Trainer, callbacks=[watches[0]], **options)
    detect(tmp_path, callbacks=[watches[1]], **options)
    assert difference(watches[0].model, watches[1].model) < 1e-7
    empty = [n for n in range(16) if n % 4 == 0]
    scenes = torch.utils.data.Subset(Scenes(16), empty)
    trained, fresh = detect(tmp_path, dataset=scenes, num_train_epochs=2), make_detector()
    assert difference(trained, fresh) > 1e-4 and logged(trained, "loss")[-1] > 0


def test_objects_without_a_query_have_no_past(tmp_path):
    """Three objects and two queries: two are matched, stored and learn; the third does when it is matched."""
    model = make_detector()
    model.config.num_queries = 2
    model = type(model)(model.config)
    trainer = detect(tmp_path, model, Scenes(4))
    assert len(trainer.teacher.stored([3])) in (2, 3) and trainer.teacher.stored([1, 2]).shape == (3, 4)
    assert torch.isfinite(trainer.teacher.stored([3])).all() and np.isfinite(logged(trainer, "loss")).all()


def test_evaluation_is_that_of_the_stock_trainer(tmp_path):
    options = {"eval_dataset": Scenes(4), "eval_do_concat_batches": False} | OPTIONS
    ours, stock = (
        make_trainer(tmp_path, make_detector(), Scenes(), trainer=kind, **options).evaluate()["eval_loss"]
        for kind in (SelfKDTrainer, Trainer)
    )
    assert ours == stock
    trainer = detect(tmp_path, **options)
    before = trainer.teacher.stored(range(8))
    assert (
        trainer.evaluate()["eval_loss"]
        == Trainer(trainer.model, trainer.args, collate_scenes, eval_dataset=Scenes(4)).evaluate()["eval_loss"]
    )
    assert torch.equal(before, trainer.teacher.stored(range(8)))


def test_half_precision(tmp_path):
    """Autocast: what is stored is what the loss itself saw."""
    trainer = detect(tmp_path, "rt_detr", bf16=True)
    assert logged(trainer, "rows_with_history")[-1] == 1 and np.isfinite(logged(trainer, "loss")).all()


@pytest.mark.parametrize(
    ("name", "dtype", "place"), [("detr", "float16", "cpu"), ("deformable_detr", "bfloat16", "disk")]
)
def test_places_and_types_of_the_history(tmp_path, name, dtype, place):
    whole = detect(tmp_path, name, num_train_epochs=2).teacher.stored(range(8))
    half = detect(tmp_path, name, num_train_epochs=2, history_dtype=dtype, history_device=place)
    torch.testing.assert_close(half.teacher.stored(range(8)), whole, atol=2e-2, rtol=2e-2)


# Which object is which


def test_objects_are_known_by_their_ids():
    task, scenes = task_for(make_detector()), Scenes(4)
    labels = [scenes[3]["labels"], scenes[0]["labels"], take(scenes[2]["labels"], [1])]
    index = task.sample_index(np.array([3, 0, 2]), labels)
    assert index.ids.tolist() == [(3 << 31) + 3, (3 << 31) + 13, (3 << 31) + 23, (2 << 31) + 12]
    classes = [*labels[0]["class_labels"].tolist(), *labels[2]["class_labels"].tolist()]
    assert index.label_hash.tolist() == classes and index.rows.tolist() == [0, 1, 2, 6]
    assert (index.total, index.num_items) == (4, 3)
    permuted = task.sample_index(np.array([3]), [take(labels[0], [2, 0, 1])])
    assert permuted.ids.tolist() == [index.ids[n] for n in (2, 0, 1)]


def test_without_ids_the_place_counts():
    """And the whole list is what must not change."""
    task, labels = task_for(make_detector()), Scenes(4, ids=False)[3]["labels"]
    index = task.sample_index(np.array([5]), [labels])
    assert index.ids.tolist() == [(5 << 31) + n for n in range(3)] and len(set(index.label_hash.tolist())) == 1
    fewer = task.sample_index(np.array([5]), [take(labels, [0, 1])])
    assert fewer.label_hash[0] != index.label_hash[0]


def objects(task, *pairs):
    """The index of objects of one image, of class 0 unless said otherwise."""
    ids, classes = zip(*pairs, strict=True)
    labels = {"class_labels": torch.tensor(classes), "id": torch.tensor(ids), "boxes": torch.zeros(len(ids), 4)}
    return task.sample_index(np.array([1]), [labels])


def test_the_history_grows_by_objects(tmp_path):
    """An object keeps its last prediction while it is out of the picture."""
    task, cpu = task_for(make_detector()), torch.device("cpu")
    history = ObjectHistory(2, Codec(4, torch.float32), "cpu", cpu, tmp_path)
    rows = torch.log_softmax(torch.randn(5, 4), -1)
    first, second = objects(task, (7, 1), (3, 0)), objects(task, (5, 2), (7, 1))
    assert history.read(first, 2, cpu) is None
    history.write(first, rows[:2], torch.tensor([1, 0]))
    assert history.read(first, 2, cpu) is None  # not before the epoch ends
    history.end_epoch(0)
    found = history.read(second, 2, cpu)
    assert found.mask.tolist() == [False, True] and torch.equal(found.log_probs[1], rows[0])
    history.write(second, rows[2:4], torch.tensor([2, 1]))
    history.end_epoch(1)
    found = history.read(objects(task, (3, 0), (5, 2), (7, 1)), 3, cpu)
    assert found.mask.all() and torch.equal(found.log_probs, rows[[1, 2, 3]])
    with pytest.raises(ValueError, match="object 3 of sample_id=1 has other labels.*annotation_id"):
        history.read(objects(task, (3, 2)), 1, cpu)
    history.write(objects(task, (9, 0)), torch.full((1, 4), torch.nan), torch.tensor([0]))
    history.end_epoch(2)  # nothing of a step that went astray
    assert history.read(objects(task, (9, 0)), 1, cpu) is None


# What is refused


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"teacher": "rank"}, ("teacher='rank'", "teacher='history'")),
        ({"auxiliary_heads": "byot"}, ("auxiliary_heads", "auxiliary_loss")),
        ({"history_top_k": 2}, ("history_top_k=2",)),
        ({"history_trace": True}, ("history_trace=True",)),
        ({"chunked_logits": True}, ("chunked_logits=True",)),
        ({"alpha_schedule": "calibrated", "eval_dataset": Scenes(4)}, ("alpha_schedule='calibrated'",)),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor",)),
        ({"compute_loss_func": lambda *_, **__: 0}, ("compute_loss_func",)),
        ({"hard_loss": "cross_entropy"}, ("hard_loss='cross_entropy'", "additive")),
        ({"data_collator": SelfKDDataCollator(collate_scenes, mixup_alpha=1.0)}, ("mixup_alpha=0",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_detection_does_not_have(tmp_path, options, parts):
    refused(lambda: make_trainer(tmp_path, make_detector(), Scenes(), **OPTIONS | options), *parts)


def test_a_temperature_needs_a_softmax(tmp_path):
    refused(lambda: detect(tmp_path, "deformable_detr", temperature=2.0), "temperature=2.0", "temperature=1.0")
    assert logged(detect(tmp_path, temperature=2.0), "soft_loss")


@pytest.mark.parametrize("teacher", ["history", "auto"])
def test_objects_that_come_and_go_need_ids(tmp_path, teacher):
    scenes = Scenes(8, drop_and_permute, ids=False)
    if teacher == "history":
        refused(lambda: detect(tmp_path, dataset=scenes, teacher=teacher), "random crops", "'annotation_id'")
    else:
        assert detect(tmp_path, dataset=scenes, teacher=teacher).teacher.kind == "snapshot"


@pytest.mark.parametrize(
    ("field", "values", "parts"),
    [
        ("id", [1, 1], ("labels['id'] of sample_id=2 are [1, 1]", "unique")),
        ("ids", [1], ("1 ids for 2 objects",)),
        ("annotation_id", [-1, 2], ("-1 to 2", "2**31")),
        ("class_labels", [0, 7], ("label 7 of sample_id=2", "3 classes")),
    ],
)
def test_faults_of_labels(tmp_path, field, values, parts):
    scenes = Scenes(4, ids=False)
    scenes.items[2]["labels"][field] = torch.tensor(values)
    refused(lambda: detect(tmp_path, dataset=scenes), *parts)


def test_labels_that_are_no_objects():
    task = task_for(make_detector())
    refused(lambda: task.split({"labels": torch.tensor([1])}), "labels that are a Tensor", "class_labels")
    refused(lambda: task.split({"pixel_values": None}), "only pixel_values", "remove_unused_columns=False")


def test_a_loss_of_ones_own_is_refused():
    model = make_detector()
    model.loss_function = lambda *_, **__: None
    refused(lambda: task_for(model), "not supported yet")


def test_watching_leaves_the_model_as_it_was():
    model = make_detector()
    own = model.loss_function
    with pytest.raises(KeyError), watched_matching(model):
        assert model.loss_function is not own
        raise KeyError
    assert model.loss_function is own and "_loss_function" not in vars(model)


# From a classifier


def test_a_classifier_becomes_a_backbone(tmp_path):
    """Trained weights and statistics, in a detector that then says the same of an image."""
    classifier = ResNetForImageClassification(tiny_resnet(out_features=["stage4"]))
    options = {"data_collator": collate, "learning_rate": 1e-2, "auxiliary_heads": "byot"}
    trained = train(tmp_path, classifier, make_samples("images"), **options).model.eval()
    detector = make_detector().eval()
    pixels = torch.randn(2, 3, 32, 32)
    body = detector.model.backbone.model
    assert not torch.allclose(body(pixels).feature_maps[0], trained.resnet(pixels).last_hidden_state)
    loaded = load_backbone(detector, trained)
    state, source = detector.state_dict(), trained.resnet.state_dict()
    frozen = {key for key in source if not key.endswith("num_batches_tracked")}
    assert {name.removeprefix("model.backbone.model.") for name in loaded} == frozen
    assert all(torch.equal(state[f"model.backbone.model.{key}"], source[key]) for key in frozen)
    torch.testing.assert_close(body(pixels).feature_maps[0], trained.resnet(pixels).last_hidden_state)
    tuned = detect(tmp_path / "detector", detector, num_train_epochs=2)
    assert logged(tuned, "rows_with_history")[-1] == 1


def test_another_architecture_is_refused():
    detector = make_detector("yolos")
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    refused(lambda: load_backbone(detector, ResNetForImageClassification(tiny_resnet())), "Yolos", "ResNet")
    refused(lambda: load_backbone(make_detector("rt_detr"), ResNetForImageClassification(tiny_resnet())), "RTDetr")
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
