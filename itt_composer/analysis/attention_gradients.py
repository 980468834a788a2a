"""Gradients of a decoder's attention matrices, and their nuclear norms (Section 2)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from itt_composer.model.sharding import unsharded, whole

LayerProjection = tuple[int, str]
"""Layer, counted from 0, and the projection's name."""

# LLaMA's names (and those of its many relatives), or GPT-2's; the last number is the layer's, also in a block of
# several. Wrappers may add names of their own anywhere between.
ATTENTION_PROJECTION = re.compile(
    r'(?:^|\.)(?:layers|h)\.(?:\w+\.)*?(\d+)\.(?:[^\W\d]\w*\.)*'
    r'(?:self_attn\.(?:\w+\.)*([qkvo]_proj)|attn\.(?:\w+\.)*(c_attn|c_proj))$'
)


def attention_projections(model: nn.Module) -> dict[LayerProjection, nn.Module]:
    """Return the attention projections of a decoder with LLaMA's or GPT-2's module names, by layer (from 0) and name.

    Names are ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, or GPT-2's ``c_attn`` (queries, keys and values side by
    side) and ``c_proj``. Wrappers may be DDP, FSDP, activation checkpointing and torch.compile.
    """
    found = {}
    for name, module in model.named_modules():
        match = ATTENTION_PROJECTION.search(name)
        if match:
            found[int(match[1]), match[2] or match[3]] = module
    return found


def attention_gradients(model: nn.Module) -> Iterator[tuple[LayerProjection, Tensor]]:
    """Yield the unsharded gradient of each attention projection, with GPT-2's joint matrices split.

    GPT-2's ``c_attn`` gives ``q_proj``, ``k_proj`` and ``v_proj``; its ``c_proj`` is called ``o_proj``. A projection
    without a gradient (frozen) is left out. Under FSDP this is a collective that every rank must run to the end.
    """
    for (layer, name), projection in unsharded(model, attention_projections(model), with_grads=True):
        sharded_gradient = projection.get_parameter('weight').grad
        if sharded_gradient is None:
            continue
        gradient = whole(sharded_gradient)
        if name == 'c_attn':  # [D, 3D]: GPT-2 stores its weights as input by output
            for part, of_part in zip(('q_proj', 'k_proj', 'v_proj'), gradient.chunk(3, dim=1), strict=True):
                yield (layer, part), of_part
        else:
            yield (layer, 'o_proj' if name == 'c_proj' else name), gradient


def nuclear_norm(gradient: Tensor) -> float:
    """Return the sum of the singular values of a matrix, in float32; NaN where an entry is not finite."""
    # torch.linalg raises LAPACK's error at an inf or NaN.
    return torch.linalg.svdvals(gradient.float()).sum().item() if gradient.isfinite().all() else float('nan')
