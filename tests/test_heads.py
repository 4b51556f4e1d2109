"""Auxiliary heads: their configuration, where they are put, what they are made of, and that they vanish again."""

import copy
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    VOCABULARY,
    collate,
    difference,
    logged,
    make_model,
    make_samples,
    make_trainer,
    refused,
    state_of,
    train,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MarianConfig,
    MarianMTModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_selfkd import AuxiliaryHeadsConfig, attach_auxiliary_heads, strip_auxiliary_heads
from hf_selfkd.heads.auxiliary import heads_of
from hf_selfkd.heads.config import CONFIG_NAME, PRESETS
from hf_selfkd.heads.inputs import example_inputs
from hf_selfkd.heads.kinds import grid_of, pool
from hf_selfkd.models import base_model


MODELS = "resnet vit convnext swin mobilenet timm bert bert_tokens wav2vec2 marian gpt2".split()
IMAGES = "resnet vit convnext swin mobilenet timm".split()
LANGUAGE = ("marian", "gpt2", "bert_mlm", "t5", "llama")


# The counter of operations and peft look at all attributes of a module, the deprecated ones too.
FLOPS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def batch_of(name, size=4, labels=False):
    """A batch for a model, with what a decoder needs."""
    batch = collate([make_samples(name, size)[i] for i in range(size)])
    target = batch.pop("labels")
    if name in ("marian", "t5", "bart"):
        batch["decoder_input_ids"] = target.clamp_min(0)
    return batch | {"labels": target} if labels else batch


def deep_vit(layers=6):
    return ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_labels=CLASSES,
        )
    )


# The configuration


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_saving(tmp_path, name):
    config = AuxiliaryHeadsConfig.preset(name, layers=[-1, "vit.layers.0"], temperature=2.0)
    config.save_pretrained(tmp_path / "heads")
    assert AuxiliaryHeadsConfig.from_pretrained(tmp_path / "heads") == config
    assert AuxiliaryHeadsConfig.from_pretrained(tmp_path / "heads" / CONFIG_NAME) == config
    assert AuxiliaryHeadsConfig.resolve(str(tmp_path / "heads")) == config


def test_config_of_a_later_version_loads_with_a_warning(tmp_path, caplog):
    AuxiliaryHeadsConfig(head="mlp").save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert content["hf_selfkd_version"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(content | {"colour": "red", "hf_selfkd_version": "9.9"}))
    with caplog.at_level(logging.WARNING):
        assert AuxiliaryHeadsConfig.from_pretrained(tmp_path) == AuxiliaryHeadsConfig(head="mlp")
    assert "colour" in caplog.text and "9.9" in caplog.text


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_file_that_is_no_config_is_refused(tmp_path, content):
    (tmp_path / CONFIG_NAME).write_text(content)
    refused(lambda: AuxiliaryHeadsConfig.from_pretrained(tmp_path), CONFIG_NAME)


@pytest.mark.parametrize(
    "field, value",
    [
        ("layers", "every"),
        ("layers", []),
        ("layers", [1.5]),
        ("head", "big"),
        ("views", "flip"),
        ("views_per_step", 4),
        ("hard_weight", -1.0),
        ("past_weight", 1.5),
        ("deep_to_shallow_weight", math.nan),
        ("deep_to_shallow_trust", 0.5),
        ("feature_weight", math.inf),
        ("heads_to_model_weight", -0.5),
        ("temperature", 0.0),
    ],
)
def test_bad_fields_are_refused(field, value):
    refused(lambda: AuxiliaryHeadsConfig(**{field: value}), field, str(value))


def test_names_that_do_not_exist_are_refused(tmp_path):
    refused(lambda: AuxiliaryHeadsConfig.preset("best"), "'best'", "lsskd, lsskd_full, joint, sla, byot")
    refused(
        lambda: AuxiliaryHeadsConfig(hard_weight=0, heads_to_model_weight=1.0), "hard_weight=0", "nothing to teach"
    )
    refused(lambda: AuxiliaryHeadsConfig.resolve(str(tmp_path / "no")), "preset", "joint")
    refused(lambda: AuxiliaryHeadsConfig.resolve({"head": "mlp"}), "dict", "AuxiliaryHeadsConfig")


# Where they are put


@pytest.mark.parametrize(
    "layers, views, expected",
    [(12, "rotation", [3, 7, 11]), (12, "none", [2, 5, 8]), (6, "rotation", [1, 3, 5]), (2, "rotation", [0, 1])]
    + [(2, "none", [0]), (1, "none", [0]), (1, "rotation", [0])],
)
def test_auto_spaces_the_layers_of_a_transformer(layers, views, expected):
    model = attach_auxiliary_heads(deep_vit(layers), AuxiliaryHeadsConfig(views=views))
    assert heads_of(model).names == [f"vit.layers.{i}" for i in expected]


def test_auto_takes_the_stages_of_a_cnn():
    shapes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**shapes, num_labels=CLASSES))
    names = [f"resnet.encoder.stages.{i}" for i in range(4)]
    assert heads_of(attach_auxiliary_heads(model, "lsskd")).names == names
    strip_auxiliary_heads(model)
    assert heads_of(attach_auxiliary_heads(model, "byot")).names == names[:3]


def test_auto_takes_the_ends_of_resolutions_where_blocks_are_listed():
    model = attach_auxiliary_heads(make_model("mobilenet"), "lsskd")
    heads = heads_of(model)
    targets = [heads.layout.shapes[name][-1] for name in heads.names]
    assert targets == sorted(set(targets), reverse=True)  # each resolution once
    assert heads.names[-1] == heads.recorder.names[-1]


def test_heads_of_an_encoder_decoder_are_on_the_decoder():
    assert heads_of(attach_auxiliary_heads(make_model("marian"), "lsskd")).names == ["model.decoder.layers.0"]


def test_layers_by_number_and_name():
    model = attach_auxiliary_heads(deep_vit(), AuxiliaryHeadsConfig(layers=[0, -2, "vit.layers.3.mlp"], head="linear"))
    assert heads_of(model).names == ["vit.layers.0", "vit.layers.3.mlp", "vit.layers.4"]  # in the order of their calls
    model.train()
    assert len(model(**batch_of("vit"))["auxiliary"]) == 3


@pytest.mark.parametrize("layer, known", [(6, "0 to 5"), (-7, "vit.layers.0"), ("vit.layers.9", "vit.layers.5")])
def test_layers_that_do_not_exist_are_refused_with_those_that_do(layer, known):
    model = deep_vit()
    names = list(model.state_dict())
    config = AuxiliaryHeadsConfig(layers=[layer])
    refused(lambda: attach_auxiliary_heads(model, config), "layers", str(layer), known)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "name, options, part",
    [
        ("bert", {"views": "rotation"}, "views='rotation'"),
        ("gpt2", {"views": "rotation"}, "views='rotation'"),
        ("bert", {"head": "conv"}, "head='conv'"),
        ("bert", {"head": "lm_head"}, "head='lm_head'"),
        ("vit", {"head": "lm_head"}, "head='lm_head'"),
        ("vit", {"head": "stages", "layers": ["vit.layers.0.mlp"]}, "head='stages'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(name, options, part):
    refused(lambda: attach_auxiliary_heads(make_model(name), AuxiliaryHeadsConfig(**options)), part)


class Own(nn.Module):
    """A module that transformers does not know."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)])
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"logits": self.out(x)}


def test_a_module_of_ones_own_needs_a_sample():
    refused(lambda: attach_auxiliary_heads(Own(), "deep_supervision"), "inputs=")
    model = attach_auxiliary_heads(Own(), "deep_supervision", inputs={"x": torch.zeros(1, 6)})
    outputs = model.train()(torch.randn(2, 6))
    assert [part.shape for part in outputs["auxiliary"]] == [(2, 4)] * 2  # all layers but the last
    assert set(model.eval()(torch.randn(2, 6))) == {"logits"}


def test_a_model_cannot_grow_heads_twice():
    model = attach_auxiliary_heads(make_model("vit"), "lsskd")
    refused(lambda: attach_auxiliary_heads(model, "lsskd"), "strip_auxiliary_heads")


# What they are made of


@pytest.mark.parametrize("head", ["linear", "mlp", "conv", "stages", "transformer"])
@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_head_on_every_image_model(name, head):
    """Each head gives joint logits, and the backbone below it a gradient (HSAKD's trap is that it does not)."""
    model = attach_auxiliary_heads(make_model(name), AuxiliaryHeadsConfig(head=head)).train()
    parts = model(**batch_of(name))["auxiliary"]
    assert [part.shape for part in parts] == [(4, 4 * CLASSES)] * len(heads_of(model).heads)
    for index, part in enumerate(parts):
        model.zero_grad()
        F.cross_entropy(part, torch.arange(4)).backward(retain_graph=True)
        assert_reached(model, index)


KINDS = ["linear", "mlp", "stages", "transformer"]
CASES = [(name, head) for name in ("bert", "bert_tokens", "wav2vec2", *LANGUAGE) for head in KINDS]


@pytest.mark.parametrize("name, head", CASES + [(name, "lm_head") for name in LANGUAGE])
def test_every_kind_of_head_on_other_models(name, head):
    model = make_model(name)
    model.config.layerdrop = 0.0  # Wav2Vec2 has one layer here, and could skip it
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head=head)).train()
    outputs = model(**batch_of(name))
    (part,) = outputs["auxiliary"]
    assert part.shape == outputs.logits.shape
    part.flatten(0, -2).logsumexp(-1).sum().backward()
    assert_reached(model, 0)


def assert_reached(model, index):
    """That a gradient has reached the head and the first weights of the model."""
    heads = heads_of(model)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in heads.heads[index].parameters())
    others = [i for i in range(len(heads.heads)) if i != index]
    assert all(p.grad is None for i in others for p in heads.heads[i].parameters())
    layer = model.get_submodule(heads.recorder.names[0])
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_stage_heads_copy_the_remaining_layers_with_fresh_weights():
    model = attach_auxiliary_heads(deep_vit(), AuxiliaryHeadsConfig(head="stages", layers=[1, 5]))
    first, last = heads_of(model).heads
    assert len(first.body.copies) == 4 and len(last.body.copies) == 1
    ours, theirs = first.body.copies[0], model.vit.layers[2]
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    assert not torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight)
    assert abs(float(ours.mlp.fc1.weight.detach().std()) - 0.02) < 0.005  # drawn as transformers draws them


def test_stage_heads_of_a_pretrained_model_are_fresh(tmp_path):
    deep_vit().save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path)
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head="stages"))
    copied = heads_of(model).heads[0].body.copies[0].mlp.fc1.weight
    assert all(not torch.equal(copied, layer.mlp.fc1.weight) for layer in model.vit.layers)


def test_stage_heads_run_as_the_layers_do():
    """With the weights of the layers that they copy, they give the features that those give."""
    model = make_model("gpt2")
    model = type(model)(type(model.config)(**(model.config.to_dict() | {"n_layer": 3})))
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head="stages", layers=[0]))
    (head,) = heads_of(model).heads
    for copied, layer in zip(head.body.copies, model.transformer.h[1:], strict=True):
        copied.load_state_dict(layer.state_dict())
    batch = batch_of("gpt2")
    heads_of(model).watching = True
    outputs = model.eval()(**batch, output_hidden_states=True)
    deep = {}
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: deep.setdefault("features", args[0]))
    model(**batch)
    expected = model.lm_head(head.norm(deep["features"]))
    torch.testing.assert_close(heads_of(model).results.logits[0], expected, rtol=1e-5, atol=1e-5)
    assert outputs.logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("name", ["t5", "marian", "gpt2"])
def test_shared_embedding_is_not_copied_and_starts_undecided(name):
    model = make_model(name)
    before = sum(p.numel() for p in model.parameters())
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head="lm_head")).train()
    width = model.get_output_embeddings().weight.shape[1]
    assert sum(p.numel() for p in model.parameters()) - before == 2 * width  # a norm
    (logits,) = model(**batch_of(name))["auxiliary"]
    bias = getattr(model, "final_logits_bias", torch.zeros(1))
    assert 0.1 < float((logits - bias).detach().std()) < 2


def test_causal_heads_do_not_see_what_follows():
    for head in ("transformer", "stages", "lm_head"):
        model = attach_auxiliary_heads(make_model("gpt2"), AuxiliaryHeadsConfig(head=head)).eval()
        heads_of(model).watching = True
        words = torch.randint(3, VOCABULARY, (1, 6))
        changed = words.clone()
        changed[0, 4] = 3 + (changed[0, 4] - 2) % 20
        said = []
        for ids in (words, changed):
            model(input_ids=ids)
            said.append(heads_of(model).results.logits[0])
        assert torch.allclose(said[0][:, :4], said[1][:, :4], atol=1e-6)
        assert not torch.allclose(said[0][:, 4:], said[1][:, 4:], atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "mlp", "transformer", "stages"])
@pytest.mark.parametrize("name", ["plain_bert", "wav2vec2"])
def test_padding_does_not_reach_a_head(name, head):
    model = make_model(name)
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head=head)).eval()
    heads_of(model).watching = True
    key, size, short = ("input_ids", 8, 5) if name == "plain_bert" else ("input_values", 160, 100)
    values = torch.randint(3, 30, (1, size)) if key == "input_ids" else torch.randn(1, size)
    mask = (torch.arange(size) < short).long().unsqueeze(0)
    said = []
    for filler in (0, 7):
        padded = torch.where(mask == 1, values, torch.full_like(values, filler))
        model(**{key: padded if name == "plain_bert" else padded * mask}, attention_mask=mask)
        said.append(heads_of(model).results.logits[0])
    model(**{key: values[:, :short]}, attention_mask=mask[:, :short])
    torch.testing.assert_close(said[0], said[1])
    if name == "plain_bert":
        torch.testing.assert_close(said[0], heads_of(model).results.logits[0], rtol=1e-4, atol=1e-5)


def test_pool_is_the_mean_of_what_counts():
    features = torch.arange(12.0).view(1, 4, 3)
    assert torch.equal(pool(features, torch.tensor([[1, 1, 0, 0]])), features[:, :2].mean(1))
    assert torch.equal(pool(features), features.mean(1))
    assert torch.equal(pool(features.view(1, 3, 2, 2)), features.view(1, 3, 4).mean(-1))
    assert torch.isfinite(pool(features, torch.zeros(1, 4))).all()


def test_class_scores_of_joint_logits():
    """Invariant 28: probabilities of the classes are sums over the four rotations, not sums of scores."""
    model = attach_auxiliary_heads(make_model("resnet"), "joint")
    logits = torch.randn(6, 4 * CLASSES)
    expected = F.softmax(logits, -1).view(6, CLASSES, 4).sum(-1)
    probs = F.softmax(heads_of(model).class_logits(logits), -1)
    torch.testing.assert_close(probs, expected)
    even = F.softmax(heads_of(model).class_logits(torch.zeros(1, 4 * CLASSES)), -1)
    torch.testing.assert_close(even, torch.full((1, CLASSES), 1 / CLASSES))


# That they vanish


@pytest.mark.parametrize("preset", ["lsskd", "joint"])
@pytest.mark.parametrize("name", MODELS)
def test_strip_leaves_the_bare_model(tmp_path, name, preset):
    bare, model = make_model(name).eval(), make_model(name).eval()
    batch = batch_of(name)
    expected = bare(**batch).logits
    set_seed(3)
    drawn = torch.rand(3)
    set_seed(3)
    attach_auxiliary_heads(model, preset)
    assert torch.equal(torch.rand(3), drawn)  # attaching takes no random number
    outputs = model(**batch)
    assert torch.equal(outputs.logits, expected)  # invariant 25, with the heads still on
    assert type(outputs) is type(bare(**batch))
    model.save_pretrained(tmp_path)
    loaded = type(bare).from_pretrained(tmp_path).eval()
    assert difference(loaded, bare) == 0
    torch.testing.assert_close(loaded(**batch).logits, expected)  # in other memory, kernels may add up otherwise
    strip_auxiliary_heads(model)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in bare.named_modules()]
    assert difference(model, bare) == 0
    assert model._keys_to_ignore_on_save == bare._keys_to_ignore_on_save
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert len(hooks) == len([m for m in bare.modules() if m._forward_hooks or m._forward_pre_hooks])
    assert torch.equal(model(**batch).logits, expected)
    assert "auxiliary" not in model.train()(**batch)


@FLOPS
@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_evaluation_costs_what_the_bare_model_costs(name):
    """Invariant 34: no operation more, with heads on the model and after they are gone."""

    def cost(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch_of(name))
        return counter.get_total_flops()

    bare = cost(make_model(name).eval())
    model = attach_auxiliary_heads(make_model(name).eval(), "joint")
    assert cost(model) == bare
    assert cost(model.train()) > bare  # the control
    assert cost(strip_auxiliary_heads(model).eval()) == bare


def test_saved_names_are_those_of_the_bare_model(tmp_path):
    from safetensors import safe_open

    make_model("vit").save_pretrained(tmp_path / "bare")
    attach_auxiliary_heads(make_model("vit"), "joint").save_pretrained(tmp_path / "heads")
    names = []
    for folder in ("bare", "heads"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]
    assert (tmp_path / "bare/config.json").read_text() == (tmp_path / "heads/config.json").read_text()


def test_strip_leaves_a_bare_model_alone():
    model = make_model("vit")
    before = state_of(model)
    assert strip_auxiliary_heads(model) is model
    assert difference(before, model) == 0


def test_copies_of_a_model_have_heads_of_their_own():
    model = attach_auxiliary_heads(make_model("resnet"), "lsskd").train()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        heads_of(twin).heads[0].classifier.bias.fill_(50.0)
    batch = batch_of("resnet")
    assert model(**batch)["auxiliary"][0].max() < 50 and twin(**batch)["auxiliary"][0].max() > 45


def test_heads_depend_on_the_seed_alone():
    one, same, other = (
        attach_auxiliary_heads(make_model("vit"), "joint", seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one if "selfkd_heads" in name)


@FLOPS
def test_heads_on_a_peft_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(deep_vit(), LoraConfig(target_modules=["q_proj", "v_proj", "query", "value"]))
    attach_auxiliary_heads(model, "deep_supervision").train()
    outputs = model(**batch_of("vit"))
    parts = outputs["auxiliary"]
    assert len(parts) == 3 and outputs.logits.shape == (4, CLASSES)
    parts[2].sum().backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and "lora" in n]
    assert any("layers.0." in name for name in reached)
    strip_auxiliary_heads(model)
    assert not any("selfkd" in name for name in model.state_dict())
    assert base_model(model) is model.get_base_model()


def test_tuple_outputs_are_refused():
    model = attach_auxiliary_heads(make_model("vit"), "lsskd").train()
    refused(lambda: model(**batch_of("vit"), return_dict=False), "return_dict=True")


def test_a_step_that_skips_all_layers_says_nothing():
    model = make_model("wav2vec2")
    attach_auxiliary_heads(model, "deep_supervision").train()
    model.config.layerdrop = model.wav2vec2.config.layerdrop = 1.0
    model.wav2vec2.encoder.config.layerdrop = 1.0
    assert model(**batch_of("wav2vec2"))["auxiliary"] == ()


def test_a_skipped_layer_is_what_went_past_it():
    """LayerDrop: with the last layer skipped, a head on it sees the layer before."""
    config = make_model("marian").config.to_dict() | {"decoder_layers": 2, "dropout": 0.0}
    model = MarianMTModel(MarianConfig(**config))
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(layers=[0, 1], head="lm_head")).train()
    heads = heads_of(model)
    heads.heads[1].load_state_dict(heads.heads[0].state_dict())
    batch = batch_of("marian")
    one, two = model(**batch)["auxiliary"]
    assert not torch.allclose(one, two)
    skipped = model.model.decoder.layers[1]
    forward = skipped.__class__.__call__
    try:
        skipped.__class__.__call__ = lambda self, features, *args, **kwargs: (
            features if self is skipped else forward(self, features, *args, **kwargs)
        )
        one, two = model(**batch)["auxiliary"]
    finally:
        skipped.__class__.__call__ = forward
    assert torch.equal(one, two)


# Models of other kinds, and what they need


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": CLASSES,
    "vocab_size": VOCABULARY,
}


def make(name, **options):
    """A tiny model of transformers with a head for classes."""
    import transformers as tf

    config_class, model_class = (getattr(tf, part) for part in name)
    set_seed(0)
    return model_class(config_class(**options)).eval()


OTHERS = {
    "pvt": (
        ("PvtConfig", "PvtForImageClassification"),
        {
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 1, 1],
            "image_size": 32,
        },
    ),
    "pvt_v2": (
        ("PvtV2Config", "PvtV2ForImageClassification"),
        {
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 1, 1],
            "image_size": 32,
        },
    ),
    "mobilevit": (
        ("MobileViTConfig", "MobileViTForImageClassification"),
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 24],
            "num_attention_heads": 2,
        },
    ),
    "clip": (
        ("CLIPConfig", "CLIPForImageClassification"),
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 24,
                "patch_size": 8,
            },
            "num_labels": CLASSES,
        },
    ),
    "bart": (
        ("BartConfig", "BartForSequenceClassification"),
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "vocab_size": VOCABULARY,
        },
    ),
    "videomae": (
        ("VideoMAEConfig", "VideoMAEForVideoClassification"),
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 16,
            "patch_size": 8,
            "num_frames": 4,
            "tubelet_size": 2,
        },
    ),
}


@pytest.mark.parametrize("preset", ["lsskd", "joint", "byot"])
@pytest.mark.parametrize("name", OTHERS)
def test_models_with_layers_of_their_own_kind(name, preset):
    kind, options = OTHERS[name]
    model = make(kind, **({"num_labels": CLASSES} | options))
    heads = heads_of(attach_auxiliary_heads(model, preset))
    for logits in _said(model, heads, example_inputs(model)):
        assert logits.shape[1] == CLASSES * (4 if heads.config.views == "rotation" else 1)
    strip_auxiliary_heads(model)
    assert not any("selfkd" in key for key in model.state_dict())


def _said(model, heads, inputs):
    with heads.watched(), torch.no_grad():
        model(**inputs)
    return heads.results.logits


@pytest.mark.parametrize(
    "kind, options, part",
    [
        (("AlbertConfig", "AlbertForSequenceClassification"), {"embedding_size": 8}, "is called 3 times"),
        (
            ("XLMConfig", "XLMForSequenceClassification"),
            {"emb_dim": 16, "n_layers": 3, "n_heads": 2, "n_words": 30},
            "follow one another",
        ),
        (
            ("XLNetConfig", "XLNetForSequenceClassification"),
            {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16},
            "keep samples apart",
        ),
    ],
)
def test_layers_that_no_head_can_use_are_refused(kind, options, part):
    options = (TINY if kind[0] == "AlbertConfig" else {"num_labels": CLASSES, "vocab_size": VOCABULARY}) | options
    model = make(kind, **options)
    names = list(model.state_dict())
    refused(lambda: attach_auxiliary_heads(model, "deep_supervision"), part)
    assert list(model.state_dict()) == names and heads_of(model) is None


@pytest.mark.parametrize("layers, names", [([3, 0], [0, 3]), ([-1, 1], [1, 5]), ([5, 2, 4], [2, 4, 5])])
def test_heads_are_ordered_from_shallow_to_deep(layers, names):
    model = attach_auxiliary_heads(deep_vit(), AuxiliaryHeadsConfig(layers=layers))
    assert heads_of(model).names == [f"vit.layers.{i}" for i in names]


def test_the_same_layer_twice_is_refused():
    refused(lambda: attach_auxiliary_heads(deep_vit(), AuxiliaryHeadsConfig(layers=[1, -5])), "vit.layers.1", "twice")


@pytest.mark.parametrize(
    "length, size, patch, grid",
    [
        (16, (16, 16), (4, 4), (4, 4)),
        (17, (16, 16), (4, 4), (4, 4)),
        (201, (112, 112), (8, 8), (14, 14)),
        (33, (32, 64), (8, 8), (4, 8)),
        (4, (16, 16), (4, 4), (2, 2)),
        (98, (56, 112), (4, 4), (7, 14)),
        (32, (32, 64), None, (4, 8)),
        (64 + 1, (16, 16), (4, 4), None),
        (7, (16, 16), None, (2, 2)),
    ],
)
def test_grid_of_tokens(length, size, patch, grid):
    found = grid_of(length, size, patch)
    assert found == grid or (grid is None and found != (4, 4))


def test_convolution_sees_every_token_of_an_image_that_is_not_square():
    config = {"image_size": (32, 64), "patch_size": 8, "hidden_size": 16, "intermediate_size": 16}
    model = ViTForImageClassification(
        ViTConfig(**config, num_hidden_layers=2, num_attention_heads=2, num_labels=CLASSES)
    )
    attach_auxiliary_heads(model, "byot").eval()
    tokens = []
    model.vit.layers[0].register_forward_hook(
        lambda module, args, output: tokens.append(output[0] if isinstance(output, tuple) else output)
    )
    heads_of(model).watching = True
    model(pixel_values=torch.randn(1, 3, 32, 64))
    (gradient,) = torch.autograd.grad(heads_of(model).results.logits[0].square().sum(), tokens[-1])
    reached = gradient[0].abs().sum(-1) > 0
    assert reached[1:].all() and len(reached) == 33


class Maps(nn.Module):
    """Two stages of maps, with the channels last or not, for images that are not square."""

    def __init__(self, last):
        super().__init__()
        self.last = last
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(n, 8, 2, stride=2), nn.ReLU()) for n in (3, 8)])
        self.stages = nn.ModuleList([Stage(stage, last) for stage in self.stages])
        self.out = nn.Linear(8, CLASSES)

    def forward(self, pixel_values):
        maps = pixel_values.movedim(1, -1) if self.last else pixel_values
        for stage in self.stages:
            maps = stage(maps)
        return {"logits": self.out(maps.mean((1, 2) if self.last else (2, 3)))}


class Stage(nn.Module):
    def __init__(self, body, last):
        super().__init__()
        self.body, self.last = body, last

    def forward(self, maps):
        return self.body(maps.movedim(-1, 1)).movedim(1, -1) if self.last else self.body(maps)


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (16, 16)])
@pytest.mark.parametrize("last", [False, True])
def test_channels_of_maps(last, size):
    """With 32 x 16, a map of the first stage is [8, 16, 8] or [16, 8, 8]: two of the three are equal."""
    inputs = {"pixel_values": torch.zeros(2, 3, *size)}
    model = attach_auxiliary_heads(Maps(last), AuxiliaryHeadsConfig(views="none", layers=[0, 1]), inputs=inputs)
    height, width = size[0] // 2, size[1] // 2
    if size == (16, 16) and not last:
        assert heads_of(model).layout.shapes["stages.1"] == (2, 8, 4, 4)
    else:
        assert heads_of(model).layout.shapes["stages.0"] == (2, 8, height, width)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("name", ["canine", "sew", "bert"])
def test_padding_of_features_of_another_length_does_not_reach_a_head(name, positional):
    if name == "canine":
        options = TINY | {"downsampling_rate": 2, "local_transformer_stride": 8, "num_hash_buckets": 64}
        model = make(("CanineConfig", "CanineForSequenceClassification"), **options)
        layers = ["canine.encoder.layer.0"]
    elif name == "sew":
        options = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "squeeze_factor": 2,
            "conv_dim": [8, 8],
            "conv_kernel": [5, 3],
            "conv_stride": [5, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "feat_extract_norm": "layer",
            "classifier_proj_size": 8,
            "num_labels": CLASSES,
        }
        model, layers = make(("SEWConfig", "SEWForSequenceClassification"), **options), "auto"
    else:
        model, layers = make_model("plain_bert").eval(), "auto"
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(layers=layers, head="linear"))
    heads_of(model).watching = True
    sizes = (400, 800) if name == "sew" else (8, 16)
    values = torch.randn(1, sizes[0]) if name == "sew" else torch.randint(3, 30, (1, sizes[0]))
    said = []
    for size in sizes:
        padded = torch.cat((values, torch.zeros(1, size - sizes[0], dtype=values.dtype)), dim=1)
        mask = (torch.arange(size) < sizes[0]).long().unsqueeze(0)
        model(padded, mask) if positional else model(padded, attention_mask=mask)
        said.append(heads_of(model).results.logits[0])
    # A window of the squeezed sound may be padding in part, and counts; without a mask the difference was 0.47.
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=0.15 if name == "sew" else 1e-5)


@FLOPS
def test_heads_of_a_model_with_adapters_are_not_saved_with_them(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors import safe_open

    model = get_peft_model(deep_vit(), LoraConfig(target_modules=["q_proj", "v_proj", "query", "value"]))
    names = set(model.state_dict())
    attach_auxiliary_heads(model, "joint")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert not any("selfkd" in name for name in file.keys())
    strip_auxiliary_heads(model)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("field", ["views_per_step", "hard_weight", "temperature", "layers"])
@pytest.mark.parametrize("value", ["1", True, None])
def test_fields_of_another_type_are_refused(field, value):
    refused(lambda: AuxiliaryHeadsConfig(**{field: value}), field)


def test_layers_may_not_be_a_number():
    refused(lambda: AuxiliaryHeadsConfig(layers=3), "layers=3")


# What can keep heads from hearing their model


@pytest.fixture
def fresh_dynamo(monkeypatch):
    """Compilation as a new process has it: without guards for hooks."""
    dynamo = pytest.importorskip("torch._dynamo")
    torch.compiler.reset()
    monkeypatch.setattr(dynamo.config, "skip_nnmodule_hook_guards", True)
    yield
    torch.compiler.reset()


@pytest.mark.trains
def test_heads_learn_after_a_compiled_run_without_heads(tmp_path, fresh_dynamo):
    options = {"torch_compile": True, "torch_compile_backend": "eager", "alpha": 0.0, "num_train_epochs": 1}
    train(tmp_path / "plain", "bert", make_samples("texts", 8), **options)
    trainer = train(tmp_path / "heads", "bert", make_samples("texts", 8), auxiliary_heads="byot", **options)
    assert logged(trainer, "head0_loss")


def test_heads_that_hear_nothing_are_an_error():
    model = attach_auxiliary_heads(make_model("vit"), "byot").train()
    heads_of(model).recorder.remove()
    refused(lambda: model(**batch_of("vit")), "heard nothing", "ViTForImageClassification", "compile")


def test_evaluation_after_a_forward_pass_that_was_broken_off():
    model = attach_auxiliary_heads(make_model("vit"), "byot").train()

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.classifier.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch_of("vit"))
    handle.remove()
    assert "auxiliary" not in model.eval()(**batch_of("vit"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft
def test_prompt_tuning_of_words_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_model("gpt2"), config)
    samples = make_samples("gpt2", 8)
    refused(lambda: make_trainer(tmp_path, model, samples, auxiliary_heads="sla"), "prompt tuning", "LoRA")
