"""``torch.compile`` of each decoder block and of the loss; one graph serves every layer. Routing is not compiled.

A step's number of tokens follows the capacity. PyTorch compiles the first number that it meets and, at the second one,
once more for any number: a complete capacity warm-up costs one recompilation, or two with blocks of several layers.
It costs one more where the MLP's activations cross the size from which they are recomputed, and one for the norms'.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from itt_composer.checks import check_choice
from itt_composer.model.block import DecoderBlock
from itt_composer.model.causal_lm import ITTForCausalLM


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = 'inductor') -> None:
    """Compile the training passes of every :class:`DecoderBlock` of ``model``, and the chunked loss, in place.

    Of a block only ``forward`` is replaced: parameters keep their names, and the hooks of FSDP and the wrappers of
    activation checkpointing, which may be put on before or after, stand outside what is compiled. Evaluation stays as
    it is: there the number of tokens is another for every text.

    Raises:
        ValueError: no such backend.
    """
    if isinstance(backend, str):
        check_choice('compile_blocks', backend, torch.compiler.list_backends(exclude_tags=()))
    compiled = torch.compile(DecoderBlock.forward, backend=backend)

    def forward(block: DecoderBlock, *args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else DecoderBlock.forward)(block, *args, **kwargs)

    for module in model.modules():
        if isinstance(module, DecoderBlock):
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        if isinstance(module, ITTForCausalLM):
            module.loss_and_derivative = torch.compile(module.loss_and_derivative, backend=backend)  # type: ignore[method-assign]
