"""The snippets of the documentation run, and what it quotes is what the package says.

The blocks of a section (`##`) are one script. A comment `<!-- setup: KIND -->` in the section says on what it runs; a
section without one is not run, which is for the README only. Long trainings are cut to three epochs. The commands of
all pages are read by the parsers that would read them, and not run.
"""

import ast
import copy
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from functools import lru_cache
from pathlib import Path

import datasets
import pytest
import test_next_sentence as sentences
import test_speech_seq2seq as transcripts
import torch
import typer
import yaml
from detectors import Scenes, collate_scenes, make_detector, tiny_resnet
from helpers import CLASSES, collate, difference, make_model, make_samples, make_trainer, state_of
from segmenters import Maps, make_segmenter
from speakers import Spoken, make_ctc, pad_sounds
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    PreTrainedTokenizerFast,
    ResNetForImageClassification,
    Trainer,
)

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDMixin, attach_auxiliary_heads
from hf_selfkd.cli import app
from hf_selfkd.cli.common import script_of
from hf_selfkd.cli.compare import _chosen
from hf_selfkd.distiller import SelfDistiller
from hf_selfkd.scripts.arguments import SCRIPTS


ROOT = Path(__file__).parents[1]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
TESTED_ELSEWHERE = ("docs/walkthrough.md", "docs/how_it_works.md")  # test_walkthrough.py; at the end of this file
PAGES = ["README.md", *(page for page in DOCS if page not in TESTED_ELSEWHERE)]
WORDS = ["[PAD]", "[EOS]", "[UNK]", *(f"w{n}" for n in range(27))]


def sections(page):
    """The title, the kind of setup (or None) and the Python blocks of each section that has any."""
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE):
        blocks = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        blocks = [re.sub(r"num_train_epochs=\d\d+", "num_train_epochs=3", block) for block in blocks]
        setup = re.search(r"^<!-- setup: (\w+) -->$", section, re.MULTILINE)
        if blocks:
            yield section.partition("\n")[0], setup and setup.group(1), blocks


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", model_max_length=16
    )


LEARNERS = {"texts": "plain_bert", "pairs": "plain_marian", "words": "plain_gpt2"}
LEARNERS |= {"tokens": "plain_bert_tokens", "sounds": "wav2vec2"}


def names_of(kind):
    """The names that the snippets of a section find: a small random model, and data that it can learn."""
    if kind == "images":
        return {"model": make_model("resnet"), "train": make_samples("images"), "test": make_samples("images", seed=1)}
    if kind in LEARNERS:
        names = {"model": make_model(LEARNERS[kind]), "tokenizer": make_tokenizer(), "collator": collate}
        if kind == "pairs":
            names["model"].generation_config.max_length = 8
        return names | {"train": make_samples(kind, 24), "test": make_samples(kind, seed=1)}
    if kind == "answers":
        config = make_model("plain_bert").config
        config.num_labels = 2
        items = [{"input_ids": item["input_ids"]} for item in make_samples("texts", 24).items]
        for item in items:
            item |= {"start_positions": 0, "end_positions": len(item["input_ids"]) - 1}
        names = {"model": BertForQuestionAnswering(config), "tokenizer": make_tokenizer()}
        return names | {"train": items[:18], "test": items[18:]}
    if kind == "several_labels":
        names = names_of("images")
        for part in ("train", "test"):
            for item in names[part].items:
                item["labels"] = torch.tensor([float(item["labels"] >= n) for n in range(CLASSES)])
        return names
    if kind == "choices":
        names = {"model": BertForMultipleChoice(make_model("plain_bert").config), "tokenizer": make_tokenizer()}
        words = [item["input_ids"] for item in make_samples("texts", 48).items]
        items = [{"input_ids": words[n : n + 2], "labels": n % 2} for n in range(0, 48, 2)]
        return names | {"train": items[:18], "test": items[18:]}
    if kind == "deep":
        config = make_model("plain_vit").config
        config.num_hidden_layers = 12
        return names_of("images") | {"model": type(make_model("plain_vit"))(config)}
    if kind == "exits":  # a training with exits, whose folder is `out`
        names = names_of("deep")
        options = {"auxiliary_heads": "exits", "save_heads": True, "num_train_epochs": 2}
        trainer = make_trainer("out", names["model"], names["train"], **options)
        trainer.train()
        trainer.save_model()
        validation = make_samples("images", 400)
        images = torch.stack([validation[place]["pixel_values"] for place in range(4)])
        return names | {"validation": validation, "images": images}
    if kind == "drafts":
        config = make_model("plain_gpt2").config
        config.num_hidden_layers = 6
        model = attach_auxiliary_heads(
            type(make_model("plain_gpt2"))(config), AuxiliaryHeadsConfig(head="native", layers=[3])
        )
        return {"model": model.eval(), "inputs": {"input_ids": torch.tensor([[5, 6, 7]])}}
    if kind == "lightning":
        pytest.importorskip("lightning")
        return names_of("images")
    if kind == "sentences":
        embeddings = pytest.importorskip("sentence_transformers")
        make_model("plain_bert").bert.save_pretrained("body")
        make_tokenizer().save_pretrained("body")
        pairs = [{"sentence1": f"w{n}", "sentence2": f"w{n + 1} w3", "label": n % 3} for n in range(24)]
        encoder = embeddings.SentenceTransformer("body", device="cpu")
        return {"model": encoder, "encoder": encoder, "pairs": pairs}
    if kind == "ordinal":  # one score fewer than classes
        config = make_model("resnet").config
        config.num_labels = CLASSES - 1
        return names_of("images") | {"model": type(make_model("resnet"))(config)}
    if kind == "subclass":
        return names_of("images") | {"TrainerOfYours": type("TrainerOfYours", (Trainer,), {})}
    if kind == "ensemble":
        models_of_yours = [make_model("resnet", seed) for seed in (1, 2)]
        return names_of("images") | {"ensemble": [make_trainer("out", model, None) for model in models_of_yours]}
    if kind == "trained":
        names = names_of("images")
        trainer = make_trainer("out", names["model"], names["train"], eval_dataset=names["test"])
        trainer.train()
        return names | {"trainer": trainer}
    if kind == "conversations":
        rows = [{"prompt": f"w{n} w{n + 1}", "completion": f"w{n + 2} w{n + 3} w{n + 4}"} for n in range(20)]
        names = {"model": make_model("plain_gpt2"), "tokenizer": make_tokenizer()}
        return names | {"dataset": datasets.Dataset.from_list(rows)}
    if kind == "detection":
        names = {"model": make_detector(), "train": Scenes(), "collate": collate_scenes}
        names |= {"resnet": ResNetForImageClassification(tiny_resnet()), "images": make_samples("images")}
        return names | {"torch": torch, "labels": {}, "kept": [{"id": 7}, {"id": 9}]}
    if kind == "boxes":
        names = {"boxes": [[0, 0, 9, 9], [20, 20, 30, 30]], "scores": [0.9, 0.4], "labels": [0, 1]}
        return names | {"true_boxes": [[0, 0, 10, 10]], "true_labels": [0], "model": None}
    if kind == "maps":
        return {"model": make_segmenter("segformer"), "train": Maps(), "test": Maps(6, seed=1)}
    if kind == "transcripts":
        names = {"model": make_ctc("wav2vec2"), "tokenizer": make_tokenizer(), "collate": pad_sounds}
        return names | {"train": Spoken(), "test": Spoken(6, seed=1)}
    if kind == "speech":
        model, collator = transcripts.make("whisper"), transcripts.collate
        model.generation_config.max_length = 8
        names = {"model": model, "tokenizer": make_tokenizer(), "collate": collator, "collator": collator}
        samples = {part: transcripts.spoken("whisper", 14, seed) for part, seed in (("train", 0), ("test", 1))}
        return names | samples
    if kind == "captions":
        lengths = (3, 4)  # of one length, as the collator of the Trainer pads nothing
        samples = {
            part: transcripts.spoken("captions", 14, seed, lengths) for part, seed in (("train", 0), ("test", 1))
        }
        return samples | {"model": transcripts.make("captions")}
    if kind == "sentence_pairs":
        return {"model": sentences.make("bert"), "train": sentences.pairs(), "test": sentences.pairs(6, seed=1)}
    raise ValueError(f"there is no setup {kind!r}")


def run(page, title, folder, monkeypatch):
    """Run a section in an empty folder; gives the names that it leaves."""
    monkeypatch.chdir(folder)
    kind, blocks = next((kind, blocks) for name, kind, blocks in sections(page) if name == title)
    names = names_of(kind)
    initial = copy.deepcopy(names["model"])
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, {title!r}, block {number}", "exec"), names)
    return names | {"initial": initial}


RUNNABLE = [(page, title) for page in PAGES for title, kind, _ in sections(page) if kind is not None]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT looks at all attributes
@pytest.mark.parametrize("page, title", RUNNABLE, ids=lambda part: part.lower().replace(" ", "-"))
def test_a_section_runs(tmp_path, monkeypatch, page, title):
    names = run(page, title, tmp_path, monkeypatch)
    if isinstance(names.get("trainer"), Trainer):  # and not one of Lightning
        assert names["trainer"].state.global_step > 0
        assert all(torch.isfinite(tensor).all() for tensor in state_of(names["trainer"]).values())


def test_every_section_of_the_documentation_runs():
    silent = [(page, title) for page in PAGES for title, kind, _ in sections(page) if kind is None]
    assert [page for page, _ in silent if page != "README.md"] == [], silent
    assert len([page for page, _ in RUNNABLE if page == "docs/migration.md"]) >= 6
    some = {"README.md", *(f"docs/{name}.md" for name in "guide index layered metrics tasks troubleshooting".split())}
    assert {page for page, _ in RUNNABLE} >= some


def test_a_snippet_that_fails_is_found(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("## Wrong\n<!-- setup: texts -->\n```python\nmodel.no_such_method()\n```\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    with pytest.raises(AttributeError, match="no_such_method"):
        run("page.md", "Wrong", tmp_path, monkeypatch)


def test_the_loss_by_hand_gives_the_same_weights(tmp_path, monkeypatch):
    """What the migration page says of its first two runs."""
    title = "From a distillation loss of your own"
    kind, blocks = next((kind, blocks) for name, kind, blocks in sections("docs/migration.md") if name == title)
    monkeypatch.chdir(tmp_path)
    names = names_of(kind)
    initial = copy.deepcopy(names["model"])
    for block in blocks[:3]:  # without the loss of one's own that follows
        exec(block, names)
    assert difference(names["by_hand"], names["trainer"]) < 1e-6
    assert difference(names["by_hand"], initial) > 1e-4
    plain = names_of(kind)
    for block in blocks[:3]:
        exec(block.replace("alpha=0.7", "alpha=0.0"), plain)
    assert difference(plain["by_hand"], plain["trainer"]) > 1e-5


# Commands


def commands(page):
    """The lines of the bash blocks of a page that start `hf-selfkd` or a script, as words after `hf-selfkd`."""
    for block in re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            script = next((word for word in words if re.fullmatch(r"examples/\w+\.py", word)), None)
            if words[:1] == ["hf-selfkd"]:
                yield words[1:]
            elif "hf_selfkd" in words:  # python -m hf_selfkd, torchrun ... -m hf_selfkd
                yield words[words.index("hf_selfkd") + 1 :]
            elif script is not None and (task := Path(script).stem.replace("_", "-")) in SCRIPTS:
                yield ["train", task, *words[words.index(script) + 1 :]]


@lru_cache
def parser_of(task):
    return script_of(task).make_parser()


def unknown_words(task, words):
    """What the script of a task does not know of the words after it; a file of settings that is here is read, too."""
    parser, settings = parser_of(task), {}
    if words and words[0].endswith((".yaml", ".json")):
        file = ROOT / words[0]
        assert file.is_file() or not words[0].startswith("examples/"), f"there is no {words[0]}"
        settings, words = yaml.safe_load(file.read_text()) if file.is_file() else {}, words[1:]
    try:
        _, unknown = parser.parse_known_args([word for word in words if word not in ("--help", "--help-all")])
    except SystemExit:  # a value that is not of the kind of its flag; argparse has told which
        return words
    return [*unknown, *(settings.keys() - vars(parser.parse_args([])).keys())]


def faults(words):
    """What is wrong with the words of a command after `hf-selfkd`; empty if nothing is."""
    group = typer.main.get_command(app)
    name, *rest = words or ["--help"]
    if name.startswith("-"):
        return []
    if name not in group.commands:
        return [name]
    if name == "train":
        if rest and rest[0] in ("-h", "--help"):
            return []
        return unknown_words(rest[0], rest[1:]) if rest and rest[0] in SCRIPTS else rest[:1]
    try:
        context = group.commands[name].make_context(name, list(rest))
        if name == "compare":
            _chosen(*(context.params[field] for field in ("task", "methods", "seeds")))
    except Exception as error:  # of click, whose copy typer may bring itself; or ours
        return [str(error) or repr(error)]
    task = context.params.get("task", context.params.get("patient"))
    if task in SCRIPTS:
        return unknown_words(task, context.args)
    return context.args if name == "doctor" else [task, *context.args] if "task" in context.params else context.args


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", *DOCS])
def test_commands_exist_with_their_flags(page):
    found = {shlex.join(words): faults(list(words)) for words in commands(page)}
    assert not any(found.values()), {command: wrong for command, wrong in found.items() if wrong}


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", *DOCS])
def test_files_that_are_named_are_here(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"(?<![\w/.])(?:examples|benchmarks|tests|docs)/[\w/]+\.(?:py|yaml|md|ipynb)", text)
    named += [f"examples/configs/{name}" for name in re.findall(r"`(\w+\.yaml)", text) if page == "docs/papers.md"]
    named = [name for name in named if page != "examples/README.md" or not name.startswith("docs/")]
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert named or page != "docs/papers.md"


def test_commands_that_do_not_exist_are_found():
    assert len([words for page in ["README.md", *DOCS] for words in commands(page)]) > 40
    for right in ("train translation", "doctor outputs/texts", "compare text-classification --folder x --do_predict"):
        assert faults(right.split()) == []
    for wrong in (
        "trian text-classification",
        "train texts",
        "train text-classification --no_such_flag 3",
        "train text-classification --num_train_epochs many",
        "train text-classification texts.yaml more.yaml",
        "evaluate text-classification outputs/texts --output_directory x",
        "compare text-classification --folder x --methods plain,no-such-method",
        "compare text-classification --do_predict",
        "doctor outputs/texts --alpha 1",
        "doctor text-classification --no_such_flag",
        "report --no-such-option outputs/texts",
    ):
        assert faults(wrong.split()), wrong


# Quotations


def messages():
    """The texts in the source of the package, with … for what is filled in."""
    for path in (ROOT / "hf_selfkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def is_said(quotation, said):
    """Whether the parts of a quotation, between its …, stand in this order in one of the texts."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quotation.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in said)


def quotations():
    """What stands in “ ” on the troubleshooting page."""
    return re.findall(r"“([^”]+)”", (ROOT / "docs/troubleshooting.md").read_text())


def test_quoted_messages_are_those_of_the_package():
    said = list(messages())
    assert len(quotations()) > 20
    stale = [quotation for quotation in quotations() if not is_said(quotation, said)]
    assert not stale, f"docs/troubleshooting.md quotes what hf_selfkd does not say: {stale}"
    assert not is_said("the moon is … of green cheese", said)


def test_links_within_the_documentation_lead_somewhere():
    for page in ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", (ROOT / page).read_text()):
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.exists(), f"{page} links to {target}"
            if anchor and file.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{page} links to {target}#{anchor}"


def test_the_step_on_the_page_is_that_of_the_package():
    page = (ROOT / "docs/how_it_works.md").read_text()
    shown = ast.parse(re.search(r"```python\n(def step\(.*?)```", page, re.DOTALL).group(1)).body[0]
    step = ast.parse(textwrap.dedent(inspect.getsource(SelfDistiller.step))).body[0]
    assert ast.dump(ast.Module(shown.body, [])) == ast.dump(ast.Module(step.body[1:], []))
    branches = [node for node in ast.walk(step) if isinstance(node, (ast.If, ast.For, ast.While, ast.Try))]
    assert not branches and len(step.body) - 1 <= 20


def test_the_call_of_the_step_on_the_page_is_that_of_the_package():
    page = (ROOT / "docs/how_it_works.md").read_text()
    (shown,) = re.findall(r"```python\n(loss, outputs = .*?)```", page, re.DOTALL)
    assert " ".join(shown.split()) in " ".join(inspect.getsource(SelfKDMixin.compute_loss).split())


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    """Every link, anchor and page of the navigation."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {"walkthrough", "doctor", "api", "configuration", "mathematics", "papers"} <= pages
    assert not list((tmp_path / "site").rglob("*.jsonl")) and not list((tmp_path / "site").rglob("*.py"))
