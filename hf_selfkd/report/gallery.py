"""The part of a report that shows training samples."""

from __future__ import annotations

from typing import Any

from ..markup import safe
from ..runs import Run
from .parts import figure, heading
from .svg import bar_chart, spark_line


DARKEST = 50  # per cent of colour behind a token that was not believed at all
TITLES = {
    "suspicious": (
        "Most suspicious",
        "The labels that the model believed least. Wrong labels gather here; so do samples that are rare or hard. The "
        "line shows the probability of the label, epoch by epoch.",
    ),
    "undecided": ("Most undecided", "Samples on which the model changed its mind most, from epoch to epoch."),
}
TOKENS = " The redder a token, the less it was believed; point at it for what was believed most."


def gallery(run: Run, name: str) -> str:
    """
    The training samples of a run that look wrong.

    Args:
        run ([`~hf_selfkd.runs.Run`]): with what [`save_samples`] wrote, if that is there.
        name (`str`): of the run; empty if the report is of one only.
    """
    told = run.samples
    if told is None:
        return (
            heading("Samples", name) + '<p class="soft">No sample is shown: only a training with '
            "teacher='history' remembers what it said of each (of tokens with history_trace=True).</p>"
        )
    several = told["epochs"] > 1
    over = f"the {told['epochs']} epochs" if several else "the last epoch (history_trace=True keeps all)"
    words = f"Mean probability of the label over {over}, {told['samples']:,} training samples."
    bars = figure(
        bar_chart(told["histogram"]["edges"], told["histogram"]["count"], "Probability of the label", "Samples"),
        "How much the model believed its labels",
        words,
    )
    parts = [heading("Samples", name), f'<div class="charts">{bars}</div>']
    tokens = TOKENS * told["per_token"]
    for kind, (title, meaning) in TITLES.items():
        if told.get(kind):
            shown = "".join(_sample(sample) for sample in told[kind])
            long = " long" if any("image" not in sample for sample in told[kind]) else ""
            parts.append(f"<h3>{title}</h3><p>{meaning}{tokens}</p>")
            parts.append(f'<div class="list{long}"><div class="samples">{shown}</div></div>')
    return "".join(parts)


def _sample(sample: dict[str, Any]) -> str:
    parts = []
    if "image" in sample:
        parts.append(f'<img src="{safe(sample["image"])}" alt="sample {sample["id"]}">')
    if "text" in sample:
        parts.append(f"<p>{safe(sample['text'])}</p>")
    if "tokens" in sample:
        parts.append("<p>" + "".join(_token(*token) for token in sample["tokens"]) + "</p>")
    if "label" in sample:
        believed = ", ".join(f"{name} {prob:.2f}" for name, prob in sample["believed"])
        parts.append(f"<p>Label <strong>{safe(sample['label'])}</strong>; the model at last: {safe(believed)}</p>")
    if len(sample["path"]) > 1:
        parts.append(spark_line(sample["path"]))
    parts.append(f'<p class="soft">Sample {sample["id"]}, mean {sample["mean"]:.3f}</p>')
    return f'<div class="sample">{"".join(parts)}</div>'


def _token(word: str, prob: float, best: str) -> str:
    told = f"{prob:.2f}" + (f"; believed most: {best}" if best != word else "")
    return f'<span class="token" style="--doubt:{DARKEST * (1 - prob):.0f}%" title="{safe(told)}">{safe(word)}</span> '
