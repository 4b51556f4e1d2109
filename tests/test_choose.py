"""What is decided once: which teacher a run has, and what its hard loss is made of."""

import pytest
import torch
import transformers as tf
from helpers import make_model
from torch import nn

from hf_selfkd.config import MethodArguments
from hf_selfkd.losses.choose import choose_hard_loss, hard_loss_kind
from hf_selfkd.losses.hard import CrossEntropy, ModelLoss, SmoothedLoss, UserLoss
from hf_selfkd.tasks import task_for
from hf_selfkd.teachers.choose import Facts, choose_teacher


# Teachers


def choose(facts, **asked):
    return choose_teacher(MethodArguments(**asked), facts)


def test_auto_takes_the_history_wherever_it_can():
    assert choose(Facts(2)) == ("history", "")
    assert choose(Facts(1), warm_start_teacher=True) == ("history", "")
    assert choose(Facts(1), alpha=0.0, history_trace=True) == ("history", "")


@pytest.mark.parametrize(
    ("facts", "asked", "kind", "reason"),
    [
        (Facts(2, past_of_heads=True), {}, "snapshot", "many times larger"),
        (Facts(2, no_ids="a stream"), {}, "snapshot", "a stream"),
        (Facts(2, no_rows="masks"), {}, "snapshot", "masks"),
        (Facts(2), {"teacher_dropout": True}, "snapshot", "copy of the weights"),
        (Facts(1), {}, "none", "one epoch"),
        (Facts(1, no_ids="a stream"), {}, "none", "one epoch"),
    ],
)
def test_auto_says_why_it_takes_another(facts, asked, kind, reason):
    chosen, said = choose(facts, **asked)
    assert chosen == kind and reason in said


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_what_is_asked_by_name_is_never_replaced(teacher):
    assert choose(Facts(2), teacher=teacher) == (teacher, "")
    with pytest.raises(ValueError, match=f"1 epoch with teacher='{teacher}'"):
        choose(Facts(1), teacher=teacher)


def test_a_history_that_cannot_be_is_refused_where_it_is_needed():
    for asked in ({"teacher": "history"}, {"history_trace": True}, {"chunked_logits": True}):
        with pytest.raises(ValueError, match="a stream"):
            choose(Facts(2, no_ids="a stream"), **asked)
    assert choose(Facts(2, no_ids="a stream"), teacher="snapshot") == ("snapshot", "")


def test_nothing_is_chosen_where_nothing_is_asked():
    for asked in ({"alpha": 0.0}, {"teacher": "none"}):
        assert choose(Facts(1, no_ids="a stream"), **asked) == ("none", "")


# Hard losses


class Weighted(tf.BertForSequenceClassification):
    """A class of one's own, whose loss nobody knows."""

    def forward(self, input_ids=None, labels=None, **others):
        return super().forward(input_ids=input_ids, labels=labels, **others)


class Unchanged(tf.BertForSequenceClassification):
    """A class of one's own that leaves the forward as it is."""


class Silent(nn.Module):
    def forward(self, x):
        return {"logits": x}


class Speaking(nn.Module):
    def forward(self, x, labels=None):
        return {"logits": x}


MOE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
MOE |= {"intermediate_size": 16, "vocab_size": 40, "num_local_experts": 2}


def mixtral(**options):
    return tf.MixtralForCausalLM(tf.MixtralConfig(**MOE, **options))


def with_own_loss():
    model = make_model("gpt2")
    model.loss_function = lambda *arguments, **keywords: torch.tensor(0.0)
    return model


def with_patched_forward():
    model = make_model("bert")
    model.forward = lambda *arguments, **keywords: None
    return model


def bart_decoder():
    return tf.BartForCausalLM(tf.BartConfig(vocab_size=40, d_model=8, decoder_layers=1, decoder_attention_heads=1))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        *[
            (lambda name=name: make_model(name), "cross_entropy")
            for name in ("bert", "vit", "resnet", "timm", "bert_tokens", "wav2vec2", "gpt2", "llama", "t5", "marian")
        ],
        (lambda: make_model("bert_mlm"), "cross_entropy"),
        (lambda: Unchanged(make_model("bert").config), "cross_entropy"),
        (lambda: torch.compile(make_model("gpt2"), backend="eager"), "cross_entropy"),
        (lambda: Weighted(make_model("bert").config), "model"),
        (with_own_loss, "model"),
        (with_patched_forward, "model"),
        (Silent, "unchecked"),
        (Speaking, "model"),
        (lambda: mixtral(output_router_logits=True), "additive"),
        (lambda: mixtral(output_router_logits=False), "cross_entropy"),
        (lambda: mixtral(output_router_logits=True, router_aux_loss_coef=0.0), "cross_entropy"),
        (bart_decoder, "unshifted"),
    ],
)
def test_the_class_tells_what_the_loss_is(make, kind):
    assert hard_loss_kind(task_for(make())) == kind


def test_a_forward_that_accelerate_has_wrapped_is_that_of_the_class():
    """As the second training of a model with autocast meets it."""
    model = make_model("bert")
    model._original_forward = model.forward
    model.forward = lambda *arguments, **keywords: None
    assert hard_loss_kind(task_for(model)) == "cross_entropy"


def test_what_is_asked_for_wins():
    task = task_for(make_model("bert"))
    kinds = {asked: type(choose_hard_loss(task, asked)) for asked in ("auto", "cross_entropy", "additive", "model")}
    assert kinds == {"auto": CrossEntropy, "cross_entropy": CrossEntropy, "additive": ModelLoss, "model": ModelLoss}
    assert choose_hard_loss(task, "auto").check and not choose_hard_loss(task, "cross_entropy").check
    assert choose_hard_loss(task, "additive").additive and not choose_hard_loss(task, "model").additive
    assert type(choose_hard_loss(task, function=print)) is UserLoss
    assert type(choose_hard_loss(task, smoother=print)) is SmoothedLoss
    assert type(choose_hard_loss(task, function=print, smoother=print)) is UserLoss
    with pytest.raises(ValueError, match="BartForCausalLM compares each position with its own label"):
        choose_hard_loss(task_for(bart_decoder()))
