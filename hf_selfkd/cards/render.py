"""A card of its facts: metadata that the Hub reads, a text that people read, and a user's own card left as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..markup import markdown_table
from ..metrics.calibration import noise_of_gap
from .facts import CardFacts, Evaluation
from .merge import BEGIN, END, merged_data, merged_text, read_card
from .names import METRICS, TASKS, TEACHERS, metric, papers
from .pictures import draw_pictures


LISTED = 12  # classes that are named

# The text


def render(facts: CardFacts, pictures: dict[str, str] | None = None) -> str:
    """
    The text of a card, without metadata.

    Args:
        facts ([`CardFacts`]): what it tells.
        pictures (`dict`, *optional*): paths of pictures beside the card: `reliability`, `curves`.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    template = environment.get_template("card.md.jinja")
    text = template.render(
        facts=facts,
        opening=_opening(facts),
        inputs=_inputs(facts),
        tables=[_table(evaluation, facts) for evaluation in facts.evaluations if evaluation.metrics],
        chosen=_chosen(facts),
        pictures={"reliability": None, "curves": None} | (pictures or {}),
        comparison=_comparison(facts.comparison),
        usage=usage(facts),
        method=describe_method(facts),
        data=_data(facts),
        training=_training(facts),
        settings={name: f"{value:g}" if isinstance(value, float) else value for name, value in facts.settings.items()},
        papers=papers(facts.method),
    )
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for n, line in enumerate(lines) if line or (n and lines[n - 1])]  # no two empty lines in a row
    return "\n".join(kept).strip() + "\n"


def _opening(facts: CardFacts) -> str:
    task = TASKS.get(facts.task or "")
    size = "" if facts.parameters is None else f" of {_count(facts.parameters)} parameters"
    words = f"A `{facts.model_class}`{size}" + (f" for {task.words}" if task else "")
    origin = f", fine-tuned from [{facts.base_model}](https://huggingface.co/{facts.base_model})"
    if facts.base_model is None:
        origin = ""
    teacher, heads = facts.method.get("teacher", "none"), facts.method.get("auxiliary_heads")
    how = "with self-distillation" if teacher != "none" or heads else "without self-distillation"
    if not facts.method:
        return f"{words}{origin}. How it was trained is not known to this card.{_exit(facts)}"
    return f"{words}{origin}, trained {how} by `hf_selfkd`.{_exit(facts)}"


def _exit(facts: CardFacts) -> str:
    """Of which model an exit is one."""
    if not facts.exit:
        return ""
    layers, whole, repo = facts.exit["layers"], f"`{facts.exit['whole']}`", facts.exit.get("repo_id")
    if repo:
        whole = f"[{facts.exit['whole']}](https://huggingface.co/{repo})"
    first = "the first layer" if layers == 1 else f"the first {layers} layers"
    of = f"{facts.exit['of']} in the decoder, all of the encoder" if facts.exit.get("decoder") else facts.exit["of"]
    return f" It is an exit of {whole}: {first} of {of}, and the head that was trained on them."


def _inputs(facts: CardFacts) -> str:
    """What goes in and what comes out."""
    parts = []
    if facts.classes:
        names = ", ".join(f"`{name}`" for name in facts.classes[:LISTED])
        more = f" and {len(facts.classes) - LISTED} more, which `config.json` names" * (len(facts.classes) > LISTED)
        parts.append(f"It tells {len(facts.classes)} classes: {names}{more}.")
    if facts.input_length:
        parts.append(f"Inputs have at most {facts.input_length:,} tokens.")
    return " ".join(parts)


def _count(number: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"


def _table(evaluation: Evaluation, facts: CardFacts) -> dict[str, Any]:
    title = f"On the split `{evaluation.split}`"
    if evaluation.samples is not None:
        title += f", {evaluation.samples:,} samples"
    steps = facts.training.get("steps")
    if evaluation.step is not None and steps and evaluation.step != steps:
        title += f", measured after step {evaluation.step:,} of {steps:,}"
    known = sorted(evaluation.metrics, key=_place)
    rows = [
        {
            "name": metric(name).name + (f": {metric(name).meaning}" if metric(name).meaning else ""),
            "value": metric(name).shown(evaluation.metrics[name]),
            "better": "lower" if metric(name).lower else "higher" if name in METRICS else "",
        }
        for name in known
        if math.isfinite(evaluation.metrics[name]) and not (name == "top5_accuracy" and evaluation.metrics[name] == 1)
    ]
    notes = [f"{metric(name).name}: `{text}`." for name, text in evaluation.signatures.items()]
    if evaluation.reliability is not None:
        notes.insert(0, _confidence(evaluation.reliability))
    return {"title": title + ":", "rows": rows, "notes": notes}


def _place(name: str) -> tuple[int, str]:
    order = list(METRICS)
    return (order.index(name) if name in METRICS else len(order), name)


def _confidence(reliability: dict[str, list]) -> str:
    """How sure the model is on average, against how often it is right."""
    sure, right = (
        100 * np.average(reliability[name], weights=reliability["count"]) for name in ("confidence", "accuracy")
    )
    if abs(sure - right) < 1:
        return f"Its mean confidence, {sure:.1f} %, is within a point of its accuracy."
    samples = sum(reliability["count"])
    noise = noise_of_gap(right / 100, samples)
    if abs(sure - right) <= noise:
        return (
            f"Its mean confidence is {sure:.1f} %, its accuracy {right:.1f} %: {samples:,} samples cannot tell a "
            f"difference below {noise:.1f} points."
        )
    word = "over" if sure > right else "under"
    return f"Its mean confidence is {sure:.1f} %, its accuracy {right:.1f} %: the model is {word}-confident."


def _chosen(facts: CardFacts) -> str:
    if facts.chosen_by is None:
        return ""
    chosen = facts.chosen_by
    return (
        f"The weights are those of step {chosen['step']:,}, where `{chosen['metric']}` was best "
        f"({chosen['value']:.4g}) among the checkpoints; that figure is therefore better than on fresh data."
    )


def _comparison(runs: list[dict[str, Any]]) -> str:
    """The table of a comparison: mean and standard deviation over the seeds of each method."""
    if not runs:
        return ""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    shown = [
        name for name in sorted({name for run in runs for name in run}, key=_place) if name in _in_comparison(runs)
    ]
    head = ["method", "seeds", *(metric(name).name for name in shown)]
    body = []
    for method in methods:
        own = [run for run in runs if run["method"] == method]
        cells = [_mean(name, [run[name] for run in own if name in run]) for name in shown]
        body.append([method, str(len({run.get("seed") for run in own})), *cells])
    seeds = min(sum(run["method"] == method for run in runs) for method in methods)
    told = "Mean and standard deviation over seeds."
    return (
        markdown_table(head, body)
        + f"\n\n{told if seeds > 1 else 'Some methods have one seed only, which tells no spread.'}"
    )


def _in_comparison(runs: list[dict[str, Any]]) -> list[str]:
    found = {name for run in runs for name in run if name in METRICS and name != "loss"}
    return sorted(
        found - ({"accuracy"} if "error" in found else set()) - {"ece_15", "eaurc", "brier", "top5_accuracy"}
    )


def _mean(name: str, values: list[float]) -> str:
    if not values:
        return ""
    return metric(name).with_spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def usage(facts: CardFacts) -> str:
    """Python that loads the model with plain transformers and uses it."""
    name = facts.repo_id or facts.model_name
    task = TASKS.get(facts.task or "")
    if facts.library == "peft":
        auto, base = task.auto if task else "AutoModel", facts.base_model or "the base model"
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
            f'base = {auto}.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "{name}")'
        )
    if task is None:
        return f'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{name}")'
    if task.auto == "AutoModelForSeq2SeqLM":
        return (
            f'from transformers import {task.auto}, AutoTokenizer\n\nmodel = {task.auto}.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            'inputs = tokenizer(["..."], return_tensors="pt", padding=True)\n'
            "print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))"
        )
    example = '"..."'
    if facts.task in ("image-classification", "object-detection", "image-segmentation"):
        example = '"image.jpg"'
    elif facts.task == "fill-mask":
        example = 'f"... {predict.tokenizer.mask_token} ..."'
    return (
        f'from transformers import pipeline\n\npredict = pipeline("{facts.task}", model="{name}")\n'
        f"print(predict({example}))"
    )


def describe_method(facts: CardFacts) -> str:
    """What was done beside plain training, in sentences of Markdown."""
    method, parts = facts.method, []
    teacher, heads = method.get("teacher", "none"), method.get("auxiliary_heads")
    if teacher in TEACHERS:
        schedule = method["alpha_schedule"].replace("_", " ")
        whole = method.get("warm_start") or teacher == "predictions"
        parts.append(
            ("Every label" if whole else "From the second epoch on every label") + " was softened: "
            f"`(1 - a) * label + a * past`, where the past is {TEACHERS[teacher]} "
            f"(`teacher={teacher}`); the weight `a` followed the schedule `{schedule}` up to {method['alpha']:.3g} "
            f"and was {method['alpha_reached']:.3g} at the end."
        )
    elif teacher == "rank":
        parts.append(
            "Beside its labels the model learned from the order of its own scores: among the other classes, shares by "
            f"Zipf's law over their ranks (`teacher=rank`); the weight of that followed the schedule "
            f"`{method['alpha_schedule'].replace('_', ' ')}` up to {method['alpha']:.3g} and was "
            f"{method['alpha_reached']:.3g} at the end."
        )
    if heads:
        preset = f" (preset `{method['preset']}`)" if method.get("preset") else ""
        what = "class and rotation of an image" if heads["views"] == "rotation" else "the labels"
        parts.append(f"{heads['heads']} auxiliary heads on intermediate layers{preset} learned {what}.")
        if heads.get("heads_to_model_weight"):
            parts.append("What they know together was taught to the classifier.")
        parts.append(
            "This model is one of these heads, with the layers before it; the others are not part of it."
            if facts.exit
            else "The heads are not part of this model."
        )
    if method.get("label_smoothing"):
        parts.append(f"Labels were smoothed by {method['label_smoothing']}.")
    if method.get("mixing"):
        mixing = method["mixing"]
        kinds = [kind for kind, name in (("mixup", "mixup_alpha"), ("CutMix", "cutmix_alpha")) if mixing[name]]
        parts.append(f"{100 * mixing['mix_probability']:.0f} % of the batches were mixed ({' and '.join(kinds)}).")
    if not method:
        return "How the model was trained is not known to this card."
    return " ".join(parts) or "Plain training on the labels."


def _data(facts: CardFacts) -> str:
    data = facts.data
    named = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets)
    named = named or data.get("description") or "data that this card does not name"
    parts = [f"Trained on {named}"]
    if "configuration" in data:
        parts.append(f"configuration `{data['configuration']}`")
    if "samples" in data:
        parts.append(f"{data['samples']:,} samples")
    if "columns" in data:
        parts.append("columns " + ", ".join(f"`{name}`" for name in data["columns"]))
    return ", ".join(parts) + "."


def _training(facts: CardFacts) -> str:
    training = facts.training
    parts = []
    if training.get("epochs"):
        parts.append(f"{training['epochs']:.4g} epochs, {training['steps']:,} steps")
    if "seconds" in training:
        seconds = training["seconds"]
        parts.append(f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes")
    if training.get("processes", 1) > 1:
        parts.append(f"{training['processes']} processes")
    if "energy" in training:
        energy = training["energy"]
        parts.append(f"{energy['kwh']:.3g} kWh, {energy['co2_kg']:.3g} kg of CO2 (measured by CodeCarbon)")
    if "device" in training:
        parts.append(f"on {training['device']}")
    return ", ".join(parts) + "." if parts else ""


# Metadata


def metadata(facts: CardFacts) -> dict[str, Any]:
    """The metadata of a card, as `ModelCardData` of `huggingface_hub` takes it."""
    method = facts.method
    distils = method.get("teacher", "none") != "none" or method.get("auxiliary_heads")
    tags = ["hf_selfkd", *(["self-distillation"] if distils else []), *(paper.tag for paper in papers(method))]
    results = eval_results(facts)
    values = {
        "library_name": facts.library,
        "language": facts.language,
        "license": facts.license,
        "base_model": facts.base_model,
        "pipeline_tag": facts.task,
        "datasets": facts.datasets,
        "tags": list(dict.fromkeys([*facts.tags, *tags])),
        "metrics": list(dict.fromkeys(result.metric_type for result in results)),
        "eval_results": results,
        "model_name": facts.model_name if results else None,
    }
    energy = facts.training.get("energy")
    if energy:  # in grams, as the Hub has it
        values["co2_eq_emissions"] = {"emissions": 1000 * energy["co2_kg"], "source": "codecarbon"}
    return {name: value for name, value in values.items() if value}


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """The results of the `model-index`; the Hub shows them beside those of other models."""
    task, found = facts.task or "other", []
    for evaluation in facts.evaluations:
        described = facts.datasets[0] if facts.datasets else None
        named = described if evaluation.data is None else evaluation.data
        for name in sorted(evaluation.metrics, key=_place):
            value = evaluation.metrics[name]
            if name == "loss" or not math.isfinite(value) or not _of_these_weights(evaluation, facts):
                continue
            arguments = {"signature": evaluation.signatures[name]} if name in evaluation.signatures else None
            found.append(
                EvalResult(
                    task_type=task,
                    task_name=TASKS[task].name if task in TASKS else None,
                    dataset_type=named or "unknown",
                    dataset_name=named or facts.data.get("description") or "unknown",
                    dataset_config=facts.data.get("configuration") if evaluation.data is None else None,
                    dataset_split=evaluation.split,
                    metric_type=name,
                    metric_name=metric(name).plain,
                    metric_value=round(value, 6),
                    metric_args=arguments,
                )
            )
    return found


def _of_these_weights(evaluation: Evaluation, facts: CardFacts) -> bool:
    """Whether an evaluation is of the weights that the card is of."""
    chosen = facts.chosen_by or {}
    return evaluation.step in (None, facts.training.get("steps"), chosen.get("step")) or not facts.training


# The file


def write_card(facts: CardFacts, folder: str | Path) -> Path:
    """
    Write `README.md`, `selfkd_card.json` and pictures into a folder. A card of the user's own keeps its text and its
    metadata, and gets ours below; a card of ours is made anew between its marks.

    Args:
        facts ([`CardFacts`]): what the card tells.
        folder (`str` or `Path`): of the model.

    Returns:
        `Path`: of the card.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{BEGIN}\n{render(facts, draw_pictures(facts, folder))}{END}\n"
    path, ours = folder / "README.md", metadata(facts)
    stored = CardFacts.find(folder)
    before = {} if stored is None else stored.written
    facts.written = ModelCardData(**ours, ignore_metadata_errors=True).to_dict()
    if path.is_file():
        card = read_card(path)
        if card is not None:
            text, ours = merged_text(card.text, text), merged_data(card.data, before, ours)
    card = ModelCard(f"---\n{ModelCardData(**ours, ignore_metadata_errors=True)}\n---\n\n{text}")
    path.write_text(str(card), encoding="utf-8")
    facts.save(folder)
    return path
