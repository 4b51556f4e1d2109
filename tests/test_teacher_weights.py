"""How the teachers that are copies of the model keep weights: float32 averages, buffers sent together."""

import copy

import pytest
import torch
from test_teachers import data, logits_of, net, state_of, targets, train_step

from hf_selfkd.files import load_tensors, save_tensors
from hf_selfkd.teachers.weights import EMATeacher, SnapshotTeacher


def drift(model, step):
    """Move every trained weight a little, by less than half precision tells of an average."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.25 + step % 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_half_precision_weights_moves(dtype):
    """As a float64 loop over the weights of each step has it, rounded once."""
    model = net().to(dtype)
    teacher, steps = EMATeacher(model, logits_of, 0.999), 600
    average, coarse = {}, {}
    for step in range(steps):
        drift(model, step)
        teacher.after_step()
        weight = max(1 - 0.999, 9 / (10 + step))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                now = parameter.detach().double()
                average[name] = now if step == 0 else average[name] + weight * (now - average[name])
                coarse[name] = (
                    parameter.detach().clone()
                    if step == 0
                    else torch.lerp(coarse[name], parameter.detach(), torch.tensor(weight, dtype=dtype))
                )
    for name, expected in average.items():
        assert teacher.weights[name].dtype == dtype and teacher.masters[name].dtype == torch.float32
        torch.testing.assert_close(teacher.masters[name].double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(teacher.weights[name], teacher.masters[name].to(dtype))
    errors = [((coarse[name].double() - expected).abs() / expected.abs()).max() for name, expected in average.items()]
    assert max(errors) > 0.01  # so the test can tell


def test_float32_weights_are_averaged_in_place():
    """Nothing more is kept of them, and the same bits as ever."""
    model = net()
    teacher = EMATeacher(model, logits_of, 0.9)
    expected = None
    for step in range(5):
        train_step(model, step)
        teacher.after_step()
        live = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        weight = max(1 - 0.9, 9 / (10 + step))
        expected = live if step == 0 else {n: torch.lerp(expected[n], live[n], weight) for n in live}
    assert teacher.masters == {}
    assert all(torch.equal(teacher.weights[name], expected[name]) for name in expected)


def test_a_checkpoint_holds_the_float32_average(tmp_path):
    """A teacher that has loaded it goes on with the same bits; buffers keep their own type."""
    model = net().bfloat16()
    teacher = EMATeacher(model, logits_of, 0.99)
    for step in range(4):
        drift(model, step)
        teacher.after_step()
    teacher.epoch = 1
    save_tensors(tmp_path / "a.safetensors", *state_of(teacher))
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert tensors["weights.head.weight"].dtype == torch.float32
    assert tensors["weights.norm.running_mean"].dtype == torch.bfloat16
    other = EMATeacher(copy.deepcopy(model), logits_of, 0.99)
    other.load("teacher", (tensors, metadata), [])
    other.epoch = 1
    for step in range(4, 8):
        assert all(torch.equal(other.masters[name], master) for name, master in teacher.masters.items())
        assert all(torch.equal(other.weights[name], weight) for name, weight in teacher.weights.items())
        pixels = data(5).bfloat16()
        assert torch.equal(targets(other, pixels).log_probs, targets(teacher, pixels).log_probs)
        for trained in (model, other.model):
            drift(trained, step)
        teacher.after_step()
        other.after_step()


@pytest.mark.parametrize("kind", ["snapshot", "ema"])
def test_buffers_are_sent_together(kind):
    """Those of the first process count, one message for each type however many layers there are."""
    torch.manual_seed(0)
    layers = [torch.nn.BatchNorm1d(4) for _ in range(20)]
    layers[3].register_buffer("flags", torch.tensor([[True, False]]))
    for number, layer in enumerate(layers):
        layer.running_mean += number
        layer.num_batches_tracked += number
    model = torch.nn.Sequential(*layers)
    first = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sent = []

    def broadcast(tensor):
        """What the first process had before this one's buffers moved on."""
        sent.append(tensor.dtype)
        values = [buffer.reshape(-1) for buffer in first.values() if buffer.dtype == tensor.dtype]
        return tensor.copy_(torch.cat(values))

    for buffer in model.buffers():
        buffer.logical_not_() if buffer.dtype == torch.bool else buffer.add_(1)
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if kind == "snapshot":
        teacher = SnapshotTeacher(model, logits_of, broadcast, warm_start=True)
        teacher.begin_epoch(0)
    else:
        teacher = EMATeacher(model, logits_of, 0.9, broadcast)
        teacher.after_step()
    assert sorted(map(str, sent)) == ["torch.bool", "torch.float32", "torch.int64"]
    for name, buffer in first.items():
        assert torch.equal(teacher.weights[name], buffer) and teacher.weights[name].dtype == buffer.dtype
        assert torch.equal(model.get_buffer(name), own[name])  # the model keeps its own


def test_a_model_without_buffers_sends_nothing():
    sent = []
    teacher = EMATeacher(torch.nn.Sequential(torch.nn.Linear(2, 2)), logits_of, 0.9, sent.append)
    teacher.after_step()
    teacher.after_step()
    assert sent == []
