"""
What is lost when less is stored of past predictions: differences to whole rows in float32, paired by seed.

    python benchmarks/classification.py cifar100 --history --results history_bytes.jsonl ...
    python benchmarks/history_bytes.py history_bytes.jsonl

The table has, for each way to store a row, its bytes, the part of a whole row in float32, the error with its standard
deviation over seeds, and the mean difference of the error, NLL and ECE of the final model on the test set, with
the standard deviation of the differences. The first line is the measure of all: how far seeds alone move whole rows.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from comparison import read_results


WHOLE = "float32"
FIGURES = {"error": 2, "nll": 3, "ece": 2}


def spread(values: list[float], digits: int, signed: bool = True) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(results: list[dict]) -> str:
    """The Markdown table."""
    runs: dict[str, dict[int, dict]] = {}
    for row in results:
        runs.setdefault(row["method"], {})[row["seed"]] = row
    whole = runs[WHOLE]
    of_whole = next(iter(whole.values()))["row_bytes"]
    lines = [
        "| stored | bytes a row | part | seeds | error % | difference of error | of NLL | of ECE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, of_seed in runs.items():
        seeds = sorted(of_seed.keys() & whole.keys())
        row_bytes = of_seed[seeds[0]].get("row_bytes", 0)
        cells = [method, str(row_bytes), f"1/{of_whole / row_bytes:.4g}" if row_bytes else "0", str(len(seeds))]
        cells.append(spread([of_seed[seed]["error"] for seed in seeds], 2, signed=False))
        for name, digits in FIGURES.items():
            pairs = [of_seed[seed][name] - whole[seed][name] for seed in seeds]
            own = [whole[seed][name] for seed in seeds]
            cells.append(f"({spread(own, digits, False)})" if method == WHOLE else spread(pairs, digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON lines of benchmarks/classification.py --history")
    print(table(read_results(parser.parse_args().results)))


if __name__ == "__main__":
    main()
