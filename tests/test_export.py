"""`hf-selfkd export`: exits as plain models with true cards, the family's table against other figures, refusals."""

import csv
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_model
from PIL import Image
from test_cli import call
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hf_selfkd.cards import CardFacts
from hf_selfkd.exits.costs import count_parameters, latencies, multiply_adds
from hf_selfkd.exits.quantized import linear_share
from hf_selfkd.exits.samples import made_up
from hf_selfkd.heads import (
    AuxiliaryHeadsConfig,
    attach_auxiliary_heads,
    heads_of,
    save_auxiliary_heads,
)
from hf_selfkd.scripts.text_classification import train_tokenizer


CLASSES, SIDE = 3, 8
ENGINE = all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
needs_onnx = pytest.mark.skipif(not ENGINE, reason='needs pip install "hf_selfkd[onnx]"')
FAR = {"initializer_range": 0.5}  # so that classes differ
VIT = {"image_size": SIDE, "patch_size": 4, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3}
BERT = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
ELSEWHERE = """
import sys
sys.modules["hf_selfkd"] = None  # not installed where the model is used
import torch
import transformers
jobs = torch.load(sys.argv[1], weights_only=True)
with torch.no_grad():
    models = [getattr(transformers, kind).from_pretrained(folder).eval() for kind, folder, _ in jobs]
    torch.save([model(**job[2]).logits for model, job in zip(models, jobs)], sys.argv[2])
"""


def write_images(folder):
    rng, rows = np.random.default_rng(0), 12
    for row in range(rows):
        path = folder / str(row % CLASSES) / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def write_texts(path):
    texts = [" ".join(["sun", "rain", "snow", "wind"][: 1 + row % 4]) for row in range(12)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, str(n % CLASSES)) for n, text in enumerate(texts))])
    return texts


def save(model, folder, head="native", **heads):
    """A model with random heads, as a training with `save_heads` leaves it."""
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head=head, views="none", **heads))
    with torch.no_grad():  # heads that say something else than the model
        for parameter in heads_of(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    save_auxiliary_heads(model, folder)
    return model


def classes():
    return {"id2label": {n: str(n) for n in range(CLASSES)}, "label2id": {str(n): n for n in range(CLASSES)}}


def make_images(folder):
    set_seed(0)
    model = ViTForImageClassification(ViTConfig(**VIT, **FAR, **classes(), num_attention_heads=2))
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "model")
    write_images(folder / "test")
    return save(model, folder / "model", layers="all")


def make_texts(folder):
    set_seed(0)
    texts = write_texts(folder / "test.csv")
    tokenizer = train_tokenizer([texts], 300, 16, True)
    config = BertConfig(**BERT, **FAR, **classes(), vocab_size=len(tokenizer), max_position_embeddings=16)
    config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder / "model")
    return save(BertForSequenceClassification(config), folder / "model", layers="all")


def exported(task, folder, *words):
    status, said = call("export", task, str(folder / "model"), "--output-dir", str(folder / "out"), *words)
    assert status == 0, said
    return said, json.loads((folder / "out" / "family.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few rounds, and no process that measures memory: `test_memory_grows_with_the_weights` starts one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_selfkd.exits.costs.FEWEST", 4)
        patch.setattr("hf_selfkd.exits.costs.MOST", 4)
        patch.setattr("hf_selfkd.exits.making.peak_memory", lambda places, *rest: [10**6] * len(places))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A family of images with data: the model with its heads, the folder, what was said, the figures."""
    folder = tmp_path_factory.mktemp("images")
    model = make_images(folder)
    facts = CardFacts("digits", "ViTForImageClassification", task="image-classification", repo_id="me/digits")
    facts.method = {"teacher": "none", "auxiliary_heads": {"heads": 2, "views": "none"}, "preset": "exits"}
    facts.curves, facts.datasets = {"loss": [[1, 2.0], [2, 1.0]]}, ["me/other"]
    facts.save(folder / "model")
    words = ["--test_dir", str(folder / "test"), "--use_cpu", "--cache_dir", str(folder / "cache")]
    said, figures = exported("image-classification", folder, "--all", *words)
    return SimpleNamespace(model=model, folder=folder, out=folder / "out", said=said, figures=figures)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """One exit of texts without data."""
    folder = tmp_path_factory.mktemp("texts")
    model = make_texts(folder)
    said, figures = exported("text-classification", folder, "--exit", "2")
    return SimpleNamespace(model=model, folder=folder, out=folder / "out", said=said, figures=figures)


def logits_of_exit(model, exit, inputs):
    """What the head says, by the whole model that it is on."""
    heads = heads_of(model)
    with torch.no_grad(), heads.watched():
        model(**inputs)
        found, heads.results = heads.results, None
    return dict(zip([head.exit for head in heads.heads], found.logits, strict=True))[exit]


# What is exported


@pytest.mark.slow
def test_exits_load_where_this_package_is_not(images, texts, tmp_path):
    pixels = {"pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))}
    words = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    jobs = [("AutoModelForImageClassification", str(images.out / "exit-2"), pixels)]
    jobs.append(("AutoModelForSequenceClassification", str(texts.out), words))
    torch.save(jobs, tmp_path / "jobs.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "jobs.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(first, logits_of_exit(images.model, 2, pixels))
    torch.testing.assert_close(second, logits_of_exit(texts.model, 2, words))
    assert not torch.allclose(first, images.model(**pixels).logits, atol=1e-2)


def test_what_stands_in_the_folders(images, texts):
    left = {path.name for path in (images.out / "exit-1").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= left
    assert not (images.out / "exit-1" / "auxiliary_heads").exists() and not (images.out / "whole").exists()
    assert (texts.out / "tokenizer.json").is_file()
    assert [row["name"] for row in texts.figures["members"]] == ["exit 2", "whole model"]
    assert all(row["quality"] == {} for row in texts.figures["members"]) and not (texts.out / "family.png").exists()
    assert "one made-up sample" in texts.said and "Accuracy" not in texts.said
    assert "| memory (MB) |" in texts.said


def test_cards_tell_of_the_exit_only(images, texts):
    card = (images.out / "exit-2" / "README.md").read_text()
    assert "[digits](https://huggingface.co/me/digits): the first 2 layers of 3, and the head" in card
    assert "This model is one of these heads, with the layers before it" in card and "name: unknown" in card
    assert "loss.png" not in card and str(images.folder) not in card and "name: me/other" not in card
    facts = CardFacts.load(images.out / "exit-2")
    assert facts.parameters == images.figures["members"][1]["parameters"] and facts.model_name == "digits-exit-2"
    (evaluation,) = facts.evaluations
    assert evaluation.metrics == images.figures["members"][1]["quality"] and evaluation.samples == 12
    plain = (texts.out / "README.md").read_text()
    assert "How it was trained is not known to this card." in plain and "the first 2 layers of 3" in plain
    assert "was not evaluated" in plain


def test_an_exit_of_a_translation_model_has_the_whole_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_selfkd.exits.making.peak_memory", lambda *given: None)  # not Linux
    config = make_model("plain_marian").config
    config.decoder_layers, config.encoder_layers = 3, 2
    config.num_hidden_layers = 2
    save(MarianMTModel(config), tmp_path / "model", layers="all")
    said, figures = exported("translation", tmp_path, "--exit", "1")
    made = MarianConfig.from_pretrained(tmp_path / "out")
    assert (made.encoder_layers, made.decoder_layers) == (2, 1) and (tmp_path / "out/generation_config.json").is_file()
    assert [row["layers"] for row in figures["members"]] == [1, 3]
    assert "every exit has the whole encoder" in said and "| memory" not in said
    assert "the first layer of 3 in the decoder, all of the encoder" in (tmp_path / "out/README.md").read_text()


def test_perplexity_of_a_language_model(tmp_path):
    set_seed(0)
    lines = write_texts(tmp_path / "x.csv")
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    tokenizer = train_tokenizer([lines], 300, 16, False)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": len(tokenizer)}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer.save_pretrained(tmp_path / "model")
    save(GPT2LMHeadModel(GPT2Config(**sizes, **ids)), tmp_path / "model", layers="all")
    words = ["--validation_file", str(tmp_path / "texts.txt"), "--cache_dir", str(tmp_path / "cache"), "--use_cpu"]
    said, figures = exported("language-modeling", tmp_path, "--all", *words)
    assert "| Perplexity |" in said and "A pass is over known tokens" in said
    model, nll = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "exit-1"), []
    for line in lines:
        tokens = torch.tensor([tokenizer(line)["input_ids"]])
        with torch.no_grad():
            nll += torch.log_softmax(model(tokens).logits[0, :-1], -1)[range(tokens.shape[1] - 1), tokens[0, 1:]]
    assert figures["members"][0]["quality"]["perplexity"] == pytest.approx(float(torch.stack(nll).neg().mean().exp()))


# The figures


def test_quality_is_that_of_the_heads(images):
    """Accuracy and NLL of an exit, computed naively from the logits of its head."""
    model = images.model
    processor = ViTImageProcessor.from_pretrained(images.folder / "model")
    files = sorted((images.folder / "test").rglob("*.png"))
    labels = torch.tensor([int(path.parent.name) for path in files])
    inputs = dict(processor([Image.open(path).convert("RGB") for path in files], return_tensors="pt"))
    for exit, row in ((1, 0), (2, 1)):
        logits = logits_of_exit(model, exit, inputs)
        quality = images.figures["members"][row]["quality"]
        assert quality["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
        assert quality["nll"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    with torch.no_grad():
        whole = model(**inputs).logits
    quality = images.figures["members"][2]["quality"]
    assert quality["nll"] == pytest.approx(float(nn.functional.cross_entropy(whole, labels)), rel=1e-4)


def test_parameters_and_sizes_are_those_of_the_architecture(images):
    width, inner, tokens = 8, 12, (SIDE // 4) ** 2 + 1
    layer = 4 * (width * width + width) + 2 * width * inner + width + inner + 4 * width
    rest = 3 * 16 * width + width + tokens * width + width + 2 * width + width * CLASSES + CLASSES
    products = 4 * width * width * tokens + 2 * width * inner * tokens + 2 * tokens * tokens * width
    outside = 3 * 16 * width * (tokens - 1) + width * CLASSES
    for row, layers in zip(images.figures["members"], (1, 2, 3), strict=True):
        assert row["layers"] == layers and row["parameters"] == layers * layer + rest
        assert row["multiply_adds"] == layers * products + outside
        assert 4 * row["parameters"] <= row["bytes"] < 4 * row["parameters"] + 20_000
        low, high = row["latency_ms_quartiles"]
        assert 0 < low <= row["latency_ms"] <= high


def test_multiply_adds_of_a_linear_layer():
    layer = nn.Linear(5, 7)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    assert multiply_adds(layer, {"x": torch.zeros(3, 5)}) == 3 * 5 * 7
    tied = nn.Sequential(layer, layer)
    assert count_parameters(tied) == 5 * 7 + 7


def test_latencies_take_turns():
    order = []
    found = latencies([lambda: order.append("a"), lambda: order.append("b")], budget=0.0)
    assert [one.rounds for one in found] == [4, 4]
    assert order == ["a", "b"] * 3 + ["a", "b", "b", "a"] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the peak of a fork")
def test_memory_grows_with_the_weights(tmp_path, monkeypatch):
    from hf_selfkd.exits.memory import peak_memory

    places = []
    for width in (8, 1024):
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 1}
        ViTForImageClassification(ViTConfig(**VIT | shape, num_attention_heads=2)).save_pretrained(
            tmp_path / f"{width}"
        )
        places.append(tmp_path / f"{width}")
    small, large = peak_memory(places, {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}, 1)
    weights = size(places[1]) - size(places[0])
    assert 0.8 * weights < large - small < 2.5 * weights and small > 0
    failed = SimpleNamespace(stdout="", stderr="no memory", returncode=1)
    monkeypatch.setattr("hf_selfkd.exits.memory.subprocess.run", lambda *words, **options: failed)
    assert peak_memory(places, {"pixel_values": torch.zeros(1)}, 1) is None


def size(folder):
    return (folder / "model.safetensors").stat().st_size


def test_the_table_says_how_it_was_measured(images):
    assert "| model | layers | parameters | multiply-adds |" in images.said and "| Accuracy (%) |" in images.said
    assert images.said.count("| exit ") == 2 and "| whole model | 3 |" in images.said
    for part in (
        "one sample of the data (pixel_values 1 x 3 x 8 x 8)",
        "1 thread",
        "on the split `test`",
        "12 samples",
    ):
        assert part in images.said, part
    text = (images.out / "family.md").read_text()
    assert text.startswith("# digits and its exits\n") and str(images.folder) not in text
    assert str(images.folder) not in (images.out / "family.json").read_text()
    if find_spec("matplotlib"):
        assert Image.open(images.out / "family.png").size[0] > 400


def test_settings_of_the_training_are_no_hindrance(tmp_path):
    """A file of settings asks for heads, checkpoints and steps, which are nothing to an exit."""
    make_texts(tmp_path)
    settings = {"test_file": str(tmp_path / "test.csv"), "auxiliary_heads": "exits", "save_heads": True}
    settings |= {"do_train": True, "do_eval": True, "teacher": "snapshot", "evaluate_heads": True, "use_cpu": True}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    (tmp_path / "run.json").write_text(json.dumps(settings | {"cache_dir": str(tmp_path / "cache")}))
    _, figures = exported("text-classification", tmp_path, "--exit", "1", str(tmp_path / "run.json"))
    assert all("accuracy" in row["quality"] for row in figures["members"])


# ONNX


@needs_onnx
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_onnx_and_int8(tmp_path, kind):
    import onnx
    import onnxruntime

    from hf_selfkd.exits.onnx import check_same

    make = {"images": make_images, "texts": make_texts}[kind]
    model, task = make(tmp_path), {"images": "image", "texts": "text"}[kind] + "-classification"
    data = ["--test_dir", str(tmp_path / "test")] if kind == "images" else ["--test_file", str(tmp_path / "test.csv")]
    words = ["--use_cpu", "--cache_dir", str(tmp_path / "cache"), "--onnx", "--int8"]
    _, figures = exported(task, tmp_path, "--exit", "1", *data, *words)
    rows = {row["name"]: row for row in figures["members"]}
    assert list(rows) == ["exit 1", "exit 1, ONNX", "exit 1, ONNX int8", "whole model"]
    assert rows["exit 1, ONNX"]["quality"]["nll"] == pytest.approx(rows["exit 1"]["quality"]["nll"], abs=1e-4)
    assert rows["exit 1, ONNX int8"]["quality"]["nll"] == pytest.approx(rows["exit 1"]["quality"]["nll"], abs=0.1)
    path = tmp_path / "out" / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count, length in ((1, 3), (5, 9)):
        if kind == "images":
            inputs = {"pixel_values": torch.randn(count, 3, SIDE, SIDE)}
        else:
            ids = torch.randint(5, 50, (count, length))
            inputs = {"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": torch.ones_like(ids)}
            inputs["attention_mask"][-1, -1] = 0
        found = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
        np.testing.assert_allclose(found, logits_of_exit(model, 1, inputs), rtol=1e-3, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model") if kind == "texts" else None
    batches, other = made_up(model, tokenizer).batches, tmp_path / "other.onnx"
    shutil.copy(path, other)
    with pytest.raises(ValueError, match="answers otherwise than the model .* so it is not kept"):
        check_same(model, other, batches)  # the whole model is not its exit
    assert not other.exists()
    operators = [node.op_type for node in onnx.load(path.with_name("model_int8.onnx")).graph.node]
    assert operators.count("MatMulInteger") == 7 if kind == "images" else 8
    assert (
        b"site-packages" not in path.read_bytes() and str(Path(__file__).parents[1]).encode() not in path.read_bytes()
    )


def test_made_up_samples_differ_in_size():
    for name in ("plain_bert", "plain_vit", "plain_marian"):
        model = make_model(name).eval()
        samples = made_up(model)
        main = model.main_input_name
        assert samples.one[main].shape[0] == 1 and [batch[main].shape[0] for batch in samples.batches] == [1, 3]
        assert torch.equal(made_up(model).batches[1][main], samples.batches[1][main])
        with torch.no_grad():
            assert all(torch.isfinite(model(**batch).logits).all() for batch in samples.batches)


# What is refused


def refused(*words):
    status, said = call("export", *map(str, words))
    assert status == 1 and said.startswith("Error: ") and said.count("\n") == 1, said
    return said


def test_what_is_wrong_is_told_in_one_line(images, tmp_path):
    task, model, out = "image-classification", images.folder / "model", ("--output-dir", tmp_path / "out")
    assert "no task 'fishing'" in refused("fishing", model, "--all", *out)
    for words in ((), ("--all", "--exit", "2")):
        assert "either --exit, one of the exits, or --all" in refused(task, model, *words, *out)
    remedy = "train with --auxiliary_heads exits --save_heads"
    assert remedy in refused(task, tmp_path / "none", "--all", *out)
    assert remedy in refused(task, images.out / "exit-2", "--all", *out)
    assert "choose one of 1, 2." in refused(task, model, "--exit", 3, *out)
    assert "is no model for text-classification" in refused("text-classification", model, "--all", *out)
    assert "is the folder of the model itself" in refused(task, model, "--all", "--output-dir", model)
    assert "No test data" in refused(task, model, "--all", *out, "--validation_dir", images.folder / "test")
    assert "no such flag" in refused(task, model, "--all", *out, "--tset_dir", "x")
    assert not (tmp_path / "out").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    assert "is the folder of a training" in refused(task, model, "--all", "--output-dir", tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(task, model, "--all", "--output-dir", tmp_path / "file")


def test_heads_that_are_no_exits_and_adapters_are_refused(tmp_path):
    save(make_model("plain_deep_vit"), tmp_path / "model", head="linear")
    said = refused("image-classification", tmp_path / "model", "--all", "--output-dir", tmp_path / "out")
    assert "'linear', which are no part of the architecture" in said
    (tmp_path / "model" / "config.json").rename(tmp_path / "model" / "adapter_config.json")
    said = refused("image-classification", tmp_path / "model", "--all", "--output-dir", tmp_path / "out")
    assert "an adapter of PEFT: merge it" in said


def test_engines_that_do_not_fit_are_refused(images, tmp_path, monkeypatch):
    out = ("--all", "--output-dir", tmp_path / "out")
    said = refused("translation", images.folder / "model", *out, "--onnx")
    assert "--onnx is for classifiers" in said and "optimum" in said
    monkeypatch.setattr("hf_selfkd.exits.onnx.find_spec", lambda name: None)
    said = refused("image-classification", images.folder / "model", *out, "--int8")
    assert '--int8 needs onnx, onnxruntime, onnxscript: pip install "hf_selfkd[onnx]"' in said
    monkeypatch.setattr("hf_selfkd.exits.onnx.find_spec", lambda name: True)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    save(ResNetForImageClassification(ResNetConfig(**sizes, **classes())), tmp_path / "cnn")
    said = refused("image-classification", tmp_path / "cnn", *out, "--int8")
    assert "--int8 is for linear layers, and ResNetForImageClassification has" in said and "leave it out" in said


def test_share_of_linear_layers():
    assert linear_share(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(1, 1, 2, bias=False))) == 12 / 19
