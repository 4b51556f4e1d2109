"""A card that stands there already: what its user wrote stays, what we wrote before is made anew."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results


logger = logging.getLogger(__name__)

BEGIN = "<!-- Made by hf_selfkd from selfkd_card.json: text between these marks is replaced. -->"
END = "<!-- End of what hf_selfkd made. -->"
# What the stock Trainer writes into a card that nobody has touched.
STOCK = "This model card has been generated automatically according to the information the Trainer had access to"
LISTS = ("tags", "datasets", "metrics", "language")  # of metadata, that a card and its user fill together


def read_card(path: Path) -> ModelCard | None:
    """A card that stands there; one that cannot be read is kept under another name."""
    try:
        return ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
    except Exception as error:  # of YAML, of the client, of the encoding
        kept = path.with_name("README.kept.md")
        path.replace(kept)
        logger.warning(f"{path} cannot be read as a model card ({type(error).__name__}): kept as {kept.name}.")
        return None


def merged_text(stored: str, ours: str) -> str:
    """Our text in the place of what we wrote before, below a text of the user's, or instead of an untouched draft."""
    before, marked, rest = stored.rpartition(BEGIN)
    _, ended, after = rest.partition(END)
    if marked and ended:
        return before.lstrip("\n") + ours + after.lstrip("\n")
    stock = STOCK in stored and stored.count("More information needed") >= 3
    draft = "Model Card for Model ID" in stored and stored.count("[More Information Needed]") > 20  # PEFT's
    if stock or draft or not stored.strip():
        return ours
    return stored.strip("\n") + "\n\n" + ours


def merged_data(data: Any, before: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """
    Our metadata, and what the user has added or changed since we last wrote (`before`), which counts.

    Args:
        data (`ModelCardData`): of the card that stands there.
        before (`dict`): what we wrote last, as a dictionary.
        ours (`dict`): what we write now, as arguments of `ModelCardData`.
    """
    result = dict(ours)
    for name, value in vars(data).items():
        if value is None or name in ("eval_results", "model_name", "ignore_metadata_errors"):
            continue
        if name in LISTS:
            values, old = (part if isinstance(part, list) else [part] for part in (value, before.get(name, [])))
            added = [one for one in values if one not in old]
            result[name] = list(dict.fromkeys([*added, *ours.get(name, [])]))
            if not result[name]:
                del result[name]
        elif value != before.get(name) and not (name == "base_model" and _is_a_path(value)):
            result[name] = value
    old = {_identity(one) for one in _results(before)}
    added = [one for one in data.eval_results or [] if _identity(one) not in old]
    if added or ours.get("eval_results"):
        result["eval_results"] = added + ours.get("eval_results", [])
        result["model_name"] = data.model_name or ours.get("model_name") or "model"
    return result


def _is_a_path(value: Any) -> bool:
    return isinstance(value, str) and (value.startswith(("/", ".", "~")) or "\\" in value or value.count("/") > 1)


def _results(written: dict[str, Any]) -> list[EvalResult]:
    return model_index_to_eval_results(written["model-index"])[1] if written.get("model-index") else []


def _identity(one: EvalResult) -> tuple:
    return one.task_type, one.dataset_type, one.dataset_split, one.metric_type, one.metric_value
