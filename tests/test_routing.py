"""Selection rules and what takes the chosen tokens, against plain Python, and the options' checks."""

import math

import pytest
import torch
import torch.nn.functional as F

from itt_composer import ops
from itt_composer.model import ITTConfig, ITTForCausalLM, routing, thinking_layers
from itt_composer.model.selection import Selection
from itt_composer.options import ModelOptions, token_count

SCORES = torch.tensor([[0.3, -1.0, 2.0, 0.1, 0.9], [5.0, 4.0, -3.0, 4.5, 0.0]])


def sets(routed_BS: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in routed_BS]


def test_top_k_is_sorted_by_position():
    assert routing.top_k(SCORES, 3).tolist() == [[0, 2, 4], [0, 1, 3]]


def test_top_p_takes_the_fewest_tokens_that_hold_the_share():
    for p in (0.01, 0.5, 0.9, 1.0):
        for row, chosen in zip(SCORES.tolist(), sets(routing.top_p(SCORES, p)), strict=True):
            total = sum(map(math.exp, row))
            by_score = sorted(range(5), key=lambda i: -row[i])
            fewest = next(n for n in range(1, 6) if sum(math.exp(row[i]) for i in by_score[:n]) / total >= p - 1e-6)
            assert chosen == sorted(by_score[:fewest])


def test_threshold_looks_at_one_token_at_a_time():
    assert sets(routing.above_threshold(SCORES, torch.tensor(0.5))) == [[2, 4], [0, 1, 3]]
    assert sets(routing.above_threshold(SCORES, torch.tensor(9.0))) == [[], []]


def test_ragged_rows_are_filled_with_unique_tokens_that_do_not_count():
    routed_BS = routing.above_threshold(SCORES, torch.tensor(0.5))
    selection = Selection.from_mask(routed_BS, token_multiple=4, training=True)
    assert torch.equal(selection.mask(), routed_BS)
    assert selection.index_RK.shape == (2, 4)
    for row in selection.index_RK.tolist():
        assert len(set(row)) == 4
    x_BSD = torch.arange(10.0).view(2, 5, 1)
    added = selection.add(x_BSD, torch.full((2, 4, 1), 100.0))
    replaced = selection.replace(x_BSD, torch.full((2, 4, 1), -1.0))
    for b, chosen in enumerate(sets(routed_BS)):
        for s in range(5):
            assert added[b, s] == x_BSD[b, s] + (100 if s in chosen else 0)
            assert replaced[b, s] == (-1 if s in chosen else x_BSD[b, s])


def written_out_attention(q_BSHE, k_BSHE, routed_BS, own_keys):
    """Softmax attention of each routed token, with the keys as the values, one token after another."""
    out = []
    for b, routed in enumerate(sets(routed_BS)):
        for s in routed:
            keys_TH = k_BSHE[b, [r for r in routed if r <= s] if own_keys else range(s + 1)]
            share_HT = (torch.einsum('he,the->ht', q_BSHE[b, s], keys_TH) / q_BSHE.shape[-1] ** 0.5).softmax(-1)
            out.append(torch.einsum('ht,the->he', share_HT, keys_TH))
    return torch.stack(out)


@pytest.mark.parametrize('own_keys', [False, True])
@pytest.mark.parametrize(('B', 'S', 'share'), [(1, 300, 0.5), (3, 300, 0.4), (4, 7, 0.2), (1, 5, 1.0), (5, 1, 0.5)])
def test_routed_tokens_are_those_of_the_mask(B, S, share, own_keys):
    """Taken out, put back, and in attention; also where a sequence or a stretch of one has no routed tokens."""
    generator = torch.Generator().manual_seed(3)
    routed_BS = torch.rand(B, S, generator=generator) <= share
    routed_BS[:1, 100:290] = False
    routed_BS[1:2] = False
    routed_BS[-1, -1] = True
    x_BSHE, new_BSHE = torch.randn(2, B, S, 2, 4, dtype=torch.float64, generator=generator)
    routed = Selection.from_mask(routed_BS)
    assert torch.equal(routed.mask(), routed_BS)
    assert routed.index_RK.shape == (routed_BS.any(-1).sum(), routed_BS.sum(-1).max()), 'no more than is routed'
    valid_RK = torch.ones_like(routed.index_RK).bool() if routed.valid_RK is None else routed.valid_RK
    new_RKHE, taken_RKHE = routed.gather(new_BSHE), routed.gather(x_BSHE)
    assert torch.equal(taken_RKHE[valid_RK], x_BSHE[routed_BS])
    positions_BS = torch.arange(S)[None]
    assert routed.gather_positions(positions_BS)[valid_RK].tolist() == routed_BS.nonzero()[:, 1].tolist()
    assert torch.equal(routed.gather_positions(positions_BS.expand(B, S)), routed.gather_positions(positions_BS))
    where_BS11 = routed_BS[..., None, None]
    assert torch.equal(routed.replace(x_BSHE, new_RKHE), torch.where(where_BS11, new_BSHE, x_BSHE))
    assert torch.equal(routed.add(x_BSHE, new_RKHE), torch.where(where_BS11, x_BSHE + new_BSHE, x_BSHE))

    keys = taken_RKHE if own_keys else routed.sequences(x_BSHE)
    got = ops.causal_attention(new_RKHE, keys, keys, None if own_keys else routed.index_RK)
    expected = written_out_attention(new_BSHE, x_BSHE, routed_BS, own_keys)
    torch.testing.assert_close(got[valid_RK], expected)


def test_nothing_routed():
    routed = Selection.from_mask(torch.zeros(2, 3, dtype=torch.bool))
    x_BSD = torch.randn(2, 3, 4)
    assert routed.is_empty
    assert routed.gather(x_BSD).shape == (2, 0, 4)
    assert torch.equal(routed.add(x_BSD, routed.gather(x_BSD)), x_BSD)


def test_padding_is_never_routed_and_each_row_has_its_own_k():
    padding_BS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert sets(routing.top_k_padded(SCORES, 0.7, padding_BS)) == [[2, 4], [0, 1, 3]]
    for routed_BS in (
        routing.top_p(SCORES, 1.0, padding_BS),
        routing.above_threshold(SCORES, torch.tensor(-99.0), padding_BS),
    ):
        assert sets(routed_BS) == [[2, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ('capacity', 'S', 'multiple', 'k'),
    # 0.7 * 90 is 62.99... in floating point.
    [(0.5, 4096, 1, 2048), (0.7, 90, 1, 63), (0.01, 10, 1, 1), (0.5, 10, 4, 8), (0.9, 10, 64, 10), (1.0, 7, 1, 7)],
)
def test_token_count(capacity, S, multiple, k):
    assert token_count(capacity, S, multiple) == k


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(thinking='it'), "did you mean 'itt'"),
        (dict(thinking='itt', token_ratios=[0.5, 1.2]), r'1.2 for step 2 is not in \(0, 1\]'),
        (dict(thinking='itt', token_ratios=[0.0]), r'not in \(0, 1\]'),
        (dict(thinking='itt', thinking_steps=3, token_ratios=[0.5]), '1 ratios for 3 extra steps'),
        (dict(thinking='itt', thinking_steps=7), 'the paper has none for 7'),
        (dict(thinking='itt', thinking_layers=[0, 8]), 'no layer 8; the model has layers 0 to 7'),
        (dict(thinking='itt', thinking_layers=[]), 'empty'),
        (dict(thinking='itt', thinking_layers=[1, 1]), 'twice'),
        (dict(thinking='itt', thinking_layers=[[2, 3], 3]), r'\[\[2, 3\], 3\] names a layer twice'),
        (dict(thinking='itt', thinking_layers=[[6, 7, 8]]), 'no layer 8; the model has layers 0 to 7'),
        *(
            (
                dict(thinking='itt', thinking_layers=[0, block]),
                rf'consecutive, ascending layers in a block, got \{block}',
            )
            for block in ([], [2, 5], [3, 2], [2, 2])
        ),
        (dict(thinking='itt', combine='weigthed'), "did you mean 'weighted'"),
        (dict(thinking='itt', thinking_kv='refreshed'), "did you mean 'refresh'"),
        (dict(thinking='itt', selection='top-k'), "did you mean 'top_k'"),
        (dict(thinking='itt', alpha=[1.0, 2.0]), '2 values for 3'),
        (dict(thinking='itt', token_multiple=0), 'token_multiple'),
        (dict(thinking='loop', token_ratios=[0.5]), 'a loop runs every token'),
        (dict(token_ratios=[0.5]), 'thinking is none'),
        (dict(thinking='itt', token_ratios=0.5), 'token_ratios: expected a list of finite numbers or null, got 0.5'),
        (
            dict(thinking='itt', thinking_layers=0),
            'thinking_layers: expected a list of whole numbers or lists of whole numbers or null, got 0',
        ),
        (
            dict(thinking='itt', thinking_layers=[True, 2]),
            r'thinking_layers: expected a list of whole numbers or lists of whole numbers or null, got \[True, 2\]',
        ),
        (dict(thinking='itt', thinking_steps='3'), "thinking_steps: expected a whole number or null .*, got '3'"),
        (dict(thinking='itt', thinking_steps=3.0), 'thinking_steps: expected a whole number or null .*, got 3.0'),
        (dict(thinking='itt', token_multiple=None), 'token_multiple: expected a whole number .*, got null'),
        (dict(thinking='itt', alpha='a'), "alpha: expected a list of finite numbers or a finite number .*, got 'a'"),
        (dict(thinking='itt', token_routing='flase'), "token_routing: expected true or false, got 'flase'"),
        (dict(thinking='itt', residual_thinking='off'), "residual_thinking: expected true or false, got 'off'"),
        (dict(thinking_layers=[0]), 'thinking is none'),
        (dict(hidden_size=130), 'do not split hidden_size 130'),
        (dict(thinking='itt', router_temperature=0), 'router_temperature: .*at least 0.001.*got 0'),
        (dict(thinking='itt', residual_scale_init=2.0, step_encoding=False), 'residual_scale_init.*: false'),
        (dict(alpha=float('nan')), 'alpha: expected .*finite number .*, got nan'),
        (dict(thinking='itt', alpha=[1.0, 1.0, float('inf')]), r'alpha: .*got \[1.0, 1.0, inf\]'),
        (dict(tie_word_embeddings='false'), "tie_word_embeddings: expected true or false, got 'false'"),
        (dict(num_hidden_layers=99999999999999999999), 'num_hidden_layers: .*at most 16384'),
        (dict(token_multiple=4097), r'token_multiple: expected at most max_position_embeddings \(4096\), got 4097'),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ModelOptions(**options)


def test_options_set_at_loading_are_checked_too(tmp_path):
    ITTForCausalLM(
        ITTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention_backend: 'tritn' is not one of"):
        ITTForCausalLM.from_pretrained(tmp_path, attention_backend='tritn')


def test_defaults_are_the_papers():
    itt = ModelOptions(thinking='itt')
    assert (itt.thinking_layers, itt.token_ratios) == ([0, 2, 4, 6], [0.5, 0.5, 0.5])
    assert ModelOptions(thinking='itt', thinking_steps=1).token_ratios == [0.9]
    assert ModelOptions(thinking='loop', thinking_steps=2).token_ratios == [1.0, 1.0]


def test_unknown_config_key_names_the_nearest():
    with pytest.raises(ValueError, match="unknown key 'token_ratio'; did you mean 'token_ratios'"):
        ITTConfig.from_options('model', thinking='itt', token_ratio=[0.5])
    with pytest.raises(ValueError, match='num_attention_heads: 5 heads'):
        ITTConfig(num_attention_heads=5)
    with pytest.raises(ValueError, match='num_key_value_heads: 3'):
        ITTConfig(num_key_value_heads=3)


def test_a_router_starts_as_no_copy_of_another_weight():
    """It is drawn aside, and what is drawn next are the next layer's queries, or the head."""
    config = ITTConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, thinking='itt',
        thinking_layers=[0, 1, 3],
    )  # fmt: skip
    torch.manual_seed(0)
    model = ITTForCausalLM(config)
    routers = torch.cat([layer.router_TD for layer in thinking_layers(model).values()])
    others = [p for name, p in model.named_parameters() if p.dim() == 2 and 'router' not in name and 'phi' not in name]
    rows = torch.cat([routers, *(weight for weight in others if weight.shape[1] == 64)]).detach()
    cosine = F.cosine_similarity(rows[:9, None], rows[None], dim=-1) - torch.eye(9, len(rows))
    assert cosine.abs().max() < 0.7


def test_initial_weights_have_the_ranges_of_the_config():
    config = ITTConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8,
        thinking='itt', embedding_initializer_range=0.5,
    )  # fmt: skip
    model = ITTForCausalLM(config)
    layer = model.model.layers[0]
    expected = [
        (model.model.embed_tokens.weight, 0.5),
        (model.lm_head.weight, 0.02),
        (layer.block.self_attn.q_proj.weight, 0.02),
        (layer.block.mlp.up_proj.weight, 0.02),
        (layer.block.self_attn.o_proj.weight, 0.02 / 4),
        (layer.block.mlp.down_proj.weight, 0.02 / 4),
        (layer.router_TD, config.router_initializer_range),
    ]
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert (layer.phi_TD[0] == 1).all() and (layer.phi_TD[1:] == 0.1).all()
