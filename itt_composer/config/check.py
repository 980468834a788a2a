"""Every key of a training config, at every depth, against what it will build, before anything heavy is imported.

Names come from foundry's registries, keys and types from the signatures of what is built (:mod:`.signatures`), and what
neither of them says from tables (:mod:`.limits`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from itt_composer.checks import check_choice, check_keys, check_time, check_value, did_you_mean
from itt_composer.config import limits
from itt_composer.config.arguments import Settings, check_arguments, with_where
from itt_composer.config.finetuning import LOADER, check_finetuning_dataset
from itt_composer.config.settings import check_needs, check_own_settings
from itt_composer.config.signatures import Parameter, Signature, registered, signature
from itt_composer.options import ModelOptions

TRAIN_CONFIG = 'llmfoundry.utils.config_utils:TrainConfig'
TEXT_DATASET = 'llmfoundry.data.text_data:StreamingTextDataset'
STREAM = 'streaming:Stream'
GAUNTLET = 'llmfoundry.callbacks:EvalGauntlet'
FSDP = ('composer.utils.parallelism:FSDPConfig', 'composer.utils.parallelism:FSDP2Config')
FSDP_2 = {
    'sharding_strategy': ('FULL_SHARD', 'SHARD_GRAD_OP'),
    'activation_checkpointing_reentrant': ('false',),
    'limit_all_gathers': ('true',),
}
"""Options of FSDP 1 to those of their values that FSDP 2 has too, as YAML has them."""
MODEL = 'itt_causal_lm'
VARIABLES = {
    'data': 'str',
    'remote': 'str | None',
    'proportions': 'dict | None',
    'merged_validation': 'bool',
    'runs': 'str | None',
    'eval_data': 'str | None',
}


def check_config(config: Settings, where: str) -> None:
    """Check all sections of a training config by themselves, before the streams are filled in.

    Raises:
        ValueError: one line that starts with ``where`` and names the key.
    """
    _check_top(config, where)
    check_arguments(config['variables'], Signature.of(VARIABLES), f'{where}: variables')
    check_model(config['model'], f'{where}: model')
    _check_tokenizer(config['tokenizer'], f'{where}: tokenizer')
    _check_named(config.get('optimizer'), 'optimizers', f'{where}: optimizer', ('params',), _OPTIMIZER_GROUPS)
    _check_named(config.get('scheduler'), 'schedulers', f'{where}: scheduler')
    for section, registries in (
        ('algorithms', ('algorithms',)),
        ('callbacks', ('callbacks', 'callbacks_with_config')),
        ('loggers', ('loggers',)),
    ):
        for name, settings in (config.get(section) or {}).items():
            _check_entry(name, settings, registries, f'{where}: {section}')
    _check_loader(config['train_loader'], f'{where}: train_loader', config['max_seq_len'])
    loaders = config.get('eval_loader')
    for loader in loaders if isinstance(loaders, list) else [loaders] if loaders else []:
        _check_loader(loader, f'{where}: eval_loader', config['max_seq_len'], more=('label',))
    _check_fsdp(config.get('fsdp_config') or {}, f'{where}: fsdp_config')
    if config.get('compile_config'):
        check_arguments(
            config['compile_config'], signature('torch:compile'), f'{where}: compile_config', given=('model',)
        )
    _check_tasks(config, where)


def check_together(config: Settings, where: str) -> None:
    """Refuse algorithms and callbacks that have nothing to work on in the model.

    Raises:
        ValueError: one line that names the entry and what it needs.
    """
    model = config['model']
    options = ModelOptions(**{key: model[key] for key in ModelOptions.keys() if model.get(key) is not None})
    for section in ('algorithms', 'callbacks'):
        for name, settings in (config.get(section) or {}).items():
            with_where(f'{where}: {section}.', check_needs, name, settings, options)


def foundry_keys() -> list[str]:
    """The top-level keys of a training config: the fields of the installed foundry's ``TrainConfig``."""
    parameters = signature(TRAIN_CONFIG).parameters
    if not parameters:
        raise ValueError('llm-foundry is not installed; in a clone of itt_composer, run: pip install .')
    return [key for key in parameters if key not in limits.OF_FOUNDRY]


def check_model(model: Settings, where: str) -> None:
    """Check the ``model`` section: our options, and the arguments of the class that foundry builds.

    Raises:
        ValueError: one line that names the key.
    """
    if (name := model.get('name', MODEL)) != MODEL:
        raise ValueError(
            f"{where}.name: expected {MODEL}, got {name!r}; train other models with foundry's own `llmfoundry train`"
        )
    ours = ModelOptions.keys()
    known, more = signature(registered('models')[MODEL]), ('name', 'master_weights_dtype', *ours)
    others = {key: value for key, value in model.items() if key not in more}
    # The keys that our class takes beside its arguments are `ours`.
    check_arguments(others, replace(known, open=False), where, ('tokenizer',), more)
    if isinstance(backend := model.get('compile_blocks'), str):
        check_choice(f'{where}.compile_blocks', backend, limits.BACKENDS)
    # A vocabulary that is left open is the tokenizer's.
    values = {key: model[key] for key in ours if key in model and not (key == 'vocab_size' and model[key] is None)}
    with_where(f'{where}.', ModelOptions, **values)


_OPTIMIZER_GROUPS = ('disable_grad', 'param_groups')


def _check_top(config: Settings, where: str) -> None:
    keys = [*foundry_keys(), *limits.OF_TRAIN_SCRIPT]
    for key in map(str, config):
        if key not in keys:
            raise ValueError(f'{where}: unknown key {key!r}{_where_it_is(key, config) or did_you_mean(key, keys)}')
    ours = {key: Parameter(kind, required=True) for key, kind in limits.OF_TRAIN_SCRIPT.items()}
    parameters = signature(TRAIN_CONFIG).parameters | ours
    for key, value in config.items():
        name = f'{where}: {key}'
        if value is None and parameters[key].none_by_default:
            continue
        if key in limits.TIMES:
            if not (type(value) is int and value > 0):
                check_time(name, value, limits.TRAINER_UNITS)
        elif key in limits.COUNT_OR_ALL:
            if not (type(value) is int and (value == -1 or value > 0)):
                raise ValueError(f'{name}: expected a whole number of at least 1, or -1 for all, got {value!r}')
        elif key == 'device_train_microbatch_size' and isinstance(value, str):
            check_choice(name, value, ('auto',))
        elif key in ('device_eval_batch_size', 'device_train_microbatch_size'):
            # Composer's split of a batch takes whole numbers, whatever the annotation says.
            check_value(name, value, 'int', **limits.LIMITS[key])
        elif not (key in ('eval_loader', 'icl_tasks') and isinstance(value, list)):
            check_value(name, value, parameters[key].annotation, **limits.LIMITS.get(key, {}))


def _where_it_is(key: str, config: Settings) -> str:
    """``'; did you mean optimizer.lr?'`` for a key that some section has."""
    places = [f'{section}.{key}' for section, value in config.items() if isinstance(value, Mapping) and key in value]
    if key in ModelOptions.keys():
        places.append(f'model.{key}')
    return f'; did you mean {places[0]!r}?' if places else ''


def _check_tokenizer(tokenizer: Settings, where: str) -> None:
    check_arguments(tokenizer, Signature.of({'name': 'str', 'kwargs': 'dict | None'}), where)
    if 'name' not in tokenizer:
        raise ValueError(f'{where}: no name; set a folder or a hub id')
    own = registered('tokenizers').get(tokenizer['name'])
    kwargs = signature(own) if own else Signature.of(limits.TOKENIZER_KWARGS)
    check_arguments(tokenizer.get('kwargs') or {}, kwargs, f'{where}.kwargs')


def _check_named(
    section: Settings | None, registry: str, where: str, given: Iterable[str] = (), more: Iterable[str] = ()
) -> None:
    """A section whose ``name`` says what is built of its other keys."""
    if section is None:
        raise ValueError(f'{where}: missing; set its name')
    names = registered(registry)
    check_choice(f'{where}.name', section.get('name'), sorted(names))
    known = signature(names[section['name']])
    check_arguments({k: v for k, v in section.items() if k != 'name'}, known, where, given, (*more, 'name'))
    _check_complete({*section, *given}, known, where, section['name'])


def _check_complete(keys: Iterable[str], known: Signature, where: str, what: str) -> None:
    for name, parameter in known.parameters.items():
        if parameter.required and name not in keys:
            raise ValueError(f'{where}: no {name}; {what} needs one')


def _check_entry(name: str, settings: Any, registries: Iterable[str], where: str) -> None:
    """An entry of a section whose keys are names of what is built."""
    names = {known: target for registry in registries for known, target in registered(registry).items()}
    if name not in names:
        raise ValueError(f'{where}: unknown name {name!r}{did_you_mean(name, sorted(names))}')
    if settings is None:
        return  # Left out.
    check_value(f'{where}.{name}', settings, 'dict')
    known = signature(names[name])
    check_arguments(settings, known, f'{where}.{name}', given=('train_config',))
    _check_complete({*settings, 'train_config'}, known, f'{where}.{name}', 'it')
    with_where(f'{where}.', check_own_settings, name, settings)


def _check_loader(loader: Any, where: str, max_seq_len: int, more: Iterable[str] = ()) -> None:
    check_value(where, loader, 'dict')
    _check_named(loader, 'dataloaders', where, ('tokenizer', 'device_batch_size'), more)
    if loader.get('num_workers') == 0:
        for key, off, default, words in (
            ('prefetch_factor', None, 2, 'null'),
            ('persistent_workers', False, True, 'false'),
        ):
            if loader.get(key, default) != off:
                raise ValueError(f'{where}.{key}: expected {words} with num_workers: 0')
    dataset = loader.get('dataset')
    check_value(f'{where}.dataset', dataset, 'dict')
    if loader['name'] == LOADER:
        check_finetuning_dataset(dataset, f'{where}.dataset')
    if loader['name'] != 'text':
        return  # Foundry checks the keys of the others itself.
    if dataset.get('max_seq_len', max_seq_len) != max_seq_len:
        raise ValueError(
            f'{where}.dataset.max_seq_len: expected max_seq_len, {max_seq_len}, got {dataset["max_seq_len"]!r}; '
            'set max_seq_len for all of them'
        )
    text, streams = signature(TEXT_DATASET), dataset.get('streams')
    others = {key: value for key, value in dataset.items() if key != 'streams'}
    special = ('streams', 'eos_token_id', 'bos_token_id', 'seq_parallel_replication')
    check_arguments(others, text, f'{where}.dataset', ('tokenizer', 'batch_size'), special)
    if text.open:  # Foundry drops what the dataset does not know.
        check_keys(others, [*text.parameters, *special], f'{where}.dataset')
    check_value(f'{where}.dataset.streams', streams, 'dict | None')
    for name, stream in (streams or {}).items():
        check_value(f'{where}.dataset.streams.{name}', stream, 'dict')
        check_arguments(stream, signature(STREAM), f'{where}.dataset.streams.{name}')


def _check_fsdp(fsdp: Settings, where: str) -> None:
    both = {name: parameter for target in FSDP for name, parameter in signature(target).parameters.items()}
    known = {name: parameter for name, parameter in both.items() if not name.endswith('device_mesh')}
    precision = "Literal['FULL', 'DEFAULT', 'PURE'] | dict"
    ours = Signature.of({'version': 'Literal[1, 2]', 'mixed_precision': precision})
    check_arguments(fsdp, Signature(known | ours.parameters, open=False), where)
    if fsdp.get('version', 2) == 2:
        _check_fsdp_2(fsdp, where)
    if isinstance(settings := fsdp.get('mixed_precision'), Mapping):
        check_keys(
            settings,
            ('param_dtype', 'reduce_dtype', 'buffer_dtype', 'keep_low_precision_grads'),
            f'{where}.mixed_precision',
        )
        for key, value in settings.items():
            if key.endswith('dtype') and value is not None:
                check_choice(f'{where}.mixed_precision.{key}', value, ('fp32', 'fp16', 'bf16'))


def _check_fsdp_2(fsdp: Settings, where: str) -> None:
    for key, allowed in FSDP_2.items():
        value = fsdp.get(key, allowed[0])
        text = str(value).lower() if isinstance(value, bool) else value
        if text not in allowed:
            raise ValueError(
                f'{where}.{key}: expected {" or ".join(allowed)} with FSDP 2, got {text}; set it to {allowed[0]}, or '
                'fsdp_config.version=1'
            )


def _check_tasks(config: Settings, where: str) -> None:
    tasks = config.get('icl_tasks')
    kinds = registered('icl_datasets')
    for i, task in enumerate(tasks if isinstance(tasks, list) else []):
        name = f'{where}: icl_tasks[{i}]'
        check_value(name, task, 'dict')
        own = ('label', 'icl_task_type', 'metric_names', 'batch_size', 'has_categories', 'question_prelimiter')
        for key in ('label', 'dataset_uri', 'icl_task_type', 'num_fewshot'):
            if task.get(key) is None:
                raise ValueError(f'{name}: no {key}; every task needs one')
        check_choice(f'{name}.icl_task_type', task['icl_task_type'], sorted(kinds))
        check_value(f'{name}.num_fewshot', task['num_fewshot'], 'list[int]', minimum=0)
        others = {key: value for key, value in task.items() if key not in ('num_fewshot', *own)}
        given = ('tokenizer', 'pad_tok_id', 'destination_path')
        check_arguments(others, signature(kinds[task['icl_task_type']]), name, given, (*own, 'num_fewshot'))
    gauntlet = config.get('eval_gauntlet')
    if not isinstance(gauntlet, Mapping):
        return
    known = signature(GAUNTLET)
    # A list, whatever its annotation says.
    known = replace(known, parameters={**known.parameters, 'categories': Parameter('list', required=True)})
    check_arguments(gauntlet, known, f'{where}: eval_gauntlet', ('logger_keys', 'benchmark_sizes'))
    for category in gauntlet.get('categories') or []:
        check_keys(category, ('name', 'benchmarks'), f'{where}: eval_gauntlet.categories')
        for benchmark in category.get('benchmarks') or []:
            keys = ('name', 'num_fewshot', 'random_baseline')
            check_keys(benchmark, keys, f'{where}: eval_gauntlet.categories.benchmarks')
