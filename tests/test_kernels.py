"""The Triton kernels: interpreted, on a GPU where there is one, and compiled for devices that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from itt_composer.kernels.build import SHARED_LIMIT, TOKENS, build
from itt_composer.model import ITTConfig
from itt_composer.ops import causal_attention


def run_cases(**environment: str) -> None:
    """``kernel_cases.py`` in a process of its own."""
    cases = Path(__file__).with_name('kernel_cases.py')
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-x', '--show-capture=no', '-p', 'no:cacheprovider', str(cases)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_interpreted():
    run_cases(TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_on_the_device():
    run_cases()


@pytest.mark.parametrize('architecture', [80, 90])
@pytest.mark.parametrize(
    ('kernel', 'dtype', 'E'),
    [
        ('forward', 'bf16', 128),
        ('q_grad', 'bf16', 48),
        ('kv_grad', 'bf16', 32),
        ('kv_grad', 'bf16', 64),
        ('kv_grad', 'bf16', 128),
        ('kv_grad', 'fp32', 64),
    ],
)
def test_compiles_for_devices_that_are_not_here(kernel, dtype, E, architecture):
    built = build(kernel, dtype, E, architecture)
    assert built.shared <= SHARED_LIMIT[architecture]
    assert built.spilled <= 32
    tensor_cores = {80: 'mma.sync', 90: 'wgmma'}[architecture]
    assert (tensor_cores in built.ptx) == (dtype == 'bf16')


@pytest.mark.parametrize('kernel', TOKENS)
def test_token_kernels_compile_for_devices_that_are_not_here(kernel):
    assert build(kernel, 'bf16', 1536, 80).spilled == 0
    assert build(kernel, 'fp32', 4096, 90).spilled == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_no_device():
    q, index = torch.zeros(1, 2, 2, 32), torch.tensor([[0, 3]])
    k = torch.zeros(1, 4, 2, 32)
    with pytest.raises(ValueError, match=r'triton needs a CUDA device.*on cpu; set attention_backend: auto'):
        causal_attention(q, k, k, index, backend='triton')
    assert causal_attention(q, k, k, index).shape == q.shape


def test_head_sizes_without_kernels_are_refused_with_the_config():
    with pytest.raises(
        ValueError, match=r'head sizes 32, 48, 64, 128, and these heads have 16; set attention_backend: auto'
    ):
        ITTConfig(hidden_size=64, num_attention_heads=4, attention_backend='triton')
