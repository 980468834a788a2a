"""``itt eval`` writes a row of Table 1; ``itt-lm-eval`` is lm-eval's command with our model in it."""

import csv
from functools import partial

import pytest
from common.evaluation_models import SHAPE, THINKING
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from itt_composer.cli import app
from itt_composer.evaluation.harness import ITTLM
from itt_composer.flops import Decoder, paper_flops
from itt_composer.model import ITTConfig


def test_the_command_writes_the_row(exported, eval_data, tmp_path, monkeypatch):
    import multiprocessing

    # lm-eval's bootstrap would fork this process with all its threads; a child that waits for ever was seen.
    monkeypatch.delenv('DISABLE_MULTIPROC')
    monkeypatch.setattr(multiprocessing, 'Pool', None)
    arguments = [
        'eval',
        '--model',
        str(exported / 'itt'),
        '--eval-data',
        str(eval_data),
        '--out',
        str(tmp_path),
        '--limit',
        '2',
    ]
    given = {file: file.stat().st_mtime_ns for file in eval_data.rglob('*')}
    done = CliRunner().invoke(app, [*arguments, '--token-ratios', '0.5/0/0', '--selection', 'top_k'])
    assert given == {file: file.stat().st_mtime_ns for file in eval_data.rglob('*')}
    assert done.exit_code == 0, done.output
    assert 'selection: top_k, token ratios 0.5/0/0' in ' '.join(done.output.split())
    rows = {row['row']: row for row in csv.DictReader((tmp_path / 'table1.csv').read_text().splitlines())}
    assert rows.keys() == {'mean', 'standard_error', 'paper_itt_x4_162m'}
    assert 'only 2 documents of each task' in ' '.join(done.output.split())
    described = {'model': str(exported / 'itt'), 'selection': 'top_k', 'token_ratios': '0.5/0/0', 'limit': '2'}
    assert {key: rows['mean'][key] for key in described} == described and rows['mean']['models'] == '1'
    assert rows['mean']['sciq'] == rows['mean']['mmlu'] == 'absent'
    assert float(rows['mean']['piqa']) in (0, 50, 100)
    decoder = Decoder.from_model_config(ITTConfig(**SHAPE, **THINKING).to_dict())
    assert float(rows['mean']['flops']) == pytest.approx(paper_flops(decoder, ratios=[0.5, 0, 0]) / 1e12, rel=1e-3)
    assert rows['paper_itt_x4_162m']['piqa'] == '63.9'
    scores = list(csv.DictReader((tmp_path / 'scores.csv').read_text().splitlines()))
    assert {row['task'] for row in scores if row['metric'] == 'data'} == {'sciq', 'hellaswag', 'mmlu'}
    own = {row['task'] for row in scores if row['metric'] == 'few_shot_examples'}
    assert own == {'arc_challenge', 'boolq'} and 'arc_challenge, boolq are other scored' in ' '.join(
        done.output.split()
    )
    assert CliRunner().invoke(app, [*arguments, '--row', 'itt_x5']).exit_code != 0
    # Several seeds of a model: mean and standard error over them.
    seeds = iter([0.4, 0.5, 0.6])
    monkeypatch.setattr(
        'lm_eval.simple_evaluate',
        lambda *_, **__: {'results': {'piqa': {'acc,none': next(seeds), 'acc_stderr,none': 0.1}}, 'configs': {}},
    )
    done = CliRunner().invoke(app, [*arguments, *['--model', str(exported / 'itt')] * 2])
    assert 'standard error over 3 models' in ' '.join(done.output.split()), done.output
    rows = {row['row']: row for row in csv.DictReader((tmp_path / 'table1.csv').read_text().splitlines())}
    assert (rows['mean']['models'], float(rows['mean']['average'])) == ('3', pytest.approx(50))
    assert float(rows['standard_error']['average']) == pytest.approx(10 / 3**0.5, abs=1e-3)
    # What cannot be run is said before the first model is scored.
    monkeypatch.setattr('lm_eval.simple_evaluate', None)
    done = CliRunner().invoke(app, [*arguments, '--token-ratios', '0.7/0.7/0.7'])
    assert 'no thresholds for 0.7/0.7/0.7' in str(done.exception or done.output)
    unlike = CliRunner().invoke(app, [*arguments, '--model', str(exported / 'llama')])
    assert unlike.exit_code != 0 and 'pass seeds of one model' in str(unlike.exception or unlike.output)


def test_lm_eval_knows_the_name(monkeypatch):
    import lm_eval.__main__
    from lm_eval.api.registry import model_registry

    from itt_composer.evaluation import lm_eval_command

    monkeypatch.setattr(model_registry, '_objs', {k: v for k, v in model_registry._objs.items() if k != 'itt'})
    found = []
    monkeypatch.setattr(lm_eval.__main__, 'cli_evaluate', lambda: found.append(get_model('itt')))
    lm_eval_command.main()
    assert found == [ITTLM]


def test_a_mistake_on_lm_evals_command_line_is_one_line(monkeypatch, exported):
    from lm_eval.api.registry import model_registry

    from itt_composer.evaluation import lm_eval_command

    monkeypatch.setattr(model_registry, '_objs', {k: v for k, v in model_registry._objs.items() if k != 'itt'})
    words = ['itt-lm-eval', '--model', 'itt', '--model_args', f'pretrained={exported / "itt"}', '--tasks', 'piqqa']
    monkeypatch.setattr('sys.argv', words)
    # Its own list is of thousands of files.
    monkeypatch.setattr('lm_eval.tasks.TaskManager', partial(TaskManager, include_defaults=False))
    with pytest.raises(SystemExit) as stop:
        lm_eval_command.main()
    assert str(stop.value).startswith('itt-lm-eval: Tasks not found') and 'piqqa' in str(stop.value)
