"""What a release needs: one version everywhere, workflows that call what there is, and SECURITY.md says what is so."""

import ast
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_model, make_samples
from transformers import TrainingArguments

import hf_selfkd
from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.scripts import arguments


ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


# Versions


def test_the_citation_has_the_version():
    assert CITATION["version"] == hf_selfkd.__version__
    assert re.search(f'^license = "{CITATION["license"]}"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_citation_has_the_papers_that_cards_cite():
    cards = (ROOT / "hf_selfkd/cards/names.py").read_text(encoding="utf-8")
    for paper in CITATION["references"]:
        assert f"title = {{{paper['title']}}}" in cards
        names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
        assert f"author = {{{names}}}" in " ".join(cards.split())
        assert f"  year = {{{paper['year']}}}" in cards
        assert paper["url"] in "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))


def test_the_changelog_has_the_version():
    titles = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert titles and (titles[0].split()[0] == hf_selfkd.__version__ or titles[0].lower() == "unreleased")


@pytest.fixture
def release(tmp_path):
    """A copy of what the check of a tag reads, ready for the release of the version."""
    for name in (".ci/check_tag", "hf_selfkd/_version.py", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    version = hf_selfkd.__version__
    replace(tmp_path / "CHANGELOG.md", r"^## .*$", f"## {version} (2026-01-31)")
    citation = (tmp_path / "CITATION.cff").read_text(encoding="utf-8")
    if "date-released" not in citation:
        (tmp_path / "CITATION.cff").write_text(f"{citation}date-released: 2026-01-31\n", encoding="utf-8")
    return tmp_path


def replace(path, pattern, text):
    changed, count = re.subn(pattern, text, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(changed, encoding="utf-8")


def check_tag(folder, tag):
    return subprocess.run([folder / ".ci/check_tag", tag], capture_output=True, text=True, timeout=60)


def test_a_tag_that_fits_may_be_released(release):
    done = check_tag(release, f"v{hf_selfkd.__version__}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "file, pattern, text, said",
    [
        ("hf_selfkd/_version.py", r'".*"$', '"9.9.9"', "_version.py says v9.9.9"),
        ("CITATION.cff", r"^version: .*$", "version: 9.9.9", "CITATION.cff has another version"),
        ("CITATION.cff", r"^date-released: .*$", "", "no date-released"),
        ("CHANGELOG.md", r"^## (.*) \(.*\)$", r"## \1 (unreleased)", "CHANGELOG.md has no"),
    ],
    ids=["tag", "citation", "date", "changelog"],
)
def test_a_tag_that_does_not_fit_is_refused(release, file, pattern, text, said):
    version = hf_selfkd.__version__
    if file == "hf_selfkd/_version.py":
        replace(release / file, r'^__version__ = ".*"$', f"__version__ = {text}")
    else:
        replace(release / file, pattern, text)
    done = check_tag(release, f"v{version}")
    assert done.returncode == 1 and said in done.stderr


# Workflows


def steps(workflow):
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        yield from job["steps"]


def targets():
    """The targets of the Makefile that are commands."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    assert all(re.search(f"^{target}:", makefile, re.MULTILINE) for target in phony)
    return phony


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_there_is(workflow):
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert content["name"] == workflow.stem and content[True]  # YAML reads `on` as true
    assert content["permissions"] == {"contents": "read"} and "secrets." not in workflow.read_text(encoding="utf-8")
    commands = [step["run"].split() for step in steps(workflow) if "run" in step]
    assert commands
    for command, target, *variables in commands:
        assert command == "make" and target in targets()
        for variable in variables:
            assert variable.partition("=")[0] in ("PYTHON", "TAG")


def test_the_workflows_lint_and_test():
    for workflow in WORKFLOWS:
        called = [step["run"].split()[1] for step in steps(workflow) if "run" in step]
        assert called.index("lint") < called.index("test-all")
    assert {path.stem for path in WORKFLOWS} == {"release", "tests"}


def test_the_release_is_checked_before_it_is_published():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
    called = [step["run"].split()[1] for step in jobs["build"]["steps"] if "run" in step]
    assert called == ["check-tag", "lint", "test-all", "build"]
    assert jobs["publish"]["needs"] == "build" and jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")


def test_the_tested_pythons_are_the_ends_of_what_is_declared():
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    job = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == [declared[0], declared[-1]]


@pytest.mark.parametrize("script", sorted((ROOT / ".ci").iterdir()), ids=lambda path: path.name)
def test_a_script_can_be_run(script):
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script], capture_output=True, timeout=60).returncode == 0


# What SECURITY.md says


def calls():
    """The names of all functions that the package calls, with the node."""
    for path in (ROOT / "hf_selfkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def test_the_package_reads_no_pickle():
    called = list(calls())
    names = {name for name, _ in called}
    assert names.isdisjoint({"torch.load", "yaml.load", "eval", "exec", "os.system"})
    assert not any("pickle" in name or "joblib" in name for name in names)
    assert {"np.load", "yaml.safe_load", "safe_open"} <= names  # the search finds what there is
    for name, node in called:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given.get("allow_pickle", "False") == "False" and given.get("shell", "False") == "False", name


def test_no_code_of_others_runs_unasked():
    classes = [value for value in vars(arguments).values() if dataclasses.is_dataclass(value)]
    fields = [field for kind in classes for field in dataclasses.fields(kind) if field.name == "trust_remote_code"]
    assert fields and all(field.default is False for field in fields)
    for name, node in calls():
        given = [ast.unparse(keyword) for keyword in node.keywords]
        assert "trust_remote_code=True" not in given, name
        assert name != "load_dataset" or not any("trust_remote_code" in text or "hub" in text for text in given)


def test_what_a_checkpoint_has_of_ours_is_safetensors(tmp_path):
    args = SelfKDConfig(
        str(tmp_path), num_train_epochs=2, auxiliary_heads="lsskd", teacher="snapshot", use_cpu=True, report_to="none"
    )
    trainer = SelfKDTrainer(make_model("resnet"), args, train_dataset=make_samples("images"))
    trainer.train()
    trainer._save_checkpoint(trainer.model, None)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    ours = [path for path in (checkpoint / "_selfkd").rglob("*") if path.is_file()]
    assert len(ours) >= 3 and {path.suffix for path in ours} == {".safetensors", ".json"}
    pickled = {path.name for path in checkpoint.rglob("*") if path.is_file() and is_pickled(path)}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}  # of transformers
    for name in pickled - {"training_args.bin", "rng_state.pth"}:
        torch.load(checkpoint / name, weights_only=True)


@pytest.mark.parametrize("kind", [SelfKDConfig, TrainingArguments])
def test_no_token_is_written(tmp_path, kind):
    args = kind(str(tmp_path), max_steps=1, hub_token="hf_secret", use_cpu=True, report_to="none")
    trainer = SelfKDTrainer(make_model("resnet"), args, train_dataset=make_samples("images"))
    trainer.train()
    trainer.save_model()
    trainer._save_checkpoint(trainer.model, None)
    assert len(list(tmp_path.rglob("training_args.bin"))) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).max_steps == 1
    assert trainer.args.hub_token == "hf_secret"


def is_pickled(path):
    start = path.read_bytes()[:2]
    return start in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
