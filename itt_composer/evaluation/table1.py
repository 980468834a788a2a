"""A row of Table 1: scores of one model or several seeds of it, beside the paper's row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from itt_composer.atomic import write_text
from itt_composer.flops import Decoder, paper_flops, parameters
from itt_composer.paper.tables import paper_rows
from itt_composer.paper.tasks import METRIC, PaperTask, paper_tasks
from itt_composer.ratios import ratios_key

PAPER_SIZES = {1024: '162m', 1536: '230m', 2048: '466m'}


@dataclass
class Scores:
    """What one model scored, and how it was run."""

    model: str
    config: dict[str, Any]
    selection: str | None
    """None for a model without routers."""
    token_ratios: list[float]
    """As run; 0 for a removed step."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """lm-eval's results of each task that had data."""
    limit: int | None = None
    """Documents of each task, where not all were scored."""
    examples_scored: tuple[str, ...] = ()
    """Tasks whose few-shot examples are other scored documents, because there was no file of examples."""

    @property
    def tflops(self) -> float:
        """TFLOPs of a 4096-token forward pass with these ratios, the paper's count."""
        return paper_flops(Decoder.from_model_config(self.config), ratios=self.token_ratios) / 1e12

    def accuracy(self, task: PaperTask) -> float | None:
        """Return percent correct; None where the task's data is missing."""
        return _percent(self.tasks, task.name, METRIC)

    def standard_error(self, task: PaperTask) -> float | None:
        """Return the standard error of the accuracy over the documents, in percent."""
        return _percent(self.tasks, task.name, f'{METRIC}_stderr')


@dataclass
class Cell:
    """Mean and standard error in percent; both None where the task's data is missing."""

    mean: float | None
    error: float | None


def summarise(scores: list[Scores]) -> dict[str, Cell]:
    """Return the cell of each column, ``average`` last, which is over the tasks that have data.

    The standard error of several models is that of their mean; of a single one, lm-eval's, over the documents.
    """
    cells = {}
    for task in paper_tasks():
        values = [value for each in scores if (value := each.accuracy(task)) is not None]
        errors = [value for each in scores if (value := each.standard_error(task)) is not None]
        assert len(values) in (0, len(scores)), 'the same data for every model'
        cells[task.column] = _cell(values, errors)
    present = [cell for cell in cells.values() if cell.mean is not None]
    if len(scores) > 1:
        averages = [statistics.mean(v for task in paper_tasks() if (v := s.accuracy(task)) is not None) for s in scores]
        cells['average'] = _cell(averages, [])
    else:
        errors = [cell.error for cell in present if cell.error is not None]
        error = math.sqrt(sum(e**2 for e in errors)) / len(present) if len(errors) == len(present) else None
        cells['average'] = Cell(statistics.mean(cell.mean for cell in present if cell.mean is not None), error)
    return cells


def _cell(values: list[float], errors: list[float]) -> Cell:
    if not values:
        return Cell(None, None)
    if len(values) > 1:
        return Cell(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))
    return Cell(values[0], errors[0] if errors else None)


def _percent(tasks: dict[str, dict[str, Any]], task: str, metric: str) -> float | None:
    value = tasks.get(task, {}).get(f'{metric},none')
    return None if value is None or value == 'N/A' else 100 * float(value)


def paper_row(config: dict[str, Any]) -> str:
    """The row of Table 1 that is nearest to a model with ``config``; at a size that the paper has not, one of 162M."""
    size = PAPER_SIZES.get(config.get('hidden_size', 0), '162m')
    thinking = config.get('thinking', 'none')
    if thinking not in ('loop', 'itt'):
        return f'llama_{size}'
    of_family = [row for row in paper_rows() if row.startswith(f'{thinking}_x') and row.endswith(f'_{size}')]
    passes = config['thinking_steps'] + 1
    return min(of_family, key=lambda row: abs(int(row.removeprefix(f'{thinking}_x').split('_')[0]) - passes))


def paper_average(row: str, columns: Sequence[str]) -> float:
    """Return the mean of these of the paper's columns; of all ten, the average that it prints."""
    paper = paper_rows()[row]
    return paper['average'] if len(columns) == len(paper_tasks()) else statistics.mean(paper[c] for c in columns)


def _scored(cells: dict[str, Cell]) -> list[str]:
    return [task.column for task in paper_tasks() if cells[task.column].mean is not None]


def table(scores: list[Scores], row: str) -> Table:
    """Return the comparison, for the terminal."""
    cells, paper = summarise(scores), paper_rows()[row]
    errors = f'over {len(scores)} models' if len(scores) > 1 else 'over the documents'
    printed = Table('task', 'shots', 'accuracy, %', f"paper's {row}", title=describe(scores[0]))
    examples = ', '.join(scores[0].examples_scored)
    own = f'; few-shot examples of {examples} are other scored documents' if examples else ''
    printed.caption = f'± standard error {errors}{own}'
    for task in paper_tasks():
        printed.add_row(task.column, str(task.shots), _text(cells[task.column]), f'{paper[task.column]:.1f}')
    scored = _scored(cells)
    over = 'average' if len(scored) == len(paper_tasks()) else f'average of {len(scored)}'
    printed.add_row(over, '', _text(cells['average']), f'{paper_average(row, scored):.1f}')
    printed.add_row('TFLOPs', '', f'{scores[0].tflops:.3g}', f'{paper["flops"]:.2f}')
    return printed


def describe(scores: Scores) -> str:
    """Return the model, its selection and ratios, and the number of documents where not all were scored."""
    limit = '' if scores.limit is None else f'; only {scores.limit} documents of each task'
    if scores.selection is None:
        return f'{scores.model}: no routing{limit}'
    return f'{scores.model}: selection: {scores.selection}, token ratios {ratios_key(scores.token_ratios)}{limit}'


def _text(cell: Cell) -> str:
    if cell.mean is None:
        return 'absent'
    return f'{cell.mean:.1f}' if cell.error is None else f'{cell.mean:.1f} ± {cell.error:.1f}'


def write_row(scores: list[Scores], row: str, file: Path) -> None:
    """``table1.csv``: the mean over the models, its standard error, and the paper's row."""
    cells, paper, first = summarise(scores), paper_rows()[row], scores[0]
    columns = [task.column for task in paper_tasks()]
    head = {
        'model': ' '.join(each.model for each in scores),
        'thinking': first.config.get('thinking', 'none'),
        'dense_parameters': parameters(Decoder.from_model_config(first.config)).dense,
        'selection': first.selection or 'none',
        'token_ratios': ratios_key(first.token_ratios),
        'limit': 'none' if first.limit is None else first.limit,
        'models': len(scores),
        'flops': f'{first.tflops:.4g}',
    }
    means = {column: 'absent' if cell.mean is None else f'{cell.mean:.4f}' for column, cell in cells.items()}
    errors = {column: 'absent' if cell.error is None else f'{cell.error:.4f}' for column, cell in cells.items()}
    printed = {column: f'{paper[column]:.1f}' for column in columns}
    rows = [
        {'row': 'mean', **head, **means},
        {'row': 'standard_error', **head, **errors},
        {
            'row': f'paper_{row}',
            'flops': paper['flops'],
            **printed,
            'average': f'{paper_average(row, _scored(cells)):.4f}',
        },
    ]
    headers = ['row', *head, *columns, 'average']
    write_text(pd.DataFrame(rows, columns=headers, dtype=object).to_csv(index=False), file)


def write_scores(scores: list[Scores], file: Path) -> None:
    """``scores.csv``: every model, task and metric."""
    lines = []
    for each in scores:
        ratios = ratios_key(each.token_ratios)
        for task in paper_tasks():
            start = [each.model, each.selection or 'none', ratios, task.name, task.shots]
            results = each.tasks.get(task.name)
            metrics = {'data': 'absent'} if results is None else dict(results)
            if task.name in each.examples_scored:
                metrics['few_shot_examples'] = 'scored documents'
            for metric, value in metrics.items():
                if metric != 'alias':
                    lines.append([*start, metric.removesuffix(',none'), value])
    headers = ['model', 'selection', 'token_ratios', 'task', 'shots', 'metric', 'value']
    write_text(pd.DataFrame(lines, columns=headers, dtype=object).to_csv(index=False), file)
