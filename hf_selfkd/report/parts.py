"""Pieces of HTML that the parts of a report share; texts are escaped here."""

from __future__ import annotations

import re

from ..markup import safe


def with_code(text: str) -> str:
    """Markdown's `code` as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", safe(text))


def heading(text: str, name: str) -> str:
    """The heading of a part, of one run where there are several."""
    return f"<h2>{safe(text)}{f': {safe(name)}' if name else ''}</h2>"


def figure(drawing: str, caption: str, words: str = "") -> str:
    """A drawing below its caption."""
    return f"<figure><figcaption><strong>{safe(caption)}</strong> {safe(words)}</figcaption>{drawing}</figure>"
