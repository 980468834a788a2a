"""How the benchmarks time a call, and what peak of memory it has."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

REPEATS = {'cuda': 20, 'cpu': 1}


def seconds(call: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Measure the wall time of one call, until the device has finished: the mean of ``repeats`` that are queued."""
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == 'cuda':
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def forward_and_backward(way: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Call ``way``, and compute the gradients of its inputs."""
    result = way(*inputs)
    torch.autograd.grad(result, inputs, torch.ones_like(result))


def milliseconds(call: Callable[[], object], device: str, rounds: int) -> float:
    """Measure the median over ``rounds`` of the wall time of one call, after one that is not timed."""
    call()
    return 1e3 * statistics.median(seconds(call, device, REPEATS[device]) for _ in range(rounds))


def peak_gib(call: Callable[[], object], device: str) -> str:
    """Measure the memory that a call allocates beyond what is allocated before it; empty without a GPU."""
    if device != 'cuda':
        return ''
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f'{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}'
