"""Causal, masked and encoder-decoder language models against the plain Trainer and naive loops, token by token."""

import copy
import math
from itertools import groupby

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EOS,
    PAD,
    VOCABULARY,
    Recording,
    Samples,
    collate,
    difference,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    train,
    with_decoder_inputs,
)
from transformers import Seq2SeqTrainer, Trainer

from hf_selfkd import SelfKDTrainer
from hf_selfkd.seq2seq import Seq2SeqSelfKDTrainer


pytestmark = pytest.mark.trains


SEQ2SEQ = "marian t5 bart mbart m2m100".split()
CAUSAL = "llama qwen2 gpt2".split()
MODELS = [*SEQ2SEQ, *CAUSAL, "bert_mlm"]
PLAIN = ["plain_marian", "plain_gpt2", "plain_bert_mlm"]
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
RULES = ["bucket", "label", "uniform", "renormalize"]


def ours(name):
    return Seq2SeqSelfKDTrainer if name in SEQ2SEQ else SelfKDTrainer


def stock(name):
    return Seq2SeqTrainer if name in SEQ2SEQ else Trainer


def without_first_label(items):
    """What GPT-2 learns, written so that the stock Trainer counts it right; see `test_fixes.py`."""
    batch = collate(items)
    batch["labels"][:, 0] = -100
    return batch


def collator_of(name):
    """Of the stock trainer, where it takes the labels out."""
    if name in SEQ2SEQ:
        return with_decoder_inputs(EOS if name == "mbart" else PAD)
    return without_first_label if name == "gpt2" else collate


def scaled_loss(name):
    """Cross-entropy over the tokens of the whole optimizer step, as a `compute_loss_func`."""

    def loss(outputs, labels, num_items_in_batch):
        logits = outputs.logits
        if name in CAUSAL:  # over all positions, with nothing to predict at the last
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    return loss


# The plain Trainer


@pytest.mark.parametrize("name", MODELS)
def test_alpha_0_is_bit_identical_to_trainer(tmp_path, name):
    samples, collator = make_samples(name), without_first_label if name == "gpt2" else collate
    plain = train(tmp_path, name, samples, trainer=stock(name), data_collator=collator)
    own = train(tmp_path, name, samples, trainer=ours(name), alpha=0.0)
    assert difference(plain, make_model(name)) > 1e-3  # it did train
    assert difference(plain, train(tmp_path, name, samples, trainer=ours(name))) > 1e-3
    assert difference(plain, own) == 0
    assert logged(plain, "loss") == logged(own, "loss")
    assert logged(plain, "grad_norm") == logged(own, "grad_norm")


def test_alpha_0_of_t5_is_trainer_but_for_rounding(tmp_path):
    samples = make_samples("t5")
    plain = train(tmp_path, "t5", samples, trainer=Seq2SeqTrainer)
    assert difference(plain, train(tmp_path, "t5", samples, trainer=Seq2SeqSelfKDTrainer, alpha=0.0)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_alpha_0_with_accumulation_is_bit_identical_to_trainer_with_scaled_loss(tmp_path, name):
    """18 samples: the last step is a lone half micro-batch."""
    samples, options = make_samples(name, 18), {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    own_loss = {"compute_loss_func": scaled_loss(name), "data_collator": collator_of(name)}
    plain = train(tmp_path, name, samples, trainer=stock(name), **own_loss, **options)
    own = train(tmp_path, name, samples, trainer=ours(name), alpha=0.0, **options)
    assert difference(plain, train(tmp_path, name, samples, trainer=ours(name), **options)) > 1e-3
    assert difference(plain, own) == 0
    assert logged(plain, "loss") == logged(own, "loss")


@pytest.mark.parametrize("name", MODELS)
def test_label_smoothing_at_alpha_0_is_that_of_trainer(tmp_path, name):
    """To the bit, but for causal models: the stock trainer cuts off the last position, which rounds otherwise."""
    samples, options = make_samples(name), {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    plain = train(tmp_path, name, samples, trainer=stock(name), data_collator=collator_of(name), **options)
    own = train(tmp_path, name, samples, trainer=ours(name), alpha=0.0, **options)
    options["label_smoothing_factor"] = 0.0
    assert difference(plain, train(tmp_path, name, samples, trainer=ours(name), alpha=0.0, **options)) > 1e-3
    assert difference(plain, own) == pytest.approx(0, abs=5e-7 if name in CAUSAL else 0)


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
@pytest.mark.parametrize("name", ["marian", "llama"])
def test_first_epoch_is_bit_identical_to_trainer(tmp_path, name, teacher):
    samples, options = make_samples(name), {"num_train_epochs": 2, "save_strategy": "epoch"}
    plain = train(tmp_path / "plain", name, samples, trainer=stock(name), **options)
    own = train(tmp_path / "ours", name, samples, trainer=ours(name), teacher=teacher, **options)
    after = [type(plain.model).from_pretrained(tmp_path / run / "checkpoint-6") for run in ("plain", "ours")]
    assert difference(*after) == 0
    assert logged(own, "rows_with_history") == [0.0] * 6 + [1.0] * 6
    assert difference(plain, own) > 1e-4


# Naively, token by token


def tokens(kind, model, ids, samples):
    """Of each token to learn: logits `[R, V]`, labels `[R]` and its (id, position in the target)."""
    batch = collate([samples[n] for n in ids])
    labels = batch.pop("labels")
    if kind == "pairs":
        previous = labels.roll(1, dims=1)
        previous[:, 0] = PAD
        batch["decoder_input_ids"] = previous.masked_fill(previous == -100, PAD)
    logits, rows = model(**batch).logits, []
    for n, row in enumerate(labels.tolist()):
        for position, label in enumerate(row):
            if label != -100 and (kind != "words" or position > 0):
                source = position - 1 if kind == "words" else position
                rows.append((logits[n, source], label, (ids[n], position)))
    logits, labels, samples = zip(*rows, strict=True)
    return torch.stack(logits), list(labels), list(samples)


def soft_loss(now, soft_targets, label, rule, top_k):
    """Cross-entropy of log-probabilities `[V]` under past probabilities of which only the top are known."""
    if top_k is None:
        return -(soft_targets * now).sum()
    kept = soft_targets.topk(top_k).indices
    known = torch.zeros_like(soft_targets).scatter(0, kept, soft_targets[kept])
    rest, others = 1 - known.sum(), torch.ones_like(soft_targets).scatter(0, kept, 0.0).bool()
    if rule == "bucket":  # two distributions over k + 1 classes
        return -(soft_targets[kept] * now[kept]).sum() - rest * now[others].exp().sum().log()
    if rule == "label":
        known[label] += rest
    elif rule == "uniform":
        known[others] = rest / others.sum()
    else:
        known = known / known.sum()
    return -(known * now).sum()


def naive(name, samples, visits, epochs=3, alpha=0.8, teacher="history", rule=None, top_k=None, accumulation=1):
    """Train on these visits with a dictionary of (id, position) or with a second model."""
    model, kind = make_model(name), {"m": "pairs", "g": "words", "b": "masked"}[name.removeprefix("plain_")[0]]
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    per_epoch = math.ceil(math.ceil(len(samples) / 4) / accumulation)
    table, fresh, other = {}, {}, None
    for step, group in groupby(visits, key=lambda visit: visit[0]):
        if step % per_epoch == 0:
            table, fresh = table | fresh, {}
            other = copy.deepcopy(model).eval() if teacher == "snapshot" and step else None
        weight = alpha * (step // per_epoch + 1) / epochs
        loss, count = 0.0, 0
        for _, inputs in group:
            ids = inputs["sample_id"].tolist()
            logits, labels, keys = tokens(kind, model.train(), ids, samples)
            soft_targets = {key: table.get(key) for key in keys}
            if other is not None:
                with torch.no_grad():
                    theirs, _, same = tokens(kind, other, ids, samples)
                soft_targets = dict(zip(same, theirs.softmax(-1), strict=True))
            for now, label, key in zip(logits.log_softmax(-1), labels, keys, strict=True):
                hard = -now[label]
                soft = hard if soft_targets[key] is None else soft_loss(now, soft_targets[key], label, rule, top_k)
                loss = loss + (1 - weight) * hard + weight * soft
                fresh[key] = now.detach().exp()
            count += len(keys)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def check_against_naive(tmp_path, name, samples=None, naive_options=None, **options):
    """The same comparison must tell the trained model from one trained without a past."""
    samples, options = samples or make_samples(name), SGD | options
    trainer = train(tmp_path, name, samples, trainer=Recording, **options)
    accumulation = options.get("gradient_accumulation_steps", 1)
    reference = naive(name, samples, trainer.visits, accumulation=accumulation, **(naive_options or {}))
    keep = {"gradient_accumulation_steps": accumulation}
    assert difference(reference, train(tmp_path, name, samples, alpha=0.0, **SGD, **keep)) > 1e-4
    assert difference(reference, trainer) < 1e-6
    return trainer


@pytest.mark.parametrize("name", PLAIN)
def test_history_equals_naive_loop(tmp_path, name):
    trainer = check_against_naive(tmp_path, name)
    assert logged(trainer, "rows_with_history") == [0.0] * 6 + [1.0] * 12


@pytest.mark.parametrize("name", PLAIN)
def test_history_with_accumulation_equals_naive_loop(tmp_path, name):
    """The mean is over the tokens of the step, however many there are in each micro-batch."""
    check_against_naive(tmp_path, name, gradient_accumulation_steps=4)  # 22 samples: the second step has 6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PLAIN)
def test_top_k_history_equals_naive_loop(tmp_path, name, rule):
    trainer = check_against_naive(tmp_path, name, None, {"rule": rule, "top_k": 4}, history_top_k=4, history_tail=rule)
    other = naive(name, make_samples(name), trainer.visits, rule=RULES[RULES.index(rule) - 1], top_k=4)
    assert difference(other, trainer) > 1e-5  # the comparison tells the rules apart


def test_what_is_not_stored_of_tokens_is_one_bucket(tmp_path):
    check_against_naive(tmp_path, "plain_marian", None, {"rule": "bucket", "top_k": 3}, history_top_k=3)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", PLAIN)
def test_snapshot_equals_naive_two_models(tmp_path, name, accumulation):
    check_against_naive(
        tmp_path, name, None, {"teacher": "snapshot"}, teacher="snapshot", gradient_accumulation_steps=accumulation
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", PLAIN)
def test_samples_without_a_label_count_nothing(tmp_path, name, accumulation):
    samples = make_samples(name)
    for item in samples.items[::5]:
        item["labels"] = [-100] * len(item["labels"])
    trainer = check_against_naive(tmp_path, name, samples, gradient_accumulation_steps=accumulation)
    labelled = [n for n in range(22) if n % 5]
    assert trainer.teacher.stored(labelled).isfinite().all()


# Padding and positions


def padded_more(items):
    """The batch with padding up to 16 columns in every field."""
    return {
        key: F.pad(part, (0, 16 - part.shape[1]), value=-100 if key == "labels" else 0)
        for key, part in collate(items).items()
    }


@pytest.mark.parametrize("options", [{}, {"history_top_k": 4}, {"teacher": "snapshot"}], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_padding_changes_nothing(tmp_path, name, options):
    """Neither loss, gradient nor history."""
    samples = make_samples(name)
    tight = train(tmp_path, name, samples, **SGD, **options)
    loose = train(tmp_path, name, samples, data_collator=padded_more, **SGD, **options)
    assert difference(tight, loose) < 1e-6
    assert logged(tight, "loss") == pytest.approx(logged(loose, "loss"), rel=1e-5)
    if "teacher" not in options:
        torch.testing.assert_close(
            tight.teacher.stored(range(22)), loose.teacher.stored(range(22)), atol=1e-6, rtol=1e-5
        )

    def labelled_padding(items):
        batch = padded_more(items)
        return batch | {"labels": batch["labels"].masked_fill(batch["labels"] == -100, PAD)}

    counted = train(tmp_path, name, samples, data_collator=labelled_padding, **SGD, **options)
    assert difference(tight, counted) > 1e-3


def kind_of(name):
    return {"plain_marian": "pairs", "plain_gpt2": "words", "plain_bert_mlm": "masked"}[name]


@pytest.mark.parametrize("name", PLAIN)
def test_history_stands_at_the_position_that_it_predicts(tmp_path, name):
    """With a learning rate of 0, what is stored of a sample is what the model says of it by itself."""
    samples = make_samples(name)
    trainer = train(tmp_path, name, samples, learning_rate=0.0)
    model, wrong = trainer.model.eval(), 0
    for n in range(len(samples)):
        with torch.no_grad():
            logits, labels, _ = tokens(kind_of(name), model, [n], samples)
        stored = trainer.teacher.stored([n])
        torch.testing.assert_close(stored, logits.softmax(-1))
        wrong += len(labels) > 1 and (stored.roll(1, 0) - logits.softmax(-1)).abs().max() > 1e-3
    assert wrong > 10


@pytest.mark.parametrize("name", PLAIN)
def test_first_loss_is_the_mean_over_the_tokens_of_the_step(tmp_path, name):
    samples = make_samples(name)
    options = {"gradient_accumulation_steps": 3, "max_steps": 4, "train_sampling_strategy": "sequential"}
    trainer = train(tmp_path, name, samples, **SGD, **options)
    with torch.no_grad():
        parts = [tokens(kind_of(name), make_model(name), list(range(n, n + 4)), samples) for n in (0, 4, 8)]
    losses = [F.cross_entropy(logits, torch.tensor(labels), reduction="none") for logits, labels, _ in parts]
    expected = torch.cat(losses).mean().item()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)
    assert logged(trainer, "hard_loss")[0] == pytest.approx(expected, rel=1e-5)
    of_means = torch.stack([part.mean() for part in losses]).mean().item()
    assert abs(of_means - expected) > 1e-4


@pytest.mark.parametrize("name", PLAIN)
def test_one_class_left_over_is_the_whole_row(tmp_path, name):
    """Invariant 24: with all entries but one stored, bucket and uniform remainder are the dense history."""
    samples = make_samples(name)
    dense = train(tmp_path, name, samples, **SGD)
    for rule in ("bucket", "uniform"):
        options = SGD | {"history_tail": rule}
        all_but_one = train(tmp_path, name, samples, history_top_k=VOCABULARY - 1, **options)
        assert difference(dense, all_but_one) < 2e-6
        assert difference(dense, train(tmp_path, name, samples, history_top_k=5, **options)) > 1e-5
    assert difference(dense, train(tmp_path, name, samples, history_top_k=VOCABULARY, **SGD)) == 0


# Samples that changed


def truncated(item):
    return {key: values[:-1] for key, values in item.items()}


def tokenized_otherwise(item):
    return {"input_ids": [item["input_ids"][0], *item["input_ids"]], "labels": [-100, 7, *item["labels"][1:]]}


def relabelled(item):
    place = max(n for n, label in enumerate(item["labels"]) if label != -100)
    labels = list(item["labels"])
    labels[place] = 3 + (labels[place] - 2) % 27
    return item | {"labels": labels}


@pytest.mark.parametrize("change", [truncated, tokenized_otherwise, relabelled])
@pytest.mark.parametrize("name", PLAIN)
def test_changed_samples_are_refused_on_resume(tmp_path, name, change):
    samples = make_samples(name)
    trainer = train(tmp_path, name, samples, save_strategy="steps", save_steps=8)
    assert trainer.state.global_step == 18
    same = make_trainer(tmp_path / "same", name, Samples(samples.items, dict))
    same.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-8")
    other = make_trainer(tmp_path / "other", name, Samples(samples.items, change))
    if name == "plain_bert_mlm" and change is truncated:  # make sure that a label is cut off somewhere
        assert any(item["labels"][-1] != -100 for item in samples.items)
    parts = (
        ["labels of sample_id=", "relabelled", "sample_id_column"] if change is relabelled else ["holds other inputs"]
    )
    refused(lambda: other.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-8"), *parts)


@pytest.mark.parametrize("name", PLAIN)
def test_samples_that_change_from_epoch_to_epoch(tmp_path, name):
    """Random masking, for instance: refused with a history, learned from with a snapshot."""

    def changing(item):
        return relabelled(item) if torch.rand(()) < 0.5 else item

    samples = make_samples(name, transform=changing)
    message = refused(
        lambda: train(tmp_path, name, samples, teacher="history"), "random masking", "teacher='snapshot'"
    )
    assert "one reading to the next" in message
    assert train(tmp_path, name, samples).teacher.kind == "snapshot"
    snapshot = train(tmp_path, name, samples, teacher="snapshot", **SGD)
    assert logged(snapshot, "rows_with_history")[-1] == 1
    assert difference(snapshot, train(tmp_path, name, samples, alpha=0.0, **SGD)) > 1e-4
