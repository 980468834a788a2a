"""The tidy table of a study from known event files, and stored results; nothing is trained here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from common.shards import write_data
from conftest import REPO
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from itt_composer.config.run_file import resolve
from itt_composer.flops import Decoder, exact_flops, paper_flops
from research.study.results import COLUMNS, collect, final, read_table, write_table
from research.study.stored import StoredResults, data_of
from research.study.study_file import load_study

STUDIES = REPO / 'yamls' / 'studies'
SMALL = ['max_duration=4ba', 'eval_interval=2ba', 'global_train_batch_size=8', 'max_seq_len=32']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'), {'cc': 64, 'wiki': 32}, {'cc': 30, 'wiki': 10})


@pytest.fixture(scope='module')
def collected(data, tmp_path_factory):
    """A run's event files with known content, with a warm-up whose third line is lost, and its rows."""
    folder = tmp_path_factory.mktemp('study')
    study = load_study(STUDIES / 'headline.yaml', ['seeds=[17]', 'set.eval_subset_num_batches=3'])
    run = next(run for run in study.main_runs(folder, {}) if run.variant == 'itt_x4')
    config = resolve(run.run_file, [*run.overrides, *SMALL, f'variables.data={data}'])
    with SummaryWriter(str(folder / 'tensorboard' / run.name)) as writer:
        for batch in range(4):
            writer.add_scalar('loss/train/total', 6.0 - batch, batch)
            writer.add_scalar('time/train', (batch + 1) / 3600, batch + 1)
            for t in (1, 2, 3):
                if batch != 2:
                    writer.add_scalar(f'capacity/step{t}', [0.25, 0.5, 0, 0.5][batch], batch)
        for domain, losses in {'cc': (5, 4), 'wiki': (4, 2)}.items():
            for batch, loss in zip((2, 4), losses, strict=True):
                writer.add_scalar(f'metrics/eval/{domain}/LanguageCrossEntropy', loss, batch)
                writer.add_scalar(f'causal_gap/eval/{domain}/cross_entropy_top_k', loss - 0.5, batch)
    return config, run, collect('headline_cpu', run, config)


def test_the_tidy_table_of_a_run(collected):
    config, run, table = collected
    whole = table[table.domain == 'all'].set_index('batch')
    assert list(whole.index) == [2, 4] and list(whole.tokens) == [2 * 8 * 32, 4 * 8 * 32]
    # Three batches of eight rows of cc (24 of its 30) and all ten of wiki are evaluated.
    assert list(whole.loss_threshold) == pytest.approx([(24 * 5 + 10 * 4) / 34, (24 * 4 + 10 * 2) / 34])
    assert list(whole.loss_top_k) == pytest.approx(list(whole.loss_threshold - 0.5))
    assert list(whole.loss_train) == [5.5, 3.5] and list(whole.seconds) == pytest.approx([2, 4], rel=1e-3)
    decoder = Decoder.from_model_config(OmegaConf.to_container(config.model))
    # Capacity 0.25, 0.5, then 0.5 twice: the line that is lost counts as the one before.
    spent = [[3 * 8 * count(decoder, 32, [c] * 3) for c in (0.25, 0.5, 0.5, 0.5)] for count in (
        paper_flops, lambda *a: exact_flops(*a).total)]  # fmt: skip
    for column, each in zip(('paper_flops', 'exact_flops'), spent, strict=True):
        assert list(whole[column]) == pytest.approx([sum(each[:2]), sum(each)])
    domains = table[table.domain != 'all'].set_index('domain')
    assert dict(domains.loss_threshold) == {'cc': 4, 'wiki': 2} and set(domains.batch) == {4}
    assert set(table.variant) == {'itt_x4'} and set(table.seed) == {17} and set(table.run) == {run.name}


def test_a_run_that_has_not_ended_has_no_rows(collected, data):
    config, run, _ = collected
    longer = OmegaConf.merge(config, {'max_duration': '6ba'})
    assert collect('headline_cpu', run, longer) is None
    with pytest.raises(ValueError, match='max_duration: 1ep'):
        collect('headline_cpu', run, OmegaConf.merge(config, {'max_duration': '1ep'}))


def test_the_table_is_stored_and_read(collected, tmp_path):
    table = collected[2]
    write_table(table, tmp_path / 'results.csv')
    again = read_table(tmp_path / 'results.csv')
    assert list(again) == list(COLUMNS)
    assert list(final(again).loss_threshold) == pytest.approx(list(final(table).loss_threshold), rel=1e-6)
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    for path, words in ((tmp_path / 'other.csv', 'no column study'), (tmp_path / 'none.csv', 'no results')):
        with pytest.raises(ValueError, match=words):
            read_table(path)


def test_stored_results_are_of_the_same_run_file_config_and_data(collected, data, tmp_path):
    _, run, table = collected

    def on(name, run):
        """The run, on data of another content for each name, and its config."""
        if not (folder := tmp_path / name).is_dir():
            shutil.copytree(data, folder)
            manifest = {'settings': {}, 'versions': {}, 'domains': {}, 'bad_lines': [], 'files': {name: 'sha'}}
            manifest |= {'tokenizer': {'sha256': 'b', 'vocab_size': 8}, 'source': {'folder': 'in', 'files': {}}}
            (folder / 'manifest.json').write_text(json.dumps(manifest))
        run = replace(run, overrides=(*run.overrides, *SMALL, f'variables.data={folder}'))
        return run, resolve(run.run_file, run.overrides)

    trained, config = on('a', run)
    known = {'run_file': run.run_file.name, 'overrides': [*trained.overrides, 'variables.runs=elsewhere']}
    manifest = {'study': 'x', 'runs': {run.name: known}, 'environments': [], 'data': data_of(config)}
    assert manifest['data'].keys() == {'content_sha256', 'settings', 'tokenizer', 'rows'}
    write_table(table, tmp_path / 'results.csv')
    with pytest.raises(ValueError, match=r'manifest\.json: missing'):
        StoredResults.read(tmp_path)
    (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
    stored = StoredResults.read(tmp_path)
    assert stored.name_of(trained, config) == run.name and len(stored.rows(run.name)) == len(table)
    stored.check_name('x', trained, config)

    # What was trained counts, and not what the run is called there.
    renamed = replace(run, name='other', overrides=(*run.overrides, 'run_name=other'))
    assert stored.name_of(*on('a', renamed)) == run.name
    slower = replace(renamed, overrides=(*renamed.overrides, 'optimizer.lr=1e-5'))
    assert stored.name_of(*on('a', slower)) is None
    stored.check_name('x', *on('a', slower))
    there, elsewhere = (data_of(on(name, run)[1])['content_sha256'] for name in ('a', 'c'))
    for here, words in (
        (on('a', replace(slower, name=run.name)), r'another config: optimizer\.lr was .* and is now 1e-05'),
        (on('c', run), f'other data: {there} there, {elsewhere} here'),
        (
            on('a', replace(run, run_file=run.run_file.with_name('llama_tiny.yaml'))),
            'another training config: itt_x4_tiny.yaml there, llama_tiny.yaml here',
        ),
    ):
        assert stored.name_of(*here) is None
        with pytest.raises(ValueError, match=words):
            stored.check_name('x', *here)
        stored.check_name('another study', *here)
    (tmp_path / 'manifest.json').write_text('{"study": "x", "data": null, "runs": {}}')
    with pytest.raises(ValueError, match=r'manifest\.json: no environments; this is not the manifest of a study'):
        StoredResults.read(tmp_path)
    (tmp_path / 'manifest.json').write_text('{')
    with pytest.raises(ValueError, match=r'manifest\.json: not a JSON file'):
        StoredResults.read(tmp_path)
