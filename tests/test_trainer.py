"""What a user of the trainer sees: data of every kind, logged values, evaluation, PEFT, mixed precision, reuse."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    Recording,
    Samples,
    SizedStream,
    Stream,
    add_noise,
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_selfkd import SelfKDDataCollator, SelfKDMixin, SelfKDTrainer, with_sample_ids
from hf_selfkd.metrics import running
from hf_selfkd.metrics.running import RunningMeans


pytestmark = pytest.mark.trains


def hf_dataset(samples, **more):
    columns = {name: [np.asarray(item[name]) for item in samples.items] for name in samples.items[0]}
    return datasets.Dataset.from_dict(columns | more)


# Logged values


class Logits(Recording):
    """Notes the training logits of each micro-batch beside its inputs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.visits[-1][1]["logits"] = outputs.logits.detach()
        return (loss, outputs) if return_outputs else loss


def rows(inputs):
    """`(sample id, position), logits, label` of every labelled row of a micro-batch."""
    count = len(inputs["sample_id"])
    logits, labels = inputs["logits"].reshape(count, -1, CLASSES), inputs["labels"].reshape(count, -1)
    for n, sample_logits, sample_labels in zip(inputs["sample_id"].tolist(), logits, labels, strict=True):
        for position, label in enumerate(sample_labels.tolist()):
            if label != -100:
                yield (n, position), sample_logits[position], label


def recompute(visits, steps_per_epoch, epochs, window):
    """The values to be logged for each `window` optimizer steps, row by row."""
    table, fresh, logs = {}, {}, []
    for first in range(0, visits[-1][0] + 1, window):
        sums = dict.fromkeys(("hard", "soft", "entropy", "agree", "known", "rows", "alpha", "batches"), 0.0)
        for step, inputs in (visit for visit in visits if first <= visit[0] < first + window):
            epoch = step // steps_per_epoch
            fresh.setdefault(epoch, {})
            table |= fresh.get(epoch - 1, {})
            alpha = 0.8 * (epoch + 1) / epochs
            sums["alpha"] += alpha
            sums["batches"] += 1
            for key, logits, label in rows(inputs):
                log_probs = F.log_softmax(logits.double(), -1)
                sums["rows"] += 1
                sums["hard"] -= log_probs[label].item()
                if key in table:
                    soft_targets = table[key]
                    target = alpha * soft_targets + (1 - alpha) * F.one_hot(torch.tensor(label), CLASSES)
                    sums["known"] += 1
                    sums["soft"] -= (soft_targets * log_probs).sum().item()
                    sums["entropy"] -= (target * target.log()).sum().item()
                    sums["agree"] += soft_targets.argmax().item() == label
                fresh[epoch][key] = log_probs.exp()
        log = {
            "alpha": sums["alpha"] / sums["batches"],
            "hard_loss": sums["hard"] / sums["rows"],
            "rows_with_history": sums["known"] / sums["rows"],
            "target_entropy": sums["entropy"] / sums["rows"],
        }
        if sums["known"]:
            soft_targets = {"soft_loss": sums["soft"] / sums["known"], "past_agreement": sums["agree"] / sums["known"]}
        logs.append(log | (soft_targets if sums["known"] else {}))
    return logs


@pytest.mark.parametrize(
    "options", [{}, {"dataloader_drop_last": True, "gradient_accumulation_steps": 2}, {"logging_steps": 4}], ids=str
)
@pytest.mark.parametrize("name", ["plain_vit", "bert_tokens"])
def test_logged_values_are_those_of_the_rows(tmp_path, name, options):
    trainer = train(tmp_path, name, make_samples(name), trainer=Logits, **options)
    per_epoch = 3 if "gradient_accumulation_steps" in options else 6
    expected = recompute(trainer.visits, per_epoch, 3, options.get("logging_steps", 1))
    got = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"alpha", "hard_loss", "soft_loss", "past_agreement", "target_entropy", "rows_with_history"}
    for entry, values in zip(got, expected, strict=False):  # the last, partial, window is not logged
        assert {name: entry[name] for name in names & entry.keys()} == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert len(got) in (len(expected), len(expected) - 1)
    assert got[-1]["rows_with_history"] > 0.5


@pytest.mark.parametrize("held", [0, 10])
def test_how_many_batches_wait_for_the_log_changes_no_loss(tmp_path, monkeypatch, held):
    # What reads the soft targets again, such as their entropy, is logged of the last batches only: test_running.py.
    metrics = ("loss", "hard_loss", "soft_loss", "rows_with_history")
    logs, most, waited = [], [], []
    update = RunningMeans.update

    def watched(self, *arguments):
        update(self, *arguments)
        most.append(len(self._waiting))

    monkeypatch.setattr(RunningMeans, "update", watched)
    for limit in (2**18, held):
        monkeypatch.setattr(running, "MAX_HELD", limit)
        trainer = train(tmp_path, "vit", make_samples("vit"), logging_steps=6)
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        logs.append([{name: entry[name] for name in metrics if name in entry} for entry in entries])
        waited.append(max(most))
        most.clear()
    # Not to the bit: batches that wait are measured as one, which adds up the rows in another order.
    assert len(logs[0]) == len(logs[1]) == 3
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert waited[0] == 6 > waited[1]


def test_loss_logged_is_the_mixture_of_hard_and_soft_loss(tmp_path):
    trainer = train(tmp_path, "vit", make_samples("vit"))
    for entry in trainer.state.log_history[6:18]:
        mixture = (1 - entry["alpha"]) * entry["hard_loss"] + entry["alpha"] * entry["soft_loss"]
        assert entry["loss"] == pytest.approx(mixture, rel=1e-5)


# Evaluation and prediction


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
@pytest.mark.parametrize("name", ["plain_vit", "resnet", "plain_bert_tokens"])
def test_evaluation_changes_nothing_and_gives_the_loss_of_trainer(tmp_path, name, teacher):
    samples = make_samples(name)
    without = train(tmp_path, name, samples, teacher=teacher)
    options = {"eval_dataset": samples, "eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 5}
    trainer = train(tmp_path, name, samples, teacher=teacher, **options)
    assert difference(without, trainer) == 0
    for part, tensor in dict(without.teacher.states())["teacher"][0].items():
        assert torch.equal(tensor.nan_to_num(), dict(trainer.teacher.states())["teacher"][0][part].nan_to_num())
    plain = make_trainer(tmp_path, trainer.model, samples, trainer=Trainer, **options)
    ours, stock = trainer.evaluate(), plain.evaluate()
    assert ours["eval_loss"] == stock["eval_loss"]
    assert ours.keys() ^ stock.keys() <= {"epoch", "eval_model_preparation_time"}  # of the stock Trainer, untrained


def test_evaluation_before_training(tmp_path):
    samples = make_samples("vit")
    trainer = make_trainer(tmp_path, "vit", samples, eval_dataset=samples)
    plain = make_trainer(tmp_path, "vit", samples, eval_dataset=samples, trainer=Trainer)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("mixes", [True, False])
def test_prediction_is_that_of_trainer(tmp_path, labels, mixes):
    samples = make_samples("vit")
    collator = SelfKDDataCollator(collate, mixup_alpha=1.0, mix_probability=0.5) if mixes else collate
    trainer = train(tmp_path, "vit", samples, data_collator=collator)
    unseen = make_samples("vit", seed=1)
    if not labels:
        unseen = Samples([{"pixel_values": item["pixel_values"]} for item in unseen.items])
    ours = trainer.predict(unseen)
    stock = make_trainer(tmp_path, trainer.model, samples, trainer=Trainer).predict(unseen)
    np.testing.assert_array_equal(ours.predictions, stock.predictions)
    assert ours.predictions.shape == (22, CLASSES)
    assert (ours.label_ids is not None) == labels


def test_dataset_with_ids_can_be_evaluated(tmp_path):
    samples = make_samples("vit")
    plain = train(tmp_path, "vit", samples)
    trainer = train(tmp_path, "vit", with_sample_ids(samples), remove_unused_columns=False)
    assert trainer.evaluate(with_sample_ids(samples))["eval_loss"] == plain.evaluate(samples)["eval_loss"]


def test_compute_metrics_and_preprocess_logits(tmp_path):
    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    samples = make_samples("vit")
    trainer = train(
        tmp_path,
        "vit",
        samples,
        eval_dataset=samples,
        eval_strategy="epoch",
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    with torch.no_grad():
        batch = collate(samples.items)
        right = (trainer.model.eval()(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right.item())
    assert len(logged(trainer, "eval_accuracy")) == 4


def test_checkpoint_is_a_plain_model(tmp_path):
    """It loads without this package; only the folder of the teacher is ours."""
    samples, options = make_samples("vit"), {"save_strategy": "steps", "save_steps": 9}
    ours = train(tmp_path / "ours", "vit", samples, **options)
    train(tmp_path / "plain", "vit", samples, trainer=Trainer, **options)
    files = {run: {p.name for p in (tmp_path / run / "checkpoint-18").iterdir()} for run in ("ours", "plain")}
    assert files["ours"] - files["plain"] == {"_selfkd"}
    weights = {run: load_file(tmp_path / run / "checkpoint-18/model.safetensors") for run in files}
    assert weights["ours"].keys() == weights["plain"].keys()
    assert difference(type(ours.model).from_pretrained(tmp_path / "ours/checkpoint-18"), ours) == 0
    configs = [(tmp_path / run / "checkpoint-18/config.json").read_text() for run in files]
    assert configs[0] == configs[1]


# Data


def test_every_map_style_dataset_gives_the_same_run(tmp_path):
    samples = make_samples("vit")
    expected = train(tmp_path, "vit", samples)
    dataset = hf_dataset(samples)

    def as_tensors(batch):
        return {name: [torch.tensor(value) for value in values] for name, values in batch.items()}

    doubled = datasets.concatenate_datasets([dataset, dataset])
    variants = {
        "list": samples.items,
        "datasets": dataset.with_format("torch"),
        "datasets without format": dataset,
        "with_transform": dataset.with_transform(as_tensors),
        "with more columns": hf_dataset(samples, other=["x"] * 22).with_format("torch"),
        "selected": doubled.select(range(22)).with_format("torch"),
        "with_sample_ids": with_sample_ids(samples),
        "datasets with_sample_ids": with_sample_ids(dataset.with_format("torch")),
        "torch dataset with more keys": Samples([item | {"name": "x"} for item in samples.items]),
        "subset": Subset(Samples(samples.items * 2), range(22)),
    }
    for name, variant in variants.items():
        trainer = train(tmp_path, "vit", variant)
        assert difference(expected, trainer) == 0, name
        assert torch.equal(trainer.teacher.stored(range(22)), expected.teacher.stored(range(22))), name


def test_default_collator_and_names_of_the_label(tmp_path):
    samples = make_samples("vit")
    expected = train(tmp_path, "vit", samples)
    for name in ("label", "labels"):
        items = [{"pixel_values": item["pixel_values"], name: item["labels"]} for item in samples.items]
        assert difference(expected, train(tmp_path, "vit", Samples(items), data_collator=None)) == 0


def test_own_ids_of_datasets(tmp_path):
    samples, ids = make_samples("vit"), [10**12 - 17 * n for n in range(22)]
    expected = train(tmp_path, "vit", samples)
    dataset = hf_dataset(samples, uid=ids).with_format("torch")
    for options in ({"sample_id_column": "uid"}, {"sample_id_column": "uid", "remove_unused_columns": True}):
        trainer = train(tmp_path, "vit", dataset, **options)
        assert difference(expected, trainer) == 0
        assert torch.equal(trainer.teacher.stored(ids), expected.teacher.stored(range(22)))
    wrapped = train(tmp_path, "vit", with_sample_ids(dataset, "uid"))
    assert torch.equal(wrapped.teacher.stored(ids), expected.teacher.stored(range(22)))
    refused(lambda: wrapped.teacher.stored([0]), "sample_id=0", "out of range", "sample_id_column")


def test_own_ids_of_a_torch_dataset(tmp_path):
    samples = make_samples("vit")
    turned = Samples([item | {"uid": 21 - n} for n, item in enumerate(samples.items)])
    expected = train(tmp_path, "vit", samples)
    trainer = train(tmp_path, "vit", turned, sample_id_column="uid")
    assert difference(expected, trainer) == 0
    assert torch.equal(trainer.teacher.stored(range(22)), expected.teacher.stored(range(21, -1, -1)))


def test_unused_columns_may_be_kept(tmp_path):
    samples = make_samples("vit")
    named = Samples([item | {"name": "x"} for item in samples.items])

    def with_name(items):
        assert all(item.pop("name") == "x" for item in items)
        return collate(items)

    trainer = train(tmp_path, "vit", named, data_collator=with_name, remove_unused_columns=False)
    assert difference(trainer, train(tmp_path, "vit", samples)) == 0
    trainer = train(
        tmp_path,
        "vit",
        hf_dataset(samples, name=["x"] * 22).with_format("torch"),
        data_collator=with_name,
        remove_unused_columns=False,
    )
    assert difference(trainer, train(tmp_path, "vit", samples)) == 0


@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_iterable_dataset_equals_the_same_samples_in_order(tmp_path, teacher):
    samples = make_samples("vit")
    options = {"teacher": teacher, "alpha_schedule": "linear_step", "max_steps": 18}
    expected = train(tmp_path, "vit", samples, train_sampling_strategy="sequential", **options)
    plain = train(tmp_path, "vit", samples, train_sampling_strategy="sequential", **(options | {"alpha": 0.0}))
    assert difference(expected, plain) > 1e-4
    assert difference(expected, train(tmp_path, "vit", SizedStream(samples), **options)) == 0
    assert difference(expected, train(tmp_path, "vit", Stream(samples), **options)) == 0
    streamed = hf_dataset(samples).to_iterable_dataset().with_format("torch")
    assert difference(expected, train(tmp_path, "vit", streamed, **options)) == 0


@pytest.mark.parametrize("warm", [False, True])
def test_iterable_dataset_with_ids_and_length_has_a_history(tmp_path, warm):
    samples = make_samples("vit")
    identified = SizedStream(Samples([item | {"uid": n} for n, item in enumerate(samples.items)]))
    options = {"warm_start_teacher": warm, "train_sampling_strategy": "sequential"}
    expected = train(tmp_path, "vit", samples, **options)
    trainer = train(tmp_path, "vit", identified, sample_id_column="uid", **options)
    assert difference(expected, trainer) == 0
    assert torch.equal(trainer.teacher.stored(range(22)), expected.teacher.stored(range(22)))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(tmp_path, persistent):
    samples = make_samples("plain_vit", transform=add_noise)  # dropout would see that workers draw random numbers
    alone = train(tmp_path, "plain_vit", samples, seed_transforms=True)
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    assert difference(alone, train(tmp_path, "plain_vit", samples, seed_transforms=True, **options)) == 0
    assert difference(alone, train(tmp_path, "plain_vit", samples, seed_transforms=True, data_seed=7)) > 1e-4


def test_seeded_transforms_differ_between_epochs_and_samples(tmp_path):
    """Every sample is the same image: only the transforms tell visits apart."""
    one = make_samples("vit", size=1).items[0]
    samples = Samples([one] * 22, transform=add_noise)
    trainer = train(tmp_path, "vit", samples, trainer=Recording, seed_transforms=True)
    images = torch.cat([inputs["pixel_values"] for _, inputs in trainer.visits]).flatten(1)
    assert len(images) == 66
    assert len(images.unique(dim=0)) == 66


def test_callback_may_end_epochs_early(tmp_path):
    class ThreeSteps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step % 3 == 0

    trainer = train(tmp_path, "vit", make_samples("vit"), trainer=Recording, callbacks=[ThreeSteps()])
    assert logged(trainer, "alpha") == pytest.approx([0.8 * t / 3 for t in (1, 1, 1, 2, 2, 2, 3, 3, 3)])
    epochs = [{n for step, i in trainer.visits if step // 3 == e for n in i["sample_id"].tolist()} for e in range(3)]
    shares = [len(epochs[1] & epochs[0]) / 12, len(epochs[2] & (epochs[0] | epochs[1])) / 12]
    got = np.array(logged(trainer, "rows_with_history")).reshape(3, 3).mean(1)
    assert got == pytest.approx([0.0, *shares])
    assert 0 < shares[0] < 1


# The teacher


def test_stored_predictions_before_during_and_after_training(tmp_path):
    samples = make_samples("plain_vit")
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (6, 7, 12):
                seen[state.global_step] = (
                    trainer.teacher.stored(range(22)) if trainer.teacher.history.table else "nothing"
                )

    trainer = make_trainer(tmp_path, "plain_vit", samples, callbacks=[Look()], trainer=Logits)
    refused(lambda: trainer.teacher.stored([0]), "no predictions are stored yet")
    trainer.train()
    epochs = [{}, {}, {}]
    for step, inputs in trainer.visits:
        for (n, _), logits, _ in rows(inputs):
            epochs[step // 6][n] = F.softmax(logits, -1)
    first, _, last = (torch.stack([epoch[n] for n in range(22)]) for epoch in epochs)
    torch.testing.assert_close(seen[7], first)
    torch.testing.assert_close(seen[12], first)  # written in epoch 2, not to be read before it ends
    torch.testing.assert_close(trainer.teacher.stored([3, 1]), last[[3, 1]])
    torch.testing.assert_close(trainer.teacher.stored(np.arange(22)), last)
    torch.testing.assert_close(trainer.teacher.stored(torch.arange(22)).sum(-1), torch.ones(22))
    for wrong in (-1, 22):
        refused(lambda wrong=wrong: trainer.teacher.stored([wrong]), f"sample_id={wrong}", "out of range")


@pytest.mark.parametrize("teacher", ["snapshot", "ema", "none"])
def test_teachers_without_rows_say_so(tmp_path, teacher):
    trainer = train(tmp_path, "vit", make_samples("vit"), teacher=teacher)
    refused(lambda: trainer.teacher.stored([0]), f"teacher={teacher!r}", "teacher='history'")


@pytest.mark.parametrize("alpha", [0.8, 0.0])
@pytest.mark.parametrize("name", ["plain_vit", "bert_tokens"])
def test_trace_holds_the_probability_of_the_true_class(tmp_path, name, alpha):
    options = {"alpha": alpha, "history_trace": True, "dataloader_drop_last": True}
    trainer = train(tmp_path, name, make_samples(name), trainer=Logits, **options)
    expected = {}
    for step, inputs in trainer.visits:
        for (n, _), logits, label in rows(inputs):
            expected.setdefault((n, step // 5), []).append(F.softmax(logits, -1)[label].item())
    assert trainer.teacher.trace.shape == (22, 3)
    for n in range(22):
        for epoch in range(3):
            got = trainer.teacher.trace[n, epoch].item()
            if (n, epoch) in expected:
                assert got == pytest.approx(np.mean(expected[n, epoch]), abs=1e-3)
            else:
                assert np.isnan(got)
    assert trainer.teacher.trace.isnan().sum() == 6


def test_trace_is_off_unless_asked_for(tmp_path):
    trainer = train(tmp_path, "vit", make_samples("vit"))
    refused(lambda: trainer.teacher.trace, "history_trace=True")


class SkipNaN(torch.optim.SGD):
    """Skips a step whose gradients are not finite, as a gradient scaler does."""

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(grad.isfinite().all() for grad in grads):
            super().step(closure)


def test_history_survives_steps_that_are_not_finite(tmp_path):
    calls = []

    def overflow_once(item):
        calls.append(item.pop("number"))
        if calls.count(4) == 2 and calls[-1] == 4:
            return item | {"pixel_values": item["pixel_values"] * float("inf")}
        return item

    samples = make_samples("plain_vit")
    items = [item | {"number": n} for n, item in enumerate(samples.items)]
    model = make_model("plain_vit")
    trainer = train(
        tmp_path,
        model,
        Samples(items, overflow_once),
        trainer=Logits,
        max_steps=12,
        optimizers=(SkipNaN(model.parameters(), 0.05), None),
    )
    broken = [step for step, inputs in trainer.visits if not inputs["logits"].isfinite().all()]
    assert len(broken) == 1 and 6 <= broken[0] < 12
    assert all(tensor.isfinite().all() for tensor in state_of(trainer).values())
    stored = trainer.teacher.stored(range(22))
    assert stored.isfinite().all()
    for step, inputs in trainer.visits:  # sample 4 keeps what it had, its neighbours in the batch do not
        for (n, _), logits, _ in rows(inputs):
            if (step < 6) == (n == 4):
                torch.testing.assert_close(stored[n], F.softmax(logits, -1))


# Ways to run


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_plain_training_arguments_take_the_defaults(tmp_path, name):
    samples = make_samples(name)
    plain = train(tmp_path, name, samples, config_class=TrainingArguments)
    assert type(plain.args) is TrainingArguments
    assert difference(plain, train(tmp_path, name, samples)) == 0
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = SelfKDTrainer(make_model(name), args, train_dataset=samples, data_collator=collate)
    assert trainer.args is args and type(args) is TrainingArguments and not hasattr(args, "alpha")


def test_arguments_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SelfKDTrainer(make_model("vit")).args.alpha == 0.8


class OwnTrainer(Trainer):
    """What a user might have: an optimizer and log entries of their own."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05)
        return self.optimizer

    def log(self, logs, start_time=None):
        super().log(logs | {"own": 1.0}, start_time)


def test_mixin_before_a_trainer_of_ones_own(tmp_path):
    class Mixed(SelfKDMixin, OwnTrainer):
        pass

    samples = make_samples("vit")
    plain = train(tmp_path, "vit", samples, trainer=OwnTrainer)
    ours = train(tmp_path, "vit", samples, trainer=Mixed, alpha=0.0)
    assert difference(plain, ours) == 0
    assert logged(ours, "own") == logged(plain, "own")
    distilled = train(tmp_path, "vit", samples, trainer=Mixed)
    sgd = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05})}
    assert difference(distilled, train(tmp_path, "vit", samples, **sgd)) == 0
    assert logged(distilled, "hard_loss") and logged(distilled, "own")


def test_own_compute_loss_around_ours(tmp_path):
    class Doubled(SelfKDTrainer):
        def compute_loss(self, *arguments, **keywords):
            return 2 * super().compute_loss(*arguments, **keywords)

    sgd = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    twice = train(tmp_path, "plain_vit", make_samples("vit"), trainer=Doubled, learning_rate=0.05, **sgd)
    once = train(tmp_path, "plain_vit", make_samples("vit"), learning_rate=0.1, **sgd)
    assert difference(twice, once) < 1e-6


def test_trainer_is_reused_as_hyperparameter_search_does(tmp_path):
    """A new model by `model_init` and fields set one by one, cast to the type that they had."""

    def run(trainer, **trial):
        for field, value in trial.items():
            old = getattr(trainer.args, field)
            setattr(trainer.args, field, value if old is None else type(old)(value))
        trainer.train()
        return state_of(trainer)

    def make(**options):
        return make_trainer(tmp_path, None, make_samples("vit"), model_init=lambda: make_model("vit"), **options)

    searched = make()
    for trial in (
        {"alpha": 0.3, "teacher": "snapshot", "num_train_epochs": 2},
        {"alpha": 1, "teacher": "history", "num_train_epochs": 3, "temperature": 2, "history_top_k": 3},
        {"alpha": 0.0, "temperature": 1.0},
        {"alpha": 0.5, "teacher": "ema", "ema_decay": 0.9},
    ):
        found = run(searched, **trial)
        assert difference(found, run(make(**trial))) == 0
    refused(lambda: run(searched, alpha=2), "alpha=2.0", "[0, 1]")
    assert difference(found, searched) == 0  # as before


def test_bfloat16_autocast(tmp_path):
    samples = make_samples("vit")
    plain = train(tmp_path, "vit", samples, trainer=Trainer, bf16=True)
    assert difference(plain, train(tmp_path, "vit", samples, alpha=0.0, bf16=True)) == 0
    assert difference(plain, train(tmp_path, "vit", samples, trainer=Trainer)) > 0
    for teacher in ("history", "snapshot", "ema"):
        trainer = train(tmp_path, "vit", samples, bf16=True, teacher=teacher)
        assert difference(plain, trainer) > 1e-4
        assert difference(trainer, train(tmp_path, "vit", samples, teacher=teacher)) < 0.1
    stored = train(tmp_path, "vit", samples, bf16=True).teacher.stored(range(22))
    torch.testing.assert_close(stored.sum(-1), torch.ones(22), rtol=0, atol=1e-6)


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_model_in_bfloat16(tmp_path, teacher):
    samples = make_samples("vit")
    in_half = Samples([item | {"pixel_values": item["pixel_values"].bfloat16()} for item in samples.items])
    plain = train(tmp_path, make_model("vit").bfloat16(), in_half, trainer=Trainer)
    trainer = train(tmp_path, make_model("vit").bfloat16(), in_half, teacher=teacher)
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    assert difference(plain, trainer) > 1e-4
    assert all(np.isfinite(logged(trainer, "loss")))
    if teacher == "history":  # log-probabilities are taken in float32
        torch.testing.assert_close(trainer.teacher.stored(range(22)).sum(-1), torch.ones(22), rtol=0, atol=1e-6)


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_activation_checkpointing_changes_nothing(tmp_path, teacher):
    samples = make_samples("vit")
    expected = train(tmp_path, "vit", samples, teacher=teacher)
    renamed = hasattr(TrainingArguments, "activation_checkpointing")  # transformers 5.23 and later
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    trainer = train(tmp_path, "vit", samples, teacher=teacher, **{name: True})
    assert getattr(trainer.model, f"is_{name}")
    assert difference(expected, trainer) < 1e-6


def test_collator_of_ours_without_mixing_changes_nothing(tmp_path):
    samples = make_samples("vit")
    trainer = train(tmp_path, "vit", samples, data_collator=SelfKDDataCollator(collate))
    assert difference(trainer, train(tmp_path, "vit", samples)) == 0


# PEFT


def lora(seed=0):
    model = make_model("vit", seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], lora_dropout=0.1)
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft
@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_peft_model(tmp_path, teacher):
    samples, options = make_samples("vit"), {"save_strategy": "steps", "save_steps": 8, "teacher": teacher}
    plain = train(tmp_path / "plain", lora(), samples, trainer=Trainer)
    assert difference(plain, train(tmp_path / "alpha 0", lora(), samples, alpha=0.0)) == 0
    whole = train(tmp_path / "whole", lora(), samples, **options)
    assert difference(plain, whole) > 1e-4
    folder = tmp_path / "whole/checkpoint-8"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    if teacher != "history":
        trainable = {name for name, p in whole.model.named_parameters() if p.requires_grad}
        assert whole.teacher.weights.keys() == trainable
        frozen = sum(p.numel() for p in whole.model.parameters() if not p.requires_grad)
        assert sum(t.numel() for t in load_file(folder / "_selfkd/teacher.safetensors").values()) < frozen
    resumed = train(tmp_path / "resumed", lora(), samples, resume=folder, **options)
    assert difference(whole, resumed) == 0


@pytest.mark.parametrize("max_steps, taught", [(4, False), (8, True)])
def test_stream_that_ends_in_its_first_pass_says_that_nothing_was_taught(tmp_path, caplog, max_steps, taught):
    options = {"teacher": "snapshot", "alpha_schedule": "linear_step", "max_steps": max_steps}
    train(tmp_path, "vit", Stream(make_samples("vit")), **options)
    assert ("never taught" not in caplog.text) == taught
