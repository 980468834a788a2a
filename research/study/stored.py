"""Stored results of runs, so that a long study can continue on another machine.

A study's ``results.csv`` and ``manifest.json`` are small and are stored with the source; checkpoints are not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from itt_composer.checks import read_json
from itt_composer.config.finetuning import example_sets, examples_file, is_finetuning
from itt_composer.config.run_file import resolve
from research.study.results import MANIFEST, RESULTS, read_table
from research.study.settings import compare_configs
from research.study.study_file import Run

# Name and places of a run, not what it trains.
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
            ValueError: one of them is missing, or is something else.
        """
        table, manifest = read_table(path / RESULTS), path / MANIFEST
        content = read_json(manifest)
        if content is None:
            raise ValueError(f'{manifest}: missing; it has the configs of the runs in {RESULTS}')
        missing = [key for key in ('study', 'data', 'environments', 'runs') if key not in content]
        if missing:
            raise ValueError(f'{manifest}: no {missing[0]}; this is not the manifest of a study')
        return cls(path, table, content)

    def name_of(self, run: Run, config: DictConfig) -> str | None:
        """Return the name here of the run with the same training; None where there is none.

        Args:
            run: a run of another study.
            config: of ``run``, as ``run_file.resolve`` returns it.
        """
        names = [name for name, known in self.runs.items() if f'seed={run.seed}' in known['overrides']]
        # Its own name first, where two runs have the same training.
        names.sort(key=lambda name: name != run.name)
        return next((name for name in names if self._difference(name, run, config) is None), None)

    def check_name(self, study: str, run: Run, config: DictConfig) -> None:
        """Refuse results of the same study with the run's name and another training.

        Raises:
            ValueError: they have another training config, other overrides or other data.
        """
        if self.manifest['study'] != study or run.name not in self.runs:
            return
        if difference := self._difference(run.name, run, config):
            raise ValueError(f'{self.path}: its run of this name has {difference}')

    def rows(self, name: str) -> pd.DataFrame:
        """Return the run's rows of ``results.csv``."""
        return self.table[self.table.run == name]

    def more_rows(self, file: str, name: str) -> pd.DataFrame:
        """Return the run's rows of another table beside ``results.csv``; empty where there are none."""
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
        """Return the machine and the versions of the run."""
        entries = (entry['environment'] for entry in self.manifest['environments'] if name in entry['runs'])
        return next(entries, None)

    def _difference(self, name: str, run: Run, config: DictConfig) -> str | None:
        """Return what differs in the run of that name, apart from its name and places; None where nothing does."""
        known = self.runs[name]
        if known['run_file'] != run.run_file.name:
            return f'another training config: {known["run_file"]} there, {run.run_file.name} here'
        there, here = ((data or {}).get('content_sha256') for data in (self.manifest['data'], data_of(config)))
        if there != here:
            return f'other data: {there} there, {here} here'
        settings = [override for override in known['overrides'] if not override.startswith(OF_THE_RUN)]
        try:
            resolved = _resolved(run.run_file, str(config.variables.data), tuple(settings))
        except ValueError as error:
            return f'overrides that are no longer valid: {error}'
        own = [override for override in run.overrides if not override.startswith(OF_THE_RUN)]
        difference = compare_configs(resolved, _resolved(run.run_file, str(config.variables.data), tuple(own)))
        return difference and f'another config: {difference}'


@cache
def _resolved(run_file: Path, data: str, settings: tuple[str, ...]) -> DictConfig:
    """Return the config of a run with its name and places replaced."""
    return resolve(run_file, [*settings, 'run_name=run', 'variables.runs=runs', f'variables.data={data}'])


def data_of(config: DictConfig) -> dict[str, Any] | None:
    """Return the identity of a run's data, without paths; None where they have no manifest and are no examples."""
    if is_finetuning(config):
        content = b''.join(examples_file(dataset).read_bytes() for _, dataset in example_sets(config))
        return {'content_sha256': hashlib.sha256(content).hexdigest()}
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
