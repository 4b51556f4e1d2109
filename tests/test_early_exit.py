"""Early exit: the answers of a run at full depth, without the work; and promises that are kept."""

import json
import math

import numpy as np
import pytest
import torch
from early_models import CLASSES, MODELS, batch, make
from helpers import make_model, refused, same_weights
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline

from hf_selfkd import EarlyExit, attach_auxiliary_heads, strip_auxiliary_heads
from hf_selfkd.early_exit.risk import NEVER, first_sure, laxest_shown, levels, most_failures, upper_bound
from hf_selfkd.heads.auxiliary import heads_of


FLOPS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
HEADS = {"images": ("native", "conv", "mlp", "linear"), "texts": ("native", "mlp"), "sounds": ("native", "linear")}
CASES = [
    (name, head) for name, model in MODELS.items() for head in HEADS[model[3]] if (name, head) != ("deberta", "native")
]


def small(name):
    """A batch to measure on, where the made-up one is large."""
    return batch(name, 3, seed=2) if MODELS[name][3] == "sounds" else None


def reference(model, inputs, thresholds, temperatures=None):
    """Every head at full depth, one sample after the other: the first that is sure."""
    heads = heads_of(model)
    with torch.no_grad(), heads.watched():
        logits = model(**inputs).logits
    depth = len(heads.layout.layers)
    said = [(exit, part) for exit, part in zip(heads.exits, heads.results.logits, strict=True) if exit < depth]
    said.append((depth, logits))
    answers, exits = [], []
    for row in range(len(logits)):
        for place, (exit, part) in enumerate(said):
            scores = heads.class_logits(part[row]) if exit < depth else part[row]
            scores = scores / (1.0 if temperatures is None else temperatures[place])
            if exit == depth or float(scores.softmax(-1).max()) >= thresholds[place]:
                break
        answers.append(scores)
        exits.append(exit)
    return torch.stack(answers), torch.tensor(exits)


def between(early, inputs, temperatures=None):
    """Thresholds at which some samples leave at each exit, and which no probability is close to."""
    heads, found = heads_of(early.model), []
    with torch.no_grad(), heads.watched():
        early.model(**inputs)
    for place, index in enumerate(early.indices):
        scores = heads.class_logits(heads.results.logits[index]) / (temperatures[place] if temperatures else 1.0)
        sure = scores.softmax(-1).amax(-1).sort().values
        gaps = sure.diff()[1:-1]
        cut = 1 + int(gaps.argmax())
        found.append(float(sure[cut : cut + 2].mean()))
    return found


def check(early, inputs, temperatures=None):
    outputs = early(**inputs)
    answers, exits = reference(early.model, inputs, early.thresholds, temperatures)
    assert torch.equal(outputs.exits, exits)
    torch.testing.assert_close(outputs.logits, answers, atol=1e-5, rtol=1e-5)
    return outputs


class Rows:
    """Counts the samples that layers really work on: what is replayed does not reach the modules inside of them."""

    def __init__(self, model):
        self.seen, self.handles = {}, []
        for layer in heads_of(model).layout.layers:
            inner = next(m for m in model.get_submodule(layer).modules() if isinstance(m, (nn.LayerNorm, nn.Conv2d)))
            self.handles.append(inner.register_forward_hook(lambda m, args, out, layer=layer: self.note(layer, out)))

    def note(self, layer, out):
        self.seen[layer] = self.seen.get(layer, 0) + len(out)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name, head", CASES)
def test_answers_are_those_of_a_run_at_full_depth(name, head):
    model = make(name, head, inputs=small(name))
    early, inputs = EarlyExit(model, inputs=small(name)), batch(name)
    early.thresholds = between(early, inputs)
    outputs = check(early, inputs)
    assert len(set(outputs.exits.tolist())) > 1  # or nothing was cut
    order = torch.tensor([4, 2, 0, 6, 5, 1, 3])
    permuted = early(**{key: value[order] for key, value in inputs.items()})
    assert torch.equal(permuted.exits, outputs.exits[order])
    torch.testing.assert_close(permuted.logits, outputs.logits[order], atol=1e-5, rtol=1e-5)
    for rows in (1, 2):
        check(early, {key: value[:rows] for key, value in inputs.items()})
    early.thresholds = [NEVER] * len(early.indices)
    with torch.no_grad():
        torch.testing.assert_close(early(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    early.thresholds = [0.0] * len(early.indices)
    assert early(**inputs).exits.tolist() == early.exits[:1] * 7


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("wav2vec2", "wavlm", "bart", "llama", "convnext")]
)
def test_layers_run_for_the_samples_that_remain(name):
    early, inputs = EarlyExit(make(name, "mlp")), batch(name)
    early.thresholds = between(early, inputs)
    with Rows(early.model) as rows:
        outputs = early(**inputs)
    layers = heads_of(early.model).layout.layers
    assert [rows.seen.get(layer, 0) for layer in layers] == [
        int((outputs.exits > place).sum()) for place in range(len(layers))
    ]
    early.thresholds = [0.0] * len(early.indices)
    with Rows(early.model) as rows:
        early(**inputs)
    assert rows.seen == {layers[0]: 7}
    assert early.shares()[early.exits[-1]] < 0.5


@pytest.mark.parametrize("views", ["none", "rotation"])
def test_rotations_are_summed_over_and_temperatures_count(views):
    model = make("vit", "conv", views=views, layers=[0, 1, 2])
    early, temperatures = EarlyExit(model), [0.5, 2.0, 3.0]
    assert early.exits == [1, 2, 3]  # the head on the last layer is no exit
    early = EarlyExit(model, between(early, batch("vit"), temperatures), temperatures)
    outputs = check(early, batch("vit"), temperatures)
    assert outputs.logits.shape == (7, CLASSES)


def test_a_head_is_asked_once_and_only_of_samples_that_have_come_to_it():
    early, inputs, asked = EarlyExit(make("vit", "linear")), batch("vit"), []
    early.thresholds = between(early, inputs)
    for head in heads_of(early.model).heads:
        head.register_forward_hook(lambda module, args, output: asked.append(len(output[0])))
    exits = early(**inputs).exits
    assert asked == [7, int((exits > 1).sum())]


def test_other_arguments_are_measured_when_they_come():
    early, inputs = EarlyExit(make("bert")), batch("bert")
    early.thresholds = between(early, inputs)
    check(
        early, inputs | {"token_type_ids": torch.randint(0, 2, (7, 9)), "position_ids": torch.arange(9).expand(7, 9)}
    )
    check(early, {"input_ids": inputs["input_ids"], "position_ids": torch.arange(9).unsqueeze(0)})
    check(early, {"inputs_embeds": early.model.get_input_embeddings()(inputs["input_ids"]).detach()})
    assert len(early._plans) == 4


@FLOPS
def test_adapters_of_peft_take_part(tmp_path):
    from peft import LoraConfig, get_peft_model

    bare = strip_auxiliary_heads(make("bert"))
    model = get_peft_model(bare, LoraConfig(target_modules=["query", "value"], init_lora_weights=False)).eval()
    early = EarlyExit(attach_auxiliary_heads(model, "exits"))
    early.thresholds = between(early, batch("bert"))
    assert len(set(check(early, batch("bert")).exits.tolist())) > 1
    refused(lambda: early.save_pretrained(tmp_path), "merge_and_unload")


def test_shares_are_counted_until_they_are_reset():
    early = EarlyExit(make("vit"), 0.0)
    assert early.shares() == {1: 0.0, 2: 0.0, 3: 0.0}
    early(**batch("vit"))
    early.thresholds = [NEVER] * 2
    early(**batch("vit", 1))
    assert early.shares() == {1: 7 / 8, 2: 0.0, 3: 1 / 8}
    early.reset()
    assert sum(early.shares().values()) == 0


def hooks_and_forwards(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]


def test_the_model_is_as_before_even_after_an_error():
    model = make("vit").train()
    before, modes = hooks_and_forwards(model), [module.training for module in model.modules()]
    early = EarlyExit(model, 0.5)
    assert [module.training for module in model.modules()] == modes
    refused(lambda: early(**batch("vit")), "training mode", ".eval()")
    early.eval()
    with torch.no_grad():
        expected = model(**batch("vit")).logits
    early(**batch("vit"))
    assert hooks_and_forwards(model) == before

    def fail(*args):
        raise RuntimeError("no more memory")

    handle = heads_of(model).heads[1].register_forward_pre_hook(fail)
    early.thresholds = [NEVER] * 2
    with pytest.raises(RuntimeError, match="no more memory"):
        early(**batch("vit"))
    handle.remove()
    assert hooks_and_forwards(model) == before
    heads = heads_of(model)
    assert not heads.recorder.on and not heads.recorder.outputs and heads.results is None and not heads.watching
    with torch.no_grad():
        assert torch.equal(model(**batch("vit")).logits, expected)
    assert "auxiliary" in model.train()(**batch("vit"))


class Mixing(nn.Module):
    """Says of a sample what depends on the others."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.out(x - x.mean(dim=0))}


class Skipping(Mixing):
    """The last layer's output is not all that is used: that of the first one is, too."""

    def forward(self, x):
        x = first = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return {"logits": self.out(x * first)}


def of_our_own(kind):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 6)}
    return attach_auxiliary_heads(kind().eval(), "deep_supervision", inputs=inputs), inputs


def test_samples_that_are_not_kept_apart_are_refused():
    model, inputs = of_our_own(Mixing)
    refused(lambda: EarlyExit(model, inputs=inputs), "something else of a sample", "one sample at a time")


def test_outputs_of_earlier_layers_are_kept_where_they_are_needed():
    model, inputs = of_our_own(Skipping)
    early = EarlyExit(model, inputs=inputs)
    assert [plan.chain for plan in early._plans.values()] == [set()]
    x = torch.randn(7, 6)
    early.thresholds = [0.3] * len(early.indices)
    with torch.no_grad():
        full = model(x=x)["logits"]
    outputs = early(x)
    last = outputs["exits"] == 3
    assert 0 < last.sum() < 7
    torch.testing.assert_close(outputs["logits"][last], full[last])


@pytest.mark.parametrize(
    "name, parts", [("bert_tokens", ("every position", "one prediction")), ("gpt2", ("every position",))]
)
def test_other_tasks_are_refused(name, parts):
    refused(lambda: EarlyExit(attach_auxiliary_heads(make_model(name), "byot")), *parts)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("regression", "single_label_classification"), ("multi_label_classification", "multi-label classification")],
)
def test_other_problems_are_refused(kind, part):
    model = make("vit")
    model.config.problem_type = kind
    refused(lambda: EarlyExit(model), part)


def test_what_makes_no_sense_is_refused():
    bare = make_model("plain_deep_vit").eval()
    refused(lambda: EarlyExit(bare), "no auxiliary heads", "auxiliary_heads='exits'")
    refused(lambda: EarlyExit(make("vit", "stages")), "head='stages'", "another head")
    refused(lambda: EarlyExit(make("vit", "conv", views="rotation", layers=[2])), "before its last layer")
    model, images = make("vit"), batch("vit")
    refused(lambda: EarlyExit(model, [0.5]), "thresholds=[0.5]", "2 finite numbers")
    refused(lambda: EarlyExit(model, math.nan), "thresholds=nan")
    refused(lambda: EarlyExit(model, 0.5, [1.0, 0.0, 1.0]), "temperatures", "positive")
    early = EarlyExit(model)
    refused(lambda: early(**images), "no thresholds", "calibrate")
    early.thresholds = [0.5, 0.5]
    refused(lambda: early(**images, labels=torch.zeros(7)), "labels", "leave it out")
    refused(lambda: early(**images, output_hidden_states=True), "output_hidden_states")
    refused(lambda: early(**images, return_dict=False), "return_dict")
    refused(lambda: early(pixel_values=[images["pixel_values"]]), "pixel_values is a list")
    without = make("gpt2")
    without.config.pad_token_id = None
    refused(lambda: EarlyExit(without), "does not run on 3 samples", "padding token", "inputs=")


# Thresholds and what they promise


def test_bounds_are_exact():
    """Against sums of the binomial distribution, and the rule of three."""
    for samples, rate in ((50, 0.1), (400, 0.05), (7, 0.5)):
        chances = [math.comb(samples, k) * rate**k * (1 - rate) ** (samples - k) for k in range(samples + 1)]
        allowed = most_failures(samples, rate, 0.95)
        assert sum(chances[: allowed + 1]) <= 0.05 < sum(chances[: allowed + 2])
    assert most_failures(10, 0.05, 0.95) == -1
    assert upper_bound(0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert upper_bound(100, 100, 0.95) == 1.0
    assert (
        upper_bound(most_failures(400, 0.05, 0.95), 400, 0.95)
        <= 0.05
        < upper_bound(most_failures(400, 0.05, 0.95) + 1, 400, 0.95)
    )


def draw(rng, samples):
    """Confidences of two exits, and how probably they and the model are right: the surer the more, but too sure."""
    ease = rng.random(samples)
    chance = 0.35 + 0.65 * ease**0.5 * np.array([[0.6], [0.8], [1.0]])
    sure = np.clip(chance[:2] + rng.normal(0, 0.1, (2, samples)) + 0.1, 0.2, 1.0)
    return torch.tensor(sure), torch.tensor(chance)


@pytest.mark.parametrize("target", ["accuracy", "loss"])
def test_the_promise_is_kept_as_often_as_is_promised(target):
    """120 draws of validation data; a rule without a bound breaks the promise far more often."""
    rng = np.random.default_rng(0)
    grid, draws = levels(CLASSES), 120

    def share(sure, fails, level):
        return float(fails.gather(0, first_sure(sure, level).unsqueeze(0)).double().mean())

    sure, chance = draw(rng, 10_000)
    expected = 1 - chance if target == "accuracy" else chance[-1] * (1 - chance)
    if target == "loss":
        expected[-1] = 0  # the model against itself
    truth = {level: share(sure, expected, level) for level in grid}
    coarse = grid[::5]
    wanted = next(level for level in coarse if truth[level] > (0.3 if target == "accuracy" else 0.05))
    rate, broken, naive, left = 0.98 * truth[wanted], 0, 0, 0  # which that threshold just does not keep
    for _ in range(draws):
        sure, chance = draw(rng, 500)
        right = torch.tensor(rng.random((3, 500))) < chance
        fails = ~right if target == "accuracy" else right[-1] & ~right
        chosen = laxest_shown(sure, fails, rate, 0.9, CLASSES)
        broken += chosen is not None and truth[chosen] > rate
        left += chosen is not None and chosen < NEVER
        fitting = [level for level in coarse if share(sure, fails, level) <= rate]
        naive += bool(fitting) and truth[fitting[-1]] > rate
    slack = 3 * math.sqrt(0.1 * 0.9 / draws)
    assert broken / draws <= 0.1 + slack < naive / draws
    assert left / draws > 0.5  # the promise is not kept by never leaving


def validation(early, name="vit", count=12, flips=0.1):
    """Batches whose labels are the model's answers, some of them changed."""
    found = []
    for seed in range(count):
        inputs = batch(name, 25, seed=10 + seed)
        with torch.no_grad():
            labels = early.model(**inputs).logits.argmax(-1)
        noise = torch.rand(25, generator=torch.Generator().manual_seed(seed)) < flips
        found.append(inputs | {"labels": torch.where(noise, (labels + 1) % CLASSES, labels)})
    return found


@FLOPS
def test_calibration_finds_temperatures_and_thresholds():
    early = EarlyExit(make("vit"))
    data = validation(early)
    data[0]["labels"][3] = -100
    summary = early.calibrate(data, target_accuracy=0.6)
    assert early.summary is summary and early.thresholds == summary.thresholds
    assert summary.samples + summary.temperature_samples == 299 and summary.temperature_samples == 60
    assert summary.accuracy > 0.6 and summary.whole_accuracy == pytest.approx(0.9, abs=0.06)
    assert sum(summary.shares) == pytest.approx(1) and summary.shares[0] > 0
    assert summary.cost == pytest.approx(sum(s * c for s, c in zip(summary.shares, summary.costs, strict=True)))
    assert summary.costs[0] < summary.costs[1] < 1 <= summary.costs[2] < 1.1
    assert "95.00%" in summary.guarantee and "at least 60.00% of samples" in summary.guarantee
    early.reset()
    for part in data:
        early(**{name: value for name, value in part.items() if name != "labels"})
    assert list(early.shares().values()) == pytest.approx(summary.shares, abs=0.06)  # of all, not of most samples

    strict = early.calibrate(data, max_accuracy_loss=0.03)
    assert strict.whole_accuracy - strict.accuracy <= 0.03 and "at most 3.00%" in strict.guarantee
    assert strict.thresholds[0] > summary.thresholds[0]
    cheap = early.calibrate(data, target_cost=0.7)
    assert cheap.cost <= 0.7 and "nothing is promised" in cheap.guarantee


@FLOPS
def test_what_cannot_be_shown_is_an_error():
    early = EarlyExit(make("vit"), 0.7)
    data = validation(early)
    refused(lambda: early.calibrate(data, target_accuracy=0.97), "cannot be shown", "of 240 samples", "below")
    refused(
        lambda: early.calibrate(data, max_accuracy_loss=0.001), "240 samples cannot show it", "more validation data"
    )
    refused(lambda: early.calibrate(data, target_cost=0.1), "target_cost=0.1", "the cost of the first exit")
    refused(lambda: early.calibrate(data), "one of target_accuracy", "none")
    refused(lambda: early.calibrate(data, target_accuracy=0.5, target_cost=0.5), "target_accuracy, target_cost")
    refused(lambda: early.calibrate(data, target_accuracy=80), "target_accuracy=80", "between 0 and 1")
    refused(lambda: early.calibrate([batch("vit")], target_cost=0.5), "'labels'")
    refused(lambda: early.calibrate([], target_cost=0.5), "no sample with a label")
    refused(lambda: early.calibrate([data[0] | {"labels": torch.rand(25)}], target_cost=0.5), "one class a sample")
    assert early.thresholds == [0.7, 0.7] and early.temperatures == [1.0] * 3 and early.summary is None


@FLOPS
def test_datasets_and_loaders_are_taken():
    from datasets import Dataset

    early = EarlyExit(make("bert"))
    parts = validation(early, "bert", 4)
    rows = [{name: value[row].tolist() for name, value in part.items()} for part in parts for row in range(25)]
    summaries = [
        early.calibrate(data, target_cost=0.8, batch_size=25)
        for data in (parts, Dataset.from_list(rows), torch.utils.data.DataLoader(rows, 10, collate_fn=stacked))
    ]
    assert all(summary.samples == 80 for summary in summaries)
    for summary in summaries[1:]:
        assert summary.thresholds == pytest.approx(summaries[0].thresholds)
        assert summary.temperatures == pytest.approx(summaries[0].temperatures, rel=1e-4)


def stacked(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


# Folders and pipelines


@FLOPS
def test_saved_and_loaded(tmp_path):
    early = EarlyExit(make("vit"))
    early.calibrate(validation(early), target_cost=0.7)
    early.save_pretrained(tmp_path)
    loaded = EarlyExit.from_pretrained(tmp_path)
    assert loaded.summary == early.summary and loaded.thresholds == early.thresholds
    expected, found = early(**batch("vit")), loaded(**batch("vit"))
    assert torch.equal(found.exits, expected.exits)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-6)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert same_weights(plain, strip_auxiliary_heads(early.model))
    content = json.loads((tmp_path / "early_exit.json").read_text())
    (tmp_path / "early_exit.json").write_text(json.dumps(content | {"exits": [1, 3]}))
    refused(lambda: EarlyExit.from_pretrained(tmp_path), "[1, 3]", "[1, 2, 3]")
    (tmp_path / "early_exit.json").write_text("{")
    refused(lambda: EarlyExit.from_pretrained(tmp_path), "early_exit.json", "damaged")
    refused(lambda: EarlyExit.from_pretrained(tmp_path / "nowhere"), "missing")


def test_image_pipeline():
    from PIL import Image
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    noise = np.random.default_rng(0).integers(0, 255, (5, 20, 20, 3)).astype("uint8")
    images = [Image.fromarray(part) for part in noise]
    early = EarlyExit(make("vit"), 0.6)
    pipe = pipeline("image-classification", model=early, image_processor=processor, device="cpu")
    check_pipeline(pipe, early, images, processor(images, return_tensors="pt"))


def test_text_pipeline(tmp_path):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 122))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    texts = ["a b c", "d e f g h", "x", "k l m n", "b b"]
    early = EarlyExit(make("bert"), 0.6)
    pipe = pipeline("text-classification", model=early, tokenizer=tokenizer, device="cpu")
    check_pipeline(pipe, early, texts, tokenizer(texts, padding=True, return_tensors="pt"))


def test_audio_pipeline():
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    sounds = [row for row in batch("wav2vec2", 5)["input_values"].numpy()]
    early = EarlyExit(make("wav2vec2", inputs=small("wav2vec2")), 0.3, inputs=small("wav2vec2"))
    pipe = pipeline("audio-classification", model=early, feature_extractor=extractor, device="cpu")
    check_pipeline(pipe, early, sounds, extractor(sounds, sampling_rate=16000, padding=True, return_tensors="pt"))


def check_pipeline(pipe, early, items, inputs):
    early.reset()
    for options in ({}, {"batch_size": 5}):
        found = pipe(list(items), top_k=CLASSES, **options)
        expected = early(**inputs).logits.softmax(-1)
        for row, answers in enumerate(found):
            scores = {answer["label"]: answer["score"] for answer in answers}
            wanted = {early.config.id2label[c]: float(p) for c, p in enumerate(expected[row])}
            assert scores == pytest.approx(wanted, abs=1e-5)
    assert sum(early.counts) == 20


def test_text_classifier_loads_plainly(tmp_path):
    early = EarlyExit(make("bert"), [0.6, 0.7])
    early.save_pretrained(tmp_path)
    assert same_weights(
        AutoModelForSequenceClassification.from_pretrained(tmp_path), strip_auxiliary_heads(early.model)
    )
