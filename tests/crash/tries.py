"""One try: a training that is killed, maybe several times, and goes on until it is over."""

import shutil
import time
from dataclasses import dataclass

from .comparing import difference
from .hub import hub_difference
from .phases import PHASES
from .processes import Kill, attend, start


MOST_KILLS = 4
# What is aimed at: phases that are rare in time are what goes wrong.
WEIGHTS = {"resume": 1, "step": 2, "end of an epoch": 2, "checkpoint": 4, "rotation": 2, "final model": 1, "upload": 9}


@dataclass
class Reference:
    """An undisturbed training: its folder, and when each phase began and how long it took in each process."""

    folder: str
    spans: list  # for each process, by phase, the seconds of each of its occurrences


def undisturbed(folder, case, processes, pause):
    """Train without a kill."""
    folder.mkdir(parents=True)
    outcome = attend(start(folder, case, processes, pause))
    if any(outcome.codes):
        raise RuntimeError(f"the undisturbed training failed: see {folder}/log_0.txt")
    spans = [{phase: [] for phase in PHASES} for _ in range(processes)]
    begun = {}
    for seconds, rank, phase, begins in outcome.marks:
        if begins:
            begun[rank, phase] = seconds
        else:
            spans[rank][phase].append(seconds - begun[rank, phase])
    return Reference(folder, spans)


def draw_kill(rng, reference, again):
    """A moment at which to kill. A resumed training has fewer of each phase: an early one is then aimed at."""
    processes = len(reference.spans)
    names = [name for name in PHASES if again or name != "resume"]
    names = [name for name in names if name != "upload" or reference.spans[0][name]]
    phase = rng.choices(names, [WEIGHTS[name] for name in names])[0]
    rank = rng.randrange(processes)
    spans = reference.spans[rank][phase]
    if not spans:  # only the first process rotates
        rank, spans = 0, reference.spans[0][phase]
    place = rng.randrange(min(len(spans), 3) if again else len(spans))
    return Kill(phase, place + 1, rng.random() * spans[place], rank, rng.random() * 0.1)


def attempt(number, rng, folder, case, reference, pause):
    """A dictionary that tells of one try; `lost` is `None`, or what went wrong."""
    started, processes = time.monotonic(), len(reference.spans)
    folder.mkdir(parents=True)
    kills, saved, lost = [], 0, None
    wanted = 1
    while wanted < MOST_KILLS and rng.random() < 0.3:
        wanted += 1
    while lost is None:
        kill = draw_kill(rng, reference, bool(kills)) if len(kills) < wanted else None
        earlier = len(_lines(folder / "begun.txt"))
        outcome = attend(start(folder, case, processes, pause), kill)
        begins = [int(line) for line in _lines(folder / "begun.txt")[earlier:]]  # none, if it died before
        for step in begins:
            if step < saved:
                lost = f"training went on from step {step}, a checkpoint was whole at {saved}"
            saved = max(saved, min(step // 5 * 5 + 5 * _checkpoints(outcome), 36))
        if outcome.killed_in is not None:
            kills.append({"phase": kill.phase, "died_in": outcome.killed_in, "process": kill.rank})
        elif outcome.late:
            lost = "the training never ended"
        elif any(outcome.codes):
            lost = lost or f"exit codes {outcome.codes}: {_last_line(folder, outcome.codes)}"
        else:
            break  # over; a kill that came too late is none
    lost = lost or difference(reference.folder, folder) or (hub_difference(folder) if case == "uploads" else None)
    told = {
        "try": number,
        "processes": processes,
        "case": case,
        "kills": kills,
        "begun": [int(line) for line in _lines(folder / "begun.txt")],
        "stock_choice_is_whole": [line == "True" for line in _lines(folder / "choices.txt")],
        "seconds": round(time.monotonic() - started, 2),
        "lost": lost,
    }
    if lost is None:
        shutil.rmtree(folder)
    return told


def _checkpoints(outcome):
    """How many checkpoints a training saved to the end before it died."""
    return sum(phase == "checkpoint" and not begins and rank == 0 for _, rank, phase, begins in outcome.marks)


def _lines(path):
    return path.read_text().split() if path.is_file() else []


def _last_line(folder, codes):
    rank = next(rank for rank, code in enumerate(codes) if code)
    lines = (folder / f"log_{rank}.txt").read_text().strip().splitlines()
    return lines[-1] if lines else ""
