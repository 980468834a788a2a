"""Initial values of parameters and buffers, complete, on the meta device, or sharded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from itt_composer.model.block import ResidualProjection
from itt_composer.model.config import ITTConfig
from itt_composer.model.residual_scale import ResidualScaleLayer
from itt_composer.model.thinking import ITTLayer


@torch.no_grad()
def initialise(module: nn.Module, config: ITTConfig) -> None:
    """Fill the parameters and buffers that ``module`` itself holds; see :class:`ITTConfig`."""
    if isinstance(module, nn.Linear):
        depth = 2 * config.num_hidden_layers if isinstance(module, ResidualProjection) else 1
        module.weight.normal_(std=config.initializer_range / math.sqrt(depth))
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(std=config.embedding_initializer_range)
    elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
        module.weight.fill_(1)
        if isinstance(module, nn.LayerNorm):
            module.bias.zero_()
    elif isinstance(module, ITTLayer):
        module.threshold_T.zero_()
        module.threshold_updates.zero_()
        if module.phi_TD is not None:
            _fill_rows(module.phi_TD, config.first_encoding_init, config.step_encoding_init)
        if module.router_TD is not None:
            with _own_seed(module.router_TD.device):
                module.router_TD.normal_(std=config.router_initializer_range)
    elif isinstance(module, ResidualScaleLayer):
        module.phi_D.fill_(config.first_encoding_init)


@contextmanager
def _own_seed(device: torch.device) -> Iterator[None]:
    """Draw the numbers within the block from a seed of their own, and restore the default generator's state after it.

    So dense, Loop and ITT models of one seed start from the same weights elsewhere, and a router is not made of the
    numbers that come next, which are those of another weight.
    """
    if device.type == 'meta':
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        seed = int(torch.randint(2**62, (), device=device))
        if device.type == 'cuda':
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield


def _fill_rows(parameter: Tensor, first: float, others: float) -> None:
    """``first`` in row 0 and ``others`` below, also where FSDP2 has shared the rows out before they get values."""
    values = torch.full(parameter.shape, others, dtype=parameter.dtype, device=parameter.device)
    values[0] = first
    if hasattr(parameter, 'placements'):  # A DTensor, whose module a model on one device need not import.
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)
