"""Config groups, the config's own keys and overrides, in that order; a mistake in one of them is one line."""

from __future__ import annotations

import pytest
from common.run_files import YAMLS, resolve_error, tiny_overrides, two_domains
from omegaconf import OmegaConf

from itt_composer.config.run_file import resolve

pytestmark = pytest.mark.usefixtures('elsewhere')


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
    fused = resolve(YAMLS / 'llama_162m.yaml').optimizer
    unfused = resolve(YAMLS / 'llama_162m.yaml', ['optimizer.name=decoupled_adamw']).optimizer
    assert unfused == {**fused, 'name': 'decoupled_adamw'} != fused
    with pytest.raises(ValueError, match=r"optimizer.name: \['a'\] is not one of"):
        resolve(YAMLS / 'llama_162m.yaml', ['optimizer.name=[a]'])


def test_the_tiny_recipe_stands_above_the_trial_of_the_cpu(tmp_path):
    config = resolve(YAMLS / 'llama_tiny.yaml', tiny_overrides(two_domains(tmp_path / 'data'), tmp_path))
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
        (['variables.proportion={}'], ['variables', "did you mean 'proportions'"]),
        (['max_duration'], ["'max_duration'", 'key=value']),
        (['run_name=off'], ['run_name', 'False', 'quotes']),
        (['max_seq_len=${sequence}'], ['sequence']),
        (['variables.proportions=null'], ['no shards at', 'itt data --source <text> --out ']),
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
        (['model=[1]'], ['itt_x4_162m.yaml: model: [1]', 'cannot stand for']),
        (['global_train_batch_size=0'], ['global_train_batch_size: expected a whole number', 'got 0']),
        (['model.max_position_embeddings=16'], ['expected at least max_seq_len (4096), got 16']),
        (['train_loader.dataset.eos_token_id=2'], ['train_loader.dataset.eos_token_id', 'has no effect']),
        (['global_train_batch_size=null'], ['no global_train_batch_size']),
        (['train_loader.dataset=null'], ['no train_loader.dataset']),
        (['tokenizer=null'], ['no tokenizer']),
        *(([f'run_name="{name}"'], ['run_name: expected a name']) for name in ('a/b', 'a\\nb')),
        (['variables.data=5'], ['variables.data', '5', 'quotes']),
    ],
)
def test_mistakes_are_one_line_that_names_them(overrides, words):
    message = resolve_error('itt_x4_162m', *overrides)
    assert all(word in message for word in words), message


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
