"""Study files, their runs and settings; nothing is trained here."""

from __future__ import annotations

import pytest
from common.shards import write_data
from conftest import REPO
from omegaconf import OmegaConf

from itt_composer import ITTConfig
from itt_composer.config.run_file import parse_overrides, resolve
from itt_composer.flops import Decoder, exact_flops
from itt_composer.training.manifest import manifest_path, write_manifest
from research.study.folder import StudyFolder
from research.study.settings import compare_configs, dotlist, grid_settings, merge
from research.study.study_file import load_study

STUDIES = REPO / 'yamls' / 'studies'
FILES = sorted(path.stem for path in STUDIES.glob('*.yaml'))
SMALL = ['max_duration=4ba', 'eval_interval=2ba', 'global_train_batch_size=8', 'max_seq_len=32']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'), {'cc': 64, 'wiki': 32}, {'cc': 30, 'wiki': 10})


@pytest.mark.parametrize('name', FILES)
def test_the_seeds_of_a_sweep_are_not_those_that_are_compared(name):
    study = load_study(STUDIES / f'{name}.yaml')
    assert study.tuning is None or not set(study.tuning.seeds) & set(study.seeds)


@pytest.mark.parametrize('study', ['headline', 'interpretations', 'ablations', 'elastic', 'capacity'])
def test_runs_resolve(study, data):
    """What differs between the scales is the scale alone, so one of them stands for the variants."""
    loaded, configs = load_study(STUDIES / f'{study}.yaml', ['seeds=[18]']), {}
    for run in loaded.main_runs('runs', dict.fromkeys(loaded.variants, 'lr 6e-3')):
        config = resolve(run.run_file, [*run.overrides, f'variables.data={data}', 'max_seq_len=32'])
        configs[run.variant] = config
        assert (config.model.num_hidden_layers, config.run_name) == (14 if run.variant == 'deep' else 8, run.name)
        assert config.seed == config.train_loader.dataset.shuffle_seed == 18
    for scale in ('gpu', 'paper'):
        scaled = load_study(STUDIES / f'{study}.yaml', [f'parts.scale={scale}', 'seeds=[18]'])
        last = scaled.main_runs('runs', dict.fromkeys(scaled.variants, 'lr 6e-3'))[-1]
        overrides = [*last.overrides, f'variables.data={data}', 'variables.proportions=null', 'max_seq_len=32']
        assert resolve(last.run_file, overrides).model.hidden_size == 1024
    if study == 'interpretations':
        check_interpretations(configs)


def check_interpretations(configs):
    """`deep` spends the FLOPs of ITT x4, `residual_scale` those of the dense baseline; neither runs a layer twice."""
    assert all(config.optimizer.lr == 6e-3 for config in configs.values())
    models = {variant: OmegaConf.to_container(config.model) for variant, config in configs.items()}
    flops = {variant: exact_flops(Decoder.from_model_config(model), 32).total for variant, model in models.items()}
    assert flops['deep'] == pytest.approx(flops['weighted'], rel=0.01)
    assert flops['residual_scale'] == flops['llama']
    assert models['residual_scale']['thinking'] == 'residual_scale'
    assert ITTConfig(thinking='residual_scale').first_encoding_init == 2
    assert models['deep']['thinking'] == 'none'


def test_the_text_study_compares_at_equal_flops(data):
    small, study = (load_study(STUDIES / 'text.yaml', [f'parts.scale={n}', 'seeds=[17]']) for n in ('1m', '20m'))
    best = dict.fromkeys(study.variants, 'lr=0.003,embedding_initializer_range=0.5')
    overrides = [f'variables.data={data}', 'max_seq_len=32', 'train_loader.dataset.epoch_size=64']
    overrides += ['train_loader.dataset.sampling_method=fixed']
    last = small.main_runs('runs', best)[-1]
    assert resolve(last.run_file, [*last.overrides, *overrides]).model.hidden_size == 96
    flops, models = {}, {}
    for run in study.main_runs('runs', best):
        config = resolve(run.run_file, [*run.overrides, *overrides])
        models[run.variant] = Decoder.from_model_config(OmegaConf.to_container(config.model))
        flops[run.variant] = exact_flops(models[run.variant], 32).total
    for variant in study.variants:
        if variant.startswith('itt_x4'):
            assert flops[variant] == pytest.approx(flops['deep'], rel=0.01)
            assert models[variant].selection == ('top_k' if variant.endswith('top_k') else 'threshold')
            start = 2.0 if models[variant].combine == 'delta' else 0.1
            assert models[variant].step_encoding_init == start
    assert models['itt_x4_delta_blocks'].thinking_blocks == [[0, 1], [4, 5]]
    assert flops['residual_scale'] == flops['llama'] < flops['itt_x2'] < flops['loop_x2'] < flops['deep']


def test_dotlist_is_read_back_to_the_same_values():
    texts = ['17', 'true', '1e-3', '[1]', 'null', '', '"a"', 'a: b', 'a #b', '@', '1:30', '😀']
    settings = {
        'a': {'b': 1.5e-3, 'c': None, 'd': {}, 'e': [0.5, 0.7], 'f': True, 'g': 'lr 3e-3, x', 'h': '900ba'},
        'parts': {'family': ['itt', 'itt_x4']},
        'texts': {f't{n}': text for n, text in enumerate(texts)},
    }
    assert merge(parse_overrides(dotlist(settings))) == settings


def test_grids():
    settings = grid_settings({'optimizer.lr': [1e-3, 2e-3], 'model.combine': ['delta', 'weighted']}, 'x')
    assert list(settings) == ['lr=0.001,delta', 'lr=0.001,weighted', 'lr=0.002,delta', 'lr=0.002,weighted']
    assert settings['lr=0.002,delta'] == {'optimizer': {'lr': 2e-3}, 'model': {'combine': 'delta'}}
    study = load_study(STUDIES / 'headline.yaml', ['variants.itt_x4.grid={model.thinking_kv: [shared, routed_only]}'])
    assert study.variants[-2:] == ['itt_x4,shared', 'itt_x4,routed_only']
    tuned = load_study(STUDIES / 'headline.yaml', ['parts.tuning=cpu'])
    assert len(tuned.tuning_runs('runs')) == 6 * 3 and tuned.variants == load_study(STUDIES / 'headline.yaml').variants


@pytest.mark.parametrize(
    ('overrides', 'words'),
    [
        (['variant.x={}'], ["'variant'", "did you mean 'variants'"]),
        (['variants.itt_x5={}'], ['itt_x5_tiny.yaml', "did you mean 'itt_x"]),
        (['variants.llama.sets={}'], ['variants.llama', "did you mean 'set'"]),
        (['seeds=[]'], ['no seeds']),
        (['seeds=[1,1]'], ['repeats a seed']),
        (['seeds=3'], ['expected a list']),
        (['where.place=tpu'], ['where.place', 'cpu, gpu, commands']),
        (['where.concurrent=0'], ['where.concurrent', 'got 0']),
        (['report.baselines=[lama]'], ["'lama'", "did you mean 'llama'"]),
        (['report.data_efficiency.baseline=null'], ['report.data_efficiency', 'baseline']),
        (['tuning=3'], ['tuning: 3', 'not a mapping']),
        (['tuning.seeds=[1]'], ['tuning: no settings']),
        (['tuning.seeds=[1]', 'tuning.grid={optimizer.lr: 3}'], ['optimizer.lr', 'list of values']),
        (['tuning.seeds=[1]', 'tuning.settings={a b: {}, a_b: {}}'], ["'llama a b'", "'llama a_b'", 'rename one']),
        (['variants.plain=null'], ['variants.plain is empty', 'write plain: {}']),
        (['variants={4: {run: llama}}'], ['variants', '4', 'quotes']),
        (['variants.plain=llama'], ["variants.plain: 'llama'", 'not a mapping']),
        (['variants.llama.grid=[1]'], ['variants.llama.grid', 'not a mapping']),
        (['parts=cpu'], ["parts: 'cpu'", 'not a mapping']),
        (['report.data_efficiency=[llama]'], ['report.data_efficiency', 'cannot stand for']),
        (['report.steps={ITT: {1: lama}}'], ['report.steps.ITT', "'lama'", "did you mean 'llama'"]),
        (['report.comparisons=[[llama]]'], ['report.comparisons', 'pairs']),
        (['report.comparisons=[[llama, lama]]'], ["'lama'", "did you mean 'llama'"]),
        (['report.paper=headlin'], ['report.paper', "did you mean 'headline'"]),
        (['elastic={itt_x4: lots}'], ['elastic.itt_x4: expected a number of sequences', "got 'lots'"]),
    ],
)
def test_mistakes_are_one_line_that_names_them(overrides, words):
    with pytest.raises(ValueError) as error:
        load_study(STUDIES / 'headline.yaml', overrides)
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value), error.value


def test_a_study_without_any_arm_is_refused():
    variants = load_study(STUDIES / 'headline.yaml').variants
    with pytest.raises(ValueError, match='every variant is removed'):
        load_study(STUDIES / 'headline.yaml', [f'variants.{variant}=null' for variant in variants])


def test_a_single_baseline_needs_no_list():
    study = load_study(STUDIES / 'headline.yaml', ['report.baselines=loop_x4'])
    assert study.report['baselines'] == ['loop_x4']


def test_another_config_is_told_from_the_same():
    before = OmegaConf.create({'a': {'b': [1, 2]}, 'c': 1.0})
    assert compare_configs(before, OmegaConf.create({'c': 1.0, 'a': {'b': [1, 2]}})) is None
    assert (
        compare_configs(before, OmegaConf.create({'a': {'b': [1, 3]}, 'c': 1.0})) == 'a.b was [1, 2] and is now [1, 3]'
    )


def test_a_run_with_an_environment_variable_is_the_same_run_again(data, tmp_path, monkeypatch):
    monkeypatch.setenv('ITT_PROJECT', 'first')
    settings = ['seeds=[17]', f'set.variables.data={data}', 'set.max_seq_len=32']
    project = 'set.loggers.wandb.project=${oc.env:ITT_PROJECT}'
    study = load_study(STUDIES / 'headline.yaml', [*settings, project])
    folder = StudyFolder(study, tmp_path)
    run = study.main_runs(folder.runs, {})[0]
    assert folder.add([run]) == [run]
    config = folder.configs[run.name]
    write_manifest(config, manifest_path(config), 0, None)
    assert folder.add([run]) == [run]
    monkeypatch.setenv('ITT_PROJECT', 'other')
    with pytest.raises(ValueError, match=r'config: loggers\.wandb\.project was \$\{oc\.env:ITT_PROJECT\}#\w+ and'):
        folder.add([run])
