"""What a user's own model may be and return: whatever the stock class trains."""

import pytest
import torch
import torch.nn.functional as F
from conformance import Linear, Points, classes, cross_entropy_of, with_each_class
from helpers import collate, make_model, make_samples, with_decoder_inputs
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput


pytestmark = pytest.mark.trains


NAMES = "bert bert_tokens vit resnet wav2vec2 gpt2 llama bert_mlm".split()
TINY = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"intermediate_size": 16, "max_position_embeddings": 16}
TEXT = {"vocab_size": 30, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


@pytest.mark.parametrize("name", NAMES)
@with_each_class("history")
def test_models_of_transformers(case, name, tmp_path):
    def script(case, folder):
        samples = make_samples(name, 10)
        if name == "gpt2":  # whose first label the stock class counts, though nothing is predicted there
            samples = [item | {"labels": [-100, *item["labels"][1:]]} for item in samples]
        return case.train(folder, make_model(name), samples, data_collator=collate, eval_dataset=samples)

    case.check(script, tmp_path)


@pytest.mark.parametrize("name", ["marian", "t5"])
@with_each_class("history")
def test_encoder_decoder_models(case, name, tmp_path):
    def script(case, folder):
        options = {"trainer": case.seq2seq, "config": case.seq2seq_config}
        options |= {"eval_strategy": "epoch", "predict_with_generate": True, "generation_max_length": 8}
        # Full batches only: the stock class gives a short one the weight of a full one.
        samples = make_samples(name, 8)
        return case.train(
            folder, make_model(name), samples, data_collator=with_decoder_inputs(), eval_dataset=samples, **options
        )

    case.check(script, tmp_path)


# Tasks that are trained while nothing is distilled, and refused by their name otherwise


def regression():
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=1))
    return model, [{"input_ids": [3 + n, 5, 6], "labels": n / 10} for n in range(10)]


def problem_of_regression():
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=2, problem_type="regression"))
    return model, [{"input_ids": [3 + n, 5, 6], "labels": [n / 10, 1.0]} for n in range(10)]


def multi_label():
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=3, problem_type="multi_label_classification"))
    return model, [{"input_ids": [3 + n, 5, 6], "labels": [1.0, n % 2, n % 3 == 0]} for n in range(10)]


def multi_label_by_its_labels():
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=3))
    return model, [{"input_ids": [3 + n, 5, 6], "labels": [1.0, float(n % 2), 0.0]} for n in range(10)]


def question_answering():
    model = BertForQuestionAnswering(BertConfig(**TINY))
    items = [{"input_ids": [3 + n, 5, 6, 7], "start_positions": n % 3, "end_positions": 3} for n in range(10)]
    return model, items


def multiple_choice():
    model = BertForMultipleChoice(BertConfig(**TINY))
    return model, [{"input_ids": [[3 + n, 5], [4, 6 + n % 5]], "labels": n % 2} for n in range(10)]


def mean_squares():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x, labels=None):
            prediction = self.layer(x)[:, 0]
            return (prediction,) if labels is None else (F.mse_loss(prediction, labels), prediction)

    return Regression(), Points(10, lambda x, y, index: {"x": x, "labels": float(y)})


def loss_only():
    class LossOnly(Linear):
        def forward(self, x, labels):
            return {"loss": super().forward(x, labels)["loss"]}

    return LossOnly(), Points()


def bare_loss():
    class BareLoss(Linear):
        def forward(self, x, labels):
            return super().forward(x, labels)["loss"][None]

    return BareLoss(), Points()


def one_of_a_tuple():
    class LossInATuple(Linear):
        def forward(self, x, labels):
            return (super().forward(x, labels)["loss"],)

    return LossInATuple(), Points()


def other_output_names():
    class Scores(Linear):
        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            return {"scores" if name == "logits" else name: value for name, value in outputs.items()}

    return Scores(), Points()


def no_labels():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return {"loss": F.mse_loss(self.layer(x), x)}

    return Autoencoder(), Points(10, lambda x, y, index: {"x": x})


def soft_labels():
    return Linear(), Points(10, lambda x, y, index: {"x": x, "labels": F.one_hot(torch.tensor(y), 3).float()})


UNSUPPORTED = {
    "regression": (("regression",), regression),
    "problem_type_regression": (("regression",), problem_of_regression),
    "multi_label_by_its_labels": (("multi-label",), multi_label_by_its_labels),
    "mean_squares": (("regression",), mean_squares),
    "loss_only": (("logits", "loss"), loss_only),
    "bare_loss": (("logits", "Tensor"), bare_loss),
    "loss_in_a_tuple": (("logits", "tuple"), one_of_a_tuple),
    "other_output_names": (("logits", "scores"), other_output_names),
    "no_labels": (("labels",), no_labels),
    "soft_labels": (("mixup_alpha",), soft_labels),
}


@pytest.mark.parametrize(("case", "make"), classes(UNSUPPORTED))
def test_tasks_that_cannot_be_distilled(case, make, tmp_path):
    def script(case, folder):
        set_seed(0)
        model, dataset = make()
        trainer = case.train(folder, model, dataset, eval_dataset=dataset)
        trainer.evaluate()
        return trainer

    case.check(script, tmp_path)


@pytest.mark.parametrize(("case", "make"), classes({name: UNSUPPORTED[name] for name in ("regression", "no_labels")}))
def test_accumulation_of_what_cannot_be_distilled(case, make, tmp_path):
    def script(case, folder):
        set_seed(0)
        return case.train(folder, *make(), gradient_accumulation_steps=2)

    case.check(script, tmp_path)  # to the bit: there is nothing that ours would count otherwise


# Models that can be distilled, though none of transformers' own


def tuples():
    class Tuples(Linear):
        def forward(self, x, labels=None):
            return tuple(super().forward(x, labels).values())

    return Tuples(), {}


def needs_labels():
    class NeedsLabels(Linear):
        def forward(self, x, labels):
            assert labels is not None
            return super().forward(x, labels)

    return NeedsLabels(), {}


def model_outputs():
    class Outputs(Linear):
        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            return SequenceClassifierOutput(outputs.get("loss"), outputs["logits"], hidden_states=(x,))

    return Outputs(), {}


def takes_anything():
    class TakesAnything(Linear):
        def forward(self, **inputs):
            return super().forward(inputs["x"], inputs.get("labels"))

    return TakesAnything(), {"remove_unused_columns": False}


def weighted():
    class Weighted(Linear):
        def forward(self, x, labels=None):
            logits = self.layer(x)
            if labels is None:
                return {"logits": logits}
            loss = F.cross_entropy(logits, labels, torch.tensor([0.5, 1.0, 2.0])) + self.layer.weight.square().sum()
            return {"loss": loss, "logits": logits}

    return Weighted(), {}


def leaves_the_loss_to_others():
    class NoLoss(Linear):
        def forward(self, x):
            return {"logits": self.layer(x)}

    return NoLoss(), {"compute_loss_func": cross_entropy_of, "label_names": ["labels"]}


def logits_in_a_tuple():
    class NoLoss(Linear):
        def forward(self, x):
            return (self.layer(x),)

    return NoLoss(), {"compute_loss_func": cross_entropy_of, "label_names": ["labels"]}


DISTILLED = {
    make.__name__: ("history", make)
    for make in (
        tuples,
        needs_labels,
        model_outputs,
        takes_anything,
        weighted,
        leaves_the_loss_to_others,
        logits_in_a_tuple,
    )
}


@pytest.mark.parametrize(("case", "make"), classes(DISTILLED))
def test_modules_of_ones_own(case, make, tmp_path):
    def script(case, folder):
        model, options = make()
        return case.train(folder, model, Points(), eval_dataset=Points(8), eval_strategy="epoch", **options)

    case.check(script, tmp_path)


TASKS = {
    make.__name__: (teacher, make)
    for teacher, make in (
        ("history", question_answering),
        ("history", multiple_choice),
        ("history", multi_label),
    )
}


@pytest.mark.parametrize(("case", "make"), classes(TASKS))
def test_tasks_that_can_be_distilled(case, make, tmp_path):
    def script(case, folder):
        set_seed(0)
        model, dataset = make()
        return case.train(folder, model, dataset, eval_dataset=dataset, eval_strategy="epoch")

    case.check(script, tmp_path)


@with_each_class(("logits", "Tensor"))
def test_bare_tensor_with_a_loss_function(case, tmp_path):
    class Bare(Linear):
        def forward(self, x):
            return self.layer(x)

    def script(case, folder):
        points = Points(10, lambda x, y, index: {"x": x, "label": y})  # a name that the collator makes "labels" of
        return case.train(folder, Bare(), points, compute_loss_func=cross_entropy_of)

    case.check(script, tmp_path)


@with_each_class("history")
def test_int32_labels(case, tmp_path):
    class Converts(Linear):
        def forward(self, x, labels=None):
            return super().forward(x, None if labels is None else labels.long())

    def script(case, folder):
        points = Points(10, lambda x, y, index: {"x": x, "labels": torch.tensor(y, dtype=torch.int32)})
        return case.train(folder, Converts(), points, eval_dataset=points, eval_strategy="epoch")

    case.check(script, tmp_path)


class Target(nn.Module):
    """A classifier whose labels have another name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x, target=None):
        logits = self.layer(x)
        return {"logits": logits} if target is None else {"loss": F.cross_entropy(logits, target), "logits": logits}


@with_each_class("history")
def test_label_names_of_ones_own(case, tmp_path):
    def script(case, folder):
        points = Points(10, lambda x, y, index: {"x": x, "target": y})
        options = {"label_names": ["target"], "eval_dataset": points, "eval_strategy": "epoch"}
        trainer = case.train(folder, Target(), points, **options)
        assert all("eval_loss" in entry for entry in trainer.state.log_history if "eval_runtime" in entry)
        return trainer, trainer.predict(points).label_ids.tolist()

    case.check(script, tmp_path)


@with_each_class(("label_names",))
def test_another_label_name_that_nobody_tells(case, tmp_path):
    def script(case, folder):
        return case.train(folder, Target(), Points(10, lambda x, y, index: {"x": x, "target": y}), label_names=[])

    case.check(script, tmp_path)


@with_each_class("history")
def test_labels_of_several_names(case, tmp_path):
    class TwoTasks(Linear):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(4, 2)

        def forward(self, x, labels=None, parity=None):
            logits, other = self.layer(x), self.other(x)
            if labels is None:
                return {"logits": logits, "other": other}
            loss = F.cross_entropy(logits, labels) + F.cross_entropy(other, parity)
            return {"loss": loss, "logits": logits, "other": other}

    def script(case, folder):
        points = Points(10, lambda x, y, index: {"x": x, "labels": y, "parity": y % 2})
        trainer = case.train(folder, TwoTasks(), points, label_names=["labels", "parity"])
        return trainer, [labels.tolist() for labels in trainer.predict(points).label_ids]

    case.check(script, tmp_path)


@with_each_class("history")
def test_a_pad_token_ends_the_text_of_a_classifier(case, tmp_path):
    def script(case, folder):
        set_seed(0)
        config = GPT2Config(**TEXT, num_labels=5)
        return case.train(
            folder, GPT2ForSequenceClassification(config), make_samples("texts", 10), data_collator=collate
        )

    case.check(script, tmp_path)


@with_each_class("history")
def test_frozen_parameters_stay(case, tmp_path):
    def script(case, folder):
        model = make_model("bert")
        model.bert.requires_grad_(False)
        before = {name: value.clone() for name, value in model.bert.state_dict().items()}
        trainer = case.train(folder, model, make_samples("bert", 10), data_collator=collate)
        assert all(torch.equal(value, before[name]) for name, value in model.bert.state_dict().items())
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_scaled_loss_over_several_micro_batches_of_unequal_length(case, tmp_path):
    """A model that counts its tokens itself: two micro-batches give what one batch of their size gives."""

    def script(case, folder, batch=4, accumulation=2):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        return case.train(folder, make_model("plain_gpt2"), make_samples("gpt2", 24), data_collator=collate, **options)

    case.check(script, tmp_path, close=1e-6)
    several, one = script(case, tmp_path / "several"), script(case, tmp_path / "one", 8, 1)
    for part, whole in zip(several.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "plain_gpt2"])
@with_each_class("history")
def test_micro_batches_of_equal_length(case, name, tmp_path):
    def script(case, folder):
        samples = make_samples(name, 24)
        if name == "plain_gpt2":
            samples = [
                {"input_ids": item["input_ids"][:3], "labels": [-100, 4, item["input_ids"][2]]} for item in samples
            ]
        options = {"gradient_accumulation_steps": 3, "optim": "sgd"}
        return case.train(folder, make_model(name), samples, data_collator=collate, **options)

    case.check(script, tmp_path, close=1e-5)
