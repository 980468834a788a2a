"""Time each hot function of an extra step alone: the kernels, and PyTorch's own operations.

    python benchmarks/kernels.py [--sequence-length 4096] [--batch-size 8] [--rounds 9] [--out results.csv]

Half of the tokens are routed. On a GPU bfloat16 at the head layouts of the 162M, 230M, 466M and 2.7B models; on a CPU
float32 at reduced shapes, and no Triton, which needs a device. The ways of one function take their turns; ``forward``
and ``both`` (forward and backward) are medians, ``speed`` is the median over the rounds of the reference's time for
both over the way's in the same round. The reference is the first way of each function. ``compacted, causal`` is a lower
bound and not an equal: attention among the routed tokens only, which has fewer FLOPs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from report import check_results, show
from rich.progress import track
from timing import REPEATS, forward_and_backward, seconds
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from itt_composer import ops

# H, G and E of the models of Tables 5 and 7.
HEADS = {'162m': (32, 32, 32), '230m': (32, 16, 48), '466m': (32, 32, 64), '2.7b': (32, 32, 128)}
CPU_HEADS = {'162m / 4': (8, 8, 32), '230m / 4': (8, 4, 48)}

Ways = dict[str, Callable[..., Tensor]]


def attention_ways(index_BK: Tensor, S: int) -> Ways:
    """Return ways to attend from the routed tokens to every token up to them."""
    seen_BKS = torch.arange(S, device=index_BK.device) <= index_BK[..., None]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BKS[:, None], enable_gqa=True)

    def compacted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = ops.gather_tokens(k, index_BK), ops.gather_tokens(v, index_BK)
        return ops.causal_attention(q, k, v)

    def backend(name: str) -> Callable[..., Tensor]:
        return lambda q, k, v: ops.causal_attention(q, k, v, index_BK, backend=name)

    ways = {'masked SDPA': masked, 'ops, sdpa': backend('sdpa')}
    if index_BK.is_cuda:
        ways['FlexAttention'] = flex_way(index_BK, S)
        ways['ops, triton'] = backend('triton')
    return {**ways, 'compacted, causal': compacted}


def flex_way(index_BK: Tensor, S: int) -> Callable[..., Tensor]:
    """Return PyTorch's FlexAttention, with its block mask made in each call, as routing changes with each batch."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def sees(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= index_BK[b, query]

        mask = create_block_mask(sees, len(index_BK), None, index_BK.shape[1], S, device=str(q.device))
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def token_ways(index_BK: Tensor, D: int) -> dict[str, Ways]:
    """Per function PyTorch's own indexing and ours, which is Triton's on a GPU."""
    place = index_BK[..., None].expand(-1, -1, D)

    def scatter_weighted(y: Tensor, z: Tensor, weight: Tensor, phi: Tensor) -> Tensor:
        return y.scatter_add(1, place, ((weight[..., None] * z) * phi).to(y.dtype))

    return {
        'gather_tokens': {
            'gather': lambda y: y.gather(1, place),
            'ops': lambda y: ops.gather_tokens(y, index_BK),
        },
        'replace_tokens': {
            'scatter': lambda y, z: y.scatter(1, place, z),
            'ops': lambda y, z: ops.replace_tokens(y, index_BK, z),
        },
        'add_weighted': {
            'scatter_add': scatter_weighted,
            'ops': lambda y, z, weight, phi: ops.add_weighted(y, index_BK, z, weight, 1.0, phi),
        },
    }


def took(way: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> float:
    """Measure the time of one call, mean of a few where calls are queued."""
    device = inputs[0].device.type
    call = (lambda: forward_and_backward(way, inputs)) if backward else (lambda: way(*inputs))
    return seconds(call, device, REPEATS[device])


def measure(name: str, ways: Ways, inputs: list[Tensor], rounds: int) -> list[dict[str, str]]:
    """The rows of one function."""
    for way in ways.values():
        took(way, inputs, backward=True)
    order = range(rounds)
    forward = [{way: took(f, inputs, False) for way, f in ways.items()} for _ in track(order, name, transient=True)]
    both = [{way: took(f, inputs, True) for way, f in ways.items()} for _ in track(order, name, transient=True)]
    reference = next(iter(ways))
    return [
        {
            'function': name,
            'way': way,
            'forward ms': f'{1e3 * statistics.median(round_[way] for round_ in forward):.3f}',
            'both ms': f'{1e3 * statistics.median(round_[way] for round_ in both):.3f}',
            'speed': f'{statistics.median(round_[reference] / round_[way] for round_ in both):.2f}',
        }
        for way in ways
    ]


def main(
    sequence_length: Annotated[int | None, typer.Option(help='S; 512 on a CPU, 4096 on a GPU.')] = None,
    batch_size: Annotated[int | None, typer.Option(help='Sequences; 1 on a CPU, 8 on a GPU.')] = None,
    rounds: Annotated[int, typer.Option(help='Measurements of each way.')] = 9,
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    cuda = torch.cuda.is_available()
    device, dtype = ('cuda', torch.bfloat16) if cuda else ('cpu', torch.float32)
    S, B = sequence_length or (4096 if cuda else 512), batch_size or (8 if cuda else 1)
    K = S // 2
    torch.manual_seed(0)
    index_BK = torch.rand(B, S, device=device).topk(K).indices.sort(-1).values

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    rows = []
    for model, (H, G, E) in (HEADS if cuda else CPU_HEADS).items():
        inputs = [numbers(B, K, H, E), numbers(B, S, G, E), numbers(B, S, G, E)]
        rows += measure(f'attention, {model}', attention_ways(index_BK, S), inputs, rounds)
    D = 1024 if cuda else 256
    y, z, weight, phi = numbers(B, S, D), numbers(B, K, D), numbers(B, K, dtype=torch.float32), numbers(D)
    for (name, ways), inputs in zip(token_ways(index_BK, D).items(), ([y], [y, z], [y, z, weight, phi]), strict=True):
        rows += measure(f'{name}, D {D}', ways, inputs, rounds)
    show(rows, f'Kernels, S {S}, K {K}, batch {B}, {dtype}'.replace('torch.', ''), out)
    if not cuda:
        print('No CUDA device: the Triton kernels were not timed.')


if __name__ == '__main__':
    typer.run(main)
