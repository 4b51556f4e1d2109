"""Classifiers of sentence-transformers and SetFit, trained by the loop and by the trainer, against a loop by hand."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, difference, make_model, make_trainer, refused
from loops import EPOCHS, Loop, sgd
from test_docs import make_tokenizer

from hf_selfkd import as_classifier


pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator  # noqa: E402
from sentence_transformers.sentence_transformer.losses import SoftmaxLoss  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SIZE, BATCH = 16, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny classifier, and its body alone, each with a tokenizer."""
    out, model = tmp_path_factory.mktemp("models"), make_model("plain_bert")
    for name, part in (("classifier", model), ("body", model.bert)):
        part.save_pretrained(out / name)
        make_tokenizer().save_pretrained(out / name)
    return out


def texts(size=SIZE):
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=size).tolist()

    def words(first):
        return " ".join(f"w{n}" for n in [first, *rng.integers(10, 26, size=3)])

    return [{"sentence1": words(label), "sentence2": words(9), "label": label} for label in labels]


def batches_of(collate):
    items = texts()
    ids = [torch.arange(start, start + BATCH) for start in range(0, SIZE, BATCH)]
    return [dict(collate([items[i] for i in some.tolist()])) | {"sample_id": some} for some in ids]


def cross_encoder(folder):
    torch.manual_seed(0)
    encoder = CrossEncoder(str(folder / "classifier"), device="cpu")

    def collate(items):
        made = encoder.preprocess([(item["sentence1"], item["sentence2"]) for item in items])
        made.pop("modality")
        return dict(made) | {"labels": torch.tensor([item["label"] for item in items])}

    def scores(batch):
        return encoder({name: value for name, value in batch.items() if name != "labels"})["scores"]

    return encoder, batches_of(collate), scores


def softmax_loss(folder):
    torch.manual_seed(0)
    body = SentenceTransformer(str(folder / "body"), device="cpu")
    loss = SoftmaxLoss(body, body.get_embedding_dimension(), CLASSES)
    batches = batches_of(SentenceTransformerDataCollator(body.preprocess))
    batches = [{("labels" if name == "label" else name): part for name, part in b.items()} for b in batches]

    def scores(batch):
        columns = ("sentence1", "sentence2")
        reps = [
            body({name[10:]: part for name, part in batch.items() if name.startswith(column)})["sentence_embedding"]
            for column in columns
        ]
        return loss.classifier(torch.cat([*reps, (reps[0] - reps[1]).abs()], 1))

    return loss, batches, scores


def setfit(folder):
    from setfit import SetFitModel

    torch.manual_seed(0)
    head = {"out_features": CLASSES}
    model = SetFitModel.from_pretrained(str(folder / "body"), use_differentiable_head=True, head_params=head)

    def collate(items):
        made = model.model_body.preprocess([item["sentence1"] for item in items])
        return dict(made) | {"labels": torch.tensor([item["label"] for item in items])}

    def scores(batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model.model_head(model.model_body(inputs))["logits"]

    return model, batches_of(collate), scores


def by_hand(parameters, batches, scores, alpha):
    optimizer, past = torch.optim.SGD(parameters, lr=0.05), {}
    for epoch in range(EPOCHS):
        weight, present = alpha * (epoch + 1) / EPOCHS, {}
        for batch in batches:
            ids = batch["sample_id"].tolist()
            logits = scores({name: value for name, value in batch.items() if name != "sample_id"})
            hard = F.one_hot(batch["labels"], CLASSES).float()
            target = (1 - weight) * hard + weight * torch.stack([past[i] for i in ids]) if past else hard
            optimizer.zero_grad()
            (-(target * logits.log_softmax(-1)).sum(-1).mean()).backward()
            optimizer.step()
            present |= dict(zip(ids, logits.detach().softmax(-1), strict=True))
        past = present


MAKERS = {"cross_encoder": cross_encoder, "softmax_loss": softmax_loss, "setfit": setfit}


@pytest.mark.parametrize("name", MAKERS)
def test_a_loop_by_hand_gives_the_same_weights(folder, name):
    if name == "setfit":
        pytest.importorskip("setfit")
    model, batches, scores = MAKERS[name](folder)
    classifier = as_classifier(model)
    initial = copy.deepcopy(classifier)
    by_hand(classifier.train().parameters(), batches, scores, 0.8)
    expected = copy.deepcopy(classifier)
    classifier.load_state_dict(initial.state_dict())
    by_hand(classifier.parameters(), batches, scores, 0.0)
    assert difference(classifier, expected) > 1e-5  # the past matters
    classifier.load_state_dict(initial.state_dict())
    classifier.zero_grad()
    Loop(classifier, {"teacher": "history", "alpha": 0.8}, batches, num_samples=SIZE).run()
    assert difference(classifier, expected) < 1e-6
    with torch.no_grad():  # what was given has learned
        given = scores({name: value for name, value in batches[0].items() if name != "sample_id"})
        inputs = {name: value for name, value in batches[0].items() if name not in ("labels", "sample_id")}
        found = classifier(**inputs)
    torch.testing.assert_close(found.logits, given)


def test_the_trainer_takes_them_too(folder, tmp_path):
    loss, _, _ = softmax_loss(folder)
    before = copy.deepcopy(loss)
    collator = SentenceTransformerDataCollator(loss.model.preprocess)
    options = {"label_names": ["label"], "remove_unused_columns": False, "teacher": "history"}
    classifier = as_classifier(loss)
    trainer = make_trainer(
        tmp_path, classifier, texts(), data_collator=collator, optimizers=(sgd(classifier), None), **options
    )
    trainer.train()
    assert difference(loss, before) > 1e-4
    assert trainer.teacher.stored(range(SIZE)).sum(-1) == pytest.approx(1.0, abs=1e-5)


def test_what_has_no_classes_is_refused(folder):
    scorer = CrossEncoder(str(folder / "body"), device="cpu", num_labels=1)
    refused(lambda: as_classifier(scorer), "num_labels=1", "at least 2")
    refused(lambda: as_classifier(make_model("plain_vit")), "ViTForImageClassification", "CrossEncoder")
    loss, batches, _ = softmax_loss(folder)
    one = {name: value for name, value in batches[0].items() if not name.startswith("sentence2")}
    refused(lambda: as_classifier(loss)(**one), "two sentences", "1", "SentenceTransformerDataCollator")


def test_a_head_without_gradients_is_refused(folder):
    setfit = pytest.importorskip("setfit")
    model = setfit.SetFitModel.from_pretrained(str(folder / "body"))
    refused(lambda: as_classifier(model), "use_differentiable_head=True")
    several = setfit.SetFitModel.from_pretrained(
        str(folder / "body"),
        use_differentiable_head=True,
        multi_target_strategy="one-vs-rest",
        head_params={"out_features": 2},
    )
    refused(lambda: as_classifier(several), "one-vs-rest", "multi_label_classification")
