"""Native heads: exits that are the architecture with fewer layers, exported as plain models of transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import CLASSES, VOCABULARY, difference, logged, make_samples, make_trainer, refused, train
from safetensors.torch import load_file
from transformers import DynamicCache, T5Config, set_seed

from hf_selfkd import (
    AuxiliaryHeadsConfig,
    attach_auxiliary_heads,
    exit_model,
    export_exit,
    load_auxiliary_heads,
    save_auxiliary_heads,
    strip_auxiliary_heads,
)
from hf_selfkd.heads import heads_of
from hf_selfkd.heads.inputs import example_inputs
from hf_selfkd.models import logits_of


pytestmark = pytest.mark.trains


DEEP = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = {"vocab_size": VOCABULARY, "pad_token_id": 0}
IMAGES = {"image_size": 16, "patch_size": 8}
CAUSAL = DEEP | WORDS | {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 1}
TRANSLATION = WORDS | {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "forced_eos_token_id": 1,
    "decoder_start_token_id": 0,
}
SOUNDS = DEEP | {
    "conv_dim": [8, 8],
    "conv_kernel": [5, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
T5 = WORDS | {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "decoder_start_token_id": 0}
STAGES = {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1, 1],
    "num_heads": [2, 2, 2],
    "window_size": 4,
}

# name: (configuration, class, fields, fields of the exit after 2 layers or stages, written by hand)
MODELS = {
    "vit": ("ViTConfig", "ViTForImageClassification", DEEP | IMAGES, {"num_hidden_layers": 2}),
    "deit": ("DeiTConfig", "DeiTForImageClassification", DEEP | IMAGES, {"num_hidden_layers": 2}),
    "deit_teacher": (
        "DeiTConfig",
        "DeiTForImageClassificationWithTeacher",
        DEEP | IMAGES,
        {"num_hidden_layers": 2},
    ),
    "dinov2": (
        "Dinov2Config",
        "Dinov2ForImageClassification",
        {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2} | IMAGES,
        {"num_hidden_layers": 2},
    ),
    "beit": ("BeitConfig", "BeitForImageClassification", DEEP | IMAGES, {"num_hidden_layers": 2}),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        STAGES | {"embedding_size": 8, "layer_type": "basic"},
        {"hidden_sizes": [8, 16], "depths": [1, 2]},
    ),
    "regnet": (
        "RegNetConfig",
        "RegNetForImageClassification",
        STAGES | {"embedding_size": 8, "groups_width": 8},
        {"hidden_sizes": [8, 16], "depths": [1, 2]},
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        STAGES | {"num_stages": 3, "layer_scale_init_value": 0.0},
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
    ),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        SWIN,
        {"depths": [2, 1], "num_heads": [2, 2]},
    ),
    "swinv2": (
        "Swinv2Config",
        "Swinv2ForImageClassification",
        SWIN,
        {"depths": [2, 1], "num_heads": [2, 2]},
    ),
    "poolformer": (
        "PoolFormerConfig",
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [2, 1, 3, 1]},
        {
            "hidden_sizes": [8, 8],
            "depths": [2, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", DEEP | WORDS, {"num_hidden_layers": 2}),
    "bert_tokens": ("BertConfig", "BertForTokenClassification", DEEP | WORDS, {"num_hidden_layers": 2}),
    "bert_mlm": ("BertConfig", "BertForMaskedLM", DEEP | WORDS, {"num_hidden_layers": 2}),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", DEEP | WORDS, {"num_hidden_layers": 2}),
    "roberta_mlm": ("RobertaConfig", "RobertaForMaskedLM", DEEP | WORDS, {"num_hidden_layers": 2}),
    "deberta": ("DebertaV2Config", "DebertaV2ForSequenceClassification", DEEP | WORDS, {"num_hidden_layers": 2}),
    "deberta_convolution": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        DEEP | WORDS | {"conv_kernel_size": 3},  # after the first layer
        {"num_hidden_layers": 2},
    ),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", DEEP | WORDS, {"num_hidden_layers": 2}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        DEEP | WORDS | {"bos_token_id": 2, "eos_token_id": 1, "cls_token_id": 2, "sep_token_id": 1},
        {"num_hidden_layers": 2},
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 16, "n_layers": 3, "n_heads": 2},
        {"n_layers": 2},
    ),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", SOUNDS, {"num_hidden_layers": 2}),
    "wav2vec2_stable": (
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        SOUNDS | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        {"num_hidden_layers": 2},
    ),
    "hubert": ("HubertConfig", "HubertForSequenceClassification", SOUNDS, {"num_hidden_layers": 2}),
    "marian": ("MarianConfig", "MarianMTModel", TRANSLATION, {"decoder_layers": 2}),
    "bart": ("BartConfig", "BartForConditionalGeneration", TRANSLATION, {"decoder_layers": 2}),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", TRANSLATION, {"decoder_layers": 2}),
    "bart_classifier": ("BartConfig", "BartForSequenceClassification", TRANSLATION, {"decoder_layers": 2}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5 | {"num_layers": 3}, {"num_decoder_layers": 2}),
    "mt5_untied": (
        "MT5Config",
        "MT5ForConditionalGeneration",
        T5 | {"num_layers": 2, "num_decoder_layers": 3, "tie_word_embeddings": False},
        {"num_decoder_layers": 2},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 2, "eos_token_id": 1},
        {"n_layer": 2},
    ),
    "gpt2_classifier": (
        "GPT2Config",
        "GPT2ForSequenceClassification",
        WORDS | {"n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 2, "eos_token_id": 1},
        {"n_layer": 2},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", CAUSAL, {"num_hidden_layers": 2}),
    "llama_tied": (
        "LlamaConfig",
        "LlamaForCausalLM",
        CAUSAL | {"tie_word_embeddings": True},
        {"num_hidden_layers": 2},
    ),
    "llama_classifier": ("LlamaConfig", "LlamaForSequenceClassification", CAUSAL, {"num_hidden_layers": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", CAUSAL, {"num_hidden_layers": 2, "layer_types": None}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        CAUSAL | {"head_dim": 8},
        {"num_hidden_layers": 2, "layer_types": None},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "word_embed_proj_dim": 16}
        | {"vocab_size": VOCABULARY},
        {"num_hidden_layers": 2},
    ),
}


def make(name, seed=0, **changes):
    """A model of the table in evaluation mode."""
    config, kind, fields, _ = MODELS[name]
    set_seed(seed)
    return getattr(transformers, kind)(getattr(transformers, config)(num_labels=CLASSES, **(fields | changes))).eval()


def random_inputs(model, size=3):
    """A batch that is not made of zeros, of samples of several lengths."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, value in example_inputs(model).items():
        shape = (size if name != "attention_mask" or len(value) > 1 else 1, *value.shape[1:])
        if value.is_floating_point():
            made[name] = torch.randn(shape, generator=generator)
        elif "mask" in name:
            made[name] = torch.ones((size, *shape[1:]), dtype=value.dtype)
            made[name][1:, -2:] = 0
        else:
            made[name] = torch.randint(3, VOCABULARY, shape, generator=generator)
            made[name][:, -3] = 1  # BART classifies by the last of these
    return made


def head_logits(model, inputs):
    """What each head says, at full depth."""
    heads = heads_of(model)
    with torch.no_grad(), heads.watched():
        model(**inputs)
    results, heads.results = heads.results, None
    return results.logits


def disturb(module, seed=1):
    """Weights that differ from the model's, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def by_hand(name, model):
    """The exit after 2 layers, built without the package: the small architecture, weights copied by their names."""
    config, kind, fields, smaller = MODELS[name]
    smaller = {key: value for key, value in (fields | smaller).items() if value is not None}
    small = getattr(transformers, kind)(getattr(transformers, config)(num_labels=CLASSES, **smaller)).eval()
    heads, own = heads_of(model), model.state_dict()
    head = heads.heads[heads.exits.index(2)]
    of_head = {key.removeprefix("model."): value for key, value in head.state_dict().items()}
    small.load_state_dict({key: of_head.get(key, own.get(key)) for key in small.state_dict()})
    return small


@pytest.mark.parametrize("name", MODELS)
def test_an_exit_is_the_architecture_with_fewer_layers(name):
    model = make(name)
    attach_auxiliary_heads(model, "exits")
    disturb(heads_of(model))
    inputs = random_inputs(model)
    logits = dict(zip(heads_of(model).exits, head_logits(model, inputs), strict=True))
    with torch.no_grad():
        expected = by_hand(name, model)(**inputs)
        made = exit_model(model, 2)
        assert (logits[2] - logits_of(expected, False)).abs().max() < 1e-6
        assert (logits_of(made(**inputs), False) - logits_of(expected, False)).abs().max() < 1e-6
    assert made.state_dict().keys() == by_hand(name, model).state_dict().keys()
    hooks = [hook for module in made.modules() for hook in module._forward_hooks.values()]
    assert not any("Recorder" in repr(hook) for hook in hooks)


LOADER = """
import json, sys
sys.modules["hf_selfkd"] = None  # not installed where the exit is used
import torch, transformers
from safetensors.torch import load_file
for folder, kind in json.loads(sys.argv[1]):
    saved = load_file(f"{folder}/check.safetensors")
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], (folder, report)
    expected = saved.pop("expected")
    with torch.no_grad():
        found = model(**saved).logits
    assert (found - expected).abs().max() < 1e-6, (folder, (found - expected).abs().max())
print("loaded", len(json.loads(sys.argv[1])))
"""


def auto_class(kind):
    """The Auto class of transformers that loads a class."""
    ends = {
        "ForImageClassification": "AutoModelForImageClassification",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForTokenClassification": "AutoModelForTokenClassification",
        "ForMaskedLM": "AutoModelForMaskedLM",
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "MTModel": "AutoModelForSeq2SeqLM",
    }
    found = next((auto for end, auto in ends.items() if kind.endswith(end)), kind)
    sounds = kind.startswith(("Wav2Vec2", "Hubert"))
    return "AutoModelForAudioClassification" if sounds else found


@pytest.mark.slow
def test_every_exit_loads_in_plain_transformers(tmp_path):
    """In a process that cannot import this package, with the plain Auto class; logits are those of the exit."""
    from safetensors.torch import save_file

    asked = []
    for name, (_, kind, _, _) in MODELS.items():
        model = make(name)
        attach_auxiliary_heads(model, "exits")
        disturb(heads_of(model))
        inputs = random_inputs(model)
        for exit, logits in zip(heads_of(model).exits, head_logits(model, inputs), strict=True):
            folder = tmp_path / f"{name}-{exit}"
            export_exit(model, exit, folder)
            save_file({**inputs, "expected": logits.contiguous()}, folder / "check.safetensors")
            asked.append([str(folder), auto_class(kind)])
    done = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(asked)], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == f"loaded {len(asked)}", done.stderr[-2000:]


@pytest.mark.parametrize("name", ["vit", "resnet", "swin", "bert", "distilbert", "wav2vec2", "gpt2", "t5", "mbart"])
def test_the_gradient_of_an_exit_is_that_of_the_smaller_model(name):
    model = make(name)
    attach_auxiliary_heads(model, "exits")
    inputs, heads = random_inputs(model), heads_of(model)
    with heads.watched():
        model(**inputs)
    results, heads.results = heads.results, None
    place = heads.exits.index(2)
    results.logits[place].logsumexp(dim=-1).sum().backward()
    found = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    small = by_hand(name, model)
    logits_of(small(**inputs), False).logsumexp(dim=-1).sum().backward()
    compared = 0
    for key, weight in small.named_parameters():
        own = f"selfkd_heads.heads.{place}.model.{key}"
        if weight.grad is not None:
            torch.testing.assert_close(found.get(own, found.get(key)), weight.grad, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared > 5


def test_layers_can_be_all_or_chosen():
    model = make("bert")
    assert heads_of(attach_auxiliary_heads(model, AuxiliaryHeadsConfig.preset("exits", layers="all"))).exits == [1, 2]
    model = make("bert")
    assert heads_of(attach_auxiliary_heads(model, AuxiliaryHeadsConfig.preset("exits", layers=[-2]))).exits == [2]
    model = make("bert")
    assert heads_of(attach_auxiliary_heads(model, AuxiliaryHeadsConfig(layers="all", head="mlp"))).exits == [1, 2]


@pytest.mark.parametrize("weights, shares", [("linear", (1 / 3, 2 / 3)), ([4.0, 0.5], (4.0, 0.5))])
def test_heads_are_weighed(tmp_path, weights, shares):
    """The sum of the losses of the heads, each times its weight: its share of the layers, or a number of its own."""
    losses = {}
    for name, chosen in (("uniform", "uniform"), ("weighed", weights)):
        heads = AuxiliaryHeadsConfig(head="native", layers=[0, 1], layer_weights=chosen)
        options = {"alpha": 0.0, "learning_rate": 0.0, "num_train_epochs": 1, "max_steps": 1}
        trainer = make_trainer(tmp_path, make("bert").train(), make_samples("texts"), auxiliary_heads=heads, **options)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        found = [logged(trainer, f"head{index}_loss")[0] for index in (0, 1)]
        losses[name] = (logged(trainer, "loss")[0], *found)
    whole, first, second = losses["uniform"]
    expected = whole + (shares[0] - 1) * first + (shares[1] - 1) * second
    assert losses["weighed"][0] == pytest.approx(expected, rel=1e-4)


def test_weights_of_layers_that_do_not_fit_are_refused():
    for layers, weights in (([0, 1], [1.0]), ("all", []), ("all", [1.0, -1.0]), ("all", [1.0, 0.0]), ("all", "deep")):
        with pytest.raises(ValueError, match="layer_weights="):
            AuxiliaryHeadsConfig(head="native", layers=layers, layer_weights=weights)
    with pytest.raises(ValueError, match=r"layer_weights=\[1.0\] for heads on .*: give 2 numbers"):
        attach_auxiliary_heads(make("bert"), AuxiliaryHeadsConfig(head="native", layers="all", layer_weights=[1.0]))


@pytest.mark.parametrize("name", ["bert", "llama", "swin"])
def test_half_precision(tmp_path, name):
    model = make(name).to(torch.bfloat16)
    attach_auxiliary_heads(model, "exits")
    export_exit(model, 2, tmp_path)
    found = type(model).from_pretrained(tmp_path)
    assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}


def test_layers_without_a_number_are_refused():
    for name in ("albert", "mobilenet", "pvt"):
        models = {
            "albert": ("AlbertConfig", "AlbertForSequenceClassification", DEEP | WORDS | {"embedding_size": 8}),
            "mobilenet": ("MobileNetV2Config", "MobileNetV2ForImageClassification", {"image_size": 32}),
            "pvt": (
                "PvtConfig",
                "PvtForImageClassification",
                {"image_size": 32, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 1, 1]},
            ),
        }
        config, kind, fields = models[name]
        model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
        names = model.state_dict().keys()
        refused(lambda model=model: attach_auxiliary_heads(model, "exits"), "choose")
        assert model.state_dict().keys() == names and heads_of(model) is None


def test_wrong_layers_and_views_are_refused():
    config = AuxiliaryHeadsConfig(head="native", layers=[-1])
    refused(lambda: attach_auxiliary_heads(make("vit"), config), "the last layer", "leave the layer out")
    config = AuxiliaryHeadsConfig(head="native", layers=["vit.embeddings"])
    refused(lambda: attach_auxiliary_heads(make("vit"), config), "vit.embeddings", "choose")
    config = AuxiliaryHeadsConfig(head="native", views="rotation")
    refused(lambda: attach_auxiliary_heads(make("vit"), config), "views='none'")
    refused(lambda: attach_auxiliary_heads(make("vit", num_hidden_layers=1), "exits"), "has one layer")
    model = make("resnet")
    model.resnet.embedder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
    refused(lambda: attach_auxiliary_heads(model, "exits"), "was changed", "resnet.embedder", "head='conv'")
    weighted = {"use_weighted_layer_sum": True}
    refused(lambda: attach_auxiliary_heads(make("wav2vec2", **weighted), "exits"), "head='native'")


def test_export_refuses_what_is_no_exit(tmp_path):
    model = make("bert")
    refused(lambda: export_exit(model, 2, tmp_path), "auxiliary_heads='exits'")
    attach_auxiliary_heads(model, "deep_supervision")
    refused(lambda: export_exit(model, 2, tmp_path), "head='linear'", "head='native'")
    strip_auxiliary_heads(model)
    attach_auxiliary_heads(model, "exits")
    refused(lambda: export_exit(model, 5, tmp_path), "exit=5", "choose one of 1, 2")
    assert not list(tmp_path.iterdir())


def test_the_whole_model_is_left_alone():
    model, bare = make("swin"), make("swin")
    attach_auxiliary_heads(model, "exits")
    inputs = random_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, bare(**inputs).logits)
        made = exit_model(model, 1)
        made(**inputs)
        made.train()
        assert not any(module.training for module in model.modules())
    shared = {id(weight) for weight in model.parameters()}
    assert sum(id(weight) in shared for weight in made.parameters()) > 5  # no memory of their own
    strip_auxiliary_heads(model)
    assert model.state_dict().keys() == bare.state_dict().keys()


@pytest.mark.parametrize("name, kind", [("bert", "texts"), ("gpt2", "words"), ("t5", "pairs"), ("wav2vec2", "sounds")])
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_exits_learn(tmp_path, name, kind, teacher):
    trainer = train(
        tmp_path, make(name).train(), make_samples(kind), auxiliary_heads="exits", teacher=teacher, num_train_epochs=8
    )
    losses = logged(trainer, "head0_loss")
    assert sum(losses[-6:]) < sum(losses[:6])


def test_the_past_teaches_the_exits(tmp_path):
    found = []
    for weight in (0.0, 1.0):
        heads = AuxiliaryHeadsConfig.preset("exits", past_weight=weight, deep_to_shallow_weight=0.0)
        found.append(train(tmp_path, make("vit").train(), make_samples("images"), auxiliary_heads=heads))
    assert difference(heads_of(found[0].model), heads_of(found[1].model)) > 1e-4


def test_saved_heads_make_the_same_exits(tmp_path):
    """`save_heads=True`: the folder beside the model; plain transformers reads the model as before."""
    options = {"auxiliary_heads": "exits", "save_heads": True}
    trainer = train(tmp_path / "run", make("bert").train(), make_samples("texts"), **options)
    trainer.save_model(str(tmp_path / "out"))
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    load_auxiliary_heads(found, tmp_path / "out")
    inputs = random_inputs(found)
    with torch.no_grad():
        expected = exit_model(trainer.model, 1)(**inputs).logits
        assert torch.equal(exit_model(found, 1)(**inputs).logits, expected)
    plain = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("selfkd" in name for name in plain)


def test_the_heads_of_the_best_model_are_saved(tmp_path):
    options = {
        "auxiliary_heads": "exits",
        "save_heads": True,
        "eval_dataset": make_samples("texts", seed=3),
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the first epoch
        "learning_rate": 1e-2,
    }
    trainer = train(tmp_path, make("bert").train(), make_samples("texts"), **options)
    best = trainer.state.best_model_checkpoint
    trainer.save_model(str(tmp_path / "out"))
    kept = load_file(f"{best}/_selfkd/auxiliary_heads.safetensors")
    saved = load_file(tmp_path / "out" / "auxiliary_heads" / "auxiliary_heads.safetensors")
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in kept)


def test_a_run_with_exits_resumes_exactly(tmp_path):
    options = {"auxiliary_heads": "exits", "save_strategy": "steps", "save_steps": 4}
    whole = train(tmp_path, make("bert").train(), make_samples("texts"), **options)
    again = train(tmp_path, make("bert", seed=5).train(), make_samples("texts"), resume=8, **options)
    assert difference(whole, again) == 0


def test_save_heads_without_heads_is_refused(tmp_path):
    refused(lambda: make_trainer(tmp_path, "bert", make_samples("texts"), save_heads=True), "save_heads=True")


def test_layers_that_are_dropped_in_training(tmp_path):
    """LayerDrop: a head on a layer that was skipped works on what went past the layer."""
    model = make("mbart", encoder_layerdrop=0.5, decoder_layerdrop=0.5).train()
    trainer = train(tmp_path, model, make_samples("pairs"), auxiliary_heads="exits")
    assert torch.isfinite(torch.tensor(logged(trainer, "head1_loss"))).all()
    assert exit_model(trainer.model, 2).config.decoder_layerdrop == 0.5


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft
def test_peft(tmp_path):
    """Exits grow on a model with adapters; once they are merged, the exits are plain models."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, task_type="SEQ_CLS")
    model = peft.get_peft_model(make("bert"), config)
    trainer = train(tmp_path, model.train(), make_samples("texts"), auxiliary_heads="exits")
    model = trainer.model.eval()
    refused(lambda: exit_model(model, 2), "PEFT", "merge_and_unload")
    inputs = random_inputs(model)
    expected = head_logits(model, inputs)[0]
    save_auxiliary_heads(model, tmp_path / "heads")
    merged = strip_auxiliary_heads(model).merge_and_unload()
    load_auxiliary_heads(merged, tmp_path / "heads")
    with torch.no_grad():
        assert (exit_model(merged, 1)(**inputs).logits - expected).abs().max() < 1e-5


def crops_empty_layers():
    """Not in transformers 5.20: there any T5 whose decoder has fewer layers than its encoder fails as an assistant."""
    try:
        DynamicCache(config=T5Config(num_layers=1)).crop(-1)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", ["gpt2", "llama", "marian", "t5"])
def test_generation_from_an_exit_and_with_its_help(name):
    """An exit writes like any model; as an assistant it changes nothing of what the whole model writes greedily."""
    if name == "t5" and not crops_empty_layers():
        pytest.skip("this transformers cannot crop the cache of a T5 with a shallower decoder")
    model = make(name)
    attach_auxiliary_heads(model, "exits")
    small = exit_model(model, 2)
    words = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(words, **options)
    assert small.generate(words, **options).shape[0] == 1
    assert torch.equal(model.generate(words, assistant_model=small, **options), alone)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # activation_checkpointing from 5.21 on
def test_gradient_checkpointing(tmp_path):
    """Whoever looks for input embeddings, as checkpointing does, finds those of the model and no stand-in."""
    checkpointed = attach_auxiliary_heads(make("bert").train(), "exits")
    checkpointed.gradient_checkpointing_enable()
    checkpointed.enable_input_require_grads()
    models = [attach_auxiliary_heads(make("bert").train(), "exits"), checkpointed]
    options = {"auxiliary_heads": "exits", "num_train_epochs": 1, "alpha": 0.0}
    one, other = (train(tmp_path, model, make_samples("texts", 8), **options) for model in models)
    assert difference(one, other) < 1e-6
