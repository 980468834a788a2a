"""Peak memory of a training step: weights, gradients, optimizer state and activations.

    python benchmarks/memory.py [--size 162m] [--sequence-length 4096] [--batch-size 8] [--autocast-residual]
        [--out results.csv]

On a GPU it is the maximum that PyTorch's allocator held over three steps, also of the compiled models. Without one, the
step runs on PyTorch's fake tensors, which have shapes but no contents, under bfloat16 autocast as on a GPU, and the
bytes of the live storages are counted. So any size can be counted on any machine. The memory of the device's libraries
and fragmentation are not included. ``unchunked loss`` is the dense baseline with ``loss_chunk_tokens: 0``.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from contestants import COMPILED, HUGGING_FACE, build, names, shape, step_of
from report import check_results, show
from rich.progress import track
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import no_init_weights

from itt_composer.ops import device

UNCHUNKED = 'dense, unchunked loss'


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the live storages that operations have made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(name: str, size: str, B: int, S: int, autocast_residual: bool = False) -> int:
    """Measure the peak memory of three steps of one model, or count it without a GPU."""
    keys, family = shape(size, S), name
    if name == UNCHUNKED:
        keys['loss_chunk_tokens'], family = 0, 'dense'
    if torch.cuda.is_available():
        # What the last model's compiled code and reference cycles hold is no memory of this one.
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _three_steps(family, keys, B, S, 'cuda', autocast_residual)
        return torch.cuda.max_memory_allocated()
    # As if the kernels of a GPU could run: of fake tensors they need the shapes alone. And such tensors give no seed,
    # which the initial values of the routers start from.
    with (
        patch.object(device, 'INTERPRETED', True),
        FakeTensorMode(),
        LiveBytes() as live,
        torch.autocast('cpu', torch.bfloat16),
        no_init_weights(),
    ):
        _three_steps(family, keys, B, S, 'cpu', autocast_residual)
    return live.peak


def _three_steps(family: str, keys: dict, B: int, S: int, where: str, autocast_residual: bool) -> None:
    model = build(family, keys, where, autocast_residual=autocast_residual)
    step = step_of(model, torch.zeros(B, S, dtype=torch.long, device=where))
    for _ in range(3):
        step()


def main(
    size: Annotated[str, typer.Option(help='A size of yamls/parts/size, or reduced.')] = '162m',
    sequence_length: Annotated[int, typer.Option(help='S.')] = 4096,
    batch_size: Annotated[int, typer.Option(help='Sequences per step.')] = 8,
    peers: Annotated[bool, typer.Option(help="Also llm-foundry's MPT.")] = False,
    autocast_residual: Annotated[bool, typer.Option(help="Our hidden states in autocast's dtype.")] = False,
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    gpu = torch.cuda.is_available()
    everyone = [*names(peers, compiled=gpu), UNCHUNKED]
    if HUGGING_FACE not in everyone:
        everyone[:0] = [HUGGING_FACE, HUGGING_FACE + COMPILED] if gpu else [HUGGING_FACE]
    peaks = {
        name: peak_bytes(name, size, batch_size, sequence_length, autocast_residual)
        for name in track(everyone, 'models')
    }
    rows = [
        {'model': name, 'peak GiB': f'{peak / 2**30:.2f}', 'peak / LLaMA': f'{peak / peaks[HUGGING_FACE]:.3f}'}
        for name, peak in peaks.items()
    ]
    how = ('allocated' if gpu else 'counted on fake tensors') + (', autocast_residual' if autocast_residual else '')
    show(rows, f'Peak memory of a training step ({how}), {size}, S {sequence_length}, batch {batch_size}', out)


if __name__ == '__main__':
    typer.run(main)
