"""What is compared: flags that turn a training into each method, over the settings that all of them share."""

from __future__ import annotations


# Without the teacher, the weight, the smoothing and the heads that the shared settings may ask for.
_RESET = {
    "teacher": "auto",
    "teacher_predictions": "None",
    "alpha_schedule": "linear",
    "calibration_fraction": "0",
    "auxiliary_heads": "None",
    "evaluate_heads": "False",
    "save_heads": "False",
    "label_smoothing_factor": "0",
    "temperature": "1",
    "warm_start_teacher": "False",
    "teacher_dropout": "False",
    "rank_label_weights": "False",
    "history_trace": "False",
    "chunked_logits": "False",
}
_BARE = tuple(word for name, value in _RESET.items() for word in (f"--{name}", value))
_PLAIN = (*_BARE, "--alpha", "0")


def _with(*flags: str, alpha: str = "0.8") -> tuple[str, ...]:
    return (*_BARE, "--alpha", alpha, *flags)


SMOOTHED = "label-smoothing"  # not every task has it

METHODS: dict[str, tuple[str, ...]] = {
    "plain": _PLAIN,
    SMOOTHED: (*_PLAIN, "--label_smoothing_factor", "0.1"),
    "given": (),  # the settings as they are
    "history": _with("--teacher", "history"),
    "snapshot": _with("--teacher", "snapshot"),
    "ema": _with("--teacher", "ema"),
    "rank": _with("--teacher", "rank", "--alpha_schedule", "constant", alpha="0.1"),
    "calibrated": _with("--teacher", "history", "--alpha_schedule", "calibrated", "--calibration_fraction", "0.1"),
    "sla": (*_PLAIN, "--auxiliary_heads", "sla"),
    "sla+history": _with("--teacher", "history", "--auxiliary_heads", "sla"),
    "lsskd": _with("--auxiliary_heads", "lsskd"),
    "byot": (*_PLAIN, "--auxiliary_heads", "byot"),
    "deep_supervision": (*_PLAIN, "--auxiliary_heads", "deep_supervision"),
}
DEFAULT = ("plain", SMOOTHED, "given")
BASELINE = "plain"
