"""Several labels a sample: a row for each class, of no and yes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import (
    Samples,
    add_noise,
    collate,
    difference,
    logged,
    make_samples,
    refused,
    same_weights,
    set_seed,
    train,
)
from helpers import make_model as single_label_model

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDDataCollator, SelfKDTrainer
from hf_selfkd.config import MethodArguments
from hf_selfkd.heads import heads_of
from hf_selfkd.heads.auxiliary import split_auxiliary
from hf_selfkd.history.codec import Codec
from hf_selfkd.history.plan import plan_history
from hf_selfkd.metrics import compute_multi_label_metrics, is_lower_better, multi_label_metrics
from hf_selfkd.tasks import task_for
from hf_selfkd.tasks.multi_label import MultiLabelClassification


pytestmark = pytest.mark.trains


CLASSES = 3
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
MODELS = ("plain_vit", "vit", "resnet", "bert", "plain_bert", "distilbert", "timm", "gpt2", "roberta")
OTHERS = {
    "gpt2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=0)
    ),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=18,
            pad_token_id=0,
        )
    ),
}


def make(name, layers=None):
    """A model of `CLASSES` independent classes."""
    config = (OTHERS[name]() if name in OTHERS else single_label_model(name)).config
    cls = type(OTHERS[name]() if name in OTHERS else single_label_model(name))
    config.num_labels, config.problem_type = CLASSES, "multi_label_classification"
    if layers is not None:
        config.num_hidden_layers = layers
    set_seed(0)
    return cls(config)


def samples_for(name, size=14, transform=None):
    kind = "texts" if name in OTHERS else name
    items = make_samples(kind, size).items
    return Samples([i | {"labels": labels_of(i["labels"])} for i in items], transform)


def labels_of(label):
    """Classes 0 to 4 as three answers."""
    return [float(label > 1), float(label % 2), float(label == 4)]


def stack(items):
    labels = torch.tensor([item["labels"] for item in items])
    return collate([item | {"labels": 0} for item in items]) | {"labels": labels}


def run(folder, name, samples=None, **options):
    model = make(name) if isinstance(name, str) else name
    samples = samples_for(name) if samples is None else samples
    return train(folder, model, samples, **({"data_collator": stack} | options))


# Rows


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_model(name):
    """A row a class; their mean cross-entropy is the loss of the model."""
    model = make(name).eval()
    task, inputs = task_for(model), stack(samples_for(name).items[:5])
    assert type(task) is MultiLabelClassification
    with torch.no_grad():
        outputs = model(**inputs)
    batch = task.split(inputs)
    rows = task.rows_of(task.logits(outputs, has_loss=True), batch)
    assert rows.logits.shape == (5 * CLASSES, 2) and rows.labels.tolist() == inputs["labels"].reshape(-1).tolist()
    torch.testing.assert_close(rows.logits.softmax(-1)[:, 1], outputs.logits.sigmoid().reshape(-1))
    torch.testing.assert_close(F.cross_entropy(rows.logits, rows.labels), outputs.loss)
    assert torch.equal(task.inputs_with_labels(batch, batch.labels)["labels"], inputs["labels"])
    loss, total = rows.hard_loss([type("Target", (), {"labels": rows.labels})], 15)
    assert torch.equal(loss, outputs.loss) and torch.isclose(total, rows.hard_sum(rows.labels))


@pytest.mark.parametrize("name", MODELS)
def test_alpha_0_is_the_stock_class(tmp_path, name):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 7}
    stock = run(tmp_path, name, trainer=tf.Trainer, **options)
    for more in ({"alpha": 0.0}, {"teacher": "none"}, {"alpha": 0.0, "history_trace": True}):
        assert same_weights(stock.model, run(tmp_path, name, **options, **more).model), more


# By hand


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_the_loss_worked_out_on_paper(tmp_path, teacher):
    """Log-odds log 3 and -log 4: yes with 3/4 and 1/5. Labels 1 and 1, alpha 1/2: targets 7/8 and 3/5."""

    class Table(tf.BertForSequenceClassification):
        def __init__(self):
            super().__init__(tf.BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
            self.config.num_labels, self.config.problem_type = 2, "multi_label_classification"
            self.odds = torch.nn.Parameter(torch.tensor([math.log(3), -math.log(4)]))
            for name in ("bert", "classifier", "dropout"):
                delattr(self, name)

        def forward(self, input_ids, labels=None):
            return {"logits": self.odds.expand(len(input_ids), -1)}

    trainer = run(
        tmp_path,
        Table(),
        Samples([{"input_ids": [3, 4], "labels": [1.0, 1.0]}]),
        data_collator=lambda items: {k: torch.tensor([i[k] for i in items]) for k in ("input_ids", "labels")},
        teacher=teacher,
        num_train_epochs=2,
        alpha=0.5,
        alpha_schedule="constant",
        learning_rate=0.0,
    )
    log = math.log
    first = -(log(3 / 4) + log(1 / 5)) / 2
    second = -(7 / 8 * log(3 / 4) + 1 / 8 * log(1 / 4) + 3 / 5 * log(1 / 5) + 2 / 5 * log(4 / 5)) / 2
    assert logged(trainer, "loss") == pytest.approx([first, second], rel=1e-4)
    if teacher == "history":
        torch.testing.assert_close(trainer.teacher.stored([0]), torch.tensor([[3 / 4, 1 / 5]]))


# Against a loop of its own


class Visits(SelfKDTrainer):
    """Notes the ids and the mixing of each batch."""

    def compute_loss(self, *arguments, **keywords):
        self.__dict__.setdefault("seen", []).append(self._batches.present)
        return super().compute_loss(*arguments, **keywords)


def naive(name, samples, visits, teacher, alpha, epochs):
    """With sigmoids and a dictionary, class by class."""
    model, past, frozen = make(name).train(), {}, None
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    steps = len(visits) // epochs
    for epoch in range(epochs):
        seen = {}
        for record in visits[epoch * steps : (epoch + 1) * steps]:
            ids, partner, share = record.ids.tolist(), record.partner, record.weight
            batch = stack([samples.items[n] for n in ids])
            labels = batch.pop("labels")
            if partner is not None:
                pixels = batch["pixel_values"]
                batch["pixel_values"] = share * pixels + (1 - share) * pixels[partner]
            odds, loss = model(**batch).logits, 0.0
            if frozen is not None:
                with torch.no_grad():
                    told = frozen(**batch).logits.sigmoid()
            weight = alpha * (epoch + 1) / epochs
            for place, n in enumerate(ids):
                for c in range(CLASSES):
                    prob = odds[place, c].sigmoid()
                    goals = []
                    for other in (place, place if partner is None else int(partner[place])):
                        believed = past.get((ids[other], c)) if frozen is None else told[place, c]
                        label = labels[other, c]
                        goals.append(label if believed is None else (1 - weight) * label + weight * believed)
                    goal = goals[0]
                    if partner is not None:
                        goal = share * goals[0] + (1 - share) * goals[1]
                    else:
                        seen[n, c] = prob.detach()
                    loss = loss - (goal * prob.log() + (1 - goal) * (1 - prob).log()) / (len(ids) * CLASSES)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if teacher == "history":
            past = past | seen
        else:
            frozen = make(name).eval()
            frozen.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_it_trains_as_a_naive_loop_does(tmp_path, teacher, mixes):
    """Mixed images learn from both images' labels and pasts; a history keeps what unmixed batches say."""
    samples, options = samples_for("plain_vit"), {"teacher": teacher, "trainer": Visits, "num_train_epochs": 4, **SGD}
    if mixes:
        options["data_collator"] = SelfKDDataCollator(stack, mixup_alpha=1.0, mix_probability=0.5)
    trainer = run(tmp_path, "plain_vit", samples, **options)
    kinds = {record.partner is None for record in trainer.seen}
    assert kinds == ({True, False} if mixes else {True})
    assert difference(naive("plain_vit", samples, trainer.seen, teacher, 0.8, 4), trainer) < 2e-5
    assert difference(run(tmp_path, "plain_vit", samples, alpha=0.0, **SGD), trainer) > 1e-3


# The other promises


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_accumulation_changes_nothing(tmp_path, teacher):
    samples, options = samples_for("plain_vit", 12), {"teacher": teacher, **SGD}
    one = run(tmp_path, "plain_vit", samples, per_device_train_batch_size=6, **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert difference(one, run(tmp_path, "plain_vit", samples, **options)) < 1e-5


@pytest.mark.parametrize("name", ["vit", "resnet", "bert"])
@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_resume_is_exact(tmp_path, name, teacher):
    options = {"teacher": teacher, "save_strategy": "steps", "save_steps": 3, "seed_transforms": True}
    samples = samples_for(name, transform=None if name == "bert" else add_noise)
    whole = run(tmp_path / "a", name, samples, **options)
    for step in (3, 6):
        resumed = run(tmp_path / "b", name, samples, resume=tmp_path / f"a/checkpoint-{step}", **options)
        assert same_weights(whole.model, resumed.model)
        assert logged(whole, "loss", step) == logged(resumed, "loss", step)


def test_the_order_of_the_samples_does_not_matter(tmp_path):
    samples, order = samples_for("plain_vit", 6), [3, 0, 5, 1, 4, 2]
    options = {"teacher": "history", "per_device_train_batch_size": 6, **SGD}
    one = run(tmp_path, "plain_vit", samples, **options)
    other = run(tmp_path, "plain_vit", Samples([samples.items[n] for n in order]), **options)
    assert difference(one, other) < 1e-5
    torch.testing.assert_close(one.teacher.stored(order), other.teacher.stored(range(6)), atol=1e-5, rtol=1e-4)


def test_what_is_stored(tmp_path):
    """The probability of each class, NaN where a sample was not seen; one number a class."""
    trainer = run(tmp_path, "plain_vit", teacher="history", dataloader_drop_last=True, num_train_epochs=1, alpha=0.0,
                  history_trace=True)  # fmt: skip
    stored = trainer.teacher.stored(range(14))
    assert stored.shape == (14, CLASSES) and stored.isnan().all(-1).sum() == 2
    known = ~stored[:, 0].isnan()
    assert ((stored[known] > 0) & (stored[known] < 1)).all() and trainer.teacher.history.codec.row_bytes == 4
    half = run(tmp_path, "plain_vit", teacher="history", history_dtype="float16", num_train_epochs=2, **SGD)
    whole = run(tmp_path, "plain_vit", teacher="history", num_train_epochs=2, **SGD)
    assert half.teacher.history.codec.row_bytes == 2 and 0 < difference(half, whole) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_log_odds_are_stored(dtype):
    odds = torch.tensor([-30.0, -1.0, 0.0, 2.0, 40.0, math.nan])
    codec = Codec(2, dtype, bernoulli=True)
    rows = F.pad(odds[:, None], (1, 0)).log_softmax(-1)
    parts = codec.encode(rows)
    assert parts["log_probs"].shape == (6, 1) and codec.row_bytes == dtype.itemsize
    told = codec.decode(parts, torch.ones(6).bool())
    torch.testing.assert_close(told.log_probs.exp(), rows.exp(), equal_nan=True, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(told.log_probs[:5].exp().sum(-1), torch.ones(5))
    assert told.num_classes == 2


def test_a_history_that_does_not_fit(tmp_path):
    config = MethodArguments(history_max_bytes=100)
    message = refused(lambda: plan_history(config, 100, 2, torch.device("cpu"), tmp_path, bernoulli=True), "snapshot")
    assert "history_top_k" not in message


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
@pytest.mark.parametrize("name", ["resnet", "distilbert", "gpt2"])
def test_models_learn(tmp_path, name, teacher):
    options = {
        "num_train_epochs": 6,
        "eval_dataset": samples_for(name),
        "compute_metrics": compute_multi_label_metrics,
    }
    trainer = run(tmp_path, name, teacher=teacher, **options)
    losses = logged(trainer, "hard_loss")
    assert sum(losses[-4:]) < sum(losses[:4]) and trainer.teacher.kind == teacher
    metrics = trainer.evaluate()
    assert metrics["eval_bce"] == pytest.approx(metrics["eval_loss"], rel=1e-4) and metrics["eval_micro_f1"] > 0.3


def test_calibrated_alpha_and_warm_start(tmp_path):
    trainer = run(tmp_path, "vit", alpha_schedule="calibrated", eval_dataset=samples_for("vit"))
    assert logged(trainer, "held_out_temperature")
    trainer = run(tmp_path, "vit", teacher="history", warm_start_teacher=True, num_train_epochs=1)
    assert logged(trainer, "rows_with_history") == [1.0] * 4


def test_a_loss_of_the_users_sees_the_labels_of_the_batch(tmp_path):
    """Floats, as the collator made them; plain cross-entropy so given is plain training."""

    def loss(outputs, labels, num_items_in_batch):
        assert labels.dtype == torch.float32 and labels.shape == outputs.logits.shape
        return F.binary_cross_entropy_with_logits(outputs.logits, labels, reduction="sum") / num_items_in_batch

    options = {"teacher": "history", **SGD}
    own, ours = (run(tmp_path, "plain_vit", **options, **more) for more in ({"compute_loss_func": loss}, {}))
    assert difference(own, ours) < 1e-5


# Heads


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
@pytest.mark.parametrize("preset", ["byot", "deep_supervision"])
def test_it_trains_with_heads(tmp_path, preset, teacher):
    model = make("plain_bert", layers=2)
    options = {"auxiliary_heads": preset, "teacher": teacher, "eval_dataset": samples_for("bert")}
    trainer = run(tmp_path, model, samples_for("bert"), evaluate_heads=True, **options)
    assert 0 <= logged(trainer, "head0_accuracy")[-1] <= 1 and math.isfinite(logged(trainer, "head0_loss")[-1])
    assert 0 <= trainer.evaluate()["eval_head0_accuracy"] <= 1


def test_the_loss_of_heads_by_hand(tmp_path):
    """Labels, and the distance of the features, averaged over samples; KL of no and yes."""
    config = AuxiliaryHeadsConfig(
        head="linear", views="none", hard_weight=0.7, deep_to_shallow_weight=0.2, feature_weight=0.3, temperature=2.0
    )
    model, samples = make("plain_bert", layers=2), samples_for("bert", 8)
    trainer = run(
        tmp_path, model, samples, auxiliary_heads=config, alpha=0.0, per_device_train_batch_size=8,
        num_train_epochs=1, learning_rate=0.0,
    )  # fmt: skip
    batch = stack(samples.items)
    labels, heads = batch.pop("labels"), heads_of(model)
    outputs, results = split_auxiliary(heads, model.train()(**batch))
    odds, (head,) = outputs.logits, results.logits
    bce = F.binary_cross_entropy_with_logits
    soft, own = (odds / 2).sigmoid(), (head / 2).sigmoid()
    away = soft * (soft / own).log() + (1 - soft) * ((1 - soft) / (1 - own)).log()
    expected = bce(odds, labels) + 0.7 * bce(head, labels) + 0.2 * 4 * away.mean()
    expected = expected + 0.3 * (results.features[0] - results.deep).square().mean()
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-4)


# What is refused


def changed(**values):
    return Samples([item | values for item in samples_for("vit").items])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"history_top_k": 1, "teacher": "history"}, ("history_top_k=1", "multi-label")),
        ({"teacher": "rank"}, ("rank", "multi-label")),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor",)),
        ({"auxiliary_heads": "lsskd_full"}, ("views='rotation'",)),
        ({"samples": changed(labels=[0.0, 0.5, 1.0])}, ("neither 0 nor 1", "sample_id=", "SelfKDDataCollator")),
        ({"samples": changed(labels=[0.0, math.nan, 1.0])}, ("neither 0 nor 1",)),
        ({"samples": changed(labels=1.0)}, ("[batch, classes]", "multi_label_classification")),
        ({"samples": changed(labels=[1.0, 0.0])}, ("[4, 2]",)),
    ],
)
def test_what_is_refused(tmp_path, options, parts):
    refused(lambda: run(tmp_path, "vit", **options), *parts)


def test_models_that_know_one_label_only():
    """An audio classifier whose loss is cross-entropy, whatever `problem_type` says."""
    config = single_label_model("wav2vec2").config
    config.problem_type = "multi_label_classification"
    refused(lambda: task_for(tf.Wav2Vec2ForSequenceClassification(config)), "Wav2Vec2ForSequence", "one label")


# Metrics


def scores(seed, size=60, classes=4):
    rng = np.random.default_rng(seed)
    odds = rng.normal(size=(size, classes)).round(1) * 2  # with ties
    return odds, (rng.random((size, classes)) < 1 / (1 + np.exp(-odds))).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_others(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    odds, labels = scores(seed)
    odds += 0.01  # no probability on the edge of a bin
    found, told = multi_label_metrics(odds, labels), odds > 0
    assert found["micro_f1"] == pytest.approx(sklearn.f1_score(labels, told, average="micro"))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels, told, average="macro"))
    assert found["map"] == pytest.approx(sklearn.average_precision_score(labels, odds, average="macro"))
    assert found["subset_accuracy"] == pytest.approx(sklearn.accuracy_score(labels, told))
    logits, answers = torch.tensor(odds), torch.tensor(labels)
    assert found["bce"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, answers.double()).item())
    ece = [torchmetrics.binary_calibration_error(logits[:, c].sigmoid(), answers[:, c].int(), 10) for c in range(4)]
    assert found["ece"] == pytest.approx(100 * float(torch.stack(ece).mean()), rel=1e-5)


def test_metrics_of_any_container(tmp_path):
    odds, labels = scores(7)
    whole = multi_label_metrics(odds, labels)
    assert multi_label_metrics((torch.tensor(odds), None), torch.tensor(labels).int()) == pytest.approx(whole)
    assert multi_label_metrics([odds[:20], odds[20:]], [labels[:20], labels[20:]]) == pytest.approx(whole)
    assert multi_label_metrics(1 / (1 + np.exp(-odds)), labels, from_logits=False) == pytest.approx(whole)
    assert compute_multi_label_metrics((odds[:20], labels[:20]), compute_result=False) == {}
    assert compute_multi_label_metrics((odds[20:], labels[20:]), compute_result=True) == pytest.approx(whole)
    assert all(math.isnan(v) for v in compute_multi_label_metrics((odds * math.nan, labels)).values())
    none = multi_label_metrics(odds, np.zeros_like(labels))
    assert math.isnan(none["map"]) and none["micro_f1"] == 0
    assert is_lower_better("eval_bce") and not is_lower_better("eval_map")


@pytest.mark.parametrize(
    ("predictions", "labels", "parts"),
    [
        (np.zeros((3, 2)), np.zeros((3, 3)), ("(3, 3)", "(3, 2)")),
        (np.zeros((3, 2)), np.full((3, 2), 0.5), ("0.5", "neither 0 nor 1")),
        (np.full((3, 2), math.nan), np.zeros((3, 2)), ("NaN",)),
        (np.zeros((0, 2)), np.zeros((0, 2)), ("shape",)),
    ],
)
def test_metrics_that_cannot_be(predictions, labels, parts):
    refused(lambda: multi_label_metrics(predictions, labels), *parts)
