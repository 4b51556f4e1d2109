"""The loss without the logits: the same training to rounding, whatever the model, and nothing left behind."""

import pytest
import torch
import transformers
from helpers import CLASSES, VOCABULARY, difference, logged, make_model, make_samples, make_trainer, refused, train
from test_language_models import ours
from test_resume import assert_same, everything
from torch import nn
from transformers import set_seed

from hf_selfkd import SelfKDTrainer
from hf_selfkd.losses.chunked import ChunkedHead


pytestmark = pytest.mark.trains


MODELS = "marian t5 bart mbart m2m100 llama qwen2 gpt2 bert_mlm".split()
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
FIGURES = ("loss", "hard_loss", "soft_loss", "past_agreement", "rows_with_history", "target_entropy")


def without_dropout(name):
    model = make_model(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def run(folder, name, **options):
    return train(folder, without_dropout(name), make_samples(name), trainer=ours(name), **SGD, **options)


@pytest.mark.parametrize("name", MODELS)
def test_chunked_is_whole_to_rounding(tmp_path, name):
    """Weights and logged figures, with a past and without one."""
    whole = run(tmp_path, name, history_top_k=5)
    chunked = run(tmp_path, name, history_top_k=5, chunked_logits=True)
    assert difference(whole, chunked) < 1e-6
    for figure in FIGURES:
        assert logged(chunked, figure) == pytest.approx(logged(whole, figure), abs=1e-5), figure
    plain = run(tmp_path, name, alpha=0.0)
    assert difference(plain, run(tmp_path, name, alpha=0.0, chunked_logits=True)) < 1e-6
    assert difference(plain, chunked) > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"history_tail": "bucket"},
        {"history_tail": "uniform"},
        {"temperature": 2.0},
        {"gradient_accumulation_steps": 2},
        {"warm_start_teacher": True},
    ],
    ids=str,
)
def test_chunked_with_options(tmp_path, options):
    options = {"history_top_k": 5, "seed": 3} | options
    whole = run(tmp_path, "marian", **options)
    assert difference(whole, run(tmp_path, "marian", chunked_logits=True, **options)) < 1e-6
    assert difference(whole, run(tmp_path, "marian", alpha=0.0, seed=3)) > 1e-4


def test_trace(tmp_path):
    """The probabilities of the labels in every epoch, the first included."""
    options = {"history_top_k": 5, "history_trace": True}
    traces = [run(tmp_path, "marian", chunked_logits=chunked, **options).teacher.trace for chunked in (False, True)]
    assert torch.isfinite(traces[0]).all() and torch.allclose(*(trace.float() for trace in traces), atol=1e-3)


def test_many_pieces(tmp_path, monkeypatch):
    """Pieces of a few rows only, the last of them ragged."""
    whole = run(tmp_path, "plain_gpt2", history_top_k=5)
    monkeypatch.setattr("hf_selfkd.losses.chunked.rows_per_chunk", lambda weight: 7)
    assert difference(whole, run(tmp_path, "plain_gpt2", history_top_k=5, chunked_logits=True)) < 1e-6


def test_logits_are_never_whole(tmp_path):
    """The model makes the logits of one position of each sample, from the first step on."""
    shapes = []

    class Watching(SelfKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **keywords):
            loss, outputs = super().compute_loss(model, inputs, True, **keywords)
            if model.training:
                shapes.append(outputs.logits.shape[1])
            return (loss, outputs) if return_outputs else loss

    trainer = make_trainer(
        tmp_path,
        "gpt2",
        make_samples("gpt2"),
        trainer=Watching,
        chunked_logits=True,
        eval_dataset=make_samples("gpt2", 5),
    )
    trainer.train()
    assert set(shapes) == {1} and len(shapes) == 18
    assert trainer.predict(make_samples("gpt2", 5)).predictions.shape[1] > 1


def test_the_model_is_left_as_it_was(tmp_path):
    trainer = run(tmp_path, "marian", chunked_logits=True)
    head = trainer.model.get_output_embeddings()
    assert not head._forward_hooks and not head._forward_pre_hooks


@pytest.mark.parametrize("name", ["marian", "gpt2"])
def test_resume_is_exact(tmp_path, name):
    """In the middle of an epoch, dropout included."""
    options = {"trainer": ours(name), "chunked_logits": True, "history_top_k": 5, "save_strategy": "steps"}
    samples = make_samples(name)
    full = train(tmp_path, name, samples, save_steps=8, **options)
    again = train(tmp_path, name, samples, resume=8, save_steps=8, **options)
    assert_same(everything(full, 8), everything(again, 8))


# What is refused


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "snapshot"},
        {"teacher": "ema"},
        {"alpha": 0.0, "label_smoothing_factor": 0.1},
    ],
    ids=str,
)
def test_options_that_need_logits(tmp_path, options):
    refused(lambda: run(tmp_path, "gpt2", chunked_logits=True, **options), "chunked_logits=True", list(options)[-1])


def test_other_tasks(tmp_path):
    action = lambda: make_trainer(tmp_path, "vit", make_samples("vit"), chunked_logits=True)  # noqa: E731
    refused(action, "chunked_logits=True", "language models")


def test_a_head_that_is_not_linear(tmp_path):
    model = make_model("gpt2")
    model.set_output_embeddings(nn.Sequential(nn.Linear(16, CLASSES)))
    refused(lambda: ChunkedHead(model), "chunked_logits=True", "Sequential")


def test_logits_that_are_more_than_the_head_gives(tmp_path):
    """A cap after the head, as Gemma has it; before the first optimizer step."""
    model = make_model("llama")
    forward = model.forward

    class Capped(type(model)):
        def forward(self, *arguments, **keywords):
            outputs = forward(*arguments, **keywords)
            outputs["logits"] = torch.tanh(outputs["logits"] / 3)
            outputs["loss"] = None
            return outputs

    model.__class__ = Capped
    options = {"chunked_logits": True, "remove_unused_columns": False}
    action = lambda: make_trainer(tmp_path, model, make_samples("llama"), **options)  # noqa: E731
    refused(action, "chunked_logits=True", "Capped", "hard_loss='cross_entropy'")
    options["hard_loss"] = "cross_entropy"
    trainer = make_trainer(tmp_path, model, make_samples("llama"), **options)
    refused(trainer.train, "chunked_logits=True", "scaled or capped")
    assert trainer.state.global_step == 0


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def from_scratch(name, **options):
    """A tiny model as transformers draws it: its logits are small."""
    set_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    small = {key: value for key, value in SMALL.items() if key != "head_dim" or name.startswith("Gemma")}
    return kind(kind.config_class(**(small | options))).eval()


def check(model):
    """What [`ChunkedHead`] says of a model."""
    head = ChunkedHead(model)
    head.watching = True
    with torch.no_grad():
        logits = model(input_ids=torch.randint(3, VOCABULARY, (2, 5))).logits
    head.check(logits)
    head.remove()
    return logits


CHANGED = [
    ("Gemma2", {"final_logit_softcapping": 5.0}, "final_logit_softcapping=5.0"),
    ("Gemma2", {}, "final_logit_softcapping=30.0"),
    ("Cohere", {"logit_scale": 0.0625}, "logit_scale=0.0625"),
    ("Granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
]


@pytest.mark.parametrize("name, options, told", CHANGED)
def test_scales_and_caps_that_the_configuration_tells_are_refused(tmp_path, name, options, told):
    """At construction, and not by the size of the logits."""
    model = from_scratch(name, **options)
    action = lambda: make_trainer(tmp_path, model, make_samples("gpt2"), chunked_logits=True)  # noqa: E731
    refused(action, "chunked_logits", told, type(model).__name__)
    head = model.get_output_embeddings()
    assert not head._forward_hooks and not head._forward_pre_hooks


@pytest.mark.parametrize("name, options, told", CHANGED)
def test_scales_and_caps_show_however_small_the_logits_are(monkeypatch, name, options, told):
    """The same models, if nothing were known of their configuration."""
    monkeypatch.setattr("hf_selfkd.losses.chunked.changes_of_logits", lambda model: {})
    refused(lambda: check(from_scratch(name, **options)), "chunked_logits=True", "scaled or capped")


@pytest.mark.parametrize(
    "name, options",
    [
        ("Gemma2", {"final_logit_softcapping": None}),
        ("Cohere", {"logit_scale": 1.0}),
        ("Granite", {"logits_scaling": 1.0}),
        ("Llama", {}),
        ("Mistral", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_what_the_head_gives(name, options, dtype):
    check(from_scratch(name, **options).to(dtype))


def test_the_check_leaves_the_logits_of_later_forwards_alone():
    model = from_scratch("Llama")
    words = torch.randint(3, VOCABULARY, (2, 5))
    with torch.no_grad():
        before = model(input_ids=words).logits
        check(model)
        assert torch.equal(model(input_ids=words).logits, before)


def test_a_head_that_is_called_twice(tmp_path):
    """A second call would be learned from in place of the first."""
    model = from_scratch("Llama")
    forward = model.forward

    class Twice(type(model)):
        def forward(self, *arguments, **keywords):
            forward(*arguments, **keywords)
            return forward(*arguments, **keywords)

    model.__class__ = Twice
    refused(lambda: check(model), "chunked_logits=True")


def test_a_loss_of_ones_own(tmp_path):
    def make():
        return make_trainer(
            tmp_path,
            "gpt2",
            make_samples("gpt2"),
            chunked_logits=True,
            compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.mean(),
        )

    refused(make, "chunked_logits=True", "plain cross-entropy")
