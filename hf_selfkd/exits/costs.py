"""What a model costs: parameters, multiply-adds of a sample, latency on this machine."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


WARM_UP = 3  # calls before the first that counts
FEWEST, MOST = 11, 201  # rounds
BUDGET = 10.0  # seconds for all rounds, if the fewest fit in


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model; those that several layers share count once."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Count floating point operations: of matrix products, convolutions and attention."""
    # On a CPU, fused attention is not counted: as matrix products it is.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore", FutureWarning)  # the counter looks at all attributes, the deprecated ones too
        yield counter


def multiply_adds(model: nn.Module, inputs: dict[str, Any]) -> int:
    """
    Multiply-adds of a forward pass: those of matrix products, convolutions and attention.

    Args:
        model (`nn.Module`): in evaluation mode.
        inputs (`dict`): for the model.
    """
    with torch.no_grad(), counted() as counter:
        model(**inputs)
    return counter.get_total_flops() // 2


@dataclass
class Latency:
    """
    How long a call takes, in milliseconds.

    Args:
        median (`float`): over the rounds.
        quartiles (`tuple[float, float]`): between which half of the rounds are.
        rounds (`int`): how many there were.
    """

    median: float
    quartiles: tuple[float, float]
    rounds: int


def latencies(calls: Sequence[Callable[[], Any]], budget: float = BUDGET) -> list[Latency]:
    """
    Time several calls in turn: each once a round, every other round backwards, so that what else the machine does
    falls on all of them.

    Args:
        calls (`Sequence[Callable]`): functions without arguments.
        budget (`float`, *optional*, defaults to 10.0): seconds for all, if eleven rounds take no longer.

    Returns:
        `list[Latency]`: in the order of the calls.
    """
    with torch.no_grad():
        for _ in range(WARM_UP):
            turn = sum(map(_milliseconds, calls))
        rounds = max(FEWEST, min(MOST, int(1000 * budget / turn)))
        times: list[list[float]] = [[] for _ in calls]
        for number in range(rounds):
            for place in range(len(calls))[:: -1 if number % 2 else 1]:
                times[place].append(_milliseconds(calls[place]))
    return [_latency(found) for found in times]


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _latency(times: list[float]) -> Latency:
    first, median, third = statistics.quantiles(times, n=4)
    return Latency(median, (first, third), len(times))
