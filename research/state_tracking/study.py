"""What the study compares, which runs that takes and in which order, and the tables of their results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from itt_composer.atomic import write_text

LOSSES, ELASTIC, ROUTING = 'losses.csv', 'elastic.csv', 'routing.csv'
KEYS = ['stage', 'variant', 'seed', 'learning_rate']
"""The columns that name a run, in each table."""


@dataclass(frozen=True)
class Run:
    """One training: ``stage`` is ``tuning`` or ``main``; without a learning rate it waits for the tuning."""

    stage: str
    variant: str
    seed: int
    learning_rate: float | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Its values of ``KEYS``."""
        return tuple(asdict(self).values())


class Study:
    """``study.yaml``, limited to some variants and seeds.

    Raises:
        ValueError: an unknown variant.
    """

    def __init__(self, variants: Sequence[str] = (), seeds: Sequence[int] = ()):
        self.settings = yaml.safe_load((Path(__file__).parent / 'study.yaml').read_text())
        self.options = {name: own for group in self.settings['groups'].values() for name, own in group.items()}
        unknown = [name for name in variants if name not in self.options]
        if unknown:
            raise ValueError(f'--variants: {unknown[0]} is not in the study; known are {", ".join(self.options)}')
        self.variants = [name for name in self.options if not variants or name in variants]
        self.seeds = list(seeds or self.settings['seeds'])

    def model_options(self, variant: str) -> dict[str, Any]:
        """Return the options of the variant's model."""
        return {**self.settings['model'], **self.options[variant]}

    def batches(self, stage: str) -> int:
        """Return the length of a run."""
        return self.settings['tuning' if stage == 'tuning' else 'training']['batches']

    def digest(self, variant: str) -> str:
        """Return a short hash of all settings that a run of the variant depends on, besides those that name it."""
        parts = [self.model_options(variant), *(self.settings[key] for key in ('training', 'evaluation'))]
        parts.append(self.settings['tuning']['batches'])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]

    def runs(self) -> Iterator[Run]:
        """Yield all runs in the order of the plan."""
        tuning = self.settings['tuning']
        for group in self.settings['groups'].values():
            names = [name for name in group if name in self.variants]
            for name in names:
                yield from (Run('tuning', name, tuning['seed'], rate) for rate in tuning['learning_rates'])
            for seed in self.seeds:
                yield from (Run('main', name, seed, None) for name in names)

    def next_run(self, losses: pd.DataFrame, running: Sequence[Run]) -> Run | None:
        """Return the first run that is neither finished nor running and whose learning rate is known."""
        taken = {*losses[KEYS].itertuples(index=False, name=None), *(run.key for run in running)}
        for run in self.runs():
            if run.stage == 'main':
                run = replace(run, learning_rate=self.best_learning_rate(losses, run.variant))
            if run.learning_rate is not None and run.key not in taken:
                return run
        return None

    def best_learning_rate(self, losses: pd.DataFrame, variant: str) -> float | None:
        """Return the learning rate with the lowest tuning loss; None before all of the grid is finished."""
        tuned = losses[(losses.stage == 'tuning') & (losses.variant == variant)]
        if set(tuned.learning_rate) != set(self.settings['tuning']['learning_rates']):
            return None
        return float(tuned.learning_rate[tuned.loss.idxmin()])


def read_tables(folder: Path, study: Study) -> dict[str, pd.DataFrame]:
    """Return the tables of the finished runs; empty ones where there are none.

    Raises:
        ValueError: some runs have other settings than the study.
    """
    tables = {}
    for name in (LOSSES, ELASTIC, ROUTING):
        file = folder / name
        tables[name] = pd.DataFrame(columns=[*KEYS, 'settings', 'loss'])
        if file.is_file():
            tables[name] = pd.read_csv(file, dtype={'settings': str})  # A digest can consist of digits.
    for variant, digest in tables[LOSSES][['variant', 'settings']].drop_duplicates().itertuples(index=False):
        if variant not in study.options or digest != study.digest(variant):
            raise ValueError(f'{folder / LOSSES}: runs of {variant} have other settings; name another folder')
    # The losses are written last: rows without them are of a run that did not finish.
    finished = pd.MultiIndex.from_frame(tables[LOSSES][KEYS])
    for name in (ELASTIC, ROUTING):
        tables[name] = tables[name][pd.MultiIndex.from_frame(tables[name][KEYS]).isin(finished)]
    return tables


def add_rows(tables: dict[str, pd.DataFrame], rows: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Add a finished run's rows to the tables and write them, the losses last."""
    for name in (ELASTIC, ROUTING, LOSSES):
        if rows[name]:
            new = pd.DataFrame(rows[name])
            tables[name] = pd.concat([tables[name], new], ignore_index=True) if len(tables[name]) else new
            write_text(tables[name].to_csv(index=False, float_format='%.5g'), folder / name)
