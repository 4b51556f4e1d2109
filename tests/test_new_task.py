"""A task that the package does not know, written outside of it: classes in an order, told by thresholds."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, collate, difference, logged, make_model, make_samples, make_trainer, refused, train
from transformers import BertForSequenceClassification, TrainerCallback, ViTForImageClassification

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDTrainer, attach_auxiliary_heads
from hf_selfkd.heads import heads_of
from hf_selfkd.tasks import Rows, Task


pytestmark = pytest.mark.trains


class OrdinalClassification(Task):
    """The model gives K - 1 scores, each of passing the threshold to the next class."""

    name = "ordinal classification"
    num_classes = 5

    def rows(self, logits, labels):
        logits = logits.float()
        above, nothing = F.logsigmoid(logits).cumsum(-1), torch.zeros_like(logits[:, :1])
        reached = torch.cat((nothing, above), -1)
        stays = torch.cat((F.logsigmoid(-logits), nothing), -1)
        return Rows(reached + stays, labels.reshape(-1))


THRESHOLDS = {"plain_vit": 4, "plain_bert": 4}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def model_for(name):
    """A classifier of transformers with a score for each threshold."""
    config = make_model(name).config
    config.num_labels = THRESHOLDS[name]
    torch.manual_seed(0)
    return type(make_model(name))(config)


def naive_probabilities(scores):
    """By a loop over the classes."""
    result = []
    for row in scores.double():
        left, probs = 1.0, []
        for score in row.sigmoid():
            probs.append(left * (1 - score))
            left = left * score
        result.append(torch.stack([*probs, left]))
    return torch.stack(result)


class OrdinalTrainer(SelfKDTrainer):
    """A trainer of one's own for the task: the thresholds' loss of the model would be another one."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, task=OrdinalClassification, **keywords)


def test_the_task_is_short():
    assert len(inspect.getsource(OrdinalClassification).splitlines()) < 30


def test_rows_are_probabilities_of_all_classes():
    scores, labels = torch.randn(6, 4), torch.randint(5, (6,))
    rows = OrdinalClassification(model_for("plain_vit")).rows(scores, labels)
    torch.testing.assert_close(rows.logits.exp(), naive_probabilities(scores).float())
    torch.testing.assert_close(rows.logits.exp().sum(-1), torch.ones(6))


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_it_trains_with_every_teacher(tmp_path, name, teacher):
    options = {"trainer": OrdinalTrainer, **SGD}
    samples = make_samples(name)
    trainer = train(tmp_path, model_for(name), samples, teacher=teacher, **options)
    plain = train(tmp_path, model_for(name), samples, alpha=0.0, **options)
    assert trainer.teacher.kind == teacher and logged(trainer, "rows_with_history")[-1] == 1
    assert difference(trainer, plain) > 1e-4
    if teacher == "history":
        stored = trainer.teacher.stored(range(22))
        assert stored.shape == (22, 5)
        torch.testing.assert_close(stored.sum(-1), torch.ones(22))


def test_the_loss_is_that_of_a_naive_loop(tmp_path):
    """One epoch without a past, by hand."""
    samples, seen = make_samples("plain_vit", 8), []

    class Watching(OrdinalTrainer):
        def compute_loss(self, model, inputs, *arguments, **keywords):
            seen.append(self.sample_ids.tolist())
            return super().compute_loss(model, inputs, *arguments, **keywords)

    options = {"num_train_epochs": 1, "alpha": 0.0, **SGD}
    trained = train(tmp_path, model_for("plain_vit"), samples, trainer=Watching, **options)
    model = model_for("plain_vit")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for ids in seen:
        batch = collate([samples[n] for n in ids])
        probs = naive_probabilities(model(batch["pixel_values"]).logits)
        loss = -probs[torch.arange(len(ids)), batch["labels"]].log().mean()
        loss.float().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 2 and difference(model, trained) < 1e-6


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_it_trains_with_heads(tmp_path, teacher):
    """Heads give scores of the thresholds too, and learn from their own past."""
    heads = {"auxiliary_heads": "byot", "teacher": teacher}
    model = model_for("plain_bert")
    model.config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = type(model)(model.config)
    trainer = train(tmp_path, model, make_samples("plain_bert"), trainer=OrdinalTrainer, **heads)
    assert 0 <= logged(trainer, "head0_accuracy")[-1] <= 1 and logged(trainer, "head0_loss")


# Against closed forms


def ordinal(kind="images", layers=2):
    """A classifier of transformers, without dropout, with one output less than classes."""
    name = {"images": "plain_deep_vit", "texts": "plain_bert"}[kind]
    config = make_model(name).config
    config.num_labels, config.num_hidden_layers = CLASSES - 1, layers
    torch.manual_seed(3)
    model = {"images": ViTForImageClassification, "texts": BertForSequenceClassification}[kind](config)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    return model


SIZE, ALPHA = 16, 0.6


class AfterEpochs(TrainerCallback):
    """The probabilities of all samples after each epoch, of the model and of its heads."""

    def __init__(self, model, batch):
        self.model, self.batch, self.seen = model, batch, []
        self.look()

    @torch.no_grad()
    def look(self):
        heads, self.model = heads_of(self.model), self.model.eval()
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        if heads is None:
            logits = [self.model(**inputs).logits]
        else:
            with heads.watched():
                logits = [self.model(**inputs).logits, *heads.results.logits]
            heads.results = None
        self.model.train()
        self.seen.append([probabilities(part) for part in logits])

    def on_epoch_end(self, *arguments, **named):
        self.look()


def probabilities(logits):
    """The probabilities `[B, K]` of `K - 1` log-odds, one sample and class after the other."""
    rows = []
    for sample in logits.double().numpy():
        beyond = 1 / (1 + np.exp(-sample))
        rows.append([np.prod(beyond[:k]) * (1 - beyond[k]) for k in range(len(sample))] + [np.prod(beyond)])
    return np.array(rows)


def cross_entropy(targets, probs):
    """The mean over the samples, from their definitions."""
    return float(-(np.asarray(targets) * np.log(probs)).sum(axis=-1).mean())


def run(tmp_path, kind="images", epochs=3, **options):
    """All samples in one batch, so that the predictions of a step are those of a state of the weights."""
    samples, model = make_samples(kind, size=SIZE), ordinal(kind)
    trainer = make_trainer(
        tmp_path,
        model,
        samples,
        trainer=OrdinalTrainer,
        per_device_train_batch_size=SIZE,
        num_train_epochs=epochs,
        alpha=ALPHA,
        alpha_schedule="constant",
        **options,
    )
    watcher = AfterEpochs(model, collate([samples[i] for i in range(SIZE)]))
    trainer.add_callback(watcher)
    trainer.train()
    labels = [samples[i]["labels"] for i in range(SIZE)]
    assert set(labels) == set(range(CLASSES))
    return trainer, watcher.seen, np.eye(CLASSES)[labels]


def mixed(onehot, past, alpha=ALPHA):
    return (1 - alpha) * onehot + alpha * past


@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_it_learns_from_its_past(tmp_path, kind, teacher):
    """The target is `(1 - alpha) * onehot + alpha * past`, over K classes; what is stored are their probabilities."""
    trainer, seen, onehot = run(tmp_path, kind, teacher=teacher)
    states = [state[0] for state in seen]  # before the first step, and after each of the three
    past = states if teacher == "history" else states[1:]  # of the last visit, or of the last epoch's end
    expected = [cross_entropy(onehot, states[0])]
    expected += [cross_entropy(mixed(onehot, past[step]), states[step + 1]) for step in (0, 1)]
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    if teacher == "history":
        stored = trainer.teacher.stored(range(SIZE))
        assert stored.shape == (SIZE, CLASSES)
        np.testing.assert_allclose(stored.sum(-1).numpy(), 1, atol=1e-5)
        np.testing.assert_allclose(stored.numpy(), states[2], atol=1e-5)


def test_its_loss_is_exact_for_every_class(tmp_path):
    """The gradient too: two ways to one number, for labels at both ends."""
    logits = torch.randn(8, CLASSES - 1, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 0, 2])
    rows = OrdinalClassification(ordinal()).rows(logits, labels)
    np.testing.assert_allclose(rows.logits.exp().detach().numpy(), probabilities(logits.detach()), rtol=1e-6)
    (gradient,) = torch.autograd.grad(F.cross_entropy(rows.logits, labels, reduction="sum"), logits)
    steps = torch.arange(CLASSES - 1)  # a sample takes part in the decisions up to its class
    decides = (steps <= labels[:, None]).double()
    expected = decides * (torch.sigmoid(logits.detach()) - (steps < labels[:, None]).double())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("preset", ["deep_supervision", "byot"])
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_its_heads_learn_the_same_classes(tmp_path, preset, teacher):
    """Each head has as many outputs as the model, which the task turns into the same classes."""
    trainer, seen, onehot = run(tmp_path, epochs=2, auxiliary_heads=preset, teacher=teacher)
    heads = heads_of(trainer.model)
    assert {head.shape[1] for state in seen for head in state} == {CLASSES} and len(seen[0]) == 1 + len(heads.heads)
    if preset == "deep_supervision":  # the labels for every head, and nothing else
        weight = heads.config.hard_weight
        first = [cross_entropy(onehot, probs) for probs in seen[0]]
        assert logged(trainer, "loss")[0] == pytest.approx(first[0] + weight * sum(first[1:]), rel=1e-4)
        assert logged(trainer, "head0_loss")[1] < logged(trainer, "head0_loss")[0]
    before = attach_auxiliary_heads(ordinal(), preset, seed=trainer.args.seed).state_dict()
    assert not torch.equal(heads.heads[0].classifier.weight.cpu(), before["selfkd_heads.heads.0.classifier.weight"])
    right = [float((probs.argmax(-1) == onehot.argmax(-1)).mean()) for probs in seen[0][1:]]
    assert [logged(trainer, f"head{i}_accuracy")[0] for i in range(len(right))] == pytest.approx(right)


def softened(probs, temperature):
    powers = probs ** (1 / temperature)
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_its_heads_learn_from_their_past_and_from_the_model(tmp_path, teacher):
    """Labels, own past and divergence from the model, all over K classes, with their weights."""
    config = AuxiliaryHeadsConfig(
        head="linear", views="none", hard_weight=0.9, past_weight=0.5, deep_to_shallow_weight=0.1, temperature=3.0
    )
    trainer, seen, onehot = run(tmp_path, epochs=2, auxiliary_heads=config, teacher=teacher)
    past = seen[0] if teacher == "history" else seen[1]
    model, *heads = seen[1]
    expected = cross_entropy(mixed(onehot, past[0]), model)
    for own_past, probs in zip(past[1:], heads, strict=True):
        deep, shallow = softened(model, 3), softened(probs, 3)
        away = cross_entropy(deep, shallow) - cross_entropy(deep, deep)
        expected += 0.9 * cross_entropy(mixed(onehot, own_past, ALPHA / 2), probs) + 0.1 * 9 * away
    assert logged(trainer, "loss")[1] == pytest.approx(expected, rel=1e-4)


def test_training_goes_on(tmp_path):
    """Far below what chance gives, from labels and past alone."""
    trainer, seen, onehot = run(tmp_path, "texts", epochs=12, teacher="history")
    assert cross_entropy(onehot, seen[-1][0]) < 0.5 * cross_entropy(onehot, seen[0][0])
    assert np.mean(seen[-1][0].argmax(-1) == onehot.argmax(-1)) > 0.8


@pytest.mark.parametrize("options", [{}, {"auxiliary_heads": "byot", "evaluate_heads": True}], ids=["model", "heads"])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_its_evaluation_has_the_loss_of_its_rows(tmp_path, kind, options):
    """All K labels are told, the last included, of which the model has no logit."""
    samples, model = make_samples(kind, size=SIZE), ordinal(kind)
    trainer = make_trainer(
        tmp_path,
        model,
        samples,
        trainer=OrdinalTrainer,
        eval_dataset=samples,
        per_device_eval_batch_size=SIZE,
        **options,
    )
    metrics = trainer.evaluate()
    inputs = collate([samples[i] for i in range(SIZE)])
    onehot = np.eye(CLASSES)[inputs.pop("labels").tolist()]
    with torch.no_grad():
        probs = probabilities(trainer.model.eval()(**inputs).logits)
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(onehot, probs), rel=1e-5)
    assert trainer.predict(samples).predictions.shape == (SIZE, CLASSES - 1)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"auxiliary_heads": "lsskd"}, ("views='rotation'", "OrdinalClassification", "views='none'")),
        ({"alpha": 0.0, "label_smoothing_factor": 0.1}, ("label_smoothing_factor", "OrdinalClassification")),
    ],
)
def test_what_it_cannot_have_is_refused(tmp_path, options, parts):
    def start():
        make_trainer(tmp_path, ordinal(), make_samples("images"), trainer=OrdinalTrainer, **options).train()

    refused(start, *parts)
