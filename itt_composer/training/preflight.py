"""Can this machine run what the training config asks? Asked before foundry, whose import alone takes half a minute."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from itt_composer.config.examples import check_examples
from itt_composer.config.finetuning import example_sets, examples_file, is_finetuning
from itt_composer.config.pretrained import find_tokenizer
from itt_composer.data_folder import check_hashes, no_shards
from itt_composer.training.fsdp import fsdp_version

# Shards that are compared with their hashes before a start, some seconds of work; `itt verify-data` compares all.
HASHED_BYTES = 2 << 30


@dataclass(frozen=True)
class Machine:
    """What the launcher started on this node, and what the node has."""

    world_size: int
    local_world_size: int
    local_rank: int
    gpus: int

    @classmethod
    def here(cls) -> Machine:
        """From the launcher's environment variables, which ``composer`` and ``torchrun`` both set, and from CUDA."""
        return cls(
            world_size=int(os.environ.get('WORLD_SIZE', 1)),
            local_world_size=int(os.environ.get('LOCAL_WORLD_SIZE', 1)),
            local_rank=int(os.environ.get('LOCAL_RANK', 0)),
            gpus=_gpus_here(),
        )


def _gpus_here() -> int:
    # Importing torch takes seconds; without a driver there is nothing to count.
    if not any(Path(device).exists() for device in ('/dev/nvidiactl', '/dev/dxg', '/dev/kfd')):
        return 0
    import torch

    return torch.cuda.device_count()


def problems(config: DictConfig, machine: Machine) -> list[str]:
    """What stands in the way of this run on this machine, each with the override that would run here; none if nothing.

    Args:
        config: as ``run_file.resolve`` returns it.
        machine: the node and the processes on it.
    """
    found = []
    for check in (_gpus, _kernels, _memory, _batch, _load_path, _shards, _examples):
        try:
            check(config, machine)
        except ValueError as error:
            found.append(str(error))
    return found


def _gpus(config: DictConfig, machine: Machine) -> None:
    if machine.gpus:
        if machine.local_world_size > machine.gpus:
            raise ValueError(
                f'{machine.local_world_size} processes on a machine with {machine.gpus} GPUs; '
                f'start {machine.gpus}: composer -n {machine.gpus} train.py ...'
            )
        return
    asked = []
    if config.get('precision', 'amp_bf16') != 'fp32':
        asked.append(f'precision {config.get("precision", "amp_bf16")}')
    # Composer drops fsdp_config for a single process; FSDP 2 runs over gloo, FSDP 1 does not.
    if config.get('fsdp_config') and machine.world_size > 1 and fsdp_version(config) == 1:
        asked.append('FSDP 1')
    if asked:
        raise ValueError(f'no GPU here, and the training config needs {" and ".join(asked)}; add: parts.machine=cpu')


def _kernels(config: DictConfig, machine: Machine) -> None:
    if not machine.gpus and config.model.get('attention_backend') == 'triton':
        raise ValueError('no GPU here, and model.attention_backend is triton; add: model.attention_backend=auto')


def _memory(config: DictConfig, machine: Machine) -> None:
    """Composer drops ``fsdp_config`` for a single process, and with it what was to save memory."""
    if machine.world_size == 1 and (config.get('fsdp_config') or {}).get('activation_checkpointing'):
        raise ValueError(
            'fsdp_config.activation_checkpointing: has no effect with one process, which has no FSDP; add: '
            'fsdp_config.activation_checkpointing=false, and device_train_microbatch_size=1 to save memory'
        )


def _batch(config: DictConfig, machine: Machine) -> None:
    batch, world = config.get('global_train_batch_size'), machine.world_size
    if batch is not None and batch % world:
        fits = max(batch // world, 1) * world
        raise ValueError(
            f'{world} processes cannot share a batch of {batch} sequences evenly; add: global_train_batch_size={fits}'
        )


def _load_path(config: DictConfig, machine: Machine) -> None:
    path = str(config.get('load_path') or '')
    if path and '://' not in path and not Path(path).exists():
        raise ValueError(f'load_path: no checkpoint at {path}; set a .pt file or the folder of a sharded checkpoint')


def _shards(config: DictConfig, machine: Machine) -> None:
    """Missing or changed shards at a stream's path, where there is no remote to fetch them from."""
    data, remote = config.variables.data, config.variables.get('remote')
    for stream in (config.train_loader.dataset.get('streams') or {}).values():
        if not stream.get('remote') and not (Path(stream.local) / 'index.json').is_file():
            raise ValueError(no_shards(stream.local, data))
    if not remote and machine.local_rank == 0 and not is_finetuning(config):
        _compare_hashes(config)
    name = str(config.tokenizer.name)
    # A name with one slash may be a hub's, unless it is where the data have theirs.
    on_disk = name.startswith(('/', '.', '~')) or name.count('/') > 1 or name == f'{data}/tokenizer'
    if on_disk and not remote and not Path(name).is_dir():
        raise ValueError(f'no tokenizer at {name}; itt data writes it, or add: tokenizer.name=<dir or hub id>')


def _examples(config: DictConfig, machine: Machine) -> None:
    """The first bad line of what a model is fine-tuned or validated on."""
    if is_finetuning(config) and machine.local_rank == 0:
        tokenizer = find_tokenizer(config, str(config.run_name))
        for _, dataset in example_sets(config):
            check_examples(examples_file(dataset), dataset.get('preprocessing_fn'), dataset.max_seq_len, tokenizer)


def _compare_hashes(config: DictConfig) -> None:
    streams = (config.train_loader.dataset.get('streams') or {}).values()
    # One per domain; a run that is only evaluated on tasks keeps the template, which names no data.
    loaders = config.get('eval_loader')
    sets = [loader.dataset for loader in loaders] if isinstance(loaders, ListConfig) else []
    folders = [Path(source.local) for source in (*streams, *sets)]
    left = HASHED_BYTES
    for folder in folders:
        # The merged set's shards are those of the sets in its folder.
        if not any(folder in other.parents for other in folders):
            left = check_hashes(folder, left)
