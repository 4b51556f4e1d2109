"""Auxiliary heads on architectures of all kinds: stages in nested lists, maps with channels last, odd inputs."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import CLASSES, VOCABULARY, collate, make_model, make_samples, refused
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, set_seed

from hf_selfkd import AuxiliaryHeadsConfig, attach_auxiliary_heads
from hf_selfkd.heads.auxiliary import heads_of
from hf_selfkd.heads.inputs import example_inputs
from hf_selfkd.heads.kinds import Context, to_channels_first
from hf_selfkd.heads.taps import tensor_of


def hub(config, kind, **options):
    """A tiny model of transformers with random weights."""
    set_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(num_labels=CLASSES, **options)).eval()


def timm(architecture, **options):
    """A tiny model of timm with random weights."""
    set_seed(0)
    config = {"architecture": architecture, "num_classes": CLASSES, "model_args": options}
    return TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(config)).eval()


SIZES = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 1, 1], "image_size": 32}
WORDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
MODELS = {
    "pvt": lambda: hub("PvtConfig", "PvtForImageClassification", depths=[2, 1, 2, 1], **SIZES),
    "pvt_v2": lambda: hub("PvtV2Config", "PvtV2ForImageClassification", depths=[2, 1, 2, 1], **SIZES),
    "segformer": lambda: hub("SegformerConfig", "SegformerForImageClassification", depths=[2, 1, 2, 1], **SIZES),
    "poolformer": lambda: hub(
        "PoolFormerConfig", "PoolFormerForImageClassification", hidden_sizes=[8, 8, 16, 16], depths=[2, 1, 3, 1]
    ),
    "twins": lambda: timm(
        "twins_svt_small", embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 1, 1), depths=(1, 2, 2, 1), img_size=64
    ),
    "timm_swin": lambda: timm(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=8,
        depths=(1, 1, 2, 1),
        num_heads=(1, 1, 2, 2),
    ),
    "mambaout": lambda: timm("test_mambaout"),
    "densenet": lambda: timm("densenet121", growth_rate=4, block_config=(2, 2, 2, 2)),
    "timm_hiera": lambda: timm("hiera_tiny_224", embed_dim=8, num_heads=1, stages=(1, 1, 2, 1)),
    "efficientnet": lambda: hub(
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
    ),
    "funnel": lambda: hub(
        "FunnelConfig",
        "FunnelForSequenceClassification",
        vocab_size=VOCABULARY,
        block_sizes=[2, 1, 2],
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=16,
    ),
    "funnel_tokens": lambda: hub(
        "FunnelConfig",
        "FunnelForTokenClassification",
        vocab_size=VOCABULARY,
        block_sizes=[2, 1, 2],
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=16,
    ),
}


@pytest.mark.parametrize(
    "name, ends",
    [
        ("pvt", [f"pvt.encoder.block.{end}" for end in ("0.1", "1.0", "2.1", "3.0")]),
        ("pvt_v2", [f"pvt_v2.encoder.layers.{end}" for end in range(4)]),
        ("segformer", [f"segformer.stages.{end}" for end in range(4)]),
        ("poolformer", [f"poolformer.encoder.block.{end}" for end in ("0.1", "1.0", "2.2", "3.0")]),
        ("twins", [f"timm_model.blocks.{end}" for end in ("0.0", "1.1", "2.1", "3.0")]),
        ("timm_swin", [f"timm_model.layers.{end}" for end in range(4)]),
        ("mambaout", [f"timm_model.stages.{end}" for end in range(4)]),
        ("densenet", [f"timm_model.features.denseblock{end}" for end in range(1, 5)]),
        ("timm_hiera", [f"timm_model.blocks.{end}" for end in (0, 1, 3, 4)]),
        ("efficientnet", [f"efficientnet.encoder.blocks.{end}" for end in (0, 1, 2, 4, 7)]),
        ("funnel", [f"funnel.encoder.blocks.{end}" for end in ("0.1", "1.0")]),
        ("funnel_tokens", ["funnel.encoder.blocks.0.0"]),  # later layers have features of fewer positions
    ],
)
def test_auto_takes_the_end_of_every_stage(name, ends):
    model = attach_auxiliary_heads(MODELS[name](), "lsskd")
    assert heads_of(model).names == ends


@pytest.mark.parametrize("name", ["pvt", "pvt_v2", "poolformer", "twins", "timm_swin", "mambaout"])
def test_stage_heads_with_the_weights_of_the_stages_give_their_features(name):
    """Whatever stands between the stages, and in whatever order a map has its dimensions."""
    model = attach_auxiliary_heads(MODELS[name](), "joint").eval()
    heads = heads_of(model)
    for head in heads.heads[:-1]:
        for place, copied in zip(head.body.places, head.body.copies, strict=True):
            copied.load_state_dict(model.get_submodule(heads.recorder.names[place]).state_dict())
    inputs = {key: torch.randn(value.shape) for key, value in example_inputs(model).items()}
    expected, found = [], []
    model.get_submodule(heads.recorder.names[-1]).register_forward_hook(
        lambda module, args, output: expected.append(tensor_of(output))
    )
    for head in heads.heads[:-1]:
        head.body.register_forward_hook(lambda module, args, output: found.append(output))
    with heads.watched(), torch.no_grad():
        model(**inputs)
    last = heads.names[-1] in heads.layout.channels_last
    for features in found:
        torch.testing.assert_close(features, to_channels_first(expected[0]) if last else expected[0])
    assert len(found) == len(heads.names) - 1


def smallest_gradient(model, inputs):
    """Of each head the largest gradient that its loss gives the weights of the model; the smallest of these."""
    parts = model.train()(**inputs)["auxiliary"][: len(heads_of(model).heads)]
    sizes = []
    for part in parts:
        model.zero_grad()
        F.cross_entropy(part, torch.arange(len(part)) % CLASSES).backward(retain_graph=True)
        of_model = [p.grad for name, p in model.named_parameters() if "selfkd" not in name and p.grad is not None]
        sizes.append(max(float(gradient.abs().max()) for gradient in of_model))
    return min(sizes)


@pytest.mark.parametrize("preset", ["joint", "lsskd"])
@pytest.mark.parametrize("name", ["efficientnet", "pvt", "timm_swin", "mambaout"])
def test_every_head_reaches_the_model(name, preset):
    """The copies of EfficientNet's blocks were drawn so that nothing got through: 1e-17 to 1e-33."""
    model = attach_auxiliary_heads(MODELS[name](), preset)
    inputs = {key: torch.randn(8, *value.shape[1:]) for key, value in example_inputs(model).items()}
    assert smallest_gradient(model, inputs) > 1e-8


class Stages(nn.Module):
    """A model of three stages, one of which may keep gradients to itself."""

    def __init__(self, stages):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return {"logits": self.out(x)}


class Stage(nn.Module):
    def __init__(self, detached=False, frozen=False):
        super().__init__()
        self.body, self.detached, self.frozen = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), detached, frozen

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.body(x.detach() if self.detached else x)


@pytest.mark.parametrize(
    "options, layer",
    [({"detached": True}, "'stages.1'"), ({"frozen": True}, "'stages.1'")],
    ids=["copies that pass nothing on", "features that pass nothing on"],
)
def test_head_that_teaches_nothing_is_refused(options, layer):
    model = Stages([Stage(), Stage(frozen=options.get("frozen", False)), Stage(options.get("detached", False))])
    config = AuxiliaryHeadsConfig(head="stages", views="none", layers=[1])
    told = refused(lambda: attach_auxiliary_heads(model, config, inputs={"x": torch.randn(4, 6)}), layer, "gradient")
    assert "choose" in told and heads_of(model) is None


def test_frozen_weights_are_no_reason_to_refuse():
    model = Stages([Stage(), Stage(), Stage()]).requires_grad_(False)
    attach_auxiliary_heads(model, "deep_supervision", inputs={"x": torch.zeros(4, 6)})


@pytest.mark.parametrize("name", ["resnet", "vit", "mobilenet"])
def test_the_check_leaves_nothing_behind(name):
    model = make_model(name).train()
    next(model.modules()).eval()  # a mode of its own
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attach_auxiliary_heads(model, "joint")
    assert [module.training for name, module in model.named_modules() if "selfkd" not in name] == modes
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for head in heads_of(model).heads:
        for key, value in head.named_buffers():
            expected = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}.get(key.rpartition(".")[2])
            assert expected is None or (value == expected).all()
    assert heads_of(model).results is None and not heads_of(model).recorder.outputs


# Maps


class Cubes(nn.Module):
    """Stages of maps `[B, H, W, C]`, one of which has as many channels as rows and columns."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Convolution(3, 8), Convolution(8, 12), Convolution(12, 20)])
        self.out = nn.Linear(20, CLASSES)

    def forward(self, pixel_values):
        maps = pixel_values.movedim(1, -1)
        for stage in self.stages:
            maps = stage(maps)
        return {"logits": self.out(maps.mean((1, 2)))}


class Convolution(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 2, stride=2))

    def forward(self, maps):
        return self.body(maps.movedim(-1, 1)).movedim(1, -1)


def test_maps_that_are_cubes_are_read_as_the_others():
    model, inputs = Cubes(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head="linear", views="none", layers=[0, 1, 2]), inputs=inputs)
    assert heads_of(model).layout.channels_last == {"stages.0", "stages.1", "stages.2"}
    seen = []
    heads_of(model).heads[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    heads_of(model).watching = True
    model(**inputs)
    assert torch.equal(seen[0], model.stages[0].body(inputs["pixel_values"]))


# Statistics of the batch


@pytest.mark.parametrize(
    "name, expected", [("plain_deep_vit", False), ("swin", False), ("convnext", False), ("resnet", True)]
)
@pytest.mark.parametrize("preset", ["lsskd", "joint"])
def test_statistics_of_the_batch_are_used_where_the_model_does(name, expected, preset):
    """Otherwise what a head says of a sample in training does not depend on the other samples."""
    model = make_model(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob"):
            vars(module).update(p=0.0, drop_prob=0.0)
    model = attach_auxiliary_heads(model, preset).train()
    norms = [module for module in heads_of(model).modules() if isinstance(module, nn.BatchNorm2d)]
    assert bool(norms) == expected
    batch = collate([make_samples(name, 6)[i] for i in range(6)])["pixel_values"]
    with torch.no_grad():
        alone, together = (model(pixel_values=images)["auxiliary"][0][:2] for images in (batch[:2], batch))
    assert torch.allclose(alone, together, atol=1e-5) != expected


# Words and sounds


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2ForSequenceClassification"])
def test_made_up_words_exist(kind):
    """GPT-2's own end of text is word 50,256."""
    options = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = hub("GPT2Config", kind, **options)
    assert model.config.eos_token_id >= VOCABULARY
    attach_auxiliary_heads(model, "byot")
    assert int(example_inputs(model)["input_ids"].max()) < VOCABULARY


def test_made_up_words_of_the_one_length_that_a_model_takes():
    options = {"segment_means_seq_len": 12, "num_landmarks": 4} | WORDS
    model = hub("NystromformerConfig", "NystromformerForSequenceClassification", **options)
    attach_auxiliary_heads(model, "byot")
    assert example_inputs(model)["input_ids"].shape[1] == 12


def test_made_up_words_of_a_vocabulary_of_special_words_only():
    options = {"vocab_size": 3, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    attach_auxiliary_heads(hub("GPT2Config", "GPT2LMHeadModel", pad_token_id=0, **options), "byot")


def test_made_up_sounds():
    options = {name: value for name, value in WORDS.items() if name != "vocab_size"}
    model = hub(
        "Wav2Vec2BertConfig", "Wav2Vec2BertForSequenceClassification", feature_projection_input_dim=12, **options
    )
    attach_auxiliary_heads(model, "byot").train()
    assert model(input_features=torch.randn(3, 20, 12))["auxiliary"][0].shape == (3, CLASSES)


LONGFORMER = {"attention_window": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0} | WORDS


@pytest.mark.parametrize("head", ["linear", "mlp", "transformer", "stages"])
def test_padding_to_a_whole_window_does_not_reach_a_head(head):
    """Longformer pads 6 words to 8: what the head says is what it says of 6 words among 12 of its own padding."""
    model = hub("LongformerConfig", "LongformerForSequenceClassification", **LONGFORMER)
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head=head))
    words, said = torch.randint(3, VOCABULARY, (2, 6)), []
    for size in (6, 12):
        padded = F.pad(words, (0, size - 6), value=model.config.pad_token_id)
        mask = (torch.arange(size) < 6).long().expand(2, -1)
        with heads_of(model).watched(), torch.no_grad():
            model(input_ids=padded, attention_mask=mask)
        said.append(heads_of(model).results.logits[0])
    torch.testing.assert_close(said[0], said[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["deep_supervision", "lsskd", "joint", "byot"])
@pytest.mark.parametrize("kind", ["LongformerForTokenClassification", "LongformerForMaskedLM"])
def test_heads_of_a_model_that_pads_say_as_much_as_the_model(kind, preset):
    model = attach_auxiliary_heads(hub("LongformerConfig", kind, **LONGFORMER), preset).train()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    outputs = model(input_ids=torch.randint(3, VOCABULARY, (2, 6)), attention_mask=mask)
    assert outputs["auxiliary"][0].shape == outputs.logits.shape
    assert all(part.shape[1] == 6 for part in outputs["auxiliary"])


@pytest.mark.parametrize("kind", ["BigBirdForSequenceClassification", "BigBirdForTokenClassification"])
def test_made_up_words_do_not_change_how_a_model_attends(kind):
    """BigBird gives up its sparse attention for good when it sees a short sentence."""
    options = {"block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 64} | WORDS
    model = hub("BigBirdConfig", kind, **options)
    words = torch.randint(3, VOCABULARY, (2, 33))
    torch.manual_seed(0)
    attach_auxiliary_heads(model, "deep_supervision")
    assert model.bert.attention_type == "block_sparse"
    outputs = model.train()(input_ids=words, attention_mask=torch.ones_like(words))
    assert model.bert.attention_type == "block_sparse"
    assert outputs["auxiliary"][0].shape == outputs.logits.shape


def test_features_are_compared_with_those_of_as_many_positions():
    model = attach_auxiliary_heads(MODELS["funnel_tokens"](), "lsskd").train()
    adapted, deep = model(input_ids=torch.randint(3, VOCABULARY, (2, 9)))["auxiliary"][1:]
    assert adapted.shape == deep.shape == (2, 9, 16)


def test_layers_that_run_without_gradients_are_refused():
    """Reformer runs its reversible layers without a graph."""
    model = hub(
        "ReformerConfig",
        "ReformerForSequenceClassification",
        vocab_size=VOCABULARY,
        hidden_size=16,
        attention_head_size=8,
        num_attention_heads=2,
        feed_forward_size=16,
        axial_pos_shape=[4, 4],
        axial_pos_embds_dim=[8, 8],
        attn_layers=["local", "local"],
        local_attn_chunk_length=4,
        is_decoder=False,
    )
    refused(lambda: attach_auxiliary_heads(model, "byot"), "reformer.encoder.layers.0", "gradient")


def test_a_context_without_a_length_cuts_nothing():
    model = attach_auxiliary_heads(make_model("bert_tokens"), "byot")
    (head,) = heads_of(model).heads
    assert head(torch.randn(2, 9, 16), Context(None, {}, None))[0].shape == (2, 9, CLASSES)
