"""`python -m crash`: kills trainings and says what was lost; exits with 1 if anything was."""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

from .hub import serve


def make_parser():
    """The flags."""
    parser = argparse.ArgumentParser("crash", description=__doc__)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first try, to go on with a file of results"
    )
    parser.add_argument("--seed", type=int, default=0, help="a try depends on the seed and its number only")
    parser.add_argument("--processes", type=int, default=1, help="of each training, on this machine, with gloo")
    parser.add_argument(
        "--teacher",
        default="all",
        help="a case of training.py (history, snapshot, ..., uploads), or all in turn but uploads",
    )
    parser.add_argument("--pause", type=float, default=0.002, help="seconds between two pieces of a file")
    parser.add_argument("--folder", type=Path, help="where trainings are kept; a temporary one by default")
    parser.add_argument("--output", type=Path, help="append each try and the table to this file, as JSON lines")
    return parser


def table(results):
    """A line for each phase: how often a process died in it, and how often something was lost."""
    phases = {}
    for result in results:
        for kill in result["kills"]:
            line = phases.setdefault(kill["died_in"], {"phase": kill["died_in"], "kills": 0, "losses": 0})
            line["kills"] += 1
            line["losses"] += result["lost"] is not None
    return sorted(phases.values(), key=lambda line: line["phase"])


def main():
    args = make_parser().parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.teacher == "uploads":
        serve()
    from .training import CASES, warm
    from .tries import attempt, undisturbed

    cases = [case for case in CASES if case != "uploads"] if args.teacher == "all" else [args.teacher]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="crash-"))
    results, references = [], {}
    warm(folder / "warm")

    def tell(line):
        print(json.dumps(line), flush=True)
        if args.output is not None:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    for number in range(args.first, args.first + args.tries):
        case = cases[number % len(cases)]
        if case not in references:
            place = folder / f"undisturbed-{args.processes}-{case.replace(' ', '-')}"
            references[case] = undisturbed(place, case, args.processes, args.pause)
        rng = random.Random(f"{args.seed} {number} {args.processes}")
        results.append(
            attempt(number, rng, folder / f"try-{args.processes}-{number}", case, references[case], args.pause)
        )
        tell(results[-1])
    for line in table(results):
        print(json.dumps(line))
    losses = [result for result in results if result["lost"] is not None]
    kills = sum(len(result["kills"]) for result in results)
    print(f"{len(results)} tries, {kills} kills, {len(losses)} losses; trainings that lost something are in {folder}")
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
