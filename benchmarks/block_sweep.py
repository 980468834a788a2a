"""Sweep the block sizes of the routed attention kernels, each kernel apart, for three ways to spread the routed tokens.

    python benchmarks/block_sweep.py [--head-size 32] [--out results.csv]

Half of 4096 tokens are routed, evenly, all early or all late; bfloat16, 8 sequences, 1024 numbers per token. The time
is the kernel's own, from PyTorch's profile. Rows are written after each configuration, so that a run that is stopped
leaves what it has. Without a GPU and with ``TRITON_INTERPRET=1`` the kernels run at a small shape, without a time.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from report import check_results, show, write
from rich.progress import track
from timing import forward_and_backward
from top_kernels import top_kernels
from torch import Tensor

from itt_composer.kernels import attention
from itt_composer.kernels.attention import Blocks, blocks

KERNELS = {'forward': 'forward_kernel', 'q_grad': 'q_grad_kernel', 'kv_grad': 'kv_grad_kernel'}
TILES = [(32, 64), (32, 128), (64, 32), (64, 64), (128, 32), (128, 64)]
CONFIGURATIONS = [Blocks(M, N, warps, stages) for (M, N), warps, stages in itertools.product(TILES, (4, 8), (2, 3))]


def positions(S: int, K: int, B: int, device: str) -> dict[str, Tensor]:
    """Return K of S positions for each way to spread them, [B, K] each."""
    even = torch.rand(B, S, device=device).topk(K).indices.sort(-1).values
    early = torch.arange(K, device=device).expand(B, K)
    return {'even': even, 'early': early, 'late': early + (S - K)}


def kernel_ms(kernel: str, inputs: list[Tensor], index_BK: Tensor) -> str:
    """Measure the time of one kernel within forward and backward; empty without a GPU."""

    def both() -> None:
        forward_and_backward(lambda *qkv: attention.routed_attention(*qkv, index_BK), inputs)

    both()
    rows = top_kernels('', both, count=1000)
    return next((row['ms per step'] for row in rows if row['kernel'].startswith(KERNELS[kernel])), '')


def main(
    head_size: Annotated[int, typer.Option(help='32, 48, 64 or 128.')] = 32,
    kernels: Annotated[str, typer.Option(help='Those to sweep.')] = ','.join(KERNELS),
    configurations: Annotated[int, typer.Option(help='Only the first ones.')] = len(CONFIGURATIONS),
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the sweep and print its table, the fastest configuration of each kernel first."""
    check_results(out)
    cuda = torch.cuda.is_available()
    device, B, S, H = ('cuda', 8, 4096, 1024 // head_size) if cuda else ('cpu', 1, 64, 2)
    torch.manual_seed(0)
    spreads = positions(S, S // 2, B, device)

    def numbers(length: int) -> Tensor:
        return torch.randn(B, length, H, head_size, device=device, dtype=torch.bfloat16, requires_grad=True)

    inputs = [numbers(S // 2), numbers(S), numbers(S)]
    title = f'Routed attention, head size {head_size}, S {S}, K {S // 2}, batch {B}, bfloat16'
    rows = []
    for kernel in kernels.split(','):
        present = blocks(kernel, head_size, 2)
        for chosen in track([present, *CONFIGURATIONS[:configurations]], kernel):
            attention.blocks = lambda name, E, itemsize: chosen if name == kernel else blocks(name, E, itemsize)  # noqa: B023
            try:
                times = {f'{name} ms': kernel_ms(kernel, inputs, index_BK) for name, index_BK in spreads.items()}
            except Exception as error:  # Too much shared memory, or another limit of the device.
                print(f'{kernel} {chosen}: {" ".join(str(error).split())[:100]}')
                continue
            named = {key: str(value) for key, value in chosen._asdict().items()}
            rows.append({'kernel': kernel, **named, 'present': 'yes' if chosen == present else '', **times})
            if out is not None:
                write(rows, title, out)
    attention.blocks = blocks
    rows.sort(key=lambda row: (row['kernel'], float(row['even ms'] or 0)))
    show(rows, title, out)


if __name__ == '__main__':
    typer.run(main)
