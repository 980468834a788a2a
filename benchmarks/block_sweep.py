"""Compare block sizes of the routed attention kernels, by counts and on a GPU also by time.

    python benchmarks/block_sweep.py [--head-size 32] [--out results.csv]

Each kernel is compiled with each configuration. ``instructions`` are those of a thread for each of its scores (a
query-key pair of a head), in the loop without a mask; ``masked`` are those with it. ``warps`` are those that a
multiprocessor holds.

On a GPU, the configurations with few instructions are timed: half of 4096 tokens are routed, evenly, all early or all
late; bfloat16, 8 sequences, 1024 numbers per token. The time is the kernel's own, from PyTorch's profile. Rows are
written after each configuration, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from loop_instructions import loop_instructions
from report import check_results, show, write
from rich.progress import track
from timing import forward_and_backward
from top_kernels import top_kernels
from torch import Tensor

from itt_composer.checks import check_choice
from itt_composer.kernels import attention
from itt_composer.kernels.attention import Blocks, blocks
from itt_composer.kernels.build import ATTENTION, SHARED_LIMIT, build
from itt_composer.one_line import one_line_errors
from itt_composer.options import KERNEL_HEAD_SIZES

TILES = [(32, 64), (32, 128), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)]
CONFIGURATIONS = [Blocks(M, N, warps, stages) for (M, N), warps, stages in itertools.product(TILES, (4, 8), (2, 3))]
# Times the fewest instructions of the kernel, up to which a configuration is timed.
TIMED = 1.6
SPREADS = ('even', 'early', 'late')
REGISTERS, WARPS, RESERVED_SHARED = 65536, 64, 1024  # Of a multiprocessor; bytes that each block takes besides its own.


def count(kernel: str, head_size: int, chosen: Blocks, architecture: int) -> dict[str, str]:
    """Compile the kernel with ``attention.blocks``, and count what it needs."""
    built = build(kernel, 'bf16', head_size, architecture)
    registers = -(-built.registers // 8) * 8 * 32 * chosen.num_warps
    shared = SHARED_LIMIT[architecture] + RESERVED_SHARED
    held = min(REGISTERS // registers, shared // (built.shared + RESERVED_SHARED), WARPS // chosen.num_warps)
    scores = chosen.BLOCK_M * chosen.BLOCK_N / (32 * chosen.num_warps)
    # Every score needs an exponential (MUFU). The loop with a mask has more instructions.
    loops = [sum(loop.values()) for loop in loop_instructions(built.cubin) if loop['MUFU'] >= scores]
    return {
        'registers': str(built.registers),
        'spilled': str(built.spilled),
        'warps': str(held * chosen.num_warps),
        'instructions': f'{min(loops) / scores:.2f}',
        'masked': f'{max(loops) / scores:.2f}',
    }


def use(kernel: str, chosen: Blocks) -> None:
    """Run and compile the kernel with these blocks, and the others with their own."""
    attention.blocks = lambda name, E, itemsize: chosen if name == kernel else blocks(name, E, itemsize)


def is_timed(row: dict[str, str], rows: list[dict[str, str]]) -> bool:
    """Whether the row's configuration is the present one, or fits the device and has few instructions."""
    fewest = min(float(other['instructions']) for other in rows if other['kernel'] == row['kernel'])
    return row['present'] == 'yes' or (row['warps'] != '0' and float(row['instructions']) <= TIMED * fewest)


def positions(S: int, K: int, B: int) -> dict[str, Tensor]:
    """Return K of S positions for each of ``SPREADS``, [B, K] each."""
    even = torch.rand(B, S, device='cuda').topk(K).indices.sort(-1).values
    early = torch.arange(K, device='cuda').expand(B, K)
    return dict(zip(SPREADS, (even, early, early + (S - K)), strict=True))


def kernel_ms(kernel: str, inputs: list[Tensor], index_BK: Tensor) -> str:
    """Measure the time of one kernel within forward and backward."""

    def both() -> None:
        forward_and_backward(lambda *qkv: attention.routed_attention(*qkv, index_BK), inputs)

    both()
    rows = top_kernels('', both, count=1000)
    return next(row['ms per step'] for row in rows if row['kernel'].startswith(f'{kernel}_kernel'))


def times(kernel: str, head_size: int) -> dict[str, str]:
    """Measure the kernel with ``attention.blocks`` for each way to spread the routed tokens."""
    B, S, K, H = 8, 4096, 2048, 1024 // head_size
    torch.manual_seed(0)
    inputs = [
        torch.randn(B, length, H, head_size, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        for length in (K, S, S)
    ]
    return {f'{name} ms': kernel_ms(kernel, inputs, index_BK) for name, index_BK in positions(S, K, B).items()}


def main(
    head_size: Annotated[int, typer.Option(help='32, 48, 64 or 128.')] = 32,
    architecture: Annotated[
        int | None, typer.Option(help='Count for 80 (A100) or 90 (H100, H200); by default the present device, or 90.')
    ] = None,
    kernels: Annotated[str, typer.Option(help='Those to compare.')] = ','.join(ATTENTION),
    configurations: Annotated[int, typer.Option(help='Only the first ones.')] = len(CONFIGURATIONS),
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the comparison and print its table, for each kernel the fewest instructions first."""
    check_results(out)
    if architecture is None:
        newer = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
        architecture = 90 if newer else 80
    with one_line_errors('benchmark'):
        check_choice('--architecture', str(architecture), [str(known) for known in SHARED_LIMIT])
        check_choice('--head-size', str(head_size), [str(known) for known in KERNEL_HEAD_SIZES])
        for kernel in kernels.split(','):
            check_choice('--kernels', kernel, list(ATTENTION))
    title = f'Routed attention, head size {head_size}, compiled for sm_{architecture}, bfloat16'
    rows: list[dict[str, str]] = []
    for kernel in kernels.split(','):
        present, first = blocks(kernel, head_size, 2), len(rows)
        for chosen in track(dict.fromkeys([present, *CONFIGURATIONS[:configurations]]), kernel):
            use(kernel, chosen)
            named = {key: str(value) for key, value in chosen._asdict().items()}
            about = {'kernel': kernel, **named, 'present': 'yes' if chosen == present else ''}
            rows.append({**about, **count(kernel, head_size, chosen, architecture)})
        rows[first:] = sorted(rows[first:], key=lambda row: float(row['instructions']))
    if torch.cuda.is_available():
        for row in rows:
            row.update(dict.fromkeys((f'{name} ms' for name in SPREADS), ''))
        for row in track([row for row in rows if is_timed(row, rows)], 'time'):
            use(row['kernel'], Blocks(*(int(row[key]) for key in Blocks._fields)))
            row.update(times(row['kernel'], head_size))
            if out is not None:
                write(rows, title, out)
    show(rows, title, out)


if __name__ == '__main__':
    typer.run(main)
