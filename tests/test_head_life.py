"""The life of auxiliary heads: attached as a whole or not at all, copied, moved, saved, loaded, taken off."""

import copy
import pickle
from types import MethodType

import numpy as np
import pytest
import torch
from helpers import CLASSES, collate, difference, make_model, make_samples, refused
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from hf_selfkd import AuxiliaryHeadsConfig, attach_auxiliary_heads, strip_auxiliary_heads
from hf_selfkd.heads import load_auxiliary_heads, save_auxiliary_heads
from hf_selfkd.heads.auxiliary import AuxiliaryHeads, heads_of
from hf_selfkd.heads.rotation import choose_rotations, rotate
from hf_selfkd.heads.taps import Call, Recorder


IGNORED = "_keys_to_ignore_on_save"


def batch_of(name, size=4):
    batch = collate([make_samples(name, size)[i] for i in range(size)])
    batch.pop("labels")
    return batch


def hooks_of(model):
    """All hooks of all modules, with what transformers or PEFT has put there."""
    return [
        list(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
        )
    ]


def everything_of(model):
    """Whatever of a model attaching could change."""
    return {
        "attributes": sorted(vars(model)),
        "modules": [name for name, _ in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": hooks_of(model),
        "gradients": [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "ignored": getattr(model, IGNORED),
        "random": [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()],
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
    }


# Attached as a whole or not at all


def fail(*arguments, **keywords):
    raise RuntimeError("no")


@pytest.mark.parametrize("ignored", [None, ["something"]])
@pytest.mark.parametrize(
    "place",
    [
        "hf_selfkd.heads.attach.measure",
        "hf_selfkd.heads.factory.HeadFactory.make",
        "hf_selfkd.heads.auxiliary.AuxiliaryHeads.register",
        "hf_selfkd.heads.auxiliary.AuxiliaryHeads._run",
        "hf_selfkd.heads.attach._save_without_heads",
        "hf_selfkd.heads.attach.head_names",
    ],
)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_failure_leaves_the_model_as_it_was(monkeypatch, name, place, ignored):
    model = make_model(name).train()
    next(model.children()).eval()  # a mode of its own
    if ignored is not None:
        setattr(model, IGNORED, ignored)
    before = everything_of(model)
    monkeypatch.setattr(place, fail)
    with pytest.raises((RuntimeError, ValueError)):
        attach_auxiliary_heads(model, "joint")
    assert everything_of(model) == before
    monkeypatch.undo()
    attach_auxiliary_heads(model, "joint")  # nothing stands in the way of a second try
    strip_auxiliary_heads(model)
    assert everything_of(model) == before


def test_a_failure_between_the_hooks_leaves_none(monkeypatch):
    model = make_model("vit")
    before = everything_of(model)

    registered = Recorder.register

    def half(self, module):
        registered(self, module)
        fail()

    monkeypatch.setattr(Recorder, "register", half)
    with pytest.raises(ValueError):
        attach_auxiliary_heads(model, "lsskd")
    assert everything_of(model) == before


# Copied and taken off


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda outputs: pickle.loads(pickle.dumps(outputs))])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_outputs_with_heads_can_be_copied_and_pickled(name, copied):
    model = attach_auxiliary_heads(make_model(name), "byot").train()
    with torch.no_grad():
        outputs = model(**batch_of(name))
    twin = copied(outputs)
    assert type(twin) is type(outputs) and list(twin) == list(outputs)
    assert torch.equal(twin.logits, outputs.logits) and twin["loss" if "loss" in twin else "logits"] is not None
    assert all(torch.equal(one, other) for one, other in zip(twin.auxiliary, outputs.auxiliary, strict=True))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft looks at all attributes
def test_a_merged_model_can_be_rid_of_its_hooks():
    from peft import LoraConfig, get_peft_model

    bare = make_model("plain_deep_vit")
    before = hooks_of(bare)
    model = get_peft_model(copy.deepcopy(bare), LoraConfig(target_modules=["q_proj", "query", "v_proj", "value"]))
    merged = attach_auxiliary_heads(model, "joint").merge_and_unload()
    strip_auxiliary_heads(merged)
    assert [len(hooks) for hooks in hooks_of(merged)] == [len(hooks) for hooks in before]
    assert difference(merged, bare) == 0


def test_hooks_of_others_stay():
    model = make_model("vit")
    handle = model.vit.layers[0].register_forward_hook(lambda module, args, output: None)
    strip_auxiliary_heads(attach_auxiliary_heads(model, "lsskd"))
    assert list(model.vit.layers[0]._forward_hooks) == [handle.id]


# Spread over devices


def test_calls_move_with_all_that_they_hold():
    moved = Call((torch.zeros(2), [torch.zeros(1), "a"], None), {"mask": {"one": torch.zeros(1)}, "two": (1,)}).to(
        "meta"
    )
    assert moved.args[0].is_meta and moved.args[1][0].is_meta and moved.args[1][1] == "a" and moved.args[2] is None
    assert moved.kwargs["mask"]["one"].is_meta and moved.kwargs["two"] == (1,)


@pytest.mark.parametrize("preset", ["lsskd", "joint"])
@pytest.mark.parametrize("name", ["vit", "resnet", "bert", "bert_tokens"])
def test_features_go_to_the_device_of_the_heads_and_logits_to_that_of_the_model(monkeypatch, name, preset):
    """A device without memory stands for the second one."""
    model = attach_auxiliary_heads(make_model(name), preset).train()
    heads_of(model).to("meta")
    asked = []
    monkeypatch.setattr("hf_selfkd.heads.auxiliary.device_of", lambda outputs: asked.append(outputs) or "meta")
    outputs = model(**batch_of(name))
    assert asked and outputs.logits.device.type == "cpu" and all(part.is_meta for part in outputs["auxiliary"])


def test_copies_do_not_keep_the_forward_of_a_model_on_several_devices():
    """accelerate replaces the forward of each module; a copy of it would run the layer that it is a copy of."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = make_model("plain_deep_vit")
    for layer in model.vit.layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    attach_auxiliary_heads(model, "joint")
    (first, *_) = heads_of(model).heads
    (copied,) = first.body.copies
    assert not hasattr(copied, "_hf_hook")
    assert isinstance(copied.forward, MethodType) and copied.forward.__self__ is copied


# Saved and loaded


@pytest.mark.parametrize("preset", ["lsskd", "joint", "byot"])
@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "gpt2"])
def test_heads_are_saved_beside_the_model_and_loaded_again(tmp_path, name, preset):
    model = attach_auxiliary_heads(make_model(name), preset, seed=1)
    with torch.no_grad():  # as after training
        for value in heads_of(model).state_dict().values():
            value.add_(1)
    model.save_pretrained(tmp_path)
    folder = save_auxiliary_heads(model, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "auxiliary_heads.safetensors",
        "auxiliary_heads_config.json",
    ]
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and heads_of(loaded) is None
    load_auxiliary_heads(loaded, tmp_path)
    assert heads_of(loaded).config == heads_of(model).config and heads_of(loaded).names == heads_of(model).names
    assert difference(heads_of(loaded), heads_of(model)) == 0
    there = attach_auxiliary_heads(make_model(name), preset, seed=2)  # heads that are there take the weights
    load_auxiliary_heads(there, tmp_path)
    assert difference(heads_of(there), heads_of(model)) == 0


def test_weights_of_losses_do_not_stand_in_the_way_of_loading(tmp_path):
    model = attach_auxiliary_heads(make_model("resnet"), "lsskd")
    save_auxiliary_heads(model, tmp_path)
    other = attach_auxiliary_heads(make_model("resnet"), AuxiliaryHeadsConfig.preset("lsskd", hard_weight=0.5))
    load_auxiliary_heads(other, tmp_path)
    assert heads_of(other).config.hard_weight == 0.5


def test_heads_of_another_model_are_refused(tmp_path):
    save_auxiliary_heads(attach_auxiliary_heads(make_model("resnet"), "lsskd"), tmp_path)
    for name, preset, told in (
        ("vit", None, "on resnet.encoder.stages.0"),
        ("resnet", "joint", "head='conv'"),
        ("resnet", "byot", "views='rotation'"),
    ):
        model = make_model(name)
        if preset is not None:
            attach_auxiliary_heads(model, preset)
        before = everything_of(model)
        refused(lambda model=model: load_auxiliary_heads(model, tmp_path), told, "other heads")
        assert everything_of(model) == before
    wider = make_model("resnet")
    wider.config.num_labels = CLASSES + 1
    wider.classifier[-1] = nn.Linear(16, CLASSES + 1)
    refused(lambda: load_auxiliary_heads(wider, tmp_path), "heads.0.classifier.bias", str(4 * CLASSES + 4))


def test_heads_that_are_not_there_or_damaged_are_refused(tmp_path):
    refused(lambda: save_auxiliary_heads(make_model("vit"), tmp_path), "attach_auxiliary_heads")
    refused(lambda: load_auxiliary_heads(make_model("vit"), tmp_path), str(tmp_path), "auxiliary_heads")
    model = attach_auxiliary_heads(make_model("vit"), "lsskd")
    file = save_auxiliary_heads(model, tmp_path) / "auxiliary_heads.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content)
    refused(lambda: load_auxiliary_heads(make_model("vit"), tmp_path), "corrupted")


# Rotated views


@pytest.mark.parametrize("views", [0, 1, 2, 3])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_rotated_views(views, as_tensor):
    """Bit for bit those of one image after the other, whether the host or the device knows the rotations."""
    images = torch.randn(7, 3, 6, 6)
    rotations = choose_rotations(np.arange(7), views, epoch=1, seed=3)
    expected = [torch.rot90(images[b], int(k), (-2, -1)) for b, row in enumerate(rotations) for k in row]
    given = torch.from_numpy(rotations) if as_tensor else rotations
    assert torch.equal(rotate(images, given), torch.stack(expected))


def test_no_shape_depends_on_rotations_that_the_device_knows():
    """One graph serves all of them, as XLA needs it."""
    images = torch.randn(5, 3, 4, 4)
    choices = [torch.randint(4, (5, 3)) for _ in range(3)]
    graph = make_fx(rotate)(images, choices[0])
    for rotations in choices:
        assert torch.equal(graph(images, rotations), rotate(images, rotations.numpy()))


def test_images_on_xla_are_turned_without_lists_of_rows(monkeypatch):
    from hf_selfkd.heads import rotation

    monkeypatch.setattr(rotation, "_rotate_chosen", fail)
    images = torch.randn(2, 3, 4, 4)
    rotations = choose_rotations(np.arange(2), 1, 0, 0)

    class OnXla(torch.Tensor):
        device = torch.device("xla", 0)

    with pytest.raises(RuntimeError, match="^no$"):
        rotate(images, rotations)
    monkeypatch.setattr(rotation, "_rotate_everything", lambda images, rotations: rotations)
    assert torch.equal(rotate(images.as_subclass(OnXla), rotations), torch.from_numpy(rotations))


def test_heads_are_modules_of_the_model():
    model = attach_auxiliary_heads(make_model("vit"), "lsskd")
    assert isinstance(heads_of(model), AuxiliaryHeads) and heads_of(model) in list(model.modules())
