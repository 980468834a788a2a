"""Where the time of a step goes: PyTorch's profile of it, as rows of a table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 3


def top_kernels(name: str, step: Callable[[], object], count: int = 20) -> list[dict[str, str]]:
    """Profile three steps of a model and return its ``count`` kernels with the most time, per step.

    On a GPU they are kernels and copies. Without one they are operators, with the time that is their own.
    """
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    device = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [
        (event.key, event.count, event.self_device_time_total if gpu else event.self_cpu_time_total)
        for event in found.key_averages()
        if event.device_type == device
    ]
    total = sum(micros for *_, micros in events)
    return [
        {
            'model': name,
            'kernel': kernel,
            'calls per step': f'{calls / STEPS:g}',
            'ms per step': f'{micros / STEPS / 1000:.3f}',
            'fraction': f'{micros / total:.4f}',
        }
        for kernel, calls, micros in sorted(events, key=lambda event: -event[2])[:count]
    ]
