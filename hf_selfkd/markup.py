"""Tables as Markdown and as HTML, for cards, comparisons, reports and the terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *body)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def safe(text: Any) -> str:
    """Text of any origin within HTML."""
    return html.escape(str(text))


def html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of HTML that scrolls where it is too wide."""
    rows = ["".join(f"<th>{safe(cell)}</th>" for cell in head)]
    rows += ["".join(f"<td>{safe(cell)}</td>" for cell in row) for row in body]
    return '<div class="wide"><table>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>"
