"""A weight of the past that looks after itself: temperature, worth of the past, rule, held-out data, whole runs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import (
    Samples,
    SizedStream,
    Stream,
    collate,
    difference,
    logged,
    make_samples,
    make_trainer,
    refused,
    same_weights,
    train,
)
from test_resume import check_resume, saves
from transformers import TrainerCallback

from hf_selfkd import SelfKDConfig, with_sample_ids
from hf_selfkd.held_out import HeldOut, ids_of_part, select, shares
from hf_selfkd.metrics.mixture import Look, past_weight
from hf_selfkd.metrics.temperature import TemperatureFit, at_temperature
from hf_selfkd.schedule import CalibratedAlpha
from hf_selfkd.tasks.rows import Rows


pytestmark = pytest.mark.trains


CALIBRATED = {"alpha_schedule": "calibrated", "num_train_epochs": 3, "learning_rate": 0.02}


def fitted(logits, labels):
    """Log of the temperature that minimizes the likelihood, by an optimizer."""
    known = labels != -100
    logits, labels = logits[known].double(), labels[known]
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach())


# The temperature


@pytest.mark.parametrize("log_t", [-1.0, -0.35, 0.0, 0.07, 0.8, 1.3])
@pytest.mark.parametrize("classes", [2, 40])
def test_temperature_is_the_one_that_minimizes_the_likelihood(classes, log_t):
    torch.manual_seed(classes)
    calm = 2 * torch.randn(3000, classes)
    labels = torch.distributions.Categorical(logits=calm).sample()
    labels[::7] = -100
    logits = calm * math.exp(log_t)
    fit = TemperatureFit()
    for part in (slice(0, 1000), slice(1000, 1001), slice(1001, None)):
        fit.update(logits[part], labels[part])
    expected = fitted(logits, labels)
    assert abs(expected - log_t) < 0.15
    assert fit.log_temperature() == pytest.approx(expected, abs=0.01)


def test_temperature_of_what_cannot_be_fitted():
    logits, labels = torch.eye(5) * 3, torch.arange(5)
    right, wrong = TemperatureFit(), TemperatureFit()
    right.update(logits, labels)
    wrong.update(logits, labels.flip(0) + torch.tensor([0, 0, 1, 0, 0]))
    assert right.log_temperature() == -1.5 and wrong.log_temperature() == 1.5
    assert TemperatureFit().log_temperature() == 0
    for poison in (float("nan"), float("inf")):
        broken = TemperatureFit()
        broken.update(torch.full((2, 3), poison), torch.tensor([0, 1]))
        assert broken.log_temperature() == 0
    masked = TemperatureFit()
    masked.update(torch.tensor([[2.0, 0.0, -math.inf], [2.0, 0.0, -math.inf]]), torch.tensor([0, 1]))
    assert masked.log_temperature() == 1.5


def test_half_precision_counts_as_its_values():
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(500, 6).bfloat16(), torch.randint(6, (500,))
    fits = [TemperatureFit(), TemperatureFit()]
    fits[0].update(logits, labels)
    fits[1].update(logits.float(), labels)
    assert fits[0].log_temperature() == fits[1].log_temperature()


# The rule


def likeliest(now, before, points=20001):
    """Mean of the weight of `before`, each as likely at first, on a fine grid in NumPy."""
    weights = np.linspace(0, 1, points)
    now, before = (np.exp(part.double().numpy())[:, None] for part in (now, before))
    heights = np.log((1 - weights) * now + weights * before).sum(0)
    heights = np.exp(heights - heights.max())
    return np.average(weights, weights=heights)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("better", [-0.5, 0.0, 0.3])
def test_past_weight_is_the_mean_of_its_posterior(rows, better):
    generator = torch.Generator().manual_seed(rows)
    now, before = (torch.rand(rows, generator=generator).clamp_min(1e-3).log() for _ in range(2))
    before = (before + better).clamp_max(0)
    assert past_weight(now, before) == pytest.approx(likeliest(now, before), abs=1e-3)
    half = rows // 2
    parts = []
    for one in (slice(0, half), slice(half, None)):
        past_weight(now[one], before[one], lambda sums: parts.append(sums) or sums)
    shared = past_weight(now[:half], before[:half], lambda sums: parts[0] + parts[1])
    assert shared == pytest.approx(past_weight(now, before), abs=1e-6)


def test_past_weight_of_what_tells_nothing():
    same, nothing = torch.rand(50).log(), torch.zeros(0)
    assert past_weight(same, same) == pytest.approx(0.5) and past_weight(nothing, nothing) == pytest.approx(0.5)
    far = torch.full((400,), -20.0)
    assert past_weight(same[:1].expand(400), far) < 0.01 and past_weight(far, same[:1].expand(400)) > 0.99
    assert math.isnan(past_weight(same, torch.full((50,), math.nan)))


@pytest.mark.parametrize("log_t", [-3.0, -1.5, -0.1, 0.03, 1.5])
def test_log_probs_at_a_temperature(log_t):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(700, 900), torch.randint(900, (700,))
    found = at_temperature(TemperatureFit().update(logits, labels), log_t)
    expected = -F.cross_entropy(logits / math.exp(max(log_t, -1.5)), labels, reduction="none")
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert at_temperature(TemperatureFit().update(logits[:0], labels[:0]), log_t).shape == (0,)


def test_rule():
    alpha, half = CalibratedAlpha(0.8), torch.full((1000,), 0.5).log()
    assert alpha.value == 0 and alpha.is_due(0) and alpha.state() == {} == alpha.process_state() == alpha.figures()
    alpha.update(0, 10, Look(2.0, half))
    assert alpha.value == 0 and not alpha.is_due(0) and alpha.is_due(1)
    alpha.update(1, 10, Look(1.5, half))
    assert alpha.value == pytest.approx(0.8 * 2 / 10 / 2) and alpha.worth == pytest.approx(0.25)
    assert alpha.figures() == {"held_out_temperature": 1.5, "held_out_past_weight": alpha.worth}
    other = CalibratedAlpha(0.8)
    other.load(alpha.state(), alpha.process_state()["log_probs"])
    assert other.state() == alpha.state() and other.seen is half and not other.is_due(1) and other.is_due(2)
    alpha.update(2, 10, Look(1.5, half / 20))
    assert alpha.worth == pytest.approx(0.125, abs=0.005) and alpha.value == pytest.approx(0.8 * 0.3 / 4, abs=0.005)
    alpha.update(3, 10, Look(1.5, half))
    assert alpha.value == pytest.approx(0.8 * 4 / 10) and alpha.worth > 0.55
    worth = alpha.worth
    alpha.update(4, 10, Look(1.5, torch.full((1000,), math.nan)))
    assert alpha.worth == worth and alpha.value == pytest.approx(0.8 * 5 / 10)
    alpha.update(4, 10, Look(1.5, half[:900]))
    assert alpha.worth == worth and alpha.value == pytest.approx(0.8 * 5 / 10)
    other.load(alpha.state(), None)
    other.update(5, 10, Look(1.5, half / 20))
    assert other.worth == worth and other.value == pytest.approx(0.8 * 6 / 10)
    other.update(12, 10, Look(1.5, half / 20))
    assert other.worth == pytest.approx((worth + 0.5) / 2) and other.value == pytest.approx(0.8)


# Held-out data


@pytest.mark.parametrize("kind", ["list", "datasets", "with ids", "own ids"])
def test_split(kind):
    rows = [{"x": n, "uid": 100 + n} for n in range(40)]
    dataset = {
        "list": lambda: Samples(rows),
        "datasets": lambda: Dataset.from_list(rows),
        "with ids": lambda: with_sample_ids(Samples(rows)),
        "own ids": lambda: with_sample_ids(Samples(rows), "uid"),
    }[kind]()
    kept, held_out = shares(dataset, 0.2, seed=3)
    rest, part = select(dataset, kept), select(dataset, held_out)
    assert len(rest) == 32 and len(part) == 8
    of_rest, of_part = ([side[n]["x"] for n in range(len(side))] for side in (rest, part))
    assert sorted(of_rest + of_part) == list(range(40)) and of_rest == sorted(of_rest) and of_part == sorted(of_part)
    assert shares(dataset, 0.2, seed=3)[1].tolist() == of_part != shares(dataset, 0.2, seed=4)[1].tolist()
    if kind == "with ids":
        assert rest.ids.tolist() == of_rest
    if kind == "own ids":
        assert [rest[n]["sample_id"] for n in range(3)] == [100 + n for n in of_rest[:3]]
    column = "uid" if kind == "own ids" else None
    ids = ids_of_part(rest, kept, column)
    assert ids is None if kind == "with ids" else ids.tolist() == [n + 100 * (kind == "own ids") for n in of_rest]


def test_split_of_little():
    assert [len(part) for part in shares([1, 2, 3], 0.01, 0)] == [2, 1]
    refused(lambda: shares([1], 0.1, 0), "calibration_fraction=0.1", "at least 2", "eval_dataset")


@pytest.mark.parametrize("dataset", ["map", "stream"])
def test_processes_share_the_samples(dataset):
    torch.manual_seed(0)
    items = [{"x": 3 * torch.randn(4), "labels": int(label)} for label in torch.randint(4, (5000,))]
    data = Samples(items) if dataset == "map" else Stream(items)

    def rows_of(inputs):
        return Rows(inputs["x"], inputs["labels"])

    sums, looks = [], []
    for rank, processes in ((0, 1), (0, 3), (1, 3), (2, 3)):
        held = HeldOut(data, collate, 16, rank=rank, processes=processes)
        looks.append(held.look(rows_of, "cpu", lambda part: sums.append(part.clone()) or part).log_probs)
    assert [len(look) for look in looks] == [2048, 683, 683, 682]
    torch.testing.assert_close(sums[0], sum(sums[1:]))
    torch.testing.assert_close(looks[0].sort().values, torch.cat(looks[1:]).sort().values)


def test_tokens_are_thinned_out():
    items = [{"x": torch.randn(64, 3), "labels": torch.randint(3, (64,)).tolist()} for _ in range(256)]
    counted = []

    class Counting(TemperatureFit):
        def update(self, logits, labels):
            counted.append(len(labels))
            return super().update(logits, labels)

    held = HeldOut(Samples(items), collate, 8)
    rows_of = lambda inputs: Rows(inputs["x"].reshape(-1, 3), inputs["labels"].reshape(-1))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_selfkd.held_out.TemperatureFit", Counting)
        with pytest.raises(AttributeError):
            held.look(rows_of, "cpu", lambda sums: sums.nothing)
    assert sum(counted) == 2048


# Whole runs


class Watching(TrainerCallback):
    """Looks, before every epoch, at what is said of the labels of the evaluation set."""

    def __init__(self, samples, rows):
        self.samples, self.rows, self.temperatures, self.looks = samples, rows, [], []

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        model.eval()
        with torch.no_grad():
            logits, labels = self.rows(model, collate([self.samples[n] for n in range(len(self.samples))]))
        model.train()
        self.temperatures.append(min(max(fitted(logits, labels), -1.5), 1.5))
        known = labels != -100
        scores = logits[known].double() / math.exp(self.temperatures[-1])
        self.looks.append(-F.cross_entropy(scores, labels[known], reduction="none"))


def rows_of(model, batch):
    labels = batch.pop("labels")
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(**batch).logits
    if "CausalLM" in type(model).__name__ or "GPT2LM" in type(model).__name__:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
@pytest.mark.parametrize("name", ["plain_vit", "bert_tokens", "plain_gpt2", "plain_marian"])
def test_alpha_follows_the_evaluation_set(tmp_path, name, teacher):
    samples, held = make_samples(name, 12), make_samples(name, 20)
    watching = Watching(held, rows_of)
    trainer = make_trainer(
        tmp_path, name, samples, eval_dataset=held, teacher=teacher, callbacks=[watching], **CALIBRATED
    )
    trainer.train()
    weights = [likeliest(now, before) for before, now in zip(watching.looks, watching.looks[1:], strict=False)]
    worth = [0.0, weights[0] / 2, weights[0] / 4 + weights[1] / 2]
    expected = [0.8 * (epoch + 1) / 3 * min(2 * weight, 1) for epoch, weight in enumerate(worth)]
    assert logged(trainer, "alpha")[::3] == pytest.approx(expected, abs=0.01)
    assert logged(trainer, "held_out_past_weight")[::3] == pytest.approx(worth, abs=0.01)
    found = np.log(logged(trainer, "held_out_temperature")[::3])
    assert found == pytest.approx(watching.temperatures, abs=0.02)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("worth", [0.0, 1.0])
def test_a_past_that_is_worth_nothing_leaves_plain_training(tmp_path, monkeypatch, name, worth):
    """Bit for bit, dropout and statistics included; the control is one that is worth all."""
    monkeypatch.setattr("hf_selfkd.schedule.past_weight", lambda *looks: worth)
    samples = make_samples(name)
    plain = train(tmp_path, name, samples, alpha=0.0, num_train_epochs=3, learning_rate=0.02)
    ours = train(tmp_path, name, samples, eval_dataset=make_samples(name, 8), **CALIBRATED)
    assert same_weights(plain.model, ours.model) is (worth == 0)
    if worth > 0:
        linear = train(tmp_path, name, samples, **CALIBRATED | {"alpha_schedule": "linear"})
        assert ours.distiller.calibrated.value == pytest.approx(0.8) and difference(plain, ours) > 1e-4
        assert same_weights(linear.model, ours.model)


@pytest.mark.parametrize("teacher", ["history", "ema"])
def test_resume_is_exact(tmp_path, teacher):
    options = saves(2) | CALIBRATED | {"teacher": teacher, "eval_dataset": make_samples("vit", 16)}
    whole = check_resume(tmp_path, "vit", make_samples("vit"), [2, 4, 6, 8], **options)
    assert whole.distiller.calibrated.worth > 0


def test_a_share_of_the_training_set_is_held_out(tmp_path):
    samples, seen = make_samples("plain_vit", 40), set()

    class Recording(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.update(trainer.sample_ids.tolist() if trainer.sample_ids is not None else [])

    trainer = make_trainer(tmp_path, "plain_vit", samples, calibration_fraction=0.25, **CALIBRATED)
    trainer.add_callback(Recording())
    trainer.train()
    assert trainer.state.max_steps == 3 * math.ceil(30 / 4) and len(trainer.train_dataset) == 30
    assert logged(trainer, "held_out_temperature")
    images = [item["pixel_values"] for item in trainer.train_dataset]
    kept = [n for n in range(40) if any(torch.equal(samples[n]["pixel_values"], image) for image in images)]
    assert torch.isfinite(trainer.teacher.stored(kept)).all()  # ids are those of the dataset that was given
    refused(lambda: trainer.teacher.stored([min(set(range(40)) - set(kept))]), "out of range", "30 samples")


def test_resume_with_a_share_held_out(tmp_path):
    options = saves(4) | CALIBRATED | {"calibration_fraction": 0.25}
    check_resume(tmp_path, "vit", make_samples("vit", 32), [4, 8], **options)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["alpha_schedule='calibrated'", "no eval_dataset", "calibration_fraction=0.1"]),
        ({"eval_dataset": "dictionary"}, ["dictionary of several", "calibration_fraction=0.1"]),
    ],
)
def test_without_data_to_look_at(tmp_path, options, parts):
    samples = make_samples("vit", 8)
    options = {name: {"a": samples, "b": samples} for name in options}
    refused(lambda: make_trainer(tmp_path, "vit", samples, **options, **CALIBRATED), *parts)


def test_a_stream_cannot_be_split(tmp_path):
    stream = SizedStream(make_samples("vit", 8))
    options = CALIBRATED | {"calibration_fraction": 0.1, "teacher": "snapshot"}
    refused(lambda: make_trainer(tmp_path, "vit", stream, **options), "calibration_fraction=0.1", "SizedStream")
    trainer = make_trainer(
        tmp_path, "vit", stream, teacher="snapshot", eval_dataset=Stream(make_samples("vit", 8)), **CALIBRATED
    )
    trainer.train()
    assert logged(trainer, "held_out_temperature")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"calibration_fraction": 0.6, "alpha_schedule": "calibrated"}, ["calibration_fraction=0.6", "[0, 0.5]"]),
        ({"calibration_fraction": -0.1}, ["calibration_fraction=-0.1"]),
        ({"calibration_fraction": 0.1}, ["alpha_schedule='linear'", "'calibrated'"]),
        ({"alpha_schedule": "calibrated", "teacher": "rank"}, ["teacher='rank'", "'constant'"]),
        ({"alpha_schedule": "calibrated", "teacher_predictions": "x"}, ["teacher='predictions'", "'constant'"]),
    ],
)
def test_fields(tmp_path, options, parts):
    refused(lambda: SelfKDConfig(str(tmp_path), use_cpu=True, **options), *parts)


def test_without_distillation_nothing_is_asked_for(tmp_path):
    plain = train(tmp_path, "vit", make_samples("vit"), alpha=0.0)
    ours = train(tmp_path, "vit", make_samples("vit"), alpha=0.0, alpha_schedule="calibrated")
    assert same_weights(plain.model, ours.model)


def test_held_out_data_that_do_not_fit_are_found_before_the_first_step(tmp_path):
    held = [{"pixel_values": item["pixel_values"]} for item in make_samples("vit", 8).items]
    trainer = make_trainer(tmp_path, "vit", make_samples("vit"), eval_dataset=Samples(held), **CALIBRATED)
    with pytest.raises((KeyError, ValueError), match="labels"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_ids_of_a_column_are_those_of_the_dataset_that_was_given(tmp_path):
    samples = Samples([item | {"uid": n} for n, item in enumerate(make_samples("plain_vit", 40))])
    options = CALIBRATED | {"calibration_fraction": 0.25, "sample_id_column": "uid"}
    trainer = train(tmp_path, "plain_vit", samples, **options)
    kept = [trainer.train_dataset[n]["uid"] for n in range(30)]
    assert torch.isfinite(trainer.teacher.stored(kept)).all()


def test_a_stream_without_length_is_refused(tmp_path):
    options = CALIBRATED | {"eval_dataset": make_samples("vit", 8), "max_steps": 4}
    for teacher in ("auto", "snapshot"):
        options["teacher"] = teacher
        refused(
            lambda: make_trainer(tmp_path, "vit", Stream(make_samples("vit", 8)), **options),
            "alpha_schedule='calibrated'",
            "number of epochs",
            "linear_step",
        )


def test_a_share_that_is_asked_for_too_late(tmp_path):
    trainer = make_trainer(tmp_path, "vit", make_samples("vit", 8), eval_dataset=make_samples("vit", 8), **CALIBRATED)
    trainer.args.calibration_fraction = 0.25
    refused(trainer.train, "calibration_fraction=0.25", "after the trainer was made")
