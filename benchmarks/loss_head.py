"""Time the language-modelling head and its loss alone, forward and backward, and measure their peak memory.

    python benchmarks/loss_head.py [--out results.csv]

On a GPU the shape of a 162M step (8 sequences of 4096 tokens) under bfloat16 autocast; on a CPU a small one in float32.
``complete logits, compiled`` is what a compiled model of Hugging Face does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from report import check_results, show
from timing import forward_and_backward, milliseconds, peak_gib
from torch import Tensor

from itt_composer.model.loss import chunked_cross_entropy, cross_entropy, loss_and_derivative
from itt_composer.options import ModelOptions


def complete(x_ND: Tensor, weight_VD: Tensor, label_N: Tensor) -> Tensor:
    """Compute the loss from the logits of all tokens."""
    return cross_entropy(F.linear(x_ND, weight_VD), label_N)


def main(
    rounds: Annotated[int, typer.Option(help='Measurements of each way.')] = 5,
    backend: Annotated[str, typer.Option(help='Of torch.compile.')] = 'inductor',
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    N, D, V = (32768, 1024, 32000) if cuda else (512, 64, 1000)
    chunk = ModelOptions.loss_chunk_tokens if cuda else 128
    torch.manual_seed(0)
    x_ND = torch.randn(N, D, device=device, requires_grad=True)
    weight_VD = (0.02 * torch.randn(V, D, device=device)).requires_grad_()
    label_N = torch.randint(V, (N,), device=device)
    compiled = functools.partial(torch.compile, backend=backend)
    chunked = functools.partial(chunked_cross_entropy, loss_and_derivative=compiled(loss_and_derivative))
    ways = {
        'complete logits': complete,
        'complete logits, compiled': compiled(complete),
        f'chunks of {chunk}': functools.partial(chunked_cross_entropy, chunk_tokens=chunk),
        f'chunks of {4 * chunk}': functools.partial(chunked_cross_entropy, chunk_tokens=4 * chunk),
        f'chunks of {chunk}, compiled': functools.partial(chunked, chunk_tokens=chunk),
        f'chunks of {4 * chunk}, compiled': functools.partial(chunked, chunk_tokens=4 * chunk),
    }
    rows = []
    for name, way in ways.items():

        def loss(x: Tensor, weight: Tensor, way=way) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=cuda):
                return way(x, weight, label_N)

        def both(loss=loss) -> None:
            forward_and_backward(loss, [x_ND, weight_VD])

        rows.append(
            {
                'way': name,
                'loss': f'{loss(x_ND, weight_VD).item():.4f}',
                'both ms': f'{milliseconds(both, device, rounds):.3f}',
                'peak GiB': peak_gib(both, device),
            }
        )
    show(rows, f'Loss head, {N} tokens, D {D}, V {V}', out)


if __name__ == '__main__':
    typer.run(main)
