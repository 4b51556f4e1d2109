"""Processes of a training: forked, watched through their pipes, killed at a moment that is asked for."""

import faulthandler
import os
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field

from .phases import PHASES, Marks, watch
from .training import run


PATIENCE = 120  # seconds for a training that nobody kills


@dataclass
class Kill:
    """
    Asks for a SIGKILL: so many seconds after a process has begun a phase for the n-th time.

    `alone` is how long the other processes live on, as long as a launcher takes to notice.
    """

    phase: str
    occurrence: int
    delay: float
    rank: int = 0
    alone: float = 0.0


@dataclass
class Outcome:
    """What became of a training."""

    codes: list = field(default_factory=list)  # exit codes of its processes
    killed_in: str | None = None  # the phase in which the victim died; "between" for none, `None` if nobody was killed
    marks: list = field(default_factory=list)  # (seconds, rank, phase, begins)
    late: bool = False


def start(folder, case, processes, pause):
    """Fork the processes of a training; gives their ids and the pipes through which they tell their phases."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _be(rank, processes, port, writing, folder, case, pause)
        os.close(writing)
        started.append((child, reading))
    return started


def _be(rank, processes, port, pipe, folder, case, pause):
    """One process of a training, with the variables that torchrun sets; does not return."""
    code = 1
    try:
        log = os.open(folder / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        if processes > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "GLOO_SOCKET_IFNAME": "lo"}
            os.environ.update({name: str(value) for name, value in (ranks | where).items()})
        mark = Marks(pipe)
        run(str(folder), case, processes, mark, watch(mark, pause))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attend(started, kill=None):
    """Follow a training to its end, and kill it if so asked."""
    outcome, begun = Outcome(), time.monotonic()
    pipes = {reading: rank for rank, (_, reading) in enumerate(started)}
    seen, inside, due = 0, [[] for _ in started], None
    while pipes:
        now = time.monotonic() - begun
        if due is not None and now >= due or now > PATIENCE:
            outcome.late = now > PATIENCE
            _end(started, kill)
            due = float("inf")
        wait = PATIENCE - now if due is None else min(max(due - now, 0), PATIENCE)
        for pipe in select.select(list(pipes), [], [], max(wait, 0.001))[0]:
            told = os.read(pipe, 4096)
            if not told:
                os.close(pipe)
                pipes.pop(pipe)
            for byte in told:
                rank, phase, begins = pipes[pipe], PHASES[byte // 2], bool(byte % 2)
                outcome.marks.append((time.monotonic() - begun, rank, phase, begins))
                inside[rank].append(phase) if begins else inside[rank].remove(phase)
                if kill is not None and due is None and begins and (rank, phase) == (kill.rank, kill.phase):
                    seen += 1
                    due = time.monotonic() - begun + kill.delay if seen == kill.occurrence else None
            if not told and due is None:  # a process is gone by itself: a launcher would end the others
                due = time.monotonic() - begun + 10
    outcome.codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in started]
    if kill is not None and outcome.codes[kill.rank] == -signal.SIGKILL and not outcome.late:
        phases = inside[kill.rank] or ["between"]
        uploading = kill.phase == "upload" and "upload" in phases  # which goes on beside other phases
        outcome.killed_in = "upload" if uploading else phases[-1]
    return outcome


def _end(started, kill):
    """Kill one process, and the others when a launcher would have noticed."""
    victim = 0 if kill is None else kill.rank
    os.kill(started[victim][0], signal.SIGKILL)
    if len(started) > 1:
        time.sleep(0 if kill is None else kill.alone)
        for rank, (child, _) in enumerate(started):
            if rank != victim:
                os.kill(child, signal.SIGKILL)
