"""Which of PyTorch's two FSDPs shards the model: ``fsdp_config.version``, 2 by default.

Composer reads the choice from the environment and the options under the names of the chosen version. Here they have one
name each, FSDP 1's.
"""

from __future__ import annotations

import os

from omegaconf import DictConfig

from itt_composer.config.check import FSDP_2


def choose_fsdp(config: DictConfig) -> None:
    """Set up the version that ``config`` asks for, and put its options under that version's names."""
    fsdp = config.get('fsdp_config')
    if not fsdp:
        return
    version = fsdp_version(config)
    fsdp.pop('version', None)
    os.environ['FSDP_VERSION'] = str(version)
    # Foundry names checkpoints by this key, whose default is another one in Composer's FSDP 2.
    fsdp.setdefault('state_dict_type', 'full')
    if version == 1:
        return
    # Whether a layer's weights are freed between the forward and the backward pass.
    fsdp.setdefault('reshard_after_forward', fsdp.pop('sharding_strategy', 'FULL_SHARD') == 'FULL_SHARD')
    for key in FSDP_2:
        fsdp.pop(key, None)  # FSDP 2 has no such choice.
    import torch

    if not torch.cuda.is_available():
        average_over_gloo()


def fsdp_version(config: DictConfig) -> int:
    """1 or 2."""
    return (config.get('fsdp_config') or {}).get('version', 2)


def average_over_gloo() -> None:
    """Divide FSDP 2's gradients here: gloo's reduce-scatter sums where it is asked to average."""
    import torch
    from torch.distributed.fsdp import _fully_shard  # noqa: F401

    collectives = torch.distributed.fsdp._fully_shard._fsdp_collectives
    collectives._get_gradient_divide_factors = lambda *_, **__: (1.0, float(torch.distributed.get_world_size()))
