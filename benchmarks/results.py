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


def main() -> None:
    for path in sorted((Path(__file__).parents[1] / "docs" / "results").glob("*.jsonl")):
        rows = read_results(path)
        if "method" not in rows[0]:
            continue  # crash_test.jsonl, which compares no methods
        for row in rows:
            if "accuracy" in row:
                row.setdefault("error", 100 * (1 - row["accuracy"]))
        methods = list(dict.fromkeys(row["method"] for row in rows))
        known = next((shown for name, shown in KINDS.items() if name in rows[0]), PIXELS | FIGURES | COST)
        shown = {name: shape for name, shape in known.items() if all(name in row for row in rows)}
        print(f"{path.name}\n\n{table(rows, methods, shown)}\n")


if __name__ == "__main__":
    main()
