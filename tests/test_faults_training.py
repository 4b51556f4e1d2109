"""Faults of the worst kind: a run that goes on in silence with wrong rows, losses, weights or metrics."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import (
    CLASSES,
    collate,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    same_weights,
    state_of,
    train,
)
from torch import nn
from transformers import Trainer

from hf_selfkd import (
    SelfKDTrainer,
)
from hf_selfkd.losses.choose import choose_hard_loss, hard_loss_kind
from hf_selfkd.metrics import compute_classification_metrics
from hf_selfkd.tasks import task_for


pytestmark = pytest.mark.trains


WORDS = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
SAVED = {"save_strategy": "epoch"}


# Rows: which prediction belongs to which label


@torch.no_grad()
def shifted_rows(model, samples):
    """Log-probabilities and labels of all target words of a causal model, one sample at a time."""
    model.eval()
    pairs = []
    for n in range(len(samples)):
        item = collate([samples[n]])
        log_probs = model(item["input_ids"], attention_mask=item["attention_mask"]).logits[0].log_softmax(-1)
        pairs += [(log_probs[i], label) for i, label in enumerate(item["labels"][0, 1:].tolist()) if label != -100]
    return torch.stack([row for row, _ in pairs]), torch.tensor([label for _, label in pairs])


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_token_metrics_of_a_causal_model_are_of_the_next_word(tmp_path, name, alpha):
    """Token metrics are shifted, equal a loop over single samples, and agree with the loss of the evaluation."""
    samples = make_samples("words", 11, seed=3)
    trainer = make_trainer(tmp_path, name, make_samples("words"), alpha=alpha, eval_dataset=samples)
    metrics = trainer.evaluate()
    log_probs, labels = shifted_rows(trainer.model, samples)
    nll = F.nll_loss(log_probs, labels).item()
    assert metrics["eval_token_nll"] == pytest.approx(nll, rel=1e-5)
    accuracy = (log_probs.argmax(-1) == labels).float().mean().item()
    assert metrics["eval_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    confidence, correct = log_probs.max(-1).values.exp(), (log_probs.argmax(-1) == labels).float()
    bins = (confidence * 10).ceil().long() - 1
    gaps = [(confidence - correct)[bins == number].sum().abs().item() for number in range(10)]
    assert metrics["eval_token_ece"] == pytest.approx(100 * sum(gaps) / len(labels), rel=1e-4)


def test_logits_of_a_language_model_are_not_kept_for_its_token_metrics(tmp_path):
    samples = make_samples("words", 11)
    trainer = make_trainer(tmp_path, "gpt2", samples)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(samples), "Evaluation", prediction_loss_only=True)
    assert output.predictions is None and output.metrics["eval_token_nll"] > 0


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_classification_metrics_of_unshifted_words_are_refused(tmp_path, name, alpha):
    options = {"compute_metrics": compute_classification_metrics, "alpha": alpha}
    refused(lambda: make_trainer(tmp_path, name, make_samples(name), **options), "compute_metrics", "token_nll")


def test_classification_metrics_of_words_that_somebody_has_shifted_are_accepted(tmp_path):
    """A user who aligns predictions and labels himself gets the metrics of the aligned rows."""
    samples = make_samples("words", 11)

    def aligned(logits, labels):
        return F.pad(logits[:, :-1], (0, 0, 1, 0)).float()  # the prediction of each word, where the word stands

    options = {"compute_metrics": compute_classification_metrics, "preprocess_logits_for_metrics": aligned}
    trainer = make_trainer(tmp_path, "gpt2", samples, eval_dataset=samples, per_device_eval_batch_size=11, **options)
    metrics = trainer.evaluate()
    log_probs, labels = shifted_rows(trainer.model, samples)
    firsts = sum(samples[n]["labels"][0] != -100 for n in range(len(samples)))  # which nothing predicts
    nll = (F.nll_loss(log_probs, labels, reduction="sum").item() + firsts * math.log(30)) / (len(labels) + firsts)
    assert metrics["eval_nll"] == pytest.approx(nll, rel=1e-4)


AUDIO = {"num_mel_bins": 8, "max_source_positions": 8}


def qwen2_audio():
    tower = AUDIO | {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    text = WORDS | {"model_type": "qwen2"}
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=29)
    )


def voxtral():
    tower = AUDIO | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = WORDS | {"model_type": "llama", "head_dim": 8}
    return tf.VoxtralForConditionalGeneration(
        tf.VoxtralConfig(audio_config=tower, text_config=text, audio_token_id=29)
    )


def llava():
    tower = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = WORDS | {"model_type": "llama"}
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=tower, image_token_index=29)
    )


@pytest.mark.parametrize("make", [qwen2_audio, voxtral, llava])
def test_decoder_only_models_of_other_mappings_shift(tmp_path, make):
    """The configuration tells whether there is an encoder: the first loss is the model's own, of the next words."""
    torch.manual_seed(0)
    model = make()
    assert task_for(model).shifts_labels
    samples = make_samples("words", 8)
    batch = collate([samples[n] for n in range(8)])
    own = model.eval()(**batch).loss.item()
    options = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential", "num_train_epochs": 2}
    trainer = train(tmp_path, model, samples, **options)
    assert logged(trainer, "loss")[0] == pytest.approx(own, rel=1e-4)
    assert logged(trainer, "soft_loss")[-1] > 0


def test_encoder_decoder_models_of_speech_do_not_shift():
    """The brother: Whisper stands in the same mapping and has an encoder."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= AUDIO | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 16}
    model = tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(vocab_size=30, pad_token_id=0, bos_token_id=2, eos_token_id=1, **sizes)
    )
    assert not task_for(model).shifts_labels


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="transformers asks for what torch has from 2.7 on"
)
@pytest.mark.parametrize("name", ["plain_gpt2", "llama"])
def test_a_compiled_causal_model_predicts_the_next_word(tmp_path, name):
    """What `torch.compile` returns is looked through: the run is that of the bare model."""
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = make_model(name)
        given = torch.compile(model, backend="eager") if compiled else model
        options = {"label_names": ["labels"], "remove_unused_columns": False, "num_train_epochs": 2, "optim": "sgd"}
        trainer = train(tmp_path / str(compiled), given, make_samples(name, 8), **options)
        results.append((logged(trainer, "loss"), state_of(model)))
    (losses, weights), (compiled_losses, compiled_weights) = results
    assert compiled_losses == pytest.approx(losses, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(compiled_weights[name], tensor, atol=1e-5, rtol=0)


# Losses


def passing_over(base):
    """Class weights as the documentation of transformers shows them, without a call of super."""

    class Weighted(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = nn.CrossEntropyLoss(weight=torch.linspace(1, 2, CLASSES))(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    return Weighted


@pytest.mark.parametrize("options", [{}, {"auxiliary_heads": "byot", "alpha": 0.0}, {"teacher": "snapshot"}])
def test_a_compute_loss_that_distils_nothing_is_refused_when_the_trainer_is_made(tmp_path, options):
    made = passing_over(SelfKDTrainer)
    refused(
        lambda: make_trainer(tmp_path, "plain_vit", make_samples("vit"), trainer=made, **options),
        "Weighted.compute_loss",
        "compute_loss_func",
    )


def test_a_compute_loss_that_hides_what_it_does_is_refused_at_the_first_step(tmp_path):
    """The brothers: a function put on the class or the object, and one that calls super under a condition."""

    def own(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model is None:
            return super(SelfKDTrainer, self).compute_loss(model, inputs)
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    class Sometimes(SelfKDTrainer):
        compute_loss = own

    for kind in ("class", "object"):
        trainer = Sometimes if kind == "class" else SelfKDTrainer
        made = make_trainer(tmp_path, "bert", make_samples("bert"), trainer=trainer)
        if kind == "object":
            made.compute_loss = own.__get__(made)
        refused(made.train, "compute_loss", "compute_loss_func")
        assert made.state.global_step == 0


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"teacher": "none"}])
def test_a_compute_loss_without_super_trains_plainly_as_trainer_does(tmp_path, options, accumulation):
    """Weights and logged losses are those of `Trainer`, whatever its scale is."""
    common = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
    ours = train(tmp_path, "vit", make_samples("vit", 16), trainer=passing_over(SelfKDTrainer), **common, **options)
    stock = train(tmp_path, "vit", make_samples("vit", 16), trainer=passing_over(Trainer), **common)
    assert same_weights(ours.model, stock.model)
    assert logged(ours, "loss") == logged(stock, "loss")


@pytest.mark.parametrize("name", ["plain_vit", "plain_gpt2", "plain_bert_tokens"])
def test_a_call_of_super_without_the_count_means_the_rows_of_the_batch(tmp_path, name):
    class WithoutCount(SelfKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **others):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            return (loss, outputs) if return_outputs else loss

    one, other = (
        train(tmp_path, name, make_samples(name, 8), trainer=trainer) for trainer in (SelfKDTrainer, WithoutCount)
    )
    assert same_weights(one.model, other.model) and logged(one, "loss") == logged(other, "loss")


class Anchored(tf.BertForSequenceClassification):
    """L2-SP: a term that pulls weights to where they started, and is 0 in the first step."""

    def __init__(self, config):
        super().__init__(config)
        self.post_init()
        self.start = self.classifier.weight.detach().clone()

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask, labels=labels)
        if labels is not None:
            outputs.loss = outputs.loss + 10 * (self.classifier.weight - self.start).square().sum()
        return outputs


class Weighted(tf.BertForSequenceClassification):
    """Class weights that are equal but for the last class."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask)
        if labels is not None:
            weight = torch.tensor([1.0] * (CLASSES - 1) + [50.0])
            outputs.loss = F.cross_entropy(outputs.logits, labels, weight)
        return outputs


@pytest.mark.parametrize("model_class", [Anchored, Weighted])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_a_loss_that_looks_plain_on_the_first_batch_is_kept(tmp_path, model_class, alpha):
    """The loss of a class of one's own is decided by structure: the first batch shows plain cross-entropy only."""
    samples = make_samples("texts", 32)
    others = [item for item in samples.items if item["labels"] != CLASSES - 1]
    samples.items = others[:4] + [item for item in samples.items if item not in others[:4]]  # for the first batch
    own = []

    class Notes(SelfKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            own.append(outputs.loss.item())
            return (loss, outputs) if return_outputs else loss

    def run(trainer, base, **options):
        torch.manual_seed(0)
        model = base(make_model("plain_bert").config)
        options |= {"train_sampling_strategy": "sequential", "num_train_epochs": 2, "optim": "sgd"}
        return train(tmp_path, model, samples, trainer=trainer, learning_rate=0.1, **options)

    stock, plain = run(Trainer, model_class), run(Trainer, tf.BertForSequenceClassification)
    assert logged(stock, "loss")[0] == pytest.approx(logged(plain, "loss")[0], abs=1e-5)
    assert logged(stock, "loss")[-1] != pytest.approx(logged(plain, "loss")[-1], rel=1e-3)
    ours = run(Notes if alpha else SelfKDTrainer, model_class, alpha=alpha)
    if alpha == 0:
        assert same_weights(ours.model, stock.model)
    else:
        assert logged(ours, "hard_loss") == pytest.approx(own, rel=1e-5)
        assert own[:8] != pytest.approx(logged(plain, "loss")[:8], rel=1e-3)


def mixtral(**more):
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True} | more
    return tf.MixtralForCausalLM(tf.MixtralConfig(router_aux_loss_coef=0.5, **WORDS, **settings))


def switch():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "num_experts": 4}
    sizes |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "dropout_rate": 0.0}
    coefficients = {"router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.5, "router_jitter_noise": 0.0}
    tokens = {"vocab_size": 30, "pad_token_id": 0, "decoder_start_token_id": 0}
    config = tf.SwitchTransformersConfig(**sizes, **coefficients, **tokens)
    return tf.SwitchTransformersForConditionalGeneration(config)


@pytest.mark.parametrize(("make", "kind"), [(mixtral, "words"), (switch, "pairs")])
def test_balancing_of_experts_keeps_its_weight(tmp_path, make, kind):
    """`loss + alpha * (soft - hard)`: an epoch after the first costs what a naive formula says, router term whole."""
    torch.manual_seed(0)
    model, samples, alpha = make().train(), make_samples(kind, 4), 0.6

    def with_routers(items):
        return collate(items) | {"output_router_logits": True}

    batch = with_routers([samples[n] for n in range(4)])
    with torch.no_grad():
        outputs = model(**batch)
    logits, labels = outputs.logits, batch["labels"]
    if kind == "words":
        logits, labels = logits[:, :-1], labels[:, 1:]
    log_probs, kept = logits.log_softmax(-1)[labels != -100], labels[labels != -100]
    hard = F.nll_loss(log_probs, kept)
    soft = -(log_probs.exp() * log_probs).sum(-1).mean()  # the past of weights that have not moved
    assert outputs.loss - hard > 0.05
    options = {"alpha": alpha, "alpha_schedule": "constant", "teacher": "history", "learning_rate": 0.0}
    options |= {"data_collator": with_routers}
    trainer = train(tmp_path, model, samples, **options)
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(outputs.loss.item(), rel=1e-4)
    assert losses[1] == pytest.approx((outputs.loss + alpha * (soft - hard)).item(), rel=1e-4)


def test_experts_that_are_not_balanced_are_plain_cross_entropy():
    assert hard_loss_kind(task_for(mixtral())) == "additive"
    assert hard_loss_kind(task_for(mixtral(output_router_logits=False))) == "cross_entropy"


def test_the_user_may_say_what_the_loss_is():
    """A loss of unknown make gives way as a whole, unless the field `hard_loss` says more."""
    task = task_for(Anchored(make_model("plain_bert").config))
    assert type(choose_hard_loss(task)).__name__ == "ModelLoss" and not choose_hard_loss(task).additive
    assert choose_hard_loss(task, "additive").additive
    assert type(choose_hard_loss(task, "cross_entropy")).__name__ == "CrossEntropy"
