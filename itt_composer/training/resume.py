"""May a run go on under this config? Composer itself loads any checkpoint of the same run name, without a question.

The config that is about to train is compared with the manifest of the run. Keys that do not change what is trained may
differ (``MAY_DIFFER``); any other difference is an error, or with ``resume_with_changes=true`` a change that the
manifest records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from itt_composer.config.finetuning import examples_file, is_finetuning
from itt_composer.config.run_file import same_name
from itt_composer.deprecated import current_names
from itt_composer.options import ModelOptions
from itt_composer.training.manifest import recorded
from itt_composer.training.run_error import RunError

# Callbacks that read the training and do not change it.
OBSERVERS = (
    *('lr_monitor', 'speed_monitor', 'memory_monitor', 'memory_snapshot', 'oom_observer', 'runtime_estimator'),
    *('optimizer_monitor', 'nan_monitor', 'system_metrics_monitor', 'fdiff_metrics', 'loss_perp_v_len', 'env_logging'),
    *('generate_callback', 'eval_output_logging', 'async_eval', 'run_timeout', 'scheduled_gc', 'hf_checkpointer'),
    *('mono_checkpoint_saver', 'threshold_commit', 'causal_gap', 'domain_mean', 'progress'),
    *('router_weights', 'step_encodings', 'gradient_nuclear_norm'),
)

# The one list of what may differ between the run and its resumption: how long, how fast, where, and what is observed.
MAY_DIFFER = (
    *('max_duration', 'run_name', 'autoresume', 'device_train_microbatch_size', 'dist_timeout'),
    *('save_*', 'log_*', 'console_log_interval', 'progress_bar', 'python_log_level', 'loggers*', 'metadata*'),
    *('flatten_metadata', 'profiler*', 'eval_*', 'device_eval_batch_size', 'icl_*', 'eval_gauntlet*'),
    *('max_split_size_mb', 'expandable_segments', 'cuda_load_lazy', 'compile_config*'),
    *('train_loader.num_workers', 'train_loader.prefetch_factor', 'train_loader.persistent_workers'),
    *('train_loader.pin_memory', 'train_loader.timeout', 'train_loader.dataset.cache_limit'),
    *('train_loader.dataset.predownload', 'train_loader.dataset.*download_*', 'train_loader.dataset.*keep_zip'),
    'train_loader.dataset.*validate_hash',
    *('model.attention_backend', 'model.loss_chunk_tokens', 'model.compile_blocks', 'model.init_device'),
    *('model.use_train_metrics', 'model.additional_*_metrics'),
    # What these decide stands in other keys too: domains and proportions in the streams, paths in save_folder.
    'variables*',
    *(f'callbacks.{name}{rest}' for name in OBSERVERS for rest in ('', '.*')),
)
# With `dynamic_batch_loading`, the losses of these evaluations decide what is trained.
WEIGHS_DOMAINS = ('eval_interval', 'eval_subset_num_batches')
# Of how the model is sharded, only the numbers' precision changes what is trained.
PRECISION = 'fsdp_config.mixed_precision*'
# Where the same data lie; data are compared by their fingerprint where it is known.
DATA_PATHS = (
    *('train_loader.dataset.streams.*.local', 'train_loader.dataset.streams.*.remote'),
    'train_loader.dataset.hf_kwargs.data_files.*',
)
# A checkpoint brings its own, whatever the config says, so that no resumed run can change them.
FROM_CHECKPOINT = ('seed', 'train_loader.dataset.shuffle_seed', 'train_loader.dataset.num_canonical_nodes')

Changes = dict[str, tuple[Any, Any]]
"""Dotted key to its value in the run and its value now."""


def check_resume(manifest: Mapping[str, Any] | None, config: DictConfig, folder: Path, on_purpose: bool) -> Changes:
    """Compare the run in ``folder`` that has a checkpoint with the config that is to resume it.

    Args:
        manifest: of the run; None where it has none.
        config: resolved.
        folder: of the run, for the messages.
        on_purpose: ``resume_with_changes``.

    Returns:
        What differs and changes what is trained; empty unless ``on_purpose``.

    Raises:
        RunError: the config trains something else, or changes what cannot be changed.
    """
    if manifest is None:
        if on_purpose:
            return {}
        raise RunError(
            f'{folder}: a checkpoint without a manifest.json, so nobody knows how it was trained; set run_name= to '
            'train another run, or resume_with_changes=true to continue from it'
        )
    found = differences(manifest, config)
    if not found:
        return {}
    fixed = [key for key in found if any(fnmatchcase(key, pattern) for pattern in FROM_CHECKPOINT)]
    if on_purpose and not fixed:
        return found
    shown = fixed or list(found)
    said = ', '.join(f'{key} (was {found[key][0]!r}, got {found[key][1]!r})' for key in shown[:4])
    more = f' and {len(shown) - 4} more' if len(shown) > 4 else ''
    way_out = 'set run_name= to train another run, or these keys as they were'
    if not fixed:
        way_out += ', or resume_with_changes=true to change this run from its last checkpoint on'
    raise RunError(f'{folder}: the run there was trained with another {said}{more}; {way_out}')


def differences(manifest: Mapping[str, Any], config: DictConfig) -> Changes:
    """What differs between a run's manifest and ``config``, and changes what is trained."""
    now: Any = recorded(config)
    then = manifest['config']
    data_then = manifest.get('data_sha256') or _manifest_sha256(then)
    data_now = data_sha256(OmegaConf.to_container(config))  # type: ignore[arg-type]
    changes: Changes = {}
    same_data = data_then is not None and data_then == data_now
    if data_then and data_now and not same_data:
        changes['data fingerprint'] = (data_then[:16], data_now[:16])
    weights_then, weights_now = ((config.get('variables') or {}).get('pretrained_weights') for config in (then, now))
    if weights_then and weights_now and weights_then != weights_now:
        changes['weights of model.pretrained'] = (weights_then[:16], weights_now[:16])
    same_weights = weights_then is not None and weights_then == weights_now
    before, after = _comparable(then), _comparable(now)
    weighted = any('dynamic_batch_loading' in (config.get('callbacks') or {}) for config in (then, now))
    for key in sorted(before.keys() | after.keys()):
        if _may_differ(key) and not (weighted and key in WEIGHS_DOMAINS):
            continue
        if same_data and any(fnmatchcase(key, pattern) for pattern in DATA_PATHS):
            continue
        if same_weights and key == 'model.pretrained':
            continue
        values = before.get(key), after.get(key)
        if not equal(key, *values):
            changes[key] = values
    return changes


def equal(key: str, before: Any, after: Any) -> bool:
    """Whether two values of a dotted key train the same."""
    return same_name(before, after) if key == 'optimizer.name' else before == after


def data_sha256(config: Mapping[str, Any]) -> str | None:
    """Fingerprint of the training data: of the manifest that came with them, or else of the shards' indices."""
    if found := _manifest_sha256(config):
        return found
    if is_finetuning(config):
        file = examples_file(config['train_loader']['dataset'])
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    streams = config['train_loader']['dataset'].get('streams') or {}
    indices = {name: Path(str(stream.get('local'))) / 'index.json' for name, stream in streams.items()}
    if not indices or not all(index.is_file() for index in indices.values()):
        return None
    digest = hashlib.sha256()
    for name, index in sorted(indices.items()):
        digest.update(f'{name}\0'.encode() + index.read_bytes())
    return digest.hexdigest()


def _manifest_sha256(config: Mapping[str, Any]) -> str | None:
    return ((config.get('variables') or {}).get('data_manifest') or {}).get('content_sha256')


def _may_differ(key: str) -> bool:
    if fnmatchcase(key, 'fsdp_config*'):
        return not fnmatchcase(key, PRECISION)
    return any(fnmatchcase(key, pattern) for pattern in MAY_DIFFER)


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys to values, without those that say nothing: model options at their default, and null."""
    variables = config.get('variables') or {}
    data = str(variables.get('data'))
    flat = {}
    defaults = {f'model.{field.name}': field.default for field in fields(ModelOptions)}
    defaults['model.autocast_residual'] = False
    for key, value in _flatten({**config, 'model': current_names(config.get('model') or {})}):
        if isinstance(value, str) and value.startswith(f'{data}/') and key == 'tokenizer.name':
            value = value.replace(data, '<data>', 1)
        if key == 'tokenizer.name' and value == (config.get('model') or {}).get('pretrained'):
            value = '<pretrained>'
        if value is not None and not (key in defaults and defaults[key] == value):
            flat[key] = value
    # A checkpoint of this very run says nothing about how it was trained.
    if 'load_path' in flat and is_below(str(flat['load_path']), str(config.get('save_folder'))):
        flat = {key: value for key, value in flat.items() if not key.startswith('load_')}
    return flat


def is_below(path: str, folder: str) -> bool:
    """Whether a file or folder on this machine lies in ``folder``."""
    return '://' not in path + folder and Path(path).resolve().is_relative_to(Path(folder).resolve())


def _flatten(value: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f'{key}.{name}' if key else str(name))
    else:
        yield key, value
