"""
Repeat a published table: each log in `docs/results` has its settings, by the same name, in `examples/configs/results`.

    python benchmarks/run.py examples/configs/results/cifar100_50_images_16_pixels.yaml \
        --train_files "train-*.parquet" --test_files "test-*.parquet"

`command` is what is run, the other settings are its flags; flags that follow are added, and win. `--table` prints the
table of what has been run so far.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import yaml


def words(config: Path, more: list[str]) -> list[str]:
    """The command of a file of settings and `more` flags, as a process is started with it."""
    settings = yaml.safe_load(config.read_text())
    program, first, *rest = shlex.split(settings.pop("command"))
    start = [sys.executable] if program == "python" else [sys.executable, "-m", "hf_selfkd"]
    for name, value in settings.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        rest += [f"--{name}", *map(str, values)]
    # A positional argument would be taken for one more value of the last flag.
    places = [word for word in more[:1] if not word.startswith("-")]
    return [*start, first, *places, *rest, *more[len(places) :]]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    Path("outputs/results").mkdir(parents=True, exist_ok=True)
    sys.exit(subprocess.call(words(Path(sys.argv[1]), sys.argv[2:])))


if __name__ == "__main__":
    main()
