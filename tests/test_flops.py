"""Costs against the paper's tables, against counts written as loops, and against PyTorch's own FLOP counter."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from itt_composer.config.run_file import resolve_model
from itt_composer.flops import (
    Decoder,
    ForwardFlops,
    exact_flops,
    paper_flops,
    parameters,
    routed_tokens,
    training_flops,
)
from itt_composer.paper.tables import paper_tables

pytestmark = pytest.mark.usefixtures('elsewhere')
REPOSITORY = Path(__file__).resolve().parents[1]

TABLE3_OVERRIDES = {
    'without_residual_thinking_connection': ['model.residual_thinking=false'],
    'without_adaptive_token_routing': ['model.token_routing=false'],
    'without_thinking_position_encoding': ['model.step_encoding=false'],
    'sampling_top_k': ['model.selection=top_k'],
    'sampling_top_p': ['model.selection=top_p'],
    'weight_norm_sigmoid': ['model.weight_norm=sigmoid'],
    'weight_norm_tanh': ['model.weight_norm=tanh'],
    'reweighting_only_select': ['model.reweighting=routed_only'],
    'reweighting_symmetric': ['model.reweighting=symmetric'],
}


@functools.cache
def decoder_of(name: str, *overrides: str) -> Decoder:
    return Decoder.from_model_config(resolve_model(REPOSITORY / 'yamls' / f'{name}.yaml', overrides)[0])


def paper_cells(tables: dict) -> list[tuple[str, list[str], list[float] | None, float]]:
    """(training config, overrides, ratios or None, TFLOPs printed) for the FLOPs column of Tables 1 to 4."""
    cells: list[tuple[str, list[str], list[float] | None, float]] = []
    for name, flops, *_ in tables['table1']['rows']:
        # The column of the two larger sizes counts one thinking layer in eight.
        one_in_eight = not name.startswith('llama') and not name.endswith('162m')
        cells.append((name, ['model.thinking_layers=[0]'] if one_in_eight else [], None, flops))
    for name, ratios, flops, _ in tables['table2_and_4']['rows']:
        trained_at = ['model.token_ratios=[0.7,0.7,0.7]'] if name.startswith('itt') else []
        cells.append((name, trained_at, ratios, flops))
    for variant, flops, _ in tables['table3']['rows']:
        name = variant if variant in ('itt_x4_162m', 'llama_162m') else 'itt_x4_162m'
        cells.append((name, TABLE3_OVERRIDES.get(variant, []), None, flops))
    return cells


def test_the_flops_column_of_tables_1_to_4():
    cells = paper_cells(paper_tables())
    assert len(cells) == 47
    wrong = []
    for name, overrides, ratios, printed in cells:
        tflops = paper_flops(decoder_of(name, *overrides), 4096, ratios) / 1e12
        # Printed to two digits, so 0.01 is the last digit's unit.
        if abs(round(tflops, 2) - printed) > 0.01 + 1e-9:
            wrong.append((name, overrides, ratios, printed, tflops))
    assert not wrong


@pytest.mark.parametrize(
    ('name', 'count'),
    [
        ('llama_162m', 162_022_400),
        ('llama_230m', 249_325_056),
        ('llama_466m', 466_651_136),
        ('llama_1.9b', 1_881e6),
        ('llama_2.7b', 2_691e6),
        ('llama_3.5b', 3_500e6),
    ],
)
def test_parameters_of_tables_5_and_7(name, count):
    exact = isinstance(count, int)
    assert parameters(decoder_of(name)).total == (count if exact else pytest.approx(count, abs=0.5e6))


def small_decoder(**options) -> Decoder:
    return Decoder(
        vocab_size=37,
        hidden_size=12,
        intermediate_size=20,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=3,
        **options,
    )


def count_by_loops(decoder: Decoder, S: int, token_ratios: list[float]) -> ForwardFlops:
    """Count multiply-adds query by query; ``refresh`` and ``shared`` as the mean over all choices of k positions."""
    D, heads, head_dim = 12, 6, 2
    kv_width = 2 * head_dim
    count = dict.fromkeys(('projections', 'attention', 'mlp', 'router', 'head'), 0.0)

    def block(positions, keys_of, new_kv, weight=1.0):
        for query in positions:
            count['projections'] += weight * 2 * (D * D + D * D + (2 * D * kv_width if new_kv else 0))
            for _head in range(heads):
                for _key in range(keys_of(query)):
                    count['attention'] += weight * 2 * (head_dim + head_dim)
            count['mlp'] += weight * 2 * 3 * D * 20

    for layer in range(3):
        block(range(S), lambda p: p + 1, new_kv=True)
        first_of_block = layer in [block[0] for block in decoder.thinking_blocks]
        for ratio in token_ratios if any(layer in block for block in decoder.thinking_blocks) else []:
            if ratio == 0:
                continue
            k = S if decoder.thinking == 'loop' or not decoder.token_routing else max(1, int(ratio * S + 1e-9))
            if decoder.thinking == 'itt' and decoder.token_routing and first_of_block:
                for _token in range(S):
                    count['router'] += 2 * D
            choices = list(itertools.combinations(range(S), k))
            for chosen in choices:
                keys_of = (
                    (lambda p, c=chosen: c.index(p) + 1) if decoder.thinking_kv == 'routed_only' else lambda p: p + 1
                )
                block(chosen, keys_of, decoder.thinking_kv != 'shared', weight=1 / len(choices))
    for _token in range(S):
        count['head'] += 2 * D * 37
    return ForwardFlops(**count)


@pytest.mark.parametrize(
    ('options', 'ratios'),
    [
        ({}, []),
        ({'thinking': 'loop', 'thinking_steps': 2, 'thinking_layers': [1]}, [1.0, 1.0]),
        ({'thinking': 'itt', 'token_ratios': [0.5, 0.7], 'thinking_kv': 'refresh'}, [0.5, 0.7]),
        ({'thinking': 'itt', 'token_ratios': [0.5, 0.7], 'thinking_kv': 'shared'}, [0.5, 0.7]),
        ({'thinking': 'itt', 'token_ratios': [0.5, 0.7], 'thinking_kv': 'routed_only'}, [0.5, 0.7]),
        ({'thinking': 'itt', 'token_ratios': [0.5, 0.7], 'token_routing': False}, [0.5, 0.7]),
        ({'thinking': 'itt', 'token_ratios': [0.5, 0.7], 'thinking_layers': [[0, 1], 2]}, [0.5, 0.7]),
        ({'thinking': 'itt', 'token_ratios': [0.5, 0.7], 'thinking_kv': 'routed_only'}, [0.0, 0.3]),
    ],
)
def test_exact_flops_against_loops_over_tokens(options, ratios):
    decoder = small_decoder(**options)
    # An even sequence: k (S + 1) / 2 is a whole number only for even k or odd S, and the count rounds down.
    for S in (9, 11):
        counted, expected = exact_flops(decoder, S, ratios), count_by_loops(decoder, S, ratios)
        assert counted.components() == pytest.approx(expected.components())
        assert training_flops(decoder, S, ratios) == pytest.approx(3 * expected.total)


def test_a_block_costs_the_sum_of_its_layers():
    """In the paper's convention and exactly, but for the routers: one per block."""
    apart, together = (
        decoder_of('itt_x4_162m', f'model.thinking_layers={layers}') for layers in ('[2,3,5,6]', '[[2,3],[5,6]]')
    )
    assert together.thinking_blocks == [[2, 3], [5, 6]]
    assert paper_flops(together) == paper_flops(apart)
    components = exact_flops(apart).components()
    assert exact_flops(together).components() == {**components, 'router': components['router'] // 2}


@pytest.mark.parametrize('heads', [{}, {'num_key_value_heads': None}])
def test_as_many_key_value_heads_as_heads_where_the_run_file_says_nothing(heads):
    model = dict(num_hidden_layers=2, vocab_size=11, hidden_size=8, intermediate_size=12, num_attention_heads=4)
    assert Decoder.from_model_config(model | heads).num_key_value_heads == 4


def test_routed_tokens():
    assert routed_tokens(0.7, 4096) == 2867
    assert routed_tokens(0.7, 4096, 128) == 2944
    assert routed_tokens(0.99, 4090, 128) == 4090
    assert routed_tokens(0.001, 100) == 1
    assert routed_tokens(0.0, 100, 64) == 0


@pytest.mark.parametrize('ratios', [[0.5], [0.5, 1.5]])
def test_ratios_that_do_not_fit_the_steps(ratios):
    with pytest.raises(ValueError, match='ratios'):
        exact_flops(small_decoder(thinking='itt', token_ratios=[0.5, 0.7]), 8, ratios)


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'thinking': 'loop', 'thinking_steps': 2},
        {'thinking': 'residual_scale', 'thinking_layers': [1, 2]},
        {'thinking': 'itt', 'token_ratios': [0.5, 0.75], 'thinking_kv': 'refresh'},
        {'thinking': 'itt', 'token_ratios': [0.5, 0.75], 'thinking_kv': 'shared'},
        {'thinking': 'itt', 'token_ratios': [0.5, 0.75], 'thinking_kv': 'routed_only', 'token_multiple': 8},
        {'thinking': 'itt', 'token_ratios': [0.5, 0.75], 'token_routing': False, 'step_encoding': False},
        {'thinking': 'itt', 'token_ratios': [0.5, 0.75], 'head_dim': 12, 'qkv_bias': True, 'qk_norm': True},
        {'thinking': 'itt', 'token_ratios': [0.5, 0.75], 'thinking_layers': [0, [2, 3]]},
        {'norm': 'layernorm', 'mlp': 'gelu', 'qkv_bias': True, 'o_bias': True, 'position': 'learned'},
    ],
    ids=['none', 'loop', 'growth', 'refresh', 'shared', 'routed_only', 'no_routing', 'qwen', 'blocks', 'gpt2'],
)
def test_the_model_multiplies_as_many_matrices_and_has_as_many_parameters(options):
    """PyTorch's FLOP counter on the model itself, for all that is not attention (its kernels are counted unmasked)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from itt_composer.model import ITTConfig, ITTForCausalLM

    config = ITTConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    model = ITTForCausalLM(config)  # in training mode, whose rule gives each step its exact share of the tokens
    decoder = Decoder.from_model_config(config.to_dict())
    assert parameters(decoder).total == sum(p.numel() for p in model.parameters())
    S = 20
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 64, (1, S)))
    aten = torch.ops.aten
    counted = {op: flops for op, flops in counter.get_flop_counts()['Global'].items() if op in (aten.mm, aten.addmm)}
    exact = exact_flops(decoder, S)
    assert sum(counted.values()) == exact.projections + exact.mlp + exact.head + exact.router


def test_the_command_prints_json_without_torch():
    code = (
        'import sys; from itt_composer.cli import app; app(sys.argv[1:], standalone_mode=False); '
        'heavy = {"torch", "transformers", "composer", "llmfoundry", "streaming"} & set(sys.modules); '
        'sys.exit(f"imported {heavy}" if heavy else 0)'
    )
    arguments = ['flops', 'itt_x4_162m', 'model.thinking_kv=shared', 'model.thinking_layers=[0]']
    process = subprocess.run(
        [sys.executable, '-c', code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    printed = json.loads(process.stdout)
    decoder = decoder_of('itt_x4_162m', *arguments[2:])
    assert printed['parameters'] == 162_022_400 + (4 + 3) * 1024
    assert printed['paper_tflops'] * 1e12 == pytest.approx(paper_flops(decoder))
    assert sum(printed['components'].values()) == pytest.approx(printed['exact_tflops'])
    assert printed['thinking_kv'] == 'shared'
