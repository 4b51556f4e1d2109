"""Heads on architectures of other makes: where they stand, what they are made of, what is refused at once."""

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import CLASSES, make_model, refused
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_selfkd import attach_auxiliary_heads
from hf_selfkd.heads import heads_of
from hf_selfkd.heads.rotation import _select, rotate
from hf_selfkd.losses.chunked import ChunkedHead
from hf_selfkd.losses.chunked_cross_entropy import ChunkedCrossEntropy
from hf_selfkd.tasks import task_for


PYRAMID = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 16, 16, 32], "num_labels": CLASSES}
ATTENTION = PYRAMID | {"num_attention_heads": [1, 2, 2, 2], "image_size": 64}
TEXT = {"vocab_size": 40, "num_labels": CLASSES}
STAGES = {
    "pvt": (tf.PvtConfig, tf.PvtForImageClassification, ATTENTION, ["0.0", "1.1", "2.0", "3.0"]),
    "poolformer": (tf.PoolFormerConfig, tf.PoolFormerForImageClassification, PYRAMID, ["0.0", "1.1", "2.0", "3.0"]),
    "funnel": (
        tf.FunnelConfig,
        tf.FunnelForSequenceClassification,
        TEXT | {"block_sizes": [1, 2, 2], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16},
        ["0.0", "1.1", "2.1"],
    ),
}


def build(config, model, options, seed=0):
    torch.manual_seed(seed)
    return model(config(**options))


@pytest.mark.parametrize("name", STAGES)
def test_heads_stand_at_the_end_of_every_stage_of_a_nested_list(name):
    config, model, options, ends = STAGES[name]
    preset = "byot" if name == "funnel" else "lsskd"
    heads = heads_of(attach_auxiliary_heads(build(config, model, options), preset))
    ends = ends[:-1] if preset == "byot" else ends  # without rotations the model's own classifier stands on the last
    assert [".".join(name.split(".")[-2:]) for name in heads.names] == ends


def has_batch_norm(module):
    return any(isinstance(part, _BatchNorm) for part in module.modules())


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet", "mobilenet"])
def test_heads_use_batch_statistics_only_where_the_model_does(name):
    model = make_model(name)
    own = has_batch_norm(model)
    heads = heads_of(attach_auxiliary_heads(model, "lsskd"))
    assert heads.config.head == "conv" and has_batch_norm(heads) is own is (name in ("resnet", "mobilenet"))


@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "gpt2", "marian", "wav2vec2"])
@pytest.mark.parametrize("preset", ["byot", "deep_supervision"])
def test_every_head_teaches_its_layer_and_leaves_no_trace_of_the_check(name, preset):
    model = make_model(name)
    if name not in ("resnet", "vit"):
        config = model.config
        for field in ("num_hidden_layers", "n_layer", "decoder_layers"):
            if hasattr(config, field):
                setattr(config, field, 3)
        torch.manual_seed(0)
        model = type(model)(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, rng = [module.training for module in model.modules()], torch.get_rng_state()
    attach_auxiliary_heads(model, preset)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert [module.training for name, module in model.named_modules() if "selfkd_heads" not in name] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_heads_that_would_teach_nobody_are_refused():
    """EfficientNet from scratch draws the weights of its norms around 0: nothing passes several of its blocks."""
    options = {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
    model = build(tf.EfficientNetConfig, tf.EfficientNetForImageClassification, options | {"num_labels": CLASSES})
    names = set(model.state_dict())
    refused(lambda: attach_auxiliary_heads(model, "joint"), "passes no gradient", "pretrained weights")
    assert set(model.state_dict()) == names and heads_of(model) is None
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    heads = heads_of(attach_auxiliary_heads(model, "joint"))
    model.train()
    outputs = model(pixel_values=torch.randn(4, 3, 32, 32))
    backbone = [p for name, p in model.named_parameters() if "selfkd_heads" not in name]
    for logits in outputs["auxiliary"][: len(heads.heads)]:
        gradients = torch.autograd.grad(logits.square().sum(), backbone, retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients)


@pytest.mark.parametrize("special", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_made_up_words_are_in_the_vocabulary(special):
    config = make_model("gpt2").config
    setattr(config, special, 50256)
    config.n_layer = 2
    attach_auxiliary_heads(tf.GPT2LMHeadModel(config), "byot")


SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
TEXTS = {
    "longformer": (
        tf.LongformerConfig,
        tf.LongformerForSequenceClassification,
        TEXT | SMALL | {"attention_window": 4, "max_position_embeddings": 66},
    ),
    "wav2vec2-bert": (
        tf.Wav2Vec2BertConfig,
        tf.Wav2Vec2BertForSequenceClassification,
        SMALL | {"num_labels": CLASSES, "classifier_proj_size": 8},
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_models_that_tell_their_inputs_in_other_words(name):
    assert len(heads_of(attach_auxiliary_heads(build(*TEXTS[name]), "byot")).names) == 3


@pytest.mark.parametrize("architecture", ["swin_tiny_patch4_window7_224", "mambaout_femto"])
@pytest.mark.parametrize("preset", ["lsskd", "joint"])
def test_maps_with_channels_last(architecture, preset):
    sizes = {"depths": (1, 1, 1, 1)}
    sizes |= {"embed_dim": 12, "num_heads": (1, 1, 2, 2)} if "swin" in architecture else {"dims": (8, 8, 16, 16)}
    kind = {"architecture": architecture, "num_classes": CLASSES, "model_args": sizes}
    torch.manual_seed(0)
    model = tf.TimmWrapperForImageClassification(tf.TimmWrapperConfig.from_dict(kind))
    heads = heads_of(attach_auxiliary_heads(model, preset))
    with torch.no_grad():
        outputs = model.train()(pixel_values=torch.randn(2, 3, 224, 224))
    assert [part.shape for part in outputs["auxiliary"][: len(heads.names)]] == [(2, 4 * CLASSES)] * 4


def test_rotations_without_an_index_are_the_same():
    """As a device that compiles needs them: no shape depends on the data."""
    images = torch.randn(5, 3, 6, 6)
    rotations = np.array([[0, 1], [0, 3], [0, 2], [0, 1], [0, 3]])
    views = images.repeat_interleave(2, dim=0)
    turned = _select(views, torch.from_numpy(rotations).reshape(-1, 1, 1, 1))
    assert torch.equal(turned, rotate(images, rotations)) and not torch.equal(turned, views)


GEMMA = {"head_dim": 8, "num_key_value_heads": 1, "vocab_size": 40, "num_labels": CLASSES} | SMALL


def test_a_cap_behind_the_head_is_refused_by_the_configuration():
    """Of a model from scratch the logits are so small that the cap does nothing yet."""
    model = build(tf.Gemma2Config, tf.Gemma2ForCausalLM, GEMMA | {"final_logit_softcapping": 5.0})
    refused(lambda: ChunkedHead(model), "chunked_logits=True", "final_logit_softcapping=5.0")
    ChunkedHead(build(tf.Gemma2Config, tf.Gemma2ForCausalLM, GEMMA | {"final_logit_softcapping": None})).remove()


def test_a_cap_is_found_however_small_the_logits_are():
    """In a class that tells nothing of it."""

    class Capped(type(make_model("llama"))):
        def forward(self, *arguments, **keywords):
            outputs = super().forward(*arguments, **keywords)
            outputs["logits"] = 5 * torch.tanh(outputs["logits"] / 5)
            outputs["loss"] = None
            return outputs

    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    words = {"input_ids": torch.randint(3, 30, (4, 6)), "labels": torch.randint(3, 30, (4, 6))}
    for kind in (type(model), Capped):
        model.__class__ = kind
        task = task_for(model)
        loss = ChunkedCrossEntropy(task)
        loss.open()
        check = lambda task=task, loss=loss: loss._check(task.split(words))  # noqa: E731
        check() if kind is not Capped else refused(check, "scaled or capped")
        loss.close()
