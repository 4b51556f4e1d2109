"""Processes of a worker that are forked from one, which imports everything once; torchrun has each import alone."""

import os
import socket
import traceback


def fork(processes, function):
    """
    Run a function in so many processes that know one another, as torchrun starts them; they share one machine.

    Raises:
        SystemExit: if one of them failed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            _run(rank, processes, port, function)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise SystemExit(1)


def _run(rank, processes, port, function):
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in (facts | {"MASTER_PORT": port}).items()}
    os.environ["MASTER_ADDR"] = "localhost"
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
