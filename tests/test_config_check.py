"""What a training config may not say is refused in one line, at every depth, without composer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from common.shards import write_data

from itt_composer.config.run_file import resolve
from itt_composer.config.signatures import registered, signature

pytestmark = pytest.mark.usefixtures('elsewhere')


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> list[str]:
    data = write_data(tmp_path_factory.mktemp('data'), {'arxiv': 64}, {'arxiv': 5})
    return [f'variables.data={data}', 'max_seq_len=32']


FAULTS = [
    # Values of the wrong kind where a section is expected.
    ('fsdp_config=5', 'fsdp_config: 5 is not a mapping'),
    ('train_loader.dataset=0', 'train_loader.dataset: 0 is not a mapping'),
    ('callbacks.causal_gap=abc', "callbacks.causal_gap: expected a mapping, got 'abc'"),
    ('parts=5', 'parts: 5 is not a mapping'),
    ('eval_loader=5', 'eval_loader: expected a mapping or null, got 5'),
    # The model.
    ('model.combine=???', 'model.combine: ??? is no value'),
    ('model.tie_word_embeddings="false"', 'expected true or false'),
    ('model.token_multiple=100000', 'model.token_multiple: expected at most max_position_embeddings (32), got 100000'),
    ('model.compile_blocks=abc', "model.compile_blocks: 'abc' is not one of inductor"),
    ('model.name=mpt_causal_lm', "model.name: expected itt_causal_lm, got 'mpt_causal_lm'; train other models with"),
    ('model.tokenizer=1', "model: unknown key 'tokenizer'"),
    # Names that nothing takes.
    ('optimizer.lrr=3', "optimizer: unknown key 'lrr'; did you mean 'lr'?"),
    ('scheduler.alpha_=1', "scheduler: unknown key 'alpha_'; did you mean 'alpha_f'?"),
    ('algorithms.capacity_warmup.duraton=1', "capacity_warmup: unknown key 'duraton'; did you mean 'duration'?"),
    ('callbacks.router_weigths=null', "callbacks: unknown name 'router_weigths'; did you mean 'router_weights'?"),
    ('callbacks.router_weights={a: 1}', "callbacks.router_weights: unknown key 'a'"),
    ('loggers.tensorboard.logdir=a', "loggers.tensorboard: unknown key 'logdir'; did you mean 'log_dir'?"),
    ('train_loader.dataset.shuffl=1', "train_loader.dataset: unknown key 'shuffl'; did you mean 'shuffle'?"),
    ('train_loader.dataset.streams={a: {locl: x}}', "streams.a: unknown key 'locl'; did you mean 'local'?"),
    ('train_loader.name=txt', "train_loader.name: 'txt' is not one of"),
    ('eval_loader.drop_lst=true', "eval_loader: unknown key 'drop_lst'; did you mean 'drop_last'?"),
    ('tokenizer.kwargs.model_max_len=1', "tokenizer.kwargs: unknown key 'model_max_len'; did you mean"),
    ('fsdp_config={activation_checkpoint: true}', "fsdp_config: unknown key 'activation_checkpoint'; did you mean"),
    ('fsdp_config={mixed_precision: {param_dtyp: bf16}}', "fsdp_config.mixed_precision: unknown key 'param_dtyp'"),
    (
        'fsdp_config={sharding_strategy: HYBRID_SHARD}',
        'fsdp_config.sharding_strategy: expected FULL_SHARD or SHARD_GRAD_OP with FSDP 2, got HYBRID_SHARD; set '
        'it to FULL_SHARD, or fsdp_config.version=1',
    ),
    ('fsdp_config={limit_all_gathers: false}', 'fsdp_config.limit_all_gathers: expected true with FSDP 2, got false'),
    ('fsdp_config={version: 3}', 'fsdp_config.version: expected 1 or 2, got 3'),
    ('icl_tasks=[{label: a}]', 'icl_tasks[0]: no dataset_uri'),
    ('compile_config={mod: 1}', "compile_config: unknown key 'mod'; did you mean 'mode'?"),
    ('n_gpus=2', "unknown key 'n_gpus'"),
    # Values of the right name and the wrong kind or size.
    ('optimizer.lr=-1', 'optimizer.lr: expected a finite number (at least 0 and at most 100), got -1'),
    ('optimizer.lr=', 'optimizer.lr: expected a finite number (at least 0 and at most 100), got null'),
    ('optimizer.betas=[0.9,1.0]', 'optimizer.betas: expected a list of 2 finite numbers (at least 0 and below 1)'),
    ('optimizer.name=adam', "optimizer.name: 'adam' is not one of"),
    ('scheduler.t_warmup=5', 'scheduler.t_warmup: expected a number and a unit, got 5'),
    ('train_loader.dataset.shuffle=abc', "train_loader.dataset.shuffle: expected true or false, got 'abc'"),
    ('train_loader.num_workers=-1', 'train_loader.num_workers: expected a whole number (at least 0), got -1'),
    ('train_loader.prefetch_factor=2', 'train_loader.prefetch_factor: expected null with num_workers: 0'),
    ('algorithms.gradient_clipping.clipping_threshold=-1', 'clipping_threshold: expected a finite number (above 0)'),
    ('model.init_device=moon', "model.init_device: 'moon' is not one of cpu, meta, mixed"),
    ('device_train_microbatch_size=1.5', 'device_train_microbatch_size: expected a whole number (at least 1), got 1.5'),
    ('algorithms.capacity_warmup.initial=1e30', 'algorithms.capacity_warmup.initial: expected'),
    ('algorithms.capacity_warmup.final=0.4', 'algorithms.capacity_warmup.final: 0.4 is below the ratio 0.5 of step 1'),
    ('algorithms.capacity_warmup.duration=-5ba', "duration: expected a positive time, got '-5ba'"),
    ('callbacks.router_weights.picture_interval=abc', "picture_interval: expected a number and a unit, got 'abc'"),
    ('callbacks.step_encodings.picture_interval=-1ba', "picture_interval: expected a positive time, got '-1ba'"),
    ('callbacks.router_weights.interval=10', 'callbacks.router_weights.interval: expected text'),
    ('callbacks.router_weights.interval=10sec', 'callbacks.router_weights.interval: expected one of the units'),
    ('callbacks.hf_checkpointer={}', 'callbacks.hf_checkpointer: no save_folder'),
    ('callbacks.dynamic_batch_loading={}', 'callbacks.dynamic_batch_loading: no targets'),
    ('callbacks.dynamic_batch_loading={targets: null}', 'callbacks.dynamic_batch_loading.targets: expected'),
    ('model.token_routing=false', 'capacity_warmup: needs a model with thinking: itt and token_routing: true'),
    ('save_num_checkpoints_to_keep=0', 'save_num_checkpoints_to_keep: expected a whole number of at least 1, or -1'),
    ('save_interval=0ba', "save_interval: expected a positive time, got '0ba'"),
    ('max_duration=1.5ba', 'max_duration: expected a whole number of ba'),
    ('eval_interval=0', 'eval_interval: expected a number and a unit, got 0'),
    ('precision=bf16', "precision: 'bf16' is not one of fp32, amp_fp16, amp_bf16"),
    (
        'callbacks.hf_checkpointer={save_folder: a, save_interval: 1ba, precision: amp_bf16}',
        "callbacks.hf_checkpointer.precision: 'amp_bf16' is not one of float32, float16, bfloat16",
    ),
    ('seed=-1', 'seed: expected a whole number (at least 0'),
    ('max_duration=1e99tok', 'max_duration: expected at most 1e+15'),
    ('train_loader.dataset.cache_limit=abc', 'or text or null (at least 1, with a unit of b, kb'),
    ('train_loader.dataset.epoch_size=12q', 'with a unit of k, m, b, t), got '),
    ('train_loader.dataset.max_seq_len=16', 'dataset.max_seq_len: expected max_seq_len, 32, got 16; set max_seq_len'),
    ('compile_config={backend: nothing}', "compile_config.backend: 'nothing' is not one of inductor, eager"),
    ('run_name=a\udcff', r"'run_name=a\udcff' is not an override: not a text in UTF-8"),
    (r'run_name=\${seed}', '${ in a value from an escape; set one without'),
    # Habits from other programs.
    ('lr=1e-3', "unknown key 'lr'; did you mean 'optimizer.lr'?"),
    ('hidden_size=64', "unknown key 'hidden_size'; did you mean 'model.hidden_size'?"),
    ('--optimizer.lr=1e-3', 'write optimizer.lr=1e-3'),
    ('~callbacks.lr_monitor', 'write callbacks.lr_monitor=null to leave it out'),
]


@pytest.mark.parametrize(('override', 'words'), FAULTS, ids=[override for override, _ in FAULTS])
def test_a_fault_is_one_line_that_names_it(small, override, words):
    with pytest.raises(ValueError) as refused:
        resolve('itt_x4_tiny', [*small, override])
    assert words in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'overrides',
    [
        [
            'optimizer={name: decoupled_lionw, lr: 1e-4, param_groups: [{param_str_match: norm, weight_decay: 0}]}',
            'scheduler={name: linear_decay_with_warmup, t_warmup: 0ba, alpha_f: 0}',
            *('eval_interval=1', 'max_duration=2ep', 'save_interval=0.1dur', 'save_num_checkpoints_to_keep=-1'),
            *('loggers.wandb={project: a, init_kwargs: {mode: offline}}', 'loggers.tensorboard=null'),
        ],
        [
            'algorithms.alibi={max_sequence_length: 64}',
            'algorithms.capacity_warmup={duration: 5ba, initial: [0.1, 0.2, 0.3], final: 1, shape: cosine}',
            'callbacks.async_eval={interval: 1ep, eval_run_config: {}}',
            'callbacks.hf_checkpointer={save_folder: a, save_interval: 1ba, precision: bfloat16}',
            *('callbacks.nan_monitor={}', 'callbacks.early_stopper={monitor: a, dataloader_label: b}'),
        ],
        ['fsdp_config={version: 1, sharding_strategy: HYBRID_SHARD, limit_all_gathers: false}'],
        [
            *('train_loader.dataset.epoch_size=64', 'train_loader.dataset.shuffle_algo=py1s'),
            'train_loader.timeout=30',
            'fsdp_config={sharding_strategy: SHARD_GRAD_OP, mixed_precision: PURE, reshard_after_forward: true}',
            *('compile_config={mode: default}', 'model.use_train_metrics=true'),
            'model.additional_eval_metrics=[lm_accuracy]',
        ],
        [
            *('algorithms.capacity_warmup=null', 'callbacks.router_weights=null', 'callbacks.causal_gap=null'),
            'model.token_routing=false',
        ],
    ],
)
def test_what_foundry_takes_is_taken(small, overrides):
    assert resolve('itt_x4_tiny', [*small, *overrides])


def test_signatures_are_those_of_the_built_classes():
    """Read from source, they agree with what Python itself says of the imported objects."""
    import inspect

    from composer.algorithms import GradientClipping
    from composer.optim import DecoupledAdamW
    from llmfoundry import registry
    from llmfoundry.data.text_data import StreamingTextDataset

    from itt_composer.training import run

    for target, built in (
        ('llmfoundry.algorithms:GradientClipping', GradientClipping),
        ('llmfoundry.optim:DecoupledAdamW', DecoupledAdamW),
    ):
        read = signature(target)
        assert read is not None and list(read.parameters) == list(inspect.signature(built).parameters)
    text = signature('llmfoundry.data.text_data:StreamingTextDataset')
    assert text is not None
    named = [name for name in inspect.signature(StreamingTextDataset).parameters if name != 'kwargs']
    assert set(named) <= set(text.parameters)
    for name in ('algorithms', 'callbacks', 'callbacks_with_config', 'loggers', 'optimizers', 'schedulers', 'models'):
        # A training in this process registers callbacks of its own.
        theirs = {key for key, cls in getattr(registry, name).get_all().items() if cls.__module__ != run.__name__}
        assert set(registered(name)) == theirs, name


def test_nothing_heavy_is_imported():
    """Also for what is refused; a start that fails should not take half a minute."""
    code = (
        'import sys\n'
        'from itt_composer.config.run_file import resolve\n'
        'import itt_composer.flops\n'
        "for override in ('optimizer.lrr=1', 'model.combin=1', 'callbacks.x={}', 'variables.proportions={cc: 1}'):\n"
        '    try:\n'
        "        resolve('itt_x4_162m', [override])\n"
        '    except ValueError:\n'
        '        pass\n'
        "heavy = ('torch', 'composer', 'transformers', 'streaming', 'llmfoundry', 'numpy')\n"
        'sys.exit(repr([name for name in heavy if name in sys.modules] or 0) if set(heavy) & set(sys.modules) else 0)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('folder', ['with blank', "quote's", 'hash#', 'dollar$HOME', 'ünïcode'])
def test_paths_of_the_data(tmp_path: Path, folder, monkeypatch):
    data = write_data(tmp_path / folder, {'arxiv': 64}, {'arxiv': 5})
    run_file = tmp_path / folder / 'mine.yaml'
    run_file.write_text(
        f'parts: {{recipe: [sheared_llama, tiny], size: tiny, family: [itt, itt_x4], machine: cpu}}\n'
        f'max_seq_len: 32\nvariables: {{data: "~/{folder}", runs: "{tmp_path / folder}"}}\n'
    )
    monkeypatch.setenv('HOME', str(tmp_path))
    config = resolve(run_file)
    assert config == resolve(run_file, [f'variables.data={data}', f'variables.runs={tmp_path / folder}'])
    assert config.train_loader.dataset.streams.arxiv.local == str(data / 'train' / 'arxiv')
    assert config.tokenizer.name == str(data / 'tokenizer')
    assert config.save_folder == f'{tmp_path / folder}/mine/checkpoints'
