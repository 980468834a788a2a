"""Every training config resolves for foundry, to a model of the paper's size and the paper's recipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from common.run_files import YAMLS, two_domains
from omegaconf import OmegaConf

from itt_composer.config.check import foundry_keys
from itt_composer.config.limits import OF_FOUNDRY
from itt_composer.config.run_file import resolve, resolve_model
from itt_composer.flops import Decoder, parameters
from itt_composer.options import ModelOptions
from itt_composer.paper.tables import paper_tables
from itt_composer.training.fsdp import choose_fsdp

pytestmark = pytest.mark.usefixtures('elsewhere')

RUN_FILES = sorted(path.stem for path in YAMLS.glob('*.yaml'))

FAMILIES = ['llama', 'loop_x3', 'loop_x4', 'itt_x2', 'itt_x3', 'itt_x4']


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return two_domains(tmp_path_factory.mktemp('data'))


def test_all_rows_of_tables_1_and_7_are_there():
    wanted = {f'{family}_{size}' for family in FAMILIES for size in ('162m', '230m', '466m', 'tiny')}
    wanted |= {f'{family}_{size}' for family in ('llama', 'itt_x3') for size in ('1.9b', '2.7b', '3.5b')}
    assert set(RUN_FILES) == wanted


def test_a_run_file_is_made_of_the_parts_in_its_name():
    for name in RUN_FILES:
        family, _, size = name.rpartition('_')
        parts = OmegaConf.load(YAMLS / f'{name}.yaml').parts
        assert parts.size == size and parts.family == (['itt', family] if family.startswith('itt') else family), name


@pytest.mark.parametrize('name', [name for name in RUN_FILES if name.startswith('itt_x3_') or name.endswith('_162m')])
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
    fused = {'name': f'fused_{recipe["optimizer"]["name"]}', 'lr': training['learning_rate']}
    assert config.optimizer == {**recipe['optimizer'], **fused}
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


def test_blocks_are_compiled_on_gpus_alone(data):
    """On a CPU it takes minutes. A tiny config lists its machine before its recipe, the others after it."""

    def compiles(name, *overrides):
        small = [f'variables.data={data}', 'max_seq_len=32'] if name.endswith('tiny') else []
        config = resolve(YAMLS / f'{name}.yaml', [*small, *overrides])
        return bool(config.model.get('compile_blocks'))

    assert compiles('itt_x4_162m') and not compiles('itt_x4_162m', 'parts.machine=cpu')
    assert compiles('itt_x4_tiny', 'parts.machine=gpus') and not compiles('itt_x4_tiny')


def test_foundry_takes_every_run_file_and_knows_every_name_in_it(data, tmp_path):
    from llmfoundry import registry
    from llmfoundry.utils.builders import build_algorithm, build_callback, build_logger, build_optimizer
    from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig, make_dataclass_and_log_config
    from torch import nn

    assert set(foundry_keys()) == TRAIN_CONFIG_KEYS - set(OF_FOUNDRY)
    # Each family and each size: a file is made of a part for each of them.
    for name in (name for name in RUN_FILES if name.endswith('tiny') or name.startswith('itt_x3')):
        small = [f'variables.data={data}', 'max_seq_len=32'] if name.endswith('tiny') else []
        for machine in ('gpus', 'cpu') if name.startswith('itt_x3') else ('gpus',):
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
    for size in ('162m', '230m', '466m', '1.9b', '2.7b', '3.5b'):
        for version in (1, 2):
            config = resolve(YAMLS / f'itt_x3_{size}.yaml', [f'fsdp_config.version={version}'])
            choose_fsdp(config)
            settings = OmegaConf.to_container(config.fsdp_config)
            assert os.environ['FSDP_VERSION'] == str(version) and set(settings) <= known[version]
            assert settings['state_dict_type'] in ('full', 'sharded')
            _, _, reduce_dtype, buffer_dtype = get_mixed_precision('amp_bf16', settings['mixed_precision'])
            assert str(reduce_dtype) == str(buffer_dtype) == 'torch.float32'
