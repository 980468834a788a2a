"""``make figures``: what is given is measured, what is not is drawn from stored tables or named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from common import shards, small_models
from common.pictures import save_coarsely
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from itt_composer.evaluation import tokens
from itt_composer.export.folder import servable
from research.figures import command, studies
from research.figures.pictures import PICTURES
from research.study import report

REPO = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Data of two domains, one of them without held-out rows, and exported models."""
    folder = tmp_path_factory.mktemp('figures')
    data = shards.write_data(folder / 'data', {'a': 2, 'b': 2}, {'a': 4}, row_length=32)
    for name, options in (('itt', dict(thinking='itt', token_ratios=[0.7, 0.7, 0.7])), ('dense', {})):
        servable(small_models.build(**options)).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(data / 'tokenizer').save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    save_coarsely(monkeypatch)


def run(**arguments):
    """The command's options, in the form in which Python takes them."""
    given = dict(sequences=4, samples=9, selection='threshold', results=Path('nowhere'))
    command.main(**{**dict.fromkeys(('model', 'dense', 'data', 'aqua', 'tensorboard', 'scores')), **given, **arguments})


def test_everything_that_the_inputs_allow(folders, tmp_path, capsys):
    out = tmp_path / 'out'
    run(model=folders / 'itt', dense=folders / 'dense', data=folders / 'data', out=out)
    made = {file.stem for file in (out / 'tables').glob('*.csv')}
    assert made == {
        'step_encodings', 'router_weights', 'token_pages', 'logit_lens', 'depth_and_loss', 'depth_and_loss_by_step',
        'elastic', 'accuracy',
    }  # fmt: skip
    about = json.loads((out / 'tables/about.json').read_text())
    assert set(about) == made
    assert all('0.7/0.7/0.7' in text for table, text in about.items() if table != 'accuracy')
    for picture in PICTURES:
        assert (out / f'{picture.name}.png').exists() == (picture.table in made)
        assert (out / f'{picture.name}.pdf').exists() == (picture.table in made)
    printed = capsys.readouterr().out
    assert 'not measured: easy_and_hard (set --aqua ' in printed
    assert 'not measured: router_weights_over_training (set --tensorboard ' in printed

    index = (out / 'index.html').read_text()
    assert index.count('data:image/png;base64,') == 8
    assert '10.21' in index, "the paper's perplexity stands beside ours"
    assert (out / 'tokens_a.html').exists() and 'b (training text)' in (out / 'tokens_b.html').read_text()
    table = pd.read_csv(out / 'tables/elastic.csv', dtype={'ratios': str})
    assert len(table) == 17 and set(table['trained']) == {'0.7/0.7/0.7'}


def test_pictures_from_stored_tables_alone(folders, tmp_path, capsys):
    run(model=folders / 'itt', data=None, out=tmp_path / 'first')
    (tmp_path / 'results').mkdir()
    stored = shutil.move(tmp_path / 'first/tables', tmp_path / 'results/figures')
    run(results=tmp_path / 'results', out=tmp_path / 'second')
    assert 'not measured: step_encodings' in (printed := capsys.readouterr().out)
    assert f'drawn from {stored}/step_encodings.csv' in printed.replace('\n', '')
    index = (tmp_path / 'second/index.html').read_text()
    assert 'mean of the step encodings (stored result of another model)' in index
    assert 'stored result' not in (tmp_path / 'first/index.html').read_text()
    first, second = ((tmp_path / name / 'figure6_middle.png').read_bytes() for name in ('first', 'second'))
    assert first == second


def test_stored_studies_are_reported_too(tmp_path, monkeypatch):
    (tmp_path / 'results/headline_cpu').mkdir(parents=True)
    (tmp_path / 'results/headline_cpu/results.csv').touch()
    reported = []

    def write_report(study, results, out):
        reported.append((study.name, results))
        out.mkdir(parents=True)
        (out / 'curves.png').write_bytes(b'a picture')
        return out / 'report.md'

    monkeypatch.setattr(studies, 'write_report', write_report)
    run(results=tmp_path / 'results', out=tmp_path / 'out')
    assert reported == [('headline_cpu', tmp_path / 'results/headline_cpu')]
    index = (tmp_path / 'out/index.html').read_text()
    assert 'href="headline_cpu/report.md"' in index and 'Figure 4' in index and 'Loss against steps' not in index


def test_the_tables_in_the_repository_can_be_drawn(tmp_path, monkeypatch):
    """And the studies there reported. Writing some fifty figures takes long and is tested above."""
    for name in ('loss_curves', 'difference_curves'):  # of test_study_report.py
        monkeypatch.setattr(report, name, lambda *_: Figure())
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **_: Path(path).touch())
    run(results=command.RESULTS, out=tmp_path)
    drawn = {picture.name for picture in PICTURES if (tmp_path / f'{picture.name}.png').exists()}
    assert drawn == {picture.name for picture in PICTURES}
    assert len(list(tmp_path.glob('tokens_*.html'))) == 7


def test_what_cannot_be_measured_is_named_and_the_rest_is_made(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(model=folders / 'dense', tensorboard=folders, out=tmp_path)
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert 'step_encodings (failed:' in printed and 'expected a model that routes tokens, got thinking: none' in printed
    assert 'step_encodings_over_training (failed:' in printed and 'no TensorBoard files' in printed
    assert (tmp_path / 'index.html').exists()


def test_inputs_that_are_not_there(tmp_path):
    with pytest.raises(SystemExit, match='figures: model: nowhere is missing; set --model '):
        run(model=Path('nowhere'), out=tmp_path)
    with pytest.raises(SystemExit, match='sequences: expected 2 or more, got 1'):
        run(sequences=1, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_see_writes_a_page(folders, tmp_path):
    arguments = dict(ratios=None, limit=50, out=tmp_path / 'sub/see.html')
    tokens.main(folders / 'itt', text='a b', selection='top_k', **arguments)
    page = (tmp_path / 'sub/see.html').read_text()
    assert 'Top-k routing' in page and 'ITT x4' in page
    for model, text, selection, message in (
        ('itt', 'x', 'topk', "selection: 'topk'"),
        ('dense', 'x', 'threshold', 'expected a model that routes tokens, got thinking: none'),
        ('nothing', 'x', 'threshold', 'no such checkpoint'),
        ('itt', '/no/such.txt', 'threshold', 'no such file'),
    ):
        with pytest.raises(SystemExit, match=message):
            tokens.main(folders / model, text=text, selection=selection, **arguments)
    arguments['ratios'] = '0/0/0'
    with pytest.raises(SystemExit, match='every step is removed'):
        tokens.main(folders / 'itt', text='x', selection='threshold', **arguments)
