"""Which teacher a run gets, from what is asked and from what data and length allow."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import MethodArguments


@dataclass
class Facts:
    """
    What decides about teachers.

    Args:
        num_epochs (`int`): passes over the data.
        past_of_heads (`bool`): whether auxiliary heads learn from past predictions.
        no_ids (`str`, *optional*): why samples cannot be told apart from one epoch to the next.
        no_rows (`str`, *optional*): why a sample has no row of its own that stays the same.
        many_rows (`str`, *optional*): why rows are stored only where that is asked for by name.
    """

    num_epochs: int
    past_of_heads: bool = False
    no_ids: str | None = None
    no_rows: str | None = None
    many_rows: str | None = None


def choose_teacher(method: MethodArguments, facts: Facts) -> tuple[str, str]:
    """
    The kind of teacher of a run.

    Args:
        method ([`~hf_selfkd.config.MethodArguments`]): what is asked.
        facts ([`Facts`]): what data and length allow.

    Returns:
        `tuple`: the kind, and the reason in words if `teacher="auto"` did not get `"history"`.

    Raises:
        ValueError: if what is asked by name cannot teach; the message says what can.
    """
    if not method.distils and not method.history_trace:
        return "none", ""
    if method.teacher_predictions is not None:
        if facts.no_ids:
            raise ValueError(facts.no_ids.replace("'history'", "'predictions'"))
        return "predictions", ""
    if method.teacher == "rank":
        return "rank", ""
    short = facts.num_epochs < 2 and not method.warm_start_teacher and method.distils
    if method.teacher != "auto":
        if short:
            raise ValueError(
                f"{facts.num_epochs} epoch with teacher={method.teacher!r}: there is no earlier epoch to learn from. "
                "Train at least 2 epochs, set warm_start_teacher=True (history, snapshot), teacher='rank' or alpha=0."
            )
        refused = facts.no_ids or facts.no_rows
        if method.teacher == "history" and refused:
            raise ValueError(refused)
        return method.teacher, ""
    if short:
        return (
            "none",
            "one epoch has no earlier one to learn from: this is plain training (warm_start_teacher=True helps)",
        )
    reason = facts.no_ids or facts.no_rows
    if reason and (method.history_trace or method.chunked_logits):
        raise ValueError(reason)  # which need the history
    if reason:
        return "snapshot", reason
    many_rows = "a history of auxiliary heads would be many times larger" if facts.past_of_heads else facts.many_rows
    if many_rows:
        return ("history", "") if method.history_trace or method.chunked_logits else ("snapshot", many_rows)
    return ("snapshot", "teacher_dropout needs a copy of the weights") if method.teacher_dropout else ("history", "")
