"""The hot functions against PyTorch's own indexing and a written-out softmax, forward and backward."""

import math

import pytest
import torch
from common.gradients import assert_same_gradients
from torch.testing import assert_close

from itt_composer import ops


def positions(B: int, S: int, K: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(S + K)
    return torch.stack([torch.randperm(S, generator=generator)[:K].sort().values for _ in range(B)])


def numbers(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expanded(index_BK: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index_BK.view(*index_BK.shape, *[1] * (x.dim() - 2)).expand(*index_BK.shape, *x.shape[2:])


@pytest.mark.parametrize(
    ('K', 'tail', 'dtype', 'strided'),
    [
        (1, (5,), torch.float64, False),
        (1, (3, 2), torch.bfloat16, True),
        (4, (5,), torch.bfloat16, False),
        (4, (3, 2), torch.float64, True),
        (11, (5,), torch.float64, True),
        (11, (3, 2), torch.bfloat16, False),
    ],
)
def test_tokens(K, tail, dtype, strided):
    B, S = 3, 11
    index_BK = positions(B, S, K)
    x = (
        numbers(S, B, *tail, seed=0, dtype=dtype).transpose(0, 1)
        if strided
        else numbers(B, S, *tail, seed=0, dtype=dtype)
    )
    new = numbers(B, K, *tail, seed=1, dtype=dtype)
    x.requires_grad_(), new.requires_grad_()
    where = expanded(index_BK, x)
    cases = [
        (ops.gather_tokens(x, index_BK), x.gather(1, where)),
        (ops.add_to_tokens(x, index_BK, new), x.scatter_add(1, where, new)),
        (ops.replace_tokens(x, index_BK, new), x.scatter(1, where, new)),
    ]
    for got, expected in cases:
        assert torch.equal(got, expected)
        probe = numbers(*got.shape, seed=2, dtype=dtype)
        assert_same_gradients(got, expected, (x, new), probe)


def written_out_attention(q, k, v, index_BK, padding_BS):
    """Softmax over the visible keys, one query of one head at a time, in float64."""
    B, K, H, E = q.shape
    group = H // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for i in range(K):
            p = int(index_BK[b, i])
            seen = [s for s in range(p + 1) if s == p or padding_BS is None or padding_BS[b, s]]
            for h in range(H):
                share = torch.softmax(k[b, seen, h // group] @ q[b, i, h] / math.sqrt(E), 0)
                out[b, i, h] = share @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize(
    ('K', 'G', 'padded'),
    [
        *((None, 1, False), (1, 2, False), (5, 4, False), (9, 1, False)),
        *((None, 2, True), (1, 4, True), (5, 1, True), (9, 2, True)),
    ],
)
def test_attention(K, G, padded, monkeypatch):
    monkeypatch.setattr('itt_composer.ops.cpu_attention.CHUNK', 3)
    B, S, H, E = 2, 9, 4, 6
    index_BK = None if K is None else positions(B, S, K)
    padding_BS = torch.ones(B, S, dtype=torch.bool) if padded else None
    if padded:
        padding_BS[0, :4] = False
        padding_BS[1, 7:] = False
    q = numbers(B, K or S, H, E, seed=0).requires_grad_()
    k, v = numbers(B, S, G, E, seed=1).requires_grad_(), numbers(B, S, G, E, seed=2).requires_grad_()
    got = ops.causal_attention(q, k, v, index_BK, padding_BS)
    everyone = torch.arange(S).expand(B, S) if index_BK is None else index_BK
    expected = written_out_attention(q, k, v, everyone, padding_BS)
    assert_close(got, expected)
    probe = numbers(*got.shape, seed=3)
    for got_grad, expected_grad in zip(
        torch.autograd.grad(got, (q, k, v), probe), torch.autograd.grad(expected, (q, k, v), probe), strict=True
    ):
        assert_close(got_grad, expected_grad)
