"""A task that the package does not know, written outside of it: classes in an order, told by thresholds."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import collate, difference, logged, make_model, make_samples, train

from hf_selfkd import SelfKDTrainer
from hf_selfkd.tasks import Rows, Task


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
