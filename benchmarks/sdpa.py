"""Time PyTorch's causal attention kernels at the head sizes of the models: flash, cuDNN, memory-efficient.

    python benchmarks/sdpa.py [--out results.csv]

All tokens attend, 32768 in all. On a GPU bfloat16 at the head layouts of the 162M, 230M and 466M models; on a CPU
float32 at reduced shapes. ``forward`` and ``both`` (forward and backward) are medians. ``TFLOP/s`` is of both, and
counts the query-key pairs that are seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from report import check_results, show
from timing import forward_and_backward, milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    'flash': SDPBackend.FLASH_ATTENTION,
    'cuDNN': SDPBackend.CUDNN_ATTENTION,
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
}
HEADS = 32


def measure(backend: SDPBackend, inputs: list[Tensor], rounds: int) -> tuple[float, float]:
    """Measure forward, and forward and backward, in milliseconds."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    device = inputs[0].device.type
    forward = milliseconds(lambda: attend(*inputs), device, rounds)
    return forward, milliseconds(lambda: forward_and_backward(attend, inputs), device, rounds)


def main(
    rounds: Annotated[int, typer.Option(help='Measurements of each kernel.')] = 5,
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    cuda = torch.cuda.is_available()
    device, dtype = ('cuda', torch.bfloat16) if cuda else ('cpu', torch.float32)
    tokens, lengths, H = (32768, (2048, 4096), HEADS) if cuda else (256, (64, 128), 4)
    rows = []
    for E in (32, 48, 64):
        for S in lengths:
            shape = (tokens // S, S, H, E)
            # [B, S, H, E] with its middle dimensions swapped, as the model has them.
            inputs = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
            for name, backend in BACKENDS.items():
                try:
                    forward, both = measure(backend, inputs, rounds)
                except RuntimeError as error:
                    print(f'{name}, head size {E}, is left out: {" ".join(str(error).split())[:100]}')
                    continue
                flops = 14 * H * E * tokens * (S + 1) / 2
                rows.append(
                    {
                        'head size': str(E),
                        'S': str(S),
                        'kernel': name,
                        'forward ms': f'{forward:.3f}',
                        'both ms': f'{both:.3f}',
                        'TFLOP/s': f'{flops / both / 1e9:.1f}',
                    }
                )
    show(rows, f'Causal attention, {tokens} tokens, {H} heads, {dtype}'.replace('torch.', ''), out)


if __name__ == '__main__':
    typer.run(main)
