"""Semantic segmentation: rows at the size of the logits, the model's own loss at the size of the labels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import Samples, add_noise, difference, logged, refused, same_weights, train
from segmenters import LABELS, SEGMENTERS, Maps, make_segmenter

from hf_selfkd import SelfKDDataCollator, SelfKDTrainer
from hf_selfkd.metrics import SegmentationMetrics, compute_segmentation_metrics, segmentation_metrics
from hf_selfkd.tasks import TASKS, task_for
from hf_selfkd.tasks.maps import counts_of, labels_of_blocks
from hf_selfkd.tasks.segmentation import SemanticSegmentation


pytestmark = pytest.mark.trains


SGD = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
AUXILIARY = {"upernet": 0.4, "beit": 0.4, "data2vec": 0.4, "dpt": 0.4}


def stack(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def maps_for(name, size=14, **options):
    return Maps(size, side={"mobilevit": 32, "mobilevitv2": 64}.get(name, 16), **options)


def run(folder, name, samples=None, **options):
    model = make_segmenter(name) if isinstance(name, str) else name
    samples = maps_for(name if isinstance(name, str) else "") if samples is None else samples
    return train(folder, model, samples, **({"data_collator": stack} | options))


# Rows


@pytest.mark.parametrize("name", SEGMENTERS)
def test_rows_are_those_of_the_model(name):
    """A row a place of the logits; what its pixels cost is the loss of the model, without that of auxiliary heads."""
    model, inputs = make_segmenter(name).eval(), stack(maps_for(name).items[:4])
    task = task_for(model)
    assert type(task) is SemanticSegmentation and task.adds_auxiliary == (name in AUXILIARY)
    with torch.no_grad():
        outputs = model(**inputs)
    batch = task.split(inputs)
    rows = task.rows_of(task.logits(outputs, has_loss=True), batch)
    height, width = outputs.logits.shape[-2:]
    if not name.startswith("mobilevit"):
        assert height == width == SEGMENTERS[name][2]
    assert rows.logits.shape == (4 * height * width, LABELS)
    place = (2 * height + height // 2) * width + width // 3
    assert torch.equal(rows.logits[place], outputs.logits[2, :, height // 2, width // 3])
    known = (inputs["labels"] != 255).sum()
    assert rows.weights.sum() == known and torch.equal(rows.weights > 0, rows.labels >= 0)
    mean = rows.hard_sum(rows.labels) / known
    if name in AUXILIARY:
        assert mean < outputs.loss
    else:
        torch.testing.assert_close(mean, outputs.loss)
    with torch.no_grad():
        again = model(**task.inputs_with_labels(batch, batch.labels))
    assert torch.equal(outputs.loss, again.loss)
    assert task.size_of_maps(batch.inputs) == (height, width)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1), (8, 6), (16, 12), (20, 13)])
def test_what_a_place_stands_for(size):
    """Each pixel belongs to the place whose square it is in, pixel by pixel; sizes need not divide."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (2, 16, 12), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    expected, classes = torch.zeros(2, *size, dtype=torch.long), {}
    for image, y, x in np.ndindex(2, 16, 12):
        place = (image, int(y * size[0] / 16), int(x * size[1] / 12))
        if labels[image, y, x] >= 0:
            expected[place] += 1
            classes.setdefault(place, set()).add(int(labels[image, y, x]))
    counts = counts_of(labels >= 0, size)
    assert torch.equal(counts, expected)
    found = labels_of_blocks(labels, counts)
    assert torch.equal(found >= 0, counts > 0)
    for place, known in classes.items():
        middle = labels[place[0], (2 * place[1] + 1) * 16 // (2 * size[0]), (2 * place[2] + 1) * 12 // (2 * size[1])]
        assert int(found[place]) == int(middle) if middle >= 0 else int(found[place]) in range(4)
        if 16 % size[0] == 12 % size[1] == 0:
            assert int(found[place]) in known


def test_every_class_of_the_mapping_is_known():
    names = tf.models.auto.modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values()
    for name in names:
        model = object.__new__(getattr(tf, name))
        assert [task for task in TASKS if task.matches(model)] == [SemanticSegmentation], name
    for name in ("DetrForSegmentation", "MaskFormerForInstanceSegmentation", "Mask2FormerForUniversalSegmentation"):
        assert not SemanticSegmentation.matches(object.__new__(getattr(tf, name)))


# Against the stock class


@pytest.mark.parametrize("name", SEGMENTERS)
def test_alpha_0_is_the_stock_class(tmp_path, name):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 7}
    stock = run(tmp_path, name, trainer=tf.Trainer, **options)
    for more in ({"alpha": 0.0}, {"teacher": "none"}) if name == "segformer" else ({"alpha": 0.0},):
        assert same_weights(stock.model, run(tmp_path, name, **options, **more).model)


# By hand


class Table(tf.SegformerForSemanticSegmentation):
    """A map of 1 x 2 places from a table, and the loss of transformers."""

    def __init__(self, scores):
        super().__init__(make_segmenter("segformer").config)
        self.config.num_labels = 2
        self.scores = torch.nn.Parameter(torch.tensor(scores))
        for name in ("segformer", "decode_head"):
            delattr(self, name)

    def forward(self, pixel_values, labels=None):
        logits = self.scores.expand(len(pixel_values), -1, -1, -1)
        if labels is None:
            return {"logits": logits}
        full = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return {"loss": F.cross_entropy(full, labels, ignore_index=255), "logits": logits}


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
@pytest.mark.parametrize("kind", ["auto", "additive", "cross_entropy"])
def test_the_loss_worked_out_on_paper(tmp_path, teacher, kind):
    """
    Two classes; two places with log-odds log 3 and 0 of the first class, probabilities 3/4 and 1/2. Of 2 x 4 pixels, 3
    of the first place have a class (0, 1, 0) and 1 of the second (1). Between the places log-odds are interpolated:
    log 3, 3/4 log 3, 1/4 log 3, 0.
    """
    model = Table([[[[math.log(3), 0.0]], [[0.0, 0.0]]]])
    labels = torch.tensor([[0, 1, 255, 1], [0, 255, 255, 255]])
    trainer = run(
        tmp_path,
        model,
        Samples([{"pixel_values": torch.zeros(3, 2, 4), "labels": labels}]),
        teacher=teacher,
        hard_loss=kind,
        num_train_epochs=2,
        alpha=0.5,
        alpha_schedule="constant",
        learning_rate=0.0,
    )
    log = math.log
    hard = -(2 * log(3 / 4) + log(1 / (1 + 3**0.75)) + log(1 / 2)) / 4
    soft = -(3 * (3 / 4 * log(3 / 4) + 1 / 4 * log(1 / 4)) + log(1 / 2)) / 4
    assert logged(trainer, "loss") == pytest.approx([hard, (hard + soft) / 2], rel=1e-4)
    assert logged(trainer, "hard_loss") == pytest.approx([hard, hard], rel=1e-4)
    if teacher == "history":
        stored = trainer.teacher.stored([0])
        torch.testing.assert_close(stored, torch.tensor([[3 / 4, 1 / 4], [1 / 2, 1 / 2]]))


# Against a loop of its own


class Visits(SelfKDTrainer):
    """Notes the ids of each batch."""

    def compute_loss(self, *arguments, **keywords):
        self.__dict__.setdefault("seen", []).append(self.sample_ids.tolist())
        return super().compute_loss(*arguments, **keywords)


def stretched(scores, size):
    """Scores `[C, h, w]` at each pixel, by weights of the four places around it."""
    height, width = scores.shape[1:]
    result = torch.zeros(len(scores), *size)
    for y, x in np.ndindex(*size):
        v, u = max((y + 0.5) * height / size[0] - 0.5, 0), max((x + 0.5) * width / size[1] - 0.5, 0)
        for i, j in np.ndindex(2, 2):
            row, column = min(int(v) + i, height - 1), min(int(u) + j, width - 1)
            share = abs(1 - i - (v - int(v))) * abs(1 - j - (u - int(u)))
            result[:, y, x] = result[:, y, x] + share * scores[:, row, column]
    return result


def naive(name, samples, visits, teacher, alpha, epochs):
    """Image by image, pixel by pixel; `visits` are the ids of each batch, epoch by epoch."""
    model = make_segmenter(name).train()
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    past, frozen, steps = {}, None, len(visits) // epochs
    for epoch in range(epochs):
        seen = {}
        for ids in visits[epoch * steps : (epoch + 1) * steps]:
            batch = stack([samples.items[n] for n in ids])
            outputs, labels = model(**batch), batch["labels"]
            if frozen is not None:
                with torch.no_grad():
                    told = frozen(pixel_values=batch["pixel_values"]).logits
            weight, soft, hard, count = alpha * (epoch + 1) / epochs, 0.0, 0.0, int((labels != 255).sum())
            for place, n in enumerate(ids):
                scores = outputs.logits[place]
                seen[n] = scores.detach().softmax(0)
                believed = past.get(n) if frozen is None else told[place].softmax(0)
                if believed is None:
                    continue
                full = stretched(scores, labels[place].shape)
                for y, x in (labels[place] != 255).nonzero().tolist():
                    v, u = y * scores.shape[1] // 16, x * scores.shape[2] // 16
                    soft = soft - (believed[:, v, u] * scores[:, v, u].log_softmax(0)).sum() / count
                    hard = hard - full[:, y, x].log_softmax(0)[labels[place, y, x]] / count
            (outputs.loss + weight * (soft - hard)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if teacher == "history":
            past = past | seen
        else:
            frozen = make_segmenter(name).eval()
            frozen.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize("name", ["plain_segformer", "upernet"])
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_it_trains_as_a_naive_loop_does(tmp_path, name, teacher):
    """Auxiliary heads of the model's own keep their weight; an image without a class learns nothing."""
    samples = maps_for(name, 6)
    options = {"teacher": teacher, "num_train_epochs": 2, "per_device_train_batch_size": 3, **SGD}
    trainer = run(tmp_path, name, samples, trainer=Visits, **options)
    assert difference(naive(name, samples, trainer.seen, teacher, 0.8, 2), trainer) < 2e-5
    plain = run(tmp_path, name, samples, **options | {"alpha": 0.0, "teacher": "none"})
    assert difference(plain, trainer) > 1e-3
    assert logged(trainer, "rows_with_history")[-1] == 1


# The other promises


@pytest.mark.parametrize("teacher", ["none", "history", "snapshot", "ema"])
def test_accumulation_changes_nothing(tmp_path, teacher):
    """Images have another number of labelled pixels each; the loss of a step is a mean over all of them."""
    samples, options = maps_for("", 12), {"teacher": teacher, **SGD}
    one = run(tmp_path, "plain_segformer", samples, per_device_train_batch_size=6, **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    two = run(tmp_path, "plain_segformer", samples, **options)
    assert difference(one, two) < 1e-5
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=1e-4)


@pytest.mark.parametrize("name", ["segformer", "upernet"])
@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_resume_is_exact(tmp_path, name, teacher):
    options = {"teacher": teacher, "save_strategy": "steps", "save_steps": 3, "seed_transforms": True}
    samples = maps_for(name, transform=add_noise)
    whole = run(tmp_path / "a", name, samples, **options)
    for step in (3, 6):
        resumed = run(tmp_path / "b", name, samples, resume=tmp_path / f"a/checkpoint-{step}", **options)
        assert same_weights(whole.model, resumed.model)
        assert logged(whole, "loss", step) == logged(resumed, "loss", step)


def test_the_order_of_the_samples_does_not_matter(tmp_path):
    samples, order = maps_for("", 6), [3, 0, 5, 1, 4, 2]
    options = {"teacher": "history", "per_device_train_batch_size": 6, **SGD}
    one = run(tmp_path, "plain_segformer", samples, **options)
    other = run(tmp_path, "plain_segformer", Samples([samples.items[n] for n in order]), **options)
    assert difference(one, other) < 1e-5
    stored = one.teacher.stored(order)
    assert stored.shape == (6 * 8 * 8, LABELS)
    torch.testing.assert_close(stored, other.teacher.stored(range(6)), atol=1e-4, rtol=1e-3)


def test_images_that_are_left_out_have_no_past(tmp_path):
    options = {"teacher": "history", "dataloader_drop_last": True, "num_train_epochs": 1, "alpha_schedule": "constant"}
    trainer = run(tmp_path, "segformer", warm_start_teacher=True, **options)
    assert logged(trainer, "rows_with_history") == [1.0] * 3  # of the initial weights
    trainer = run(tmp_path, "segformer", **options | {"num_train_epochs": 2, "train_sampling_strategy": "sequential"})
    missing = trainer.teacher.stored(range(14)).isnan().all(1)
    assert missing.tolist() == [False] * 12 * 64 + [True] * 2  # a row for what is not known


@pytest.mark.parametrize("name", ["segformer", "upernet"])
def test_a_batch_without_a_class_costs_nothing(tmp_path, name):
    samples = Samples([maps_for("").items[3]] * 4)
    trainer = run(tmp_path, name, samples, **SGD)
    assert logged(trainer, "loss") == [0.0] * 3
    assert difference(dict(trainer.model.named_parameters()), dict(make_segmenter(name).named_parameters())) == 0


@pytest.mark.parametrize("name", ["segformer", "dpt", "upernet"])
def test_models_learn(tmp_path, name):
    options = {"num_train_epochs": 6, "eval_dataset": maps_for(name, seed=1), "batch_eval_metrics": True}
    trainer = run(tmp_path, name, compute_metrics=SegmentationMetrics(), **options)
    assert trainer.teacher.kind == "snapshot"
    losses, metrics = logged(trainer, "hard_loss"), trainer.evaluate()
    assert sum(losses[-4:]) < sum(losses[:4]) and 0 <= metrics["eval_mean_iou"] <= 1
    if name not in AUXILIARY:
        assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=0.05)  # a mean over batches there


def test_calibrated_alpha_and_temperature(tmp_path):
    trainer = run(tmp_path, "segformer", alpha_schedule="calibrated", eval_dataset=maps_for("", 6, seed=1))
    assert logged(trainer, "held_out_temperature")
    warm, cold = (run(tmp_path, "plain_segformer", temperature=tau, **SGD) for tau in (1.0, 3.0))
    assert 1e-5 < difference(warm, cold)


def test_a_loss_of_the_users_sees_the_labels_of_the_batch(tmp_path):
    """With 255 as the collator has them; the loss of transformers so given is the run without it."""

    def loss(outputs, labels, num_items_in_batch):
        full = F.interpolate(outputs.logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(full, labels, ignore_index=255, reduction="sum") / num_items_in_batch

    own, ours = (run(tmp_path, "plain_segformer", **SGD, **more) for more in ({"compute_loss_func": loss}, {}))
    assert difference(own, ours) < 1e-5


class Module(torch.nn.Module):
    """A module of one's own without a loss, known by its name alone; -100 is what does not count."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, LABELS, 4, 4)

    def forward(self, pixel_values):
        return {"logits": self.layer(pixel_values)}


class ModuleForSemanticSegmentation(Module):
    """The same by its right name."""


def test_a_module_of_the_users(tmp_path):
    samples = maps_for("", 6, ignored=-100)
    options = {"teacher": "history", "remove_unused_columns": False, **SGD}
    trainer = run(tmp_path, ModuleForSemanticSegmentation(), samples, **options)
    losses = logged(trainer, "hard_loss")
    assert losses[-1] < losses[0] and logged(trainer, "soft_loss")[-1] > 0
    batch = stack(samples.items)
    full = F.interpolate(Module()(batch["pixel_values"])["logits"], 16, mode="bilinear")
    assert losses[0] < 2 * float(F.cross_entropy(full, batch["labels"]))
    refused(lambda: run(tmp_path, Module(), samples, **options), "logits")


# What is refused


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"auxiliary_heads": "byot"}, ("auxiliary_heads", "semantic segmentation", "pixels")),
        ({"teacher": "rank"}, ("rank", "several classes")),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor",)),
        ({"chunked_logits": True}, ("chunked_logits",)),
        ({"history_trace": True}, ("history_trace", "each pixel")),
        ({"data_collator": SelfKDDataCollator(stack, mixup_alpha=1.0), "teacher": "snapshot"}, ("mixup",)),
        ({"teacher": "history", "history_max_bytes": 1000}, ("896 rows x 4 classes", "28672 bytes", "snapshot")),
    ],
)
def test_what_is_refused(tmp_path, options, parts):
    refused(lambda: run(tmp_path, "segformer", **options), *parts)


def test_a_history_of_moving_pixels_is_refused(tmp_path):
    def flip(item):
        turned = torch.rand(()) < 0.5
        return {name: value.flip(-1) if turned else value for name, value in item.items()}

    refused(lambda: run(tmp_path, "segformer", maps_for("", transform=flip), teacher="history"), "crops and flips")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda labels: labels.masked_fill(labels == 1, 4), ("is 4", "4 classes")),
        (lambda labels: labels.masked_fill(labels == 1, -100), ("-100", "255")),
        (lambda labels: labels.unsqueeze(0), ("[4, 1, 16, 16]", "[batch, height, width]")),
        (lambda labels: labels.float(), ("torch.float32",)),
    ],
)
def test_labels_that_cannot_be(tmp_path, change, parts):
    items = [item | {"labels": change(item["labels"])} for item in maps_for("").items]
    refused(lambda: run(tmp_path, "segformer", Samples(items)), *parts)


def test_one_score_a_pixel_is_refused(tmp_path):
    config = make_segmenter("segformer").config
    config.num_labels = 1
    model = tf.SegformerForSemanticSegmentation(config)
    refused(lambda: run(tmp_path, model), "num_labels=1", "num_labels=2")


# Metrics


def scores(size=(3, 5), seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=(3, 12, 10))
    labels[rng.random(labels.shape) < 0.3] = 255
    return rng.normal(size=(3, 4, *size)) * 3, labels


@pytest.mark.parametrize("size", [(3, 5), (12, 10), (1, 1), (24, 20)])
def test_metrics_against_loops(size):
    logits, labels = scores(size)
    full = F.interpolate(torch.tensor(logits), labels.shape[1:], mode="bilinear").permute(0, 2, 3, 1).softmax(-1)
    known = torch.tensor(labels) != 255
    probs, classes = full[known], torch.tensor(labels)[known]
    told = probs.argmax(-1)
    overlap = [((told == c) & (classes == c)).sum() / ((told == c) | (classes == c)).sum() for c in range(4)]
    recall = [(told[classes == c] == c).double().mean() for c in range(4)]
    gaps = 0.0
    for low in np.arange(10) / 10:
        inside = (probs.amax(-1) > low) & (probs.amax(-1) <= low + 0.1)
        gaps += abs(float(((told == classes).double() - probs.amax(-1))[inside].sum()))
    expected = {
        "mean_iou": float(np.mean(overlap)),
        "mean_accuracy": float(np.mean(recall)),
        "pixel_accuracy": float((told == classes).double().mean()),
        "nll": float(F.nll_loss(probs.log(), classes)),
        "ece": 100 * gaps / len(classes),
    }
    assert segmentation_metrics(logits, labels) == pytest.approx(expected, rel=1e-5)
    assert segmentation_metrics(torch.tensor(logits), torch.tensor(labels)) == pytest.approx(expected, rel=1e-5)
    metrics = SegmentationMetrics()
    assert metrics((logits[:2], labels[:2]), compute_result=False) == {}
    assert metrics((logits[2:], labels[2:]), compute_result=True) == pytest.approx(expected, rel=1e-5)
    assert metrics((list(logits[:, None]), list(labels[:, None]))) == pytest.approx(expected, rel=1e-5)


def test_intersection_over_union_is_that_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    logits, labels = scores((12, 10))
    metric = torchmetrics.JaccardIndex(task="multiclass", num_classes=4, ignore_index=255)
    expected = float(metric(torch.tensor(logits).argmax(1), torch.tensor(labels)))
    assert segmentation_metrics(logits, labels)["mean_iou"] == pytest.approx(expected, rel=1e-5)


def test_classes_that_are_nowhere_do_not_count():
    logits = torch.tensor([[[[5.0, 0.0]], [[0.0, 5.0]], [[-9.0, -9.0]]]])
    metrics = segmentation_metrics(logits, torch.tensor([[[0, 0]]]))
    assert metrics["mean_iou"] == pytest.approx((1 / 2 + 0) / 2) and metrics["mean_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("predictions", "labels", "parts"),
    [
        (np.zeros((1, 2, 3)), np.zeros((1, 3), int), ("shape",)),
        (np.zeros((1, 2, 3, 3)), np.full((1, 3, 3), 2), ("outside 0..1",)),
        (np.zeros((1, 2, 3, 3)), np.full((1, 3, 3), 255), ("no pixel",)),
        (np.full((1, 2, 3, 3), math.nan), np.zeros((1, 3, 3), int), ("NaN",)),
        (np.zeros((0, 2, 3, 3)), np.zeros((0, 3, 3), int), ("no image",)),
    ],
)
def test_metrics_that_cannot_be(predictions, labels, parts):
    refused(lambda: segmentation_metrics(predictions, labels), *parts)


def test_metrics_of_what_went_astray(caplog):
    found = compute_segmentation_metrics((np.full((1, 2, 3, 3), math.nan), np.zeros((1, 3, 3), int)))
    assert all(map(math.isnan, found.values())) and "NaN" in caplog.text
