"""Uploads against a server of the Hub's API, by the client that users have, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer


TESTS = Path(__file__).parent
LOADS = """
import json, sys
sys.modules["hf_selfkd"] = None  # not installed where the model is used
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification
images, result = torch.load(sys.argv[1], weights_only=True), {}
for name in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained("me/" + name).eval()
    card = ModelCard.load("me/" + name)
    with torch.no_grad():
        logits = model(pixel_values=images).logits.tolist()
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    result[name] = {"logits": logits, "results": results, "tags": card.data.tags, "text": card.text}
print("RESULT" + json.dumps(result))
"""


def process(command, url, home, token=TOKEN, check=True):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **({} if token is None else {"HF_TOKEN": token})}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def worked(scenario, folder, url, **options):
    folder.mkdir(parents=True, exist_ok=True)
    done = process([TESTS / "hub_worker.py", scenario, folder], url, folder / "home", **options)
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.slow
def test_every_strategy_arrives_and_loads_elsewhere(tmp_path):
    """What was trained is what is loaded from the Hub, where this package is not installed."""
    with HubServer(slow=0.05) as server:
        trained = worked("strategies", tmp_path, server.url)
        loaded = process(["-c", LOADS, tmp_path / "images.pt", *trained], server.url, tmp_path / "other")
        loaded = json.loads(loaded.stdout.split("RESULT")[1])
        again = ["-m", "hf_selfkd", "push", tmp_path / "end", "--repo-id", "me/again"]
        told = process(again, server.url, tmp_path / "home")
        assert "Uploaded: " in told.stdout and server.repos["me/again"].keys() == server.repos["me/end"].keys() - {
            "training_args.bin"
        }
        nothing = process(
            ["-m", "hf_selfkd", "push", tmp_path, "--repo-id", "me/x"], server.url, tmp_path, check=False
        )
        assert nothing.returncode == 1 and "has no config.json" in nothing.stderr
    for name, logits in trained.items():
        torch.testing.assert_close(torch.tensor(loaded[name]["logits"]), torch.tensor(logits))
        assert {"hf_selfkd", "self-distillation", "ps-kd"} <= set(loaded[name]["tags"])
        assert "## Results" in loaded[name]["text"] and loaded[name]["results"]["accuracy"] <= 1
        files = server.repos[f"me/{name}"]
        assert {"model.safetensors", "config.json", "README.md", "selfkd_card.json"} <= files.keys()
        assert not any("_selfkd" in file for file in files)  # no history, no training samples
        assert b"sample_id" not in files["selfkd_card.json"] and str(tmp_path).encode() not in files["README.md"]
    assert any(file.startswith("last-checkpoint/") for file in server.repos["me/checkpoint"])
    assert sum(file.endswith("trainer_state.json") for file in server.repos["me/all_checkpoints"]) == 3
    summaries = [summary for repo, summary in server.commits if repo == "me/every_save"]
    assert summaries[-1] == "End of training" and "Training in progress, epoch 3" in summaries


@pytest.mark.slow
def test_a_script_uploads_what_it_trained(tmp_path):
    rows = [f"{word} {n},{label}" for n in range(8) for word, label in (("sunny", "good"), ("rainy", "bad"))]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    flags = {"train_file": tmp_path / "texts.csv", "validation_file": tmp_path / "texts.csv", "model_type": "bert"}
    flags |= {"config_overrides": json.dumps(small), "tokenizer_vocab_size": 300, "num_train_epochs": 3}
    flags |= {"report_to": "none", "hub_model_id": "me/script", "output_dir": tmp_path / "out"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = ["-m", "hf_selfkd", "train", "text-classification", *words, "--do_train", "--do_eval", "--use_cpu"]
    with HubServer() as server:
        process([*command, "--push_to_hub"], server.url, tmp_path / "home")
        code = """
import sys
sys.modules["hf_selfkd"] = None
from transformers import pipeline
print(pipeline("text-classification", model="me/script")("sunny 3")[0]["label"] in ("good", "bad"))
"""
        assert process(["-c", code], server.url, tmp_path / "other").stdout.strip().endswith("True")
        files = server.repos["me/script"]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert b"teacher=history" in files["README.md"] and b"pipeline_tag: text-classification" in files["README.md"]
    assert not any("_selfkd" in name for name in files) and str(tmp_path).encode() not in files["README.md"]


def found_early(said, *parts):
    for (kind, text), part in zip(said, parts, strict=True):
        assert kind == "ValueError" and "\n" not in text
        assert text.startswith("push_to_hub=True: ") and part in text
        assert "hub_model_id='me/early'" in text and "hf-selfkd push" in text


@pytest.mark.slow
def test_a_hub_that_will_not_take_the_model_is_found_before_training(tmp_path):
    with HubServer(refuse="create") as server:
        found_early(worked("early", tmp_path, server.url), "refuses the token (401)", "having a bad day")


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_found_before_training(tmp_path):
    found_early(worked("early", tmp_path, "http://127.0.0.1:9"), "cannot be reached", "cannot be reached")


@pytest.mark.parametrize("refuse", ["commit", pytest.param("lfs", marks=pytest.mark.slow)])
def test_an_upload_that_fails_at_the_end_loses_nothing(tmp_path, refuse):
    with HubServer(refuse=refuse) as server:
        said = worked("late", tmp_path, server.url)
        assert said["kind"] == "RuntimeError" and "\n" not in said["text"] and "403" in said["text"]
        assert f"hf-selfkd push {tmp_path / 'late'} --repo-id me/late" in said["text"]
        assert {"model.safetensors", "README.md", "config.json"} <= set(said["files"])
        assert any("An upload during training failed" in line for line in said["warnings"])
        assert "model.safetensors" not in server.repos["me/late"]
        server.refuse = None
        process(["-m", "hf_selfkd", "push", tmp_path / "late", "--repo-id", "me/late"], server.url, tmp_path / "home")
        assert "model.safetensors" in server.repos["me/late"]
