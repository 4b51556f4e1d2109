"""
The table of every file of JSON lines in docs/results, as docs/results.md has them.

    python benchmarks/results.py
"""

from __future__ import annotations

from pathlib import Path

from comparison import (
    COST,
    DETECTION,
    FIGURES,
    MULTI_LABEL,
    PHONEMES,
    PIXELS,
    SPEECH,
    TRANSLATION,
    read_results,
    table,
)


KINDS = {  # by a figure that no other kind of run has
    "d_ece": DETECTION,
    "bce": MULTI_LABEL,
    "cer": SPEECH,
    "bleu": TRANSLATION | COST,
    "phoneme_error": PHONEMES | COST,
}


def table_of(rows: list[dict]) -> list[str]:
    """The lines of the table of a log."""
    rows = [row | {"error": 100 * (1 - row["accuracy"])} if "accuracy" in row else row for row in rows]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    known = next((shown for name, shown in KINDS.items() if name in rows[0]), PIXELS | FIGURES | COST)
    shown = {name: shape for name, shape in known.items() if all(name in row for row in rows)}
    return table(rows, methods, shown).splitlines()


def main() -> None:
    for path in sorted((Path(__file__).parents[1] / "docs" / "results").glob("*.jsonl")):
        rows = read_results(path)
        if "method" not in rows[0]:
            continue  # crash_test.jsonl and others, which compare no methods
        lines = "\n".join(table_of(rows))
        print(f"{path.name}\n\n{lines}\n")


if __name__ == "__main__":
    main()
