"""BLEU and chrF against sacrebleu itself, token metrics against torchmetrics and closed forms."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torchmetrics.functional.classification import multiclass_calibration_error
from transformers import EvalPrediction, PreTrainedTokenizerFast

from hf_selfkd.metrics import calibration_metrics, compute_translation_metrics


WORDS = ["<pad>", "<s>", "</s>", *"the a cat sat on mat dog ran far away".split()]
REFERENCES = ["the cat sat on the mat", "a dog ran far away", "the dog sat"]
TRANSLATIONS = ["the cat sat on a mat", "a dog ran away", "the dog sat"]


@pytest.fixture
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows(texts, *, start=(), fill=-100, width=9):
    """Token ids [B, width] that end in `</s>`, then filled up."""
    ids = np.full((len(texts), width), fill)
    for row, text in zip(ids, texts, strict=True):
        tokens = [*start, *map(WORDS.index, text.split()), WORDS.index("</s>")]
        row[: len(tokens)] = tokens
    return ids


def expected_scores(translations=TRANSLATIONS, references=REFERENCES):
    return {
        "bleu": sacrebleu.corpus_bleu(translations, [references]).score,
        "chrf": sacrebleu.corpus_chrf(translations, [references]).score,
    }


@pytest.mark.parametrize("fill", [0, -100])
@pytest.mark.parametrize("start", [(), (0,), (1,)])
def test_generated_ids_against_sacrebleu(tokenizer, fill, start):
    compute = compute_translation_metrics(tokenizer)
    assert compute.signatures == {}
    labels = rows(REFERENCES, width=12)
    metrics = compute(EvalPrediction(rows(TRANSLATIONS, start=start, fill=fill), labels))
    expected = expected_scores()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["gen_len"] == (6 + 4 + 3) / 3
    assert all(type(value) is float for value in metrics.values()) and len(metrics) == 3
    assert compute.signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert compute.signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_perfect_and_empty_translations(tokenizer):
    compute = compute_translation_metrics(tokenizer)
    perfect = compute((rows(REFERENCES), rows(REFERENCES)))
    assert (perfect["bleu"], perfect["chrf"]) == pytest.approx((100, 100))
    empty = compute((np.full((3, 4), 2), rows(REFERENCES)))
    assert empty == {"bleu": 0, "chrf": 0, "gen_len": 0}


def test_one_bleu_by_hand(tokenizer):
    # As long as the reference, so no brevity penalty; all but the n-grams across the last two words are in it.
    compute = compute_translation_metrics(tokenizer)
    metrics = compute((rows(["cat sat on the mat the"]), rows(["the cat sat on the mat"])))
    assert metrics["bleu"] == pytest.approx(100 * (6 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_one_row_and_one_without_a_word(tokenizer):
    compute = compute_translation_metrics(tokenizer)
    assert compute((np.array([[-100, -100]]), rows(["the cat"])))["gen_len"] == 0
    metrics = compute((rows(["", "a dog ran far"]), rows(["cat", "a dog ran far"])))
    assert metrics["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(["", "a dog ran far"], [["cat", "a dog ran far"]]).score
    )


def test_other_word_boundaries(tokenizer):
    compute = compute_translation_metrics(tokenizer, bleu_tokenizer="char")
    bleu = compute((rows(TRANSLATIONS), rows(REFERENCES)))["bleu"]
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(TRANSLATIONS, [REFERENCES], tokenize="char").score)
    assert "tok:char" in compute.signatures["bleu"]


def test_tensors_and_tuples(tokenizer):
    compute = compute_translation_metrics(tokenizer)
    ids, labels = rows(TRANSLATIONS, fill=0), rows(REFERENCES)
    expected = compute((ids, labels))
    assert compute((torch.tensor(ids), torch.tensor(labels))) == expected
    assert compute(((ids, np.zeros((3, 2, 4))), labels)) == expected


def test_a_processor_decodes_with_its_tokenizer(tokenizer):
    processor = SimpleNamespace(tokenizer=tokenizer, batch_decode=tokenizer.batch_decode)
    pair = (rows(TRANSLATIONS), rows(REFERENCES))
    assert compute_translation_metrics(processor)(pair) == compute_translation_metrics(tokenizer)(pair)


def logits_and_labels(seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, (40, 6))
    logits = 2 * rng.normal(size=(40, 6, 7)).astype(np.float32)
    np.put_along_axis(logits, labels[..., None], rng.exponential(3, (40, 6, 1)), axis=2)
    labels[:, 4:] = np.where(rng.random((40, 2)) < 0.7, -100, labels[:, 4:])
    return logits, labels


def test_token_metrics_against_torchmetrics(tokenizer):
    logits, labels = logits_and_labels()
    metrics = compute_translation_metrics(tokenizer)(((logits, np.zeros((40, 3, 2))), labels))
    kept = torch.tensor(labels.reshape(-1) != -100)
    flat, targets = torch.tensor(logits.reshape(-1, 7))[kept], torch.tensor(labels.reshape(-1))[kept]
    ece = multiclass_calibration_error(flat.softmax(-1), targets, 7, 10, "l1").item()
    assert list(metrics) == ["token_nll", "token_ece", "token_accuracy", "perplexity"]
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["token_nll"]))
    assert metrics["token_ece"] == pytest.approx(100 * ece, abs=1e-3)
    assert metrics["token_nll"] == pytest.approx(torch.nn.functional.cross_entropy(flat, targets).item(), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx((flat.argmax(-1) == targets).float().mean().item())


def test_token_metrics_in_closed_form(tokenizer):
    # Every token has confidence 0.7; 3 of the 4 labelled ones are right.
    logits = np.log(np.tile([0.7, 0.2, 0.1], (1, 5, 1)))
    metrics = compute_translation_metrics(tokenizer)((logits, np.array([[0, 0, 0, 1, -100]])))
    assert metrics["token_nll"] == pytest.approx(-(3 * np.log(0.7) + np.log(0.2)) / 4)
    assert metrics["token_ece"] == pytest.approx(5) and metrics["token_accuracy"] == 0.75


@pytest.mark.parametrize("kind", ["ids", "logits"])
def test_batches_equal_one_call(tokenizer, kind):
    predictions, labels = (rows(TRANSLATIONS), rows(REFERENCES)) if kind == "ids" else logits_and_labels()
    compute = compute_translation_metrics(tokenizer)
    for _ in range(2):  # the second evaluation must not see the first
        assert compute((predictions[:1], labels[:1]), compute_result=False) == {}
        assert compute((predictions[1:2], labels[1:2]), compute_result=False) == {}
        metrics = compute((predictions[2:], labels[2:]), compute_result=True)
        assert metrics == compute_translation_metrics(tokenizer)((predictions, labels))
    compute((predictions[:1], labels[:1]), compute_result=False)
    compute.reset()
    assert compute((predictions, labels), compute_result=True) == metrics


def test_batches_of_two_kinds_are_refused(tokenizer):
    compute = compute_translation_metrics(tokenizer)
    compute(logits_and_labels(), compute_result=False)
    with pytest.raises(ValueError, match="^predictions: token ids in one batch and logits in another"):
        compute((rows(TRANSLATIONS), rows(REFERENCES)), compute_result=True)
    assert compute((rows(TRANSLATIONS), rows(REFERENCES)))["bleu"] > 0


@pytest.mark.parametrize("kind", ["ids", "logits"])
def test_batches_that_the_trainer_does_not_join(tokenizer, kind):
    compute = compute_translation_metrics(tokenizer)
    if kind == "ids":
        whole = rows(TRANSLATIONS), rows(REFERENCES)
        batches = [rows(TRANSLATIONS[:2], width=7), rows(TRANSLATIONS[2:], width=5)]
        labels = [rows(REFERENCES[:2], width=8), rows(REFERENCES[2:], width=4)]
    else:
        whole = logits_and_labels()
        batches = [whole[0][:30], torch.tensor(whole[0][30:])]
        labels = [whole[1][:30], torch.tensor(whole[1][30:])]
    expected = compute(whole)
    assert compute((batches, labels)) == expected
    assert compute(([(batch, None) for batch in batches], labels)) == expected
    assert compute(((None, whole[0]), whole[1])) == expected


def test_tokens_of_probability_zero(tokenizer):
    logits, labels = logits_and_labels()
    labels[labels == 6] = 0
    logits[..., 6] = -np.inf
    metrics = compute_translation_metrics(tokenizer)((logits, labels))
    assert metrics == compute_translation_metrics(tokenizer)((logits[..., :6], labels))
    labels[0, 0] = 6
    assert compute_translation_metrics(tokenizer)((logits, labels))["perplexity"] == np.inf


@pytest.mark.parametrize("batched", [False, True])
def test_without_labels_the_metrics_are_nan_with_one_warning(tokenizer, batched, caplog):
    cases = [
        (np.zeros((3, 4, 5)), np.full((3, 4), -100), ["token_nll", "token_ece", "token_accuracy", "perplexity"]),
        (np.full((3, 4, 5), np.nan), np.ones((3, 4), int), ["token_nll", "token_ece", "token_accuracy", "perplexity"]),
        (rows(TRANSLATIONS), np.full((3, 4), -100), ["bleu", "chrf"]),
        (np.zeros((0, 4), int), np.zeros((0, 4), int), ["bleu", "chrf", "gen_len"]),
    ]
    for predictions, labels, missing in cases:
        compute = compute_translation_metrics(tokenizer)
        if batched:
            compute((predictions[:1], labels[:1]), compute_result=False)
            metrics = compute((predictions[1:], labels[1:]), compute_result=True)
        else:
            metrics = compute((predictions, labels))
        assert [name for name, value in metrics.items() if np.isnan(value)] == missing
        assert len(caplog.records) == 1
        caplog.clear()


def test_a_sentence_without_labels_has_no_reference(tokenizer):
    labels = rows(REFERENCES)
    labels[1] = -100
    metrics = compute_translation_metrics(tokenizer)((rows(TRANSLATIONS), labels))
    expected = expected_scores(TRANSLATIONS[::2], REFERENCES[::2])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["gen_len"] == (6 + 4 + 3) / 3


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (np.zeros((3, 4), int), np.zeros((2, 4), int), "labels: 2 rows for 3 predictions; pass one for each"),
        (np.zeros((3, 4)), np.zeros((3, 4), int), r"predictions: shape \(3, 4\) and dtype float64 are no token ids"),
        (np.zeros((3, 4), int), None, "labels: None; pass the labels"),
        ([[1, 2], [3]], np.zeros((2, 4), int), "predictions: got list that is no array of numbers"),
    ],
)
def test_bad_input_is_one_clear_line(tokenizer, predictions, labels, message):
    with pytest.raises(ValueError, match="^" + message) as caught:
        compute_translation_metrics(tokenizer)((predictions, labels))
    assert "\n" not in str(caught.value)


def test_what_cannot_decode_is_refused():
    with pytest.raises(ValueError, match="^processing_class: NoneType has no batch_decode; pass the tokenizer.$"):
        compute_translation_metrics(None)


def test_without_sacrebleu(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    compute = compute_translation_metrics(tokenizer)
    assert compute(logits_and_labels())["token_nll"] == calibration_metrics(*logits_and_labels())["nll"]
    with pytest.raises(ImportError, match=r'^sacrebleu is not installed: pip install "hf_selfkd\[translation\]"$'):
        compute((rows(TRANSLATIONS), rows(REFERENCES)))
