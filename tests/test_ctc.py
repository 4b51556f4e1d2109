"""CTC: rows are frames without labels, the hard loss is that of the transcript."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import Samples, difference, logged, refused, same_weights, train
from speakers import BLANK, CTC_MODELS, SYMBOLS, Spoken, make_ctc, pad_for, pad_sounds

from hf_selfkd import SelfKDTrainer
from hf_selfkd.losses.ctc import CTCLoss
from hf_selfkd.losses.soft_targets import SoftTargets, make_targets
from hf_selfkd.tasks import TASKS, task_for
from hf_selfkd.tasks.ctc import CTC


pytestmark = pytest.mark.trains


SGD = {"optim": "sgd", "learning_rate": 0.001, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
PLAIN = ("plain_wav2vec2", "plain_wav2vec2_mean")


def known(names):
    return [name for name in names if name in CTC_MODELS]


def sounds_for(name, size=14, **options):
    return Spoken(size, width=CTC_MODELS[name][2] if name in CTC_MODELS else 0, **options)


def run(folder, name, samples=None, **options):
    model = make_ctc(name) if isinstance(name, str) else name
    samples = sounds_for(name) if samples is None else samples
    defaults = {"data_collator": pad_for(name), "learning_rate": 1e-3}
    return train(folder, model, samples, **(defaults | options))


def lengths_of(model, batch):
    """Frames of each sample, from a run of each by itself."""
    counts = []
    name = next(name for name in batch if name.startswith("input"))
    for place, mask in enumerate(batch.get("attention_mask", batch.get("padding_mask"))):
        sound, length = batch[name][place : place + 1], int(mask.sum())
        with torch.no_grad():
            alone = model(**{name: sound[..., :length] if name == "input_values" else sound[:, :length]})
        counts.append(alone.logits.shape[1])
    return counts


# Rows


@pytest.mark.parametrize("name", CTC_MODELS)
def test_rows_are_the_frames_of_the_model(name):
    """Frames of padding do not count: there are as many rows as the sounds have frames by themselves."""
    model, batch = make_ctc(name).eval(), pad_for(name)(sounds_for(name).items[:5])
    task = task_for(model)
    assert type(task) is CTC and task.num_classes == SYMBOLS
    loss = CTCLoss(task)
    inputs = task.split(batch)
    with torch.no_grad():
        outputs = loss.forward(model, inputs, None, 0.0)
        own = model(**batch)
    rows = loss.rows(outputs, inputs)
    assert torch.equal(outputs.loss, own.loss) and "_loss_function" not in vars(model)
    size, length = own.logits.shape[:2]
    assert torch.equal(rows.logits, own.logits.flatten(0, 1))
    known = (rows.labels >= 0).view(size, length)
    assert known.sum(1).tolist() == lengths_of(model, batch)
    weights = rows.weights.view(size, length)
    shares = [1.0] * 5 if not task.by_length else [1 / max(len(item["labels"]), 1) for item in sounds_for(name).items]
    for place in range(5):
        torch.testing.assert_close(weights[place], known[place] * torch.tensor(shares[place]))


def test_frames_of_a_loss_that_was_not_seen():
    """As in versions of transformers that compute it on the spot: the model's own count of frames."""
    model, batch = make_ctc("wav2vec2").eval(), pad_sounds(Spoken().items[:5])
    task, loss = task_for(model), CTCLoss(task_for(model))
    inputs = task.split(batch)
    seen = loss.rows(loss.forward(model, inputs, None, 0.0), inputs)
    frames = task.frames_of(inputs.inputs, inputs.labels, len(seen.labels) // 5)
    assert frames.lengths.tolist() == lengths_of(model, batch)
    assert frames.targets.tolist() == [len(item["labels"]) for item in Spoken().items[:5]]
    task.model = torch.nn.Linear(1, 1)
    refused(lambda: task.frames_of(inputs.inputs, inputs.labels, 9), "Linear", "logit_lengths")
    frames = task.frames_of({}, inputs.labels, 9)
    assert frames.lengths.tolist() == [9] * 5


def test_every_class_of_the_mapping_is_known():
    for name in tf.models.auto.modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES.values():
        model = object.__new__(getattr(tf, name))
        assert [task for task in TASKS if task.matches(model)] == [CTC], name


# Against the stock class


@pytest.mark.parametrize("name", CTC_MODELS)
def test_alpha_0_is_the_stock_class(tmp_path, name):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 7}
    stock = run(tmp_path, name, trainer=tf.Trainer, **options)
    assert same_weights(stock.model, run(tmp_path, name, **options, alpha=0.0).model)


@pytest.mark.parametrize("name", known(["wav2vec2", "wav2vec2_mean", "parakeet"]))
def test_until_there_is_a_past_it_is_the_stock_class(tmp_path, name):
    """The first epoch of a run with a teacher, to the bit."""
    options = {"num_train_epochs": 2, "lr_scheduler_type": "constant", "save_strategy": "epoch"}
    run(tmp_path / "a", name, trainer=tf.Trainer, **options)
    run(tmp_path / "b", name, **options)
    for step, same in ((4, True), (8, False)):
        one, other = (type(make_ctc(name)).from_pretrained(tmp_path / f"{x}/checkpoint-{step}") for x in "ab")
        assert same_weights(one, other) == same


# By hand


class TableForCTC(tf.Wav2Vec2ForCTC):
    """Scores of three frames from a table, of a sound of two or three samples."""

    def __init__(self, scores, reduction):
        super().__init__(make_ctc("wav2vec2").config)
        self.config.vocab_size, self.config.ctc_loss_reduction = 3, reduction
        self.scores = torch.nn.Parameter(torch.tensor(scores))
        for name in ("wav2vec2", "lm_head", "dropout"):
            delattr(self, name)

    def forward(self, input_values, attention_mask=None, labels=None):
        logits = self.scores.expand(len(input_values), -1, -1)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                logit_lengths=attention_mask.sum(-1),
                blank_token_id=0,
                reduction=self.config.ctc_loss_reduction,
            )
        return {"loss": loss, "logits": logits}


@pytest.mark.skipif(find_spec("transformers.loss.loss_ctc") is None, reason="the loss function of CTC came later")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_worked_out_on_paper(tmp_path, reduction):
    """
    Two frames (the third is padding) of probabilities 1/2, 1/4, 1/4 and 1/4, 1/2, 1/4 for blank, a and b. "a" is
    spelled by a a, a blank and blank a: 1/4 * 1/2 + 1/4 * 1/4 + 1/2 * 1/2 = 7/16. The entropy of either frame is
    1/2 log 2 + 1/2 log 4 = 3/2 log 2. With two symbols, "ab": a b alone, 1/4 * 1/4 = 1/16.
    """
    scores = [[[math.log(2), 0.0, 0.0], [0.0, math.log(2), 0.0], [9.0, 0.0, 0.0]]]
    items = [{"input_values": torch.zeros(2), "labels": labels} for labels in ([1], [1, 2])]
    trainer = run(
        tmp_path,
        TableForCTC(scores, reduction),
        Samples(items),
        data_collator=lambda items: pad_sounds(items, 3),
        num_train_epochs=2,
        alpha=0.5,
        alpha_schedule="constant",
        learning_rate=0.0,
    )
    one, two, frames = math.log(16 / 7), math.log(16), 3 * math.log(2)
    hard, soft = (one + two, 2 * frames) if reduction == "sum" else ((one + two / 2) / 2, (frames + frames / 2) / 2)
    assert logged(trainer, "loss") == pytest.approx([hard, (hard + soft) / 2], rel=1e-4)
    assert logged(trainer, "soft_loss")[-1] == pytest.approx(frames / 2, rel=1e-4)  # nats a frame
    shares = 4 if reduction == "sum" else (2 / 1 + 2 / 2) / 2  # frames of the step, as the loss counts them
    assert logged(trainer, "hard_loss")[-1] == pytest.approx(hard / shares, rel=1e-4)


# Against a loop of its own


def spelled(log_probs, symbols):
    """`-log` of the probability of all paths that spell the symbols, by the states of each frame."""
    states = [BLANK]
    for symbol in symbols:
        states += [symbol, BLANK]
    reached = {0: log_probs[0, BLANK]}
    if symbols:
        reached[1] = log_probs[0, symbols[0]]
    for frame in log_probs[1:]:
        after = {}
        for state, symbol in enumerate(states):
            before = [state, state - 1]
            if symbol != BLANK and state > 1 and states[state - 2] != symbol:
                before.append(state - 2)
            found = [reached[b] for b in before if b in reached]
            if found:
                after[state] = torch.logsumexp(torch.stack(found), 0) + frame[symbol]
        reached = after
    ends = [reached[state] for state in (len(states) - 1, len(states) - 2) if state in reached]
    return -torch.logsumexp(torch.stack(ends), 0)


def naive(name, samples, visits, alpha, epochs, rate):
    """Sample by sample, frame by frame; `visits` are the ids of each batch, epoch by epoch."""
    model, frozen, steps = make_ctc(name).train(), None, len(visits) // epochs
    optimizer = torch.optim.SGD(model.parameters(), rate)
    lengths = [lengths_of(make_ctc(name).eval(), pad_sounds([item]))[0] for item in samples.items]
    for epoch in range(epochs):
        for ids in visits[epoch * steps : (epoch + 1) * steps]:
            batch = pad_sounds([samples.items[n] for n in ids])
            batch.pop("labels")
            log_probs, loss = model(**batch).logits.log_softmax(-1), 0.0
            if frozen is not None:
                with torch.no_grad():
                    told = frozen(**batch).logits.softmax(-1)
            weight = alpha * (epoch + 1) / epochs
            for place, n in enumerate(ids):
                symbols = samples.items[n]["labels"]
                cost = spelled(log_probs[place, : lengths[n]], symbols)
                if frozen is not None:
                    soft = -(told[place] * log_probs[place])[: lengths[n]].sum()
                    cost = (1 - weight) * cost + weight * soft
                loss = loss + (cost / max(len(symbols), 1) / len(ids) if name.endswith("mean") else cost)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        frozen = make_ctc(name).eval()
        frozen.load_state_dict(model.state_dict())
    return model


class Visits(SelfKDTrainer):
    """Notes the ids of each batch."""

    def compute_loss(self, *arguments, **keywords):
        self.__dict__.setdefault("seen", []).append(self.sample_ids.tolist())
        return super().compute_loss(*arguments, **keywords)


@pytest.mark.parametrize("name", PLAIN)
def test_it_trains_as_a_naive_loop_does(tmp_path, name):
    """Transcripts of several lengths, an empty one among them; paths are counted by a recursion of its own."""
    samples, rate = Spoken(), 0.02 if name.endswith("mean") else 0.001
    options = SGD | {"learning_rate": rate}
    trainer = run(tmp_path, name, samples, trainer=Visits, **options)
    model = naive(name, samples, trainer.seen, 0.8, 3, rate)
    assert difference(model, trainer) < 1e-4
    assert difference(run(tmp_path, name, samples, alpha=0.0, **options), trainer) > 1e-3
    assert logged(trainer, "rows_with_history")[-1] == 1


# The other promises


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_accumulation_changes_nothing(tmp_path, name, teacher):
    samples, options = Spoken(12), {"teacher": teacher, **SGD}
    options["data_collator"] = lambda items: pad_sounds(items, 240)
    one = run(tmp_path, name, samples, per_device_train_batch_size=6, **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    two = run(tmp_path, name, samples, **options)
    assert difference(one, two) < 1e-5
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=1e-4)


@pytest.mark.parametrize("name", known(["wav2vec2", "sew", "parakeet"]))
@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_resume_is_exact(tmp_path, name, teacher):
    options = {"teacher": teacher, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "a", name, **options)
    for step in (3, 6):
        resumed = run(tmp_path / "b", name, resume=tmp_path / f"a/checkpoint-{step}", **options)
        assert same_weights(whole.model, resumed.model)
        assert logged(whole, "loss", step) == logged(resumed, "loss", step)


def test_the_order_of_the_samples_does_not_matter(tmp_path):
    """The same sounds under other row numbers, in one batch; and twice some of them, in another one."""
    samples, order = Spoken(6), [3, 0, 5, 1, 4, 2]
    options = {"per_device_train_batch_size": 6, **SGD}
    one = run(tmp_path, "plain_wav2vec2", samples, **options)
    other = run(tmp_path, "plain_wav2vec2", Samples([samples.items[n] for n in order]), **options)
    assert difference(one, other) < 1e-4
    dropped = run(tmp_path, "plain_wav2vec2", Spoken(15), dataloader_drop_last=True, **SGD)
    assert dropped.state.global_step == 9 and math.isfinite(logged(dropped, "loss")[-1])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty_transcripts_are_all_blank(tmp_path, reduction):
    samples = Samples([item | {"labels": []} for item in Spoken(4).items])
    name = "wav2vec2" if reduction == "sum" else "wav2vec2_mean"
    losses = logged(run(tmp_path, name, samples), "loss")
    assert len(losses) == 3 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "wav2vec2_bert"])
def test_models_learn(tmp_path, name):
    trainer = run(tmp_path, name, num_train_epochs=12, eval_dataset=sounds_for(name), learning_rate=1e-2)
    losses = logged(trainer, "hard_loss")
    assert sum(losses[-4:]) < sum(losses[:4]) and trainer.teacher.kind == "snapshot"
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.skipif(find_spec("transformers.loss.loss_ctc") is None, reason="there the loss counts them")
def test_padding_with_the_blank_is_none_of_the_transcript(tmp_path):
    """As some processors pad; the hard loss of transformers leaves it out, and so do we."""
    batch = pad_sounds(Spoken().items[:5], filler=BLANK)
    task = task_for(make_ctc("wav2vec2_mean"))
    loss, inputs = CTCLoss(task), task.split(batch)
    rows = loss.rows(loss.forward(task.model.eval(), inputs, None, 0.0), inputs)
    first = rows.weights.view(5, -1)[:, 0]
    torch.testing.assert_close(1 / first, torch.tensor([max(len(i["labels"]), 1.0) for i in Spoken().items[:5]]))


# What is refused


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"auxiliary_heads": "byot"}, ("auxiliary_heads", "CTC", "label")),
        ({"teacher": "history"}, ("history", "frame", "snapshot")),
        ({"history_trace": True}, ("history_trace", "frame")),
        ({"teacher": "rank"}, ("rank", "frame")),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor",)),
        ({"chunked_logits": True}, ("chunked_logits",)),
        ({"hard_loss": "cross_entropy"}, ("hard_loss='cross_entropy'", "own")),
        ({"compute_loss_func": lambda *a, **k: 0}, ("compute_loss_func",)),
        ({"alpha_schedule": "calibrated", "eval_dataset": Spoken(4)}, ("calibrated", "frame", "linear")),
    ],
)
def test_what_is_refused(tmp_path, options, parts):
    refused(lambda: run(tmp_path, "wav2vec2", **options), *parts)


def test_labels_that_cannot_be(tmp_path):
    flat = lambda items: pad_sounds(items) | {"labels": torch.ones(len(items), dtype=torch.long)}  # noqa: E731
    refused(lambda: run(tmp_path, "wav2vec2", data_collator=flat), "[batch, length]")
    samples = Samples([item | {"labels": [SYMBOLS]} for item in Spoken(4).items])
    refused(lambda: run(tmp_path, "wav2vec2", samples), f"label {SYMBOLS}", f"{SYMBOLS} classes")


def test_a_past_that_is_no_number_teaches_nothing():
    """NaN of the teacher at some frames: the loss and its gradient are finite."""
    task = task_for(make_ctc("plain_wav2vec2"))
    loss, batch = CTCLoss(task), task.split(pad_sounds(Spoken().items[:2]))
    outputs = loss.forward(task.model, batch, None, 0.5)
    rows = loss.rows(outputs, batch)
    past = F.log_softmax(torch.randn_like(rows.logits), -1).detach()
    mask = torch.arange(len(past)) % 3 > 0
    soft = SoftTargets(torch.where(mask.unsqueeze(-1), past, torch.nan), mask)
    losses = loss(outputs, rows, make_targets(rows.labels, soft, None, False), 0.5, 2)
    (gradient,) = torch.autograd.grad(losses.loss, outputs["logits"])
    assert torch.isfinite(losses.loss) and torch.isfinite(gradient).all()


def test_what_is_logged_and_stored(tmp_path):
    trainer = run(tmp_path, "wav2vec2")
    refused(lambda: trainer.teacher.stored([0]), "stores no rows")
    assert np.isfinite(logged(trainer, "past_agreement")[-1])
