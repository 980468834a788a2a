"""Figure 5: mean accuracy of Table 1's tasks against steps, for each size; the paper's and that of ``itt eval``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from itt_composer.analysis.figure_style import line_style, tidy
from itt_composer.evaluation.table1 import paper_average
from itt_composer.paper.tables import paper_rows
from itt_composer.paper.tasks import paper_tasks
from itt_composer.ratios import parse_ratios

PAPER, HERE = 'paper, 50 B tokens (Table 1)', 'here'
DENSE = 'dense'
STEPPING = ('Loop', 'ITT')
FAMILIES = {'none': DENSE, 'llama': DENSE, 'loop': 'Loop', 'itt': 'ITT', 'residual_scale': 'residual scaling'}
"""Option ``thinking``, or the start of the name of a row of Table 1, to the name of a line."""
NEEDED = ('thinking', 'dense_parameters', 'token_ratios', 'selection', 'limit', 'average')


@dataclass(frozen=True)
class Point:
    """One model's mean accuracy in percent."""

    source: str
    family: str
    size: str
    steps: int
    """With the base pass."""
    average: float
    error: float | None
    selection: str
    tasks: int
    """Number of tasks in the mean."""

    @property
    def place(self) -> str:
        """Where it is in the figure."""
        return f'{self.family}, {self.size}, {self.steps} steps'


def table(scores: Path | None) -> pd.DataFrame:
    """Return one row per model, with the fields of :class:`Point`: the models in ``scores``, and the paper's 18.

    Args:
        scores: a folder with a folder per model, in which ``itt eval --out`` wrote ``table1.csv``. The paper's means
            are then over the tasks that were scored here.

    Raises:
        ValueError: no results, or results that do not belong in one figure.
    """
    files = sorted(scores.glob('*/table1.csv')) if scores else []
    if scores and not files:
        raise ValueError(f'{scores}: no */table1.csv; score each model with itt eval --out {scores}/<model>')
    tasks = [task.column for task in paper_tasks()]
    places: dict[str, Path] = {}
    points: list[Point] = []
    for file in files:
        point, scored = _read(file)
        tasks = tasks if points else scored
        if scored != tasks:
            raise ValueError(f'{file}: expected the tasks of {files[0]}, {", ".join(tasks)}, got {", ".join(scored)}')
        if point.place in places:
            raise ValueError(f'{file}: {point.place}, as {places[point.place]}; remove one of them from {scores}')
        places[point.place] = file
        points.append(point)
    return pd.DataFrame([*points, *_paper(tasks)])


def _read(file: Path) -> tuple[Point, list[str]]:
    """Return the result in a ``table1.csv``, and the columns of the tasks that were scored."""
    rows = pd.read_csv(file, dtype=str, keep_default_na=False).set_index('row')
    columns = [task.column for task in paper_tasks()]
    if missing := {*NEEDED, *columns} - set(rows.columns):
        raise ValueError(f'{file}: no column {", ".join(sorted(missing))}; run itt eval again')
    mean, error = rows.loc['mean'], rows.loc['standard_error'].average
    if mean.limit != 'none':
        raise ValueError(f'{file}: limit: expected none, got {mean.limit}; score all documents, without --limit')
    scored = [column for column in columns if mean[column] != 'absent']
    ratios = parse_ratios(mean.token_ratios) if mean.token_ratios else []
    millions = int(mean.dense_parameters) / 1e6
    return Point(
        source=HERE,
        family=FAMILIES[mean.thinking],
        size=f'{millions:.0f}M' if millions >= 100 else f'{millions:.3g}M',
        steps=1 + sum(ratio > 0 for ratio in ratios),
        average=float(mean.average),
        error=None if error == 'absent' else float(error),
        selection=mean.selection,
        tasks=len(scored),
    ), scored


def _paper(tasks: list[str]) -> Iterator[Point]:
    for name in paper_rows():
        family, *passes, size = name.split('_')
        steps = int(passes[0].removeprefix('x')) if passes else 1
        average = paper_average(name, tasks)
        yield Point(PAPER, FAMILIES[family], size.upper(), steps, average, None, 'not stated', len(tasks))


def plot(table: pd.DataFrame) -> Figure:
    """Plot Figure 5 from the result of :func:`table`: a panel per source, a line per size and family."""
    sources = table.source.unique()
    figure = Figure(figsize=(5.6 * len(sources), 3.6), dpi=140, layout='constrained')
    for axis, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        shown = table[table.source == source]
        for i, ((size, family), line) in enumerate(shown.groupby(['size', 'family'], sort=False)):
            of_size = shown[shown['size'] == size]
            if family in STEPPING:  # its line starts at the dense baseline
                line = of_size[of_size.family.isin([DENSE, family])].sort_values('steps')
            elif family == DENSE and of_size.family.isin(STEPPING).any():
                continue
            axis.errorbar(line.steps, line.average, line.error.astype(float).fillna(0), label=f'{family}, {size}',
                          markersize=5, capsize=3, linewidth=1.2, **line_style(i))  # fmt: skip
        axis.set_title(source, fontsize=9)
        axis.set_xlabel('steps including the base pass', fontsize=9)
        axis.set_ylabel(f'mean accuracy of {shown.tasks.iloc[0]} tasks, %', fontsize=9)
        axis.set_xticks(sorted(shown.steps.unique()))
        axis.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
        tidy(axis, 'both')
    return figure
