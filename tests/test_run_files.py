"""Every training config resolves for foundry, to a model of the paper's size; mistakes are one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from common.shards import TOKENS, write_data
from omegaconf import OmegaConf

from itt_composer.config.check import foundry_keys
from itt_composer.config.limits import OF_FOUNDRY
from itt_composer.config.run_file import resolve, resolve_model
from itt_composer.flops import Decoder, parameters
from itt_composer.options import ModelOptions
from itt_composer.paper.tables import paper_tables
from itt_composer.training.fsdp import choose_fsdp

pytestmark = pytest.mark.usefixtures('elsewhere')
YAMLS = Path(__file__).resolve().parents[1] / 'yamls'
RUN_FILES = sorted(path.stem for path in YAMLS.glob('*.yaml'))
FAMILIES = ['llama', 'loop_x3', 'loop_x4', 'itt_x2', 'itt_x3', 'itt_x4']


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Two domains, of which one has no validation rows."""
    return write_data(tmp_path_factory.mktemp('data'), {'arxiv': 96, 'wiki': 32}, {'arxiv': 5})


@pytest.fixture
def tiny(data, tmp_path) -> list[str]:
    """Overrides that fit a tiny training config to the small data."""
    return [f'variables.data={data}', f'variables.runs={tmp_path}', 'max_seq_len=32']


def resolve_error(name: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        resolve(YAMLS / f'{name}.yaml', overrides)
    message = str(error.value)
    assert '\n' not in message
    return message


def test_all_rows_of_tables_1_and_7_are_there():
    wanted = {f'{family}_{size}' for family in FAMILIES for size in ('162m', '230m', '466m', 'tiny')}
    wanted |= {f'{family}_{size}' for family in ('llama', 'itt_x3') for size in ('1.9b', '2.7b', '3.5b')}
    assert set(RUN_FILES) == wanted


@pytest.mark.parametrize('name', RUN_FILES)
def test_run_file_builds_the_model_that_its_name_says(name, data):
    import torch

    from itt_composer.model import ITTConfig, ITTForCausalLM

    options, _ = resolve_model(YAMLS / f'{name}.yaml', [f'variables.data={data}'])
    config = ITTConfig.from_options('model', **{key: options[key] for key in ModelOptions.keys() if key in options})
    with torch.device('meta'):
        model = ITTForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters(Decoder.from_model_config(options)).total
    family = name.rpartition('_')[0]
    thinking, _, passes = family.partition('_x')
    assert config.thinking == {'llama': 'none'}.get(thinking, thinking)
    assert config.thinking_steps == (int(passes) - 1 if passes else 0)
    # Every other layer, from the first (Section 4.1).
    assert config.thinking_layers == ([] if thinking == 'llama' else list(range(0, config.num_hidden_layers, 2)))
    ratio = {'itt_x2': 0.9, 'itt_x3': 0.7, 'itt_x4': 0.5}.get(family, 1.0)
    assert config.token_ratios == [ratio] * config.thinking_steps


def test_the_shapes_and_the_recipe_of_the_paper():
    tables = paper_tables()
    columns = ['hidden_size', 'intermediate_size', 'num_attention_heads', 'num_key_value_heads', 'num_hidden_layers']
    for name, *shape, _ in tables['table5']['rows']:
        model, _ = resolve_model(YAMLS / f'{name}.yaml')
        assert [model[column] for column in columns] == shape
    for size, (_, layers, hidden, intermediate, billions) in zip(
        ('1.9b', '2.7b', '3.5b'), tables['table7']['rows'], strict=True
    ):
        model, _ = resolve_model(YAMLS / f'itt_x3_{size}.yaml')
        assert [model[key] for key in ('num_hidden_layers', 'hidden_size', 'intermediate_size')] == [
            layers,
            hidden,
            intermediate,
        ]
        assert parameters(Decoder.from_model_config(model)).dense / 1e9 == pytest.approx(billions, abs=0.005)
    training = tables['training']
    recipe = training['sheared_llama']
    config = resolve(YAMLS / 'itt_x4_230m.yaml')
    assert config.global_train_batch_size == training['global_batch_size']
    assert config.max_seq_len == config.train_loader.dataset.max_seq_len == training['sequence_length']
    assert config.max_duration == f'{training["steps"]}ba'
    assert config.optimizer == {**recipe['optimizer'], 'lr': training['learning_rate']}
    warmup = recipe['scheduler']['warmup_fraction']
    assert config.scheduler == {
        'name': recipe['scheduler']['name'],
        't_warmup': f'{warmup}dur',
        'alpha_f': recipe['scheduler']['alpha_f'],
    }
    clipping = {'clipping_type': 'norm', 'clipping_threshold': recipe['gradient_clip_norm']}
    assert config.algorithms.gradient_clipping == clipping
    assert (config.precision, config.seed) == (recipe['precision'], recipe['seed'])
    streams = config.train_loader.dataset.streams
    assert {domain: stream.proportion for domain, stream in streams.items()} == recipe['domain_proportions']


def test_foundry_takes_every_run_file_and_knows_every_name_in_it(data, tmp_path):
    from llmfoundry import registry
    from llmfoundry.utils.builders import build_algorithm, build_callback, build_logger, build_optimizer
    from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig, make_dataclass_and_log_config
    from torch import nn

    assert set(foundry_keys()) == TRAIN_CONFIG_KEYS - set(OF_FOUNDRY)
    for name in RUN_FILES:
        small = [f'variables.data={data}'] if name.endswith('tiny') else []
        for machine in ('gpus', 'cpu'):
            overrides = [*small, f'parts.machine={machine}', f'variables.runs={tmp_path}']
            overrides += ['max_seq_len=32'] if small else []
            config = resolve(YAMLS / f'{name}.yaml', overrides)
            _, taken = make_dataclass_and_log_config(config, TrainConfig, TRAIN_CONFIG_KEYS, transforms='all')
            assert taken.device_train_batch_size == config.global_train_batch_size
            for section, known in (
                (taken.model, registry.models),
                (taken.optimizer, registry.optimizers),
                (taken.scheduler, registry.schedulers),
                (taken.train_loader, registry.dataloaders),
            ):
                assert section['name'] in known.get_all()
            for algorithm, keys in taken.algorithms.items():
                build_algorithm(algorithm, keys)
            for callback, keys in taken.callbacks.items():
                build_callback(callback, keys, train_config=None)
            for logger, keys in taken.loggers.items():
                build_logger(logger, keys)
            optimizer = dict(taken.optimizer)
            build_optimizer(nn.Linear(2, 2), optimizer.pop('name'), optimizer)


def test_the_fsdp_settings_are_composers(monkeypatch):
    from composer.distributed.mosaic_parallelism import get_mixed_precision
    from composer.utils import FSDPConfig
    from composer.utils.parallelism import FSDP2Config

    monkeypatch.setenv('FSDP_VERSION', '')
    # Composer's classes take any key.
    known = {1: set(FSDPConfig.__dataclass_fields__), 2: FSDP2Config.settable_attrs()}
    for name in RUN_FILES:
        for version in (1, 2) if not name.endswith('tiny') else ():
            config = resolve(YAMLS / f'{name}.yaml', [f'fsdp_config.version={version}'])
            choose_fsdp(config)
            settings = OmegaConf.to_container(config.fsdp_config)
            assert os.environ['FSDP_VERSION'] == str(version) and set(settings) <= known[version]
            assert settings['state_dict_type'] in ('full', 'sharded')
            _, _, reduce_dtype, buffer_dtype = get_mixed_precision('amp_bf16', settings['mixed_precision'])
            assert str(reduce_dtype) == str(buffer_dtype) == 'torch.float32'
    for keys in ({'sharding_strategy': 'HYBRID_SHARD'}, {'limit_all_gathers': False}, {'version': 3}):
        with pytest.raises(ValueError, match=f'fsdp_config.{next(iter(keys))}'):
            choose_fsdp(OmegaConf.create({'fsdp_config': keys}))


def test_streams_follow_the_domains(data, tiny):
    config = resolve(YAMLS / 'itt_x4_tiny.yaml', tiny)
    streams = OmegaConf.to_container(config.train_loader.dataset.streams)
    assert streams == {d: {'local': str(data / 'train' / d)} for d in ('arxiv', 'wiki')}
    assert [(loader.label, loader.dataset.local) for loader in config.eval_loader] == [
        ('arxiv', str(data / 'validation' / 'arxiv'))
    ]
    assert (config.model.vocab_size, config.model.bos_token_id, config.model.eos_token_id) == (len(TOKENS), 1, 2)
    weighted = resolve(YAMLS / 'itt_x4_tiny.yaml', [*tiny, 'variables.proportions={arxiv: 3, wiki: 1}'])
    assert {d: s.proportion for d, s in weighted.train_loader.dataset.streams.items()} == {'arxiv': 3.0, 'wiki': 1.0}
    without = resolve(YAMLS / 'itt_x4_tiny.yaml', [*tiny, 'variables.proportions={arxiv: 1, wiki: 0, cc: 0}'])
    assert list(without.train_loader.dataset.streams) == ['arxiv']


def test_a_remote_is_streamed_through_the_local_cache():
    remote = ['variables.remote=s3://bucket/redpajama/', 'variables.data=./cache']
    # An epoch must be whole batches, and here nothing says how many rows there are.
    assert 'copy it there' in resolve_error('llama_162m', *remote)
    assert 'multiple' in resolve_error('llama_162m', *remote, 'train_loader.dataset.epoch_size=1000')
    config = resolve(YAMLS / 'llama_162m.yaml', [*remote, 'train_loader.dataset.epoch_size=25600'])
    assert config.train_loader.dataset.streams['c4-rp'] == {
        'local': 'cache/train/c4-rp',
        'remote': 's3://bucket/redpajama/train/c4-rp',
        'proportion': 0.15,
    }
    assert config.eval_loader[1].dataset.remote == 's3://bucket/redpajama/validation/c4-rp'


def test_foundrys_loaders_read_the_streams_in_the_mix_asked_for(tiny):
    import numpy as np
    from llmfoundry.data.dataloader import build_dataloader
    from llmfoundry.utils.builders import build_eval_loaders, build_tokenizer

    overrides = [*tiny, 'variables.proportions={arxiv: 1, wiki: 1}']
    config = OmegaConf.to_container(resolve(YAMLS / 'itt_x4_tiny.yaml', overrides))
    tokenizer = build_tokenizer(config['tokenizer']['name'], config['tokenizer']['kwargs'])
    train = build_dataloader(config['train_loader'], tokenizer, 16).dataloader
    evaluators = build_eval_loaders(config['eval_loader'], tokenizer, 4)
    batches = list(train)
    assert all(batch['input_ids'].shape == (16, 32) for batch in batches)
    # 32 rows of wiki must be repeated to make up half of an epoch of 128 rows.
    wiki = {tuple(row) for row in _rows(train.dataset, stream=1)}
    seen = [tuple(row) for batch in batches for row in batch['input_ids'].tolist()]
    assert len(seen) == 128
    assert np.mean([row in wiki for row in seen]) == pytest.approx(0.5, abs=0.02)
    assert [evaluator.label for evaluator in evaluators] == ['eval/arxiv']
    assert sum(len(batch['input_ids']) for batch in evaluators[0].dataloader.dataloader) == 5


def _rows(dataset, stream: int) -> list[list[int]]:
    first = sum(dataset.samples_per_stream[:stream])
    return [dataset[first + i].tolist() for i in range(dataset.samples_per_stream[stream])]


def test_parts_own_keys_and_overrides_in_that_order(tmp_path):
    run_file = tmp_path / 'mine.yaml'
    run_file.write_text(
        'parts: {recipe: sheared_llama, size: 162m, family: [itt, itt_x4], machine: gpus}\n'
        'optimizer: {lr: 1.0e-3}\nmodel: {hidden_size: 512}\n'
    )
    config = resolve(run_file, ['model.hidden_size=256', 'parts.family=loop_x3', 'callbacks.lr_monitor=null'])
    assert config.run_name == 'mine'
    assert config.save_folder == './runs/mine/checkpoints'
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-3, [0.9, 0.95])
    assert (config.model.hidden_size, config.model.thinking) == (256, 'loop')
    assert config.variables.parts.family == 'loop_x3'
    assert 'capacity_warmup' not in config.algorithms
    assert 'lr_monitor' not in config.callbacks and 'speed_monitor' in config.callbacks
    on_cpu = resolve(YAMLS / 'itt_x4_162m.yaml', ['parts.machine=cpu'])
    assert (on_cpu.precision, on_cpu.fsdp_config, on_cpu.max_duration) == ('fp32', None, '10ba')
    assert on_cpu.train_loader.num_workers == on_cpu.eval_loader[0].num_workers == 0


def test_another_optimizer_does_not_inherit_the_settings_of_the_first():
    overrides = ['optimizer.name=decoupled_lionw', 'optimizer.lr=1e-4', 'scheduler.t_warmup=1ba']
    config = resolve(YAMLS / 'llama_162m.yaml', overrides)
    assert config.optimizer == {'name': 'decoupled_lionw', 'lr': 1e-4}
    assert (config.scheduler.name, config.scheduler.alpha_f) == ('cosine_with_warmup', 0.1)


def test_the_tiny_recipe_stands_above_the_trial_of_the_cpu(tiny):
    config = resolve(YAMLS / 'llama_tiny.yaml', tiny)
    recipe = OmegaConf.load(YAMLS / 'parts' / 'recipe' / 'tiny.yaml')
    for key in ('max_duration', 'global_train_batch_size', 'eval_subset_num_batches', 'device_eval_batch_size'):
        assert config[key] == recipe[key]
    assert (config.precision, config.fsdp_config) == ('fp32', None)
    assert config.train_loader.num_workers == config.eval_loader[0].num_workers == 0


@pytest.mark.parametrize(
    ('overrides', 'words'),
    [
        (['parts.size=231m'], ['parts.size', "'231m'", "did you mean '230m'"]),
        (['parts.sise=230m'], ['parts', "'sise'", "did you mean 'size'"]),
        (['max_durations=5ba'], ["'max_durations'", "did you mean 'max_duration'"]),
        (['model.combin=delta'], ['model', "'combin'", "did you mean 'combine'"]),
        (['model.combine=deltas'], ['combine', "did you mean 'delta'"]),
        (['variables.proportion={}'], ['variables', "did you mean 'proportions'"]),
        (['model.token_ratios=[0.5,0.5]'], ['token_ratios', '2 ratios for 3 extra steps']),
        (['model.token_ratios=[0.5,0.5,1.5]'], ['token_ratios', '1.5', '(0, 1]']),
        (['model.thinking_layers=[8]'], ['no layer 8', '0 to 7']),
        (['model.thinking_layers=[[2,4],6]'], ['thinking_layers', 'consecutive', 'got [2, 4]']),
        (['max_duration'], ["'max_duration'", 'key=value']),
        (['run_name=off'], ['run_name', 'False', 'quotes']),
        (['max_seq_len=${sequence}'], ['sequence']),
        (['variables.proportions=null'], ['no shards at', 'make data OUT=']),
        (['variables.proportions=null', 'variables.remote=s3://x'], ['variables.proportions', 'remote']),
        (['variables.proportions.cc=-1'], ['-1', 'cc']),
        (['variables.proportions=arxiv'], ['variables.proportions', "'arxiv'", 'not a mapping']),
        (['callbacks=x'], ['callbacks', "'x'", 'not a mapping']),
        (['parts=null'], ['no model', 'under parts']),
        (
            ['fsdp_config.activation_checkpointing=true', 'fsdp_config.activation_checkpointing_reentrant=true'],
            ['fsdp_config.activation_checkpointing_reentrant', 'set it to false'],
        ),
        (
            ['model.compile_blocks=true', 'device_train_microbatch_size=auto'],
            ['device_train_microbatch_size: auto', 'compile_blocks', 'set a number'],
        ),
        (
            ['model.residual_scale_init=2.0', 'model.step_encoding=false'],
            ['residual_scale_init', 'step_encoding: false', 'no phi'],
        ),
        (['model=[1]'], ['itt_x4_162m.yaml: model: [1]', 'cannot stand for']),
        (['model.token_ratios=0.5'], ['model.token_ratios: expected a list of finite numbers', 'got 0.5']),
        (['model.thinking_steps=two'], ['model.thinking_steps: expected a whole number', "got 'two'"]),
        (['model.num_hidden_layers=abc'], ['model.num_hidden_layers: expected a whole number', "got 'abc'"]),
        (['global_train_batch_size=0'], ['global_train_batch_size: expected a whole number', 'got 0']),
        (['max_seq_len=abc'], ['max_seq_len: expected a whole number', "got 'abc'"]),
        (['model.hidden_size=130'], ['num_attention_heads', 'do not split hidden_size 130']),
        (['model.num_key_value_heads=3'], ['num_key_value_heads: 3', 'does not divide']),
        (['model.router_temperature=0'], ['model.router_temperature', 'at least 0.001', 'got 0']),
        (['model.router_temperature=.nan'], ['model.router_temperature: expected a finite number', 'got nan']),
        (['model.initializer_range=null'], ['model.initializer_range: expected a finite number', 'got null']),
        (['model.loss_chunk_tokens=-1'], ['model.loss_chunk_tokens: expected a whole number (at least 0), got -1']),
        (['model.step_encoding_init=abc'], ['model.step_encoding_init: expected a finite number', "got 'abc'"]),
        (['model.max_position_embeddings=16'], ['max_position_embeddings: 16', 'max_seq_len 4096']),
        (['train_loader.dataset.eos_token_id=2'], ['train_loader.dataset.eos_token_id', 'attends across them']),
        (['global_train_batch_size=null'], ['no global_train_batch_size']),
        (['train_loader.dataset=null'], ['no train_loader.dataset']),
        (['tokenizer=null'], ['no tokenizer']),
        *(([f'run_name="{name}"'], ['run_name: expected a name']) for name in ('../x', 'a/b', '..', 'a\\nb')),
        (['variables.data=5'], ['variables.data', '5', 'quotes']),
        (
            ['train_loader.dataset.num_canonical_nodes=abc'],
            ['num_canonical_nodes: expected a whole number', "got 'abc'"],
        ),
    ],
)
def test_mistakes_are_one_line_that_names_them(overrides, words):
    message = resolve_error('itt_x4_162m', *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ('overrides', 'words'),
    [
        (['variables.proportions={arxiv: 1, wikipedia: 1, wiki: 0}'], ["'wikipedia'", "did you mean 'wiki'"]),
        (['variables.proportions={arxiv: 1}'], ["'wiki'", 'variables.proportions.wiki=0']),
        (['variables.proportions={arxiv: 0, wiki: 0}'], ['no domain has a share']),
        (['max_seq_len=64'], ['max_seq_len: 64', '32 tokens', 'SEQ_LEN=64']),
        (['model.vocab_size=10'], ['model.vocab_size: 10', str(len(TOKENS) - 1)]),
        (['save_interval=1ep'], ['save_interval: 1ep', 'place in the data', '1000ba']),
        (['save_interval=1'], ['save_interval: 1', 'place in the data', '1000ba']),
    ],
)
def test_mistakes_that_the_data_shows(tiny, overrides, words):
    message = resolve_error('itt_x4_tiny', *tiny, *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize('size', ['1000', '1k'])
def test_an_epoch_that_a_resumed_run_would_not_repeat(size, tiny):
    message = resolve_error('itt_x4_tiny', *tiny, f'train_loader.dataset.epoch_size={size}')
    assert all(word in message for word in ('epoch_size: 1', '64 (num_canonical_nodes)', 'multiple of 64')), message


def test_a_domain_without_rows(tmp_path):
    data = write_data(tmp_path, {'arxiv': 4, 'wiki': 0}, {})
    message = resolve_error('llama_tiny', f'variables.data={data}', 'max_seq_len=32')
    assert 'wiki' in message and 'no sequences' in message


def test_no_such_run_file_and_no_yaml(tmp_path):
    assert "did you mean 'itt_x4_162m.yaml'" in resolve_error('itt_x4_162mm')
    broken = tmp_path / 'broken.yaml'
    for content, words in (
        ('parts: {recipe: [', 'not valid YAML'),
        ('null: 3', 'not valid YAML: Incompatible key type'),
        ('3', 'not a training config'),
    ):
        broken.write_text(content)
        with pytest.raises(ValueError, match=rf'broken\.yaml: {words}.*\Z'):
            resolve(broken)


def test_dynamic_batch_loading_is_one_part_and_off_without_it(tiny):
    assert 'dynamic_batch_loading' not in resolve(YAMLS / 'itt_x4_tiny.yaml', tiny).callbacks
    targets = 'callbacks.dynamic_batch_loading.targets={arxiv: 2.0, wiki: 2.0}'
    config = resolve(YAMLS / 'itt_x4_tiny.yaml', [*tiny, 'parts.loading=dynamic', targets])
    assert config.callbacks.dynamic_batch_loading.targets == {'arxiv': 2.0, 'wiki': 2.0}
    # An epoch of the loader ends with each evaluation.
    assert config.eval_interval == '1ep'
    assert resolve(YAMLS / 'itt_x4_tiny.yaml', [*tiny, 'parts.loading=dynamic', targets, 'save_interval=1ep'])
    assert config.train_loader.dataset.epoch_size % 256 == 0
    assert not config.train_loader.persistent_workers
