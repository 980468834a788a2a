"""Each Triton kernel against float64, forward and backward: on a GPU, or on a CPU by Triton's interpreter.

``test_kernels.py`` runs these in a process of their own: Triton decides when it is imported whether it interprets.
The interpreter cuts the bits off where a GPU rounds to bfloat16, which is twice the error.
"""

import functools
import math

import pytest
import torch
from common import thinking_cases
from common.gradients import assert_same_gradients
from torch.utils.checkpoint import checkpoint

from itt_composer import kernels, ops
from itt_composer.kernels import attention, tokens
from itt_composer.model import DecoderBlock, ITTConfig
from itt_composer.model.rotary import Rotation
from itt_composer.model.selection import Selection

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Largest error allowed, as a share of the largest value, or of one: a softmax over one key has no gradient.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


def numbers(*shape: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype).requires_grad_()


def positions(B: int, S: int, K: int, where: str) -> torch.Tensor:
    """K positions of S for each sequence: a random choice, the first, the last, both ends, or in any order."""
    generator = torch.Generator().manual_seed(S + K)
    rows = {
        'random': lambda: torch.randperm(S, generator=generator)[:K].sort().values,
        'first': lambda: torch.arange(K),
        'last': lambda: torch.arange(S - K, S),
        'both ends': lambda: torch.arange(S).roll(K // 2)[:K].sort().values,
        'any order': lambda: torch.randperm(S, generator=generator)[:K],
    }
    return torch.stack([rows[where]() for _ in range(B)]).to(DEVICE)


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    assert got.shape == expected.shape, what
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < TOLERANCE[dtype], f'{what} is off by {error:.1e}'


def compare(got, expected, inputs: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """A result and its gradients, against the same in float64."""
    dtype = got.dtype
    assert_near(got, expected, dtype, 'the result')
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(9)).to(got.device, dtype)
    grads = torch.autograd.grad(got, list(inputs.values()), probe)
    exact_grads = torch.autograd.grad(expected, list(exact.values()), probe.double())
    for name, grad, exact_grad in zip(inputs, grads, exact_grads, strict=True):
        assert grad.dtype == inputs[name].dtype
        assert_near(grad, exact_grad, dtype, f'the gradient of {name}')


def in_float64(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def scores(q, k, index_BK) -> torch.Tensor:
    """[B, H, K, S], minus infinity where a query may not look."""
    score_BHKS = torch.einsum('bkhe,bshe->bhks', q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))
    seen_BKS = torch.arange(k.shape[1], device=k.device) <= index_BK[..., None]
    return (score_BHKS / math.sqrt(q.shape[-1])).masked_fill(~seen_BKS[:, None], -math.inf)


def softmax_attention(q, k, v, index_BK) -> torch.Tensor:
    share_BHKS = scores(q, k, index_BK).softmax(-1)
    return torch.einsum('bhks,bshe->bkhe', share_BHKS, v.repeat_interleave(q.shape[2] // v.shape[2], dim=2))


# A block has 32 queries and 32 or 16 keys in float32, and in bfloat16 up to 128 of either.
@pytest.mark.parametrize(
    ('dtype', 'B', 'S', 'K', 'H', 'G', 'E', 'where'),
    [
        (torch.float32, 2, 45, 33, 4, 2, 32, 'random'),  # K and S are no multiples of a block
        (torch.bfloat16, 2, 75, 33, 4, 2, 32, 'random'),
        (torch.float32, 1, 100, 70, 1, 1, 48, 'random'),  # several blocks of queries, and of keys that are not masked
        (torch.bfloat16, 1, 300, 170, 1, 1, 48, 'random'),
        (torch.bfloat16, 1, 130, 130, 1, 1, 64, 'first'),  # K = S, more than one block
        (torch.float32, 2, 40, 1, 4, 1, 128, 'last'),  # K = 1
        (torch.bfloat16, 1, 9, 4, 4, 2, 48, 'random'),  # S smaller than a block
        (torch.float32, 1, 1, 1, 4, 4, 32, 'first'),
        (torch.bfloat16, 1, 200, 40, 1, 1, 128, 'first'),  # keys that nobody sees
        (torch.float32, 1, 80, 40, 1, 1, 64, 'both ends'),
        (torch.float32, 2, 60, 40, 1, 1, 32, 'any order'),
    ],
)
def test_routed_attention(dtype, B, S, K, H, G, E, where):
    index_BK = positions(B, S, K, where)
    inputs = {
        'q': numbers(B, K, H, E, seed=0, dtype=dtype),
        'k': numbers(B, S, G, E, seed=1, dtype=dtype),
        'v': numbers(B, S, G, E, seed=2, dtype=dtype),
    }
    exact = in_float64(inputs)
    got = ops.causal_attention(*inputs.values(), index_BK, backend='triton')
    compare(got, softmax_attention(*exact.values(), index_BK), inputs, exact)


def test_one_list_of_positions_for_all_sequences():
    """As tokens that see one another alone have it outside training."""
    q, k, v = (numbers(3, 35, 2, 32, seed=seed) for seed in range(3))
    index_1K = torch.arange(35, device=DEVICE)[None]
    got = ops.causal_attention(q, k, v, index_1K, backend='triton')
    expected = softmax_attention(q.double(), k.double(), v.double(), index_1K.expand(3, 35))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_float16():
    index_BK = positions(1, 40, 20, 'random')
    inputs = {name: numbers(1, n, 2, 32, seed=n, dtype=torch.float16) for name, n in (('q', 20), ('k', 40), ('v', 40))}
    got = ops.causal_attention(*inputs.values(), index_BK, backend='triton')
    exact = in_float64(inputs)
    assert_near(got, softmax_attention(*exact.values(), index_BK), torch.bfloat16, 'the result')


def test_strides():
    """Inputs and gradients in other layouts: [B, H, K, E], every second element, keys and values in one tensor."""
    B, S, K, H, E = 2, 40, 19, 2, 32
    index_BK = positions(B, S, K, 'random').repeat_interleave(2, dim=1)[:, ::2]
    q_BHKE, kv_SBGE = numbers(B, H, K, 2 * E, seed=0), numbers(S, B, 2, 2 * E, seed=1)

    def attention_of(q_BHKE, kv_SBGE, attend):
        q = q_BHKE[..., ::2].transpose(1, 2)
        k, v = kv_SBGE.transpose(0, 1).chunk(2, dim=-1)
        return attend(q, k, v, index_BK).transpose(1, 2).sin()

    inputs = {'q': q_BHKE, 'kv': kv_SBGE}
    exact = in_float64(inputs)
    got = attention_of(*inputs.values(), kernels.routed_attention)
    compare(got, attention_of(*exact.values(), softmax_attention), inputs, exact)


def small_attention():
    index_BK = positions(1, 20, 9, 'random')
    return numbers(1, 9, 2, 32, seed=0), numbers(1, 20, 1, 32, seed=1), numbers(1, 20, 1, 32, seed=2), index_BK


def test_log_sum_exp():
    q, k, v, index_BK = small_attention()
    _, lse_BHK = attention._forward(q, k, v, index_BK)
    assert not lse_BHK.requires_grad
    inside_BHK, beyond_BHK = lse_BHK.split([9, attention.pad(4) - 9], dim=-1)
    torch.testing.assert_close(inside_BHK * math.log(2), scores(q, k, index_BK).logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert beyond_BHK.isposinf().all()


def test_routed_attention_is_an_operator():
    """Schema, fake implementation, autograd registration, and tracing with symbolic shapes."""
    q, k, v, index_BK = small_attention()
    torch.library.opcheck(attention._forward, (q, k, v, index_BK))


def test_a_decoder_block_compiles_without_graph_breaks_and_is_checkpointed():
    """For one number of chosen tokens and, after that, for any."""
    torch.manual_seed(0)
    config = ITTConfig(hidden_size=64, intermediate_size=40, num_attention_heads=2, attention_backend='triton')
    block, x_BSD = DecoderBlock(config).to(DEVICE), numbers(1, 70, 64, seed=0)
    rotation = Rotation.at(torch.arange(70, device=DEVICE)[None], config)

    def grads(forward, K):
        routed = Selection((1, 70), positions(1, 70, K, 'random'))
        _, past_kv = block(x_BSD, rotation)
        out, _ = forward(block, routed.gather(x_BSD), rotation.of(routed), None, past_kv, routed)
        return torch.autograd.grad(out.square().sum(), [x_BSD, *block.parameters()])

    backend = 'inductor' if DEVICE == 'cuda' else 'aot_eager'
    compiled = torch.compile(DecoderBlock.forward, fullgraph=True, backend=backend)
    for K in (7, 11, 64, 65):
        torch.testing.assert_close(grads(compiled, K), grads(DecoderBlock.forward, K), atol=1e-4, rtol=1e-4)
    checkpointed = functools.partial(checkpoint, DecoderBlock.forward, use_reentrant=False)
    torch.testing.assert_close(grads(checkpointed, 33), grads(DecoderBlock.forward, 33))


def test_autocast():
    q, k, v, index_BK = small_attention()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert ops.causal_attention(q, k, v, index_BK, backend='triton').dtype is torch.bfloat16


@pytest.mark.parametrize(
    ('dtype', 'tail', 'B', 'S', 'K', 'where'),
    [
        (torch.float32, (5,), 3, 7, 1, 'last'),
        (torch.bfloat16, (3, 48), 1, 11, 4, 'both ends'),
        (torch.float32, (3, 48), 2, 7, 7, 'any order'),
    ],
)
def test_gather_and_replace(dtype, tail, B, S, K, where):
    """Row copies: every bit as PyTorch's own indexing has it, gradients too, from strided inputs and gradients."""
    index_BK = positions(B, S, K, where)
    x = numbers(S, B, *tail, seed=0, dtype=dtype).transpose(0, 1)
    new = numbers(B, K, *tail, seed=1, dtype=dtype)
    places = index_BK.view(B, K, *[1] * len(tail)).expand(B, K, *tail)
    cases = [
        (kernels.gather_tokens(x, index_BK), x.gather(1, places)),
        (kernels.replace_tokens(x, index_BK, new), x.scatter(1, places, new)),
    ]
    for got, expected in cases:
        assert torch.equal(got, expected)
        probe = numbers(*got.shape[::-1], seed=2, dtype=dtype).detach().permute(*range(got.dim())[::-1])
        assert_same_gradients(got, expected, (x, new), probe)


@pytest.mark.parametrize(
    ('dtype', 'with_phi', 'B', 'S', 'K', 'D', 'where'),
    [
        (torch.float32, True, 3, 7, 1, 5, 'first'),
        (torch.bfloat16, True, 1, 40, 19, 96, 'random'),
        (torch.float32, False, 2, 9, 9, 40, 'first'),
        (torch.bfloat16, True, 2, 15, 10, 130, 'any order'),
        (torch.float32, True, 2, 15, 10, 130, 'any order'),
    ],
)
def test_add_weighted(dtype, with_phi, B, S, K, D, where):
    index_BK = positions(B, S, K, where)
    inputs = {
        'y': numbers(B, S, D, seed=0, dtype=dtype),
        'z': numbers(B, K, D, seed=1, dtype=dtype),
        'weight': numbers(B, K, seed=2),
        # A bfloat16 residual stream on one GPU has float32 step encodings.
        'phi': numbers(D, seed=3, dtype=torch.float32 if where == 'any order' else dtype),
    }
    if not with_phi:
        del inputs['phi']
    exact = in_float64(inputs)

    def function(y, z, weight, phi=None):
        return kernels.add_weighted(y.sin(), index_BK, z, weight, 1.3, phi)

    def expected(y, z, weight, phi=None):
        update_BKD = 1.3 * weight[..., None] * z * (1 if phi is None else phi)
        return y.sin().scatter_add(1, index_BK[..., None].expand(B, K, D), update_BKD)

    got = function(**inputs)
    compare(got, expected(**exact), inputs, exact)
    y_BSD, routed_BS = inputs['y'].sin(), torch.zeros(B, S, dtype=torch.bool, device=DEVICE).scatter(1, index_BK, True)
    assert torch.equal(got[~routed_BS], y_BSD[~routed_BS]), 'tokens that are not routed keep their bits'


def test_token_operators():
    index_BK = positions(2, 7, 3, 'random')
    y, z, weight, phi = numbers(2, 7, 8, seed=0), numbers(2, 3, 8, seed=1), numbers(2, 3, seed=2), numbers(8, seed=3)
    torch.library.opcheck(tokens.gather_tokens, (y, index_BK))
    torch.library.opcheck(tokens._put, (y, z, index_BK, 7))
    torch.library.opcheck(tokens.add_weighted, (y, index_BK, z, weight, 0.7, phi))
    torch.library.opcheck(tokens.add_weighted, (y, index_BK, z, weight, 0.7, None))


def test_a_step_compiles_without_graph_breaks():
    index_BK = positions(2, 7, 3, 'random')
    inputs = [numbers(2, 7, 8, seed=0), numbers(2, 3, seed=1), numbers(8, seed=2)]

    def step(y, weight, phi):
        z = ops.gather_tokens(y, index_BK).sin()
        return ops.add_weighted(ops.replace_tokens(y, index_BK, z), index_BK, z, weight, 1.0, phi)

    compiled = torch.compile(step, fullgraph=True, backend='inductor' if DEVICE == 'cuda' else 'aot_eager')
    grads = [torch.autograd.grad(function(*inputs).square().sum(), inputs) for function in (step, compiled)]
    torch.testing.assert_close(grads[1], grads[0])


# Top-p routes a different number of tokens per sequence.
@pytest.mark.parametrize(
    'options',
    [
        {'combine': 'weighted', 'thinking_kv': 'refresh', 'selection': 'top_p'},
        {'combine': 'equation7', 'thinking_kv': 'shared', 'reweighting': 'symmetric', 'step_encoding': False},
        {'combine': 'algorithm1', 'thinking_kv': 'shared', 'selection': 'top_p', 'step_encoding': False},
        {'combine': 'delta', 'thinking_kv': 'refresh', 'residual_thinking': False, 'reweighting': 'symmetric'},
    ],
)
def test_the_thinking_layer_with_kernels(options, monkeypatch):
    """The layer against the written-out recurrence, as in test_thinking.py, with heads of a size the kernels have."""
    monkeypatch.setattr(thinking_cases, 'D', 96)
    if 'selection' not in options:
        monkeypatch.setattr(thinking_cases, 'B', 1)
    thinking_cases.compare_with_reference({'attention_backend': 'triton', **options}, DEVICE)
