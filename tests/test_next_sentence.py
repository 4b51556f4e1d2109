"""Next sentence prediction: one row a pair of texts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import Samples, difference, logged, refused, same_weights, set_seed, train

from hf_selfkd import SelfKDTrainer
from hf_selfkd.metrics import compute_classification_metrics
from hf_selfkd.tasks import TASKS, task_for
from hf_selfkd.tasks.next_sentence import NextSentence


pytestmark = pytest.mark.trains


TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
MODELS = {
    "bert": lambda: tf.BertForNextSentencePrediction(tf.BertConfig(**TEXT, max_position_embeddings=16)),
    "plain_bert": lambda: tf.BertForNextSentencePrediction(tf.BertConfig(**TEXT | PLAIN)),
    "many_labels": lambda: tf.BertForNextSentencePrediction(tf.BertConfig(**TEXT, num_labels=5)),
    "one_label": lambda: tf.BertForNextSentencePrediction(tf.BertConfig(**TEXT, num_labels=1)),
    "ernie": lambda: tf.ErnieForNextSentencePrediction(tf.ErnieConfig(**TEXT)),
    "fnet": lambda: tf.FNetForNextSentencePrediction(
        tf.FNetConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    ),
    "megatron": lambda: tf.MegatronBertForNextSentencePrediction(tf.MegatronBertConfig(**TEXT)),
    "mobilebert": lambda: tf.MobileBertForNextSentencePrediction(
        tf.MobileBertConfig(
            **TEXT, embedding_size=16, intra_bottleneck_size=8, num_feedforward_networks=1, true_hidden_size=8
        )
    ),
}
SGD = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def make(name):
    set_seed(0)
    return MODELS[name]()


def pairs(size=14, seed=0, key="labels"):
    """The second text goes on from the first (0) where both begin alike."""
    rng, items = np.random.default_rng(seed), []
    for _ in range(size):
        words, label = rng.integers(5, 30, size=(2, 3)), int(rng.integers(2))
        words[1, 0] = words[0, 0] if label == 0 else 4
        items.append({"input_ids": words.reshape(-1), "token_type_ids": np.repeat([0, 1], 3), key: label})
    return Samples(items)


def stack(items):
    return {name: torch.tensor(np.stack([item[name] for item in items])) for name in items[0]}


def run(folder, name, samples=None, **options):
    samples = pairs() if samples is None else samples
    return train(folder, make(name), samples, **({"data_collator": stack} | options))


def test_every_class_of_the_mapping_is_known():
    for name in tf.models.auto.modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES.values():
        model = object.__new__(getattr(tf, name))
        assert [task for task in TASKS if task.matches(model)] == [NextSentence], name


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_model(name):
    model, inputs = make(name).eval(), stack(pairs(5).items)
    task = task_for(model)
    with torch.no_grad():
        outputs = model(**inputs)
    rows = task.rows_of(task.logits(outputs, has_loss=True), task.split(inputs))
    assert rows.logits.shape == (5, 2) == (5, task.num_classes) and type(task) is NextSentence
    torch.testing.assert_close(F.cross_entropy(rows.logits, rows.labels), outputs.loss)


@pytest.mark.parametrize("name", MODELS)
def test_alpha_0_is_the_stock_class(tmp_path, name):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 7}
    stock = run(tmp_path, name, trainer=tf.Trainer, **options)
    assert same_weights(stock.model, run(tmp_path, name, **options, alpha=0.0).model)


class Table(tf.BertForNextSentencePrediction):
    """Scores from a table."""

    def __init__(self):
        super().__init__(tf.BertConfig(**TEXT))
        self.scores = torch.nn.Parameter(torch.tensor([math.log(3), 0.0]))
        for name in ("bert", "cls"):
            delattr(self, name)

    def forward(self, input_ids, labels=None):
        return {"logits": self.scores.expand(len(input_ids), -1)}


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_the_loss_worked_out_on_paper(tmp_path, teacher):
    """Probabilities 3/4 and 1/4, label 1, alpha 1/2: the target is 3/8 and 5/8."""
    options = {"alpha": 0.5, "alpha_schedule": "constant", "learning_rate": 0.0, "num_train_epochs": 2}
    samples = Samples([{"input_ids": np.array([5, 6]), "labels": 1}])
    trainer = train(tmp_path, Table(), samples, data_collator=stack, teacher=teacher, **options)
    second = -(3 / 8 * math.log(3 / 4) + 5 / 8 * math.log(1 / 4))
    assert logged(trainer, "loss") == pytest.approx([math.log(4), second], rel=1e-4)


def naive(samples, visits, alpha, epochs):
    model, past, steps = make("plain_bert").train(), {}, len(visits) // epochs
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    for epoch in range(epochs):
        seen = {}
        for ids in visits[epoch * steps : (epoch + 1) * steps]:
            batch = stack([samples.items[n] for n in ids])
            labels, loss = batch.pop("labels"), 0.0
            log_probs, weight = model(**batch).logits.log_softmax(-1), alpha * (epoch + 1) / epochs
            for row, n, label in zip(log_probs, ids, labels.tolist(), strict=True):
                seen[n] = row.detach().exp()
                target = torch.eye(2)[label]
                target = target if n not in past else (1 - weight) * target + weight * past[n]
                loss = loss - (target * row).sum() / len(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        past |= seen
    return model


class Visits(SelfKDTrainer):
    """Notes the ids of each batch."""

    def compute_loss(self, *arguments, **keywords):
        self.__dict__.setdefault("seen", []).append(self.sample_ids.tolist())
        return super().compute_loss(*arguments, **keywords)


@pytest.mark.parametrize("drop", [False, True])
def test_it_trains_as_a_naive_loop_does(tmp_path, drop):
    """Also where the end of an epoch is dropped, whose samples keep the past that they have."""
    trainer = run(tmp_path, "plain_bert", trainer=Visits, dataloader_drop_last=drop, **SGD)
    assert sum(map(len, trainer.seen)) == 3 * (12 if drop else 14)
    assert trainer.teacher.kind == "history"
    assert difference(naive(pairs(), trainer.seen, 0.8, 3), trainer) < 2e-5
    assert difference(run(tmp_path, "plain_bert", alpha=0.0, **SGD), trainer) > 1e-3


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_resume_is_exact(tmp_path, teacher):
    options = {"teacher": teacher, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "a", "bert", **options)
    resumed = run(tmp_path / "b", "bert", resume=tmp_path / "a/checkpoint-6", **options)
    assert same_weights(whole.model, resumed.model)
    assert logged(whole, "loss", 6) == logged(resumed, "loss", 6)


def test_the_order_of_the_samples_does_not_matter(tmp_path):
    samples, order = pairs(6), [3, 0, 5, 1, 4, 2]
    options = {"per_device_train_batch_size": 6, **SGD}
    one = run(tmp_path, "plain_bert", samples, **options)
    other = run(tmp_path, "plain_bert", Samples([samples.items[n] for n in order]), **options)
    assert difference(one, other) < 1e-5
    torch.testing.assert_close(one.teacher.stored(order), other.teacher.stored(range(6)), atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The `next_sentence_label` argument:FutureWarning")
def test_the_old_name_of_the_labels(tmp_path):
    """As BERT took them once; the stock class then needs to be told their name."""
    old, options = pairs(key="next_sentence_label"), {"remove_unused_columns": False}
    told = run(tmp_path, "bert", old, label_names=["next_sentence_label"], **options)
    untold = run(tmp_path, "bert", old, **options)
    ours = run(tmp_path, "bert")
    assert same_weights(told.model, ours.model) and same_weights(untold.model, ours.model)


@pytest.mark.parametrize("preset", ["byot", "deep_supervision"])
def test_it_trains_with_heads(tmp_path, preset):
    options = {"auxiliary_heads": preset, "eval_dataset": pairs(), "compute_metrics": compute_classification_metrics}
    trainer = run(tmp_path, "bert", **options)
    assert math.isfinite(logged(trainer, "head0_loss")[-1]) and 0 <= trainer.evaluate()["eval_accuracy"] <= 1


@pytest.mark.filterwarnings("ignore:The `next_sentence_label` argument:FutureWarning")
def test_what_is_refused(tmp_path):
    unlabelled = Samples([{k: v for k, v in item.items() if k != "labels"} for item in pairs().items])
    refused(lambda: run(tmp_path, "bert", unlabelled), "'labels' or 'next_sentence_label'")
    three = Samples([item | {"labels": 2} for item in pairs().items])
    refused(lambda: run(tmp_path, "bert", three), "label 2", "2 classes")
    refused(lambda: run(tmp_path, "bert", teacher="rank"), "rank", "2 classes")
