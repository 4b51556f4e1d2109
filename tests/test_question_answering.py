"""Extractive question answering: rows over positions, whatever a batch is padded to."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import Samples, difference, logged, make_trainer, refused, same_weights, set_seed, train

from hf_selfkd import SelfKDTrainer
from hf_selfkd.tasks import task_for
from hf_selfkd.tasks.question_answering import QuestionAnswering


pytestmark = pytest.mark.trains


TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
BART = {
    "vocab_size": 30,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "init_std": 0.3,
}
MODELS = {
    "bert": lambda: tf.BertForQuestionAnswering(tf.BertConfig(**TEXT, max_position_embeddings=16)),
    "plain_bert": lambda: tf.BertForQuestionAnswering(tf.BertConfig(**TEXT, **PLAIN, max_position_embeddings=16)),
    "roberta": lambda: tf.RobertaForQuestionAnswering(
        tf.RobertaConfig(**TEXT, max_position_embeddings=18, pad_token_id=0)
    ),
    "distilbert": lambda: tf.DistilBertForQuestionAnswering(
        tf.DistilBertConfig(vocab_size=30, dim=16, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16)
    ),
    "bart": lambda: tf.BartForQuestionAnswering(tf.BartConfig(**BART)),
    "xlnet": lambda: tf.XLNetForQuestionAnsweringSimple(
        tf.XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=16)
    ),
    "t5": lambda: tf.T5ForQuestionAnswering(
        tf.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
}
SGD = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def make(name):
    set_seed(0)
    return MODELS[name]()


def texts(size=14, seed=0, outside=False):
    """Texts of 4 to 9 tokens; token 3 stands before the answer. With `outside`, some answers are behind the end."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(size):
        words = rng.integers(5, 30, size=int(rng.integers(4, 10)))
        start = int(rng.integers(1, len(words) - 1))
        end = int(rng.integers(start, len(words)))
        words[start - 1], words[end] = 3, 4
        if outside and number % 5 == 0:
            start, end = 50, 60
        items.append({"input_ids": words.tolist(), "start_positions": start, "end_positions": end})
    return Samples(items)


def pad(items, to=None):
    length = max(len(item["input_ids"]) for item in items) if to is None else to
    ids = torch.tensor([item["input_ids"] + [0] * (length - len(item["input_ids"])) for item in items])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return batch | {
        name: torch.tensor([item[name] for item in items])
        for name in ("start_positions", "end_positions")
        if name in items[0]
    }


def run(folder, name, samples=None, **options):
    model = make(name) if isinstance(name, str) else name
    return train(folder, model, samples or texts(), **({"data_collator": pad} | options))


# Rows


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_model(name):
    """The mean cross-entropy of the rows is the loss of the model; rows of start and end alternate."""
    model = make(name).eval()
    task, inputs = task_for(model), pad(texts(5).items)
    assert type(task) is QuestionAnswering
    with torch.no_grad():
        outputs = model(**inputs)
    rows = task.rows_of(task.logits(outputs, has_loss=True), task.split(inputs))
    assert torch.equal(rows.logits[::2], outputs.start_logits) and torch.equal(rows.logits[1::2], outputs.end_logits)
    assert rows.labels.tolist()[:2] == [inputs["start_positions"][0], inputs["end_positions"][0]]
    torch.testing.assert_close(F.cross_entropy(rows.logits, rows.labels), outputs.loss)
    kept = rows.kept.log_probs.exp()
    assert kept.shape[-1] == (task.width or rows.logits.shape[-1])
    torch.testing.assert_close(kept.sum(-1), torch.ones(10))
    padding = F.pad(inputs["attention_mask"] == 0, (0, kept.shape[-1] - rows.logits.shape[-1]), value=True)
    assert not kept[padding.repeat_interleave(2, 0)].any()


def test_positions_of_no_answer():
    """As in transformers: below 0 is the first position, behind the end does not count."""
    model = make("plain_bert").eval()
    task, inputs = task_for(model), pad(texts(4).items)
    length = inputs["input_ids"].shape[1]
    inputs["start_positions"] = torch.tensor([-1, length, 2, 900])
    inputs["end_positions"] = torch.tensor([[1], [length + 3], [3], [length]])
    batch = task.split(inputs)
    assert batch.labels.tolist() == [[0, 1], [-100, -100], [2, 3], [-100, -100]]
    with torch.no_grad():
        outputs = model(**inputs)
        again = model(**task.inputs_with_labels(batch, batch.labels))
    rows = task.rows_of(task.logits(outputs, has_loss=True), batch)
    torch.testing.assert_close(F.cross_entropy(rows.logits, rows.labels), outputs.loss)
    assert torch.equal(outputs.loss, again.loss)
    index = task.sample_index(np.arange(4), batch.labels)
    assert index.total == 4 and index.counts.tolist() == [2] * 4 and index.rows.tolist() == list(range(8))


def test_the_loss_of_the_model_where_starts_and_ends_differ_in_number():
    """Its own mean is over starts and over ends; ours counts every label once. The check of its loss knows both."""
    model, inputs = make("plain_bert"), pad(texts(4).items)
    inputs["end_positions"][0] = 90
    task = task_for(model)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    batch = task.split(inputs)
    rows = task.rows_of(task.logits(outputs, has_loss=True), batch)
    losses = F.cross_entropy(rows.logits, rows.labels, reduction="none")
    torch.testing.assert_close(task.own_loss(losses, rows.labels), outputs.loss)
    assert not torch.isclose(losses.sum() / 7, outputs.loss)


# Against the stock class


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_alpha_0_is_the_stock_class(tmp_path, name, outside):
    samples = texts(outside=outside)
    options = {"num_train_epochs": 2, "samples": samples}
    stock = run(tmp_path, name, trainer=tf.Trainer, **options)
    for more in ({"alpha": 0.0}, {"alpha": 0.0, "history_trace": True} if name == "bert" else {"teacher": "none"}):
        assert same_weights(stock.model, run(tmp_path, name, **options, **more).model)


# By hand


class Table(tf.BertForQuestionAnswering):
    """Scores of positions from a table: no position knows another one."""

    def __init__(self, scores):
        super().__init__(tf.BertConfig(**TEXT, max_position_embeddings=6))
        self.scores = torch.nn.Parameter(torch.tensor(scores))
        for name in ("bert", "qa_outputs"):
            delattr(self, name)

    def forward(self, input_ids, attention_mask=None, start_positions=None, end_positions=None):
        rows = self.scores[:, : input_ids.shape[1]]
        return {
            "start_logits": rows[0].expand(len(input_ids), -1),
            "end_logits": rows[1].expand(len(input_ids), -1),
        }


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_the_loss_worked_out_on_paper(tmp_path, teacher):
    """
    One text of 2 tokens in a batch of 3: scores log 2, 0, 0 of the start and 0, log 3, 0 of the end. Softmax with the
    padding: 2/4, 1/4, 1/4 and 1/5, 3/5, 1/5. What is believed without it: 2/3, 1/3 and 1/4, 3/4. Labels 0 and 1.
    """
    model = Table([[math.log(2), 0, 0, 0, 0, 0], [0, math.log(3), 0, 0, 0, 0]])
    item = {"input_ids": [7, 8], "start_positions": 0, "end_positions": 1}
    trainer = run(
        tmp_path,
        model,
        Samples([item]),
        data_collator=lambda items: pad(items, 3),
        teacher=teacher,
        num_train_epochs=2,
        alpha=0.5,
        alpha_schedule="constant",
        learning_rate=0.0,
    )
    first = -(math.log(2 / 4) + math.log(3 / 5)) / 2
    start = -((0.5 + 0.5 * 2 / 3) * math.log(2 / 4) + 0.5 * 1 / 3 * math.log(1 / 4))
    end = -((0.5 + 0.5 * 3 / 4) * math.log(3 / 5) + 0.5 * 1 / 4 * math.log(1 / 5))
    assert logged(trainer, "loss") == pytest.approx([first, (start + end) / 2], rel=1e-4)
    if teacher == "history":
        stored = trainer.teacher.stored([0])
        torch.testing.assert_close(stored, torch.tensor([[2 / 3, 1 / 3, 0, 0, 0, 0], [1 / 4, 3 / 4, 0, 0, 0, 0]]))


# Against a loop of its own


def naive(model, samples, visits, teacher, alpha, epochs):
    """Sample by sample, position by position; `visits` are the ids of each batch, epoch by epoch."""
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    past, steps = {}, len(visits) // epochs
    frozen = None
    for epoch in range(epochs):
        seen = {}
        for ids in visits[epoch * steps : (epoch + 1) * steps]:
            items = [samples.items[n] for n in ids]
            batch = pad(items)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            outputs = model(**inputs)
            if frozen is not None:
                with torch.no_grad():
                    told = frozen(**inputs)
            loss, count = 0.0, 0
            for place, (n, item) in enumerate(zip(ids, items, strict=True)):
                length = len(item["input_ids"])
                for kind in ("start", "end"):
                    scores = outputs[f"{kind}_logits"][place]
                    seen[n, kind] = scores.detach()[:length].softmax(0)
                    position = item[f"{kind}_positions"]
                    if position >= len(scores):
                        continue
                    target = torch.zeros(len(scores))
                    target[position] = 1.0
                    believed = past.get((n, kind))
                    if frozen is not None:
                        believed = told[f"{kind}_logits"][place][:length].softmax(0)
                    if believed is not None:
                        weight = alpha * (epoch + 1) / epochs
                        target = (1 - weight) * target
                        target[:length] += weight * believed
                    loss = loss - (target * scores.log_softmax(0)).sum()
                    count += 1
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        if teacher == "history":
            past.update(seen)
        else:
            frozen = make("plain_bert")
            frozen.load_state_dict(model.state_dict())
            frozen.eval()
    return model


class Visits(SelfKDTrainer):
    """Notes the ids of each batch."""

    def compute_loss(self, *arguments, **keywords):
        self.__dict__.setdefault("seen", []).append(self.sample_ids.tolist())
        return super().compute_loss(*arguments, **keywords)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_it_trains_as_a_naive_loop_does(tmp_path, teacher, drop):
    """
    Batches are shuffled anew in each epoch, so a text is padded to another length; texts of a dropped batch keep the
    past that they have.
    """
    samples, options = texts(outside=True), {"teacher": teacher, "dataloader_drop_last": drop, **SGD}
    trainer = run(tmp_path, "plain_bert", samples, trainer=Visits, **options)
    model = naive(make("plain_bert").train(), samples, trainer.seen, teacher, 0.8, 3)
    assert difference(model, trainer) < 2e-5
    plain = run(tmp_path, "plain_bert", samples, alpha=0.0, **SGD)
    assert difference(plain, trainer) > 1e-3
    assert drop or logged(trainer, "rows_with_history")[-1] == 1


def test_entries_are_kept_by_position(tmp_path):
    """With all positions kept as entries the run is that of whole rows; fewer are enough to train."""
    whole = run(tmp_path, "plain_bert", teacher="history", history_top_k=16, **SGD)
    dense = run(tmp_path, "plain_bert", teacher="history", **SGD)
    assert difference(whole, dense) == 0
    for tail in ("bucket", "label", "uniform", "renormalize"):
        some = run(tmp_path, "plain_bert", teacher="history", history_top_k=12, history_tail=tail, **SGD)
        assert difference(some, dense) < 1e-3, tail  # a text has 9 tokens at most
    few = run(tmp_path, "plain_bert", teacher="history", history_top_k=2, history_dtype="float16", **SGD)
    assert few.teacher.history.codec.top_k == 2 and 1e-5 < difference(few, dense) < 0.5


# The other promises


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_accumulation_changes_nothing(tmp_path, teacher):
    """Where all are padded to one length: a model of transformers gives padding a share of its softmax."""
    samples, options = (
        texts(12, outside=True),
        {"teacher": teacher, "data_collator": lambda items: pad(items, 10), **SGD},
    )
    one = run(tmp_path, "plain_bert", samples, per_device_train_batch_size=4, **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    two = run(tmp_path, "plain_bert", samples, **options)
    assert difference(one, two) < 1e-5
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=1e-3)


@pytest.mark.parametrize("name", ["bert", "bart"])
@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_resume_is_exact(tmp_path, name, teacher):
    options = {"teacher": teacher, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "a", name, **options)
    for step in (3, 6):
        resumed = run(tmp_path / "b", name, resume=tmp_path / f"a/checkpoint-{step}", **options)
        assert same_weights(whole.model, resumed.model)
        assert logged(whole, "loss", step) == logged(resumed, "loss", step)


def test_the_order_of_the_samples_does_not_matter(tmp_path):
    """The same texts under other row numbers, in one batch."""
    samples, order = texts(6), [3, 0, 5, 1, 4, 2]
    options = {"teacher": "history", "per_device_train_batch_size": 6, **SGD}
    one = run(tmp_path, "plain_bert", samples, **options)
    other = run(tmp_path, "plain_bert", Samples([samples.items[n] for n in order]), **options)
    assert difference(one, other) < 1e-5
    stored = other.teacher.stored(range(6)).view(6, 2, -1)
    torch.testing.assert_close(one.teacher.stored(order).view(6, 2, -1), stored, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "bart"])
@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_models_learn(tmp_path, name, teacher):
    trainer = run(tmp_path, name, teacher=teacher, num_train_epochs=8, eval_dataset=texts())
    losses = logged(trainer, "hard_loss")
    assert sum(losses[-4:]) < sum(losses[:4]) and trainer.teacher.kind == teacher
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_the_teacher_of_a_model_without_a_longest_sequence(tmp_path):
    trainer = run(tmp_path, "t5")
    assert trainer.teacher.kind == "snapshot"
    refused(lambda: run(tmp_path, "t5", teacher="history"), "max_position_embeddings", "T5", "snapshot")


def test_warm_start_and_calibrated_alpha(tmp_path):
    trainer = run(tmp_path, "bert", teacher="history", warm_start_teacher=True, num_train_epochs=1)
    assert logged(trainer, "rows_with_history") == [1.0] * 4
    trainer = run(tmp_path, "bert", alpha_schedule="calibrated", eval_dataset=texts(6, seed=1))
    assert logged(trainer, "held_out_temperature")


# What is refused


def without(name):
    return Samples([{key: value for key, value in item.items() if key != name} for item in texts().items])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"auxiliary_heads": "byot"}, ("auxiliary_heads", "extractive question answering")),
        ({"teacher": "rank"}, ("rank", "extractive question answering", "padding")),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor",)),
        ({"chunked_logits": True}, ("chunked_logits",)),
        ({"samples": without("end_positions")}, ("end_positions", "give both")),
    ],
)
def test_what_is_refused(tmp_path, options, parts):
    refused(lambda: run(tmp_path, "bert", **options), *parts)


def test_label_smoothing_of_the_stock_class_does_nothing(tmp_path):
    """Which smooths `labels` only, without a word."""
    stock = run(tmp_path, "bert", trainer=tf.Trainer, label_smoothing_factor=0.1)
    ours = run(tmp_path, "bert", alpha=0.0, label_smoothing_factor=0.1)
    assert same_weights(stock.model, ours.model)


def test_positions_that_changed_are_told(tmp_path):
    """A history that was made for other answers."""
    options = {"teacher": "history", "save_strategy": "steps", "save_steps": 4}
    run(tmp_path, "bert", **options)
    other = texts()
    for item in other.items:
        item["start_positions"] += 1
    trainer = make_trainer(tmp_path, make("bert"), other, data_collator=pad, **options)
    refused(lambda: trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4"), "labels of sample_id=")


@pytest.mark.parametrize("name", ["XLNetForQuestionAnswering", "ViltForQuestionAnswering"])
def test_other_kinds_of_answers_are_not_supported(name):
    assert not QuestionAnswering.matches(object.__new__(getattr(tf, name)))
