"""Training configs: a few lines of YAML that name config groups, resolved into the strict config of foundry.

    parts: {recipe: sheared_llama, size: 162m, family: [itt, itt_x4], machine: gpus}

names ``parts/<kind>/<name>.yaml`` for each kind. The groups are merged in the order listed (a kind may list several,
``recipe: [sheared_llama, tiny]``), then the config's own keys, then the command line's ``key=value`` overrides,
which may also replace a group (``parts.machine=cpu``).

OmegaConf only: neither torch nor composer is imported, so a mistake is reported immediately.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from itt_composer.checks import check_file_name, check_keys, check_mapping, did_you_mean
from itt_composer.config.check import check_config, check_together
from itt_composer.config.data import fill_in_data, fill_in_vocabulary
from itt_composer.config.files import find_file, rank_0_file, yamls_folder
from itt_composer.config.finetuning import fill_in_finetuning, is_finetuning
from itt_composer.config.pretrained import fill_in_pretrained
from itt_composer.config.tasks import fill_in_tasks
from itt_composer.deprecated import current_groups, current_names

# Sections whose entries name things to build. Foundry builds `name: null` with its defaults; here null takes the
# entry out, so that an override can switch off what a config group switched on.
NAMED_ENTRIES = ('algorithms', 'callbacks', 'loggers')

# Sections whose keys belong to the thing they name: another name (`optimizer.name=decoupled_lionw`) starts afresh.
NAMED_SECTIONS = ('optimizer', 'scheduler')

SECTIONS = (
    *('variables', 'variables.proportions', 'model', 'tokenizer', 'train_loader', 'train_loader.dataset'),
    *('fsdp_config', *NAMED_ENTRIES, *NAMED_SECTIONS),
)
ENVIRONMENT_VARIABLE = re.compile(r'\$\{\s*oc\.env\s*:\s*(\w+)')
NEEDED = (
    *('model', 'train_loader', 'train_loader.dataset', 'tokenizer', 'max_seq_len', 'global_train_batch_size'),
    'variables.data',
)


def resolve(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The config that foundry takes: groups merged, keys checked, streams and tokenizer of the data filled in.

    Args:
        path: the training config, or the name of one that comes with the package.
        overrides: ``key=value`` in OmegaConf's dotlist syntax.

    Raises:
        ValueError: one line that names the key, the config group or the file, and what to do.
    """
    path = find_file(path)
    config = _compose(path, overrides)
    check_together(to_container(config), path.name)
    if load_path := config.get('load_path'):
        config.load_path = rank_0_file(load_path, config.run_name)
    if is_finetuning(config):
        fill_in_finetuning(config, path.name)
    else:
        fill_in_vocabulary(config)
        fill_in_data(config)
    fill_in_tasks(config)
    return config


def resolve_model(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], int]:
    """The ``model`` section alone and the sequence length; looks at the data only for a vocabulary left to it."""
    config = _compose(find_file(path), overrides)
    fill_in_vocabulary(config)
    return to_container(config.model), config.max_seq_len


def resolve_without_data(path: str | Path, layer: DictConfig) -> DictConfig:
    """The config without streams, for evaluation: the training config, overridden by ``layer``, and the tasks."""
    config = _compose(find_file(path), layer)
    fill_in_vocabulary(config)
    fill_in_tasks(config)
    return config


def _compose(path: Path, overrides: Sequence[str] | DictConfig) -> DictConfig:
    own = load_run_file(path)
    command_line = overrides if isinstance(overrides, DictConfig) else parse_overrides(overrides)
    for given in (own, command_line):
        check_mapping(f'{path.name}: parts', given.get('parts'))
    parts = OmegaConf.merge({'parts': own.pop('parts', {})}, {'parts': command_line.pop('parts', {})}).parts
    if isinstance(parts, DictConfig):
        parts = OmegaConf.create(current_groups(to_container(parts)))
    folder = path.parent / 'parts' if (path.parent / 'parts').is_dir() else yamls_folder() / 'parts'
    layers = [load_run_file(file) for file in part_files(parts or DictConfig({}), folder, path)]
    try:
        config = OmegaConf.create({'variables': {}, 'run_name': path.stem})
        for layer in (*layers, own, command_line):
            if isinstance(model := layer.get('model'), DictConfig):
                layer.model = current_names(to_container(model))
            check_kinds(OmegaConf.to_container(config), OmegaConf.to_container(layer), path.name)
            _check_not_missing(OmegaConf.to_container(layer), path.name)
            config = _merge(config, layer)
        for key in SECTIONS:
            check_mapping(f'{path.name}: {key}', OmegaConf.select(config, key))
        _check_keys(config, path.name)
        environment = sorted(set(ENVIRONMENT_VARIABLE.findall(str(to_container(config)))))
        config = OmegaConf.create(_with_home(to_container(config)))
        OmegaConf.resolve(config)
        if '${' in str(to_container(config)):  # It would be read once more.
            names = ', '.join(environment) or 'an escape'
            raise ValueError(f'{path.name}: ${{ in a value from {names}; set one without')
    except OmegaConfBaseException as error:
        raise ValueError(f'{path.name}: {_one_line(error)}') from None
    fill_in_pretrained(config, path.name)
    check_config(to_container(config), path.name)
    for section in NAMED_ENTRIES:
        entries = config.get(section) or {}
        config[section] = {name: entry for name, entry in entries.items() if entry is not None}
    if config.model.get('thinking') == 'itt' and config.model.get('token_routing', True):
        # Part of the model, not a choice: its thresholds move once per batch.
        first = {'first_thresholds': True} if config.model.get('pretrained') else {}
        config.callbacks = {**config.get('callbacks', {}), 'threshold_commit': first}
    # Stored with the run: which config groups it was made of.
    config.variables.parts = parts
    if environment:
        config.variables.environment = environment  # The manifest leaves their values out.
    _check_silent_failures(config, path.name)
    return config


def to_container(config: DictConfig) -> dict[str, Any]:
    """A config as plain dictionaries and lists."""
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check_kinds(config: Any, layer: Any, where: str, key: str = '') -> None:
    """Raise a ValueError where ``layer`` has a list for a mapping of ``config`` or the other way round.

    OmegaConf refuses that too, without naming the key.
    """
    if isinstance(config, Mapping) and isinstance(layer, Mapping):
        for name, value in layer.items():
            check_kinds(config.get(name), value, where, f'{key}.{name}' if key else str(name))
    elif (isinstance(config, Mapping) and isinstance(layer, list)) or (
        isinstance(config, list) and isinstance(layer, Mapping)
    ):
        raise ValueError(f'{where}: {key}: {layer} cannot stand for {config}')


def _with_home(value: Any) -> Any:
    """The value with ``~/`` at the start of a text, which no shell has expanded in a file, as the home folder."""
    if isinstance(value, dict):
        return {key: _with_home(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_with_home(member) for member in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith('~/') else value


def _check_not_missing(value: Any, key: str) -> None:
    """Raise a ValueError for ``???``, which OmegaConf takes for a value to come and leaves out of a merge."""
    if value == '???':
        raise ValueError(f'{key}: ??? is no value; set one')
    if isinstance(value, (Mapping, list)):
        for name, member in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_not_missing(member, f'{key}: {name}' if ':' not in key else f'{key}.{name}')


def _merge(config: DictConfig, layer: DictConfig) -> DictConfig:
    for section in NAMED_SECTIONS:
        before, after = OmegaConf.select(config, f'{section}.name'), OmegaConf.select(layer, f'{section}.name')
        if after is not None and not same_name(before, after):
            config.pop(section, None)
    merged = OmegaConf.unsafe_merge(config, layer)
    assert isinstance(merged, DictConfig)
    return merged


def same_name(before: Any, after: Any) -> bool:
    """Whether two names of an optimizer or scheduler are of the same one.

    The two of AdamW take the same keys, read each other's state, and differ by rounding.
    """
    adamw = ('decoupled_adamw', 'fused_decoupled_adamw')
    return before == after or (before in adamw and after in adamw)


def load_run_file(path: Path) -> DictConfig:
    """The YAML as it is written; a ValueError where it is not a mapping."""
    try:
        state = path.stat()
        config = deepcopy(_loaded(path.absolute(), state.st_mtime_ns, state.st_size))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f'{path}: not valid YAML: {_one_line(error)}') from None
    except OSError as error:  # Also OmegaConf's for a single value.
        raise ValueError(f'{path}: not a training config: {error}') from None
    if not isinstance(config, DictConfig):
        raise ValueError(f'{path}: a training config is a mapping of keys to values')
    return config


@cache
def _loaded(path: Path, mtime_ns: int, size: int) -> DictConfig | ListConfig:
    """The YAML of a file in this state; a study resolves hundreds of configs of the same few config groups."""
    return OmegaConf.load(path)


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """``key=value`` in OmegaConf's dotlist syntax as a config; a ValueError for anything else."""
    for override in overrides:
        key = override.lstrip('+~-')
        if key != override:
            spelling = f'{key}=null to leave it out' if override.startswith('~') else key
            raise ValueError(f'{override!r} is not an override; write {spelling}')
        if '=' not in override:
            raise ValueError(f'{override!r} is not an override; write key=value, for example max_duration=100ba')
        if override.encode(errors='ignore').decode() != override:
            raise ValueError(f'{override!r} is not an override: not a text in UTF-8')
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f'overrides {" ".join(overrides)}: {_one_line(error)}') from None


def part_files(parts: DictConfig, folder: Path, run_file: Path) -> list[Path]:
    """The files that ``parts`` of ``run_file`` names, in its order; a ValueError for a missing one."""
    kinds = sorted(kind.name for kind in folder.iterdir() if kind.is_dir())
    check_keys((str(kind) for kind in parts), kinds, f'{run_file.name}: parts')
    files = []
    for kind, names in ((str(kind), names) for kind, names in parts.items()):
        for name in names if isinstance(names, ListConfig) else [names]:
            file = folder / kind / f'{name}.yaml'
            if not file.is_file():
                known = sorted(part.stem for part in file.parent.glob('*.yaml'))
                nearest = did_you_mean(name, known)
                among = f'among {", ".join(known)}{nearest}'
                raise ValueError(f'{run_file.name}: parts.{kind}: no config group {name!r} {among}')
            files.append(file)
    return files


def _check_keys(config: DictConfig, name: str) -> None:
    pretrained = OmegaConf.select(config, 'model.pretrained') is not None
    for key in (*NEEDED, *(() if pretrained else ('model.num_hidden_layers',))):
        if OmegaConf.select(config, key) is None:
            raise ValueError(f'{name}: no {key}; name a recipe, a size, a family and a machine under parts')
    for key in ('run_name', 'variables.data'):
        if not isinstance(value := OmegaConf.select(config, key), str):
            raise ValueError(f'{name}: {key}: YAML reads it as {value!r}, which is no name; put it in quotes')
    check_file_name(f'{name}: run_name', config.run_name)


def _check_silent_failures(config: DictConfig, name: str) -> None:
    """Raise a ValueError for what Composer, foundry and PyTorch accept silently, and do wrong or not at all."""
    positions = config.model.get('max_position_embeddings')
    if positions is not None and positions < config.max_seq_len:
        raise ValueError(
            f'{name}: model.max_position_embeddings: expected at least max_seq_len ({config.max_seq_len}), got '
            f'{positions}'
        )
    multiple = config.model.get('token_multiple', 1)
    if multiple > config.max_seq_len:
        raise ValueError(
            f'{name}: model.token_multiple: expected at most max_seq_len ({config.max_seq_len}), got {multiple}'
        )
    for key in ('eos_token_id', 'bos_token_id'):
        if config.train_loader.dataset.get(key) is not None:
            raise ValueError(
                f'{name}: train_loader.dataset.{key}: has no effect, because this model does not mask attention '
                'between the documents of a sequence; leave it out'
            )
    if config.model.get('compile_blocks') and config.get('device_train_microbatch_size') == 'auto':
        raise ValueError(
            f'{name}: device_train_microbatch_size: auto does not work with model.compile_blocks, because '
            'Composer then hooks every module; set a number of sequences, or model.compile_blocks=false'
        )
    fsdp = config.get('fsdp_config') or {}
    if config.model.get('thinking') != 'itt' or not fsdp.get('activation_checkpointing'):
        return
    if fsdp.get('activation_checkpointing_reentrant', True):  # Composer's default
        raise ValueError(
            f'{name}: fsdp_config.activation_checkpointing_reentrant: true loses the gradients of the keys and values '
            'that later steps see, without an error; set it to false'
        )


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())
