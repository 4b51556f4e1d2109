"""Which teacher and which hard loss a run gets: every rule, on structure alone."""

import functools
import re

import pytest
import torch
import transformers as tf
from helpers import CLASSES, PAD, VOCABULARY, make_model
from torch import nn

from hf_selfkd.config import MethodArguments
from hf_selfkd.losses.choose import choose_hard_loss, hard_loss_kind
from hf_selfkd.losses.chunked_cross_entropy import ChunkedCrossEntropy
from hf_selfkd.losses.hard import CrossEntropy, ModelLoss, SmoothedLoss, UserLoss
from hf_selfkd.tasks import task_for
from hf_selfkd.tasks.sample_classification import SampleClassification
from hf_selfkd.teachers.choose import Facts, choose_teacher


# The teacher

IDS, ROWS = "these samples have no ids", "these labels change"
ONE_EPOCH = "one epoch has no earlier one to learn from: this is plain training (warm_start_teacher=True helps)"
LARGER = "a history of auxiliary heads would be many times larger"
DROPOUT = "teacher_dropout needs a copy of the weights"


def chosen(epochs=3, past_of_heads=False, no_ids=None, no_rows=None, **fields):
    return choose_teacher(MethodArguments(**fields), Facts(epochs, past_of_heads, no_ids, no_rows))


@pytest.mark.parametrize(
    ("situation", "kind", "reason"),
    [
        ({}, "history", ""),
        ({"epochs": 2}, "history", ""),
        ({"no_ids": IDS}, "snapshot", IDS),
        ({"no_rows": ROWS}, "snapshot", ROWS),
        ({"no_ids": IDS, "no_rows": ROWS}, "snapshot", IDS),
        ({"past_of_heads": True}, "snapshot", LARGER),
        ({"past_of_heads": True, "no_rows": ROWS}, "snapshot", ROWS),
        ({"teacher_dropout": True}, "snapshot", DROPOUT),
        ({"teacher_dropout": True, "no_ids": IDS}, "snapshot", IDS),
        ({"epochs": 1}, "none", ONE_EPOCH),
        ({"epochs": 1, "no_ids": IDS, "past_of_heads": True}, "none", ONE_EPOCH),
        ({"epochs": 1, "history_trace": True}, "none", ONE_EPOCH),
        ({"epochs": 1, "warm_start_teacher": True}, "history", ""),
        ({"epochs": 1, "warm_start_teacher": True, "no_rows": ROWS}, "snapshot", ROWS),
        ({"alpha": 0.0}, "none", ""),
        ({"alpha": 0.0, "epochs": 1, "no_ids": IDS}, "none", ""),
        ({"alpha": 0.0, "history_trace": True}, "history", ""),
        ({"alpha": 0.0, "history_trace": True, "epochs": 1}, "history", ""),
        ({"history_trace": True}, "history", ""),
        ({"history_trace": True, "past_of_heads": True}, "history", ""),
        ({"chunked_logits": True}, "history", ""),
        ({"chunked_logits": True, "past_of_heads": True}, "history", ""),
        ({"chunked_logits": True, "alpha": 0.0}, "none", ""),
    ],
)
def test_the_teacher_of_auto(situation, kind, reason):
    """`"history"` where samples can be addressed; the reason is told where it is another one."""
    assert chosen(**situation) == (kind, reason)


@pytest.mark.parametrize("need", ["history_trace", "chunked_logits"])
@pytest.mark.parametrize(("why", "message"), [("no_ids", IDS), ("no_rows", ROWS)])
def test_auto_does_not_give_up_what_needs_the_history(need, why, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        chosen(**{need: True, why: message})


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_a_teacher_that_is_named_is_never_another_one(teacher):
    """Whatever heads and epochs; and nothing is told."""
    assert chosen(teacher=teacher) == chosen(teacher=teacher, past_of_heads=True) == (teacher, "")
    if teacher != "ema":
        assert chosen(teacher=teacher, epochs=1, warm_start_teacher=True) == (teacher, "")
    if teacher != "history":
        assert chosen(teacher=teacher, no_ids=IDS, no_rows=ROWS, teacher_dropout=True) == (teacher, "")
    assert chosen(teacher=teacher, alpha=0.0, epochs=1, no_ids=IDS) == ("none", "")


@pytest.mark.parametrize(("why", "message"), [("no_ids", IDS), ("no_rows", ROWS)])
def test_a_history_that_cannot_be_is_refused(why, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        chosen(teacher="history", **{why: message})


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_a_named_teacher_of_one_epoch_is_refused(teacher):
    """In a sentence with the field, its value and the remedy."""
    message = (
        f"1 epoch with teacher={teacher!r}: there is no earlier epoch to learn from. Train at least 2 epochs, set "
        "warm_start_teacher=True (history, snapshot), teacher='rank' or alpha=0."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chosen(teacher=teacher, epochs=1)


def test_no_teacher_is_no_teacher():
    assert chosen(teacher="none") == chosen(teacher="none", epochs=1, past_of_heads=True, no_ids=IDS) == ("none", "")


# The hard loss

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CAUSAL = SMALL | {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "pad_token_id": PAD}


def mixtral(**extra):
    return tf.MixtralForCausalLM(tf.MixtralConfig(**CAUSAL, num_local_experts=2, **extra))


def switch(**extra):
    config = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "num_experts": 2}
    config |= {"vocab_size": VOCABULARY, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(**config, decoder_start_token_id=PAD, **extra)
    )


def bart_decoder():
    return tf.BartForCausalLM(
        tf.BartConfig(vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_attention_heads=2)
    )


class Renamed(tf.BertForSequenceClassification):
    """A subclass that leaves the forward, and with it the loss, as it is."""


class Weighted(tf.BertForSequenceClassification):
    """A subclass with a loss of its own."""

    def forward(self, input_ids=None, labels=None, **named):
        outputs = super().forward(input_ids, **named)
        if labels is not None:
            outputs.loss = nn.functional.cross_entropy(outputs.logits, labels, torch.arange(CLASSES).float())
        return outputs


class Own(nn.Module):
    """A module that computes a loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"logits": logits} if labels is None else {"loss": logits.sum(), "logits": logits}


class WithoutLabels(Own):
    """A module that takes no labels."""

    def forward(self, x):
        return {"logits": self.layer(x)}


class Anything(Own):
    """A module that may take labels."""

    def forward(self, **inputs):
        return super().forward(**inputs)


def bert_of(cls):
    return cls(make_model("plain_bert").config)


KINDS = [
    (lambda: make_model("plain_bert"), "cross_entropy"),
    (lambda: make_model("resnet"), "cross_entropy"),
    (lambda: make_model("vit"), "cross_entropy"),
    (lambda: make_model("wav2vec2"), "cross_entropy"),
    (lambda: make_model("plain_bert_tokens"), "cross_entropy"),
    (lambda: make_model("plain_bert_mlm"), "cross_entropy"),
    (lambda: make_model("plain_gpt2"), "cross_entropy"),
    (lambda: make_model("llama"), "cross_entropy"),
    (lambda: make_model("t5"), "cross_entropy"),
    (lambda: make_model("plain_marian"), "cross_entropy"),
    (lambda: bert_of(Renamed), "cross_entropy"),
    (lambda: torch.compile(make_model("plain_bert")), "cross_entropy"),
    (lambda: bert_of(Weighted), "model"),
    (Own, "model"),
    (Anything, "model"),
    (WithoutLabels, "unchecked"),
    (mixtral, "cross_entropy"),  # without router logits there is nothing to balance
    (lambda: mixtral(output_router_logits=True), "additive"),
    (lambda: mixtral(output_router_logits=True, router_aux_loss_coef=0.0), "cross_entropy"),
    (switch, "additive"),  # a batch may ask for router logits, which the configuration does not tell
    (lambda: switch(router_aux_loss_coef=0.0, router_z_loss_coef=0.0), "cross_entropy"),
    (bart_decoder, "unshifted"),
]


@pytest.mark.parametrize(("make", "kind"), KINDS, ids=[f"{number}-{kind}" for number, (_, kind) in enumerate(KINDS)])
def test_what_the_class_of_a_model_tells(make, kind):
    """And the loss that a run has of it."""
    task = task_for(make())
    assert hard_loss_kind(task) == kind
    if kind == "unshifted":
        with pytest.raises(ValueError, match="BartForCausalLM compares each position with its own label"):
            choose_hard_loss(task)
        return
    loss = choose_hard_loss(task, temperature=2.0)
    assert type(loss) is (ModelLoss if kind in ("model", "additive") else CrossEntropy)
    assert loss.temperature == 2.0 and loss.check is (kind == "cross_entropy")
    assert loss.plain is (type(loss) is CrossEntropy)
    assert not isinstance(loss, ModelLoss) or loss.additive is (kind == "additive")


class Halved(SampleClassification):
    """A task of one's own, with rows of its own."""

    def rows(self, logits, labels):
        return super().rows(logits / 2, labels)


class OnlyRenamed(SampleClassification):
    """A task of one's own with the rows of another."""

    name = "my task"


def test_a_task_of_ones_own():
    """Of its rows no class of transformers computes the loss; a class of one's own may know them."""
    for model in (make_model("plain_bert"), make_model("resnet"), make_model("plain_gpt2")):
        assert hard_loss_kind(Halved(model)) == "unchecked"
        assert choose_hard_loss(Halved(model)).check is False
    assert hard_loss_kind(OnlyRenamed(make_model("plain_bert"))) == "cross_entropy"  # its rows are known
    assert hard_loss_kind(Halved(Own())) == hard_loss_kind(Halved(bert_of(Weighted))) == "model"
    assert hard_loss_kind(Halved(WithoutLabels())) == "unchecked"


def logits_only(input_ids, attention_mask=None, labels=None):
    return {"logits": torch.zeros(len(input_ids), CLASSES)}


def test_a_model_that_somebody_has_patched():
    """Another forward or another loss function of this very object: it is of unknown make."""
    model = make_model("plain_bert")
    model.forward = logits_only
    assert hard_loss_kind(task_for(model)) == "model"
    model = make_model("plain_gpt2")
    model.loss_function = lambda logits, labels, **named: logits.sum()
    assert hard_loss_kind(task_for(model)) == "model"
    del model._loss_function
    assert hard_loss_kind(task_for(model)) == "cross_entropy"


def test_a_wrapper_around_the_forward_of_a_class_is_no_patch():
    """A wrapper around somebody else's forward is one."""
    for name in ("plain_bert", "plain_gpt2", "resnet", "t5"):
        model = make_model(name)
        wrapped = model.forward

        @functools.wraps(wrapped)
        def forward(*arguments, wrapped=wrapped, **named):
            return wrapped(*arguments, **named)

        model.forward = forward
        assert hard_loss_kind(task_for(model)) == "cross_entropy", name
    model = make_model("plain_bert")
    model.forward = functools.wraps(logits_only)(lambda *arguments, **named: logits_only(*arguments, **named))
    assert hard_loss_kind(task_for(model)) == "model"


def test_a_forward_that_accelerate_has_wrapped_is_that_of_the_class():
    """As the second training of a model with autocast meets it."""
    model = make_model("bert")
    model._original_forward = model.forward
    model.forward = lambda *arguments, **keywords: None
    assert hard_loss_kind(task_for(model)) == "cross_entropy"


@pytest.mark.parametrize(("make", "kind"), KINDS[:-1], ids=[f"{n}-{kind}" for n, (_, kind) in enumerate(KINDS[:-1])])
def test_what_is_asked_by_name_is_done(make, kind):
    """Without a comparison: whoever says so knows."""
    task = task_for(make())
    loss = choose_hard_loss(task, "cross_entropy")
    assert type(loss) is CrossEntropy and not loss.check
    assert choose_hard_loss(task, "model").additive is False
    assert choose_hard_loss(task, "additive").additive is True


def test_a_function_of_the_user_comes_first():
    for asked in ("auto", "cross_entropy", "model"):
        for make in (lambda: make_model("plain_bert"), Own, bart_decoder):
            loss = choose_hard_loss(task_for(make()), asked, 2.0, function=max)
            assert type(loss) is UserLoss and loss.function is max and loss.temperature == 2.0 and not loss.plain
            assert type(choose_hard_loss(task_for(make()), asked, function=max, smoother=min)) is UserLoss
            assert type(choose_hard_loss(task_for(make()), asked, smoother=min)) is SmoothedLoss
    for given in ({"function": max}, {"smoother": max}):
        with pytest.raises(ValueError, match="chunked_logits=True needs plain cross-entropy.* and this run"):
            choose_hard_loss(task_for(make_model("plain_gpt2")), chunked=True, **given)


def test_chunked_logits_need_plain_cross_entropy():
    """A loss of another kind is named; who asks for cross-entropy gets it."""
    loss = choose_hard_loss(task_for(make_model("plain_gpt2")), chunked=True, temperature=2.0)
    assert type(loss) is ChunkedCrossEntropy and loss.temperature == 2.0 and loss.plain
    model = mixtral(output_router_logits=True)
    with pytest.raises(ValueError, match="MixtralForCausalLM has a loss of its own: set it to False, or hard_loss="):
        choose_hard_loss(task_for(model), chunked=True)
    assert type(choose_hard_loss(task_for(model), "cross_entropy", chunked=True)) is ChunkedCrossEntropy
    for asked in ("model", "additive"):
        with pytest.raises(ValueError, match="chunked_logits=True needs plain cross-entropy"):
            choose_hard_loss(task_for(make_model("plain_gpt2")), asked, chunked=True)
    with pytest.raises(ValueError, match="chunked_logits=True is for language models"):
        choose_hard_loss(task_for(make_model("plain_bert")), chunked=True)


def test_additive_losses_are_cross_entropy_and_more():
    """What the structure says is so: the model's own loss exceeds the mean cross-entropy of its rows."""
    torch.manual_seed(0)
    for make, more in ((lambda: mixtral(output_router_logits=True), 1e-4), (mixtral, 0.0)):
        model = make().eval()
        task = task_for(model)
        words, labels = torch.randint(3, VOCABULARY, (2, 6)), torch.randint(3, VOCABULARY, (2, 6))
        with torch.no_grad():
            outputs = model(input_ids=words, labels=labels)
        rows = task.rows(task.logits(outputs, has_loss=True), labels)
        mean = nn.functional.cross_entropy(rows.logits, rows.labels)
        assert outputs.loss > mean + more if more else torch.isclose(outputs.loss, mean)


def test_unshifted_models_learn_to_copy():
    """Their loss is that of the label at the same position."""
    model = bart_decoder().eval()
    words = torch.randint(3, VOCABULARY, (2, 6))
    with torch.no_grad():
        outputs = model(input_ids=words, labels=words)
    in_place = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), words.flatten())
    torch.testing.assert_close(outputs.loss, in_place)
