"""Results of runs that were trained elsewhere, so that a long study can go on on another machine.

A study's ``results.csv`` and ``manifest.json`` are small and can be kept with the source; its checkpoints cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from itt_composer.checks import read_json
from itt_composer.config.run_file import resolve
from research.study.results import MANIFEST, RESULTS, read_table
from research.study.settings import compare_configs
from research.study.study_file import Run

# They say what the run is called and where things lie, not what is trained.
OF_THE_RUN = ('run_name=', 'variables.runs=', 'variables.data=')


@dataclass(frozen=True)
class StoredResults:
    """The tables of a study's folder, or of ``research/results/<study>``."""

    path: Path
    table: pd.DataFrame
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> StoredResults:
        """Read ``results.csv`` and ``manifest.json`` of a folder.

        Raises:
            ValueError: one of them is not there, or is something else.
        """
        table, manifest = read_table(path / RESULTS), path / MANIFEST
        content = read_json(manifest)
        if content is None:
            raise ValueError(f'{manifest}: not there, so it is not known how the runs of {RESULTS} were trained')
        missing = [key for key in ('study', 'data', 'environments', 'runs') if key not in content]
        if missing:
            raise ValueError(f'{manifest}: no {missing[0]}; this is not the manifest of a study')
        return cls(path, table, content)

    def name_of(self, run: Run, config: DictConfig) -> str | None:
        """What the run that trained the same is called here; None where there is none.

        Args:
            run: of the study that asks.
            config: of ``run``, as ``run_file.resolve`` returns it.
        """
        names = [name for name, known in self.runs.items() if f'seed={run.seed}' in known['overrides']]
        # Its own name first: of two runs that trained the same it is the one that is meant.
        names.sort(key=lambda name: name != run.name)
        return next((name for name in names if self._difference(name, run, config) is None), None)

    def check_name(self, study: str, run: Run, config: DictConfig) -> None:
        """Refuse results of the same study that have the run's name and are of something else.

        In another study the name may well stand for another run.

        Raises:
            ValueError: they are of another run file, another config, or other data.
        """
        if self.manifest['study'] != study or run.name not in self.runs:
            return
        if difference := self._difference(run.name, run, config):
            raise ValueError(f'{self.path}: its run of this name has {difference}')

    def rows(self, name: str) -> pd.DataFrame:
        """The run's rows of ``results.csv``."""
        return self.table[self.table.run == name]

    def more_rows(self, file: str, name: str) -> pd.DataFrame:
        """The run's rows of another table beside ``results.csv``; empty where there are none."""
        if not (self.path / file).is_file():
            return pd.DataFrame()
        table = pd.read_csv(self.path / file)
        return table[table.run == name]

    @cached_property
    def runs(self) -> dict[str, Any]:
        """Name to ``run_file`` and ``overrides`` of the runs that have rows."""
        with_rows = set(self.table.run)
        return {name: known for name, known in self.manifest['runs'].items() if name in with_rows}

    def environment(self, name: str) -> dict[str, Any] | None:
        """On what the run ran, with which versions."""
        entries = (entry['environment'] for entry in self.manifest['environments'] if name in entry['runs'])
        return next(entries, None)

    def _difference(self, name: str, run: Run, config: DictConfig) -> str | None:
        """What is not the same in the run of that name, with a run's own name and places taken for granted."""
        known = self.runs[name]
        if known['run_file'] != run.run_file.name:
            return f'another run file: {known["run_file"]} there, {run.run_file.name} here'
        there = (self.manifest['data'] or {}).get('content_sha256')
        here = OmegaConf.select(config, 'variables.data_manifest.content_sha256')
        if there != here:
            return f'other data: {there} there, {here} here'
        settings = [override for override in known['overrides'] if not override.startswith(OF_THE_RUN)]
        try:
            resolved = _resolved(run.run_file, str(config.variables.data), tuple(settings))
        except ValueError as error:
            return f'overrides that do not hold any more: {error}'
        own = [override for override in run.overrides if not override.startswith(OF_THE_RUN)]
        difference = compare_configs(resolved, _resolved(run.run_file, str(config.variables.data), tuple(own)))
        return difference and f'another config: {difference}'


@cache
def _resolved(run_file: Path, data: str, settings: tuple[str, ...]) -> DictConfig:
    """What a run trains, whatever it is called and wherever it lies."""
    return resolve(run_file, [*settings, 'run_name=run', 'variables.runs=runs', f'variables.data={data}'])


def data_of(config: DictConfig) -> dict[str, Any] | None:
    """What a run's data were, without the paths of the machine that made them; None where they say nothing."""
    manifest = config.variables.get('data_manifest')
    if not manifest:
        return None
    return {
        'content_sha256': manifest.content_sha256,
        'settings': OmegaConf.to_container(manifest.settings),
        'tokenizer': {'sha256': manifest.tokenizer.sha256, 'vocab_size': manifest.tokenizer.vocab_size},
        'rows': {
            str(name): {split: domain[split].rows for split in ('train', 'validation')}
            for name, domain in manifest.domains.items()
        },
    }
