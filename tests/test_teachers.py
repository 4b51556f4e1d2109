"""Teachers against copies of the model, naive averages and a dictionary of rows."""

import copy

import numpy as np
import pytest
import torch
from test_history import Processes
from torch import nn

from hf_selfkd import teachers
from hf_selfkd.batch import Batch, Mixing
from hf_selfkd.config import MethodArguments
from hf_selfkd.history.table import NEVER, WARM_START
from hf_selfkd.samples import sample_index
from hf_selfkd.tasks.rows import Rows
from hf_selfkd.teachers.base import Taught, Teacher
from hf_selfkd.teachers.history import HistoryStore, HistoryTeacher
from hf_selfkd.teachers.weights import EMATeacher, SnapshotTeacher


CPU = torch.device("cpu")
CLASSES = 4


class Net(nn.Module):
    """BatchNorm, dropout, a frozen layer, tied weights and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.frozen, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(6, CLASSES)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, pixel_values):
        hidden = self.drop(self.norm(self.frozen(pixel_values)))
        return {"logits": self.head(self.decode(torch.tanh(self.encode(hidden))) * self.scale)}


def net(seed=0):
    torch.manual_seed(seed)
    return Net().train()


def data(seed):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


def train_step(model, seed, lr=0.5):
    """One step that moves weights and batch statistics."""
    torch.manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = nn.functional.cross_entropy(model(data(seed))["logits"], torch.randint(CLASSES, (8,)))
    gradients = torch.autograd.grad(loss, trained)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter -= lr * gradient


def logits_of(run, batch):
    return [Rows(run(batch.inputs)["logits"], batch.labels)]


def state_of(teacher):
    """The tensors and metadata of the one file that these teachers write."""
    return dict(teacher.states())["teacher"]


def journal_of(teacher):
    return dict(teacher.process_states()).get("teacher", {})


def log_probs(model, x):
    with torch.no_grad():
        return model(x)["logits"].log_softmax(-1)


def targets(teacher, x):
    return teacher.targets(Batch({"pixel_values": x}, torch.zeros(len(x), dtype=torch.long))).model


def flags_and_state(model):
    flags = [(name, module.training) for name, module in model.named_modules()]
    return flags, {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()


def unchanged(model, before):
    flags, state, rng = flags_and_state(model)
    return (
        flags == before[0]
        and torch.equal(rng, before[2])
        and all(torch.equal(state[name], before[1][name]) for name in state)
        and all(p.grad is None for p in model.parameters())
    )


# No teacher


def test_the_silent_teacher():
    """Says nothing, keeps nothing, and says so."""
    teacher = Teacher()
    teacher.begin_epoch(3)
    batch = Batch({}, torch.zeros(1, dtype=torch.long))
    teacher.observe(batch, None, [])
    teacher.after_step()
    assert teacher.epoch == 3 and teacher.targets(batch) == Taught()
    assert state_of(teacher) == ({}, {}) and journal_of(teacher) == {} and not teacher.needs_ids
    with pytest.raises(ValueError, match="teacher='none' stores no rows: use teacher='history'"):
        teacher.stored([0])


# Snapshot


def test_snapshot_equals_a_copy_of_the_model():
    """The weights and statistics at the end of the epoch before, in evaluation mode, on any input."""
    model = net()
    teacher = SnapshotTeacher(model, logits_of)
    teacher.begin_epoch(0)
    assert targets(teacher, data(9)) is None
    for epoch in range(1, 4):
        train_step(model, epoch)
        frozen = copy.deepcopy(model).eval()
        teacher.begin_epoch(epoch)
        for step in range(2):
            train_step(model, 10 * epoch + step)
            soft_targets = targets(teacher, data(100 + step))
            assert torch.equal(soft_targets.log_probs, log_probs(frozen, data(100 + step))) and soft_targets.mask.all()
            assert (
                soft_targets.log_probs.dtype == torch.float32
                and soft_targets.index is None
                and not soft_targets.log_probs.requires_grad
            )
        assert not torch.allclose(soft_targets.log_probs, log_probs(copy.deepcopy(model).eval(), data(101)), atol=1e-2)
        assert not torch.allclose(
            soft_targets.log_probs, log_probs(copy.deepcopy(frozen).train(), data(101)), atol=1e-2
        )


@pytest.mark.parametrize("kind", ["snapshot", "ema"])
def test_dropout_of_a_teacher_leaves_statistics_alone(kind):
    """Against a copy in training mode whose batch statistics are those of evaluation; no buffer moves."""
    model = net()
    if kind == "snapshot":
        teacher = SnapshotTeacher(model, logits_of, warm_start=True, dropout=True)
    else:
        teacher = EMATeacher(model, logits_of, 0.0, dropout=True)
        teacher.after_step()
    teacher.begin_epoch(0)
    teacher.begin_epoch(1)
    frozen = copy.deepcopy(model).train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    torch.manual_seed(5)
    expected = log_probs(frozen, data(3))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    torch.manual_seed(5)
    soft_targets = targets(teacher, data(3))
    assert torch.equal(soft_targets.log_probs, expected)
    assert not torch.allclose(soft_targets.log_probs, log_probs(copy.deepcopy(model).eval(), data(3)), atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_heads_are_asked_in_the_same_pass():
    model = net()
    calls = []

    def predict(run, batch):
        outputs = run(batch.inputs)
        calls.append(1)
        return [Rows(logits, batch.labels) for logits in (outputs["logits"], 2 * outputs["logits"])]

    teacher = SnapshotTeacher(model, predict, warm_start=True)
    teacher.begin_epoch(0)
    batch = Batch({"pixel_values": data(4)}, torch.zeros(8, dtype=torch.long))
    assert teacher.targets(batch).heads == []  # in the first epoch, even a warm start has untrained heads
    teacher.begin_epoch(1)
    calls.clear()
    taught = teacher.targets(batch)
    expected = torch.log_softmax(2 * taught.model.log_probs, -1)
    torch.testing.assert_close(taught.heads[0].log_probs, expected)
    assert len(calls) == 1 and len(taught.heads) == 1


def test_snapshot_is_taken_once_an_epoch():
    """Entering the same epoch again (a resumed run) does not renew it."""
    model = net()
    teacher = SnapshotTeacher(model, logits_of)
    teacher.begin_epoch(0)
    train_step(model, 1)
    teacher.begin_epoch(1)
    before = targets(teacher, data(5)).log_probs
    train_step(model, 2)
    teacher.begin_epoch(1)
    assert torch.equal(targets(teacher, data(5)).log_probs, before)
    teacher.begin_epoch(2)
    assert not torch.allclose(targets(teacher, data(5)).log_probs, before, atol=1e-2)


def test_warm_start_lets_the_initial_weights_teach():
    model = net()
    initial, teacher = copy.deepcopy(model).eval(), SnapshotTeacher(model, logits_of, warm_start=True)
    teacher.begin_epoch(0)
    train_step(model, 1)
    assert torch.equal(targets(teacher, data(5)).log_probs, log_probs(initial, data(5)))


@pytest.mark.parametrize("kind", ["snapshot", "ema"])
def test_teaching_leaves_no_trace(kind):
    """Training flags (mixed ones too), buffers, gradients, random numbers; the model's own tensors stay its own."""
    model = net()
    model.norm.eval()  # a user's frozen BatchNorm
    model.encode.weight.requires_grad_(True)
    teacher = (
        SnapshotTeacher(model, logits_of, warm_start=True) if kind == "snapshot" else EMATeacher(model, logits_of, 0.9)
    )
    teacher.begin_epoch(0)
    if kind == "ema":
        teacher.after_step()
        teacher.begin_epoch(1)
    parameters, before = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}, flags_and_state(model)
    assert targets(teacher, data(5)) is not None
    assert unchanged(model, before)
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert not model.norm.training and model.drop.training
    train_step(model, 1)
    assert not unchanged(model, before)


def test_teaching_that_fails_leaves_no_trace():
    model = net()
    teacher = SnapshotTeacher(model, logits_of, warm_start=True)
    teacher.begin_epoch(0)
    before = flags_and_state(model)
    with pytest.raises(RuntimeError):
        targets(teacher, torch.zeros(8, 5))
    assert unchanged(model, before)


def test_only_what_training_changes_is_copied():
    """Trainable parameters (tied ones once) and saved buffers; in memory of its own."""
    model = net()
    teacher = SnapshotTeacher(model, logits_of, warm_start=True)
    teacher.begin_epoch(0)
    expected = {"norm.weight", "norm.bias", "encode.weight", "encode.bias", "decode.bias", "head.weight", "head.bias"}
    expected |= {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert teacher.weights.keys() == expected
    live = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert live.isdisjoint(tensor.data_ptr() for tensor in teacher.weights.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_snapshot_of_a_peft_model_costs_its_adapters():
    """And equals a copy of the whole."""
    peft = pytest.importorskip("peft")

    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["head"], lora_dropout=0.3)).train()
    teacher = SnapshotTeacher(model, logits_of, warm_start=True)
    train_step(model, 1)
    teacher.begin_epoch(0)
    frozen = copy.deepcopy(model).eval()
    train_step(model, 2)
    train_step(model, 3)
    assert torch.equal(targets(teacher, data(5)).log_probs, log_probs(frozen, data(5)))
    assert not torch.allclose(log_probs(copy.deepcopy(model).eval(), data(5)), log_probs(frozen, data(5)), atol=1e-3)
    assert all("lora" in name or "norm" in name for name in teacher.weights)


def test_rows_that_are_not_finite_teach_nothing():
    """Their mask is false and their values are finite."""
    model = net()
    teacher = SnapshotTeacher(model, logits_of, warm_start=True)
    teacher.begin_epoch(0)
    x = data(5)
    x[2] = float("nan")
    soft_targets = targets(teacher, x)
    assert (
        soft_targets.mask.tolist() == [True, True, False] + [True] * 5 and torch.isfinite(soft_targets.log_probs).all()
    )


def test_half_precision_models_teach_in_float32():
    model = net().bfloat16().eval()
    teacher = SnapshotTeacher(model, logits_of, warm_start=True)
    teacher.begin_epoch(0)
    soft_targets = targets(teacher, data(5).bfloat16())
    assert soft_targets.log_probs.dtype == torch.float32
    assert (soft_targets.log_probs.exp().sum(-1) - 1).abs().max() < 1e-5
    with torch.no_grad():
        assert torch.equal(soft_targets.log_probs, model(data(5).bfloat16())["logits"].float().log_softmax(-1))


def test_processes_share_the_statistics_of_the_first():
    """`broadcast` gets the buffers of a type together, a copy of them, and what it gives is used."""
    model, seen = net(), []

    def broadcast(tensor):
        seen.append(tensor)
        return tensor.fill_(3)

    teacher = SnapshotTeacher(model, logits_of, broadcast, warm_start=True)
    teacher.begin_epoch(0)
    assert len(seen) == 2 and (model.norm.running_mean == 0).all()
    assert (teacher.weights["norm.running_mean"] == 3).all() and teacher.weights["norm.num_batches_tracked"] == 3


@pytest.mark.parametrize("kind", ["snapshot", "ema"])
def test_state_of_weights(kind):
    """A teacher that has loaded it says the same; another model is refused."""

    def make(model):
        if kind == "snapshot":
            return SnapshotTeacher(model, logits_of)
        return EMATeacher(model, logits_of, 0.6)

    model = net()
    teacher = make(model)
    assert state_of(teacher)[0] == {} and journal_of(teacher) == {}
    teacher.begin_epoch(0)
    for step in range(3):
        train_step(model, step)
        teacher.after_step()
    teacher.begin_epoch(1)
    tensors, metadata = state_of(teacher)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    other = make(copy.deepcopy(model))
    other.load("teacher", (tensors, metadata | {"teacher": kind}), [])
    other.epoch = 1
    other.begin_epoch(1)
    for step in range(3, 6):
        train_step(model, step)
        train_step(other.model, step)
        assert torch.equal(targets(other, data(5)).log_probs, targets(teacher, data(5)).log_probs)
        teacher.after_step()
        other.after_step()
    assert not torch.allclose(targets(teacher, data(5)).log_probs, log_probs(copy.deepcopy(model).eval(), data(5)))
    wide = nn.Sequential(nn.Linear(6, 9))
    with pytest.raises(ValueError, match=f"the checkpoint's {kind} has no 0.weight of shape \\[9, 6\\]"):
        make(wide).load("teacher", (tensors, metadata), [])
    tensors["weights.head.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=f"the checkpoint's {kind} has no head.bias of shape \\[4\\]: resume with"):
        make(net()).load("teacher", (tensors, metadata), [])


@pytest.mark.parametrize("kind", ["snapshot", "ema"])
def test_state_before_the_teacher_has_acted(kind):
    def make():
        return SnapshotTeacher(net(), logits_of) if kind == "snapshot" else EMATeacher(net(), logits_of, 0.9)

    tensors, metadata = state_of(make())
    other = make()
    other.load("teacher", (tensors, metadata), [])
    other.begin_epoch(1 if kind == "ema" else 0)
    assert targets(other, data(1)) is None


# Moving average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8, 0.999])
def test_ema_equals_a_naive_loop(decay):
    """Decay `min(decay, (1 + t) / (10 + t))` after t steps, from the weights of the first step; buffers are copied."""
    model = net()
    teacher, history = EMATeacher(model, logits_of, decay), []
    teacher.begin_epoch(0)
    for step in range(12):
        train_step(model, step)
        teacher.after_step()
        history.append({n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad})
        for name in history[0]:
            average = history[0][name]
            for t, weights in enumerate(history[1:], start=1):
                now = min(decay, (1 + t) / (10 + t))
                average = now * average + (1 - now) * weights[name]
            torch.testing.assert_close(teacher.weights[name].double(), average, atol=1e-6, rtol=1e-5)
        for name, buffer in model.named_buffers():
            if name != "scale":
                assert torch.equal(teacher.weights[name], buffer)
    live = dict(model.named_parameters())
    assert decay == 0 or not torch.allclose(teacher.weights["head.weight"], live["head.weight"], atol=1e-3)
    assert teacher.weights["norm.num_batches_tracked"].dtype == torch.int64


def test_ema_acts_from_the_second_epoch():
    """And then with the average of the moment, in evaluation mode."""
    model = net()
    teacher = EMATeacher(model, logits_of, 0.7)
    teacher.begin_epoch(0)
    for step in range(4):
        train_step(model, step)
        teacher.after_step()
        assert targets(teacher, data(5)) is None
    teacher.begin_epoch(1)
    train_step(model, 5)
    expected = copy.deepcopy(model).eval()
    expected.load_state_dict(
        {**model.state_dict(), **teacher.weights, "decode.weight": teacher.weights["encode.weight"]}
    )
    assert torch.equal(targets(teacher, data(5)).log_probs, log_probs(expected, data(5)))
    before = targets(teacher, data(5)).log_probs
    teacher.after_step()
    assert not torch.allclose(targets(teacher, data(5)).log_probs, before, atol=1e-4)


# History


def history_teacher(tmp_path, size=6, ids=None, gather=None, rank=0, **fields):
    store = HistoryStore(MethodArguments(**fields), size, ids, CPU, tmp_path / "history", 3, gather, rank, rank == 0)
    return HistoryTeacher(store)


def asked(teacher, samples, rows):
    """The soft targets of a teacher for these rows."""
    return teacher.targets(Batch({}, rows.labels, samples=samples)).model


def observe(teacher, samples, rows, mixed=False):
    mixing = Mixing(torch.arange(len(rows.labels)), torch.tensor(0.5)) if mixed else None
    teacher.observe(Batch({}, rows.labels, samples=samples, mixing=mixing), rows, [])


def batch(ids, seed, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([i % classes for i in ids])
    rows = Rows(torch.randn(len(ids), classes, generator=generator).requires_grad_(), labels)
    return sample_index(torch.tensor(ids), labels), rows


def visit(teacher, ids, seed, mixed=False):
    """What a step does; the past it learns from."""
    samples, rows = batch(ids, seed)
    soft_targets = asked(teacher, samples, rows)
    observe(teacher, samples, rows, mixed)
    return soft_targets, rows.logits.detach().log_softmax(-1)


def test_history_teacher_reads_what_it_observed_an_epoch_ago(tmp_path):
    """In any order; nothing in the first epoch, and no gradient."""
    teacher = history_teacher(tmp_path)
    teacher.begin_epoch(0)
    soft_targets, first = visit(teacher, [0, 1, 2, 3], 1)
    assert soft_targets is None
    teacher.begin_epoch(0)  # again: changes nothing
    assert visit(teacher, [4, 0], 2)[0] is None
    teacher.begin_epoch(1)
    soft_targets, second = visit(teacher, [3, 5, 1], 3)
    assert soft_targets.mask.tolist() == [True, False, True] and not soft_targets.log_probs.requires_grad
    assert torch.equal(soft_targets.log_probs[soft_targets.mask], first[[3, 1]])
    teacher.begin_epoch(2)
    soft_targets, _ = visit(teacher, [0, 1, 5], 4)
    assert torch.equal(soft_targets.log_probs, torch.stack((first[0], second[2], second[1])))
    assert teacher.history.stamps.tolist() == [0, 1, 0, 1, 0, 1]


def test_half_precision_rows_are_stored_in_float32(tmp_path):
    teacher = history_teacher(tmp_path)
    samples, rows = batch([0, 1], 1)
    rows.logits = rows.logits.detach().bfloat16()
    teacher.begin_epoch(0)
    observe(teacher, samples, rows)
    teacher.begin_epoch(1)
    assert torch.equal(asked(teacher, samples, rows).log_probs, rows.logits.float().log_softmax(-1))


def test_rows_of_mixed_images_are_not_stored(tmp_path):
    """Invariant 21; they still learn from what their images have."""
    teacher = history_teacher(tmp_path)
    teacher.begin_epoch(0)
    visit(teacher, [0, 1], 1, mixed=True)
    _, first = visit(teacher, [1, 2], 2)
    teacher.begin_epoch(1)
    soft_targets, _ = visit(teacher, [0, 1, 2], 3, mixed=True)
    assert soft_targets.mask.tolist() == [False, True, True] and torch.equal(soft_targets.log_probs[1:], first)
    teacher.begin_epoch(2)
    assert torch.equal(visit(teacher, [1, 2], 4)[0].log_probs, first)


def test_observations_before_training(tmp_path):
    """A warm start is the past of the first epoch, and has a stamp of its own."""
    teacher = history_teacher(tmp_path)
    samples, rows = batch([0, 1], 1)
    observe(teacher, samples, rows)
    teacher.begin_epoch(0)
    assert torch.equal(visit(teacher, [1, 0], 2)[0].log_probs, rows.logits.log_softmax(-1)[[1, 0]])
    assert teacher.history.stamps.tolist() == [WARM_START] * 2 + [NEVER] * 4


def test_stored(tmp_path):
    """For lists, arrays and tensors of ids, in their order."""
    teacher = history_teacher(tmp_path, size=3, ids=np.array([90, 7, 30]))
    with pytest.raises(ValueError, match="no predictions are stored yet"):
        teacher.stored([7])
    samples, rows = batch([30, 90], 1)
    observe(teacher, samples, rows)
    teacher.begin_epoch(0)
    probabilities = rows.logits.detach().softmax(-1)
    for ids in ([90, 7, 30], np.array([90, 7, 30]), torch.tensor([90, 7, 30])):
        found = teacher.stored(ids)
        assert found.shape == (3, CLASSES) and found[1].isnan().all()
        torch.testing.assert_close(found[[0, 2]], probabilities[[1, 0]])
    with pytest.raises(ValueError, match="sample_id=8 is out of range"):
        teacher.stored([7, 8])


def test_trace(tmp_path):
    """Of the epochs of the run; an error where none is kept."""
    teacher = history_teacher(tmp_path, history_trace=True)
    with pytest.raises(ValueError, match="set history_trace=True and train"):
        _ = teacher.trace
    teacher.begin_epoch(0)
    _, rows = visit(teacher, [3, 4], 1)
    teacher.begin_epoch(1)
    assert teacher.trace.shape == (6, 3)
    assert teacher.trace[3, 0].item() == pytest.approx(rows[0, 3].exp().item(), abs=1e-3)
    assert teacher.trace[[0, 1, 2, 5]].isnan().all() and teacher.trace[:, 1:].isnan().all()
    without = history_teacher(tmp_path)
    visit(without, [3], 1)
    with pytest.raises(ValueError, match="history_trace=False"):
        _ = without.trace


def test_another_number_of_classes(tmp_path):
    """Found where rows are kept; where they are read, the distiller compares the classes."""
    teacher = history_teacher(tmp_path)
    visit(teacher, [0, 1], 1)
    teacher.begin_epoch(0)
    samples, rows = batch([0, 1], 2, classes=7)
    with pytest.raises(ValueError, match="the model has 7 classes, the stored predictions 4: resume with the model"):
        observe(teacher, samples, rows)
    assert asked(teacher, samples, rows).num_classes == CLASSES


def tokens(ids, seed, length=5):
    """Sample i has i % 4 labelled positions."""
    labels = torch.tensor([[0] * (i % 4) + [-100] * (length - i % 4) for i in ids])
    rows = Rows(
        torch.randn(labels.numel(), CLASSES, generator=torch.Generator().manual_seed(seed)), labels.reshape(-1)
    )
    return sample_index(torch.tensor(ids), labels), rows


def test_size_of_a_history_of_tokens_is_estimated_from_the_first_batch(tmp_path, monkeypatch):
    """Labelled rows per sample, times the samples, rounded up; that of all processes together."""
    counts, plan_history = [], teachers.history.plan_history
    monkeypatch.setattr(
        teachers.history, "plan_history", lambda c, rows, *rest: counts.append(rows) or plan_history(c, rows, *rest)
    )
    teacher = history_teacher(tmp_path, size=10)
    observe(teacher, *tokens([1, 3, 3], 1))  # 7 rows of 3 samples
    assert counts == [24] and teacher.history.ragged

    def process(rank, gather):
        teacher = history_teacher(tmp_path / str(rank), 10, gather=gather, rank=rank)
        observe(teacher, *tokens([1, 3, 3] if rank == 0 else [1], 1))  # 8 rows of 4 samples
        return teacher

    Processes(2).run(process)
    assert counts == [24, 20, 20]


def test_a_history_that_does_not_fit_is_refused_at_the_first_batch(tmp_path):
    teacher = history_teacher(tmp_path, size=1000, history_max_bytes=10_000)
    with pytest.raises(ValueError, match="needs 32000 bytes .*set history_top_k=1 with history_dtype='float16'"):
        visit(teacher, [0, 1], 1)


def test_processes_that_mix_different_batches(tmp_path):
    """Every process meets every exchange, whichever of its batches are mixed: also all of an epoch, also the first."""
    mixed = {0: [[True, False], [True, True]], 1: [[False, True], [False, False]]}

    def process(rank, gather):
        teacher = history_teacher(tmp_path, gather=gather, rank=rank, history_trace=True)
        for epoch in range(2):
            teacher.begin_epoch(epoch)
            for step in range(2):
                visit(teacher, [3 * rank + step], 100 * rank + 10 * epoch + step, mixed[rank][epoch][step])
        teacher.begin_epoch(2)
        return teacher

    for teacher in Processes(2).run(process):
        assert teacher.history.stamps.tolist() == [NEVER, 0, NEVER, 1, 1, NEVER]
        expected = {1: 1, 3: 110, 4: 111}
        for i, seed in expected.items():
            assert torch.equal(teacher.stored([i])[0], batch([i], seed)[1].logits.detach()[0].log_softmax(-1).exp())


# Saving and loading a history


def trained(tmp_path, **arguments):
    teacher = history_teacher(tmp_path, **arguments)
    teacher.begin_epoch(0)
    ids = [0, 1, 2, 3] if teacher.store.ids is None else teacher.store.ids[:4].tolist()
    visit(teacher, ids, 1)
    teacher.begin_epoch(1)
    visit(teacher, ids[:2], 2)
    return teacher, ids


@pytest.mark.parametrize("place", ["accelerator", "disk"])
@pytest.mark.parametrize("top_k", [None, 2, CLASSES])
@pytest.mark.parametrize("ids", [None, np.array([50, 3, 20, 9, 44, 1])])
def test_a_loaded_history_goes_on_as_the_old_one(tmp_path, place, top_k, ids):
    """In the middle of an epoch, with rows read and rows still in the journal."""
    arguments = {"history_device": place, "history_top_k": top_k, "ids": ids, "history_trace": True}
    teacher, visited = trained(tmp_path / "a", **arguments)
    tensors, metadata = state_of(teacher)
    other = history_teacher(tmp_path / "b", **arguments)
    other.load("teacher", ({n: t.clone() for n, t in tensors.items()}, metadata), [journal_of(teacher)])
    other.epoch = 1
    for t in (teacher, other):
        t.begin_epoch(1)
    results = []
    for t in (teacher, other):
        now, _ = visit(t, visited[::-1], 3)
        t.begin_epoch(2)
        later, _ = visit(t, visited, 4)
        results.append((now, later, t.trace.nan_to_num(nan=-1)))
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(a.log_probs, b.log_probs) and torch.equal(a.mask, b.mask)
    assert torch.equal(results[0][2], results[1][2])
    assert not torch.equal(results[0][0].log_probs, results[0][1].log_probs)


def test_a_history_saved_before_the_first_batch(tmp_path):
    teacher = history_teacher(tmp_path)
    assert state_of(teacher) == ({}, {}) and journal_of(teacher) == {}
    other = history_teacher(tmp_path)
    other.load("teacher", ({}, {"teacher": "history"}), [])
    assert other.history is None and visit(other, [0], 1)[0] is None


OWN_IDS = np.array([5, 6, 7, 8, 9, 10])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"size": 7}, r"made for 6 samples \(row numbers as ids\), the training set has 7 \(row numbers as ids\)"),
        ({}, {"ids": OWN_IDS}, r"6 samples \(row numbers as ids\), the training set has 6 \(ids of their own\)"),
        ({"ids": OWN_IDS}, {}, r"6 samples \(ids of their own\), the training set has 6 \(row numbers as ids\)"),
        ({"ids": OWN_IDS}, {"ids": OWN_IDS + 1}, "give the same dataset and sample_id_column as before"),
        ({}, {"history_top_k": 2}, "history_top_k=2 but the checkpoint's history has None"),
        (
            {"history_top_k": 2},
            {"history_top_k": 3},
            "history_top_k=3 but the checkpoint's history has 2: resume with",
        ),
        ({}, {"history_dtype": "float16"}, "history_dtype=float16 but the checkpoint's history has float32"),
    ],
)
def test_histories_of_something_else(tmp_path, before, after, message):
    """Both sides are in the message."""
    teacher, _ = trained(tmp_path / "a", **before)
    tensors, metadata = state_of(teacher)
    with pytest.raises(ValueError, match=message):
        history_teacher(tmp_path / "b", **after).load("teacher", (tensors, metadata), [journal_of(teacher)])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"history_top_k": 2}, {}),
        ({"history_dtype": "float16"}, {}),
        ({"history_top_k": CLASSES}, {"history_top_k": CLASSES}),
        ({}, {"history_top_k": CLASSES, "history_dtype": "float32"}),
        ({"ids": OWN_IDS}, {"ids": OWN_IDS[::-1]}),
        ({"history_device": "disk"}, {"history_device": "cpu"}),
    ],
)
def test_histories_that_are_the_same(tmp_path, before, after):
    """What the checkpoint has wins over what is left open; the order of ids and the place do not matter."""
    teacher, ids = trained(tmp_path / "a", **before)
    tensors, metadata = state_of(teacher)
    other = history_teacher(tmp_path / "b", **after)
    other.load("teacher", (tensors, metadata), [])
    assert other.history.codec == teacher.history.codec
    assert torch.equal(other.stored(ids), teacher.stored(ids)) and other.stored(ids).isfinite().all()


def test_shuffled_data_are_found_at_the_first_batch(tmp_path):
    """Row numbers that now mean other samples."""
    teacher, _ = trained(tmp_path)
    labels = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="labels of sample_id=0 are not those .*sample_id_column"):
        asked(teacher, sample_index(torch.tensor([0, 1]), labels), Rows(torch.zeros(2, CLASSES), labels))
