"""The model of a step on several GPUs, against cases computed by hand and the anchors of its assumptions."""

import re

import pytest
from typer.testing import CliRunner

from itt_composer.config.files import yamls_folder
from itt_composer.config.run_file import resolve, resolve_model
from itt_composer.flops import Decoder, exact_flops
from research.__main__ import app
from research.scale import (
    GPUS,
    Assumed,
    Gpu,
    Settings,
    activation_bytes,
    best,
    foundry_flops_per_token,
    step,
    tokens_per_second,
)
from research.study.command import predicted_cost

EXACT = Assumed(link_share=0.5, bandwidth_share=0.5, overlap=0.5, usable_memory=1.0)
TOY = Gpu('toy', peak=1e12, memory=1e12, bandwidth=2e9, link=2e9, utilisation=0.5)


def decoder(row):
    return Decoder.from_model_config(resolve_model(yamls_folder() / f'{row}.yaml')[0])


@pytest.mark.parametrize(
    ('gpu', 'size', 'expected'),
    [
        ('a100', '162m', 122e3), ('a100', '230m', 84e3), ('a100', '466m', 45e3),
        ('h100', '162m', 260770), ('h100', '230m', 181e3), ('h100', '466m', 95e3),
    ],
)  # fmt: skip
def test_plain_speed_on_one_gpu(gpu, size, expected):
    """46 % of an A100 and 31 % of an H100, by the FLOPs that foundry counts; what one H200 did with 162M."""
    assert tokens_per_second(decoder(f'llama_{size}'), 4096, GPUS[gpu]) == pytest.approx(expected, rel=0.07)


def test_foundry_flops():
    # 6 * (162,022,400 - 32000 * 1024) + 12 * 8 * 1024 * 4096
    assert foundry_flops_per_token(decoder('llama_162m'), 4096) == 6 * 129_254_400 + 402_653_184


def test_thinking_costs_its_flops_and_the_overhead():
    plain, itt, loop = (decoder(f'{family}_162m') for family in ('llama', 'itt_x4', 'loop_x4'))
    speed = tokens_per_second(plain, 4096, TOY)
    floor = exact_flops(itt, 4096).total / exact_flops(plain, 4096).total
    assert tokens_per_second(itt, 4096, TOY) == pytest.approx(speed / floor / 1.238)
    assert tokens_per_second(itt, 4096, GPUS['h100']) == pytest.approx(130908, rel=0.02)  # What one H200 did.
    floor = exact_flops(loop, 4096).total / exact_flops(plain, 4096).total
    assert tokens_per_second(loop, 4096, TOY) == pytest.approx(speed / floor)


@pytest.mark.parametrize(('strategy', 'bytes_per_weight'), [('FULL_SHARD', 8), ('SHARD_GRAD_OP', 6)])
def test_a_step_by_hand(strategy, bytes_per_weight):
    """8 sequences of 100 tokens on 4 GPUs: 2 microbatches of 1 on each, at 10 tokens a second."""
    plain = decoder('llama_162m')
    N = 162_022_400
    took = step(plain, 100, 8, 4, TOY, Settings(1, strategy, False), speed=10.0, assumed=EXACT)
    assert took.compute == pytest.approx(20.0)
    # 3/4 of the bytes over 1e9 bytes/s, half of it behind the computing, twice.
    assert took.exposed_traffic == pytest.approx(2 * 0.5 * bytes_per_weight * N * 0.75 / 1e9)
    assert took.optimizer == pytest.approx(28 * N / 4 / 1e9)
    assert took.seconds == took.compute + took.exposed_traffic + took.optimizer


def test_traffic_hides_behind_no_more_than_the_computing():
    plain = decoder('llama_162m')
    took = step(plain, 100, 8, 4, TOY, Settings(2, 'FULL_SHARD', False), speed=1e6, assumed=EXACT)
    assert took.exposed_traffic == pytest.approx(8 * 162_022_400 * 0.75 / 1e9 - 200 / 1e6)


def test_one_gpu_sends_nothing():
    took = step(decoder('itt_x2_230m'), 64, 4, 1, TOY, Settings(4, 'FULL_SHARD', False), speed=1.0, assumed=EXACT)
    assert took.exposed_traffic == 0


def test_checkpointing_trades_a_third_of_the_blocks_for_memory():
    plain = decoder('llama_162m')
    kept, again = (step(plain, 4096, 8, 8, TOY, Settings(1, 'FULL_SHARD', c), 1e4, EXACT) for c in (False, True))
    count = exact_flops(plain, 4096)
    assert again.compute / kept.compute == pytest.approx(1 + (count.total - count.head) / count.total / 3)
    assert again.memory < kept.memory


def test_memory_by_hand():
    """ZeRO's 16 bytes a weight over 8 GPUs, everything whole in bfloat16 under SHARD_GRAD_OP, and the activations."""
    plain, N, V, D = decoder('llama_162m'), 162_022_400, 32000, 1024
    layer = (N - 2 * V * D) / 8
    took = step(plain, 4096, 16, 8, TOY, Settings(2, 'SHARD_GRAD_OP', False), 1e4, EXACT)
    # Per token: 8 passes of 49,544 bytes, which is what was counted, and 10 D outside of the layers.
    activations = 2 * 4096 * (8 * 49544 + 10 * D)
    assert took.memory == pytest.approx(16 * N / 8 + 2 * N + 2 * layer + 2048 * V * 16 + 4 * V * D + activations)


@pytest.mark.parametrize(('size', 'counted'), [('162m', 49544), ('230m', 64008), ('466m', 90760), ('1.9b', 203912)])
def test_activations_are_those_that_were_counted(size, counted):
    plain = decoder(f'llama_{size}')
    assert (activation_bytes(plain) - 10 * plain.hidden_size) / plain.num_hidden_layers == counted


def test_the_best_settings_fit_and_nothing_faster_does():
    itt, gpu, assumed = decoder('itt_x4_466m'), GPUS['a100'], Assumed()
    speed = tokens_per_second(itt, 4096, gpu)
    settings, took = best(itt, 4096, 256, 8, gpu, speed, assumed)
    assert took.memory <= 0.85 * 80e9
    larger = Settings(settings.microbatch * 2, settings.strategy, settings.checkpointing)
    assert step(itt, 4096, 256, 8, gpu, larger, speed, assumed).memory > 0.85 * 80e9
    with pytest.raises(ValueError, match='256: 7 GPUs cannot share it'):
        best(itt, 4096, 256, 7, gpu, speed, assumed)
    with pytest.raises(ValueError, match='not even one sequence'):
        best(itt, 4096, 256, 8, TOY.__class__('small', 1e12, 1e9, 1e9, 1e9, 0.5), speed, assumed)


def test_what_the_runs_of_a_study_cost():
    """50,000 batches at what one H200 did with ITT x4 at 162M, twice; FSDP and the optimizer take under a hundredth."""
    config = resolve(yamls_folder() / 'itt_x4_162m.yaml')
    said = predicted_cost([config, config])
    hours = float(re.search(r'([\d,.]+) on H100', said)[1].replace(',', ''))
    assert hours == pytest.approx(2 * 50000 * 256 * 4096 / 130908 / 3600, rel=0.03), said
    config.max_duration = '2ep'
    assert 'no prediction' in predicted_cost([config]) and '2ep' in predicted_cost([config])


def test_command():
    row = str(yamls_folder() / 'llama_162m.yaml')
    arguments = [row, '--gpu', 'a100', '--gpus', '1', '--batch', '32', '--tokens', '3.6e9', '--price', '2']
    done = CliRunner().invoke(app, ['scale', *arguments, '--tokens-per-second', '100000'])
    assert done.exit_code == 0
    assert '100k' in done.output  # 3.6e9 tokens at 1e5 a second are ten hours, and the optimizer's few milliseconds.
    assert '│ 10 │' in ' '.join(done.output.split()) and '│ 20 │' in ' '.join(done.output.split())
    assert 'utilisation' not in done.output and 'Assumed, not measured' in done.output
    assert '--gpu v100: not one of' in str(CliRunner().invoke(app, ['scale', row, '--gpu', 'v100']).exception)
    shared = CliRunner().invoke(
        app, ['scale', row.replace('llama', 'itt_x4'), 'model.thinking_kv=shared', '--gpu', 'h100']
    )
    chosen = CliRunner().invoke(
        app, ['scale', row.replace('llama', 'itt_x4'), 'model.thinking_kv=routed_only', '--gpu', 'h100']
    )
    assert shared.exit_code == chosen.exit_code == 0 and shared.output != chosen.output
    assert CliRunner().invoke(app, ['scale', row, '--gpus', '0']).exit_code == 2
    assert 'set both' in str(CliRunner().invoke(app, ['scale', '--tokens-per-second', '1']).exception)
