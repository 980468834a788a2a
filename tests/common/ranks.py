"""Run a function on several ranks of a gloo process group, in forks of the test process.

A fork keeps the half-minute import of composer that the parent has already paid for. The children use one thread each:
OpenMP's thread pool does not survive a fork.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """What ``function(*args)`` returns on each rank; fails with the rank's traceback where it raises."""
    import_causal_models()
    context = multiprocessing.get_context('fork')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(send, rank, world_size, port, function, args), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout), f'rank {rank} did not finish in {timeout} s'
            try:
                result, error = pipe.recv()
            except EOFError:
                result, error = None, f'rank {rank} died without a word'
            assert error is None, error
            results.append(result)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


@functools.cache
def import_causal_models() -> None:
    """Composer compares a model with each causal one of transformers: all are imported here, not in every fork."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    list(MODEL_FOR_CAUSAL_LM_MAPPING.values())


def use_fsdp2_over_gloo() -> None:
    """Have Composer take FSDP 2, and divide its gradients right over gloo, as ``train.py`` does."""
    from itt_composer.training.fsdp import average_over_gloo

    os.environ['FSDP_VERSION'] = '2'
    average_over_gloo()


def _rank(send: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK='0',
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    try:
        send.send((function(*args), None))
    except BaseException:
        send.send((None, f'rank {rank}:\n{traceback.format_exc()}'))
    finally:
        os._exit(0)
