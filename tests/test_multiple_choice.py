"""Multiple choice: rows over the choices of a sample."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import Samples, difference, logged, refused, same_weights, set_seed, train

from hf_selfkd import SelfKDDataCollator, SelfKDTrainer
from hf_selfkd.tasks import task_for
from hf_selfkd.tasks.multiple_choice import MultipleChoice


pytestmark = pytest.mark.trains


TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
MODELS = {
    "bert": lambda: tf.BertForMultipleChoice(tf.BertConfig(**TEXT, max_position_embeddings=16)),
    "plain_bert": lambda: tf.BertForMultipleChoice(tf.BertConfig(**TEXT, **PLAIN, max_position_embeddings=16)),
    "one_label": lambda: tf.BertForMultipleChoice(tf.BertConfig(**TEXT, num_labels=1)),
    "roberta": lambda: tf.RobertaForMultipleChoice(
        tf.RobertaConfig(**TEXT, max_position_embeddings=18, pad_token_id=0)
    ),
    "distilbert": lambda: tf.DistilBertForMultipleChoice(
        tf.DistilBertConfig(vocab_size=30, dim=16, hidden_dim=16, n_layers=1, n_heads=2)
    ),
    "xlnet": lambda: tf.XLNetForMultipleChoice(
        tf.XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=16)
    ),
}
SGD = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def make(name):
    set_seed(0)
    return MODELS[name]()


def questions(size=14, choices=(4,), seed=0):
    """Word 3 stands in the right choice only; sample n has `choices[n % len(choices)]` of them."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(size):
        texts = rng.integers(5, 30, size=(choices[number % len(choices)], 6))
        label = int(rng.integers(len(texts)))
        texts[label, 2] = 3
        items.append({"input_ids": texts, "labels": label})
    return Samples(items)


def stack(items):
    """A batch has the choices of its first sample with the fewest."""
    choices = min(len(item["input_ids"]) for item in items)
    ids = torch.tensor(np.stack([item["input_ids"][:choices] for item in items]))
    labels = torch.tensor([item["labels"] for item in items]) % choices
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run(folder, name, samples=None, **options):
    return train(folder, make(name), samples or questions(), **({"data_collator": stack} | options))


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_model(name):
    model = make(name).eval()
    task, inputs = task_for(model), stack(questions(5).items)
    assert type(task) is MultipleChoice and task.num_classes is None
    with torch.no_grad():
        outputs = model(**inputs)
    rows = task.rows(task.logits(outputs, has_loss=True), inputs["labels"])
    assert rows.logits.shape == (5, 4)
    torch.testing.assert_close(F.cross_entropy(rows.logits, rows.labels), outputs.loss)


@pytest.mark.parametrize("name", MODELS)
def test_alpha_0_is_the_stock_class(tmp_path, name):
    stock = run(tmp_path, name, trainer=tf.Trainer, num_train_epochs=2)
    ours = run(tmp_path, name, alpha=0.0, num_train_epochs=2)
    assert same_weights(stock.model, ours.model)


class Table(tf.BertForMultipleChoice):
    """Scores from a table; the hard loss is that of the rows."""

    def __init__(self):
        super().__init__(tf.BertConfig(**TEXT))
        self.scores = torch.nn.Parameter(torch.tensor([math.log(2), 0.0, 0.0]))
        for name in ("bert", "classifier", "dropout"):
            delattr(self, name)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"logits": self.scores.expand(len(input_ids), -1)}


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_the_loss_worked_out_on_paper(tmp_path, teacher):
    """Probabilities 1/2, 1/4, 1/4; first and third are right; at alpha 1/2: 3/4, 1/8, 1/8 and 1/4, 1/8, 5/8."""
    options = {"alpha": 0.5, "alpha_schedule": "constant", "learning_rate": 0.0, "num_train_epochs": 2}
    samples = Samples([{"input_ids": np.full((3, 2), 5), "labels": label} for label in (0, 2)])
    trainer = train(tmp_path, Table(), samples, data_collator=stack, teacher=teacher, **options)
    half, quarter = math.log(2), math.log(4)
    second = (3 / 4 * half + 1 / 4 * quarter + 1 / 4 * half + 3 / 4 * quarter) / 2
    assert logged(trainer, "loss") == pytest.approx([(half + quarter) / 2, second], rel=1e-4)


class Visits(SelfKDTrainer):
    """Notes the ids of each batch."""

    def compute_loss(self, *arguments, **keywords):
        self.__dict__.setdefault("seen", []).append(self.sample_ids.tolist())
        return super().compute_loss(*arguments, **keywords)


def naive(samples, visits, teacher, alpha, epochs):
    """Sample by sample, with a dictionary of what was believed."""
    model, past, frozen = make("plain_bert").train(), {}, None
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    steps = len(visits) // epochs
    for epoch in range(epochs):
        seen = {}
        for ids in visits[epoch * steps : (epoch + 1) * steps]:
            batch = stack([samples.items[n] for n in ids])
            labels = batch.pop("labels").tolist()
            scores, loss = model(**batch).logits, 0.0
            if frozen is not None:
                with torch.no_grad():
                    past = dict(zip(ids, frozen(**batch).logits.softmax(-1), strict=True))
            for row, n, label in zip(scores, ids, labels, strict=True):
                seen[n] = row.detach().softmax(0)
                target = torch.zeros(len(row))
                target[label] = 1.0
                if n in past:
                    weight = alpha * (epoch + 1) / epochs
                    target = (1 - weight) * target + weight * past[n]
                loss = loss - (target * row.log_softmax(0)).sum() / len(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if teacher == "history":
            past = past | seen
        else:
            frozen = make("plain_bert").eval()
            frozen.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize(("choices", "drop"), [((4,), False), ((4,), True), ((4, 2), False)])
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_it_trains_as_a_naive_loop_does(tmp_path, teacher, choices, drop):
    """
    A snapshot sees the very batch, however many choices it has; a stored row needs one number of them. Samples of a
    dropped batch keep the past that they have.
    """
    samples = questions(choices=choices)
    options = {"teacher": teacher, "trainer": Visits, "dataloader_drop_last": drop, **SGD}
    if teacher == "history" and len(choices) > 1:
        options["per_device_train_batch_size"] = 1
        refused(lambda: run(tmp_path, "plain_bert", samples, **options), "2 classes", "4", "choices", "snapshot")
        return
    trainer = run(tmp_path, "plain_bert", samples, **options)
    assert difference(naive(samples, trainer.seen, teacher, 0.8, 3), trainer) < 2e-5
    plain = run(tmp_path, "plain_bert", samples, alpha=0.0, dataloader_drop_last=drop, **SGD)
    assert difference(plain, trainer) > 1e-3


def test_the_order_of_the_samples_does_not_matter(tmp_path):
    """The same questions under other row numbers, in one batch."""
    samples, order = questions(6), [3, 0, 5, 1, 4, 2]
    options = {"teacher": "history", "per_device_train_batch_size": 6, **SGD}
    one = run(tmp_path, "plain_bert", samples, **options)
    other = run(tmp_path, "plain_bert", Samples([samples.items[n] for n in order]), **options)
    assert difference(one, other) < 1e-5
    torch.testing.assert_close(one.teacher.stored(order), other.teacher.stored(range(6)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema", "rank"])
def test_accumulation_changes_nothing(tmp_path, teacher):
    samples, options = questions(12), {"teacher": teacher, **SGD}
    one = run(tmp_path, "plain_bert", samples, per_device_train_batch_size=4, **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert difference(one, run(tmp_path, "plain_bert", samples, **options)) < 1e-5


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_resume_is_exact(tmp_path, teacher):
    options = {"teacher": teacher, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "a", "bert", **options)
    for step in (3, 6):
        resumed = run(tmp_path / "b", "bert", resume=tmp_path / f"a/checkpoint-{step}", **options)
        assert same_weights(whole.model, resumed.model)
        assert logged(whole, "loss", step) == logged(resumed, "loss", step)


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_models_learn(tmp_path, name):
    trainer = run(tmp_path, name, num_train_epochs=8, eval_dataset=questions())
    losses = logged(trainer, "hard_loss")
    assert sum(losses[-4:]) < sum(losses[:4]) and trainer.teacher.kind == "history"
    assert math.isfinite(trainer.evaluate()["eval_loss"]) and trainer.teacher.stored([0]).shape == (1, 4)


def with_label_7(items):
    return stack(items) | {"labels": torch.full((len(items),), 7)}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"auxiliary_heads": "byot"}, ("auxiliary_heads", "multiple choice")),
        ({"data_collator": with_label_7}, ("label 7", "4")),
        ({"data_collator": SelfKDDataCollator(stack, mixup_alpha=1.0), "teacher": "snapshot"}, ("mixup_alpha",)),
    ],
)
def test_what_is_refused(tmp_path, options, parts):
    refused(lambda: run(tmp_path, "bert", **options), *parts)
