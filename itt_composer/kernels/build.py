"""Compile the kernels without a device, and read what they need of a multiprocessor.

``ptxas`` and ``cuobjdump`` come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from itt_composer.kernels import attention, attention_kernels, token_kernels, tokens

ATTENTION = {name: getattr(attention_kernels, f'{name}_kernel') for name in ('forward', 'q_grad', 'kv_grad')}
TOKENS = {name: getattr(token_kernels, f'{name}_kernel') for name in ('put_rows', 'add_weighted', 'add_weighted_grad')}
# Compute capability (80: A100, 90: H100) to bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
ITEMSIZE = {'fp32': 4, 'bf16': 2, 'fp16': 2}


class Build(NamedTuple):
    """One compiled kernel: bytes of shared memory, registers per thread, bytes spilled per thread, PTX and binary."""

    shared: int
    registers: int
    spilled: int
    ptx: str
    cubin: bytes


def build(kernel: str, dtype: str, size: int, architecture: int) -> Build:
    """Compile ``kernel`` for contiguous tensors with one query head per key-value head.

    Args:
        kernel: a key of ``ATTENTION`` or ``TOKENS``.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        size: E, the size of a head; D, the width, for a kernel of ``TOKENS``.
        architecture: 80 or 90.
    """
    if kernel in ATTENTION:
        function, constants = ATTENTION[kernel], attention.constants(kernel, size, ITEMSIZE[dtype])
    else:
        function, constants = TOKENS[kernel], {**tokens.block_of(size), 'ROWS': tokens.ROWS}
        constants.update(dict.fromkeys(('HAS_OLD', 'HAS_NEW', 'HAS_PHI'), True))
    options = {key: constants.pop(key) for key in ('num_warps', 'num_stages') if key in constants}
    # Triton makes a constant of an argument that is 1, and assumes multiples of 16 of one that is.
    constants.update({name: 1 for name in function.arg_names if name.endswith('_e') or name in ('i_k', 'GROUP')})
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(i,)] = 'constexpr', constants[name]
        elif name in ('scale', 'alpha'):
            signature[name] = 'fp32'
        else:
            signature[name], aligned[(i,)] = _type(name, dtype), [['tt.divisibility', 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget('cuda', architecture, 32), options=options)
    usage = _resource_usage(compiled.asm['cubin'])
    spilled = usage['STACK'] + usage['LOCAL']
    return Build(compiled.metadata.shared, usage['REG'], spilled, compiled.asm['ptx'], compiled.asm['cubin'])


def _type(name: str, dtype: str) -> str:
    if name in ('H', 'K', 'PADDED_K', 'S', 'D', 'BK') or '_' in name:
        return 'i32'
    if name in ('lse', 'delta', 'weight', 'dweight', 'dphi'):
        return '*fp32'
    return {'index': '*i64', 'slot': '*i32'}.get(name, f'*{dtype}')


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, '--dump-resource-usage', file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r'(REG|STACK|LOCAL):(\d+)', text.stdout)}
