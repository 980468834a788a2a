"""Evaluation files: which run's model, which checkpoint, how much thinking, on which tasks.

    run: itt_x4_162m
    load_path: null
    thinking: {token_ratios: [0.5, 0.5, 0], selection: threshold}
    parts: {evaluation: gauntlet}

All keys but the first three override the training config, so that the tasks are those of training. The checkpoint says
what the model is. It replaces the training config's ``model``, but not this file's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from itt_composer.checks import check_keys
from itt_composer.config.files import find_file
from itt_composer.config.run_file import load_run_file, parse_overrides, resolve_without_data
from itt_composer.deprecated import current_names
from itt_composer.options import ModelOptions

OWN_KEYS = ('run', 'load_path', 'thinking')
THINKING_KEYS = ('token_ratios', 'selection')


def resolve_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> tuple[DictConfig, DictConfig]:
    """The run's config with the evaluation's tasks, and the config that foundry's ``evaluate`` takes.

    Args:
        path: the evaluation file, or the name of one that comes with the package.
        overrides: ``key=value`` in OmegaConf's dotlist syntax.

    Raises:
        ValueError: one line that names the key or the file, and what to do.
    """
    path = find_file(path, 'eval')
    own = OmegaConf.merge(load_run_file(path), parse_overrides(overrides))
    assert isinstance(own, DictConfig)
    run, load_path, thinking = (own.pop(key, None) for key in OWN_KEYS)
    if run is None:
        raise ValueError(f'{path}: no run; name the training config of the model: run=itt_x4_162m')
    config = resolve_without_data(run, own)
    config.pop('global_train_batch_size', None)  # Any number of processes may evaluate.
    if config.get('fsdp_config'):
        config.fsdp_config.activation_checkpointing = False  # Nothing is cached for a backward pass.
    checkpoint = _checkpoint(load_path, config)
    config.model.pop('pretrained', None)  # The weights are the checkpoint's.
    config.model = OmegaConf.merge(config.model, _trained(checkpoint), own.get('model', {}))
    if not config.get('icl_tasks'):
        raise ValueError(f'{path}: no icl_tasks; name a config group that has them: parts.evaluation=gauntlet')
    return config, _for_foundry(config, checkpoint, _thinking(thinking, path, config))


def _checkpoint(load_path: str | None, config: DictConfig) -> str:
    from itt_composer.export.checkpoint import find_checkpoint

    try:
        return str(find_checkpoint(Path(load_path or config.save_folder)))
    except ValueError as error:
        raise ValueError(f'load_path: {error}') from None


def _trained(checkpoint: str) -> dict[str, Any]:
    """Settings the model was trained with. Most fit other weights too, so the training config is not asked."""
    from itt_composer.export.checkpoint import read_checkpoint
    from itt_composer.export.unpickle import check_names

    config = read_checkpoint(checkpoint, with_weights=False).config
    check_names(Path(checkpoint))  # Composer is about to read all of it.
    return _of_the_model(config)


def _of_the_model(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Those that are :class:`ModelOptions`, of all that a checkpoint's config or a training config's ``model`` says."""
    keys, current = ModelOptions.keys(), current_names(values)
    return {key: value for key, value in current.items() if key in keys}


def _thinking(thinking: DictConfig | None, path: Path, config: DictConfig) -> dict[str, Any] | None:
    if not thinking:
        return None
    from itt_composer.model import ITTConfig, thinking_setting

    check_keys((str(key) for key in thinking), THINKING_KEYS, f'{path.name}: thinking')
    given = {str(key): value for key, value in OmegaConf.to_container(thinking).items()}  # type: ignore[union-attr]
    try:
        thinking_setting(ITTConfig(**_of_the_model(config.model)), **given)
    except ValueError as error:
        raise ValueError(f'{path.name}: thinking: {error}') from None
    return given


def _for_foundry(config: DictConfig, checkpoint: str, thinking: dict[str, Any] | None) -> DictConfig:
    model = {
        'model_name': config.run_name,
        'model': config.model,
        'tokenizer': config.tokenizer,
        'load_path': checkpoint,
    }
    passed_on = ('icl_tasks', 'eval_gauntlet', 'icl_subset_num_batches', 'precision', 'seed',
                 'run_name', 'python_log_level', 'fsdp_config', 'dist_timeout')  # fmt: skip
    evaluation = {key: config[key] for key in passed_on if config.get(key) is not None}
    evaluation['models'] = [model]
    evaluation['device_eval_batch_size'] = config.get('device_eval_batch_size', 8)
    evaluation['max_seq_len'] = config.get('icl_seq_len') or config.max_seq_len
    if thinking:
        evaluation['callbacks'] = {'set_thinking': thinking}
    return OmegaConf.create(evaluation)
