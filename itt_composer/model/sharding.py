"""Parameters and gradients in one piece, whether a model is unsharded, under DDP, or sharded by FSDP 1 or 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

Key = TypeVar('Key')
Module = TypeVar('Module', bound=nn.Module)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without sharding and without graph; for a DTensor (FSDP 2) a collective that every rank must join."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded(
    model: nn.Module, modules: Mapping[Key, Module], *, with_grads: bool = False
) -> Iterator[tuple[Key, Module]]:
    """Yield ``modules``, submodules of ``model``, each with its FSDP 1 parameters in one piece until the next one.

    One FSDP unit at a time is gathered, so the memory needed is that of one layer. Gathering is a collective: every
    rank must iterate to the end. Parameters of FSDP 2 stay as they are; :func:`whole` gathers them one by one.

    Args:
        model: the outermost module, after wrapping.
        modules: what to yield, by any key.
        with_grads: gather the gradients too.
    """
    unit_of: dict[nn.Module, nn.Module] = {}
    for outer in model.modules():  # outer units first, so that the innermost one stays
        if isinstance(outer, FullyShardedDataParallel):
            unit_of.update(dict.fromkeys(outer.modules(), outer))

    by_unit: dict[nn.Module | None, list[tuple[Key, Module]]] = {}
    for key, module in modules.items():
        by_unit.setdefault(unit_of.get(module), []).append((key, module))
    for unit, group in by_unit.items():
        context: AbstractContextManager[Any]
        if unit is None:
            context = nullcontext()
        else:
            context = FullyShardedDataParallel.summon_full_params(
                unit, recurse=False, writeback=False, with_grads=with_grads
            )
        with context:
            yield from group
