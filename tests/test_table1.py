"""Table 1 on paper: its rows and columns, and how the scores of one model or several become a row."""

from pathlib import Path
from statistics import mean

import pytest
import yaml
from conftest import REPO
from transformers import GPT2Config

from itt_composer.evaluation.score import examples_scored, folder_name
from itt_composer.evaluation.table1 import Scores, paper_average, paper_row, summarise, write_row
from itt_composer.model import ITTConfig
from itt_composer.paper.tables import paper_rows, paper_tables
from itt_composer.paper.tasks import GROUP, paper_tasks
from research.figures import accuracy


def test_the_group_is_the_papers():
    tables = paper_tables()
    group = yaml.safe_load((REPO / 'yamls' / 'eval' / 'lm_eval' / f'{GROUP}.yaml').read_text())
    members = [(item.get('task') or item['group'], item['num_fewshot']) for item in group['task']]
    assert members == [(task.name, task.shots) for task in paper_tasks()] and group['group'] == GROUP
    assert [task.column for task in paper_tasks()] == tables['table1']['columns'][2:-1]
    # The averages that the paper prints are up to 0.14 from those of its ten accuracies.
    for row in paper_rows().values():
        assert mean(row[task.column] for task in paper_tasks()) == pytest.approx(row['average'], abs=0.141)


def test_summary_of_one_model_and_of_three():
    def scores(*accuracies):
        tasks = {'piqa': {'acc,none': accuracies[0], 'acc_stderr,none': 0.03}}
        tasks['sciq'] = {'acc,none': accuracies[1], 'acc_stderr,none': 0.04}
        return Scores('m', {}, 'threshold', [0.5], tasks)

    one = summarise([scores(0.5, 0.7)])
    assert (one['piqa'].mean, one['piqa'].error, one['mmlu'].mean) == (50, 3, None)
    assert (one['average'].mean, one['average'].error) == (60, pytest.approx(2.5))
    three = summarise([scores(0.5, 0.7), scores(0.6, 0.6), scores(0.7, 0.5)])
    assert (three['sciq'].mean, three['sciq'].error) == (pytest.approx(60), pytest.approx(10 / 3**0.5))
    assert (three['average'].mean, three['average'].error) == (pytest.approx(60), pytest.approx(0, abs=1e-9))
    assert paper_average('itt_x4_162m', ['sciq', 'piqa']) == pytest.approx((72.4 + 63.9) / 2)


def test_the_papers_row_is_found():
    def config(**keys):
        return {'hidden_size': 1024, **keys}

    assert paper_row(config()) == 'llama_162m'
    assert paper_row(config(hidden_size=2048, thinking='itt', thinking_steps=3)) == 'itt_x4_466m'
    assert paper_row(config(hidden_size=7, thinking='loop', thinking_steps=2)) == 'loop_x3_162m'
    assert paper_row(config(thinking='loop', thinking_steps=1)) == 'loop_x3_162m'
    assert paper_row(config(thinking='itt', thinking_steps=4)) == 'itt_x4_162m'
    assert paper_row(GPT2Config().to_dict()) == 'llama_162m'
    assert paper_row(config(hidden_size=2048, thinking='residual_scale', thinking_steps=0)) == 'llama_466m'


def test_a_trial_has_a_folder_of_its_own():
    model = Path('exported/itt')
    names = [
        folder_name([model], None, None, None),
        folder_name([model, Path('b')], None, None, None),
        folder_name([model], '0.5/0/0', 'top_k', 4),
    ]
    assert names == ['exported-itt', 'exported-itt_and_1_more', 'exported-itt_0.5-0-0_top_k_limit_4']


def test_tasks_whose_examples_are_scored_too():
    configs = {
        'boolq': {'num_fewshot': 32, 'test_split': 'test', 'fewshot_split': 'test'},
        'piqa': {'num_fewshot': 0, 'test_split': 'test', 'fewshot_split': 'test'},
        'mmlu_anatomy': {'num_fewshot': 5, 'test_split': 'test', 'fewshot_split': 'dev'},
        'winogrande': {'num_fewshot': 5, 'training_split': 'train', 'validation_split': 'validation'},
    }
    assert examples_scored(configs) == ('boolq',)
    assert examples_scored({'mmlu_law': {**configs['mmlu_anatomy'], 'fewshot_split': 'test'}}) == ('mmlu',)


def scored(folder, name, config, accuracies, tasks=None, limit=None, ratios=(0.5, 0.5, 0)):
    """A model's ``table1.csv``, as ``itt eval`` writes it: the same accuracy in each task."""
    ratios = list(ratios) if config['thinking'] == 'itt' else []
    scores = [
        Scores(name, config, 'threshold' if ratios else None, ratios, limit=limit,
               tasks={task: {'acc,none': value, 'acc_stderr,none': 0.01} for task in tasks or ALL})
        for value in accuracies
    ]  # fmt: skip
    write_row(scores, paper_row(config), folder / name / 'table1.csv')


ALL = [task.name for task in paper_tasks()]
SHAPE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=96)
DENSE, ITT = (ITTConfig(**SHAPE, thinking=thinking).to_dict() for thinking in ('none', 'itt'))


def test_figure_5_has_the_mean_over_seeds_for_each_size_and_number_of_steps(tmp_path):
    scored(tmp_path, 'dense', DENSE, [0.4])
    scored(tmp_path, 'itt', ITT, [0.4, 0.5, 0.6])
    table = accuracy.table(tmp_path)
    here = table[table.source == accuracy.HERE].set_index('family')
    assert len(set(here['size'])) == 1, 'routers and step encodings do not count'
    assert (here.steps['dense'], here.steps['ITT']) == (1, 3), 'a ratio of 0 removes a step'
    assert (here.average['ITT'], here.error['ITT']) == (pytest.approx(50), pytest.approx(10 / 3**0.5, abs=1e-3))
    paper = table[table.source == accuracy.PAPER].set_index(['family', 'size', 'steps'])
    assert len(paper) == 18 and paper.average['ITT', '162M', 4] == 42.1 and paper.average['Loop', '466M', 3] == 43.5
    lines = {
        axis.get_title(): {bar.get_label(): bar.lines[0].get_xydata().tolist() for bar in axis.containers}
        for axis in accuracy.plot(table).axes
    }
    size = here['size'].iloc[0]
    assert lines[accuracy.HERE][f'ITT, {size}'] == [[1, pytest.approx(40)], [3, pytest.approx(50)]]
    assert lines[accuracy.PAPER]['Loop, 230M'] == [[1, 41.8], [3, 42.3], [4, 42.2]]
    # Without some tasks here, the paper's mean is over the same tasks.
    scored(tmp_path / 'few', 'itt', ITT, [0.4], ['piqa', 'sciq'])
    assert accuracy.table(tmp_path / 'few').set_index(['family', 'size', 'steps']).average['ITT', '162M', 4] == (
        pytest.approx((72.4 + 63.9) / 2)
    )


def test_results_that_do_not_belong_in_one_figure(tmp_path):
    scored(tmp_path / 'limit', 'itt', ITT, [0.4], limit=5)
    for name, tasks in (('a', ALL), ('b', ALL[1:])):
        scored(tmp_path / 'tasks', name, ITT, [0.4], tasks, ratios=(0.5,) * 3 if name == 'a' else (0.5, 0, 0))
        scored(tmp_path / 'twice', name, ITT, [0.4])
    for folder, message in (
        ('limit', 'limit: expected none, got 5'),
        ('tasks', 'expected the tasks of .*a/table1.csv, sciq, piqa'),
        ('twice', 'ITT, .* 3 steps, as .*a/table1.csv; remove one'),
        ('nothing', 'score each model with itt eval --out'),
    ):
        with pytest.raises(ValueError, match=message):
            accuracy.table(tmp_path / folder)
