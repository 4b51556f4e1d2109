"""The snippets of the documentation run, and what it quotes is what the package says.

The blocks of a section (`##`) are one script. A comment `<!-- setup: KIND -->` in the section says on what it runs; a
section without one is not run, which no section of docs/migration.md with Python in it may be. Long trainings are cut
to three epochs.
"""

import ast
import copy
import inspect
import re
import textwrap
from pathlib import Path

import datasets
import pytest
import torch
from helpers import collate, difference, make_model, make_samples, state_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_selfkd.distiller import SelfDistiller


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/migration.md", "docs/troubleshooting.md"]
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


def names_of(kind):
    """The names that the snippets of a section find: a small random model, and data that it can learn."""
    if kind == "images":
        return {"model": make_model("resnet"), "train": make_samples("images"), "test": make_samples("images", seed=1)}
    if kind == "texts":
        names = {"model": make_model("plain_bert"), "collator": collate}
        return names | {"train": make_samples("texts", 24), "test": make_samples("texts", seed=1)}
    if kind == "conversations":
        rows = [{"prompt": f"w{n} w{n + 1}", "completion": f"w{n + 2} w{n + 3} w{n + 4}"} for n in range(20)]
        names = {"model": make_model("plain_gpt2"), "tokenizer": make_tokenizer()}
        return names | {"dataset": datasets.Dataset.from_list(rows)}
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


@pytest.mark.parametrize("page, title", RUNNABLE, ids=lambda part: part.lower().replace(" ", "-"))
def test_a_section_runs(tmp_path, monkeypatch, page, title):
    names = run(page, title, tmp_path, monkeypatch)
    if "trainer" in names:
        assert names["trainer"].state.global_step > 0
        assert all(torch.isfinite(tensor).all() for tensor in state_of(names["trainer"]).values())


def test_every_section_of_the_migration_page_runs():
    assert [title for title, kind, _ in sections("docs/migration.md") if kind is None] == []
    assert len([page for page, _ in RUNNABLE if page == "docs/migration.md"]) >= 6
    assert {page for page, _ in RUNNABLE} == set(PAGES)


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
