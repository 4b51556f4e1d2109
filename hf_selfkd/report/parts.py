"""Pieces of HTML that the parts of a report share; texts are escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any


def safe(text: Any) -> str:
    """Text of any origin within HTML."""
    return html.escape(str(text))


def with_code(text: str) -> str:
    """Markdown's `code` as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", safe(text))


def heading(text: str, name: str) -> str:
    """The heading of a part, of one run where there are several."""
    return f"<h2>{safe(text)}{f': {safe(name)}' if name else ''}</h2>"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that scrolls where it is too wide."""
    rows = ["".join(f"<th>{safe(cell)}</th>" for cell in head)]
    rows += ["".join(f"<td>{safe(cell)}</td>" for cell in row) for row in body]
    return '<div class="wide"><table>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>"


def figure(drawing: str, caption: str, words: str = "") -> str:
    """A drawing below its caption."""
    return f"<figure><figcaption><strong>{safe(caption)}</strong> {safe(words)}</figcaption>{drawing}</figure>"
