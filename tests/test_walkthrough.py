"""The walkthrough of the documentation: its commands run, in an empty folder, with short trainings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer


ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^<!-- (?P<note>.*?) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = {"num_train_epochs: 30": "num_train_epochs: 2", "--num_train_epochs 15": "--num_train_epochs 2"}
SHORTER |= {"--methods plain,label-smoothing,history --seeds 0,1,2": "--methods plain,history --seeds 0"}
SHORTER |= {"texts.yaml --do_eval\n": "texts.yaml --do_eval --no-cost\n"}
ELSEWHERE = "import sys\nsys.modules['hf_selfkd'] = None  # not installed where the model is used\n"
LEFT = """
    texts/model.safetensors texts/README.md texts/predictions.csv texts/_report.html texts/_selfkd_samples.json
    compare/comparison.md compare/comparison.html evaluated/predictions.csv evaluated/reliability.png
    predicted/predictions.csv digits/_report.html digits/model.safetensors
"""


def blocks():
    text = (ROOT / "docs/walkthrough.md").read_text()
    for before, after in SHORTER.items():
        assert before in text, f"the walkthrough has no {before!r}"
        text = text.replace(before, after)
    return [match.groupdict() for match in BLOCK.finditer(text)]


def commands(folder):
    """`hf-selfkd` and `python` of this environment, first on the path."""
    (folder / "bin").mkdir()
    for name, words in (("hf-selfkd", "-m hf_selfkd"), ("python", "")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(0o755)
    return f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_the_walkthrough_runs(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PATH": commands(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    ran = 0
    with HubServer() as server:
        environment["HF_ENDPOINT"] = server.url
        for block in blocks():
            note, code = block["note"] or "", block["code"]
            if note.startswith("file: "):
                (work / note.removeprefix("file: ")).write_text(code)
            elif block["kind"] == "bash" and not code.startswith("pip "):
                done = subprocess.run(["bash", "-ec", code], cwd=work, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
                ran += 1
            elif note == "elsewhere":
                command = [sys.executable, "-c", ELSEWHERE + code]
                done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
                assert done.returncode == 0 and done.stdout.count("'score'") == 3, done.stderr
                ran += 1
        assert not any("_selfkd" in file or "report" in file for file in server.repos["me/languages"])
        assert b"label-smoothing" not in server.repos["me/languages"]["README.md"]  # in this test it was left out
        assert b"| history |" in server.repos["me/languages"]["README.md"]
    assert ran == 10
    missing = [name for name in LEFT.split() if not (work / "outputs" / name).is_file()]
    assert not missing
