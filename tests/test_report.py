"""The report: wrong labels are found, what is drawn is what was logged, and one page holds all."""

import base64
import html.parser
import io
import json
import os
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import make_model, make_samples, make_trainer, refused
from PIL import Image
from test_cli import call
from torch.utils.data import Subset

from hf_selfkd import Seq2SeqSelfKDTrainer
from hf_selfkd.cards import CardFacts, Evaluation
from hf_selfkd.comparison import report as comparison
from hf_selfkd.comparison.cells import Cell
from hf_selfkd.hub import IGNORED
from hf_selfkd.metrics import compute_classification_metrics
from hf_selfkd.metrics.calibration import risk_coverage_of
from hf_selfkd.report import save_samples, write_report
from hf_selfkd.report.content import content_of, raw_item
from hf_selfkd.report.page import make_page
from hf_selfkd.report.suspects import Paths, most_suspicious, most_undecided, paths_of
from hf_selfkd.report.svg import bar_chart, line_chart, reliability_chart, spark_line, ticks
from hf_selfkd.runs import SAMPLES_FILE, Run, find_runs, names_of


def trained(out, model, dataset, trainer=None, **options):
    settings = {"num_train_epochs": 4, "logging_steps": 2, "learning_rate": 5e-3} | options
    extra = {} if trainer is None else {"trainer": trainer}
    made = make_trainer(out, make_model(model), dataset, **extra, **settings)
    made.train()
    made.save_state()
    return made


# Which samples


def naive_paths(trainer, dataset):
    """The probability of each label in what is stored, one sample after the other."""
    return np.array([trainer.teacher.stored([i])[0, int(dataset[i]["labels"])].item() for i in range(len(dataset))])


def test_paths_are_the_probabilities_of_the_labels(tmp_path):
    data = make_samples("images")
    made = trained(tmp_path, "resnet", data, teacher="history")
    paths = paths_of(made.teacher)
    assert paths.ids.tolist() == list(range(len(data))) and paths.probs.shape == (len(data), 1)
    np.testing.assert_allclose(paths.probs[:, 0], naive_paths(made, data), rtol=1e-6)


def test_with_a_trace_there_is_a_column_an_epoch(tmp_path):
    data = make_samples("images")
    made = trained(tmp_path, "resnet", data, teacher="history", history_trace=True)
    paths = paths_of(made.teacher)
    assert paths.probs.shape == (len(data), 4) and not np.isnan(paths.probs).any()
    np.testing.assert_allclose(paths.probs[:, -1], naive_paths(made, data), atol=1e-3)  # stored in half precision
    assert most_undecided(paths, 3).tolist() == np.argsort(-paths.probs.std(axis=1), kind="stable")[:3].tolist()


def test_order_of_suspicion():
    nan = np.nan
    paths = Paths(np.array([7, 8, 9]), np.array([[0.2, nan, 0.4], [0.9, 0.1, 0.5], [0.1, 0.1, 0.1]], np.float32))
    assert most_suspicious(paths, 2).tolist() == [2, 0]
    assert most_undecided(paths, 1).tolist() == [1]
    assert most_undecided(Paths(paths.ids, paths.probs[:, :2]), 3).size == 0


def test_wrong_labels_gather_among_the_most_suspicious(tmp_path):
    """Two groups of images; some labels are of the other group."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    wrong = set(rng.choice(120, 12, replace=False).tolist())
    pixels = torch.from_numpy(rng.normal(size=(120, 3, 8, 8)) + 1.5 * (2 * labels[:, None, None, None] - 1)).float()
    given = [int(label) ^ (i in wrong) for i, label in enumerate(labels)]
    data = [{"pixel_values": pixels[i], "labels": given[i]} for i in range(120)]
    made = trained(tmp_path, "resnet", data, teacher="history", history_trace=True, num_train_epochs=6)
    told = json.loads(save_samples(made).read_text())
    assert {sample["id"] for sample in told["suspicious"][:12]} == wrong
    assert all(sample["label"] != sample["believed"][0][0] for sample in told["suspicious"][:12])


def test_nothing_is_told_where_nothing_is_remembered(tmp_path):
    for place, options in enumerate(({"alpha": 0.0}, {"teacher": "snapshot"}, {"teacher": "rank"})):
        made = trained(tmp_path / str(place), "resnet", make_samples("images"), num_train_epochs=2, **options)
        assert save_samples(made) is None
    assert not list(tmp_path.rglob(SAMPLES_FILE))


# What they look like


def test_a_sample_is_shown_as_a_picture_or_a_text():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert content_of({"image": grey, "label": 1})["image"].startswith("data:image/png;base64,")
    assert content_of({"pixel_values": torch.rand(3, 8, 8)})["image"].startswith("data:image/png;base64,")
    assert content_of({"pixel_values": torch.rand(5, 8, 8)}) == {}
    assert content_of({"id": "7", "text": "a  <b>\n c", "label": 0}) == {"text": "a <b> c"}
    assert len(content_of({"text": "word " * 1000})["text"]) == 600
    assert content_of({"input_ids": [1, 2]}) == {} and content_of({}) == {}


def pixels_of(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_pictures_of_other_modes_are_seen_as_they_are():
    wide = Image.fromarray((np.arange(64, dtype=np.uint16) * 100).reshape(8, 8))
    floats = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    for image in (wide, floats):
        shown = pixels_of(content_of({"image": image})["image"])
        assert shown.min() == 0 and shown.max() == 255
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (pixels_of(content_of({"image": clear})["image"]) == 255).all()  # nothing but paper


def test_the_raw_sample_of_a_transformed_dataset():
    from datasets import Dataset

    data = Dataset.from_dict({"text": ["a", "b", "c"]}).with_transform(lambda batch: {"n": [1] * len(batch["text"])})
    assert raw_item(data, 2) == {"text": "c"}
    assert raw_item(Subset(data, [2, 0]), 1) == {"text": "a"}
    assert raw_item([(1, 2)], 0) == {}


def test_ids_of_ones_own_are_found(tmp_path):
    from datasets import Dataset

    samples = make_samples("images", 10)
    rows = [samples[i] for i in range(10)]
    data = Dataset.from_dict(
        {
            "pixel_values": [row["pixel_values"].tolist() for row in rows],
            "labels": [int(row["labels"]) for row in rows],
            "key": [1000 - 3 * i for i in range(10)],
        }
    ).with_format("torch")
    made = trained(tmp_path, "resnet", data, teacher="history", sample_id_column="key", num_train_epochs=2)
    told = json.loads(save_samples(made).read_text())
    label = {1000 - 3 * i: int(row["labels"]) for i, row in enumerate(rows)}
    names = made.model.config.id2label
    assert len(told["suspicious"]) == 10
    assert all(sample["label"] == names[label[sample["id"]]] for sample in told["suspicious"])


@pytest.mark.parametrize(("model", "kind"), [("plain_gpt2", "words"), ("marian", "pairs")])
def test_tokens_are_shown_with_their_probabilities(tmp_path, model, kind):
    data = make_samples(kind)
    trainer = Seq2SeqSelfKDTrainer if kind == "pairs" else None
    made = trained(tmp_path, model, data, trainer, teacher="history", history_trace=True, num_train_epochs=3)
    told = json.loads(save_samples(made).read_text())
    assert told["per_token"] and told["epochs"] == 3
    sample = told["suspicious"][0]
    labels = torch.as_tensor(data[sample["id"]]["labels"])
    known = labels[1:] if kind == "words" else labels
    known = known[known != -100]
    assert [word for word, _, _ in sample["tokens"]] == [str(int(label)) for label in known]
    stored = made.teacher.stored([sample["id"]])
    expected = stored.gather(-1, known[:, None])[:, 0].tolist()
    assert [prob for _, prob, _ in sample["tokens"]] == pytest.approx(expected, abs=1e-4)
    assert [best for _, _, best in sample["tokens"]] == [str(int(best)) for best in stored.argmax(-1)]


# The drawings


def numbers(drawing, tag="polyline"):
    """The points of each line of a drawing."""
    root = ElementTree.fromstring(drawing)
    return [
        np.array([[float(x) for x in pair.split(",")] for pair in line.get("points").split()])
        for line in root.iter(tag)
    ]


def test_lines_stand_where_their_values_are():
    line = np.array([[0, 1.0], [5, 3.0], [10, 2.0]])
    (points,) = numbers(line_chart({"one": line}, "Step", "Loss"))
    slope = (points[2, 0] - points[0, 0]) / 10
    np.testing.assert_allclose(points[:, 0], points[0, 0] + slope * line[:, 0], atol=0.1)
    height = (points[0, 1] - points[1, 1]) / 2  # y grows downwards
    np.testing.assert_allclose(points[:, 1], points[0, 1] - height * (line[:, 1] - 1), atol=0.1)
    assert len(line_chart({"one": line * 1e300}, "x")) < 3000 and "1e+0" not in line_chart({"one": line}, "x")
    assert 0 < points.min() and points[:, 0].max() < 560 and points[:, 1].max() < 300


def test_long_lines_are_thinned_and_keep_their_end():
    line = np.stack((np.arange(5000.0), np.sin(np.arange(5000.0))), axis=1)
    (points,) = numbers(line_chart({"one": line}, "x"))
    assert 100 < len(points) <= 401
    (whole,) = numbers(line_chart({"one": line[[0, -1]]}, "x"))
    assert points[-1, 0] == whole[-1, 0]


def test_bars_are_as_high_as_their_values():
    drawing = bar_chart([0, 1, 2, 3], [1, 4, 2], "x", "y")
    heights = [float(bar.get("height")) for bar in ElementTree.fromstring(drawing).iter("rect")]
    np.testing.assert_allclose(np.array(heights) / heights[0], [1, 4, 2], rtol=0.01)
    assert "<rect" in bar_chart([0, 1], [0], "x", "y")


def test_reliability_shows_filled_bins_and_their_gap():
    curve = {"count": [0, 4, 6], "confidence": [0, 0.5, 0.9], "accuracy": [0, 0.25, 1.0]}
    bars = [bar for bar in ElementTree.fromstring(reliability_chart(curve)).iter("rect")]
    assert [bar.get("class") for bar in bars] == ["bar c0", "gap"] * 2
    heights = [float(bar.get("height")) for bar in bars]
    np.testing.assert_allclose(np.array(heights) / heights[2], [0.25, 0.25, 1, 0.1], atol=0.01)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 870, [0, 200, 400, 600, 800]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    np.testing.assert_allclose(ticks(low, high), expected, atol=1e-12)


def test_gaps_of_a_path_are_left_out():
    (points,) = numbers(spark_line([0.0, None, 1.0]))
    assert len(points) == 2 and points[0, 1] > points[1, 1] and "0.00, 1.00" in spark_line([0.0, None, 1.0])
    assert len(numbers(spark_line([0.5]))[0]) == 1


# The page


class Reader(html.parser.HTMLParser):
    """Notes what a page refers to, and whether its elements are closed."""

    VOID = ("meta", "img", "br", "line", "rect", "polyline")

    def __init__(self, text):
        super().__init__()
        self.addresses, self.open, self.tags = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def run_folder(path, **changes):
    """A folder as a training leaves it."""
    path.mkdir(parents=True)
    log = [{"step": s, "loss": 3.0 / s, "alpha": 0.1 * s, "epoch": s / 2, "eval_runtime": s} for s in range(1, 7)]
    log.append({"step": 6, "train_runtime": 12.5, "train_loss": 1.0})
    log += [{"step": s, "eval_loss": 1.0, "eval_accuracy": 0.5 + 0.1 * s, "epoch": s} for s in (2, 4)]
    (path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    curve = {"count": [10, 30], "confidence": [0.4, 0.9], "accuracy": [0.5, 0.7]}
    evaluation = Evaluation("eval", {"accuracy": 0.65, "nll": 1.25, "ece": 17.5}, 40, 6, {}, curve)
    test = Evaluation("test", {"accuracy": 2 / 3, "nll": 0.9}, 3, 6)
    training = {"seconds": 12.5, "steps": 6}
    facts = CardFacts("tiny", "TinyModel", 10, evaluations=[evaluation, test], settings={"seed": 3}, training=training)
    facts.method = {"teacher": "history", "alpha": 0.8, "alpha_schedule": "linear", "alpha_reached": 0.8}
    for name, value in changes.items():
        setattr(facts, name, value)
    facts.save(path)
    lines = ["row,prediction,confidence,label,label_probability", "0,a,0.9,a,0.9", "1,a,0.8,b,0.2", "2,b,0.6,b,0.6"]
    (path / "predictions.csv").write_text("\n".join(lines) + "\n")
    sample = {"id": 4, "path": [0.1, None, 0.2], "mean": 0.15, "text": "<script>alert(1)</script> & more"}
    sample |= {"label": "a<b", "believed": [["c", 0.7]]}
    told = {"samples": 9, "epochs": 3, "per_token": False, "histogram": {"count": [4, 5], "edges": [0, 0.5, 1]}}
    (path / SAMPLES_FILE).write_text(json.dumps(told | {"suspicious": [sample], "undecided": []}))
    return path


def test_a_page_needs_nothing_beside_it(tmp_path):
    page = write_report([run_folder(tmp_path / "run")])
    assert page == tmp_path / "run" / "_report.html"
    text = page.read_text()
    reader = Reader(text)
    assert reader.open == [] and "script" not in reader.tags and "link" not in reader.tags
    assert reader.addresses == [] and "http" not in text.replace("http-equiv", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text and "a&lt;b" in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text


def test_a_page_tells_what_the_run_left(tmp_path):
    text = write_report([run_folder(tmp_path / "run")]).read_text()
    assert "TinyModel" in text and "mean confidence 77.5 %, accuracy 65.0 %" not in text  # the test set counts first
    rows = dict(confidence=np.array([0.9, 0.8, 0.6]), correct=np.array([True, False, True]))
    assert f"AURC {risk_coverage_of(**rows).aurc:.1f}" in text
    assert "<td>Accuracy (%)</td><td>65.00</td>" in text and "<td>seed</td><td>3</td>" in text
    captions = re.findall(r"<figcaption><strong>(.*?)</strong>", text)
    assert captions[0] == "Split eval" and {"Training loss", "alpha", "Accuracy (%)"} <= set(captions)
    assert "Evaluation loss" not in captions and "runtime" not in text  # one is flat, the other no metric
    assert "Most suspicious" in text and "Most undecided" not in text


def test_what_is_of_another_training_is_not_shown(tmp_path):
    """A folder that was trained into twice, or that a model was evaluated into."""
    folder = run_folder(tmp_path / "run")
    results = folder / "all_results.json"
    results.write_text(json.dumps({"predict_temperature": 2.0, "train_runtime": 12.5}))
    assert Run.load(folder).rows is not None and Run.load(folder).results["predict_temperature"] == 2.0
    results.write_text(json.dumps({"predict_temperature": 2.0, "train_runtime": 99.0}))
    assert Run.load(folder).results == {}
    predictions = (folder / "predictions.csv").read_text()
    (folder / "predictions.csv").write_text(predictions.replace("1,a,0.8,b,0.2", "1,a,0.8,a,0.8"))
    assert Run.load(folder).rows is None  # the test accuracy of the card is another one
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] = [
        {**entry, "train_runtime": 7.0} if "train_runtime" in entry else entry for entry in state["log_history"]
    ]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert Run.load(folder).facts is None
    made = trained(tmp_path / "run", "resnet", make_samples("images"), alpha=0.0)
    assert save_samples(made) is None and not (folder / SAMPLES_FILE).exists()


def test_a_folder_may_be_copied_in_any_order(tmp_path):
    folder = run_folder(tmp_path / "run")
    for place, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (1000 * place, 1000 * place))
    run = Run.load(folder)
    assert run.rows is not None and run.facts is not None and run.samples is not None


def test_a_training_that_was_stopped_is_told_by_its_checkpoint(tmp_path):
    folder = run_folder(tmp_path / "run")
    whole = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    (folder / "checkpoint-3").mkdir()
    state = folder / "checkpoint-3" / "trainer_state.json"
    state.write_text(json.dumps({"log_history": whole[:3]}))
    assert Run.load(folder).log == whole  # an earlier part of the same training, whatever its time
    state.write_text(json.dumps({"log_history": [{"step": 1, "loss": 9.0}]}))
    assert Run.load(folder).log == [{"step": 1, "loss": 9.0}]
    os.utime(state, (0, 0))
    assert Run.load(folder).log == whole


def test_evaluation_sets_with_names_and_losses_that_are_no_numbers(tmp_path):
    log = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 0.0}]
    log += [{"step": 3, "eval_a_loss": 1.0, "eval_a_nll": 1.0}, {"step": 3, "eval_b_loss": 2.0, "eval_b_nll": 2.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    run = Run.load(tmp_path)
    assert run.diverged_at == 2 and {one.split: one.metrics["nll"] for one in run.evaluations} == {
        "eval_a": 1,
        "eval_b": 2,
    }
    assert "Diverged" in make_page([run])


def test_uploads_leave_report_and_samples_here(tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    folder = run_folder(tmp_path / "run")
    write_report(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / SAMPLES_FILE).write_text("{}")
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    left = set(filter_repo_objects(paths, ignore_patterns=IGNORED))
    assert left == {"selfkd_card.json", "predictions.csv"}
    assert "_report.html" in paths and "_report.html" not in set(filter_repo_objects(paths, ignore_patterns=["_*"]))


def test_runs_are_drawn_together(tmp_path):
    folders = [run_folder(tmp_path / name / "model", settings={}) for name in ("plain_0", "history_0")]
    folders[0].joinpath(SAMPLES_FILE).unlink()
    text = write_report(folders, tmp_path / "new" / "both.html", "A & B").read_text()
    assert "<title>A &amp; B</title>" in text and "plain_0, eval" in text
    assert text.count("No sample is shown") == 1 and text.count("Most suspicious") == 1
    losses = next(part for part in text.split("<figure>") if "Training loss" in part)
    assert losses.count("<polyline") == 2 and '<div class="legend">' in losses
    assert names_of([Run.load(folder) for folder in folders]) == ["plain_0", "history_0"]


def test_a_comparison_has_its_tables_and_models(tmp_path):
    rng, cells = np.random.default_rng(0), []
    for method in ("plain", "history"):
        for seed in range(3):
            rows = {"confidence": rng.random(50), "correct": rng.random(50) > 0.3, "label_probability": rng.random(50)}
            cells.append(Cell(method, seed, {"accuracy": 0.5, "train_seconds": 1.0}, rows))
    comparison.write(comparison.summarize(cells), tmp_path, "compared")
    page = write_report([tmp_path])
    text = page.read_text()
    assert "minus plain, 95 % interval" in text and "<h2>Curves" not in text and Reader(text).open == []
    run_folder(tmp_path / "plain_0" / "model")
    assert find_runs(tmp_path) == find_runs(tmp_path / "plain_0") == [tmp_path / "plain_0" / "model"]
    assert "<h2>Curves" in write_report([tmp_path]).read_text()


def test_a_run_of_a_trainer_without_card(tmp_path):
    """What `save_state` leaves is enough, and a checkpoint is, too."""
    data = make_samples("images")
    made = trained(
        tmp_path / "out",
        "resnet",
        data,
        eval_dataset=make_samples("images", seed=1),
        compute_metrics=compute_classification_metrics,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    run = Run.load(made.args.output_dir)
    assert run.facts is None and run.evaluations[0].metrics["nll"] > 0 and {"loss", "eval_nll"} <= set(run.logged())
    text = make_page([run])
    assert "Without a model card" in text and "No sample is shown" in text
    (tmp_path / "out" / "trainer_state.json").unlink()
    assert Run.load(tmp_path / "out").log == run.log[: len(Run.load(tmp_path / "out").log)]


def test_what_is_no_run_is_told(tmp_path):
    refused(lambda: Run.load(tmp_path), "has no trainer_state.json", "save_state")
    refused(lambda: find_runs(tmp_path / "none"), "is no folder", "--output_dir")
    refused(lambda: write_report([]), "no training given")
    run_folder(tmp_path / "run")
    (tmp_path / "run" / SAMPLES_FILE).write_text('{"samples": 9, "epo')
    refused(lambda: Run.load(tmp_path / "run"), SAMPLES_FILE, "is no JSON")
    (tmp_path / "run" / SAMPLES_FILE).write_text("{}")
    refused(lambda: Run.load(tmp_path / "run"), SAMPLES_FILE, "is not what hf_selfkd", "epochs")
    (tmp_path / "run" / "trainer_state.json").write_text("[]")
    refused(lambda: Run.load(tmp_path / "run"), "trainer_state.json", "is not what")
    (tmp_path / "comparison.json").write_text("{}")
    refused(lambda: write_report(str(tmp_path)), "comparison.json", "is not what", "methods")
    status, said = call("report", str(tmp_path / "none"))
    assert status == 1 and said.startswith("Error: ") and "is no folder" in said


def test_the_command_writes_a_page(tmp_path):
    folder = run_folder(tmp_path / "run")
    status, said = call("report", str(folder), "--output", str(tmp_path / "page.html"))
    assert status == 0 and f"Wrote {tmp_path / 'page.html'}" in said and (tmp_path / "page.html").is_file()
